"""The small element-wise layers between GEMMs: fused RMSNorm + residual, SiLU * mul, rotary embedding.

They do almost no arithmetic, so the figure to look at is bytes per second against copy. Three implementations: eager
torch, our Triton kernel, and the compiled operation that vLLM ships where vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernels import config
from kernels.case import Case, Check, Prepared, Unsupported, Work, make_case
from kernels.checking import TOLERANCE, compare
from kernels.device import Device, element_bytes
from kernels.inputs import generator, random_tensor
from kernels.triton_ops import require_triton

if TYPE_CHECKING:
    import torch

FAMILY = "norm"
EPS = 1e-5
ROPE_BASE = 500_000.0  # Llama 3's theta
MAX_POSITION = 8192


def cases(group: config.NormGroup) -> list[Case]:
    """One case per operation, implementation and number of tokens."""
    shapes: dict[str, dict[str, int]] = {
        "rmsnorm_residual": {"hidden": group.hidden},
        "silu_mul": {"intermediate": group.intermediate},
        "rope": {"heads": group.num_heads, "kv_heads": group.num_kv_heads, "head_dim": group.head_dim},
    }
    return [
        make_case(FAMILY, op, impl, group.dtype, {"tokens": tokens, **shapes[op]})
        for op in group.ops
        for tokens in group.tokens
        for impl in group.impls
    ]


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """Inputs for the layer and its call. Raises Unsupported when the implementation or the memory is missing."""
    device.require_dtype(case.dtype)
    rng = generator(device, seed)
    prepare_op = {"rmsnorm_residual": _rmsnorm, "silu_mul": _silu_mul, "rope": _rope}[case.op]
    return prepare_op(case, device, rng)


# ---- references: the definitions, in fp64 ----------------------------------------------------------------------------


def rmsnorm_residual_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, new residual) in fp64: r = x + residual; r / sqrt(mean(r^2) + eps) * weight (Zhang & Sennrich 2019)."""
    import torch

    r = x.to(torch.float64) + residual.to(torch.float64)
    scale = (r.square().mean(-1, keepdim=True) + eps).rsqrt()
    return r * scale * weight.to(torch.float64), r


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in fp64 for gate_up [tokens, 2 * intermediate] (Shazeer 2020, SwiGLU)."""
    import torch

    gate, up = gate_up.to(torch.float64).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate x [tokens, heads, head_dim] in fp64, halves paired as in Llama ("neox" style; Su et al. 2021)."""
    import torch

    half = x.shape[-1] // 2
    c = cos[positions].to(torch.float64)[:, None, :]
    s = sin[positions].to(torch.float64)[:, None, :]
    a, b = x[..., :half].to(torch.float64), x[..., half:].to(torch.float64)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


# ---- RMSNorm + residual ----------------------------------------------------------------------------------------------


def _rmsnorm(case: Case, device: Device, rng: torch.Generator) -> Prepared:
    import torch

    tokens, hidden, size = case.dim("tokens"), case.dim("hidden"), element_bytes(case.dtype)
    device.require_memory(tokens * hidden * (4 * size + 3 * 8))
    x = random_tensor([tokens, hidden], case.dtype, device, rng)
    residual = random_tensor([tokens, hidden], case.dtype, device, rng)
    weight = random_tensor([hidden], case.dtype, device, rng, scale=0.1).add_(1)
    out, new_residual = torch.empty_like(x), torch.empty_like(x)
    call, timed, backend = _rmsnorm_call(case.impl, device, x, residual, weight, out, new_residual)

    def check() -> list[Check]:
        want = rmsnorm_residual_reference(x, residual, weight)
        got = call()
        limit = TOLERANCE[case.dtype]
        names = ("normed", "residual")
        return [compare(g, w, limit, output=n) for g, w, n in zip(got, want, names, strict=True)]

    values = tokens * hidden
    work = Work(4.0 * values, size * (2 * values + hidden), size * 2 * values)
    return Prepared(call, check, work, flush=True, capturable=True, backend=backend, timed=timed)


_NormCall = Callable[[], tuple[Any, Any]]


def _rmsnorm_call(
    impl: str,
    device: Device,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    new_residual: torch.Tensor,
) -> tuple[_NormCall, bool, str]:
    import torch

    if impl == "triton":
        timed = require_triton(device)
        from kernels.triton_ops.norm import rmsnorm_residual

        def triton_call() -> tuple[Any, Any]:
            rmsnorm_residual(x, residual, weight, EPS, out, new_residual)
            return out, new_residual

        return triton_call, timed, "triton"
    if impl == "vllm":
        ops = require_vllm_ops("fused_add_rms_norm")
        # In place: the first call (the check) sees the inputs, later ones add to the residual, which grows by about 1 a call.
        mine, mine_residual = x.clone(), residual.clone()

        def vllm_call() -> tuple[Any, Any]:
            ops.fused_add_rms_norm(mine, mine_residual, weight, EPS)
            return mine, mine_residual

        return vllm_call, True, "vLLM fused_add_rms_norm (in place)"

    def torch_call() -> tuple[Any, Any]:
        torch.add(x, residual, out=new_residual)
        return torch.nn.functional.rms_norm(new_residual, (x.shape[-1],), weight, EPS), new_residual

    return torch_call, True, "torch add + rms_norm"


# ---- SiLU * mul ------------------------------------------------------------------------------------------------------


def _silu_mul(case: Case, device: Device, rng: torch.Generator) -> Prepared:
    import torch

    tokens, inter, size = case.dim("tokens"), case.dim("intermediate"), element_bytes(case.dtype)
    device.require_memory(tokens * inter * (4 * size + 4 * 8))
    gate_up = random_tensor([tokens, 2 * inter], case.dtype, device, rng)
    out = torch.empty(tokens, inter, dtype=gate_up.dtype, device=gate_up.device)
    timed, backend = True, "torch silu, mul"
    call: Callable[[], torch.Tensor]
    if case.impl == "triton":
        timed, backend = require_triton(device), "triton"
        from kernels.triton_ops.norm import silu_mul

        def call() -> torch.Tensor:
            silu_mul(gate_up, out)
            return out

    elif case.impl == "vllm":
        ops, backend = require_vllm_ops("silu_and_mul"), "vLLM silu_and_mul"

        def call() -> torch.Tensor:
            ops.silu_and_mul(out, gate_up)
            return out

    else:

        def call() -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up

    def check() -> list[Check]:
        return [compare(call(), silu_mul_reference(gate_up), TOLERANCE[case.dtype])]

    values = tokens * inter
    work = Work(5.0 * values, size * 2 * values, size * values)
    return Prepared(call, check, work, flush=True, capturable=True, backend=backend, timed=timed)


# ---- rotary embedding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _RopeInputs:
    q: torch.Tensor  # [tokens, heads, head_dim]
    k: torch.Tensor  # [tokens, kv_heads, head_dim]
    cos: torch.Tensor  # [MAX_POSITION, head_dim / 2]
    sin: torch.Tensor
    positions: torch.Tensor  # [tokens] int64


def _rope_inputs(case: Case, device: Device, rng: torch.Generator) -> _RopeInputs:
    import torch

    tokens, dim = case.dim("tokens"), case.dim("head_dim")
    q = random_tensor([tokens, case.dim("heads"), dim], case.dtype, device, rng)
    k = random_tensor([tokens, case.dim("kv_heads"), dim], case.dtype, device, rng)
    inverse = ROPE_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=q.device) / dim)
    angle = torch.arange(MAX_POSITION, dtype=torch.float64, device=q.device)[:, None] * inverse[None, :]
    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=rng, device=q.device)
    return _RopeInputs(q, k, angle.cos().to(q.dtype), angle.sin().to(q.dtype), positions)


def _rope(case: Case, device: Device, rng: torch.Generator) -> Prepared:
    tokens, dim, size = case.dim("tokens"), case.dim("head_dim"), element_bytes(case.dtype)
    heads = case.dim("heads") + case.dim("kv_heads")
    device.require_memory(tokens * heads * dim * (2 * size + 3 * 8) + MAX_POSITION * dim * 16)
    data = _rope_inputs(case, device, rng)
    apply, timed, backend = _rope_apply(case.impl, device, data)
    # In place on copies: a rotation keeps the size of what it rotates, so calls may follow each other for ever.
    q, k = data.q.clone(), data.k.clone()

    def check() -> list[Check]:
        fresh_q, fresh_k = data.q.clone(), data.k.clone()
        got = apply(fresh_q, fresh_k)
        limit = TOLERANCE[case.dtype]
        originals = (data.q, data.k)
        return [
            compare(g, rope_reference(x, data.cos, data.sin, data.positions), limit, output=n)
            for g, x, n in zip(got, originals, ("q", "k"), strict=True)
        ]

    values = tokens * heads * dim
    work = Work(3.0 * values, size * (values + tokens * dim) + 8 * tokens, size * values)
    return Prepared(lambda: apply(q, k), check, work, flush=True, capturable=True, backend=backend, timed=timed)


_RopeApply = Callable[[Any, Any], tuple[Any, Any]]


def _rope_apply(impl: str, device: Device, data: _RopeInputs) -> tuple[_RopeApply, bool, str]:
    import torch

    cos, sin, positions = data.cos, data.sin, data.positions
    if impl == "triton":
        timed = require_triton(device)
        from kernels.triton_ops.norm import rope_

        def triton_apply(q: torch.Tensor, k: torch.Tensor) -> tuple[Any, Any]:
            rope_(q, k, cos, sin, positions)
            return q, k

        return triton_apply, timed, "triton (in place)"
    if impl == "vllm":
        ops = require_vllm_ops("rotary_embedding")
        cache = torch.cat([cos, sin], -1).contiguous()

        def vllm_apply(q: torch.Tensor, k: torch.Tensor) -> tuple[Any, Any]:
            ops.rotary_embedding(positions, q.view(q.shape[0], -1), k.view(k.shape[0], -1), q.shape[-1], cache, True)
            return q, k

        return vllm_apply, True, "vLLM rotary_embedding (in place)"

    def torch_apply(q: torch.Tensor, k: torch.Tensor) -> tuple[Any, Any]:
        c, s = cos[positions][:, None, :], sin[positions][:, None, :]
        out = []
        for x in (q, k):
            a, b = x.chunk(2, -1)
            out.append(torch.cat([a * c - b * s, b * c + a * s], -1))
        return out[0], out[1]

    return torch_apply, True, "torch mul, cat"


def require_vllm_ops(name: str) -> Any:
    """The namespace of vLLM's compiled operations. Raises Unsupported when vLLM or the operation is not there."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise Unsupported("vllm is not installed")
    import torch

    try:
        import vllm._custom_ops  # noqa: F401  registers torch.ops._C
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a broken or mismatched build
        raise Unsupported(f"vllm's operations do not load: {str(error).splitlines()[0][:100]}") from error
    if not hasattr(torch.ops._C, name):
        raise Unsupported(f"this vllm has no {name}")
    return torch.ops._C
