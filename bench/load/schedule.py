"""Schedules: requests with their due times, built before the clock starts. Pure functions of values and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from bench.errors import BadInput
from bench.load.arrivals import ArrivalKind, RateProfile, due_times
from bench.records import Phase, Request, Schedule, StopRule

_ARRIVALS_STREAM = 7  # spawn key of the arrivals' random stream; the workload's streams have others


def arrivals_rng(seed: int) -> np.random.Generator:
    """The stream that due times are drawn from: independent of lengths and tokens of the same seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_ARRIVALS_STREAM,))))


def offline(
    requests: Iterable[Request], *, batch_size: int | None = None, stop: StopRule | None = None, seed: int = 0
) -> Schedule:
    """Everything due at 0, in batches of ``batch_size`` (None: all at once)."""
    items = tuple(requests)
    return Schedule("offline", items, np.zeros(len(items)), batch_size, stop or StopRule(), seed)


def closed_loop(
    requests: Iterable[Request],
    concurrency: int,
    *,
    steps: Sequence[tuple[float, int]] | None = None,
    stop: StopRule | None = None,
    seed: int = 0,
) -> Schedule:
    """A next request as soon as one is done, ``concurrency`` in flight.

    ``steps`` = ((t_s, limit), ...) changes the limit over time (from 0 s on; see :func:`concurrency_ramp`).
    """
    if concurrency < 1:
        raise BadInput(f"expected a concurrency >= 1, got {concurrency}", where="load.concurrency")
    in_flight = _checked_steps(steps)
    return Schedule("closed_loop", tuple(requests), None, concurrency, stop or StopRule(), seed, in_flight)


def open_loop(
    requests: Iterable[Request],
    rate: RateProfile | float,
    *,
    arrivals: ArrivalKind = "poisson",
    burstiness: float = 1.0,
    max_in_flight: int | None = None,
    stop: StopRule | None = None,
    seed: int = 0,
    ramp_up_s: float = 0.0,
    cool_down_s: float = 0.0,
) -> Schedule:
    """Requests at given times whatever the server does. With ``max_in_flight`` a request may have to wait in the client;
    its latency still counts from its due time, so that the queue is not hidden.

    Requests of phase "warmup" come before the clock of the arrivals starts: their due time is 0. Those due in the first
    ``ramp_up_s`` or the last ``cool_down_s`` are marked so.
    """
    items = list(requests)
    warm = [r for r in items if r.phase == "warmup"]
    rest = [r for r in items if r.phase != "warmup"]
    if not rest:
        raise BadInput("no requests besides the warm-up", where="load")
    due = due_times(arrivals, len(rest), rate, arrivals_rng(seed), burstiness=burstiness)
    marked = _mark_by_time(rest, due, ramp_up_s, cool_down_s)
    all_due = np.concatenate([np.zeros(len(warm)), due])
    return Schedule("open_loop", (*warm, *marked), all_due, max_in_flight, stop or StopRule(), seed)


def trace(
    requests: Iterable[Request],
    due_s: Iterable[float],
    *,
    time_scale: float = 1.0,
    max_in_flight: int | None = None,
    stop: StopRule | None = None,
    seed: int = 0,
    ramp_up_s: float = 0.0,
    cool_down_s: float = 0.0,
) -> Schedule:
    """Replay of a trace. ``time_scale`` stretches time: 0.5 plays it twice as fast.

    Raises:
        BadInput: a negative, infinite or missing time, or times that do not ascend.
    """
    if not time_scale > 0:
        raise BadInput(f"expected a time scale > 0, got {time_scale}", where="load.time_scale")
    items = list(requests)
    warm = [r for r in items if r.phase == "warmup"]
    rest = [r for r in items if r.phase != "warmup"]
    due = np.rint(np.asarray(list(due_s), dtype=np.float64) * time_scale * 1e9) / 1e9
    if len(due) != len(rest):
        raise BadInput(f"{len(rest)} requests but {len(due)} due times", where="trace")
    if len(due) == 0 or not np.all(np.isfinite(due)) or due[0] < 0 or np.any(np.diff(due) < 0):
        raise BadInput("due times must be finite, >= 0 and ascending", where="trace")
    marked = _mark_by_time(rest, due, ramp_up_s, cool_down_s)
    all_due = np.concatenate([np.zeros(len(warm)), due])
    return Schedule("trace", (*warm, *marked), all_due, max_in_flight, stop or StopRule(), seed)


def concurrency_ramp(
    start: int, end: int, duration_s: float, num_steps: int | None = None
) -> tuple[tuple[float, int], ...]:
    """Steps from ``start`` to ``end`` in flight over ``duration_s`` (one request at a time unless ``num_steps``)."""
    n = abs(end - start) if num_steps is None else num_steps
    if n < 1 or start < 1 or end < 1 or duration_s <= 0:
        raise BadInput(
            f"expected a ramp between two different concurrencies >= 1 over > 0 s, got {start}, {end}, {duration_s}",
            where="load.ramp",
        )
    return tuple((duration_s * k / n, round(start + (end - start) * k / n)) for k in range(n + 1))


def _checked_steps(steps: Sequence[tuple[float, int]] | None) -> tuple[tuple[float, int], ...] | None:
    if steps is None:
        return None
    out = tuple((float(t), int(c)) for t, c in steps)
    times = [t for t, _ in out]
    if not out or times[0] != 0 or times != sorted(set(times)) or min(c for _, c in out) < 1:
        raise BadInput(
            f"expected (time, concurrency) steps from 0 s on, ascending, each concurrency >= 1, got {steps}",
            where="load.steps",
        )
    return out


def _mark_by_time(requests: list[Request], due: np.ndarray, ramp_up_s: float, cool_down_s: float) -> list[Request]:
    if ramp_up_s <= 0 and cool_down_s <= 0:
        return requests
    end = float(due[-1]) - cool_down_s
    out = []
    for r, t in zip(requests, due, strict=True):
        phase: Phase = "ramp_up" if t < ramp_up_s else "cool_down" if cool_down_s > 0 and t > end else "measured"
        out.append(replace(r, phase=phase))
    if all(r.phase != "measured" for r in out):
        raise BadInput(
            f"ramp-up {ramp_up_s:g} s and cool-down {cool_down_s:g} s leave nothing of {due[-1]:.3g} s to measure",
            where="load",
        )
    return out


def split(schedule: Schedule, num_shards: int) -> list[np.ndarray]:
    """Positions of the schedule's requests for each of ``num_shards`` processes: every request exactly once.

    Sessions stay whole (turns of one session must follow each other on one process); other requests go round-robin, so
    the merged arrivals are those of the one schedule, whatever the number of processes.
    """
    shard = np.empty(len(schedule.requests), dtype=np.int64)
    plain = 0
    for i, r in enumerate(schedule.requests):
        if r.session is None:
            shard[i] = plain % num_shards
            plain += 1
        else:
            shard[i] = r.session % num_shards
    return [np.flatnonzero(shard == k) for k in range(num_shards)]
