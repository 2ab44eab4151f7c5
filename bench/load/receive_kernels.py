"""The hot path in machine code: wait for sockets, read each, stamp it, look at its last bytes. Compiled by numba.

The calls are libc's own, so a read costs what it costs in C. An answer that ends as it should is logged here, and in a closed
loop the next request goes out on its connection at once; Python is entered only where a decision is needed: a head to read,
an end that may be none, a full buffer, an error, or another descriptor that became ready.

Linux on 64-bit machines only (the layouts below are theirs). Import it only through ``compiled_memory.load_kernels``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
from numba import types

#: Columns of the table: one row a connection (int64). ITEM: row of the share in flight, -1: none. STORE: 0 when Python has
#: to leave the record behind, else 2, and 1 more where stamps are the kernel's. (128 bytes a row: two lines of cache.)
FD, USED, NUM_READS, MODE, ITEM, STORE, SENT_NS, SEEN_READS, LAST_NS, BASE, BODY_AT, WALK_AT, WALKED_READS = range(13)
DUE_NS, CONNECT_NS, SLOT, NUM_COLUMNS = 13, 14, 15, 16
#: MODE: nothing asked; waiting for the end of the head; in the body of a chunked answer.
FREE, IDLE, HEAD, BODY = range(4)
#: Why a connection needs Python. MORE is added when there may be bytes left to read.
AT_HEAD, COMPLETE, LOOK, FULL, ENDED, LOST, UNASKED, TIMEOUT, NO_FIRST_BYTE, STALL = range(1, 11)
#: The answer to a request was logged and the connection rests; a further request was sent in part or not at all; a plain
#: closed loop has nothing to send any more, and all of its connections rest.
OVER, SHORT, ALL_OVER = 11, 12, 13
MORE = 64
#: In ``slots``: a descriptor that is no connection's; one of these that is a repeating timer.
OTHER, TIMER = -1, -2
#: Results of :func:`walk`, as in ``wire.Walk``.
NEED, DONE, ODD = range(3)

#: struct epoll_event is packed on x86 alone: 32-bit words an event, and the word that holds the descriptor.
EVENT_WORDS, EVENT_FD = (3, 1) if platform.machine() == "x86_64" else (4, 2)
#: Layout of ``scratch`` (int64): msghdr (7 words), iovec (2), control message (4), timespec (2); msghdr, two iovecs and a
#: log entry's head of what is sent and logged; what a reason needs besides (an errno, an item, bytes sent).
MSG, IOV, CONTROL, CLOCK, SEND_MSG, SEND_IOV, ENTRY, INFO = 0, 7, 9, 13, 15, 22, 26, 38
#: Length of the head that is known by sight (0: none yet). Whether compiled code may send further requests (0, 1), and which:
#: ``queue[NEXT:END]``. Addresses of the requests' common head and of the rest of each.
KNOWN_BYTES, TURNS, NEXT, END, HEAD_AT, HEAD_BYTES, REST_AT = range(39, 46)
#: The log: address, room, bytes used, the file to which it may be written now (-1: none). Lags in use; CLOCK_REALTIME - CLOCK_MONOTONIC; answers logged and their reads.
LOG_AT, LOG_ROOM, LOG_USED, LOG_FD, NUM_LAGS, OFFSET_NS, NUM_LOGGED, READS_LOGGED = range(46, 54)
#: Requests in flight when Python last looked; pairs of (slot, item) in ``rested``, of which Python need not hear at once.
IN_FLIGHT, NUM_RESTED, NUM_SCRATCH = 54, 55, 56
#: Bytes of a log entry's head.
ENTRY_BYTES = 96

#: Of one read. A buffer holds two, so that a part to write out can end where a read ended.
READ_BYTES = 65536

_EAGAIN, _EINTR = 11, 4
_CLOCK_REALTIME, _CLOCK_MONOTONIC = 0, 1
_MSG_NOSIGNAL = 0x4000
#: Words that the driver reads, as in ``control.Control``; kind of a log entry, as in ``spill``.
_NUM_DONE, _FINAL = 2, 1
_HANG_UP = 0x2018  # EPOLLRDHUP | EPOLLHUP | EPOLLERR
_STAMP_HEADER = 1 | (35 << 32)  # SOL_SOCKET, SCM_TIMESTAMPNS
_STAMP_SPACE = 32

_epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, types.int64, types.int32, types.int32))
_recvmsg = types.ExternalFunction("recvmsg", types.int64(types.int32, types.int64, types.int32))
_sendmsg = types.ExternalFunction("sendmsg", types.int64(types.int32, types.int64, types.int32))
_read_bytes = types.ExternalFunction("read", types.int64(types.int32, types.int64, types.int64))
_write = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))
_memcpy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
_memmove = types.ExternalFunction("memmove", types.int64(types.int64, types.int64, types.int64))
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
        _clock_gettime(types.int32(_CLOCK_REALTIME), scratch_at + 8 * CLOCK)
        out[2 * k] = scratch[CLOCK]
        out[2 * k + 1] = scratch[CLOCK + 1]


@_compiled
def _now(scratch: Any, scratch_at: int) -> int:
    """CLOCK_MONOTONIC, ns."""
    _clock_gettime(types.int32(_CLOCK_MONOTONIC), scratch_at + 8 * CLOCK)
    return scratch[CLOCK] * 1_000_000_000 + scratch[CLOCK + 1]


@_compiled
def _send_next(row: Any, scratch: Any, scratch_at: int, queue: Any, rest: Any) -> int:
    """The next request of the queue goes out on an idle connection. 0, or SHORT with INFO: bytes sent, or -errno."""
    item = queue[scratch[NEXT]]
    scratch[NEXT] += 1
    row[USED] = row[NUM_READS] = row[SEEN_READS] = row[BASE] = row[BODY_AT] = row[WALK_AT] = row[WALKED_READS] = 0
    row[DUE_NS] = row[CONNECT_NS] = 0
    row[MODE], row[ITEM] = HEAD, item
    size = rest[item + 1] - rest[item]
    scratch[SEND_IOV], scratch[SEND_IOV + 1] = scratch[HEAD_AT], scratch[HEAD_BYTES]
    scratch[SEND_IOV + 2], scratch[SEND_IOV + 3] = scratch[REST_AT] + rest[item], size
    row[SENT_NS] = row[LAST_NS] = _now(scratch, scratch_at)
    sent = _sendmsg(types.int32(row[FD]), scratch_at + 8 * SEND_MSG, types.int32(_MSG_NOSIGNAL))
    if sent == scratch[HEAD_BYTES] + size:
        return 0
    scratch[INFO] = sent if sent >= 0 else -_errno_location()[0]
    return SHORT


@_compiled
def _has_room(scratch: Any, size: int) -> bool:
    """Whether the log takes ``size`` bytes more; it is written to disk when it does not. Failures are left to Python."""
    if scratch[LOG_USED] + size > scratch[LOG_ROOM] and scratch[LOG_FD] >= 0:
        used = scratch[LOG_USED]
        written = _write(types.int32(scratch[LOG_FD]), scratch[LOG_AT], used)
        if written == used:
            scratch[LOG_USED] = 0
        else:  # what Python writes must go on where this ended
            scratch[LOG_FD] = -1
            if written > 0:
                _memmove(scratch[LOG_AT], scratch[LOG_AT] + written, used - written)
                scratch[LOG_USED] = used - written
    return scratch[LOG_USED] + size <= scratch[LOG_ROOM]


@_compiled
def _complete(
    row: Any, data: Any, stamps: Any, ends: Any, scratch: Any, scratch_at: int, queue: Any, positions: Any, rest: Any,
    lags: Any, words: Any, rested: Any,
) -> int:  # fmt: skip
    """An answer has ended as it should: send the next request, log this one (as ``spill.SpillWriter.final`` does).
    0: done, and nothing that Python has to know now; OVER: done, none was sent (INFO: the item); ALL_OVER; SHORT; COMPLETE:
    left to Python."""
    n, used, item = row[NUM_READS], row[USED], row[ITEM]
    if not row[STORE] or scratch[NUM_LAGS] == len(lags) or not _has_room(scratch, ENTRY_BYTES + 20 * n + used):
        return COMPLETE
    at = scratch[LOG_USED]
    end = _now(scratch, scratch_at)
    if row[STORE] & 1:
        lags[scratch[NUM_LAGS]] = end + scratch[OFFSET_NS] - stamps[2 * n - 2] * 1_000_000_000 - stamps[2 * n - 1]
        scratch[NUM_LAGS] += 1
    entry = scratch[ENTRY : ENTRY + 12]
    entry[0], entry[1], entry[2], entry[3], entry[4] = (
        _FINAL,
        positions[item],
        row[DUE_NS],
        row[SENT_NS],
        row[CONNECT_NS],
    )
    entry[5], entry[6], entry[7], entry[8], entry[9], entry[10], entry[11] = end, -1, row[STORE] & 1, 0, 16 * n, n, used
    if scratch[TURNS] and scratch[NEXT] < scratch[END]:
        reason = _send_next(row, scratch, scratch_at, queue, rest)
    else:
        row[USED] = row[NUM_READS] = 0
        row[MODE], row[ITEM], row[LAST_NS] = IDLE, -1, end
        scratch[INFO], reason = item, OVER
        if scratch[TURNS]:
            rested[2 * scratch[NUM_RESTED]], rested[2 * scratch[NUM_RESTED] + 1] = row[SLOT], item
            scratch[NUM_RESTED] += 1
            reason = ALL_OVER if scratch[NUM_RESTED] >= scratch[IN_FLIGHT] else 0
    to = scratch[LOG_AT] + at
    _memcpy(to, scratch_at + 8 * ENTRY, ENTRY_BYTES)
    _memcpy(to + ENTRY_BYTES, stamps.ctypes.data, 16 * n)
    _memcpy(to + ENTRY_BYTES + 16 * n, ends.ctypes.data, 4 * n)
    _memcpy(to + ENTRY_BYTES + 20 * n, data.ctypes.data, used)
    scratch[LOG_USED] = at + ENTRY_BYTES + 20 * n + used
    scratch[NUM_LOGGED] += 1
    scratch[READS_LOGGED] += n
    words[_NUM_DONE] += 1
    return reason


@_compiled
def send_many(
    table: Any, slots: Any, num: int, scratch: Any, queue: Any, rest: Any, out: Any
) -> int:  # fmt: skip
    """Send the queue's next requests on ``num`` idle connections; the rows of ``out`` of those that came short."""
    scratch_at, found = scratch.ctypes.data, 0
    for k in range(num):
        if _send_next(table[slots[k]], scratch, scratch_at, queue, rest):
            out[found, 0], out[found, 1], out[found, 2] = slots[k], SHORT, scratch[INFO]
            found += 1
    return found


@_compiled
def _read(
    row: Any, data: Any, stamps: Any, ends: Any, most: int, scratch: Any, scratch_at: int, tail: Any, known: Any,
    varies: Any, queue: Any, positions: Any, rest: Any, lags: Any, words: Any, rested: Any,
) -> int:  # fmt: skip
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
        scratch[INFO] = error
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
        if not _ends_with(data, used, tail):
            return LOOK | more
        if more:
            return COMPLETE | more
        return _complete(row, data, stamps, ends, scratch, scratch_at, queue, positions, rest, lags, words, rested)
    if used > most or n == len(ends):
        return FULL | more
    return more


@_compiled
def receive(
    poll: int, timeout_ms: int, events: Any, table: Any, slots: Any, data: Any, stamps: Any, ends: Any, most: int,
    scratch: Any, tail: Any, known: Any, varies: Any, out: Any, queue: Any, positions: Any, rest: Any, lags: Any, words: Any,
    rested: Any,
) -> int:  # fmt: skip
    """Wait and read until something needs Python; how many rows of ``out`` say what.

    Args:
        poll: an epoll descriptor; connections are in it edge-triggered, others as they like.
        timeout_ms: of each wait; -1: none.
        events: (EVENT_WORDS x the most events of one wait,) uint32.
        table: (connections, NUM_COLUMNS) int64.
        slots: (descriptors,) int32: the connection's row, OTHER or TIMER for other descriptors.
        data, stamps, ends: (connections, bytes) uint8, (connections, 2 x reads) int64, (connections, reads) uint32.
        most: bytes beyond which a response has to be written out.
        tail: how a complete SSE answer ends.
        known, varies: the head of an answer that Python has read, and where another such head may differ; uint8.
        out: (events + 1, 3) int64: row, reason, INFO; or descriptor, 0, 0 for other descriptors.
        queue: rows of the share that are to be sent, in order; int64.
        positions, rest: of each row of the share: its place in the schedule; where what follows the common head of its
            request begins in memory, and one more; int64.
        lags: ns from the kernel's stamp to the moment at which an end was seen, of answers logged here.
        words: those that the driver reads (``control.Control``).
        rested: (2 x connections,) int64: slots whose answers are over, and the items of these.

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
                if slot == TIMER:  # one that repeats goes on when it is read
                    _read_bytes(types.int32(fd), scratch_at + 8 * INFO, 8)
                out[found, 0], out[found, 1], out[found, 2] = fd, 0, 0
                found += 1
                continue
            again = (flags & _HANG_UP) != 0
            reason = MORE
            while reason == MORE or (again and reason == 0):
                reason = _read(
                    table[slot], data[slot], stamps[slot], ends[slot], most, scratch, scratch_at, tail, known, varies,
                    queue, positions, rest, lags, words, rested,
                )  # fmt: skip
            if reason > 0:
                if again and reason not in (ENDED, LOST):
                    reason |= MORE
                out[found, 0], out[found, 1], out[found, 2] = slot, reason, scratch[INFO]
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
