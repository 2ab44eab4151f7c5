"""``vllm serve`` as an engine: started on a free port, waited for, driven over HTTP, stopped, its memory seen released.

Prompts go as token ids to ``/v1/completions`` (``api: chat`` sends messages and needs the model's tokenizer). A model
folder without a tokenizer (random weights from an architecture alone) is served with ``--skip-tokenizer-init``: the
server then sends no text, and tokens are counted from the ``usage`` in every chunk.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from bench.engines import vllm_args, vllm_setup, vllm_versions
from bench.engines.base import RecordSink
from bench.engines.http_run import serve_over_http
from bench.engines.processes import descendants, end_processes, started_processes, still_running
from bench.errors import BadInput, EngineUnavailable
from bench.load.driver import LoadOptions
from bench.load.oneshot import ask
from bench.load.self_test import known_capacity
from bench.load.target import Target
from bench.records import EngineInfo, RequestRecord, Schedule

if TYPE_CHECKING:
    from bench.engines.host import EngineLaunch

HOST = "127.0.0.1"
SERVED_NAME = "model"
START_LIMIT_S = 3600.0  # the runner's own limit is shorter and ends this process
DRAIN_LIMIT_S, KILL_LIMIT_S, MEMORY_LIMIT_S = 30.0, 10.0, 60.0
#: What multiprocessing's resource trackers may take, after the server has ended, to remove its shared memory.
TIDY_LIMIT_S = 3.0
_POLL_S = 0.25
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")
#: A GPU counts as released once its used memory is back within this of what it was before the start.
_RELEASED_SLACK_BYTES = 512 * 2**20


def build(launch: EngineLaunch) -> VllmServer:
    return VllmServer(launch)


def _ranks(args: dict[str, Any]) -> int:
    """Processes that hold a part of the model, of one data-parallel replica."""
    return int(args.get("tensor_parallel_size") or 1) * int(args.get("pipeline_parallel_size") or 1)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def command_line(launch: EngineLaunch, port: int) -> list[str]:
    """``vllm serve`` with the experiment's arguments, by vLLM's own names (``max_num_seqs`` -> ``--max-num-seqs``).

    Raises:
        BadInput: an argument that this engine sets itself.
    """
    taken = set(vllm_args.SET_BY_SERVER) & set(launch.args)
    if taken:
        raise BadInput(f"engine.args.{min(taken)} cannot be set: this engine sets it itself", next_step="remove it")
    out = [sys.executable, "-m", *_entry_point(launch.model)]
    out += ["--host", HOST, "--port", str(port), "--served-model-name", SERVED_NAME]
    values = dict(launch.args)
    if launch.weights == "dummy":
        values.setdefault("load_format", "dummy")
    if not has_tokenizer(launch.model):
        values.setdefault("skip_tokenizer_init", True)
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            out += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            out += [f"--{flag}", *map(str, value)]
        else:
            out += [f"--{flag}", str(value)]
    return out


def _entry_point(model: str) -> list[str]:
    """``vllm serve``; where the distribution has another name (CPU builds), for which that command refuses to start, the
    module that it runs."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def has_tokenizer(model: str) -> bool:
    """False for a local folder without any tokenizer file; hub ids have one."""
    folder = Path(model)
    return not folder.is_dir() or any((folder / name).exists() for name in _TOKENIZER_FILES)


class VllmServer:
    """``bench.engines.base.Engine`` over a ``vllm serve`` of its own."""

    def __init__(self, launch: EngineLaunch, options: LoadOptions | None = None) -> None:
        self.launch, self.options = launch, options or LoadOptions()
        self.api = str(launch.spec.get("api", "completions"))
        self.process: subprocess.Popen[bytes] | None = None
        self.target: Target | None = None
        self._info: EngineInfo | None = None
        self._uuids: tuple[str, ...] = ()
        self._memory_before: dict[str, int] = {}
        self._started: dict[int, int] = {}

    def __enter__(self) -> Self:
        """Raises EngineUnavailable when the server dies or does not get ready; the reason is the last line of its log."""
        version = vllm_versions.check_version()
        if self.api == "chat" and not has_tokenizer(self.launch.model):
            raise BadInput(
                "the chat API needs the model's tokenizer, and this model folder has none",
                next_step="set engine.api: completions",
            )
        port = free_port()
        num_ranks = _ranks(self.launch.args) * int(self.launch.args.get("data_parallel_size") or 1)
        self._uuids = _gpu_uuids(num_ranks)
        self._memory_before = used_memory(self._uuids)
        started = time.monotonic()
        # Output goes where this process's own output goes: the engine's log.
        self.process = subprocess.Popen(
            command_line(self.launch, port), env=self._environment(), stdin=subprocess.DEVNULL
        )
        self.target = Target(
            f"http://{HOST}:{port}",
            model=SERVED_NAME,
            api="chat" if self.api == "chat" else "completions",
            ignore_eos=True,
            continuous_usage=True,
            temperature=1.0,
        )
        try:
            self._wait_until_ready(started + START_LIMIT_S)
            self._info = self._describe(version, time.monotonic() - started)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _environment(self) -> dict[str, str]:
        env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if Path(self.launch.model).is_dir():
            env.setdefault("HF_HUB_OFFLINE", "1")
        if "kv_cache_memory_bytes" not in self.launch.args:
            env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(vllm_setup.CPU_KV_CACHE_GIB))
        ranks = _ranks(self.launch.args)
        if ranks > 1:
            binding = vllm_setup.cpu_binding(ranks, sorted(os.sched_getaffinity(0)))
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)
        # So that each run can begin with an empty prefix cache.
        env["VLLM_SERVER_DEV_MODE"] = "1"
        return env

    def _wait_until_ready(self, deadline: float) -> None:
        assert self.process is not None and self.target is not None
        while True:
            status = self.process.poll()
            if status is not None:
                raise EngineUnavailable(
                    f"vllm serve ended while starting (exit status {status})", next_step="see the engine's log"
                )
            with contextlib.suppress(EngineUnavailable):
                if ask(self.target, "GET", "/health", timeout_s=5.0).status == 200:
                    return
            if time.monotonic() > deadline:
                raise EngineUnavailable("vllm serve did not get ready in time", next_step="raise limits.engine_start_s")
            time.sleep(_POLL_S)

    def _describe(self, version: str, start_s: float) -> EngineInfo:
        assert self.target is not None and self.process is not None
        self._started = started_processes({self.process.pid, *descendants(self.process.pid)})
        models = ask(self.target, "GET", self.target.path("models")).json() or {}
        cards = models.get("data") or [{}]
        config = self._cache_config()
        block, blocks = _whole(config.get("block_size")), _whole(config.get("num_gpu_blocks"))
        return EngineInfo(
            kind="vllm_server",
            version=version,
            effective_args={**self.launch.args, "api": self.api, **_plain_args(config)},
            num_gpus=len(self._uuids),
            device_uuids=self._uuids,
            kv_capacity_tokens=block * blocks if block and blocks else None,
            num_kv_blocks=blocks,
            block_size=block,
            start_s=start_s,
            max_model_len=_whole(cards[0].get("max_model_len")),
            pids=tuple(sorted(self._started)),
            notes={
                "weights": self.launch.weights,
                "tokenizer": has_tokenizer(self.launch.model),
                "environment": vllm_setup.shown_environment(self._environment()),
            },
        )

    def _cache_config(self) -> dict[str, str]:
        """The labels of ``vllm:cache_config_info``: the cache as vLLM set it up."""
        from bench.telemetry.vllm_metrics import parse_prometheus

        assert self.target is not None
        text = ask(self.target, "GET", "/metrics").body.decode("utf-8", "replace")
        for sample in parse_prometheus(text, 0.0):
            if sample.name == "vllm:cache_config_info":
                labels: dict[str, str] = json.loads(sample.labels)
                return labels
        return {}

    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    def run(self, schedule: Schedule, sink: RecordSink, t0_monotonic_s: float) -> Iterator[RequestRecord]:
        assert self.target is not None and self.process is not None
        if self.process.poll() is not None:
            raise EngineUnavailable(f"vllm serve has ended (exit status {self.process.returncode})")
        limit = self.info().max_model_len
        for r in schedule.requests:
            if limit is not None and r.isl is not None and r.isl + r.osl > limit:
                raise BadInput(
                    f"request {r.index} needs {r.isl + r.osl} tokens of context, but max_model_len is {limit}",
                    next_step="shorten the workload or raise engine.args.max_model_len",
                )
        with contextlib.suppress(EngineUnavailable):
            ask(self.target, "POST", "/reset_prefix_cache", b"")
        options = replace(self.options, exact_osl=True)
        known = known_capacity()
        if known is not None:
            options = replace(options, capacity_chunks_per_s=known[0], capacity_source=known[1])
        yield from serve_over_http(self.target, schedule, sink, t0_monotonic_s, options, metrics_path="/metrics")
        if self.process.poll() is not None:
            raise RuntimeError(f"vllm serve ended during the run (exit status {self.process.returncode})")

    def __exit__(self, *exc: object) -> None:
        """SIGTERM, a limit, SIGKILL for whatever is left of what it started; then wait until the GPUs' memory is free."""
        process, self.process = self.process, None
        if process is None:
            return
        # A server that died has no descendants any more: those seen at the start still count.
        below = self._started | started_processes(descendants(process.pid))
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DRAIN_LIMIT_S)
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_LIMIT_S)
        left = end_processes(lambda: still_running(below), KILL_LIMIT_S, grace_s=TIDY_LIMIT_S)
        if left:
            print(
                f"processes of vllm serve still there {KILL_LIMIT_S:g} s after SIGKILL: {sorted(left)}", file=sys.stderr
            )
        held = wait_for_release(self._uuids, self._memory_before, MEMORY_LIMIT_S)
        if held:
            print(f"GPU memory not released {MEMORY_LIMIT_S:g} s after the server's end: {held}", file=sys.stderr)


def _gpu_uuids(num_ranks: int) -> tuple[str, ...]:
    """The GPUs that the server will hold; none where there is no NVIDIA driver."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ()
    return vllm_setup.gpu_uuids(num_ranks)


def used_memory(uuids: tuple[str, ...]) -> dict[str, int]:
    """UUID -> used bytes, by NVML; GPUs that cannot be read are left out."""
    if not uuids:
        return {}
    import pynvml

    out = {}
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for uuid in uuids:
                with contextlib.suppress(pynvml.NVMLError):
                    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                    out[uuid] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        finally:
            pynvml.nvmlShutdown()
    return out


def wait_for_release(uuids: tuple[str, ...], before: dict[str, int], limit_s: float) -> dict[str, int]:
    """Wait until every GPU's used memory is back to what it was. Returns UUID -> bytes still held after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while True:
        now = used_memory(uuids)
        held = {u: now[u] - before[u] for u in now if u in before and now[u] > before[u] + _RELEASED_SLACK_BYTES}
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(_POLL_S)


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _plain_args(config: dict[str, str]) -> dict[str, str]:
    """The cache's settings that decide throughput, as vLLM states them."""
    names = ("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype", "gpu_memory_utilization")
    return {n: config[n] for n in names if n in config}
