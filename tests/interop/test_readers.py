"""Readers of foreign formats: files written by the real tools (see data/README.md), and traps of each format."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BadInput
from bench.interop.formats import FORMATS, read_runs, recognise
from bench.interop.imported import ForeignRun
from bench.interop.reading import error_class, read_file
from bench.interop.recount import recount

DATA = Path(__file__).parent / "data"
GENAI = "genai_bench/d_100_200_text-to-text_concurrency_8_time_60s.json"
WRITTEN_BY = {
    "vllm_serve_c4.json": "vllm-bench",
    "vllm_serve_inf_summary.json": "vllm-bench",
    "vllm_throughput.json": "vllm-bench",
    "vllm_latency.json": "vllm-bench",
    "vllm_sweep_summary.json": "vllm-bench",
    "guidellm_c4.json": "guidellm",
    "aiperf/profile_export_aiperf.json": "aiperf",
    "aiperf/profile_export.jsonl": "aiperf",
    "inference_perf_stage_0.json": "inference-perf",
    GENAI: "genai-bench",
    "genai_bench/experiment_metadata.json": "genai-bench",
    "ml_energy.json": "ml-energy",
    "inferencex_agg.json": "inferencex",
}


def one(name: str) -> ForeignRun:
    runs = read_runs(read_file(DATA / name))
    assert len(runs) == 1
    return runs[0]


def changed(tmp_path: Path, name: str, **values: Any) -> Path:
    """A copy of a file with some top-level keys replaced; None removes one."""
    data = json.loads((DATA / name).read_text())
    data = {k: v for k, v in {**data, **values}.items() if v is not None or k not in values}
    path = tmp_path / Path(name).name
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(("name", "format_name"), WRITTEN_BY.items())
def test_each_file_is_recognised_by_its_content(name: str, format_name: str) -> None:
    assert recognise(read_file(DATA / name)) == format_name


# --- what the tools printed, from our records --------------------------------------------------------------------


def test_vllm_records_give_what_vllm_printed() -> None:
    """The numbers are those that `vllm bench serve` printed to the terminal in the run that wrote the file."""
    ours = {c.key: c.ours for c in recount(one("vllm_serve_faults.json"))}
    printed_ms = {
        "ttft_service_mean_s": 50.03, "ttft_service_p50_s": 50.70, "ttft_service_p99_s": 64.00,
        "tpot_mean_s": 8.15, "tpot_p50_s": 8.01, "tpot_p99_s": 9.38,
        "itl_mean_s": 7.64, "itl_p50_s": 4.99, "itl_p99_s": 39.87,
        "e2e_service_mean_s": 172.30, "e2e_service_p50_s": 172.47, "e2e_service_p99_s": 187.48,
    }  # fmt: skip
    for key, value in printed_ms.items():
        assert ours[key] * 1e3 == pytest.approx(value, abs=0.00501), key
    assert ours["requests_per_s"] == pytest.approx(21.41, abs=0.00501)
    assert ours["output_tokens_per_s"] == pytest.approx(342.58, abs=0.00501)
    assert ours["total_tokens_per_s"] == pytest.approx(370.76, abs=0.00501)


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("vllm_serve_c4.json", 20),
        ("vllm_serve_faults.json", 16),
        ("vllm_serve_rate.json", 14),
        ("guidellm_c4.json", 6),
        ("aiperf/profile_export_aiperf.json", 15),
    ],
)
def test_every_number_of_the_tool_comes_out_of_its_records_again(name: str, at_least: int) -> None:
    checks = recount(one(name))
    assert len(checks) >= at_least
    assert max(c.difference_ratio for c in checks) < 1e-5, [c for c in checks if not c.agrees]


def test_a_wrong_unit_would_not_pass(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm_serve_c4.json").read_text())
    path = changed(tmp_path, "vllm_serve_c4.json", ttfts=[t * 1e3 for t in data["ttfts"]])
    differing = {c.key for c in recount(read_runs(read_file(path))[0]) if not c.agrees}
    assert {"ttft_service_mean_s", "tpot_mean_s"} <= differing


# --- vllm bench --------------------------------------------------------------------------------------------------


def test_failed_requests_are_records_with_a_class_and_no_zeros() -> None:
    run = one("vllm_serve_faults.json")
    failed = [r for r in run.records if r.error is not None]
    assert len(failed) == 5 and {r.error for r in failed} == {"http_5xx"}
    assert all(r.first_token_s is None and r.done_s is None and r.osl is None for r in failed)
    assert all(r.sent_s is not None and r.error_detail == "Internal Server Error" for r in failed)
    assert run.chunks is not None and not set(run.chunks.index.tolist()) & {r.index for r in failed}


def test_a_failure_without_a_text_is_told_by_its_zeros(tmp_path: Path) -> None:
    data = json.loads((DATA / "vllm_serve_faults.json").read_text())
    path = changed(tmp_path, "vllm_serve_faults.json", errors=[""] * len(data["errors"]))
    run = read_runs(read_file(path))[0]
    assert sum(r.error is not None for r in run.records) == 5
    assert any("could not be told" in n for n in run.notes)


def test_times_start_at_zero_and_are_in_order_of_seconds() -> None:
    run = one("vllm_serve_c4.json")
    assert min(r.sent_s for r in run.records if r.sent_s is not None) == 0
    for r in run.records:
        assert r.due_s is not None and r.sent_s is not None and r.first_token_s is not None and r.done_s is not None
        assert r.due_s == r.sent_s < r.first_token_s < r.done_s < 10


def test_the_wait_for_the_rate_limit_counts_from_the_due_time_in_an_open_loop_only(tmp_path: Path) -> None:
    run = one("vllm_serve_rate.json")
    assert run.load is not None and run.load.kind == "open_loop" and run.load.rate_per_s == 20
    waits = json.loads((DATA / "vllm_serve_rate.json").read_text())["queue_times"]
    late = [r.sent_s - r.due_s for r in run.records if r.sent_s is not None and r.due_s is not None]
    assert late == pytest.approx(waits, abs=1e-9)
    closed = one("vllm_serve_c4.json")  # there the same field is the wait for a free slot, which is no lateness
    assert all(r.sent_s == r.due_s for r in closed.records)


def test_tokens_of_chunks_add_up_to_the_requests_tokens() -> None:
    run = one("vllm_serve_c4.json")
    assert run.chunks is not None
    for r in run.records:
        assert int(run.chunks.tokens[run.chunks.index == r.index].sum()) == r.osl
    assert any("spread evenly" in n for n in run.notes)


def test_a_file_without_details_keeps_its_summary_and_says_so() -> None:
    run = one("vllm_serve_inf_summary.json")
    assert not run.records and run.load is not None and (run.load.kind, run.load.batch_size) == ("offline", 16)
    data = json.loads((DATA / "vllm_serve_inf_summary.json").read_text())
    assert run.reported["ttft_service_mean_s"] == data["mean_ttft_ms"] / 1e3
    assert run.reported["e2e_service_p50_s"] == pytest.approx(float(np.median(data["latencies"])))
    assert any("--save-detailed" in n for n in run.notes)


def test_appended_results_are_one_run_a_line(tmp_path: Path) -> None:
    text = (DATA / "vllm_serve_c4.json").read_text().strip()
    path = tmp_path / "all.json"
    path.write_text(text + "\n" + text + "\n")
    assert [r.part for r in read_runs(read_file(path))] == ["line 1", "line 2"]


def test_a_sweep_gives_its_runs_with_their_engine_arguments() -> None:
    runs = read_runs(read_file(DATA / "vllm_sweep_summary.json"))
    assert [r.part for r in runs] == ["[0]", "[1]", "[2]", "[3]"]
    assert runs[0].engine_args == {"tensor_parallel_size": 2, "max_num_seqs": 64}
    assert runs[0].load is not None and runs[0].load.concurrency == 16


def test_throughput_and_latency_say_what_they_lack() -> None:
    throughput, latency = one("vllm_throughput.json"), one("vllm_latency.json")
    assert throughput.reported == {"total_tokens_per_s": 28800.0, "requests_per_s": 25.0}
    assert "output_tokens_per_s" in throughput.absent
    assert latency.reported["e2e_service_mean_s"] == pytest.approx(2.0)
    assert latency.load is not None and latency.load.batch_size is None and "--batch-size" in latency.notes[0]


def test_lists_of_different_length_are_refused_with_the_key(tmp_path: Path) -> None:
    path = changed(tmp_path, "vllm_serve_c4.json", ttfts=[0.1])
    with pytest.raises(BadInput, match=r"ttfts: has 1 entries, start_times has 24"):
        read_runs(read_file(path))


# --- GuideLLM ----------------------------------------------------------------------------------------------------


def test_guidellm_tpot_is_recomputed_and_itl_stays_empty() -> None:
    run = one("guidellm_c4.json")
    assert run.chunks is None and "itl_p50_s" in run.absent and not any(k.startswith("itl") for k in run.reported)
    raw = json.loads((DATA / "guidellm_c4.json").read_text())["benchmarks"][0]["requests"]["successful"]
    theirs = sorted(r["inter_token_latency_ms"] / 1e3 for r in raw)
    ours = sorted(
        (r.last_token_s - r.first_token_s) / (r.osl - 1)
        for r in run.records
        if r.error is None and r.last_token_s is not None and r.first_token_s is not None and r.osl is not None
    )
    assert ours == pytest.approx(theirs, rel=1e-6)  # per request both are (last - first) / (OSL - 1)
    assert sum(r.error == "http_5xx" for r in run.records) == 2


def test_guidellm_targets_that_are_no_time_of_day_are_dropped(tmp_path: Path) -> None:
    data = json.loads((DATA / "guidellm_c4.json").read_text())
    benchmark = data["benchmarks"][0]
    benchmark["config"]["strategy"] = {"type_": "constant", "rate": 20.0}
    benchmark["requests"]["successful"][0]["info"]["timings"]["targeted_start"] = 12.5
    path = tmp_path / "b.json"
    path.write_text(json.dumps(data))
    run = read_runs(read_file(path))[0]
    assert run.load is not None and run.load.rate_per_s == 20.0
    assert all(r.due_s is not None and -1 < r.due_s < 60 for r in run.records)
    assert any(r.due_s != r.sent_s for r in run.records)


def test_guidellm_incomplete_requests_are_aborted_not_failed(tmp_path: Path) -> None:
    data = json.loads((DATA / "guidellm_c4.json").read_text())
    requests = data["benchmarks"][0]["requests"]
    requests["incomplete"] = [copy.deepcopy(requests["errored"][0])]
    path = tmp_path / "b.json"
    path.write_text(json.dumps(data))
    run = read_runs(read_file(path))[0]
    assert sorted(r.error for r in run.records if r.error) == ["aborted", "http_5xx", "http_5xx"]


def test_guidellm_of_another_version_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, "guidellm_c4.json", metadata={"version": 1, "guidellm_version": "0.3.0"})
    with pytest.raises(BadInput, match=r"metadata\.version 1 is not read"):
        read_runs(read_file(path))


# --- AIPerf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile_export_aiperf.json", "profile_export.jsonl"])
def test_aiperf_summary_and_records_are_read_together(name: str) -> None:
    run = one(f"aiperf/{name}")
    assert len(run.companions) == 1 and run.tool_version == "0.13.0" and len(run.records) == 24
    assert run.load is not None and run.load.concurrency == 4


def test_aiperf_tokens_are_the_servers_where_it_says_them() -> None:
    run = one("aiperf/profile_export_aiperf.json")
    good = [r for r in run.records if r.error is None]
    assert {r.osl for r in good} == {16} and {r.token_source for r in good} == {"usage"}
    assert run.reported["osl_mean_tokens"] > 80  # its own tokenizer's count
    assert "osl_mean_tokens" not in run.recount and "tpot_mean_s" not in run.recount
    assert any("usage" in n for n in run.notes)


def test_aiperf_without_usage_its_tpot_comes_out_again(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DATA / "aiperf/profile_export.jsonl").read_text().splitlines()]
    for row in rows:
        row["metrics"] = {k: v for k, v in row["metrics"].items() if not k.startswith("usage")}
    (tmp_path / "profile_export.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    path = changed(tmp_path, "aiperf/profile_export_aiperf.json")
    checks = {c.key: c for c in recount(read_runs(read_file(path))[0])}
    for key in ("tpot_mean_s", "tpot_p50_s", "output_tokens_per_s", "total_tokens_per_s", "osl_mean_tokens"):
        assert checks[key].difference_ratio < 1e-5, checks[key]


def test_aiperf_summary_alone_counts_its_errors(tmp_path: Path) -> None:
    run = read_runs(read_file(changed(tmp_path, "aiperf/profile_export_aiperf.json")))[0]
    assert not run.records and run.errors == {"http_5xx": 2} and run.num_failed == 2
    assert run.reported["ttft_service_p50_s"] == pytest.approx(0.0541959085)


# --- summary-only formats ----------------------------------------------------------------------------------------


def test_inference_perf_in_seconds_from_the_send() -> None:
    run = one("inference_perf_stage_0.json")
    assert run.load is not None and run.load.rate_per_s == 5.0
    assert run.reported["ttft_service_mean_s"] == 0.06 and run.reported["tpot_p50_s"] == pytest.approx(0.0081)
    assert run.errors == {"http_429": 6, "timeout": 4} and run.reported["error_ratio"] == pytest.approx(10 / 300)
    assert "itl_p50_s" in run.absent and "itl_mean_s" not in run.reported


def test_genai_bench_milliseconds_are_read_as_such(tmp_path: Path) -> None:
    run = one(GENAI)
    assert run.reported["ttft_service_mean_s"] == pytest.approx(0.05)
    assert (run.engine, run.engine_version, run.gpu, run.num_gpus) == ("SGLang", "v0.5.0", "H100", 4)
    assert run.reported["total_tokens_per_s"] == 1170.0 and run.errors == {"http_5xx": 5}
    assert (run.isl_tokens, run.osl_tokens) == (100, 200)
    path = changed(tmp_path, GENAI, _time_unit="s")
    assert read_runs(read_file(path))[0].reported["ttft_service_mean_s"] == pytest.approx(50.0)


def test_genai_bench_statistics_come_out_of_its_own_requests() -> None:
    """Written by genai-bench 0.0.5, whose error_rate says 0 although 3 of 27 requests failed."""
    name = "genai_bench_c4/D64_16_text-to-text_num_concurrency_4_time_1s.json"
    run = one(name)
    rows = json.loads((DATA / name).read_text())["individual_request_metrics"]
    good = [r for r in rows if not r["error_code"]]
    ttft = np.array([r["ttft"] for r in good])
    tpot = np.array([(r["e2e_latency"] - r["ttft"]) / (r["num_output_tokens"] - 1) for r in good])
    assert run.reported["ttft_service_mean_s"] == pytest.approx(ttft.mean())
    assert run.reported["ttft_service_p95_s"] == pytest.approx(np.percentile(ttft, 95))
    assert run.reported["tpot_p50_s"] == pytest.approx(np.percentile(tpot, 50))
    assert run.duration_s is not None
    assert run.reported["output_tokens_per_s"] == pytest.approx(16 * len(good) / run.duration_s)
    assert run.reported["error_ratio"] == pytest.approx(3 / 27) and run.errors == {"http_5xx": 3}


def test_genai_bench_before_run_duration_token_rates_are_not_means_of_request_rates(tmp_path: Path) -> None:
    data = json.loads((DATA / GENAI).read_text())["aggregated_metrics"]
    del data["run_duration"], data["requests_per_second"]
    path = changed(tmp_path, GENAI, aggregated_metrics={**data, "requests_per_minute": 234.0})
    run = read_runs(read_file(path))[0]
    assert run.reported["requests_per_s"] == pytest.approx(3.9)
    assert run.reported["output_tokens_per_s"] == pytest.approx(3.9 * 200)
    assert run.reported["total_tokens_per_s"] == pytest.approx(3.9 * 300)


def test_genai_bench_metadata_alone_is_refused() -> None:
    with pytest.raises(BadInput, match="metadata, without results"):
        one("genai_bench/experiment_metadata.json")


def test_ml_energy_counts_from_durations_and_drops_inserted_gaps() -> None:
    run = one("ml_energy.json")
    assert run.reported["itl_mean_s"] == pytest.approx(0.2)  # not 0.1, as with the zeros between tokens of one chunk
    assert run.reported["tpot_mean_s"] == pytest.approx(0.1)
    assert run.reported["energy_j_per_output_token"] == 10.0 and run.reported["power_w"] == 600.0
    assert run.num_failed == 1 and run.errors == {"reset": 1} and run.num_gpus == 2
    assert "ttft_service_p99_s" not in run.reported  # 20 requests allow no p99


def test_inferencex_rates_are_per_gpu_of_their_own_kind() -> None:
    single, multi = read_runs(read_file(DATA / "inferencex_agg.json"))
    assert single.num_gpus == 4 and single.reported["total_tokens_per_s"] == 2000.0
    assert single.reported["output_tokens_per_s"] == 1000.0 and single.reported["ttft_service_p50_s"] == 0.2
    assert multi.num_gpus == 12 and multi.reported["total_tokens_per_s"] == 12000.0
    assert multi.reported["output_tokens_per_s"] == 7200.0  # 900 a decode GPU x 8, not x 12
    assert "tensor_parallel_size" not in multi.engine_args


# --- bad files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"  \n", "the file is empty"),
        (b"\x00\xff\xfe\x80", "not a text file"),
        (b"hello", "not JSON"),
        (b'{"a": [1, 2', "cut off"),
        (b"[]", "not a result file of"),
        (b"3", "not a result file of"),
        (b'{"a": 1}', "not a result file of"),
        (b'{"duration": 1, "completed": 1', "cut off"),
    ],
)
def test_what_is_no_result_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_runs(read_file(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in WRITTEN_BY if not n.endswith("metadata.json")])
def test_any_cut_of_any_file_is_refused_or_read_never_a_crash(tmp_path: Path, name: str) -> None:
    text = (DATA / name).read_text()
    for share in (0.1, 0.37, 0.5, 0.83, 0.99):
        path = tmp_path / "cut.json"
        path.write_text(text[: int(len(text) * share)])
        try:
            read_runs(read_file(path))
        except BadInput as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("name", [n for n in WRITTEN_BY if n.endswith(".json") and "metadata" not in n])
def test_a_missing_or_wrong_key_is_refused_or_read_never_a_crash(tmp_path: Path, name: str) -> None:
    data = json.loads((DATA / name).read_text())
    first = data[0] if isinstance(data, list) else data
    for key in first:
        for wrong in (None, "text", [], {}, 0, -1, True):
            broken = {**first, key: wrong}
            path = tmp_path / "broken.json"
            path.write_text(json.dumps([broken] if isinstance(data, list) else broken))
            try:
                for run in read_runs(read_file(path)):
                    recount(run)
            except BadInput as e:
                assert "\n" not in str(e)


def test_a_torn_last_line_is_dropped_and_named(tmp_path: Path) -> None:
    text = (DATA / "aiperf/profile_export.jsonl").read_text()
    path = tmp_path / "requests.jsonl"
    path.write_text(text[:-300])
    run = read_runs(read_file(path))[0]
    assert len(run.records) == 23 and any("dropped" in n for n in run.notes)


def test_a_named_format_must_be_the_files() -> None:
    with pytest.raises(BadInput, match="not a result file of GuideLLM"):
        read_runs(read_file(DATA / "vllm_serve_c4.json"), "guidellm")


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("", 429, "http_429"),
        ("Too Many Requests", None, "http_429"),
        ("Bad Request", None, "http_4xx"),
        ("HTTPStatusError(\"Server error '503 Service Unavailable' for url ...\")", None, "http_5xx"),
        ("aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected", None, "reset"),
        ("aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host", None, "connect"),
        ("asyncio.exceptions.TimeoutError", None, "timeout"),
        ("aiohttp.client_exceptions.ClientPayloadError: Response payload is not completed", None, "truncated"),
        ("Never received a valid chunk to calculate TTFT.", None, "truncated"),
        ("json.decoder.JSONDecodeError: Expecting value", None, "malformed_sse"),
    ],
)
def test_error_texts_of_the_tools(text: str, code: int | None, expected: str) -> None:
    assert error_class(text, code) == (expected, True)


def test_an_unknown_error_text_is_not_recognised() -> None:
    assert error_class("the moon was in the way") == ("server_error", False)


def test_the_command_knows_every_format() -> None:
    from bench.cli.import_ import FORMAT_NAMES

    assert set(FORMAT_NAMES) == {"auto", *FORMATS}
