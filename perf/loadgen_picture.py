"""The picture and the tables of docs/load-generator.md, from the measured JSON.

python -m perf.loadgen_picture [results/examples/loadgen/loadgen.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "results/examples/loadgen/loadgen.json"
PICTURE = ROOT / "docs/images/loadgen-accuracy.png"
PAGE = ROOT / "docs/load-generator.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LABELS = {"64": "64", "256": "256", "1000": "1,000", "1000 in step": "1,000 in step"}
# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = {
    "tokenyield": "#0072B2",
    "real-time tokenyield": "#56B4E9",
    "C (epoll)": "#000000",
    "vllm bench serve": "#E69F00",
    "GuideLLM": "#009E73",
    "AIPerf": "#CC79A7",
}


def _us(seconds: float) -> str:
    if seconds != seconds:
        return "–"
    us = seconds * 1e6
    return f"{us:,.0f}" if us >= 10 else f"{us:.1f}"


def tables(data: dict[str, Any]) -> str:
    """Markdown: one table for each measure."""
    clients = {n: c for n, c in data["clients"].items() if "cases" in c}
    names = [n for n in COLOURS if n in clients]
    titles = [f"{n} {clients[n]['version']}" if n != "C (epoll)" else "C (epoll)" for n in names]
    out = [f"Machine: {data['machine']}.", ""]
    parts = (
        ("TTFT error, µs, p50 / p99", lambda f: f"{_us(f['ttft']['p50_s'])} / {_us(f['ttft']['p99_s'])}"),
        ("ITL error, µs, p50 / p99", lambda f: f"{_us(f['itl']['p50_s'])} / {_us(f['itl']['p99_s'])}"),
        ("E2E error, µs, p50 / p99", lambda f: f"{_us(f['e2e']['p50_s'])} / {_us(f['e2e']['p99_s'])}"),
        ("CPU per streamed chunk, µs", lambda f: f"{f['cpu_us_per_chunk']:.1f}"),
        ("Chunks/s that one core could take (1 / CPU per chunk)", lambda f: f"{1e6 / f['cpu_us_per_chunk']:,.0f}"),
    )
    for title, text in parts:
        out += [f"**{title}**", "", "| streams | " + " | ".join(titles) + " |", "|---|" + "---|" * len(names)]
        for key, label in LABELS.items():
            cells = []
            for n in names:
                found = clients[n]["cases"].get(key)
                cells.append("not measured" if found is None else "failed" if "failed" in found else text(found))
            out.append(f"| {label} | " + " | ".join(cells) + " |")
        out.append("")
    single = [clients[n].get("single", {}).get("cpu_us_per_request") for n in names]
    out += ["**CPU of one request of a single token, µs (requests/s that one core could make)**", ""]
    out += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(names)]
    out += ["| " + " | ".join("failed" if not s else f"{s:,.0f} ({1e6 / s:,.0f})" for s in single) + " |", ""]
    ours = clients.get("tokenyield", {}).get("cases", {})
    if ours:
        later = ", ".join(f"{c['cpu_after_us_per_chunk']:.1f}" for c in ours.values() if "cpu_after_us_per_chunk" in c)
        out.append(f"Ours parses after the window; that costs a further {later} µs per chunk (same order as above).")
    for p in data.get("pacing", []):
        out.append(
            f"Open loop, {p['rate_per_s']:,.0f} requests/s, constant: sent late by {_us(p['lateness_p50_s'])} µs p50, "
            f"{_us(p['lateness_p99_s'])} µs p99, {_us(p['lateness_max_s'])} µs max."
        )
    skipped = [f"{n}: {c['skipped']}" for n, c in data["clients"].items() if "skipped" in c]
    return "\n".join(out + skipped) + "\n"


def picture(data: dict[str, Any]) -> None:
    """Error and CPU by number of streams, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clients = {n: c for n, c in data["clients"].items() if "cases" in c}
    names = [n for n in COLOURS if n in clients]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), constrained_layout=True)
    panels = (
        ("TTFT error, p99", lambda f: f["ttft"]["p99_s"] * 1e6, "µs (lower is better)", 100.0),
        ("Inter-token error, p99", lambda f: f["itl"]["p99_s"] * 1e6, "µs (lower is better)", 100.0),
        ("CPU per streamed chunk", lambda f: f["cpu_us_per_chunk"], "µs (lower is better)", None),
    )
    width = 0.8 / len(names)
    for axis, (title, value, unit, limit) in zip(axes, panels, strict=True):
        for k, n in enumerate(names):
            points = []
            for x, key in enumerate(LABELS):
                found = clients[n]["cases"].get(key)
                if found and "failed" not in found and value(found) == value(found):
                    points.append((x + (k - (len(names) - 1) / 2) * width, value(found)))
            axis.bar([p[0] for p in points], [p[1] for p in points], width, label=n, color=COLOURS[n])
        if limit is not None:
            axis.axhline(limit, color="#555555", lw=1, ls="--")
            axis.annotate(
                "100 µs", (0.99, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#555555"
            )
        axis.set_yscale("log")
        axis.set_xticks(range(len(LABELS)), list(LABELS.values()))
        axis.set_xlabel("streams, 20 ms between tokens")
        axis.set_ylabel(unit)
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * 30)
    figure.suptitle("What load generators report, against the server's own log", fontsize=13)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE
    try:
        data = json.loads(source.read_text())
    except (OSError, ValueError) as e:
        print(
            f"{source}: {getattr(e, 'strerror', None) or f'not JSON ({e})'}; write it with python -m perf.loadgen",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    picture(data)
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{tables(data)}{END}{after}")
    print(f"written: {PICTURE} and the tables of {PAGE}")


if __name__ == "__main__":
    main()
