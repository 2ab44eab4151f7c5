"""The roofline: for every operation of a step, how long it must take at least, and which ceiling says so.

time >= max(FLOPs / peak FLOP/s, bytes / memory bandwidth, wire bytes / link bandwidth). Ceilings come from the data sheet
(``configs/hardware``) or from kernels measured on the machine (``bench kernels``); a result says which. The operations
themselves, and the coefficients a simulator multiplies, are in ``bench.catalog.steps``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware
from bench.catalog.steps import (
    COMM_KINDS,
    FEATURES,
    KINDS,
    NUM_FEATURES,
    F,
    StepCoefficients,
    StepShape,
    request_features,
    step_coefficients,
)
from bench.errors import BadInput

__all__ = [
    "COMM_KINDS",
    "FEATURES",
    "KINDS",
    "NUM_FEATURES",
    "Ceilings",
    "F",
    "Op",
    "OpTime",
    "StepCoefficients",
    "StepRoofline",
    "StepShape",
    "Work",
    "request_features",
    "roofline_time",
    "run_work",
    "step_coefficients",
    "step_ops",
    "step_roofline",
    "wire_bytes",
]

Bound = Literal["compute", "memory", "link", "nothing"]


@dataclass(frozen=True, slots=True)
class Op:
    """One kind of operation on one rank, summed over ``count`` calls (layers) of a step.

    ``m``, ``n``, ``k`` are one call's matrix sizes (0 where it is no product). ``comm_bytes`` is the size of the tensors
    sent or reduced, before the algorithm's factor (see :func:`wire_bytes`), over ``group`` ranks.
    """

    name: str
    kind: str
    count: float
    flops: float
    bytes: float
    comm_bytes: float
    dtype: str
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    group: int = 1

    @property
    def intensity_flops_per_byte(self) -> float:
        """Arithmetic intensity; 0 for what computes nothing."""
        return self.flops / self.bytes if self.bytes else 0.0


def step_ops(
    model: ModelArch,
    shape: StepShape,
    tp: int = 1,
    pp: int = 1,
    quant: str | None = None,
    kv_cache_dtype: str | None = None,
    ep: int = 1,
    stage: int = 0,
) -> list[Op]:
    """The operations of one step on one rank of pipeline ``stage``, in order, without those that do nothing in it."""
    coefficients = step_coefficients(model, tp, pp, quant, kv_cache_dtype, ep, stage)
    return ops_from(coefficients, shape)


def ops_from(c: StepCoefficients, shape: StepShape) -> list[Op]:
    """As :func:`step_ops`, from coefficients built once."""
    x = shape.features()
    flops, size, comm = c.evaluate(x)
    result = []
    for i, name in enumerate(c.names):
        if flops[i] <= 0 and size[i] <= 0 and comm[i] <= 0:
            continue
        m = float(x[c.m_feature[i]] * c.m_scale[i]) if c.m_feature[i] >= 0 else 0.0
        result.append(
            Op(
                name=name,
                kind=c.kinds[i],
                count=float(c.counts[i]),
                flops=float(flops[i]),
                bytes=float(size[i]),
                comm_bytes=float(comm[i]),
                dtype=c.dtypes[i],
                m=m,
                n=float(c.gemm_n[i]),
                k=float(c.gemm_k[i]),
                group=int(c.group[i]),
            )
        )
    return result


def wire_bytes(kind: str, comm_bytes: float, group: int) -> float:
    """Bytes that one rank must send at least for a collective over ``group`` ranks on a tensor of ``comm_bytes``.

    all-reduce 2 (p-1)/p (reduce-scatter, then all-gather), all-gather and all-to-all (p-1)/p, point to point 1: the
    bandwidth-optimal bounds (Thakur, Rabenseifner, Gropp, 2005). For an all-gather the tensor is the gathered one.
    """
    if group <= 1:
        return 0.0
    factor = {"all_reduce": 2 * (group - 1) / group, "p2p": 1.0}.get(kind, (group - 1) / group)
    return factor * comm_bytes


# --- ceilings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device can do at most: FLOP/s by dtype, memory bytes/s, link bytes/s (one direction), and who says so."""

    name: str
    flops: dict[str, float]
    memory_bytes_per_s: float
    link_bytes_per_s: float
    source: str
    wide_link_bytes_per_s: float | None = (
        None  # among more than two ranks, where that is another figure (bridged cards)
    )
    measured: frozenset[str] = field(default_factory=frozenset)  # "memory", "link" and dtypes that were measured here

    @classmethod
    def from_hardware(cls, hardware: Hardware) -> Ceilings:
        """Data-sheet ceilings. Raises BadInput for a CPU entry, which has none."""
        if not hardware.peak_flops or not hardware.memory_bandwidth_bytes_per_s:
            step = "measure them with `bench kernels` and pass its results"
            raise BadInput(f"{hardware.name} has no data-sheet ceilings", next_step=step)
        return cls(
            hardware.name,
            dict(hardware.peak_flops),
            hardware.memory_bandwidth_bytes_per_s,
            hardware.link_bandwidth_bytes_per_s,
            "data sheet",
            hardware.link_bytes_per_s(3),
        )

    def link(self, group: int) -> float:
        """Link bytes/s of one direction among ``group`` ranks."""
        wide = self.wide_link_bytes_per_s
        return wide if group > 2 and wide is not None else self.link_bytes_per_s

    def peak(self, dtype: str) -> float:
        """FLOP/s for products in ``dtype``; a format without its own rate runs at the 16-bit one."""
        for key in (dtype, "bf16", "fp16", "tf32", "fp32"):
            if key in self.flops:
                return self.flops[key]
        raise BadInput(f"{self.name} has no FLOP/s ceiling")

    def ridge_flops_per_byte(self, dtype: str) -> float:
        """Intensity at which compute takes over from memory as the bound."""
        return self.peak(dtype) / self.memory_bytes_per_s


def as_ceilings(device: Hardware | Ceilings) -> Ceilings:
    """Ceilings as they are, or a device's data-sheet ones."""
    return device if isinstance(device, Ceilings) else Ceilings.from_hardware(device)


# --- times -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpTime:
    """Least time of one operation and the ceiling that sets it. Seconds."""

    op: Op
    compute_s: float
    memory_s: float
    link_s: float

    @property
    def time_s(self) -> float:
        return max(self.compute_s, self.memory_s, self.link_s)

    @property
    def mfu_ratio(self) -> float:
        """Share of the compute ceiling that the operation reaches in its least time."""
        return self.compute_s / self.time_s if self.time_s else 0.0

    @property
    def mbu_ratio(self) -> float:
        """Share of the memory ceiling that the operation reaches in its least time."""
        return self.memory_s / self.time_s if self.time_s else 0.0

    @property
    def bound(self) -> Bound:
        if self.time_s <= 0:
            return "nothing"
        if self.link_s == self.time_s:
            return "link"
        return "compute" if self.compute_s >= self.memory_s else "memory"


def roofline_time(op: Op, device: Hardware | Ceilings) -> OpTime:
    """The least time of ``op`` on ``device``. A device without a link figure takes no time for messages."""
    c = as_ceilings(device)
    wire = wire_bytes(op.kind, op.comm_bytes, op.group) if op.kind in COMM_KINDS else 0.0
    return OpTime(
        op,
        compute_s=op.flops / c.peak(op.dtype) if op.flops else 0.0,
        memory_s=op.bytes / c.memory_bytes_per_s,
        link_s=wire / c.link(op.group) if wire and c.link(op.group) else 0.0,
    )


@dataclass(frozen=True, slots=True)
class StepRoofline:
    """A step at its ceilings: the sum of its operations' least times (they follow one another; nothing overlaps)."""

    ceilings: Ceilings
    ops: tuple[OpTime, ...]

    @property
    def time_s(self) -> float:
        return sum(o.time_s for o in self.ops)

    @property
    def flops(self) -> float:
        return sum(o.op.flops for o in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes of model work (weights, cache, activations), without the local copies of collectives."""
        return sum(o.op.bytes for o in self.ops if o.op.kind not in COMM_KINDS)

    def share(self, bound: Bound) -> float:
        """Share of the least time that this ceiling sets."""
        total = self.time_s
        return sum(o.time_s for o in self.ops if o.bound == bound) / total if total else 0.0

    def mfu(self, measured_s: float, dtype: str = "bf16") -> float:
        """Model FLOPs utilisation of a step that took ``measured_s``: FLOPs / time / peak at ``dtype``."""
        return self.flops / measured_s / self.ceilings.peak(dtype)

    def mbu(self, measured_s: float) -> float:
        """Model bandwidth utilisation of a step that took ``measured_s``: bytes / time / memory bandwidth."""
        return self.bytes / measured_s / self.ceilings.memory_bytes_per_s


def step_roofline(ops: Iterable[Op], device: Hardware | Ceilings) -> StepRoofline:
    """All operations of a step against one device's ceilings."""
    c = as_ceilings(device)
    return StepRoofline(c, tuple(roofline_time(op, c) for op in ops))


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs and memory bytes that a run's model arithmetic comes to, on one rank; divide by time for rates."""

    flops: float
    bytes: float
    num_steps: float

    def mfu(self, seconds: float, peak_flops: float) -> float:
        """FLOPs / time / peak of one rank."""
        return self.flops / seconds / peak_flops

    def mbu(self, seconds: float, memory_bytes_per_s: float) -> float:
        """Bytes / time / bandwidth of one rank."""
        return self.bytes / seconds / memory_bytes_per_s


def run_work(
    model: ModelArch,
    isl: Sequence[int],
    osl: Sequence[int],
    num_steps: float,
    num_prefill_steps: float | None = None,
    tp: int = 1,
    pp: int = 1,
    quant: str | None = None,
    kv_cache_dtype: str | None = None,
    ep: int = 1,
) -> Work:
    """The work of serving whole requests in ``num_steps`` engine steps, on one rank, averaged over pipeline stages.

    FLOPs do not depend on the batching; of the bytes only the weights do, which each step reads once. Experts read per
    step follow the mean number of tokens in a step. Prefix-cache hits must be taken off ``isl`` by the caller.
    """
    if num_steps <= 0 or not len(isl):
        raise BadInput(f"a run of {len(isl)} requests in {num_steps} steps has no work")
    x = request_features(model, isl, osl)
    prefill_steps = min(num_steps, len(isl)) if num_prefill_steps is None else num_prefill_steps
    x[F["any_tokens"]], x[F["has_prefill"]], x[F["has_decode"]] = num_steps, prefill_steps, num_steps
    flops = size = 0.0
    for stage in range(pp):
        c = step_coefficients(model, tp, pp, quant, kv_cache_dtype, ep, stage)
        model_rows = np.array([k not in COMM_KINDS for k in c.kinds])
        experts = c.expert_bytes * c.experts_touched(float(x[F["tokens"]]) / num_steps) * num_steps
        flops += float((c.flops @ x).sum())
        size += float((c.bytes @ x + experts)[model_rows].sum())
    return Work(flops / pp, size / pp, num_steps)


def load_kernel_ceilings(path: str | Path, hardware: Hardware | None = None) -> Ceilings:
    """Best rates measured by ``bench kernels``; what was not measured comes from ``hardware`` where it is given.

    ``path`` is a run folder under ``results/kernels/`` or its ``summary.json`` (``peaks.measured``, each value an
    Estimate). Raises BadInput for anything else, and when neither source has a memory rate and one FLOP/s rate.
    """
    file = Path(path)
    file = file / "summary.json" if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot be read: {e}", where=str(file), next_step="run `bench kernels` first") from None
    if not isinstance(data, dict) or data.get("kind") != "kernels":
        raise BadInput("is not a result of `bench kernels`", where=str(file))
    peaks = data.get("peaks", {}).get("measured", {})

    def rate(value: Any) -> float:
        return float(value["value"] if isinstance(value, dict) else value or 0.0)

    flops = {dtype: rate(value) for dtype, value in (peaks.get("flops_per_s") or {}).items() if rate(value) > 0}
    memory, link = rate(peaks.get("bandwidth_bytes_per_s")), rate(peaks.get("link_bytes_per_s"))
    base = Ceilings.from_hardware(hardware) if hardware is not None and hardware.peak_flops else None
    if base is None and not (memory and flops):
        raise BadInput("has no memory and no gemm rates", where=str(file), next_step="run `bench kernels` again")
    device = data.get("device") or {}
    return Ceilings(
        name=hardware.name if base is not None and hardware is not None else str(device.get("name") or "this machine"),
        flops={**(base.flops if base else {}), **flops},
        memory_bytes_per_s=memory or (base.memory_bytes_per_s if base else 0.0),
        link_bytes_per_s=link or (base.link_bytes_per_s if base else 0.0),
        source="measured kernels" + (", data sheet for the rest" if base is not None else ""),
        wide_link_bytes_per_s=base.wide_link_bytes_per_s if base is not None and not link else None,
        measured=frozenset({*flops, *(["memory"] if memory else []), *(["link"] if link else [])}),
    )
