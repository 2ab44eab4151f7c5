"""What the load generator says of itself with every result, and whether it was the limit.

``client_limited`` is a verdict with reasons: a number measured by a client that could not keep up describes the client.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench.records import RequestRecord, Schedule

#: Above these the client is called the limit. CPU: of one core, per process. Lags: p99. Capacity: share of the measured.
CPU_SHARE_LIMIT, LATENESS_LIMIT_S, LOOP_LAG_LIMIT_S, CAPACITY_SHARE_LIMIT = 0.85, 1e-3, 10e-3, 0.8
#: Of a late loop: share of answers whose first token merged with later ones. At 1 % a p99 of TTFT may hang on them.
MERGED_LIMIT = 0.01


#: Where real-time priority was wanted, as against a server on this machine, and not had.
_REFUSED = (
    ". The sending processes ran at ordinary priority: allow them real-time priority (root, CAP_SYS_NICE or "
    "`ulimit -r 1`), or keep cores free of the engine for them"
)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """p50, p99 and maximum of a set of times in seconds; None where there were none."""

    p50_s: float | None
    p99_s: float | None
    max_s: float | None
    num: int

    @classmethod
    def of(cls, values_s: Sequence[float] | np.ndarray) -> Quantiles:
        if len(values_s) == 0:
            return cls(None, None, None, 0)
        p50, p99 = np.percentile(values_s, [50, 99])
        return cls(float(p50), float(p99), float(np.max(values_s)), len(values_s))


@dataclass(frozen=True, slots=True)
class Honesty:
    """The block that goes into every manifest under ``client``.

    Args:
        send_lateness: sent - due, of requests with a due time. With a concurrency cap, queueing is part of it.
        loop_lag: lateness of a timer, two to ten times a second.
        read_lag: from the kernel's receive stamp to the moment when this process handled the bytes (once a request).
        cpu_share: CPU time / wall time of each process while the main part ran, sending and stamping only.
        chunks_per_read: SSE events with tokens for each read that brought any.
        first_chunk_merged_ratio: share of the streamed answers whose first token came in one read with later ones: its
            arrival is known only to be no later than that read's stamp.
        stamps: "kernel", "user" or "mixed": where receive times come from.
        capacity_chunks_per_s: what one process of this client was measured to take on this machine.
        receive_path: what read the answers: "compiled", or "event loop" with the reason in brackets.
        compiled_ratio: share of the answers that the compiled path read from head to end; the others had something that
            it leaves to the event loop (errors, other framings).
        real_time: whether the sending processes ran before ordinary ones (``bench.priority``).
        prepare_s: time that loading (the first time: compiling) that path took, before the clock started.
        notes: what was not as it should be, but changed no number, and why not.
        checked_tokens_ratio: share of the good requests whose count was compared with the server's ``usage``.
    """

    client_limited: bool
    reasons: tuple[str, ...]
    send_lateness: Quantiles
    loop_lag: Quantiles
    read_lag: Quantiles
    cpu_share: tuple[float, ...]
    cpu_us_per_chunk: float | None
    chunks_per_read: float | None
    first_chunk_merged_ratio: float | None
    stamps: str
    num_processes: int
    event_loop: str
    num_connections: int
    num_stale_retries: int
    num_unsolicited: int
    clock_steps_s: tuple[float, ...]
    clock_spread_s: float
    checked_tokens_ratio: float | None
    num_isl_differs: int
    chunks_per_s: float | None
    capacity_chunks_per_s: float | None = None
    capacity_source: str | None = None
    errors: dict[str, int] = field(default_factory=dict)
    receive_path: str = "event loop"
    compiled_ratio: float | None = None
    prepare_s: float = 0.0
    notes: tuple[str, ...] = ()
    real_time: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def assess(
    schedule: Schedule,
    facts: Sequence[dict[str, Any]],
    records: Iterable[RequestRecord],
    *,
    capacity_chunks_per_s: float | None = None,
    capacity_source: str | None = None,
) -> Honesty:
    """The honesty block from the workers' own measurements and the records."""
    main = [r for r in records if r.phase != "warmup"]
    late = np.asarray([r.sent_s - r.due_s for r in main if r.sent_s is not None and r.due_s is not None])
    tick = np.concatenate([np.asarray(f["tick_lag_ns"], dtype=float) for f in facts]) / 1e9
    read = np.concatenate([np.asarray(f["read_lag_ns"], dtype=float) for f in facts]) / 1e9
    cpu = tuple(round(f["cpu_s"] / f["wall_s"], 4) for f in facts)
    events = sum(f["num_events"] for f in facts)
    reads = sum(f["num_reads_with_tokens"] for f in facts)
    wall = max((f["wall_s"] for f in facts), default=0.0)
    rate = events / wall if wall > 0 and events else None
    kernel, stamped = sum(f["num_kernel_stamped"] for f in facts), sum(f["num_stamped"] for f in facts)
    streamed = sum(f["num_streamed"] for f in facts)
    good = [r for r in main if r.error is None]
    lateness, loop_lag = Quantiles.of(late), Quantiles.of(tick)
    stamps = "kernel" if kernel == stamped and stamped else "mixed" if kernel else "user"
    merged = sum(f["num_first_merged"] for f in facts) / streamed if streamed else None
    reasons = _reasons(schedule, cpu, lateness, rate, len(facts), capacity_chunks_per_s)
    real_time = bool(facts) and all(f["real_time"] for f in facts)
    harm, notes = _judge_lag(schedule, loop_lag, Quantiles.of(read), stamps, merged)
    if harm and any(f["real_time_refused"] for f in facts):
        harm[-1] += _REFUSED
    reasons += harm
    return Honesty(
        client_limited=bool(reasons),
        reasons=tuple(reasons),
        send_lateness=lateness,
        loop_lag=loop_lag,
        read_lag=Quantiles.of(read),
        cpu_share=cpu,
        cpu_us_per_chunk=sum(f["cpu_s"] for f in facts) / events * 1e6 if events else None,
        chunks_per_read=events / reads if reads else None,
        first_chunk_merged_ratio=merged,
        stamps=stamps,
        num_processes=len(facts),
        event_loop=str(facts[0]["event_loop"]) if facts else "",
        num_connections=sum(f["num_connections"] for f in facts),
        num_stale_retries=sum(f["num_retries"] for f in facts),
        num_unsolicited=sum(f["num_unsolicited"] for f in facts),
        clock_steps_s=tuple(s / 1e9 for f in facts for s in f["clock_steps_ns"]),
        clock_spread_s=max((f["clock_spread_ns"] for f in facts), default=0) / 1e9,
        checked_tokens_ratio=sum(r.token_source == "usage" for r in good) / len(good) if good else None,
        num_isl_differs=sum(f["num_isl_differs"] for f in facts),
        chunks_per_s=rate,
        capacity_chunks_per_s=capacity_chunks_per_s,
        capacity_source=capacity_source,
        errors=dict(Counter(r.error for r in main if r.error is not None)),
        receive_path=str(facts[0]["receive_path"]) if facts else "",
        compiled_ratio=sum(f["num_compiled"] for f in facts) / stamped if stamped else None,
        prepare_s=max((f["prepare_s"] for f in facts), default=0.0),
        notes=tuple(notes),
        real_time=real_time,
    )


def _reasons(
    schedule: Schedule,
    cpu: Sequence[float],
    lateness: Quantiles,
    rate: float | None,
    num_processes: int,
    capacity: float | None,
) -> list[str]:
    out = []
    if cpu and max(cpu) > CPU_SHARE_LIMIT:
        out.append(f"a sending process used {max(cpu):.0%} of a core (limit {CPU_SHARE_LIMIT:.0%})")
    open_without_cap = schedule.kind in ("open_loop", "trace") and schedule.max_in_flight is None
    if open_without_cap and lateness.p99_s is not None and lateness.p99_s > LATENESS_LIMIT_S:
        out.append(
            f"requests were sent late by {lateness.p99_s * 1e3:.2f} ms at p99 (limit {LATENESS_LIMIT_S * 1e3:g} ms)"
        )
    if capacity is not None and rate is not None and rate > CAPACITY_SHARE_LIMIT * capacity * num_processes:
        out.append(
            f"{rate:,.0f} chunks/s are more than {CAPACITY_SHARE_LIMIT:.0%} of the measured capacity "
            f"({capacity:,.0f} chunks/s in each of {num_processes} processes)"
        )
    return out


def _judge_lag(
    schedule: Schedule, loop_lag: Quantiles, read_lag: Quantiles, stamps: str, merged: float | None
) -> tuple[list[str], list[str]]:
    """(reasons, notes) for an event loop that was late.

    Lateness is harm where it reaches a number. User-space stamps are late by it. Kernel stamps are not: then it shows in
    the next sends of a closed loop or under a cap, which wait until an answer's end is handled (``read_lag``), and in
    first tokens that merged with later ones in one read. Sends of an open loop have a limit of their own.
    """
    if loop_lag.p99_s is None or loop_lag.p99_s <= LOOP_LAG_LIMIT_S:
        return [], []
    late = f"the event loop was late by {loop_lag.p99_s * 1e3:.1f} ms at p99 (limit {LOOP_LAG_LIMIT_S * 1e3:g} ms)"
    if stamps != "kernel":
        return [f"{late}, and so are the stamps of the answers"], []
    reasons = []
    if schedule.max_in_flight is not None and read_lag.p99_s is not None and read_lag.p99_s > LOOP_LAG_LIMIT_S:
        reasons.append(
            f"{late}: ends of answers were handled {read_lag.p99_s * 1e3:.1f} ms after they came at p99, so that next "
            "requests went out late"
        )
    if merged is not None and merged > MERGED_LIMIT:
        reasons.append(
            f"{late}: {merged:.1%} of the first tokens came in one read with later ones (limit {MERGED_LIMIT:.0%}), so "
            "that their TTFT is an upper bound"
        )
    if reasons:
        return reasons, []
    return [], [f"{late}; times are the kernel's and sends were not held up, so no number is touched by it"]
