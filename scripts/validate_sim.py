"""Calibrate on some cells of ``validate-sim``, predict the others, and compare with what was measured.

    python scripts/validate_sim.py [FOLDER] [--json FILE] [--figure FILE]

Without FOLDER it first runs what is missing of the experiment (real vLLM; about three minutes on two cores). With it, the
runs in that folder are compared. Delete ``results/runs/validate-sim`` to measure anew.

Calibration cells are named in :data:`CALIBRATION`; no step of any other cell enters the profile. Each other cell is then
simulated with the very requests that were sent, and output tokens per second, TPOT p50 and TTFT p50 are compared. Exit
code 1 when a median error is above its limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.config.experiment import CellSpec, load_level, mean_length_tokens
from bench.errors import BenchError
from bench.records import RequestRecord, Schedule
from bench.runner.results import experiment_folder
from bench.runner.schedules import build_schedule
from bench.sim.calibrate import calibrate
from bench.sim.inputs import Fleet, Replica, SimInputs, SimResult, prepare
from bench.sim.profile import Profile, save_profile
from bench.sim.scheduler import SchedulerConfig
from bench.sim.step_time import build_step_time
from bench.store import RunReader, list_cells, list_runs

#: (load level, prompt tokens) of the cells that calibrate, offline batches and closed loops apart.
CALIBRATION = {("batch_size", 1, 128), ("batch_size", 4, 128), ("batch_size", 16, 128), ("batch_size", 4, 384), ("batch_size", 16, 384),
               ("concurrency", 2, 128), ("concurrency", 8, 128), ("concurrency", 8, 384)}  # fmt: skip
EXPERIMENT = Path(__file__).resolve().parents[1] / "configs" / "experiments" / "validate-sim.yaml"
METRICS = ("output_tokens_per_s", "tpot_p50_s", "ttft_p50_s")
LIMITS = {"output_tokens_per_s": 0.07, "tpot_p50_s": 0.10, "ttft_p50_s": 0.15}
TITLES = {"output_tokens_per_s": "output tokens/s", "tpot_p50_s": "TPOT p50", "ttft_p50_s": "TTFT p50"}


@dataclass(frozen=True)
class Compared:
    """One cell that was predicted: measured and predicted values, and whether the 90 % interval held."""

    name: str
    kind: str
    measured: dict[str, float]
    predicted: dict[str, float]
    covered: dict[str, bool]

    def error(self, metric: str) -> float:
        return self.predicted[metric] / self.measured[metric] - 1.0


def is_calibration(run: RunReader) -> bool:
    spec = CellSpec.model_validate(run.manifest["cell"])
    name, level = load_level(spec.load)
    return (name, int(level), int(mean_length_tokens(spec.workload.isl))) in CALIBRATION


def label(spec: CellSpec) -> str:
    """``batch size 8, 256/32``."""
    name, level = load_level(spec.load)
    lengths = f"{mean_length_tokens(spec.workload.isl):.0f}/{mean_length_tokens(spec.workload.osl):.0f}"
    return f"{name.removesuffix('_per_s').replace('_', ' ')} {level:g}, {lengths}"


def measured(records: list[RequestRecord]) -> dict[str, float]:
    """Rate over the counted requests, and medians over them; requests without an error alone."""
    ok = [r for r in records if r.phase == "measured" and r.error is None and r.first_token_s is not None]
    sent = np.array([r.sent_s for r in ok], dtype=float)
    first = np.array([r.first_token_s for r in ok], dtype=float)
    last = np.array([r.last_token_s for r in ok], dtype=float)
    return values(sent, first, last, np.array([r.osl for r in ok], dtype=float))


def values(sent: np.ndarray, first: np.ndarray, last: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    return {
        "output_tokens_per_s": float(tokens.sum() / (last.max() - sent.min())),
        "tpot_p50_s": float(np.median((last - first) / np.maximum(tokens - 1, 1))),
        "ttft_p50_s": float(np.median(first - sent)),
    }


def submit_interval_s(runs: list[RunReader]) -> float:
    """Seconds between two requests of one batch: the client hands them over one by one."""
    gaps = []
    for run in runs:
        sent = sorted(r.sent_s for r in run.iter_requests() if r.sent_s is not None and r.phase == "measured")
        gaps += [b - a for a, b in itertools.pairwise(sent) if b - a < 0.02]
    return float(np.median(gaps)) if gaps else 0.0


def scheduler_config(run: RunReader) -> SchedulerConfig:
    """The scheduler as the engine itself says it ran."""
    engine = run.manifest["engine"]
    args = engine["effective_args"]
    return SchedulerConfig(
        max_num_seqs=int(args["max_num_seqs"]), max_num_batched_tokens=int(args["max_num_batched_tokens"]),
        max_model_len=int(engine["max_model_len"]), num_blocks=int(engine["num_kv_blocks"]), block_size=int(engine["block_size"]),
        enable_prefix_caching=False, async_scheduling=bool(args.get("async_scheduling")),
    )  # fmt: skip


def with_hand_over(inputs: SimInputs, interval_s: float) -> SimInputs:
    """Offline batches whose requests are handed over ``interval_s`` after one another."""
    due = inputs.due_s.copy()
    for group in range(inputs.num_groups):
        members = np.flatnonzero(inputs.group == group)
        due[members] = interval_s * np.arange(len(members))
    return dataclasses.replace(inputs, due_s=due)


def predict(
    run: RunReader,
    profile: Profile,
    interval_s: float,
    simulate: Callable[[SimInputs], SimResult],
    num_engines: int = 1,
) -> Compared:
    """Simulate the requests of ``run``, on so many data-parallel engines of the profile, and compare."""
    spec = CellSpec.model_validate(run.manifest["cell"])
    records = run.requests()
    model, hardware = load_model(spec.model), load_hardware(profile.layout.hardware)
    step_time = build_step_time(model, hardware, max_num_seqs=64, enforce_eager=True, profile=profile)
    before, after = step_time.request_overhead_s()
    engine = Replica(scheduler_config(run), step_time.coefficients())
    fleet = Fleet((engine,) * num_engines, "least_loaded", request_before_s=before, request_after_s=after)
    whole = build_schedule(spec, seed=int(run.manifest["seed"]), vocab_size=model.vocab_size, base=None)
    done = {r.index for r in records}
    kept = [i for i, r in enumerate(whole.requests) if r.index in done]
    schedule = Schedule(
        whole.kind, tuple(whole.requests[i] for i in kept), None if whole.due_s is None else whole.due_s[kept],
        whole.max_in_flight, seed=whole.seed,
    )  # fmt: skip
    inputs = prepare(schedule, fleet, record_tokens=False)
    if whole.kind == "offline":
        inputs = with_hand_over(inputs, interval_s)
    result = simulate(inputs)
    counted = np.array([r.phase == "measured" for r in schedule.requests]) & np.isfinite(result.last_token_s)
    found = values(
        result.sent_s[counted], result.first_token_s[counted] + after, result.last_token_s[counted] + after,
        result.num_output_tokens[counted].astype(float),
    )  # fmt: skip
    truth = measured(records)
    covered = {}
    for metric in METRICS:
        interval = step_time.interval(metric)
        if interval is not None:
            covered[metric] = interval.low_ratio <= truth[metric] / found[metric] <= interval.high_ratio
    return Compared(label(spec), whole.kind, truth, found, covered)


def table(compared: list[Compared]) -> list[str]:
    lines = [f"{'cell (never calibrated on)':32s} " + " ".join(f"{TITLES[m]:>30s}" for m in METRICS)]
    for c in compared:
        cells = []
        for m in METRICS:
            factor, unit = (1.0, "") if m == "output_tokens_per_s" else (1e3, " ms")
            cells.append(f"{c.measured[m] * factor:9.4g} {c.predicted[m] * factor:9.4g}{unit:3s} {c.error(m):+7.1%}")
        lines.append(f"{c.name:32s} " + " ".join(f"{x:>30s}" for x in cells))
    return lines


def medians(compared: list[Compared]) -> dict[str, float]:
    return {m: float(np.median([abs(c.error(m)) for c in compared])) for m in METRICS}


def figure(compared: list[Compared], path: Path) -> None:
    """Predicted against measured, one panel a metric."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(12, 4.2))
    for ax, metric in zip(axes, METRICS, strict=True):
        factor = 1.0 if metric == "output_tokens_per_s" else 1e3
        for kind, marker in (("offline", "o"), ("closed_loop", "s"), ("open_loop", "^")):
            members = [c for c in compared if c.kind == kind]
            x = [c.measured[metric] * factor for c in members]
            ax.scatter(
                x, [c.predicted[metric] * factor for c in members], marker=marker, label=kind.replace("_", " "), s=36
            )
        low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
        low = max(low, 0)
        limit = LIMITS[metric]
        line = np.array([low, high])
        ax.plot(line, line, color="0.4", lw=1)
        ax.fill_between(line, line * (1 - limit), line * (1 + limit), color="0.85", zorder=0, label=f"±{limit:.0%}")
        ax.set(xlim=(low, high), ylim=(low, high), xlabel="measured", ylabel="predicted (simulated)")
        error = np.median([abs(c.error(metric)) for c in compared])
        ax.set_title(f"{TITLES[metric]}{'' if factor == 1 else ', ms'}: median error {error:.1%}", fontsize=10)
        ax.legend(fontsize=8)
    fig.suptitle("Predicted after calibration, never run before the prediction: vLLM on a CPU, tiny Llama", fontsize=11)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare predictions after calibration with measurements.")
    parser.add_argument("folder", type=Path, nargs="?", help="runs of the experiment; default: run it here")
    parser.add_argument("--profiles", type=Path, default=Path("results/profiles"))
    parser.add_argument("--json", type=Path, help="write the comparison here")
    parser.add_argument("--figure", type=Path, help="write the picture here (PNG)")
    arguments = parser.parse_args()
    try:
        if arguments.folder is None:
            arguments.folder = measure()
        return compare(arguments)
    except BenchError as e:
        print(f"validate_sim: {e}", file=sys.stderr)
        return e.exit_code


def measure() -> Path:
    """Run what is missing of the experiment and return its folder. Raises BenchError when some of it failed."""
    folder = experiment_folder("validate-sim")
    command = [sys.executable, "-m", "bench", "run", str(EXPERIMENT), "--plain", "--no-report"]
    if subprocess.run(command, check=False).returncode:
        raise BenchError("the experiment did not complete", where=str(folder), next_step="see its messages above")
    return folder


def compare(arguments: argparse.Namespace) -> int:
    from bench.sim.compiled import simulate

    runs = [r for cell in list_cells(arguments.folder) for r in list_runs(cell) if r.status == "complete"]
    known, unknown = [r for r in runs if is_calibration(r)], [r for r in runs if not is_calibration(r)]
    if not known or not unknown:
        raise BenchError(
            f"{len(known)} runs to calibrate on and {len(unknown)} to predict in {arguments.folder}",
            next_step="run the experiment first",
        )
    compared: list[Compared] = []
    profiles: dict[str, Any] = {}
    for front, kinds in (("offline", ("offline",)), ("server", ("closed_loop", "open_loop"))):
        mine = [r for r in known if (r.manifest["schedule"]["kind"] == "offline") == (front == "offline")]
        others = [r for r in unknown if r.manifest["schedule"]["kind"] in kinds]
        if not mine or not others:
            continue
        profile = calibrate(mine, f"validate-sim-{front}")
        save_profile(profile, arguments.profiles)
        profiles[front] = dataclasses.asdict(profile)
        print(
            f"{front}: {profile.num_steps} steps of {len(mine)} runs, cross-validated step error {profile.errors['step_median_ape']:.1%}"
        )
        interval_s = submit_interval_s(mine) if front == "offline" else 0.0
        compared += [predict(r, profile, interval_s, simulate) for r in others]
    print("\n".join(["", *table(compared), ""]))
    found = medians(compared)
    for metric, value in found.items():
        covered = [c.covered[metric] for c in compared if metric in c.covered]
        print(
            f"{TITLES[metric]:16s} median error {value:.1%} (limit {LIMITS[metric]:.0%}), inside the 90 % interval {np.mean(covered):.0%}"
        )
    if arguments.json:
        data = {
            "cells": [dataclasses.asdict(c) for c in compared],
            "medians": found,
            "limits": LIMITS,
            "profiles": profiles,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(data, indent=1, default=float) + "\n", encoding="utf-8")
    if arguments.figure:
        figure(compared, arguments.figure)
    return int(any(found[m] > LIMITS[m] for m in METRICS))


if __name__ == "__main__":
    sys.exit(main())
