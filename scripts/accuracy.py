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
from bench.sim.anchors import RATIO_TARGET, Anchor, all_anchors, full_load_lines, graded_full_load
from bench.sim.ground_truth import Point, Refusal, published_points, serving_points
from bench.sim.intervals import between_groups, left_out_coverage, read_left_out

#: A 90 % interval is honest when this share of rows that nothing was fitted on lies inside.
COVERAGE_TARGET = (0.85, 0.95)
#: GPUs with curves of their own.
OWN_CURVES = ("h100-sxm", "h200-sxm", "a100-80-sxm")
#: Targets for uncalibrated predictions of vLLM on H100 and H200, on all rows of the serving sample together.
TARGETS = {"tpot": 0.07, "ttft": 0.15, "output_tokens_per_s": 0.10}
SATURATED_TARGET = 0.20
OFFLINE_TARGET = 0.15
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


def show(graded: list[Graded], refused: list[Refusal], anchors: list[Anchor]) -> bool:
    """Print everything; whether all targets are met."""
    everything, graded = graded, [g for g in graded if not g.contradiction]
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
    missed = ratios(free, others)
    print("\nRows refused")
    for (source, reason), n in Counter((r.source, r.reason) for r in refused).most_common():
        print(f"  {n:5d}  {source[:34]:34s} {reason}")
    contradictory([g for g in everything if g.contradiction], full)
    print(
        "\nTensorRT-LLM at full load, every row of the six models published for 0.14 to 1.0 on A100, H100, H200 (output tok/s)"
    )
    for line in full_load_lines():
        print(f"  {line}")
    covered = left_out(graded)
    return verdict(free, full, others, covered, anchors, missed)


def contradictory(rows: list[Graded], full: list[Graded]) -> None:
    """What the rule of Little's law leaves out, graded all the same, and what the saturated rows would be with them."""
    print("\nRows that contradict Little's law as recorded: graded here alone, in no other table")
    for e in errors(rows, lambda g: f"{g.point.gpu} {g.contradiction}"):
        print(
            f"  {e.group[:88]:88s} {TITLES[e.metric]:13s} {e.num_rows:4d}  median {e.median_ape:7.1%}  bias {e.bias:+7.1%}"
        )
    mine = [g for g in rows if g.point.gpu != "b200"]
    with_them = errors(full + mine, lambda g: "")
    print(
        "  saturated rows of H100 and H200 with them: "
        + ", ".join(f"{TITLES[e.metric]} {e.median_ape:.1%}" for e in with_them)
    )


def left_out(graded: list[Graded]) -> dict[str, tuple[float, int]]:
    """Metric -> (coverage, rows) of 90 % intervals on rows left out, each group graded by the interval of all others.

    Prints what ``configs/efficiency/overheads.yaml`` ships: over the fitted engines' groups, and over all groups for others.
    """
    known = read_left_out()
    print("\n90 % intervals (measured / predicted), every group of rows graded by the interval of all other groups")
    found = {}
    for tier, chosen in (("fitted engines", [g for g in graded if g.fitted]), ("other engines", graded)):
        for metric in METRICS:
            groups: dict[str, list[float]] = {}
            for g in chosen:
                p = g.point
                if p.gpu in OWN_CURVES and not (metric == "ttft" and g.saturated):
                    e = left_out_error(g, metric, known.get(p.id, {}))
                    if math.isfinite(e):
                        groups.setdefault(f"{p.model} {p.precision} {p.source[:8]} {p.gpu}", []).append(e)
            if len(groups) < 3:
                continue
            covered = left_out_coverage(groups)
            num_rows = sum(map(len, groups.values()))
            share = sum(c * len(groups[name]) for name, c in covered.items()) / num_rows
            low, high = between_groups(groups)
            outside = ", ".join(f"{name} {c:.0%}" for name, c in covered.items() if c < 0.7)
            print(
                f"  {tier:14s} {TITLES[metric]:13s} {low:.2f} .. {high:.2f}  {len(groups):3d} groups, {num_rows:3d} rows: {share:4.0%} inside;"
                f" under 70 %: {outside or 'none'}"
            )
            found[metric] = (share, num_rows)
    return found


def held_out(rows: list[Graded]) -> dict[str, list[float]]:
    """Metric -> relative errors of ``rows``, none predicted by overheads that saw a row of its model.

    Rows of fitted models that the refits did not grade (outputs over 1,024 tokens and the like) are not among them.
    """
    known = read_left_out()
    chosen = [g for g in rows if g.point.id in known or not g.fitted]
    errors_of = {m: [left_out_error(g, m, known.get(g.point.id, {})) for g in chosen] for m in METRICS}
    return {m: [abs(math.expm1(-e)) for e in found if math.isfinite(e)] for m, found in errors_of.items()}


def left_out_error(g: Graded, metric: str, known: dict[str, float]) -> float:
    """Log of measured / predicted where no row of this model was fitted on; output rates of a closed loop by Little's law."""
    if metric in known:
        return known[metric]
    if known:
        tokens = g.point.osl * 0.9 - 1
        ttft, tpot = g.measured["ttft"], g.measured["tpot"]
        predicted = ttft * math.exp(-known["ttft"]) + tokens * tpot * math.exp(-known["tpot"])
        return math.log(predicted / (ttft + tokens * tpot))
    return -math.log1p(g.error(metric))


def ratios(free: list[Graded], others: list[Graded]) -> list[str]:
    """Generation and TP ratios between measured rows of vLLM that differ in nothing else; the names of those that miss by much.

    No published anchor exists for them, so they are no target; the limit is the anchors'.
    """
    print("\nRatios of measured rows that differ in one thing (output tok/s): predicted over measured ratio - 1")
    missed = []
    for source, rows, differ in (
        ("serving sample, TP", free, "tp"),
        ("serving sample", free, "gpu"),
        ("other sources", others, "gpu"),
    ):
        for pair, signed in sorted(ratio_errors(rows, differ).items()):
            middle, typical = statistics.median(signed), statistics.median(map(abs, signed))
            name = f"{source} {pair}"
            over = typical > RATIO_TARGET
            missed += [f"{name} (vLLM)"] if over else []
            print(
                f"  {name:46s} {len(signed):5d} pairs   median error {typical:6.1%}   bias {middle:+6.1%}"
                f"{f'   over {RATIO_TARGET:.0%}' if over else ''}"
            )
    return missed


def verdict(
    free: list[Graded],
    full: list[Graded],
    others: list[Graded],
    covered: dict[str, tuple[float, int]],
    anchors: list[Anchor],
    missed: list[str],
) -> bool:
    """Print every target beside what was reached, and what beyond the targets (``missed`` and pairs) is off by much."""
    print("\nTargets: vLLM rows of H100 and H200, median error")
    met = []

    def line(name: str, value: float, target: str, ok: bool) -> None:
        met.append(ok)
        print(f"  {name:58s} {value:6.1%}  target {target:9s} {'met' if ok else 'MISSED'}")

    for e in errors(free, lambda g: ""):
        line(TITLES[e.metric], e.median_ape, f"{TARGETS[e.metric]:.0%}", e.median_ape <= TARGETS[e.metric])
    for e in errors(full, lambda g: ""):
        name = f"{TITLES[e.metric]}, saturated ({e.num_rows} rows)"
        line(name, e.median_ape, f"{SATURATED_TARGET:.0%}", e.median_ape <= SATURATED_TARGET)
    offline = [g for g in others if g.point.kind == "offline" and g.point.gpu in OWN_CURVES]
    for e in errors(offline, lambda g: ""):
        if e.metric == "output_tokens_per_s":
            name = f"output tok/s, published offline rows ({e.num_rows})"
            line(name, e.median_ape, f"{OFFLINE_TARGET:.0%}", e.median_ape <= OFFLINE_TARGET)
    for metric, misses in held_out(free).items():
        name = f"{TITLES[metric]}, each model left out of the fit ({len(misses)} rows)"
        typical = statistics.median(misses)
        line(name, typical, f"{TARGETS[metric]:.0%}", typical <= TARGETS[metric])
    low, high = COVERAGE_TARGET
    for metric, (share, num_rows) in covered.items():
        name = f"90 % interval of {TITLES[metric]}, models left out ({num_rows} rows)"
        line(name, share, f"{low:.0%}-{high:.0%}", low <= share <= high)
    print(
        "\nAnchors (TensorRT-LLM's by its own engine profile): medians over pairs of equal lengths and TP, predicted and published; what"
        " has no target is for information"
    )
    for anchor in anchors:
        print(f"  {anchor.line()}")
        if anchor.limit is not None:
            met.append(anchor.met)
    print(f"\n{sum(met)} of {len(met)} targets met")
    missed += [f"{a.name}, pair by pair" for a in anchors if abs(a.pair_error) > RATIO_TARGET]
    missed += [a.name for a in anchors if a.limit is None and abs(a.error) > RATIO_TARGET]
    print(f"Ratios without a target that are off by more than {RATIO_TARGET:.0%}: {'; '.join(missed) or 'none'}")
    return all(met)


def as_rows(graded: list[Graded]) -> list[dict[str, object]]:
    rows = []
    for g in graded:
        row: dict[str, object] = {
            k: v for k, v in dataclasses.asdict(g.point).items() if k not in ("ttft_s", "tpot_s", "output_tokens_per_s")
        }
        for m in METRICS:
            row[f"measured_{m}"], row[f"predicted_{m}"] = g.measured[m], g.predicted[m]
        rows.append({**row, "saturated": g.saturated, "fitted": g.fitted, "contradiction": g.contradiction})
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
    anchors = list(all_anchors())
    met = show(graded, refused, anchors)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_rows(graded), indent=0, default=str) + "\n", encoding="utf-8")
    if arguments.figures:
        from bench.sim.accuracy_pictures import anchors_picture, draw_all

        for path in draw_all([g for g in graded if not g.contradiction], arguments.figures):
            print(f"wrote {path}")
        print(f"wrote {anchors_picture(graded_full_load(), anchors, arguments.figures / 'prediction-anchors.png')}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
