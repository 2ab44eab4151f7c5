"""The parts of the vLLM engine that need no vLLM: its environment, the step tap, packing, versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.engines import vllm_setup, vllm_tap, vllm_versions
from bench.engines.packing import pack, unpack
from bench.engines.vllm_steps import StepRecords
from bench.records import Request, Schedule, StopRule
from tests.engines.sinks import some_requests


@pytest.mark.parametrize(
    ("ranks", "cores", "expected"),
    [
        (2, [0, 1], "0|1"),
        (2, [0, 1, 2, 3], "0,1|2,3"),
        (2, [4, 5, 6, 7, 8, 9], "4,5|6,7"),  # one core per rank is left to the scheduler and front end
        (4, [0, 1], "0|1|0|1"),
        (3, list(range(16)), "0,1,2,3|4,5,6,7|8,9,10,11"),
    ],
)
def test_cores_are_shared_evenly(ranks: int, cores: list[int], expected: str) -> None:
    assert vllm_setup.cpu_binding(ranks, cores) == expected


def test_the_environment_of_the_user_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.engines.host import EngineLaunch

    names = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
    for name in (*names, vllm_tap.FOLDER_VARIABLE, vllm_tap.CLASS_VARIABLE, "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")  # so that it is restored whatever happens
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    args = {"tensor_parallel_size": 2}
    vllm_setup.prepare_environment(EngineLaunch("vllm", str(tmp_path), args=args), tmp_path)
    import os

    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7" and "|" in os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ[vllm_tap.FOLDER_VARIABLE] == str(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    vllm_setup.prepare_environment(EngineLaunch("vllm", "acme/model-7b"), tmp_path)
    assert "HF_HUB_OFFLINE" not in os.environ and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def test_secrets_are_not_shown() -> None:
    shown = vllm_setup.shown_environment({"VLLM_API_KEY": "x", "VLLM_USE_V1": "1", "HOME": "/root"})
    assert shown == {"VLLM_USE_V1": "1"}


@pytest.mark.parametrize(
    ("version", "error"),
    [
        ("0.26.0", None),
        ("0.33.1+cu129", None),
        ("0.1.dev17", None),
        ("0.25.1", "0.26 to 0.33"),
        ("0.34.0", "0.26 to 0.33"),
        (None, "not installed"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str | None, error: str | None) -> None:
    monkeypatch.setattr(vllm_versions, "installed_version", lambda: version)
    if error is None:
        assert vllm_versions.check_version() == version
        return
    with pytest.raises(vllm_versions.EngineUnavailable, match=error) as caught:
        vllm_versions.check_version()
    assert caught.value.next_step


def test_packing_is_lossless() -> None:
    text = Request(index=7, osl=3, text="hello", session=1, turn=2, think_s=0.5, priority=3, phase="ramp_up")
    chat = Request(index=8, osl=3, messages=({"role": "user", "content": "hi"},), prefix_tokens=2)
    for requests, due in (((*some_requests(5, num_warmup=2), text, chat), np.arange(7.0)), ((), None)):
        schedule = Schedule("trace" if due is not None else "offline", requests, due, 3, StopRule(min_requests=2), 11)
        again = unpack(pack(schedule))
        assert again.digest() == schedule.digest() and again.stop == schedule.stop and again.seed == 11
        assert [r.priority for r in again.requests] == [r.priority for r in requests]


class FakeScheduler:
    """Schedules what it is told; has what the tap reads."""

    def __init__(self, vllm_config: Any) -> None:
        self.kv_cache_manager = SimpleNamespace(usage=0.25)
        self.outputs: list[Any] = []
        self.left = 0

    def get_request_counts(self) -> tuple[int, int]:
        return self.left, 1

    def schedule(self, throttle_prefills: bool = False) -> Any:
        return self.outputs.pop(0)

    def update_from_output(self, scheduler_output: Any, model_output: Any) -> str:
        return "result"


def output(new: list[tuple[str, int, int]], cached: list[tuple[str, int, int, int]], resumed: set[str]) -> Any:
    """new: (id, scheduled, computed before); cached: (id, scheduled, computed before, tokens produced)."""
    scheduled = {i: n for i, n, *_ in (*new, *cached)}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=i, num_computed_tokens=c) for i, _, c in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[i for i, *_ in cached],
            resumed_req_ids=resumed,
            num_computed_tokens=[c for _, _, c, _ in cached],
            num_output_tokens=[p for *_, p in cached],
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids={"p"} if resumed else set(),
    )


def test_the_tap_reads_what_was_scheduled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(vllm_tap.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(vllm_tap, "_scheduler_class", lambda config: FakeScheduler)
    made = vllm_tap.scheduler(vllm_config=None)
    reader = vllm_tap.RowReader(tmp_path)
    assert reader.num_cores == 1 and list(reader.rows()) == []
    steps = [
        output([("a", 64, 0), ("b", 32, 16)], [], set()),  # b: 16 tokens were in the prefix cache
        output([], [("a", 1, 64, 1), ("b", 1, 48, 1)], set()),
        output([], [], set()),  # nothing scheduled: no step
        output([("c", 10, 0)], [("a", 1, 65, 2), ("b", 20, 0, 5), ("d", 8, 24, 0)], {"b"}),  # b again, d goes on
    ]
    made.outputs = list(steps)
    made.left = 1
    for step in steps:
        assert made.schedule() is step
        assert made.update_from_output(step, None) == "result"
    rows = [row for *_, row in reader.rows()]
    #        kv usage, running, waiting, prefill, decode, prefills, decodes, context, preempted, hits
    assert rows[0] == (0.25, 1, 1, 96, 0, 2, 0, 16, 0, 16)
    assert rows[1] == (0.25, 1, 1, 0, 2, 0, 2, 64 + 48, 0, 0)
    assert rows[2] == (0.25, 1, 1, 38, 1, 3, 1, 65 + 24, 1, 0) and len(rows) == 3
    assert list(reader.rows()) == []


def test_the_tap_follows_overlapping_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asynchronous scheduling: the next step is scheduled before the result of the one before has come."""
    monkeypatch.setenv(vllm_tap.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(vllm_tap, "_scheduler_class", lambda config: FakeScheduler)
    made = vllm_tap.scheduler(vllm_config=None)
    first, second = (output([], [("a", 1, n, 1)], set()) for n in (10, 11))
    made.outputs, made.left = [first, second], 1
    made.schedule()
    made.schedule()
    made.update_from_output(first, None)
    made.update_from_output(second, None)
    rows = list(vllm_tap.RowReader(tmp_path).rows())
    assert [row[5] for *_, row in rows] == [0, 0] and [row[7] for *_, row in rows] == [10, 11]
    assert [busy for _, _, busy, _ in rows] == [False, True]
    assert rows[0][0] <= rows[1][0] <= rows[0][1] <= rows[1][1]


def test_a_ring_of_rows_bears_more_than_it_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm_tap, "_CAPACITY", 8)
    writer = vllm_tap._RowWriter(tmp_path / "1.steps")
    reader = vllm_tap.RowReader(tmp_path)
    for i in range(20):
        writer.write(i, i + 0.5, 1.0, 0.5, *range(9))
    assert [started for started, *_ in reader.rows()] == list(range(12, 20))


def test_each_core_of_a_data_parallel_engine_has_steps_of_its_own(tmp_path: Path) -> None:
    """Periods are within a core, and steps come in the order of time, whoever of the cores made them."""
    writers = [vllm_tap._RowWriter(tmp_path / f"{k}.steps") for k in (1, 2)]
    records = StepRecords(vllm_tap.RowReader(tmp_path))
    records.begin(0.0)
    found: list[Any] = []
    sink: Any = SimpleNamespace(append_step=found.append)
    for first in (0, 3):
        for core, writer in enumerate(writers):
            for i in range(first, first + 3):
                end_s = 10 * (core + 1) + (core + 1) * i
                writer.write(end_s - 0.5, end_s, float(i > 0), 0.5, core, *range(8))
        records.read(sink)
    for core in (0, 1):
        mine = [s for s in found if s.num_running == core]
        assert [s.step_time_s for s in mine] == [0.5, *[core + 1] * 5]
    assert [s.t_s for s in found[:6]] == sorted(s.t_s for s in found[:6]) and records.total is not None
    assert records.total["steps"] == 12
