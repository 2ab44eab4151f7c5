"""One point of a search: the requests that it answers, and what is read off its simulation."""

from __future__ import annotations

import math

import numpy as np

from bench.catalog.slo import Slo
from bench.sim.inputs import NO_LIMIT, UNFINISHED, Fleet, SimInputs, SimResult
from bench.sim.search_space import Demand

CONCURRENCIES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
#: Requests per slot while searching; the winner gets more (``search.FINAL_PER_SLOT``).
SEARCH_PER_SLOT = 4
#: Most requests of a point under arrivals, and how long after the last of them a fleet that falls behind is given up.
OPEN_LOOP_MOST, PATIENCE_RATIO = 6000, 0.5


class Draws:
    """Lengths, drawn once, so that all engines answer the same requests."""

    def __init__(self, demand: Demand) -> None:
        rng = np.random.default_rng(demand.seed)
        n = max(OPEN_LOOP_MOST, CONCURRENCIES[-1] * SEARCH_PER_SLOT * 2)
        self.demand = demand
        self.prompt = rng.integers(math.ceil(demand.isl * demand.low_ratio), demand.isl + 1, n).astype(np.int64)
        self.output = rng.integers(math.ceil(demand.osl * demand.low_ratio), demand.osl + 1, n).astype(np.int64)
        self.unit_gaps = rng.exponential(1.0, n)
        self.prefix = rng.integers(0, max(demand.prefix_groups, 1), n).astype(np.int64)

    def inputs(self, fleet: Fleet, count: int, concurrency: int | None, rate_per_s: float | None) -> SimInputs:
        """``count`` requests in a closed loop, or open at ``rate_per_s``; prompts of a group share their prefix."""
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
            if self.demand.prefix_tokens:
                self._share_prefixes(prompt, offsets, numbers, config.block_size)
        none = np.full(count, -1, dtype=np.int64)
        return SimInputs(
            fleet=fleet, prompt_tokens=prompt, max_tokens=output, stop_after=none, priority=np.zeros(count, np.int64),
            group=np.zeros(count, np.int64), next_turn=none, follows=np.zeros(count, bool), think_s=np.zeros(count),
            due_s=due, limit_t_s=np.zeros(1), limit=np.array([concurrency or NO_LIMIT]), num_groups=1, timed_group=0,
            max_duration_s=np.inf if rate_per_s is None else float(due[-1]) * (1 + PATIENCE_RATIO) + 60.0, min_duration_s=0.0, min_requests=0, block_offsets=offsets, block_numbers=numbers,
            num_block_numbers=len(numbers),
        )  # fmt: skip

    def _share_prefixes(self, prompt: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, block_size: int) -> None:
        """Give the requests of a group the block numbers of its longest member, as far as the prefix goes."""
        group = np.tile(self.prefix, -(-len(prompt) // len(self.prefix)))[: len(prompt)]
        blocks = np.minimum(self.demand.prefix_tokens, prompt) // block_size
        for g in range(max(self.demand.prefix_groups, 1)):
            members = np.flatnonzero(group == g)
            if not len(members):
                continue
            first = offsets[members[np.argmax(blocks[members])]]
            for i in members.tolist():
                numbers[offsets[i] : offsets[i] + blocks[i]] = np.arange(first, first + blocks[i])


def values_of(inputs: SimInputs, r: SimResult, concurrency: int | None, slo: Slo | None) -> dict[str, float]:
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


def broken_limit(values: dict[str, float], slo: Slo | None) -> str | None:
    if slo is None:
        return None
    for limit in slo.limits:
        value = values[f"limit {limit.metric}"]
        if value > limit.limit_s:
            return f"{limit.text} does not hold ({'never done' if math.isinf(value) else f'{value * 1e3:,.0f} ms'})"
    if slo.min_ratio is not None and values["good_ratio"] < slo.min_ratio:
        return f"{values['good_ratio']:.1%} of requests meet the SLO, {slo.min_ratio:.1%} are asked for"
    return None
