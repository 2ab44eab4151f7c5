"""Synthetic requests: seeded lengths and token ids, shared prefixes, multi-turn sessions, and plain text.

Every random quantity has a stream of its own (``SeedSequence(seed, spawn_key)``), so changing one axis (say the output
lengths) leaves all others as they were, and the same seed gives the same bytes on any machine. Token ids are fresh for
every seed: repeats of a cell use :func:`repeat_seed`, so no prefix is in the cache by accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bench.errors import BadInput
from bench.records import Phase, Request
from bench.workload.lengths import (
    EmpiricalLength,
    FixedLength,
    Length,
    LognormalLength,
    NormalLength,
    UniformLength,
    parse_scenario,
)

__all__ = [
    "EmpiricalLength",
    "FixedLength",
    "Length",
    "LognormalLength",
    "NormalLength",
    "PromptForm",
    "Sessions",
    "SharedPrefix",
    "UniformLength",
    "build_requests",
    "build_sessions",
    "parse_scenario",
    "repeat_seed",
    "requests_of_lengths",
    "stream",
    "with_phases",
]

PromptForm = Literal["token_ids", "text", "messages"]

# Names of the random streams; append only, or old seeds give other bytes.
_STREAMS = ("isl", "osl", "tokens", "prefix_tokens", "prefix_choice", "turns", "think", "arrivals", "order")


def stream(seed: int, name: str) -> np.random.Generator:
    """The random stream ``name`` of ``seed``, independent of all others."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(name),))))


def repeat_seed(seed: int, repeat: int) -> int:
    """A seed for the ``repeat``-th run of a cell: independent of the others, and the same each time it is asked for."""
    return int(np.random.SeedSequence((seed, repeat)).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A share ``share_ratio`` of the requests begins with one of ``num_prefixes`` common prefixes of ``tokens`` tokens.

    The prefix is part of the ISL, not added to it. A prompt always keeps at least one token of its own.
    """

    tokens: int
    share_ratio: float = 1.0
    num_prefixes: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.num_prefixes < 1 or not 0 <= self.share_ratio <= 1:
            raise BadInput(
                f"expected tokens >= 1, num_prefixes >= 1 and a share in [0, 1], got {self}", where="shared prefix"
            )


@dataclass(frozen=True, slots=True)
class Sessions:
    """Multi-turn conversations: ``turns`` per session and a think time before every turn but the first (exponential
    with mean ``think_s``; 0 = none)."""

    turns: Length
    think_s: float = 0.0
    think_kind: Literal["fixed", "exponential"] = "exponential"


def _tokens(rng: np.random.Generator, n: int, vocab_size: int, first_token_id: int) -> np.ndarray:
    return rng.integers(first_token_id, vocab_size, size=n, dtype=np.int32)


def _check(n: int, vocab_size: int, first_token_id: int) -> None:
    if n < 1:
        raise BadInput(f"expected at least 1 request, got {n}", where="workload")
    if not 0 <= first_token_id < vocab_size - 1:
        raise BadInput(
            f"vocab_size {vocab_size} leaves no token ids above the reserved {first_token_id}", where="workload"
        )


def build_requests(
    n: int,
    isl: Length,
    osl: Length,
    *,
    vocab_size: int,
    seed: int,
    prefix: SharedPrefix | None = None,
    first_token_id: int = 256,
    form: PromptForm = "token_ids",
    first_index: int = 0,
    phase: Phase = "measured",
) -> list[Request]:
    """``n`` independent requests with lengths from ``isl`` and ``osl``.

    ``first_token_id`` keeps the low ids, where special tokens usually live, out of prompts. With ``form`` "text" or
    "messages", ISL is a number of words, the true token count comes from the server's usage, and ``Request.isl`` is None.
    """
    lengths_in = isl.sample(stream(seed, "isl"), n)
    lengths_out = osl.sample(stream(seed, "osl"), n)
    return requests_of_lengths(
        lengths_in,
        lengths_out,
        vocab_size=vocab_size,
        seed=seed,
        prefix=prefix,
        first_token_id=first_token_id,
        form=form,
        first_index=first_index,
        phase=phase,
    )


def requests_of_lengths(
    isl: Iterable[int],
    osl: Iterable[int],
    *,
    vocab_size: int,
    seed: int,
    prefix: SharedPrefix | None = None,
    first_token_id: int = 256,
    form: PromptForm = "token_ids",
    first_index: int = 0,
    phase: Phase = "measured",
) -> list[Request]:
    """Requests of the given lengths (e.g. a trace's) with synthetic prompts. See :func:`build_requests`."""
    lengths_in, lengths_out = np.asarray(isl, dtype=np.int64), np.asarray(osl, dtype=np.int64)
    n = len(lengths_in)
    if len(lengths_out) != n:
        raise BadInput(f"{n} input lengths but {len(lengths_out)} output lengths", where="workload")
    if min(lengths_in.min(initial=1), lengths_out.min(initial=1)) < 1:
        raise BadInput("every input and output length must be >= 1", where="workload")
    vocab_size = vocab_size if form == "token_ids" else _NUM_WORDS
    first_token_id = first_token_id if form == "token_ids" else 0
    _check(n, vocab_size, first_token_id)
    pool = _tokens(stream(seed, "tokens"), int(lengths_in.sum()), vocab_size, first_token_id)
    choice, prefixes = np.full(n, -1), np.empty((0, 0), dtype=np.int32)
    if prefix is not None:
        rng = stream(seed, "prefix_choice")
        shares = rng.random(n) < prefix.share_ratio
        choice = np.where(shares, rng.integers(0, prefix.num_prefixes, size=n), -1)
        flat = _tokens(stream(seed, "prefix_tokens"), prefix.num_prefixes * prefix.tokens, vocab_size, first_token_id)
        prefixes = flat.reshape(prefix.num_prefixes, prefix.tokens)
    out, end = [], 0
    for i in range(n):
        start, end = end, end + int(lengths_in[i])
        ids, shared = pool[start:end], 0
        if choice[i] >= 0 and prefix is not None and len(ids) > 1:
            shared = min(prefix.tokens, len(ids) - 1)
            ids[:shared] = prefixes[choice[i], :shared]
        out.append(_request(first_index + i, int(lengths_out[i]), ids, form, phase, shared))
    pool.setflags(write=False)
    return out


def _request(index: int, osl: int, ids: np.ndarray, form: PromptForm, phase: Phase, prefix_tokens: int) -> Request:
    if form == "token_ids":
        view = ids.view()
        view.setflags(write=False)
        return Request(
            index=index, osl=osl, isl=len(ids), prompt_token_ids=view, phase=phase, prefix_tokens=prefix_tokens
        )
    text = " ".join(_word(int(i)) for i in ids)
    if form == "text":
        return Request(index=index, osl=osl, text=text, phase=phase, prefix_tokens=prefix_tokens)
    messages = ({"role": "user", "content": text},)
    return Request(index=index, osl=osl, messages=messages, phase=phase, prefix_tokens=prefix_tokens)


# Words for prompts sent as text: pronounceable syllables, so that no word list is needed and tokenizers split them
# into a few tokens each. 20^4 x 5 ... the exact number only bounds the ids drawn.
_ONSETS, _VOWELS = "bdfghjklmnprstvwyz", "aeiou"
_NUM_WORDS = (len(_ONSETS) * len(_VOWELS)) ** 2


def _word(i: int) -> str:
    syllables = len(_ONSETS) * len(_VOWELS)
    a, b = divmod(i, syllables)
    return "".join(_ONSETS[s // len(_VOWELS)] + _VOWELS[s % len(_VOWELS)] for s in (a, b))


def build_sessions(
    num_sessions: int,
    first_isl: Length,
    turn_isl: Length,
    osl: Length,
    sessions: Sessions,
    *,
    vocab_size: int,
    seed: int,
    first_token_id: int = 256,
    first_index: int = 0,
) -> list[Request]:
    """Multi-turn requests, turn by turn: turn 0 of every session, then turn 1 of every session, and so on.

    The prompt of turn k is the whole prompt of turn k - 1, then ``osl`` made-up tokens that stand for its answer, then
    ``turn_isl`` new tokens. The schedule is fixed before the run, so the stand-in answer is not the server's own: the
    part that a prefix cache can serve is the previous *prompt*, and ``prefix_tokens`` says exactly that.
    """
    _check(num_sessions, vocab_size, first_token_id)
    turns = sessions.turns.sample(stream(seed, "turns"), num_sessions)
    total = int(turns.sum())
    rng_isl, rng_tokens, rng_think = stream(seed, "isl"), stream(seed, "tokens"), stream(seed, "think")
    first, later = first_isl.sample(rng_isl, num_sessions), turn_isl.sample(rng_isl, total)
    outs = osl.sample(stream(seed, "osl"), total)
    think = np.full(total, sessions.think_s)
    if sessions.think_kind == "exponential" and sessions.think_s > 0:
        think = rng_think.exponential(sessions.think_s, size=total)
    history: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * num_sessions
    answer = [0] * num_sessions
    out: list[Request] = []
    for turn in range(int(turns.max())):
        for s in np.flatnonzero(turns > turn):
            k = len(out)
            new = int(first[s]) if turn == 0 else int(later[k])
            old = history[s]
            ids = np.concatenate([old, _tokens(rng_tokens, answer[s] + new, vocab_size, first_token_id)])
            ids.setflags(write=False)
            out.append(
                Request(
                    index=first_index + k,
                    osl=int(outs[k]),
                    isl=len(ids),
                    prompt_token_ids=ids,
                    session=int(s),
                    turn=turn,
                    think_s=round(float(think[k]), 9) if turn else 0.0,
                    prefix_tokens=len(old),
                )
            )
            history[s], answer[s] = ids, int(outs[k])
    return out


def with_phases(
    requests: Iterable[Request], *, num_warmup: int = 0, num_ramp_up: int = 0, num_cool_down: int = 0
) -> list[Request]:
    """The requests with phases by position: first warm-up, then ramp-up, then measured, the last ones cool-down.

    Raises:
        BadInput: nothing would be left to measure.
    """
    items = list(requests)
    if num_warmup + num_ramp_up + num_cool_down >= len(items):
        raise BadInput(
            f"{num_warmup} warm-up + {num_ramp_up} ramp-up + {num_cool_down} cool-down requests leave none of "
            f"{len(items)} to measure",
            where="workload",
            next_step="ask for more requests or fewer of these",
        )
    out = []
    for i, r in enumerate(items):
        phase: Phase = "measured"
        if i < num_warmup:
            phase = "warmup"
        elif i < num_warmup + num_ramp_up:
            phase = "ramp_up"
        elif i >= len(items) - num_cool_down:
            phase = "cool_down"
        out.append(r if r.phase == phase else replace(r, phase=phase))
    return out
