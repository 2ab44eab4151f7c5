"""Calibration: it finds what made the steps, says how well, and refuses what cannot be decided."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.cli.calibrate import command
from bench.errors import BadInput
from bench.records import EngineInfo, EngineStep, RequestRecord
from bench.sim import step_time_kernel as kernel
from bench.sim.calibrate import base_array, calibrate, design, engine_of, fit, request_overheads, solve, steps_of_runs
from bench.sim.profile import PARAMETERS, Layout, Profile, load_profile, save_profile
from bench.sim.step_time import build_step_time
from bench.store import RunReader, RunWriter

CPU = Layout("tiny-llama", load_hardware("cpu").name, enforce_eager=True)
TRUTH = dict(zip(PARAMETERS, (2.0, 3.0, 1.5, 2e-3, 5e-5, 1e-6, 1e-3), strict=True))


def true_time_s(prefill: tuple[int, int], decode: tuple[int, int]) -> float:
    """Seconds of a step by a known machine: (prompts, tokens each), (decodes, context each)."""
    array, _, _ = base_array(CPU)
    k, p = kernel, TRUTH
    for position in (k.HOST_FIXED_S, k.GAP_S, k.GAP_PER_RUNNING_S, k.SKEW_RATIO):
        array[position] = 0.0
    for position, name in (
        (k.LINEAR_SCALE, "linear_scale"), (k.DECODE_ATTENTION_SCALE, "decode_attention_scale"),
        (k.PREFILL_ATTENTION_SCALE, "prefill_attention_scale"), (k.GPU_FIXED_S, "fixed_s"),
        (k.GPU_PER_REQUEST_S, "per_request_s"), (k.GPU_PER_PREFILL_TOKEN_S, "per_prefill_token_s"),
        (k.GPU_PREFILL_FIXED_S, "prefill_fixed_s"),
    ):  # fmt: skip
        array[position] = p[name]
    n, each = prefill
    b, context = decode
    return kernel.step_time_s(array, n, n * each, n * each * (each + 1) / 2, 0, b, b * context, context, n + b)[0]


def write_run(
    root: Path,
    batch: int,
    isl: int,
    *,
    origin: str = "measured",
    noise: float = 0.02,
    seed: int = 0,
    tp: int = 1,
    num_steps: int = 80,
) -> Path:
    """A run folder with the steps that the known machine would have taken."""
    rng = np.random.default_rng(seed)
    folder = root / "exp" / f"bs{batch}-{isl}-tp{tp}" / "run-1-20260101T000000Z"
    manifest = {
        "experiment": "exp", "cell_id": folder.parent.name, "origin": origin,
        "cell": {"model": "tiny-llama", "engine": {"kind": "vllm", "args": {"enforce_eager": True, "tensor_parallel_size": tp}}},
        "engine": dataclasses.asdict(EngineInfo("vllm", "0.32.0", {"enforce_eager": True}, 0, num_kv_blocks=512, block_size=128)),
    }  # fmt: skip
    writer = RunWriter(folder, manifest)
    t = 0.0
    for i in range(num_steps):
        prompt = i % 20 == 0
        prefill, decode = ((batch, isl), (0, 0)) if prompt else ((0, 0), (batch, isl + i % 20))
        step_s = true_time_s(prefill, decode) * (1 + noise * rng.standard_normal())
        t += step_s
        writer.append_step(
            EngineStep(
                i, t, None if i == 0 else step_s, batch, 0, 0.1, batch * isl if prompt else 0, 0 if prompt else batch,
                batch if prompt else 0, 0 if prompt else batch, 0 if prompt else batch * (isl + i % 20 - 1),
            )
        )  # fmt: skip
    writer.append_request(
        RequestRecord(0, "measured", isl, 20, 0.0, 0.0, 0.11, 1.0, 1.0, queued_s=0.004, engine_first_token_s=0.109)
    )
    writer.finish("complete")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[RunReader]:
    folders = [write_run(tmp_path, b, isl, seed=b) for b, isl in ((1, 64), (4, 64), (16, 64), (4, 256), (16, 256))]
    return [RunReader.open(f) for f in folders]


def test_a_run_without_steps_is_no_run_that_was_fitted_on(runs: list[RunReader], tmp_path: Path) -> None:
    """As of a server: a report would take its cell for a fitted one."""
    bare = RunReader.open(write_run(tmp_path, 2, 64, num_steps=0))
    assert calibrate([*runs, bare], "p").runs == calibrate(runs, "p").runs and len(runs) == 5


def test_it_finds_the_machine_that_made_the_steps(runs: list[RunReader]) -> None:
    profile = calibrate(runs, "p")
    built = build_step_time(load_model("tiny-llama"), load_hardware("cpu"), enforce_eager=True, profile=profile)
    assert built.trust == "user-runs" and "5 recorded runs" in built.source
    # loads that were never recorded
    for prefill, decode in (((0, 0), (8, 100)), ((2, 128), (0, 0)), ((1, 200), (8, 90)), ((0, 0), (12, 300))):
        n, each = prefill
        b, context = decode
        found = kernel.step_time_s(
            built.coefficients(), n, n * each, n * each * (each + 1) / 2, 0, b, b * context, context, n + b
        )
        assert found[0] == pytest.approx(true_time_s(prefill, decode), rel=0.06)
    assert built.request_overhead_s() == (pytest.approx(0.004), pytest.approx(0.001))


def test_the_error_is_of_cells_left_out(runs: list[RunReader]) -> None:
    errors = calibrate(runs, "p").errors
    assert errors["method"] == "leave one cell out" and len(errors["cells"]) == 5
    assert errors["step_median_ape"] < 0.05
    # a machine that behaves otherwise at one batch size shows in the error
    steps = steps_of_runs(runs)
    odd = dataclasses.replace(steps, time_s=np.where(steps.cell == 0, steps.time_s * 2, steps.time_s))
    from bench.sim.calibrate import cross_validate

    assert (
        cross_validate(design(odd, base_array(CPU)[0]), odd, False)["cell_time_mean_ape"]
        > 3 * errors["cell_time_mean_ape"]
    )


def test_a_stray_slow_step_does_not_bend_the_fit(runs: list[RunReader]) -> None:
    steps = steps_of_runs(runs)
    matrix = design(steps, base_array(CPU)[0])
    clean = matrix @ solve(matrix, steps.time_s, False)
    slow = steps.time_s.copy()
    slow[::25] *= 10
    assert np.median(np.abs(matrix @ solve(matrix, slow, False) / clean - 1)) < 0.03


def test_the_fit_adds_up_to_the_recorded_time_and_not_to_the_median_step(runs: list[RunReader]) -> None:
    """Rates follow from the mean step. A tail of slow steps raises it; an accident counts for three steps, not for forty."""
    steps = steps_of_runs(runs)
    matrix = design(steps, base_array(CPU)[0])
    clean = float((matrix @ fit(matrix, steps.time_s, False)).sum())
    assert clean == pytest.approx(steps.time_s.sum(), rel=0.01)
    tail, accident = steps.time_s.copy(), steps.time_s.copy()
    tail[::10] *= 1.5
    accident[::40] *= 40
    assert (matrix @ fit(matrix, tail, False)).sum() == pytest.approx(tail.sum(), rel=0.01)
    assert (matrix @ solve(matrix, tail, False)).sum() < 0.97 * tail.sum()
    assert (matrix @ fit(matrix, accident, False)).sum() == pytest.approx(clean * (1 + 2 / 40), rel=0.02)


def test_an_engine_on_another_clock_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 4, 64)
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    for shifted, what in (
        ({"queued_s": -2.0}, "before they were sent"),
        ({"engine_first_token_s": 5.0}, "after the client"),
    ):
        (folder / "requests.jsonl").write_text("".join(json.dumps({**line, **shifted}) + "\n" for line in lines))
        with pytest.raises(BadInput, match=f"not on the client's clock.*{what}"):
            request_overheads([RunReader.open(folder)])


def test_parameters_are_never_negative(runs: list[RunReader]) -> None:
    assert all(v >= 0 for v in calibrate(runs, "p").parameters.values())


def test_one_batch_size_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = RunReader.open(write_run(tmp_path, 4, 64, num_steps=160))
    with pytest.raises(BadInput, match=r"at least 3 batch sizes.*found: 4.*prompts of different lengths"):
        calibrate([run], "p")


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 60"):
        calibrate([RunReader.open(write_run(tmp_path, 4, 64, num_steps=20))], "p")


def test_simulated_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="only measured runs"):
        calibrate([RunReader.open(write_run(tmp_path, 4, 64, origin="simulated"))], "p")


def test_runs_of_two_engines_are_refused(tmp_path: Path) -> None:
    two = [RunReader.open(write_run(tmp_path, 4, 64, tp=tp)) for tp in (1, 2)]
    with pytest.raises(BadInput, match="tensor_parallel_size: 1 and 2"):
        calibrate(two, "p")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"args": {"data_parallel_size": 2}}, "data_parallel_size: 1 and 2"),
        ({"bound": "1"}, "VLLM_CPU_OMP_THREADS_BIND: 0 and 1"),
        ({"bound": None}, "VLLM_CPU_OMP_THREADS_BIND: 0 and None"),
        ({"num_usable": 1}, "usable cores: 2 and 1"),
        ({"args": {"dtype": "float32"}}, "dtype: auto and float32"),
    ],
)
def test_engines_that_share_or_change_cores_are_told_apart(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    def bound_run(
        name: str, args: dict[str, Any] | None = None, bound: str | None = "0", num_usable: int = 2
    ) -> RunReader:
        folder = write_run(tmp_path / name, 4, 64)
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["cell"]["engine"]["args"].update(args or {})
        manifest["engine"]["notes"] = {"environment": {"VLLM_CPU_OMP_THREADS_BIND": bound} if bound else {}}
        manifest["provenance"] = {"cpu": {"num_usable": num_usable}}
        path.write_text(json.dumps(manifest))
        return RunReader.open(folder)

    two = [bound_run("one"), bound_run("other", **change)]
    with pytest.raises(BadInput, match=f"different engines .{words}.; calibrate one engine") as found:
        calibrate(two, "p")
    assert str(two[1].folder) in str(found.value)
    assert engine_of(two[0].manifest) == engine_of(bound_run("same").manifest)
    with pytest.raises(
        BadInput, match="at least 3 batch sizes"
    ):  # not known, and vLLM's own choice, are no two engines
        calibrate([two[0], bound_run("auto", {"kv_cache_dtype": "auto"})], "p")


def write_gpu_run(root: Path, slowdown: float, name: str = "NVIDIA H100 80GB HBM3") -> Path:
    """A run on a GPU whose every step takes ``slowdown`` times what the shipped curves say, at one batch size."""
    layout = Layout("llama-3.1-8b", "H100-SXM", max_num_seqs=64)
    array, _, _ = base_array(layout)
    folder = root / "exp" / "gpu" / "run-1-20260101T000000Z"
    manifest = {
        "experiment": "exp", "cell_id": "gpu", "origin": "measured",
        "cell": {"model": "llama-3.1-8b", "engine": {"kind": "vllm", "args": {"max_num_seqs": 64}}},
        "engine": dataclasses.asdict(EngineInfo("vllm", "0.32.0", {}, 1)),
        "provenance": {"gpus": [{"name": name, "memory_bytes": 85520809984}]},
    }  # fmt: skip
    writer = RunWriter(folder, manifest)
    t = 0.0
    for i in range(100):
        prefill = i % 10 == 0
        n, b = (2, 30) if prefill else (0, 32)
        step_s = slowdown * kernel.step_time_s(array, n, n * 500, n * 500 * 501 / 2, 0, b, b * 600, 600, n + b)[0]
        t += step_s
        writer.append_step(EngineStep(i, t, step_s, n + b, 0, 0.1, n * 500, b, n, b, b * 599))
    writer.finish("complete")
    return folder


def test_on_a_gpu_one_batch_size_moves_the_shipped_curves(tmp_path: Path) -> None:
    profile = calibrate([RunReader.open(write_gpu_run(tmp_path, 1.2))], "gpu")
    assert profile.layout.hardware == "H100-SXM"
    built = build_step_time(load_model("llama-3.1-8b"), load_hardware("h100-sxm"), max_num_seqs=64, profile=profile)
    shipped = build_step_time(load_model("llama-3.1-8b"), load_hardware("h100-sxm"), max_num_seqs=64)
    for batch in (4, 32, 64):  # batch sizes that were not recorded keep the shape of the curves
        a, b = (
            kernel.step_time_s(s.coefficients(), 0, 0, 0.0, 0, batch, batch * 600, 600, batch)[0]
            for s in (shipped, built)
        )
        assert b / a == pytest.approx(1.2, abs=0.12)


def test_a_gpu_that_is_not_in_the_catalogue_is_refused(tmp_path: Path) -> None:
    run = RunReader.open(write_gpu_run(tmp_path, 1.2, name="NVIDIA Unheard Of"))
    with pytest.raises(BadInput, match="not in the catalogue"):
        calibrate([run], "gpu")


def test_a_profile_survives_the_disk_and_refuses_other_engines(runs: list[RunReader], tmp_path: Path) -> None:
    profile = calibrate(runs, "p")
    path = save_profile(profile, tmp_path / "profiles")
    assert load_profile(path) == profile
    assert path.stat().st_size < 4096
    with pytest.raises(BadInput, match="tensor_parallel_size 1, not 2"):
        build_step_time(load_model("tiny-llama"), load_hardware("cpu"), tensor_parallel_size=2, profile=profile)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 99}', "not json"])
def test_a_broken_profile_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"p\.json"):
        load_profile(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {**TRUTH, "fixed_s": "fast"}}, r"parameters\.fixed_s is 'fast', expected a number >= 0"),
        ({"parameters": {**TRUTH, "fixed_s": -1.0}}, r"parameters\.fixed_s is -1\.0, expected a number >= 0"),
        ({"parameters": {**TRUTH, "fixed_s": True}}, r"parameters\.fixed_s is True, expected a number"),
        ({"parameters": {"fixed_s": 1.0}}, r"parameters\.linear_scale is missing"),
        ({"parameters": "many"}, "parameters is str, expected a mapping"),
        ({"request_before_s": "1 ms"}, "request_before_s is '1 ms', expected a number >= 0"),
        ({"num_kv_blocks": 10.5}, r"num_kv_blocks is 10\.5, expected a whole number >= 0"),
        ({"errors": {"cells": {"a": None}}}, r"errors\.cells\.a is None, expected a number"),
        ({"errors": {}}, r"errors\.cells is missing"),
        ({"layout": {"model": "tiny-llama"}}, r"layout\.hardware is missing"),
        (
            {"layout": {**dataclasses.asdict(CPU), "max_num_seqs": "256"}},
            r"layout\.max_num_seqs is '256', expected a whole",
        ),
        ({"schema_version": "one"}, "schema_version is 'one', expected a whole number"),
        ({"speed": 1}, "speed is not known here"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    whole = Profile("p", CPU, TRUTH, {"cells": {"a": 0.1}}, 100, ("run",), "2026-01-01T00:00:00+00:00")
    path = save_profile(whole, tmp_path)
    assert load_profile(path) == whole
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadInput, match=rf"p\.json: not a calibration profile: {words}.*bench calibrate"):
        load_profile(path)


def test_the_command_prints_the_error_and_writes_the_profile(runs: list[RunReader], tmp_path: Path) -> None:
    root = runs[0].folder.parents[1]
    result = CliRunner().invoke(command, [str(root), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "leave one cell out" in result.output and "exp.json" in result.output
    as_json = CliRunner().invoke(command, [str(root), "--out", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    assert json.loads(as_json.output)["errors"]["method"] == "leave one cell out"


def test_the_command_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no complete runs"):
        CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
