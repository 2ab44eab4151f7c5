"""The pictures of decision pages: staircases against lines, cost bars, cost against utilisation and speed, fleets.

They share style, palette and label placing with the other reports (``charts``, ``labels``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.decide.decision import Compared, ResolvedOption
from bench.decide.fleet import Rival
from bench.decide.options import SelfHost
from bench.decide.plan import Plan, SizedFleet
from bench.report.charts import STYLE, heading, set_axis
from bench.report.decision_text import volume_text
from bench.report.labels import end_labels
from bench.report.model import Axis, Chart, Line, Panel, Point
from bench.report.palette import INK, MARKERS, MUTED, PALETTE
from bench.units import significant, usd_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_API_DASH: Any = (0, (4, 2))


def _picture(chart: Chart, draw: Callable[[Axes], None], height: float = 5.0) -> Figure:
    """One set of axes with the heading of ``chart``, drawn by ``draw``, positions final."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as _Figure

    with rc_context(STYLE):
        figure = _Figure(figsize=(9.2, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots()
        heading(figure, chart)
        draw(axes)
        figure.canvas.draw()
        figure.set_layout_engine("none")
    return figure


def _color(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def volume_range(compared: Compared) -> tuple[float, float]:
    """Tokens a month that the charts span: the volumes asked for and every crossing, half a decade around."""
    seen = list(compared.volumes)
    for p in compared.pairs:
        seen += [v for v in (p.crossing.first_tokens, p.crossing.always_tokens) if v]
    return min(seen) / 3, max(seen) * 3


def stair_volumes(option: SelfHost, low: float, high: float, num: int = 160) -> list[float]:
    """Volumes at which ``option`` is drawn: evenly in the logarithm, and both sides of its stairs (the first 60)."""
    volumes = list(np.geomspace(low, high, num))
    if option.billing == "around_clock":
        k = option.capacity_tokens_per_month
        first = max(option.min_replicas, int(low / k))
        volumes += [k * n * f for n in range(first, first + 60) for f in (1.0, 1 + 1e-9) if low <= k * n * f <= high]
    return sorted(volumes)


def break_even(compared: Compared, chart: Chart) -> Figure:
    """Dollars per month against tokens per month, log-log."""
    low, high = volume_range(compared)
    lines = []
    paint = colors(compared)
    for o, i in zip(compared.options, paint, strict=False):
        points = tuple(Point(v, o.option.monthly_usd(v)) for v in stair_volumes(o.option, low, high))
        lines.append(Line(o.option.name, points, i))
    for j, a in enumerate(compared.apis):
        points = tuple(Point(v, a.monthly_usd(v, compared.mix)) for v in (low, high))
        lines.append(Line(a.name, points, paint[len(compared.options) + j], dashed=True))
    panel = Panel("", Axis("Tokens per month (input and output)", "log"), Axis("USD per month", "log"), tuple(lines))

    def draw(ax: Axes) -> None:
        _log_axes(ax, panel)
        by_hour = {o.option.name for o in compared.options if o.option.billing == "by_hour"}
        for line in lines:
            width = 1.3 if line.label in by_hour else 2.4
            style = {"linestyle": _API_DASH, "linewidth": 1.5} if line.dashed else {"linewidth": width}
            ax.plot([p.x for p in line.points], [p.y for p in line.points], color=_color(line.color), zorder=3, **style)  # type: ignore[arg-type]
        _price_bands(ax, compared, paint, (low, high))
        for v in compared.volumes:
            ax.axvline(v, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
            ax.annotate(
                volume_text(v), (v, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5, color=MUTED
            )  # fmt: skip
        for p in compared.pairs:
            if p.first is None or not p.first.value:
                continue
            y = p.option.monthly_usd(p.first.value)
            if p.first.low is not None:
                end = p.first.high if p.first.high is not None else high
                ax.plot([max(low, p.first.low), end], [y, y], color=INK, linewidth=1.3, zorder=5)
            ax.plot(p.first.value, y, marker="o", markersize=7, markerfacecolor="white", markeredgecolor=INK, zorder=6)
        end_labels(ax, panel)

    return _picture(chart, draw, 5.6)


def _price_bands(ax: Axes, compared: Compared, paint: Sequence[int], span: tuple[float, float]) -> None:
    """Shade what each option costs between the cheapest and the dearest known GPU-hour."""
    for o, i in zip(compared.options, paint, strict=False):
        if (band := o.price.band) is None:
            continue
        at = stair_volumes(o.option, *span)
        ends = [
            [replace(o.option, usd_per_gpu_hour=usd).monthly_usd(v) for v in at]
            for usd in (band.low_usd, band.high_usd)
        ]
        ax.fill_between(at, ends[0], ends[1], color=_color(i), alpha=0.13, linewidth=0, zorder=2)


def _log_axes(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter

    points = [p for line in panel.lines for p in line.points]
    set_axis(ax, "x", panel.x, [p.x for p in points])
    set_axis(ax, "y", panel.y, [p.y for p in points])
    if panel.x.scale == "log":
        ax.set_xlim(min(p.x for p in points), max(p.x for p in points))
    if panel.x.label.startswith("Tokens per month"):
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: volume_text(v).replace(".00", "").replace(".0", "")))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"${v:,.10g}"))


def bars(compared: Compared, chart: Chart) -> Figure:
    """Dollars per million tokens: every option at full use with its interval, every API."""
    rows: list[tuple[str, float, float | None, float | None, str, bool]] = []
    for i, o in enumerate(distinct(compared.options)):
        s = o.option
        value = full_use(s)
        rate = s.tokens_per_s
        high = full_use(s.at_rate(rate.low)) if rate.low else None
        low = full_use(s.at_rate(rate.high)) if rate.high else None
        label = f"{config_name(s)}\n{significant(rate.value)} tokens/s, {s.origin}"
        rows.append((label, value, low, high, _color(i), False))
    rows += [(a.name, a.usd_per_token(compared.mix) * 1e6, None, None, MUTED, True) for a in compared.apis]
    rows.sort(key=lambda r: -r[1])

    def draw(ax: Axes) -> None:
        at = range(len(rows))
        for y, (_, value, low, high, color, is_api) in zip(at, rows, strict=True):
            ax.barh(y, value, color=color, height=0.62, alpha=0.55 if is_api else 0.95, zorder=3)
            end = value
            if low is not None and high is not None:
                ax.errorbar(
                    value, y, xerr=[[value - low], [high - value]], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=4
                )  # fmt: skip
                end = high
            ax.annotate(
                usd_text(value), (end, y), xytext=(6, 0), textcoords="offset points", va="center", fontweight="bold", fontsize=9.5
            )  # fmt: skip
        ax.set_yticks(list(at), [r[0] for r in rows], fontsize=9)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("USD per million tokens (input and output)")
        ax.set_xlim(0, 1.15 * max((r[3] or r[1]) for r in rows))
        ax.xaxis.set_major_formatter(lambda v, _: f"${v:,.10g}")

    return _picture(chart, draw, 1.5 + 0.5 * len(rows))


def distinct(options: Sequence[ResolvedOption]) -> list[ResolvedOption]:
    """Options that differ in more than how they are billed: one for each GPU, price and throughput."""
    seen: dict[tuple[Any, ...], ResolvedOption] = {}
    for o in options:
        s = o.option
        seen.setdefault((s.gpu, s.num_gpus, s.usd_per_gpu_hour, s.tokens_per_s.value), o)
    return list(seen.values())


def colors(compared: Compared) -> list[int]:
    """A position in the palette for every option, then for every API: options that differ in billing alone share one."""
    keys = [(s.gpu, s.num_gpus, s.usd_per_gpu_hour, s.tokens_per_s.value) for s in (o.option for o in compared.options)]
    known = list(dict.fromkeys(keys))
    return [known.index(k) for k in keys] + [len(known) + j for j in range(len(compared.apis))]


def config_name(s: SelfHost) -> str:
    return f"{s.num_gpus}×{s.gpu} at ${s.usd_per_replica_hour:.3g}/h"


def full_use(s: SelfHost) -> float:
    """$/hour / 3600 / tokens/s x 10^6."""
    return s.usd_per_replica_hour / 3600 / s.tokens_per_s.value * 1e6


def utilisation(compared: Compared, chart: Chart) -> Figure:
    """Dollars per million tokens against the share of paid time that is used; an API's price does not depend on it."""
    shares = np.geomspace(0.01, 1.0, 60)
    lines = []
    options = distinct(compared.options)
    for i, o in enumerate(options):
        points = tuple(Point(100 * float(u), full_use(o.option) / float(u)) for u in shares)
        lines.append(Line(config_name(o.option), points, i))
    for j, a in enumerate(compared.apis):
        y = a.usd_per_token(compared.mix) * 1e6
        lines.append(Line(a.name, (Point(1.0, y), Point(100.0, y)), len(options) + j, dashed=True))
    panel = Panel(
        "", Axis("Utilisation of the paid time (%)", "log"), Axis("USD per million tokens", "log"), tuple(lines)
    )

    def draw(ax: Axes) -> None:
        _log_axes(ax, panel)
        for line in lines:
            style = {"linestyle": _API_DASH, "linewidth": 1.5} if line.dashed else {"linewidth": 2.2}
            ax.plot([p.x for p in line.points], [p.y for p in line.points], color=_color(line.color), zorder=3, **style)  # type: ignore[arg-type]
        end_labels(ax, panel)

    return _picture(chart, draw)


def speed(compared: Compared, chart: Chart) -> Figure:
    """Dollars per million tokens against tokens/s per user, a curve for each option that has one."""
    curved = [o for o in distinct(compared.options) if o.rate.curve is not None]
    panel_lines, lines = [], []
    paint = colors(compared)
    apis_from = paint[len(compared.options)]
    for o in curved:
        assert o.rate.curve is not None
        i = paint[compared.options.index(o)]
        usd = o.option.usd_per_replica_hour / 3600 * 1e6
        lines.append((o, [(p, usd / p.total_tokens_per_s.value) for p in o.rate.curve.points], i))
    every = [(p, y) for _, found, _ in lines for p, y in found]

    def draw(ax: Axes) -> None:
        xs = [p.output_tokens_per_s_per_user for p, _ in every]
        apis = [a.usd_per_token(compared.mix) * 1e6 for a in compared.apis]
        set_axis(ax, "x", Axis("Tokens/s per user (1 / TPOT)"), xs)
        set_axis(ax, "y", Axis("USD per million tokens", "log"), [y for _, y in every] + apis)
        ax.yaxis.set_major_formatter(lambda v, _: f"${v:,.10g}")
        for o, found, i in lines:
            x, y = [p.output_tokens_per_s_per_user for p, _ in found], [y for _, y in found]
            hollow = (
                {"markerfacecolor": "white"} if o.rate.curve is not None and o.rate.curve.origin != "measured" else {}
            )
            ax.plot(x, y, color=_color(i), marker=MARKERS[i % len(MARKERS)], linewidth=1.6, zorder=4, **hollow)  # type: ignore[arg-type]
            low = [
                v * p.total_tokens_per_s.value / (p.total_tokens_per_s.high or p.total_tokens_per_s.value)
                for p, v in found
            ]
            high = [
                v * p.total_tokens_per_s.value / (p.total_tokens_per_s.low or p.total_tokens_per_s.value)
                for p, v in found
            ]
            ax.fill_between(x, low, high, color=_color(i), alpha=0.13, linewidth=0, zorder=2)
            for k, (p, v) in enumerate(found):
                if k % 2 == 0 or k == len(found) - 1:
                    ax.annotate(
                        f"{p.concurrency:g}", (p.output_tokens_per_s_per_user, v), xytext=(6, 5), textcoords="offset points",
                        fontsize=8, color=MUTED, zorder=5,
                    )  # fmt: skip
            label = config_name(o.option) + (
                f", {o.rate.curve.model}" if o.rate.curve is not None and o.rate.curve.model else ""
            )
            top = max(found, key=lambda f: f[1])
            left = top[0].output_tokens_per_s_per_user < 0.4 * max(xs)
            ax.annotate(
                label, (top[0].output_tokens_per_s_per_user, top[1]), xytext=(16 if left else -6, -12 if left else 10),
                textcoords="offset points", ha="left" if left else "right", color=_color(i), fontweight="bold", fontsize=9, zorder=6,
            )  # fmt: skip
        for j, (a, price) in enumerate(zip(compared.apis, apis, strict=True)):
            ax.axhline(price, color=_color(apis_from + j), linewidth=1.3, linestyle=_API_DASH, zorder=1)
            panel_lines.append(Line(a.name, (Point(0, price),), apis_from + j, dashed=True))
        end_labels(ax, Panel("", Axis(""), Axis("", "log"), tuple(panel_lines)))

    return _picture(chart, draw, 5.4)


# --- plans -------------------------------------------------------------------------------------------------------


def fleets(plan: Plan, chart: Chart) -> Figure:
    """Dollars per month of each fleet, up around the clock and autoscaled."""
    rows = list(plan.fleets)[::-1]

    def draw(ax: Axes) -> None:
        for y, f in enumerate(rows):
            color = _color(0) if f is plan.fleets[0] else MUTED
            ax.barh(y + 0.19, f.cost.always_usd_per_month, color=color, height=0.34, zorder=3)
            ax.barh(y - 0.19, f.cost.scaled_usd_per_month, color=color, alpha=0.45, height=0.34, zorder=3)
            for value, dy, word in (
                (f.cost.always_usd_per_month, 0.19, ""),
                (f.cost.scaled_usd_per_month, -0.19, " autoscaled"),
            ):
                ax.annotate(
                    f"{usd_text(value)}{word}", (value, y + dy), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5
                )  # fmt: skip
        labels = [f"{f.cost.num_replicas} × {f.name}\n{f.cost.num_gpus} GPUs, {f.origin}" for f in rows]
        ax.set_yticks(range(len(rows)), labels, fontsize=9)
        ax.grid(axis="y", visible=False)
        ax.set_xlim(0, 1.22 * max(f.cost.always_usd_per_month for f in rows))
        ax.set_xlabel("USD per month")
        ax.xaxis.set_major_formatter(lambda v, _: f"${v:,.0f}")

    return _picture(chart, draw, 1.4 + 0.62 * len(rows))


def day(plan: Plan, chart: Chart) -> Figure:
    """The day's load against what the winner's serving replicas carry, always up and autoscaled."""
    best = plan.fleets[0]
    hours = list(range(25))
    rates = [*plan.rates_per_s, plan.rates_per_s[-1]]
    room = 1 - plan.demand.headroom
    needed = [scaled_replicas(best, r, room) for r in rates]

    def draw(ax: Axes) -> None:
        per = best.capacity_per_s
        set_axis(ax, "y", Axis("Requests per second"), [*rates, best.cost.num_serving * per])
        ax.step(hours, rates, where="post", color=_color(0), linewidth=2.2, zorder=4)
        ax.fill_between(hours, rates, step="post", color=_color(0), alpha=0.13, linewidth=0)
        ax.step(
            hours,
            [n * per for n in needed],
            where="post",
            color=_color(1),
            linewidth=1.6,
            linestyle=(0, (4, 2)),
            zorder=3,
        )
        ax.axhline(best.cost.num_serving * per, color=MUTED, linewidth=1.3)
        ax.set_xlim(0, 24)
        ax.set_xticks(range(0, 25, 3))
        ax.set_xlabel("Hour of the day")
        lines = (
            Line("demand", (Point(24, rates[-1]),), 0),
            Line("capacity, autoscaled", (Point(24, needed[-1] * per),), 1),
        )
        whole = (best.cost.num_serving * per, f"capacity of {best.cost.num_serving} serving")
        end_labels(ax, Panel("", Axis(""), Axis(""), lines, reference=whole))

    return _picture(chart, draw, 4.2)


def scaled_replicas(f: SizedFleet, rate_per_s: float, room: float) -> int:
    """Serving replicas that autoscaling keeps for a rate."""
    from bench.decide.fleet import replicas_for

    return min(f.cost.num_serving, replicas_for(rate_per_s, f.capacity_per_s, 1 - room))


def sensitivity(plan: Plan, chart: Chart) -> Figure:
    """Dollars per month of the best fleets against the peak: staircases, with the demand marked."""
    peaks = np.linspace(plan.peak_per_s * 0.02, plan.peak_per_s * 2.5, 400)
    d = plan.demand
    lines = []
    for i, f in enumerate(plan.fleets[:4]):
        rival = Rival(
            f.name, f.capacity_per_s, f.usd_per_gpu_hour * f.gpus_per_replica, d.spare_replicas, d.zones, d.headroom
        )
        lines.append(Line(f.name, tuple(Point(float(p), rival.usd_per_month(float(p))) for p in peaks), i))
    panel = Panel("", Axis("Peak (requests/s)"), Axis("USD per month"), tuple(lines))

    def draw(ax: Axes) -> None:
        set_axis(ax, "x", panel.x, [float(peaks[-1])])
        set_axis(ax, "y", panel.y, [p.y for line in lines for p in line.points])
        ax.set_xlim(0, float(peaks[-1]))
        ax.yaxis.set_major_formatter(lambda v, _: f"${v:,.0f}")
        for line in lines:
            ax.plot([p.x for p in line.points], [p.y for p in line.points], color=_color(line.color), linewidth=1.9)
        ax.axvline(plan.peak_per_s, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        ax.annotate(
            f"demand {plan.peak_per_s:.4g}/s", (plan.peak_per_s, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=8.5, color=MUTED,
        )  # fmt: skip
        end_labels(ax, panel)

    return _picture(chart, draw, 4.6)
