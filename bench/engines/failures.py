"""Why an engine failed, in one line: from its exception, its exit status and the last lines of its log."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterable
from pathlib import Path

from bench.engines.wire import Failure
from bench.errors import BadInput, BenchError

LOG_TAIL_LINES = 30
_LINE_CHARS = 300
_TAIL_BYTES = 256 * 1024

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|bad_alloc|Cannot allocate memory"
    r"|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|less than desired (GPU|CPU) memory utilization|to serve at least one request with the models?'s max seq len"
    r"|not enough memory|DefaultCPUAllocator: can't allocate|needed, which is larger than the available",
    re.IGNORECASE,
)
_MISSING_MODEL = re.compile(
    r"is not a local folder|not a valid model identifier|No such file or directory.*config\.json"
    r"|does not appear to have a file named|LocalEntryNotFoundError|RepositoryNotFoundError|couldn't connect to"
    r"|Repo id must be in the form|outgoing traffic has been disabled|Cannot find any model weights|Invalid repository ID or local directory",
    re.IGNORECASE,
)
_BAD_ARGUMENT = re.compile(r"ValidationError|unexpected keyword|validation error", re.IGNORECASE)
# "ValueError: text", also behind vLLM's "(EngineCore pid=1) ERROR 11-24 05:46:54 [core.py:1] " prefix
_EXCEPTION = re.compile(r"(?:^|\] |\) )\s*((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)): (.+)$")
# Wrappers that say nothing of the cause
_WRAPPERS = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineGenerateError|See root cause|WorkerProc initialization"
    r"|Tokenizer not available when|leaked|Exception ignored|RuntimeError: cancelled|a process of the engine"
)

NEXT_STEPS = {
    "out-of-memory": "lower max_model_len, max_num_seqs or gpu_memory_utilization, or raise tensor_parallel_size",
    "missing-model": "check the model's name or path, or write `weights: dummy` to measure without weights",
    "bad-argument": "check engine.args against the documentation of the installed vLLM",
    "killed": "see who ended it: the system's log (dmesg) or another user",
    "hang": "raise limits.idle_s if the engine is only slow; the stacks of its threads are in its log",
    "time-limit": "raise limits.run_s, or ask for fewer requests",
    "start-timeout": "raise limits.engine_start_s, or look at the engine's log",
}


def log_tail(path: Path, num_lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log; empty when it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        f.seek(0, 2)
        f.seek(max(0, f.tell() - _TAIL_BYTES))
        return "\n".join(f.read().decode("utf-8", "replace").splitlines()[-num_lines:])
    return ""


def root_cause(log_text: str) -> str | None:
    """The last exception in a log that is not merely a wrapper around another one."""
    for line in reversed(log_text.splitlines()):
        found = _EXCEPTION.search(line)
        if found and not _WRAPPERS.search(line):
            return one_line(f"{found[1].rpartition('.')[2]}: {found[2]}")
    return None


def one_line(text: str) -> str:
    """``text`` as a single line of bounded length."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LINE_CHARS else line[: _LINE_CHARS - 1] + "…"


def reason_of_text(text: str, otherwise: str) -> str:
    """The kebab-case reason that a message speaks of."""
    if _OUT_OF_MEMORY.search(text):
        return "out-of-memory"
    if _MISSING_MODEL.search(text):
        return "missing-model"
    if _BAD_ARGUMENT.search(text):
        return "bad-argument"
    return otherwise


def failure_of(error: BaseException, *, starting: bool) -> Failure:
    """What the tool is told of an exception in the engine's process. The traceback stays in the log."""
    if isinstance(error, BenchError):
        reason = getattr(error, "reason", None) or ("bad-argument" if isinstance(error, BadInput) else "unavailable")
        return Failure(str(reason), error.what, error.next_step)
    text = one_line(f"{type(error).__name__}: {_message(error)}")
    if isinstance(error, MemoryError):
        reason = "out-of-memory"
    elif isinstance(error, ModuleNotFoundError):
        reason = "not-installed"
    elif starting and isinstance(error, TypeError):
        reason = reason_of_text(text, "bad-argument")
    else:
        reason = reason_of_text(text, "crash")
    return Failure(reason, text, NEXT_STEPS.get(reason))


def _message(error: BaseException) -> str:
    """An exception's text; of a pydantic validation error only what is wrong, without links and inputs."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        with contextlib.suppress(Exception):
            parts = [f"{'.'.join(str(x) for x in e.get('loc', ()))}: {e.get('msg', '')}".lstrip(": ") for e in errors()]
            if parts:
                return "; ".join(parts)
    return str(error)


def failure_of_exit(status: int | None, log_text: str, oom_kills: int) -> Failure:
    """Why a process ended without a word: ``status`` as the guardian gives it (128 + signal for a signal).

    ``oom_kills``: how many processes the kernel's out-of-memory killer ended in our control group meanwhile.
    """
    number = -status if status is not None and status < 0 else (status or 0) - 128
    if oom_kills > 0:
        return Failure(
            "out-of-memory", "the kernel's out-of-memory killer ended the engine", NEXT_STEPS["out-of-memory"]
        )
    cause = root_cause(log_text)
    if number == signal.SIGKILL:
        return Failure("killed", "the engine was killed (SIGKILL)", NEXT_STEPS["killed"])
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        reason = "killed" if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) else "crash"
        return Failure(reason, f"the engine ended by {name}", NEXT_STEPS.get(reason))
    what = f"the engine ended with exit status {status}" + (f": {cause}" if cause else "")
    reason = reason_of_text(cause or "", "crash")
    return Failure(reason, what, NEXT_STEPS.get(reason))


def refined(failure: Failure, log_text: str, oom_kills: int) -> Failure:
    """``failure`` with the root cause from the log where the exception was only a wrapper (a dead engine core)."""
    if oom_kills > 0:
        return failure_of_exit(128 + signal.SIGKILL, log_text, oom_kills)
    if failure.next_step is None and failure.reason in NEXT_STEPS:
        failure = Failure(failure.reason, failure.message, NEXT_STEPS[failure.reason])
    if failure.reason != "crash" or not _WRAPPERS.search(failure.message):
        return failure
    cause = root_cause(log_text)
    if cause is None:
        return failure
    reason = reason_of_text(cause, "crash")
    return Failure(reason, cause, NEXT_STEPS.get(reason))


def count_oom_kills(files: Iterable[str] = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")) -> int:
    """Processes ended by the kernel's out-of-memory killer so far: of our control group if readable, else the host's."""
    for name in files:
        with contextlib.suppress(OSError), open(name) as f:
            for line in f:
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0
