"""`bench run`, `status` and `validate` on folders that are damaged, foreign or not writable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli import cli
from bench.errors import BadInput
from bench.runner.results import only_one

EXPERIMENT = """
name: {name}
why: to see what damaged folders do
model: tiny-llama
weights: dummy
engine: {{kind: "null"}}
load: {{kind: offline, batch_size: 2}}
workload: {{isl: 16, osl: 4}}
repeats: 1
telemetry: {{source: {source}}}
"""


def written(tmp_path: Path, name: str = "folders", source: str = "none") -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(EXPERIMENT.format(name=name, source=source))
    return path


def bench(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args])


def run(path: Path, results: Path) -> Any:
    return bench("run", path, "--results", results, "--json", "--no-report")


def test_an_unreadable_plan_does_not_hide_the_other_experiments(tmp_path: Path) -> None:
    results = tmp_path / "r"
    for name in ("good", "torn"):
        assert run(written(tmp_path, name), results).exit_code == 0
    (results / "runs/torn/plan.json").write_text("{")
    rows = {r["experiment"]: r for r in json.loads(bench("status", "--results", results, "--json").stdout)}
    assert rows["good"]["complete"] == 1 and "plan.json" in rows["torn"]["error"]
    table = bench("status", "--results", results)
    assert table.exit_code == 0 and "good" in table.output and "run `bench run` again" in table.output
    assert run(written(tmp_path, "torn"), results).exit_code == 0  # as the message says
    assert "error" not in json.loads(bench("status", "--results", results, "--json").stdout)[1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BadInput, match="results cannot be written here: Not a directory; make"),
        only_one(tmp_path / "file" / "runs" / "x"),
    ):
        pass


def test_runs_of_another_engine_version_are_not_added_to(tmp_path: Path) -> None:
    path, results = written(tmp_path), tmp_path / "r"
    assert run(path, results).exit_code == 0
    (manifest,) = results.glob("runs/folders/*/run-*/manifest.json")
    data = json.loads(manifest.read_text())
    data["fingerprint"]["engine_version"] = "0.0"
    manifest.write_text(json.dumps(data))
    path.write_text(path.read_text().replace("repeats: 1", "repeats: 2"))
    again = run(path, results)
    assert isinstance(again.exception, BadInput) and "engine_version = '0.0'" in str(again.exception)
    assert len(list(results.glob("runs/folders/*/run-*"))) == 1


@pytest.mark.parametrize("command", ["validate", "run"])
def test_nvml_without_a_gpu_is_refused_before_anything_starts(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENYIELD_RESULTS", str(tmp_path / "r"))
    monkeypatch.setattr("bench.telemetry.gpus.list_gpus", lambda: [])
    monkeypatch.setattr("bench.telemetry.gpus.visible_devices", lambda: ())
    done = bench(command, written(tmp_path, source="nvml"))
    assert isinstance(done.exception, BadInput) and "telemetry.source: no NVIDIA GPU" in str(done.exception)
    assert not (tmp_path / "r").exists()


def test_only_looks_at_names_and_whole_ids() -> None:
    from bench.cli.run import _names

    assert _names("c1", "tp1-c1-f166124f") and _names("f166124f", "tp1-c1-f166124f")
    assert not _names("c1", "tp1-c2-7c1b6c58")
    assert _names("tp1-c2-7c1b6c58", "tp1-c2-7c1b6c58")
