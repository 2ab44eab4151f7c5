"""What an hour of a GPU costs that one owns, and what a fine-tuned model adds: the parts, each with its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bench.decide.options import HOURS_PER_MONTH
from bench.errors import BadInput
from bench.units import TOKENS_PER_MILLION

MONTHS_PER_YEAR = 12.0
W_PER_KW = 1000.0


@dataclass(frozen=True, slots=True)
class Owned:
    """Owned hardware, everything per GPU (its share of server, network and rack included in ``capex_usd``).

    ``power_w`` is the measured draw of a GPU's share of the server at the load in question, averaged over the month.
    ``spare_ratio`` is the share of GPUs bought beyond those that serve. Staff hours are per GPU and month.
    """

    capex_usd: float
    life_years: float
    power_w: float
    usd_per_kwh: float
    pue: float = 1.3
    hosting_usd_per_month: float = 0.0
    spare_ratio: float = 0.0
    staff_hours_per_month: float = 0.0
    usd_per_staff_hour: float = 0.0
    resale_ratio: float = 0.0
    interest_per_year: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not math.isfinite(value) or value < 0:
                raise BadInput(f"expected a number >= 0, got {value}", where=f"owned.{f.name}")
        if self.life_years <= 0:
            raise BadInput(f"expected a life above 0 years, got {self.life_years}", where="owned.life_years")
        if self.pue < 1:
            raise BadInput(f"PUE is at least 1, got {self.pue}", where="owned.pue", next_step="1.1 to 1.6 is usual")
        if self.resale_ratio > 1:
            raise BadInput(f"resale is a share of the price, got {self.resale_ratio}", where="owned.resale_ratio")


@dataclass(frozen=True, slots=True)
class HourParts:
    """Dollars per GPU-hour of one serving GPU, by part; the total is their sum."""

    capital_usd: float
    power_usd: float
    hosting_usd: float
    staff_usd: float

    @property
    def total_usd(self) -> float:
        return self.capital_usd + self.power_usd + self.hosting_usd + self.staff_usd


def owned_hour(owned: Owned) -> HourParts:
    """The parts of an owned GPU-hour, for every hour of the month whether it works or not.

    * capital = capex (1 - resale) (1 + spare) / (life in hours) + interest: capex (1 + spare) (1 + resale) / 2 x rate, the
      mean capital bound over the life;
    * power = W / 1000 x PUE x $/kWh (spares are off);
    * hosting = $/month (1 + spare) / 720; staff = hours x $/hour (1 + spare) / 720.
    """
    life_hours = owned.life_years * MONTHS_PER_YEAR * HOURS_PER_MONTH
    bought = owned.capex_usd * (1 + owned.spare_ratio)
    depreciation = bought * (1 - owned.resale_ratio) / life_hours
    interest = bought * (1 + owned.resale_ratio) / 2 * owned.interest_per_year / (MONTHS_PER_YEAR * HOURS_PER_MONTH)
    monthly = (1 + owned.spare_ratio) / HOURS_PER_MONTH
    return HourParts(
        capital_usd=depreciation + interest,
        power_usd=owned.power_w / W_PER_KW * owned.pue * owned.usd_per_kwh,
        hosting_usd=owned.hosting_usd_per_month * monthly,
        staff_usd=owned.staff_hours_per_month * owned.usd_per_staff_hour * monthly,
    )


@dataclass(frozen=True, slots=True)
class FineTune:
    """A one-off cost that a volume has to carry, and how many adapters share one GPU afterwards."""

    one_off_usd: float
    months: float  # over which it is spread: until the next fine-tune
    num_adapters_sharing: int = 1  # LoRA adapters served by the same replicas

    def __post_init__(self) -> None:
        if self.one_off_usd < 0 or not self.months > 0 or self.num_adapters_sharing < 1:
            raise BadInput(f"expected a cost >= 0, months > 0 and at least one adapter, got {self}", where="fine-tune")

    @property
    def usd_per_month(self) -> float:
        """One-off / months."""
        return self.one_off_usd / self.months

    def usd_per_million(self, volume_tokens_per_month: float) -> float:
        """One-off / (volume x months) x 10^6: what it adds to each million tokens of the tuned model."""
        if not volume_tokens_per_month > 0:
            raise BadInput(f"expected a volume > 0, got {volume_tokens_per_month}", where="fine-tune volume")
        return self.usd_per_month / volume_tokens_per_month * TOKENS_PER_MILLION

    def share_of_serving_usd(self, serving_usd_per_month: float) -> float:
        """Serving cost / adapters: each adapter's part of replicas that all of them use (equal use)."""
        return serving_usd_per_month / self.num_adapters_sharing
