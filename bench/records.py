"""Values and records: what is asked of an engine, and what it reports back.

All times are seconds on one monotonic clock whose zero is the run's start (``t0``); only raw times are stored, never
anything derived from them. ``None`` means "not known" and is never replaced by zero. Records are flat so that they go
to JSON lines and Arrow columns without a mapping.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

# How a number came to be. It travels in every manifest and to every table and picture.
Origin = Literal["measured", "simulated", "imported"]
ORIGINS: tuple[str, ...] = get_args(Origin)

# warmup and ramp_up come before, cool_down after the measured part; all are recorded, only "measured" is counted.
Phase = Literal["warmup", "ramp_up", "measured", "cool_down"]
PHASES: tuple[str, ...] = get_args(Phase)

# Classes of failure of one request. A failed request stays in the denominator of goodput and never in a percentile.
ErrorClass = Literal[
    "connect",  # refused, unreachable, DNS, TLS handshake or certificate
    "connect_timeout",
    "http_4xx",
    "http_429",  # Retry-After is kept in retry_after_s
    "http_5xx",
    "reset",  # connection closed or reset before the response was complete
    "stall",  # no byte for longer than the stall limit
    "timeout",  # the request's total limit passed
    "malformed_http",
    "malformed_sse",
    "truncated",  # stream ended without its end marker
    "wrong_token_count",  # the server's usage disagrees with what was asked or counted
    "server_error",  # an error object inside a 200 stream
    "engine_error",  # an in-process engine failed this request
    "aborted",  # cut off by the stop rule or by the user
]
ERROR_CLASSES: tuple[str, ...] = get_args(ErrorClass)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to be served. Exactly one of ``prompt_token_ids``, ``text`` and ``messages`` is set.

    ``prompt_token_ids`` is a 1-d int32 array of length ``isl``. ``osl`` is the number of tokens to generate
    (``ignore_eos`` is set, so it is exact on engines that honour it).
    """

    index: int
    osl: int
    isl: int | None = None
    prompt_token_ids: np.ndarray | None = None
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    phase: Phase = "measured"
    session: int | None = None  # multi-turn: requests of one session go one after the other
    turn: int = 0
    think_s: float = 0.0  # pause between the previous turn's last byte and this turn's due time
    prefix_tokens: int = 0  # how many leading tokens are shared on purpose with other requests
    priority: int = 0


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a run ends. A run goes on until both minima are met, and never past either maximum.

    ``max_errors`` and ``max_error_ratio`` end it early as failed.
    """

    min_duration_s: float = 0.0
    max_duration_s: float | None = None
    min_requests: int = 0
    max_requests: int | None = None
    max_errors: int | None = None
    max_error_ratio: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Requests with their due times, built and seeded before the clock starts.

    * offline: no due times; ``max_in_flight = B`` means batches of B, each submitted whole when the one before is done
      (due and sent at that moment); ``max_in_flight = None`` means all at once at 0.
    * closed loop: ``due_s`` is None and ``max_in_flight`` is the concurrency.
    * open loop: ``due_s`` is an ascending array of seconds, with or without ``max_in_flight``.
    * trace replay: as the open loop, due times from a file.

    ``due_s[i]`` belongs to ``requests[i]``. Same seeds, same bytes: see :meth:`digest`.
    """

    kind: Literal["offline", "closed_loop", "open_loop", "trace"]
    requests: tuple[Request, ...]
    due_s: np.ndarray | None = None
    max_in_flight: int | None = None
    stop: StopRule = field(default_factory=StopRule)
    seed: int = 0
    # concurrency over time for ramps: (t_s, limit) steps; None means max_in_flight throughout
    in_flight_steps: tuple[tuple[float, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.due_s is not None and len(self.due_s) != len(self.requests):
            raise ValueError(f"{len(self.due_s)} due times for {len(self.requests)} requests")
        if self.kind in ("open_loop", "trace") and self.due_s is None:
            raise ValueError(f"{self.kind} needs due times")
        if self.kind == "closed_loop" and self.max_in_flight is None and self.in_flight_steps is None:
            raise ValueError("closed_loop needs max_in_flight")

    def digest(self) -> str:
        """sha256 (hex) over every request and due time: equal schedules have equal digests, on any machine."""
        h = hashlib.sha256()
        h.update(repr((self.kind, self.max_in_flight, self.in_flight_steps)).encode())
        for i, r in enumerate(self.requests):
            due = float("nan") if self.due_s is None else float(self.due_s[i])
            h.update(struct.pack("<qqqd", r.index, r.osl, -1 if r.isl is None else r.isl, due))
            h.update(repr((r.text, r.messages, r.phase, r.session, r.turn, r.think_s, r.prefix_tokens)).encode())
            if r.prompt_token_ids is not None:
                h.update(np.ascontiguousarray(r.prompt_token_ids, dtype="<i4").tobytes())
        return h.hexdigest()


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What happened to one request. Raw times in seconds since the run's start; nothing derived."""

    index: int
    phase: Phase
    isl: int | None  # from the engine or the server's usage (see token_source)
    osl: int | None  # tokens really produced
    # None in a closed loop, due when a slot was free: due = sent. There as well where no connection let it be sent.
    due_s: float | None
    sent_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    done_s: float | None
    error: ErrorClass | None = None
    error_detail: str | None = None
    finish_reason: str | None = None
    requested_osl: int | None = None
    first_chunk_tokens: int | None = None  # tokens that came with the first chunk
    num_chunks: int | None = None
    token_source: Literal["engine", "usage", "chunks", "tokenizer", "schedule"] | None = None
    # the engine's own view, where it gives one; same clock and origin as the rest
    queued_s: float | None = None
    scheduled_s: float | None = None
    engine_first_token_s: float | None = None
    engine_last_token_s: float | None = None
    num_cached_tokens: int | None = None
    num_preemptions: int | None = None
    # HTTP clients only
    connect_s: float | None = None  # length of the connection set-up that this request waited for, 0 if reused
    http_status: int | None = None
    retry_after_s: float | None = None
    session: int | None = None
    turn: int | None = None
    worker: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value, without the fields that are None (they read back as None)."""
        return {k: v for k in self.__slots__ if (v := getattr(self, k)) is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RequestRecord:
        """Inverse of :meth:`to_dict`. Unknown keys (from a newer version) are dropped."""
        known = {f.name for f in fields(cls)}
        base: dict[str, Any] = dict.fromkeys(
            ("isl", "osl", "due_s", "sent_s", "first_token_s", "last_token_s", "done_s")
        )
        return cls(**{**base, **{k: v for k, v in data.items() if k in known}})


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One read of streamed output: ``tokens`` tokens of request ``index`` arrived at ``t_s``."""

    index: int
    t_s: float
    tokens: int
    num_events: int = 1  # SSE events in this read


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One iteration of the engine (one forward pass). Later work calibrates the simulator on these."""

    step: int
    t_s: float  # when the step's output was there
    step_time_s: float | None  # since the previous step's output, or the engine's own elapsed time
    num_running: int
    num_waiting: int
    kv_usage_ratio: float | None
    prefill_tokens: int  # scheduled this step for prompts
    decode_tokens: int  # scheduled this step for generation
    prefill_requests: int
    decode_requests: int
    context_tokens: int | None = None  # sum over scheduled requests of the tokens already in the KV cache
    num_preemptions: int = 0  # in this step
    cached_tokens: int | None = None  # prompt tokens served from the prefix cache in this step


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """One scraped value of the server's ``/metrics``. ``labels`` is a JSON object with sorted keys."""

    t_s: float
    name: str
    labels: str
    value: float


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one device. ``device`` is the GPU's UUID, or ``cpu`` for the host. None = not available here.

    ``energy_j`` is the device's cumulative counter, ``energy_t_s`` the moment the driver stamped it.
    """

    t_s: float
    device: str
    index: int | None = None
    power_w: float | None = None  # instantaneous
    power_average_w: float | None = None  # the driver's 1 s mean
    energy_j: float | None = None
    energy_t_s: float | None = None
    gpu_util_ratio: float | None = None  # "some kernel ran"; for cpu: busy share of all cores
    memory_util_ratio: float | None = None
    sm_active_ratio: float | None = None  # GPM, Hopper and newer
    sm_occupancy_ratio: float | None = None
    tensor_active_ratio: float | None = None
    dram_bandwidth_ratio: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    pcie_rx_bytes_per_s: float | None = None
    nvlink_tx_bytes_per_s: float | None = None
    nvlink_rx_bytes_per_s: float | None = None
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None
    memory_temperature_c: float | None = None
    memory_used_bytes: int | None = None
    throttle_reasons: int | None = None  # bit mask as NVML gives it
    throttled_sw_power_s: float | None = None  # cumulative seconds
    throttled_sync_boost_s: float | None = None
    throttled_sw_thermal_s: float | None = None
    throttled_hw_thermal_s: float | None = None
    throttled_hw_power_s: float | None = None
    num_foreign_processes: int | None = None
    lost: bool = False  # the driver reported this GPU as lost


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself once it is up; goes into the manifest whole."""

    kind: str
    version: str
    effective_args: dict[str, Any] = field(default_factory=dict)
    num_gpus: int = 0  # GPUs the engine holds (0 on a CPU)
    device_uuids: tuple[str, ...] = ()
    kv_capacity_tokens: int | None = None
    num_kv_blocks: int | None = None
    block_size: int | None = None
    start_s: float | None = None  # wall seconds from launch to ready
    max_model_len: int | None = None
    pids: tuple[int, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its uncertainty. No bare float leaves ``analysis``.

    ``low`` and ``high`` bound ``value`` at ``confidence``; they are None where one run alone gives no interval.
    """

    value: float
    low: float | None
    high: float | None
    confidence: float = 0.95
    method: str = ""
    num_runs: int = 1
    unit: str = ""

    def scaled(self, factor: float, unit: str | None = None) -> Estimate:
        """This estimate times ``factor`` (of either sign), interval included."""
        ends = [None if e is None else e * factor for e in (self.low, self.high)]
        low, high = ends if factor >= 0 else ends[::-1]
        new_unit = self.unit if unit is None else unit
        return Estimate(self.value * factor, low, high, self.confidence, self.method, self.num_runs, new_unit)


@dataclass(frozen=True, slots=True)
class Warning_:
    """A typed doubt about a measurement, with its cause and remedy."""

    code: str  # kebab-case, stable: "client-limited", "too-few-runs", "simulated", ...
    message: str  # what is doubtful and how much
    remedy: str  # what to do about it
    severity: Literal["note", "warning", "serious"] = "warning"
    scope: str = ""  # cell or run it concerns
    size: float = 0.0  # how bad, comparable only within one code: the larger the worse
