"""Search for the best way to serve a model: parallelism, batch limits, precision, replicas and pools, each point simulated.

Without a rate a point is a unit (one engine, or a few prefill and decode engines) at a concurrency (closed loop); the
concurrency rises until the SLO breaks or nothing is gained, and units multiply (they are independent). With a rate a point is
a fleet under Poisson arrivals, and the fewest engines that keep the SLO are looked for. The winner is simulated once more as
the whole fleet behind its router.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.catalog.arch import ModelArch
from bench.catalog.slo import Slo
from bench.errors import BadInput, BenchError
from bench.sim.arrival_limited import KEEPS_UP_RATIO
from bench.sim.fleets import FleetShape
from bench.sim.inputs import SimInputs, SimResult
from bench.sim.search_points import (
    CONCURRENCIES,
    OPEN_LOOP_MOST,
    SEARCH_PER_SLOT,
    Draws,
    broken_limit,
    values_of,
)
from bench.sim.search_space import Demand, Found, Objective, Point, Space
from bench.sim.setup import EngineSetup, engine_setup

Simulate = Callable[[SimInputs], SimResult]

#: InferenceX' ten requests per slot for the winner, and the fewest of any point.
FINAL_PER_SLOT, LEAST_REQUESTS = 10, 32
#: Under arrivals a point lasts as long as this, or this many times a request's latency, but not for fewer requests than this.
OPEN_LOOP_SECONDS, OPEN_LOOP_LATENCIES, OPEN_LOOP_LEAST = 60.0, 6.0, 300
MOST_SETTLING = 6
#: Two levels in a row that gain less than this end the climb of an engine without a broken SLO.
LEAST_GAIN_RATIO = 0.01
#: Ratios of prefill to decode engines that are tried: all with at most so many engines together.
MOST_IN_UNIT = 5
#: Ways to split a fleet into pools that are tried at a rate.
MOST_SPLITS = 7


def search(
    model: ModelArch,
    space: Space,
    demand: Demand,
    simulate: Simulate,
    *,
    objective: Objective = "throughput",
    slo: Slo | None = None,
    price_per_gpu_hour: dict[str, float] | None = None,
    profile: Path | None = None,
) -> Found:
    """Simulate the space and rank it.

    Args:
        price_per_gpu_hour: GPU name -> USD; needed for the objective "cost".

    Raises:
        BadInput: nothing in the space can run, or an objective without what it needs.
    """
    if objective == "goodput" and slo is None:
        raise BadInput("goodput counts requests that meet an SLO", where="--slo", next_step='e.g. "ttft p99 <= 500 ms"')
    found = Found([], [], [], None)
    looking = _Looking(space, demand, Draws(demand), simulate, slo, objective, price_per_gpu_hour or {})
    for setup in _engines(model, space, demand, profile, found.refused):
        for points in looking.kinds(setup):
            scored = [looking.scored(p) for p in points]
            found.points += scored
            good = [p for p in scored if p.broken is None]
            if good:
                found.ranked.append(max(good, key=lambda p: p.score))
    if not found.points:
        raise BadInput(f"nothing in this space can run: {found.refused[0][1] if found.refused else 'it is empty'}")
    found.ranked.sort(key=lambda p: p.score, reverse=True)
    looking.settle(found)
    return found


def _engines(
    model: ModelArch, space: Space, demand: Demand, profile: Path | None, refused: list[tuple[dict[str, Any], str]]
) -> Iterator[EngineSetup]:
    names = (
        "tensor_parallel_size", "pipeline_parallel_size", "quantization", "kv_cache_dtype", "max_num_seqs",
        "max_num_batched_tokens",
    )  # fmt: skip
    for hardware in space.gpus:
        for values in itertools.product(*(getattr(space, name) for name in names)):
            axes = dict(zip(names, values, strict=True))
            if axes["tensor_parallel_size"] * axes["pipeline_parallel_size"] > space.max_gpus:
                continue
            try:
                yield engine_setup(
                    model, hardware, {"max_model_len": demand.isl + demand.osl, **space.fixed, **axes},
                    profile=profile, typical_tokens=demand.isl + demand.osl,
                )  # fmt: skip
            except BenchError as e:
                refused.append(({"gpu": hardware.name, **axes}, str(e)))


@dataclass(frozen=True, slots=True)
class _Looking:
    """What every point of one search has in common."""

    space: Space
    demand: Demand
    draws: Draws
    simulate: Simulate
    slo: Slo | None
    objective: Objective
    prices: dict[str, float]

    def kinds(self, setup: EngineSetup) -> Iterator[Iterator[Point]]:
        """Points of one engine, kind of fleet by kind of fleet: alone, and in pools of every ratio where pools are wanted."""
        most = self.space.max_gpus // setup.num_gpus
        if self.demand.rate_per_s is not None:
            yield self._fewest(setup, most, pools=False)
            if self.space.kv_link is not None and most > 1:
                yield self._fewest(setup, most, pools=True)
            return
        yield self._climb(setup, FleetShape(1, self.space.routing), most)
        if self.space.kv_link is not None:
            for total in range(2, min(most, MOST_IN_UNIT) + 1):
                for prefill in (p for p in range(1, total) if math.gcd(p, total) == 1):
                    yield self._climb(setup, self._pools(prefill, total - prefill), most)

    def _pools(self, prefill: int, decode: int) -> FleetShape:
        return FleetShape(1, self.space.routing, prefill, decode, self.space.kv_link)

    # -- closed loop -------------------------------------------------------------------------------------------------

    def _climb(self, setup: EngineSetup, unit: FleetShape, most: int) -> Iterator[Point]:
        """The unit at rising concurrency, as many times over as the GPUs allow."""
        engines, times = unit.num_engines, most // unit.num_engines
        shape = replace(unit, prefill=unit.prefill * times, decode=unit.decode * times)
        if not unit.disaggregated:
            shape = replace(unit, engines=times)
        fleet = replace(setup, shape=unit).fleet()
        best, flat = 0.0, 0
        for level in CONCURRENCIES:
            slots = level * engines
            inputs = self.draws.inputs(fleet, max(LEAST_REQUESTS, slots * SEARCH_PER_SLOT), slots, None)
            values = values_of(inputs, self.simulate(inputs), slots, self.slo)
            values = {k: v * times if k.endswith("_per_s") else v for k, v in values.items()}
            point = Point(setup, level, shape, values, broken_limit(values, self.slo))
            yield point
            rate = values["output_tokens_per_s"]
            flat = flat + 1 if rate < best * (1 + LEAST_GAIN_RATIO) else 0
            best = max(best, rate)
            if point.broken is not None or flat >= 2:
                return

    # -- at a rate ---------------------------------------------------------------------------------------------------

    def _fewest(self, setup: EngineSetup, most: int, pools: bool) -> Iterator[Point]:
        """Bisection for the fewest engines that serve the rate; every fleet that was tried is a point."""
        low, high = int(pools), most + 1
        while high - low > 1:
            n = (low + high) // 2
            good = False
            for shape in self._splits(n) if pools else (FleetShape(n, self.space.routing),):
                point = self._served(setup, shape, self.draws)
                yield point
                good = good or point.broken is None
            low, high = (low, n) if good else (n, high)

    def _splits(self, total: int) -> Iterator[FleetShape]:
        """Pools of ``total`` engines together: every split of a small fleet, evenly spaced ones of a large fleet."""
        count = min(total - 1, MOST_SPLITS)
        for prefill in sorted({1 + k * (total - 2) // max(count - 1, 1) for k in range(count)}):
            yield self._pools(prefill, total - prefill)

    def _served(self, setup: EngineSetup, shape: FleetShape, draws: Draws) -> Point:
        """The fleet under the demand's arrivals, long enough to be steady."""
        rate = self.demand.rate_per_s
        assert rate is not None
        fleet = replace(setup, shape=shape).fleet()
        count = int(min(max(rate * OPEN_LOOP_SECONDS, OPEN_LOOP_LEAST), OPEN_LOOP_MOST))
        while True:
            inputs = draws.inputs(fleet, count, None, rate)
            values = values_of(inputs, self.simulate(inputs), None, self.slo)
            enough = int(min(rate * OPEN_LOOP_LATENCIES * min(values["e2e_p50_s"], 1e6), OPEN_LOOP_MOST))
            if enough <= count or values["completed_ratio"] < KEEPS_UP_RATIO / 2:
                break
            count = enough
        point = Point(setup, 0, shape, values, broken_limit(values, self.slo))
        if point.broken is None and values["completed_ratio"] < KEEPS_UP_RATIO:
            return replace(point, broken=f"completes {values['completed_ratio']:.0%} of what arrives")
        return point

    # -- the winner --------------------------------------------------------------------------------------------------

    def settle(self, found: Found) -> None:
        """Confirm the best point; one that does not hold with other requests gives way to the next, a few times."""
        for _ in range(MOST_SETTLING):
            if not found.ranked:
                return
            best = found.ranked[0]
            found.confirmed = self.scored(self._confirm(best))
            if found.confirmed.broken is None:
                return
            load = f"concurrency {best.level}" if best.level else f"{best.num_engines} engines"
            found.notes.append(f"the best at first, {load}, did not hold with other requests: {found.confirmed.broken}")
            instead = self._instead(best, found)
            found.ranked = [p for p in (instead, *found.ranked[1:]) if p is not None]
            found.ranked.sort(key=lambda p: p.score, reverse=True)

    def _instead(self, best: Point, found: Found) -> Point | None:
        """What takes the place of a winner that did not hold: a lower level of the same fleet, or one engine more."""
        if self.demand.rate_per_s is None:
            lower = [
                p for p in found.points
                if p.setup is best.setup and p.pools == best.pools and p.broken is None and p.level < best.level
            ]  # fmt: skip
            return max(lower, key=lambda p: p.score, default=None)
        if (best.num_engines + 1) * best.setup.num_gpus > self.space.max_gpus:
            return None
        shape = best.shape
        larger = [replace(shape, engines=shape.engines + 1)]
        if shape.disaggregated:
            larger = [replace(shape, decode=shape.decode + 1), replace(shape, prefill=shape.prefill + 1)]
        tried = [self.scored(self._served(best.setup, s, self.draws)) for s in larger]
        found.points += tried
        return max((p for p in tried if p.broken is None), key=lambda p: p.score, default=None)

    def _confirm(self, winner: Point) -> Point:
        """The winner once more: the whole fleet behind its router, other draws, more requests."""
        draws = Draws(replace(self.demand, seed=self.demand.seed + 1))
        if self.demand.rate_per_s is not None:
            return self._served(winner.setup, winner.shape, draws)
        fleet = replace(winner.setup, shape=winner.shape).fleet()
        total = winner.level * winner.num_engines
        inputs = draws.inputs(fleet, max(LEAST_REQUESTS, total * FINAL_PER_SLOT), total, None)
        values = values_of(inputs, self.simulate(inputs), total, self.slo)
        return Point(winner.setup, winner.level, winner.shape, values, broken_limit(values, self.slo))

    def scored(self, p: Point) -> Point:
        """Higher is better: tokens/s or good requests/s per GPU, or minus dollars per million output tokens."""
        if self.objective == "cost":
            price = self.prices.get(p.setup.hardware.name)
            if price is None:
                raise BadInput(
                    f"no price for {p.setup.hardware.name}", where="--price", next_step="give USD per GPU hour"
                )
            return replace(p, score=-usd_per_million(p, price))
        key = "output_tokens_per_s" if self.objective == "throughput" else "good_requests_per_s"
        return replace(p, score=p.values[key] / p.num_gpus)


def usd_per_million(p: Point, price_per_gpu_hour: float) -> float:
    """USD per million output tokens at the point's throughput, GPUs paid by the hour."""
    rate = p.values["output_tokens_per_s"]
    return math.inf if rate <= 0 else price_per_gpu_hour * p.num_gpus / (rate * 3600) * 1e6
