"""How cells are laid out in charts and tables: what runs along x, what tells lines apart, what makes panels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.analysis.summary import Summary
from bench.config.sweep import axis_path

_LEVEL_TITLES = {
    "batch_size": "Batch size (requests)",
    "concurrency": "Concurrency (requests in flight)",
    "rate_per_s": "Request rate (1/s)",
    "segments": "Ramp segments",
    "time_scale": "Trace time scale",
}
#: Axes that make lines; every other one makes panels.
_LINE_AXES = ("gpu", "tensor_parallel_size")
_SHORT = {"batch_size": "batch", "concurrency": "concurrency", "rate_per_s": "rate", "tensor_parallel_size": "TP", "gpu": ""}


@dataclass(frozen=True, slots=True)
class Placed:
    """A cell with its place: ``x`` along the load axis, ``line`` and ``panel`` by label."""

    summary: Summary
    x: float
    line: str
    color: int
    panel: str
    level: str  # name of the load axis


@dataclass(frozen=True, slots=True)
class Layout:
    """All cells placed. ``panels`` and ``lines`` in the order of the sweep."""

    placed: tuple[Placed, ...]
    panels: tuple[str, ...]
    lines: tuple[str, ...]
    level: str

    @property
    def x_title(self) -> str:
        return _LEVEL_TITLES.get(self.level, self.level)

    @property
    def level_word(self) -> str:
        """"batch" or "concurrency", for sentences."""
        return _SHORT.get(self.level, self.level)

    def of(self, panel: str, line: str) -> list[Placed]:
        """Cells of one line of one panel, by x."""
        return sorted((p for p in self.placed if p.panel == panel and p.line == line), key=lambda p: p.x)


def axis_tail(name: str) -> str:
    """'engine.args.tensor_parallel_size' and its short name alike: 'tensor_parallel_size'."""
    return axis_path(name)[-1]


def lay_out(summaries: Sequence[Summary]) -> Layout:
    """Place every cell. Axes that take one value alone are left out of labels."""
    varying = _varying(summaries)
    mixed = len({s.origin for s in summaries}) > 1
    levels = [s.facts.level or ("batch_size", 1.0) for s in summaries]
    several_levels = len({name for name, _ in levels}) > 1
    placed = []
    lines: dict[str, int] = {}
    panels: dict[str, None] = {}
    for s, (level, x) in zip(summaries, levels, strict=True):
        line = _line_label(s, mixed)
        panel = _panel_label(s, varying, level if several_levels else "")
        color = lines.setdefault(line, len(lines))
        panels.setdefault(panel)
        placed.append(Placed(s, float(x), line, color, panel, level))
    return Layout(tuple(placed), tuple(panels), tuple(lines), levels[0][0] if levels else "batch_size")


def _varying(summaries: Sequence[Summary]) -> set[str]:
    seen: dict[str, set[str]] = {}
    for s in summaries:
        for name, value in s.facts.axes.items():
            seen.setdefault(name, set()).add(repr(value))
    return {name for name, values in seen.items() if len(values) > 1}


def _line_label(s: Summary, mixed: bool) -> str:
    gpu = getattr(s.facts.spec.engine, "gpu", None) if s.facts.spec is not None else None
    parts = [str(gpu)] if gpu else []
    parts.append(f"TP {s.facts.tensor_parallel_size}")
    if mixed and s.origin != "measured":
        parts.append(f"({s.origin})")
    return " ".join(parts)


def _panel_label(s: Summary, varying: set[str], level: str) -> str:
    level_name = (s.facts.level or ("", 0.0))[0]
    parts = [level] if level else []
    for name, value in s.facts.axes.items():
        tail = axis_tail(name)
        if name in varying and tail not in _LINE_AXES and tail != level_name:
            parts.append(f"{_word(tail)} {value_text(value)}".strip())
    return ", ".join(parts)


def _word(tail: str) -> str:
    return {"shape": "ISL/OSL", "isl": "ISL", "osl": "OSL", "model": "", "kind": ""}.get(tail, tail)


def value_text(value: Any) -> str:
    """An axis value for people: {'kind': 'uniform', ...} -> 'uniform 1-8'."""
    if isinstance(value, dict):
        rest = "-".join(str(v) for k, v in value.items() if k != "kind")
        return f"{value.get('kind', '')} {rest}".strip()
    return str(value)


def cell_label(p: Placed, panel: bool = True) -> str:
    """'TP 2, batch 32' with the panel's label where there are several panels."""
    text = f"{p.line}, {_SHORT.get(p.level, p.level)} {p.x:g}"
    return f"{text}, {p.panel}" if panel and p.panel else text
