"""Step times corrected by the user's own kernel measurements (``bench kernels``).

The efficiency curves say how a kernel's time depends on its shape; the user's measurements say how this device differs
from the one that the curves were fitted on (clocks, power limit, driver). Four ratios carry that over: the median of
measured over predicted time for products bound by memory and by compute, and for decode and prefill attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.catalog.hardware import load_hardware, match_device
from bench.errors import BadInput
from bench.sim.model_shape import LayerGroup
from bench.sim.op_times import WEIGHT_BYTES, Device, decode_attention_s, gemm_s, prefill_attention_s

_MIN_CASES = 3
#: A ratio beyond these bounds is a different kernel or a broken measurement, not a different device.
_PLAUSIBLE = (0.3, 5.0)
_DTYPES = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class KernelScales:
    """Measured over predicted kernel time; 1 where too few cases were measured.

    ``num_cases`` counts those behind each ratio, in the order memory, compute, decode attention, prefill attention.
    """

    memory: float
    compute: float
    decode_attention: float
    prefill_attention: float
    num_cases: tuple[int, int, int, int]
    source: str


def read_kernel_scales(path: Path, device: Device) -> KernelScales:
    """Ratios from a folder of ``results/kernels`` or its ``summary.json``, against the curves of ``device``.

    Raises BadInput for a file that is no kernel result, is of another device, or has fewer than three usable cases of every
    kind.
    """
    file, data = read_kernel_result(path)
    measured = _measured_on(data)
    if measured is not None and measured != device.hardware.name:
        raise BadInput(
            f"the kernels were measured on {measured}, not on {device.hardware.name}",
            where=str(file),
            next_step="run `bench kernels` on the predicted device, or predict without them",
        )
    ratios: dict[str, list[float]] = {"memory": [], "compute": [], "decode": [], "prefill": []}
    for kind, measured_s, predicted_s in _pairs(_fastest(data["cases"]), device):
        ratios[kind].append(measured_s / predicted_s)
    counts = tuple(len(v) for v in ratios.values())
    if max(counts) < _MIN_CASES:
        raise BadInput("too few usable cases", where=str(file), next_step="run the whole suite with `bench kernels`")
    median = [float(np.clip(np.median(v), *_PLAUSIBLE)) if len(v) >= _MIN_CASES else 1.0 for v in ratios.values()]
    return KernelScales(*median, counts, str(file))  # type: ignore[call-arg, arg-type]


def _measured_on(data: dict[str, Any]) -> str | None:
    """Catalogue name of the device of a kernel result; None where the result or the catalogue does not know it."""
    device = data.get("device")
    if not isinstance(device, dict):
        return None
    if device.get("kind") == "cpu":
        return load_hardware("cpu").name
    found = match_device(str(device.get("name")))
    return None if found is None else found.name


def read_kernel_result(path: Path) -> tuple[Path, dict[str, Any]]:
    """The summary's file and content of a folder of ``results/kernels``. Raises BadInput where it is none."""
    file = path / "summary.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["kind"] != "kernels" or not isinstance(data["cases"], list):
            raise ValueError("another kind of result")
    except OSError as e:
        raise BadInput(f"cannot be read: {e.strerror}", where=str(file), next_step="run `bench kernels` first") from e
    except (ValueError, KeyError, TypeError) as e:
        raise BadInput(f"is not a result of `bench kernels`: {e}", where=str(file)) from e
    return file, data


def _fastest(cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest implementation of each case that was measured and correct: a serving engine picks it too."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in cases:
        if case.get("status") != "ok" or not case.get("time_s"):
            continue
        key = (case["family"], case["op"], case["dtype"], tuple(sorted(case["shape"].items())))
        if key not in best or case["time_s"]["value"] < best[key]["time_s"]["value"]:
            best[key] = case
    return list(best.values())


def _pairs(cases: list[dict[str, Any]], device: Device) -> Iterable[tuple[str, float, float]]:
    """(kind, measured seconds, predicted seconds) of the cases that step times contain."""
    for case in cases:
        shape, dtype, time_s = case["shape"], _DTYPES.get(str(case["dtype"])), float(case["time_s"]["value"])
        if dtype is None:
            continue
        if case["family"] == "gemm" and {"m", "n", "k"} <= set(shape):
            m, n, k = (float(shape[x]) for x in "mnk")
            width = WEIGHT_BYTES[dtype]
            memory = (width * n * k + width * m * k + 2 * m * n) / device.bandwidth
            kind = "memory" if memory > 2 * m * n * k / device.peak(dtype) else "compute"
            yield kind, time_s, float(gemm_s(device, np.array([m]), n, k, dtype)[0])
        elif case["family"] == "attention" and {"heads", "kv_heads", "head_dim", "batch"} <= set(shape):
            group = LayerGroup(1, int(shape["heads"]), int(shape["kv_heads"]), int(shape["head_dim"]))
            batch = float(shape["batch"])
            if case["op"] == "paged_decode":
                length = float(shape["context"])
                predicted = decode_attention_s(device, group, dtype, 1, np.array([batch]), np.array([length]))
                yield "decode", time_s, float(predicted[0])
            elif case["op"] == "prefill":
                length = float(shape["length"])
                predicted = prefill_attention_s(
                    device, group, dtype, 1, np.array([batch * length]), np.array([(length + 1) / 2])
                )
                yield "prefill", time_s, float(predicted[0])
