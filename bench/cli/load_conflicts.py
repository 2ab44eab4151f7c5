"""Options of `bench load` that do not go together, or that would silently do nothing: refused before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.errors import BadInput

#: Option -> the options of which one must be given for it to have an effect.
_NEEDS: dict[str, tuple[str, ...]] = {
    "arrivals": ("rate", "search", "sweep"),
    "burstiness": ("rate", "search", "sweep"),
    "max_in_flight": ("rate", "search", "sweep", "trace"),
    "time_scale": ("trace",),
    "prefix_share": ("prefix_tokens",),
    "num_prefixes": ("prefix_tokens",),
    "think": ("turns",),
    "tolerance": ("search",),
    "lowest": ("search",),
    "highest": ("search",),
}
#: Two of these at once say different things.
_EITHER: tuple[tuple[str, str], ...] = (
    ("search", "sweep"),
    ("trace", "shape"),
    ("trace", "sharegpt"),
    ("sharegpt", "shape"),
    ("sharegpt", "turns"),
)
#: What a search or a sweep sets itself.
_LEVELS = {"rate": ("concurrency", "batch", "trace"), "concurrency": ("rate", "batch", "trace")}
_OPEN_LOOP = ("arrivals", "burstiness", "max_in_flight")
_CONSTANT = ("constant", "poisson")


def flag(name: str) -> str:
    """The option as it is written."""
    return "--" + name.replace("_", "-")


def check(o: Mapping[str, Any], given: set[str]) -> None:
    """Refuse what contradicts itself.

    Args:
        o: every option's value.
        given: names of the options that the user wrote.

    Raises:
        BadInput: names the options.
    """
    if "rate" in given and not o["rate"] > 0:
        raise BadInput(f"expected more than 0 requests per second, got {o['rate']:g}", where="--rate")
    if "duration" in given and not o["duration"] > 0:
        raise BadInput(f"expected more than 0 s, got {o['duration']:g}", where="--duration")
    for one, other in _EITHER:
        if {one, other} <= given:
            raise BadInput(f"{flag(one)} and {flag(other)} exclude each other", next_step="remove one of the two")
    if (kind := o["search"]) is not None:
        for name in _LEVELS[kind]:
            if name in given:
                what = f"--search {kind} sets the {kind} itself, {flag(name)} is another kind of load"
                raise BadInput(what, next_step=f"remove it, or start the search at --{kind}")
    for name, needs in _NEEDS.items():
        if name in given and not given & set(needs):
            raise BadInput(
                f"{flag(name)} has no effect here", next_step=f"add {' or '.join(map(flag, needs))}, or remove it"
            )
    closed = o["search"] == "concurrency" or (o["sweep"] and o["rate"] is None)
    for name in _OPEN_LOOP:
        if name in given and closed:
            raise BadInput(f"{flag(name)} has no effect on a closed loop", next_step="give --rate, or remove it")
    if "burstiness" in given and "arrivals" in given and o["arrivals"] in _CONSTANT:
        raise BadInput(f"--burstiness has no effect on {o['arrivals']} arrivals", next_step="write --arrivals gamma")
    if "ca_file" in given and not str(o["url"]).startswith("https:"):
        raise BadInput("--ca-file has no effect without TLS", next_step="write https://, or remove it")
