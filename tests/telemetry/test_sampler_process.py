"""The life of the sampling process: start, stop, kill, full disk, a parent that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bench.telemetry.columns import read_samples
from bench.telemetry.sampler import Sampler

from .conftest import ROOT, wait_until

PARENT = """
import sys, time
from bench.telemetry.sampler import Sampler
sampler = Sampler(sys.argv[1], time.monotonic()).start()
print(sampler.pid, flush=True)
{more}
time.sleep(60)
"""


def start_parent(path: Path, more: str = "") -> tuple[subprocess.Popen[str], int]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(more=more), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    with Sampler(tmp_path / "t.arrow", time.monotonic()) as sampler:
        time.sleep(1.3)
    stats = sampler.stats
    assert stats["error"] is None
    assert 0 < stats["cpu_share_of_one_core"] < 1
    assert 0 <= stats["jitter_s"]["p50"] <= stats["jitter_s"]["p99"] <= stats["jitter_s"]["max"]
    assert stats["num_samples"] == read_samples(tmp_path / "t.arrow").table.num_rows > 0
    assert abs(stats["wall_clock_step_s"]) < 5
    assert stats["devices"]["cpu"]["num_cpus"] == os.cpu_count()
    import json

    json.dumps(stats)  # goes into the manifest as it is


def test_clock_pairs_are_stored_each_second(tmp_path: Path) -> None:
    with Sampler(tmp_path / "t.arrow", time.monotonic()):
        time.sleep(2.3)
    file = read_samples(tmp_path / "t.arrow")
    assert len(file.clock_pairs) >= 2
    offset = time.time_ns() - time.monotonic_ns()
    for wall_ns, monotonic_ns in file.clock_pairs:
        assert abs((wall_ns - monotonic_ns) - offset) < 1e9
    assert float(file.metadata["t0_monotonic_s"]) <= time.monotonic()


def test_stop_is_harmless_twice_and_leaves_nothing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sampler = Sampler(tmp_path / "t.arrow", time.monotonic()).start()
    pid = sampler.pid
    assert pid is not None and psutil.pid_exists(pid)
    first = sampler.stop()
    assert sampler.stop() is first
    assert not psutil.pid_exists(pid)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_exception_in_the_block_ends_it_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Sampler(tmp_path / "t.arrow", time.monotonic()) as sampler:
        pid = sampler.pid
        raise RuntimeError
    assert pid is not None and not psutil.pid_exists(pid)


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent, pid = start_parent(tmp_path / "t.arrow")
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not psutil.pid_exists(pid))
    file = read_samples(tmp_path / "t.arrow")
    assert file.table.num_rows > 0 and not file.torn


def test_it_ends_when_its_parent_is_killed_although_a_child_holds_the_pipe(tmp_path: Path) -> None:
    # a forked child of the parent inherits the pipe and outlives it: its end alone would never be seen
    parent, pid = start_parent(tmp_path / "t.arrow", more="import os\nif os.fork() == 0: time.sleep(20); os._exit(0)")
    time.sleep(0.3)
    children = [c for c in psutil.Process(parent.pid).children() if c.pid != pid]
    parent.kill()
    parent.wait()
    try:
        assert wait_until(lambda: not psutil.pid_exists(pid))
        assert children and all(c.is_running() for c in children)
    finally:
        for child in children:
            child.kill()


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path / "t.arrow", time.monotonic())
    thread = threading.Thread(target=sampler.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert sampler.pid is not None and psutil.Process(sampler.pid).status() != psutil.STATUS_ZOMBIE
    assert sampler.stop()["error"] is None


def test_interrupt_from_the_keyboard_is_left_to_the_parent(tmp_path: Path) -> None:
    with Sampler(tmp_path / "t.arrow", time.monotonic()) as sampler:
        assert sampler.pid is not None
        os.kill(sampler.pid, signal.SIGINT)
        time.sleep(0.3)
        assert psutil.pid_exists(sampler.pid)
    assert sampler.error is None


def test_a_killed_sampler_is_reported_and_its_file_readable(tmp_path: Path) -> None:
    with Sampler(tmp_path / "t.arrow", time.monotonic()) as sampler:
        assert sampler.pid is not None
        time.sleep(1.3)
        os.kill(sampler.pid, signal.SIGKILL)
        time.sleep(0.1)
    assert "lost" in str(sampler.error)
    file = read_samples(tmp_path / "t.arrow")
    assert file.table.num_rows > 0
    assert max(s.t_s for s in file.samples()) > 0.7  # at most the last second is gone


def test_terminating_it_flushes(tmp_path: Path) -> None:
    with Sampler(tmp_path / "t.arrow", time.monotonic()) as sampler:
        assert sampler.pid is not None
        time.sleep(0.3)
        os.kill(sampler.pid, signal.SIGTERM)
        time.sleep(0.3)
    assert read_samples(tmp_path / "t.arrow").table.num_rows > 0


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with Sampler(tmp_path / "no" / "t.arrow", time.monotonic()) as sampler:
        pass
    assert "cannot write telemetry" in str(sampler.error)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_does_not_end_it(tmp_path: Path) -> None:
    with Sampler("/dev/full", time.monotonic()) as sampler:
        time.sleep(1.2)
    assert "No space left" in str(sampler.error)
    assert sampler.stats["num_ticks"] > 10


def test_an_unknown_source(tmp_path: Path) -> None:
    with Sampler(tmp_path / "t.arrow", time.monotonic(), source="guess") as sampler:
        pass
    assert "guess" in str(sampler.error)
