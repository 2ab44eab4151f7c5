"""Ramp-up and cool-down: marked in the records, by due time or by the time they were sent; never counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bench.config.conflicts import conflict
from bench.config.experiment import CellSpec, WarmupSpec
from bench.config.sweep import make_cell
from bench.errors import BadInput
from bench.records import RequestRecord
from bench.runner.marks import mark_by_sent
from bench.runner.schedules import build_schedule

BOTH = {"num_requests": 2, "ramp_up_s": 2.0, "cool_down_s": 1.0}


def spec(load: dict[str, Any], **more: Any) -> CellSpec:
    base = {"model": "tiny-llama", "engine": {"kind": "vllm"}, "load": load, "workload": {"isl": 20, "osl": 6}}
    return CellSpec.model_validate({**base, **more})


def record(index: int, sent_s: float | None, phase: Any = "measured") -> RequestRecord:
    done = None if sent_s is None else sent_s + 0.25
    return RequestRecord(
        index=index, phase=phase, isl=20, osl=6, due_s=sent_s, sent_s=sent_s, first_token_s=done, last_token_s=done,
        done_s=done, error=None if sent_s is not None else "aborted",
    )  # fmt: skip


def test_an_open_loop_is_marked_by_due_time() -> None:
    load = {"kind": "open_loop", "rate_per_s": 10, "arrivals": "constant"}
    schedule = build_schedule(
        spec(load, stop={"max_requests": 100, "min_requests": 100}, warmup=BOTH), seed=1, vocab_size=4096
    )
    phases = Counter(r.phase for r in schedule.requests)
    assert phases["warmup"] == 2 and sum(phases.values()) == 102
    due = {p: [t for r, t in zip(schedule.requests, schedule.due_s, strict=True) if r.phase == p] for p in phases}  # type: ignore[arg-type]
    assert max(due["ramp_up"]) < 2.0 <= min(due["measured"])
    assert max(due["measured"]) <= max(due["cool_down"]) - 1.0 < min(due["cool_down"])


def test_a_closed_loop_is_marked_by_what_was_sent_when() -> None:
    # warm-up until 1 s; then a request every 0.5 s until 11 s; records come in the order in which they ended
    sent = [1.0 + 0.5 * k for k in range(21)]
    records = [record(0, 0.0, "warmup"), replace(record(1, 0.5, "warmup"), done_s=1.0)]
    records += [record(2 + k, t) for k, t in enumerate(sent)]
    records[10], records[11] = records[11], records[10]
    records.append(record(99, None))
    out = list(mark_by_sent(records, "closed_loop", WarmupSpec(**BOTH)))
    assert sorted(r.index for r in out) == sorted(r.index for r in records)
    by = {
        p: [r.sent_s for r in out if r.phase == p and r.sent_s is not None]
        for p in ("ramp_up", "measured", "cool_down")
    }
    assert sorted(by["ramp_up"]) == [1.0, 1.5, 2.0, 2.5]
    assert sorted(by["cool_down"]) == [10.5, 11.0]
    assert len(by["measured"]) == 21 - 6
    unmarked = {r.index: replace(r, phase="measured") for r in out}
    assert all(unmarked[r.index] == replace(r, phase="measured") for r in records), "only the phase changes"


def test_without_marks_and_in_other_loads_records_pass_at_once() -> None:
    def ends() -> Any:
        yield record(0, 0.0)
        raise AssertionError("read ahead")

    for kind, warmup in (("closed_loop", WarmupSpec()), ("open_loop", WarmupSpec(**BOTH))):
        assert next(mark_by_sent(ends(), kind, warmup)).phase == "measured"


def test_marks_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(BadInput, match=r"ramp-up 2 s and cool-down 1 s leave nothing of 1\.5 s to measure"):
        list(mark_by_sent([record(k, 0.5 * k) for k in range(4)], "closed_loop", WarmupSpec(**BOTH)))


def test_offline_batches_refuse_marks() -> None:
    found = conflict(spec({"kind": "offline", "batch_size": 2}, warmup=BOTH))
    assert found is not None and found.field == ("warmup", "ramp_up_s")


def test_cells_without_marks_keep_the_names_they_had() -> None:
    load = {"kind": "closed_loop", "concurrency": 2}
    plain = make_cell({"concurrency": 2}, spec(load)).cell_id
    assert plain == "tp1-c2-c3d4eeaa"
    assert make_cell({"concurrency": 2}, spec(load, warmup={"ramp_up_s": 0.0})).cell_id == plain
    assert make_cell({"concurrency": 2}, spec(load, warmup={"ramp_up_s": 1.0})).cell_id != plain
