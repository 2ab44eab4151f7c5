"""Telemetry over the counted window: utilisation, memory, power, energy per token, throttling, over all devices held."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from bench.analysis.run_facts import RunFacts
from bench.analysis.steady_state import Window
from bench.records import Estimate, Warning_
from bench.store import TELEMETRY, RunReader
from bench.telemetry.baseline import baseline_of
from bench.telemetry.energy import energy_per_token, net_energy_j, total_energy
from bench.telemetry.series import Series, series_from_table
from bench.telemetry.window import WindowReport, report_window

#: Averaged over the window and then over devices: telemetry column and metric have the same name.
_MEANS = ("gpu_util_ratio", "sm_active_ratio", "tensor_active_ratio", "dram_bandwidth_ratio", "sm_clock_hz")
#: A stretch before the first request that is long enough to tell the power of the loaded idle engine.
MIN_IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class DeviceWindow:
    """Metrics by key of METRICS, reasons for the absent ones, and the telemetry's own doubts."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    warnings: tuple[Warning_, ...] = ()


def device_window(
    run: RunReader, facts: RunFacts, window: Window, output_tokens: float, input_tokens: float
) -> DeviceWindow:
    """What the engine's devices did in ``window``. A quantity that one of them lacks is absent, never a part of the sum."""
    table = run.table(TELEMETRY)
    if table is None or not table.num_rows:
        reason = str(facts.telemetry.get("error") or "no telemetry was recorded")
        return DeviceWindow(absent=dict.fromkeys(("gpu_util_ratio", "power_w", "energy_j_per_output_token"), reason))
    series = series_from_table(table)
    held = [d for d in facts.device_names if d in series] or ([] if facts.device_names else list(series))
    if not held:
        reason = f"telemetry holds {', '.join(series)}, not the engine's devices"
        return DeviceWindow(absent=dict.fromkeys(("gpu_util_ratio", "power_w", "energy_j_per_output_token"), reason))
    reports = [report_window(series[d], _limits(facts, d), window.start_s, window.end_s) for d in held]
    values, absent = _usage(reports)
    energy, no_energy, counts = _energy(reports, [series[d] for d in held], facts, output_tokens, input_tokens)
    return DeviceWindow(values | energy, absent | no_energy, counts, _once_each(reports))


def _limits(facts: RunFacts, device: str) -> dict[str, float]:
    """The sampler's facts of a device that are numbers (limits, maxima)."""
    devices = facts.telemetry.get("devices")
    about = devices.get(device) if isinstance(devices, dict) else None
    return {k: v for k, v in about.items() if isinstance(v, (int, float))} if isinstance(about, dict) else {}


def _once_each(reports: list[WindowReport]) -> tuple[Warning_, ...]:
    """Each kind of doubt once, with the number of devices it holds for."""
    by_code: dict[str, list[Warning_]] = {}
    for w in (w for r in reports for w in r.warnings):
        by_code.setdefault(w.code, []).append(w)
    out = []
    for same in by_code.values():
        others = len({w.scope for w in same}) - 1
        text = same[0].message + (f" (and {others} more device{'s' if others > 1 else ''} likewise)" if others else "")
        out.append(replace(same[0], message=text))
    return tuple(out)


def _usage(reports: list[WindowReport]) -> tuple[dict[str, float], dict[str, str]]:
    values: dict[str, float] = {}
    absent: dict[str, str] = {}
    for key in _MEANS:
        found = [r.means[key] for r in reports if key in r.means]
        if len(found) == len(reports):
            values[key] = float(np.mean(found))
        else:
            absent[key] = "not readable on this device"
    memory = [r.max_memory_used_bytes for r in reports if r.max_memory_used_bytes is not None]
    if len(memory) == len(reports):
        values["memory_used_bytes"] = float(sum(memory))
    hottest = [r.max_temperature_c for r in reports if r.max_temperature_c is not None]
    if hottest:
        values["temperature_max_c"] = max(hottest)
    # reasons overlap, so the longest one on the worst device counts, never their sum
    throttled = [max(r.throttled_s.values()) for r in reports if r.throttled_s]
    if throttled:
        values["throttled_s"] = max(throttled)
    return values, absent


def _energy(
    reports: list[WindowReport], series: list[Series], facts: RunFacts, output_tokens: float, input_tokens: float
) -> tuple[dict[str, float], dict[str, str], dict[str, float]]:
    values: dict[str, float] = {}
    absent: dict[str, str] = {}
    counts: dict[str, float] = {}
    whole = total_energy([r.energy for r in reports])
    if whole.mean_power_w is not None:
        values["power_w"] = whole.mean_power_w
        counts |= {"energy_j": whole.energy_j or 0.0, "energy_uncertainty_j": whole.uncertainty_j}
    elif all("power_w" in r.means for r in reports):
        values["power_w"] = sum(r.means["power_w"] for r in reports)
    else:
        absent["power_w"] = whole.problem or "not readable"
    if whole.disagreement_ratio is not None:
        counts["energy_gap_ratio"] = whole.disagreement_ratio
    for key, tokens in (
        ("energy_j_per_output_token", output_tokens),
        ("energy_j_per_total_token", output_tokens + input_tokens),
    ):
        _per_token(key, energy_per_token(whole, round(tokens)), values, absent)
    idle_w = idle_power_w(series, facts)
    net = net_energy_j(whole, idle_w)
    if net is None:
        absent["energy_net_j_per_output_token"] = (
            absent.get("energy_j_per_output_token") or "the power of the loaded idle engine was not measured"
        )
    else:
        counts["idle_power_w"] = idle_w or 0.0
        _per_token("energy_net_j_per_output_token", energy_per_token(whole, round(output_tokens), net), values, absent)
    return values, absent, counts


def _per_token(key: str, found: Estimate | Warning_, values: dict[str, float], absent: dict[str, str]) -> None:
    if isinstance(found, Warning_):
        absent[key] = found.message
    else:
        values[key] = found.value


def idle_power_w(series: list[Series], facts: RunFacts) -> float | None:
    """Power of the loaded idle engine over all its devices: from the manifest, else from the samples before the run's zero.

    None where a device's is not known.
    """
    found = facts.telemetry.get("idle_power_w")
    known = {k: v for k, v in found.items() if isinstance(v, (int, float))} if isinstance(found, dict) else {}
    total = 0.0
    for s in series:
        power = known.get(s.device)
        if power is None and len(s.t_s) and s.t_s[0] <= -MIN_IDLE_S:
            power = baseline_of(s, float(s.t_s[0]), 0.0).power_w
        if power is None:
            return None
        total += float(power)
    return total
