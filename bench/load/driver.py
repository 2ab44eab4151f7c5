"""Serves a schedule over HTTP: one schedule, split over sending processes; start, stop rules, records, honesty.

The driver itself sends nothing. It prepares everything before the clock starts (bodies on disk, shares, connections),
watches the stop rule on a shared page, and collects what the processes parsed when the window is over.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError, StoreError
from bench.load import schedule as schedules
from bench.load.compiled_reads import MOST_CONNECTIONS
from bench.load.control import Bell, Control, Go, State, Stop
from bench.load.honesty import assess
from bench.load.options import LoadOptions, LoadResult, Progress
from bench.load.prepare import (
    build_share,
    choose_num_processes,
    is_local,
    limited_by_rule,
    pick_address,
    raise_file_limit,
    wants_compiled,
)
from bench.load.target import Target, request_rest, resolve, tls_context
from bench.load.worker import WorkerSpec, asked_of, dump
from bench.records import RequestRecord, Schedule, StopRule

__all__ = ["Driver", "LoadOptions", "LoadResult", "Progress", "drive"]

#: Between two looks at the shared page, which cost some 200 us each: while nothing can end the run but its end or the death of
#: the one worker, of which the pipe tells; while somebody may stop it, errors, or the death of one of several; while somebody
#: watches or a count may end it; with concurrency steps over several processes.
_LONG_REST_S, _REST_S, _POLL_S, _STEP_POLL_S = 10.0, 1.0, 0.2, 0.1
_START_LIMIT_S = 60.0
_LEAD_S = 0.02


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
        self.bell = Bell()
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
            self.bell.close()
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
                    at.append(at[-1] + f.write(request_rest(int(p), self.target.body(schedule.requests[p]))))
            dump(self.scratch, f"share.{rank}.pickle", build_share(schedule, mine, np.asarray(at, dtype=np.int64)))
            dump(self.scratch, f"asked.{rank}.pickle", asked_of({int(p): schedule.requests[p] for p in mine}))
        most = max((c for _, c in steps), default=0) if steps else limit
        connections = min(self.num_total, most if most is not None else 64, self.options.preconnect)
        address = pick_address(resolve(self.target), self.options.limits.connect_s)
        real_time = self.options.real_time
        spec = WorkerSpec(
            target=self.target,
            address=address,
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
            bell_fd=self.bell.write_fd,
            real_time=is_local(address) if real_time is None else real_time,
            compiled=wants_compiled(schedule, self.options, allowed),
            most_connections=min(self.num_total, -(-(most if most is not None else MOST_CONNECTIONS) // self.num) + 64),
        )
        dump(self.scratch, "spec.pickle", spec)

    def _start(self) -> None:
        fds = (self.bell.write_fd,) if self.semaphore is None else (self.bell.write_fd, self.semaphore)
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
        self.bell.started()

    def _watch(self) -> int:
        """From readiness to the last response. Returns the main part's start (ns)."""
        limit = time.monotonic() + _START_LIMIT_S + self.options.limits.connect_s
        self._wait(State.READY, "connect", lambda: time.monotonic() > limit)
        self.control.header[Control.GO] = Go.WARMUP
        if self.num_warmup:
            self._wait(State.WARM, "warmup", self._asked_to_stop)
        start_ns = time.monotonic_ns() + round(_LEAD_S * 1e9)
        self.control.header[Control.MAIN_START_NS] = start_ns
        self.control.header[Control.GO] = Go.MAIN
        self._wait(State.SENT, "main", lambda: self._rule_ends(start_ns))
        self.control.header[Control.GO] = Go.PARSE
        return start_ns

    def _wait(self, state: State, stage: str, ends: Callable[[], bool]) -> None:
        """Until all workers reach ``state``; ``ends`` asks for an early end, after which the drain limit holds."""
        control, abort_at = self.control, None
        began = time.monotonic()
        while not control.all_at_least(state):
            self.bell.wait(self._pause_s(stage))
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

    def _pause_s(self, stage: str) -> float:
        """How long the driver may rest before it has to look for itself."""
        if self.schedule.in_flight_steps is not None:
            return _STEP_POLL_S
        rule = self.schedule.stop
        if stage != "main" or self.on_progress is not None or rule.min_requests > 0 or rule.min_duration_s > 0:
            return _POLL_S
        may_end = self.should_stop is not None or rule.max_errors is not None or rule.max_error_ratio is not None
        rest = (
            _REST_S if may_end or self.num > 1 else _LONG_REST_S
        )  # the pipe hangs up when the last of its writers ends
        if rule.max_duration_s is None:
            return rest
        elapsed = (time.monotonic_ns() - int(self.control.header[Control.MAIN_START_NS])) / 1e9
        return min(rest, max(rule.max_duration_s - elapsed, 0.001))

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
            self.control.header[Control.GO] = Go.PARSE
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
