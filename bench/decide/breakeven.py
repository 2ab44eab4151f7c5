"""From which volume on self-hosting is cheaper than an API: by formula on the staircase, and with its interval.

Let a be the API's dollars per token, C a replica's dollars per month, K its capacity in tokens per month, F the fixed
dollars, m the least number of replicas. Self-hosting costs S(V) = F + n(V) C with n(V) = max(m, ceil(V / K)); the API
costs a V. On the stair of n replicas (V up to n K) self-hosting is the cheaper one from (F + n C) / a on. Hence:

* first crossing: on the first stair n >= m with (F + n C) / a <= n K, that is n >= F / (a K - C);
* always cheaper from: after the last stair at whose beginning the API is still cheaper, n <= (F + C) / (a K - C) + 1;
* never, where a K <= C: even a full GPU costs more per token than the API.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bench.decide.options import ApiOption, Mix, SelfHost
from bench.records import Estimate

INTERVAL_METHOD = "crossing at both ends of the throughput's interval (the crossing falls as throughput rises)"


@dataclass(frozen=True, slots=True)
class Crossing:
    """Volumes in tokens per month; None means never, at any volume."""

    first_tokens: float | None
    always_tokens: float | None
    num_replicas: int | None  # at the first crossing


@dataclass(frozen=True, slots=True)
class BreakEven:
    """One self-hosted option against one API."""

    option: SelfHost
    api: ApiOption
    mix: Mix
    crossing: Crossing
    first: Estimate | None  # the first crossing with the interval that the throughput's interval gives; None: never
    never_within_interval: bool  # at the low end of the throughput there is no crossing at all
    api_usd_per_million: float
    full_use_usd_per_million: float
    price_ends: tuple[float, float] | None = None  # the cheapest and dearest known USD per GPU-hour
    by_price: tuple[Crossing, Crossing] | None = None  # the crossing at both, at the throughput's value


def crossing(option: SelfHost, usd_per_token: float) -> Crossing:
    """Where ``option`` becomes cheaper than an API at ``usd_per_token``. Exact; see the module's text for the algebra."""
    if usd_per_token <= 0:
        return Crossing(None, None, None)
    if option.billing == "by_hour":
        return _crossing_of_line(option, usd_per_token)
    a, fixed = usd_per_token, option.fixed_usd_per_month
    return _on_stairs(a, option.usd_per_replica_month, option.capacity_tokens_per_month, fixed, option.min_replicas)


def _on_stairs(a: float, c: float, k: float, fixed: float, least: int) -> Crossing:
    """The algebra of the module's text: ``c`` dollars and ``k`` tokens a stair, at least ``least`` stairs."""
    gain = a * k - c  # what a full stair saves
    if gain <= 0 and not (c == 0 and fixed == 0):
        # the first stair alone may still pay when the minimum is more than one stair's worth: no, it costs m C <= m a K
        return Crossing(None, None, None)
    first_n = max(least, math.ceil(_safe(fixed, gain)))
    first = max((fixed + first_n * c) / a, k * (first_n - 1) if first_n > least else 0.0)
    last_n = max(least, math.ceil(_safe(fixed + c, gain)))
    start = k * (last_n - 1) if last_n > least else 0.0
    always = max((fixed + last_n * c) / a, start)
    return Crossing(first, max(first, always), first_n)


def _safe(numerator: float, denominator: float) -> float:
    """The quotient, less the rounding error that would add a whole replica to an exact fit."""
    return numerator / denominator * (1 - 1e-12) if denominator > 0 else 0.0


def _crossing_of_line(option: SelfHost, usd_per_token: float) -> Crossing:
    """By the hour self-hosting costs F + V s with s dollars per token: it crosses at F / (a - s), or never.

    Where a started hour is paid in full the line is a staircase of hours.
    """
    hour_usd, hour_tokens = option.usd_per_replica_hour, option.tokens_per_paid_hour
    if option.whole_hours:
        share = option.num_sharing
        return _on_stairs(usd_per_token, hour_usd / share, hour_tokens / share, option.fixed_usd_per_month, 1)
    per_token = hour_usd / hour_tokens
    if per_token >= usd_per_token:
        return Crossing(None, None, None)
    volume = option.fixed_usd_per_month / (usd_per_token - per_token)
    return Crossing(volume, volume, 1)


def break_even(option: SelfHost, api: ApiOption, mix: Mix, price_ends: tuple[float, float] | None = None) -> BreakEven:
    """The crossing of ``option`` and ``api`` with the interval that comes from the throughput's interval.

    Args:
        price_ends: the band of USD per GPU-hour; the crossing at both ends stands apart from the interval, because a
            spread of offers says what one may be asked to pay and nothing about chance.
    """
    a = api.usd_per_token(mix)
    here = crossing(option, a)
    rate = option.tokens_per_s
    low = high = None
    never = False
    if rate.low is not None and rate.high is not None:
        best = crossing(option.at_rate(rate.high), a)
        worst = crossing(option.at_rate(rate.low), a) if rate.low > 0 else Crossing(None, None, None)
        low, high, never = best.first_tokens, worst.first_tokens, worst.first_tokens is None
    first = None
    method = f"{INTERVAL_METHOD}: {rate.method}" if rate.method else INTERVAL_METHOD
    if here.first_tokens is not None:
        first = Estimate(here.first_tokens, low, high, rate.confidence, method, rate.num_runs, "tokens/month")
    seconds_usd = option.usd_per_replica_hour / 3600
    return BreakEven(
        option=option,
        api=api,
        mix=mix,
        crossing=here,
        first=first,
        never_within_interval=never,
        api_usd_per_million=a * 1e6,
        full_use_usd_per_million=seconds_usd / rate.value * 1e6,
        price_ends=price_ends,
        by_price=None if price_ends is None else _at_prices(option, a, price_ends),
    )


def _at_prices(option: SelfHost, usd_per_token: float, ends: tuple[float, float]) -> tuple[Crossing, Crossing]:
    low, high = (crossing(replace(option, usd_per_gpu_hour=usd), usd_per_token) for usd in ends)
    return low, high


def crossing_on_curve(option: SelfHost, api: ApiOption, mix: Mix, volumes: list[float]) -> float | None:
    """The first of ``volumes`` (ascending) at which self-hosting costs no more than the API; for checks and charts."""
    for volume in volumes:
        if option.monthly_usd(volume) <= api.monthly_usd(volume, mix) * (1 + 1e-12):
            return volume
    return None
