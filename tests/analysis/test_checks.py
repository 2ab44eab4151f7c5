"""Each warning: raised when it should be, silent otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.analysis.checks import cell_warnings, run_warnings, worst
from bench.analysis.run_facts import RunFacts
from bench.analysis.steady_state import Window
from bench.analysis.summary import RunSummary, summarise_cell, summarise_run
from bench.config.experiment import CellSpec
from bench.config.sweep import expand
from bench.records import Estimate, RequestRecord, Warning_
from bench.store import RunReader
from tests.analysis.synthetic import EXPERIMENT, experiment, write_run

GOOD = Window(0.0, 60.0, "steady", True, "")


def facts(num_gpus: int = 1, load: dict[str, Any] | None = None, **changes: Any) -> RunFacts:
    tp = changes.pop("tensor_parallel_size", 1)
    spec = CellSpec.model_validate(
        {
            "model": "llama-3.1-8b",
            "engine": {"kind": "vllm", "args": {"tensor_parallel_size": tp}},
            "load": load or {"kind": "closed_loop", "concurrency": 64},
            "workload": changes.pop("workload", {"isl": 100, "osl": 100}),
            "weights": changes.pop("weights", "auto"),
        }
    )
    base: dict[str, Any] = {
        "experiment": "x", "cell_id": "c", "run": "run-1", "repeat": 1, "status": "complete", "reason": None, "origin": "measured",
        "created_utc": "", "axes": {}, "spec": spec, "engine": {"num_gpus": num_gpus, "effective_args": {"max_num_seqs": 256}},
    }  # fmt: skip
    return RunFacts(**(base | changes))


def summary(window: Window | None = GOOD, values: dict[str, float] | None = None, **changes: Any) -> RunSummary:
    base: dict[str, Any] = {
        "experiment": "x", "cell_id": "c", "run": "run-1", "repeat": 1, "origin": "measured", "started_utc": "", "window": window,
        "values": values or {},
    }  # fmt: skip
    return RunSummary(**(base | changes))


def codes(f: RunFacts, s: RunSummary, problems: tuple[str, ...] = ()) -> dict[str, str]:
    return {w.code: w.severity for w in run_warnings(f, s, problems)}


def test_a_good_run_has_no_warning() -> None:
    assert codes(facts(), summary(values={"error_ratio": 0.0, "mfu_ratio": 0.5, "mbu_ratio": 0.6})) == {}


@pytest.mark.parametrize(
    ("code", "f", "s"),
    [
        ("simulated", {"origin": "simulated"}, {}),
        ("imported", {"origin": "imported"}, {}),
        ("dummy-weights", {"weights": "dummy"}, {}),
        ("window-too-short", {}, {"window": Window(0, 20, "steady", True, "")}),
        ("window-too-short", {"num_gpus": 0}, {"window": Window(0, 3, "steady", True, "")}),
        ("not-steady", {}, {"window": Window(0, 60, "whole", False, "too short")}),
        ("errors", {}, {"values": {"error_ratio": 0.02}, "errors": {"timeout": 3}}),
        ("telemetry-failed", {"telemetry": {"error": "no driver"}}, {}),
        ("client-limited", {"client": {"client_limited": True, "reason": "99 % CPU"}}, {}),
        ("schedule-late", {"load": {"kind": "open_loop", "rate_per_s": 5}}, {"values": {"send_lateness_p99_s": 0.5}}),
        ("prefix-cache-hits", {}, {"values": {"prefix_cache_hit_ratio": 0.4}}),
        ("preemptions", {}, {"values": {"num_preemptions": 3.0}}),
        ("batch-cap", {}, {"values": {"running_max": 256.0, "waiting_mean": 40.0}}),
        ("far-below-roofline", {}, {"values": {"mfu_ratio": 0.05, "mbu_ratio": 0.1, "running_mean": 20.0}}),
        ("mfu-contradicted", {"engine": {"num_gpus": 1, "device_uuids": ["GPU-0"]}}, {"values": {"mfu_ratio": 0.8, "mbu_ratio": 0.1, "tensor_active_ratio": 0.3}}),
        ("shared-cpu", {"num_gpus": 0, "tensor_parallel_size": 2}, {}),
        ("oversubscribed-cpu", {"num_gpus": 0, "tensor_parallel_size": 4, "provenance": {"cpu": {"num_usable": 2}}}, {}),
        ("token-count-mismatch", {}, {"counts": {"step_decode_tokens": 90, "step_prefill_tokens": 10, "all_output_tokens": 100, "num_with_output": 1, "all_input_tokens": 10, "all_cached_tokens": 0}}),
        ("tokens-not-from-server", {}, {"token_sources": ("tokenizer",)}),
        ("nothing-measured", {}, {"window": None}),
    ],
)  # fmt: skip
def test_each_warning_is_raised(code: str, f: dict[str, Any], s: dict[str, Any]) -> None:
    assert code in codes(facts(**f), summary(**s))


def test_severity_grows_with_the_share_of_errors() -> None:
    found = [codes(facts(), summary(values={"error_ratio": share}))["errors"] for share in (0.001, 0.02, 0.2)]
    assert found == ["note", "warning", "serious"]


def test_asked_for_prefixes_are_no_warning() -> None:
    shared = facts(workload={"isl": 100, "osl": 10, "prefix": {"tokens": 50}})
    assert "prefix-cache-hits" not in codes(shared, summary(values={"prefix_cache_hit_ratio": 0.5}))


def test_the_likely_cause_is_named() -> None:
    values = {"mfu_ratio": 0.05, "mbu_ratio": 0.1, "running_mean": 8.0}
    text = next(w.message for w in run_warnings(facts(), summary(values=values), ()) if w.code == "far-below-roofline")
    assert "of 64 requests in flight only 8 ran" in text


def test_torn_files_are_told() -> None:
    assert "torn-file" in codes(facts(), summary(), ("requests.jsonl:7: unreadable line dropped",))


def test_cell_warnings_count_their_runs_and_add_their_own() -> None:
    rows = [
        summary(values={"output_tokens_per_s": v, "num_preemptions": p}, run=f"run-{i}")
        for i, (v, p) in enumerate([(100, 1), (130, 0)])
    ]
    rows = [
        RunSummary(**{**{k: getattr(r, k) for k in r.__slots__}, "warnings": run_warnings(facts(), r, ())})
        for r in rows
    ]
    found = {w.code: w for w in cell_warnings(facts(), rows, {"output_tokens_per_s": Estimate(115, None, None)})}
    assert "(1 of 2 runs)" in found["preemptions"].message
    assert "too-few-runs" in found and "noisy" in found
    assert all(w.remedy for w in found.values())


def test_dummy_weights_say_what_does_not_hold(tmp_path: Path) -> None:
    cell = expand(experiment(sweep={"grid": {"batch_size": [4]}}))[0]
    run = write_run(tmp_path, cell, 1, origin="measured")
    text = next(w.message for w in summarise_run(run).warnings if w.code == "dummy-weights")
    assert "MoE routing" in text and "speculative acceptance" in text
    assert EXPERIMENT["weights"] == "dummy"
    assert "simulated" not in {w.code for w in summarise_cell([run]).warnings}


def test_kv_capacity_that_changes_between_starts_is_told() -> None:
    rows = [
        summary(run=f"run-{i}", counts={"kv_capacity_tokens": kv})
        for i, kv in enumerate([400_000.0, 401_000.0, 390_000.0])
    ]
    assert "kv-capacity-differs" in {w.code for w in cell_warnings(facts(), rows, {})}
    assert "kv-capacity-differs" not in {w.code for w in cell_warnings(facts(), rows[:2], {})}


def test_the_worst_of_several_speaks_for_them() -> None:
    """A later, milder run must not stand for a worse one, in size or in severity."""
    runs = []
    for number, share in enumerate((0.2, 0.5, 0.001)):
        s = summary(values={"error_ratio": share, "output_tokens_per_s": 100.0}, errors={"engine_error": 3})
        f = facts(run=f"run-{number}")
        runs.append(replace(s, run=f.run, warnings=run_warnings(f, s, ())))
    (errors,) = (w for w in cell_warnings(facts(), runs, {}) if w.code == "errors")
    assert errors.severity == "serious" and errors.message.startswith("at worst, 50.0% of the counted requests failed")
    mild = replace(errors, message="at worst, 0.1% of ...", severity="note", size=0.001)
    assert worst([mild, errors, mild]) == errors
    assert worst([mild, mild]) == mild
    noisy = [Warning_("noisy", f"varies by {x}%", "", size=x) for x in (19, 141, 30)]
    assert worst(noisy).message == "at worst, varies by 141%"
    assert worst(noisy[:1]).message == "varies by 19%"  # one alone is no worst


def test_a_simulated_device_has_no_sensors_to_doubt(tmp_path: Path) -> None:
    cell = expand(experiment())[0]
    codes = {
        origin: {w.code for w in summarise_run(write_run(tmp_path / origin, cell, 1, origin=origin)).warnings}
        for origin in ("measured", "simulated")
    }
    assert "energy-window-short" in codes["measured"]
    assert not {c for c in codes["simulated"] if c.startswith("energy-")}


def test_failed_requests_do_not_cast_doubt_on_who_counted_the_tokens(tmp_path: Path) -> None:
    run = write_run(tmp_path, expand(experiment())[0], 1, origin="measured")
    refused = RequestRecord(9999, "measured", 10, 0, None, None, None, None, 0.5, "connect", token_source="chunks")
    with open(run.folder / "requests.jsonl", "a") as f:
        f.write(json.dumps(refused.to_dict()) + "\n")
    found = summarise_run(RunReader.open(run.folder))
    assert found.errors == {"connect": 1}
    assert "tokens-not-from-server" not in {w.code for w in found.warnings}
