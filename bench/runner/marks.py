"""Ramp-up and cool-down of a closed loop, marked in its records.

An open loop knows when each request is due, so its schedule carries the marks. A closed loop sends when a slot is free:
which of its requests belong to the ramp-up or to the cool-down is known from their records only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush

from bench.config.experiment import WarmupSpec
from bench.errors import BadInput
from bench.records import RequestRecord


def mark_by_sent(records: Iterable[RequestRecord], kind: str, warmup: WarmupSpec) -> Iterator[RequestRecord]:
    """The records of a run, those of a closed loop marked by when they were sent.

    ``ramp_up``: sent in the first ``ramp_up_s`` after the warm-up. ``cool_down``: sent in the last ``cool_down_s`` before
    the last request of the run was sent; records that may still turn out to be among these are held back, no others.

    Args:
        kind: the schedule's kind; all but ``closed_loop`` pass unchanged.

    Raises:
        BadInput: the marks leave nothing to measure (after the last record).
    """
    if kind != "closed_loop" or not (warmup.ramp_up_s or warmup.cool_down_s):
        yield from records
        return
    start_s = last_s = 0.0
    held: list[tuple[float, int, RequestRecord]] = []  # a heap: the earliest sent first
    num_measured = num_marked = 0
    for number, record in enumerate(records):
        if record.phase != "measured" or record.sent_s is None:
            if record.phase == "warmup":
                start_s = max(start_s, record.done_s or 0.0)
            yield record
            continue
        last_s = max(last_s, record.sent_s)
        if record.sent_s - start_s < warmup.ramp_up_s:
            num_marked += 1
            yield replace(record, phase="ramp_up")
            continue
        heappush(held, (record.sent_s, number, record))
        while held and held[0][0] <= last_s - warmup.cool_down_s:
            num_measured += 1
            yield heappop(held)[2]
    for _, _, record in sorted(held, key=lambda h: h[1]):
        yield replace(record, phase="cool_down")
    if num_measured == 0 and num_marked + len(held):
        raise BadInput(
            f"ramp-up {warmup.ramp_up_s:g} s and cool-down {warmup.cool_down_s:g} s leave nothing of "
            f"{last_s - start_s:.3g} s to measure",
            where="warmup",
            next_step="shorten them, or let the run last longer",
        )


__all__ = ["mark_by_sent"]
