"""The table at the end of `bench kernels`: one line a case, those that cannot run gathered by reason."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bench.units import bytes_text, duration_text, si, significant
from kernels.bounds import Bound

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "memory": "Memory",
    "gemm": "GEMM",
    "attention": "Attention",
    "norm": "Norm, activation, rotary embedding",
    "moe": "MoE grouped GEMM",
    "collectives": "Collectives",
    "link": "Links",
    "host": "Host overhead",
}


def shape_text(row: dict[str, Any]) -> str:
    """The sizes of a case for people: ``64 x 6144 x 4096 (qkv_proj)``."""
    s, family = row["shape"], row["family"]
    if family in ("memory", "link"):
        return bytes_text(s["bytes"])
    if family == "gemm":
        layer = (row.get("tags") or {}).get("layer")
        return f"{s['m']} x {s['n']} x {s['k']}" + (f" ({layer})" if layer else "")
    if family == "attention":
        what = f"{s['batch']} x {s.get('length') or s['context']}"
        return f"{what}, {s['heads']}/{s['kv_heads']} heads of {s['head_dim']}"
    if family == "norm":
        rest = s.get("hidden") or s.get("intermediate") or f"{s['heads'] + s['kv_heads']} heads"
        return f"{s['tokens']} x {rest}"
    if family == "moe":
        return f"{s['tokens']} tokens, {s['top_k']} of {s['experts']} experts, {s['n']} x {s['k']}"
    if family == "collectives":
        return f"{bytes_text(s['bytes'])}, {s['ranks']} ranks"
    return ""


def time_text(row: dict[str, Any]) -> str:
    """Median and half width of the interval in per cent: ``12.3 µs ±4 %``."""
    t = row.get("time_s")
    if not t:
        return ""
    if t["low"] is None:
        return duration_text(t["value"])
    spread = max(t["high"] - t["value"], t["value"] - t["low"]) / t["value"]
    return f"{duration_text(t['value'])} ±{significant(100 * spread, 2)} %"


def share_text(ratio: float | None) -> str:
    """A share in per cent, or a dash."""
    return "–" if ratio is None else f"{100 * ratio:.0f} %"


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of one measured case (see :func:`columns`)."""
    rate = row.get("bytes_per_s") or row.get("link_bytes_per_s")
    check = row.get("check")
    correct = "" if not check else ("exact" if check["reference"] == "exact" else f"{check['max_error']:.1e}")
    energy = row.get("energy") or {}
    joules = energy.get("energy_j_per_call")
    return [
        row["op"],
        row["impl"],
        row["dtype"],
        shape_text(row),
        time_text(row) if row["status"] == "ok" else row["status"].upper(),
        si(row["flops_per_s"]["value"], "FLOP/s") if row.get("flops_per_s") else "",
        si(rate["value"], "B/s") if rate else "",
        row.get("bound") or "",
        share_text(row.get("nominal_ratio")),
        share_text(row.get("measured_ratio")),
        si(joules, "J") if joules else "",
        correct,
    ]


def columns(summary: dict[str, Any]) -> list[str]:
    """The headings; ``% sheet`` is the share of the data sheet's (or derived) limit, ``% best`` of the best measured."""
    nominal = summary["peaks"]["nominal"]
    limit = "% derived" if nominal and nominal["kind"] == "derived" else "% sheet"
    return ["op", "by", "type", "size", "time", "FLOP/s", "bytes/s", "bound", limit, "% best", "J/call", "max error"]


def missing(summary: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(family and what, reason, number of cases) of the cases that this machine cannot run, equal reasons together."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for row in summary["cases"]:
        if row["status"] == "n/a":
            key = (row["family"], row["reason"])
            what = row["dtype"] if row["family"] == "gemm" else row["op"] if row["impl"] == "torch" else row["impl"]
            found[key].add(what)
            count[key] += 1
    return [
        (f"{family}: {', '.join(sorted(found[family, reason]))}", reason, count[family, reason])
        for family, reason in found
    ]


def render(summary: dict[str, Any]) -> Table:
    """The rich table, a section a family."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    names = columns(summary)
    for name in names:
        right = name not in ("op", "by", "type", "size", "bound")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "size")
    for family, title in TITLES.items():
        rows = [r for r in summary["cases"] if r["family"] == family and r["status"] != "n/a"]
        if not rows:
            continue
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in rows:
            style = "red" if row["status"] in ("wrong", "failed") else None
            table.add_row(*cells(row), style=style)
    return table


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """What to say under the table: peaks, what is missing and why, what went wrong."""
    peaks = summary["peaks"]["measured"]
    lines = []
    if peaks.get("bandwidth_bytes_per_s"):
        cached = (
            " (inside the last-level cache: no size of this suite is larger)" if peaks["bandwidth_in_cache"] else ""
        )
        lines.append(f"memory  best {si(peaks['bandwidth_bytes_per_s']['value'], 'B/s')}{cached}")
    lines += [f"{d:7} best {si(e['value'], 'FLOP/s')}" for d, e in peaks["flops_per_s"].items()]
    nominal = summary["peaks"]["nominal"]
    if nominal:
        lines.append(f"limits  {nominal['kind']}: {nominal['source']}")
    else:
        lines.append("limits  this GPU is not in configs/hardware: no data-sheet share; add a file there")
    bounds = [Bound(**b) for b in summary.get("bounds") or ()]  # results of earlier versions have none
    lines += [f"bound   {b.text()}" for b in bounds if b.verdict != "n/a"]
    lines += [f"n/a     {what}: {reason} ({n} case{'s' if n > 1 else ''})" for what, reason, n in missing(summary)]
    lines += [
        f"{r['status'].upper():7} {r['case_id']}: {r['reason']}"
        for r in summary["cases"]
        if r["status"] in ("wrong", "failed")
    ]
    return lines


def plain(summary: dict[str, Any]) -> str:
    """The same table as text of fixed columns: table.txt beside the raw samples."""
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    console = Console(file=out, width=190, color_system=None)
    console.print(render(summary))
    console.print()
    for line in closing_lines(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return out.getvalue()
