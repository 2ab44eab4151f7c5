"""Ending a tree of processes whose parents have already gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from bench.engines.processes import descendants, end_processes, started_processes, still_running

#: Starts a child that ignores SIGTERM for ``argv[1]`` seconds, says so, and waits.
PARENT = """
import subprocess, sys
child = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(float(sys.argv[1]))"
p = subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdout=subprocess.PIPE)
p.stdout.readline()
print("ready", flush=True)
p.wait()
"""


def orphaned(child_lives_s: float) -> dict[int, int]:
    """The processes of a tree whose parent was killed and reaped while its child went on."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(child_lives_s)], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    tree = started_processes({parent.pid, *descendants(parent.pid)})
    assert len(tree) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert parent.pid not in still_running(tree) and len(still_running(tree)) == 1
    return tree


def test_orphans_are_known_again_and_ended() -> None:
    tree = orphaned(600)
    assert end_processes(lambda: still_running(tree), 30) == set()
    assert still_running(tree) == set()


def test_grace_lets_a_process_end_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = orphaned(0.3)
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(pid))
    assert end_processes(lambda: still_running(tree), 30, grace_s=60) == set()
    assert sent == []


def test_a_later_process_with_the_same_pid_is_not_touched() -> None:
    me = os.getpid()
    ticks = started_processes([me])[me]
    assert still_running({me: ticks}) == {me}
    assert still_running({me: ticks - 1}) == set()
