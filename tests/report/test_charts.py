"""Pictures: sizes, that something is drawn, units on every axis, labels that do not overlap, layout helpers."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.charts import draw, nice_log_ticks, svg_text
from bench.report.figures import pareto_front
from bench.report.html import inline_svg
from bench.report.labels import spread
from bench.report.model import Axis, Chart, Line, Panel, Point
from bench.report.palette import PALETTE
from bench.report.write import ReportFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPECTED = {"throughput", "latency", "interactivity", "cost", "tp_scaling", "roofline", "timeline"}


def test_all_default_charts_are_there(files: ReportFiles) -> None:
    assert {c.name for c in files.report.charts} == EXPECTED
    assert {p.stem for p in files.charts} == EXPECTED
    assert {p.suffix for p in files.charts} == {".png", ".svg"}
    for chart in files.report.charts:
        assert chart.answer.endswith(".") and chart.title


def test_pictures_are_large_and_not_blank(files: ReportFiles) -> None:
    from matplotlib.image import imread

    for path in (p for p in files.charts if p.suffix == ".png"):
        image = imread(path)
        assert image.shape[0] >= 600 and image.shape[1] >= 1300, path.name
        ink = (image[..., :3].min(axis=-1) < 0.9).mean()
        assert 0.01 < ink < 0.5, (path.name, ink)
        colours = {tuple(np.round(np.array(c) * 255).astype(int)) for c in image[::3, ::3, :3].reshape(-1, 3)[::7]}
        assert len(colours) > 20, path.name


def test_every_axis_has_a_label_with_its_unit(files: ReportFiles) -> None:
    units = ("tokens/s", "(ms)", "(%)", "USD", "(GiB)", "(W)", "(requests)", "(min)", "(s)", "(1 / TPOT p50)")
    for chart in files.report.charts:
        panels = chart.timeline.panels if chart.timeline else chart.panels
        for panel in panels:
            for axis in (panel.x, panel.y):
                assert any(u in axis.label for u in units), axis.label


def shown_ticks(ax: Axes) -> list[Any]:
    """Tick labels within the limits: matplotlib keeps others around without drawing them."""
    out = []
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        out += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return out


def test_nothing_is_drawn_outside_the_picture(files: ReportFiles) -> None:
    for chart in files.report.charts:
        figure = draw(chart)
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        width, height = figure.get_size_inches() * figure.dpi
        for ax in figure.axes:
            for text in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *shown_ticks(ax)):
                if not text.get_text() or not text.get_visible():
                    continue
                box = text.get_window_extent(renderer)
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (
                    chart.name,
                    text.get_text(),
                )


@pytest.mark.parametrize("label", ["TP 1", "H200-SXM TP 1"])
def test_the_name_of_a_single_point_stays_in_the_picture(label: str) -> None:
    """A single cell lies at the right end of its axes, with its name beside it."""
    line = Line(label, (Point(200.0, 68.1, note="20", front=True),))
    panel = Panel("", Axis("Output tokens/s per user"), Axis("Output tokens/s"), (line,), "scatter")
    figure = draw(Chart("interactivity", "A chart", "An answer.", (panel,)))
    figure.canvas.draw()
    name = next(t for t in figure.axes[0].texts if t.get_text() == f"{label} · 20")
    assert name.get_window_extent(figure.canvas.get_renderer()).x1 <= figure.bbox.x1  # type: ignore[attr-defined]


def test_labels_do_not_overlap(files: ReportFiles) -> None:
    for chart in files.report.charts:
        figure = draw(chart)
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        for ax in figure.axes:
            boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in ax.texts if t.get_text()]
            for i, (a, box) in enumerate(boxes):
                for b, other in boxes[i + 1 :]:
                    # the extents hold a little air around the letters
                    assert not box.padded(-2).overlaps(other.padded(-2)), (chart.name, a, b)
            ticks = [t.get_window_extent(renderer) for t in ax.get_xticklabels() if t.get_text() and t.get_visible()]
            assert all(left.x1 <= right.x0 + 1 for left, right in pairwise(sorted(ticks, key=lambda t: t.x0))), (
                chart.name
            )


def test_colours_can_be_told_apart_and_are_not_red_against_green() -> None:
    assert len(set(PALETTE)) == len(PALETTE)
    assert "#000000" not in PALETTE  # would vanish in dark mode


def test_same_chart_same_bytes(files: ReportFiles) -> None:
    chart = files.report.charts[0]
    assert svg_text(draw(chart)) == svg_text(draw(chart))


def test_inline_svg_takes_its_colours_from_the_page(files: ReportFiles) -> None:
    text = inline_svg(svg_text(draw(files.report.charts[0])), "x")
    assert "var(--ink)" in text and "var(--series-0)" in text
    assert not re.search(r"#0072b2", text)
    assert text.startswith("<svg viewBox=") and "xlink" not in text


@pytest.mark.parametrize("kind", ["line", "scatter"])
@pytest.mark.parametrize("points", [1, 2, 12])
@pytest.mark.parametrize("lines", [1, 8])
def test_any_number_of_lines_and_points_can_be_drawn(kind: str, points: int, lines: int, tmp_path: Path) -> None:
    drawn = tuple(
        Line(
            f"TP {2**i}",
            tuple(Point(2.0**k, 10.0 * (k + 1) + i, 9.0, 13.0, str(2**k), k == 0) for k in range(points)),
            i,
        )
        for i in range(lines)
    )
    panel = Panel("", Axis("Batch size (requests)", "log2"), Axis("Output tokens/s"), drawn, kind)  # type: ignore[arg-type]
    assert "<svg" in svg_text(draw(Chart("x", "A chart", "An answer.", (panel,))))


def test_an_interval_that_reaches_zero_does_not_stretch_a_log_axis() -> None:
    points = (Point(1, 100.0, 0.0, 250.0), Point(2, 420.0, 400.0, 440.0))
    panel = Panel("", Axis("Batch size (requests)", "log2"), Axis("TTFT (ms)", "log"), (Line("TP 1", points),))
    figure = draw(Chart("x", "A chart", "An answer.", (panel,)))
    low, high = figure.axes[0].get_ylim()
    assert 20 < low < 100 and 440 < high < 700


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=12), st.floats(0.01, 0.2))
def test_spread_keeps_order_distance_and_bounds(wanted: list[float], gap: float) -> None:
    found = spread(wanted, gap, 0.0, 1.0)
    real = min(gap, 1.0 / max(1, len(wanted) - 1))
    assert all(-1e-9 <= y <= 1 + 1e-9 for y in found)
    ordered = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in pairwise(ordered):
        assert found[b] - found[a] >= real - 1e-9


def test_spread_leaves_free_labels_where_they_belong() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1, 0, 1) == [0.1, 0.5, 0.9]


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6))
def test_log_ticks_are_within_and_ascending(low: float, factor: float) -> None:
    ticks = nice_log_ticks(low, low * factor)
    assert ticks == sorted(ticks) and ticks
    assert all(low * 0.99 <= t <= low * factor * 1.01 for t in ticks)
    assert len(ticks) <= 14


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=30))
def test_pareto_front_is_exactly_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    on_front = {points[i] for i in front}

    def beaten(p: tuple[float, float]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    assert on_front == {p for p in points if not beaten(p)}
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_a_narrow_range_is_drawn_from_zero() -> None:
    panel = Panel(
        "",
        Axis("Batch size (requests)", "log2"),
        Axis("TPOT (ms)", "log"),
        (Line("TP 1", (Point(1, 5.0), Point(2, 5.4))),),
    )
    axes = draw(Chart("x", "A chart", "An answer.", (panel,))).axes[0]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
    assert sum(0 <= t <= axes.get_ylim()[1] for t in axes.get_yticks()) >= 4
