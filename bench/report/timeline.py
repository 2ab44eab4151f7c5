"""Utilisation, memory and power over time, with the runs marked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np

from bench.analysis.summary import RunSummary
from bench.report.collect import Collected
from bench.report.figures import origin_label
from bench.report.layout import Layout, Placed
from bench.report.model import Axis, Chart, Line, Panel, Point, Span, Timeline
from bench.store import TELEMETRY, RunReader
from bench.telemetry.series import Series, series_from_table
from bench.telemetry.source import CPU_DEVICE
from bench.units import GIB, duration_text

MAX_POINTS = 1500
#: A pause longer than this between runs (another day, another engine) is cut out of the time axis.
MAX_PAUSE_S = 30.0
_COLUMNS = (
    ("gpu_util_ratio", 100.0, "Utilisation (%)"),
    ("memory_used_bytes", 1 / GIB, "Memory used (GiB)"),
    ("power_w", 1.0, "Power (W)"),
)


def timeline(data: Collected, layout: Layout) -> Chart | None:
    """The chart, or None without telemetry. Devices of one kind are averaged (utilisation) or summed (memory, power)."""
    runs = _runs_in_order(data, layout)
    if not runs:
        return None
    series: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {c: [] for c, _, _ in _COLUMNS}
    spans: list[Span] = []
    shift, end_before, cut = 0.0, None, False
    unit_s, unit = (60.0, "min") if runs[-1][3] - runs[0][3] > 180 else (1.0, "s")
    for placed, summary, reader, started in runs:
        table = reader.table(TELEMETRY)
        if table is None or not table.num_rows or summary.window is None:
            continue
        devices = _held(series_from_table(table), placed)
        if not devices:
            continue
        if end_before is None:
            shift = started
        elif started - shift > end_before + MAX_PAUSE_S:
            shift += started - shift - end_before - MAX_PAUSE_S
            cut = True
        begin = started - shift
        for column, _, _ in _COLUMNS:
            found = _together(devices, column)
            if found is not None:
                series[column].append((found[0] + begin, found[1]))
        w = summary.window
        spans.append(Span((begin + w.start_s) / unit_s, (begin + w.end_s) / unit_s, placed.line, placed.color))
        end_before = begin + float(max(s.t_s[-1] for s in devices))
    if not spans or not any(series.values()):
        return None
    x = Axis(f"Time since the first run ({unit}{', longer pauses cut out' if cut else ''})")
    panels = tuple(
        Panel("", x, Axis(title), (Line("", _points(series[c], factor, unit_s), 6),))
        for c, factor, title in _COLUMNS
        if series[c]
    )
    busy = sum(s.end_s - s.start_s for s in spans) * unit_s
    missing = [title.split(" (")[0].lower() for c, _, title in _COLUMNS if not series[c]]
    answer = f"{len(spans)} runs, {duration_text(busy)} of counted time (shaded, coloured by TP)."
    answer += f" Not readable here: {', '.join(missing)}." if missing else ""
    if any(not p.summary.facts.on_gpu for p, _, _, _ in runs):
        answer += " Utilisation and memory are the whole host's."
    label = origin_label([p.summary for p in layout.placed])
    words = [title.split(" (")[0].lower() for c, _, title in _COLUMNS if series[c]]
    heading = (", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]).capitalize() + " over time"
    return Chart("timeline", heading, answer, timeline=Timeline(panels, tuple(spans)), origin_label=label)


def _runs_in_order(data: Collected, layout: Layout) -> list[tuple[Placed, RunSummary, RunReader, float]]:
    out = []
    for placed in layout.placed:
        readers = {r.folder.name: r for r in data.runs.get(placed.summary.key, ())}
        for summary in placed.summary.runs:
            started = _unix_s(summary.started_utc)
            if summary.run in readers and started is not None:
                out.append((placed, summary, readers[summary.run], started))
    return sorted(out, key=lambda r: r[3])


def _unix_s(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _held(series: dict[str, Series], placed: Placed) -> list[Series]:
    names = placed.summary.facts.device_names
    found = [series[n] for n in names if n in series]
    return found or [s for d, s in series.items() if names == () or d == CPU_DEVICE][:1]


def _together(devices: Sequence[Series], column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(times, values) over devices on the first one's clock: mean for ratios, sum for the rest; None if one lacks it."""
    parts = [d.readings(column) for d in devices]
    if any(len(t) < 2 for t, _ in parts):
        return None
    times = parts[0][0]
    stacked = np.array([np.interp(times, t, v) for t, v in parts])
    return times, stacked.mean(axis=0) if column.endswith("_ratio") else stacked.sum(axis=0)


def _points(pieces: list[tuple[np.ndarray, np.ndarray]], factor: float, unit_s: float) -> tuple[Point, ...]:
    """At most MAX_POINTS points; a NaN between runs breaks the line."""
    share = max(1, -(-sum(len(t) for t, _ in pieces) // MAX_POINTS))
    out: list[Point] = []
    for times, values in sorted(pieces, key=lambda p: float(p[0][0])):
        n = len(times) // share * share
        if n:
            t = times[:n].reshape(-1, share).mean(axis=1)
            v = values[:n].reshape(-1, share).mean(axis=1)
            out += [Point(float(a) / unit_s, float(b) * factor) for a, b in zip(t, v, strict=True)]
        out.append(Point(float(times[-1]) / unit_s, float("nan")))
    return tuple(out)
