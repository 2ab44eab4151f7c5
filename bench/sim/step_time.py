"""Step time of one engine: kernels, collectives, launch and host time, laid out as flat tables.

The time of a step is the sum of its operations (``bench/sim/op_times.py``): matrix products, attention, experts, norms,
the all-reduces of tensor parallelism, LM head and sampler, plus the host: a fixed and a per-request part that hides
behind the device until it exceeds it. All of it is computed once per engine; a simulated step reads tables
(``bench/sim/step_time_kernel.py``).

Where the numbers come from, best first, is told with every prediction (:attr:`StepTime.trust`):

* ``user-runs``: engine steps that ``bench run`` recorded, fitted by ``bench calibrate``;
* ``user-kernels``: kernel times that ``bench kernels`` measured on the device;
* ``shipped-curves``: efficiency curves fitted on open kernel tables, of the device itself or borrowed from a relative;
* ``data-sheet``: bare data-sheet ceilings at flat utilisations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.catalog.hardware import Hardware
from bench.catalog.model import ModelArch
from bench.errors import BadInput
from bench.sim import step_time_kernel as kernel
from bench.sim.efficiency import EFFICIENCY_FOLDER, curves_for
from bench.sim.interface import Interval
from bench.sim.model_shape import ModelShape, shape_of
from bench.sim.op_times import (
    Device,
    Overheads,
    all_reduce_s,
    decode_attention_s,
    elementwise_s,
    head_rows_s,
    layer_tokens_s,
    prefill_attention_s,
)
from bench.sim.profile import Layout, Profile
from bench.sim.user_kernels import KernelScales, read_kernel_scales

TOKENS_PER_OCTAVE, NUM_TOKEN_KNOTS = 8, 8 * 15 + 1  # 1 .. 32,768 tokens
ROWS_PER_OCTAVE, NUM_ROW_KNOTS = 4, 4 * 11 + 1  # 1 .. 2,048 sampled rows
ATTENTION_PER_OCTAVE = 2
NUM_DECODE_KNOTS, NUM_DECODE_LENGTH_KNOTS = 2 * 11 + 1, 2 * 18 + 1  # 2,048 requests, 262,144 tokens
NUM_PREFILL_KNOTS, NUM_PREFILL_LENGTH_KNOTS = 2 * 15 + 1, 2 * 18 + 1
#: vLLM captures CUDA graphs up to min(2 x max_num_seqs, this) tokens (1,024 from compute capability 10 on).
GRAPH_TOKENS_CAP, GRAPH_TOKENS_CAP_BLACKWELL = 512, 1024


@dataclass(frozen=True, slots=True)
class OverheadFit:
    """``configs/efficiency/overheads.yaml``: overheads, what they were fitted on, and intervals found on other rows."""

    overheads: Overheads
    source: str
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]  # trust -> metric -> (low, high) ratio
    interval_basis: str
    devices: tuple[str, ...] = ()
    engines: frozenset[tuple[int, int, int, str]] = frozenset()
    front_end_s: float = 0.0  # of request_before_s, what an HTTP server does for one request at a time

    def knows(self, shape: ModelShape, device: str) -> bool:
        """Whether the overheads were fitted on this architecture and dtype, on this device: its interval is narrower."""
        dtype = shape.expert_dtype if any(g.num_experts for g in shape.groups) else shape.dense_dtype
        return device in self.devices and (shape.num_layers, shape.hidden_size, shape.vocab_size, dtype) in self.engines


@functools.lru_cache(maxsize=4)
def load_overheads(path: Path = EFFICIENCY_FOLDER / "overheads.yaml") -> OverheadFit:
    """Read the fitted overheads. Raises BadInput where the file cannot be used."""
    from ruamel.yaml import YAML, YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        intervals = {
            trust: {m: (float(low), float(high)) for m, (low, high) in metrics.items()}
            for trust, metrics in data["intervals"].items()
        }
        values = {k: float(v) for k, v in data["overheads"].items()}
        engines = frozenset((int(n), int(h), int(v), str(d)) for n, h, v, d in data["fitted_engines"])
        return OverheadFit(
            Overheads(**values), str(data["source"]), intervals, str(data["interval_basis"]),
            tuple(data["fitted_devices"]), engines, float(data["front_end_s"]),
        )  # fmt: skip
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as e:
        raise BadInput(f"not an overheads file: {e}", where=str(path), next_step="restore the file") from e


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step-time model for one engine; implements ``bench.sim.interface.StepTimeModel``.

    Attributes:
        source: where the times come from, in words.
        trust: ``user-runs``, ``user-kernels``, ``shipped-curves`` or ``data-sheet``.
        array: what the kernel reads.
        overhead_s: per request before the queue and after the engine.
        front_end_s: what an HTTP server does for one request at a time: part of the former, except after a calibration, for
            the engines that record their steps run without such a server.
        intervals: metric -> interval; ``tpot``, ``ttft`` and ``output_tokens_per_s``.
    """

    source: str
    trust: str
    array: np.ndarray = field(repr=False)
    overhead_s: tuple[float, float] = (0.0, 0.0)
    front_end_s: float = 0.0
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def coefficients(self) -> np.ndarray:
        return self.array

    def request_overhead_s(self) -> tuple[float, float]:
        return self.overhead_s

    def interval(self, metric: str) -> Interval | None:
        """For ``metric``; throughputs share one interval, latencies that are not known take the wider of TTFT's."""
        if metric in self.intervals:
            return self.intervals[metric]
        if metric.endswith("_per_s") or metric.startswith("throughput"):
            return self.intervals.get("output_tokens_per_s")
        if metric.startswith(("itl", "tpot")):
            return self.intervals.get("tpot")
        return self.intervals.get("ttft")


def build_step_time(
    model: ModelArch,
    hardware: Hardware,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    enable_expert_parallel: bool = False,
    quantization: str | None = None,
    kv_cache_dtype: str | None = None,
    max_num_seqs: int = 256,
    enforce_eager: bool = False,
    async_scheduling: bool = True,
    profile: Profile | None = None,
    kernels: Path | None = None,
    shape: ModelShape | None = None,
) -> StepTime:
    """Step times of ``model`` served by vLLM on ``hardware``, under vLLM's own knob names.

    ``shape`` replaces the one derived from ``model`` and ``quantization`` (checkpoints that quantise parts alone).
    ``profile`` is a calibration on recorded runs (``bench/sim/calibrate.py``) and then decides. ``kernels`` is a result
    of ``bench kernels`` from the device that is predicted; without a profile it corrects the shipped curves.

    Raises BadInput for a layout that vLLM could not run, or a profile of another engine.
    """
    model.check_parallel(
        tensor_parallel_size, pipeline_parallel_size, tensor_parallel_size if enable_expert_parallel else 1
    )
    device = device_of(hardware)
    scales = read_kernel_scales(kernels, device) if kernels is not None and profile is None else None
    if scales is not None:
        o = device.overheads
        slower = {
            "memory_slowdown": o.memory_slowdown * scales.memory,
            "compute_slowdown": o.compute_slowdown * scales.compute,
        }
        device = dataclasses.replace(device, overheads=changed(o, **slower))
    blackwell = float(hardware.compute_capability or 0) >= 10.0
    graph_tokens = min(2 * max_num_seqs, GRAPH_TOKENS_CAP_BLACKWELL if blackwell else GRAPH_TOKENS_CAP)
    shape = shape or shape_of(model, quantization, kv_cache_dtype)
    array = coefficients(
        shape, device, tensor_parallel_size, pipeline_parallel_size,
        enable_expert_parallel, 0 if enforce_eager or hardware.kind == "cpu" else graph_tokens,
    )  # fmt: skip
    if not async_scheduling:
        array[kernel.HOST_PER_RUNNING_S] = device.overheads.host_per_running_sync_s
    if profile is not None:
        asked = Layout(
            profile.layout.model if profile.is_of(model) else model.name, hardware.name, tensor_parallel_size, pipeline_parallel_size, enable_expert_parallel,
            quantization, kv_cache_dtype,
        )  # fmt: skip
        return _calibrated(profile, asked, array)
    if scales is not None:
        array[kernel.DECODE_ATTENTION_SCALE] = scales.decode_attention / scales.memory
        array[kernel.PREFILL_ATTENTION_SCALE] = scales.prefill_attention / scales.compute
    return _uncalibrated(device, scales, array, shape)


def device_of(hardware: Hardware) -> Device:
    """The device with its shipped curves and fitted overheads."""
    capability = float(hardware.compute_capability) if hardware.compute_capability else None
    return Device(hardware, curves_for(hardware.name, capability), load_overheads().overheads)


def _calibrated(profile: Profile, asked: Layout, array: np.ndarray) -> StepTime:
    profile.check_layout(asked)
    for position, value in profile.adjustments().items():
        array[position] = value
    overhead = (profile.request_before_s, profile.request_after_s)
    return StepTime(profile.source, "user-runs", array, overhead, load_overheads().front_end_s, profile.intervals())


def _uncalibrated(device: Device, scales: KernelScales | None, array: np.ndarray, shape: ModelShape) -> StepTime:
    fit, curves, name = load_overheads(), device.curves, device.hardware.name
    own = "own-curves" if fit.knows(shape, name) else "own-curves-other-models"
    trust, key = "shipped-curves", own
    words = f"shipped efficiency curves of {curves.name} ({curves.source})"
    if curves.trust == "borrowed curves":
        key, words = "borrowed-curves", f"{words}; {curves.reason}: less trusted"
    if curves.trust == "bare data sheet":
        trust = key = "data-sheet"
        words = f"data sheet of {name} at flat utilisations; {curves.reason}"
        if not device.hardware.peak_flops:
            key, words = (
                "unknown",
                f"nothing is known of {name}'s speed: a guess until `bench calibrate` has seen runs of it",
            )
    if scales is not None:
        trust, key = "user-kernels", own
        words = f"kernels measured on {name} ({sum(scales.num_cases)} cases, {scales.source}) over the {words}"
    intervals = {m: Interval(low, high, 0.90, fit.interval_basis) for m, (low, high) in fit.intervals[key].items()}
    o = device.overheads
    front_end_s = min(fit.front_end_s, o.request_before_s)
    return StepTime(words, trust, array, (o.request_before_s, o.request_after_s), front_end_s, intervals)


def coefficients(
    model: ModelShape,
    device: Device,
    tp: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
    graph_max_tokens: int = 512,
) -> np.ndarray:
    """The flat array that ``step_time_kernel.step_time_s`` reads: header, then the four tables, all in seconds."""
    m = 2.0 ** (np.arange(NUM_TOKEN_KNOTS) / TOKENS_PER_OCTAVE)
    rows = 2.0 ** (np.arange(NUM_ROW_KNOTS) / ROWS_PER_OCTAVE)
    batch = 2.0 ** (np.arange(NUM_DECODE_KNOTS) / ATTENTION_PER_OCTAVE)[:, None]
    length = 2.0 ** (np.arange(NUM_DECODE_LENGTH_KNOTS) / ATTENTION_PER_OCTAVE)[None, :]
    queries = 2.0 ** (np.arange(NUM_PREFILL_KNOTS) / ATTENTION_PER_OCTAVE)[:, None]
    mean = 2.0 ** (np.arange(NUM_PREFILL_LENGTH_KNOTS) / ATTENTION_PER_OCTAVE)[None, :]
    h = model.hidden_size
    tokens = elementwise_s(device, 2.0, 4 * m * h) + all_reduce_s(device, 2 * m * h, tp)  # embedding
    decode = np.zeros((NUM_DECODE_KNOTS, NUM_DECODE_LENGTH_KNOTS))
    prefill = np.zeros((NUM_PREFILL_KNOTS, NUM_PREFILL_LENGTH_KNOTS))
    for group in model.groups:
        tokens = tokens + group.count * layer_tokens_s(device, model, group, tp, expert_parallel, m)
        decode += group.count * decode_attention_s(device, group, model.kv_dtype, tp, batch, length)
        prefill += group.count * prefill_attention_s(device, group, model.kv_dtype, tp, queries, mean)
    if pp > 1:  # the hidden states cross each stage border
        link = device.hardware.link_bandwidth_bytes_per_s or device.hardware.pcie_bandwidth_bytes_per_s
        tokens = tokens + (pp - 1) * (1e-5 + 2 * m * h / (0.7 * link))
    header = _header(model, device, tp, graph_max_tokens)
    parts = [header, tokens, head_rows_s(device, model, tp, rows), decode.ravel(), prefill.ravel()]
    return np.ascontiguousarray(np.concatenate(parts), dtype=np.float64)


def _header(model: ModelShape, device: Device, tp: int, graph_max_tokens: int) -> np.ndarray:
    o, k = device.overheads, kernel
    ranks = float(np.log2(max(tp, 1)))
    values: dict[int, Any] = {
        k.LINEAR_SCALE: 1.0,
        k.DECODE_ATTENTION_SCALE: 1.0,
        k.PREFILL_ATTENTION_SCALE: 1.0,
        k.SKEW_RATIO: o.skew_ratio,
        k.HOST_FIXED_S: o.host_fixed_s,
        k.HOST_PER_RUNNING_S: o.host_per_running_s,
        k.HOST_PIECEWISE_S: o.piecewise_per_layer_s * model.num_layers,
        k.HOST_EAGER_S: o.eager_per_layer_s * model.num_layers,
        k.GRAPH_MAX_TOKENS: graph_max_tokens,
        k.TOKENS_PER_OCTAVE: TOKENS_PER_OCTAVE,
        k.NUM_TOKEN_KNOTS: NUM_TOKEN_KNOTS,
        k.ROWS_PER_OCTAVE: ROWS_PER_OCTAVE,
        k.NUM_ROW_KNOTS: NUM_ROW_KNOTS,
        k.ATTENTION_PER_OCTAVE: ATTENTION_PER_OCTAVE,
        k.NUM_DECODE_KNOTS: NUM_DECODE_KNOTS,
        k.NUM_DECODE_LENGTH_KNOTS: NUM_DECODE_LENGTH_KNOTS,
        k.NUM_PREFILL_KNOTS: NUM_PREFILL_KNOTS,
        k.NUM_PREFILL_LENGTH_KNOTS: NUM_PREFILL_LENGTH_KNOTS,
        k.GAP_S: o.gap_s + o.gap_per_rank_s * ranks,
        k.GAP_PER_RUNNING_S: o.gap_per_running_s,
    }
    header = np.zeros(k.HEADER)
    for position, value in values.items():
        header[position] = value
    return header


def with_overheads(model: ModelShape, hardware: Hardware, overheads: Overheads, **layout: Any) -> np.ndarray:
    """Coefficients under other overheads: what the fit of the overheads itself evaluates."""
    return coefficients(model, dataclasses.replace(device_of(hardware), overheads=overheads), **layout)


def changed(overheads: Overheads, **values: float) -> Overheads:
    """``overheads`` with some values replaced."""
    return dataclasses.replace(overheads, **values)
