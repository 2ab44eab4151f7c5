"""A simulated engine that cannot be: bad input, at its line, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.config.loading import load
from bench.errors import BadInput
from bench.runner.feasible import Machine, why_not
from bench.runner.local import LocalRunner
from bench.runner.models import load_archs
from bench.runner.progress import display_for
from bench.runner.run_time import rough_run_s
from bench.runner.simulated import check_simulated
from bench.sim.profile import PARAMETERS, Layout, Profile, save_profile

EXPERIMENT = """name: simulated-checks
why: a test
model: {model}
weights: dummy
engine:
  kind: simulated
  gpu: {gpu}
{profile}load: {{kind: closed_loop, concurrency: 2}}
workload: {{isl: 100, osl: 20}}
sweep:
  grid:
    tensor_parallel_size: [1, 2]
"""
MACHINE = Machine(0, None, None, 2, 8 * 2**30, False)


def written(folder: Path, *, model: str = "llama-3.1-8b", gpu: str = "H100-SXM", profile: Path | None = None) -> Path:
    path = folder / "experiment.yaml"
    line = f"  profile: {profile}\n" if profile else ""
    path.write_text(EXPERIMENT.format(model=model, gpu=gpu, profile=line))
    return path


def complaint(path: Path) -> str:
    loaded = load(path)
    archs = load_archs([c.spec.model for c in loaded.cells])
    with pytest.raises(BadInput) as found:
        check_simulated(loaded, archs)
    results = path.parent / "results"
    with pytest.raises(BadInput, match="engine") as again:
        LocalRunner(loaded, results, display_for("plain"), MACHINE, archs, {}).run()
    assert str(again.value) == str(found.value) and not results.exists()
    return str(found.value)


def profile(folder: Path, model: str = "llama-3.1-8b", hardware: str = "H100-SXM", **layout: Any) -> Path:
    errors = {
        "cells": {"c": 0.05},
        "method": "",
        "step_median_ape": 0.1,
        "step_p90_ape": 0.2,
        "cell_time_mean_ape": 0.1,
    }
    made = Profile(
        "mine", Layout(model, hardware, **layout), dict.fromkeys(PARAMETERS, 1.0), errors, 100, ("e/c/r",), ""
    )
    return save_profile(made, folder)


def test_a_gpu_that_is_not_known(tmp_path: Path) -> None:
    said = complaint(written(tmp_path, gpu="H1000"))
    assert "experiment.yaml:7: engine.gpu: unknown hardware 'H1000'; did you mean H100-SXM" in said


def test_profiles_that_are_none(tmp_path: Path) -> None:
    said = complaint(written(tmp_path, profile=tmp_path / "none.json"))
    assert "experiment.yaml:8: engine.profile:" in said and "none.json: cannot read: No such file" in said
    (tmp_path / "empty.json").write_text("")
    assert "empty.json: not a calibration profile" in complaint(written(tmp_path, profile=tmp_path / "empty.json"))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"model": "qwen-3-8b"}, "calibrated with model qwen-3-8b, not llama-3.1-8b"),
        ({"hardware": "A100-80-SXM"}, "calibrated with hardware A100-80-SXM, not H100-SXM"),
        ({}, "calibrated with tensor_parallel_size 1, not 2"),
    ],
)
def test_profiles_of_another_engine(tmp_path: Path, made: dict[str, Any], words: str) -> None:
    assert words in complaint(written(tmp_path, profile=profile(tmp_path, **made)))


def test_what_does_not_fit_is_said_cell_by_cell(tmp_path: Path) -> None:
    loaded = load(written(tmp_path, model="llama-3.1-70b", gpu="H200-SXM"))
    archs = load_archs(["llama-3.1-70b"])
    check_simulated(loaded, archs)
    one, two = (why_not(c, MACHINE, archs["llama-3.1-70b"]) for c in loaded.cells)
    assert one is not None and "does not fit H200-SXM" in one
    assert two is None


def test_virtual_time_takes_no_time(tmp_path: Path) -> None:
    loaded = load(written(tmp_path))
    assert rough_run_s(loaded.cells[0], MACHINE, load_archs(["llama-3.1-8b"])["llama-3.1-8b"]) < 5
