"""Search for the best way to serve a model: parallelism, batch limits, precision and replicas, each point simulated.

Without a rate a point is an engine at a concurrency (closed loop); the concurrency rises until the SLO breaks or nothing is
gained, and replicas multiply (they are independent). With a rate a point is a fleet under Poisson arrivals, and the fewest
replicas that keep the SLO are looked for. The winner is simulated once more as the whole fleet behind its router.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware
from bench.catalog.slo import Slo
from bench.errors import BadInput, BenchError
from bench.sim.inputs import NO_LIMIT, UNFINISHED, Fleet, SimInputs, SimResult
from bench.sim.setup import EngineSetup, engine_setup

Objective = Literal["throughput", "cost", "goodput"]
Simulate = Callable[[SimInputs], SimResult]

CONCURRENCIES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
#: Requests per slot: few while searching, InferenceX' ten for the winner.
SEARCH_PER_SLOT, FINAL_PER_SLOT, LEAST_REQUESTS = 4, 10, 32
#: Under arrivals a point lasts as long as this, or this many times a request's latency, within these numbers of requests.
OPEN_LOOP_SECONDS, OPEN_LOOP_LATENCIES, OPEN_LOOP_LEAST, OPEN_LOOP_MOST = 60.0, 6.0, 300, 6000
#: A fleet keeps up when it completes this share of what arrives.
KEEPS_UP_RATIO = 0.95
#: A fleet that falls behind is given up this long after the last arrival, in shares of the time until then.
PATIENCE_RATIO = 0.5
MOST_SETTLING = 6
#: Two levels in a row that gain less than this end the climb of an engine without a broken SLO.
LEAST_GAIN_RATIO = 0.01


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked: nominal lengths (drawn from 80-100 % of them, as InferenceX does), a shared prefix, maybe a rate."""

    isl: int
    osl: int
    prefix_tokens: int = 0
    rate_per_s: float | None = None
    low_ratio: float = 0.8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Space:
    """Values per axis; the product is searched. None in a list is vLLM's own default."""

    gpus: tuple[Hardware, ...]
    tensor_parallel_size: tuple[int, ...] = (1, 2, 4, 8)
    pipeline_parallel_size: tuple[int, ...] = (1,)
    quantization: tuple[str | None, ...] = (None,)
    kv_cache_dtype: tuple[str | None, ...] = (None,)
    max_num_seqs: tuple[int | None, ...] = (None,)
    max_num_batched_tokens: tuple[int | None, ...] = (None,)
    max_gpus: int = 8
    fixed: dict[str, Any] = field(default_factory=dict)  # further engine arguments, the same for all


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated configuration. Rates are of the whole fleet; ``level`` is the concurrency of one engine, or 0 at a rate."""

    setup: EngineSetup
    level: int
    num_engines: int
    values: dict[str, float]
    broken: str | None  # the SLO limit that does not hold, with its value
    score: float = 0.0

    @property
    def num_gpus(self) -> int:
        return self.num_engines * self.setup.num_gpus

    @property
    def axes(self) -> dict[str, Any]:
        a, m = self.setup.args, self.setup.memory
        return {
            "gpu": self.setup.hardware.name,
            "tensor_parallel_size": m.tp,
            "pipeline_parallel_size": m.pp,
            "quantization": a.get("quantization"),
            "kv_cache_dtype": a.get("kv_cache_dtype"),
            "max_num_seqs": a.get("max_num_seqs"),
            "max_num_batched_tokens": a.get("max_num_batched_tokens"),
        }


@dataclass(slots=True)
class Found:
    """Everything simulated, the best point per engine (best first), engines that cannot run, and the winner as a fleet."""

    points: list[Point]
    ranked: list[Point]
    refused: list[tuple[dict[str, Any], str]]
    confirmed: Point | None
    notes: list[str] = field(default_factory=list)


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
    prices = price_per_gpu_hour or {}
    found = Found([], [], [], None)
    draws = _Draws(demand)
    for setup in _engines(model, space, demand, profile, found.refused):
        scored = [
            replace(p, score=_score(p, objective, prices)) for p in _climb(setup, space, demand, draws, simulate, slo)
        ]
        found.points += scored
        good = [p for p in scored if p.broken is None]
        if good:
            found.ranked.append(max(good, key=lambda p: p.score))
    if not found.points:
        raise BadInput(f"nothing in this space can run: {found.refused[0][1] if found.refused else 'it is empty'}")
    found.ranked.sort(key=lambda p: p.score, reverse=True)
    _settle(found, space, demand, draws, simulate, slo, lambda p: replace(p, score=_score(p, objective, prices)))
    return found


def _settle(
    found: Found, space: Space, demand: Demand, draws: _Draws, simulate: Simulate, slo: Slo | None,
    scored: Callable[[Point], Point],
) -> None:  # fmt: skip
    """Confirm the best point; one that does not hold with other requests gives way to the next, at most MOST_SETTLING times."""
    for _ in range(MOST_SETTLING):
        if not found.ranked:
            return
        best = found.ranked[0]
        found.confirmed = scored(_confirm(best, demand, simulate, slo))
        if found.confirmed.broken is None:
            return
        load = f"concurrency {best.level}" if best.level else f"{best.num_engines} engines"
        found.notes.append(f"the best at first, {load}, did not hold with other requests: {found.confirmed.broken}")
        instead = None
        if demand.rate_per_s is None:
            lower = [p for p in found.points if p.setup is best.setup and p.broken is None and p.level < best.level]
            instead = max(lower, key=lambda p: p.score, default=None)
        elif (best.num_engines + 1) * best.setup.num_gpus <= space.max_gpus:
            more = scored(_served(best.setup, best.num_engines + 1, demand, draws, simulate, slo))
            found.points.append(more)
            instead = more if more.broken is None else None
        found.ranked = [p for p in (instead, *found.ranked[1:]) if p is not None]
        found.ranked.sort(key=lambda p: p.score, reverse=True)


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


class _Draws:
    """Lengths, drawn once, so that all engines answer the same requests."""

    def __init__(self, demand: Demand) -> None:
        rng = np.random.default_rng(demand.seed)
        n = max(OPEN_LOOP_MOST, CONCURRENCIES[-1] * SEARCH_PER_SLOT * 2)
        self.demand = demand
        self.prompt = rng.integers(math.ceil(demand.isl * demand.low_ratio), demand.isl + 1, n).astype(np.int64)
        self.output = rng.integers(math.ceil(demand.osl * demand.low_ratio), demand.osl + 1, n).astype(np.int64)
        self.unit_gaps = rng.exponential(1.0, n)

    def inputs(self, fleet: Fleet, count: int, concurrency: int | None, rate_per_s: float | None) -> SimInputs:
        """``count`` requests in a closed loop, or open at ``rate_per_s``; all share the demand's prefix."""
        repeat = -(-count // len(self.prompt))
        prompt, output = (np.tile(a, repeat)[:count] for a in (self.prompt, self.output))
        due = np.full(count, np.nan)
        if rate_per_s is not None:
            due = np.cumsum(np.tile(self.unit_gaps, repeat)[:count]) / rate_per_s
        config = fleet.replicas[0].config
        offsets, numbers = np.zeros(count + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if config.enable_prefix_caching:
            np.cumsum((prompt + output) // config.block_size, out=offsets[1:])
            numbers = np.arange(offsets[-1], dtype=np.int64)
            for i in range(count if self.demand.prefix_tokens else 0):
                shared = min(self.demand.prefix_tokens, int(prompt[i])) // config.block_size
                numbers[offsets[i] : offsets[i] + shared] = np.arange(shared)
        none = np.full(count, -1, dtype=np.int64)
        return SimInputs(
            fleet=fleet, prompt_tokens=prompt, max_tokens=output, stop_after=none, priority=np.zeros(count, np.int64),
            group=np.zeros(count, np.int64), next_turn=none, follows=np.zeros(count, bool), think_s=np.zeros(count),
            due_s=due, limit_t_s=np.zeros(1), limit=np.array([concurrency or NO_LIMIT]), num_groups=1, timed_group=0,
            max_duration_s=np.inf if rate_per_s is None else float(due[-1]) * (1 + PATIENCE_RATIO) + 60.0, min_duration_s=0.0, min_requests=0, block_offsets=offsets, block_numbers=numbers,
            num_block_numbers=len(numbers),
        )  # fmt: skip


def _climb(
    setup: EngineSetup, space: Space, demand: Demand, draws: _Draws, simulate: Simulate, slo: Slo | None
) -> Iterator[Point]:
    most = space.max_gpus // setup.num_gpus
    if demand.rate_per_s is not None:
        yield from _fewest(setup, most, demand, draws, simulate, slo)
        return
    best, flat = 0.0, 0
    for level in CONCURRENCIES:
        inputs = draws.inputs(setup.fleet(), max(LEAST_REQUESTS, level * SEARCH_PER_SLOT), level, None)
        values = _values(inputs, simulate(inputs), level, slo)
        point = _point(setup, level, most, {k: v * most if k.endswith("_per_s") else v for k, v in values.items()}, slo)
        yield point
        rate = point.values["output_tokens_per_s"]
        flat = flat + 1 if rate < best * (1 + LEAST_GAIN_RATIO) else 0
        best = max(best, rate)
        if point.broken is not None or flat >= 2:
            return


def _fewest(
    setup: EngineSetup, most: int, demand: Demand, draws: _Draws, simulate: Simulate, slo: Slo | None
) -> Iterator[Point]:
    """Bisection for the fewest engines that serve the rate; every fleet that was tried is a point."""
    low, high = 0, most + 1
    while high - low > 1:
        n = (low + high) // 2
        point = _served(setup, n, demand, draws, simulate, slo)
        yield point
        low, high = (low, n) if point.broken is None else (n, high)


def _served(
    setup: EngineSetup, num_engines: int, demand: Demand, draws: _Draws, simulate: Simulate, slo: Slo | None
) -> Point:
    """The fleet under the demand's arrivals, long enough to be steady."""
    rate = demand.rate_per_s
    assert rate is not None
    fleet = setup.fleet("least_loaded", num_engines)
    count = int(min(max(rate * OPEN_LOOP_SECONDS, OPEN_LOOP_LEAST), OPEN_LOOP_MOST))
    while True:
        inputs = draws.inputs(fleet, count, None, rate)
        values = _values(inputs, simulate(inputs), None, slo)
        enough = int(min(rate * OPEN_LOOP_LATENCIES * min(values["e2e_p50_s"], 1e6), OPEN_LOOP_MOST))
        if enough <= count or values["completed_ratio"] < KEEPS_UP_RATIO / 2:
            break
        count = enough
    point = _point(setup, 0, num_engines, values, slo)
    if point.broken is None and values["completed_ratio"] < KEEPS_UP_RATIO:
        return replace(point, broken=f"completes {values['completed_ratio']:.0%} of what arrives")
    return point


def _confirm(winner: Point, demand: Demand, simulate: Simulate, slo: Slo | None) -> Point:
    """The winner once more: the whole fleet behind its router, other draws, more requests."""
    draws = _Draws(replace(demand, seed=demand.seed + 1))
    fleet = winner.setup.fleet("least_loaded", winner.num_engines)
    if demand.rate_per_s is None:
        total = winner.level * winner.num_engines
        inputs = draws.inputs(fleet, max(LEAST_REQUESTS, total * FINAL_PER_SLOT), total, None)
        values = _values(inputs, simulate(inputs), total, slo)
    else:
        return _served(winner.setup, winner.num_engines, demand, draws, simulate, slo)
    return _point(winner.setup, winner.level, winner.num_engines, values, slo)


def _score(p: Point, objective: Objective, prices: dict[str, float]) -> float:
    """Higher is better: tokens/s or good requests/s per GPU, or minus dollars per million output tokens."""
    if objective == "cost":
        price = prices.get(p.setup.hardware.name)
        if price is None:
            raise BadInput(f"no price for {p.setup.hardware.name}", where="--price", next_step="give USD per GPU hour")
        return -usd_per_million(p, price)
    key = "output_tokens_per_s" if objective == "throughput" else "good_requests_per_s"
    return p.values[key] / p.num_gpus


def usd_per_million(p: Point, price_per_gpu_hour: float) -> float:
    """USD per million output tokens at the point's throughput, GPUs paid by the hour."""
    rate = p.values["output_tokens_per_s"]
    return math.inf if rate <= 0 else price_per_gpu_hour * p.num_gpus / (rate * 3600) * 1e6


# -- measuring a point ----------------------------------------------------------------------------------------------


def _point(setup: EngineSetup, level: int, num_engines: int, values: dict[str, float], slo: Slo | None) -> Point:
    return Point(setup, level, num_engines, values, _broken(values, slo))


def _values(inputs: SimInputs, r: SimResult, concurrency: int | None, slo: Slo | None) -> dict[str, float]:
    """Rates over the steady part and percentiles of its requests. ``limit <metric>`` holds what the SLO asks of."""
    after = inputs.fleet.request_after_s
    start_s = np.where(np.isnan(r.due_s), r.sent_s, r.due_s)
    finished_all = r.ended != UNFINISHED
    done = np.where(finished_all, r.last_token_s + after, np.inf)
    start_s = np.where(np.isnan(start_s), r.end_s, start_s)
    if concurrency is None:
        # what came first found an empty fleet
        span = float(start_s.max() - start_s.min())
        latest = float(np.quantile(done - start_s, 0.99, method="lower"))
        begin = float(start_s.min()) + min(latest, span / 2)
        end = float(start_s.max())
    else:
        finished = np.sort(done)
        begin = float(finished[max(min(concurrency, len(finished) // 3) - 1, 0)])
        end = float(r.sent_s.max())
        if end <= begin:
            begin, end = 0.0, float(finished[-1])
    length = max(end - begin, 1e-9)
    tokens = np.count_nonzero((r.token_s >= begin - after) & (r.token_s < end - after))
    counted = (start_s >= begin) & (start_s <= end)
    if not counted.any():
        counted = np.ones(len(start_s), dtype=bool)
    metrics = {
        "ttft": np.nan_to_num(r.first_token_s + after, nan=np.inf) - start_s,
        "tpot": np.where(
            finished_all, (r.last_token_s - r.first_token_s) / np.maximum(r.num_output_tokens - 1, 1), np.inf
        ),
        "e2e": done - start_s,
    }
    completed = np.count_nonzero((done >= begin) & (done < end)) / length
    values = {
        "output_tokens_per_s": tokens / length,
        "requests_per_s": completed,
        "completed_ratio": completed * length / max(int(counted.sum()), 1),
        "good_requests_per_s": completed,
        "preemptions_per_request": float(r.num_preemptions.sum()) / len(start_s),
        "kv_usage_max_ratio": 1
        - float(r.steps["num_free_blocks"].min()) / (inputs.fleet.replicas[0].config.num_blocks - 1),
        "running_mean": float(np.average(r.steps["num_running"], weights=r.steps["gpu_s"])),
        "prefill_time_ratio": float(r.steps["gpu_s"][r.steps["prefill_requests"] > 0].sum() / r.steps["gpu_s"].sum()),
        "host_bound_ratio": float(np.mean(r.steps["host_s"] > r.steps["gpu_s"])),
    }
    for name, column in metrics.items():
        values |= {f"{name}_p{q}_s": float(np.quantile(column[counted], q / 100, method="lower")) for q in (50, 99)}
    if slo is not None:
        values |= _against(slo, metrics, inputs, r, counted)
        values["good_requests_per_s"] = completed * values["good_ratio"]
    return values


def _against(
    slo: Slo, metrics: dict[str, np.ndarray], inputs: SimInputs, r: SimResult, counted: np.ndarray
) -> dict[str, float]:
    """The value that each limit speaks of, and the share of requests that meet all limits."""
    good = counted.copy()
    out: dict[str, float] = {}
    for limit in slo.limits:
        if limit.metric == "itl":
            column = _worst_gap(r)
            gaps = np.diff(r.token_s)
            gaps[r.token_offsets[1:-1] - 1] = np.nan  # between requests
            speaks_of = gaps[~np.isnan(gaps)]
        else:
            column = metrics[limit.metric]
            speaks_of = column[counted]
        rank = limit.percentile if limit.percentile is not None else slo.required_ratio * 100
        out[f"limit {limit.metric}"] = (
            float(np.quantile(speaks_of, rank / 100, method="higher")) if len(speaks_of) else 0.0
        )
        good &= column <= limit.limit_s
    out["good_ratio"] = float(good.sum() / counted.sum())
    return out


def _worst_gap(r: SimResult) -> np.ndarray:
    gaps = np.diff(r.token_s, append=np.nan)
    gaps[r.token_offsets[1:] - 1] = 0.0
    return np.asarray(np.maximum.reduceat(gaps, r.token_offsets[:-1]))


def _broken(values: dict[str, float], slo: Slo | None) -> str | None:
    if slo is None:
        return None
    for limit in slo.limits:
        value = values[f"limit {limit.metric}"]
        if value > limit.limit_s:
            return f"{limit.text} does not hold ({'never done' if math.isinf(value) else f'{value * 1e3:,.0f} ms'})"
    if slo.min_ratio is not None and values["good_ratio"] < slo.min_ratio:
        return f"{values['good_ratio']:.1%} of requests meet the SLO, {slo.min_ratio:.1%} are asked for"
    return None


# -- explaining -----------------------------------------------------------------------------------------------------


def explain(found: Found, objective: Objective) -> list[str]:
    """Why the winner wins: what holds it back, and what each other value of an axis would give."""
    best = found.ranked[0]
    lines = [_limits_of(best, found), *found.notes]
    for axis, value in best.axes.items():
        others = [p for p in found.ranked if p.axes[axis] != value]
        near = [p for p in others if all(p.axes[a] == v for a, v in best.axes.items() if a != axis)]
        for other in _best_per_value(near or others, axis)[:3]:
            rest = "" if near else " (other axes differ too)"
            change = abs(other.score / best.score) - 1 if best.score else 0.0
            lines.append(
                f"{axis} {_text(other.axes[axis])} instead of {_text(value)}: {_change(change, objective)}{rest}"
            )
        lines += _never_good(found, axis, value, best)
    for axes, reason in found.refused[:6]:
        lines.append(f"refused: {', '.join(f'{k} {_text(v)}' for k, v in axes.items() if v is not None)}: {reason}")
    return lines


def _best_per_value(points: Sequence[Point], axis: str) -> list[Point]:
    best: dict[Any, Point] = {}
    for p in points:
        if p.axes[axis] not in best or p.score > best[p.axes[axis]].score:
            best[p.axes[axis]] = p
    return sorted(best.values(), key=lambda p: p.score, reverse=True)


def _never_good(found: Found, axis: str, value: Any, best: Point) -> list[str]:
    """Other values of the axis with which no point met the SLO, all else as in the winner."""
    good = {p.axes[axis] for p in found.ranked}
    lines = {}
    for p in found.points:
        other = p.axes[axis]
        if other in good or other == value or p.broken is None or other in lines:
            continue
        if all(p.axes[a] == v for a, v in best.axes.items() if a != axis):
            lines[other] = f"{axis} {_text(other)}: never meets the SLO; {p.broken}"
    return list(lines.values())


def _limits_of(best: Point, found: Found) -> str:
    v = best.values
    parts = [
        f"{v['running_mean']:.0f} requests run on average",
        f"{v['prefill_time_ratio']:.0%} of the time goes into steps with prompt work",
        f"KV cache at most {v['kv_usage_max_ratio']:.0%} full",
    ]
    if v["preemptions_per_request"] > 0.01:
        parts.append(f"{v['preemptions_per_request']:.2f} preemptions per request: KV memory is the limit")
    if v["host_bound_ratio"] > 0.1:
        parts.append(f"the host sets the pace in {v['host_bound_ratio']:.0%} of the steps")
    higher = [p for p in found.points if p.setup is best.setup and p.level > best.level]
    if best.level and higher:
        stop = higher[0].broken or "nothing is gained any more"
        parts.append(f"concurrency {higher[0].level} per engine is too much: {stop}")
    return "; ".join(parts)


def _change(change: float, objective: Objective) -> str:
    what = {
        "throughput": "tokens/s per GPU",
        "cost": "$ per million output tokens",
        "goodput": "good requests/s per GPU",
    }
    return f"{change:+.0%} {what[objective]}"


def _text(value: Any) -> str:
    return "default" if value is None else str(value)
