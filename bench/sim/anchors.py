"""Ratios that published measurements agree on, beside the same ratios predicted: generations, precisions, TP, KV limits.

The published figures are TensorRT-LLM's at full load, so they are predicted for that engine (``bench/sim/tensorrt_llm.py``).
Both rows of a pair are published, equal in release, model, TP and lengths, and differ in GPU or precision alone. An anchor is
the *median over such pairs* of release 0.14, the one that published every GPU, precision and model: medians are compared with medians.
The median error pair by pair, the harder measure, stands beside it. Pairs of which one row or both were fitted on, later releases,
and ratios of which two things differ are shown apart and have no target.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.errors import BenchError
from bench.sim.accuracy import run_point
from bench.sim.ground_truth import Point
from bench.sim.tensorrt_llm import fitted_on, full_load_rate, load_engine_profile, published_full_load

RATIO_TARGET = 0.10
KV_TARGET = 0.15  # offline rows
#: (name, numerator (GPU, precision), denominator, models); every published pair of equal release, TP and lengths counts.
_GENERATIONS = (
    ("H100 SXM / A100 PCIe, FP16, 8B", ("h100-sxm", "fp16"), ("a100-80-pcie", "fp16"), "llama-3.1-8b"),
    ("H100 SXM / A100 PCIe, FP16, 7B", ("h100-sxm", "fp16"), ("a100-80-pcie", "fp16"), "mistral-7b"),
    ("H100 / A100 SXM, FP16, 70B", ("h100-sxm", "fp16"), ("a100-80-sxm", "fp16"), "llama-3.1-70b"),
    ("H100 / A100 SXM, FP16, Mixtral-8x7B", ("h100-sxm", "fp16"), ("a100-80-sxm", "fp16"), "mixtral-8x7b"),
    ("H100 / A100 SXM, FP16, Mixtral-8x22B", ("h100-sxm", "fp16"), ("a100-80-sxm", "fp16"), "mixtral-8x22b"),
    ("H100 FP8 / FP16, 8B", ("h100-sxm", "fp8"), ("h100-sxm", "fp16"), "llama-3.1-8b"),
    ("H100 FP8 / FP16, 7B", ("h100-sxm", "fp8"), ("h100-sxm", "fp16"), "mistral-7b"),
    ("H100 FP8 / FP16, 70B", ("h100-sxm", "fp8"), ("h100-sxm", "fp16"), "llama-3.1-70b"),
    ("H100 FP8 / FP16, Mixtral-8x7B", ("h100-sxm", "fp8"), ("h100-sxm", "fp16"), "mixtral-8x7b"),
    ("H100 FP8 / FP16, Mixtral-8x22B", ("h100-sxm", "fp8"), ("h100-sxm", "fp16"), "mixtral-8x22b"),
    ("H200 / H100, FP8, 8B", ("h200-sxm", "fp8"), ("h100-sxm", "fp8"), "llama-3.1-8b"),
    ("H200 / H100, FP8, 7B", ("h200-sxm", "fp8"), ("h100-sxm", "fp8"), "mistral-7b"),
    ("H200 / H100, FP8, 70B", ("h200-sxm", "fp8"), ("h100-sxm", "fp8"), "llama-3.1-70b"),
    ("H200 / H100, FP8, Mixtral-8x7B", ("h200-sxm", "fp8"), ("h100-sxm", "fp8"), "mixtral-8x7b"),
    ("H200 / H100, FP8, Mixtral-8x22B", ("h200-sxm", "fp8"), ("h100-sxm", "fp8"), "mixtral-8x22b"),
    ("H100 FP8 / A100 SXM FP16, 70B", ("h100-sxm", "fp8"), ("a100-80-sxm", "fp16"), "llama-3.1-70b"),
    ("H200 FP8 / A100 SXM FP16, 70B", ("h200-sxm", "fp8"), ("a100-80-sxm", "fp16"), "llama-3.1-70b"),
)  # fmt: skip
#: The release that the anchors are medians over.
ANCHOR_RELEASE = (0, 14)
#: Release 0.17, 70B FP8: tensor parallel sizes at 1,000/1,000 on H200; one and two H100 at 128/2,048, where one holds few requests.
_SCALING_TP, _KV_LIMITED_TP = (1, 2, 4, 8), (1, 2)
#: vLLM 0.30, Qwen3-8B FP8, H100, 128/1024: concurrency -> output tokens/s.
_QWEN3_8B = {1: 214.0, 16: 3027.0, 64: 8621.0, 128: 12176.0, 256: 15264.0}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A published figure beside its prediction.

    Attributes:
        predicted, published: of several pairs the median of each.
        pair_error: relative, the median over the pairs' own errors. Medians over pairs may agree while most pairs are missed.
        limit: the largest error of ``predicted`` that passes; None: for information.
    """

    name: str
    predicted: float
    published: float
    unit: str
    num_pairs: int = 1
    pair_error: float = math.nan
    limit: float | None = RATIO_TARGET

    @property
    def error(self) -> float:
        """Relative, of the two figures."""
        return self.predicted / self.published - 1

    @property
    def met(self) -> bool:
        return self.limit is None or abs(self.error) <= self.limit

    def line(self) -> str:
        """One printed line; of several pairs it tells the median error pair by pair as well, and whether it is a large one."""
        digits = 2 if self.unit == "x" else 0
        verdict = "" if self.limit is None else f"  target {self.limit:.0%}  {'met' if self.met else 'MISSED'}"
        several = self.num_pairs > 1
        pairs = f" ({self.num_pairs} pairs)" if several else ""
        over = f" (over {RATIO_TARGET:.0%})" if abs(self.pair_error) > RATIO_TARGET else ""
        beside = f"  pair by pair {self.pair_error:+6.1%}{over}" if several else ""
        return (
            f"{self.name + pairs:62s} {self.predicted:9,.{digits}f}  published {self.published:9,.{digits}f} {self.unit:5s}"
            f" {self.error:+6.1%}{verdict}{beside}"
        )


@functools.lru_cache(maxsize=1)
def graded_full_load() -> tuple[tuple[Point, float], ...]:
    """Every published full-load row that fits, with the predicted rate."""
    rows = ((p, full_load_rate(p)) for p in published_full_load())
    return tuple((p, rate) for p, rate in rows if math.isfinite(rate))


def generation_anchors() -> Iterator[Anchor]:
    """Ratios between published rows that differ in GPU or precision; those with a target first."""
    rows = {(p.version, p.gpu, p.precision, p.model, p.tp, p.isl, p.osl): (p, rate) for p, rate in graded_full_load()}
    found: list[Anchor] = []
    for name, above, below, model in _GENERATIONS:
        pairs: dict[tuple[bool, bool], list[tuple[float, float]]] = {}
        for (version, gpu, precision, m, *rest), (point, rate) in rows.items():
            other = rows.get((version, *below, m, *rest))  # type: ignore[arg-type]
            if (gpu, precision) == above and m == model and other is not None:
                ratio = point.output_tokens_per_s / other[0].output_tokens_per_s
                kind = (version != ANCHOR_RELEASE, fitted_on(point) or fitted_on(other[0]))
                pairs.setdefault(kind, []).append((rate / other[1], ratio))
        one_thing = (above[0] == below[0]) != (above[1] == below[1])
        for (later, fitted), members in sorted(pairs.items()):
            predicted, measured = np.array(members).T
            suffix = (", later releases" if later else "") + (", fitted on" if fitted else "")
            found.append(
                Anchor(
                    name + suffix, float(np.median(predicted)), float(np.median(measured)), "x", len(members),
                    float(np.median(predicted / measured)) - 1, RATIO_TARGET if one_thing and not later and not fitted else None,
                )
            )  # fmt: skip
    yield from sorted(found, key=lambda a: a.limit is None)


def single_anchors() -> Iterator[Anchor]:
    """TP scaling and KV limits of 70B FP8, release 0.17."""

    def row(gpu: str, tp: int, isl: int, osl: int) -> tuple[float, float]:
        wanted = ((0, 17), gpu, "llama-3.1-70b", "fp8", tp, isl, osl)
        return next(
            (rate, p.output_tokens_per_s)
            for p, rate in graded_full_load()
            if (p.version, p.gpu, p.model, p.precision, p.tp, p.isl, p.osl) == wanted
        )

    scaling = {tp: row("h200-sxm", tp, 1000, 1000) for tp in _SCALING_TP}
    for tp in _SCALING_TP[1:]:
        found, wanted = (scaling[tp][i] / scaling[1][i] for i in (0, 1))
        yield Anchor(f"70B FP8, H200, 1000/1000, TP {tp} over TP 1", found, wanted, "x")
    for tp in _KV_LIMITED_TP:
        found, published = row("h100-sxm", tp, 128, 2048)
        name = f"70B FP8, {tp} x H100, 128/2048 (KV cache decides)"
        yield Anchor(name, found, published, "tok/s", limit=KV_TARGET)


def vllm_anchors() -> Iterator[Anchor]:
    """vLLM's own published closed loop."""
    for c, published in _QWEN3_8B.items():
        found = closed_loop(c)
        name = f"vLLM 0.30, Qwen3-8B FP8, H100, 128/1024, concurrency {c}"
        yield Anchor(name, found, published, "tok/s", limit=KV_TARGET)


def closed_loop(concurrency: int) -> float:
    """Output tokens/s of Qwen3-8B FP8 on an H100 at 128/1024 in a closed loop, without ramp and tail."""
    point = Point(
        "anchor", "anchor", "vllm", (0, 30), "h100-sxm", "qwen3-8b", "fp8_block", "fp8_block", 1, False, 128, 1024, 1.0,
        "closed_loop", concurrency, max(4, 6 * concurrency), None, None,
    )  # fmt: skip
    try:
        result = run_point(point).result
    except BenchError:
        return math.nan
    low, high = 0.15 * result.end_s, 0.8 * result.end_s
    inside = (result.steps["end_s"] > low) & (result.steps["end_s"] <= high)
    produced = result.steps["decode_requests"][inside].sum() + result.steps["prefill_requests"][inside].sum()
    return float(produced) / (high - low)


def full_load_lines() -> list[str]:
    """Errors of TensorRT-LLM's rows, fitted ones apart, and the coverage of the profile's interval."""
    lines = []
    low, high = load_engine_profile().interval
    for name, wanted in (("fitted on", True), ("never fitted on", False)):
        members = [(p, r) for p, r in graded_full_load() if fitted_on(p) is wanted]
        for label, chosen in (("", members), (", one GPU or NVLink", [m for m in members if not _through_pcie(m[0])])):
            if label and len(chosen) == len(members):
                continue
            ratios = np.array([p.output_tokens_per_s / rate for p, rate in chosen])
            errors = 1 / ratios - 1
            inside = np.mean((ratios >= low) & (ratios <= high))
            lines.append(
                f"{name + label:36s} {len(chosen):4d} rows  median {np.median(np.abs(errors)):6.1%}  bias {np.median(errors):+6.1%}"
                f"  in 90 % interval {inside:4.0%}"
            )
    return lines


def _through_pcie(point: Point) -> bool:
    return point.gpu == "a100-80-pcie" and point.tp > 1


def all_anchors() -> Sequence[Anchor]:
    """Every anchor, those of vLLM first; what has no target comes last."""
    found = (*vllm_anchors(), *single_anchors(), *generation_anchors())
    return sorted(found, key=lambda a: a.limit is None)
