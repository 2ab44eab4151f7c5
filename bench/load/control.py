"""A page of memory shared by the driver and its sending processes: start, stop and progress; and a pipe in which a process
says that it is a step further, so that the driver need not look often."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import time
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

_HEADER, _PER_WORKER = 16, 16


class State(IntEnum):
    """Of a worker."""

    STARTING = 0
    READY = 1
    WARM = 2  # warm-up done, waits for the main part
    SENT = 3  # nothing in flight or to be sent any more
    PARSED = 4


class Go(IntEnum):
    """How far the driver lets the workers go."""

    WARMUP = 1
    MAIN = 2
    PARSE = 3  # everybody has sent: nobody's parsing takes CPU from another's window, or from a server on this machine


class Stop(IntEnum):
    RUN = 0
    NO_MORE = 1  # send nothing new, let what is in flight end
    ABORT = 2  # give up what is in flight


class Control:
    """Words (int64) in a shared file. One writer for each word, so no locks."""

    GO, MAIN_START_NS, STOP = 0, 1, 2
    STATE, NUM_SENT, NUM_DONE, NUM_ERRORS, NUM_READS, IN_FLIGHT, NUM_BYTES = range(7)

    def __init__(self, path: Path, num_workers: int, *, create: bool = False) -> None:
        size = 8 * (_HEADER + _PER_WORKER * num_workers)
        if create:
            path.write_bytes(b"\0" * size)
        fd = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        words = np.frombuffer(self._map, dtype=np.int64)
        self.header = words[:_HEADER]
        self.workers = words[_HEADER:].reshape(num_workers, _PER_WORKER)

    def total(self, word: int) -> int:
        return int(self.workers[:, word].sum())

    def all_at_least(self, state: State) -> bool:
        return bool((self.workers[:, self.STATE] >= state).all())


class Bell:
    """The driver's end of the pipe. Rings when a process is a step further, or has ended."""

    def __init__(self) -> None:
        self._read, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        self._hung_up = False

    def started(self) -> None:
        """Every process has its end now; this one lets go of it."""
        os.close(self.write_fd)
        self.write_fd = -1

    def wait(self, limit_s: float) -> None:
        """Until it rings, ``limit_s`` at the most."""
        if self._hung_up:
            time.sleep(min(limit_s, 0.01))
        elif self._poll.poll(limit_s * 1e3):
            self._hung_up = not os.read(self._read, 4096)

    def close(self) -> None:
        os.close(self._read)
        if self.write_fd >= 0:
            os.close(self.write_fd)


def tell_state(words: Any, state: State, bell_fd: int) -> None:
    """Tell the driver how far this worker is."""
    words[Control.STATE] = int(state)
    with contextlib.suppress(OSError):  # full: it has been rung often enough; broken: nobody listens any more
        os.write(bell_fd, b"\1")
