"""`bench plan`: the cheapest fleet for a demand and an SLO."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.errors import EXIT_DONE, BadInput

if TYPE_CHECKING:
    from bench.config.demand import Demand
    from bench.decide.plan import Plan, SizedFleet


@click.command("plan")
@click.argument("demand", required=False)
@click.option("--model", default="llama-3.1-8b", show_default=True, help="Model: catalogue name, path or hub id.")
@click.option("--rate", type=float, help="Requests per second at the peak.")
@click.option("--trace", type=click.Path(), help="A request trace instead of --rate, --isl and --osl.")
@click.option("--growth", type=float, default=0.0, show_default=True, help="Growth a month, e.g. 0.1 for 10 %.")
@click.option("--horizon", type=int, default=0, show_default=True, help="Months ahead to size the fleet for.")
@click.option("--mean-rate", type=float, help="Requests per second on average [default: the peak, all day].")
@click.option(
    "--isl", type=int, default=1000, show_default=True, help="Prompt tokens (a demand file takes distributions)."
)
@click.option("--osl", type=int, default=300, show_default=True, help="Output tokens.")
@click.option(
    "--slo",
    default="ttft p99 <= 1 s and tpot p95 <= 50 ms",
    show_default=True,
    help="A name in configs/slo/ or a text.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    help="Candidate GPUs, comma-separated or repeated [default: A100-80-SXM, H100-SXM, H200-SXM, L40S].",
)
@click.option(
    "--gpu-price", "gpu_prices", multiple=True, metavar="GPU=USD", help="Your price per GPU-hour, e.g. H100-SXM=2.5."
)
@click.option("--tp", "tps", default="1,2,4,8", show_default=True, help="Tensor parallel sizes to try.")
@click.option(
    "--quantization", "quantizations", multiple=True, help="Weight formats to try beside the model's own, e.g. fp8."
)
@click.option("--spares", type=int, default=1, show_default=True, help="Spare replicas (N + spares).")
@click.option("--zones", type=int, default=1, show_default=True, help="Zones; with several, one may be lost.")
@click.option(
    "--headroom", type=float, default=0.15, show_default=True, help="Share of a replica left free at the peak."
)
@click.option("--out", type=click.Path(file_okay=False), help="Write the plan as a page (HTML, Markdown, charts) here.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of tables.")
def command(demand: str | None, out: str | None, as_json: bool, **quick: Any) -> int:
    """Find the cheapest fleets for DEMAND (a file, or a name in configs/demands/), or for a demand given by options.

    Capacities are simulated with vLLM's scheduler (or taken from your own results); each plan is checked by simulating
    the peak against it.
    """
    from bench.decide.plan import make_plan

    spec = _load(demand) if demand else _quick(**quick)
    noisy = sys.stderr.isatty() and not as_json
    plan = make_plan(
        spec, (lambda text: click.echo(f"\r\x1b[K{text}", nl=False, err=True)) if noisy else lambda text: None
    )
    if noisy:
        click.echo("\r\x1b[K", nl=False, err=True)
    if as_json:
        click.echo(json.dumps(to_json(plan), indent=1, default=str))
    else:
        _print(plan)
    if out:
        from bench.report.decision import write_plan

        files = write_plan(plan, Path(out))
        if not as_json:
            click.echo(f"plan page: {files.html}")
    return EXIT_DONE


def _load(name_or_path: str) -> Demand:
    from bench.catalog.yaml_source import catalogue_files, load_yaml, looks_like_path, unknown_name, validate
    from bench.config.demand import Demand

    if looks_like_path(name_or_path):
        return validate(load_yaml(name_or_path), Demand)
    known = catalogue_files("demands")
    if name_or_path not in known:
        raise unknown_name("demand file", name_or_path, known)
    return validate(load_yaml(known[name_or_path]), Demand)


def _quick(
    model: str,
    rate: float | None,
    trace: str | None,
    growth: float,
    horizon: int,
    mean_rate: float | None,
    isl: int,
    osl: int,
    slo: str,
    gpus: tuple[str, ...],
    gpu_prices: tuple[str, ...],
    tps: str,
    quantizations: tuple[str, ...],
    spares: int,
    zones: int,
    headroom: float,
) -> Demand:
    from pydantic import ValidationError

    from bench.config.demand import Demand

    if rate is None and trace is None:
        raise BadInput("give a demand file, --rate or --trace", next_step="for example `bench plan --rate 50`")
    candidates = _candidates(gpus, gpu_prices, tps, [None, *quantizations])
    raw = {
        "model": model,
        "peak_rate_per_s": rate,
        "mean_rate_per_s": mean_rate,
        "isl": isl if trace is None else None,
        "osl": osl if trace is None else None,
        "trace": trace,
        "growth_per_month": growth,
        "horizon_months": horizon,
        "slo": slo,
        "spare_replicas": spares,
        "zones": zones,
        "headroom": headroom,
        "candidates": candidates,
    }
    try:
        return Demand.model_validate(raw)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = (
            str(first["loc"][0]).replace("_rate_per_s", "-rate").replace("peak-rate", "rate") if first["loc"] else ""
        )
        text = first["msg"].removeprefix("Value error, ")
        raise BadInput(
            f"{text[0].lower()}{text[1:]}, got {first.get('input')!r}" if field else text,
            where=f"--{field}" if field else None,
        ) from None


def _candidates(
    gpus: tuple[str, ...], gpu_prices: tuple[str, ...], tps: str, forms: list[str | None]
) -> list[dict[str, Any]]:
    """The candidates of a demand file, from options. Raises BadInput."""
    from bench.catalog.hardware import load_hardware

    names = [n.strip() for g in gpus for n in g.split(",") if n.strip()] or [
        "A100-80-SXM",
        "H100-SXM",
        "H200-SXM",
        "L40S",
    ]
    prices = dict(_own_price(text) for text in gpu_prices)
    known = [load_hardware(n).name for n in names]
    unused = set(prices) - set(known)
    if unused:
        raise BadInput(
            f"{', '.join(sorted(unused))} is not among the candidates",
            where="--gpu-price",
            next_step="name it with --gpu too",
        )
    try:
        sizes = [int(t) for t in tps.split(",")]
    except ValueError:
        raise BadInput(f"expected sizes such as 1,2,4, got {tps!r}", where="--tp") from None
    return [
        {"gpu": n, "usd_per_gpu_hour": prices.get(n), "tensor_parallel_sizes": sizes, "quantizations": forms}
        for n in known
    ]


def _own_price(text: str) -> tuple[str, float]:
    from bench.catalog.hardware import load_hardware

    name, _, value = text.partition("=")
    try:
        usd = float(value)
    except ValueError:
        usd = -1.0
    if usd < 0:
        raise BadInput(f'expected GPU=USD such as H100-SXM=2.5, got "{text}"', where="--gpu-price")
    return load_hardware(name).name, usd


def to_json(plan: Plan) -> dict[str, Any]:
    """Every number of the plan, for machines."""
    return {
        "demand": plan.demand.model_dump(mode="json"),
        "slo": plan.slo.text,
        "peak_rate_per_s": plan.peak_per_s,
        "rates_per_s": plan.rates_per_s,
        "fleets": [_fleet_json(f) for f in plan.fleets],
        "lost": [asdict(x) for x in plan.lost],
        "why_runner_up_lost": plan.why_runner_up_lost,
        "sensitivity": asdict(plan.flips) if plan.flips else None,
        "warnings": [asdict(w) for w in plan.warnings],
        "load_source": plan.load_source,
        "growth": [asdict(s) for s in plan.stages],
        "risks_at_peak": {name: asdict(v) for name, v in plan.risks},
    }


def _fleet_json(f: SizedFleet) -> dict[str, Any]:
    spec = f.spec
    return {
        "name": f.name,
        "origin": f.origin,
        "trust": f.trust,
        "capacity_source": f.capacity_source,
        "interval": f.interval_text,
        "gpu": spec.hardware.name if spec else None,
        "tensor_parallel_size": f.gpus_per_replica,
        "max_num_seqs": spec.max_num_seqs if spec else None,
        "max_num_batched_tokens": spec.max_num_batched_tokens if spec else None,
        "capacity_requests_per_s_per_replica": f.capacity_per_s,
        "usd_per_gpu_hour": f.usd_per_gpu_hour,
        "price_source": f.price_source,
        "cost": {
            **asdict(f.cost),
            "always_usd_per_million": f.cost.always_usd_per_million,
            "scaled_usd_per_million": f.cost.scaled_usd_per_million,
        },
        "simulated_at_peak": asdict(f.at_peak) if f.at_peak else None,
        "simulated_at_1.5x_peak": asdict(f.beyond) if f.beyond else None,
        "replicas_added_by_check": f.added,
        "serving_replicas_at_slow_end_of_interval": f.num_conservative,
    }


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.report.decision_text import (
        autoscaled_text,
        checked_text,
        flip_lines,
        growth_text,
        plan_answer,
        risk_text,
    )
    from bench.units import significant, usd_text

    console = Console(width=None if sys.stdout.isatty() else 150)
    say = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
    label = " (SIMULATED)" if plan.fleets[0].origin == "simulated" else ""
    say(plan_answer(plan) + label + ".")
    table = Table(
        "fleet",
        "replicas",
        "GPUs",
        "requests/s each",
        "$/month",
        "$/M tokens",
        "used",
        "autoscaled $/month",
        "$/M",
        "SLO at the peak",
    )
    for f in plan.fleets:
        c = f.cost
        table.add_row(
            f.name,
            f"{c.num_serving} + {c.num_replicas - c.num_serving}",
            str(c.num_gpus),
            f"{significant(f.capacity_per_s)}{'' if f.origin == 'measured' else ' sim' if f.origin == 'simulated' else f' {f.origin}'}",
            usd_text(c.always_usd_per_month),
            usd_text(c.always_usd_per_million),
            f"{c.utilisation_ratio:.0%}",
            usd_text(c.scaled_usd_per_month),
            usd_text(c.scaled_usd_per_million),
            checked_text(f),
        )
    console.print(table)
    if plan.why_runner_up_lost:
        say(f"runner-up: {plan.why_runner_up_lost}")
    if scaled := autoscaled_text(plan):
        say(scaled)
    for line in flip_lines(plan):
        say(line)
    for name, v in plan.risks:
        say(risk_text(name, v))
    if plan.stages:
        say(growth_text(plan))
    for x in plan.lost:
        say(f"not in the list: {x.name}: {x.reason}")
    say(f"price: {plan.fleets[0].usd_per_gpu_hour:.2f} $/GPU-h, {plan.fleets[0].price_source}; a month is 720 hours")
    for w in plan.warnings:
        say(f"{w.severity}: {w.message}; {w.remedy}")
