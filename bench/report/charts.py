"""Drawing charts with matplotlib: SVG for the page, SVG and PNG files beside it.

Colours are Okabe and Ito's (told apart with any colour vision), each with a marker of its own; lines carry their names
themselves, so there is no legend to look up. Greys are fixed so that the page can swap them in dark mode.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report.labels import end_labels, place_labels, span_labels
from bench.report.model import Axis, Chart, Line, Panel, Span
from bench.report.palette import GRID, INK, MARKERS, MUTED, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_DPI = 160
NARROW_RATIO = 3.0
STYLE: Any = {
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

    with rc_context(STYLE):
        rows, columns = (len(chart.timeline.panels), 1) if chart.timeline else chart.grid
        width = 9.2 if columns == 1 else 11.0
        height = 0.7 + rows * (2.0 if chart.timeline else 5.2 if chart.roofline else 3.9 if columns == 1 else 3.5)
        figure = _Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(rows, columns, squeeze=False, sharex=chart.timeline is not None)
        heading(figure, chart)
        if chart.timeline is not None:
            for i, panel in enumerate(chart.timeline.panels):
                _timeline_panel(axes[i][0], panel, chart.timeline.spans, first=i == 0, last=i == rows - 1)
        elif chart.roofline is not None:
            from bench.report.roofline_picture import draw_on

            draw_on(axes[0][0], chart.roofline)
        else:
            flat = list(axes.flat)
            for axis, panel in zip(flat, chart.panels, strict=False):
                _panel(axis, panel)
            for axis in flat[len(chart.panels) :]:
                axis.set_visible(False)
            place_labels(figure, list(zip(flat, chart.panels, strict=False)))
        figure.canvas.draw()
        figure.set_layout_engine("none")  # keep the positions found: every file shows the same, and is written faster
    return figure


def heading(figure: Figure, chart: Chart) -> None:
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


def set_axis(ax: Axes, which: str, axis: Axis, values: Sequence[float]) -> None:
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
        ax.set_title(textwrap.fill(panel.title, 48))  # panels stand side by side: a long title would run into the next
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
    set_axis(ax, "x", panel.x, [p.x for p in points])
    set_axis(ax, "y", panel.y, ys)
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
    style = (
        {"linestyle": (0, (3, 2)), "linewidth": 1.4, "marker": "", "alpha": 0.9} if line.dashed else {"marker": marker}
    )
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
    ax.errorbar(
        [p.x for p in known],
        [p.y for p in known],
        yerr=[down, up],
        fmt="none",
        ecolor=color,
        elinewidth=1.2,
        capsize=3,
        zorder=3,
    )


def _scatter_line(ax: Axes, line: Line) -> None:
    color, marker = PALETTE[line.color % len(PALETTE)], MARKERS[line.color % len(MARKERS)]
    style: Any = (0, (3, 2)) if line.dashed else "-"
    fill: Any = {"markerfacecolor": "none"} if line.dashed else {}
    ax.plot(
        [p.x for p in line.points],
        [p.y for p in line.points],
        color=color,
        linewidth=1.0,
        alpha=0.55,
        linestyle=style,
        zorder=2,
    )
    for p in line.points:
        ax.plot(p.x, p.y, marker=marker, color=color, markersize=6.5, linestyle="none", zorder=4, clip_on=False, **fill)
        if p.front:
            ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.2}
            ax.plot(p.x, p.y, marker="o", linestyle="none", zorder=5, clip_on=False, **ring)  # type: ignore[arg-type]


def _front(ax: Axes, panel: Panel) -> None:
    front = sorted((p.x, p.y) for line in panel.lines for p in line.points if p.front)
    if len(front) > 1:
        ax.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)


# --- timeline ----------------------------------------------------------------------------------------------------


def _timeline_panel(ax: Axes, panel: Panel, spans: Sequence[Span], first: bool, last: bool) -> None:
    points = [p for line in panel.lines for p in line.points]
    set_axis(ax, "y", panel.y, [p.y for p in points])
    for span in spans:
        ax.axvspan(span.start_s, span.end_s, color=PALETTE[span.color % len(PALETTE)], alpha=0.13, linewidth=0)
    for line in panel.lines:
        ax.plot(
            [p.x for p in line.points],
            [p.y for p in line.points],
            color=PALETTE[line.color % len(PALETTE)],
            linewidth=1.1,
        )
    ax.grid(axis="x", visible=False)
    ends = [e for s in spans for e in (s.start_s, s.end_s)] or [p.x for p in points]
    margin = 0.01 * (max(ends) - min(ends) or 1.0)
    ax.set_xlim(min(ends) - margin, max(ends) + margin)
    if last:
        ax.set_xlabel(panel.x.label)
    if first:
        span_labels(ax, spans)
    if len(panel.lines) > 1:
        end_labels(ax, panel)


# --- files -------------------------------------------------------------------------------------------------------


def svg_text(figure: Figure) -> str:
    """The figure as SVG text on white, the same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "TokenYield"}, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, svg: str, name: str, folder: Path) -> tuple[Path, Path]:
    """Write ``name``.png and ``name``.svg (the text ``svg``) and return their paths."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    png, vector = folder / f"{name}.png", folder / f"{name}.svg"
    with rc_context(STYLE):
        figure.savefig(png, dpi=PNG_DPI, facecolor="white", metadata={"Software": "TokenYield"})
    vector.write_text(svg, encoding="utf-8")
    return png, vector
