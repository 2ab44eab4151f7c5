"""The evidence programme: its plan, its state across interruptions, and what it publishes. No engine is started here."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.config.loading import load
from scripts import evidence_results, gpu_evidence
from scripts.evidence_parts import Part, Programme, programme

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_part_needs_only_earlier_ones_and_every_experiment_loads(rehearsal):
    plan = programme(rehearsal)
    seen: set[str] = set()
    for part in plan.parts:
        assert set(part.needs) <= seen, part.name
        seen.add(part.name)
        assert (part.kind == "call" and part.argv[0] in gpu_evidence.CALLS) or part.argv[0] == "run"
        if part.kind == "bench":
            assert load(str(ROOT / "configs" / "experiments" / f"{part.argv[1]}.yaml")).cells
    names = (*plan.offline, plan.serve, plan.sampler_on, plan.sampler_off)
    assert all((ROOT / "configs" / "experiments" / f"{n}.yaml").exists() for n in names)


def test_the_gpu_programme_is_planned_for_less_than_26_minutes():
    assert 15 * 60 < programme(False).gpu_s <= 25.5 * 60
    assert programme(True).gpu_s == 0


def test_only_telemetry_differs_between_the_sides_of_the_comparison():
    for plan in (programme(False), programme(True)):
        folder = ROOT / "configs" / "experiments"
        on, off = (load(str(folder / f"{n}.yaml")) for n in (plan.sampler_on, plan.sampler_off))
        assert [c.cell_id for c in on.cells] == [c.cell_id for c in off.cells]
        assert off.experiment.telemetry.source == "none" and on.experiment.telemetry.source != "none"
        assert on.experiment.repeats == off.experiment.repeats >= 3


@pytest.mark.parametrize("flag", [[], ["--rehearse"]])
def test_dry_run_prints_the_plan_and_leaves_nothing(flag, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "gpu_evidence.py"), "--dry-run", *flag]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "bench run evidence-" in done.stdout and "bench doctor --json" in done.stdout
    assert "missing" in done.stdout and list(tmp_path.iterdir()) == []


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit) as raised:
        gpu_evidence.main(["--rehearse", "--only", "kernel"])
    assert raised.value.code == 2 and "no part" in capsys.readouterr().err


# ---- running ---------------------------------------------------------------------------------------------------------


def _evidence(tmp_path: Path, parts: tuple[Part, ...], budget_s: float = 1e9) -> gpu_evidence.Evidence:
    plan = Programme("rehearsal", "tiny", ("e",), "s", "on", "off", {}, parts)
    return gpu_evidence.Evidence(plan, tmp_path, budget_s)


def _part(name: str, gpu_s: float = 0.0, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, "test", "call", (name,), gpu_s, 10, needs)


@pytest.fixture
def calls(monkeypatch):
    """Functions that note that they were called; ``fail`` raises, ``stop`` is interrupted once."""
    seen: list[str] = []

    def make(name):
        def call(evidence, part):
            seen.append(name)
            if name == "fail":
                raise gpu_evidence.PartFailed("because")
            if name == "stop" and seen.count("stop") == 1:
                raise KeyboardInterrupt

        return call

    monkeypatch.setattr(gpu_evidence, "CALLS", {n: make(n) for n in ("a", "b", "c", "fail", "stop", "after")})
    return seen


def test_complete_parts_are_never_repeated(tmp_path, calls):
    parts = (_part("a"), _part("b"))
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 0
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 0
    assert calls == ["a", "b"]
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ("b",)) == 0
    assert calls == ["a", "b", "b"]


def test_what_is_derived_is_made_again_when_something_before_it_has_run(tmp_path, calls):
    derived = dataclasses.replace(_part("c"), derived=True)
    parts = (_part("a"), _part("stop"), derived, _part("after"))
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), ("a", "c"), ()) == 1
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), ("c",), ()) == 1
    assert calls == ["a", "c"]
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 130
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 0
    assert calls == ["a", "c", "stop", "stop", "c", "after"]
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 0
    assert len(calls) == 6


def test_a_failed_part_holds_back_only_what_needs_it(tmp_path, calls):
    parts = (_part("fail"), _part("after", needs=("fail",)), _part("b"))
    evidence = _evidence(tmp_path, parts)
    assert gpu_evidence.run_all(evidence, (), ()) == 1
    assert calls == ["fail", "b"]
    stored = json.loads((tmp_path / "state.json").read_text())["parts"]
    assert stored["fail"]["status"] == "failed" and stored["fail"]["reason"] == "because" and "after" not in stored


def test_an_interrupt_is_kept_and_the_next_call_goes_on_there(tmp_path, calls):
    parts = (_part("a"), _part("stop"), _part("b"))
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 130
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 0
    assert calls == ["a", "stop", "stop", "b"]


def test_a_part_that_does_not_fit_into_the_time_waits(tmp_path, calls, capsys):
    parts = (_part("a", gpu_s=60), _part("b", gpu_s=600), _part("c", gpu_s=30))
    assert gpu_evidence.run_all(_evidence(tmp_path, parts, budget_s=100), (), ()) == 1
    assert calls == ["a", "c"] and "left for the next call" in capsys.readouterr().out


def test_another_programmes_folder_is_refused(tmp_path, calls, capsys):
    gpu_evidence.run_all(_evidence(tmp_path, (_part("a"),)), (), ())
    with pytest.raises(SystemExit, match="2"):
        gpu_evidence.Evidence(programme(False), tmp_path, 1.0)
    assert "holds the programme rehearsal" in capsys.readouterr().err


def test_a_command_past_its_limit_is_ended(tmp_path, monkeypatch):
    evidence = _evidence(tmp_path, ())
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: real(slow, **kwargs))
    with pytest.raises(gpu_evidence.PartFailed, match="not finished after"):
        gpu_evidence.bench(evidence, "slow", ["doctor"], 0.5)


def test_the_end_of_the_calls_time_breaks_off_and_the_next_call_goes_on_there(tmp_path, calls, monkeypatch, capsys):
    def over(evidence, part):
        raise gpu_evidence.OutOfTime

    first = gpu_evidence.CALLS["b"]
    monkeypatch.setitem(gpu_evidence.CALLS, "b", over)
    parts = (_part("a"), _part("b"), _part("c"))
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 1
    assert (
        calls == ["a"] and "the time of this call is over; the same command continues here" in capsys.readouterr().out
    )
    monkeypatch.setitem(gpu_evidence.CALLS, "b", first)
    assert gpu_evidence.run_all(_evidence(tmp_path, parts), (), ()) == 0
    assert calls == ["a", "b", "c"]


@pytest.fixture
def commands(monkeypatch):
    """`bench` stands for whatever Python the test says."""
    real = subprocess.Popen

    def say(code: str) -> None:
        monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: real([sys.executable, "-c", code], **kw))

    return say


def test_a_command_past_the_end_of_the_calls_time_is_interrupted(tmp_path, commands):
    evidence = _evidence(tmp_path, ())
    evidence.stop_at = time.monotonic() + 0.5
    commands("import time; time.sleep(60)")
    with pytest.raises(gpu_evidence.OutOfTime):
        gpu_evidence.bench(evidence, "slow", ["doctor"], 30)


def test_a_command_that_was_interrupted_interrupts_the_programme(tmp_path, commands):
    commands("raise SystemExit(130)")
    with pytest.raises(KeyboardInterrupt):
        gpu_evidence.bench(_evidence(tmp_path, ()), "slow", ["doctor"], 30)


@pytest.mark.parametrize(
    "code, runs, status",
    [
        (0, 1, "complete"),
        (0, 0, "not possible here"),
        (1, 1, "partial"),
        (2, 1, "partial"),
        (1, 0, "failed"),
        (-9, 1, "failed"),
    ],
)
def test_what_an_exit_code_means_for_a_part(tmp_path, code, runs, status):
    evidence = _evidence(tmp_path, ())
    for n in range(runs):
        _run(evidence.results, "e", "cell", n, {}, {})
    part = Part("p", "test", "bench", ("run", "e"), 0.0, 1.0, failed_ok=True)
    found, reason = gpu_evidence._status_of(code, part, evidence)
    assert found == status and (reason is None) == (status == "complete")


PROGRAMME = """
import signal, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
from scripts import evidence_state, gpu_evidence
from scripts.evidence_parts import Part, Programme
code = ("import os, pathlib, time\\n"
        "pathlib.Path('FOLDER/pid').write_text(str(os.getpid()))\\n"
        "try:\\n    time.sleep(60)\\n"
        "except KeyboardInterrupt:\\n    pathlib.Path('FOLDER/ended').write_text('cleanly')").replace("FOLDER", str(folder))
real = subprocess.Popen
evidence_state.subprocess.Popen = lambda command, **kw: real([sys.executable, "-c", code], **kw)
part = Part("doctor", "test", "call", ("doctor",), 0, 50)
evidence = gpu_evidence.Evidence(Programme("rehearsal", "tiny", ("e",), "s", "on", "off", {}, (part,)), folder, 1.0)
gpu_evidence._interrupt_on_signals()
sys.exit(gpu_evidence.run_all(evidence, (), ()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal on a parent's death is Linux's")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_programme_ends_the_command_cleanly(tmp_path, sign):
    """Started as a shell starts a background job, deaf to interrupts, which is what `nohup` and CI do."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAMME, str(tmp_path)],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    _wait_for(tmp_path / "pid")
    process.send_signal(sign)
    assert process.wait(30) == (130 if sign != signal.SIGKILL else -signal.SIGKILL)
    _wait_for(tmp_path / "ended")
    if sign != signal.SIGKILL:
        assert json.loads((tmp_path / "state.json").read_text())["parts"]["doctor"]["reason"] == "interrupted"


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


# ---- reading results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evidence-serve", "evidence-rehearsal-serve"])
def test_the_open_loop_is_the_closed_one_with_other_arrivals(name, tmp_path):
    source = ROOT / "configs" / "experiments" / f"{name}.yaml"
    file = tmp_path / "open.yaml"
    file.write_text(evidence_results.open_loop_yaml(source.read_text(), 12.3456, (0.5, 0.8)))
    closed, opened = load(str(source)).experiment, load(str(file))
    assert [c.spec.load.rate_per_s for c in opened.cells] == [6.17, 9.88]
    assert opened.experiment.name == name.replace("serve", "open")
    same = ("model", "engine", "workload", "warmup", "stop", "repeats", "telemetry")
    assert all(getattr(opened.experiment, f) == getattr(closed, f) for f in same)


def test_a_closed_loop_that_cannot_be_turned_is_an_error():
    with pytest.raises(ValueError, match="has no"):
        evidence_results.open_loop_yaml("name: x\n", 1.0, (0.5,))


def _run(results: Path, experiment: str, cell: str, n: int, axes: dict, values: dict, status: str = "complete") -> Path:
    run = results / "runs" / experiment / cell / f"run-{n}-x"
    run.mkdir(parents=True)
    manifest = {"status": status, "axes": axes, "t0_utc": f"2026-11-24T06:00:{n:02d}+00:00"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "values.json").write_text(json.dumps(values))
    return run


@pytest.fixture
def stored_values(monkeypatch):
    monkeypatch.setattr(evidence_results, "values_of", lambda run: json.loads((run / "values.json").read_text()))


def test_the_highest_rate_is_the_best_cells_median(tmp_path, stored_values):
    for n, rate in enumerate((10.0, 12.0, 11.0), 1):
        _run(tmp_path, "s", "c128", n, {"concurrency": 128}, {"requests_per_s": rate})
    _run(tmp_path, "s", "c16", 1, {"concurrency": 16}, {"requests_per_s": 4.0})
    _run(tmp_path, "s", "c256", 1, {"concurrency": 256}, {"requests_per_s": 99.0}, status="failed")
    assert evidence_results.highest_rate(tmp_path, "s") == 11.0
    assert evidence_results.highest_rate(tmp_path, "nothing") is None


def test_only_the_wanted_cells_are_learned_from(tmp_path):
    wanted = {"quantization": "None", "shape": "1k/1k"}
    mine = _run(tmp_path, "e", "a", 1, {"quantization": None, "shape": "1k/1k", "batch_size": 1}, {})
    _run(tmp_path, "e", "b", 1, {"quantization": "fp8", "shape": "1k/1k", "batch_size": 1}, {})
    _run(tmp_path, "e", "c", 1, {"quantization": None, "shape": "8k/1k", "batch_size": 1}, {})
    assert evidence_results.runs_to_learn_from(tmp_path, "e", wanted) == [mine]


def test_prediction_errors_pair_a_simulated_run_with_the_cell_that_it_names(tmp_path, stored_values):
    real, guess = tmp_path / "real", tmp_path / "guess"
    for n, value in enumerate((90.0, 110.0, 100.0), 1):
        _run(real, "e", "a", n, {"batch_size": 1}, {"output_tokens_per_s": value, "tpot_p50_s": 0.01})
    _run(real, "e", "b", 1, {"batch_size": 2}, {"output_tokens_per_s": 200.0})
    _run(real, "e", "c", 1, {"batch_size": 4}, {"output_tokens_per_s": 300.0})
    for cell, predicts, value in (("x", "a", 105.0), ("y", "b", 150.0)):
        run = _run(guess, "e.predicted", cell, 1, {"gpu": "h200"}, {"output_tokens_per_s": value})
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps({**manifest, "predicts": {"cell_id": predicts}}))
    rows = evidence_results.prediction_errors(real, guess, "e", {"batch_size": "1"})
    assert [r["cell_id"] for r in rows] == ["a", "b"] and [r["learned_from"] for r in rows] == [True, False]
    assert rows[0]["metrics"]["output_tokens_per_s"]["error_ratio"] == pytest.approx(0.05)
    assert set(rows[0]["metrics"]) == {"output_tokens_per_s"}
    summary = evidence_results.error_summary(rows)
    assert summary == {"output_tokens_per_s": {"median_absolute_error_ratio": pytest.approx(0.25), "num_cells": 1}}


def test_the_cost_of_telemetry_is_a_ratio_with_a_verdict(tmp_path, stored_values):
    for n, (with_, without) in enumerate(((99.9, 100.0), (100.1, 100.0), (100.0, 100.1)), 1):
        _run(tmp_path, "on", "c", 2 * n, {}, {"output_tokens_per_s": with_})
        _run(tmp_path, "off", "c", 2 * n + 1, {}, {"output_tokens_per_s": without})
    cost = evidence_results.sampler_cost(tmp_path, "on", "off")
    assert cost["ratio"]["value"] == pytest.approx(1.0, abs=0.002) and cost["verdict"] in ("no difference", "undecided")
    assert len(cost["with_telemetry"]) == 3
