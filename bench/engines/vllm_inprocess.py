"""vLLM inside the engine's process: offline batches through ``vllm.LLM``, everything else through ``AsyncLLM``.

An engine that is started for another load than offline also serves offline batches, through ``AsyncLLM`` with final
outputs only; one started for offline serves nothing else. Times of vLLM's own (``queued_s`` ... ``engine_last_token_s``)
are the engine core's CLOCK_MONOTONIC, which all processes of a host share, so subtracting the run's zero is all that is
needed; vLLM's ``arrival_time`` is wall clock and is not used.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from bench.engines import vllm_setup, vllm_versions
from bench.engines.base import RecordSink
from bench.engines.processes import step_folder
from bench.engines.vllm_run import VllmRun
from bench.engines.vllm_steps import StepRecords, TokenTally
from bench.engines.vllm_tap import RowReader
from bench.errors import BadInput
from bench.records import EngineInfo, RequestRecord, Schedule

if TYPE_CHECKING:
    from bench.engines.launch import EngineLaunch

_POLL_S = 0.1


def build(launch: EngineLaunch) -> VllmEngine:
    return VllmEngine(launch)


class VllmEngine:
    """``bench.engines.base.Engine`` over vLLM 0.26 to 0.33."""

    def __init__(self, launch: EngineLaunch) -> None:
        self.launch = launch
        self.asynchronous = launch.load_kind != "offline"
        self._engine: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._info: EngineInfo | None = None
        self._steps = StepRecords(None)
        self._tally = TokenTally()
        self._run_number = 0

    def __enter__(self) -> Self:
        version = vllm_versions.check_version()
        folder = step_folder()
        try:
            vllm_setup.prepare_environment(self.launch, folder)
            args = vllm_setup.engine_args(self.launch, self.asynchronous)
            if self.asynchronous:
                self._loop = _new_loop()
                self._engine = self._loop.run_until_complete(_in_loop(vllm_versions.make_async_llm, args))
            else:
                self._engine = vllm_versions.make_llm(args)
            reader = RowReader(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the maps stay; nothing is left behind if we are killed
        self._steps = StepRecords(reader)
        loggers = vllm_versions.stat_loggers(self._engine)
        if loggers is not None:
            loggers.append(self._tally)
            self._tally.active = True
        self._serve_one_request()
        front_end = "AsyncLLM" if self.asynchronous else "LLM"
        self._info = vllm_setup.describe(self._engine, self.launch, version, front_end, reader.num_cores > 0)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._engine is not None:
            vllm_versions.close(self._engine)
            self._engine = None

    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    def run(self, schedule: Schedule, sink: RecordSink, t0_monotonic_s: float) -> Iterator[RequestRecord]:
        if schedule.kind != "offline" and not self.asynchronous:
            raise BadInput(
                f"this engine was started for offline batches and cannot serve a load of kind {schedule.kind}",
                next_step="start it with another load_kind",
            )
        self._run_number += 1
        run = VllmRun(self, schedule, sink, t0_monotonic_s)
        run.check()
        self._reset_prefix_cache()
        self._steps.begin(t0_monotonic_s)
        self._tally.begin()
        yield from run.asynchronous() if self.asynchronous else run.offline()
        run.conclude()

    def _serve_one_request(self) -> None:
        """What happens once in an engine's life (communicators, just-in-time kernels) belongs to its start, not to the
        first run: with two CPU ranks the first step takes 5 to 15 s. Every run still warms up at its own shape."""
        sampling = vllm_versions.sampling_params(
            max_tokens=2, output_kind=vllm_versions.output_kind(False), **vllm_setup.SAMPLING
        )
        prompt = vllm_versions.tokens_prompt([1] * 8)
        if self._loop is None:
            self._engine.llm_engine.add_request("first", prompt, sampling)
            while self._engine.llm_engine.has_unfinished_requests():
                self._engine.llm_engine.step()
            return

        async def serve() -> None:
            async for _ in self._engine.generate(prompt, sampling, "first"):
                pass

        self._loop.run_until_complete(serve())

    def _reset_prefix_cache(self) -> None:
        """Every run starts with an empty prefix cache, whatever ran before."""
        if self._loop is not None:
            self._loop.run_until_complete(self._engine.reset_prefix_cache())
        else:
            self._engine.reset_prefix_cache()


async def _in_loop(make: Callable[[Any], Any], args: Any) -> Any:
    return make(args)  # AsyncLLM wants a running loop when it is made


def _new_loop() -> asyncio.AbstractEventLoop:
    """``vllm serve`` runs on uvloop, so do we."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
