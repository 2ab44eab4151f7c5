"""What must change before self-hosting and APIs change places at a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.decide.options import ApiOption, Mix, SelfHost

Lever = Literal["gpu_price", "throughput", "api_price", "volume"]
_STEP, _LIMIT = 1.02, 100.0


@dataclass(frozen=True, slots=True)
class Flip:
    """``lever`` times ``factor`` turns the answer round, to ``winner``. Found in steps of 2 %, within a factor of 100."""

    lever: Lever
    factor: float
    winner: str


def decision_flips(
    options: Sequence[SelfHost], apis: Sequence[ApiOption], mix: Mix, volume_tokens: float
) -> tuple[Flip, ...]:
    """The nearest change of each lever alone that turns the answer round; levers that cannot are left out.

    Every option's GPU price (throughput) changes alike, and every API's price; fixed dollars stay.
    """

    def best(lever: Lever | None, factor: float) -> tuple[bool, str]:
        volume = volume_tokens * (factor if lever == "volume" else 1.0)
        hosts = [_changed(o, lever, factor) for o in options]
        host = min(hosts, key=lambda o: o.monthly_usd(volume))
        api = min(apis, key=lambda a: a.monthly_usd(volume, mix))
        theirs = api.monthly_usd(volume, mix) * (factor if lever == "api_price" else 1.0)
        wins = host.monthly_usd(volume) <= theirs
        return wins, host.name if wins else api.name

    now = best(None, 1.0)[0]
    out = []
    levers: tuple[tuple[Lever, int], ...] = (
        ("gpu_price", 1 if now else -1), ("throughput", -1 if now else 1), ("api_price", -1 if now else 1), ("volume", -1), ("volume", 1),
    )  # fmt: skip
    for lever, direction in levers:
        factor = 1.0
        while 1 / _LIMIT <= factor <= _LIMIT:
            factor *= _STEP**direction
            wins, winner = best(lever, factor)
            if wins != now:
                out.append(Flip(lever, factor, winner))
                break
    return tuple(out)


def _changed(o: SelfHost, lever: Lever | None, factor: float) -> SelfHost:
    if lever == "gpu_price":
        return replace(o, usd_per_gpu_hour=o.usd_per_gpu_hour * factor)
    if lever == "throughput":
        return o.at_rate(o.tokens_per_s.value * factor)
    return o
