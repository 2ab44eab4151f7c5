"""How accurate are predictions? Grades them on measured points that others published, and prints the table.

    python scripts/accuracy.py [--json results/accuracy.json] [--figures docs/pictures] [--every N]

Rows fitted on and rows never fitted on stand apart, and so do saturated rows (where waiting for the KV cache or for
``max_num_seqs`` decides); rows that cannot be predicted are listed with the reason. ``--every N`` grades every N-th row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

from bench.sim.accuracy import METRICS, Graded, errors, grade, ratio_errors
from bench.sim.anchors import anchor_lines
from bench.sim.ground_truth import Point, Refusal, published_points, serving_points

#: Targets for uncalibrated predictions of vLLM on H100 and H200, on all rows of the serving sample together.
TARGETS = {"tpot": 0.07, "ttft": 0.15, "output_tokens_per_s": 0.10}
SATURATED_TARGET = 0.20
TITLES = {"ttft": "mean TTFT", "tpot": "mean TPOT", "output_tokens_per_s": "output tok/s"}


def load_level(c: int) -> str:
    return "1-8" if c <= 8 else "9-32" if c <= 32 else "33-128" if c <= 128 else "over 128"


def section(title: str, graded: list[Graded], key: object) -> None:
    """Print one table of errors by group."""
    if not graded:
        return
    print(f"\n{title}")
    print(f"  {'group':46s} {'metric':13s} {'rows':>5s} {'median':>8s} {'mean':>8s} {'bias':>8s} {'in 90 %':>8s}")
    last = ""
    for e in errors(graded, key):  # type: ignore[arg-type]
        name = e.group if e.group != last else ""
        last = e.group
        inside = "" if math.isnan(e.coverage) else f"{e.coverage:8.0%}"
        print(
            f"  {name:46s} {TITLES[e.metric]:13s} {e.num_rows:5d} {e.median_ape:8.1%} {e.mean_ape:8.1%} {e.bias:+8.1%} {inside}"
        )


def gather(every: int) -> tuple[list[Graded], list[Refusal]]:
    """Grade the vLLM rows of both files."""
    serving, refused = serving_points()
    published, also = published_points()
    points: list[Point] = [p for p in serving if p.gpu in ("h100-sxm", "h200-sxm", "b200")] + published
    graded, unrunnable = grade(points[::every])
    return graded, refused + also + unrunnable


def show(graded: list[Graded], refused: list[Refusal]) -> bool:
    """Print everything; whether all targets are met."""
    sample = [g for g in graded if g.point.source == "NVIDIA serving sample"]
    borrowed = [g for g in sample if g.point.gpu == "b200"]
    sample = [g for g in sample if g.point.gpu != "b200"]
    free, full = [g for g in sample if not g.saturated], [g for g in sample if g.saturated]
    others = [g for g in graded if g.point.source != "NVIDIA serving sample"]
    print("Uncalibrated predictions against published measurements of vLLM. Median and mean absolute percentage error.")
    section("Serving sample, H100 and H200", free, lambda g: "fitted on" if g.fitted else "never fitted on")
    section("Serving sample, all together", free, lambda g: "unsaturated")
    section("Serving sample, saturated rows", full, lambda g: f"{g.point.gpu} {g.point.model}")
    section(
        "By GPU and model",
        free,
        lambda g: f"{g.point.gpu} {g.point.model} {g.point.precision}{'' if g.fitted else '  (held out)'}",
    )
    section("By model class", free, lambda g: g.point.model_class)
    section("By precision", free, lambda g: g.point.precision)
    section("By tensor parallel size", free, lambda g: f"TP {g.point.tp}")
    section("By concurrency", free, lambda g: load_level(g.point.concurrency))
    section(
        "Serving sample, B200 (borrowed curves)",
        borrowed,
        lambda g: f"{g.point.model}{', saturated' if g.saturated else ''}",
    )
    section("Other sources (never fitted on)", others, lambda g: f"{g.point.source[:30]}, {g.point.gpu}")
    section(
        "Other sources by model",
        others,
        lambda g: f"{g.point.source[:12]} {g.point.gpu} {g.point.model} {g.point.precision}",
    )
    ratios(free, others)
    print("\nRows refused")
    for (source, reason), n in Counter((r.source, r.reason) for r in refused).most_common():
        print(f"  {n:5d}  {source[:34]:34s} {reason}")
    print("\nAnchors (TensorRT-LLM's published ratios; predictions are of vLLM)")
    for line in anchor_lines():
        print(f"  {line}")
    return verdict(free, full)


def ratios(free: list[Graded], others: list[Graded]) -> None:
    """Generation and TP ratios between measured rows of vLLM that differ in nothing else."""
    print("\nRatios of measured rows that differ in one thing (output tok/s): predicted over measured ratio - 1")
    for source, rows, differ in (
        ("serving sample, TP", free, "tp"),
        ("serving sample", free, "gpu"),
        ("other sources", others, "gpu"),
    ):
        for pair, signed in sorted(ratio_errors(rows, differ).items()):
            middle, typical = statistics.median(signed), statistics.median(map(abs, signed))
            print(
                f"  {f'{source} {pair}':46s} {len(signed):5d} pairs   median error {typical:6.1%}   bias {middle:+6.1%}"
            )


def verdict(free: list[Graded], full: list[Graded]) -> bool:
    """Print targets beside what was reached."""
    print("\nTargets (median over vLLM rows of H100 and H200)")
    met = True
    for e in errors(free, lambda g: ""):
        ok = e.median_ape <= TARGETS[e.metric]
        met = met and ok
        print(
            f"  {TITLES[e.metric]:13s} {e.median_ape:6.1%}  target {TARGETS[e.metric]:.0%}  {'met' if ok else 'MISSED'}"
        )
    for e in errors(full, lambda g: ""):
        ok = e.median_ape <= SATURATED_TARGET
        met = met and ok
        print(
            f"  {TITLES[e.metric]:13s} {e.median_ape:6.1%}  target {SATURATED_TARGET:.0%}  {'met' if ok else 'MISSED'} (saturated, {e.num_rows} rows)"
        )
    return met


def as_rows(graded: list[Graded]) -> list[dict[str, object]]:
    rows = []
    for g in graded:
        row: dict[str, object] = {
            k: v for k, v in dataclasses.asdict(g.point).items() if k not in ("ttft_s", "tpot_s", "output_tokens_per_s")
        }
        for m in METRICS:
            row[f"measured_{m}"], row[f"predicted_{m}"] = g.measured[m], g.predicted[m]
        rows.append({**row, "saturated": g.saturated, "fitted": g.fitted})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Grade predictions on published measurements.")
    parser.add_argument("--json", type=Path, help="write every row with its prediction here")
    parser.add_argument(
        "--figures", type=Path, help="draw the pictures of docs/how-prediction-works.md into this folder"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="grade every N-th row only")
    arguments = parser.parse_args()
    graded, refused = gather(arguments.every)
    met = show(graded, refused)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_rows(graded), indent=0, default=str) + "\n", encoding="utf-8")
    if arguments.figures:
        from bench.sim.accuracy_pictures import draw_all

        for path in draw_all(graded, arguments.figures):
            print(f"wrote {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
