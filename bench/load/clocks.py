"""Clocks of the load path: kernel receive timestamps on the monotonic clock, and a timer that is on time.

The kernel stamps received packets with CLOCK_REALTIME (``SO_TIMESTAMPNS``). Everything here runs on CLOCK_MONOTONIC. The
two clocks are slewed alike by NTP, so their difference changes only when somebody sets the wall clock; it is read in
pairs during the run, and a step is seen, reported and undone.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass

import numpy as np

# From <asm-generic/socket.h>; the value returned in the control message has the same number.
SO_TIMESTAMPNS = 35
#: Room for one control message with two 64-bit numbers.
STAMP_SPACE = socket.CMSG_SPACE(16) if hasattr(socket, "CMSG_SPACE") else 0
STAMP_BYTES = 16
#: A wall clock that moved by more than this between two paired readings has been set, not slewed.
STEP_NS = 20_000


def enable_kernel_stamps(sock: socket.socket) -> bool:
    """Ask for receive timestamps. False where the platform has none (not Linux, or not a TCP socket)."""
    if not sys.platform.startswith("linux") or struct.calcsize("l") != 8:
        return False
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


def stamps_to_realtime_ns(stamps: bytes | bytearray | memoryview) -> np.ndarray:
    """Concatenated ``struct timespec`` control messages -> CLOCK_REALTIME nanoseconds (int64)."""
    pairs = np.frombuffer(stamps, dtype="<i8").reshape(-1, 2)
    return pairs[:, 0] * 1_000_000_000 + pairs[:, 1]


def pack_realtime_ns(t_ns: int) -> bytes:
    """The inverse for one stamp: used where user space has to stand in for the kernel."""
    return struct.pack("<qq", *divmod(t_ns, 1_000_000_000))


def paired_reading() -> tuple[int, int]:
    """(monotonic ns, realtime - monotonic ns), from the tightest of five sandwiched readings."""
    best = None
    for _ in range(5):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, wall)
    assert best is not None
    return best[1], best[2] - best[1]


@dataclass(frozen=True, slots=True)
class ClockOffsets:
    """Paired readings of a run: ``monotonic_ns[k]`` and the wall clock's lead ``offset_ns[k]`` at that moment."""

    monotonic_ns: np.ndarray
    offset_ns: np.ndarray

    @property
    def steps_ns(self) -> np.ndarray:
        """Sizes of the wall clock's steps during the run (empty: it was not set)."""
        jumps = np.diff(self.offset_ns)
        return jumps[np.abs(jumps) > STEP_NS]

    @property
    def spread_ns(self) -> int:
        """Largest minus smallest offset: the bound of the conversion's error when there was no step."""
        return int(self.offset_ns.max() - self.offset_ns.min()) if len(self.offset_ns) else 0

    def to_monotonic_ns(self, realtime_ns: np.ndarray) -> np.ndarray:
        """Convert kernel stamps. Without a step the median offset is used, the best estimate of a constant.

        With steps, each stamp takes the offset of the reading interval that it falls in; within the one interval that
        holds a step (a tick, 100 ms) the size of the step remains as an error, which the result reports.
        """
        if len(self.offset_ns) == 0:
            raise ValueError("no paired readings")
        if len(self.steps_ns) == 0:
            return realtime_ns - int(np.median(self.offset_ns))
        out = realtime_ns - int(self.offset_ns[0])
        done = np.zeros(len(realtime_ns), dtype=bool)
        for k in range(len(self.offset_ns)):
            guess = realtime_ns - int(self.offset_ns[k])
            low = self.monotonic_ns[k - 1] if k else np.iinfo(np.int64).min
            high = self.monotonic_ns[k] if k < len(self.offset_ns) - 1 else np.iinfo(np.int64).max
            mine = ~done & (guess > low) & (guess <= high)
            out[mine] = guess[mine]
            done |= mine
        return out


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


_CLOCK_MONOTONIC, _TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_ABSTIME = 1, 0o4000, 0o2000000, 1


class DeadlineTimer:
    """A Linux timerfd on CLOCK_MONOTONIC: readable at an absolute time, right to ~50 us where an event loop's own timer
    is right to ~1 ms. ``fileno()`` goes to epoll or ``add_reader``.

    Raises:
        OSError: the platform has no timerfd.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "timerfd_create"):
            raise OSError("no timerfd on this platform")
        self._settime = libc.timerfd_settime
        self._fd = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _Itimerspec()
        self._pointer = ctypes.byref(self._spec)
        self.armed_ns = 0

    def fileno(self) -> int:
        return self._fd

    def arm(self, at_ns: int) -> None:
        """Fire at ``at_ns`` (at once if that is past). 0 disarms. Arming for the same time again costs nothing."""
        if at_ns == self.armed_ns:
            return
        self.armed_ns = at_ns
        value = self._spec.it_value
        value.tv_sec, value.tv_nsec = divmod(at_ns, 1_000_000_000)
        self._settime(self._fd, _TFD_ABSTIME, self._pointer, None)

    def arm_every(self, first_ns: int, interval_ns: int) -> None:
        """Fire at ``first_ns`` and every ``interval_ns`` after it."""
        self.armed_ns = 0
        s = self._spec
        s.it_value.tv_sec, s.it_value.tv_nsec = divmod(first_ns, 1_000_000_000)
        s.it_interval.tv_sec, s.it_interval.tv_nsec = divmod(interval_ns, 1_000_000_000)
        self._settime(self._fd, _TFD_ABSTIME, self._pointer, None)
        s.it_interval.tv_sec = s.it_interval.tv_nsec = 0

    def acknowledge(self) -> None:
        """Read the expiry so that the descriptor is not readable any more."""
        self.armed_ns = 0
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
