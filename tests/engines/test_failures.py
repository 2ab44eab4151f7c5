"""One line for a failure, from exceptions, exit statuses and logs as vLLM writes them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bench.engines.failures import (
    count_oom_kills,
    failure_of,
    failure_of_exit,
    log_tail,
    one_line,
    refined,
    root_cause,
)
from bench.engines.wire import Failure
from bench.errors import BadInput

LOG = """\
(EngineCore pid=71) ERROR 11-24 05:46:54 [core.py:999] Traceback (most recent call last):
(EngineCore pid=71) ERROR 11-24 05:46:54 [core.py:999]   File "x.py", line 1, in f
(EngineCore pid=71) ERROR 11-24 05:46:54 [core.py:999] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_root_cause_is_found_behind_wrappers() -> None:
    assert root_cause(LOG) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert root_cause("all is well\nError: no") is None


def test_a_dead_engine_core_is_explained_by_its_log() -> None:
    class EngineDeadError(Exception):
        pass

    failure = failure_of(EngineDeadError("EngineCore encountered an issue. See stack trace"), starting=False)
    assert failure.reason == "crash"
    better = refined(failure, LOG, 0)
    assert better.reason == "out-of-memory" and "CUDA out of memory" in better.message and better.next_step
    assert refined(failure, "nothing of use", 0) == failure
    assert refined(failure, LOG, 1).message.startswith("the kernel's out-of-memory killer")


@pytest.mark.parametrize(
    ("error", "starting", "reason"),
    [
        (MemoryError(), False, "out-of-memory"),
        (RuntimeError("std::bad_alloc"), False, "out-of-memory"),
        (ValueError("No available memory for the cache blocks. Try increasing ..."), True, "out-of-memory"),
        (ModuleNotFoundError("No module named 'vllm'"), True, "not-installed"),
        (TypeError("got an unexpected keyword argument 'x'"), True, "bad-argument"),
        (OSError("/nowhere is not a local folder and is not a valid model identifier"), True, "missing-model"),
        (BadInput("wrong"), True, "bad-argument"),
        (RuntimeError("something else"), False, "crash"),
    ],
)
def test_reasons_of_exceptions(error: Exception, starting: bool, reason: str) -> None:
    failure = failure_of(error, starting=starting)
    assert failure.reason == reason and "\n" not in failure.message


@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [
        (128 + signal.SIGKILL, "killed", "killed"),
        (-signal.SIGKILL, "killed", "killed"),
        (128 + signal.SIGSEGV, "crash", "SIGSEGV"),
        (128 + signal.SIGTERM, "killed", "SIGTERM"),
        (3, "crash", "status 3"),
        (None, "crash", "None"),
    ],
)
def test_reasons_of_exit_statuses(status: int | None, reason: str, words: str) -> None:
    failure = failure_of_exit(status, "", 0)
    assert failure.reason == reason and words in failure.message


def test_kernel_kills_are_told_from_other_kills(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert count_oom_kills([str(tmp_path / "none"), str(events)]) == 2
    assert failure_of_exit(128 + signal.SIGKILL, "", 1).reason == "out-of-memory"


def test_pydantic_errors_lose_their_boilerplate() -> None:
    from pydantic import BaseModel

    class Config(BaseModel):
        max_model_len: int

    with pytest.raises(ValueError) as caught:
        Config(max_model_len="many")  # type: ignore[arg-type]
    failure = failure_of(caught.value, starting=True)
    assert failure.reason == "bad-argument"
    assert "max_model_len: Input should be a valid integer" in failure.message and "http" not in failure.message


def test_log_tail_and_lines(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert log_tail(log).splitlines() == [f"line {i}" for i in range(70, 100)]
    assert log_tail(tmp_path / "none") == ""
    assert one_line("a\n  b") == "a b" and len(one_line("x" * 1000)) == 300
    assert refined(Failure("killed", "x"), "", 0).next_step  # a remedy where there is one
