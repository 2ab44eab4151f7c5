"""Names and numbers inside pictures: placed so that they neither overlap nor leave the frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report.model import Line, Panel, Point, Span
from bench.report.palette import MUTED, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More numbers than this beside the points of a scatter chart, and only the front keeps its own.
MAX_NOTES = 16


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


def place_labels(figure: Figure, drawn: list[tuple[Axes, Panel]]) -> None:
    """Names at the right end of each line, and numbers beside scatter points, after the axes have their final scales."""
    for ax, panel in drawn:
        if panel.kind == "scatter":
            continue
        end_labels(ax, panel)
    figure.canvas.draw()  # positions are final from here on; scatter notes are placed in pixels
    for ax, panel in drawn:
        if panel.kind == "scatter":
            _scatter_notes(figure, ax, panel)


def end_labels(ax: Axes, panel: Panel) -> None:
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


#: Offsets in points at which a text beside a point is tried, the best first.
_PLACES = ((9, 5), (-9, 5), (9, -12), (-9, -12), (0, 10), (0, -18), (12, -3), (-12, -3))


def put_beside(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    frame: Any,
    taken: list[Any],
    places: Sequence[tuple[float, float]] = _PLACES,
    **look: Any,
) -> bool:
    """Write ``text`` beside a point where it overlaps nothing; False, and nothing written, where there is no such place.

    ``frame`` and ``taken`` are boxes in pixels: what the text must stay within, and what it must keep off; its own box is
    added to ``taken``. The axes' positions must be final.
    """
    renderer = ax.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for dx, dy in places:
        t = ax.annotate(
            text, at, xytext=(dx, dy), textcoords="offset points", zorder=6,
            ha="left" if dx > 0 else "right" if dx < 0 else "center", **look,
        )  # fmt: skip
        t.set_in_layout(False)
        box = t.get_window_extent(renderer)
        fits = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if fits and not any(box.overlaps(b) for b in taken):
            taken.append(box)
            return True
        t.remove()
    return False


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

    # a little beyond the frame, but never over the picture's edge, where a name would be cut off
    right = min(frame.x1 + 30 * pixels, figure.bbox.x1 - pixels)
    wide = Bbox([[frame.x0, frame.y0], [right, frame.y1 + 10 * pixels]])

    def put(text: str, p: Point, color: str, bold: bool, size: float, must: bool) -> None:
        look: dict[str, Any] = {"fontsize": size, "color": color, "fontweight": "bold" if bold else "normal"}
        if not put_beside(ax, text, (p.x, p.y), wide, taken, **look) and must:
            ax.annotate(text, (p.x, p.y), xytext=(9, 5), textcoords="offset points", **{**look, "fontweight": "bold"})

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


def span_labels(ax: Axes, spans: Sequence[Span]) -> None:
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
