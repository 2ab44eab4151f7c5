"""Serves a schedule over HTTP: one schedule, split over sending processes; start, stop rules, records, honesty.

The driver itself sends nothing. It prepares everything before the clock starts (bodies on disk, shares, connections),
watches the stop rule on a shared page, and collects what the processes parsed when the window is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.errors import BenchError, StoreError
from bench.load import schedule as schedules
from bench.load.compiled_reads import MOST_CONNECTIONS
from bench.load.control import Control, State, Stop
from bench.load.honesty import Honesty, assess
from bench.load.share import Limits, Share
from bench.load.target import Address, Target, resolve, tls_context
from bench.load.worker import WorkerSpec, asked_of, dump
from bench.records import RequestRecord, Schedule, StopRule

#: In-flight requests that one process is given before a second one is used, where the number is not set.
STREAMS_PER_PROCESS = 1024
#: Expected chunks from which on the compiled path is used: below, loading it costs more than it saves.
COMPILED_CHUNKS = 10_000
_POLL_S = 0.1
_START_LIMIT_S = 60.0
_LEAD_S = 0.02


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to drive, apart from the schedule.

    Args:
        num_processes: None: one, and more only where one would not do and cores are free.
        cpus: pin process k to ``cpus[k % len]``, to keep the client off the engine's cores.
        exact_osl: an output length other than the requested one is an error (servers that honour ``ignore_eos``).
        drain_s: once enough was measured (minima reached, stopped on request, too many errors), how long requests in flight
            may take before they are aborted. At a maximum duration they are aborted at once.
        preconnect: connections opened before the clock starts, at most.
        capacity_chunks_per_s: receive path -> this client's measured capacity on this machine, for the verdict.
        receive_path: "compiled" reads plain connections in machine code (Linux; elsewhere and over TLS the event loop does
            it), "auto" does so where enough chunks are expected to be worth loading it. The result says which it was.
        keep_raw: leave the scratch folder (raw responses) and report where it is.
    """

    limits: Limits = field(default_factory=Limits)
    num_processes: int | None = None
    cpus: tuple[int, ...] | None = None
    exact_osl: bool = False
    drain_s: float = 30.0
    preconnect: int = 1024
    capacity_chunks_per_s: Mapping[str, float] | None = None
    capacity_source: str | None = None
    scratch_parent: str | None = None
    keep_raw: bool = False
    receive_path: Literal["auto", "compiled", "event_loop"] = "auto"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is now."""

    elapsed_s: float
    num_total: int
    num_done: int
    num_errors: int
    in_flight: int
    num_reads: int
    stage: str  # "connect", "warmup", "main", "drain", "parse"


@dataclass(slots=True)
class LoadResult:
    """Records in order of completion; chunks come in blocks from disk until :meth:`close`."""

    records: list[RequestRecord]
    honesty: Honesty
    main_start_s: float
    stop_reason: str
    scratch: Path
    chunk_files: list[Path]

    def chunk_blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns index, t_s, tokens, num_events; about a million rows a block."""
        for path in self.chunk_files:
            with np.load(path) as data:
                yield {name: data[name] for name in data.files}

    def close(self, *, keep_raw: bool = False) -> None:
        if not keep_raw:
            shutil.rmtree(self.scratch, ignore_errors=True)


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


class Driver:
    """One run of one schedule. Use :func:`drive`."""

    def __init__(
        self,
        schedule: Schedule,
        target: Target,
        options: LoadOptions,
        t0_monotonic_s: float,
        on_progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        if not schedule.requests:
            raise BenchError("the schedule has no requests")
        self.schedule, self.target, self.options = schedule, target, options
        self.t0_ns = round(t0_monotonic_s * 1e9)
        self.on_progress, self.should_stop = on_progress, should_stop
        self.num = choose_num_processes(schedule, options.num_processes)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.semaphore: int | None = None
        self.num_warmup = sum(r.phase == "warmup" for r in schedule.requests)
        self.num_total = 0
        self.step_limit = schedule.max_in_flight
        self.stop_reason = "the schedule was served"
        self.past_maximum = False

    def run(self) -> LoadResult:
        raise_file_limit()
        self.target.authorization()  # a missing key is told before anything starts
        tls_context(self.target)
        self.scratch = Path(tempfile.mkdtemp(prefix="tokenyield-load-", dir=self.options.scratch_parent))
        try:
            self._prepare()
            self._start()
            main_start_ns = self._watch()
            return self._collect(main_start_ns)
        except OSError as e:
            raise StoreError(
                f"cannot write raw responses: {e.strerror or e}",
                where=str(self.scratch),
                next_step="free space or set TMPDIR",
            ) from e
        finally:
            self._end_processes()
            if self.semaphore is not None:
                os.close(self.semaphore)
            if sys.exc_info()[0] is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def _prepare(self) -> None:
        """Bodies, shares and the shared page, all on disk before the clock starts."""
        schedule, allowed = self.schedule, limited_by_rule(self.schedule)
        self.num_total = int(allowed.sum())
        self.control = Control(self.scratch / "control", self.num, create=True)
        limit, semaphore = schedule.max_in_flight, None
        steps = schedule.in_flight_steps
        if steps:
            limit = self.step_limit = steps[0][1]
        if limit is not None and self.num > 1:
            semaphore = self.semaphore = os.eventfd(limit, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
        for rank, positions in enumerate(schedules.split(schedule, self.num)):
            mine = positions[allowed[positions]]
            at = [0]
            with open(self.scratch / f"bodies.{rank}", "wb") as f:
                for p in mine:
                    at.append(at[-1] + f.write(self.target.body(schedule.requests[p])))
            dump(self.scratch, f"share.{rank}.pickle", build_share(schedule, mine, np.asarray(at, dtype=np.int64)))
            dump(self.scratch, f"asked.{rank}.pickle", asked_of({int(p): schedule.requests[p] for p in mine}))
        most = max((c for _, c in steps), default=0) if steps else limit
        connections = min(self.num_total, most if most is not None else 64, self.options.preconnect)
        spec = WorkerSpec(
            target=self.target,
            address=pick_address(resolve(self.target), self.options.limits.connect_s),
            limits=self.options.limits,
            num_workers=self.num,
            num_connections=-(-connections // self.num),
            max_in_flight=limit,
            in_flight_steps=steps,
            batch=schedule.kind == "offline",
            semaphore_fd=semaphore,
            t0_ns=self.t0_ns,
            exact_osl=self.options.exact_osl,
            cpus=self.options.cpus,
            parent_pid=os.getpid(),
            compiled=self._wants_compiled(allowed),
            most_connections=min(self.num_total, -(-(most if most is not None else MOST_CONNECTIONS) // self.num) + 64),
        )
        dump(self.scratch, "spec.pickle", spec)

    def _wants_compiled(self, allowed: np.ndarray) -> bool:
        path = self.options.receive_path
        if path != "auto":
            return path == "compiled"
        requests = self.schedule.requests
        return sum(requests[p].osl for p in np.flatnonzero(allowed)) >= COMPILED_CHUNKS

    def _start(self) -> None:
        fds = () if self.semaphore is None else (self.semaphore,)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        env.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
        for rank in range(self.num):
            # A session of their own: Ctrl-C reaches the driver alone, which ends them in order.
            with open(self.scratch / f"log.{rank}", "wb") as log:
                command = [sys.executable, "-m", "bench.load.worker", str(self.scratch), str(rank)]
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=env,
                        pass_fds=fds,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )

    def _watch(self) -> int:
        """From readiness to the last response. Returns the main part's start (ns)."""
        limit = time.monotonic() + _START_LIMIT_S + self.options.limits.connect_s
        self._wait(State.READY, "connect", lambda: time.monotonic() > limit)
        self.control.header[Control.GO] = 1
        if self.num_warmup:
            self._wait(State.WARM, "warmup", self._asked_to_stop)
        start_ns = time.monotonic_ns() + round(_LEAD_S * 1e9)
        self.control.header[Control.MAIN_START_NS] = start_ns
        self.control.header[Control.GO] = 2
        self._wait(State.SENT, "main", lambda: self._rule_ends(start_ns))
        return start_ns

    def _wait(self, state: State, stage: str, ends: Callable[[], bool]) -> None:
        """Until all workers reach ``state``; ``ends`` asks for an early end, after which the drain limit holds."""
        control, abort_at = self.control, None
        began = time.monotonic()
        pause_s = 0.005  # short runs are not made long by waiting for them
        while not control.all_at_least(state):
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, _POLL_S)
            self._check_alive()
            if abort_at is None and ends():
                if stage == "connect":
                    raise BenchError("the sending processes did not get ready in time", where=self.target.url)
                control.header[Control.STOP] = max(int(control.header[Control.STOP]), int(Stop.NO_MORE))
                abort_at = time.monotonic() + (0.0 if self.past_maximum else self.options.drain_s)
                stage = "drain"
            if abort_at is not None and time.monotonic() > abort_at:
                control.header[Control.STOP] = int(Stop.ABORT)
            if self.on_progress is not None:
                self.on_progress(self._progress(began, stage))

    def _progress(self, began: float, stage: str) -> Progress:
        c = self.control
        return Progress(
            elapsed_s=time.monotonic() - began,
            num_total=self.num_total,
            num_done=c.total(Control.NUM_DONE),
            num_errors=c.total(Control.NUM_ERRORS),
            in_flight=c.total(Control.IN_FLIGHT),
            num_reads=c.total(Control.NUM_READS),
            stage=stage,
        )

    def _asked_to_stop(self) -> bool:
        if self.should_stop is not None and self.should_stop():
            self.stop_reason = "stopped on request"
            return True
        return False

    def _rule_ends(self, start_ns: int) -> bool:
        elapsed = (time.monotonic_ns() - start_ns) / 1e9
        if elapsed >= 0:
            self._step_semaphore(elapsed)
        reason = self._stop_reason(self.schedule.stop, elapsed)
        if reason:
            self.stop_reason = reason
        return reason is not None or self._asked_to_stop()

    def _stop_reason(self, rule: StopRule, elapsed: float) -> str | None:
        done = self.control.total(Control.NUM_DONE) - self.num_warmup
        errors = self.control.total(Control.NUM_ERRORS)
        if rule.max_duration_s is not None and elapsed >= rule.max_duration_s:
            self.past_maximum = True
            return f"the maximum duration of {rule.max_duration_s:g} s was reached"
        if rule.max_errors is not None and errors > rule.max_errors:
            return f"{errors} errors are more than the {rule.max_errors} allowed"
        # A share needs some requests before it means anything.
        if rule.max_error_ratio is not None and done >= 20 and errors > rule.max_error_ratio * done:
            return f"{errors} errors of {done} requests are more than the share of {rule.max_error_ratio:g} allowed"
        has_minimum = rule.min_duration_s > 0 or rule.min_requests > 0
        if has_minimum and elapsed >= rule.min_duration_s and done >= rule.min_requests:
            return "the minimum duration and number of requests were reached"
        return None

    def _step_semaphore(self, elapsed_s: float) -> None:
        """Concurrency steps over several processes: give and take slots of the shared semaphore."""
        steps = self.schedule.in_flight_steps
        if not steps or self.semaphore is None or self.step_limit is None:
            return
        wanted = [c for t, c in steps if t <= elapsed_s][-1]
        if wanted > self.step_limit:
            os.eventfd_write(self.semaphore, wanted - self.step_limit)
            self.step_limit = wanted
        while wanted < self.step_limit:
            try:
                os.eventfd_read(self.semaphore)
            except BlockingIOError:
                break  # all slots are taken: the next look takes back those that get free
            self.step_limit -= 1

    def _check_alive(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() not in (None, 0):
                raise BenchError(f"a sending process died: {self._reason(rank)}", where=self.target.url)

    def _reason(self, rank: int) -> str:
        failed = self.scratch / f"failed.{rank}"
        if failed.exists():
            return failed.read_text()
        lines = (self.scratch / f"log.{rank}").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.processes[rank].returncode}"

    def _collect(self, main_start_ns: int) -> LoadResult:
        self._wait(State.PARSED, "parse", lambda: False)
        facts: list[dict[str, Any]] = []
        records: list[RequestRecord] = []
        for rank in range(self.num):
            facts.append(json.loads((self.scratch / f"facts.{rank}.json").read_text()))
            with open(self.scratch / f"records.{rank}.jsonl", encoding="utf-8") as f:
                records += [RequestRecord.from_dict(json.loads(line)) for line in f]
        for fact in facts:
            if fact["spill_failed"]:
                raise StoreError(
                    f"raw responses could not be written: {fact['spill_failed']}",
                    where=str(self.scratch),
                    next_step="free space there, or set TMPDIR to a larger disk",
                )
        infinity = float("inf")
        records.sort(key=lambda r: (infinity if r.done_s is None else r.done_s, r.index))
        blocks = [self.scratch / f"chunks.{f['rank']}.{k}.npz" for f in facts for k in range(f["num_chunk_blocks"])]
        honesty = assess(
            self.schedule,
            facts,
            records,
            capacity_chunks_per_s=(self.options.capacity_chunks_per_s or {}).get(_path(facts)),
            capacity_source=self.options.capacity_source,
        )
        start_s = (main_start_ns - self.t0_ns) / 1e9
        return LoadResult(records, honesty, start_s, self.stop_reason, self.scratch, blocks)

    def _end_processes(self) -> None:
        if hasattr(self, "control"):
            self.control.header[Control.STOP] = int(Stop.ABORT)
        deadline = time.monotonic() + 5
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _path(facts: list[dict[str, Any]]) -> str:
    """The receive path's name without the reason in brackets."""
    return str(facts[0]["receive_path"]).split(" (")[0]


def drive(
    schedule: Schedule,
    target: Target,
    options: LoadOptions | None = None,
    *,
    t0_monotonic_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> LoadResult:
    """Serve ``schedule`` against ``target`` and return every record. Call ``close()`` on the result.

    Args:
        t0_monotonic_s: zero of all times, a ``time.monotonic()`` reading; None: now.

    Raises:
        BadInput: a key, certificate, host or prompt form cannot be used (before anything is sent).
        StoreError: the scratch disk is full.
        BenchError: a sending process died.
    """
    t0 = time.monotonic() if t0_monotonic_s is None else t0_monotonic_s
    return Driver(schedule, target, options or LoadOptions(), t0, on_progress, should_stop).run()
