"""Arguments that vLLM would refuse, told without importing it: from its sources where installed, else from the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.engines import vllm_args, vllm_versions
from bench.engines.vllm_args import Declared, wrong_argument

ARG_UTILS = """
@dataclass
class EngineArgs:
    model: str = ModelConfig.model
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    dtype: ModelDType = "auto"
    kv_cache_dtype: CacheDType = "auto"
    compilation_config: CompilationConfig = None
    _api_process_count: ClassVar[int] = 1


@dataclass
class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
"""
CLI_ARGS = """
class FrontendArgs:
    uvicorn_log_level: Literal["debug", "info"] = "info"

parser.add_argument("--headless", action="store_true")
"""
CONFIG = """
ModelDType = Literal["auto", "float16", "bfloat16"]
CacheDType = Literal[
    "auto",
    "fp8_e4m3",
]
Mixed = Literal["a", ModelDType]
"""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Declared:
    """A small vLLM of release 0.30, as far as its argument declarations go."""
    for name, text in {
        "engine/arg_utils.py": ARG_UTILS,
        "entrypoints/launchers/cli_args.py": CLI_ARGS,
        "config/model.py": CONFIG,
    }.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = vllm_args.declared(tmp_path / "vllm")
    assert found is not None
    monkeypatch.setattr(vllm_args, "installed", lambda: found)
    monkeypatch.setattr(vllm_versions, "installed_version", lambda: "0.30.0")
    return found


def test_declarations_are_read(release: Declared) -> None:
    assert release.engine["max_num_seqs"] == "int | None" and "enable_log_requests" in release.engine
    assert "_api_process_count" not in release.engine
    assert release.server.keys() == {"uvicorn_log_level", "headless"}
    assert release.choices == {"ModelDType": ("auto", "float16", "bfloat16"), "CacheDType": ("auto", "fp8_e4m3")}


@pytest.mark.parametrize(
    ("args", "what", "step"),
    [
        ({"max_num_seq": 8}, 'vLLM 0.30.0 has no engine argument "max_num_seq"', "did you mean max_num_seqs?"),
        ({"Max-Num-Seqs": 8}, "no engine argument", "did you mean max_num_seqs?"),
        ({"frobnicate": 8}, "no engine argument", "EngineArgs"),
        ({"max_num_partial_prefills": 2}, "(vLLM 0.26 has)", "install that release"),
        ({"uvicorn_log_level": "info"}, "no engine argument", "install"),
        ({"tokenizer": "x"}, "cannot be set", "remove it"),
        ({"max_num_seqs": "8"}, 'expected a whole number, got "8"', "write 8 without quotes"),
        ({"max_num_seqs": True}, "expected a whole number, got true", "write a whole number"),
        ({"max_num_seqs": 2.5}, "expected a whole number, got 2.5", "write a whole number"),
        ({"gpu_memory_utilization": "high"}, 'expected a number, got "high"', "write a number"),
        ({"enforce_eager": 1}, "expected true or false, got 1", "write true"),
        ({"dtype": "bf16"}, 'expected one of auto, float16, bfloat16, got "bf16"', "did you mean bfloat16"),
        ({"kv_cache_dtype": "int3"}, "expected one of auto, fp8_e4m3", "write one of them"),
    ],
)
@pytest.mark.usefixtures("release")
def test_what_vllm_would_refuse(args: dict[str, Any], what: str, step: str) -> None:
    found = wrong_argument("vllm", args)
    assert found is not None and what in found.what and step in found.next_step
    assert found.name == next(iter(args))


@pytest.mark.usefixtures("release")
def test_what_vllm_takes() -> None:
    fine = {"max_num_seqs": None, "gpu_memory_utilization": 1, "enforce_eager": False, "dtype": "BFloat16"}
    assert wrong_argument("vllm", {**fine, "kv_cache_dtype": "fp8-e4m3", "compilation_config": {"mode": 3}}) is None
    served = {"max_num_seqs": "8", "headless": True, "uvicorn_log_level": "info", "compilation_config.mode": 3}
    assert wrong_argument("vllm_server", served) is None
    found = wrong_argument("vllm_server", {"max_num_seq": 8})
    assert found is not None and "max_num_seqs" in found.next_step
    taken = wrong_argument("vllm_server", {"port": 8000})
    assert taken is not None and "sets it itself" in taken.what
    assert wrong_argument("simulated", {"anything": 1}) is None


def test_without_vllm_the_table_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_args, "installed", lambda: None)
    assert wrong_argument("vllm", {"max_num_seqs": 8, "max_num_partial_prefills": 1, "max_num_active_seqs": 1}) is None
    found = wrong_argument("vllm", {"tensor_paralel_size": 8})
    assert found is not None and found.what.startswith("no vLLM from 0.26 to 0.33 has an engine argument")
    assert "tensor_parallel_size" in found.next_step


def test_unknown_sources_are_no_answer(tmp_path: Path) -> None:
    assert vllm_args.declared(tmp_path) is None
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "arg_utils.py").write_text("class Something:\n    x: int = 1\n")
    assert vllm_args.declared(tmp_path) is None


def test_the_table_is_that_of_the_installed_release() -> None:
    """The table's column for the installed release equals what its sources declare."""
    found = vllm_args.installed()
    version = vllm_versions.installed_version()
    if found is None or version is None:
        pytest.skip("vLLM is not installed")
    release = tuple(map(int, version.split(".")[:2]))

    def of_release(part: str) -> set[str]:
        spans = vllm_args.table()[part].items()
        return {n for n, (a, b) in spans if _number(a) <= release <= _number(b)}

    assert of_release("engine") == set(found.engine)
    assert of_release("server") == set(found.server)


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))
