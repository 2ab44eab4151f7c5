"""What a demand file may say: how many requests, how long, when in the day, under which SLO, on which GPUs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from bench.config.experiment import LengthSpec, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec


class CandidateSpec(Spec):
    """A GPU to consider. The price is one's own, or the catalogue's median on-demand offer."""

    gpu: str
    usd_per_gpu_hour: NonNegativeFloat | None = None
    price: str | None = None
    tensor_parallel_sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    quantizations: tuple[str | None, ...] = (None,)
    profile: str | None = None  # a calibration of this GPU on your own runs (bench calibrate)
    results: str | None = None  # measured cells: their request rates within the SLO count as capacity

    @model_validator(mode="after")
    def _one_price(self) -> CandidateSpec:
        if self.usd_per_gpu_hour is not None and self.price is not None:
            raise ValueError(f"candidate {self.gpu}: give usd_per_gpu_hour or price, not both")
        return self


class Demand(Spec):
    """A whole demand file for `bench plan`.

    ``hourly`` is the shape of a day: 24 numbers in proportion to the load of each hour; their largest stands for
    ``peak_rate_per_s``. Without it, ``mean_rate_per_s`` (default: the peak all day) sets the month's volume. A ``trace``
    takes the place of all rates and lengths. Growth compounds monthly; fleets are sized for the horizon.
    """

    name: str = Field(default="plan", pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)
    why: str = "the cheapest fleet that meets the SLO at the peak"
    model: str
    peak_rate_per_s: PositiveFloat | None = None
    mean_rate_per_s: PositiveFloat | None = None
    hourly: tuple[NonNegativeFloat, ...] | None = None
    isl: LengthSpec | None = None
    osl: LengthSpec | None = None
    trace: str | None = None  # a request trace (Mooncake, Bailian, BurstGPT, Azure) instead of rates and lengths
    trace_time_scale: PositiveFloat = 1.0  # stretches the trace's times: 0.5 doubles its rates
    peak_window_s: PositiveFloat = 60.0  # the trace's peak is that of its busiest window of this length
    slo: str
    candidates: tuple[CandidateSpec, ...] = Field(min_length=1)
    growth_per_month: Annotated[float, Field(ge=-0.5, le=1.0)] = 0.0
    horizon_months: NonNegativeInt = 0
    spare_replicas: NonNegativeInt = 1  # N + 1
    zones: PositiveInt = 1  # with several, the fleet carries the peak with one zone lost
    headroom: Annotated[float, Field(ge=0, lt=1)] = 0.15  # of a replica's capacity, left free by the router at the peak
    engine_start_s: NonNegativeFloat = 180.0  # until a new replica serves: it is paid meanwhile
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Demand:
        typed = (self.peak_rate_per_s, self.isl, self.osl)
        if self.trace is None and None in typed:
            raise ValueError("give peak_rate_per_s, isl and osl, or a trace")
        others = (*typed, self.mean_rate_per_s, self.hourly)
        if self.trace is not None and any(v is not None for v in others):
            raise ValueError("a trace brings its own rates and lengths: leave out peak_rate_per_s, hourly, isl and osl")
        if self.growth_per_month and not self.horizon_months:
            raise ValueError("growth_per_month needs horizon_months: how far ahead to plan")
        if self.hourly is not None:
            if len(self.hourly) != 24:
                raise ValueError(f"hourly: expected 24 numbers, one an hour, got {len(self.hourly)}")
            if max(self.hourly) <= 0:
                raise ValueError("hourly: at least one hour must have load")
            if self.mean_rate_per_s is not None:
                raise ValueError("give hourly or mean_rate_per_s, not both")
        if self.mean_rate_per_s and self.peak_rate_per_s and self.mean_rate_per_s > self.peak_rate_per_s:
            raise ValueError(
                f"mean_rate_per_s ({self.mean_rate_per_s:g}) is above peak_rate_per_s ({self.peak_rate_per_s:g})"
            )
        gpus = [(c.gpu, c.price) for c in self.candidates]
        if len(set(gpus)) != len(gpus):
            raise ValueError("two candidates are the same GPU at the same price")
        return self
