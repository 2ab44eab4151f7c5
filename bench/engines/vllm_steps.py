"""What vLLM says of itself while it serves: one EngineStep per scheduler step, and its own count of tokens."""

from __future__ import annotations

from typing import Any

from bench.engines.base import RecordSink
from bench.engines.vllm_tap import RowReader
from bench.records import EngineStep


class StepRecords:
    """Turns the tap's rows into EngineSteps of the run that goes on."""

    def __init__(self, reader: RowReader | None) -> None:
        self._reader = reader
        self._t0 = 0.0
        self._count = 0
        self._last_output_s: dict[int, float] = {}  # by engine core
        self.total: dict[str, int] | None = None

    def begin(self, t0: float) -> None:
        self._t0, self._count, self._last_output_s = t0, 0, {}
        if self._reader is not None and self._reader.num_cores:
            self._reader.skip()
            self.total = {"prefill": 0, "decode": 0, "steps": 0}

    def read(self, sink: RecordSink) -> None:
        """``step_time_s`` is the time since the step before where the engine was busy since then (what throughput
        sees: scheduling, execution and processing of the output, less what asynchronous scheduling overlaps), else the
        time since the scheduler was called. Each core of a data-parallel engine has steps of its own."""
        if self._reader is None:
            return
        rows = [(row, core) for core in range(self._reader.num_cores) for row in self._reader.rows_of(core)]
        for (started_s, output_s, follows, values), core in sorted(rows, key=lambda r: r[0][1]):
            usage, running, waiting, prefill, decode, prefills, decodes, context, preempted, hits = values
            since_s = self._last_output_s.get(core, started_s) if follows else started_s
            self._last_output_s[core] = output_s
            sink.append_step(
                EngineStep(
                    step=self._count,
                    t_s=output_s - self._t0,
                    step_time_s=output_s - since_s,
                    num_running=running,
                    num_waiting=waiting,
                    kv_usage_ratio=usage,
                    prefill_tokens=prefill,
                    decode_tokens=decode,
                    prefill_requests=prefills,
                    decode_requests=decodes,
                    context_tokens=context,
                    num_preemptions=preempted,
                    cached_tokens=hits,
                )
            )
            self._count += 1
            if self.total is not None:
                self.total["prefill"] += prefill
                self.total["decode"] += decode
                self.total["steps"] += 1


class TokenTally:
    """A statistics logger of vLLM's that only adds up the tokens vLLM says it has processed."""

    def __init__(self) -> None:
        self.active = False
        self.output_tokens = self.prompt_tokens = 0

    def begin(self) -> None:
        self.output_tokens = self.prompt_tokens = 0

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *args: Any, **kwargs: Any) -> None:
        if iteration_stats is not None:
            self.output_tokens += iteration_stats.num_generation_tokens
            self.prompt_tokens += iteration_stats.num_prompt_tokens

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, *args: Any, **kwargs: Any) -> None: ...

    def record_admission_rejection(self, *args: Any, **kwargs: Any) -> None: ...
