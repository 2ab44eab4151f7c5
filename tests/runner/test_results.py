"""The folder of an experiment: what cannot be written, and which cells of earlier calls belong together."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.config.sweep import expand, make_cell
from bench.errors import StoreError
from bench.runner.results import comparable_cells, experiment_folder, write_resolved
from tests.analysis.synthetic import experiment


def test_a_results_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot write results here: Not a directory.*--results DIR"):
        write_resolved(experiment_folder("x", tmp_path / "runs"), experiment(), (), {})


def test_calls_that_differ_in_load_alone_are_reported_together(tmp_path: Path) -> None:
    plain = experiment(sweep={"grid": {}})
    (cell,) = expand(plain)
    assert comparable_cells(tmp_path, cell.spec) == [], "no plan yet"
    write_resolved(tmp_path, plain, (cell,), {})
    loaded = cell.spec.model_copy(update={"load": cell.spec.load.model_copy(update={"batch_size": 32}), "seed": 5})
    assert comparable_cells(tmp_path, loaded) == [make_cell(cell.axes_dict(), cell.spec)]
    other = cell.spec.model_copy(update={"workload": cell.spec.workload.model_copy(update={"prefix": "other"})})
    assert comparable_cells(tmp_path, other) == []
