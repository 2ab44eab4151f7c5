"""The sending process: ``python -m bench.load.worker SCRATCH RANK``, started by the driver.

It reads its share from the scratch folder, opens connections, waits for the start on the shared page, sends, and, when
the last response is in, parses what it left on disk into records and chunk columns.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import mmap
import os
import pickle
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.load.client import Client
from bench.load.clocks import ClockOffsets
from bench.load.compiled_memory import load_kernels
from bench.load.control import Control, Go, State, Stop, tell_state
from bench.load.parse import Asked, parse_outcome
from bench.load.share import Limits, Share
from bench.load.spill import SpillWriter, read_spill
from bench.load.target import Address, Target, tls_context
from bench.priority import ask_for_short_slices, real_time

#: Chunk columns go to disk in blocks of about this many rows.
_BLOCK_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is told. No secret is in it: the key comes from the environment."""

    target: Target
    address: Address
    limits: Limits
    num_workers: int
    num_connections: int
    max_in_flight: int | None
    in_flight_steps: tuple[tuple[float, int], ...] | None
    batch: bool
    semaphore_fd: int | None
    t0_ns: int
    exact_osl: bool
    cpus: tuple[int, ...] | None
    parent_pid: int
    bell_fd: int
    real_time: bool
    compiled: bool = False
    most_connections: int = 64


def new_loop() -> tuple[asyncio.AbstractEventLoop, str]:
    """uvloop's loop where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop(), "asyncio"
    return uvloop.new_event_loop(), f"uvloop {uvloop.__version__}"


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """No garbage collection while measuring: what exists now is not looked at, what is made then is not searched."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _cpu_ns() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


class Worker:
    """One process from start to records."""

    def __init__(self, scratch: Path, rank: int) -> None:
        self.scratch, self.rank = scratch, rank
        self.spec: WorkerSpec = pickle.loads((scratch / "spec.pickle").read_bytes())
        self.share: Share = pickle.loads((scratch / f"share.{rank}.pickle").read_bytes())
        self.control = Control(scratch / "control", self.spec.num_workers)
        self.words = self.control.workers[rank]
        if self.spec.cpus and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {self.spec.cpus[rank % len(self.spec.cpus)]})
        ask_for_short_slices()

    def send(self) -> dict[str, Any]:
        """The live part. Returns what the process measured of itself."""
        spec = self.spec
        body_path = self.scratch / f"bodies.{self.rank}"
        with open(body_path, "rb") as f:
            bodies = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if body_path.stat().st_size else b""
        loop, loop_name = new_loop()
        asyncio.set_event_loop(loop)
        spill = SpillWriter(self.scratch / f"spill.{self.rank}")
        kernels, path, prepare_s = self._receive_path()
        client = Client(
            loop,
            spec.target,
            spec.address,
            self.share,
            memoryview(bodies),
            spill,
            self.control,
            self.rank,
            spec.limits,
            max_in_flight=spec.max_in_flight,
            in_flight_steps=spec.in_flight_steps,
            batch=spec.batch,
            semaphore_fd=spec.semaphore_fd,
            tls_context=tls_context(spec.target),
            parent_pid=spec.parent_pid,
            kernels=kernels,
            num_connections=spec.most_connections,
        )
        try:
            with frozen_gc(), real_time(wanted=spec.real_time) as prompt:
                cpu, wall = loop.run_until_complete(self._live(client))
                tell_state(self.words, State.SENT, spec.bell_fd)
                loop.run_until_complete(self._until_all_have_sent())
        finally:
            client.close()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            spill.close()
        m = client.measures
        return {
            "rank": self.rank,
            "event_loop": loop_name,
            "receive_path": path,
            "real_time": prompt,
            "real_time_refused": spec.real_time and not prompt,
            "prepare_s": prepare_s,
            "num_compiled": client.reads.num_compiled if client.reads is not None else 0,
            "cpu_s": cpu / 1e9,
            "wall_s": wall / 1e9,
            "tick_lag_ns": m.tick_lag_ns.tolist(),
            "read_lag_ns": m.read_lag_ns.tolist(),
            "offsets": m.offsets,
            "num_connections": m.num_connections,
            "num_retries": m.num_retries,
            "num_unsolicited": m.num_unsolicited,
            "spill_failed": spill.failed,
        }

    def _receive_path(self) -> tuple[Any, str, float]:
        """(compiled functions or None, what the result calls the path, seconds that it took to get it)."""
        if not self.spec.compiled:
            return None, "event loop", 0.0
        if self.spec.target.is_tls:
            return None, "event loop (TLS)", 0.0
        try:
            kernels, took = load_kernels()
        except RuntimeError as e:
            return None, f"event loop ({e})", 0.0
        return kernels, "compiled", took

    async def _live(self, client: Client) -> tuple[int, int]:
        await client.connect(self.spec.num_connections)
        tell_state(self.words, State.READY, self.spec.bell_fd)
        rows = np.flatnonzero(self.share.is_root)
        warm = rows[self.share.is_warmup[rows]]
        if not await self._wait_for(Go.WARMUP):
            return 0, 1
        if len(warm):
            await client.serve(warm, time.monotonic_ns())
        tell_state(self.words, State.WARM, self.spec.bell_fd)
        if not await self._wait_for(Go.MAIN):
            return 0, 1
        cpu, wall = _cpu_ns(), time.monotonic_ns()
        client.measures.tick_lag_ns = client.measures.tick_lag_ns[:0]
        client.measures.read_lag_ns = client.measures.read_lag_ns[:0]
        await client.serve(rows[~self.share.is_warmup[rows]], int(self.control.header[Control.MAIN_START_NS]))
        return _cpu_ns() - cpu, max(time.monotonic_ns() - wall, 1)

    async def _until_all_have_sent(self) -> None:
        while self.control.header[Control.GO] < Go.PARSE and os.getppid() == self.spec.parent_pid:
            await asyncio.sleep(0.005)

    async def _wait_for(self, go: int) -> bool:
        """Wait for the driver's sign. False when the run was stopped, or the driver died, before it came."""
        header = self.control.header
        while header[Control.GO] < go:
            if header[Control.STOP] >= Stop.NO_MORE or os.getppid() != self.spec.parent_pid:
                return False
            await asyncio.sleep(0.002)
        return True

    def parse(self, facts: dict[str, Any]) -> None:
        """Turn the spill into ``records.RANK.jsonl`` and ``chunks.RANK.K.npy`` files."""
        spec = self.spec
        asked: dict[int, Asked] = pickle.loads((self.scratch / f"asked.{self.rank}.pickle").read_bytes())
        points = np.asarray(facts.pop("offsets"), dtype=np.int64)
        offsets = ClockOffsets(points[:, 0], points[:, 1])
        key = spec.target.authorization()
        secret = key.removeprefix("Bearer ") if key else None
        blocks: list[tuple[int, Any]] = []
        rows = number = reads = events = differing = kernel = stamped = merged = streamed = 0
        with open(self.scratch / f"records.{self.rank}.jsonl", "w", encoding="utf-8") as out:
            for outcome in read_spill(self.scratch / f"spill.{self.rank}"):
                p = parse_outcome(
                    outcome,
                    asked[outcome.position],
                    offsets,
                    spec.t0_ns,
                    exact_osl=spec.exact_osl,
                    worker=self.rank,
                    secret=secret,
                )
                out.write(json.dumps(p.record.to_dict(), ensure_ascii=False) + "\n")
                if p.record.phase != "warmup":
                    reads, events = reads + len(p.chunk_t_s), events + p.num_events
                    differing += p.isl_differs
                    merged += len(p.chunk_events) > 0 and p.chunk_events[0] > 1
                    streamed += len(p.chunk_events) > 0
                kernel += outcome.kernel_stamps and bool(p.num_reads)
                stamped += bool(p.num_reads)
                if len(p.chunk_t_s):
                    blocks.append((p.record.index, p))
                    rows += len(p.chunk_t_s)
                if rows >= _BLOCK_ROWS:
                    self._write_chunks(blocks, number)
                    blocks, rows, number = [], 0, number + 1
        self._write_chunks(blocks, number)
        facts.update(
            num_chunk_blocks=number + bool(blocks),
            num_reads_with_tokens=reads,
            num_events=events,
            num_isl_differs=differing,
            num_first_merged=int(merged),
            num_streamed=int(streamed),
            num_kernel_stamped=kernel,
            num_stamped=stamped,
            clock_steps_ns=offsets.steps_ns.tolist(),
            clock_spread_ns=offsets.spread_ns,
        )
        (self.scratch / f"facts.{self.rank}.json").write_text(json.dumps(facts))

    def _write_chunks(self, blocks: list[tuple[int, Any]], number: int) -> None:
        if not blocks:
            return
        columns = {
            "index": np.concatenate([np.full(len(p.chunk_t_s), i, dtype=np.int64) for i, p in blocks]),
            "t_s": np.concatenate([p.chunk_t_s for _, p in blocks]),
            "tokens": np.concatenate([p.chunk_tokens for _, p in blocks]).astype(np.int64),
            "num_events": np.concatenate([p.chunk_events for _, p in blocks]).astype(np.int64),
        }
        np.savez(self.scratch / f"chunks.{self.rank}.{number}.npz", **columns)  # type: ignore[arg-type]


def main(scratch: str, rank: str) -> None:
    """Entry point. A failure is written to ``failed.RANK``, one line, for the driver to tell."""
    folder = Path(scratch)
    try:
        worker = Worker(folder, int(rank))
        worker.parse(worker.send())
        tell_state(worker.words, State.PARSED, worker.spec.bell_fd)
    except BenchError as e:
        (folder / f"failed.{rank}").write_text(str(e))
        raise SystemExit(1) from None
    except Exception as e:
        import traceback

        (folder / f"failed.{rank}").write_text(f"{type(e).__name__}: {e}")
        traceback.print_exc()
        raise SystemExit(1) from None


def asked_of(requests: dict[int, Any]) -> dict[int, Asked]:
    """Schedule position -> what the record needs of that request."""
    return {
        k: Asked(r.index, r.phase, r.isl, r.osl, r.session, r.turn if r.session is not None else None)
        for k, r in requests.items()
    }


def dump(scratch: Path, name: str, value: Any) -> None:
    """Pickle into the scratch folder (both ends are this package, on this machine)."""
    with open(scratch / name, "wb") as f:
        pickle.dump(value, f, protocol=5)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
