"""From the options of `bench load` to an Experiment, a Target and LoadOptions."""

from __future__ import annotations

import json
import os
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from bench.config.experiment import CellSpec, Experiment
from bench.errors import BadInput
from bench.load.driver import LoadOptions
from bench.load.target import Target
from bench.runner.schedules import LengthPairs
from bench.workload.lengths import FixedLength, LognormalLength, NormalLength, UniformLength, parse_scenario

#: Of arrivals in a probe of an open loop, and in `bench load --rate`, where the user sets no length.
SECONDS_PER_RATE = 10


def _length(value: Any) -> dict[str, Any]:
    if isinstance(value, FixedLength):
        return {"kind": "fixed", "tokens": value.tokens}
    if isinstance(value, UniformLength):
        return {"kind": "uniform", "low": value.low, "high": value.high}
    kind = "lognormal" if isinstance(value, LognormalLength) else "normal"
    assert isinstance(value, (NormalLength, LognormalLength))
    return {"kind": kind, "mean": value.mean, "sd": value.sd, "low": value.low, "high": value.high}


def _load(o: dict[str, Any]) -> dict[str, Any]:
    concurrency, rate = o["concurrency"], o["rate"]
    if o["search"] == "rate" or (o["sweep"] and rate is not None):
        rate = rate or 1.0
    elif o["search"] == "concurrency" or o["sweep"]:
        concurrency = concurrency or 1
    given = [
        n
        for n, v in (("--concurrency", concurrency), ("--rate", rate), ("--batch", o["batch"]), ("--trace", o["trace"]))
        if v
    ]
    if len(given) != 1:
        what = "nothing says how requests are sent" if not given else f"{' and '.join(given)} exclude each other"
        raise BadInput(what, next_step="give one of --concurrency N, --rate R, --batch N and --trace FILE")
    if concurrency:
        return {"kind": "closed_loop", "concurrency": concurrency}
    if o["batch"]:
        return {"kind": "offline", "batch_size": o["batch"]}
    if o["trace"]:
        return {"kind": "trace", "path": o["trace"], "time_scale": o["time_scale"], "max_in_flight": o["max_in_flight"]}
    return {
        "kind": "open_loop",
        "rate_per_s": rate,
        "arrivals": "gamma" if o["burstiness"] != 1.0 else o["arrivals"],
        "burstiness": o["burstiness"],
        "max_in_flight": o["max_in_flight"],
    }


def _stop(o: dict[str, Any], load: dict[str, Any]) -> dict[str, Any]:
    stop: dict[str, Any] = {"max_errors": o["max_errors"], "max_error_ratio": o["max_error_share"]}
    if o["duration"] is not None:
        stop |= {
            "min_duration_s": o["duration"],
            "max_duration_s": None if load["kind"] == "closed_loop" else o["duration"],
        }
    if o["requests"] is not None:
        stop["max_requests"] = o["requests"]
        if o["duration"] is not None:
            stop["min_requests"] = 0
    elif o["duration"] is None and load["kind"] == "open_loop" and not (o["search"] or o["sweep"]):
        stop["max_requests"] = max(
            100, ceil(SECONDS_PER_RATE * load["rate_per_s"])
        )  # searches and sweeps choose for each level
    if load["kind"] == "open_loop" and "max_requests" in stop:
        stop["min_requests"] = stop["max_requests"]
    return {k: v for k, v in stop.items() if v is not None}


def _moments(tokens: np.ndarray) -> dict[str, Any]:
    """A data set's lengths as the experiment can say them; runs draw from the data set itself."""
    low, high = int(tokens.min()), int(tokens.max())
    if low == high:
        return {"kind": "fixed", "tokens": low}
    return {"kind": "normal", "mean": float(tokens.mean()), "sd": float(tokens.std()), "low": low, "high": high}


def lengths_of(o: dict[str, Any]) -> tuple[LengthPairs | None, dict[str, Any] | None]:
    """(lengths of --sharegpt, what the manifest says of them); None without that option.

    Raises:
        BadInput: the file cannot be read.
    """
    if not o["sharegpt"]:
        return None, None
    from bench.workload.dataset import CHARACTERS_PER_TOKEN, read_sharegpt, sharegpt_lengths

    pairs = sharegpt_lengths(read_sharegpt(o["sharegpt"]))
    return pairs, {
        "file": Path(o["sharegpt"]).name,
        "num_exchanges": len(pairs[0]),
        "lengths": f"{CHARACTERS_PER_TOKEN:g} characters a token",
    }


def experiment_of(url: str, o: dict[str, Any], lengths: LengthPairs | None = None) -> Experiment:
    """The experiment that the options stand for. Raises BadInput in words of the options."""
    isl, osl = parse_scenario(o["shape"])
    load = _load(o)
    prompts = o["prompts"] or ("text" if o["api"] == "chat" else "token_ids")
    workload: dict[str, Any] = {"isl": _length(isl), "osl": _length(osl)}
    if lengths is not None:
        workload = {"isl": _moments(lengths[0]), "osl": _moments(lengths[1])}
    if o["prefix_tokens"]:
        workload["prefix"] = {
            "tokens": o["prefix_tokens"],
            "share": o["prefix_share"],
            "num_prefixes": o["num_prefixes"],
        }
    if o["turns"]:
        workload["sessions"] = {"turns": o["turns"], "think_s": o["think"]}
    data: dict[str, Any] = {
        "name": o["name"],
        "why": "bench load",
        "model": o["model"] or "served",
        "engine": {
            "kind": "endpoint",
            "url": url,
            "served_model": o["model"] or None,
            "api": o["api"],
            "api_key_env": o["api_key_env"],
            "prompts": prompts,
            "extra_body": _extra(o),
        },
        "load": load,
        "workload": workload,
        "stop": _stop(o, load),
        "warmup": {
            "num_requests": o["warmup"],
            "ramp_up_s": o["ramp_up"] or 0.0,
            "cool_down_s": o["cool_down"] or 0.0,
        },
        "seed": o["seed"],
        "repeats": o["repeats"],
        "slo": o["slo"],
    }
    try:
        return Experiment.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        # a check of our own says what it got, or why that does not matter
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        what = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"{place}: {what}{got}"[:300], where="bench load") from None


def _extra(o: dict[str, Any]) -> dict[str, Any]:
    if not o["extra_body"]:
        return {}
    try:
        extra = json.loads(o["extra_body"])
    except ValueError as e:
        raise BadInput(f"not JSON: {e}", where="--extra-body") from None
    if not isinstance(extra, dict):
        raise BadInput("expected a JSON object", where="--extra-body", next_step="write '{\"top_p\": 0.9}'")
    return extra


def cell_of(experiment: Experiment) -> CellSpec:
    """The experiment's one cell."""
    fields = {name: getattr(experiment, name) for name in CellSpec.model_fields}
    return CellSpec(**fields)


def target_of(url: str, o: dict[str, Any]) -> Target:
    return Target(
        url=url,
        model=o["model"],
        api=o["api"],
        api_key_env=o["api_key_env"],
        ca_file=o["ca_file"],
        ignore_eos=True,
        continuous_usage=True,
        extra_body=_extra(o),
    )


def options_of(o: dict[str, Any], say: Any) -> LoadOptions:
    """How to drive; measures this client's capacity first where it is not known."""
    from bench.load.self_test import capacity, known_capacity

    if known_capacity() is None:
        say.line("measuring this client's capacity once (4 s)")
    value, source = capacity()
    cpus = None
    if o["cpus"]:
        try:
            cpus = tuple(int(c) for c in o["cpus"].split(","))
        except ValueError:
            raise BadInput(f'expected core numbers such as 14,15, got "{o["cpus"]}"', where="--cpus") from None
        here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(cpus)
        if not set(cpus) <= here:
            what = f"this process may not run on core {min(set(cpus) - here)}"
            raise BadInput(what, where="--cpus", next_step=f"choose among {', '.join(map(str, sorted(here)))}")
    return LoadOptions(
        num_processes=o["processes"],
        cpus=cpus,
        capacity_chunks_per_s=value,
        capacity_source=source,
        keep_raw=o["keep_raw"],
    )
