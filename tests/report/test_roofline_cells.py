"""Measured and simulated cells on the roofline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.report.roofline_cells import cell_points
from bench.roofline import run_work
from tests.analysis.synthetic import experiment, write_experiment

SWEEP = {"grid": {"tensor_parallel_size": [1, 2], "batch_size": [4, 64]}}


def test_points_are_the_steps_arithmetic_over_the_window(tmp_path: Path) -> None:
    folder, _ = write_experiment(tmp_path, experiment(sweep=SWEEP, workload={"isl": 64, "osl": 32}), repeats=2)
    points, left_out = cell_points(folder)
    assert not left_out and len(points) == 4
    by_label = {p.label: p for p in points}
    p = by_label["TP 1, batch size 64"]
    assert p.origin == "simulated" and p.interval is not None
    assert p.interval[0] <= p.flops_per_s <= p.interval[1]
    # a batch of 64 prompts of 64 tokens in one step, then 31 steps that add a token to each
    work = run_work(load_model("llama-3.1-8b"), [64] * 64, [32] * 64, num_steps=32, num_prefill_steps=1)
    assert p.intensity_flops_per_byte == pytest.approx(work.flops / work.bytes, rel=0.02)
    assert p.intensity_flops_per_byte > by_label["TP 1, batch size 4"].intensity_flops_per_byte
    assert p.flops_per_s > by_label["TP 2, batch size 64"].flops_per_s * 0.8  # per device


def test_the_picture_names_their_origin(tmp_path: Path) -> None:
    from bench.cli import cli

    folder, _ = write_experiment(tmp_path, experiment(sweep=SWEEP, workload={"isl": 64, "osl": 32}), repeats=1)
    out = tmp_path / "roof.svg"
    args = ["roofline", "llama-3.1-8b", "--gpu", "H100", "--results", str(folder), "--out", str(out), "--json"]
    data = json.loads(CliRunner().invoke(cli, args, catch_exceptions=False).output)
    assert {c["origin"] for c in data["cells"]} == {"simulated"}
    assert [Path(p).suffix for p in data["pictures"]] == [".png", ".svg"]


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        cell_points(tmp_path / "none")
    with pytest.raises(BadInput, match="holds no runs"):
        cell_points(tmp_path)
