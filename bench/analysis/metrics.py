"""Every metric once: formula and units. ``METRICS`` holds the definitions that reports print; the functions compute.

Times are seconds, tokens are counts, shares are 0-1. A function returns NaN (arrays) or None (numbers) where a metric is
undefined, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.analysis.columns import RequestColumns

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True)
class MetricDef:
    """What a metric is. ``key`` names it in summary.json; percentiles of a distribution have keys of their own."""

    key: str
    title: str
    unit: str  # base unit; "" for a pure number
    formula: str
    better: Better = "higher"
    group: str = "throughput"


_DISTRIBUTIONS: tuple[MetricDef, ...] = (
    MetricDef("ttft", "Time to first token (TTFT)", "s", "first token − due; in a closed loop and in a batch due = sent", "lower", "latency"),
    MetricDef("ttft_service", "Service TTFT", "s", "first token − sent: without the time that a request waited in the client", "lower", "latency"),
    MetricDef("tpot", "Time per output token (TPOT)", "s", "(last token − first token) / (OSL − tokens in the first chunk); undefined where the divisor is below 1", "lower", "latency"),
    MetricDef("itl", "Inter-token latency (ITL)", "s", "gaps between chunks of one request; chunks that arrived in one read are one gap (see tokens per read)", "lower", "latency"),
    MetricDef("e2e", "End-to-end latency (E2E)", "s", "done − due", "lower", "latency"),
    MetricDef("send_lateness", "Send lateness", "s", "sent − due: how late this client was", "lower", "client"),
)  # fmt: skip
PERCENTILES: tuple[int, ...] = (50, 90, 95, 99)

_SINGLE: tuple[MetricDef, ...] = (
    MetricDef("output_tokens_per_s", "Output tokens/s", "tokens/s", "output tokens of the measured window / its length"),
    MetricDef("input_tokens_per_s", "Input tokens/s", "tokens/s", "prompt tokens whose first output token fell into the window / its length"),
    MetricDef("total_tokens_per_s", "Total tokens/s", "tokens/s", "output tokens/s + input tokens/s"),
    MetricDef("output_tokens_per_s_per_gpu", "Output tokens/s per GPU", "tokens/s", "output tokens/s / GPUs that the engine held; on a machine without GPU the host counts as one device"),
    MetricDef("total_tokens_per_s_per_gpu", "Total tokens/s per GPU", "tokens/s", "total tokens/s / GPUs that the engine held; on a machine without GPU the host counts as one device"),
    MetricDef("output_tokens_per_s_per_user", "Output tokens/s per user", "tokens/s", "1 / median TPOT: the speed at which one user sees text appear"),
    MetricDef("requests_per_s", "Requests/s", "1/s", "requests completed without error in the window / its length"),
    MetricDef("goodput_requests_per_s", "Goodput", "1/s", "requests due in the window that met all SLO limits / its length; requests with errors count as not met", group="slo"),
    MetricDef("slo_met_ratio", "Share that met the SLO", "", "requests due in the window that met all SLO limits / all requests due in it, errors included", group="slo"),
    MetricDef("error_ratio", "Share of errors", "", "requests with an error / requests due in the window", "lower", "slo"),
    MetricDef("isl_mean_tokens", "Mean ISL", "tokens", "mean prompt length of the counted requests, as the engine or server counted it", "neither", "workload"),
    MetricDef("osl_mean_tokens", "Mean OSL", "tokens", "mean number of tokens really produced by the counted requests", "neither", "workload"),
    MetricDef("tokens_per_chunk", "Tokens per read", "tokens", "output tokens / chunks read, over the counted requests", "neither", "workload"),
    MetricDef("in_flight_mean", "Mean requests in flight", "", "sum of the requests' time in flight within the window / its length", "neither", "workload"),
    MetricDef("prefix_cache_hit_ratio", "Prefix-cache hits", "", "prompt tokens served from the prefix cache / prompt tokens", "neither", "engine"),
    MetricDef("num_preemptions", "Preemptions", "", "requests that the scheduler pushed back during the window (sum over engine steps)", "lower", "engine"),
    MetricDef("running_mean", "Mean running requests", "", "requests running in the engine, mean over the window's steps, weighted by step time", "neither", "engine"),
    MetricDef("running_max", "Most running requests", "", "most requests running at once in the window's steps", "neither", "engine"),
    MetricDef("waiting_mean", "Mean waiting requests", "", "requests waiting in the engine, mean over the window's steps, weighted by step time", "lower", "engine"),
    MetricDef("kv_usage_max_ratio", "Highest KV-cache use", "", "largest share of KV-cache blocks in use in the window's steps", "neither", "engine"),
    MetricDef("step_time_p50_s", "Step time p50", "s", "median time of one engine step in the window", "lower", "engine"),
    MetricDef("prefill_time_ratio", "Share of time in steps with prefill", "", "time of steps that processed prompt tokens / time of all steps", "neither", "engine"),
    MetricDef("gpu_util_ratio", "Utilisation", "", "mean over devices and window. GPU: share of time in which some kernel ran (decode shows ~100 %, so conclude nothing from it); host: busy share of all cores", "neither", "device"),
    MetricDef("sm_active_ratio", "SM activity", "", "mean share of time in which an SM had a warp (GPM, Hopper and newer)", "neither", "device"),
    MetricDef("tensor_active_ratio", "Tensor-core activity", "", "mean share of time in which tensor cores were busy (GPM, Hopper and newer)", "neither", "device"),
    MetricDef("dram_bandwidth_ratio", "Memory-bandwidth activity", "", "mean share of peak memory bandwidth in use (GPM, Hopper and newer)", "neither", "device"),
    MetricDef("memory_used_bytes", "Memory used", "bytes", "largest memory in use in the window, summed over devices; on a host: of the whole host", "lower", "device"),
    MetricDef("power_w", "Power", "W", "energy of the window / its length where an energy counter is readable, else mean of the power samples; summed over devices", "lower", "energy"),
    MetricDef("energy_j_per_output_token", "Energy per output token", "J", "energy in the window of the devices that the engine held / output tokens of the window (gross)", "lower", "energy"),
    MetricDef("energy_net_j_per_output_token", "Net energy per output token", "J", "(energy − power of the loaded idle engine × window) / output tokens", "lower", "energy"),
    MetricDef("energy_j_per_total_token", "Energy per token", "J", "energy in the window / (input + output tokens)", "lower", "energy"),
    MetricDef("throttled_s", "Throttled time", "s", "seconds of the window in which clocks were held down by power or heat, worst device", "lower", "device"),
    MetricDef("temperature_max_c", "Highest temperature", "°C", "highest temperature of any device in the window", "lower", "device"),
    MetricDef("sm_clock_hz", "SM clock", "Hz", "mean SM clock over devices and window", "neither", "device"),
    MetricDef("mfu_ratio", "MFU", "", "FLOP/s by the model's arithmetic / (peak dense FLOP/s × GPUs); the peak is named with its source", group="efficiency"),
    MetricDef("mbu_ratio", "MBU", "", "bytes/s by the model's arithmetic (weights and KV cache, each step) / (peak memory bandwidth × GPUs); the peak is named with its source", group="efficiency"),
    MetricDef("tp_scaling_ratio", "TP scaling efficiency", "", "output tokens/s at TP n / (n / m × output tokens/s at the smallest TP m), all else equal", group="efficiency"),
    MetricDef("window_s", "Measured window", "s", "length of the window that was counted", "neither", "window"),
    MetricDef("cost_usd_per_million_output_tokens", "Cost per million output tokens", "USD", "price of the devices for the window / output tokens × 10⁶: all cost is charged to output", "lower", "cost"),
    MetricDef("cost_usd_per_million_input_tokens", "Cost per million input tokens (split)", "USD", "cost split by price ratio: an output token weighs r input tokens, so input = cost / (input + r × output tokens) × 10⁶", "lower", "cost"),
    MetricDef("cost_usd_per_million_output_tokens_split", "Cost per million output tokens (split)", "USD", "r × the cost of an input token under the same split", "lower", "cost"),
    MetricDef("cost_usd_per_million_blended_tokens", "Cost per million blended tokens", "USD", "price of the devices for the window / (input + output tokens) × 10⁶", "lower", "cost"),
)  # fmt: skip


def _expand() -> dict[str, MetricDef]:
    table: dict[str, MetricDef] = {}
    for d in _DISTRIBUTIONS:
        for name, text in [*((f"p{q}", f"p{q}") for q in PERCENTILES), ("mean", "mean")]:
            table[f"{d.key}_{name}_s"] = MetricDef(
                f"{d.key}_{name}_s", f"{d.title} {text}", d.unit, d.formula, d.better, d.group
            )
    return table | {d.key: d for d in _SINGLE}


#: key -> definition, percentiles expanded: "ttft_p50_s", "output_tokens_per_s", ...
METRICS: dict[str, MetricDef] = _expand()


def definitions() -> tuple[MetricDef, ...]:
    """The definitions as a reader wants them: each distribution once, then the rest."""
    return (*_DISTRIBUTIONS, *_SINGLE)


# --- per request -------------------------------------------------------------------------------------------------


def ttft_s(c: RequestColumns) -> np.ndarray:
    """first_token_s - due_s, seconds per request; NaN for requests without a first token or with an error."""
    return np.where(c.ok, c.first_token_s - c.due_s, np.nan)


def ttft_service_s(c: RequestColumns) -> np.ndarray:
    """first_token_s - sent_s, seconds per request."""
    return np.where(c.ok, c.first_token_s - c.sent_s, np.nan)


def send_lateness_s(c: RequestColumns) -> np.ndarray:
    """sent_s - due_s, seconds per request, failed ones included."""
    return c.sent_s - c.due_s


def e2e_s(c: RequestColumns) -> np.ndarray:
    """done_s - due_s, seconds per request."""
    return np.where(c.ok, c.done_s - c.due_s, np.nan)


def tpot_s(c: RequestColumns) -> np.ndarray:
    """(last_token_s - first_token_s) / (osl - tokens in the first chunk); NaN where the divisor is below 1.

    The first chunk counts as one token where its size is not known.
    """
    first = np.where(np.isnan(c.first_chunk_tokens), 1.0, c.first_chunk_tokens)
    rest = c.osl - first
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(c.ok & (rest >= 1), (c.last_token_s - c.first_token_s) / rest, np.nan)


def itl_s(index: np.ndarray, t_s: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Gaps between successive chunks of one request, all requests of ``counted`` (their indices) pooled.

    ``index`` and ``t_s`` are the chunk records' columns in any order.
    """
    keep = np.isin(index, counted)
    index, t_s = index[keep], t_s[keep]
    order = np.lexsort((t_s, index))
    index, t_s = index[order], t_s[order]
    return np.diff(t_s)[index[1:] == index[:-1]]


# --- per window --------------------------------------------------------------------------------------------------


def output_tokens_in(c: RequestColumns, start_s: float, end_s: float) -> float:
    """Output tokens produced in [start_s, end_s] by requests without error.

    A request whose tokens all fell inside counts whole. One that reaches over an end counts in part: the first chunk at
    first_token_s, the rest spread evenly from there to last_token_s (exact to one token per request and end).
    """
    first = np.where(np.isnan(c.first_chunk_tokens), 1.0, c.first_chunk_tokens)
    known = c.ok & ~np.isnan(c.osl) & ~np.isnan(c.first_token_s) & ~np.isnan(c.last_token_s)
    osl, head, tail = c.osl[known], np.minimum(first, c.osl)[known], c.last_token_s[known]
    begin = c.first_token_s[known]
    inside_head = (begin >= start_s) & (begin <= end_s)
    span = tail - begin
    overlap = np.clip(np.minimum(tail, end_s) - np.maximum(begin, start_s), 0, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(span > 0, overlap / span, inside_head)
    share = np.where((begin >= start_s) & (tail <= end_s), 1.0, share)
    return float((head * inside_head + (osl - head) * share).sum())


def input_tokens_in(c: RequestColumns, start_s: float, end_s: float) -> float:
    """Prompt tokens of requests without error whose first output token fell into [start_s, end_s]."""
    inside = c.ok & (c.first_token_s >= start_s) & (c.first_token_s <= end_s) & ~np.isnan(c.isl)
    return float(c.isl[inside].sum())


def completed_in(c: RequestColumns, start_s: float, end_s: float) -> int:
    """Requests without error that were done in [start_s, end_s]."""
    return int(np.count_nonzero(c.ok & (c.done_s >= start_s) & (c.done_s <= end_s)))


def in_flight_mean(c: RequestColumns, start_s: float, end_s: float) -> float:
    """Mean number of requests between sent and done over [start_s, end_s]."""
    done = np.where(np.isnan(c.done_s), end_s, c.done_s)
    overlap = np.clip(np.minimum(done, end_s) - np.maximum(c.sent_s, start_s), 0, None)
    return float(np.nansum(overlap) / (end_s - start_s))


def rate_per_s(amount: float, window_s: float) -> float | None:
    """amount / window; None for an empty window."""
    return amount / window_s if window_s > 0 else None


def energy_per_token_j(energy_j: float | None, tokens: float) -> float | None:
    """J per token; None where energy is unknown or nothing was produced."""
    return None if energy_j is None or tokens <= 0 else energy_j / tokens
