"""Notices within milliseconds when a process of the engine ends, and how: vLLM's front end may wait for it for ever."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable

from bench.engines.wire import Failure

#: How long the engine may take to report the loss of a process itself, with a better reason, before we do.
GRACE_S = 5.0


class ProcessWatch:
    """Watches processes until :meth:`close`. ``failure`` is set when the first of them ends.

    Args:
        pids: whose end means that the engine cannot go on.
        overdue: called ``GRACE_S`` after the first of them ended.
    """

    def __init__(self, pids: Iterable[int], overdue: Callable[[Failure], None]) -> None:
        self.failure: Failure | None = None
        self._overdue = overdue
        self._closed = threading.Event()
        self._noticed = threading.Event()
        self._names: dict[int, tuple[int, str]] = {}
        for pid in pids:
            name = _name(pid)
            if "resource_tracker" in name or not hasattr(os, "pidfd_open"):
                continue
            try:
                self._names[os.pidfd_open(pid)] = (pid, name)
            except OSError:
                continue
        threading.Thread(target=self._watch, name="process-watch", daemon=True).start()

    def _watch(self) -> None:
        poll = select.poll()
        for fd in self._names:
            poll.register(fd, select.POLLIN)
        while not self._closed.is_set():
            for fd, _ in poll.poll(500):
                if self._closed.is_set():
                    return
                pid, name = self._names[fd]
                self.failure = _failure(pid, name)
                self._noticed.set()
                if not self._closed.wait(GRACE_S):
                    self._overdue(self.failure)
                return

    def why(self, wait_s: float = 1.0) -> Failure | None:
        """The first end of a process, for an engine that raised an error that may be no more than its consequence."""
        self._noticed.wait(wait_s)
        return self.failure

    def close(self) -> None:
        """Ends of processes from now on are wanted."""
        self._closed.set()


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            words = f.read().replace(b"\0", b" ").decode("utf-8", "replace").split()
    except OSError:
        return ""
    return " ".join(words)[:80]


def _failure(pid: int, name: str) -> Failure:
    short = name.split()[0].rpartition("/")[2] if name else "a process"
    what = f"a process of the engine ({short}, pid {pid})"
    code = _exit_code_of_zombie(pid)
    if code is None:
        code = _exit_code_as_collected(pid)
    if code == -signal.SIGKILL:
        return Failure("killed", f"{what} was killed (SIGKILL)")
    if code is not None and code < 0:
        return Failure("crash", f"{what} ended by {signal.Signals(-code).name}")
    return Failure("crash", f"{what} ended" + ("" if code is None else f" with exit status {code}"))


def _exit_code_of_zombie(pid: int) -> int | None:
    """Exit code (minus the signal) from the last field of /proc/PID/stat; None once its parent has collected it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == "Z" and len(fields) > 49 else None


def _exit_code_as_collected(pid: int) -> int | None:
    """Exit code that ``multiprocessing`` collected for a child of this process: whoever owns the object, it knows."""
    from multiprocessing.process import BaseProcess

    for item in gc.get_objects():
        if isinstance(item, BaseProcess):
            with contextlib.suppress(Exception):
                if item.pid == pid:
                    return item.exitcode
    return None
