"""How cells are laid out in charts and tables: what runs along x, what tells lines apart, what makes panels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.analysis.efficiency import hardware_of
from bench.analysis.run_facts import LOAD_UNKNOWN
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
_TITLES = {"shape": "ISL/OSL", "isl": "ISL", "osl": "OSL", "model": "", "kind": ""}
_DEVICE_UNKNOWN = "device unknown"  # an import that does not say
#: What a load axis belongs to, where one report holds several.
_LOADS = {"batch_size": "offline batches", "concurrency": "closed loop", "rate_per_s": "open loop"}
_SHORT = {
    "batch_size": "batch",
    "concurrency": "concurrency",
    "rate_per_s": "rate",
    "tensor_parallel_size": "TP",
    "gpu": "",
    LOAD_UNKNOWN: "load",
}


@dataclass(frozen=True, slots=True)
class Placed:
    """A cell with its place: ``x`` along the load axis, ``line`` and ``panel`` by label."""

    summary: Summary
    x: float
    line: str
    color: int
    panel: str
    level: str  # name of the load axis
    beside: bool = False  # a simulated or imported cell among measured ones: drawn dashed, never the answer

    @property
    def x_text(self) -> str:
        """The load's level as text; an import may not know it."""
        return "unknown" if self.level == LOAD_UNKNOWN else f"{self.x:g}"


@dataclass(frozen=True, slots=True)
class Layout:
    """All cells placed. ``panels`` and ``lines`` in the order of the sweep."""

    placed: tuple[Placed, ...]
    panels: tuple[str, ...]
    lines: tuple[str, ...]
    level: str

    def level_of(self, panel: str) -> str:
        """The load axis of a panel: "batch_size", "concurrency", ..."""
        return next((p.level for p in self.placed if p.panel == panel), self.level)

    def x_title(self, panel: str) -> str:
        level = self.level_of(panel)
        return _LEVEL_TITLES.get(level, level)

    @property
    def level_word(self) -> str:
        """ "batch" or "concurrency", for sentences."""
        return _SHORT.get(self.level, self.level)

    @property
    def mixed(self) -> bool:
        """Whether measured cells stand beside others."""
        return any(p.beside for p in self.placed)

    @property
    def answering(self) -> tuple[Placed, ...]:
        """The cells that answers come from: the measured ones where there are any."""
        return tuple(p for p in self.placed if not p.beside)

    def of(self, panel: str, line: str) -> list[Placed]:
        """Cells of one line of one panel, by x."""
        return sorted((p for p in self.placed if p.panel == panel and p.line == line), key=lambda p: p.x)


def axis_title(name: str) -> str:
    """The heading of an axis in a table."""
    tail = axis_tail(name)
    return _TITLES.get(tail) or tail


def axis_tail(name: str) -> str:
    """'engine.args.tensor_parallel_size' and its short name alike: 'tensor_parallel_size'."""
    return axis_path(name)[-1]


def lay_out(summaries: Sequence[Summary]) -> Layout:
    """Place every cell. Axes that take one value alone are left out of labels."""
    varying = _varying(summaries)
    mixed = "measured" in {s.origin for s in summaries} and len({s.origin for s in summaries}) > 1
    levels = [s.facts.level or ("batch_size", 1.0) for s in summaries]
    several_devices = len({_device(s) for s in summaries}) > 1
    several_levels = len({name for name, _ in levels}) > 1
    placed = []
    lines: dict[str, None] = {}
    colors: dict[str, int] = {}
    panels: dict[str, None] = {}
    for s, (level, x) in zip(summaries, levels, strict=True):
        line = _line_label(s, mixed, _device(s) if several_devices else "")
        panel = _panel_label(s, varying, level if several_levels else "")
        beside = mixed and s.origin != "measured"
        # a prediction has the colour of what it predicts
        color = colors.setdefault(line.removesuffix(f" ({s.origin})"), len(colors))
        lines.setdefault(line)
        panels.setdefault(panel)
        placed.append(Placed(s, float(x), line, color, panel, level, beside))
    return Layout(tuple(placed), tuple(panels), tuple(lines), levels[0][0] if levels else "batch_size")


def _varying(summaries: Sequence[Summary]) -> set[str]:
    seen: dict[str, set[str]] = {}
    for s in summaries:
        for name, value in s.facts.axes.items():
            seen.setdefault(name, set()).add(repr(value))
    return {name for name, values in seen.items() if len(values) > 1}


def _device(s: Summary) -> str:
    """The device's catalogue name, or what it calls itself."""
    hardware = hardware_of(s.facts)
    if hardware is not None and hardware.kind == "gpu":
        return hardware.name
    names = s.facts.fingerprint_devices
    if names and names[0] != "cpu":
        return str(names[0])
    if s.origin == "imported":
        return str(s.facts.axes.get("gpu") or _DEVICE_UNKNOWN)
    return str(s.facts.fingerprint.get("cpu") or "CPU") if not s.facts.on_gpu else "GPU"


def _line_label(s: Summary, mixed: bool, device: str) -> str:
    parts = [device] if device else []
    if device != _DEVICE_UNKNOWN or s.facts.parallel_text != "GPUs unknown":
        parts.append(s.facts.parallel_text)
    if mixed and s.origin != "measured":
        parts.append(f"({s.origin})")
    return " ".join(parts)


def _panel_label(s: Summary, varying: set[str], level: str) -> str:
    level_name = (s.facts.level or ("", 0.0))[0]
    parts = [_LOADS.get(level, level)] if level else []
    for name, value in s.facts.axes.items():
        tail = axis_tail(name)
        if name in varying and tail not in (*_LINE_AXES, "load", level_name):
            parts.append(f"{_word(tail)} {value_text(value)}".strip())
    return ", ".join(parts)


def _word(tail: str) -> str:
    return _TITLES.get(tail, tail)


def value_text(value: Any) -> str:
    """An axis value for people: {'kind': 'uniform', ...} -> 'uniform 1-8'."""
    if isinstance(value, dict):
        rest = "-".join(str(v) for k, v in value.items() if k != "kind")
        return f"{value.get('kind', '')} {rest}".strip()
    return str(value)


def cell_label(p: Placed, panel: bool = True) -> str:
    """'TP 2, batch 32' with the panel's label where there are several panels."""
    text = f"{p.line}, {_SHORT.get(p.level, p.level)} {p.x_text}"
    return f"{text}, {p.panel}" if panel and p.panel else text
