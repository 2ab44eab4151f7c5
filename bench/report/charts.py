"""Drawing charts with matplotlib: SVG for the page, SVG and PNG files beside it.

Colours are Okabe and Ito's (told apart with any colour vision), each with a marker of its own; lines carry their names
themselves, so there is no legend to look up. Greys are fixed so that the page can swap them in dark mode.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report.model import Axis, Chart, Line, Panel, Point, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, GRID = "#24292e", "#636c76", "#d8dee4"
PNG_DPI = 160
NARROW_RATIO = 3.0
#: More numbers than this beside the points of a scatter chart, and only the front keeps its own.
MAX_NOTES = 16
_STYLE: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "tokenyield",
    "figure.constrained_layout.use": True,
}


def draw(chart: Chart) -> Figure:
    """The chart as a matplotlib figure (Agg; no display is needed)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as _Figure

    with rc_context(_STYLE):
        rows, columns = (len(chart.timeline.panels), 1) if chart.timeline else chart.grid
        width = 9.2 if columns == 1 else 11.0
        height = 0.7 + rows * (2.0 if chart.timeline else 3.9 if columns == 1 else 3.5)
        figure = _Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(rows, columns, squeeze=False, sharex=chart.timeline is not None)
        _heading(figure, chart)
        if chart.timeline is not None:
            for i, panel in enumerate(chart.timeline.panels):
                _timeline_panel(axes[i][0], panel, chart.timeline.spans, first=i == 0, last=i == rows - 1)
        else:
            flat = list(axes.flat)
            for axis, panel in zip(flat, chart.panels, strict=False):
                _panel(axis, panel)
            for axis in flat[len(chart.panels) :]:
                axis.set_visible(False)
            _labels(figure, list(zip(flat, chart.panels, strict=False)))
        figure.canvas.draw()
        figure.set_layout_engine("none")  # keep the positions found: every file shows the same, and is written faster
    return figure


def _heading(figure: Figure, chart: Chart) -> None:
    figure.suptitle(chart.title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    if chart.origin_label:
        figure.text(
            0.985, 1 - 0.12 / figure.get_figheight(), chart.origin_label.upper(), ha="right", va="top", fontsize=9, fontweight="bold",
            color="white", bbox={"boxstyle": "round,pad=0.35", "facecolor": "#b3261e", "edgecolor": "none"},
        )  # fmt: skip


# --- axes --------------------------------------------------------------------------------------------------------


def nice_log_ticks(low: float, high: float) -> list[float]:
    """Ticks within [low, high] for a log axis: 1-2-5 steps over up to three decades, whole decades beyond.

    A range without any gets its two ends.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) <= 3.2 else (1,)
    ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside or [low, high]


def _tick_text(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1:
        return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:g}"
    return f"{value:.{max(0, -math.floor(math.log10(abs(value))) + 1)}f}".rstrip("0")


def _set_axis(ax: Axes, which: str, axis: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    target = ax.xaxis if which == "x" else ax.yaxis
    set_label = ax.set_xlabel if which == "x" else ax.set_ylabel
    set_label(axis.label)
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    formatter = FuncFormatter(lambda v, _: _tick_text(v))
    if axis.scale == "log2" and positive:
        (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=2)
        distinct = sorted(set(positive))
        target.set_major_locator(FixedLocator(distinct[:: -(-len(distinct) // 12)]))
        target.set_minor_locator(NullLocator())
    elif axis.scale == "log" and positive:
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        low, high = min(positive) / 1.25, max(positive) * 1.25
        (ax.set_xlim if which == "x" else ax.set_ylim)(low, high)
        target.set_major_locator(FixedLocator(nice_log_ticks(low, high)))
        target.set_minor_locator(NullLocator())
    else:
        top = max(positive, default=1.0)
        (ax.set_xlim if which == "x" else ax.set_ylim)(0, top * 1.08)
        target.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    target.set_major_formatter(formatter)


def _panel(ax: Axes, panel: Panel) -> None:
    if panel.title:
        ax.set_title(panel.title)
    points = [p for line in panel.lines for p in line.points]
    ys = [v for p in points for v in ((p.y,) if panel.kind == "scatter" else (p.y, p.low, p.high)) if v is not None]
    if panel.reference is not None:
        ys.append(panel.reference[0])
    if panel.y.scale == "log":  # an interval that reaches down to 0 must not stretch a log axis
        floor = min((p.y for p in points if p.y > 0), default=1.0) / 3
        ys = [v for v in ys if v > floor]
    positive = [v for v in ys if v > 0]
    if panel.y.scale == "log" and (not positive or max(positive) < NARROW_RATIO * min(positive)):
        # over less than half a decade a log axis has one tick and hides that hardly anything changes
        panel = replace(panel, y=replace(panel.y, scale="linear"))
    _set_axis(ax, "x", panel.x, [p.x for p in points])
    _set_axis(ax, "y", panel.y, ys)
    if panel.note:
        ax.text(0.99, 0.98, panel.note, transform=ax.transAxes, ha="right", va="top", fontsize=9, color=MUTED)
    if panel.reference is not None:
        ax.axhline(panel.reference[0], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    for line in panel.lines:
        if panel.kind == "scatter":
            _scatter_line(ax, line)
        else:
            _curve(ax, line, panel)
    if panel.kind == "scatter":
        _front(ax, panel)


def _curve(ax: Axes, line: Line, panel: Panel) -> None:
    color, marker = PALETTE[line.color % len(PALETTE)], MARKERS[line.color % len(MARKERS)]
    x, y = [p.x for p in line.points], [p.y for p in line.points]
    style = {"linestyle": (0, (3, 2)), "linewidth": 1.4, "marker": "", "alpha": 0.9} if line.dashed else {"marker": marker}
    if line.dashed and len(x) == 1:
        style = {"marker": marker, "linestyle": "none", "markerfacecolor": "none"}
    ax.plot(x, y, color=color, label=line.label, zorder=3, **style)  # type: ignore[arg-type]
    if line.dashed and len(x) > 1:
        return
    known = [p for p in line.points if p.low is not None and p.high is not None]
    if not known:
        return
    bottom = ax.get_ylim()[0] if panel.y.scale == "log" else 0.0
    low = [max(float(p.low or 0.0), bottom) for p in known]
    high = [float(p.high or 0.0) for p in known]
    ax.fill_between([p.x for p in known], low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
    down = [max(0.0, p.y - b) for p, b in zip(known, low, strict=True)]
    up = [max(0.0, h - p.y) for p, h in zip(known, high, strict=True)]
    ax.errorbar([p.x for p in known], [p.y for p in known], yerr=[down, up], fmt="none", ecolor=color, elinewidth=1.2, capsize=3, zorder=3)


def _scatter_line(ax: Axes, line: Line) -> None:
    color, marker = PALETTE[line.color % len(PALETTE)], MARKERS[line.color % len(MARKERS)]
    style: Any = (0, (3, 2)) if line.dashed else "-"
    fill: Any = {"markerfacecolor": "none"} if line.dashed else {}
    ax.plot([p.x for p in line.points], [p.y for p in line.points], color=color, linewidth=1.0, alpha=0.55, linestyle=style, zorder=2)
    for p in line.points:
        ax.plot(p.x, p.y, marker=marker, color=color, markersize=6.5, linestyle="none", zorder=4, clip_on=False, **fill)
        if p.front:
            ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.2}
            ax.plot(p.x, p.y, marker="o", linestyle="none", zorder=5, clip_on=False, **ring)  # type: ignore[arg-type]


def _front(ax: Axes, panel: Panel) -> None:
    front = sorted((p.x, p.y) for line in panel.lines for p in line.points if p.front)
    if len(front) > 1:
        ax.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)


# --- labels ------------------------------------------------------------------------------------------------------


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to ``wanted`` as possible, at least ``gap`` apart and within [low, high], in the same order.

    Labels are pushed apart in groups: a group sits at the mean of what its members wanted. Where they cannot all fit,
    the gap shrinks.
    """
    n = len(wanted)
    if n == 0:
        return []
    gap = min(gap, (high - low) / max(1, n - 1)) if n > 1 else gap
    order = sorted(range(n), key=lambda i: wanted[i])
    groups: list[tuple[list[int], float]] = []  # (members, position of the first)
    for i in order:
        members, first = [i], min(max(wanted[i], low), high)
        while groups and groups[-1][1] + len(groups[-1][0]) * gap > first:
            members = groups.pop()[0] + members
            centre = float(np.mean([wanted[k] - j * gap for j, k in enumerate(members)]))
            first = min(max(centre, low), high - (len(members) - 1) * gap)
        groups.append((members, first))
    out = [0.0] * n
    for members, first in groups:
        for j, k in enumerate(members):
            out[k] = first + j * gap
    return out


def _labels(figure: Figure, drawn: list[tuple[Axes, Panel]]) -> None:
    """Names at the right end of each line, and numbers beside scatter points, after the axes have their final scales."""
    for ax, panel in drawn:
        if panel.kind == "scatter":
            continue
        _end_labels(ax, panel)
    figure.canvas.draw()  # positions are final from here on; scatter notes are placed in pixels
    for ax, panel in drawn:
        if panel.kind == "scatter":
            _scatter_notes(figure, ax, panel)


def _end_labels(ax: Axes, panel: Panel) -> None:
    from matplotlib.transforms import ScaledTranslation

    named = [line for line in panel.lines if not (line.dashed and line.label.startswith(_solid_names(panel, line)))]
    ends = [(line.label, line.points[-1].y, PALETTE[line.color % len(PALETTE)]) for line in named]
    if panel.reference is not None:
        ends.append((panel.reference[1], panel.reference[0], MUTED))
    to_axes = ax.transData + ax.transAxes.inverted()
    beside = ax.transAxes + ScaledTranslation(11 / 72, 0, ax.figure.dpi_scale_trans)
    wanted = [float(to_axes.transform((1, y))[1]) for _, y, _ in ends]
    height = 13.0 / 72 / (3.0 if len(ends) else 1)  # a line of 10 pt text over the axes' height of about 3 inches
    for (label, _, color), y, at in zip(ends, spread(wanted, height, 0.0, 1.0), wanted, strict=True):
        moved = abs(y - at) > height / 4
        ax.annotate(
            label, xy=(1.0, at), xycoords="axes fraction", xytext=(1.0, y), textcoords=beside, va="center", ha="left",
            color=color, fontweight="bold" if color != MUTED else "normal", fontsize=9.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.6, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0} if moved else None,
        )  # fmt: skip


def _solid_names(panel: Panel, dashed: Line) -> tuple[str, ...]:
    """Labels that a dashed line merely varies ("TP 2 at 50%" of "TP 2"): it then needs no name of its own."""
    return tuple(f"{line.label} at " for line in panel.lines if line.color == dashed.color and not line.dashed)


def _scatter_notes(figure: Figure, ax: Axes, panel: Panel) -> None:
    """A number beside each point where there is room, front first; and the line's name beside its topmost free point."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    taken: list[Any] = []
    for line in panel.lines:
        for p in line.points:
            x, y = ax.transData.transform((p.x, p.y))
            r = (7.5 if p.front else 4.5) * pixels
            taken.append(Bbox([[x - r, y - r], [x + r, y + r]]))

    def put(text: str, p: Point, color: str, bold: bool, size: float, must: bool) -> None:
        for dx, dy in ((9, 5), (-9, 5), (9, -12), (-9, -12), (0, 10), (0, -18), (12, -3), (-12, -3)):
            t = ax.annotate(
                text, (p.x, p.y), xytext=(dx, dy), textcoords="offset points", fontsize=size, color=color, zorder=6,
                ha="left" if dx > 0 else "right" if dx < 0 else "center", fontweight="bold" if bold else "normal",
            )  # fmt: skip
            t.set_in_layout(False)
            box = t.get_window_extent(renderer)
            fits = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 30 * pixels and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 10 * pixels
            if fits and not any(box.overlaps(b) for b in taken):
                taken.append(box)
                return
            t.remove()
        if must:
            ax.annotate(text, (p.x, p.y), xytext=(9, 5), textcoords="offset points", fontsize=size, color=color, fontweight="bold")

    for line in panel.lines:
        if line.points:
            end = max(line.points, key=lambda p: p.y)
            put(f"{line.label} · {end.note}", end, PALETTE[line.color % len(PALETTE)], True, 9.5, True)
    named = [max(line.points, key=lambda p: p.y) for line in panel.lines if line.points]
    rest = [p for line in panel.lines for p in line.points if not any(p is n for n in named)]
    if len(rest) > MAX_NOTES:  # the front is what matters; numbers on every point would be a thicket
        rest = [p for p in rest if p.front]
    for p in sorted(rest, key=lambda p: not p.front):
        put(p.note, p, MUTED, False, 8.5, False)


# --- timeline ----------------------------------------------------------------------------------------------------


def _timeline_panel(ax: Axes, panel: Panel, spans: Sequence[Span], first: bool, last: bool) -> None:
    points = [p for line in panel.lines for p in line.points]
    _set_axis(ax, "y", panel.y, [p.y for p in points])
    for span in spans:
        ax.axvspan(span.start_s, span.end_s, color=PALETTE[span.color % len(PALETTE)], alpha=0.13, linewidth=0)
    for line in panel.lines:
        ax.plot([p.x for p in line.points], [p.y for p in line.points], color=PALETTE[line.color % len(PALETTE)], linewidth=1.1)
    ax.grid(axis="x", visible=False)
    ends = [e for s in spans for e in (s.start_s, s.end_s)] or [p.x for p in points]
    margin = 0.01 * (max(ends) - min(ends) or 1.0)
    ax.set_xlim(min(ends) - margin, max(ends) + margin)
    if last:
        ax.set_xlabel(panel.x.label)
    if first:
        _span_labels(ax, spans)
    if len(panel.lines) > 1:
        _end_labels(ax, panel)


def _span_labels(ax: Axes, spans: Sequence[Span]) -> None:
    """The label of each stretch of equally named runs above it, left out where it would run into the one before."""
    groups: list[list[Any]] = []
    for s in sorted(spans, key=lambda s: s.start_s):
        if groups and groups[-1][2] == s.label:
            groups[-1][1] = s.end_s
        else:
            groups.append([s.start_s, s.end_s, s.label, s.color])
    low, high = ax.get_xlim()
    free = -math.inf
    for start, end, label, color in groups:
        centre = (start + end) / 2
        half = 0.0062 * len(label) * (high - low)
        if centre - half < free:
            continue
        free = centre + half
        ax.annotate(label, (centre, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5,
                    fontweight="bold", color=PALETTE[color % len(PALETTE)], annotation_clip=False)  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------------


def svg_text(figure: Figure) -> str:
    """The figure as SVG text on white, the same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "TokenYield"}, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, svg: str, name: str, folder: Path) -> tuple[Path, Path]:
    """Write ``name``.png and ``name``.svg (the text ``svg``) and return their paths."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    png, vector = folder / f"{name}.png", folder / f"{name}.svg"
    with rc_context(_STYLE):
        figure.savefig(png, dpi=PNG_DPI, facecolor="white", metadata={"Software": "TokenYield"})
    vector.write_text(svg, encoding="utf-8")
    return png, vector
