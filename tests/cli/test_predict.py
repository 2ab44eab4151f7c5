"""`bench predict` and `bench optimize` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

from click.testing import CliRunner

from bench.analysis.predicted import with_stated
from bench.analysis.summary import summarise_cell
from bench.cli import cli
from bench.errors import BadInput
from bench.sim.power import power_interval
from bench.sim.profile import PARAMETERS, Layout, Profile, load_profile, save_profile
from bench.store import list_cells, list_runs

EXPERIMENT = """
name: small
why: Does the prediction go through?
model: llama-3.1-8b
weights: dummy
engine:
  kind: vllm
  args: {tensor_parallel_size: 1, max_model_len: 2048}
load: {kind: closed_loop, concurrency: 4}
workload: {isl: {kind: uniform, low: 64, high: 128}, osl: 16}
stop: {min_requests: 24}
repeats: 2
sweep:
  grid:
    concurrency: [2, 4]
    tensor_parallel_size: [1, 2]
"""


def bench(*args: str) -> Any:
    return CliRunner().invoke(cli, args, catch_exceptions=True, standalone_mode=False)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT)
    monkeypatch.setenv("TOKENYIELD_RESULTS", str(tmp_path / "results"))
    return path


def test_predict_writes_simulated_runs_in_the_layout_of_measured_ones(experiment: Path, tmp_path: Path) -> None:
    result = bench("predict", str(experiment), "--gpu", "H100-SXM,A100-80-SXM", "--json")
    assert result.exception is None, result.exception
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert len(rows) == 8 and all(row["origin"] == "simulated" for row in rows)
    assert all(row["scheduler_proved_against_vllm"] == "0.32.0" and row["step_time_source"] for row in rows)
    assert all(row["tpot_p50_s"]["low"] < row["tpot_p50_s"]["value"] < row["tpot_p50_s"]["high"] for row in rows)
    cells = list_cells(tmp_path / "results" / "runs" / "small.predicted")
    assert len(cells) == 8
    for cell in cells:
        runs = list_runs(cell)
        assert len(runs) == 2
        for run in runs:
            assert run.status == "complete" and run.origin == "simulated" and not run.verify()
            assert run.manifest["predicts"]["cell_id"] and run.manifest["simulated"]["step_time_source"]
            requests = run.requests()
            counted = [r for r in requests if r.phase == "measured"]
            assert len(counted) >= 24 and all(r.error is None and r.osl == 16 for r in counted)
            assert len(run.chunks()) == sum(r.osl or 0 for r in requests)
            assert run.steps() and run.telemetry()
            # power is stated as less certain than at known step times, and the summary carries it
            low, high, share, basis = run.manifest["simulated"]["intervals"]["power"]
            known = power_interval(run.manifest["simulated"]["gpu"])
            assert low < known.low_ratio and high > known.high_ratio and share == 0.9 and "step time" in basis
            watts = with_stated(summarise_cell([run])).estimates["power_w"]
            assert watts.low == pytest.approx(low * watts.value) and watts.high == pytest.approx(high * watts.value)


def test_predicting_again_replaces_and_repeats_exactly(experiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "runs" / "small.predicted"
    seen = []
    for _ in range(2):
        assert bench("predict", str(experiment), "--gpu", "H100-SXM", "--only", "tp1-c2").exception is None
        (cell,) = list_cells(folder)
        seen.append([[r.to_dict() for r in run.requests()] for run in list_runs(cell)])
    assert len(seen[0]) == 2 and seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]  # each run has requests of its own


def test_text_says_what_it_is(experiment: Path) -> None:
    text = bench("predict", str(experiment), "--gpu", "H100-SXM").output
    assert text.startswith("SIMULATED") and "proved step by step against vLLM 0.32.0" in text
    assert "step times of H100-SXM:" in text and "bench report" in text


def test_fleets_are_asked_for_by_options_or_in_the_file(experiment: Path, tmp_path: Path) -> None:
    args = ("predict", str(experiment), "--gpu", "H100-SXM", "--only", "tp1-c4")
    plain = json.loads(bench(*args, "--json").output)
    pools = json.loads(bench(*args, "--prefill", "1", "--decode", "2", "--kv-link", "ndr", "--json").output)
    assert (plain["num_gpus"], pools["num_gpus"]) == (1, 3) and plain["cell_id"] != pools["cell_id"]
    assert pools["predicts"] == plain["predicts"] and "over ndr" in pools["fleet"]
    folder = tmp_path / "results" / "runs" / "small.predicted" / pools["cell_id"]
    assert list_runs(folder)[0].manifest["simulated"]["fleet"]["decode"] == 2
    assert "2 x prefix-aware (2 GPUs)" in bench(*args, "--engines", "2", "--routing", "prefix-aware").output
    # what was predicted before stays beside it, until the experiment asks for something else
    plan = json.loads((folder.parent / "plan.json").read_text())
    assert {c["axes"].get("engine.fleet.engines", 1) for c in plan["cells"]} == {1, 2} and len(plan["cells"]) == 3
    assert "decode pool" in str(bench(*args, "--prefill", "1").exception)
    assert "unknown link" in str(bench(*args, "--prefill", "1", "--decode", "1", "--kv-link", "string").exception)
    experiment.write_text(
        EXPERIMENT.replace("kind: vllm", "kind: simulated\n  gpu: H100-SXM\n  fleet: {engines: 2}").replace(
            "concurrency: [2, 4]", "engine.fleet.routing: [round_robin, prefix_aware]"
        )
    )
    rows = [json.loads(line) for line in bench("predict", str(experiment), "--json").output.splitlines()]
    assert sorted({r["fleet"] for r in rows}) == ["2 x prefix-aware", "2 x round-robin"] and len(rows) == 4
    assert len(json.loads((folder.parent / "plan.json").read_text())["cells"]) == 4


def test_a_cell_that_does_not_fit_is_refused_and_the_rest_goes_on(experiment: Path) -> None:
    experiment.write_text(EXPERIMENT.replace("llama-3.1-8b", "llama-3.1-70b"))
    result = bench("predict", str(experiment), "--gpu", "H100-SXM,B200", "--only", "tp1", "--json")
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert {r["gpu"]: r["refused"] is None for r in rows} == {"H100-SXM": False, "B200": True}


def test_a_minimum_duration_is_virtual_time(experiment: Path, tmp_path: Path) -> None:
    experiment.write_text(EXPERIMENT.replace("{min_requests: 24}", "{min_duration_s: 20}"))
    assert bench("predict", str(experiment), "--gpu", "H100-SXM", "--only", "tp1-c4").exception is None
    (cell,) = list_cells(tmp_path / "results" / "runs" / "small.predicted")
    run = list_runs(cell)[0]
    counted = [r for r in run.requests() if r.phase == "measured"]
    length = max(r.done_s or 0 for r in counted) - min(r.sent_s or 0 for r in counted)
    assert 20 <= length < 22


def test_throughput_under_arrivals_carries_the_engines_interval_only_where_the_engine_is_the_limit(
    experiment: Path, tmp_path: Path
) -> None:
    load = "{kind: open_loop, rate_per_s: 5}"
    text = EXPERIMENT.replace("{kind: closed_loop, concurrency: 4}", load).replace(
        "{min_requests: 24}", "{min_requests: 400}"
    )
    experiment.write_text(text[: text.index("sweep:")] + "sweep: {grid: {load.rate_per_s: [5, 5000]}}\n")
    output = bench("predict", str(experiment), "--gpu", "H100-SXM", "--json").output
    idle, saturated = (json.loads(line)["output_tokens_per_s"] for line in output.splitlines())
    assert 0.95 < idle["low"] / idle["value"] < 1 < idle["high"] / idle["value"] < 1.05
    assert saturated["low"] / saturated["value"] < 0.9 and saturated["high"] / saturated["value"] > 1.05
    for cell in list_cells(tmp_path / "results" / "runs" / "small.predicted"):  # what the report reads
        intervals = [run.manifest["simulated"]["intervals"]["output_tokens_per_s"] for run in list_runs(cell)]
        wide = "rps5000" in cell.name
        assert all((low < 0.9) == wide and ("arrivals set the rate" in basis) != wide for low, _, _, basis in intervals)


def profile(folder: Path, model: str = "llama-3.1-8b", scale: float = 1.0, **layout: Any) -> Path:
    values = dict.fromkeys(PARAMETERS, 0.0) | {
        "linear_scale": scale,
        "decode_attention_scale": 1.0,
        "prefill_attention_scale": 1.0,
    }
    made = Profile(
        "cal", Layout(model, "H100-SXM", **layout), values, {"cells": {"a": 0.05}}, 100, ("small/cell/run-1",),
        "2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return save_profile(made, folder)


def test_manifests_keep_what_the_profile_was_and_other_fits_do_not_stay(experiment: Path, tmp_path: Path) -> None:
    path = profile(tmp_path / "profiles")
    args = ("predict", str(experiment), "--gpu", "H100-SXM", "--profile", str(path), "--json", "--only")
    row = json.loads(bench(*args, "tp1-c2").output)
    assert row["step_time_trust"] == "user-runs"
    folder = tmp_path / "results" / "runs" / "small.predicted"
    kept = list_runs(folder / row["cell_id"])[0].manifest["simulated"]["profile"]
    assert kept["name"] == "cal" and kept["path"] == str(path) and kept["runs"] == ["small/cell/run-1"]
    assert kept["sha256"] == load_profile(path).fingerprint()

    def cells() -> set[str]:
        return {c["cell_id"] for c in json.loads((folder / "plan.json").read_text())["cells"]}

    other = json.loads(bench(*args, "tp1-c4").output)["cell_id"]
    assert cells() == {row["cell_id"], other}
    profile(tmp_path / "profiles", scale=1.5)
    assert load_profile(path).fingerprint() != kept["sha256"]
    assert json.loads(bench(*args, "tp1-c4").output)["cell_id"] == other
    assert cells() == {other}  # what rests on another fit under the same file name does not stay beside it


def test_a_simulated_experiment_names_its_own_profile(experiment: Path, tmp_path: Path) -> None:
    path = profile(tmp_path / "profiles")
    experiment.write_text(EXPERIMENT.replace("kind: vllm", f"kind: simulated\n  gpu: H100-SXM\n  profile: {path}"))
    rows = [
        json.loads(line) for line in bench("predict", str(experiment), "--only", "tp1-c2", "--json").output.splitlines()
    ]
    assert [r["step_time_trust"] for r in rows] == ["user-runs"]
    text = bench("predict", str(experiment), "--gpu", "A100-80-SXM", "--only", "tp1-c2", "--json").output
    assert json.loads(text)["step_time_trust"] == "shipped-curves"


def test_a_profile_or_kernels_of_something_else_are_one_clear_line(experiment: Path, tmp_path: Path) -> None:
    args = ("predict", str(experiment), "--gpu", "H100-SXM")
    empty = tmp_path / "empty.json"
    empty.write_text("")
    assert "not a calibration profile" in str(bench(*args, "--profile", str(empty)).exception)
    assert "not a result of `bench kernels`" in str(bench(*args, "--kernels", str(empty)).exception)
    other = bench(*args, "--profile", str(profile(tmp_path / "a", model="qwen-3-8b"))).exception
    assert isinstance(other, BadInput) and "calibrated on qwen-3-8b on H100-SXM, not llama-3.1-8b" in str(other)
    alias = profile(tmp_path / "b", model="meta-llama/Llama-3.1-8B")
    assert bench(*args, "--only", "tp1-c2", "--profile", str(alias)).exception is None
    tp2 = profile(tmp_path / "c", tensor_parallel_size=2)
    rows = [json.loads(line) for line in bench(*args, "--profile", str(tp2), "--json").output.splitlines()]
    assert {("tp1" in r["cell_id"], r["refused"] is None) for r in rows} == {(True, False), (False, True)}


def test_requests_cut_off_at_the_end_are_counted(experiment: Path) -> None:
    experiment.write_text(
        EXPERIMENT.replace("closed_loop, concurrency: 4", "offline, batch_size: 2")
        .replace("concurrency: [2, 4]", "batch_size: [256]")
        .replace("osl: 16", "osl: 1024")
        .replace("{min_requests: 24}", "{min_duration_s: 1, max_duration_s: 2}")
    )
    args = ("predict", str(experiment), "--gpu", "H100-SXM", "--only", "tp1", "--repeats", "1")
    row = json.loads(bench(*args, "--json").output)
    assert row["num_requests"] == row["num_cut_off"] == 256
    assert "256 of 256 requests were cut off at the run's end" in bench(*args).output


def test_no_engine_starts_with_more_tokens_than_its_model_takes(experiment: Path) -> None:
    experiment.write_text(EXPERIMENT.replace("max_model_len: 2048", "max_model_len: 200000"))
    row = json.loads(bench("predict", str(experiment), "--gpu", "H100-SXM", "--only", "tp1-c2", "--json").output)
    assert "takes at most 131,072 tokens" in row["refused"]
    assert "131,072" in str(bench("optimize", "llama-3.1-8b", "--gpu", "H100-SXM", "--shape", "200k/256").exception)


def test_bad_input_is_one_clear_line(experiment: Path) -> None:
    assert isinstance(bench("predict", str(experiment)).exception, BadInput)
    assert "--gpu" in str(bench("predict", str(experiment)).exception)
    assert "H100-SXM" in str(bench("predict", str(experiment), "--gpu", "H1000").exception)
    for option, value in (("--shape", "big"), ("--tp", "0"), ("--max-num-seqs", "x"), ("--gpu", ",")):
        assert f"{option}: " in str(bench("optimize", "llama-3.1-8b", "--gpu", "H100-SXM", option, value).exception)


def test_optimize_answers_and_explains() -> None:
    args = ("optimize", "llama-3.1-8b", "--gpu", "H100-SXM", "--shape", "256/64", "--tp", "1,2", "--max-gpus", "2")
    text = bench(*args, "--slo", "ttft p99 <= 300 ms and tpot p99 <= 20 ms").output
    assert text.startswith("SIMULATED") and "why:" in text and "interval" in text
    nothing = bench(*args, "--slo", "ttft p99 <= 1 ms")
    assert "no configuration meets the SLO" in nothing.output and "does not hold" in nothing.output
    assert "keeps up with the rate" in bench(*args, "--rate", "1e9").output
    data = json.loads(bench(*args, "--json").output)
    assert (
        data["origin"] == "simulated"
        and data["winner"]["tensor_parallel_size"] == 1
        and data["num_configurations"] > 10
    )
