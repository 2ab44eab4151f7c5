"""The roofline as a picture: ceilings of a device, operations of a step at their ceilings, measured cells below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report.charts import GRID, INK, MARKERS, MUTED, PALETTE, PNG_DPI
from bench.report.labels import put_beside
from bench.roofline import Ceilings, OpTime
from bench.units import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Where the points of each kind of operation sit in the palette; None is not drawn (no arithmetic to speak of).
_GROUPS = {
    "gemm": ("matrix products", 0),
    "moe_gemm": ("experts", 4),
    "attention_prefill": ("attention, prefill", 1),
    "attention_decode": ("attention, decode", 2),
}


@dataclass(frozen=True, slots=True)
class CellPoint:
    """A measured cell: what its steps needed by arithmetic, per second, on one device."""

    label: str
    flops_per_s: float
    bytes_per_s: float
    origin: str = "measured"
    interval: tuple[float, float] | None = None  # of flops_per_s over runs
    short: str = ""  # the label without what all cells of the picture share

    @property
    def intensity_flops_per_byte(self) -> float:
        return self.flops_per_s / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class KernelPoint:
    """A kernel as ``bench kernels`` measured it on this device."""

    family: str  # gemm, attention, moe, memory, norm
    flops_per_s: float
    intensity_flops_per_byte: float


@dataclass(frozen=True, slots=True)
class RooflineData:
    """What the report's roofline shows: ceilings, measured kernels, and where the cells came to."""

    ceilings: Ceilings
    dtypes: tuple[str, ...]
    cells: tuple[CellPoint, ...]
    kernels: tuple[KernelPoint, ...] = ()


def draw_roofline(
    ceilings: Ceilings,
    dtypes: Sequence[str],
    steps: dict[str, Sequence[OpTime]],
    cells: Sequence[CellPoint],
    title: str,
    path: Path,
) -> list[Path]:
    """Write ``path`` as PNG and SVG (suffix replaced); returns both.

    ``dtypes``: whose compute ceilings are drawn. ``steps``: phase name -> its operations, drawn where the ceilings put
    them (filled for the first phase, open for the second). ``cells``: measured or simulated points, labelled.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "tokenyield",
    }
    with rc_context(style):
        figure = Figure(figsize=(9.6, 6.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _on_axes(axes, ceilings, dtypes, steps, cells, ())
        axes.set_title(
            "area of a point and per cent: share of the step's least time", loc="left", fontsize=9, color=MUTED
        )
        for handle in axes.legend(loc="lower right", frameon=False, fontsize=9).legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([45])
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
        _name_cells(axes, cells, ())
        written = [path.with_suffix(".png"), path.with_suffix(".svg")]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(written[0], dpi=PNG_DPI)
        figure.savefig(written[1], metadata={"Date": None})
    return written


def _on_axes(
    axes: Axes,
    ceilings: Ceilings,
    dtypes: Sequence[str],
    steps: dict[str, Sequence[OpTime]],
    cells: Sequence[CellPoint],
    kernels: Sequence[KernelPoint],
) -> None:
    """Ceilings, operations, kernels and cells, with axes that hold them all."""
    points = [o for ops in steps.values() for o in ops if o.op.kind in _GROUPS and o.op.flops > 0]
    intensities = [o.op.intensity_flops_per_byte for o in points] + [c.intensity_flops_per_byte for c in cells]
    intensities += [k.intensity_flops_per_byte for k in kernels]
    ridges = [ceilings.ridge_flops_per_byte(d) for d in dtypes]
    low = min([0.3, *[x / 2 for x in intensities]])
    high = max([x * 12 for x in ridges] + [x * 4 for x in intensities])
    _ceilings(axes, ceilings, dtypes, low, high)
    for i, (phase, ops) in enumerate(steps.items()):
        _operations(axes, ops, phase, filled=i == 0)
    _kernels(axes, kernels)
    _cells(axes, cells)
    top = max(ceilings.peak(d) for d in dtypes)
    rates = [c.flops_per_s for c in cells] + [k.flops_per_s for k in kernels]
    bottom = min([low * ceilings.memory_bytes_per_s, *[r / 2 for r in rates]])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, 3 * max([top, *rates])))
    axes.set_xlabel("arithmetic intensity (FLOP per byte of memory traffic)")
    axes.set_ylabel("rate on one device (FLOP/s)")
    axes.yaxis.set_major_formatter(lambda v, _: si(v, "FLOP/s", 1))
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def draw_on(axes: Axes, data: RooflineData) -> None:
    """The report's roofline on ``axes``: kernels and cells under the ceilings."""
    _on_axes(axes, data.ceilings, data.dtypes, {}, data.cells, data.kernels)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _name_cells(axes, data.cells, data.kernels)


def _kernels(axes: Axes, kernels: Sequence[KernelPoint]) -> None:
    """Measured kernels, a colour for each family."""
    for i, family in enumerate(dict.fromkeys(k.family for k in kernels)):
        some = [k for k in kernels if k.family == family]
        axes.scatter(
            [k.intensity_flops_per_byte for k in some], [k.flops_per_s for k in some], s=26, alpha=0.8, zorder=3,
            marker=MARKERS[i % len(MARKERS)], facecolors="none", edgecolors=PALETTE[i % len(PALETTE)], linewidths=1.3,
            label=f"kernels: {family}",
        )  # fmt: skip


def _ceilings(axes: Axes, c: Ceilings, dtypes: Sequence[str], low: float, high: float) -> None:
    """The memory slope up to the highest ridge and a flat line for each dtype, labelled in place."""
    top = max(dtypes, key=c.peak)
    ridge = c.ridge_flops_per_byte(top)
    axes.plot([low, ridge], [low * c.memory_bytes_per_s, c.peak(top)], color=INK, linewidth=2, zorder=2)
    who = "measured" if "memory" in c.measured else "data sheet"
    axes.annotate(
        f"memory {si(c.memory_bytes_per_s, 'B/s')} ({who})", (low * 2, low * 2 * c.memory_bytes_per_s),
        xytext=(10, -4), textcoords="offset points", fontsize=9, color=MUTED, va="top",
    )  # fmt: skip
    for dtype in dict.fromkeys(dtypes):
        peak = c.peak(dtype)
        axes.plot([peak / c.memory_bytes_per_s, high], [peak, peak], color=INK, linewidth=2, zorder=2)
        who = "measured" if dtype in c.measured else "data sheet"
        axes.annotate(
            f"{dtype} {si(peak, 'FLOP/s')} ({who})", (high, peak), xytext=(-4, 5), textcoords="offset points",
            fontsize=9, color=MUTED, ha="right", va="bottom",
        )  # fmt: skip


def _operations(axes: Axes, ops: Sequence[OpTime], phase: str, filled: bool) -> None:
    """Operations at the rate that their ceiling allows; the area of a point grows with its share of the step's time."""
    total = sum(o.time_s for o in ops) or 1.0
    for kind, (label, color) in _GROUPS.items():
        chosen = [o for o in ops if o.op.kind == kind and o.op.flops > 0 and o.time_s > 0]
        if not chosen:
            continue
        axes.scatter(
            [o.op.intensity_flops_per_byte for o in chosen],
            [o.op.flops / o.time_s for o in chosen],
            s=[30 + 400 * o.time_s / total for o in chosen],
            marker=MARKERS[color % len(MARKERS)],
            facecolors=PALETTE[color] if filled else "none",
            edgecolors=PALETTE[color],
            linewidths=1.4,
            alpha=0.85,
            zorder=3,
            label=f"{phase}: {label}",
        )
    biggest = sorted((o for o in ops if o.op.kind in _GROUPS and o.op.flops > 0), key=lambda o: -o.time_s)[:3]
    placed: list[float] = []
    for o in biggest:
        if any(abs(o.op.intensity_flops_per_byte / x - 1) < 0.8 for x in placed):
            continue  # two labels on one spot say nothing
        placed.append(o.op.intensity_flops_per_byte)
        axes.annotate(
            f"{o.op.name} {100 * o.time_s / total:.0f} %", (o.op.intensity_flops_per_byte, o.op.flops / o.time_s),
            xytext=(10, -15), textcoords="offset points", fontsize=8.5, color=INK, zorder=4,
        )  # fmt: skip


def _cells(axes: Axes, cells: Sequence[CellPoint]) -> None:
    """Cells as crosses, simulated ones hollow; their distance to the ceiling is what was lost."""
    for origin in dict.fromkeys(c.origin for c in cells):
        some = [c for c in cells if c.origin == origin]
        axes.scatter(
            [c.intensity_flops_per_byte for c in some], [c.flops_per_s for c in some], s=60,
            marker="X" if origin == "measured" else "P", facecolors="#cc79a7" if origin == "measured" else "none",
            edgecolors="#cc79a7", linewidths=1.2, zorder=5, label=f"cells, {origin}",
        )  # fmt: skip
    for c in cells:
        if c.interval:
            axes.plot([c.intensity_flops_per_byte] * 2, c.interval, color="#cc79a7", linewidth=1.2, zorder=4)


#: Where a cell's name is tried, in points from its mark; further off it would be taken for another one's.
_NAME_PLACES = (
    (8, -3), (-8, -3), (8, 6), (-8, 6), (8, -12), (-8, -12), (0, 9), (0, -17),
)  # fmt: skip


def _name_cells(axes: Axes, cells: Sequence[CellPoint], kernels: Sequence[KernelPoint]) -> None:
    """Cells by name where there is room, the ones that do most and least first; those without room stay bare marks.

    To be called when everything else is drawn: names keep off marks, lines, texts and the legend.
    """
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = axes.figure.dpi / 72
    taken = [t.get_window_extent(renderer) for t in axes.texts if t.get_text()]
    legend = axes.get_legend()
    taken += [legend.get_window_extent(renderer)] if legend is not None else []
    for points, points_size in ((cells, 4.5), (kernels, 2.5)):
        for p in points:
            x, y = axes.transData.transform((p.intensity_flops_per_byte, p.flops_per_s))
            r = points_size * pixels
            taken.append(Bbox([[x - r, y - r], [x + r, y + r]]))
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata())
        for share in (k / 80 for k in range(81)):
            x, y = ends[0] + (ends[-1] - ends[0]) * share
            taken.append(Bbox([[x - pixels, y - pixels], [x + pixels, y + pixels]]))
    by_rate = sorted(cells, key=lambda c: c.flops_per_s)
    for c in dict.fromkeys([*by_rate[-1:], *by_rate[:1], *reversed(by_rate)]):
        at = (c.intensity_flops_per_byte, c.flops_per_s)
        put_beside(
            axes, c.short or c.label, at, axes.get_window_extent(renderer), taken, _NAME_PLACES, fontsize=8, color=INK
        )
