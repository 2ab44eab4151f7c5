"""Lengths and prompts from conversation data sets in ShareGPT's form.

A file is a JSON list of ``{"conversations": [{"from", "value"}, ...]}``; some copies write ``role`` and ``content``, or
``messages`` for the list. The first exchange of each conversation is used, as the field's benchmarks do.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BadInput
from bench.records import Request
from bench.workload.synthetic import PromptForm, requests_of_lengths, stream

#: Characters per token of English text with current tokenizers; used only where no tokenizer is given, and said so.
CHARACTERS_PER_TOKEN = 4.0
_USER, _ASSISTANT = {"human", "user"}, {"gpt", "assistant", "chatgpt", "bard", "bing"}


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its answer."""

    prompt: str
    answer: str


def read_sharegpt(path: Path | str) -> list[Exchange]:
    """The first user-assistant exchange of every conversation that has one.

    Raises:
        BadInput: not readable, not JSON, not a list of conversations, or without a single exchange.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read the data set: {e}", where=str(path)) from e
    if not isinstance(data, list):
        raise BadInput("expected a JSON list of conversations", where=str(path))
    out = []
    for item in data:
        turns = (item.get("conversations") or item.get("messages") or []) if isinstance(item, dict) else []
        pair = _first_exchange(turns)
        if pair is not None:
            out.append(pair)
    if not out:
        raise BadInput("no conversation has a question and an answer", where=str(path))
    return out


def _first_exchange(turns: list[Any]) -> Exchange | None:
    parts = [
        (str(t.get("from", t.get("role", ""))).lower(), t.get("value", t.get("content")))
        for t in turns
        if isinstance(t, dict)
    ]
    for (who, text), (then, answer) in itertools.pairwise(parts):
        if (
            who in _USER
            and then in _ASSISTANT
            and isinstance(text, str)
            and isinstance(answer, str)
            and text
            and answer
        ):
            return Exchange(text, answer)
    return None


def sharegpt_lengths(
    exchanges: list[Exchange], count_tokens: Callable[[str], int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(ISL, OSL) in tokens; by ``CHARACTERS_PER_TOKEN`` where no ``count_tokens`` is given."""

    def estimate(text: str) -> int:
        return max(1, round(len(text) / CHARACTERS_PER_TOKEN))

    count = count_tokens or estimate
    return (
        np.asarray([max(1, count(e.prompt)) for e in exchanges]),
        np.asarray([max(1, count(e.answer)) for e in exchanges]),
    )


def sharegpt_requests(
    exchanges: list[Exchange],
    n: int,
    *,
    seed: int,
    form: PromptForm = "token_ids",
    vocab_size: int = 32_000,
    max_isl: int | None = None,
    max_osl: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Request]:
    """``n`` requests drawn without replacement (with, once all are used): their lengths with synthetic token ids, or
    their own text. Exchanges longer than a limit are left out, as cutting would change the distribution's shape less
    visibly."""
    isl, osl = sharegpt_lengths(exchanges, count_tokens)
    fits = np.flatnonzero((isl <= (max_isl or isl.max())) & (osl <= (max_osl or osl.max())))
    if len(fits) == 0:
        raise BadInput("no conversation fits the length limits", where="data set", next_step="raise the limits")
    rng = stream(seed, "order")
    order = np.concatenate([rng.permutation(fits) for _ in range(-(-n // len(fits)))])[:n]
    if form == "token_ids":
        return requests_of_lengths(isl[order], osl[order], vocab_size=vocab_size, seed=seed)
    out = []
    for i, k in enumerate(order):
        e, tokens = exchanges[k], int(osl[k])
        if form == "text":
            out.append(Request(index=i, osl=tokens, text=e.prompt))
        else:
            out.append(Request(index=i, osl=tokens, messages=({"role": "user", "content": e.prompt},)))
    return out
