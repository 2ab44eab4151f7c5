"""The options that are compared: an API that charges by the token, and GPUs of one's own that are paid by the hour.

A volume is tokens per month, input and output together; a :class:`Mix` says how they divide. A month is 30 days (720
hours): what one H100 at $4/h costs around the clock is then $2,880.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from bench.catalog.prices import ApiPrice
from bench.errors import BadInput
from bench.records import Estimate
from bench.units import S_PER_HOUR, TOKENS_PER_MILLION

HOURS_PER_MONTH = 720.0

Billing = Literal["around_clock", "by_hour"]


@dataclass(frozen=True, slots=True)
class Mix:
    """How tokens divide into input and output: ``input_parts`` : ``output_parts``, e.g. 1 : 2."""

    input_parts: float
    output_parts: float
    cached_ratio: float = 0.0  # share of the input tokens that an API bills as cached

    def __post_init__(self) -> None:
        parts = (self.input_parts, self.output_parts)
        if min(parts) < 0 or sum(parts) <= 0 or not all(map(math.isfinite, parts)):
            raise BadInput(
                f"expected input:output such as 1:2, got {self.input_parts:g}:{self.output_parts:g}", where="mix"
            )
        if not 0 <= self.cached_ratio <= 1:
            raise BadInput(f"expected a share of cached input from 0 to 1, got {self.cached_ratio}", where="cached")

    @property
    def input_ratio(self) -> float:
        """Share of input among all tokens."""
        return self.input_parts / (self.input_parts + self.output_parts)

    @property
    def text(self) -> str:
        return f"{self.input_parts:g}:{self.output_parts:g}"

    @classmethod
    def parse(cls, text: str, cached_ratio: float = 0.0) -> Mix:
        """``1:2`` -> one input token for two output tokens. Raises BadInput."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)\s*", text)
        if not found:
            raise BadInput(f'expected input:output such as "1:2", got "{text}"', where="mix")
        return cls(float(found[1]), float(found[2]), cached_ratio)


def parse_volume(text: str) -> float:
    """``10M``, ``1.5B``, ``2e9`` -> tokens per month. Raises BadInput."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmMbBgGtT]?)\s*", text)
    factor = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
    if not found or float(found[1]) <= 0:
        raise BadInput(f'expected tokens a month such as 10M or 1B, got "{text}"', where="volume")
    return float(found[1]) * factor[found[2].lower()]


@dataclass(frozen=True, slots=True)
class ApiOption:
    """An API: dollars in proportion to tokens, no fixed part."""

    price: ApiPrice
    batch: bool = False
    cached_ratio: float | None = None  # share of the input that this API bills as cached; None: the mix's

    @property
    def name(self) -> str:
        notes = ["batch"] if self.batch else []
        notes += [f"{self.cached_ratio:.0%} cached"] if self.cached_ratio is not None else []
        return f"{self.price.provider} {self.price.model}" + (f" ({', '.join(notes)})" if notes else "")

    def cached_of(self, mix: Mix) -> float:
        """Share of the input that is billed as cached."""
        return mix.cached_ratio if self.cached_ratio is None else self.cached_ratio

    def usd_per_token(self, mix: Mix) -> float:
        """(i (1 - c) p_in + i c p_cached + o p_out) / 10^6, with i, o the shares of input and output, c the cached share."""
        return self.monthly_usd(TOKENS_PER_MILLION, mix) / TOKENS_PER_MILLION

    def monthly_usd(self, volume_tokens: float, mix: Mix) -> float:
        """Volume x dollars per token. Raises BadInput for a price that is not in dollars."""
        if self.price.currency != "USD":
            raise BadInput(f"price {self.price.id} is in {self.price.currency}", next_step="give one in USD")
        tokens_in = volume_tokens * mix.input_ratio
        cost = self.price.cost(tokens_in, volume_tokens - tokens_in, tokens_in * self.cached_of(mix), self.batch)
        return cost.amount


@dataclass(frozen=True, slots=True)
class SelfHost:
    """GPUs of one's own for one configuration: replicas of ``num_gpus`` GPUs that each serve ``tokens_per_s`` in all.

    Volumes are those of one model; ``num_sharing`` LoRA adapters of equal volume share the replicas and their cost.
    ``tokens_per_s`` counts input and output together, at the mix it was measured (or simulated) at. ``peak_to_mean`` is
    the day's highest load over its mean: a fleet is sized for the peak. ``max_utilisation_ratio`` is the head-room that is
    left at the peak. ``billing``: ``around_clock`` pays for every hour of the month, ``by_hour`` only for hours in which
    GPUs work (at full use; a started hour counts in full when ``whole_hours``).
    """

    name: str
    gpu: str
    num_gpus: int
    usd_per_gpu_hour: float
    tokens_per_s: Estimate
    origin: str = "measured"
    billing: Billing = "around_clock"
    min_replicas: int = 1
    peak_to_mean: float = 1.0
    max_utilisation_ratio: float = 1.0
    fixed_usd_per_month: float = 0.0  # staff, hosting and the like that do not grow with the fleet
    whole_hours: bool = False
    hours_per_month: float = HOURS_PER_MONTH
    num_sharing: int = 1  # adapters on the same replicas, this one included

    def __post_init__(self) -> None:
        where = f"option {self.name}"
        if not self.tokens_per_s.value > 0:
            raise BadInput(f"expected tokens/s > 0, got {self.tokens_per_s.value}", where=where)
        if self.usd_per_gpu_hour < 0 or self.fixed_usd_per_month < 0:
            raise BadInput("expected prices >= 0", where=where, next_step="a refund is not a price")
        if self.num_gpus < 1 or self.min_replicas < 1 or self.num_sharing < 1:
            raise BadInput("expected at least one GPU, one replica and one adapter", where=where)
        if not (self.peak_to_mean >= 1 and math.isfinite(self.peak_to_mean)):
            raise BadInput(f"a peak is at least the mean, got peak/mean {self.peak_to_mean}", where=where)
        if not 0 < self.max_utilisation_ratio <= 1:
            raise BadInput(f"expected a utilisation above 0 and up to 1, got {self.max_utilisation_ratio}", where=where)

    @property
    def usd_per_replica_hour(self) -> float:
        return self.num_gpus * self.usd_per_gpu_hour

    @property
    def usd_per_replica_month(self) -> float:
        """GPUs x $/GPU-hour x hours in the month / adapters that share it."""
        return self.usd_per_replica_hour * self.hours_per_month / self.num_sharing

    @property
    def capacity_tokens_per_month(self) -> float:
        """A replica's room for this model's volume: tokens/s x 3600 x hours x utilisation / (peak / mean) / adapters."""
        seconds = S_PER_HOUR * self.hours_per_month
        return self.tokens_per_s.value * seconds * self.max_utilisation_ratio / self.peak_to_mean / self.num_sharing

    def num_replicas(self, volume_tokens: float) -> int:
        """Whole replicas: the larger of the minimum and volume / capacity, rounded up."""
        # a volume that is the capacity up to rounding error does not need another GPU
        need = math.ceil(volume_tokens / self.capacity_tokens_per_month * (1 - 1e-12))
        return max(self.min_replicas, need)

    def gpu_hours(self, volume_tokens: float) -> float:
        """GPU-hours paid for in a month (this model's share of them)."""
        if self.billing == "around_clock":
            return self.num_replicas(volume_tokens) * self.num_gpus * self.hours_per_month / self.num_sharing
        hours = volume_tokens / self.tokens_per_paid_hour
        if self.whole_hours:
            hours = math.ceil(hours * self.num_sharing * (1 - 1e-12)) / self.num_sharing
        return hours * self.num_gpus

    @property
    def tokens_per_paid_hour(self) -> float:
        """By the hour: what an hour of a replica serves, tokens/s x 3600 x utilisation."""
        return self.tokens_per_s.value * S_PER_HOUR * self.max_utilisation_ratio

    def monthly_usd(self, volume_tokens: float) -> float:
        """GPU-hours x price + fixed. Around the clock this is a staircase in the volume, by the hour a line."""
        return self.gpu_hours(volume_tokens) * self.usd_per_gpu_hour + self.fixed_usd_per_month

    def utilisation(self, volume_tokens: float) -> float:
        """Share of the paid time in which tokens are served: volume / (tokens/s x paid replica-seconds)."""
        paid_s = self.gpu_hours(volume_tokens) / self.num_gpus * S_PER_HOUR
        return volume_tokens / (self.tokens_per_s.value * paid_s) if paid_s else 0.0

    def usd_per_million(self, volume_tokens: float) -> float:
        """Dollars per million tokens at this volume, everything included."""
        return self.monthly_usd(volume_tokens) / volume_tokens * TOKENS_PER_MILLION

    def at_rate(self, tokens_per_s: float) -> SelfHost:
        """The same option with another throughput (one end of its interval)."""
        return replace(self, tokens_per_s=Estimate(tokens_per_s, None, None, unit=self.tokens_per_s.unit))
