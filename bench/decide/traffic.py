"""From a demand file to numbers: the day's rates now and at the horizon, and the lengths of the requests."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bench.config.demand import Demand
from bench.decide.capacity import Traffic
from bench.decide.fleet import HOURS_PER_DAY, day_of_rates
from bench.errors import BadInput
from bench.runner.schedules import length
from bench.units import S_PER_HOUR
from bench.workload.lengths import EmpiricalLength
from bench.workload.trace import read_trace

#: A trace must cover at least this much before its hours count as the shape of a day.
_FULL_DAY_S = 23 * S_PER_HOUR


@dataclass(frozen=True, slots=True)
class Load:
    """The demand that a fleet must carry. ``rates_per_s``: 24 hours, the highest is the peak."""

    peak_per_s: float
    rates_per_s: tuple[float, ...]
    traffic: Traffic
    source: str

    def grown(self, factor: float) -> Load:
        return replace(
            self, peak_per_s=self.peak_per_s * factor, rates_per_s=tuple(r * factor for r in self.rates_per_s)
        )


def growth_factor(demand: Demand, months: float | None = None) -> float:
    """(1 + growth per month) ^ months; ``months``: default the horizon."""
    return (1 + demand.growth_per_month) ** (demand.horizon_months if months is None else months)


def load_of(demand: Demand) -> Load:
    """Today's load, typed in or taken from a trace.

    Raises:
        BadInput: the trace cannot be read or is too short for its peak window.
    """
    if demand.trace is None:
        assert demand.peak_rate_per_s is not None and demand.isl is not None and demand.osl is not None
        rates = day_of_rates(demand.peak_rate_per_s, demand.mean_rate_per_s, demand.hourly)
        traffic = Traffic(length(demand.isl), length(demand.osl), demand.seed)
        return Load(demand.peak_rate_per_s, rates, traffic, "typed in")
    return _of_trace(demand)


def _of_trace(demand: Demand) -> Load:
    """Peak: the busiest window of ``peak_window_s``; mean: requests / span; lengths: drawn from the trace's, ISL and OSL
    independently of each other."""
    assert demand.trace is not None
    trace = read_trace(demand.trace, skip_bad=True)
    due = trace.due_s * demand.trace_time_scale
    span = float(due[-1])
    window = demand.peak_window_s
    if span < window:
        raise BadInput(
            f"the trace covers {span:.3g} s, less than one peak window of {window:g} s",
            where=demand.trace,
            next_step="give a longer trace, or a smaller peak_window_s",
        )
    counts = np.searchsorted(due, due + window) - np.arange(len(due))
    peak = float(counts[due <= span - window].max()) / window
    mean = len(due) / span
    if span >= _FULL_DAY_S:
        hour = (due // S_PER_HOUR).astype(int)
        full = max(1, math.floor(span / S_PER_HOUR / HOURS_PER_DAY + 1 / HOURS_PER_DAY))
        by_hour = np.bincount(hour % HOURS_PER_DAY, minlength=HOURS_PER_DAY) / (full * S_PER_HOUR)
        rates = tuple(float(min(r, peak)) for r in by_hour)
    else:
        rates = day_of_rates(peak, min(mean, peak), None)
    isl = EmpiricalLength(tuple(r.isl for r in trace.rows))
    osl = EmpiricalLength(tuple(r.osl for r in trace.rows))
    skipped = f", {trace.num_skipped} unusable rows left out" if trace.num_skipped else ""
    text = (
        f"trace {demand.trace}: {len(trace.rows):,} requests in {span / S_PER_HOUR:.3g} h, peak over {window:g} s, "
        f"mean ISL {isl.mean_tokens:,.0f}, OSL {osl.mean_tokens:,.0f}{skipped}"
    )
    return Load(peak, rates, Traffic(isl, osl, demand.seed), text)
