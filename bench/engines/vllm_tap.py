"""What vLLM's scheduler decided at each step, read where it happens: inside vLLM's engine-core process.

vLLM takes the class of its scheduler as an engine argument (``scheduler_cls``). We name :func:`scheduler` there: it makes
exactly the scheduler that vLLM would have made and notes, per step, what ``schedule()`` returned and when
``update_from_output()`` had processed the result. A step costs a few microseconds: one row of numbers is written to a
shared memory map that the front end reads; nothing is sent, nothing waits. (vLLM's own per-step statistics do not hold
the sum of context lengths, which any model of a step's time needs; and its front end sees them late.)

This module is imported by the engine core: standard library only at the top.
"""

from __future__ import annotations

import importlib
import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Folder for the rows, and the scheduler class that the user asked for (empty: vLLM's own choice).
FOLDER_VARIABLE, CLASS_VARIABLE = "TOKENYIELD_STEP_FOLDER", "TOKENYIELD_SCHEDULER_CLASS"
SCHEDULER_CLS = "bench.engines.vllm_tap.scheduler"

# started_s, output_s, follows (1: the engine had work since the row before), kv_usage, num_running, num_waiting,
# prefill_tokens, decode_tokens, prefill_requests, decode_requests, context_tokens, num_preemptions, cached_tokens
_ROW = struct.Struct("<4d9q")
_COUNT = struct.Struct("<q")
_CAPACITY = 1 << 16  # rows: at 0.25 s between reads this bears 260,000 steps per second


def scheduler(*args: Any, **kwargs: Any) -> Any:
    """Called by vLLM in place of its scheduler class. Arguments are passed on as they come."""
    made = _scheduler_class(kwargs["vllm_config"] if "vllm_config" in kwargs else args[0])(*args, **kwargs)
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        try:
            _record_steps(made, _RowWriter(Path(folder) / f"{os.getpid()}.steps"))
        except OSError as e:  # no room: the engine runs, without statistics of its steps
            print(f"tokenyield: steps are not recorded: {e}", flush=True)
    return made


def _scheduler_class(vllm_config: Any) -> Any:
    named = os.environ.get(CLASS_VARIABLE)
    if named:
        module, _, name = named.rpartition(".")
        return getattr(importlib.import_module(module), name)
    from bench.engines.vllm_versions import default_scheduler_class

    return default_scheduler_class(vllm_config)


def _record_steps(made: Any, rows: _RowWriter) -> None:
    """Wrap the two methods of this one scheduler that begin and end a step."""
    schedule, update_from_output = made.schedule, made.update_from_output
    counts = made.get_request_counts  # () -> (running, waiting)
    begun: deque[tuple[Any, float, tuple[int, ...], tuple[int, int], float]] = deque()
    busy = False  # the scheduler still had requests after the row before

    def recorded_schedule(*args: Any, **kwargs: Any) -> Any:
        started_s = time.monotonic()
        output = schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens > 0:
            usage = float(made.kv_cache_manager.usage)
            begun.append((output, started_s, _shape(output), counts(), usage))
        return output

    def recorded_update(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        result = update_from_output(scheduler_output, *args, **kwargs)
        while begun:
            output, started_s, shape, (running, waiting), usage = begun.popleft()
            if output is scheduler_output:
                rows.write(started_s, time.monotonic(), float(busy), usage, running, waiting, *shape)
                busy = any(counts())
                break
        return result

    made.schedule, made.update_from_output = recorded_schedule, recorded_update


def _shape(output: Any) -> tuple[int, ...]:
    """(prefill_tokens, decode_tokens, prefill_requests, decode_requests, context_tokens, num_preemptions,
    cached_tokens) of a SchedulerOutput.

    A request decodes once it has produced a token; a preempted one that is computed again counts as prefill. Context is
    what is in the KV cache before the step, prefix-cache hits included.
    """
    new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
    scheduled = output.num_scheduled_tokens
    context = sum(cached.num_computed_tokens)
    preempted = len(output.preempted_req_ids or ())
    if not new and not cached.resumed_req_ids and 0 not in cached.num_output_tokens:
        return 0, output.total_num_scheduled_tokens, 0, len(scheduled), context, preempted, 0  # pure decode: the usual
    prefill_tokens = prefill_requests = hits = 0
    for request in new:
        prefill_tokens += scheduled[request.req_id]
        hits += request.num_computed_tokens
        prefill_requests += 1
    for req_id, produced in zip(cached.req_ids, cached.num_output_tokens, strict=True):
        if produced == 0 or req_id in cached.resumed_req_ids:
            prefill_tokens += scheduled[req_id]
            prefill_requests += 1
    decode_tokens = output.total_num_scheduled_tokens - prefill_tokens
    decode_requests = len(scheduled) - prefill_requests
    return prefill_tokens, decode_tokens, prefill_requests, decode_requests, context + hits, preempted, hits


class _RowWriter:
    """A ring of rows in a shared file. The count is written after its row: a reader never sees half a row."""

    def __init__(self, path: Path) -> None:
        size = _COUNT.size + _CAPACITY * _ROW.size
        with open(path, "w+b") as f:
            f.truncate(size)  # sparse: pages come with their rows
            self._map = mmap.mmap(f.fileno(), size)
        self._count = 0

    def write(self, *values: float) -> None:
        _ROW.pack_into(self._map, _COUNT.size + (self._count % _CAPACITY) * _ROW.size, *values)
        self._count += 1
        _COUNT.pack_into(self._map, 0, self._count)


class RowReader:
    """Reads the rows that one or more engine cores (data parallel) write under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._maps: list[mmap.mmap] = []
        for path in sorted(folder.glob("*.steps")):
            with open(path, "rb") as f:
                self._maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        self._read = [0] * len(self._maps)

    @property
    def num_cores(self) -> int:
        return len(self._maps)

    def skip(self) -> None:
        """Forget everything up to now."""
        self._read = [_COUNT.unpack_from(m, 0)[0] for m in self._maps]

    def rows(self) -> Iterator[tuple[float, float, bool, tuple[Any, ...]]]:
        """New rows of all cores, one core after the other; see :meth:`rows_of`."""
        for core in range(self.num_cores):
            yield from self.rows_of(core)

    def rows_of(self, core: int) -> Iterator[tuple[float, float, bool, tuple[Any, ...]]]:
        """New rows of one core: (started_s, output_s on the monotonic clock, whether that core was busy since its row before,
        (kv_usage_ratio, num_running, ..., cached_tokens))."""
        rows = self._maps[core]
        count = _COUNT.unpack_from(rows, 0)[0]
        for i in range(max(self._read[core], count - _CAPACITY), count):
            row = _ROW.unpack_from(rows, _COUNT.size + (i % _CAPACITY) * _ROW.size)
            yield row[0], row[1], row[2] > 0, row[3:]
        self._read[core] = count
