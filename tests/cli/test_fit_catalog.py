"""bench fit and bench catalog as a user types them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from bench.cli import cli
from bench.errors import BadInput, UnknownName


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), standalone_mode=False, env={"COLUMNS": "200"})


def test_fit_says_the_smallest_number_of_gpus() -> None:
    done = run("fit", "llama-3.1-70b", "--gpu", "H100,A100", "--quantization", "fp8", "--concurrency", "64")
    assert done.return_value == 0
    assert "Smallest: 2 x H100-SXM" in done.output and "Smallest: 2 x A100-80-SXM" in done.output


def test_fit_as_json_agrees_with_the_function() -> None:
    from bench.catalog.hardware import load_hardware
    from bench.catalog.memory import fit
    from bench.catalog.model import load_model

    done = run("fit", "gpt-oss-120b", "--gpu", "H200", "--tp", "1,2", "--json")
    rows = json.loads(done.output)["gpus"][0]["layouts"]
    for tp, row in zip((1, 2), rows, strict=True):
        f = fit(load_model("gpt-oss-120b"), load_hardware("H200"), tp=tp)
        assert (row["num_blocks"], row["kv_capacity_tokens"]) == (f.num_blocks, f.kv_capacity_tokens)
        assert row["max_concurrency"] == f.max_concurrency(1024, 1024)


def test_fit_that_fails_says_why() -> None:
    done = run("fit", "llama-3.1-405b", "--gpu", "L4", "--tp", "3")
    assert done.return_value == 1 and "not divisible" in done.output.replace("\n", " ")
    for args, kind in (
        (("fit", "llama-3.1-8b", "--gpu", "cpu"), BadInput),
        (("fit", "llama-3.1-8b", "--gpu", "H100", "--tp", "two"), BadInput),
        (("fit", "llama-3.1-8b", "--gpu", "H1000"), UnknownName),
        (("fit", "lama", "--gpu", "H100"), UnknownName),
        (("fit", "llama-3.1-8b", "--gpu", "H100", "--quantization", "fp9"), UnknownName),
        (("fit", "llama-3.1-8b", "--gpu", "H100", "--gpu-memory-utilization", "2"), BadInput),
    ):
        assert isinstance(run(*args).exception, kind), args


@pytest.mark.parametrize("what", ["models", "hardware", "prices", "slo"])
def test_catalog_lists(what: str) -> None:
    assert run("catalog", what).return_value == 0
    assert len(json.loads(run("catalog", what, "--json").output)) >= 10


@pytest.mark.parametrize(
    ("what", "name", "text"),
    [
        ("models", "deepseek-r1", "MLA 512+64"),
        ("hardware", "H100", "NVIDIA H100 Tensor Core GPU data sheet"),
        ("prices", "H100-SXM", "$12.29/GPU-h"),
        ("prices", "Together", "batch -50 %"),
        ("slo", "chat", "interactive-chat"),
        ("slo", "ttft p99 <= 1 s", "ttft"),
    ],
)
def test_catalog_shows_one_with_its_sources(what: str, name: str, text: str) -> None:
    assert text in run("catalog", what, name).output
    json.loads(run("catalog", what, name, "--json").output)


def test_catalog_unknown_names() -> None:
    for what in ("models", "hardware", "prices", "slo"):
        assert isinstance(run("catalog", what, "nosuchthing").exception, BadInput)


def test_catalog_without_such_a_list() -> None:
    """Every other command says --gpu, so gpus is hardware; a word that is none has the nearest one named."""
    assert run("catalog", "gpus", "H100", "--json").output == run("catalog", "hardware", "H100", "--json").output
    unknown = run("catalog", "gpus", "H100-SMX").exception
    assert isinstance(unknown, UnknownName) and "did you mean H100-SXM" in str(unknown)
    for word, hint in (("hardwre", "did you mean `cli catalog hardware`?"), ("zzz", "`cli catalog --help` lists")):
        assert hint in str(run("catalog", word).exception)
