"""Are the figures of ``bench kernels`` plausible? Beside a STREAM in C and numpy's GEMM, in one run, interleaved.

Memory: McCalpin's four loops compiled by the C compiler at hand (-O3 -march=native -fopenmp), same arrays, same threads. GEMM:
numpy's BLAS in fp32 against torch's, and both against the CPU's derived peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kernels.case import make_case
from kernels.cpu_peaks import derived_peaks
from kernels.device import Device, find_device

STREAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <omp.h>
static double best(const char *op, float *a, float *b, float *c, long n, int repeats) {
    double least = 1e30;
    for (int r = 0; r < repeats; r++) {
        double start = omp_get_wtime();
        float sum = 0;
        if (!strcmp(op, "copy")) {
            #pragma omp parallel for simd schedule(static)
            for (long i = 0; i < n; i++) b[i] = a[i];
        } else if (!strcmp(op, "read")) {
            #pragma omp parallel for simd schedule(static) reduction(+ : sum)
            for (long i = 0; i < n; i++) sum += a[i];
        } else if (!strcmp(op, "write")) {
            #pragma omp parallel for simd schedule(static)
            for (long i = 0; i < n; i++) a[i] = 1.7f;
        } else {
            #pragma omp parallel for simd schedule(static)
            for (long i = 0; i < n; i++) c[i] = a[i] + 1.7f * b[i];
        }
        double took = omp_get_wtime() - start;
        if (took < least) least = took;
        if (sum == 12345.678f) puts("");
    }
    return least;
}
int main(int argc, char **argv) {
    long bytes = atol(argv[2]), n = bytes / 4;
    float *a = malloc(bytes), *b = malloc(bytes), *c = malloc(bytes);
    #pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) { a[i] = i % 1013 + 1; b[i] = i % 517 + 1; c[i] = 0; }
    best(argv[1], a, b, c, n, 1);
    printf("%.9f\n", best(argv[1], a, b, c, n, atoi(argv[3])));
    return 0;
}
"""
ARRAYS = {"copy": 2, "read": 1, "write": 1, "triad": 3}
#: Ours may be this much slower than the C loop before the figure is called implausible.
LEAST_RATIO = 0.8


def compile_stream(folder: Path) -> Path:
    """The C program; exits when there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("perf.kernels needs a C compiler")
    source, program = folder / "stream.c", folder / "stream"
    source.write_text(STREAM)
    subprocess.run([compiler, "-O3", "-march=native", "-fopenmp", "-o", str(program), str(source)], check=True)
    return program


def memory(device: Device, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Best bytes/s of ours and of the C loop for each operation and size, rounds interleaved."""
    from kernels.memory import prepare

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = compile_stream(Path(folder))
        environment = {**os.environ, "OMP_NUM_THREADS": str(device.num_units)}
        for op, arrays in ARRAYS.items():
            for size in sizes:
                prepared = prepare(make_case("memory", op, "torch", "fp32", {"bytes": size}), device, 0)
                prepared.run()
                ours, theirs = [], []
                repeats = max(3, min(200, 2**29 // size))
                for _ in range(rounds):
                    ours.append(_best(prepared.run, repeats))
                    command = [str(program), op, str(size), str(repeats)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                    theirs.append(float(done.stdout))
                moved = arrays * size
                row: dict[str, Any] = {
                    "op": op,
                    "bytes": size,
                    "ours_bytes_per_s": moved / min(ours),
                    "c_bytes_per_s": moved / min(theirs),
                }
                row["ratio"] = row["ours_bytes_per_s"] / row["c_bytes_per_s"]
                rows.append(row)
    return rows


def gemm(device: Device, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Best FLOP/s of torch in every type and of numpy in fp32 for square products."""
    import numpy as np

    from kernels.gemm import prepare

    rows = []
    peaks = derived_peaks(device)["flops_per_s"]
    for size in sizes:
        work = 2.0 * size**3
        a, b = (np.random.default_rng(s).standard_normal((size, size), dtype=np.float32) for s in (0, 1))
        numpy_s = min(_best(lambda a=a, b=b: a @ b, 3) for _ in range(rounds))
        rows.append({"by": "numpy", "dtype": "fp32", "size": size, "flops_per_s": work / numpy_s})
        for dtype in ("fp32", "bf16", "int8"):
            shape = {"m": size, "n": size, "k": size}
            prepared = prepare(make_case("gemm", "linear", "torch", dtype, shape), device, 0)
            prepared.run()
            best = min(_best(prepared.run, 3) for _ in range(rounds))
            rows.append({"by": "ours", "dtype": dtype, "size": size, "flops_per_s": work / best})
    for row in rows:
        row["derived_peak_ratio"] = row["flops_per_s"] / peaks[row["dtype"]] if row["dtype"] in peaks else None
    return rows


def _best(run: Any, repeats: int) -> float:
    least = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least


def main(argv: list[str] | None = None) -> int:
    """Print both tables; exit 1 when ours is implausibly slow."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    device = find_device("cpu")
    result = {
        "device": device.name,
        "num_cores": device.num_units,
        "derived": derived_peaks(device)["source"],
        "memory": memory(device, (2**20, 2**24, 2**28), args.rounds),
        "gemm": gemm(device, (1024, 2048), args.rounds),
    }
    median = statistics.median(r["ratio"] for r in result["memory"])
    result["median_ratio_to_c"] = median
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{device.name}, {device.num_units} cores; best of {args.rounds} rounds each, interleaved")
        for r in result["memory"]:
            print(
                f"  {r['op']:6} {r['bytes'] / 2**20:7.0f} MiB   ours {r['ours_bytes_per_s'] / 1e9:7.1f} GB/s   "
                f"C {r['c_bytes_per_s'] / 1e9:7.1f} GB/s   {r['ratio']:.2f}"
            )
        print(f"  {result['derived']}")
        for g in result["gemm"]:
            share = (
                ""
                if g["derived_peak_ratio"] is None
                else f"   {100 * g['derived_peak_ratio']:.0f} % of the derived peak"
            )
            print(f"  {g['by']:6} {g['dtype']:5} {g['size']:5}   {g['flops_per_s'] / 1e9:8.0f} GFLOP/s{share}")
        print(f"median ours / C: {median:.2f} (target >= {LEAST_RATIO})")
    return 0 if median >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
