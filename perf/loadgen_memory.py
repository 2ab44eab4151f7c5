"""Memory of the load generator while it takes 10 million chunks from the mock, as fast as that sends them.

    python -m perf.loadgen_memory [--chunks 10000000] [--streams 64] [--itl 0] [--out FILE]

As fast as it can the mock sends many chunks at a time. ``--streams 1000 --itl 0.02`` takes them one by one (50,000 a second,
200 s for 10 million), so that each is a read with a stamp of its own.

The peak resident memory (VmHWM) of every process of the client is read from /proc until the records are there; the limit
is 1 GiB for all of them together. Every answer's tokens are counted against what was asked for. Needs about 2.5 GB in
$TMPDIR for 10 million chunks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.processes import descendants
from bench.load.driver import LoadOptions, drive
from bench.load.mock import Delay, MockConfig, running_mock
from bench.load.schedule import closed_loop
from bench.load.target import Target
from bench.records import Request

LIMIT_BYTES = 1 << 30
_TOKENS = 2000


class PeakMemory:
    """Peak resident bytes of this process's descendants, but those in ``but``, and of itself, by process."""

    def __init__(self, but: set[int]) -> None:
        self.but = but
        self.peak: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            for pid in {os.getpid(), *descendants(os.getpid())} - self.but:
                try:
                    text = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                line = next((x for x in text.splitlines() if x.startswith("VmHWM")), None)
                if line is not None:
                    self.peak[pid] = max(self.peak.get(pid, 0), int(line.split()[1]) * 1024)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def measure(num_chunks: int, num_streams: int, itl_s: float) -> dict[str, Any]:
    """Drive the mock; what was taken, in which time and memory."""
    n = max(1, num_chunks // _TOKENS)
    ids = np.arange(300, 316, dtype=np.int32)
    requests = [Request(index=i, osl=_TOKENS, isl=len(ids), prompt_token_ids=ids) for i in range(n)]
    with running_mock(MockConfig(ttft=Delay(itl_s), itl=Delay(itl_s))) as url:
        memory = PeakMemory(set(descendants(os.getpid())))
        started, window = time.monotonic(), [0.0]

        def progress(p: Any) -> None:
            if p.stage in ("main", "drain"):
                window[0] = p.elapsed_s

        result = drive(
            closed_loop(requests, num_streams),
            Target(url, model="mock"),
            LoadOptions(exact_osl=True),
            on_progress=progress,
        )
        wall = time.monotonic() - started
        memory.stop()
    reads = tokens = 0
    for block in result.chunk_blocks():
        reads, tokens = reads + len(block["index"]), tokens + int(block["tokens"].sum())
    failed = sum(r.error is not None for r in result.records)
    honesty = dataclasses.asdict(result.honesty)
    result.close()
    return {
        "num_chunks": tokens,
        "num_reads": reads,
        "num_requests": n,
        "num_failed": failed,
        "num_streams": num_streams,
        "itl_s": itl_s,
        "window_s": window[0],
        "wall_s": wall,
        "peak_bytes": sorted(memory.peak.values(), reverse=True),
        "receive_path": honesty["receive_path"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--itl", type=float, default=0.0, help="Seconds between chunks.")
    parser.add_argument("--out", type=Path, default=Path("results/perf/loadgen.json"))
    args = parser.parse_args()
    found = measure(args.chunks, args.streams, args.itl)
    peak = sum(found["peak_bytes"])
    print(
        f"{found['num_chunks']:,} chunks in {found['num_reads']:,} reads of {found['num_requests']:,} answers, "
        f"{found['num_failed']} failed; window {found['window_s']:.0f} s, with parsing {found['wall_s']:.0f} s"
    )
    good = peak <= LIMIT_BYTES and found["num_failed"] == 0 and found["num_chunks"] >= args.chunks // _TOKENS * _TOKENS
    print(f"{'ok    ' if good else 'MISSED'} peak memory of all processes: {peak / 1e6:,.0f} MB (limit 1 GiB)")
    data: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"clients": {}}
    data["memory_one_by_one" if args.itl else "memory"] = found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
