"""What the tool and an engine's process say to each other: length-prefixed pickles over a socket pair.

Messages are ``(kind, value)`` tuples. To the engine: ``start`` EngineLaunch, ``run`` RunOrder, ``abort`` run number,
``stop`` None. From the engine: ``hello`` pid, ``ready`` EngineInfo, ``pids`` [(pid, start_ticks)], ``batch`` Batch,
``done`` run number, ``refused`` (run number, BenchError), ``failed`` Failure.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

from bench.records import EngineMetric, EngineStep, GpuSample, RequestRecord

_LENGTH = struct.Struct("<Q")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RunOrder:
    """Serve this schedule; ``number`` is repeated in everything that comes back for it."""

    number: int
    schedule: dict[str, Any]  # bench.engines.packing.pack
    t0_monotonic_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine did not start or ended in the middle of a run.

    ``reason``: out-of-memory, missing-model, bad-argument, not-installed, unsupported-version, crash.
    """

    reason: str
    message: str  # one line
    next_step: str | None = None


@dataclass(slots=True)
class Batch:
    """All that happened since the batch before. ``chunks`` are whole columns of ChunkRecord."""

    number: int
    records: list[RequestRecord] = field(default_factory=list)
    steps: list[EngineStep] = field(default_factory=list)
    chunks: dict[str, Any] | None = None
    metrics: list[EngineMetric] = field(default_factory=list)
    telemetry: list[GpuSample] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    alive: bool = False  # nothing is in flight on purpose: the engine waits for a due time

    def is_empty(self) -> bool:
        return not (
            self.records or self.steps or self.chunks or self.metrics or self.telemetry or self.manifest or self.alive
        )


class Channel:
    """One end of the socket pair. ``send`` may be called from any thread; receive from one."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, kind: str, value: Any = None) -> None:
        """Raises OSError when the other end is gone."""
        data = pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self.sock.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> list[tuple[str, Any]] | None:
        """One read and the whole messages that it completed (maybe none); None at the end of the stream."""
        try:
            data = self.sock.recv(_READ_BYTES)
        except InterruptedError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._buffer += data
        out = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            out.append(pickle.loads(memoryview(self._buffer)[start + _LENGTH.size : end]))
            start = end
        if start:
            self._buffer = self._buffer[start:]
        return out

    def close(self) -> None:
        self.sock.close()
