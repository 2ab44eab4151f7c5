"""How cells are laid out in charts and tables: what runs along x, what tells lines apart, what makes panels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.analysis.efficiency import hardware_of
from bench.analysis.run_facts import LOAD_UNKNOWN, RunFacts
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
_HOST = "CPU"
_LENGTHS = ("isl", "osl")
NOT_SAID = object()  # a cell's value on an axis that its experiment has not; None is a value ("no quantization")
_DEVICE_UNKNOWN = "device unknown"  # an import that does not say
#: What a load axis belongs to, where one report holds several.
_LOADS = {"batch_size": "offline batches", "concurrency": "closed loop", "rate_per_s": "open loop"}
_LOAD_TEXTS = {
    "batch_size": "offline, batch {}",
    "concurrency": "closed loop, {} in flight",
    "rate_per_s": "open loop, {}/s",
}
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

    @property
    def load_text(self) -> str:
        """The kind of load with its level, for where several kinds stand together: "closed loop, 4 in flight"."""
        if self.level == LOAD_UNKNOWN:
            return self.x_text
        return _LOAD_TEXTS.get(self.level, self.level.replace("_", " ") + " {}").format(self.x_text)


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


def axis_value(facts: RunFacts, name: str) -> Any:
    """What a cell has on an axis: the swept value, else that of the experiment's fixed part, else NOT_SAID."""
    if name in facts.axes:
        return facts.axes[name]
    found: Any = facts.spec.model_dump(mode="json") if facts.spec is not None else NOT_SAID
    for key in axis_path(name):
        found = found.get(key, NOT_SAID) if isinstance(found, dict) else NOT_SAID
    if isinstance(found, dict):
        if axis_tail(name) not in _LENGTHS:
            return (
                NOT_SAID  # a whole section, such as the engine: it holds other axes, and is no value to tell cells by
            )
        return found["tokens"] if found.get("kind") == "fixed" else found
    return found


def varying_axes(cells: Sequence[RunFacts]) -> list[str]:
    """Axes on which the cells differ, in the order of the sweep. A cell that says nothing of an axis does not count."""
    names = list(dict.fromkeys(name for f in cells for name in f.axes))
    return [n for n in names if len({repr(v) for f in cells if (v := axis_value(f, n)) is not NOT_SAID}) > 1]


def differences(cells: Sequence[RunFacts]) -> list[list[str]]:
    """For each cell the axes that tell it from the others, but for its device, TP and load: ["ISL 384", "quantization fp8"]."""
    axes = varying_axes(cells)
    return [axis_texts(f, axes, (*_LINE_AXES, "load", *_LEVEL_TITLES)) for f in cells]


def level_text(level: tuple[str, float]) -> str:
    """ "batch 32", "concurrency 4"."""
    return f"{_SHORT.get(level[0], level[0])} {level[1]:g}"


def lay_out(summaries: Sequence[Summary]) -> Layout:
    """Place every cell. Axes that take one value alone are left out of labels."""
    varying = varying_axes([s.facts for s in summaries])
    mixed = "measured" in {s.origin for s in summaries} and len({s.origin for s in summaries}) > 1
    levels = [s.facts.level or ("batch_size", 1.0) for s in summaries]
    devices = _devices(summaries)
    several_devices = len(set(devices)) > 1
    several_levels = len({name for name, _ in levels}) > 1
    placed = []
    lines: dict[str, None] = {}
    colors: dict[str, int] = {}
    panels: dict[str, None] = {}
    for s, device, (level, x) in zip(summaries, devices, levels, strict=True):
        line = _line_label(s, mixed, device if several_devices else "")
        panel = _panel_label(s, varying, level if several_levels else "")
        beside = mixed and s.origin != "measured"
        # a prediction has the colour of what it predicts
        color = colors.setdefault(line.removesuffix(f" ({s.origin})"), len(colors))
        lines.setdefault(line)
        panels.setdefault(panel)
        placed.append(Placed(s, float(x), line, color, panel, level, beside))
    return Layout(tuple(placed), tuple(panels), tuple(lines), levels[0][0] if levels else "batch_size")


def _devices(summaries: Sequence[Summary]) -> list[str]:
    """The device of each cell. A simulated host CPU has no name of its own: it is the one measured beside it."""
    found = [_device(s) for s in summaries]
    hosts = {d for s, d in zip(summaries, found, strict=True) if s.origin == "measured" and not s.facts.on_gpu}
    host = hosts.pop() if len(hosts) == 1 else _HOST
    return [host if d == _HOST and s.origin == "simulated" else d for s, d in zip(summaries, found, strict=True)]


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
    return str(s.facts.fingerprint.get("cpu") or _HOST) if not s.facts.on_gpu else "GPU"


def _line_label(s: Summary, mixed: bool, device: str) -> str:
    parts = [device] if device else []
    if device != _DEVICE_UNKNOWN or s.facts.parallel_text != "GPUs unknown":
        parts.append(s.facts.parallel_text)
    if mixed:
        parts.append(f"({s.origin})")
    return " ".join(parts)


def _panel_label(s: Summary, varying: Sequence[str], level: str) -> str:
    level_name = (s.facts.level or ("", 0.0))[0]
    parts = [_LOADS.get(level, level)] if level else []
    return ", ".join([*parts, *axis_texts(s.facts, varying, (*_LINE_AXES, "load", level_name))])


def axis_texts(facts: RunFacts, names: Sequence[str], hidden: Sequence[str]) -> list[str]:
    """ "ISL 384" for each of the axes ``names`` that the cell has a value on; ``hidden`` are named elsewhere."""
    shown = [(axis_tail(n), axis_value(facts, n)) for n in names if axis_tail(n) not in hidden]
    return [f"{_TITLES.get(tail, tail)} {value_text(v)}".strip() for tail, v in shown if v is not NOT_SAID]


def value_text(value: Any) -> str:
    """An axis value for people: {'kind': 'uniform', ...} -> 'uniform 1-8'."""
    if isinstance(value, dict):
        rest = "-".join(str(v) for k, v in value.items() if k != "kind")
        return f"{value.get('kind', '')} {rest}".strip()
    return "none" if value is None else str(value)


def cell_label(p: Placed, panel: bool = True) -> str:
    """'TP 2, batch 32' with the panel's label where there are several panels."""
    text = f"{p.line}, {_SHORT.get(p.level, p.level)} {p.x_text}"
    return f"{text}, {p.panel}" if panel and p.panel else text
