"""What a published ``vllm serve`` command says about the engine that ran: the options that a simulation needs.

An option that is neither known here nor known not to matter makes the row one that cannot be predicted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

#: Options without a value, and options with one, that change neither scheduling nor the time of a step.
_PLAIN_FLAGS = ("--trust-remote-code", "--enable-auto-tool-choice", "--disable-log-requests")
_PLAIN_OPTIONS = (
    "--max-model-len", "--tool-call-parser", "--reasoning-parser", "--tokenizer-mode", "--served-model-name", "--host", "--port",
)  # fmt: skip
_NUMBERS = {
    "-tp": "tp", "--tensor-parallel-size": "tp", "-dp": "dp", "--data-parallel-size": "dp", "-pp": "pp",
    "--pipeline-parallel-size": "pp", "--max-num-batched-tokens": "max_num_batched_tokens", "--max-num-seqs": "max_num_seqs",
    "--gpu-memory-utilization": "memory_share",
}  # fmt: skip
_SWITCHES = {
    "--enable-expert-parallel": ("ep", True), "--async-scheduling": ("async_scheduling", True),
    "--no-async-scheduling": ("async_scheduling", False), "--no-enable-prefix-caching": ("prefix_caching", False),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """Options of one command; None where vLLM's default of that release holds. ``unknown``: an option not modelled."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    memory_share: float | None = None
    async_scheduling: bool | None = None
    prefix_caching: bool = True
    unknown: str | None = None


def serve_command(notes: str) -> ServeCommand | None:
    """The command in ``notes`` (``cmd=vllm serve ...;``); None where there is none, or its end was cut off."""
    found = re.search(r"cmd=vllm serve ([^;]+);", notes)
    if not found:
        return None
    words = iter(shlex.split(found.group(1).replace("\\", " ")))
    next(words, None)  # the model
    options: dict[str, float | bool | str] = {}
    for word in words:
        _read(word, words, options)
    integers = {k: int(v) for k, v in options.items() if isinstance(v, float) and k != "memory_share"}
    return ServeCommand(**{**options, **integers})  # type: ignore[arg-type]


def _read(word: str, words: Iterator[str], options: dict[str, float | bool | str]) -> None:
    """Take one option, and its value from ``words``, into ``options``."""
    name, equals, value = word.partition("=")
    if name in _NUMBERS:
        options[_NUMBERS[name]] = float(value if equals else next(words))
    elif name in _SWITCHES:
        field, on = _SWITCHES[name]
        options[field] = on
    elif name in _PLAIN_OPTIONS:
        if not equals:
            next(words, None)
    elif name not in _PLAIN_FLAGS:
        options["unknown"] = name
