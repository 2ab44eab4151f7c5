"""How soon the kernel runs a measuring process after it is woken: short time slices, and real-time where it is allowed.

An engine that spins on ``sched_yield`` between steps, as vLLM's message queue does, can keep Linux's fair scheduler (seen on
6.18) from running anybody else on its core for a quarter of a second at a time. A load generator or sampler that shares
that core is then late by as much, although it needs a hundredth of the core.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SHORT_SLICE_NS = 100_000  # the least that the kernel takes
#: The lowest real-time priority: above every ordinary process, below everything else that is real-time.
_PRIORITY = 1
#: "0" keeps measuring processes at ordinary priority.
SWITCH = "TOKENYIELD_REAL_TIME"


def ask_for_short_slices() -> bool:
    """Ask the scheduler (EEVDF, Linux 6.12 on) for short time slices: this process then runs sooner after it is woken,
    and has to yield sooner, too. It gets no more CPU than before, and needs no privilege. Older kernels ignore it.

    Returns whether the kernel took it.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return False
    # struct sched_attr, version 0 (48 bytes): size, policy SCHED_OTHER, flags, nice, priority, runtime, deadline, period
    attr = struct.pack("<IIQiIQQQ", 48, 0, 0, os.nice(0), 0, _SHORT_SLICE_NS, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(ctypes.c_long(number), ctypes.c_long(0), ctypes.c_char_p(attr), ctypes.c_long(0)) == 0


@contextlib.contextmanager
def real_time(*, wanted: bool = True) -> Iterator[bool]:
    """Run the calling thread before every ordinary process while inside (SCHED_RR, priority 1).

    Yields whether the kernel allowed it (root, CAP_SYS_NICE or an rtprio limit); ``TOKENYIELD_REAL_TIME=0`` does not ask.
    Children are ordinary again. The former policy comes back, with time slices of the usual length. Only for code that mostly sleeps: it takes the core whenever it wants it, up to the
    kernel's own limit (95 % of each second by default).
    """
    allowed = False
    if wanted and hasattr(os, "sched_setscheduler") and os.environ.get(SWITCH) != "0":
        before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
            allowed = True
    try:
        yield allowed
    finally:
        if allowed:
            # The flag stays: who has only an rtprio limit may not take it back (sched(7)), and it does no harm.
            os.sched_setscheduler(0, before | os.SCHED_RESET_ON_FORK, parameters)
