"""What an experiment file may say. Pydantic models, frozen, unknown fields refused.

Unions are told apart by ``kind``, so a field that does not apply to the chosen kind cannot be written.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

#: Shapes the field knows by name, as (ISL, OSL) in tokens.
NAMED_SHAPES: dict[str, tuple[int, int]] = {
    "1k/1k": (1024, 1024),
    "8k/1k": (8192, 1024),
    "1k/8k": (1024, 8192),
    "2048/128": (2048, 128),
    "512/2048": (512, 2048),
    "128/128": (128, 128),
    "128/2048": (128, 2048),
}

Scalar = bool | int | float | str | None
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]


def _refuse_bool_and_text(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError(f"expected a number, got {value!r}")
    return value


PositiveFloat = Annotated[float, BeforeValidator(_refuse_bool_and_text), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_refuse_bool_and_text), Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, BeforeValidator(_refuse_bool_and_text), Field(gt=0, le=1, allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of every part of an experiment file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- lengths -----------------------------------------------------------------------------------------------------


class FixedLengthSpec(Spec):
    """Every request has the same number of tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: PositiveInt


class UniformLengthSpec(Spec):
    """Uniform over the whole numbers ``low``..``high``, both included."""

    kind: Literal["uniform"]
    low: PositiveInt
    high: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> UniformLengthSpec:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class NormalLengthSpec(Spec):
    """Normal, rounded, clipped to ``low``..``high``."""

    kind: Literal["normal"]
    mean: PositiveFloat
    sd: NonNegativeFloat
    low: PositiveInt = 1
    high: PositiveInt | None = None


class LognormalLengthSpec(Spec):
    """Lognormal with the given mean and standard deviation (of the lengths themselves), clipped to ``low``..``high``."""

    kind: Literal["lognormal"]
    mean: PositiveFloat
    sd: NonNegativeFloat
    low: PositiveInt = 1
    high: PositiveInt | None = None


class NominalLengthSpec(Spec):
    """Uniform over ``low_ratio``..1 of ``tokens``: how InferenceX and NVIDIA draw lengths (0.8 to 1 of nominal)."""

    kind: Literal["nominal"]
    tokens: PositiveInt
    low_ratio: Ratio = 0.8


def _length_shorthand(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"kind": "fixed", "tokens": value}
    return value


LengthSpec = Annotated[
    Annotated[
        FixedLengthSpec | UniformLengthSpec | NormalLengthSpec | LognormalLengthSpec | NominalLengthSpec,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_length_shorthand),
]


def max_length_tokens(spec: Any) -> int:
    """The longest length to plan for, in tokens: mean + 6 sd where a distribution has no bound."""
    if isinstance(spec, (FixedLengthSpec, NominalLengthSpec)):
        return spec.tokens
    if isinstance(spec, UniformLengthSpec):
        return spec.high
    if spec.high is not None:
        return int(spec.high)
    return int(spec.mean + 6 * spec.sd) + 1


def mean_length_tokens(spec: Any) -> float:
    """The expected length in tokens, ignoring truncation."""
    if isinstance(spec, FixedLengthSpec):
        return float(spec.tokens)
    if isinstance(spec, NominalLengthSpec):
        return spec.tokens * (1 + spec.low_ratio) / 2
    if isinstance(spec, UniformLengthSpec):
        return (spec.low + spec.high) / 2
    return float(spec.mean)


# --- workload ----------------------------------------------------------------------------------------------------


class PrefixSpec(Spec):
    """Shared prefixes: ``share`` of the requests begin with one of ``num_prefixes`` prefixes of ``tokens`` tokens.

    The prefix is part of the ISL, not added to it.
    """

    tokens: PositiveInt
    num_prefixes: PositiveInt = 1
    share: Ratio = 1.0


class SessionSpec(Spec):
    """Multi-turn sessions: each turn's prompt is the whole conversation so far plus new tokens."""

    turns: PositiveInt
    think_s: NonNegativeFloat = 0.0


class WorkloadSpec(Spec):
    """What is asked: prompt and output lengths, and what prompts share.

    ``shape: 8k/1k`` is short for isl and osl. Lengths are whole numbers or distributions.
    """

    isl: LengthSpec
    osl: LengthSpec
    prefix: PrefixSpec | None = None
    sessions: SessionSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, data: Any) -> Any:
        if isinstance(data, dict) and "shape" in data:
            shape = data["shape"]
            rest = {k: v for k, v in data.items() if k != "shape"}
            isl, osl = parse_shape(shape)
            return {"isl": isl, "osl": osl, **rest}
        return data


def parse_shape(shape: Any) -> tuple[int, int]:
    """'8k/1k' or '1000/200' -> (ISL, OSL) in tokens. Raises ValueError."""
    if isinstance(shape, str):
        if shape in NAMED_SHAPES:
            return NAMED_SHAPES[shape]
        found = re.fullmatch(r"(\d+)(k?)/(\d+)(k?)", shape)
        if found:
            isl, osl = (int(found[i]) * (1024 if found[i + 1] else 1) for i in (1, 3))
            if isl > 0 and osl > 0:
                return isl, osl
    raise ValueError(f'expected a shape such as "1k/1k" or "1000/200", got {shape!r}')


# --- load --------------------------------------------------------------------------------------------------------


class OfflineLoad(Spec):
    """Batches of ``batch_size`` requests, each submitted whole when the one before is done."""

    kind: Literal["offline"]
    batch_size: PositiveInt


class ClosedLoopLoad(Spec):
    """``concurrency`` requests always in flight: a new one goes out when one completes."""

    kind: Literal["closed_loop"]
    concurrency: PositiveInt


class OpenLoopLoad(Spec):
    """Requests due by a clock. ``burstiness`` is the gamma shape: 1 is Poisson, below 1 burstier, above smoother.

    ``max_in_flight`` caps concurrency; latency still counts from the due time, so that queueing is not hidden.
    """

    kind: Literal["open_loop"]
    rate_per_s: PositiveFloat
    arrivals: Literal["constant", "poisson", "gamma"] = "poisson"
    burstiness: PositiveFloat = 1.0
    max_in_flight: PositiveInt | None = None


class RampSegment(Spec):
    """One piece of a ramp: from the previous level to this one over ``duration_s`` (a step when ``hold``)."""

    duration_s: PositiveFloat
    rate_per_s: PositiveFloat | None = None
    concurrency: PositiveInt | None = None
    hold: bool = True

    @model_validator(mode="after")
    def _one_level(self) -> RampSegment:
        if (self.rate_per_s is None) == (self.concurrency is None):
            raise ValueError("give exactly one of rate_per_s and concurrency")
        return self


class RampLoad(Spec):
    """A piecewise series of rates (open loop) or of concurrencies (closed loop)."""

    kind: Literal["ramp"]
    segments: tuple[RampSegment, ...] = Field(min_length=1)
    arrivals: Literal["constant", "poisson", "gamma"] = "poisson"
    burstiness: PositiveFloat = 1.0
    max_in_flight: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> RampLoad:
        if len({s.rate_per_s is None for s in self.segments}) != 1:
            raise ValueError("segments must all give rate_per_s, or all give concurrency")
        return self


class TraceLoad(Spec):
    """Arrivals and lengths from a file. ``time_scale`` stretches time: 0.5 replays twice as fast.

    The trace's own lengths are sent; ``workload.isl`` and ``osl`` then say only what to plan for (fit and run time).
    """

    kind: Literal["trace"]
    path: str
    format: Literal["mooncake", "burstgpt", "azure", "bailian"] | None = None  # None: recognised from the file
    time_scale: PositiveFloat = 1.0
    max_in_flight: PositiveInt | None = None


LoadSpec = Annotated[OfflineLoad | ClosedLoopLoad | OpenLoopLoad | RampLoad | TraceLoad, Field(discriminator="kind")]


def load_level(load: Any) -> tuple[str, float]:
    """(name of the axis, its value) for tables: ("batch_size", 8), ("concurrency", 8), ("rate_per_s", 2.5)."""
    if isinstance(load, OfflineLoad):
        return "batch_size", load.batch_size
    if isinstance(load, ClosedLoopLoad):
        return "concurrency", load.concurrency
    if isinstance(load, OpenLoopLoad):
        return "rate_per_s", load.rate_per_s
    if isinstance(load, RampLoad):
        return "segments", len(load.segments)
    return "time_scale", load.time_scale


# --- engines -----------------------------------------------------------------------------------------------------


class VllmEngine(Spec):
    """vLLM in a child process of its own: offline batches through vllm.LLM's engine, closed loops through AsyncLLM.

    ``args`` are vLLM's own engine arguments, by their own names.
    """

    kind: Literal["vllm"]
    args: dict[str, Any] = {}
    env: dict[str, str] = {}


class VllmServerEngine(Spec):
    """``vllm serve`` on a free port, driven over HTTP."""

    kind: Literal["vllm_server"]
    args: dict[str, Any] = {}
    env: dict[str, str] = {}
    api: Literal["completions", "chat"] = "completions"


class EndpointEngine(Spec):
    """Any OpenAI-compatible URL. The key is read from the environment variable ``api_key_env``, never stored."""

    kind: Literal["endpoint"]
    url: str
    served_model: str | None = None
    api: Literal["completions", "chat"] = "completions"
    api_key_env: str | None = None
    prompts: Literal["token_ids", "text"] = "text"
    extra_body: dict[str, Any] = {}
    num_gpus: NonNegativeInt = 0

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not re.match(r"(https?://\S+|unix:\S+)$", url):
            raise ValueError(f'expected a URL that starts with http://, https:// or unix:, got "{url}"')
        return url


class FleetSpec(Spec):
    """Engines behind a router: ``engines`` equal ones, or pools of ``prefill`` and ``decode`` engines joined by ``kv_link``."""

    engines: PositiveInt = 1
    routing: Literal["round_robin", "least_loaded", "prefix_aware"] = "least_loaded"
    prefill: NonNegativeInt = 0
    decode: NonNegativeInt = 0
    kv_link: str | None = None


class SimulatedEngine(Spec):
    """The simulator: vLLM's scheduler over predicted step times, for hardware that is not at hand."""

    kind: Literal["simulated"]
    gpu: str
    args: dict[str, Any] = {}
    profile: str | None = None
    fleet: FleetSpec = FleetSpec()


class NullEngine(Spec):
    """Answers at once and so measures the harness itself. For tests and for `make perf`."""

    kind: Literal["null"]
    args: dict[str, Any] = {}
    time_per_token_s: NonNegativeFloat = 0.0
    fail: Literal["none", "start", "crash", "hang", "oom", "request"] = "none"


EngineSpec = Annotated[
    VllmEngine | VllmServerEngine | EndpointEngine | SimulatedEngine | NullEngine, Field(discriminator="kind")
]


# --- the rest ----------------------------------------------------------------------------------------------------


class WarmupSpec(Spec):
    """Requests served before the clock counts, at the measured shape. ``num_requests: null`` = one full batch."""

    num_requests: NonNegativeInt | None = None


class StopSpec(Spec):
    """A run goes on until both minima are met and never past either maximum."""

    min_duration_s: NonNegativeFloat = 0.0
    max_duration_s: PositiveFloat | None = None
    min_requests: NonNegativeInt = 0
    max_requests: PositiveInt | None = None
    max_errors: NonNegativeInt | None = None
    max_error_ratio: Ratio | None = None

    @model_validator(mode="after")
    def _ordered(self) -> StopSpec:
        if self.max_duration_s is not None and self.max_duration_s < self.min_duration_s:
            raise ValueError(f"max_duration_s ({self.max_duration_s}) is below min_duration_s ({self.min_duration_s})")
        if self.max_requests is not None and self.max_requests < self.min_requests:
            raise ValueError(f"max_requests ({self.max_requests}) is below min_requests ({self.min_requests})")
        return self


class LimitsSpec(Spec):
    """Time limits. Past one of them the engine is ended and the run has failed, with its reason."""

    engine_start_s: PositiveFloat = 900.0
    run_s: PositiveFloat = 1800.0
    idle_s: PositiveFloat = 300.0  # no request completed and no engine step for this long: it hangs
    memory_release_s: PositiveFloat = 60.0


class TelemetrySpec(Spec):
    """How the devices are sampled. ``source: none`` turns it off (and the report says so).

    ``auto`` takes the engine's GPUs and the host, ``nvml`` the GPUs alone, ``host`` the host alone. ``gpm: false`` leaves
    the activity counters of Hopper and newer GPUs to another profiler.
    """

    source: Literal["auto", "nvml", "host", "none"] = "auto"
    rate_hz: Annotated[PositiveFloat, Field(le=1000)] = 20.0
    gpm: bool = True


class SweepSpec(Spec):
    """Axes: ``grid`` is the product of its lists, ``points`` are explicit extra ones. Keys are dotted paths."""

    grid: dict[str, list[Any]] = {}
    points: list[dict[str, Any]] = []

    @field_validator("grid")
    @classmethod
    def _not_empty(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(f"axis {key} has no values")
        return grid


class CellSpec(Spec):
    """Everything that decides what one cell measures. Its canonical JSON names the cell."""

    model: str
    weights: Literal["auto", "dummy"] = "auto"
    engine: EngineSpec
    load: LoadSpec
    workload: WorkloadSpec
    warmup: WarmupSpec = WarmupSpec()
    stop: StopSpec = StopSpec()
    seed: NonNegativeInt = 0

    @property
    def engine_args(self) -> dict[str, Any]:
        return dict(getattr(self.engine, "args", {}))

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.engine_args.get("tensor_parallel_size", 1) or 1)

    @property
    def pipeline_parallel_size(self) -> int:
        return int(self.engine_args.get("pipeline_parallel_size", 1) or 1)

    @property
    def data_parallel_size(self) -> int:
        return int(self.engine_args.get("data_parallel_size", 1) or 1)

    @property
    def num_devices(self) -> int:
        """GPUs (or CPU ranks) that one engine of this cell holds."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size


class Experiment(Spec):
    """A whole experiment file. ``why`` is required: a measurement without a question is not worth its time."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)
    why: str = Field(min_length=1)
    model: str
    weights: Literal["auto", "dummy"] = "auto"
    engine: EngineSpec
    load: LoadSpec
    workload: WorkloadSpec
    warmup: WarmupSpec = WarmupSpec()
    stop: StopSpec = StopSpec()
    seed: NonNegativeInt = 0
    repeats: PositiveInt = 3
    limits: LimitsSpec = LimitsSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    sweep: SweepSpec = SweepSpec()
    prices: str | None = None  # a GPU price: name in configs/prices/, or a path
    gpu_price_usd_per_hour: NonNegativeFloat | None = None  # your own price; wins over `prices`
    utilisation: Ratio = 0.5  # the share of full use at which costs are also stated
    slo: str | None = None  # a name in configs/slo/, a path, or a text such as "ttft p99 <= 500 ms"

    @field_validator("why")
    @classmethod
    def _says_something(cls, why: str) -> str:
        if not why.strip():
            raise ValueError("say in a sentence what question this experiment answers")
        return why
