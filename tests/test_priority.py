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


@linux
def test_it_is_taken_and_given_back_and_children_are_ordinary() -> None:
    with priority.real_time() as allowed:
        assert policy() == (os.SCHED_RR if allowed else os.SCHED_OTHER)
        child = "import os; print(os.sched_getscheduler(0))"
        out = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
        assert int(out) == os.SCHED_OTHER
    assert policy() == os.SCHED_OTHER


@linux
def test_it_is_given_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), priority.real_time():
        raise ValueError("inside")
    assert policy() == os.SCHED_OTHER


@linux
def test_a_refusal_of_the_kernel_and_the_switch_leave_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with priority.real_time() as allowed:
        assert not allowed and policy() == os.SCHED_OTHER
    monkeypatch.undo()
    monkeypatch.setenv(priority.SWITCH, "0")
    with priority.real_time() as allowed:
        assert not allowed and policy() == os.SCHED_OTHER
