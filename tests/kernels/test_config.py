"""Suites: what is shipped loads, what is wrong is named with its line, shapes agree with the catalogue."""

from __future__ import annotations

import pytest

from bench.catalog.model import load_model
from bench.errors import BadInput
from kernels.case import WEIGH, Case
from kernels.config import FAMILIES, GemmGroup, SuiteConfig, layer_shapes, load_suite
from kernels.model_shapes import shapes_of
from kernels.suite import list_cases


@pytest.mark.parametrize("name", ["quick", "full", "tiny"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_shipped_suites_list_cases_of_every_family(name, kind):
    cases = list_cases(load_suite(name), kind)
    assert {c.family for c in cases} == set(FAMILIES)
    ids = [c.case_id for c in cases]
    assert len(ids) == len(set(ids))
    for case in cases:
        again = Case.from_dict(case.to_dict())
        assert again == case and again.case_id == case.case_id


def test_listing_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from kernels.config import load_suite; from kernels.suite import list_cases; "
        "list_cases(load_suite('full'), 'cuda'); sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_and_energy(tmp_path):
    suite = SuiteConfig.model_validate(
        {
            "name": "mine",
            "why": "test",
            "memory": [{"sizes_bytes": [1024], "energy": True}],
            "norm": [{"tokens": [1], "hidden": 64, "intermediate": 64, "num_heads": 2, "num_kv_heads": 1}],
        }
    )
    memory = list_cases(suite, "cpu", ("memory",))
    assert {c.family for c in memory} == {"memory"} and all(WEIGH in dict(c.tags) for c in memory)
    assert not any(WEIGH in dict(c.tags) for c in list_cases(suite, "cpu", ("norm",)))
    with pytest.raises(BadInput, match="no such family"):
        list_cases(suite, "cpu", ("gem",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gemm: [{dtypes: [bf17], m: [1], layers: [{name: a, n: 1, k: 1}]}]", "x.yaml:3: gemm.*dtypes"),
        ("gemm: [{dtypes: [bf16], m: [0], layers: [{name: a, n: 1, k: 1}]}]", "x.yaml:3: gemm.*m"),
        ("gemm: [{dtypes: [bf16], m: [1]}]", "give layers: or models:"),
        ("timing: {min_repeats: 5}", "x.yaml:3: timing.min_repeats: .*6"),
        ("timing: {min_repeats: 9, max_repeats: 7}", "max_repeats .7. is below min_repeats .9."),
        ("attention: [{num_heads: 3, num_kv_heads: 2}]", "not a multiple"),
        ("moe: [{num_experts: 2, top_k: 3, n: 1, k: 1, tokens: [1]}]", "top_k .3. is above num_experts .2."),
        ("memmory: []", "did you mean memory"),
        ("energy: {window_s: 0.5}", "x.yaml:3: energy.window_s"),
        ("schema_version: 2", "x.yaml:3: schema_version"),
    ],
)
def test_a_wrong_suite_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "x.yaml"
    file.write_text(f"name: mine\nwhy: test\n{line}\n")
    with pytest.raises(BadInput, match=message):
        load_suite(str(file))


def test_an_unknown_suite_lists_the_known():
    with pytest.raises(BadInput, match=r"did you mean quick|known"):
        load_suite("quik")


def test_the_digest_tells_suites_apart():
    quick = load_suite("quick")
    assert quick.digest == load_suite("quick").digest != load_suite("tiny").digest


def test_shapes_of_an_8b_are_those_of_its_weights():
    shapes = {s.name: (s.n, s.k) for s in shapes_of(load_model("llama-3.1-8b"), 1)}
    assert shapes == {
        "qkv_proj": (6144, 4096),
        "o_proj": (4096, 4096),
        "gate_up_proj": (28672, 4096),
        "down_proj": (4096, 14336),
        "lm_head": (128256, 4096),
    }


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-32b", "mistral-large-2"])
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_the_matrices_hold_as_many_weights_as_the_architecture_says(model, tp):
    arch = load_model(model)
    held = sum(s.n * s.k for s in shapes_of(arch, tp) if s.name != "lm_head")
    layer = arch.layer_params(arch.layers[0])
    whole = layer.qkv + layer.attention_out + layer.mlp
    assert held * tp == pytest.approx(whole, rel=1e-12)


def test_equal_shapes_are_measured_once():
    group = GemmGroup.model_validate({"dtypes": ["bf16"], "m": [1], "models": ["llama-3.1-70b", "llama-3.3-70b"]})
    names = [(s.n, s.k) for s in layer_shapes(group)]
    assert len(names) == len(set(names)) == 5
