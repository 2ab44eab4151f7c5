"""Predictions beside measurements: which belong together, whether intervals held, and what the profile was fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.analysis.predicted import Stated
from bench.report.build import build
from bench.report.model import Table
from bench.report.prediction import _widest
from bench.sim.profile import PARAMETERS, Layout, Profile, save_profile
from tests.analysis.synthetic import experiment, write_experiment

SWEEP = {"grid": {"batch_size": [1, 16]}}
NARROW, WIDE = [0.999999, 1.000001, 0.9, "nothing"], [0.5, 1.5, 0.9, "3 cells"]


def profile_on(runs: tuple[str, ...], created_utc: str = "2026-01-01T00:00:00+00:00") -> Profile:
    return Profile(
        "cal", Layout("llama-3.1-8b", "H100-SXM"), dict.fromkeys(PARAMETERS, 1.0), {"cells": {}}, 100, runs, created_utc
    )


def laid_over(
    folder: Path,
    profile: Profile | None = None,
    gpu: str = "H100-SXM",
    kept: dict[str, Any] | None = None,
    **manifest: Any,
) -> Table | None:
    """The table of a measured experiment and a prediction of it, two cells each.

    ``profile`` is the file that the prediction's cells name, ``kept`` what its manifests keep of the one that they used.
    """
    ours, _ = write_experiment(folder / "m", experiment(name="synthetic", sweep=SWEEP), repeats=1, origin="measured")
    engine: dict[str, Any] = {"kind": "simulated", "gpu": gpu}
    simulated: dict[str, Any] = {"intervals": {"output_tokens_per_s": WIDE, "tpot": NARROW}}
    if profile is not None:
        engine["profile"] = str(save_profile(profile, folder / "profiles"))
        simulated["step_time_source"] = profile.source
    if kept is not None:
        simulated["profile"] = kept
    guess = experiment(name="guess", sweep=SWEEP, engine=engine)
    theirs, _ = write_experiment(folder / "s", guess, repeats=1, seed=3, noise=0.05, simulated=simulated, **manifest)
    report, _, _ = build(ours, beside=[theirs])
    return next((t for t in report.tables if t.name == "prediction"), None)


def column(table: Table, title: str) -> list[str]:
    at = [c.title for c in table.columns].index(title)
    return [row[at].text for row in table.rows]


def test_intervals_are_printed_and_judged(tmp_path: Path) -> None:
    table = laid_over(tmp_path)
    assert table is not None
    assert column(table, "Output, in 90 % interval") == ["inside", "inside"]
    assert column(table, "TPOT p50, in 90 % interval") == ["OUTSIDE", "OUTSIDE"]
    titles = [c.title for c in table.columns]
    assert "TTFT p50, in 90 % interval" not in titles and "E2E p50, in 90 % interval" not in titles  # none is stated
    guess = table.rows[0][titles.index("Output, simulated")]
    low, high = (float(t.replace(",", "")) for t in guess.detail.split(" – "))
    assert isinstance(guess.sort, float)
    assert low == pytest.approx(0.5 * guess.sort, rel=0.01) and high == pytest.approx(1.5 * guess.sort, rel=0.01)
    assert "All cells (2), measured value inside the stated interval: Output 2 of 2, TPOT p50 0 of 2." in table.note
    assert "Intervals from: 3 cells; nothing." in table.note
    assert "Profile fitted on this cell" not in titles and "profile" not in table.note


def test_a_report_of_predictions_alone_says_how_far_they_may_be_off(tmp_path: Path) -> None:
    simulated = {"intervals": {"output_tokens_per_s": WIDE, "tpot": [0.9, 1.25, 0.9, "rows"], "ttft": None}}
    guess = experiment(name="guess", sweep=SWEEP, engine={"kind": "simulated", "gpu": "H100-SXM"})
    folder, _ = write_experiment(tmp_path / "s", guess, repeats=2, simulated=simulated)
    report, _, _ = build(folder)
    (line,) = [text for text in report.keep_in_mind if "may be off" in text]
    assert "H100-SXM" in line and "90 %" in line and "tokens/s 0.50 to 1.50" in line and "TPOT 0.90 to 1.25" in line
    assert "TTFT" not in line
    measured, _ = write_experiment(tmp_path / "m", experiment(name="m", sweep=SWEEP), repeats=2, origin="measured")
    report, _, _ = build(measured)
    assert not any("may be off" in text for text in report.keep_in_mind)


def test_cells_with_intervals_of_their_own_share_one_sentence() -> None:
    tpot = Stated(0.9, 1.25, 0.9, "rows")
    powers = [Stated(0.8, 1.4, 0.9, "p"), Stated(0.85, 1.5, 0.9, "p")]
    assert _widest("TPOT", [tpot, tpot]) == "TPOT 0.90 to 1.25 of the value"
    assert _widest("power", powers) == "power 0.80 to 1.50 of the value (the widest; each cell has its own)"


def test_cells_that_the_profile_has_seen_are_marked(tmp_path: Path) -> None:
    ours, cells = write_experiment(tmp_path / "x", experiment(name="synthetic", sweep=SWEEP), repeats=1)
    seen = next((ours / cells[0].cell_id).iterdir()).name
    table = laid_over(tmp_path, profile_on((f"synthetic/{cells[0].cell_id}/{seen}",)))
    assert table is not None
    assert column(table, "Profile fitted on this cell") == ["yes", "no"]
    assert "Cells whose runs the profile was fitted on (1)" in table.note and "never saw (1)" in table.note


def test_a_profile_written_since_tells_nothing(tmp_path: Path) -> None:
    table = laid_over(tmp_path, profile_on(("synthetic/a/b",), created_utc="2026-12-01T00:00:00+00:00"))
    assert table is not None
    assert column(table, "Profile fitted on this cell") == ["not known", "not known"]
    assert "is not known" in table.note and "its file is not there, or has been written anew" in table.note
    assert "never saw" not in table.note


def test_a_prediction_keeps_what_its_profile_was_fitted_on(tmp_path: Path) -> None:
    """The file moved, refitted since, or never at hand: the manifest says it."""
    ours, cells = write_experiment(tmp_path / "x", experiment(name="synthetic", sweep=SWEEP), repeats=1)
    seen = next((ours / cells[0].cell_id).iterdir()).name
    used = profile_on((f"synthetic/{cells[0].cell_id}/{seen}",)).provenance("results/profiles/cal.json")
    assert used["name"] == "cal" and len(used["sha256"]) == 64
    gone = laid_over(tmp_path / "gone", kept=used)
    refitted = laid_over(tmp_path / "refitted", profile_on((), created_utc="2026-12-01T00:00:00+00:00"), kept=used)
    for table in (gone, refitted):
        assert table is not None
        assert column(table, "Profile fitted on this cell") == ["yes", "no"]
        assert "is not known" not in table.note
    damaged = laid_over(tmp_path / "damaged", kept={"runs": 7})
    assert damaged is not None and "Profile fitted on this cell" not in [c.title for c in damaged.columns]


def test_another_device_or_fleet_is_no_prediction_of_this(tmp_path: Path) -> None:
    assert laid_over(tmp_path / "a", gpu="A100-80-SXM") is None
    other = experiment(
        name="guess", sweep=SWEEP, engine={"kind": "simulated", "gpu": "H100-SXM", "fleet": {"engines": 2}}
    )
    ours, _ = write_experiment(tmp_path / "m", experiment(name="synthetic", sweep=SWEEP), repeats=1, origin="measured")
    theirs, _ = write_experiment(tmp_path / "s", other, repeats=1)
    assert all(t.name != "prediction" for t in build(ours, beside=[theirs])[0].tables)


def test_a_prediction_without_a_name_is_found_by_its_task(tmp_path: Path) -> None:
    table = laid_over(tmp_path, predicts="junk")
    assert table is not None and len(table.rows) == 2
