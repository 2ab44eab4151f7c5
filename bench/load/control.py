"""A page of memory shared by the driver and its sending processes: start, stop and progress, without messages."""

from __future__ import annotations

import mmap
import os
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


def serve_state(words: Any, state: State) -> None:
    """Tell the driver how far this worker is."""
    words[Control.STATE] = int(state)
