"""How long `bench --help` takes: the whole process, from the shell's view. Target: at most 0.15 s."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

TARGET_S = 0.15
NUM_RUNS = 15


def measure(num_runs: int = NUM_RUNS) -> list[float]:
    """Wall seconds of ``bench --help``, one process each; the first, which warms the file cache, is left out."""
    command = [str(Path(sys.executable).parent / "bench"), "--help"]
    times = []
    for _ in range(num_runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the times here")
    args = parser.parse_args()
    times = measure()
    median = statistics.median(times)
    print(f"bench --help: median {median * 1e3:.0f} ms, worst {max(times) * 1e3:.0f} ms of {len(times)}; target 150 ms")
    if args.json:
        args.json.write_text(json.dumps({"times_s": times, "median_s": median, "target_s": TARGET_S}))
    return 0 if median <= TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
