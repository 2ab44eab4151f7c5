"""The simulation compiled by numba: :func:`simulate` gives exactly what ``bench.sim.loop.simulate`` gives, faster.

The kernel files (the other ``compiled_*`` and ``step_time_kernel``) are ordinary modules of pure functions. A second copy of each is loaded here and compiled, so the very same source also runs as plain Python.
Machine code is kept on disk under a folder named by a hash of those sources and of numba's version: numba itself only
notices a change in the file of the outermost function.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
import types
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BadInput
from bench.sim import compiled_client as client
from bench.sim import compiled_kv as kv
from bench.sim import compiled_light as light
from bench.sim import compiled_loop as loop
from bench.sim import compiled_router as router
from bench.sim.compiled_kv import State
from bench.sim.inputs import STEP_COLUMNS, Replica, SimInputs, SimResult
from bench.sim.loop import MOST_FRUITLESS_PREEMPTIONS, no_progress

_HERE = Path(__file__).parent
_KERNELS = (
    "compiled_kv", "compiled_scheduler", "compiled_light", "compiled_client", "compiled_router", "compiled_loop",
)  # fmt: skip
_ROLES = {"both": router.ROLE_BOTH, "prefill": router.ROLE_PREFILL, "decode": router.ROLE_DECODE}
_ROUTING = {
    "round_robin": router.ROUND_ROBIN,
    "least_loaded": router.LEAST_LOADED,
    "prefix_aware": router.PREFIX_AWARE,
}
_MAX_PREFIX_AWARE = 62  # replicas are bits of an int64
STEP_TIME_FILE = _HERE / "step_time_kernel.py"
_PREPARING = threading.Lock()


def simulate(inputs: SimInputs, step_time_file: Path = STEP_TIME_FILE) -> SimResult:
    """Run ``inputs`` compiled, with the ``step_time_s`` of ``step_time_file``.

    The first call ever on a machine compiles for some tens of seconds; later processes load the result from disk.
    """
    s = _arrays(inputs)
    table, num_steps, now = compiled_run(step_time_file)(s)
    if s.state[client.STALLED]:
        raise no_progress()
    offsets = np.zeros(inputs.num_requests + 1, dtype=np.int64)
    np.cumsum(inputs.max_tokens, out=offsets[1:])
    time, req = s.time.T.copy(), s.req.T.copy()
    if inputs.record_tokens:
        _blank_what_never_came(s.token_s, offsets, req[kv.OUTPUTS])
    return SimResult(
        time[client.SENT], time[client.DUE_ABS], time[client.QUEUED], time[client.SCHEDULED], time[client.FIRST], time[client.LAST],
        req[kv.ENDED], req[kv.OUTPUTS], req[kv.HITS], req[kv.PREEMPTIONS], req[kv.REPLICA],
        s.completed[: s.state[client.NUM_COMPLETED]].copy(), _step_columns(table[:num_steps]), offsets, s.token_s,
        min(float(now), float(s.param[client.DEADLINE])),
    )  # fmt: skip


def _blank_what_never_came(token_s: np.ndarray, offsets: np.ndarray, num_outputs: np.ndarray) -> None:
    """Times of tokens that were not put out are nan. They are few; filling all beforehand costs as much as the steps."""
    for i in np.flatnonzero(num_outputs < np.diff(offsets)).tolist():
        token_s[offsets[i] + num_outputs[i] : offsets[i + 1]] = np.nan


def _step_columns(table: np.ndarray) -> dict[str, np.ndarray]:
    """Columns in the order of the readable loop: replica by replica, each in time."""
    if len(table):
        table = table[np.argsort(table[:, 0], kind="stable")]
    return {
        name: table[:, k] if is_float else table[:, k].astype(np.int64)
        for k, (name, is_float) in enumerate(STEP_COLUMNS)
    }


def compiled_run(step_time_file: Path = STEP_TIME_FILE) -> Any:
    """The compiled ``compiled_loop.run`` over ``step_time_file``. Threads may call it at once."""
    # numba reads its cache folder from a global that is set while the functions are prepared: one thread at a time
    with _PREPARING:
        return _compiled_run(step_time_file)


@lru_cache(maxsize=4)
def _compiled_run(step_time_file: Path) -> Any:
    import numba

    files = {"step_time_kernel": step_time_file, **{name: _HERE / f"{name}.py" for name in _KERNELS}}
    digest = _digest(files.values(), numba.__version__)
    folder = cache_folder(digest)
    saved = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder) if folder else saved
    try:
        copies = {name: _copy(path, f"tokenyield_compiled_{digest}_{name}") for name, path in files.items()}
        compiled = {}
        for plain, module in copies.items():
            for name, value in vars(module).items():
                if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                    compiled[f"bench.sim.{plain}", name] = numba.njit(
                        cache=folder is not None, nogil=True, error_model="numpy"
                    )(value)
        for plain, module in copies.items():
            for name, value in list(vars(module).items()):
                if isinstance(value, types.FunctionType):
                    origin = f"bench.sim.{plain}" if value.__module__ == module.__name__ else value.__module__
                    setattr(module, name, compiled.get((origin, name), value))
        return copies["compiled_loop"].run
    finally:
        numba.config.CACHE_DIR = saved


def _copy(path: Path, name: str) -> types.ModuleType:
    """A second, separate module from the same file. It is entered under its name, for numba's cache asks for it there."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput("not a Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _digest(files: Iterable[Path], numba_version: str) -> str:
    digest = hashlib.sha256(numba_version.encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder(digest: str) -> Path | None:
    """A writable folder for machine code of these sources; None where nothing can be written (then every process compiles
    anew). ``TOKENYIELD_CACHE_DIR`` or ``XDG_CACHE_HOME`` choose the place."""
    xdg = os.environ.get("XDG_CACHE_HOME")
    places = [os.environ.get("TOKENYIELD_CACHE_DIR"), f"{xdg}/tokenyield" if xdg else None]
    places += [
        str(Path.home() / ".cache" / "tokenyield"),
        str(Path(tempfile.gettempdir()) / f"tokenyield-{os.getuid()}"),
    ]
    for place in places:
        if place is None:
            continue
        folder = Path(place) / "compiled" / digest
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


# -- arrays ---------------------------------------------------------------------------------------------------------


def _arrays(x: SimInputs) -> State:
    """The simulation's state before its first event."""
    replicas = x.fleet.replicas
    n, num = x.num_requests, len(replicas)
    if x.fleet.routing == "prefix_aware" and num > _MAX_PREFIX_AWARE:
        raise BadInput(f"prefix_aware routing is limited to {_MAX_PREFIX_AWARE} replicas, got {num}")
    caching = any(r.config.enable_prefix_caching for r in replicas)
    stages = max(r.config.pipeline_parallel_size for r in replicas)
    depth = max(r.config.max_concurrent_batches for r in replicas)
    widest = max(min(r.config.max_running, n) for r in replicas) + 1
    req, table_size = _requests(x, caching)
    rep, num_blocks = _replicas(x, caching)
    clock = np.zeros((num, 2 + stages + depth))
    clock[:, loop.NEXT_S] = np.inf
    coefficients = np.zeros((num, max(len(r.coefficients) for r in replicas)))
    for i, r in enumerate(replicas):
        coefficients[i, : len(r.coefficients)] = r.coefficients
    time = np.full((n, client.NUM_TIME), np.nan)
    time[:, client.THINK], time[:, client.DUE] = x.think_s, x.due_s
    num_events = n + len(x.limit) + 2
    numbers = max(x.num_block_numbers, 1)
    aware = x.fleet.routing == "prefix_aware"
    largest_block = max(r.config.block_size for r in replicas)
    return State(
        req=req, time=time, rep=rep, clock=clock, coefficients=coefficients, running=_zeros(num, widest),
        queue=_zeros(num, 2, n + 1), batch=_zeros(num, depth, widest + 1), chunk=_zeros(widest, 2),
        scratch=_zeros(4, n + 2), block=_blocks(replicas, rep, num_blocks, caching),
        same=np.full((num, numbers, 2), -1, dtype=np.int64), table=_zeros(table_size + 1), numbers=x.block_numbers,
        state=_state(x), param=_param(x), load=np.zeros(8), limit=np.column_stack([x.limit_t_s, x.limit.astype(float)]),
        event_t=np.zeros(num_events), event=_zeros(num_events, 3), ring=_zeros(2, n + 1), members=_members(x),
        completed=_zeros(n), token_s=np.empty(int(x.max_tokens.sum()) if x.record_tokens else 0),
        seen=_zeros(2, numbers if aware else 1), light_head=_zeros(num, largest_block), light_next=_zeros(num, widest),
        light_t=np.zeros((num, light.MOST_STEPS + 2)),
    )  # fmt: skip


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.int64)


def _requests(x: SimInputs, caching: bool) -> tuple[np.ndarray, int]:
    """State.req, and how many block-table entries all requests need."""
    req = _zeros(x.num_requests, kv.NUM_REQ)
    req[:, kv.PROMPT], req[:, kv.OSL], req[:, kv.STOP_AFTER] = x.prompt_tokens, x.max_tokens, x.stop_after
    req[:, kv.PRIORITY], req[:, kv.NEXT_TURN], req[:, kv.FOLLOWS] = x.priority, x.next_turn, x.follows
    req[:, kv.REPLICA] = -1
    req[1:, kv.TOKENS] = np.cumsum(x.max_tokens)[:-1]
    req[:, kv.NUMBERS], req[:, kv.NUM_NUMBERS] = x.block_offsets[:-1], np.diff(x.block_offsets)
    size = 0
    if caching:
        block_size = next(r.config.block_size for r in x.fleet.replicas if r.config.enable_prefix_caching)
        entries = (x.prompt_tokens + x.max_tokens) // block_size + 2
        req[1:, kv.TABLE] = np.cumsum(entries)[:-1]
        size = int(entries.sum())
    return req, size


def _replicas(x: SimInputs, caching: bool) -> tuple[np.ndarray, int]:
    """State.rep, and how many blocks there are in all."""
    rep = _zeros(len(x.fleet.replicas), kv.NUM_REP)
    total = 0
    for row, replica in zip(rep, x.fleet.replicas, strict=True):
        c = replica.config
        values = {
            kv.MAX_RUNNING: c.max_running, kv.TOKEN_BUDGET: c.token_budget, kv.INPUT_BUDGET: c.max_num_batched_tokens,
            kv.MAX_MODEL_LEN: c.max_model_len, kv.CHUNKED: c.enable_chunked_prefill, kv.ASYNC: c.async_scheduling,
            kv.BY_PRIORITY: c.policy == "priority", kv.LONG_CAP: c.long_prefill_token_threshold,
            kv.LONG_ADAPTIVE: c.long_prefill_token_threshold_adaptive, kv.RESERVE_FULL: c.scheduler_reserve_full_isl,
            kv.STAGES: c.pipeline_parallel_size, kv.V2_RUNNER: c.use_v2_model_runner, kv.DEPTH: c.max_concurrent_batches,
            kv.ROLE: _ROLES[replica.role], kv.BLOCK_SIZE: c.block_size, kv.CACHING: c.enable_prefix_caching,
            kv.WATERMARK: int(c.watermark * c.num_blocks), kv.BASE: total, kv.NUM_FREE: c.num_blocks - 1,
            kv.MOST_FRUITLESS: MOST_FRUITLESS_PREEMPTIONS + 10 * c.max_running,
        }  # fmt: skip
        for column, value in values.items():
            row[column] = value
        total += c.num_blocks if caching else 1
    return rep, total


def _blocks(replicas: tuple[Replica, ...], rep: np.ndarray, total: int, caching: bool) -> np.ndarray:
    """State.block: each replica's blocks in a ring through its null block, in order."""
    block = np.full((total, kv.NUM_BLOCK), -1, dtype=np.int64)
    block[:, kv.REF] = 0
    block[:, kv.NEXT] = np.arange(1, total + 1)
    block[:, kv.PREVIOUS] = np.arange(-1, total - 1)
    for row, replica in zip(rep, replicas, strict=True):
        first = int(row[kv.BASE])
        last = first + replica.config.num_blocks - 1 if caching else first
        block[last, kv.NEXT], block[first, kv.PREVIOUS] = first, last
    return block


def _state(x: SimInputs) -> np.ndarray:
    state = _zeros(client.NUM_STATE)
    state[client.GROUP] = -1
    state[client.NUM_GROUPS], state[client.TIMED_GROUP] = x.num_groups, x.timed_group
    state[client.ROUTING] = _ROUTING[x.fleet.routing]
    state[client.DISAGGREGATED] = any(r.role == "prefill" for r in x.fleet.replicas)
    state[client.RECORD_TOKENS] = x.record_tokens
    state[client.HAS_MINIMA], state[client.MIN_REQUESTS] = x.min_duration_s > 0 or x.min_requests > 0, x.min_requests
    return state


def _param(x: SimInputs) -> np.ndarray:
    param = np.zeros(client.NUM_PARAM)
    param[client.DEADLINE], param[client.MAX_DURATION] = np.inf, x.max_duration_s
    param[client.BEGIN], param[client.MIN_DURATION] = np.inf, x.min_duration_s
    param[client.BEFORE], param[client.AFTER] = x.fleet.request_before_s, x.fleet.request_after_s
    param[client.FRONT_END] = x.fleet.front_end_s
    param[client.TRANSFER], param[client.TRANSFER_PER_TOKEN] = x.fleet.transfer_latency_s, x.fleet.transfer_s_per_token
    return param


def _members(x: SimInputs) -> np.ndarray:
    """Group by group: how many requests, and which."""
    order = np.argsort(x.group, kind="stable")
    counts = np.bincount(x.group, minlength=x.num_groups)
    parts: list[np.ndarray] = []
    at = 0
    for count in counts.tolist():
        parts += [np.array([count]), order[at : at + count]]
        at += count
    return np.concatenate(parts).astype(np.int64)
