"""The folder of an experiment: what cannot be written, and which cells of earlier calls belong together."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.config.sweep import expand
from bench.errors import StoreError
from bench.runner.results import comparable_cells, experiment_folder, write_resolved
from tests.analysis.synthetic import experiment, write_run


def test_a_results_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot write results here: Not a directory.*--results DIR"):
        write_resolved(experiment_folder("x", tmp_path / "runs"), experiment(), (), {})


def test_calls_that_differ_in_load_alone_are_reported_together(tmp_path: Path) -> None:
    small, large = expand(experiment(sweep={"grid": {"batch_size": [1, 16]}}))
    assert comparable_cells(tmp_path / "none", small.spec) == []
    write_run(tmp_path, small, 1)
    write_run(tmp_path, small, 2, t0_s=10)
    write_run(tmp_path, large, 1, t0_s=20)
    (tmp_path / "damaged").mkdir()
    assert comparable_cells(tmp_path, large.spec) == [small, large]
    other = small.spec.model_copy(update={"workload": small.spec.workload.model_copy(update={"prefix": "other"})})
    assert comparable_cells(tmp_path, other) == []
