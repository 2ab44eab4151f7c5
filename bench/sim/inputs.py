"""What a simulation gets and gives: flat arrays, the same for the readable loop and for the compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bench.errors import BadInput
from bench.records import Schedule
from bench.sim.prefixes import block_numbers
from bench.sim.scheduler import SchedulerConfig

Role = Literal["both", "prefill", "decode"]
RoutingPolicy = Literal["round_robin", "least_loaded", "prefix_aware"]
NO_LIMIT = 2**62

# How a request ended.
UNFINISHED, BY_LENGTH, BY_STOP, REJECTED = range(4)


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine: its scheduler, the coefficients of its step times, and what it does in a disaggregated fleet."""

    config: SchedulerConfig
    coefficients: np.ndarray
    role: Role = "both"

    def __post_init__(self) -> None:
        c = self.config
        capacity = (c.num_blocks - 1) * c.block_size
        if capacity < c.max_model_len:
            raise BadInput(
                f"the KV cache holds {capacity:,} tokens, less than max_model_len ({c.max_model_len:,})",
                next_step="lower max_model_len, use more GPUs or a smaller dtype; vLLM refuses to start",
            )


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas behind a router. ``transfer_*``: moving a prompt's KV cache from a prefill to a decode replica."""

    replicas: tuple[Replica, ...]
    routing: RoutingPolicy = "round_robin"
    transfer_latency_s: float = 0.0
    transfer_s_per_token: float = 0.0
    request_before_s: float = 0.0  # client's send -> engine's queue, where nothing waits
    front_end_s: float = 0.0  # of that, what one server does for one request at a time
    request_after_s: float = 0.0  # engine's output -> client

    def __post_init__(self) -> None:
        roles = {r.role for r in self.replicas}
        if not self.replicas:
            raise BadInput("a fleet needs at least one replica")
        if roles & {"prefill", "decode"} and roles != {"prefill", "decode"}:
            raise BadInput("a disaggregated fleet needs prefill and decode replicas, and no others")


@dataclass(frozen=True, slots=True)
class SimInputs:
    """Everything that decides a simulation. Arrays have one entry per request unless said otherwise."""

    fleet: Fleet
    prompt_tokens: np.ndarray  # int64
    max_tokens: np.ndarray  # int64
    stop_after: np.ndarray  # int64, -1: never
    priority: np.ndarray  # int64
    group: np.ndarray  # int64: a group starts when all requests of the one before are done (warm-up, offline batches)
    next_turn: np.ndarray  # int64: request that follows this one in its session, -1: none
    follows: np.ndarray  # bool: waits for an earlier turn of its session
    think_s: np.ndarray  # float64: pause between the previous turn's end and this request
    due_s: np.ndarray  # float64, from the start of the request's group; nan: as soon as a slot is free
    limit_t_s: np.ndarray  # float64 ascending (num_limits,), from the start of the timed group: from then on ...
    limit: np.ndarray  # int64 (num_limits,): ... so many requests in flight at most (warm-up groups have no limit)
    num_groups: int
    timed_group: int  # the first group that counts: the stop rule's times and requests are counted from its start
    max_duration_s: float  # what is in flight then is broken off
    min_duration_s: float  # once both minima are met (if there is one) nothing more is sent
    min_requests: int
    block_offsets: np.ndarray  # int64 (num_requests + 1,), see bench.sim.prefixes
    block_numbers: np.ndarray  # int64
    num_block_numbers: int
    record_tokens: bool = True

    @property
    def num_requests(self) -> int:
        return len(self.prompt_tokens)


@dataclass(slots=True)
class SimResult:
    """What happened. Times in virtual seconds since the run's start, nan where it did not happen.

    Engine times are those of the engine; the client sees ``request_after_s`` later what the engine puts out.
    """

    sent_s: np.ndarray
    due_s: np.ndarray
    queued_s: np.ndarray  # arrival at the (first) engine
    scheduled_s: np.ndarray
    first_token_s: np.ndarray
    last_token_s: np.ndarray
    ended: np.ndarray  # int64: UNFINISHED, BY_LENGTH, BY_STOP, REJECTED
    num_output_tokens: np.ndarray
    num_hit_tokens: np.ndarray
    num_preemptions: np.ndarray
    replica: np.ndarray  # the replica that generated
    completion_order: np.ndarray  # int64 (number of finished,)
    steps: dict[str, np.ndarray]  # one row per step that computed something; STEP_COLUMNS
    token_offsets: np.ndarray
    token_s: np.ndarray  # engine time of every output token, request after request; empty unless recorded
    end_s: float
    extra: dict[str, float] = field(default_factory=dict)


#: (name, is_float) of the columns of SimResult.steps
STEP_COLUMNS: tuple[tuple[str, bool], ...] = (
    ("replica", False), ("scheduled_s", True), ("end_s", True), ("gpu_s", True), ("host_s", True),
    ("prefill_requests", False), ("prefill_tokens", False), ("prefill_pairs", True), ("prefill_context", False),
    ("decode_requests", False), ("decode_context_sum", False), ("decode_context_max", False),
    ("num_running", False), ("num_waiting", False), ("num_free_blocks", False), ("num_preemptions", False),
    ("hit_tokens", False),
)  # fmt: skip


def prepare(schedule: Schedule, fleet: Fleet, *, record_tokens: bool = True) -> SimInputs:
    """The arrays of ``schedule`` on ``fleet``.

    The same client as for in-process engines (``bench/engines/pacing.py``): warm-up in batches of ``max_in_flight`` before
    everything else, offline batches one after the other, else by due times, slots and sessions.

    Raises:
        BadInput: a request without a prompt length, or replicas that differ in block size under prefix caching.
    """
    requests = schedule.requests
    if schedule.stop.max_requests is not None:
        requests = _first_counted(requests, schedule.stop.max_requests)
    if not requests:
        raise BadInput("nothing to simulate: the schedule has no requests")
    prompt = np.array([_prompt_length(r) for r in requests], dtype=np.int64)
    output = np.array([r.osl for r in requests], dtype=np.int64)
    group, num_groups, timed = _groups(schedule, [r.phase == "warmup" for r in requests])
    next_turn, follows = _sessions(requests, group)
    limit_t, limit = _limits(schedule)
    caching = [r.config.block_size for r in fleet.replicas if r.config.enable_prefix_caching]
    if len(set(caching)) > 1:
        raise BadInput("replicas with prefix caching must have the same block size")
    offsets, numbers, count = np.zeros(len(requests) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64), 0
    if caching:
        offsets, numbers, count = block_numbers(requests, prompt, output, caching[0])
    due = np.full(len(requests), np.nan)
    if schedule.kind in ("open_loop", "trace") and schedule.due_s is not None:
        due = np.asarray(schedule.due_s[: len(requests)], dtype=np.float64).copy()
    return SimInputs(
        fleet=fleet,
        prompt_tokens=prompt,
        max_tokens=output,
        stop_after=np.full(len(requests), -1, dtype=np.int64),
        priority=np.array([r.priority for r in requests], dtype=np.int64),
        group=group,
        next_turn=next_turn,
        follows=follows,
        think_s=np.array([r.think_s for r in requests], dtype=np.float64),
        due_s=due,
        limit_t_s=limit_t,
        limit=limit,
        num_groups=num_groups,
        timed_group=timed,
        max_duration_s=np.inf if schedule.stop.max_duration_s is None else schedule.stop.max_duration_s,
        min_duration_s=schedule.stop.min_duration_s,
        min_requests=schedule.stop.min_requests,
        block_offsets=offsets,
        block_numbers=numbers,
        num_block_numbers=count,
        record_tokens=record_tokens,
    )


def _first_counted(requests: Sequence, count: int) -> tuple:  # type: ignore[type-arg]
    kept, seen = [], 0
    for r in requests:
        seen += r.phase != "warmup"
        if seen > count:
            break
        kept.append(r)
    return tuple(kept)


def _prompt_length(request) -> int:  # type: ignore[no-untyped-def]
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    if request.isl is None:
        raise BadInput(
            f"request {request.index}: its prompt is text and its length in tokens is not known",
            next_step="give isl, or token ids; the simulator has no tokenizer",
        )
    return int(request.isl)


def _groups(schedule: Schedule, warmup: list[bool]) -> tuple[np.ndarray, int, int]:
    """(group of each request, number of groups, first group that is not warm-up)."""
    is_warm = np.array(warmup, dtype=bool)
    size = schedule.max_in_flight
    group = np.zeros(len(warmup), dtype=np.int64)
    warm, rest = np.flatnonzero(is_warm), np.flatnonzero(~is_warm)
    group[warm] = np.arange(len(warm)) // size if size else 0
    first = int(group[warm].max()) + 1 if len(warm) else 0
    group[rest] = first + (np.arange(len(rest)) // size if size and schedule.kind == "offline" else 0)
    return group, int(group.max()) + 1, min(first, int(group.max()))


def _sessions(requests: Sequence, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    next_turn = np.full(len(requests), -1, dtype=np.int64)
    follows = np.zeros(len(requests), dtype=bool)
    last: dict[tuple[int, int], int] = {}
    for i, r in enumerate(requests):
        if r.session is None or r.phase == "warmup":
            continue
        key = (requests[i].session, int(group[i]))
        if key in last:
            next_turn[last[key]] = i
            follows[i] = True
        last[key] = i
    return next_turn, follows


def _limits(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    if schedule.in_flight_steps:
        return (
            np.array([t for t, _ in schedule.in_flight_steps], dtype=np.float64),
            np.array([n for _, n in schedule.in_flight_steps], dtype=np.int64),
        )
    limit = NO_LIMIT if schedule.kind == "offline" or schedule.max_in_flight is None else schedule.max_in_flight
    return np.zeros(1), np.array([limit], dtype=np.int64)
