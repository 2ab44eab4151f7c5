"""Intervals, plans and the two clocks; the CUDA clock with stand-ins, since its logic must not wait for a GPU."""

from __future__ import annotations

import random

import pytest

from kernels.case import Prepared, Work
from kernels.device import Device
from kernels.timing import (
    FEWEST_REPEATS,
    EventClock,
    HostClock,
    TimingPlan,
    calls_in_graph,
    choose_inner_and_repeats,
    make_flush,
    measure,
    median_estimate,
)

CPU = Device("cpu", 0, "test", 2**30, 2**20, 2)
GPU = Device("cuda", 0, "test", 2**30, 2**20, 100, (9, 0))


def test_median_of_odd_and_even_counts():
    assert median_estimate([3.0, 1.0, 2.0]).value == 2.0
    assert median_estimate([4.0, 1.0, 2.0, 3.0]).value == 2.5


def test_five_samples_give_no_interval_and_six_give_the_range():
    five = median_estimate([1, 2, 3, 4, 5])
    assert (five.low, five.high) == (None, None)
    six = median_estimate([6, 5, 4, 3, 2, 1])
    assert (six.low, six.high) == (1, 6)
    assert FEWEST_REPEATS == 6


def test_ranks_agree_with_published_tables():
    # Ranks of the 95 % interval of the median by the binomial: n = 10: 2 and 9; n = 25: 8 and 18; n = 50: 18 and 33.
    for n, low, high in ((10, 2, 9), (25, 8, 18), (50, 18, 33)):
        estimate = median_estimate([float(i) for i in range(1, n + 1)])
        assert (estimate.low, estimate.high) == (low, high)


def test_interval_covers_the_true_median_at_least_as_often_as_it_says():
    rng = random.Random(1)
    hits = 0
    for _ in range(2000):
        estimate = median_estimate([rng.expovariate(1.0) for _ in range(15)])
        assert estimate.low is not None and estimate.high is not None
        hits += estimate.low <= 0.693147 <= estimate.high
    assert hits / 2000 >= 0.945


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        median_estimate([])


def test_short_calls_are_repeated_inside_a_sample_and_flushed_ones_are_not():
    plan = TimingPlan(min_repeats=7, max_repeats=50, budget_s=0.3, min_sample_s=5e-5)
    inner, repeats = choose_inner_and_repeats(1e-6, 0.0, False, plan)
    assert inner in (50, 51) and repeats == 50
    assert choose_inner_and_repeats(1e-6, 0.01, True, plan) == (1, 29)
    assert choose_inner_and_repeats(10.0, 0.0, False, plan) == (1, 7)
    assert choose_inner_and_repeats(0.0, 0.0, False, plan)[0] == 10_000


def test_host_clock_counts_every_call_and_flushes_before_each_sample(cpu):
    calls: list[str] = []
    times = HostClock(CPU).time(lambda: calls.append("run"), 3, 2, lambda: calls.append("flush"))
    assert calls == ["flush", "run", "run", "run"] * 2
    assert len(times) == 2 and all(t >= 0 for t in times)


def test_measure_on_a_cpu_divides_by_inner_calls_and_launches(cpu):
    count = [0]

    def run() -> None:
        count[0] += 1

    plan = TimingPlan(min_repeats=6, max_repeats=6, budget_s=1e-6, warmup_s=0.0, min_sample_s=1e-5)
    one = measure(Prepared(run, lambda: [], Work(), flush=False), cpu, plan, None)
    many = measure(Prepared(run, lambda: [], Work(num_calls=1000), flush=False), cpu, plan, None)
    assert len(one.seconds) == 6 and one.clock == "perf_counter" and one.flushed_bytes == 0
    assert max(many.seconds) < max(one.seconds) + 1e-3
    assert many.seconds[0] < 1e-6  # one thousandth of a call
    assert count[0] == one.warmup_calls + many.warmup_calls + 6 * (one.inner_calls + many.inner_calls)


class FakeCuda:
    """Stands for torch.cuda: a device clock that every enqueued piece of work moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, graph_error: Exception | None = None) -> None:
        torch = pytest.importorskip("torch")
        self.now_ms = 0.0
        self.waits = 0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                self.at = outer.now_ms

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class Graph:
            def __init__(self, run, calls: int) -> None:
                self.run, self.calls = run, calls

            def replay(self) -> None:
                for _ in range(self.calls):
                    self.run()

        def capture(run, calls: int) -> Graph:
            if graph_error:
                raise graph_error
            return Graph(run, calls)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        self.head_starts = 0
        monkeypatch.setattr(torch.cuda, "_sleep", self._spin)
        monkeypatch.setattr(torch.cuda, "synchronize", self._wait)
        monkeypatch.setattr("kernels.timing.capture_graph", capture)

    def _wait(self) -> None:
        self.waits += 1

    def _spin(self, cycles: int) -> None:
        self.head_starts += 1
        self.now_ms += cycles / 1e6

    def work(self, ms: float) -> None:
        self.now_ms += ms


PLAN = TimingPlan(min_repeats=20, max_repeats=20, budget_s=1e-6, warmup_s=0.0)


def test_events_time_the_calls_and_not_the_flush(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    times = EventClock().time(lambda: cuda.work(2.0), 3, 40, lambda: cuda.work(100.0))
    assert times == [pytest.approx(0.006)] * 40
    assert cuda.waits == cuda.head_starts == 3  # 16 + 16 + 8 samples enqueued between waits, each behind a spin


def test_measure_replays_a_graph_of_one_call_after_a_flush(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    prepared = Prepared(lambda: cuda.work(2.0), lambda: [], Work(), flush=True, capturable=True)
    samples = measure(prepared, GPU, PLAN, (lambda: cuda.work(50.0), 123))
    assert samples.clock == "cuda graph" and samples.flushed_bytes == 123 and samples.inner_calls == 1
    assert samples.seconds == pytest.approx([0.002] * 20)


def test_measure_puts_many_calls_into_a_graph_without_a_flush(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(
        "kernels.timing.calls_in_graph", lambda call_s: 20
    )  # by a real clock, which a busy machine stops
    prepared = Prepared(lambda: cuda.work(2.0), lambda: [], Work(), flush=False, capturable=True)
    samples = measure(prepared, GPU, PLAN, (lambda: cuda.work(50.0), 123))
    assert samples.clock == "cuda graph" and samples.flushed_bytes == 0 and samples.inner_calls % 20 == 0
    assert samples.seconds == pytest.approx([0.002] * 20)


def test_a_graph_holds_a_millisecond_of_calls_and_twenty_at_most():
    assert [calls_in_graph(s) for s in (0.0, 5e-6, 1e-4, 3e-4, 2.6e-3)] == [20, 20, 10, 4, 1]


def test_the_flush_reads_and_changes_nothing(cpu):
    flush, num_bytes = make_flush(CPU, 2**20)
    assert num_bytes == 2**20 and float(flush()) == num_bytes / 4
    assert float(flush()) == num_bytes / 4


def test_what_cannot_be_captured_is_timed_plainly_and_says_so(monkeypatch):
    cuda = FakeCuda(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore"))
    prepared = Prepared(lambda: cuda.work(2.0), lambda: [], Work(), flush=True, capturable=True)
    samples = measure(prepared, GPU, PLAN, (lambda: cuda.work(50.0), 9))
    assert samples.clock == "cuda events"
    assert samples.notes == ("not captured in a CUDA graph: operation not permitted when stream is capturing",)
    assert samples.seconds == pytest.approx([0.002] * 20)


def test_host_cases_on_a_gpu_use_the_host_clock(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    prepared = Prepared(lambda: cuda.work(2.0), lambda: [], Work(), flush=False, clock="host", capturable=True)
    samples = measure(prepared, GPU, PLAN, None)
    assert samples.clock == "perf_counter" and cuda.waits > 20
