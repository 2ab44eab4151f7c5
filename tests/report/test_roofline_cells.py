"""Measured and simulated cells on the roofline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.report.charts import draw
from bench.report.model import Chart
from bench.report.roofline_cells import cell_points
from bench.report.roofline_picture import CellPoint, KernelPoint, RooflineData
from bench.roofline import Ceilings, run_work
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


def test_labels_hold_what_tells_cells_apart(tmp_path: Path) -> None:
    sweep = {"grid": {"batch_size": [4, 64], "isl": [64, 256], "quantization": [None, "fp8"]}}
    folder, _ = write_experiment(tmp_path, experiment(sweep=sweep, workload={"isl": 64, "osl": 16}), repeats=1)
    points, _ = cell_points(folder)
    assert len({p.label for p in points}) == len({p.short for p in points}) == 8
    assert "TP 1, batch size 64, ISL 256, quantization none" in {p.label for p in points}
    assert "batch 4, ISL 64, quantization fp8" in {p.short for p in points}


@pytest.mark.parametrize("num_cells", [1, 5, 60])
def test_names_of_cells_overlap_nothing(num_cells: int) -> None:
    rng = np.random.default_rng(num_cells)
    cells = tuple(
        CellPoint(f"TP 1, batch {i}", float(3e11 * (1 + 0.2 * x)), float(2e10 * (1 + 0.2 * y)), short=f"batch {i}, ISL 1024")
        for i, (x, y) in enumerate(rng.random((num_cells, 2)))
    )  # fmt: skip
    kernels = tuple(KernelPoint("gemm", 2e11 * (i + 1), 10.0 + i) for i in range(5))
    ceilings = Ceilings("device", {"bf16": 1e12}, 1e11, 0.0, "data sheet")
    data = RooflineData(ceilings, ("bf16",), cells, kernels)
    figure = draw(Chart("roofline", "Roofline", "An answer.", roofline=data))
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    (axes,) = figure.axes
    boxes = [t.get_window_extent(renderer) for t in axes.texts] + [axes.get_legend().get_window_extent(renderer)]
    named = [t for t in axes.texts if t.get_text().startswith("batch")]
    assert 1 <= len(named) <= num_cells and (num_cells > 5 or len(named) == num_cells)
    for a, box in enumerate(boxes):
        assert all(not box.padded(-1).overlaps(other.padded(-1)) for other in boxes[a + 1 :])


def test_cells_of_several_gpus_are_held_against_their_own_ceilings(tmp_path: Path) -> None:
    from bench.analysis.summary import summarise_cell
    from bench.report.roofline_chart import rooflines
    from bench.store import list_runs

    engine = {"kind": "simulated", "gpu": "H100-SXM"}
    sweep = {"grid": {"engine.gpu": ["H100-SXM", "A100-80-SXM"], "batch_size": [4, 64]}}
    work = {"isl": 64, "osl": 16}
    folder, cells = write_experiment(tmp_path, experiment(engine=engine, sweep=sweep, workload=work), repeats=1)
    summaries = [summarise_cell(list_runs(folder / c.cell_id)) for c in cells]
    found = rooflines(folder, summaries)
    charts = [chart for _, chart, _ in found if chart is not None]
    assert [c.title for c in charts] == ["Roofline of H100-SXM", "Roofline of A100-80-SXM"]
    assert [c.name for c in charts] == ["roofline_h100_sxm", "roofline_a100_80_sxm"]
    for chart in charts:
        assert chart.roofline is not None and len(chart.roofline.cells) == 2
        assert "simulated" in chart.origin_label and chart.roofline.ceilings.name in chart.title
    (alone,) = rooflines(folder, summaries[:2])
    assert alone[1] is not None and alone[1].name == "roofline"
    points, left_out = cell_points(folder, gpu="A100-80-SXM")
    assert len(points) == 2 and all("of H100-SXM, not of A100-80-SXM" in line for line in left_out)
