"""Kills, full disks and Ctrl-C: nothing finished is lost, nothing is left behind, the next run completes the rest."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bench.store import RunReader, list_cells, list_runs

NUM_KILLS = 20


def all_runs(folder: Path) -> list[RunReader]:
    return [run for cell in list_cells(folder) for run in list_runs(cell)]


def complete(folder: Path) -> dict[str, dict]:
    """Folder name -> file facts of every complete run; each must verify and be readable without a complaint."""
    out = {}
    for run in all_runs(folder):
        if run.status == "complete":
            assert run.verify() == []
            assert len(run.requests()) >= 12 and run.problems == []
            out[f"{run.folder.parent.name}/{run.folder.name}"] = run.manifest["files"]
    return out


@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments(tool) -> None:
    rng = random.Random(20261124)
    folder = tool.results / "runs" / "kills"
    tool.write(repeats=12)
    finished: dict[str, dict] = {}
    for _ in range(NUM_KILLS):
        process = tool.start()
        time.sleep(rng.uniform(0.05, 3.0))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert tool.leftovers() == []
        for run in all_runs(folder):
            run.requests(), run.steps(), run.telemetry()  # the reader accepts whatever is there
        now = complete(folder)
        assert {k: now.get(k) for k in finished} == finished, "a finished run was lost or changed"
        finished = now
    done = tool.run()
    assert done.returncode == 0, done.stderr
    now = complete(folder)
    assert {k: now.get(k) for k in finished} == finished
    assert len(now) == 4 * 12
    assert all(len([r for r in list_runs(c) if r.status == "complete"]) == 12 for c in list_cells(folder))
    again = tool.run()
    assert again.returncode == 0 and complete(folder) == now


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tool) -> None:
    tool.write(repeats=20)
    process = tool.start()
    tool.wait_for("bench.engines.child")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with `bench run" in err and "Traceback" not in err + out
    assert tool.leftovers(2.0) == []
    tool.write(repeats=2)
    assert tool.run().returncode == 0


def test_the_engine_killed_is_a_failed_run_and_the_sweep_goes_on(tool) -> None:
    tool.write(repeats=2, osl="[200]", requests=12)
    process = tool.start()
    tool.wait_for("bench.engines.child")
    folder = tool.results / "runs" / "kills"
    until = time.monotonic() + 20
    while not any(folder.glob("*/run-*/requests.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(tool.children("bench.engines.child")[0].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, out + err
    failed = [r for r in all_runs(folder) if r.status == "failed"]
    assert len(failed) == 1
    assert failed[0].manifest["error"]["code"] in ("killed", "out-of-memory")
    assert len(complete(folder)) == 3
    assert tool.leftovers() == []
    assert tool.run().returncode == 0
    assert len(complete(folder)) == 4


@pytest.mark.parametrize(
    ("fail", "code"), [("crash", "crash"), ("hang", "hang"), ("start", None), ("request", "requests-failed")]
)
def test_engine_failures_have_their_reason(tool, fail: str, code: str | None) -> None:
    tool.write(fail=fail, repeats=1, osl="[5]", idle_s=2, max_errors="0")
    done = tool.run()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    failed = [r for r in all_runs(tool.results / "runs" / "kills") if r.status == "failed"]
    assert failed
    for run in failed:
        error = run.manifest["error"]
        assert error["reason"] and (code is None or error["code"] == code)
    assert tool.leftovers() == []


def test_failed_requests_are_records_and_the_run_counts(tool) -> None:
    tool.write(fail="request", repeats=1, osl="[5]")
    assert tool.run().returncode == 0
    runs = all_runs(tool.results / "runs" / "kills")
    assert all(r.status == "complete" for r in runs)
    assert any(q.error == "engine_error" for r in runs for q in r.requests())


def test_two_at_once_are_refused(tool) -> None:
    tool.write(repeats=10)
    process = tool.start()
    try:
        tool.wait_for("bench.engines.child")
        second = tool.run()
        assert second.returncode == 2
        assert f"process {process.pid}" in second.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_changed_configuration_is_kept_apart(tool) -> None:
    assert tool.run().returncode == 0
    tool.write(requests=13)
    done = tool.run()
    assert done.returncode == 0
    assert "belong to an earlier configuration" in done.stdout
    folder = tool.results / "runs" / "kills"
    assert len(list_cells(folder)) == 8


def can_mount(path: Path) -> bool:
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(path)], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def test_a_full_disk(tool, tmp_path: Path) -> None:
    small = tmp_path / "small"
    if not can_mount(small):
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    try:
        tool.write(repeats=4, requests=60)
        done = tool.run(results=small)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "free some space" in done.stderr and "Traceback" not in done.stderr + done.stdout
        assert done.stderr.count("\n") == 1
        assert tool.leftovers() == []
        folder = small / "runs" / "kills"
        before = complete(folder)
        assert before, "the disk was full before a single run was finished"
        for run in all_runs(folder):
            run.requests(), run.telemetry()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        again = tool.run(results=small)
        assert again.returncode == 0, again.stderr
        after = complete(folder)
        assert {k: after.get(k) for k in before} == before
        assert len(after) == 4 * 4
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
