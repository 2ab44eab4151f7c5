"""`bench import` as a user calls it, and every command that reads results on what it wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.analysis.summary import Summary, summarise_cell, summarise_run
from bench.store import RunReader, list_cells, list_runs

DATA = Path(__file__).parent / "data"
GENAI = "genai_bench/d_100_200_text-to-text_concurrency_8_time_60s.json"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(*args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    import contextlib
    import io

    from bench.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(args))
    code = ended.value.code
    return (code if isinstance(code, int) else 0), out.getvalue(), err.getvalue()


def imported(*args: str) -> dict[str, Any]:
    code, out, err = bench("import", *args, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert isinstance(data, dict)
    return data


def cells(name: str) -> list[Summary]:
    return [summarise_cell(list_runs(c)) for c in list_cells(Path("results/runs") / name)]


def test_every_format_becomes_summaries_of_origin_imported(there: Path) -> None:
    names = [
        "vllm_serve_c4.json", "vllm_throughput.json", "vllm_latency.json", "vllm_sweep_summary.json", "guidellm_c4.json",
        "aiperf/profile_export_aiperf.json", "inference_perf_stage_0.json", GENAI, "ml_energy.json", "inferencex_agg.json",
    ]  # fmt: skip
    data = imported(*(str(DATA / n) for n in names), "--name", "all")
    assert len(data["runs"]) == 14
    found = cells("all")
    assert {s.origin for s in found} == {"imported"} and len(found) == 12  # three runs of the sweep repeat one cell
    assert all(any(w.code == "imported" for w in s.warnings) for s in found)
    assert all(s.estimates for s in found)


def test_the_manifest_names_tool_version_file_and_digest(there: Path) -> None:
    import hashlib

    data = imported(str(DATA / "guidellm_c4.json"))
    manifest = RunReader.open(Path(data["runs"][0]["folder"])).manifest
    about = manifest["imported"]
    assert (about["tool"], about["tool_version"], about["file"], about["part"]) == (
        "GuideLLM", "0.8.1", "guidellm_c4.json", "benchmarks[0]",
    )  # fmt: skip
    assert about["sha256"] == hashlib.sha256((DATA / "guidellm_c4.json").read_bytes()).hexdigest()
    assert manifest["origin"] == "imported" and manifest["t0_utc"].startswith("2026-11-24T")
    assert about["notes"] and not about["not_reproduced"]


def test_importing_again_changes_nothing(there: Path) -> None:
    first, again = (imported(str(DATA / "vllm_serve_c4.json"), "--name", "x") for _ in range(2))
    assert again["runs"][0]["already_imported"] and again["runs"][0]["folder"] == first["runs"][0]["folder"]
    assert len(list_runs(list_cells(Path("results/runs/x"))[0])) == 1


def test_a_file_and_its_companion_count_once(there: Path) -> None:
    both = imported(str(DATA / "aiperf/profile_export_aiperf.json"), str(DATA / "aiperf/profile_export.jsonl"))
    assert len(both["runs"]) == 1


def test_repeats_of_a_sweep_give_an_interval(there: Path) -> None:
    imported(str(DATA / "vllm_sweep_summary.json"), "--name", "sweep", "--gpu", "H100-SXM", "--gpus", "2")
    small, large = cells("sweep")
    assert (small.facts.level, large.facts.level) == (("concurrency", 16.0), ("concurrency", 32.0))
    e = small.estimates["output_tokens_per_s"]
    assert e.num_runs == 3 and e.value == 513 and e.low is not None and e.low < 513
    assert small.estimates["output_tokens_per_s_per_gpu"].value == 256.5 and small.facts.tensor_parallel_size == 2


def test_what_no_file_says_stays_unknown_and_is_not_priced(there: Path) -> None:
    data = imported(str(DATA / "vllm_serve_c4.json"), "--name", "x")
    assert {"--gpu", "--gpus", "--tp"} <= set(data["runs"][0]["unknown"])
    (s,) = cells("x")
    assert "output_tokens_per_s_per_gpu" not in s.estimates and "--gpus" in s.absent["output_tokens_per_s_per_gpu"]
    assert s.facts.parallel_text == "GPUs unknown" and not s.facts.devices_known
    code, out, _ = bench("cost", "x", "--gpu-price", "3", "--json")
    assert code == 0 and "--gpus" in json.loads(out)["cells"][0]["unpriced"]


def test_a_gpu_named_like_several_boards_is_not_guessed(there: Path) -> None:
    imported(str(DATA / "ml_energy.json"), "--name", "x")
    from bench.analysis.efficiency import hardware_of

    (s,) = cells("x")
    assert s.facts.manifest["hardware"] is None and hardware_of(s.facts) is None and s.num_devices == 2
    imported(str(DATA / "ml_energy.json"), "--name", "y", "--gpu", "h100 sxm")
    hardware = hardware_of(cells("y")[0].facts)
    assert hardware is not None and hardware.name == "H100-SXM"


def test_an_option_that_contradicts_the_file_is_refused(there: Path) -> None:
    code, _, err = bench("import", str(DATA / "ml_energy.json"), "--gpus", "8")
    assert code == 2 and "the file says 2, --gpus says 8" in err


def test_latencies_from_the_send_are_not_ours_in_an_open_loop(there: Path) -> None:
    imported(str(DATA / "inference_perf_stage_0.json"), "--name", "open")
    (s,) = cells("open")
    assert s.estimates["ttft_service_p50_s"].value == pytest.approx(0.054)
    assert "ttft_p50_s" not in s.estimates and "due time" in s.absent["ttft_p50_s"]
    imported(str(DATA / "inferencex_agg.json"), "--name", "closed")
    single = cells("closed")[0]
    assert single.estimates["ttft_p50_s"].value == single.estimates["ttft_service_p50_s"].value == 0.2


def test_failed_requests_count_as_errors_and_in_no_latency(there: Path) -> None:
    data = imported(str(DATA / "vllm_serve_faults.json"), "--name", "x")
    summary = summarise_run(RunReader.open(Path(data["runs"][0]["folder"])))
    assert summary.errors == {"http_5xx": 5} and summary.values["error_ratio"] > 0.1
    assert summary.values["ttft_p50_s"] > 0.02
    assert "in_flight_mean" in summary.absent  # nobody knows when the failed ones ended


def test_energy_of_an_imported_summary(there: Path) -> None:
    imported(str(DATA / "ml_energy.json"), "--name", "x")
    (s,) = cells("x")
    assert s.estimates["energy_j_per_output_token"].value == 10.0 and s.estimates["power_w"].value == 600.0


def test_reports_say_imported_in_every_table_and_picture(there: Path) -> None:
    imported(str(DATA / "vllm_sweep_summary.json"), "--name", "sweep", "--gpu", "H100-SXM", "--gpus", "2")
    code, out, err = bench("report", "sweep")
    assert code == 0, err
    assert "IMPORTED, NOT MEASURED HERE" in out
    text = Path("results/runs/sweep/report/report.md").read_text()
    numbers = text.partition("### engine")[0]  # what follows is provenance
    headings = [line for line in numbers.splitlines() if line.startswith("### ")]
    assert len(headings) >= 8 and all("imported, not measured here" in h for h in headings), headings
    pictures = list(Path("results/runs/sweep/report/charts").glob("*.svg"))
    assert len(pictures) >= 3 and all("IMPORTED, NOT MEASURED HERE" in p.read_text() for p in pictures)


def test_a_report_of_whatever_was_imported_together(there: Path) -> None:
    names = [
        "vllm_serve_faults.json", "vllm_serve_rate.json", "vllm_throughput.json", "vllm_latency.json", "guidellm_c4.json",
        "aiperf/profile_export_aiperf.json", "inference_perf_stage_0.json", GENAI, "ml_energy.json", "inferencex_agg.json",
    ]  # fmt: skip
    imported(*(str(DATA / n) for n in names), "--name", "all")
    code, out, err = bench("report", "all")
    assert code == 0 and "IMPORTED" in out, err
    text = Path("results/runs/all/report/report.md").read_text()
    assert "device unknown" in text and "| unknown" in text and "CPU" not in text
    assert "GuideLLM keeps no times of single chunks" in text


def test_cost_and_show_work_on_imports(there: Path) -> None:
    imported(str(DATA / "vllm_sweep_summary.json"), "--name", "sweep", "--gpu", "H100-SXM", "--gpus", "2")
    code, out, err = bench("cost", "sweep", "--gpu-price", "2", "--json")
    assert code == 0, err
    first = json.loads(out)["cells"][0]
    assert first["origin"] == "imported"
    # 2 GPUs x 2 USD an hour at 513 output tokens/s
    assert first["full_use"]["cost_usd_per_million_output_tokens"]["value"] == pytest.approx(4 / 3600 / 513 * 1e6)
    run = next(iter(list_runs(list_cells(Path("results/runs/sweep"))[0]))).folder
    code, out, err = bench("show", str(run))
    assert code == 0 and "IMPORTED" in out and "Output tokens/s" in out, err


def test_measured_capacity_reads_imports(there: Path) -> None:
    from bench.catalog.hardware import load_hardware
    from bench.catalog.slo import load_slo
    from bench.decide.measured import measured_capacity

    imported(str(DATA / "vllm_sweep_summary.json"), "--name", "sweep", "--gpu", "H100-SXM", "--gpus", "2")
    (capacity,) = measured_capacity("sweep", load_hardware("H100-SXM"), load_slo("ttft p99 <= 500 ms"))
    assert capacity.origin == "imported" and capacity.devices == 2


def test_breakeven_and_plan_name_the_origin(there: Path) -> None:
    imported(str(DATA / "vllm_sweep_summary.json"), "--name", "sweep", "--gpu", "H100-SXM", "--gpus", "2")
    (there / "decision.yaml").write_text(
        "name: d\nwhy: does it pay?\noptions:\n  - {name: ours, gpu: H100-SXM, num_gpus: 2, usd_per_gpu_hour: 2.5, results: sweep}\n"
        "apis: [openai-gpt-4o]\n"
    )
    code, out, err = bench("breakeven", "decision.yaml")
    assert code == 0 and "8,100 (imported)" in out, err
    (there / "demand.yaml").write_text(
        "name: p\nmodel: llama-3.1-8b\npeak_rate_per_s: 20\nisl: 1024\nosl: 128\nslo: ttft p99 <= 500 ms\n"
        "candidates: [{gpu: H100-SXM, results: sweep}]\n"
    )
    code, out, err = bench("plan", "demand.yaml")
    assert code == 0 and "4.00 imported" in out and "measured" not in out, err


def test_secrets_in_metadata_and_error_texts_are_not_kept(there: Path) -> None:
    data = json.loads((DATA / "vllm_serve_faults.json").read_text())
    data |= {
        "api_key": "sk-0123456789abcdef",
        "errors": ["Bad Request: wrong key sk-0123456789abcdef" if e else "" for e in data["errors"]],
    }
    (there / "x.json").write_text(json.dumps(data))
    folder = Path(imported("x.json")["runs"][0]["folder"])
    for name in ("manifest.json", "requests.jsonl"):
        assert "0123456789abcdef" not in (folder / name).read_text()
    assert "http_4xx" in (folder / "requests.jsonl").read_text()


def test_imports_do_not_mix_with_measured_results(there: Path) -> None:
    folder = there / "results/runs/mine"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    code, _, err = bench("import", str(DATA / "vllm_serve_c4.json"), "--name", "mine")
    assert code == 2 and "--with" in err and not list_cells(folder)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing.json"], "nothing.json: no such file"),
        ([str(DATA)], "this is a folder"),
        ([str(DATA / "README.md")], "not JSON"),
        ([str(DATA / "vllm_serve_c4.json"), "--gpu", "H1000"], "H1000"),
        ([str(DATA / "vllm_serve_c4.json"), "--name", "My Runs"], "write my-runs"),
        ([str(DATA / "vllm_serve_c4.json"), "--gpus", "2", "--tp", "4"], "4 ranks do not fit on 2 GPUs"),
        ([str(DATA / "vllm_serve_c4.json"), "--format", "aiperf"], "not a result file of AIPerf"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(there: Path, args: list[str], message: str) -> None:
    code, out, err = bench("import", *args)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not out
    assert not (there / "results").exists()


def test_nothing_is_written_when_one_of_several_files_is_bad(there: Path) -> None:
    shutil.copy(DATA / "vllm_serve_c4.json", there / "good.json")
    (there / "bad.json").write_text("{")
    code, _, err = bench("import", "good.json", "bad.json")
    assert code == 2 and "bad.json" in err and not (there / "results").exists()


def test_help_imports_no_reader() -> None:
    code = "import sys; from bench.cli import cli; cli.get_command(None, 'import'); print(any(m.startswith('bench.interop') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
