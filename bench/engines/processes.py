"""Process trees through /proc: who belongs to an engine, and ending all of them. Standard library only, Linux only.

An engine's processes are found four ways at once, because each alone has a hole: by the session that the engine was
started in (holds whatever a process writes over its command line and environment), by a marker in the environment
(holds for those that left the session), by descent (holds while the parents live) and by a list of pids reported earlier.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

#: Every process of an engine inherits this variable; its value is unique to one engine start.
MARKER_VARIABLE = "TOKENYIELD_ENGINE_ID"

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class ProcStat(NamedTuple):
    """A line of /proc/PID/stat: ``start_ticks`` tells a process from a later one with the same pid."""

    state: str
    ppid: int
    session: int
    start_ticks: int


def proc_stat(pid: int) -> ProcStat | None:
    """None when there is no such process (any more)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return None
    rest = text[text.rindex(")") + 2 :].split()  # the command may hold spaces and brackets
    return ProcStat(rest[0], int(rest[1]), int(rest[3]), int(rest[19]))


def process_table() -> dict[int, ProcStat]:
    """Every live process that can be read, zombies left out."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := proc_stat(int(name))) is not None and stat.state not in "ZX":
            table[int(name)] = stat
    return table


def descendants(root: int, table: dict[int, ProcStat] | None = None) -> set[int]:
    """Live pids below ``root``, itself not included."""
    table = process_table() if table is None else table
    children: dict[int, list[int]] = {}
    for pid, stat in table.items():
        children.setdefault(stat.ppid, []).append(pid)
    found: set[int] = set()
    stack = [root]
    while stack:
        for child in children.get(stack.pop(), ()):
            if child not in found:
                found.add(child)
                stack.append(child)
    return found


def started_processes(pids: Iterable[int]) -> dict[int, int]:
    """pid -> start_ticks of those that live: knows them again wherever they are handed to when their parents end."""
    return {pid: stat.start_ticks for pid in pids if (stat := proc_stat(pid)) is not None}


def still_running(processes: dict[int, int]) -> set[int]:
    """Those of :func:`started_processes` that have not ended; a zombie has."""
    found = ((pid, ticks, proc_stat(pid)) for pid, ticks in processes.items())
    return {pid for pid, ticks, stat in found if stat and stat.state not in "ZX" and stat.start_ticks == ticks}


def _has_marker(pid: int, marker: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            return marker in f.read()
    except OSError:
        return False


def engine_processes(root: int, marker: str, reported: Iterable[tuple[int, int]] = ()) -> set[int]:
    """Live pids of the engine whose session leader is ``root``: see the module's first lines.

    ``reported``: (pid, start_ticks) pairs heard of earlier.
    """
    table = process_table()
    needle = f"{MARKER_VARIABLE}={marker}".encode()
    me = os.getpid()
    found = descendants(root, table) | {
        pid
        for pid, stat in table.items()
        if pid == root or stat.session == root or (stat.ppid != me and _has_marker(pid, needle))
    }
    found |= {pid for pid, ticks in reported if pid in table and table[pid].start_ticks == ticks}
    return found - {me}


#: Shared memory that vLLM, NCCL, torch and Python's multiprocessing make, and leave behind when they are killed.
_SHARED_MEMORY_PREFIXES = ("vllm", "psm_", "torch_", "nccl-", "sem.mp-", "tokenyield-")


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Files in /dev/shm that these processes have mapped and that an engine makes."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as f:
            for line in f:
                path = line.rstrip("\n").partition("/dev/shm/")[2]
                if path.startswith(_SHARED_MEMORY_PREFIXES) and not path.endswith(" (deleted)"):
                    found.add(f"/dev/shm/{path}")
    return found


def step_folder(marker: str | None = None) -> Path:
    """The folder that an engine shares with its own processes, made here; named by the engine's marker so that the tool
    can remove it when the engine was killed before it could."""
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() else Path(tempfile.gettempdir())
    folder = base / f"tokenyield-{marker or os.environ.get(MARKER_VARIABLE) or os.getpid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remove_shared_memory(paths: Iterable[str], marker: str) -> None:
    """Remove the files of :func:`shared_memory_of` and the engine's folder after its processes have ended."""
    shutil.rmtree(step_folder(marker), ignore_errors=True)
    for path in paths:
        with contextlib.suppress(OSError):
            if os.stat(path).st_uid == os.getuid():
                os.unlink(path)


def end_processes(find: Callable[[], set[int]], limit_s: float, grace_s: float = 0.0) -> set[int]:
    """SIGKILL what ``find`` returns, again and again until it returns nothing. Returns what is left after ``limit_s``.

    ``grace_s``: time in which they may end by themselves before the first signal.
    """
    begin = time.monotonic()
    pause_s = 0.005
    while left := find():
        waited_s = time.monotonic() - begin
        if waited_s >= grace_s:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if waited_s > grace_s + limit_s:
            return left
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.2)
    return set()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def become_subreaper() -> None:
    """Orphaned descendants of this process become its children, not init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_on_parent_death(number: int, parent: int) -> None:
    """Have the kernel send this process signal ``number`` when the thread that started it ends.

    ``parent``: its pid as known before the call; if it is already gone the signal is sent at once.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
