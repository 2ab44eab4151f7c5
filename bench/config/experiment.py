"""What an experiment file may say. Pydantic models, frozen, unknown fields refused.

Unions are told apart by ``kind``, so a field that does not apply to the chosen kind cannot be written.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bench.config.load import (
    ClosedLoopLoad,
    LoadSpec,
    OfflineLoad,
    OpenLoopLoad,
    RampLoad,
    RampSegment,
    TraceLoad,
    load_level,
)
from bench.config.spec import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Ratio, Scalar, Spec
from bench.config.workload import (
    NAMED_SHAPES,
    FixedLengthSpec,
    LengthSpec,
    LognormalLengthSpec,
    NominalLengthSpec,
    NormalLengthSpec,
    PrefixSpec,
    SessionSpec,
    UniformLengthSpec,
    WorkloadSpec,
    max_length_tokens,
    mean_length_tokens,
    parse_shape,
)

__all__ = [
    "NAMED_SHAPES",
    "CellSpec",
    "ClosedLoopLoad",
    "EndpointEngine",
    "EngineSpec",
    "Experiment",
    "FixedLengthSpec",
    "FleetSpec",
    "LengthSpec",
    "LimitsSpec",
    "LoadSpec",
    "LognormalLengthSpec",
    "NominalLengthSpec",
    "NonNegativeFloat",
    "NonNegativeInt",
    "NormalLengthSpec",
    "NullEngine",
    "OfflineLoad",
    "OpenLoopLoad",
    "PositiveFloat",
    "PositiveInt",
    "PrefixSpec",
    "RampLoad",
    "RampSegment",
    "Ratio",
    "Scalar",
    "SessionSpec",
    "SimulatedEngine",
    "Spec",
    "StopSpec",
    "SweepSpec",
    "TelemetrySpec",
    "TraceLoad",
    "UniformLengthSpec",
    "VllmEngine",
    "VllmServerEngine",
    "WarmupSpec",
    "WorkloadSpec",
    "load_level",
    "max_length_tokens",
    "mean_length_tokens",
    "parse_shape",
]

# --- engines -----------------------------------------------------------------------------------------------------


class VllmEngine(Spec):
    """vLLM in a child process of its own: offline batches through vllm.LLM's engine, closed loops through AsyncLLM.

    ``args`` are vLLM's own engine arguments, by their own names.
    """

    kind: Literal["vllm"]
    args: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)


class VllmServerEngine(Spec):
    """``vllm serve`` on a free port, driven over HTTP."""

    kind: Literal["vllm_server"]
    args: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    api: Literal["completions", "chat"] = "completions"


class EndpointEngine(Spec):
    """Any OpenAI-compatible URL. The key is read from the environment variable ``api_key_env``, never stored."""

    kind: Literal["endpoint"]
    url: str
    served_model: str | None = None
    api: Literal["completions", "chat"] = "completions"
    api_key_env: str | None = None
    prompts: Literal["token_ids", "text"] = "text"
    extra_body: dict[str, Any] = Field(default_factory=dict)
    num_gpus: NonNegativeInt = 0

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not re.match(r"(https?://\S+|unix:\S+)$", url):
            raise ValueError(f'expected a URL that starts with http://, https:// or unix:, got "{url}"')
        return url

    @field_validator("extra_body")
    @classmethod
    def _not_the_generator_s(cls, extra: dict[str, Any]) -> dict[str, Any]:
        """What the client reads times from, or what the schedule decides, is not for the experiment to overwrite."""
        for name in ("stream", "prompt", "messages", "model", "max_tokens", "max_completion_tokens"):
            if name in extra:
                raise ValueError(f"{name} is set by the load generator, for each request; remove it")
        return extra


class FleetSpec(Spec):
    """Engines behind a router: ``engines`` equal ones, or pools of ``prefill`` and ``decode`` engines joined by ``kv_link``."""

    engines: PositiveInt = 1
    routing: Literal["round_robin", "least_loaded", "prefix_aware"] = "least_loaded"
    prefill: NonNegativeInt = 0
    decode: NonNegativeInt = 0
    kv_link: str | None = None

    @property
    def text(self) -> str:
        """For labels: "4 x prefix-aware", "1 prefill + 3 decode over ndr"; empty for a single engine."""
        if self.prefill or self.decode:
            routing = "" if self.routing == "least_loaded" else f", {self.routing.replace('_', '-')}"
            return f"{self.prefill} prefill + {self.decode} decode over {self.kv_link}{routing}"
        return f"{self.engines} x {self.routing.replace('_', '-')}" if self.engines > 1 else ""


class SimulatedEngine(Spec):
    """The simulator: vLLM's scheduler over predicted step times, for hardware that is not at hand."""

    kind: Literal["simulated"]
    gpu: str
    args: dict[str, Any] = Field(default_factory=dict)
    profile: str | None = None
    fleet: FleetSpec = FleetSpec()


class NullEngine(Spec):
    """Answers at once and so measures the harness itself. For tests and for `make perf`."""

    kind: Literal["null"]
    args: dict[str, Any] = Field(default_factory=dict)
    time_per_token_s: NonNegativeFloat = 0.0
    fail: Literal["none", "start", "crash", "hang", "oom", "request"] = "none"


EngineSpec = Annotated[
    VllmEngine | VllmServerEngine | EndpointEngine | SimulatedEngine | NullEngine, Field(discriminator="kind")
]


# --- the rest ----------------------------------------------------------------------------------------------------


class WarmupSpec(Spec):
    """Requests served before the clock counts, at the measured shape. ``num_requests: null`` = one full batch.

    After it the requests of the first ``ramp_up_s`` and of the last ``cool_down_s`` are sent and recorded as the others
    are, but marked, and never counted: by due time where there is one, by the time they were sent in a closed loop.
    """

    num_requests: NonNegativeInt | None = None
    ramp_up_s: NonNegativeFloat = 0.0
    cool_down_s: NonNegativeFloat = 0.0


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

    grid: dict[str, list[Any]] = Field(default_factory=dict)
    points: list[dict[str, Any]] = Field(default_factory=list)

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
