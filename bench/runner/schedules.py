"""From a cell and a repeat to its Schedule: lengths, tokens and due times, all seeded before the clock starts."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from bench.config.conflicts import conflict, takes_text
from bench.config.experiment import (
    CellSpec,
    ClosedLoopLoad,
    FixedLengthSpec,
    LognormalLengthSpec,
    NominalLengthSpec,
    NormalLengthSpec,
    OfflineLoad,
    OpenLoopLoad,
    RampLoad,
    TraceLoad,
    UniformLengthSpec,
    max_length_tokens,
    mean_length_tokens,
)
from bench.config.loading import trace_path
from bench.errors import BadInput
from bench.load import schedule as build
from bench.load.arrivals import RateProfile
from bench.records import Phase, Request, Schedule, StopRule
from bench.workload import synthetic
from bench.workload.lengths import FixedLength, Length, LognormalLength, NormalLength, UniformLength

#: Input and output lengths in tokens, pair by pair.
LengthPairs = tuple[np.ndarray, np.ndarray]
#: Prompts are built ahead of the run. This many prompt tokens (4 bytes each) is the most that one run may hold ready.
MAX_POOL_TOKENS = 48_000_000
MAX_POOL_REQUESTS = 200_000
#: Requests per slot of a closed loop when the experiment sets no number (InferenceX uses the same).
REQUESTS_PER_SLOT = 10
OPEN_LOOP_WARMUP = 8


def length(spec: Any) -> Length:
    """The distribution that a length spec of the experiment file stands for."""
    if isinstance(spec, FixedLengthSpec):
        return FixedLength(spec.tokens)
    if isinstance(spec, UniformLengthSpec):
        return UniformLength(spec.low, spec.high)
    if isinstance(spec, NominalLengthSpec):
        return UniformLength.from_ratio(spec.tokens, spec.low_ratio)
    if isinstance(spec, NormalLengthSpec):
        return NormalLength(spec.mean, spec.sd, spec.low, spec.high)
    assert isinstance(spec, LognormalLengthSpec)
    return LognormalLength(spec.mean, spec.sd, spec.low, spec.high)


def stop_rule(spec: CellSpec) -> StopRule:
    """The stop rule of the experiment as the engines take it."""
    return StopRule(**spec.stop.model_dump())


def num_warmup(spec: CellSpec) -> int:
    """Requests before the clock counts: one full batch at the measured shape unless the experiment says otherwise."""
    if spec.warmup.num_requests is not None:
        return spec.warmup.num_requests
    if isinstance(spec.load, OfflineLoad):
        return spec.load.batch_size
    if isinstance(spec.load, ClosedLoopLoad):
        return spec.load.concurrency
    return OPEN_LOOP_WARMUP


def num_measured(spec: CellSpec) -> int:
    """How many measured requests to hold ready, so that the stop rule ends the run and never a lack of requests.

    Without a minimum duration this is the exact number of requests of the run. With one, enough for the maximum
    duration at any speed is not knowable, so as many as the pool allows (``MAX_POOL_TOKENS``).
    """
    stop, load = spec.stop, spec.load
    if isinstance(load, OpenLoopLoad):
        seconds = stop.max_duration_s or max(stop.min_duration_s, stop.min_requests / load.rate_per_s, 1.0)
        wanted = max(1, ceil(load.rate_per_s * seconds))
        return min(wanted if stop.max_requests is None else min(wanted, stop.max_requests), MAX_POOL_REQUESTS)
    if isinstance(load, RampLoad):
        return _ramp_requests(load)
    step = load.batch_size if isinstance(load, OfflineLoad) else 1
    least = stop.min_requests or (step if isinstance(load, OfflineLoad) else REQUESTS_PER_SLOT * _concurrency(load))
    if stop.max_requests is not None:
        wanted = stop.max_requests
    elif stop.min_duration_s > 0:
        by_tokens = int(MAX_POOL_TOKENS / max(1.0, mean_length_tokens(spec.workload.isl)))
        wanted = max(least, min(by_tokens, MAX_POOL_REQUESTS))
    else:
        wanted = least
    return max(step, wanted // step * step if stop.max_requests is not None else ceil(wanted / step) * step)


def _concurrency(load: Any) -> int:
    return load.concurrency if isinstance(load, ClosedLoopLoad) else 1


def _ramp_requests(load: RampLoad) -> int:
    if load.segments[0].rate_per_s is None:
        return MAX_POOL_REQUESTS // 10
    return max(1, ceil(ramp_profile(load).expected_requests(sum(s.duration_s for s in load.segments))))


def ramp_profile(load: RampLoad) -> RateProfile:
    """The rate over time of a ramp of rates; a segment without ``hold`` rises linearly from the one before."""
    times, rates, t = [0.0], [float(load.segments[0].rate_per_s or 0)], 0.0
    linear = any(not s.hold for s in load.segments)
    for number, segment in enumerate(load.segments):
        assert segment.rate_per_s is not None
        if linear:
            if segment.hold and number and rates[-1] != segment.rate_per_s:
                # a step in a linear profile is a very steep ramp
                times.append(t + 1e-6)
                rates.append(segment.rate_per_s)
            t += segment.duration_s
            times.append(t)
            rates.append(segment.rate_per_s)
        else:
            if number:
                times.append(t)
                rates.append(segment.rate_per_s)
            t += segment.duration_s
    return RateProfile(tuple(times), tuple(rates), "linear" if linear else "step")


def build_schedule(
    spec: CellSpec, *, seed: int, vocab_size: int, base: Path | None = None, lengths: LengthPairs | None = None
) -> Schedule:
    """The schedule of one run.

    Args:
        seed: of this run (``synthetic.repeat_seed`` of the experiment's seed and the run's number).
        vocab_size: of the model; token ids are drawn below it.
        base: folder that a trace's relative path is resolved against.
        lengths: (ISL, OSL) of a data set; requests take pairs of them in a seeded order in place of the workload's lengths.

    Raises:
        BadInput: the load and the workload do not go together, or a trace cannot be read.
    """
    if (found := conflict(spec)) is not None:
        raise BadInput(found.what, where=".".join(found.field), next_step=found.next_step)
    load, stop = spec.load, stop_rule(spec)
    if isinstance(load, TraceLoad):
        return _trace_schedule(spec, load, seed=seed, vocab_size=vocab_size, base=base)
    requests = _requests(spec, seed=seed, vocab_size=vocab_size, form=_prompt_form(spec), lengths=lengths)
    if isinstance(load, OfflineLoad):
        return build.offline(requests, batch_size=load.batch_size, stop=stop, seed=seed)
    if isinstance(load, ClosedLoopLoad):
        return build.closed_loop(requests, load.concurrency, stop=stop, seed=seed)
    if isinstance(load, OpenLoopLoad):
        return build.open_loop(
            requests,
            load.rate_per_s,
            arrivals=load.arrivals,
            burstiness=load.burstiness,
            max_in_flight=load.max_in_flight,
            stop=stop,
            seed=seed,
            **_marks(spec),
        )
    assert isinstance(load, RampLoad)
    if load.segments[0].rate_per_s is None:
        return _concurrency_ramp(load, requests, stop, seed)
    return build.open_loop(
        requests,
        ramp_profile(load),
        arrivals=load.arrivals,
        burstiness=load.burstiness,
        max_in_flight=load.max_in_flight,
        stop=stop,
        seed=seed,
        **_marks(spec),
    )


def _marks(spec: CellSpec) -> dict[str, float]:
    """What marks requests by their due time; closed loops are marked when their records come (``runner.marks``)."""
    return {"ramp_up_s": spec.warmup.ramp_up_s, "cool_down_s": spec.warmup.cool_down_s}


def _concurrency_ramp(load: RampLoad, requests: list[Request], stop: StopRule, seed: int) -> Schedule:
    levels = [int(s.concurrency or 1) for s in load.segments]
    steps: list[tuple[float, int]] = [(0.0, levels[0])]
    t, level = 0.0, levels[0]
    for segment, target in zip(load.segments, levels, strict=True):
        if not segment.hold and target != level:
            ramp = build.concurrency_ramp(level, target, segment.duration_s)
            steps += [(t + dt, c) for dt, c in ramp if t + dt > steps[-1][0]]
        elif t > 0 and target != level:
            steps.append((t, target))
        t, level = t + segment.duration_s, target
    capped = StopRule(
        stop.min_duration_s,
        min(stop.max_duration_s or t, t),
        stop.min_requests,
        stop.max_requests,
        stop.max_errors,
        stop.max_error_ratio,
    )
    return build.closed_loop(requests, max(levels), steps=steps, stop=capped, seed=seed)


def _prompt_form(spec: CellSpec) -> synthetic.PromptForm:
    if not takes_text(spec):
        return "token_ids"
    return "messages" if getattr(spec.engine, "api", "completions") == "chat" else "text"


def _requests(
    spec: CellSpec,
    *,
    seed: int,
    vocab_size: int,
    form: synthetic.PromptForm,
    lengths: LengthPairs | None = None,
) -> list[Request]:
    work, warm, measured = spec.workload, num_warmup(spec), num_measured(spec)
    isl, osl = length(work.isl), length(work.osl)
    prefix = None
    if work.prefix is not None:
        prefix = synthetic.SharedPrefix(work.prefix.tokens, work.prefix.share, work.prefix.num_prefixes)
    ids: dict[str, Any] = {"vocab_size": vocab_size, "first_token_id": _first_token_id(vocab_size)}
    out: list[Request] = []
    if lengths is not None:
        phases: tuple[tuple[int, int, int, Phase], ...] = (
            (warm, 0, _warm_up_seed(seed), "warmup"),
            (measured, warm, seed, "measured"),
        )
        for number, first, phase_seed, phase in phases:
            isl_osl = (values[drawn_pairs(len(values), number, phase_seed)] for values in lengths)
            out += synthetic.requests_of_lengths(
                *isl_osl, seed=phase_seed, prefix=prefix, form=form, first_index=first, phase=phase, **ids
            )
        return out
    if warm:
        out = synthetic.build_requests(
            warm, isl, osl, seed=_warm_up_seed(seed), phase="warmup", prefix=prefix, form=form, **ids
        )
    if work.sessions is not None:
        sessions = synthetic.Sessions(FixedLength(work.sessions.turns), work.sessions.think_s)
        count = max(1, ceil(measured / work.sessions.turns))
        return out + synthetic.build_sessions(count, isl, isl, osl, sessions, seed=seed, first_index=warm, **ids)
    return out + synthetic.build_requests(
        measured, isl, osl, seed=seed, first_index=warm, prefix=prefix, form=form, **ids
    )


def drawn_pairs(num_pairs: int, n: int, seed: int) -> np.ndarray:
    """``n`` numbers below ``num_pairs``: each once in random order, then again in another one."""
    rng = synthetic.stream(seed, "order")
    rounds = [rng.permutation(num_pairs) for _ in range(-(-n // num_pairs))]
    return np.concatenate([*rounds, np.zeros(0, dtype=np.int64)])[:n].astype(np.int64)


def _warm_up_seed(seed: int) -> int:
    """A stream of its own: the measured requests are the same whatever the warm-up."""
    return synthetic.repeat_seed(seed, 1_000_003)


def _first_token_id(vocab_size: int) -> int:
    """Low ids, where special tokens usually live, stay out of prompts, unless the vocabulary is too small for that."""
    return 256 if vocab_size > 512 else 0


def _trace_schedule(spec: CellSpec, load: TraceLoad, *, seed: int, vocab_size: int, base: Path | None) -> Schedule:
    """The trace's rows, after a warm-up at the lengths of its first ones."""
    from bench.workload.trace import read_trace, trace_requests

    rows = read_trace(trace_path(load.path, base), fmt=load.format, limit=spec.stop.max_requests)
    first_id = _first_token_id(vocab_size)
    requests = trace_requests(rows, vocab_size=vocab_size, seed=seed, first_token_id=first_id)
    warm: list[Request] = []
    if num := num_warmup(spec):
        like = [requests[i % len(requests)] for i in range(num)]
        isl, osl = [r.isl or 1 for r in like], [r.osl for r in like]
        warm = synthetic.requests_of_lengths(
            isl, osl, vocab_size=vocab_size, seed=_warm_up_seed(seed), first_token_id=first_id, phase="warmup"
        )
        requests = [replace(r, index=r.index + num) for r in requests]
    return build.trace(
        [*warm, *requests],
        rows.due_s,
        time_scale=load.time_scale,
        max_in_flight=load.max_in_flight,
        stop=stop_rule(spec),
        seed=seed,
        **_marks(spec),
    )


def longest_sequence_tokens(spec: CellSpec) -> int:
    """The longest prompt plus output that this cell can ask for, in tokens (sessions: the whole conversation)."""
    isl, osl = max_length_tokens(spec.workload.isl), max_length_tokens(spec.workload.osl)
    turns = spec.workload.sessions.turns if spec.workload.sessions else 1
    return (isl + osl) * turns
