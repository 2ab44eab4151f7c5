"""A report as pure data: what the writers (Markdown, HTML) print and the charts draw. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bench.analysis.metrics import MetricDef
from bench.records import Estimate, Warning_

if TYPE_CHECKING:
    from bench.report.roofline_picture import RooflineData


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a line with its interval (None: no interval). ``note`` is printed beside it in scatter charts."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    front: bool = False  # on the Pareto front


@dataclass(frozen=True, slots=True)
class Line:
    """Points that belong together. ``color`` is a position in the palette, the same for one label in all charts."""

    label: str
    points: tuple[Point, ...]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """``label`` carries the unit. ``scale``: linear starts at 0."""

    label: str
    scale: Literal["linear", "log", "log2"] = "linear"


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes of a chart."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    kind: Literal["line", "scatter"] = "line"
    reference: tuple[float, str] | None = None  # a horizontal line and its label
    note: str = ""  # printed in the upper right corner


@dataclass(frozen=True, slots=True)
class Span:
    """A run on the time axis."""

    start_s: float
    end_s: float
    label: str
    color: int = 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """Device readings over time: panels that share their x axis, with the runs marked."""

    panels: tuple[Panel, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture. ``answer`` is the one line that it says; ``grid`` is (rows, columns) of its panels."""

    name: str
    title: str
    answer: str
    panels: tuple[Panel, ...] = ()
    grid: tuple[int, int] = (1, 1)
    timeline: Timeline | None = None
    origin_label: str = ""  # "" when everything in it was measured
    roofline: RooflineData | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column; numbers are right-aligned and sort by value."""

    title: str
    unit: str = ""
    numeric: bool = True
    help: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """A table's cell: what is printed, and what it sorts by."""

    text: str
    sort: float | str = ""
    detail: str = ""  # interval, or why it is n/a


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Field, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, answered in a sentence."""

    question: str
    headline: str  # the configuration
    figure: str  # the number with its unit
    sentence: str
    caveat: str = ""
    workload: str = ""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A warning and the cells it holds for."""

    warning: Warning_
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A run without result, or cells without result for the same reason."""

    cells: tuple[str, ...]
    what: str  # failed, missing, skipped, refused
    reason: str
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a report says."""

    title: str
    why: str
    created_utc: str
    state: str  # how complete it is, in words
    origin_label: str
    answers: tuple[Answer, ...]
    keep_in_mind: tuple[str, ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    doubts: tuple[Doubt, ...]
    failures: tuple[Failure, ...]
    definitions: tuple[MetricDef, ...]
    statements: tuple[tuple[str, str], ...]  # methods: percentile, interval, window, price, split rule
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # section -> (name, value)
    configuration: str = ""  # the resolved experiment, as text
    version: str = ""
    missing_charts: tuple[tuple[str, str], ...] = field(default=())  # title -> why it is not there
    setup: str = ""  # model, engine and device in one line
    derived: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # Summary.key -> metric -> cost, TP scaling
    intervals: str = "95 % intervals over repeats"  # what bands, whiskers and small print are
