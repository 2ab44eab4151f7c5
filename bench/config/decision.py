"""What a decision file may say: the options, the APIs, the volumes and the mix that are compared."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bench.config.experiment import NonNegativeFloat, PositiveFloat, PositiveInt, Ratio, Spec


class OwnedSpec(Spec):
    """Owned hardware, per GPU. See ``bench.decide.ownership``.

    ``purchase`` names a purchase in ``configs/prices/``: it gives what is left out of capital, life and power.
    """

    purchase: str | None = None
    capex_usd: NonNegativeFloat | None = None
    life_years: PositiveFloat | None = None
    power_w: NonNegativeFloat | None = None
    usd_per_kwh: NonNegativeFloat
    pue: PositiveFloat = 1.3
    hosting_usd_per_month: NonNegativeFloat = 0.0
    spare_ratio: NonNegativeFloat = 0.0
    staff_hours_per_month: NonNegativeFloat = 0.0
    usd_per_staff_hour: NonNegativeFloat = 0.0
    resale_ratio: NonNegativeFloat = 0.0
    interest_per_year: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _complete(self) -> OwnedSpec:
        missing = [n for n in ("capex_usd", "life_years", "power_w") if getattr(self, n) is None]
        if missing and self.purchase is None:
            raise ValueError(f"give {', '.join(missing)}, or purchase: a name in configs/prices/")
        return self


class FineTuneSpec(Spec):
    """A one-off cost spread over months; adapters that share the replicas."""

    one_off_usd: NonNegativeFloat
    months: PositiveFloat = 12.0
    num_adapters_sharing: PositiveInt = 1


class SimulateSpec(Spec):
    """What to simulate on the option's GPUs where nothing was measured: one replica at rising concurrency."""

    model: str
    isl: PositiveInt = 1000
    osl: PositiveInt = 300
    quantization: str | None = None
    concurrencies: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8, 16, 32, 64, 128, 256), min_length=1)
    at_concurrency: PositiveInt | None = None  # the throughput that counts; default: the highest of the curve
    profile: str | None = None  # a calibration on your own runs (bench calibrate)

    @model_validator(mode="after")
    def _on_the_curve(self) -> SimulateSpec:
        if self.at_concurrency is not None and self.at_concurrency not in self.concurrencies:
            raise ValueError(f"at_concurrency {self.at_concurrency} is not among concurrencies")
        return self


class ApiSpec(Spec):
    """An API by name with how it is used: in batches at the batch price, with a share of cached input of its own."""

    name: str = Field(min_length=1)
    batch: bool = False
    cached_input: float | None = Field(default=None, ge=0, le=1)  # share of the input; default: the decision's


class SelfHostSpec(Spec):
    """One way to host the model. Throughput is typed in, comes from results (measured, simulated or imported), or is
    simulated here; beside a typed-in throughput ``simulate`` draws the curve alone.

    The price is one of ``usd_per_gpu_hour``, ``price`` (a name in ``configs/prices/``: rented, reserved, spot, or an
    API provider's dedicated endpoint) and ``owned``. A price of the catalogue brings the band of all offers of that GPU
    under that commitment; ``usd_per_gpu_hour_low`` and ``_high`` give one of your own.
    """

    name: str = Field(min_length=1)
    gpu: str
    num_gpus: PositiveInt = 1
    usd_per_gpu_hour: NonNegativeFloat | None = None
    usd_per_gpu_hour_low: NonNegativeFloat | None = None
    usd_per_gpu_hour_high: NonNegativeFloat | None = None
    price_note: str | None = None  # where a typed-in price comes from
    price: str | None = None
    owned: OwnedSpec | None = None
    tokens_per_s: PositiveFloat | None = None  # input and output together, all GPUs of one replica
    tokens_per_s_low: PositiveFloat | None = None
    tokens_per_s_high: PositiveFloat | None = None
    results: str | None = None  # a results folder or an experiment's name
    cell: str | None = None  # part of a cell id there; without it the cell with the highest throughput
    billing: Literal["around_clock", "by_hour"] = "around_clock"
    min_replicas: PositiveInt = 1
    peak_to_mean: PositiveFloat = 1.0
    max_utilisation: Ratio = 1.0
    whole_hours: bool = False  # by_hour: a started hour is paid in full
    fixed_usd_per_month: NonNegativeFloat = 0.0
    fine_tune: FineTuneSpec | None = None
    simulate: SimulateSpec | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> SelfHostSpec:
        prices = [self.usd_per_gpu_hour, self.price, self.owned]
        if sum(p is not None for p in prices) != 1:
            raise ValueError(f"option {self.name}: give exactly one of usd_per_gpu_hour, price and owned")
        if self.tokens_per_s is not None and self.results is not None:
            raise ValueError(f"option {self.name}: give either tokens_per_s or results")
        if self.tokens_per_s is None and self.results is None and self.simulate is None:
            raise ValueError(f"option {self.name}: give tokens_per_s, results or simulate")
        if self.results is None and self.cell is not None:
            raise ValueError(f"option {self.name}: cell names a cell of results, and there are none")
        if self.owned is not None and self.billing == "by_hour":
            raise ValueError(f"option {self.name}: owned GPUs cost money around the clock, not by_hour")
        if self.whole_hours and self.billing != "by_hour":
            raise ValueError(f"option {self.name}: whole_hours goes with billing: by_hour")
        if self.billing == "by_hour" and (self.min_replicas > 1 or self.peak_to_mean > 1):
            raise ValueError(
                f"option {self.name}: min_replicas and peak_to_mean size a fleet around the clock, not by_hour"
            )
        if self.peak_to_mean < 1:
            raise ValueError(f"option {self.name}: a peak is at least the mean, got peak_to_mean {self.peak_to_mean:g}")
        self._ends("tokens_per_s")
        self._ends("usd_per_gpu_hour")
        return self

    def _ends(self, name: str) -> None:
        value, low, high = (getattr(self, name + end) for end in ("", "_low", "_high"))
        if value is None and low is not None:
            raise ValueError(f"option {self.name}: {name}_low belongs to a typed-in {name}")
        if (low is None) != (high is None):
            raise ValueError(f"option {self.name}: give {name}_low and {name}_high together")
        if low is not None and not low <= value <= high:
            raise ValueError(f"option {self.name}: {name} must lie between its low and high ends")


class Decision(Spec):
    """A whole decision file: self-host or API, and which."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)
    why: str = Field(min_length=1)
    mix: str = "1:1"  # input:output
    cached_input: float = Field(default=0.0, ge=0, le=1)
    volumes: tuple[str | int | float, ...] = Field(default=("10M", "100M", "1B"), min_length=1)
    options: tuple[SelfHostSpec, ...] = Field(min_length=1)
    apis: tuple[str | ApiSpec, ...] = Field(min_length=1)
    prices: tuple[str, ...] = ()  # price files of your own; their rows replace the catalogue's of the same id

    @model_validator(mode="before")
    @classmethod
    def _mix_text(cls, data: Any) -> Any:
        # YAML 1.1 readers take 1:2 for a base-60 number; ours does not, but a bare 1.5 would come as a float
        if isinstance(data, dict) and isinstance(data.get("mix"), (int, float)):
            raise ValueError('mix: expected input:output in quotes, such as "1:2"')
        return data

    @model_validator(mode="after")
    def _distinct(self) -> Decision:
        names = [o.name for o in self.options]
        if len(set(names)) != len(names):
            raise ValueError("two options have the same name")
        return self
