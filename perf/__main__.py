"""`make perf`: every benchmark of TokenYield itself, one after the other, with a verdict for each.

Usage: python -m perf [NAME...]   (default: all)
"""

from __future__ import annotations

import subprocess
import sys
import time

#: name -> (module, what it compares). Each prints its own table and exits 0 when its targets are met.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "startup": ("perf.startup", "`bench --help`"),
    "sampler": ("perf.sampler", "the sampler's cost and jitter over 8 fake GPUs"),
    "simulator": ("perf.simulator", "simulated requests per second"),
    "kernels": ("perf.kernels", "our memory kernels against STREAM in C, GEMM against numpy"),
    "throughput": ("perf.throughput", "our offline tokens/s against `vllm bench throughput`"),
    "loadgen": ("perf.loadgen", "our load generator against C, vllm bench serve, GuideLLM and AIPerf"),
    "memory": ("perf.loadgen_memory", "ten million chunks in under 1 GiB"),
}


def main(names: list[str]) -> int:
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        print(f"perf: no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    verdicts: list[tuple[str, int, float]] = []
    for name in names or list(BENCHMARKS):
        module, what = BENCHMARKS[name]
        print(f"\n=== {name}: {what}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", module], check=False).returncode
        verdicts.append((name, code, time.monotonic() - start))
    print()
    for name, code, seconds in verdicts:
        print(
            f"{name:12} {'targets met' if code == 0 else f'targets missed or failed (exit {code})':40} {seconds:6.0f} s"
        )
    return 0 if all(code == 0 for _, code, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
