"""Calibrate on one engine alone, predict two of them behind vLLM's own router, and compare with what was measured.

    python -m scripts.validate_fleet [--json FILE]

Runs what is missing of two experiments (real vLLM on a CPU with two cores or more; about five minutes):
``validate-fleet-one``, an engine that has core 0 to itself and its front end, and ``validate-fleet-two``, the same engine
twice (``data_parallel_size: 2``), each bound to a core of its own. No run of the second enters a profile. Cores of one host
may slow each other down, and the simulator knows nothing of it: so ``validate-fleet-one`` is run once alone and once beside a
second copy of itself on core 1, and the fleet is predicted from either.

Nothing is judged: this is the one comparison of a simulated fleet with a real one that needs no GPU, and the errors are what
they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.errors import BenchError, EngineUnavailable
from bench.runner.results import experiment_folder
from bench.sim.calibrate import calibrate
from bench.store import RunReader, list_cells, list_runs
from scripts.validate_sim import METRICS, TITLES, medians, predict, table

EXPERIMENTS = Path(__file__).resolve().parents[1] / "configs" / "experiments"
ONE, TWO = "validate-fleet-one", "validate-fleet-two"
NUM_ENGINES = 2
#: Results of the engine that is measured beside another one, and of that other one.
BESIDE, NEIGHBOUR = Path(".perf/validate-fleet/beside"), Path(".perf/validate-fleet/neighbour")


def command(name: str, cores: str, results: Path | None = None) -> list[str]:
    line = ["taskset", "-c", cores, sys.executable, "-m", "bench", "run", str(EXPERIMENTS / f"{name}.yaml")]
    return [*line, "--plain", "--no-report", *(["--results", str(results)] if results else [])]


def environment(binding: str) -> dict[str, str]:
    """OpenMP threads of the engines on the cores of ``binding``, one engine's cores after another's, apart by ``|``."""
    return {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_CPU_KVCACHE_SPACE": "1"}


def measure() -> None:
    """Run what is missing of all three. Raises BenchError when some of it failed."""
    codes = [subprocess.run(command(ONE, "0"), check=False, env=environment("0")).returncode]
    if len(complete(ONE, BESIDE)) < len(complete(ONE)):
        with subprocess.Popen(
            command(ONE, "1", NEIGHBOUR), env=environment("1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as neighbour:
            codes.append(subprocess.run(command(ONE, "0", BESIDE), check=False, env=environment("0")).returncode)
            codes.append(neighbour.wait())
    codes.append(subprocess.run(command(TWO, "0,1"), check=False, env=environment("0|1")).returncode)
    if any(codes):
        raise BenchError("an experiment did not complete", where=f"{ONE}, {TWO}", next_step="see its messages above")


def complete(name: str, results: Path | None = None) -> list[RunReader]:
    folder = experiment_folder(name, results / "runs" if results else None)
    return (
        [r for cell in list_cells(folder) for r in list_runs(cell) if r.status == "complete"] if folder.exists() else []
    )


def compare(json_file: Path | None) -> None:
    from bench.sim.compiled import simulate

    data = {}
    for name, runs in (("alone", complete(ONE)), ("beside a busy engine", complete(ONE, BESIDE))):
        profile = calibrate(runs, f"{ONE} {name}")
        error = profile.errors["step_median_ape"]
        print(f"\ncalibrated on one engine {name}: {profile.num_steps} steps, cross-validated step error {error:.1%}\n")
        compared = [predict(r, profile, 0.0, simulate, NUM_ENGINES) for r in complete(TWO)]
        print("\n".join([*table(compared), ""]))
        for metric, value in medians(compared).items():
            covered = [c.covered[metric] for c in compared if metric in c.covered]
            print(
                f"{TITLES[metric]:16s} median error {value:.1%}, inside the 90 % interval {sum(covered)} of {len(covered)}"
            )
        data[name] = {
            "cells": [dataclasses.asdict(c) for c in compared],
            "medians": {m: medians(compared)[m] for m in METRICS},
            "profile": dataclasses.asdict(profile),
        }
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=1, default=float) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a simulated fleet of two engines with a real one.")
    parser.add_argument("--json", type=Path, help="write the comparison here")
    arguments = parser.parse_args()
    try:
        if (os.cpu_count() or 1) < NUM_ENGINES or shutil.which("taskset") is None:
            raise EngineUnavailable(f"needs {NUM_ENGINES} cores and taskset (util-linux)")
        measure()
        compare(arguments.json)
    except BenchError as e:
        print(f"validate_fleet: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
