"""Timing one call: device events on a GPU, the monotonic clock on a CPU; raw samples kept, median and interval derived.

* GPU: an event before and after every call, all enqueued ahead of the device, so the host's launch time is hidden
  behind the flush or the previous call. With a CUDA graph the calls between two events are one replay, as an engine
  that decodes under graphs runs them.
* CPU: ``perf_counter`` around as many calls as last ``min_sample_s``.
* Cold cache: where a case asks for it, a buffer of twice the last-level cache (up to a limit that the suite sets and the
  result states) is read before every call, outside the timed part. Read and not written: a written one would leave the
  cache full of changed lines, and the call would pay for bringing them to memory.

The interval is that of the median from order statistics: no assumption about the shape of the distribution.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bench.records import Estimate
from kernels.case import Prepared
from kernels.device import Device

if TYPE_CHECKING:
    import torch

MEDIAN_METHOD = "median; interval from order statistics (binomial)"
#: Fewest repeats that give a 95 % interval of the median: 1 - 2 * 0.5**6 = 96.9 %.
FEWEST_REPEATS = 6


@dataclass(frozen=True, slots=True)
class TimingPlan:
    """How long to measure. All cases of a suite share one plan."""

    min_repeats: int = 7
    max_repeats: int = 50
    budget_s: float = 0.3  # per case, warm-up and flushes included
    warmup_s: float = 0.05
    min_sample_s: float = 5e-5  # a shorter call is repeated inside one sample
    flush_limit_bytes: int = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds per call, one value a sample, with how they were taken."""

    seconds: tuple[float, ...]
    clock: str  # "cuda events", "cuda graph", "perf_counter"
    inner_calls: int  # calls inside one sample
    flushed_bytes: int
    warmup_calls: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "seconds": list(self.seconds), "notes": list(self.notes)}


def median_estimate(samples: Sequence[float], confidence: float = 0.95, unit: str = "s") -> Estimate:
    """Median of ``samples`` with the order-statistic interval.

    The interval runs from the k-th smallest to the k-th largest sample, k the largest rank with
    P(Binomial(n, 1/2) < k) <= (1 - confidence) / 2 (David & Nagaraja, Order Statistics, 3rd ed., section 7.1). With
    fewer than six samples no such rank exists at 95 % and the ends are None. Raises ValueError on no samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    n = len(ordered)
    middle = ordered[n // 2] if n % 2 else 0.5 * (ordered[n // 2 - 1] + ordered[n // 2])
    tail, rank = 0.0, 0
    for k in range(n):
        tail += math.comb(n, k) * 0.5**n
        if tail > (1 - confidence) / 2:
            break
        rank = k + 1
    low, high = (None, None) if rank == 0 else (ordered[rank - 1], ordered[n - rank])
    return Estimate(middle, low, high, confidence, MEDIAN_METHOD, n, unit)


class Clock(Protocol):
    """Times calls on one device."""

    name: str

    def wait(self) -> None:
        """Return when everything enqueued so far is done."""

    def time(
        self, run: Callable[[], object], inner: int, repeats: int, flush: Callable[[], object] | None
    ) -> list[float]:
        """``repeats`` samples of ``inner`` calls each, in seconds per sample (not per call)."""


class HostClock:
    """``perf_counter`` around the calls; on a GPU it waits for the device at both ends."""

    name = "perf_counter"

    def __init__(self, device: Device) -> None:
        self._on_gpu = device.kind == "cuda"

    def wait(self) -> None:
        """Return when the device is idle (at once on a CPU, where torch is synchronous)."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()

    def time(
        self, run: Callable[[], object], inner: int, repeats: int, flush: Callable[[], object] | None
    ) -> list[float]:
        """See :class:`Clock`."""
        out = []
        now = time.perf_counter
        for _ in range(repeats):
            if flush:
                flush()
            self.wait()
            start = now()
            for _ in range(inner):
                run()
            self.wait()
            out.append(now() - start)
        return out


class EventClock:
    """CUDA events on the current stream."""

    name = "cuda events"
    #: Samples enqueued before the host waits: enough to keep the device busy, few enough for the launch queue (1,024).
    batch = 16
    #: Cycles that the device spins before each batch, some 2 ms at 1.5 to 2 GHz: the host enqueues a batch (flush, two
    #: events, a launch: some 30 us a sample) in that time, so that no sample holds the time of its launch.
    head_start_cycles = 4_000_000

    def wait(self) -> None:
        """Return when the device is idle."""
        import torch

        torch.cuda.synchronize()

    def time(
        self, run: Callable[[], object], inner: int, repeats: int, flush: Callable[[], object] | None
    ) -> list[float]:
        """See :class:`Clock`."""
        import torch

        out: list[float] = []
        while len(out) < repeats:
            pairs = []
            torch.cuda._sleep(self.head_start_cycles)
            for _ in range(min(self.batch, repeats - len(out))):
                pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                if flush:
                    flush()
                pair[0].record()
                for _ in range(inner):
                    run()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
            out.extend(start.elapsed_time(end) * 1e-3 for start, end in pairs)
        return out


def make_flush(device: Device, limit_bytes: int) -> tuple[Callable[[], object], int]:
    """A call that fills the last-level cache with something else, and how many bytes it reads.

    Twice the cache where the limit allows. A CPU's last-level cache may be hundreds of MiB shared between machines:
    there the limit decides and the result says how much was read.
    """
    import torch

    num_bytes = min(2 * device.l2_bytes, limit_bytes)
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device.torch_name)
    return buffer.sum, num_bytes


def capture_graph(run: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """``calls`` calls of ``run`` as one CUDA graph. Raises RuntimeError when ``run`` cannot be captured."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch asks for a warm-up on a side stream before a capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def calls_in_graph(call_s: float) -> int:
    """How many calls of ``call_s`` (launch included) one graph holds: about a millisecond of them, 20 at most."""
    return max(1, min(20, math.ceil(1e-3 / max(call_s, 1e-9))))


def choose_inner_and_repeats(call_s: float, flush_s: float, flushes: bool, plan: TimingPlan) -> tuple[int, int]:
    """Calls per sample and number of samples for a call that lasts ``call_s`` with ``flush_s`` of flushing before it."""
    call_s = max(call_s, 1e-9)
    inner = 1 if flushes else max(1, min(10_000, math.ceil(plan.min_sample_s / call_s)))
    sample_s = call_s * inner + (flush_s if flushes else 0.0)
    repeats = int(plan.budget_s / sample_s)
    return inner, max(plan.min_repeats, min(plan.max_repeats, repeats))


def measure(
    prepared: Prepared, device: Device, plan: TimingPlan, flush: tuple[Callable[[], object], int] | None
) -> Samples:
    """Time ``prepared.run``. ``flush`` comes from :func:`make_flush` and is used only where the case asks for it."""
    clock: Clock = EventClock() if device.kind == "cuda" and prepared.clock != "host" else HostClock(device)
    flush_call, flushed_bytes = flush if flush and prepared.flush else (None, 0)
    run, name, notes, per_replay = prepared.run, clock.name, [], 1
    if device.kind == "cuda" and prepared.capturable and prepared.clock != "host":
        # Without a flush one replay holds many calls, so that its launch does not count; long calls need no company.
        calls = 1 if flush_call else calls_in_graph(_warm_up(prepared.run, clock, plan.warmup_s)[1])
        try:
            run = capture_graph(prepared.run, calls).replay
            name, per_replay = "cuda graph", calls
        except RuntimeError as error:
            notes.append(f"not captured in a CUDA graph: {str(error).splitlines()[0][:120]}")
    warmup_calls, call_s = _warm_up(run, clock, plan.warmup_s)
    flush_s = 0.0
    if flush_call:
        start = time.perf_counter()
        flush_call()
        clock.wait()
        flush_s = time.perf_counter() - start
    inner, repeats = choose_inner_and_repeats(call_s, flush_s, flush_call is not None, plan)
    totals = clock.time(run, inner, repeats, flush_call)
    per_sample = inner * per_replay * prepared.work.num_calls
    return Samples(
        tuple(t / per_sample for t in totals),
        name,
        inner * per_replay,
        flushed_bytes,
        warmup_calls * per_replay,
        tuple(notes),
    )


def _warm_up(run: Callable[[], object], clock: Clock, warmup_s: float) -> tuple[int, float]:
    """Call until ``warmup_s`` have passed (twice at least); returns the calls made and seconds per call at the end."""
    calls, last = 0, 0.0
    begin = time.perf_counter()
    batch = 1
    while calls < 2 or time.perf_counter() - begin < warmup_s:
        clock.wait()
        start = time.perf_counter()
        for _ in range(batch):
            run()
        clock.wait()
        last = (time.perf_counter() - start) / batch
        calls += batch
        batch = min(2 * batch, 64)
    return calls, last
