"""What each part of a cell allows but the parts together do not: refused when the file is read, hours before a run."""

from __future__ import annotations

from dataclasses import dataclass

from bench.config.experiment import CellSpec, OfflineLoad, OpenLoopLoad, RampLoad, TraceLoad, max_length_tokens


@dataclass(frozen=True, slots=True)
class Conflict:
    """``what`` is wrong at ``field`` (its path in the file), and what to write instead."""

    what: str
    field: tuple[str, ...]
    next_step: str


def conflict(spec: CellSpec) -> Conflict | None:
    """The first thing in ``spec`` that would silently do nothing, or could not be run; None when there is none."""
    return _arrivals(spec) or _marks(spec) or _trace(spec) or _sessions(spec) or _prefix(spec)


def takes_text(spec: CellSpec) -> bool:
    """True where this cell's engine is sent words or chat messages, so that a prompt has no set number of tokens."""
    engine = spec.engine
    if getattr(engine, "api", "completions") == "chat":
        return True
    return engine.kind == "endpoint" and getattr(engine, "prompts", "text") == "text"


_TOKEN_IDS = "set engine.api: completions, and engine.prompts: token_ids where the engine is an endpoint"


def _arrivals(spec: CellSpec) -> Conflict | None:
    load = spec.load
    if isinstance(load, (OpenLoopLoad, RampLoad)) and load.burstiness != 1.0 and load.arrivals != "gamma":
        what = f"has no effect on {load.arrivals} arrivals"
        return Conflict(what, ("load", "burstiness"), "write arrivals: gamma, or remove it")
    return None


def _marks(spec: CellSpec) -> Conflict | None:
    if isinstance(spec.load, OfflineLoad):
        for name in ("ramp_up_s", "cool_down_s"):
            if getattr(spec.warmup, name):
                what = "has no effect on offline batches, which count whole, filling and draining included"
                return Conflict(what, ("warmup", name), "remove it")
    return None


def _trace(spec: CellSpec) -> Conflict | None:
    if not isinstance(spec.load, TraceLoad):
        return None
    if takes_text(spec):
        return Conflict("a trace gives lengths in tokens, this engine is sent text", ("load", "kind"), _TOKEN_IDS)
    for name in ("prefix", "sessions"):
        if getattr(spec.workload, name) is not None:
            what = "has no effect on a trace, which brings its own"
            return Conflict(what, ("workload", name), "remove it")
    return None


def _sessions(spec: CellSpec) -> Conflict | None:
    if spec.workload.sessions is None:
        return None
    at = ("workload", "sessions")
    if isinstance(spec.load, OfflineLoad):
        what = "turns wait for each other, the requests of an offline batch do not"
        return Conflict(what, at, "use load.kind closed_loop or open_loop")
    if spec.workload.prefix is not None:
        what = "has no effect on sessions, whose turns share the conversation so far"
        return Conflict(what, ("workload", "prefix"), "remove one of the two")
    if takes_text(spec):
        return Conflict("a conversation is built from token ids, this engine is sent text", at, _TOKEN_IDS)
    return None


def _prefix(spec: CellSpec) -> Conflict | None:
    prefix = spec.workload.prefix
    longest = max_length_tokens(spec.workload.isl)
    if prefix is not None and prefix.tokens >= longest:
        what = f"{prefix.tokens:,} tokens leave none of an ISL of at most {longest:,} for the request itself"
        return Conflict(
            what, ("workload", "prefix", "tokens"), "the prefix is part of the ISL: lengthen isl or shorten it"
        )
    return None
