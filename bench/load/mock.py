"""A mock OpenAI server: exact, seeded token times, faults on request, and a log of what really happened.

It is the ground truth that load generators are tested against, so its own loop does little: answers are encoded before
they are due, one epoll loop writes them at absolute deadlines (no drift), and each write's time goes to a log. Request
arrivals carry the kernel's receive timestamp. Run it in a process of its own (:func:`running_mock`, ``bench mock``).

Log format (little endian), one block a request: 6 x int64 (request id, arrival ns, start ns, number of writes, number of
tokens, fault number or -1) and then a time in ns for each write, all CLOCK_MONOTONIC. Write 0 is the response's head,
write k >= 1 carries the k-th chunk; with ``dribble`` several writes make one chunk.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BadInput, BenchError
from bench.load.clocks import enable_kernel_stamps
from bench.load.mock_api import hashed_id
from bench.load.mock_config import FAULT_KINDS, Delay, Fault, MockConfig
from bench.load.mock_server import LOG_HEAD, Server
from bench.priority import ask_for_short_slices

__all__ = ["Delay", "Fault", "MockConfig", "Truth", "hashed_id", "read_truth", "running_mock", "serve"]


@dataclass(frozen=True, slots=True)
class Truth:
    """What the mock did for one request; times in ns on CLOCK_MONOTONIC."""

    request_id: int
    arrival_ns: int
    start_ns: int
    num_tokens: int
    fault: str | None
    writes_ns: np.ndarray

    @property
    def ttft_s(self) -> float:
        """From the request's arrival at the host to the write of the first token."""
        return float(self.writes_ns[1] - self.arrival_ns) / 1e9

    @property
    def e2e_s(self) -> float:
        return float(self.writes_ns[-1] - self.arrival_ns) / 1e9


def read_truth(path: str | Path) -> list[Truth]:
    """Every complete block of the log(s) at ``path`` (and ``path.0``, ``path.1``, ... of several processes)."""
    out = []
    base = Path(path)
    for file in sorted(base.parent.glob(base.name + "*")):
        data, i = file.read_bytes(), 0
        while i + LOG_HEAD.size <= len(data):
            rid, arrival, start, num, tokens, fault = LOG_HEAD.unpack_from(data, i)
            i += LOG_HEAD.size
            if i + 8 * num > len(data):
                break
            writes = np.frombuffer(data, dtype="<i8", count=num, offset=i)
            i += 8 * num
            out.append(Truth(rid, arrival, start, tokens, None if fault < 0 else FAULT_KINDS[fault], writes))
    return out


def _listener(config: MockConfig, port: int) -> socket.socket:
    if config.uds:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(config.uds)
    else:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.processes > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((config.host, port))
    full = any(f.kind == "no_accept" for f in config.faults)
    enable_kernel_stamps(sock)  # inherited by accepted sockets, so that a first request is stamped too
    sock.listen(0 if full else 4096)
    return sock


def serve(config: MockConfig, parent_pid: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until ``parent_pid``, which started this process, is gone.

    Prints ``ready URL`` on standard output when the port is open.

    Raises:
        BadInput: the address cannot be bound.
    """
    try:
        listener = _listener(config, config.port)
    except OSError as e:
        where = config.uds or f"{config.host}:{config.port}"
        raise BadInput(f"cannot listen: {e.strerror or e}", where=where, next_step="choose another port") from e
    port = 0 if config.uds else listener.getsockname()[1]
    fillers = []
    if any(f.kind == "no_accept" for f in config.faults):
        for _ in range(2):  # fill the accept queue, so that the kernel drops further SYNs
            filler = socket.socket(listener.family, socket.SOCK_STREAM)
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
    children: list[int] = []
    rank, me = 0, os.getpid()
    for k in range(1, config.processes):
        sibling = _listener(config, port)
        pid = os.fork()
        if pid == 0:
            listener.close()
            listener, rank, children, parent_pid = sibling, k, [], me
            break
        sibling.close()
        children.append(pid)
    log = None if config.log_path is None else f"{config.log_path}.{rank}"
    server = Server(replace(config, seed=config.seed + rank), listener, log)
    server.parent_pid = parent_pid

    def stop(*_: Any) -> None:
        server.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if rank == 0:
        scheme = "https" if config.tls_cert else "http"
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"ready unix:{config.uds}" if config.uds else f"ready {scheme}://{host}:{port}", flush=True)
    import gc

    gc.collect()
    gc.freeze()
    gc.disable()
    ask_for_short_slices()
    try:
        server.run()
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for pid in children:
            os.waitpid(pid, 0)
        if config.uds:
            Path(config.uds).unlink(missing_ok=True)


@contextlib.contextmanager
def running_mock(config: MockConfig, *, start_limit_s: float = 20.0) -> Iterator[str]:
    """The base URL of a mock in a process of its own, ended at the end of the block.

    Raises:
        BenchError: it did not start; the text has its reason.
    """
    command = [sys.executable, "-m", "bench.load.mock", config.to_json(), str(os.getpid())]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None and process.stderr is not None
        ready, _, _ = select.select([process.stdout], [], [], start_limit_s)
        line = process.stdout.readline().decode() if ready else ""
        if not line.startswith("ready "):
            process.kill()
            reason = process.stderr.read().decode().strip().splitlines()[-1:]
            raise BenchError(f"the mock server did not start: {' '.join(reason) or 'no answer in time'}")
        yield line.split(" ", 1)[1].strip()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


if __name__ == "__main__":
    try:
        serve(MockConfig.from_json(sys.argv[1]), int(sys.argv[2]))
    except BenchError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
