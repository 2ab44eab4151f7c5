"""MFU and MBU: what the model's arithmetic needs, against the peak of the devices that the engine held.

FLOPs and bytes come from the engine's recorded steps (who was in the batch, how long the contexts were), through the
catalogue's arithmetic: a multiply-add is two FLOPs, weights are read once a step, keys and values once a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bench.analysis.run_facts import RunFacts
from bench.analysis.steady_state import Window
from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware, load_hardware, match_device
from bench.catalog.model import load_model
from bench.catalog.steps import COMM_KINDS, F, features_of_totals, step_coefficients
from bench.errors import BenchError
from bench.roofline import Ceilings
from bench.units import si


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Metrics, reasons for those that are absent, and the peaks used, each with its source."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, str] = field(default_factory=dict)


def efficiency(
    facts: RunFacts, steps: dict[str, np.ndarray] | None, window: Window, measured: Ceilings | None = None
) -> Efficiency:
    """MFU and MBU over the window, or the reason why there are none.

    Args:
        facts, steps, window: of the run.
        measured: ceilings that `bench kernels` found on this very machine; used where the catalogue has no peaks (CPUs).
    """
    if steps is None:
        return _absent(why_no_steps(facts))
    if facts.spec is None or facts.spec.engine.kind in ("endpoint", "null"):
        return _absent("the model and its layout are not known")
    hardware = hardware_of(facts)
    if hardware is None:
        return _absent("the device is not in the catalogue")
    try:
        model = load_model(facts.spec.model)
        if hardware.peak_flops:
            ceilings = Ceilings.from_hardware(hardware)
        elif measured is not None:
            ceilings = measured
        else:
            return _absent("no peak is known for a CPU: `bench kernels` measures what this one reaches")
        flops, size = step_work(facts, model, steps, window)
        dtype = compute_dtype(facts, model, ceilings)
    except BenchError as e:
        return _absent(str(e))
    peak, bandwidth = ceilings.peak(dtype), ceilings.memory_bytes_per_s
    peaks = {
        "mfu_ratio": f"{ceilings.name}: {si(peak, 'FLOP/s', 4)} {dtype}, dense",
        "mbu_ratio": f"{ceilings.name}: {si(bandwidth, 'B/s', 4)}",
    }
    for key, fact in (("mfu_ratio", f"peak_flops.{dtype}"), ("mbu_ratio", "memory_bandwidth_bytes_per_s")):
        peaks[key] += f" ({_source(hardware, fact) or ceilings.source})"
    return Efficiency(
        values={"mfu_ratio": flops / window.length_s / peak, "mbu_ratio": size / window.length_s / bandwidth},
        peaks=peaks,
    )


def why_no_steps(facts: RunFacts) -> str:
    """Why a run holds no engine steps, and what to run to have them."""
    kind = facts.spec.engine.kind if facts.spec is not None else str(facts.engine.get("kind") or "")
    if kind == "vllm_server":
        return (
            "no engine steps were recorded: `vllm serve` tells counts of tokens, not who was in each step, and without that the "
            "bytes that memory moved are not known. Run the same load with `engine.kind: vllm`, which records every step"
        )
    if kind == "endpoint" or facts.origin == "imported":
        return "no engine steps were recorded: an engine that was not started here does not tell them"
    return "no engine steps were recorded"


def _absent(reason: str) -> Efficiency:
    return Efficiency(absent={"mfu_ratio": reason, "mbu_ratio": reason})


def _source(hardware: Hardware, name: str) -> str:
    fact = hardware.facts.get(name)
    return f"{fact.source}, {fact.as_of}" if fact is not None else ""


def hardware_of(facts: RunFacts) -> Hardware | None:
    """The catalogue's entry for the run's device, or None."""
    if facts.spec is not None and facts.spec.engine.kind == "simulated":
        try:
            return load_hardware(facts.spec.engine.gpu)
        except BenchError:
            return None
    if facts.origin == "imported" and "hardware" in facts.manifest:
        return _imported_hardware(facts)
    if not facts.on_gpu:
        return load_hardware("cpu")
    names = [(str(g.get("name")), g.get("memory_bytes")) for g in facts.gpus if g.get("name")]
    names += [(n, None) for n in facts.fingerprint_devices]
    for name, memory_bytes in names:
        found = match_device(
            name, int(memory_bytes) if isinstance(memory_bytes, (int, float)) and memory_bytes else None
        )
        if found is not None:
            return found
    return None


def _imported_hardware(facts: RunFacts) -> Hardware | None:
    """What the file or the user named at import; never guessed."""
    name = facts.manifest.get("hardware")
    try:
        return load_hardware(name) if isinstance(name, str) else None
    except BenchError:
        return None


def compute_dtype(facts: RunFacts, model: ModelArch, ceilings: Ceilings) -> str:
    """The dtype whose peak counts: the weights' where the device multiplies in it, else the model's 16-bit one."""
    args = facts.spec.engine_args if facts.spec is not None else {}
    wanted = (model.quant(args.get("quantization")).compute_dtype, model.dtype, "bf16", "fp16", "tf32", "fp32")
    return next((d for d in wanted if d in ceilings.flops), wanted[0])


def step_work(facts: RunFacts, model: ModelArch, steps: dict[str, np.ndarray], window: Window) -> tuple[float, float]:
    """(FLOPs, bytes) that one GPU's share of the steps in the window needs by arithmetic; a pipeline's stages averaged."""
    spec = facts.spec
    assert spec is not None
    args = spec.engine_args
    inside = np.flatnonzero(window.holds(steps["t_s"]))
    context = np.nan_to_num(steps["context_tokens"][inside]) if "context_tokens" in steps else np.zeros(len(inside))
    prefill, requests, decodes = (steps[n][inside] for n in ("prefill_tokens", "prefill_requests", "decode_requests"))
    busy = prefill + decodes > 0
    if not busy.any():
        return 0.0, 0.0
    features = features_of_totals(model, prefill[busy], requests[busy], decodes[busy], context[busy])
    # all but the experts read is in proportion to the features, so that one vector stands for all steps
    total = features.sum(axis=0)
    tokens, times = np.unique(features[:, F["tokens"]], return_counts=True)
    flops = size = 0.0
    pp = spec.pipeline_parallel_size
    for stage in range(pp):
        coefficients = step_coefficients(
            model, spec.tensor_parallel_size, pp, args.get("quantization"), args.get("kv_cache_dtype"), stage=stage
        )
        local = np.array([kind not in COMM_KINDS for kind in coefficients.kinds])
        flops += float((coefficients.flops @ total).sum())
        size += float((coefficients.bytes[local] @ total).sum())
        if coefficients.num_experts:
            touched = sum(
                coefficients.experts_touched(t) * n for t, n in zip(tokens.tolist(), times.tolist(), strict=True)
            )
            size += float(coefficients.expert_bytes.sum()) * touched
    return flops / pp, size / pp
