"""What an engine's process is started with, and the two ways in which it may fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.errors import EXIT_SOME_FAILED, BenchError, EngineUnavailable


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """What an engine's process is started with."""

    kind: str
    model: str  # path or hub id as the engine is given it
    weights: str = "auto"  # "dummy": random weights from the architecture alone
    args: dict[str, Any] = field(default_factory=dict)  # vLLM's own names
    env: dict[str, str] = field(default_factory=dict)  # wins over the tool's own environment
    spec: dict[str, Any] = field(default_factory=dict)  # the whole EngineSpec, for engines that take more than args
    load_kind: str = "offline"  # "offline": vllm.LLM; anything else: AsyncLLM, which serves offline batches too


class _EngineFailure(BenchError):
    """How an engine failed: ``reason``, and ``log_tail``, the last lines of its log. Crosses processes whole."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        next_step: str | None = None,
        reason: str = "crash",
        log_tail: str = "",
    ) -> None:
        super().__init__(what, where=where, next_step=next_step)
        self.reason, self.log_tail = reason, log_tail

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.next_step, self.reason, self.log_tail))


class EngineDied(_EngineFailure):
    """An engine ended or had to be ended in the middle of a run.

    ``reason``: crash, out-of-memory, hang, time-limit or killed.
    """

    exit_code = EXIT_SOME_FAILED


class EngineStartFailed(_EngineFailure, EngineUnavailable):
    """The engine did not come up.

    ``reason``: bad-argument, missing-model, out-of-memory, not-installed, unsupported-version, start-timeout, killed,
    unavailable or crash.
    """


def _rebuild(cls: Any, what: str, where: str | None, next_step: str | None, reason: str, tail: str) -> BenchError:
    error: BenchError = cls(what, where=where, next_step=next_step, reason=reason, log_tail=tail)
    return error
