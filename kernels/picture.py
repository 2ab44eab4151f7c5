"""The one picture of a kernel run: roofline with every kernel on it, bandwidth over size, FLOP/s over tokens."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.units import bytes_text, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe & Ito (2008), told apart by colour-blind readers; markers differ as well.
_COLOURS = {
    "memory": "#009E73",
    "gemm": "#0072B2",
    "attention": "#D55E00",
    "norm": "#CC79A7",
    "moe": "#E69F00",
}
_MARKERS = {"memory": "s", "gemm": "o", "attention": "^", "norm": "D", "moe": "v"}
#: Height of a label of a ceiling as a share of the axis, with the space above it.
LABEL_HEIGHT = 0.035
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LABELS = {"memory": "memory", "gemm": "GEMM", "attention": "attention", "norm": "norm, activation, RoPE", "moe": "MoE"}


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the picture as ``path`` (PNG) and beside it as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    ):
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained", width_ratios=(1.35, 1, 1))
        _roofline(axes[0], summary)
        _bandwidth(axes[1], summary)
        _gemm(axes[2], summary)
        device, suite = summary["device"], summary["suite"]["name"]
        figure.suptitle(
            f"{device['name']}: what its kernels reach ({suite} suite, {summary['started_utc']})", fontsize=11
        )
        figure.savefig(path, dpi=130)
        figure.savefig(path.with_suffix(".svg"))
        pyplot.close(figure)


def _timed(summary: dict[str, Any], *families: str) -> list[dict[str, Any]]:
    return [r for r in summary["cases"] if r["status"] == "ok" and r.get("time_s") and r["family"] in families]


def _roofline(axes: Axes, summary: dict[str, Any]) -> None:
    rows = [r for r in _timed(summary, *_COLOURS) if r.get("flops") and r.get("bytes")]
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of memory traffic", ylabel="operations per second")
    axes.set_title("Roofline: measured ceilings, kernels as points", fontsize=10)
    if not rows:
        axes.text(0.5, 0.5, "no kernel was timed", ha="center", transform=axes.transAxes)
        return
    intensity = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(intensity) / 2, max(intensity) * 4
    labels = _ceilings(axes, summary, low, high)
    for family, colour in _COLOURS.items():
        points = [r for r in rows if r["family"] == family]
        if points:
            axes.scatter(
                [r["flops"] / r["bytes"] for r in points],
                [r["flops_per_s"]["value"] for r in points],
                s=22,
                color=colour,
                marker=_MARKERS[family],
                alpha=0.75,
                linewidths=0,
                label=_LABELS[family],
                zorder=3,
            )
    axes.set_xlim(low, high)
    _label(axes, labels, high)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.2, which="major")


_Label = tuple[float, str, str]  # height, text, colour


def _ceilings(axes: Axes, summary: dict[str, Any], low: float, high: float) -> list[_Label]:
    """Draw the ceilings; returns their labels, to be placed once the axes hold everything."""
    measured, nominal = summary["peaks"]["measured"], summary["peaks"]["nominal"] or {}
    bandwidth = measured.get("bandwidth_bytes_per_s")
    labels: list[_Label] = []
    if not bandwidth:
        return labels
    slope = bandwidth["value"]
    top = max((e["value"] for e in measured["flops_per_s"].values()), default=None)
    knee = top / slope if top else high
    axes.plot([low, min(knee, high)], [low * slope, min(knee, high) * slope], color="black", linewidth=1.2)
    axes.annotate(
        si(slope, "B/s"),
        (low * 1.3, low * 1.3 * slope),
        xytext=(-8, 16),
        textcoords="offset points",
        rotation=30,
        fontsize=8,
    )
    for dtype, estimate in measured["flops_per_s"].items():
        value = estimate["value"]
        if value / slope < high:
            axes.plot([value / slope, high], [value] * 2, color="black", linewidth=1.2)
        labels.append((value, f"{dtype} {si(value, 'FLOP/s')}", "black"))
        limit = (nominal.get("flops_per_s") or {}).get(dtype)
        if limit and limit / slope < high:
            axes.plot([limit / slope, high], [limit] * 2, color="grey", linewidth=0.8, linestyle=":")
            labels.append((limit, f"{dtype} {nominal['kind']} {si(limit, 'FLOP/s')}", "grey"))
    return labels


def _label(axes: Axes, labels: list[_Label], high: float) -> None:
    """Write each label at the right end of its line, moved up where it would lie on another."""
    low_y, high_y = axes.get_ylim()
    apart = (high_y / low_y) ** LABEL_HEIGHT
    for height, (_, text, colour) in zip(spread(sorted(v for v, _, _ in labels), apart), sorted(labels), strict=True):
        place = (high, height)
        # Nothing strikes a label out: it stands on white.
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}
        axes.annotate(
            text,
            place,
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color=colour,
            bbox=behind,
            zorder=2.5,
        )


def spread(heights: list[float], apart: float) -> list[float]:
    """Heights for labels on a log axis: ascending, none less than ``apart`` times the one below, each at its line or above."""
    out: list[float] = []
    for height in heights:
        out.append(max(height, out[-1] * apart) if out else height)
    return out


def _bandwidth(axes: Axes, summary: dict[str, Any]) -> None:
    series: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in _timed(summary, "memory"):
        series[row["op"]].append(row)
    axes.set(xscale="log", xlabel="bytes per array", ylabel="GB/s")
    axes.set_title("Memory bandwidth over size", fontsize=10)
    for (op, rows), colour in zip(sorted(series.items()), _SERIES, strict=False):
        rows.sort(key=lambda r: r["shape"]["bytes"])
        _line(axes, [r["shape"]["bytes"] for r in rows], [r["bytes_per_s"] for r in rows], 1e9, colour, op)
    nominal = summary["peaks"]["nominal"] or {}
    if nominal.get("bandwidth_bytes_per_s"):
        limit = nominal["bandwidth_bytes_per_s"] / 1e9
        axes.axhline(limit, color="grey", linestyle=":", linewidth=0.8)
        axes.annotate(
            "data sheet",
            (1, limit),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="grey",
        )
    cache = summary["device"]["l2_bytes"]
    axes.axvline(cache, color="grey", linewidth=0.8)
    axes.annotate(
        f"last-level cache {bytes_text(cache)}",
        (cache, 1),
        xycoords=("data", "axes fraction"),
        rotation=90,
        ha="right",
        va="top",
        fontsize=7,
        color="grey",
    )
    _finish(axes, bool(series))


def _gemm(axes: Axes, summary: dict[str, Any]) -> None:
    best: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in _timed(summary, "gemm"):
        m, rate = row["shape"]["m"], row["flops_per_s"]
        if m not in best[row["dtype"]] or rate["value"] > best[row["dtype"]][m]["value"]:
            best[row["dtype"]][m] = rate
    axes.set(xscale="log", yscale="log", xlabel="tokens in the step (m)", ylabel="TFLOP/s (TOP/s for int8)")
    axes.set_title("GEMM: best layer at each number of tokens", fontsize=10)
    for (dtype, points), colour in zip(best.items(), _SERIES, strict=False):
        sizes = sorted(points)
        _line(axes, sizes, [points[m] for m in sizes], 1e12, colour, dtype)
    _finish(axes, bool(best))


def _line(axes: Axes, x: list[int], estimates: list[dict[str, Any]], unit: float, colour: str, label: str) -> None:
    """Medians joined by a line, their intervals as bars."""
    y = [e["value"] / unit for e in estimates]
    low = [(e["value"] - (e["low"] if e["low"] is not None else e["value"])) / unit for e in estimates]
    high = [((e["high"] if e["high"] is not None else e["value"]) - e["value"]) / unit for e in estimates]
    axes.errorbar(
        x, y, yerr=[low, high], color=colour, marker="o", markersize=3.5, linewidth=1.2, capsize=2, label=label
    )


def _finish(axes: Axes, has_data: bool) -> None:
    axes.grid(alpha=0.2)
    if has_data:
        axes.legend(frameon=False)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes)
