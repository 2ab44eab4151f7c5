"""Readers of public request traces: Mooncake JSONL, BurstGPT CSV, Azure LLM inference CSV, Bailian JSONL.

A trace gives arrival times and lengths; prompts are synthetic, except that ``hash_ids`` (blocks of the prompt, equal
ids meaning equal tokens) are honoured, so that prefix reuse is that of the trace. Times start at 0 and ascend (a stable
sort; ``TraceRows.num_reordered`` says how many rows were out of order). A row that cannot be used is an error that names the line,
or, with ``skip_bad=True``, is counted in ``num_skipped``.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.errors import BadInput
from bench.records import Request
from bench.workload.synthetic import requests_of_lengths

TraceFormat = Literal["mooncake", "burstgpt", "azure", "bailian"]
MOONCAKE_BLOCK_TOKENS, BAILIAN_BLOCK_TOKENS = 512, 16


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace: arrival ``t_s`` from the trace's start and lengths in tokens."""

    t_s: float
    isl: int
    osl: int
    hash_ids: tuple[int, ...] = ()
    session: str | None = None
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TraceRows:
    """A trace as read."""

    rows: tuple[TraceRow, ...]
    block_tokens: int | None
    num_skipped: int
    num_reordered: int

    @property
    def due_s(self) -> np.ndarray:
        return np.asarray([r.t_s for r in self.rows])


def detect_format(path: Path) -> TraceFormat:
    """The format, told from the first line. Raises BadInput when it is none that is known."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            line = f.readline().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the trace: {e}", where=str(path)) from e
    if line.startswith("{"):
        return "bailian" if '"parent_chat_id"' in line else "mooncake"
    names = [n.strip().strip('"') for n in line.split(",")]
    if "Request tokens" in names:
        return "burstgpt"
    if "ContextTokens" in names:
        return "azure"
    raise BadInput(
        f"not a trace this tool knows (first line: {line[:60]!r})",
        where=str(path),
        next_step="give Mooncake or Bailian JSONL, BurstGPT CSV or Azure LLM inference CSV",
    )


def read_trace(
    path: Path | str, *, fmt: TraceFormat | None = None, limit: int | None = None, skip_bad: bool = False
) -> TraceRows:
    """Read a trace.

    Args:
        limit: read only that many usable rows.
        skip_bad: count unusable rows (e.g. BurstGPT's failed requests with 0 response tokens) instead of raising.

    Raises:
        BadInput: the file cannot be read, a row cannot be used, or no row is left.
    """
    path = Path(path)
    fmt = fmt or detect_format(path)
    rows: list[TraceRow] = []
    skipped = 0
    try:
        for number, raw in _records(path, fmt):
            if limit is not None and len(rows) >= limit:
                break
            try:
                rows.append(_PARSERS[fmt](raw))
            except (KeyError, ValueError, TypeError, AttributeError) as e:
                if not skip_bad:
                    reason = f"missing field {e}" if isinstance(e, KeyError) else str(e)
                    raise BadInput(
                        f"cannot use this row: {reason}", where=f"{path}:{number}", next_step="fix it or skip bad rows"
                    ) from e
                skipped += 1
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BadInput(f"cannot read the trace: {e}", where=str(path)) from e
    if not rows:
        raise BadInput("the trace has no usable row", where=str(path))
    times = [r.t_s for r in rows]
    reordered = sum(b < a for a, b in itertools.pairwise(times))
    t0 = min(times)
    ordered = sorted(rows, key=lambda r: r.t_s)
    rebased = tuple(TraceRow(r.t_s - t0, r.isl, r.osl, r.hash_ids, r.session, r.delay_s) for r in ordered)
    block = {"mooncake": MOONCAKE_BLOCK_TOKENS, "bailian": BAILIAN_BLOCK_TOKENS}.get(fmt)
    return TraceRows(rebased, block, skipped, reordered)


def _records(path: Path, fmt: TraceFormat) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as f:
        if fmt in ("mooncake", "bailian"):
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except ValueError:
                        record = {"": "not JSON"}
                    yield number, record
        else:
            for number, record in enumerate(csv.DictReader(f), 2):
                yield number, record


def _count(value: Any, name: str) -> int:
    number = float(value)
    if not math.isfinite(number) or number < 1 or number != int(number):
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    return int(number)


def _time(value: Any, scale: float) -> float:
    t = float(value) * scale
    if not math.isfinite(t):
        raise ValueError(f"timestamp: expected a number, got {value!r}")
    return t


def _mooncake(raw: dict[str, Any]) -> TraceRow:
    # The text variants carry text in place of a length: about 4 characters a token, said so in the docs.
    if "input_length" in raw:
        isl = _count(raw["input_length"], "input_length")
    else:
        text = raw["text_input"] if "text_input" in raw else json.dumps(raw["messages"])
        isl = max(1, len(str(text)) // 4)
    session = raw.get("session_id")
    return TraceRow(
        _time(raw.get("timestamp", 0), 1e-3),
        isl,
        _count(raw["output_length"], "output_length"),
        tuple(int(h) for h in raw.get("hash_ids") or ()),
        None if session is None else str(session),
        float(raw.get("delay") or 0) * 1e-3,
    )


def _bailian(raw: dict[str, Any]) -> TraceRow:
    return TraceRow(
        _time(raw["timestamp"], 1.0),
        _count(raw["input_length"], "input_length"),
        _count(raw["output_length"], "output_length"),
        tuple(int(h) for h in raw.get("hash_ids") or ()),
    )


def _burstgpt(raw: dict[str, Any]) -> TraceRow:
    isl, osl = _count(raw["Request tokens"], "Request tokens"), _count(raw["Response tokens"], "Response tokens")
    return TraceRow(_time(raw["Timestamp"], 1.0), isl, osl)


def _azure(raw: dict[str, Any]) -> TraceRow:
    text = raw["TIMESTAMP"].strip()
    head, _, fraction = text.partition(".")
    digits = fraction.rstrip("Z").split("+")[0]
    when = datetime.fromisoformat(head.replace("Z", "")).replace(tzinfo=timezone.utc).timestamp()
    when += float(f"0.{digits}") if digits else 0.0
    return TraceRow(
        when, _count(raw["ContextTokens"], "ContextTokens"), _count(raw["GeneratedTokens"], "GeneratedTokens")
    )


_PARSERS: dict[TraceFormat, Callable[[dict[str, Any]], TraceRow]] = {
    "mooncake": _mooncake,
    "bailian": _bailian,
    "burstgpt": _burstgpt,
    "azure": _azure,
}


def trace_requests(
    trace: TraceRows,
    *,
    vocab_size: int,
    seed: int,
    max_isl: int | None = None,
    max_osl: int | None = None,
    first_token_id: int = 256,
) -> list[Request]:
    """Requests with the trace's lengths and synthetic tokens; blocks with equal ``hash_ids`` get equal tokens.

    ``max_isl`` and ``max_osl`` cut lengths to what a model can hold. Rows of one session become turns of one session:
    each is sent no sooner than ``delay_s`` after the one before is done.
    """
    isl = [min(r.isl, max_isl or r.isl) for r in trace.rows]
    osl = [min(r.osl, max_osl or r.osl) for r in trace.rows]
    requests = requests_of_lengths(isl, osl, vocab_size=vocab_size, seed=seed, first_token_id=first_token_id)
    seen_blocks: set[int] = set()
    sessions: dict[str, int] = {}
    turns: dict[str, int] = {}
    out = []
    for row, r in zip(trace.rows, requests, strict=True):
        ids, shared = r.prompt_token_ids, 0
        assert ids is not None
        if row.hash_ids and trace.block_tokens:
            ids, shared = _with_blocks(
                ids, row.hash_ids, trace.block_tokens, seen_blocks, vocab_size, seed, first_token_id
            )
        session = turn = None
        if row.session is not None:
            session = sessions.setdefault(row.session, len(sessions))
            turn = turns.get(row.session, 0)
            turns[row.session] = turn + 1
        out.append(
            Request(
                index=r.index,
                osl=r.osl,
                isl=len(ids),
                prompt_token_ids=ids,
                session=session,
                turn=turn or 0,
                think_s=row.delay_s,
                prefix_tokens=shared,
            )
        )
    return out


def _with_blocks(
    ids: np.ndarray,
    hash_ids: tuple[int, ...],
    block_tokens: int,
    seen: set[int],
    vocab_size: int,
    seed: int,
    first_token_id: int,
) -> tuple[np.ndarray, int]:
    """(ids with each whole block replaced by its hash id's tokens, leading tokens that an earlier request had)."""
    out = ids.copy()
    shared, leading = 0, True
    for k, h in enumerate(hash_ids):
        low, high = k * block_tokens, min((k + 1) * block_tokens, len(out))
        if low >= high:
            break
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(101, h))))
        out[low:high] = rng.integers(first_token_id, vocab_size, size=block_tokens, dtype=np.int32)[: high - low]
        leading = leading and h in seen
        shared += (high - low) if leading else 0
        seen.add(h)
    out.setflags(write=False)
    return out, min(shared, len(out) - 1)
