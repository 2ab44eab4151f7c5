"""Weight formats: bytes a weight takes (scales included), what stays in 16 bits, and the rate it is multiplied at.

Embeddings, the output head, norms, biases and the router stay in the model's own 16-bit type in every format here:
that is what vLLM's FP8, AWQ, GPTQ, compressed-tensors and MXFP4 loaders do.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.catalog.yaml_source import unknown_name

#: Bytes of one element by torch-like dtype name, for weights, activations and the KV cache.
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0}
_TORCH_NAMES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
}
#: vLLM's ``kv_cache_dtype`` values -> bytes of an element; "auto" is the model's own type.
_KV_BYTES = {
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "fp8_inc": 1.0,
    "bfloat16": 2.0,
    "bf16": 2.0,
    "float16": 2.0,
    "half": 2.0,
    "fp16": 2.0,
}


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """One weight format.

    Attributes:
        bytes_per_weight: of a quantised matrix, with its scales and zero points spread over the weights.
        experts_only: attention and dense matrices stay in 16 bits (gpt-oss's MXFP4) when the model has experts.
        compute_dtype: key of ``Hardware.peak_flops`` that the product runs at where the device has it, else 16 bits.
        expert_alignment: (hidden, expert width on a rank) are padded up to multiples of these in memory.
        activation_bytes: bytes of an activation element as the product reads it.
        description: where the figure comes from.
    """

    name: str
    bytes_per_weight: float
    compute_dtype: str
    activation_bytes: float
    experts_only: bool = False
    expert_alignment: tuple[int, int] | None = None
    description: str = ""


# A group of 128 weights of W4A16 (AWQ, GPTQ, compressed-tensors) carries one fp16 scale and one 4-bit zero point.
_INT4_BYTES = 0.5 + (2 + 0.5) / 128
_FORMATS = {
    "fp32": QuantFormat("fp32", 4.0, "fp32", 4.0, description="32-bit floats"),
    "bf16": QuantFormat("bf16", 2.0, "bf16", 2.0, description="16-bit brain floats"),
    "fp16": QuantFormat("fp16", 2.0, "fp16", 2.0, description="16-bit floats"),
    # Per-tensor or per-channel scales: below 0.1 % of the weights.
    "fp8": QuantFormat("fp8", 1.0, "fp8", 1.0, description="W8A8 float, one scale a tensor or channel"),
    "fp8_block": QuantFormat(
        "fp8_block", 1.0 + 4 / 128**2, "fp8", 1.0, description="W8A8 float, fp32 scale per 128x128"
    ),
    "int8": QuantFormat("int8", 1.0, "int8", 1.0, description="W8A8 integer, one scale a channel"),
    "int4": QuantFormat("int4", _INT4_BYTES, "bf16", 2.0, description="W4A16, groups of 128 (AWQ, GPTQ)"),
    # OCP Microscaling v1.0: 4-bit floats with one 8-bit scale for 32 of them; multiplied in 16 bits by vLLM's kernels.
    "mxfp4": QuantFormat(
        "mxfp4",
        0.5 + 1 / 32,
        "bf16",
        2.0,
        experts_only=True,
        expert_alignment=(256, 128),
        description="4-bit float, scale per 32",
    ),
    "nvfp4": QuantFormat("nvfp4", 0.5 + 1 / 16, "fp4", 0.5, description="4-bit float, fp8 scale per 16 (Blackwell)"),
}
_ALIASES = {
    "none": "bf16",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "awq": "int4",
    "awq_marlin": "int4",
    "gptq": "int4",
    "gptq_marlin": "int4",
    "w4a16": "int4",
    "w8a8": "int8",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "modelopt": "fp8",
    "modelopt_fp4": "nvfp4",
    "fp4": "nvfp4",
}


def quant_format(name: str) -> QuantFormat:
    """A format by its name or vLLM's ``quantization`` name. Raises UnknownName."""
    key = str(name).lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in _FORMATS:
        raise unknown_name("quantization", str(name), {*_FORMATS, *_ALIASES, "auto"})
    return _FORMATS[key]


def list_formats() -> list[QuantFormat]:
    """Every format, widest first."""
    return sorted(_FORMATS.values(), key=lambda f: -f.bytes_per_weight)


def short_dtype(torch_name: str | None) -> str:
    """``bfloat16`` -> ``bf16``; None (older config files leave it out) -> bf16, which is vLLM's choice on such files."""
    return _TORCH_NAMES.get(str(torch_name or "bfloat16").removeprefix("torch."), "bf16")


def kv_dtype_bytes(kv_cache_dtype: str | None, model_dtype: str) -> float:
    """Bytes of one KV-cache element under vLLM's ``kv_cache_dtype``. Raises UnknownName."""
    key = str(kv_cache_dtype or "auto").lower()
    if key == "auto":
        return DTYPE_BYTES[model_dtype]
    if key not in _KV_BYTES:
        raise unknown_name("kv_cache_dtype", key, {*_KV_BYTES, "auto"})
    return _KV_BYTES[key]
