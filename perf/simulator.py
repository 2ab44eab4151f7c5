"""How fast is the simulator? One core, warm machine code.

    python -m perf.simulator [--out FILE] [--quick]

1. Requests per wall second: batches of 1,000 requests, 1,024/1,024 drawn from 80-100 %, concurrency 256, Llama 3.1 8B on an
   H100; arrays prepared and steps simulated, with and without prefix caching. Target 20,000; Vidur reaches 70 to 180.
2. Growth: 4,000 to 32,000 requests in the same closed loop. In the first wave requests start and end together, so a short run
   has fewer steps with prompt work (which cost most) and is cheaper per step. What must not grow is the cost of each *further*
   step: the time that twice the requests add, over the steps that they add.
3. A search over 1,000 configurations or more. Target 60 s.
Also: the readable Python loop on the same input, and the time to load the compiled code from disk in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.catalog.slo import load_slo
from bench.load import schedule as build
from bench.records import Request
from bench.sim import compiled, loop
from bench.sim.inputs import prepare
from bench.sim.search import search
from bench.sim.search_space import Demand, Space
from bench.sim.setup import EngineSetup, engine_setup
from bench.sim.step_time_kernel import step_time_s

TARGET_REQUESTS_PER_S, TARGET_SEARCH_S = 20_000, 60.0


def requests_of(count: int, isl: int, osl: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(int(0.8 * n), n + 1, count).tolist() for n in (isl, osl)]
    return [Request(i, osl=o, isl=p) for i, (p, o) in enumerate(zip(*lengths, strict=True))]


def engine(caching: bool) -> EngineSetup:
    args = {"max_model_len": 2048, "enable_prefix_caching": caching}
    return engine_setup(load_model("llama-3.1-8b"), load_hardware("H100-SXM"), args)


def batch_rate(caching: bool, repeats: int) -> dict[str, Any]:
    """Requests per wall second, arrays included."""
    fleet = engine(caching).fleet()
    rates, steps = [], 0
    for seed in range(repeats):
        schedule = build.closed_loop(requests_of(1000, 1024, 1024, seed), 256)
        begin = time.perf_counter()
        result = compiled.simulate(prepare(schedule, fleet))
        rates.append(1000 / (time.perf_counter() - begin))
        steps = len(result.steps["end_s"])
    return {
        "prefix_caching": caching, "requests_per_s_median": statistics.median(rates), "requests_per_s_low": min(rates),
        "requests_per_s_high": max(rates), "steps": steps, "num_runs": repeats,
    }  # fmt: skip


def growth(repeats: int) -> list[dict[str, float]]:
    """Wall time against the number of steps, in all and of those that each doubling of the requests adds."""
    fleet = engine(True).fleet()
    rows: list[dict[str, float]] = []
    for count in (4_000, 8_000, 16_000, 32_000):
        inputs = prepare(build.closed_loop(requests_of(count, 1024, 1024), 256), fleet)
        wall_s = min(_timed(lambda x=inputs: compiled.simulate(x)) for _ in range(repeats))  # type: ignore[misc]
        taken = compiled.simulate(inputs).steps
        steps, with_prompts = len(taken["end_s"]), int((taken["prefill_requests"] > 0).sum())
        before = rows[-1] if rows else {"wall_s": 0.0, "steps": 0, "with_prompts": 0}
        added = steps - before["steps"]
        rows.append(
            {
                "requests": count, "steps": steps, "with_prompts": with_prompts, "wall_s": wall_s,
                "us_per_step": wall_s / steps * 1e6, "us_per_added_step": (wall_s - before["wall_s"]) / added * 1e6,
                "added_with_prompts_ratio": (with_prompts - before["with_prompts"]) / added,
            }
        )  # fmt: skip
    return rows


def _timed(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def python_loop() -> dict[str, float]:
    """The readable loop on a smaller batch, and the compiled one on the same."""
    inputs = prepare(build.closed_loop(requests_of(200, 1024, 256), 64), engine(True).fleet())
    return {
        "readable_s": _timed(lambda: loop.simulate(inputs, step_time_s)),
        "compiled_s": _timed(lambda: compiled.simulate(inputs)),
    }


def thousand() -> dict[str, float]:
    """A search over at least a thousand configurations."""
    space = Space(
        (load_hardware("H100-SXM"), load_hardware("A100-80-SXM"), load_hardware("H200-SXM")),
        quantization=(None, "fp8"),
        max_num_seqs=(None, 256, 128),
        max_num_batched_tokens=(None, 2048),
    )
    slo = load_slo("ttft p99 <= 1 s and tpot p99 <= 50 ms")
    begin = time.perf_counter()
    found = search(load_model("llama-3.1-8b"), space, Demand(1024, 256), compiled.simulate, slo=slo)
    return {"configurations": len(found.points), "wall_s": time.perf_counter() - begin}


def cold_start() -> float:
    """Seconds of a fresh process until a small simulation is done, with the machine code on disk."""
    code = "from perf.simulator import *; compiled.simulate(prepare(build.closed_loop(requests_of(8, 64, 8), 4), engine(True).fleet()))"
    return _timed(lambda: subprocess.run([sys.executable, "-c", code], check=True, env=os.environ))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no search")
    options = parser.parse_args()
    compiled.simulate(prepare(build.closed_loop(requests_of(8, 64, 8), 4), engine(True).fleet()))
    repeats = 3 if options.quick else 9
    results: dict[str, Any] = {
        "batches": [batch_rate(caching, repeats) for caching in (False, True)],
        "growth": growth(2 if options.quick else 3),
        "python": python_loop(),
        "cold_start_s": cold_start(),
    }
    if not options.quick:
        results["search"] = thousand()
    for row in results["batches"]:
        verdict = "meets" if row["requests_per_s_median"] >= TARGET_REQUESTS_PER_S else "MISSES"
        print(
            f"1,000 requests 1k/1k at 256, prefix caching {'on' if row['prefix_caching'] else 'off'}: "
            f"{row['requests_per_s_median']:,.0f} requests/s (of {row['num_runs']}: {row['requests_per_s_low']:,.0f} to "
            f"{row['requests_per_s_high']:,.0f}); {verdict} {TARGET_REQUESTS_PER_S:,}"
        )
    for row in results["growth"]:
        print(
            f"{row['requests']:>6,} requests {row['steps']:>7,} steps {row['wall_s']:.3f} s {row['us_per_step']:.1f} us/step; "
            f"steps added {row['us_per_added_step']:.1f} us each, {row['added_with_prompts_ratio']:.0%} of them with prompt work"
        )
    python = results["python"]
    print(f"200 requests: readable {python['readable_s']:.2f} s, compiled {python['compiled_s']:.3f} s")
    print(f"fresh process with machine code on disk: {results['cold_start_s']:.1f} s")
    if "search" in results:
        s = results["search"]
        verdict = "meets" if s["wall_s"] * 1000 / s["configurations"] <= TARGET_SEARCH_S else "MISSES"
        print(
            f"search: {s['configurations']:,} configurations in {s['wall_s']:.1f} s; {verdict} 1,000 in {TARGET_SEARCH_S:.0f} s"
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
