"""Real-time priority of measuring processes: taken where it is allowed, given back, never inherited, told in the result."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import priority

linux = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="no sched_setscheduler on this platform")
RESET = getattr(os, "SCHED_RESET_ON_FORK", 0)


def policy() -> int:
    return os.sched_getscheduler(0) & ~RESET


ORDINARY = policy() if hasattr(os, "sched_setscheduler") else 0


@linux
def test_it_is_taken_and_given_back_and_children_are_ordinary() -> None:
    with priority.real_time() as allowed:
        assert policy() == (os.SCHED_RR if allowed else ORDINARY)
        child = "import os; print(os.sched_getscheduler(0))"
        out = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
        assert int(out) in (ORDINARY, os.SCHED_OTHER)
    assert policy() == ORDINARY


@linux
def test_it_is_given_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), priority.real_time():
        raise ValueError("inside")
    assert policy() == ORDINARY


@linux
def test_it_is_given_back_by_a_process_without_privileges() -> None:
    """As with an rtprio limit alone: such a process may leave real-time, but not unset the flag that it came with."""
    if os.geteuid() != 0:
        pytest.skip("only root can give privileges up")
    child = (
        "import os; from bench.priority import real_time\n"
        "with real_time() as allowed: os.setgid(65534); os.setuid(65534)\n"
        "print(allowed, os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == str(os.SCHED_OTHER)


@linux
def test_another_policy_comes_back() -> None:
    child = (
        "import os; from bench.priority import real_time\n"
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))\n"
        "with real_time(): pass\n"
        "print(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(os.SCHED_BATCH)]


@linux
def test_a_refusal_of_the_kernel_and_the_switch_leave_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with priority.real_time() as allowed:
        assert not allowed and policy() == ORDINARY
    monkeypatch.undo()
    monkeypatch.setenv(priority.SWITCH, "0")
    with priority.real_time() as allowed:
        assert not allowed and policy() == ORDINARY
