"""From run folders to summaries: recomputed equals stored, sums add up, unlike runs are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.analysis.frames import cells_frame, requests_frame, runs_frame
from bench.analysis.summary import (
    RunSummary,
    Yardsticks,
    combine,
    stored_summary,
    summarise_cell,
    summarise_run,
    summary_of,
)
from bench.catalog.slo import parse_slo
from bench.config.sweep import Cell, expand
from bench.errors import BadInput
from bench.records import ChunkRecord, RequestRecord
from bench.store import SUMMARY, RunReader, RunWriter
from tests.analysis.synthetic import experiment, write_run


@pytest.fixture(scope="module")
def cell() -> Cell:
    return expand(experiment(sweep={"grid": {"tensor_parallel_size": [2], "batch_size": [8]}}))[0]


@pytest.fixture
def runs(tmp_path: Path, cell: Cell) -> list[RunReader]:
    return [write_run(tmp_path, cell, k) for k in (1, 2, 3)]


def test_recomputed_equals_stored(runs: list[RunReader]) -> None:
    for run in runs:
        made = summary_of(run)
        assert (run.folder / SUMMARY).is_file()
        stored = stored_summary(run)
        assert stored == made
        assert summarise_run(RunReader.open(run.folder)) == stored  # bit for bit, through JSON and back


def test_a_stored_summary_of_something_else_is_not_used(runs: list[RunReader]) -> None:
    run = runs[0]
    summary_of(run)
    assert stored_summary(run, Yardsticks(parse_slo("ttft <= 1 s"))) is None
    data = json.loads((run.folder / SUMMARY).read_text())
    data["summary"]["values"]["output_tokens_per_s"] = 1e9
    data["made_from"] = "0" * 64
    (run.folder / SUMMARY).write_text(json.dumps(data))
    assert summary_of(run).values["output_tokens_per_s"] < 1e6
    (run.folder / SUMMARY).write_text("{")
    assert summary_of(run) == summarise_run(run)
    (run.folder / SUMMARY).unlink()
    assert summary_of(run) == summarise_run(run)


def test_numbers_of_a_run_by_hand(tmp_path: Path, cell: Cell) -> None:
    """Two batches of two: 8 requests' worth of arithmetic that fits on a page."""
    writer = RunWriter(
        tmp_path / "x" / "run-1-20261124T060000Z", {"origin": "simulated", "schedule": {"kind": "offline"}}
    )
    times = [(0.0, 0.5, 2.5), (0.0, 0.5, 2.5), (3.0, 3.7, 6.0), (3.0, 3.5, 5.5)]
    for i, (sent, first, last) in enumerate(times):
        writer.append_request(RequestRecord(i, "measured", 100, 11, 0.0, sent, first, last, last, first_chunk_tokens=1))
    writer.finish("complete")
    s = summarise_run(RunReader.open(writer.folder))
    assert s.window is not None and (s.window.start_s, s.window.end_s) == (0.0, 6.0)
    v = s.values
    assert v["output_tokens_per_s"] == pytest.approx(44 / 6)
    assert v["input_tokens_per_s"] == pytest.approx(400 / 6)
    assert v["total_tokens_per_s"] == pytest.approx(444 / 6)
    assert v["requests_per_s"] == pytest.approx(4 / 6)
    assert v["ttft_p50_s"] == pytest.approx(0.5)  # of 0.5 0.5 0.5 0.7
    assert v["ttft_mean_s"] == pytest.approx(0.55)
    assert v["tpot_p50_s"] == pytest.approx(0.2)  # of 0.2 0.2 0.2 0.23
    assert v["output_tokens_per_s_per_user"] == pytest.approx(5.0)
    assert v["e2e_p50_s"] == pytest.approx(2.5)
    assert "ttft_p90_s" not in v and "too few" in s.absent["ttft_p90_s"]
    assert v["in_flight_mean"] == pytest.approx((2.5 + 2.5 + 3.0 + 2.5) / 6)


def test_tokens_of_requests_and_of_engine_steps_add_up(runs: list[RunReader]) -> None:
    for run in runs:
        s = summarise_run(run)
        c = s.counts
        assert c["step_decode_tokens"] == c["all_output_tokens"] - c["num_with_output"]
        assert c["step_prefill_tokens"] == c["all_input_tokens"] - c["all_cached_tokens"]
        assert "token-count-mismatch" not in {w.code for w in s.warnings}


def test_chunks_give_itl_and_tokens_per_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "c" / "run-1-x", {"origin": "simulated", "schedule": {"kind": "offline"}})
    writer.append_request(
        RequestRecord(0, "measured", 10, 7, None, 0.0, 0.1, 0.4, 0.4, first_chunk_tokens=1, num_chunks=4)
    )
    for t, n in ((0.1, 1), (0.2, 2), (0.25, 2), (0.4, 2)):
        writer.append_chunk(ChunkRecord(0, t, n))
    writer.finish("complete")
    v = summarise_run(RunReader.open(writer.folder)).values
    assert v["itl_p50_s"] == pytest.approx(0.1)
    assert v["itl_mean_s"] == pytest.approx(0.1)
    assert v["tokens_per_chunk"] == pytest.approx(7 / 4)


def test_a_run_of_nothing_but_errors_and_warmup(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "e" / "run-1-x", {"origin": "measured"})
    writer.append_request(RequestRecord(0, "warmup", 10, 7, None, 0.0, 0.1, 0.4, 0.4))
    writer.finish("complete")
    s = summarise_run(RunReader.open(writer.folder))
    assert s.values == {} and s.absent and s.warnings[-1].code == "nothing-measured"
    assert RunSummary.from_dict(json.loads(json.dumps(s.to_dict()))) == s


def test_cell_estimates_are_over_runs(runs: list[RunReader]) -> None:
    summary = summarise_cell(runs)
    rates = [summarise_run(r).values["output_tokens_per_s"] for r in runs]
    e = summary.estimates["output_tokens_per_s"]
    assert e.num_runs == 3 and e.value == pytest.approx(sum(rates) / 3)
    assert e.low is not None and e.low < min(rates)
    per_gpu = summary.estimates["output_tokens_per_s_per_gpu"]
    assert per_gpu.value == pytest.approx(e.value / 2)


def test_goodput(runs: list[RunReader]) -> None:
    tight = summarise_cell(runs, Yardsticks(parse_slo("e2e <= 1 ms"))).estimates
    loose = summarise_cell(runs, Yardsticks(parse_slo("e2e <= 100 s"))).estimates
    assert tight["slo_met_ratio"].value == 0 and loose["slo_met_ratio"].value == 1
    assert loose["goodput_requests_per_s"].value == pytest.approx(loose["requests_per_s"].value)


def test_unlike_runs_are_refused_by_name_of_the_key(tmp_path: Path, cell: Cell) -> None:
    same = write_run(tmp_path, cell, 1)
    other = write_run(
        tmp_path, cell, 2, fingerprint={"devices": ["NVIDIA A100-SXM4-80GB"] * 2, "engine_version": "vllm 0.32.0"}
    )
    with pytest.raises(BadInput, match=r"fingerprint\.devices.*H100.*A100"):
        summarise_cell([same, other])
    measured = write_run(tmp_path, cell, 3, origin="measured")
    with pytest.raises(BadInput, match="differ in origin"):
        summarise_cell([same, measured])


def test_incomplete_runs_are_left_out(tmp_path: Path, cell: Cell) -> None:
    runs = [write_run(tmp_path, cell, 1), write_run(tmp_path, cell, 2, status="failed")]
    assert len(summarise_cell(runs).runs) == 1
    with pytest.raises(BadInput, match="no complete run"):
        summarise_cell(runs[1:])


def test_frames(runs: list[RunReader]) -> None:
    summary = summarise_cell(runs)
    frame = cells_frame([summary])
    row = frame[frame.metric == "output_tokens_per_s"].iloc[0]
    assert row["value"] == summary.estimates["output_tokens_per_s"].value and row["origin"] == "simulated"
    assert len(runs_frame([summary])) == 3
    assert requests_frame(runs[0].requests())["tpot_s"].notna().all()


def test_a_percentile_needs_every_run(tmp_path: Path) -> None:
    def summary(run: str, **values: float) -> RunSummary:
        return RunSummary("x", "c", run, 1, "measured", "", None, values)

    rows = [summary("a", ttft_p95_s=0.4, ttft_p99_s=0.3, power_w=100.0), summary("b", ttft_p95_s=0.5)]
    estimates, absent = combine(rows)
    assert "ttft_p99_s" not in estimates and "1 of 2 runs" in absent["ttft_p99_s"]
    assert estimates["ttft_p95_s"].num_runs == 2 and estimates["power_w"].num_runs == 1
