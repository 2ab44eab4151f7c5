"""Damaged results: a report comes out, or one clear line, never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.report.build import build
from bench.report.markdown import render
from bench.report.write import write_report
from bench.store import list_cells, list_runs
from tests.analysis.synthetic import experiment, write_experiment

JUNK: tuple[Any, ...] = (None, "", "text", -1, 0, 1e308, [], {}, [{}], {"x": None}, True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = experiment(sweep={"grid": {"tensor_parallel_size": [1, 2], "batch_size": [1, 4]}})
    return write_experiment(tmp_path_factory.mktemp("small"), exp, repeats=2)[0]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside nested JSON."""
    out = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        out += places(v, (*path, k))
    return out


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for k in path[:-1]:
        value = value[k]
    value[path[-1]] = new


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_any_value_may_be_junk(small: Path, tmp_path: Path, seed: int, name: str) -> None:
    rng = random.Random(f"{name}{seed}")
    copy = tmp_path / "synthetic"
    shutil.copytree(small, copy)
    path = copy / name if name == "plan.json" else rng.choice(list_runs(rng.choice(list_cells(copy)))).folder / name
    data = json.loads(path.read_text())
    for place in rng.sample(places(data), 3):
        try:
            put(data, place, rng.choice(JUNK))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation took the place away
    path.write_text(json.dumps(data))
    try:
        report, _, _ = build(copy)
    except BenchError as e:
        assert "\n" not in str(e)
        return
    assert render(report)


@pytest.mark.parametrize(
    "name", ["requests.jsonl", "engine_steps.arrow", "telemetry.arrow", "summary.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["torn", "empty", "gone", "garbage"])
def test_any_file_may_be_damaged(small: Path, tmp_path: Path, name: str, how: str) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(small, copy)
    build(copy)  # stores summaries
    path = list_runs(list_cells(copy)[0])[0].folder / name
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"torn": data[: len(data) * 2 // 3], "empty": b"", "garbage": bytes(range(256)) * 8}[how])
    report, found, _ = build(copy)
    assert len(found.summaries) >= 3 and report.answers
    if name == "requests.jsonl" and how == "torn":
        codes = {d.warning.code for d in report.doubts}
        assert "torn-file" in codes or "changed-files" in codes


def test_an_unreadable_plan_is_one_line(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(small, copy)
    (copy / "plan.json").write_text("{")
    with pytest.raises(BenchError, match=r"plan\.json: cannot be read"):
        write_report(copy)
