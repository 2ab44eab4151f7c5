"""Simulated cells carry the intervals that their prediction states, not those over repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.analysis.predicted import OF_PREDICTION, is_of_prediction, prediction_line, with_stated
from bench.analysis.summary import Summary, summarise_cell
from bench.store import list_runs
from tests.analysis.synthetic import experiment, write_experiment

STATED = {"intervals": {"output_tokens_per_s": [0.8, 1.1, 0.9, "rows"], "tpot": [0.5, 1.25, 0.9, "rows"], "ttft": None}}


def cell(folder: Path, origin: str = "simulated", **more: Any) -> Summary:
    engine = {"kind": "simulated", "gpu": "H100-SXM"}
    sweep = {"grid": {"batch_size": [8]}}
    written, cells = write_experiment(folder, experiment(engine=engine, sweep=sweep), repeats=3, origin=origin, **more)
    return summarise_cell(list_runs(written / cells[0].cell_id))


def test_stated_intervals_are_carried(tmp_path: Path) -> None:
    before = cell(tmp_path, simulated=STATED)
    after = with_stated(before)
    for key, low, high in (
        ("output_tokens_per_s", 0.8, 1.1),
        ("total_tokens_per_s", 0.8, 1.1),
        ("requests_per_s", 0.8, 1.1),
        ("tpot_p50_s", 0.5, 1.25),
        ("output_tokens_per_s_per_user", 1 / 1.25, 1 / 0.5),
    ):
        e = after.estimates[key]
        assert e.value == before.estimates[key].value and e.confidence == 0.9 and is_of_prediction(e), key
        assert e.low is not None and e.high is not None
        assert (e.low, e.high) == (pytest.approx(low * e.value), pytest.approx(high * e.value)), key
        assert e.method == f"{OF_PREDICTION} (rows)"
    for key in ("ttft_p50_s", "ttft_service_p50_s", "e2e_p50_s"):
        assert before.estimates[key].low is not None and after.estimates[key].low is None, key
        assert "no interval is stated" in after.estimates[key].method
    line = prediction_line([after.estimates["output_tokens_per_s"], None], "costs")
    assert "costs of simulated throughput: the 90% interval of the prediction itself" in line


def test_repeats_that_spread_further_still_show(tmp_path: Path) -> None:
    narrow = {"intervals": {"output_tokens_per_s": [1.0, 1.0, 0.9, "rows"]}}
    before = cell(tmp_path, simulated=narrow)
    one, other = (s.estimates["output_tokens_per_s"] for s in (before, with_stated(before)))
    assert (other.low, other.high) == (one.low, one.high)


def test_measured_cells_stay_as_they_are(tmp_path: Path) -> None:
    measured = cell(tmp_path, origin="measured")
    assert with_stated(measured) is measured
    assert prediction_line(measured.estimates.values(), "costs") == ""
