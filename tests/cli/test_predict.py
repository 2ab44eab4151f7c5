"""`bench predict` and `bench optimize` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

from click.testing import CliRunner

from bench.cli import cli
from bench.errors import BadInput
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


def test_bad_input_is_one_clear_line(experiment: Path) -> None:
    assert isinstance(bench("predict", str(experiment)).exception, BadInput)
    assert "--gpu" in str(bench("predict", str(experiment)).exception)
    assert "H100-SXM" in str(bench("predict", str(experiment), "--gpu", "H1000").exception)
    assert "--shape" in str(bench("optimize", "llama-3.1-8b", "--gpu", "H100-SXM", "--shape", "big").exception)


def test_optimize_answers_and_explains() -> None:
    args = ("optimize", "llama-3.1-8b", "--gpu", "H100-SXM", "--shape", "256/64", "--tp", "1,2", "--max-gpus", "2")
    text = bench(*args, "--slo", "ttft p99 <= 300 ms and tpot p99 <= 20 ms").output
    assert text.startswith("SIMULATED") and "why:" in text and "interval" in text
    data = json.loads(bench(*args, "--json").output)
    assert (
        data["origin"] == "simulated"
        and data["winner"]["tensor_parallel_size"] == 1
        and data["num_configurations"] > 10
    )
