"""`bench cost`: dollars per million tokens of a run, an experiment or an imported result."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.errors import EXIT_DONE, BadInput

if TYPE_CHECKING:
    from rich.table import Table

    from bench.analysis.summary import Summary
    from bench.records import Estimate


@click.command("cost")
@click.argument("results")
@click.option("--cell", help="Only cells whose id contains this text.")
@click.option(
    "--gpu-price",
    type=click.FloatRange(min=0),
    metavar="USD",
    help="Price of one device-hour; wins over the experiment's.",
)
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of full use at which costs are also stated [default: the experiment's].",
)
@click.option(
    "--output-price-ratio",
    type=float,
    default=4.0,
    show_default=True,
    help="What an output token weighs against an input token when cost is split.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def command(
    results: str,
    cell: str | None,
    gpu_price: float | None,
    utilisation: float | None,
    output_price_ratio: float,
    as_json: bool,
) -> int:
    """Price RESULTS: an experiment (name, file or results folder) or one run's folder.

    Costs are at full use and at a stated utilisation; input and output are split by price ratio and by engine time.
    """
    if not output_price_ratio > 0:
        raise BadInput(
            f"expected a ratio > 0, got {output_price_ratio}", where="--output-price-ratio", next_step="4 is usual"
        )
    experiment, summaries = _read(results, cell)
    share = utilisation or (experiment.utilisation if experiment is not None else 0.5)
    rows, doubts = [], []
    for s in summaries:
        row, warnings = _price_cell(s, experiment, gpu_price, share, output_price_ratio)
        rows.append(row)
        doubts += warnings
    if as_json:
        out = {"utilisation": share, "output_price_ratio": output_price_ratio, "cells": rows}
        out["warnings"] = [asdict(w) for w in dict.fromkeys(doubts)]
        click.echo(json.dumps(out, indent=1, default=_plain))
    else:
        _print(rows, list(dict.fromkeys(doubts)), share, output_price_ratio)
    return EXIT_DONE


def _plain(value: Any) -> Any:
    from bench.records import Estimate

    return asdict(value) if isinstance(value, Estimate) else str(value)


def _read(results: str, cell: str | None) -> tuple[Any, list[Summary]]:
    """(experiment or None, summaries) of an experiment or of a single run's folder."""
    from bench.analysis.predicted import with_stated
    from bench.analysis.summary import summarise_cell
    from bench.decide.results import summaries
    from bench.report.collect import find_folder, planned_experiment
    from bench.store import MANIFEST, RunReader

    path = Path(results)
    if (path / MANIFEST).is_file():
        run = RunReader.open(path)
        return planned_experiment(path.resolve().parent.parent), [with_stated(summarise_cell([run]))]
    folder = find_folder(results)
    return planned_experiment(folder), summaries(folder, cell)


def _price_cell(
    s: Summary, experiment: Any, gpu_price: float | None, share: float, ratio: float
) -> tuple[dict[str, Any], list[Any]]:
    from bench.decide.cost import rate_usd_per_s, split_by_time, token_cost
    from bench.decide.device_price import device_price

    row: dict[str, Any] = {"cell_id": s.cell_id, "origin": s.origin, "num_devices": s.facts.num_devices}
    price, warnings, why_not = device_price(experiment, s.facts, gpu_price)
    output, total = s.estimates.get("output_tokens_per_s"), s.estimates.get("total_tokens_per_s")
    if price is None or output is None or total is None or not output.value > 0:
        row["unpriced"] = why_not or "no throughput could be counted"
        return row, warnings
    rate_in = total.value - output.value
    full = token_cost(price, s.facts.num_devices, output, total, rate_in, ratio=ratio)
    stated = token_cost(price, s.facts.num_devices, output, total, rate_in, ratio=ratio, utilisation=share)
    row |= {
        "price": asdict(price),
        "output_tokens_per_s": output,
        "full_use": full.estimates,
        "stated_use": stated.estimates,
    }
    prefill = s.estimates.get("prefill_time_ratio")
    if prefill is not None:
        usd_per_s = rate_usd_per_s(price.usd_per_hour, s.facts.num_devices)
        per_input, per_output = split_by_time(usd_per_s, rate_in, output.value, prefill.value)
        row["split_by_time"] = {"input_usd_per_million": per_input, "output_usd_per_million": per_output}
    return row, warnings


def _money(e: Estimate | None) -> str:
    from bench.units import usd_text

    if e is None:
        return "n/a"
    text = usd_text(e.value)
    if e.low is not None:
        text += f" ({usd_text(e.low)} – {usd_text(e.high) if e.high is not None else '∞'})"
    return text


def _print(rows: list[dict[str, Any]], doubts: list[Any], share: float, ratio: float) -> None:
    from rich.console import Console

    from bench.analysis.predicted import prediction_line

    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(rows, share))
    priced = [r for r in rows if "price" in r]
    lines = [_price_line(priced[0]["price"])] if priced else []
    lines.append(
        "$/M output charges everything to output tokens, blended spreads it over all tokens; "
        f"by price: an output token weighs {ratio:g} input tokens; by time: steps with prompt tokens go to input."
    )
    of_prediction = prediction_line((r.get("output_tokens_per_s") for r in rows), "In brackets, $/M")
    lines += [of_prediction] if of_prediction else []
    lines += [f"{w.severity}: {w.message}; {w.remedy}" for w in doubts]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _table(rows: list[dict[str, Any]], share: float) -> Table:
    from rich.table import Table

    labelled = any(r["origin"] != "measured" for r in rows if "unpriced" not in r)
    heads = ["cell", "tokens/s out", "$/M output", "$/M blended", f"$/M output at {share:.0%} use"]
    table = Table(*heads, "$/M in | out by price", "$/M in | out by time", *(["origin"] if labelled else []))
    for r in rows:
        if "unpriced" in r:
            table.add_row(r["cell_id"], "", f"not priced: {r['unpriced']}")
            continue
        table.add_row(*_cells(r), *([r["origin"].upper()] if labelled else []))
    return table


def _cells(r: dict[str, Any]) -> list[str]:
    from bench.units import significant, usd_text

    full, stated = r["full_use"], r["stated_use"]
    out_key, mix_key = "cost_usd_per_million_output_tokens", "cost_usd_per_million_blended_tokens"
    by_price = (full["cost_usd_per_million_input_tokens"].value, full[out_key + "_split"].value)
    timed = r.get("split_by_time")
    by_time = None if timed is None else (timed["input_usd_per_million"], timed["output_usd_per_million"])
    split = ["n/a" if pair is None else " | ".join(map(usd_text, pair)) for pair in (by_price, by_time)]
    rate = significant(r["output_tokens_per_s"].value)
    return [r["cell_id"], rate, _money(full[out_key]), _money(full[mix_key]), _money(stated[out_key]), *split]


def _price_line(price: dict[str, Any]) -> str:
    """The price with its source, date and, where offers differ, their spread."""
    from bench.units import usd_text

    dated = f", {price['as_of']}" if price["as_of"] else ""
    low, high = price.get("low_usd_per_hour"), price.get("high_usd_per_hour")
    band = ""
    if low is not None and high is not None and low < high:
        band = f"; offers from {usd_text(low)} to {usd_text(high)}, and costs are in proportion"
    return f"price: {usd_text(price['usd_per_hour'])} per device-hour ({price['source']}{dated}{band})"
