"""What a manifest says of machine, software and code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import bench
from bench.provenance import collect, facts
from bench.provenance.facts import git_facts, package_versions


def test_collect_is_json_and_says_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "verysecret1")
    found = collect(["bench", "run", "--api-key", "verysecret1", os.path.expanduser("~/x.yaml")])
    text = json.dumps(found)
    assert "verysecret1" not in text
    assert found["command_line"] == ["bench", "run", "--api-key", "***", "~/x.yaml"]
    assert found["environment"]["VLLM_API_KEY"] == "***"
    assert found["tool"]["version"] == bench.__version__
    assert found["packages"]["numpy"]
    assert found["cpu"]["num_threads"] == os.cpu_count()
    assert found["memory"]["total_bytes"] > 0
    assert found["host"]["kernel"] == os.uname().release
    assert isinstance(found["gpus"], list)


def test_no_absolute_path_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = collect([str(tmp_path / "bin/bench"), "run", str(tmp_path / "x.yaml"), f"--out={tmp_path}"], {})
    assert found["command_line"] == ["bench", "run", "./x.yaml", "--out=."]
    assert collect(["/somewhere/bench/__main__.py", "run"], {})["command_line"] == ["bench", "run"]
    assert str(Path(bench.__file__).parents[1]) not in json.dumps(found)


def test_absent_packages_are_left_out() -> None:
    assert package_versions(["numpy", "no-such-package-here"]).keys() == {"numpy"}


def test_a_machine_that_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError

    for name in ("_host", "cpu_facts", "_memory", "git_facts", "torch_cuda_version"):
        monkeypatch.setattr(facts, name, fails)
    found = collect([])
    assert found["host"] is None and found["cpu"] is None and found["tool"]["git"] is None
    json.dumps(found)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_commit_and_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "x")
    (tmp_path / "untracked").write_text("1")
    clean = git_facts(tmp_path)
    assert clean is not None and clean["dirty"] is False and len(clean["commit"]) == 40 and clean["branch"] == "main"
    (tmp_path / "a").write_text("2")
    changed = git_facts(tmp_path)
    assert changed is not None and changed["dirty"] is True and changed["num_changed_files"] == 1
    # a package installed below somebody else's repository does not take on its commit
    (tmp_path / "lib").mkdir()
    assert git_facts(tmp_path / "lib") is None


def test_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_facts(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_facts(tmp_path) is None
