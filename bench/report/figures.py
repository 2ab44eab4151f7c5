"""The default charts as data: few of them, each with the one line that it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.analysis.stats import ratio_estimate
from bench.analysis.summary import Summary
from bench.decide.cost import TokenCost
from bench.records import Estimate
from bench.report.layout import Layout, Placed, cell_label
from bench.report.model import Axis, Chart, Line, Panel, Point
from bench.units import duration_text, significant, usd_text

MAX_PANELS = 6
Value = Callable[[Placed], Estimate | None]


def metric(key: str) -> Value:
    """The estimate of a metric of a placed cell."""
    return lambda p: p.summary.estimates.get(key)


def origin_label(summaries: Sequence[Summary]) -> str:
    """What stands on every picture and table: "" when all was measured."""
    origins = sorted({s.origin for s in summaries})
    if origins == ["measured"] or not origins:
        return ""
    if "measured" in origins:
        others = " and ".join(o for o in origins if o != "measured")
        return f"partly {others}"
    return " and ".join(origins) + ", not measured here"


def _lines(
    layout: Layout, panel: str, value: Value, factor: float = 1.0, suffix: str = "", dashed: bool = False
) -> list[Line]:
    out = []
    for name in layout.lines:
        cells = layout.of(panel, name)
        points = [_point(p.x, e, factor) for p in cells if (e := value(p)) is not None]
        if points:
            out.append(Line(f"{name}{suffix}", tuple(points), cells[0].color, dashed or cells[0].beside))
    return out


def _point(x: float, e: Estimate, factor: float, note: str = "") -> Point:
    low, high = (None if v is None else v * factor for v in (e.low, e.high))
    return Point(x, e.value * factor, low, high, note)


def _x_axis(layout: Layout, panel: str) -> Axis:
    xs = {p.x for p in layout.placed if p.panel == panel}
    wide = len(xs) > 2 and min(xs) > 0 and max(xs) / min(xs) >= 8
    doubling = layout.level_of(panel) in ("batch_size", "concurrency")
    return Axis(layout.x_title(panel), "log2" if wide or doubling else "linear")


def _panels(layout: Layout) -> tuple[str, ...]:
    return layout.panels[:MAX_PANELS]


def _grid(n: int, per_row: int = 2) -> tuple[int, int]:
    columns = min(n, per_row)
    return -(-n // columns), columns


def _omitted(layout: Layout) -> str:
    more = len(layout.panels) - MAX_PANELS
    return f" {more} more combinations are in the table." if more > 0 else ""


def _finish(name: str, title: str, answer: str, panels: list[Panel], layout: Layout, per_row: int = 2) -> Chart | None:
    panels = [p for p in panels if p.lines]
    if not panels:
        return None
    label = origin_label([p.summary for p in layout.placed])
    return Chart(name, title, answer + _omitted(layout), tuple(panels), _grid(len(panels), per_row), origin_label=label)


def best(layout: Layout, key: str, lowest: bool = False) -> Placed | None:
    """The cell with the highest (or lowest) value of a metric."""
    known = [p for p in layout.answering if key in p.summary.estimates]
    if not known:
        return None
    return (min if lowest else max)(known, key=lambda p: p.summary.estimates[key].value)


def throughput(layout: Layout) -> Chart | None:
    """Output tokens/s against batch size, a line for each TP."""
    top = best(layout, "output_tokens_per_s")
    if top is None:
        return None
    value = top.summary.estimates["output_tokens_per_s"].value
    answer = f"Highest: {significant(value)} output tokens/s with {cell_label(top)}.{_knee(layout, top)}"
    panels = [
        Panel(
            name,
            _x_axis(layout, name),
            Axis("Output tokens/s"),
            tuple(_lines(layout, name, metric("output_tokens_per_s"))),
        )
        for name in _panels(layout)
    ]
    return _finish("throughput", f"Throughput against {_load_word(layout)}", answer, panels, layout)


def _load_word(layout: Layout) -> str:
    """What runs along x, for titles: "batch size", or "load" where panels differ."""
    levels = {p.level for p in layout.placed}
    if len(levels) > 1:
        return "load"
    return {"batch_size": "batch size", "rate_per_s": "request rate"}.get(layout.level, layout.level_word)


def _knee(layout: Layout, top: Placed) -> str:
    """Where the top's line reaches nine tenths of its best: more load buys little beyond."""
    line = [p for p in layout.of(top.panel, top.line) if "output_tokens_per_s" in p.summary.estimates]
    limit = 0.9 * top.summary.estimates["output_tokens_per_s"].value
    first = next((p for p in line if p.summary.estimates["output_tokens_per_s"].value >= limit), top)
    if len(line) < 3 or first.x >= top.x:
        return ""
    return f" {layout.level_word.capitalize()} {first.x:g} already gives 90 % of that."


def latency(layout: Layout) -> Chart | None:
    """TTFT and TPOT (medians) against batch size."""
    panels = []
    for name in _panels(layout):
        for key, title in (("ttft_p50_s", "TTFT p50"), ("tpot_p50_s", "TPOT p50")):
            lines = tuple(_lines(layout, name, metric(key), 1e3))
            heading = f"{title}: {name}" if name else title
            panels.append(Panel(heading, _x_axis(layout, name), Axis(f"{title} (ms)", "log"), lines))
    low = best(layout, "tpot_p50_s", lowest=True)
    if low is None:
        low_ttft = best(layout, "ttft_p50_s", lowest=True)
        if low_ttft is None:
            return None
        answer = (
            f"Lowest TTFT: {duration_text(low_ttft.summary.estimates['ttft_p50_s'].value)} with {cell_label(low_ttft)}."
        )
    else:
        e = low.summary.estimates
        answer = f"Lowest: TPOT {duration_text(e['tpot_p50_s'].value)} (TTFT {duration_text(e['ttft_p50_s'].value)}) with {cell_label(low)}."
        line = [p for p in layout.of(low.panel, low.line) if "tpot_p50_s" in p.summary.estimates]
        if len(line) > 1 and line[-1].x != low.x:
            last = line[-1].summary.estimates
            answer += f" At {layout.level_word} {line[-1].x:g}: TPOT {duration_text(last['tpot_p50_s'].value)}, TTFT {duration_text(last['ttft_p50_s'].value)}."
    return _finish("latency", f"Latency against {_load_word(layout)}", answer, panels, layout)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats in both coordinates (higher is better), by ascending x."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    front, top = [], float("-inf")
    for i in order:
        if points[i][1] > top:
            front.append(i)
            top = points[i][1]
    return front[::-1]


def interactivity(layout: Layout) -> Chart | None:
    """Output tokens/s per GPU against tokens/s per user, with the Pareto front."""
    panels, size = [], 0
    on_gpu = any(p.summary.facts.on_gpu for p in layout.placed)
    for name in _panels(layout):
        both = {"output_tokens_per_s_per_user", "output_tokens_per_s_per_gpu"}  # an import may not know its GPUs
        cells = [p for p in layout.placed if p.panel == name and both <= set(p.summary.estimates)]
        cells.sort(key=lambda p: p.x)  # a line goes from load to load, in whatever order the sweep has them
        xy = [
            (
                p.summary.estimates["output_tokens_per_s_per_user"].value,
                p.summary.estimates["output_tokens_per_s_per_gpu"].value,
            )
            for p in cells
        ]
        answering = [i for i, p in enumerate(cells) if not p.beside]
        front = {answering[k] for k in pareto_front([xy[i] for i in answering])}
        size += len(front)
        lines = []
        for label in layout.lines:
            points = tuple(
                Point(xy[i][0], xy[i][1], p.summary.estimates["output_tokens_per_s_per_gpu"].low,
                      p.summary.estimates["output_tokens_per_s_per_gpu"].high, p.x_text, i in front)
                for i, p in enumerate(cells)
                if p.line == label
            )  # fmt: skip
            if points:
                first = next(p for p in cells if p.line == label)
                lines.append(Line(label, points, first.color, first.beside))
        y = Axis("Output tokens/s per GPU" if on_gpu else "Output tokens/s (whole host)")
        panels.append(Panel(name, Axis("Output tokens/s per user (1 / TPOT p50)"), y, tuple(lines), "scatter"))
    word = "per GPU" if on_gpu else "of the host"
    answer = (
        f"{size} of {len(layout.answering)} configurations are on the Pareto front (ringed): elsewhere another one gives users more "
        f"speed and more throughput {word} at once. Numbers beside the points: {_load_word(layout)}."
    )
    return _finish("interactivity", f"Throughput {word} against speed for each user", answer, panels, layout)


def tp_scaling(layout: Layout) -> Chart | None:
    """TP scaling efficiency against batch size, a line for each TP above the smallest."""
    panels = []
    found: list[tuple[float, str, float]] = []  # (efficiency in percent, line, x) at the highest load of each line
    y = Axis("TP scaling efficiency (%)")
    for name in _panels(layout):
        lines = scaling_lines(layout, name)
        found += [
            (line.points[-1].y, line.label, line.points[-1].x) for line in lines if not (layout.mixed and line.dashed)
        ]
        drawn = tuple(lines)
        panels.append(Panel(name, _x_axis(layout, name), y, drawn, reference=(100.0, "perfect scaling")))
    if not found:
        return None
    efficiency, label, x = min(found)
    answer = f"{label} reaches {efficiency:.0f} % of perfect scaling at {layout.level_word} {x:g}."
    if not any(p.summary.facts.on_gpu for p in layout.placed):
        answer += " The ranks share one host's cores here, so this says nothing about GPUs."
    return _finish("tp_scaling", "Tensor-parallel scaling", answer, panels, layout)


def scaling_lines(layout: Layout, panel: str) -> list[Line]:
    """Efficiency in percent for each TP above the smallest one, from the runs of both cells."""
    cells = [p for p in layout.placed if p.panel == panel and "output_tokens_per_s" in p.summary.estimates]
    sizes = sorted({p.summary.facts.tensor_parallel_size for p in cells})
    out = []
    for label in layout.lines:
        own = [c for c in cells if c.line == label]
        points = [_point(p.x, e, 100.0) for p in own if (e := scaling_of(p, cells, sizes[0])) is not None]
        if points:
            out.append(Line(label, tuple(sorted(points, key=lambda q: q.x)), own[0].color, own[0].beside))
    return out


def scaling_of(p: Placed, cells: Sequence[Placed], smallest: int) -> Estimate | None:
    """Efficiency of a cell against the one with the smallest TP at the same load: ratio of rates / ratio of TP."""
    tp = p.summary.facts.tensor_parallel_size
    if tp == smallest:
        return None
    same = p.line.replace(f"TP {tp}", f"TP {smallest}")  # same device, same origin
    base = [c for c in cells if c.x == p.x and c.line == same]
    if not base:
        return None
    ours, theirs = (
        [r.values["output_tokens_per_s"] for r in s.runs if "output_tokens_per_s" in r.values]
        for s in (p.summary, base[0].summary)
    )
    return ratio_estimate(ours, theirs).scaled(smallest / tp)


def cost(layout: Layout, full: dict[str, TokenCost], stated: dict[str, TokenCost]) -> Chart | None:
    """Cost per million output tokens against batch size, at full use and (dashed) at the stated utilisation."""
    key = "cost_usd_per_million_output_tokens"

    def at(costs: dict[str, TokenCost]) -> Value:
        return lambda p: costs[p.summary.key].estimates[key] if p.summary.key in costs else None

    priced = [p for p in layout.answering if p.summary.key in full]
    if not priced:
        return None
    low = min(priced, key=lambda p: full[p.summary.key].estimates[key].value)
    share = next(iter(stated.values())).utilisation if stated else 1.0
    both = share < 1 and not layout.mixed  # among predictions a dashed line would mean two things
    value, at_share = (c[low.summary.key].estimates[key].value for c in (full, stated or full))
    price = full[low.summary.key].price
    answer = (
        f"Cheapest: {usd_text(value)} per million output tokens with {cell_label(low)} at full use, {usd_text(at_share)} at "
        f"{share:.0%} utilisation{' (dashed)' if both else ''}; {usd_text(price.usd_per_hour)} per device-hour."
    )
    panels = []
    note = f"solid: at full use; dashed: at {share:.0%} utilisation" if both else "at full use"
    for name in _panels(layout):
        lines = _lines(layout, name, at(full))
        if both:
            lines += _lines(layout, name, at(stated), suffix=f" at {share:.0%}", dashed=True)
        panels.append(
            Panel(name, _x_axis(layout, name), Axis("USD per million output tokens", "log"), tuple(lines), note=note)
        )
    return _finish("cost", "Cost per million output tokens", answer, panels, layout)
