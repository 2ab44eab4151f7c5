"""Capacity from results instead of simulations: the highest measured request rate that met the SLO."""

from __future__ import annotations

from bench.analysis.efficiency import hardware_of
from bench.analysis.summary import Summary
from bench.catalog.hardware import Hardware
from bench.catalog.slo import Slo
from bench.decide.capacity import Capacity
from bench.decide.results import results_folder, summaries
from bench.errors import BadInput


def meets(summary: Summary, slo: Slo) -> bool:
    """Whether the upper end of every limit's interval (the value, where there is none) is within its limit."""
    for limit in slo.limits:
        rank = limit.percentile if limit.percentile is not None else 99
        key = f"{limit.metric}_p{rank:g}_s"
        found = summary.estimates.get(key)
        if found is None:
            return False
        value = found.high if found.high is not None else found.value
        if value > limit.limit_s:
            return False
    return True


def measured_capacity(results: str, hardware: Hardware, slo: Slo) -> list[Capacity]:
    """One capacity for every tensor parallelism in the results: the highest request rate of a cell within the SLO.

    Raises:
        BadInput: the results are of another device, or no cell met the SLO.
    """
    best: dict[int, tuple[float, Summary]] = {}
    for s in summaries(results_folder(results)):
        device = hardware_of(s.facts)
        if device is None or device.name != hardware.name:
            raise BadInput(
                f"its results are of {device.name if device else 'an unknown device'}, not of {hardware.name}",
                where=results,
            )
        rate = s.estimates.get("requests_per_s")
        if rate is None or not meets(s, slo):
            continue
        tp = s.facts.num_devices
        if tp not in best or rate.value > best[tp][0]:
            best[tp] = (rate.value, s)
    if not best:
        raise BadInput(
            f"no measured cell meets {slo.text}", where=results, next_step="measure lower loads, or relax the SLO"
        )
    return [
        Capacity(
            None,
            rate,
            None,
            origin=s.origin,
            source=f"{s.experiment}, cell {s.cell_id}, {s.estimates['requests_per_s'].num_runs} runs",
            label=f"{hardware.name} ×{tp} ({s.origin})",
            devices=tp,
        )
        for tp, (rate, s) in sorted(best.items())
    ]
