"""Attention with grouped queries: causal prefill, and decode over a paged KV cache.

Shapes: ``heads`` query heads share ``kv_heads`` key/value heads; ``head_dim`` values each. Decode reads the cache through a
block table in random order, as a server's cache looks after a while.

Work by arithmetic. Prefill of S tokens: 4 x heads x head_dim x S(S+1)/2 operations (two products over the causal triangle);
decode at context C: 4 x heads x head_dim x C. Bytes: Q, K, V and the output once.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kernels import config
from kernels.case import Case, Check, Prepared, Unsupported, Work, make_case
from kernels.checking import TOLERANCE, compare
from kernels.device import Device, element_bytes
from kernels.inputs import generator, random_tensor
from kernels.triton_ops import require_triton

if TYPE_CHECKING:
    import torch

FAMILY = "attention"
#: The reference holds [query rows, context] in fp64 for one head at a time; longer prompts are checked on some rows.
CHECKED_QUERY_ROWS = 128
CHECKED_SEQUENCES = 4


def cases(group: config.AttentionGroup) -> list[Case]:
    """Prefill: batch x length. Decode: batch x context. Each with every implementation asked for."""
    heads = {"heads": group.num_heads, "kv_heads": group.num_kv_heads, "head_dim": group.head_dim}
    out = []
    for batch, length in group.prefill:
        shape = {"batch": batch, "length": length, **heads}
        out += [make_case(FAMILY, "prefill", impl, group.dtype, shape) for impl in group.impls]
    for batch, context in group.decode:
        shape = {"batch": batch, "context": context, "block_size": group.block_size, **heads}
        out += [make_case(FAMILY, "paged_decode", impl, group.dtype, shape) for impl in group.impls]
    return out


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """Random Q, K, V (paged for decode) and the call. Raises Unsupported with the reason."""
    device.require_dtype(case.dtype)
    return _prefill(case, device, seed) if case.op == "prefill" else _decode(case, device, seed)


# ---- prefill ---------------------------------------------------------------------------------------------------------


def prefill_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Causal softmax(q k^T / sqrt(d)) v in fp64 for the query ``rows`` of one sequence.

    q [S, heads, d], k and v [S, kv_heads, d]; returns [len(rows), heads, d]. One head at a time: it is the definition,
    not a fast way.
    """
    import torch

    heads, dim = q.shape[1], q.shape[2]
    group = heads // k.shape[1]
    length = k.shape[0]
    hidden = torch.arange(length, device=q.device)[None, :] > rows[:, None]
    out = torch.empty(len(rows), heads, dim, dtype=torch.float64, device=q.device)
    for head in range(heads):
        keys, values = k[:, head // group].to(torch.float64), v[:, head // group].to(torch.float64)
        scores = q[rows, head].to(torch.float64) @ keys.t() / math.sqrt(dim)
        out[:, head] = scores.masked_fill_(hidden, -math.inf).softmax(-1) @ values
    return out


def _prefill(case: Case, device: Device, seed: int) -> Prepared:
    import torch

    batch, length, dim = case.dim("batch"), case.dim("length"), case.dim("head_dim")
    heads, kv_heads, size = case.dim("heads"), case.dim("kv_heads"), element_bytes(case.dtype)
    values = batch * length * dim * (2 * heads + 2 * kv_heads)
    device.require_memory(2 * size * values + 3 * 8 * CHECKED_QUERY_ROWS * length)
    rng = generator(device, seed)
    q = random_tensor([batch, length, heads, dim], case.dtype, device, rng)
    k = random_tensor([batch, length, kv_heads, dim], case.dtype, device, rng)
    v = random_tensor([batch, length, kv_heads, dim], case.dtype, device, rng)
    call, backend, timed = _prefill_call(case.impl, device, q, k, v)

    def check() -> list[Check]:
        step = max(1, length // CHECKED_QUERY_ROWS)
        rows = torch.tensor(sorted({*range(0, length, step), length - 1}), device=q.device)
        got = call()  # [batch, length, heads, dim]
        some = range(min(batch, CHECKED_SEQUENCES))
        want = torch.stack([prefill_reference(q[b], k[b], v[b], rows) for b in some])
        return [compare(got[: len(some)][:, rows], want, TOLERANCE[case.dtype])]

    work = Work(
        4.0 * batch * heads * dim * length * (length + 1) / 2,
        size * batch * length * dim * (heads + 2 * kv_heads),
        size * batch * length * dim * heads,
    )
    return Prepared(call, check, work, flush=True, capturable=True, backend=backend, timed=timed)


_TensorCall = Callable[[], Any]


def _prefill_call(
    impl: str, device: Device, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[_TensorCall, str, bool]:
    """The call, what serves it, and whether its time counts. Every call returns [batch, length, heads, dim]."""
    batch, length, heads, dim = q.shape
    if impl == "triton":
        timed = require_triton(device)
        from kernels.triton_ops.attention import prefill

        return lambda: prefill(q, k, v), "triton", timed
    if impl == "flashinfer":
        flashinfer = require_flashinfer(device)
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD")
        starts = _starts(batch, length, device)
        wrapper.plan(starts, starts, heads, k.shape[2], dim, causal=True, q_data_type=q.dtype)
        flat = [t.reshape(batch * length, t.shape[2], dim) for t in (q, k, v)]
        return lambda: wrapper.run(*flat).view(batch, length, heads, dim), "flashinfer ragged prefill", True
    if impl == "vllm_fa":
        attend, version = require_vllm_flash_attention(device)
        starts = _starts(batch, length, device)
        flat = [t.reshape(batch * length, t.shape[2], dim) for t in (q, k, v)]

        def varlen() -> Any:
            out = attend(
                *flat,
                max_seqlen_q=length,
                cu_seqlens_q=starts,
                max_seqlen_k=length,
                cu_seqlens_k=starts,
                causal=True,
                fa_version=version,
            )
            return out.view(batch, length, heads, dim)

        return varlen, f"FlashAttention {version} (vLLM's build)", True
    return _sdpa_call(device, q, k, v)


def _sdpa_call(device: Device, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[_TensorCall, str, bool]:
    """torch's scaled_dot_product_attention, kept to its flash backend where that takes the shape."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q4, k4, v4 = (t.transpose(1, 2) for t in (q, k, v))  # [batch, heads, length, dim]

    def call(backends: list[SDPBackend] | None = None) -> Any:
        if backends is None:
            return scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=True).transpose(1, 2)
        with sdpa_kernel(backends):
            return scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=True).transpose(1, 2)

    candidates = [SDPBackend.FLASH_ATTENTION]
    if device.kind == "cuda":
        candidates.insert(
            0, SDPBackend.CUDNN_ATTENTION
        )  # the fastest of torch's on Hopper, where cuDNN takes the shape
    for backend in candidates:
        try:
            call([backend])
        except RuntimeError:
            continue
        if device.kind == "cuda":
            torch.cuda.synchronize()
        return partial(call, [backend]), f"torch SDPA, {backend.name.lower()}", True
    return call, "torch SDPA, default", True


def _starts(batch: int, length: int, device: Device) -> torch.Tensor:
    import torch

    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device.torch_name)


# ---- paged decode ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PagedCache:
    """One layer's KV cache in blocks, as vLLM lays it out.

    ``k`` and ``v``: [num_blocks, block_size, kv_heads, head_dim]; ``block_table`` [batch, blocks per sequence] int32 in
    random order; ``lengths`` [batch] int32.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.k.shape[1])


def decode_reference(q: torch.Tensor, cache: PagedCache, sequence: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in fp64 for one sequence's single query; q [batch, heads, d]; returns [heads, d]."""
    import torch

    length = int(cache.lengths[sequence])
    blocks = cache.block_table[sequence].long()
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = cache.k.shape[2]
    keys = cache.k[blocks].reshape(-1, kv_heads, dim)[:length].to(torch.float64)
    values = cache.v[blocks].reshape(-1, kv_heads, dim)[:length].to(torch.float64)
    query = q[sequence].to(torch.float64).view(kv_heads, heads // kv_heads, dim)
    weights = (torch.einsum("hgd,thd->hgt", query, keys) / math.sqrt(dim)).softmax(-1)
    return torch.einsum("hgt,thd->hgd", weights, values).reshape(heads, dim)


def _decode(case: Case, device: Device, seed: int) -> Prepared:
    import torch

    batch, context, dim = case.dim("batch"), case.dim("context"), case.dim("head_dim")
    heads, kv_heads, size = case.dim("heads"), case.dim("kv_heads"), element_bytes(case.dtype)
    block_size = case.dim("block_size")
    per_sequence = math.ceil(context / block_size)
    kv_values = 2 * batch * per_sequence * block_size * kv_heads * dim
    copies = 2 if case.impl == "torch" else 1  # the torch version gathers the pages first
    device.require_memory(size * kv_values * copies + 4 * 8 * context * kv_heads * dim)
    rng = generator(device, seed)
    q = random_tensor([batch, heads, dim], case.dtype, device, rng)
    num_blocks = batch * per_sequence
    cache = PagedCache(
        random_tensor([num_blocks, block_size, kv_heads, dim], case.dtype, device, rng),
        random_tensor([num_blocks, block_size, kv_heads, dim], case.dtype, device, rng),
        torch.randperm(num_blocks, generator=rng, device=q.device).to(torch.int32).view(batch, per_sequence),
        torch.full((batch,), context, dtype=torch.int32, device=q.device),
    )
    call, backend, timed = _decode_call(case.impl, device, q, cache)

    def check() -> list[Check]:
        got = call()  # [batch, heads, dim]
        some = sorted({0, batch - 1, *range(min(batch, CHECKED_SEQUENCES))})
        want = torch.stack([decode_reference(q, cache, i) for i in some])
        return [compare(got[some], want, TOLERANCE[case.dtype])]

    work = Work(
        4.0 * batch * heads * dim * context,
        size * (2 * batch * context * kv_heads * dim + batch * heads * dim),
        size * batch * heads * dim,
    )
    return Prepared(call, check, work, flush=True, capturable=True, backend=backend, timed=timed)


def _decode_call(impl: str, device: Device, q: torch.Tensor, cache: PagedCache) -> tuple[_TensorCall, str, bool]:
    """The call, what serves it, and whether its time counts. Every call returns [batch, heads, dim]."""
    batch = q.shape[0]
    context = int(cache.lengths.max())
    if impl == "triton":
        timed = require_triton(device)
        from kernels.triton_ops.attention import paged_decode

        splits = choose_splits(batch, cache.k.shape[2], context, device)
        return lambda: paged_decode(q, cache.k, cache.v, cache.block_table, cache.lengths, splits), "triton", timed
    if impl == "flashinfer":
        return _flashinfer_decode(device, q, cache), "flashinfer paged decode", True
    if impl == "vllm_fa":
        attend, version = require_vllm_flash_attention(device)
        import torch

        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)

        def paged() -> Any:
            return attend(
                q,
                cache.k,
                cache.v,
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=context,
                seqused_k=cache.lengths,
                block_table=cache.block_table,
                causal=True,
                fa_version=version,
            )

        return paged, f"FlashAttention {version} (vLLM's build)", True
    return _gather_decode(q, cache, context), "torch gather + SDPA", True


def _gather_decode(q: torch.Tensor, cache: PagedCache, context: int) -> _TensorCall:
    """Gather every sequence's pages into one tensor, then attend: what torch alone can do (all lengths equal)."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, _, dim = q.shape
    kv_heads = cache.k.shape[2]
    table = cache.block_table.long()

    def call() -> Any:
        k = cache.k[table].view(batch, -1, kv_heads, dim)[:, :context].transpose(1, 2)
        v = cache.v[table].view(batch, -1, kv_heads, dim)[:, :context].transpose(1, 2)
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    return call


def _flashinfer_decode(device: Device, q: torch.Tensor, cache: PagedCache) -> _TensorCall:
    import torch

    flashinfer = require_flashinfer(device)
    batch, heads, dim = q.shape
    per_sequence = cache.block_table.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=True)
    starts = torch.arange(0, (batch + 1) * per_sequence, per_sequence, dtype=torch.int32, device=q.device)
    last = ((cache.lengths - 1) % cache.block_size + 1).to(torch.int32)
    wrapper.plan(
        starts,
        cache.block_table.reshape(-1),
        last,
        heads,
        cache.k.shape[2],
        dim,
        cache.block_size,
        q_data_type=q.dtype,
        kv_data_type=cache.k.dtype,
    )
    return lambda: wrapper.run(q, (cache.k, cache.v))


def choose_splits(batch: int, kv_heads: int, context: int, device: Device) -> int:
    """Into how many parts our decode kernel cuts each context: about four programs per SM, no part under 256 tokens."""
    wanted = math.ceil(4 * device.num_units / (batch * kv_heads))
    return max(1, min(wanted, math.ceil(context / 256), 64))


# ---- libraries -------------------------------------------------------------------------------------------------------


#: Set to 1 to let FlashInfer compile its kernels on first use (minutes, with nvcc and ninja).
FLASHINFER_JIT = "TOKENYIELD_FLASHINFER_JIT"


def require_flashinfer(device: Device) -> Any:
    """The flashinfer module.

    Raises Unsupported without it, without a GPU, and where it would first have to compile its kernels for minutes: its
    package ``flashinfer-jit-cache`` holds them ready-made.
    """
    if device.kind != "cuda":
        raise Unsupported("flashinfer needs a GPU")
    if importlib.util.find_spec("flashinfer") is None:
        raise Unsupported("flashinfer is not installed")
    if importlib.util.find_spec("flashinfer_jit_cache") is None and os.environ.get(FLASHINFER_JIT) != "1":
        raise Unsupported(
            f"flashinfer has no compiled kernels here: install flashinfer-jit-cache, or set {FLASHINFER_JIT}=1"
        )
    import flashinfer

    return flashinfer


def _workspace(device: Device) -> torch.Tensor:
    """FlashInfer's scratch buffer; its documentation asks for 128 MiB, zeroed."""
    import torch

    return torch.zeros(128 * 2**20, dtype=torch.uint8, device=device.torch_name)


def require_vllm_flash_attention(device: Device) -> tuple[Any, int]:
    """vLLM's build of FlashAttention and the version (3 on Hopper, else 2) that this GPU runs.

    Raises Unsupported without a GPU, without vLLM, or with a build that has no kernel for this GPU.
    """
    if device.kind != "cuda":
        raise Unsupported("FlashAttention needs a GPU")
    if importlib.util.find_spec("vllm") is None:
        raise Unsupported("vllm is not installed")
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a build for another GPU or torch
        raise Unsupported(f"vllm's FlashAttention does not load: {str(error).splitlines()[0][:100]}") from error
    wanted = 3 if device.compute_capability and device.compute_capability[0] == 9 else 2
    for version in dict.fromkeys((wanted, 2)):
        if is_fa_version_supported(version):
            return flash_attn_varlen_func, version
    raise Unsupported("vllm's FlashAttention has no kernel for this GPU")
