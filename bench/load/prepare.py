"""What is settled before the clock starts: processes, shares of the schedule, the address."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import numpy as np

from bench.load.options import LoadOptions
from bench.load.share import Share
from bench.load.target import Address
from bench.records import Schedule

#: In-flight requests that one process is given before a second one is used, where the number is not set.
STREAMS_PER_PROCESS = 1024
#: Expected chunks from which on the compiled path is used: below, loading it costs more than it saves.
COMPILED_CHUNKS = 10_000


def wants_compiled(schedule: Schedule, options: LoadOptions, allowed: np.ndarray) -> bool:
    """Whether the compiled path is to read the answers of the requests that may be sent."""
    if options.receive_path != "auto":
        return options.receive_path == "compiled"
    return sum(schedule.requests[p].osl for p in np.flatnonzero(allowed)) >= COMPILED_CHUNKS


def choose_num_processes(schedule: Schedule, wanted: int | None) -> int:
    """Sending processes for a schedule: as asked, or by its concurrency; one for batches and for few requests."""
    if schedule.kind == "offline" and schedule.max_in_flight is not None:
        return 1
    limit = schedule.max_in_flight
    if schedule.in_flight_steps:
        limit = max(c for _, c in schedule.in_flight_steps)
    most = min(len(schedule.requests), limit or len(schedule.requests))
    if wanted is not None:
        return max(1, min(wanted, most))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(-(-(limit or 1) // STREAMS_PER_PROCESS), cores // 2))


def limited_by_rule(schedule: Schedule) -> np.ndarray:
    """Positions that may be sent: all, or the warm-up and the first ``max_requests`` others."""
    limit = schedule.stop.max_requests
    warm = np.asarray([r.phase == "warmup" for r in schedule.requests])
    if limit is None:
        return np.ones(len(warm), dtype=bool)
    return warm | (np.cumsum(~warm) <= limit)


def build_share(schedule: Schedule, positions: np.ndarray, body_at: np.ndarray) -> Share:
    """The arrays a process works from."""
    requests = [schedule.requests[p] for p in positions]
    n = len(requests)
    due = np.full(n, -1, dtype=np.int64)
    if schedule.due_s is not None and schedule.kind != "offline":  # a batch is due when it is submitted
        due = np.rint(np.asarray(schedule.due_s, dtype=np.float64)[positions] * 1e9).astype(np.int64)
    follows, is_root = np.full(n, -1, dtype=np.int64), np.ones(n, dtype=bool)
    last_of: dict[int, int] = {}
    order = sorted((k for k in range(n) if requests[k].session is not None), key=lambda k: (requests[k].turn, k))
    for k in order:
        session = requests[k].session
        assert session is not None
        if session in last_of:
            follows[last_of[session]] = k
            is_root[k] = False
        last_of[session] = k
    return Share(
        positions=np.asarray(positions, dtype=np.int64),
        due_ns=due,
        think_ns=np.asarray([round(r.think_s * 1e9) for r in requests], dtype=np.int64),
        follows=follows,
        is_root=is_root,
        is_warmup=np.asarray([r.phase == "warmup" for r in requests], dtype=bool),
        body_at=body_at,
    )


def is_local(address: Address) -> bool:
    """Whether the server runs on this machine."""
    family, where = address
    return family == getattr(socket, "AF_UNIX", None) or ipaddress.ip_address(where[0].split("%")[0]).is_loopback


def pick_address(addresses: list[Address], limit_s: float) -> Address:
    """The first address that takes a connection; the first of all when none does (the requests then say why)."""
    for family, address in addresses if len(addresses) > 1 else []:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(limit_s)
            probe.connect(address)
            return family, address
    return addresses[0]


def raise_file_limit() -> None:
    """As many open files as the system lets this user have."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
