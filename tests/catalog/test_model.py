"""Architectures: parameter counts against the published ones, weights, KV bytes, parallel layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.catalog.facts import Fact
from bench.catalog.model import ModelArch, Moe, list_models, load_model, materialise
from bench.catalog.quant import list_formats, quant_format
from bench.errors import BadInput, UnknownName

GIB = 2**30
ASKED_FOR = [
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "llama-3.3-70b",
    "llama-4-scout",
    "llama-4-maverick",
    "mistral-7b",
    "mistral-nemo-12b",
    "mistral-large-2",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "qwen2.5-7b",
    "qwen2.5-32b",
    "qwen2.5-72b",
    "qwen3-8b",
    "qwen3-32b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "deepseek-v3",
    "deepseek-r1",
    "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-llama-70b",
    "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-14b",
    "deepseek-r1-distill-qwen-32b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "gpt-j-6b",
    "tiny-llama",
]
MODELS = {m.name: m for m in list_models()}


def test_every_model_asked_for_is_there() -> None:
    assert set(ASKED_FOR) <= set(MODELS)


@pytest.mark.parametrize("name", ASKED_FOR)
def test_parameters_equal_the_published_count(name: str) -> None:
    """Exactly, where the exact count is published; within the rounding of a report's two to four digits otherwise."""
    fact = MODELS[name].facts.get("num_params")
    if fact is None:
        assert name == "tiny-llama"
        return
    assert isinstance(fact, Fact) and fact.source and fact.as_of
    exact = "gpt-oss" not in name
    assert MODELS[name].num_params == (fact.value if exact else pytest.approx(fact.value, rel=5e-4))


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if "num_active_params" in m.facts])
def test_active_parameters_agree_with_the_rounded_published_ones(name: str) -> None:
    model = MODELS[name]
    # gpt-oss's card leaves the embedding table out of its active count; the others keep it in
    ours = model.num_matmul_params_active if "gpt-oss" in name else model.num_active_params
    assert ours == pytest.approx(model.facts["num_active_params"].value, rel=0.02)


def test_kv_bytes_per_token() -> None:
    """2 x layers x KV heads x head dim x bytes; MLA 61 x 576 x 2 (DeepSeek-V3's report: 70.3 kB)."""
    assert MODELS["llama-3.1-8b"].kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2 == 131072
    assert MODELS["llama-3.1-70b"].kv_bytes_per_token() == 327680
    assert MODELS["qwen2.5-7b"].kv_bytes_per_token() == 57344
    assert MODELS["gpt-j-6b"].kv_bytes_per_token() == 2 * 28 * 16 * 256 * 2
    assert MODELS["deepseek-v3"].kv_bytes_per_token() == 61 * 576 * 2 == 70272
    assert MODELS["llama-3.1-8b"].kv_bytes_per_token("fp8") == 65536


def test_kv_heads_are_divided_then_replicated() -> None:
    m = MODELS["qwen2.5-7b"]  # 28 heads, 4 KV heads
    assert [m.kv_bytes_per_token(tp=tp) for tp in (1, 2, 4, 28)] == [57344, 28672, 14336, 14336]
    assert m.parallel_problem(tp=8) is not None  # 28 heads are not divisible by 8
    d = MODELS["deepseek-v3"]
    assert d.kv_bytes_per_token(tp=8) == d.kv_bytes_per_token()  # the latent vector is on every rank


def test_windowed_layers_hold_no_more_than_their_window() -> None:
    m = MODELS["gpt-oss-20b"]
    per_layer = 2 * 8 * 64 * 2
    assert m.kv_bytes_at(100) == 24 * 100 * per_layer
    assert m.kv_bytes_at(10_000) == (12 * 128 + 12 * 10_000) * per_layer
    scout = MODELS["llama-4-scout"]
    assert sum(1 for k in scout.layers if k.attention == "chunked") == 36
    assert scout.kv_bytes_at(8192 * 3) == (36 * 8192 + 12 * 8192 * 3) * 2 * 8 * 128 * 2
    assert scout.kv_bytes_at(8192 * 3 + 1) < scout.kv_bytes_at(8192 * 3)


def test_interleaved_and_leading_dense_layers() -> None:
    maverick = MODELS["llama-4-maverick"]
    assert [k.moe for k in maverick.layers[:4]] == [False, True, False, True]
    assert [k.moe for k in MODELS["deepseek-v3"].layers[:4]] == [False, False, False, True]
    assert all(k.moe for k in MODELS["llama-4-scout"].layers)


def test_weight_bytes_by_format() -> None:
    m = MODELS["llama-3.1-8b"]
    assert m.weight_bytes() == pytest.approx(2 * m.num_params)
    tables = 2 * m.num_embedding_params
    norms = (2 * 32 + 1) * 4096
    assert m.weight_bytes("fp8") == pytest.approx(m.num_params - tables - norms + 2 * (tables + norms), rel=1e-9)
    # a published AWQ checkpoint of this model (group 128) is 5.74 GB
    assert m.weight_bytes("awq") / 1e9 == pytest.approx(5.74, rel=0.01)
    sizes = [m.weight_bytes(f.name) for f in list_formats()]
    assert sizes == sorted(sizes, reverse=True)
    assert MODELS["deepseek-v3"].quant().name == "fp8_block"
    assert MODELS["gpt-oss-120b"].quant().name == "mxfp4"
    # checkpoint size on the hub: 65.2 GB for 120b (MXFP4 experts, the rest bf16), before kernels pad the experts
    oss = MODELS["gpt-oss-120b"]
    raw = oss.moe.num_experts * 3 * 2880 * 2880 * 36 if oss.moe else 0
    padding = raw * (0.5 + 1 / 32) * (oss.expert_padding_ratio(oss.quant()) - 1)
    assert (oss.weight_bytes() - padding) / 1e9 == pytest.approx(65.2, rel=0.01)


@pytest.mark.parametrize("name", ASKED_FOR)
def test_ranks_together_hold_the_model_once_and_what_is_replicated(name: str) -> None:
    m = MODELS[name]
    whole = m.weight_bytes("bf16")
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 3):
            if m.parallel_problem(tp, pp):
                continue
            stages = m.stage_weight_bytes("bf16", tp, pp)
            assert len(stages) == pp
            total = sum(stages) * tp
            assert total >= whole * 0.9999
            assert total <= whole * (1.35 if name == "tiny-llama" else 1.16)


def test_stages_follow_vllm() -> None:
    m = MODELS["deepseek-v3"]
    assert m.stages(2) == [(0, 31), (31, 61)]
    assert m.stages(4) == [(0, 15), (15, 30), (30, 46), (46, 61)]
    assert MODELS["llama-3.1-8b"].stages(3) == [(0, 11), (11, 22), (22, 32)]


@given(n=st.floats(0, 1e5), k=st.integers(1, 8), e=st.sampled_from([8, 16, 32, 128, 256]))
def test_experts_touched_is_bounded_and_grows(n: float, k: int, e: int) -> None:
    moe = Moe(e, k, 1024)
    touched = moe.experts_touched(n)
    assert 0 <= touched <= min(e, k * max(n, 1) + 1e-9) + 1e-9
    assert moe.experts_touched(n + 1) >= touched
    assert moe.experts_touched(1) == pytest.approx(k)


def test_experts_touched_agrees_with_a_draw() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    moe = Moe(128, 8, 1024)
    for n in (1, 4, 16, 64):
        draws = [len({x for _ in range(n) for x in rng.choice(128, 8, replace=False)}) for _ in range(200)]
        assert np.mean(draws) == pytest.approx(moe.experts_touched(n), rel=0.02)


def test_names_paths_and_hub_ids(tmp_path: Path) -> None:
    assert load_model("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"
    assert load_model("LLAMA 3.1 8B").name == "llama-3.1-8b"
    folder = materialise(MODELS["qwen3-8b"], tmp_path / "q")
    for path in (folder, folder / "config.json"):
        assert load_model(str(path)).num_params == MODELS["qwen3-8b"].num_params
    with pytest.raises(UnknownName, match="did you mean"):
        load_model("lama-3.1-8b")
    for text, message in (("{", "not valid JSON"), ("[]", "config.json"), ("{}", "hidden_size is missing")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=message):
            load_model(str(tmp_path / "config.json"))


def test_hub_id_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    import bench.catalog.model as module

    def refuse() -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "_probe_hub", refuse)
    with pytest.raises(BadInput, match=r"cannot be fetched \(no route to host\).*config.json"):
        load_model("some-org/no-such-model")


def test_materialised_config_is_what_was_read(tmp_path: Path) -> None:
    for name in ("tiny-llama", "gpt-oss-20b", "llama-4-scout"):
        folder = materialise(MODELS[name], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        assert config == MODELS[name].config
        assert sorted(p.name for p in folder.iterdir()) == ["config.json"]


BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected a whole number > 0"),
        ({"hidden_size": "64"}, "hidden_size: expected a whole number > 0"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"model_type": "mamba2"}, "does not cover"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected one entry"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "exceeds"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3 bits is not covered"),
        ({"num_hidden_layers": 10**9}, "not a real model"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ModelArch.from_hf_config({**BASE, **change}, "x")


def test_other_families() -> None:
    mistral = ModelArch.from_hf_config({**BASE, "model_type": "mistral", "sliding_window": 16}, "x")
    assert {(k.attention, k.window) for k in mistral.layers} == {("sliding", 16)}
    qwen = {**BASE, "model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}
    assert ModelArch.from_hf_config(qwen, "x").layers[0].attention == "full"
    unknown = ModelArch.from_hf_config({**BASE, "model_type": "brandnew"}, "x")
    assert "Llama-like" in unknown.notes[0]
    tied = ModelArch.from_hf_config({**BASE, "tie_word_embeddings": True}, "x")
    assert ModelArch.from_hf_config(BASE, "x").num_params - tied.num_params == 6400
    awq = {**BASE, "quantization_config": {"quant_method": "awq", "bits": 4}}
    assert ModelArch.from_hf_config(awq, "x").quant().name == "int4"


def test_quant_names() -> None:
    assert quant_format("gptq_marlin").name == "int4"
    with pytest.raises(UnknownName, match="fp8"):
        quant_format("fp9")
    with pytest.raises(UnknownName):
        MODELS["llama-3.1-8b"].kv_bytes_per_token("fp3")


@pytest.mark.parametrize("name", ASKED_FOR)
def test_counts_and_configs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The written config.json loads, and the model built from it (no memory is taken) has exactly our parameters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = MODELS[name]
    config = transformers.AutoConfig.from_pretrained(str(materialise(model, tmp_path)))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = transformers.AutoModelForImageTextToText if model.num_vision_params else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        built = kind.from_config(config)
    count = sum(p.numel() for p in built.parameters())
    # DeepSeek's routing correction is a buffer there and a parameter in the checkpoint
    count += sum(b.numel() for n, b in built.named_buffers() if n.endswith("e_score_correction_bias"))
    assert count == model.num_params


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(name=st.sampled_from(ASKED_FOR), data=st.data())
def test_a_broken_config_is_refused_in_one_line_or_read(name: str, data: st.DataObject) -> None:
    """Whatever a config.json says under a known key, the answer is a model whose arithmetic works, or one clear line."""
    config = json.loads(json.dumps(MODELS[name].config))
    part = config["text_config"] if "text_config" in config and data.draw(st.booleans()) else config
    for key in data.draw(st.lists(st.sampled_from(sorted(part)), min_size=1, max_size=2)):
        part[key] = data.draw(JSON)
    try:
        model = ModelArch.from_hf_config(config, "fuzzed")
        assert model.num_params > 0 and model.weight_bytes() > 0 and model.kv_bytes_per_token() > 0
    except BadInput as e:
        assert "\n" not in str(e)


def test_a_model_file_is_named_by_itself_and_a_config_by_its_folder(tmp_path: Path) -> None:
    config = json.dumps(load_model("llama-3.1-8b").config)
    for name in ("config.json", "candidate-a.json"):
        (tmp_path / name).write_text(config)
    assert load_model(str(tmp_path / "config.json")).name == tmp_path.name
    assert load_model(str(tmp_path / "candidate-a.json")).name == "candidate-a"
