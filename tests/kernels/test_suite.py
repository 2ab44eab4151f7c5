"""The suite end to end on this CPU, and what it does when a case crashes, hangs or poisons its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from bench.cli.kernels import command
from bench.errors import BadInput
from kernels import child, results
from kernels.case import make_case
from kernels.config import SuiteConfig, load_suite
from kernels.suite import list_cases, run_suite

TIMING = {"min_repeats": 6, "max_repeats": 6, "budget_s": 0.001, "warmup_s": 0.0001, "flush_limit_bytes": 4096}
SUITE = SuiteConfig.model_validate({"name": "mine", "why": "test", "timing": TIMING, "case_limit_s": 30.0})
COPIES = [make_case("memory", "copy", "torch", "fp32", {"bytes": size}) for size in (1024, 2048, 4096)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`bench kernels --config tiny` once, as a user runs it."""
    out = tmp_path_factory.mktemp("kernels") / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [
        sys.executable,
        "-m",
        "bench",
        "kernels",
        "--config",
        "tiny",
        "--device",
        "cpu",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=False, env=env)
    return done, out


def test_tiny_suite_end_to_end(tiny):
    done, out = tiny
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == results.load_summary(out)
    assert {p.name for p in out.iterdir()} >= {
        "samples.jsonl",
        "summary.json",
        "table.txt",
        "kernels.png",
        "kernels.svg",
    }
    statuses = {r["case_id"]: r["status"] for r in printed["cases"]}
    assert len(statuses) == len(list_cases(load_suite("tiny"), "cpu"))
    assert set(statuses.values()) <= {"ok", "n/a", "checked"}
    assert all(r["reason"] for r in printed["cases"] if r["status"] != "ok")


def test_every_family_that_a_cpu_has_is_measured_and_checked(tiny):
    cases = results.load_summary(tiny[1])["cases"]
    measured = {r["family"] for r in cases if r["status"] == "ok"}
    assert measured == {"memory", "gemm", "attention", "norm", "moe", "collectives", "host"}
    for r in cases:
        if r["status"] == "ok":
            assert r["check"]["passed"] and r["time_s"]["value"] > 0 and r["time_s"]["low"] <= r["time_s"]["high"]
    try:
        import triton  # noqa: F401
    except ImportError:
        return
    checked = {(r["family"], r["op"]) for r in cases if r["status"] == "checked"}
    assert checked >= {
        ("attention", "prefill"),
        ("attention", "paged_decode"),
        ("norm", "rope"),
        ("moe", "grouped_gemm"),
    }


def test_the_summary_is_a_function_of_the_samples(tiny):
    folder = tiny[1]
    assert json.loads(json.dumps(results.rebuild(folder))) == results.load_summary(folder)


def _crashing_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Children import a sitecustomize that spoils kernels.memory.prepare for the 2,048-byte copy."""
    (tmp_path / "sitecustomize.py").write_text(
        "import kernels.memory as m\n"
        "right = m.prepare\n"
        "def prepare(case, device, seed):\n"
        "    if case.dim('bytes') == 2048:\n"
        f"        {body}\n"
        "    return right(case, device, seed)\n"
        "m.prepare = prepare\n"
    )
    root = str(Path(child.__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("import os; os._exit(3)", "ended with status 3"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
        ("raise RuntimeError('CUDA error: an illegal memory access was encountered')", "CUDA error: an illegal"),
    ],
    ids=["crash", "exit", "hang", "poison"],
)
def test_a_case_that_takes_its_process_along_is_one_failed_case(tmp_path, monkeypatch, body, reason):
    _crashing_child(tmp_path, monkeypatch, body)
    suite = SUITE.model_copy(update={"case_limit_s": 2.0}) if "sleep" in body else SUITE
    run = run_suite(suite, "cpu", lambda device: COPIES, tmp_path / "log")
    assert [r.answer["status"] for r in run.results] == ["ok", "failed", "ok"]
    assert reason in run.results[1].answer["reason"]
    assert [r.case for r in run.results] == COPIES and not run.interrupted


def _spoiled_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Every process imports a sitecustomize that replaces torch.distributed's collectives before a rank uses them."""
    (tmp_path / "sitecustomize.py").write_text(f"import kernels.collectives as c\nright = c._collective\n{body}\n")
    root = str(Path(child.__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))


def test_collectives_that_do_nothing_are_caught(tmp_path, monkeypatch):
    body = (
        "import dataclasses\n"
        "c._collective = lambda *a: dataclasses.replace(right(*a), call=lambda: None, reset=right(*a).output.zero_)"
    )
    _spoiled_ranks(tmp_path, monkeypatch, body)
    ops = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
    cases = [make_case("collectives", op, "torch", "fp32", {"bytes": 1024, "ranks": 2}) for op in ops]
    run = run_suite(SUITE, "cpu", lambda device: cases, tmp_path / "log")
    for result in run.results:
        assert result.answer["status"] == "wrong" and "timing" not in result.answer, (result.case, result.answer)
    assert len(run.results) == len(ops)


def test_a_rank_that_dies_is_one_failed_case(tmp_path, monkeypatch):
    body = (
        "def dies(op, rank, num_ranks, everyone):\n"
        "    if rank == 1 and everyone[0].numel() == 512: raise RuntimeError('rank gone')\n"
        "    return right(op, rank, num_ranks, everyone)\n"
        "c._collective = dies"
    )
    _spoiled_ranks(tmp_path, monkeypatch, body)
    cases = [
        make_case("collectives", "all_gather", "torch", "fp32", {"bytes": b, "ranks": 2}) for b in (1024, 2048, 4096)
    ]
    suite = SUITE.model_copy(update={"case_limit_s": 5.0})
    run = run_suite(suite, "cpu", lambda device: cases, tmp_path / "log")
    assert [r.answer["status"] for r in run.results] == ["ok", "failed", "ok"]


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    def stop(result):
        raise KeyboardInterrupt

    run = run_suite(SUITE, "cpu", lambda device: COPIES, tmp_path / "log", on_result=stop)
    assert run.interrupted and len(run.results) == 1


def test_control_c_ends_with_130_and_leaves_readable_results(tmp_path):
    import signal
    import time

    out = tmp_path / "out"
    # the quick suite takes tens of seconds: the signal comes long before its end however fast the machine is
    command_line = [sys.executable, "-m", "bench", "kernels", "--quick", "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen(
        command_line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell starts jobs in the background with the signal ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    samples = out / results.SAMPLES
    deadline = time.monotonic() + 120
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    summary = results.load_summary(out)
    assert summary["status"] == "interrupted" and 3 <= len(summary["cases"]) < 70
    assert b"Traceback" not in errors


def test_no_process_is_left_behind(tmp_path):
    import psutil

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    suite = SUITE.model_copy(update={"case_limit_s": 30.0})
    ranks = [make_case("collectives", "all_reduce", "torch", "fp32", {"bytes": 1024, "ranks": 2})]
    run = run_suite(suite, "cpu", lambda device: ranks, tmp_path / "log")
    assert run.results[0].answer["status"] == "ok", run.results[0].answer["reason"]
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_a_missing_gpu_is_one_line(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match="cuda:0 is not here"):
        run_suite(SUITE, "cuda:0", lambda device: COPIES, tmp_path / "log")


def test_too_large_is_not_available_and_says_how_much_is_free(cpu):
    case = make_case("memory", "copy", "torch", "fp32", {"bytes": 2**45})
    result = child.run_case(case, cpu, SUITE.timing.plan(), 0, None, 0.0)
    assert result["status"] == "n/a" and "GiB are free" in result["reason"]


def test_command_line_refuses_what_it_cannot_use(tmp_path):
    runner = CliRunner()
    for arguments in (["--only", "gem"], ["--config", "nothing-like-it"], ["--config", str(tmp_path / "no.yaml")]):
        result = runner.invoke(command, arguments)
        assert isinstance(result.exception, BadInput)
    full = tmp_path / "full"
    full.mkdir()
    (full / results.SAMPLES).write_text("")
    result = runner.invoke(command, ["--config", "tiny", "--only", "host", "--device", "cpu", "--out", str(full)])
    assert isinstance(result.exception, BadInput) and "holds results already" in str(result.exception)


def test_list_prints_the_cases():
    result = CliRunner().invoke(command, ["--config", "tiny", "--device", "cpu", "--list", "--json"])
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert len(listed) == len(list_cases(load_suite("tiny"), "cpu"))
