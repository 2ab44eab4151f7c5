"""`bench breakeven`: from which monthly volume on self-hosting beats an API."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.errors import EXIT_DONE

if TYPE_CHECKING:
    from bench.config.decision import Decision
    from bench.decide.breakeven import BreakEven
    from bench.decide.decision import Compared


@click.command("breakeven")
@click.argument("decision", required=False)
@click.option("--gpu", help="GPU of a quick comparison, e.g. H100-SXM (instead of a decision file).")
@click.option("--gpus", type=int, default=1, show_default=True, help="GPUs of one replica.")
@click.option("--gpu-price", type=float, help="USD per GPU-hour; default: the catalogue's median on-demand offer.")
@click.option("--tokens-per-s", type=float, help="Tokens/s of one replica, input and output together.")
@click.option("--from", "results", help="Take the throughput from these results (folder or experiment name).")
@click.option("--cell", help="Part of the cell's id in --from; default: the one with the highest throughput.")
@click.option("--api", "apis", multiple=True, help="API price: id, provider/model or model. May be repeated.")
@click.option("--mix", default="1:1", show_default=True, help="Input:output tokens.")
@click.option("--volume", "volumes", multiple=True, help="Tokens a month, e.g. 10M. May be repeated.")
@click.option("--min-replicas", type=int, default=1, show_default=True, help="Least replicas (redundancy).")
@click.option("--peak-to-mean", type=float, default=1.0, show_default=True, help="Peak over mean load of the day.")
@click.option("--by-hour", is_flag=True, help="Pay only for the hours used, not around the clock.")
@click.option("--out", type=click.Path(file_okay=False), help="Write the decision page (HTML, Markdown, charts) here.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of tables.")
def command(decision: str | None, out: str | None, as_json: bool, **quick: Any) -> int:
    """Compare self-hosting with APIs: DECISION (a file, or a name in configs/decisions/), or a quick one by options.

    Prints dollars per month of every option at every volume and the volumes where the curves cross.
    """
    from bench.decide.decision import compare, load_decision

    spec = load_decision(decision)[0] if decision else _quick(**quick)
    compared = compare(spec, curves=out is not None)
    if as_json:
        click.echo(json.dumps(to_json(compared), indent=1, default=str))
    else:
        _print(compared)
    if out:
        from bench.report.decision import write_decision

        paths = write_decision(compared, Path(out))
        if not as_json:
            click.echo(f"decision page: {paths.html}")
    return EXIT_DONE


def _quick(*, apis: tuple[str, ...], mix: str, volumes: tuple[str, ...], by_hour: bool, **option: Any) -> Decision:
    """A decision of one option from the command line's options (those of :class:`SelfHostSpec` under their flags' names)."""
    from pydantic import ValidationError

    from bench.catalog.hardware import load_hardware
    from bench.catalog.prices import load_prices
    from bench.config.decision import Decision
    from bench.errors import BadInput
    from bench.units import counted

    gpu, gpus, gpu_price = option.pop("gpu"), option.pop("gpus"), option.pop("gpu_price")
    if gpu is None:
        raise BadInput(
            "give a decision file, or --gpu with --tokens-per-s or --from",
            next_step="`bench breakeven self-host-or-api` shows the worked example",
        )
    price: dict[str, Any] = {"usd_per_gpu_hour": gpu_price}
    if gpu_price is None:
        found = load_prices().gpu_range(load_hardware(gpu).name)
        price = {
            "usd_per_gpu_hour": found.typical.amount,
            "usd_per_gpu_hour_low": found.low.amount,
            "usd_per_gpu_hour_high": found.high.amount,
            "price_note": f"median of {counted(len(found.offers), 'on-demand offer')} of the catalogue",
        }
    option |= {"name": f"{gpus}×{gpu}", "gpu": gpu, "num_gpus": gpus, **price}
    option["billing"] = "by_hour" if by_hour else "around_clock"
    raw: dict[str, Any] = {
        "name": "quick",
        "why": "from the command line",
        "mix": mix,
        "options": [option],
        "apis": list(apis) or ["openai/gpt-4o"],
    }
    if volumes:
        raw["volumes"] = list(volumes)
    try:
        return Decision.model_validate(raw)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(str(p) for p in first["loc"] if p not in ("options", 0))
        flag = {"usd_per_gpu_hour": "gpu-price", "num_gpus": "gpus", "results": "from"}.get(
            field, field.replace("_", "-")
        )
        text = first["msg"].removeprefix("Value error, ")
        raise BadInput(text, where=f"--{flag}" if flag else None) from None


def to_json(compared: Compared) -> dict[str, Any]:
    """Every number of the comparison, for machines."""
    from bench.decide.sensitivity import decision_flips

    mix = compared.mix
    costs: dict[str, dict[str, float]] = {}
    for o in compared.options:
        costs[o.option.name] = {f"{v:g}": o.option.monthly_usd(v) for v in compared.volumes}
    for a in compared.apis:
        costs[a.name] = {f"{v:g}": a.monthly_usd(v, mix) for v in compared.volumes}
    return {
        "name": compared.name,
        "mix": mix.text,
        "hours_per_month": compared.options[0].option.hours_per_month,
        "monthly_usd": costs,
        "options": [
            {
                **asdict(o.option),
                "price_source": o.price.source,
                "price_band": None if o.price.band is None else asdict(o.price.band),
                "rate_source": o.rate.source,
            }
            for o in compared.options
        ],
        "crossings": [
            {
                "option": p.option.name,
                "api": p.api.name,
                "first_tokens_per_month": None if p.first is None else asdict(p.first),
                "always_tokens_per_month": p.crossing.always_tokens,
                "first_tokens_per_month_by_price": _by_price(p),
                "api_usd_per_million": p.api_usd_per_million,
                "self_host_usd_per_million_at_full_use": p.full_use_usd_per_million,
            }
            for p in compared.pairs
        ],
        "flips": {
            f"{v:g}": [asdict(f) for f in decision_flips([o.option for o in compared.options], compared.apis, mix, v)]
            for v in compared.volumes
        },
        "cheapest": {f"{v:g}": compared.cheapest(v)[0] for v in compared.volumes},
        "warnings": [asdict(w) for w in compared.warnings],
    }


def _by_price(pair: BreakEven) -> list[dict[str, float | None]] | None:
    """The crossing at the cheapest and at the dearest known GPU-hour; null tokens: never."""
    if pair.price_ends is None or pair.by_price is None:
        return None
    ends = zip(pair.price_ends, pair.by_price, strict=True)
    return [{"usd_per_gpu_hour": usd, "tokens_per_month": c.first_tokens} for usd, c in ends]


def _print(compared: Compared) -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.report.decision_text import (
        answer_sentence,
        band_lines,
        by_price_text,
        crossing_text,
        flips_sentence,
        share_text,
        volume_text,
    )
    from bench.units import significant, usd_text

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{compared.name}: {compared.why}", markup=False, highlight=False)
    hosts = [o.option for o in compared.options]
    for volume in compared.volumes:
        console.print(answer_sentence(hosts, compared.apis, compared.mix, volume), markup=False, highlight=False)
    table = Table("option", "tokens/s", "$/M at full use", *[f"{volume_text(v)}/month" for v in compared.volumes])
    for o in compared.options:
        s = o.option
        cells = []
        for v in compared.volumes:
            usage = (
                f" ({s.num_replicas(v)}×, {share_text(s.utilisation(v))} used)" if s.billing == "around_clock" else ""
            )
            cells.append(usd_text(s.monthly_usd(v)) + usage)
        per_million = usd_text(s.usd_per_replica_hour / 3600 / s.tokens_per_s.value * 1e6)
        rate = f"{significant(s.tokens_per_s.value)} {'' if s.origin == 'measured' else f'({s.origin})'}"
        table.add_row(s.name, rate, per_million, *cells)
    for a in compared.apis:
        per_million = usd_text(a.usd_per_token(compared.mix) * 1e6)
        table.add_row(a.name, "", per_million, *[usd_text(a.monthly_usd(v, compared.mix)) for v in compared.volumes])
    winners = [compared.cheapest(v)[0] for v in compared.volumes]
    table.add_section()
    table.add_row("cheapest", "", "", *winners, style="bold")
    console.print(table)
    crossings = Table("self-host", "beats", "from", "over the band of GPU prices")
    for p in compared.pairs:
        crossings.add_row(p.option.name, p.api.name, crossing_text(p), by_price_text(p))
    console.print(crossings)
    for line in band_lines(compared):
        console.print(line, markup=False, highlight=False)
    for volume in compared.volumes:
        console.print(flips_sentence(hosts, compared.apis, compared.mix, volume), markup=False, highlight=False)
    hours = compared.options[0].option.hours_per_month
    console.print(f"input:output {compared.mix.text}; a month is {hours:g} hours", markup=False, highlight=False)
    for w in compared.warnings:
        console.print(f"{w.severity}: {w.message}; {w.remedy}", markup=False, highlight=False)
