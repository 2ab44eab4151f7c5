"""Schedules as columns: a pool of 200,000 requests crosses to the engine's process in half a second, not in six."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np

from bench.records import Request, Schedule

_COLUMNS = ("index", "osl", "isl", "phase", "session", "turn", "think_s", "prefix_tokens", "priority")


def pack(schedule: Schedule) -> dict[str, Any]:
    """Inverse of :func:`unpack`. A column whose values are all equal is one value."""
    requests = schedule.requests
    columns: dict[str, Any] = {}
    for name in (*_COLUMNS, "text", "messages"):
        values = [getattr(r, name) for r in requests]
        same = bool(values) and values.count(values[0]) == len(values)
        columns[name] = ("all", values[0]) if same else ("each", values)
    ids = [r.prompt_token_ids for r in requests]
    arrays = [a for a in ids if a is not None]
    return {
        "kind": schedule.kind,
        "due_s": schedule.due_s,
        "max_in_flight": schedule.max_in_flight,
        "stop": schedule.stop,
        "seed": schedule.seed,
        "in_flight_steps": schedule.in_flight_steps,
        "num_requests": len(requests),
        "columns": columns,
        "tokens": np.concatenate(arrays).astype(np.int32, copy=False) if arrays else None,
        "lengths": np.array([-1 if a is None else len(a) for a in ids], dtype=np.int64),
    }


def unpack(packed: dict[str, Any]) -> Schedule:
    n = packed["num_requests"]
    columns = {k: repeat(v, n) if how == "all" else v for k, (how, v) in packed["columns"].items()}
    tokens, end = packed["tokens"], 0
    prompts: list[np.ndarray | None] = []
    for length in packed["lengths"].tolist():
        if length < 0:
            prompts.append(None)
            continue
        prompts.append(tokens[end : end + length])
        end += length
    names = ("index", "osl", "isl", "text", "messages", "phase", "session", "turn", "think_s", "prefix_tokens")
    requests = tuple(
        Request(i, osl, isl, ids, text, messages, phase, session, turn, think_s, prefix, priority)
        for i, osl, isl, text, messages, phase, session, turn, think_s, prefix, ids, priority in zip(
            *(columns[k] for k in names), prompts, columns["priority"], strict=True
        )
    )
    return Schedule(
        packed["kind"],
        requests,
        packed["due_s"],
        packed["max_in_flight"],
        packed["stop"],
        packed["seed"],
        packed["in_flight_steps"],
    )
