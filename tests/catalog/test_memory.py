"""What fits: vLLM's rules, checked against vLLM's own specs and a real engine where vLLM is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.catalog.arch import KvGroup
from bench.catalog.hardware import load_hardware
from bench.catalog.memory import (
    activation_bytes,
    blocks_per_request,
    bytes_per_block,
    default_block_size,
    engine_defaults,
    fit,
    layouts,
    smallest,
)
from bench.catalog.model import ModelArch, list_models, load_model, materialise
from bench.errors import BadInput

GIB = 2**30
H100, A100, H200, B200, L4 = (load_hardware(n) for n in ("H100", "A100", "H200", "B200", "L4"))


def test_defaults_by_device_are_vllms() -> None:
    assert engine_defaults(B200) == engine_defaults(B200, "server") == (16384, 1024)
    assert (engine_defaults(H100), engine_defaults(H100, "server")) == ((16384, 1024), (8192, 1024))
    assert (engine_defaults(A100), engine_defaults(A100, "server")) == ((8192, 256), (2048, 256))
    assert engine_defaults(L4) == (8192, 256)


def test_parts_add_up() -> None:
    f = fit(load_model("llama-3.1-8b"), H100, tp=2)
    parts = f.weight_bytes + f.activation_bytes + f.cuda_graph_bytes + f.non_torch_bytes + f.kv_cache_bytes
    assert parts == pytest.approx(f.requested_bytes)
    assert f.requested_bytes == pytest.approx(0.92 * f.total_bytes, abs=1)
    assert f.num_blocks == int(f.kv_cache_bytes // f.bytes_per_block)
    assert f.bytes_per_block == 16 * 2 * 32 * 4 * 128 * 2
    assert f.kv_capacity_tokens == pytest.approx(f.num_blocks * 16, rel=1e-3)


def test_start_logs_of_real_engines() -> None:
    """Public vLLM logs. Llama-3.1-8B on an 80 GB H100 at 0.90, 256 sequences: weights 14.99 GiB, activations 1.19 to
    1.26 with the V1 sampler, 54.86 and 54.93 GiB left for the cache. Qwen2.5-1.5B at 32,768 tokens: 2.02 GiB."""
    from bench.catalog.memory import SAMPLER_BYTES_PER_LOGIT_V1

    m = load_model("llama-3.1-8b")
    f = fit(m, H100, gpu_memory_utilization=0.9, max_num_batched_tokens=8192, max_num_seqs=256, enforce_eager=True)
    assert f.weight_bytes / GIB == pytest.approx(14.99, rel=0.005)
    v1 = activation_bytes(m, 8192, 256, sampler_bytes=SAMPLER_BYTES_PER_LOGIT_V1)
    assert v1 / GIB == pytest.approx(1.22, rel=0.05)
    assert f.kv_cache_bytes / GIB == pytest.approx(54.9, rel=0.02)
    small = {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936}  # fmt: skip
    arch = ModelArch.from_hf_config(small, "qwen2.5-1.5b")
    assert activation_bytes(arch, 32768, 256) / GIB == pytest.approx(2.02, rel=0.05)


def test_seventy_billion_on_one_gpu_is_kv_limited() -> None:
    """70B in FP8 just fits one H100 and leaves next to no cache; two GPUs leave a hundred times as much."""
    m = load_model("llama-3.1-70b")
    one, two = (fit(m, H100, tp=tp, quantization="fp8") for tp in (1, 2))
    assert one.kv_cache_bytes + one.uncertain_bytes < 4 * GIB
    assert one.max_concurrency(128, 2048) <= 2
    assert two.max_concurrency(128, 2048) > 50
    assert not fit(m, H100).fits and "short" in str(fit(m, H100).reason)
    assert fit(m, H100, tp=8).fits


def test_smallest_number_of_gpus() -> None:
    def gpus(name: str, hardware: Any, **k: Any) -> int | None:
        found = smallest(load_model(name), hardware, **k)
        return found.num_gpus if found else None

    assert gpus("llama-3.1-8b", H100) == 1
    # 131 GiB of weights are 66 a GPU at TP 2, which leaves room for a handful of requests and no more
    assert gpus("llama-3.1-70b", H100) == 2
    assert gpus("llama-3.1-70b", H100, concurrency=64) == 4
    assert gpus("deepseek-r1", H200) == 8
    assert gpus("deepseek-r1", H100) == 16
    assert gpus("llama-3.1-405b", L4, max_gpus=8) is None
    assert layouts(16) == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2)]


def test_more_never_fits_less() -> None:
    m = load_model("qwen3-32b")
    by_tp = [fit(m, H100, tp=tp).kv_capacity_tokens for tp in (1, 2, 4, 8)]
    assert by_tp == sorted(by_tp)
    by_share = [fit(m, H100, tp=2, gpu_memory_utilization=u).num_blocks for u in (0.5, 0.7, 0.9, 1.0)]
    assert by_share == sorted(by_share)
    assert fit(m, H100, tp=2, kv_cache_dtype="fp8").kv_capacity_tokens > fit(m, H100, tp=2).kv_capacity_tokens


def test_concurrency_counts_whole_blocks() -> None:
    f = fit(load_model("llama-3.1-8b"), L4, quantization="fp8", kv_cache_memory_bytes=101 * 16 * 131072)
    assert (f.num_blocks, f.usable_blocks) == (101, 100)
    assert f.max_concurrency(100, 60) == 10  # 159 positions are 10 blocks
    assert f.max_concurrency(100, 62) == 9  # 161 positions are 11
    assert f.max_concurrency(131072, 1) == 0
    with pytest.raises(BadInput):
        f.max_concurrency(0, 1)
    assert f.longest_request_tokens == 101 * 16


def test_windows_save_blocks() -> None:
    groups = [KvGroup("sliding", 128, 12, 12, 2048), KvGroup("full", None, 12, 12, 2048)]
    assert blocks_per_request(groups, 1600, 16) == 9 + 100
    assert blocks_per_request(groups, 16, 16) == 2
    chunked = [KvGroup("chunked", 8192, 12, 12, 2048)]
    assert blocks_per_request(chunked, 100_000, 16) == 512
    assert bytes_per_block(groups, 16) == 12 * 2048 * 16


def test_one_table_that_holds_as_much() -> None:
    plain = fit(load_model("llama-3.1-8b"), H100)
    assert plain.equivalent_blocks(1000) == plain.num_blocks
    windowed = fit(load_model("gpt-oss-20b"), H100)
    held = (windowed.equivalent_blocks(4096) - 1) // 256
    assert held == pytest.approx(windowed.usable_blocks // blocks_per_request(list(windowed.groups), 4096, 16), abs=1)


def test_values_out_of_range() -> None:
    m = load_model("llama-3.1-8b")
    for bad in ({"gpu_memory_utilization": 0.0}, {"gpu_memory_utilization": 1.5}, {"block_size": -1}):
        with pytest.raises(BadInput):
            fit(m, H100, **bad)  # type: ignore[arg-type]
    f = fit(m, H100, tp=3)
    assert not f.fits and "not divisible" in str(f.reason)


def test_latent_attention_uses_its_kernels_blocks() -> None:
    m = load_model("deepseek-v3")
    assert [default_block_size(m, h) for h in (A100, H100, B200)] == [16, 64, 128]
    assert fit(m, H200, tp=8).bytes_per_block == 61 * 576 * 2 * 64


# --- against vLLM ----------------------------------------------------------------------------------------------------


def vllm_specs(model: ModelArch, tp: int, block: int) -> dict[str, Any]:
    """vLLM's own KV-cache spec of every layer of ``model``."""
    import torch
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    specs: dict[str, Any] = {}
    for i, kind in enumerate(model.layers):
        common: dict[str, Any] = {"block_size": block, "dtype": torch.bfloat16}
        if model.mla is not None:
            specs[f"l{i}"] = MLAAttentionSpec(num_kv_heads=1, head_size=model.mla.cache_dim, **common)
            continue
        common |= {"num_kv_heads": model.kv_heads_per_rank(tp), "head_size": model.head_dim}
        if kind.attention == "sliding":
            specs[f"l{i}"] = SlidingWindowSpec(sliding_window=kind.window, **common)
        elif kind.attention == "chunked":
            specs[f"l{i}"] = ChunkedLocalAttentionSpec(attention_chunk_size=kind.window, **common)
        else:
            specs[f"l{i}"] = FullAttentionSpec(**common)
    return specs


@pytest.mark.parametrize("name", [m.name for m in list_models()])
def test_blocks_are_those_of_vllm(name: str) -> None:
    pytest.importorskip("vllm")
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    # newer releases ask for the memory layout: layers outermost, as by default
    layouts_of_vllm = pytest.importorskip("vllm.v1.kv_cache_layout")
    model = load_model(name)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(), max_model_len=4096),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layouts_of_vllm.KVCacheLayout.LBNHC),
    )
    for tp in (1, 2, 16):
        if model.parallel_problem(tp):
            continue
        groups = get_kv_cache_groups(config, vllm_specs(model, tp, 16))  # type: ignore[arg-type]
        ours = model.kv_groups(tp=tp)
        assert len(groups) == len(ours)
        assert sorted(len(g.layer_names) for g in groups) == sorted(g.num_layers for g in ours)
        pages = {g.kv_cache_spec.page_size_bytes for g in groups}
        assert pages == {16 * ours[0].page_bytes_per_token}
        assert max(len(g.layer_names) for g in groups) * pages.pop() == bytes_per_block(ours, 16)


@pytest.mark.parametrize("name", ["gpt-oss-120b", "llama-4-scout", "llama-3.1-8b"])
def test_printed_capacity_is_computed_as_vllm_does(name: str) -> None:
    """ "GPU KV cache size" of hybrid models: sequences of max_model_len that fit, windows counted, times its length."""
    pytest.importorskip("vllm")
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    model, tp, batched = load_model(name), 8, 8192
    ours = fit(model, H100, tp=tp, max_model_len=131072, max_num_batched_tokens=batched)
    specs = vllm_specs(model, tp, 16)
    groups: list[Any] = []
    for g in ours.groups:
        spec = next(s for k, s in zip(model.layers, specs.values(), strict=True) if k.attention == g.attention)
        groups.append(SimpleNamespace(kv_cache_spec=spec, host_resident=False))
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=131072),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=2 * batched,  # two batches in flight under asynchronous scheduling
    )
    kv = SimpleNamespace(num_blocks=ours.num_blocks, kv_cache_groups=groups, hisparse_host_num_blocks=None)
    assert get_kv_cache_capacity(config, kv)[0] == ours.kv_capacity_tokens  # type: ignore[arg-type]


ENGINE = """
import json, sys
from vllm import LLM
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, enforce_eager=True,
              tensor_parallel_size=int(sys.argv[2]))
    c = llm.llm_engine.vllm_config.cache_config
    print("RESULT " + json.dumps({"num_blocks": c.num_gpu_blocks, "block_size": c.block_size,
                                  "tokens": getattr(c, "kv_cache_size_tokens", None)}))
"""


@pytest.mark.engine
def test_capacity_is_what_a_real_engine_reports(tmp_path: Path) -> None:
    """vLLM's CPU engine with 1 GiB for its cache: the same blocks and tokens, exactly."""
    pytest.importorskip("vllm")
    model = load_model("tiny-llama")
    folder = materialise(model, tmp_path / "model")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    tp = 2 if (os.cpu_count() or 1) > 1 else 1  # two ranks, each with its own budget and half of the KV heads
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(i) for i in range(tp))
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(tp)], env=env, capture_output=True, text=True, timeout=280
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    cpu = load_hardware("cpu")
    assert default_block_size(model, cpu) == found["block_size"]
    ours = fit(model, cpu, tp=tp, max_model_len=2048, kv_cache_memory_bytes=GIB, block_size=found["block_size"])
    assert ours.num_blocks == found["num_blocks"]
    if found["tokens"] is not None:
        assert ours.kv_capacity_tokens == found["tokens"]
