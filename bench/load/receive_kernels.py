"""The hot path in machine code: wait for sockets, read each, stamp it, look at its last bytes. Compiled by numba.

The calls are libc's own, so a read costs what it costs in C; Python is entered only where a decision is needed: a head
to read, a response that may be complete, a full buffer, an error, or another descriptor that became ready.

Linux on 64-bit machines only (the layouts below are theirs). Import it only through ``compiled_memory.load_kernels``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
from numba import types

#: Columns of the table: one row a connection (int64).
FD, USED, NUM_READS, MODE, SENT_NS, SEEN_READS, LAST_NS, BASE, BODY_AT, WALK_AT, WALKED_READS, NUM_COLUMNS = range(12)
#: MODE: nothing asked; waiting for the end of the head; in the body of a chunked answer.
FREE, IDLE, HEAD, BODY = range(4)
#: Why a connection needs Python. MORE is added when there may be bytes left to read.
AT_HEAD, COMPLETE, LOOK, FULL, ENDED, LOST, UNASKED, TIMEOUT, NO_FIRST_BYTE, STALL = range(1, 11)
MORE = 64
#: Results of :func:`walk`, as in ``wire.Walk``.
NEED, DONE, ODD = range(3)

#: struct epoll_event is packed on x86 alone: 32-bit words an event, and the word that holds the descriptor.
EVENT_WORDS, EVENT_FD = (3, 1) if platform.machine() == "x86_64" else (4, 2)
#: Layout of ``scratch`` (int64): msghdr (7 words), iovec (2), control message (4), timespec (2).
#: Then the length of the head that is known by sight (0: none yet).
MSG, IOV, CONTROL, CLOCK, KNOWN_BYTES, NUM_SCRATCH = 0, 7, 9, 13, 15, 16

#: Of one read. A buffer holds two, so that a part to write out can end where a read ended.
READ_BYTES = 65536

_EAGAIN, _EINTR = 11, 4
_HANG_UP = 0x2018  # EPOLLRDHUP | EPOLLHUP | EPOLLERR
_STAMP_HEADER = 1 | (35 << 32)  # SOL_SOCKET, SCM_TIMESTAMPNS
_STAMP_SPACE = 32

_epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, types.int64, types.int32, types.int32))
_recvmsg = types.ExternalFunction("recvmsg", types.int64(types.int32, types.int64, types.int32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_errno_location = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on first use and kept beside this file, else in the user's cache folder, else nowhere."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written
        return numba.njit(**options)(function)


@_compiled
def walk(data: Any, at: int, used: int) -> Any:
    """``wire.walk_chunks`` on ``data[:used]``: (position of the first chunk that is not complete, NEED | DONE | ODD)."""
    while True:
        size, digits, k = 0, 0, at
        while k < used and digits <= 8:
            c = data[k]
            if 48 <= c <= 57:
                value = c - 48
            elif 65 <= c <= 70:
                value = c - 55
            elif 97 <= c <= 102:
                value = c - 87
            else:
                break
            size = size * 16 + value
            digits += 1
            k += 1
        if digits > 8:
            return at, ODD
        if k >= used:
            return at, NEED
        if digits == 0 and not (data[k] == 13 and k + 1 >= used):
            return at, ODD
        if data[k] != 13:
            return at, ODD
        if k + 1 >= used:
            return at, NEED
        if data[k + 1] != 10:
            return at, ODD
        after = k + 2 + size
        if after < used and data[after] != 13:
            return at, ODD
        if after + 1 < used and data[after + 1] != 10:
            return at, ODD
        if after + 2 > used:
            return at, NEED
        at = after + 2
        if size == 0:
            return at, DONE


@_compiled
def _ends_with(data: Any, used: int, tail: Any) -> bool:
    n = len(tail)
    if used < n:
        return False
    for j in range(n):  # noqa: SIM110 - compiled code has no all()
        if data[used - n + j] != tail[j]:
            return False
    return True


@_compiled
def _is_known(data: Any, known: Any, varies: Any, n: int) -> bool:
    """Whether ``data`` begins with the known head: equal byte for byte, but for any printable ones where it varies."""
    for j in range(n):  # noqa: SIM110 - compiled code has no all()
        if data[j] != known[j] and not (varies[j] and 32 <= data[j] <= 126):
            return False
    return True


@_compiled
def _stamp(scratch: Any, scratch_at: int, out: Any, k: int) -> None:
    """The kernel's stamp of the read just made, else the clock's (CLOCK_REALTIME)."""
    if scratch[MSG + 5] >= _STAMP_SPACE and scratch[CONTROL + 1] == _STAMP_HEADER:
        out[2 * k] = scratch[CONTROL + 2]
        out[2 * k + 1] = scratch[CONTROL + 3]
    else:
        _clock_gettime(types.int32(0), scratch_at + 8 * CLOCK)
        out[2 * k] = scratch[CLOCK]
        out[2 * k + 1] = scratch[CLOCK + 1]


@_compiled
def _read(
    row: Any,
    data: Any,
    stamps: Any,
    ends: Any,
    most: int,
    scratch: Any,
    scratch_at: int,
    tail: Any,
    known: Any,
    varies: Any,
) -> int:
    """One read of one connection. 0: nothing that Python needs to see, MORE: the same, and there may be more to read,
    -1: nothing to read, else the reason."""
    used, n = row[USED], row[NUM_READS]
    room = min(len(data) - used, READ_BYTES)
    if room <= 0 or n == len(ends):
        return FULL | MORE
    scratch[IOV] = data.ctypes.data + used
    scratch[IOV + 1] = room
    scratch[MSG + 5] = _STAMP_SPACE
    got = _recvmsg(types.int32(row[FD]), scratch_at + 8 * MSG, types.int32(0))
    if got < 0:
        error = _errno_location()[0]
        if error in (_EAGAIN, _EINTR):
            return -1
        scratch[CLOCK] = error
        return LOST
    if got == 0:
        return ENDED
    _stamp(scratch, scratch_at, stamps, n)
    used += got
    n += 1
    ends[n - 1] = used
    row[USED] = used
    row[NUM_READS] = n
    more = MORE if got == room else 0
    if row[MODE] == HEAD:
        size = scratch[KNOWN_BYTES]
        if size == 0 or used < size or not _is_known(data, known, varies, size):
            return AT_HEAD | more
        row[MODE], row[BODY_AT], row[WALK_AT] = BODY, size, size
        if used == size:
            return more
    if row[MODE] == IDLE:
        return UNASKED
    if data[used - 1] == 10 and data[used - 2] == 13 and data[used - 3] == 10 and data[used - 4] == 13:
        return (COMPLETE if _ends_with(data, used, tail) else LOOK) | more
    if used > most or n == len(ends):
        return FULL | more
    return more


@_compiled
def receive(
    poll: int, timeout_ms: int, events: Any, table: Any, slots: Any, data: Any, stamps: Any, ends: Any, most: int,
    scratch: Any, tail: Any, known: Any, varies: Any, out: Any,
) -> int:  # fmt: skip
    """Wait and read until something needs Python; how many rows of ``out`` say what.

    Args:
        poll: an epoll descriptor; connections are in it edge-triggered, others as they like.
        timeout_ms: of each wait; -1: none.
        events: (EVENT_WORDS x the most events of one wait,) uint32.
        table: (connections, NUM_COLUMNS) int64.
        slots: (descriptors,) int32: the connection's row, -1 for other descriptors.
        data, stamps, ends: (connections, bytes) uint8, (connections, 2 x reads) int64, (connections, reads) uint32.
        most: bytes beyond which a response has to be written out.
        tail: how a complete SSE answer ends.
        known, varies: the head of an answer that Python has read, and where another such head may differ; uint8.
        out: (events + 1, 3) int64: row, reason, errno; or descriptor, 0, 0 for other descriptors.

    Returns:
        The number of rows, 0 after a timeout or a signal, -errno when the wait failed.
    """
    most_events = types.int32(len(events) // EVENT_WORDS)
    scratch_at = scratch.ctypes.data
    while True:
        n = _epoll_wait(types.int32(poll), events.ctypes.data, most_events, types.int32(timeout_ms))
        if n < 0:
            error = _errno_location()[0]
            return 0 if error == _EINTR else -error
        if n == 0:
            return 0
        found = 0
        for k in range(n):
            flags, fd = events[EVENT_WORDS * k], events[EVENT_WORDS * k + EVENT_FD]
            slot = slots[fd] if fd < len(slots) else -1
            if slot < 0:
                out[found, 0], out[found, 1], out[found, 2] = fd, 0, 0
                found += 1
                continue
            again = (flags & _HANG_UP) != 0
            reason = MORE
            while reason == MORE or (again and reason == 0):
                reason = _read(
                    table[slot], data[slot], stamps[slot], ends[slot], most, scratch, scratch_at, tail, known, varies
                )
            if reason > 0:
                if again and reason not in (ENDED, LOST):
                    reason |= MORE
                out[found, 0], out[found, 1], out[found, 2] = slot, reason, scratch[CLOCK]
                found += 1
        if found:
            return found


@_compiled
def overdue(table: Any, now: int, first_ns: int, stall_ns: int, total_ns: int, out: Any) -> Any:
    """The watchdog's look at every connection in flight: limits, and quiet ones whose end may not have looked like one.
    (rows of ``out``, reads of the answers in flight)."""
    found = total = 0
    for slot in range(len(table)):
        row = table[slot]
        if row[MODE] != HEAD and row[MODE] != BODY:
            continue
        total += row[NUM_READS]
        reads, reason = row[NUM_READS] + row[BASE], 0
        if reads != row[SEEN_READS]:
            row[SEEN_READS] = reads
            row[LAST_NS] = now
        elif row[MODE] == BODY and row[WALKED_READS] != reads:
            row[WALKED_READS] = reads
            reason = LOOK
        has_body = row[BASE] > 0 or row[USED] > row[BODY_AT]
        if now - row[SENT_NS] > total_ns:
            reason = TIMEOUT
        elif not has_body and now - row[SENT_NS] > first_ns:
            reason = NO_FIRST_BYTE
        elif has_body and now - row[LAST_NS] > stall_ns:
            reason = STALL
        if reason and found < len(out):
            out[found, 0], out[found, 1], out[found, 2] = slot, reason, 0
            found += 1
    return found, total
