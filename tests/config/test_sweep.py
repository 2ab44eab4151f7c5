"""Expansion: which cells, in which order, under which names."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.config.experiment import Experiment, NominalLengthSpec, WorkloadSpec, max_length_tokens, mean_length_tokens
from bench.config.loading import load
from bench.config.sweep import apply_axes, expand, sweep_points

BASE = """
name: sweep
why: to be expanded
model: tiny-llama
weights: dummy
engine: {kind: vllm, args: {max_model_len: 512}}
load: {kind: offline}
workload: {shape: 128/128}
"""


def load_text(tmp_path: Path, text: str):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    return load(path)


def test_grid_is_the_product_first_axis_slowest(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, BASE + "sweep: {grid: {tensor_parallel_size: [1, 2], batch_size: [1, 8]}}\n")
    axes = [c.axes_dict() for c in loaded.cells]
    assert axes == [
        {"tensor_parallel_size": 1, "batch_size": 1},
        {"tensor_parallel_size": 1, "batch_size": 8},
        {"tensor_parallel_size": 2, "batch_size": 1},
        {"tensor_parallel_size": 2, "batch_size": 8},
    ]
    assert [c.spec.tensor_parallel_size for c in loaded.cells] == [1, 1, 2, 2]
    assert len({c.engine_key for c in loaded.cells}) == 2
    assert all(c.cell_id.startswith(f"tp{c.spec.tensor_parallel_size}-bs") for c in loaded.cells)


def test_points_come_after_the_grid_and_twice_is_once(tmp_path: Path) -> None:
    sweep = "sweep: {grid: {batch_size: [1, 8]}, points: [{batch_size: 8}, {batch_size: 3, shape: 8k/1k}]}\n"
    loaded = load_text(tmp_path, BASE.replace("512", "16384") + sweep)
    assert [c.spec.load.batch_size for c in loaded.cells] == [1, 8, 3]
    assert loaded.cells[2].spec.workload.isl.tokens == 8192


def test_expand_gives_the_same_cells_as_loading_apart_from_the_model_file(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, BASE + "sweep: {grid: {batch_size: [1, 8], osl: [4, {kind: nominal, tokens: 9}]}}\n")
    assert [c.spec for c in expand(loaded.experiment)] == [c.spec for c in loaded.cells]


def test_a_cell_is_named_by_what_it_measures_only(tmp_path: Path) -> None:
    sweep = "sweep: {grid: {batch_size: [1]}}\n"
    a = load_text(tmp_path, BASE + sweep).cells[0]
    renamed = load_text(tmp_path, BASE.replace("to be expanded", "another why") + sweep + "repeats: 9\n").cells[0]
    changed = load_text(tmp_path, BASE.replace("512", "513") + sweep).cells[0]
    assert a.cell_id == renamed.cell_id
    assert a.cell_id != changed.cell_id


def test_a_changed_architecture_is_another_cell(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    text = BASE.replace("tiny-llama", str(model)) + "sweep: {grid: {batch_size: [1]}}\n"
    (model / "config.json").write_text('{"a": 1}')
    first = load_text(tmp_path, text).cells[0]
    (model / "config.json").write_text('{"a": 2}')
    assert load_text(tmp_path, text).cells[0].cell_id != first.cell_id


def test_no_sweep_is_one_cell(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, BASE.replace("{kind: offline}", "{kind: offline, batch_size: 2}"))
    assert len(loaded.cells) == 1 and loaded.cells[0].axes == ()


def test_sweep_points_and_unknown_paths() -> None:
    assert sweep_points({}, []) == [{}]
    assert sweep_points({}, [{"a": 1}]) == [{"a": 1}]
    with pytest.raises(ValueError, match="not a path"):
        apply_axes({}, {"nonsense": 1})


def test_lengths() -> None:
    work = WorkloadSpec.model_validate(
        {"isl": {"kind": "nominal", "tokens": 1000}, "osl": {"kind": "normal", "mean": 9, "sd": 2}}
    )
    assert isinstance(work.isl, NominalLengthSpec)
    assert mean_length_tokens(work.isl) == 900
    assert max_length_tokens(work.isl) == 1000
    assert max_length_tokens(work.osl) == 22
    assert WorkloadSpec.model_validate({"shape": "1000/20"}).isl.tokens == 1000


def test_shipped_experiments_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "experiments"
    for path in sorted(folder.glob("*.yaml")):
        loaded = load(path)
        assert isinstance(loaded.experiment, Experiment) and loaded.cells
