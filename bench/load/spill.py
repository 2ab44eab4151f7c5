"""Raw responses on disk: what the hot path leaves behind, and what is parsed after the window.

Memory holds only responses in flight. A finished one goes to a file as a fixed header, the stamps of its reads (16 bytes
each), the offsets at which its reads ended (4 bytes each) and its bytes. Very long responses are written in several
parts. Files are private to the user and deleted with the run's scratch folder.
"""

from __future__ import annotations

import itertools
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.records import ERROR_CLASSES

_HEAD = struct.Struct("<12q")
_FLUSH_BYTES = 1 << 18
PART, FINAL = 0, 1
Raw = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as the hot path saw it; times in CLOCK_MONOTONIC ns, 0 where there is none."""

    position: int  # in the schedule
    due_ns: int
    sent_ns: int
    connect_ns: int  # length of the connection set-up that it waited for
    end_ns: int  # when the process saw the end (user space)
    error: str | None
    detail: str
    kernel_stamps: bool
    num_retries: int
    until_close: bool
    stamps_realtime: np.ndarray  # (num_reads, 2) int64: seconds, nanoseconds of CLOCK_REALTIME
    read_ends: np.ndarray  # (num_reads,) offsets into data
    data: bytes

    def pieces(self) -> Iterator[bytes]:
        """The bytes of each read."""
        start = 0
        for end in self.read_ends.tolist():
            yield self.data[start:end]
            start = end


class SpillWriter:
    """Appends outcomes; writes in blocks large enough to be cheap and small enough not to hold the loop up."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._buffer = bytearray()
        self.failed: str | None = None
        #: Makes whoever keeps a log of entries of its own hand it over (with ``take``): entries stay in order.
        self.collect: Callable[[], None] | None = None

    def part(self, position: int, stamps: Raw, ends: array[int] | memoryview, data: Raw) -> None:
        """A part of a response that goes on."""
        self._write(
            _HEAD.pack(PART, position, 0, 0, 0, 0, -1, 0, 0, len(stamps), len(ends), len(data)), b"", stamps, ends, data
        )

    def final(
        self,
        position: int,
        due_ns: int,
        sent_ns: int,
        connect_ns: int,
        end_ns: int,
        error: str | None,
        detail: str,
        flags: int,
        stamps: Raw,
        ends: array[int] | memoryview,
        data: Raw,
    ) -> None:
        """The end of a response. ``flags``: bit 0 kernel stamps, bit 1 until close, the rest the number of retries."""
        code = -1 if error is None else ERROR_CLASSES.index(error)
        text = detail.encode("utf-8", "replace")[:1000]
        head = _HEAD.pack(
            FINAL,
            position,
            due_ns,
            sent_ns,
            connect_ns,
            end_ns,
            code,
            flags,
            len(text),
            len(stamps),
            len(ends),
            len(data),
        )
        self._write(head, text, stamps, ends, data)

    def _write(self, head: bytes, text: bytes, stamps: Raw, ends: array[int] | memoryview, data: Raw) -> None:
        if self.collect is not None:
            self.collect()
        buffer = self._buffer
        buffer += head
        buffer += text
        buffer += stamps
        buffer += ends.tobytes()
        buffer += data
        if len(buffer) > _FLUSH_BYTES:
            self.flush()

    def take(self, entries: memoryview) -> None:
        """Entries that are laid out already (all of them final)."""
        self.flush()
        self._to_disk(entries)

    def ready_fd(self) -> int:
        """The file, to which another log may be appended directly; -1 when it failed."""
        self.flush()
        return self._fd if self.failed is None else -1

    def flush(self) -> None:
        if self._buffer:
            with memoryview(self._buffer) as view:
                self._to_disk(view)
            self._buffer = bytearray()

    def _to_disk(self, view: memoryview) -> None:
        at = 0
        try:
            while at < len(view) and self.failed is None:
                at += os.write(self._fd, view[at:])
        except OSError as e:
            self.failed = e.strerror or str(e)

    def close(self) -> None:
        if self.collect is not None:
            self.collect()
        self.flush()
        os.close(self._fd)


def _content(raw: bytes, num_stamps: int, num_ends: int) -> tuple[bytes, np.ndarray, bytes]:
    """(stamps, ends, bytes) of one entry of the file."""
    data_at = num_stamps + 4 * num_ends
    return raw[:num_stamps], np.frombuffer(raw[num_stamps:data_at], dtype=np.uint32).astype(np.int64), raw[data_at:]


def read_spill(path: Path) -> Iterator[Outcome]:
    """Outcomes in the order of their ends. Parts of one response are joined when it ends: until then only where they are is
    kept, so that memory does not grow with the number of long answers that were under way at a time."""
    if not path.exists():
        return
    parts: dict[
        int, list[tuple[int, int, int, int]]
    ] = {}  # position -> (place in the file, bytes of stamps, ends, bytes)
    with open(path, "rb", buffering=1 << 20) as f:
        while len(head := f.read(_HEAD.size)) == _HEAD.size:
            kind, position, due, sent, connect, end, code, flags, *sizes = _HEAD.unpack(head)
            num_text, num_stamps, num_ends, num = sizes
            if kind == PART:
                parts.setdefault(position, []).append((f.tell(), num_stamps, num_ends, num))
                f.seek(num_stamps + 4 * num_ends + num, os.SEEK_CUR)
                continue
            text = f.read(num_text)
            blocks = [
                _content(os.pread(f.fileno(), a + 4 * b + c, at), a, b) for at, a, b, c in parts.pop(position, ())
            ]
            blocks.append(_content(f.read(num_stamps + 4 * num_ends + num), num_stamps, num_ends))
            starts = itertools.accumulate((len(block[2]) for block in blocks), initial=0)
            stamps, data = b"".join(block[0] for block in blocks), b"".join(block[2] for block in blocks)
            ends = np.concatenate([block[1] + start for block, start in zip(blocks, starts, strict=False)])
            yield Outcome(
                position,
                due,
                sent,
                connect,
                end,
                None if code < 0 else ERROR_CLASSES[code],
                text.decode("utf-8", "replace"),
                bool(flags & 1),
                flags >> 2,
                bool(flags & 2),
                np.frombuffer(stamps, dtype="<i8").reshape(-1, 2),
                ends,
                data,
            )
