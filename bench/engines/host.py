"""The tool's side of an engine that runs in processes of its own: start it, give it schedules, end it whatever happens.

Nothing here imports torch or vLLM. The engine's output goes to one log file, given at construction, from its start to
its end; while a run goes on, the run's own part of it is copied, as it grows, to ``log_path`` when that was set to
another file since.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import bench
from bench.engines.base import RecordSink
from bench.engines.failures import (
    NEXT_STEPS,
    count_oom_kills,
    failure_of_exit,
    log_tail,
    refined,
)
from bench.engines.launch import EngineDied, EngineLaunch, EngineStartFailed
from bench.engines.packing import pack
from bench.engines.processes import (
    MARKER_VARIABLE,
    end_processes,
    engine_processes,
    remove_shared_memory,
    shared_memory_of,
)
from bench.engines.wire import Batch, Channel, Failure, RunOrder
from bench.errors import BenchError, EngineUnavailable, StoreError
from bench.records import EngineInfo, RequestRecord, Schedule

__all__ = ["EngineDied", "EngineLaunch", "EngineProcess", "EngineStartFailed"]

_TICK_S = 0.5  # how often limits are looked at while nothing arrives
_ABORT_LIMIT_S = 30.0  # for an engine to wind down a run that is broken off, before it is ended
_KILL_LIMIT_S = 20.0


class EngineProcess:
    """One engine start. Serves any number of runs, one after the other; ``stop`` it in a ``finally``.

    Args:
        launch: what to start.
        log_path: the engine's whole output goes here (appended). Set the attribute to another path before a run, and
            that run's part of the log is copied there as it grows.
    """

    def __init__(self, launch: EngineLaunch, log_path: Path) -> None:
        self.launch = launch
        self.log_path = self._whole_log = Path(log_path)
        self.info: EngineInfo | None = None
        self._marker = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._inbox: deque[tuple[str, Any]] = deque()
        self._reported: set[tuple[int, int]] = set()
        self._engine_pid: int | None = None
        self._number = 0
        self._stopped = False
        self._oom_kills_before = 0
        self._shared_memory: set[str] = set()

    # --- start ---------------------------------------------------------------------------------------------------

    def start(self, limit_s: float) -> EngineInfo:
        """Start the engine and wait until it is ready. Raises EngineStartFailed (an EngineUnavailable)."""
        if self._process is not None:
            raise RuntimeError("this engine was started already")
        self._oom_kills_before = count_oom_kills()
        begin = time.monotonic()
        self._spawn()
        try:
            for message in self._messages(begin + limit_s, None):
                if message is None:
                    raise self._start_failed(
                        Failure("start-timeout", f"not ready after {limit_s:g} s", NEXT_STEPS["start-timeout"])
                    )
                kind, value = message
                if kind == "failed":
                    raise self._start_failed(value)
                if kind == "ready":
                    self.info = _with_start(value, time.monotonic() - begin, self.pids)
                    self._shared_memory = shared_memory_of(self.info.pids)
                    return self.info
            raise self._start_failed(self._exit_failure())
        except BaseException:
            self.stop(limit_s=0)
            raise

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        env = {**os.environ, **self.launch.env, MARKER_VARIABLE: self._marker, "PYTHONUNBUFFERED": "1"}
        root = str(Path(bench.__file__).resolve().parent.parent)
        env["PYTHONPATH"] = os.pathsep.join(p for p in (root, env.get("PYTHONPATH")) if p)
        try:
            self._whole_log.parent.mkdir(parents=True, exist_ok=True)
            log: IO[bytes] = open(self._whole_log, "ab")
        except OSError as e:
            ours.close()
            theirs.close()
            raise StoreError(f"cannot write: {e.strerror}", where=str(self._whole_log)) from e
        with log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.engines.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._channel = Channel(ours)
        with contextlib.suppress(OSError):  # it may have ended already: seen by whoever reads
            self._channel.send("start", self.launch)

    def _start_failed(self, failure: Failure) -> EngineStartFailed:
        tail = log_tail(self._whole_log)
        failure = refined(failure, log_tail(self._whole_log, 2000), self._oom_kills())
        return EngineStartFailed(
            f"the {self.launch.kind} engine did not start: {failure.message}",
            next_step=failure.next_step or f"see {self._whole_log}",
            reason=failure.reason,
            log_tail=tail,
        )

    # --- run -----------------------------------------------------------------------------------------------------

    def run(
        self,
        schedule: Schedule,
        sink: RecordSink,
        t0_monotonic_s: float,
        *,
        run_limit_s: float,
        idle_limit_s: float,
    ) -> Iterator[RequestRecord]:
        """Serve ``schedule``: yields records as they complete, gives the rest to ``sink``.

        Closing the iterator, or an error from ``sink`` (disk full), breaks off the run; the engine can serve the next
        one if it winds down in time.

        Raises:
            EngineDied: the engine crashed, ran out of memory, was killed, hung (nothing happened for ``idle_limit_s``)
                or went on past ``run_limit_s``. It is down then.
            BenchError: what ``sink`` raised, or what the engine finds wrong with the schedule.
        """
        if self._channel is None or self._process is None or self.info is None or self._stopped:
            raise EngineUnavailable("the engine is not running", next_step="start it first")
        self._number += 1
        number = self._number
        log = _LogCopy(self._whole_log, self.log_path)
        over = False
        try:
            with contextlib.suppress(OSError):
                self._channel.send("run", RunOrder(number, pack(schedule), t0_monotonic_s))
            deadline_s = time.monotonic() + run_limit_s
            for message in self._messages(deadline_s, idle_limit_s):
                log.copy()
                if message is None:
                    over = True
                    raise self._overdue(time.monotonic() > deadline_s, run_limit_s, idle_limit_s)
                kind, value = message
                if kind == "batch" and value.number == number:
                    yield from _deliver(value, sink)
                elif kind == "done" and value == number:
                    over = True
                    return
                elif kind == "refused" and value[0] == number:
                    over = True
                    raise value[1]
                elif kind == "failed":
                    over = True
                    raise self._died(value)
            over = True
            raise self._died(self._exit_failure())
        finally:
            if not over:
                self._abort(number)
            log.copy()

    def _abort(self, number: int) -> None:
        """Have the engine break off the run; end it when it does not."""
        assert self._channel is not None
        try:
            self._channel.send("abort", number)
            for message in self._messages(time.monotonic() + _ABORT_LIMIT_S, None):
                if message is None:
                    break
                kind, value = message
                if (kind == "done" and value == number) or (kind == "refused" and value[0] == number):
                    return
        except (OSError, BenchError):
            pass
        self.stop(limit_s=0)

    def _messages(self, deadline_s: float, idle_limit_s: float | None) -> Iterator[tuple[str, Any] | None]:
        """Messages as they come; None once when the deadline passed or nothing happened for too long; ends with the
        engine."""
        assert self._channel is not None and self._process is not None
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        last = time.monotonic()
        while True:
            ready = poll.poll(0 if self._inbox else _TICK_S * 1000)
            messages: list[tuple[str, Any]] | None = self._channel.receive() if ready else []
            self._inbox.extend(messages or ())
            while self._inbox:  # kept on self: whoever breaks off may leave some for the next reader
                kind, value = self._inbox.popleft()
                if kind == "pids":
                    self._reported.update(value)
                elif kind == "hello":
                    self._engine_pid = value
                else:
                    last = time.monotonic()
                    yield kind, value
            if messages is None or (not ready and self._process.poll() is not None):
                return
            now = time.monotonic()
            if now > deadline_s or (idle_limit_s is not None and now - last > idle_limit_s):
                yield None
                return

    def _overdue(self, past_deadline: bool, run_limit_s: float, idle_limit_s: float) -> EngineDied:
        self._write_stacks()
        if past_deadline:
            failure = Failure("time-limit", f"the run was not over after {run_limit_s:g} s", NEXT_STEPS["time-limit"])
        else:
            failure = Failure(
                "hang", f"no request completed and no step happened for {idle_limit_s:g} s", NEXT_STEPS["hang"]
            )
        return self._died(failure)

    def _write_stacks(self) -> None:
        """Ask a hung engine to write the stacks of its threads to its log."""
        if self._engine_pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self._engine_pid, signal.SIGUSR2)
                time.sleep(0.2)

    def _died(self, failure: Failure) -> EngineDied:
        self.stop(limit_s=0)
        failure = refined(failure, log_tail(self._whole_log, 2000), self._oom_kills())
        return EngineDied(
            failure.message,
            next_step=failure.next_step or f"see {self.log_path}",
            reason=failure.reason,
            log_tail=log_tail(self._whole_log),
        )

    def _exit_failure(self) -> Failure:
        """Why the engine ended without a word."""
        assert self._process is not None
        try:
            status: int | None = self._process.wait(timeout=_KILL_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = None
        return failure_of_exit(status, log_tail(self._whole_log, 500), self._oom_kills())

    def _oom_kills(self) -> int:
        return count_oom_kills() - self._oom_kills_before

    # --- stop ----------------------------------------------------------------------------------------------------

    @property
    def pids(self) -> tuple[int, ...]:
        """Live processes of the engine, ascending."""
        if self._process is None or self._stopped:
            return ()
        return tuple(sorted(engine_processes(self._process.pid, self._marker, self._reported)))

    def stop(self, limit_s: float = 30) -> None:
        """End the engine: asked first, killed after ``limit_s``. Every process of it is gone on return. Never raises."""
        if self._process is None or self._stopped:
            return
        process, channel = self._process, self._channel
        self._shared_memory |= shared_memory_of(self.pids)
        if limit_s > 0 and channel is not None and process.poll() is None:
            with contextlib.suppress(OSError):
                channel.send("stop")
            with contextlib.suppress(subprocess.TimeoutExpired):
                _drain_until_exit(channel, process, limit_s)
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGTERM)  # the guardian ends everything below it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_KILL_LIMIT_S)
        end_processes(lambda: engine_processes(process.pid, self._marker, self._reported), _KILL_LIMIT_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_KILL_LIMIT_S)
        if channel is not None:
            channel.close()
        remove_shared_memory(self._shared_memory, self._marker)
        self._stopped = True

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _drain_until_exit(channel: Channel, process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Wait for the engine to end while reading what it still sends, so that it cannot block on a full socket."""
    deadline = time.monotonic() + limit_s
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while process.poll() is None and time.monotonic() < deadline:
        if poll.poll(50) and channel.receive() is None:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))


def _deliver(batch: Batch, sink: RecordSink) -> Iterator[RequestRecord]:
    for step in batch.steps:
        sink.append_step(step)
    if batch.chunks:
        sink.append_chunk_columns(**batch.chunks)
    for metric in batch.metrics:
        sink.append_metric(metric)
    for sample in batch.telemetry:
        sink.append_telemetry(sample)
    if batch.manifest:
        sink.update_manifest(**batch.manifest)
    yield from batch.records


def _with_start(info: EngineInfo, start_s: float, pids: tuple[int, ...]) -> EngineInfo:
    return replace(info, start_s=start_s, pids=pids)


class _LogCopy:
    """Copies what is added to one log file to another one, from now on. Never raises: a log is not worth a run."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self._position = 0
        with contextlib.suppress(OSError):
            self._position = source.stat().st_size

    def copy(self) -> None:
        if self.target == self.source:
            return
        with contextlib.suppress(OSError):
            size = self.source.stat().st_size
            if size == self._position:
                return
            with open(self.source, "rb") as source, open(self.target, "ab") as target:
                source.seek(self._position)
                while block := source.read(1 << 20):
                    target.write(block)
                    self._position += len(block)
