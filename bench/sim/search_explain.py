"""Why the winner of a search wins, from what was simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.sim.search_space import Found, Objective, Point


def explain(found: Found, objective: Objective) -> list[str]:
    """Why the winner wins: what holds it back, and what each other value of an axis would give."""
    best = found.ranked[0]
    lines = [_limits_of(best, found), *found.notes]
    for axis, value in best.axes.items():
        others = [p for p in found.ranked if p.axes[axis] != value]
        near = [p for p in others if all(p.axes[a] == v for a, v in best.axes.items() if a != axis)]
        ranked = _best_per_value(near or others, axis)
        unpooled = [p for p in ranked[3:] if axis == "pools" and p.pools is None]  # always worth saying
        for other in (*ranked[:3], *unpooled):
            rest = "" if near else " (other axes differ too)"
            change = abs(other.score / best.score) - 1 if best.score else 0.0
            lines.append(
                f"{axis} {_text(other.axes[axis], axis)} instead of {_text(value, axis)}: {_change(change, objective)}{rest}"
            )
        lines += _never_good(found, axis, value, best)
    for axes, reason in found.refused[:6]:
        lines.append(f"refused: {', '.join(f'{k} {_text(v)}' for k, v in axes.items() if v is not None)}: {reason}")
    return lines


def _best_per_value(points: Sequence[Point], axis: str) -> list[Point]:
    best: dict[Any, Point] = {}
    for p in points:
        if p.axes[axis] not in best or p.score > best[p.axes[axis]].score:
            best[p.axes[axis]] = p
    return sorted(best.values(), key=lambda p: p.score, reverse=True)


def _never_good(found: Found, axis: str, value: Any, best: Point) -> list[str]:
    """Other values of the axis with which no point met the SLO, all else as in the winner."""
    good = {p.axes[axis] for p in found.ranked}
    lines = {}
    for p in found.points:
        other = p.axes[axis]
        if other in good or other == value or p.broken is None or other in lines:
            continue
        if all(p.axes[a] == v for a, v in best.axes.items() if a != axis):
            lines[other] = f"{axis} {_text(other, axis)}: never meets the SLO; {p.broken}"
    return list(lines.values())


def _limits_of(best: Point, found: Found) -> str:
    v = best.values
    parts = [
        f"{v['running_mean']:.0f} requests run on average",
        f"{v['prefill_time_ratio']:.0%} of the time goes into steps with prompt work",
        f"KV cache at most {v['kv_usage_max_ratio']:.0%} full",
    ]
    if v["preemptions_per_request"] > 0.01:
        parts.append(f"{v['preemptions_per_request']:.2f} preemptions per request: KV memory is the limit")
    if v["host_bound_ratio"] > 0.1:
        parts.append(f"the host sets the pace in {v['host_bound_ratio']:.0%} of the steps")
    higher = [p for p in found.points if p.setup is best.setup and p.pools == best.pools and p.level > best.level]
    if best.level and higher:
        stop = higher[0].broken or "nothing is gained any more"
        parts.append(f"concurrency {higher[0].level} per engine is too much: {stop}")
    return "; ".join(parts)


def _change(change: float, objective: Objective) -> str:
    what = {
        "throughput": "tokens/s per GPU",
        "cost": "$ per million output tokens",
        "goodput": "good requests/s per GPU",
    }
    return f"{change:+.0%} {what[objective]}"


def _text(value: Any, axis: str = "") -> str:
    if value is None:
        return "none" if axis == "pools" else "default"
    return str(value)
