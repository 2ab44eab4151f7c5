"""How far throughput may be off where arrivals, not the engine, set it.

The interval of a step-time model says how fast the engine may be, and that is an interval of throughput only while the engine is
the limit. Under arrivals the same requests are put to engines as slow and as fast as its ends: what they keep up with, they serve at
the rate of the arrivals, whatever their speed. Time is scaled in place of the engine, so that every kind of step gets slower alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bench.sim.inputs import SimInputs, SimResult
from bench.sim.interface import Interval

#: Fewer timed requests than this say nothing about growth.
LEAST_REQUESTS = 16
#: Engines keep up when they serve this share of what arrives.
KEEPS_UP_RATIO = 0.95
_Z_90 = 1.645
ARRIVALS_SET_IT = "arrivals set the rate"


def at_speed(inputs: SimInputs, speed_ratio: float) -> SimInputs:
    """The same demand for an engine ``speed_ratio`` times as fast, in time that runs as much faster: what the engine does takes as
    long as ever, what the world does (arrivals, pauses, the run's minimum) so many times as long. Nothing is cut off at the end,
    so that a queue shows its whole length."""
    return replace(
        inputs,
        due_s=inputs.due_s * speed_ratio,
        think_s=inputs.think_s * speed_ratio,
        limit_t_s=inputs.limit_t_s * speed_ratio,
        min_duration_s=inputs.min_duration_s * speed_ratio,
        max_duration_s=math.inf,
        record_tokens=False,
    )


def served_share(inputs: SimInputs, result: SimResult) -> tuple[float, float] | None:
    """(share of what arrives that leaves as fast as it comes, requests in flight on average); None for too few requests.

    If latency grows by dL while arrivals go on for da, what comes in da leaves in da + dL. Both are taken between the means of the
    second and of the last quarter of the requests, as steady state looks for growth.
    """
    timed = np.flatnonzero((inputs.group >= inputs.timed_group) & np.isfinite(result.last_token_s))
    if len(timed) < LEAST_REQUESTS:
        return None
    arrival = np.where(np.isfinite(result.due_s), result.due_s, result.sent_s)[timed]
    order = np.argsort(arrival, kind="stable")
    arrival, latency = arrival[order], (result.last_token_s[timed] - arrival)[order]
    n = len(timed)
    second, last = slice(n // 4, n // 2), slice(3 * n // 4, n)
    gone = float(arrival[last].mean() - arrival[second].mean())
    grown = max(0.0, float(latency[last].mean() - latency[second].mean()))
    span = float(arrival[-1] - arrival[0])
    if gone <= 0 or span <= 0:
        return None
    return gone / (gone + grown), float(latency.sum()) / span


def throughput_interval(inputs: SimInputs, simulate: Callable[[SimInputs], SimResult], engine: Interval) -> Interval:
    """The interval of throughput under the arrivals of ``inputs``: never wider than ``engine``, that of the engine as the limit.

    An end of it stays where the engine is the limit: the upper one if the predicted engine does not keep up, the lower one if one as
    slow as ``engine`` allows does not. Else the rate is that of the arrivals, but for the share that latency's growth takes, and for
    the edges of a counted window: what leaves in it differs from what arrives by the requests in flight at its two ends, two
    independent counts.
    """
    shares = []
    for speed in (engine.low_ratio, 1.0, engine.high_ratio):
        scaled = at_speed(inputs, speed)
        found = served_share(scaled, simulate(scaled))
        if found is None:
            return engine
        shares.append(found)
    (low, in_flight), (middle, _), (high, _) = shares
    num_timed = int(np.count_nonzero(inputs.group >= inputs.timed_group))
    edges = _Z_90 * math.sqrt(2 * in_flight) / num_timed
    if middle < KEEPS_UP_RATIO:
        return engine
    low_ratio = max(engine.low_ratio, min(1.0, low / middle) - edges) if low >= KEEPS_UP_RATIO else engine.low_ratio
    high_ratio = min(engine.high_ratio, max(1.0, high / middle) + edges)
    return replace(engine, low_ratio=low_ratio, high_ratio=high_ratio, basis=f"{ARRIVALS_SET_IT}; {engine.basis}")
