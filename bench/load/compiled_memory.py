"""Memory of the compiled hot path, and its functions: loaded, or compiled the first time."""

from __future__ import annotations

import contextlib
import mmap
import platform
import select
import struct
import sys
import time
from typing import Any

import numpy as np

from bench.load.share import Share
from bench.load.wire import SSE_END

#: Bytes of one connection's buffer; beyond ``MOST_BYTES`` a part is written out, so a read has 64 KiB at least.
SLOT_BYTES, MOST_BYTES = 1 << 17, 1 << 16
#: Reads that a buffer's stamps have room for.
SLOT_READS = 1024
#: Of a new connection's buffer, so that the first answers find their memory there.
TOUCHED_BYTES = 1 << 15
#: Longest head that is known by sight.
KNOWN_BYTES = 1024
#: Events of one wait: few enough that a send that is due meanwhile does not wait for long.
_EVENTS = 128
#: Bytes that compiled code logs before it writes them to disk; answers that it logs before Python collects their lags.
LOG_BYTES, LOG_ANSWERS = 1 << 18, 4096


def load_kernels() -> tuple[Any, float]:
    """(the compiled functions, seconds that it took to load or compile them). A first compilation takes some seconds
    and is kept on disk.

    Raises:
        RuntimeError: this machine has no such path; the text says why.
    """
    if not sys.platform.startswith("linux") or struct.calcsize("P") != 8:
        raise RuntimeError("no compiled path: it needs Linux on a 64-bit machine")
    if platform.machine() not in ("x86_64", "aarch64"):
        raise RuntimeError(f"no compiled path for {platform.machine()}")
    started = time.monotonic()
    try:
        from bench.load import receive_kernels as kernels
    except ImportError as e:
        raise RuntimeError(f"no compiled path: {e}") from e
    with select.epoll() as poll:
        memory = Memory(kernels, 1)
        kernels.receive(poll.fileno(), 0, *memory.arguments)
        kernels.overdue(memory.table, 0, 1, 1, 1, memory.out)
        kernels.walk(memory.data[0], 0, 0)
        kernels.send_many(memory.table, memory.to_send, 0, *memory.send_arguments)
    return kernels, time.monotonic() - started


def _lazy(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """An array whose pages come one by one, when they are touched: huge pages would be cleared in the hot path."""
    pages = mmap.mmap(-1, shape[0] * shape[1] * np.dtype(dtype).itemsize)
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype=dtype).reshape(shape)


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Zeros (int64) that begin where a page does, so that a row of 128 bytes is two lines of cache and not three."""
    pages = mmap.mmap(-1, shape[0] * shape[1] * 8)
    return np.frombuffer(pages, dtype=np.int64).reshape(shape)


class Memory:
    """What the compiled code works on. Pages are touched only as far as answers reach."""

    def __init__(self, kernels: Any, num: int) -> None:
        self.kernels = kernels
        self.table = _aligned((num, kernels.NUM_COLUMNS))
        self.table[:, kernels.SLOT] = np.arange(num)
        self.rested = np.zeros(2 * num, dtype=np.int64)
        self.slots = np.full(1024, -1, dtype=np.int32)
        self.data = _lazy((num, SLOT_BYTES), np.uint8)
        self.stamps = _lazy((num, 2 * SLOT_READS), np.int64)
        self.ends = _lazy((num, SLOT_READS), np.uint32)
        self.scratch = np.zeros(kernels.NUM_SCRATCH, dtype=np.int64)
        self.out = np.zeros((max(num, _EVENTS) + 1, 3), dtype=np.int64)
        at = self.scratch.ctypes.data
        self.scratch[kernels.MSG + 2] = at + 8 * kernels.IOV
        self.scratch[kernels.MSG + 3] = 1
        self.scratch[kernels.MSG + 4] = at + 8 * kernels.CONTROL
        self.events = np.zeros(kernels.EVENT_WORDS * _EVENTS, dtype=np.uint32)
        self.tail = np.frombuffer(SSE_END, dtype=np.uint8)
        self.known, self.varies = np.zeros((2, KNOWN_BYTES), dtype=np.uint8)
        self.scratch[kernels.SEND_MSG + 2] = at + 8 * kernels.SEND_IOV
        self.scratch[kernels.SEND_MSG + 3] = 2
        self.log = np.zeros(LOG_BYTES, dtype=np.uint8)
        self.log[::4096] = 1  # its pages are there before the clock starts
        self.scratch[kernels.LOG_AT], self.scratch[kernels.LOG_ROOM] = self.log.ctypes.data, LOG_BYTES
        self.scratch[kernels.LOG_FD] = -1
        self.lags = np.zeros(LOG_ANSWERS, dtype=np.int64)
        self.to_send = np.zeros(num, dtype=np.int64)
        self.queue = self.positions = np.zeros(0, dtype=np.int64)
        self.rest = np.zeros(1, dtype=np.int64)
        self.words = np.zeros(16, dtype=np.int64)
        self._views()

    def give_requests(self, share: Share, head: bytes, rest: memoryview, words: np.ndarray) -> None:
        """What is sent: the common head, and what follows it in each request; ``words`` are those that the driver reads."""
        self._kept = [np.frombuffer(data or b" ", dtype=np.uint8) for data in (head, rest)]
        k = self.kernels
        self.scratch[k.HEAD_AT], self.scratch[k.REST_AT] = [data.ctypes.data for data in self._kept]
        self.scratch[k.HEAD_BYTES] = len(head)
        self.positions = np.array(share.positions, dtype=np.int64)
        self.rest = np.array(share.body_at, dtype=np.int64)
        self.words = words
        self._views()

    def give_queue(self, rows: np.ndarray) -> None:
        """The rows of the share that are sent in this phase, in order."""
        self.queue = np.array(rows, dtype=np.int64)
        self._views()

    def _views(self) -> None:
        self.data_bytes = self.data.reshape(-1).data
        self.stamp_bytes = self.stamps.reshape(-1).data.cast("B")
        self.end_words = self.ends.reshape(-1).data
        self.log_bytes = self.log.data
        self.cells, self.state = self.table.reshape(-1).data, self.scratch.data
        self.arguments = (
            self.events, self.table, self.slots, self.data, self.stamps, self.ends, MOST_BYTES, self.scratch,
            self.tail, self.known, self.varies, self.out, self.queue, self.positions, self.rest, self.lags, self.words,
            self.rested,
        )  # fmt: skip
        self.send_arguments = (self.scratch, self.queue, self.rest, self.out)

    def know_descriptor(self, fd: int, slot: int) -> None:
        while fd >= len(self.slots):
            self.slots = np.append(self.slots, np.full(len(self.slots), -1, dtype=np.int32))
            self._views()
        self.slots[fd] = slot
