"""Efficiency curves: what share of a device's data-sheet ceiling its kernels reach, as a function of their shape.

A curve stores a *utilisation* on a coarse grid over the base-2 logarithm of a few shape numbers. The time of a kernel is

    time = (speed-of-light time + floor) / utilisation(shape)

where the speed-of-light time is max(bytes / bandwidth, FLOPs / peak) at data-sheet values and the floor is the shortest
time that such a kernel takes at all. Utilisation is interpolated multilinearly in its logarithm; outside the grid the
value at the border is held. The curves shipped in ``configs/efficiency`` are least-squares fits (``scripts/
fit_efficiency.py``) to the open kernel-time tables of NVIDIA AIConfigurator 0.12.0 (Apache-2.0); the tables themselves
are not part of this project. Devices without own curves borrow those of a relative (:func:`curves_for`) and say so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.errors import BadInput

EFFICIENCY_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "efficiency"

#: How far the kernel times behind a prediction are from the device that is predicted; sets the width of the interval.
CurveTrust = Literal["own curves", "borrowed curves", "bare data sheet"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Utilisation of one kind of kernel over a grid.

    Attributes:
        axes: names of the shape numbers, in the order that :meth:`utilisation` takes them.
        knots: per axis the ascending log2 positions of the grid.
        log_utilisation: natural logarithms, of shape (len(knots[0]), len(knots[1]), ...).
        floor_s: added to the speed-of-light time before the division.
        held_out_error: median absolute relative error on shapes that the fit never saw.
    """

    axes: tuple[str, ...]
    knots: tuple[np.ndarray, ...]
    log_utilisation: np.ndarray
    floor_s: float
    held_out_error: float

    def utilisation(self, *coordinates: np.ndarray | float) -> np.ndarray:
        """Utilisation at shape numbers (not their logarithms), broadcast against each other."""
        arrays = np.broadcast_arrays(*[np.asarray(c, dtype=float) for c in coordinates])
        lower, weight = [], []
        for values, knots in zip(arrays, self.knots, strict=True):
            x = np.clip(np.log2(np.maximum(values, 1e-9)), knots[0], knots[-1])
            i = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
            lower.append(i)
            weight.append((x - knots[i]) / (knots[i + 1] - knots[i]))
        total = np.zeros(arrays[0].shape)
        for corner in range(2 ** len(self.knots)):
            bits = [(corner >> d) & 1 for d in range(len(self.knots))]
            share = np.ones(arrays[0].shape)
            for b, w in zip(bits, weight, strict=True):
                share = share * (w if b else 1.0 - w)
            total += share * self.log_utilisation[tuple(i + b for i, b in zip(lower, bits, strict=True))]
        return np.asarray(np.exp(total))

    def time_s(self, speed_of_light_s: np.ndarray | float, *coordinates: np.ndarray | float) -> np.ndarray:
        """Seconds of a kernel with this speed-of-light time at these shape numbers."""
        return (np.asarray(speed_of_light_s) + self.floor_s) / self.utilisation(*coordinates)

    def to_dict(self) -> dict[str, Any]:
        """The form that :func:`curve_from_dict` reads; utilisation is written in rows over the last axis."""
        rows = np.round(np.exp(self.log_utilisation), 3).reshape(-1, self.log_utilisation.shape[-1])
        return {
            "axes": list(self.axes),
            "log2_knots": [[round(float(k), 3) for k in ks] for ks in self.knots],
            "floor_us": round(self.floor_s * 1e6, 3),
            "held_out_median_error": round(self.held_out_error, 4),
            "utilisation": "\n".join(" ".join(f"{v:g}" for v in row) for row in rows),
        }


def curve_from_dict(data: Mapping[str, Any]) -> Curve:
    """Inverse of :meth:`Curve.to_dict`. Raises KeyError or ValueError on a malformed one."""
    knots = tuple(np.asarray(k, dtype=float) for k in data["log2_knots"])
    # A block of text, not YAML lists: ten thousand YAML numbers take a second to parse.
    values = np.asarray([float(v) for v in data["utilisation"].split()]).reshape(tuple(len(k) for k in knots))
    if not (values > 0).all() or any((np.diff(k) <= 0).any() for k in knots):
        raise ValueError("utilisations must be positive and knots ascending")
    return Curve(
        tuple(data["axes"]), knots, np.log(values), float(data["floor_us"]) * 1e-6, float(data["held_out_median_error"])
    )


@dataclass(frozen=True, slots=True)
class EfficiencyCurves:
    """All curves of one device, and where they come from.

    ``curves`` is keyed by kind and variant, e.g. ``gemm.bf16``, ``decode_attention.bf16.128``, ``moe.fp8``,
    ``all_reduce``. ``trust`` and ``reason`` say how well they suit the device that was asked for.
    """

    name: str
    source: str
    curves: dict[str, Curve]
    trust: CurveTrust = "own curves"
    reason: str = ""
    missing: frozenset[str] = field(default_factory=frozenset)

    def find(self, *names: str) -> Curve | None:
        """The first of these curves that exists."""
        for name in names:
            if name in self.curves:
                return self.curves[name]
        return None


def nearest_curve(curves: EfficiencyCurves, prefix: str, number: int) -> Curve | None:
    """The curve ``prefix.<n>`` whose ``n`` is nearest to ``number`` (head sizes), in ratio."""
    found = {int(k.rsplit(".", 1)[1]): c for k, c in curves.curves.items() if k.rsplit(".", 1)[0] == prefix}
    if not found:
        return None
    return found[min(found, key=lambda n: abs(np.log(n / number)))]


@functools.lru_cache(maxsize=16)
def load_curves(path: Path) -> EfficiencyCurves:
    """Read one file of ``configs/efficiency``. Raises BadInput where it cannot be used."""
    from ruamel.yaml import YAML, YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        curves = {name: curve_from_dict(c) for name, c in data["curves"].items()}
        return EfficiencyCurves(str(data["name"]), str(data["source"]), curves)
    except OSError as e:
        raise BadInput(f"cannot read: {e.strerror}", where=str(path), next_step="restore the file") from e
    except (YAMLError, KeyError, ValueError, TypeError, AttributeError) as e:
        raise BadInput(
            f"not an efficiency file: {e}", where=str(path), next_step="write it with scripts/fit_efficiency.py"
        ) from e


#: (compute capability at least, file): whose curves a device without own ones borrows. Ada and consumer Ampere run the
#: same kernels (FlashAttention 2, cuBLAS Ampere tiles) as A100; Hopper's successors run Hopper-like ones.
_RELATIVES: Sequence[tuple[float, str]] = ((9.0, "h100_sxm"), (8.0, "a100_sxm"))
_OWN: Mapping[str, str] = {
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "a100-80-sxm": "a100_sxm",
    "a100-40-sxm": "a100_sxm",
}


def curves_for(device: str, compute_capability: float | None, folder: Path = EFFICIENCY_FOLDER) -> EfficiencyCurves:
    """Curves for a device of the catalogue, with the trust they deserve there.

    What only the H100's tables hold (FP8, 4-bit weights, latent attention) is lent by it. A device older than compute capability
    8.0, or unknown, gets no curves at all (``bare data sheet``): callers then use flat utilisations.
    """
    key = device.lower().replace("_", "-")
    own = next((f for prefix, f in _OWN.items() if key.startswith(prefix)), None)
    if own is not None:
        return _with_lent(load_curves(folder / f"{own}.yaml"), folder)
    relative = next((f for cc, f in _RELATIVES if compute_capability is not None and compute_capability >= cc), None)
    if relative is None:
        why = f"no kernel times known for a relative of {device}"
        return EfficiencyCurves(device, "data sheet", {}, "bare data sheet", why)
    lent = _with_lent(load_curves(folder / f"{relative}.yaml"), folder)
    return dataclasses.replace(lent, trust="borrowed curves", reason=f"{device} uses the curves of {lent.name}")


def _with_lent(curves: EfficiencyCurves, folder: Path) -> EfficiencyCurves:
    """Curves that only the H100's tables hold (FP8, 4-bit weights, latent attention), where ``curves`` lacks them."""
    hopper = load_curves(folder / "h100_sxm.yaml").curves
    return dataclasses.replace(
        curves, curves={**{k: c for k, c in hopper.items() if not k.startswith("all_reduce")}, **curves.curves}
    )
