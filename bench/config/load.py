"""How requests arrive: batches, a closed loop, an open loop, a ramp of either, or a trace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bench.config.spec import PositiveFloat, PositiveInt, Spec


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
