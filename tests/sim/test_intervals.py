"""Intervals between models: every group weighs the same, and a group is graded by the others alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.sim.ground_truth import serving_points
from bench.sim.intervals import between_groups, left_out_coverage, read_left_out
from bench.sim.step_time import build_step_time


def test_a_group_counts_once_however_many_rows_it_has() -> None:
    groups = {f"g{i}": [i * 0.1] * 3 for i in range(10)}
    many = {**groups, "g0": [0.0] * 300}
    assert between_groups(many) == pytest.approx(between_groups(groups), rel=0.02)


def test_the_interval_covers_nine_tenths_of_new_groups_of_the_same_kind() -> None:
    random = np.random.default_rng(0)
    groups = {f"g{i}": random.normal(random.normal(0, 0.3), 0.1, 20).tolist() for i in range(40)}
    assert 0.83 <= np.mean(list(left_out_coverage(groups).values())) <= 0.96


def test_a_group_does_not_widen_the_interval_that_grades_it() -> None:
    groups = {"odd": [2.0] * 5, **{f"g{i}": [-0.05, 0.0, 0.05] for i in range(30)}}
    assert left_out_coverage(groups)["odd"] == 0.0


def test_left_out_errors_are_of_rows_that_exist() -> None:
    known = {p.id for p in serving_points()[0]}
    left = read_left_out()
    assert len(left) > 100 and set(left) <= known


def test_a_broken_file_of_left_out_errors_is_told(tmp_path: Path) -> None:
    path = tmp_path / "left_out.csv"
    path.write_text("id,tpot\na,0.1\n")
    with pytest.raises(BadInput, match="left-out"):
        read_left_out(path)


def test_an_engine_that_was_fitted_gets_the_narrow_interval_and_no_other() -> None:
    def width(model: str, gpu: str, quantization: str | None) -> float:
        interval = build_step_time(load_model(model), load_hardware(gpu), quantization=quantization).interval("tpot")
        assert interval is not None
        return interval.high_ratio - interval.low_ratio

    fitted = width("llama-3.3-70b", "h200-sxm", "fp8")  # the architecture of 3.1
    assert fitted < 0.2
    for other in (
        ("llama-3.3-70b", "h200-sxm", "none"),
        ("llama-3.1-8b", "h100-sxm", "fp8"),
        ("llama-3.3-70b", "a100-80-sxm", "fp8"),
    ):
        assert width(*other) > 3 * fitted
