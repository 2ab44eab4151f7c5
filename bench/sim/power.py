"""Power and energy of a predicted run, from the load of each step.

GPU power is not linear in utilisation: an H100 draws 56-61 % of its limit at batch 1 already, because streaming weights
keeps the memory busy, and nears the limit from batch 128 on. Power is therefore predicted from the rates of the two
things that cost energy, bytes moved and FLOPs, with a floor for being busy at all and a soft ceiling at the power limit.
The coefficients are fitted on published H100 points (``configs/efficiency/power.yaml``); other devices scale with their
power limit and data sheet, and get the wider interval that rows of a never-fitted device showed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.catalog.hardware import Hardware
from bench.catalog.model import ModelArch
from bench.catalog.steps import NUM_FEATURES, F, StepCoefficients, step_coefficients, window_of
from bench.errors import BadInput
from bench.sim.efficiency import EFFICIENCY_FOLDER
from bench.sim.interface import Interval

FITTED_DEVICE = "H100-SXM"


@dataclass(frozen=True, slots=True)
class PowerFit:
    """Coefficients and intervals of ``configs/efficiency/power.yaml``; shares of the power limit."""

    busy_floor: float
    weights: float
    kv: float
    flops: float
    flops_exponent: float
    cap: float
    idle: float
    source: str
    fitted_device: tuple[float, float]
    other_device: tuple[float, float]


@functools.lru_cache(maxsize=4)
def load_power_fit(path: Path = EFFICIENCY_FOLDER / "power.yaml") -> PowerFit:
    """Read the fit. Raises BadInput where the file cannot be used."""
    from ruamel.yaml import YAML, YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        bounds = {k: (float(low), float(high)) for k, (low, high) in data["intervals"].items()}
        values = {k: float(v) for k, v in data["values"].items()}
        source = str(data["source"])
        return PowerFit(
            **values, source=source, fitted_device=bounds["fitted-device"], other_device=bounds["other-device"]
        )
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as e:
        raise BadInput(f"not a power file: {e}", where=str(path), next_step="restore the file") from e


@dataclass(frozen=True, slots=True)
class StepPower:
    """Power of every step of a simulated run, per GPU, and what the run took.

    Attributes:
        power_w: (num_steps,) mean power of one GPU over each step's period.
        energy_j: of all GPUs over the whole run, idle time included.
        mean_power_w: of one GPU over the whole run.
        interval: relative bounds of power and energy.
    """

    power_w: np.ndarray
    energy_j: float
    mean_power_w: float
    interval: Interval


def power_interval(hardware_name: str) -> Interval:
    """90 % interval of power and energy on this device."""
    fit = load_power_fit()
    if hardware_name == FITTED_DEVICE:
        return Interval(*fit.fitted_device, 0.90, fit.source)
    return Interval(*fit.other_device, 0.90, f"scaled from {FITTED_DEVICE} by power limit and data sheet")


def energy_per_token_interval(hardware_name: str, rate: Interval) -> Interval:
    """90 % interval of joules per output token: power over ``rate`` (that of the output rate).

    Power was fitted at measured rates, so that the two errors are taken as independent: log half-widths add in squares.
    """
    power = power_interval(hardware_name)
    low = math.hypot(math.log(power.low_ratio), math.log(rate.high_ratio))
    high = math.hypot(math.log(power.high_ratio), math.log(rate.low_ratio))
    return Interval(math.exp(-low), math.exp(high), 0.90, f"power: {power.basis}; output rate: {rate.basis}")


def _wider(power: Interval, low: float, high: float, basis: str) -> Interval:
    """``power`` with an independent cause that gives ``low`` to ``high`` times: log half-widths add in squares."""
    down, up = (
        math.hypot(math.log(power.low_ratio), math.log(low)),
        math.hypot(math.log(power.high_ratio), math.log(high)),
    )
    return Interval(math.exp(-down), math.exp(up), power.confidence, f"power: {power.basis}; step time: {basis}")


def power_ratio(fit: PowerFit, memory: np.ndarray, kv: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """Share of the power limit at these utilisations (shares of the data sheet's bandwidth and peak)."""
    raw = fit.busy_floor + fit.weights * memory + fit.kv * kv + fit.flops * np.maximum(flops, 0.0) ** fit.flops_exponent
    return np.asarray(fit.cap * (1.0 - np.exp(-raw / fit.cap)))


def step_features(model: ModelArch, steps: dict[str, np.ndarray]) -> np.ndarray:
    """(num_steps, NUM_FEATURES) of ``bench.catalog.steps`` from the step columns of a simulation."""
    prefill, decode = steps["prefill_tokens"].astype(float), steps["decode_requests"].astype(float)
    prompts = steps["prefill_requests"].astype(float)
    x = np.zeros((len(prefill), NUM_FEATURES))
    x[:, F["any_tokens"]] = (prefill + decode) > 0
    x[:, F["has_prefill"]] = prefill > 0
    x[:, F["has_decode"]] = decode > 0
    x[:, F["tokens"]] = prefill + decode
    x[:, F["prefill_tokens"]] = prefill
    x[:, F["decode_requests"]] = decode
    x[:, F["sampled"]] = prompts + decode
    x[:, F["prefill_pairs"]] = steps["prefill_pairs"]
    x[:, F["prefill_rows"]] = steps["prefill_context"] + prefill
    x[:, F["decode_rows"]] = steps["decode_context_sum"]
    _, window = window_of(model)
    if window:
        mean = np.where(decode > 0, steps["decode_context_sum"] / np.maximum(decode, 1), 0.0)
        pairs = steps["prefill_pairs"] / np.maximum(prefill, 1)
        x[:, F["decode_rows_windowed"]] = decode * np.minimum(mean, window)
        x[:, F["prefill_pairs_windowed"]] = prefill * np.minimum(pairs, window)
        x[:, F["prefill_rows_windowed"]] = np.minimum(x[:, F["prefill_rows"]], prefill + prompts * (window - 1))
    return x


def utilisations(
    coefficients: StepCoefficients, hardware: Hardware, features: np.ndarray, period_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes besides KV, KV bytes, FLOPs) per second over data-sheet ceilings, one value a step."""
    c = coefficients
    kv_rows = np.array([k == "attention_decode" for k in c.kinds])
    moved = features @ c.bytes.T
    touched = np.array([c.experts_touched(t) for t in np.unique(features[:, F["tokens"]])])
    order = np.searchsorted(np.unique(features[:, F["tokens"]]), features[:, F["tokens"]])
    moved = moved + np.outer(touched[order], c.expert_bytes)
    peaks = np.array([hardware.peak(hardware.compute_dtype(d)) for d in c.dtypes])
    flops = (features @ c.flops.T) / peaks
    bandwidth = hardware.memory_bandwidth_bytes_per_s * np.maximum(period_s, 1e-9)
    return (
        moved[:, ~kv_rows].sum(1) / bandwidth,
        moved[:, kv_rows].sum(1) / bandwidth,
        flops.sum(1) / np.maximum(period_s, 1e-9),
    )


def step_power(
    model: ModelArch,
    hardware: Hardware,
    steps: dict[str, np.ndarray],
    duration_s: float,
    *,
    tp: int = 1,
    pp: int = 1,
    quantization: str | None = None,
    kv_cache_dtype: str | None = None,
    step_time: Interval | None = None,
) -> StepPower:
    """Power of a simulated run of one replica.

    ``steps`` are the step columns of a simulation (``bench.sim.inputs.STEP_COLUMNS``), ``duration_s`` the length of the
    run in virtual time. A step's power holds from the end of the step before to its own end, at most for its own GPU and
    host time; the rest of the time the GPU idles. ``step_time`` is the interval of the predicted step times, which the power's then
    takes in: a step that takes longer does the same work at a lower power. Raises BadInput for a device without a power limit or peaks.
    """
    if not hardware.tdp_w or not hardware.peak_flops:
        raise BadInput(f"{hardware.name}: no power limit or peak rates in the catalogue, so no power can be predicted")
    fit = load_power_fit()
    interval = power_interval(hardware.name)
    idle_w = fit.idle * hardware.tdp_w
    gpus = tp * pp
    if not len(steps["end_s"]):
        return StepPower(np.zeros(0), idle_w * duration_s * gpus, idle_w, interval)
    order = np.argsort(steps["end_s"], kind="stable")
    ends = steps["end_s"][order]
    starts = np.concatenate([[steps["scheduled_s"][order][0]], ends[:-1]])
    busy = np.minimum(np.maximum(ends - starts, 0.0), steps["gpu_s"][order] + steps["host_s"][order])
    coefficients = step_coefficients(model, tp, pp, quantization, kv_cache_dtype, 1, 0)
    features = step_features(model, steps)[order]
    memory, kv, flops = utilisations(coefficients, hardware, features, np.maximum(busy, 1e-6))
    power = power_ratio(fit, memory, kv, flops) * hardware.tdp_w
    energy = float((power * busy).sum()) + idle_w * max(0.0, duration_s - float(busy.sum()))
    if step_time is not None:
        at = [
            float((power_ratio(fit, memory / r, kv / r, flops / r) * busy).sum())
            for r in (step_time.high_ratio, 1.0, step_time.low_ratio)
        ]
        interval = _wider(interval, at[0] / at[1], at[2] / at[1], step_time.basis)
    result = np.empty_like(power)
    result[order] = power
    return StepPower(result, energy * gpus, energy / max(duration_s, 1e-9), interval)
