"""The engine's side of ``bench.engines.host``: ``python -m bench.engines.child FD``.

Two processes. The **guardian** (this one, standard library only) is the session leader and a subreaper: every process
below it stays below it, even when its parent dies or it starts a session of its own. It forks the **engine** process,
which loads vLLM, and waits. When the engine ends in any way, or the tool ends in any way (the socket hangs up, or the
kernel signals the parent's death), it ends everything below it and exits with the engine's status (128 + signal for a
signal). So neither a crash of the engine nor ``kill -9`` of the tool leaves a process behind, nor shared memory: which
files those processes have mapped is looked up while they start and once more when the engine says that it is ready,
because at the end they may be gone before anybody can look.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

from bench.engines.processes import (
    MARKER_VARIABLE,
    become_subreaper,
    descendants,
    remove_shared_memory,
    shared_memory_of,
    signal_on_parent_death,
)

_PARENT_DIED = signal.SIGUSR1  # not SIGTERM: the kernel sends it when the *thread* that started us ends
_KILL_LIMIT_S = 20.0
#: The engine tells the guardian that it is ready (to the engine itself this signal means: write your stacks).
READY_SIGNAL = signal.SIGUSR2
_LOOK_EVERY_S = 1.0


def main() -> None:
    fd = int(sys.argv[1])
    parent = os.getppid()
    become_subreaper()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, _PARENT_DIED, READY_SIGNAL):
        signal.signal(number, lambda *_: None)  # only to be woken: what to do is decided in the loop
    me = os.getpid()
    engine = os.fork()
    if engine == 0:
        os.close(wake_read)
        os.close(wake_write)
        for number in (signal.SIGCHLD, signal.SIGTERM, _PARENT_DIED):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal_on_parent_death(signal.SIGKILL, me)
        from bench.engines.child_engine import serve

        serve(fd)  # does not return
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal_on_parent_death(_PARENT_DIED, parent)
    shared: set[str] = set()
    status = _watch(engine, fd, wake_read, parent, shared)
    _end_everything_below(shared)
    os._exit(status)


def _watch(engine: int, fd: int, wake_read: int, parent: int, shared: set[str]) -> int:
    """Wait until the engine or the tool ends; the exit status to report. ``shared`` collects the shared memory below.

    Once the engine is ready this sleeps: nothing here may take time from a measurement.
    """
    ready_seen = False
    poll = select.poll()
    poll.register(fd, 0)  # only hang-ups: the engine process reads the messages
    poll.register(wake_read, select.POLLIN)
    while True:
        status = _reap(engine)
        if status is not None:
            return status
        if os.getppid() != parent:
            return 128 + signal.SIGHUP
        if not ready_seen:
            shared |= shared_memory_of(descendants(os.getpid()))
        for ready, event in poll.poll(None if ready_seen else _LOOK_EVERY_S * 1000):
            if ready == fd and event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return 128 + signal.SIGHUP
            if ready == wake_read:
                numbers = b""
                with contextlib.suppress(BlockingIOError):
                    numbers = os.read(wake_read, 4096)
                if signal.SIGTERM in numbers:
                    return 128 + signal.SIGTERM
                if READY_SIGNAL in numbers:
                    shared |= shared_memory_of(descendants(os.getpid()))
                    ready_seen = True


def _reap(engine: int) -> int | None:
    """Collect every ended child; the engine's status once it has ended."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status if status is not None else 1
        if pid == 0:
            return status
        if pid == engine:
            code = os.waitstatus_to_exitcode(raw)
            status = code if code >= 0 else 128 - code


def _end_everything_below(shared: set[str]) -> None:
    """As a subreaper this process inherits every orphan, so killing its descendants until none is left ends them all."""
    shared |= shared_memory_of(descendants(os.getpid()))
    deadline = time.monotonic() + _KILL_LIMIT_S
    with contextlib.suppress(ChildProcessError):  # raised when no child is left
        while time.monotonic() < deadline:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.005)
    remove_shared_memory(shared, os.environ.get(MARKER_VARIABLE, str(os.getpid())))


if __name__ == "__main__":
    main()
