"""The pictures of ``docs/how-prediction-works.md``: predicted against measured, and errors by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.sim.accuracy import METRICS, Graded, errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.sim.anchors import Anchor
    from bench.sim.ground_truth import Point

_TITLES = {
    "ttft": ("mean TTFT", "ms", 1e3),
    "tpot": ("mean TPOT", "ms", 1e3),
    "output_tokens_per_s": ("output rate", "tokens/s", 1.0),
}


def _plt() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_all(graded: list[Graded], folder: Path) -> list[Path]:
    """Draw every picture into ``folder``; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [scatter(graded, folder / "prediction-scatter.png"), by_group(graded, folder / "prediction-errors.png")]


def anchors_picture(rows: Sequence[tuple[Point, float]], anchors: Sequence[Anchor], path: Path) -> Path:
    """TensorRT-LLM at full load: every row predicted against published, and the ratios beside their published values."""
    plt = _plt()
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(1, 1.25), layout="constrained")
    colours = {"a100-80-pcie": "#999933", "a100-80-sxm": "#ddaa33", "h100-sxm": "#4477aa", "h200-sxm": "#cc6677"}
    for gpu, colour in colours.items():
        pairs = [(p.output_tokens_per_s, rate) for p, rate in rows if p.gpu == gpu]
        if pairs:
            x, y = zip(*pairs, strict=True)
            left.scatter(x, y, s=13, alpha=0.6, lw=0, color=colour, label=f"{gpu}: {len(pairs)}")
    line = np.geomspace(50, 9e4, 50)
    left.fill_between(line, line / 1.2, line * 1.2, color="0.88", zorder=0, label="within 20 %")
    left.plot(line, line, color="0.4", lw=0.8)
    left.set(xscale="log", yscale="log", xlabel="published, output tokens/s", ylabel="predicted (simulated)")
    left.set_title("TensorRT-LLM at full load, dense models and Mixtral", fontsize=10)
    left.legend(fontsize=7.5, loc="upper left")
    shown = [a for a in anchors if a.unit == "x"][::-1]
    for row, a in enumerate(shown):
        right.plot([a.published, a.predicted], [row, row], color="0.7", lw=1, zorder=1)
        right.scatter(a.published, row, s=34, color="black", zorder=2, label=None if row else "published")
        colour = "#bbbbbb" if a.limit is None else "#4477aa" if a.met else "#cc6677"
        right.scatter(a.predicted, row, s=34, color=colour, marker="D", zorder=3)
    right.scatter([], [], color="#4477aa", marker="D", label="predicted, within 10 %")
    right.scatter([], [], color="#cc6677", marker="D", label="predicted, missed")
    right.scatter(
        [], [], color="#bbbbbb", marker="D", label="predicted, no target (fitted on, later, two things differ)"
    )
    right.set_yticks(range(len(shown)), [a.name for a in shown], fontsize=7)
    right.set(xlabel="ratio", xlim=(1, None))
    right.legend(fontsize=7.5, loc="center right")
    right.grid(axis="x", color="0.92")
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def _groups(graded: list[Graded]) -> dict[str, list[Graded]]:
    groups = {
        "fitted on (4 models)": [g for g in graded if g.fitted and not g.saturated],
        "never fitted on": [g for g in graded if not g.fitted and not g.saturated],
        "saturated": [g for g in graded if g.saturated],
    }
    return {k: v for k, v in groups.items() if v}


def scatter(graded: list[Graded], path: Path) -> Path:
    """Predicted against measured on logarithmic axes, one panel a metric."""
    plt = _plt()
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.6))
    for ax, metric in zip(axes, METRICS, strict=True):
        title, unit, factor = _TITLES[metric]
        values: list[float] = []
        for (name, members), (colour, marker) in zip(
            _groups(graded).items(), (("#4477aa", "o"), ("#cc6677", "s"), ("#999933", "^")), strict=False
        ):
            pairs = [(g.measured[metric] * factor, g.predicted[metric] * factor) for g in members]
            pairs = [p for p in pairs if all(math.isfinite(v) and v > 0 for v in p)]
            if pairs:
                x, y = zip(*pairs, strict=True)
                values += [*x, *y]
                ax.scatter(x, y, s=14, alpha=0.6, color=colour, marker=marker, lw=0, label=f"{name}: {len(pairs)}")
        line = np.geomspace(min(values) * 0.8, max(values) * 1.25, 50)
        ax.fill_between(line, line / 1.2, line * 1.2, color="0.88", zorder=0, label="within 20 %")
        ax.plot(line, line, color="0.4", lw=0.8)
        ax.set(xscale="log", yscale="log", xlim=(line[0], line[-1]), ylim=(line[0], line[-1]))
        ax.set(xlabel=f"measured, {unit}", ylabel=f"predicted (simulated), {unit}", title=title)
        ax.legend(fontsize=7.5, loc="upper left")
    fig.suptitle(
        "Uncalibrated predictions against published measurements of vLLM (H100, H200, A100, B200)", fontsize=11
    )
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def by_group(graded: list[Graded], path: Path) -> Path:
    """Signed errors of every row by model and GPU, with the median."""
    plt = _plt()
    fig, axes = plt.subplots(1, 3, figsize=(13, 7.2), sharey=True)
    names = sorted({_row_name(g) for g in graded}, reverse=True)
    for ax, metric in zip(axes, METRICS, strict=True):
        _strip(ax, graded, metric, names)
        ax.set(title=_TITLES[metric][0], xlabel="predicted / measured - 1")
    axes[0].set_yticks(range(len(names)), names, fontsize=7.5)
    fig.suptitle(
        "Errors of single rows by model and GPU (* the overheads were fitted on this model); bar: median", fontsize=11
    )
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def _row_name(g: Graded) -> str:
    return f"{g.point.model}, {g.point.gpu}{', saturated' if g.saturated else ''}{' *' if g.fitted else ''}"


def _strip(ax: Axes, graded: list[Graded], metric: str, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for row, group in enumerate(names):
        signed = [e for g in graded if _row_name(g) == group and math.isfinite(e := g.error(metric))]
        if signed:
            clipped = np.clip(signed, -1.0, 1.5)
            ax.scatter(
                clipped,
                row + rng.uniform(-0.25, 0.25, len(clipped)),
                s=8,
                alpha=0.5,
                lw=0,
                color="#cc6677" if "*" not in group else "#4477aa",
            )
            middle = float(np.clip(np.median(signed), -1.0, 1.5))
            ax.plot([middle, middle], [row - 0.38, row + 0.38], color="black", lw=1.6)
    ax.axvspan(-0.2, 0.2, color="0.92", zorder=0)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set(xlim=(-1.05, 1.55), ylim=(-0.7, len(names) - 0.3))
    total = [e for e in errors(graded, lambda g: "") if e.metric == metric]
    if total:
        ax.text(
            0.98, 0.01, f"all rows: median {total[0].median_ape:.1%}", transform=ax.transAxes, ha="right", fontsize=8
        )
