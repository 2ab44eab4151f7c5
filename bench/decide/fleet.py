"""From a replica's capacity to a fleet: how many replicas, what they cost, and what autoscaling saves.

All of it is arithmetic on numbers that are given; simulations are in ``capacity`` and ``plan``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.decide.options import HOURS_PER_MONTH
from bench.errors import BadInput
from bench.units import S_PER_HOUR, TOKENS_PER_MILLION

HOURS_PER_DAY = 24
DAYS_PER_MONTH = HOURS_PER_MONTH / HOURS_PER_DAY


def replicas_for(rate_per_s: float, capacity_per_s: float, headroom: float) -> int:
    """ceil(rate / (capacity x (1 - headroom))): replicas that carry a rate with head-room left on each.

    Raises:
        BadInput: a rate below 0, a capacity that is not positive, a head-room outside [0, 1).
    """
    if rate_per_s < 0 or not capacity_per_s > 0 or not 0 <= headroom < 1:
        raise BadInput(
            f"expected rate >= 0, capacity > 0, 0 <= headroom < 1, got {rate_per_s}, {capacity_per_s}, {headroom}"
        )
    return max(1, math.ceil(rate_per_s / (capacity_per_s * (1 - headroom)) * (1 - 1e-12)))


def with_redundancy(num_serving: int, spare_replicas: int, zones: int) -> int:
    """Replicas in all: N + spares; with z > 1 zones also enough that any one zone may be lost, spread evenly.

    Losing one of z zones leaves n (z - 1) / z of n replicas, hence n >= N z / (z - 1), rounded up to a multiple of z.
    """
    total = num_serving + spare_replicas
    if zones > 1:
        per_zone = max(math.ceil(num_serving / (zones - 1)), math.ceil(total / zones))
        total = per_zone * zones
    return total


def day_of_rates(peak_per_s: float, mean_per_s: float | None, hourly: tuple[float, ...] | None) -> tuple[float, ...]:
    """Requests per second of each hour of the day.

    With ``hourly`` its shape, scaled so that the highest hour is the peak. Without: one busy hour at the peak and the
    others at what gives the mean (all at the peak where no mean is given).
    """
    if hourly is not None:
        top = max(hourly)
        return tuple(peak_per_s * h / top for h in hourly)
    if mean_per_s is None or mean_per_s >= peak_per_s:
        return (peak_per_s,) * HOURS_PER_DAY
    rest = max(0.0, (HOURS_PER_DAY * mean_per_s - peak_per_s) / (HOURS_PER_DAY - 1))
    return (peak_per_s,) + (rest,) * (HOURS_PER_DAY - 1)


@dataclass(frozen=True, slots=True)
class FleetCost:
    """A month of a fleet. ``always`` keeps the whole fleet up; ``scaled`` follows the day, hour by hour."""

    num_serving: int  # replicas that the peak needs
    num_replicas: int  # with redundancy
    num_gpus: int
    always_usd_per_month: float
    scaled_usd_per_month: float
    tokens_per_month: float
    utilisation_ratio: float  # mean rate / (capacity of the whole fleet)
    scaled_utilisation_ratio: float
    scaled_replica_hours_per_day: float

    @property
    def always_usd_per_million(self) -> float:
        return self.always_usd_per_month / self.tokens_per_month * TOKENS_PER_MILLION

    @property
    def scaled_usd_per_million(self) -> float:
        return self.scaled_usd_per_month / self.tokens_per_month * TOKENS_PER_MILLION


def fleet_cost(
    *,
    capacity_per_s: float,
    num_serving: int,
    num_replicas: int,
    gpus_per_replica: int,
    usd_per_gpu_hour: float,
    rates_per_s: tuple[float, ...],
    tokens_per_request: float,
    headroom: float,
    engine_start_s: float,
) -> FleetCost:
    """Costs with and without autoscaling.

    Autoscaling keeps, in each hour, what that hour needs plus the redundancy of the full fleet. A replica that an hour
    adds is started ``engine_start_s`` before it and paid from then on.
    """
    extra = num_replicas - num_serving
    needed = [min(num_serving, replicas_for(r, capacity_per_s, headroom)) + extra for r in rates_per_s]
    started = sum(max(0, needed[h] - needed[h - 1]) for h in range(len(needed)))
    scaled_hours = sum(needed) + started * engine_start_s / S_PER_HOUR
    always_hours = num_replicas * HOURS_PER_DAY
    scaled_hours = min(scaled_hours, always_hours)
    per_hour = gpus_per_replica * usd_per_gpu_hour
    mean = sum(rates_per_s) / len(rates_per_s)
    return FleetCost(
        num_serving=num_serving,
        num_replicas=num_replicas,
        num_gpus=num_replicas * gpus_per_replica,
        always_usd_per_month=num_replicas * per_hour * HOURS_PER_MONTH,
        scaled_usd_per_month=scaled_hours * per_hour * DAYS_PER_MONTH,
        tokens_per_month=mean * HOURS_PER_MONTH * S_PER_HOUR * tokens_per_request,
        utilisation_ratio=mean / (num_replicas * capacity_per_s),
        scaled_utilisation_ratio=mean * HOURS_PER_DAY / (scaled_hours * capacity_per_s),
        scaled_replica_hours_per_day=scaled_hours,
    )


@dataclass(frozen=True, slots=True)
class Rival:
    """What sensitivity needs of a plan: its name, its capacity and its price per replica-hour."""

    name: str
    capacity_per_s: float
    usd_per_replica_hour: float
    spare_replicas: int
    zones: int
    headroom: float

    def num_replicas(self, peak_per_s: float, capacity_factor: float = 1.0) -> int:
        """Replicas for a peak, redundancy included."""
        serving = replicas_for(peak_per_s, self.capacity_per_s * capacity_factor, self.headroom)
        return with_redundancy(serving, self.spare_replicas, self.zones)

    def usd_per_month(self, peak_per_s: float, price_factor: float = 1.0, capacity_factor: float = 1.0) -> float:
        """Dollars per month of the fleet for a peak, with price and capacity scaled."""
        total = self.num_replicas(peak_per_s, capacity_factor)
        return total * self.usd_per_replica_hour * price_factor * HOURS_PER_MONTH


@dataclass(frozen=True, slots=True)
class Flips:
    """By which factor a thing must change before another option is cheaper; None: not within a factor of ten."""

    price_factor: float | None
    price_winner: str | None
    throughput_factor: float | None
    throughput_winner: str | None
    less_volume_factor: float | None
    less_volume_winner: str | None
    more_volume_factor: float | None
    more_volume_winner: str | None


def flips(winner: Rival, rivals: list[Rival], peak_per_s: float) -> Flips:
    """Scan each factor outwards from 1 in steps of 2 % until one of ``rivals`` is cheaper than ``winner``."""

    def scan(change: str, direction: int) -> tuple[float | None, str | None]:
        factor = 1.0
        while 0.1 <= factor <= 10.0:
            factor *= 1.02**direction
            price = factor if change == "price" else 1.0
            speed = factor if change == "throughput" else 1.0
            volume = peak_per_s * (factor if change == "volume" else 1.0)
            cost = winner.usd_per_month(volume, price, speed)
            best = min(rivals, key=lambda r: r.usd_per_month(volume), default=None)
            if best is not None and best.usd_per_month(volume) < cost * (1 - 1e-9):
                return factor, best.name
        return None, None

    return Flips(*scan("price", 1), *scan("throughput", -1), *scan("volume", -1), *scan("volume", 1))
