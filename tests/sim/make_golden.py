"""Write ``tests/sim/golden/vllm-<version>.json.gz``: traces of the real scheduler, for machines without vLLM.

Run ``python -m tests.sim.make_golden`` with the vLLM release that the proof shall hold for.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.sim.scheduler import PROVED_AGAINST_VLLM
from tests.sim.cases import Case, real_cases, seeded_case
from tests.sim.driver import drive
from tests.sim.vllm_driver import Theirs

PATH = Path(__file__).parent / "golden" / f"vllm-{PROVED_AGAINST_VLLM}.json.gz"
NUM_SEEDED = 80


def condensed(trace: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """The trace with each free list as its length and a checksum of its order."""
    return ([*row[:-1], [len(row[-1]), zlib.crc32(repr(row[-1]).encode())]] for row in trace)


def golden_cases() -> dict[str, Case]:
    return {**real_cases(), **{f"seed {seed}": seeded_case(seed) for seed in range(1000, 1000 + NUM_SEEDED)}}


def main() -> None:
    data = {
        "vllm": PROVED_AGAINST_VLLM,
        "row": "schedule: [[index, tokens, context, emits]..], preempted, running, waiting, free; "
        "output: got a token, finished, free; free = [count, crc32 of the order]",
        "cases": [
            {"name": name, **case.to_dict(), "trace": list(condensed(drive(case, Theirs(case))))}
            for name, case in golden_cases().items()
        ],
    }
    text = json.dumps(data, separators=(",", ":")).encode()
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_bytes(gzip.compress(text, mtime=0))
    print(f"{PATH}: {len(data['cases'])} cases, {PATH.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
