"""`bench optimize`: search for the best way to serve a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from bench.cli.predict import ROUTING
from bench.errors import EXIT_DONE, EXIT_SOME_FAILED


def _numbers(text: str | None, option: str, default: tuple[Any, ...]) -> tuple[Any, ...]:
    from bench.errors import BadInput

    if text is None:
        return default
    out: list[int | None] = []
    for part in text.split(","):
        part = part.strip()
        if part == "default":
            out.append(None)
        elif part.isdigit() and int(part) > 0:
            out.append(int(part))
        else:
            raise BadInput(f'expected whole numbers > 0 or "default", comma-separated, got "{text}"', where=option)
    return tuple(dict.fromkeys(out))


def _names(text: str | None) -> tuple[str | None, ...]:
    if text is None:
        return (None,)
    return tuple(
        dict.fromkeys(None if p.strip() in ("default", "none", "auto") else p.strip() for p in text.split(","))
    )


@click.command("optimize")
@click.argument("model")
@click.option("--gpu", "gpus", required=True, metavar="NAME,...", help="GPUs of the catalogue to choose from.")
@click.option(
    "--shape",
    default="1k/1k",
    show_default=True,
    metavar="ISL/OSL",
    help="Lengths in tokens; drawn from 80-100 % of them.",
)
@click.option("--prefix-tokens", type=click.IntRange(0), default=0, help="Leading tokens that prompts share.")
@click.option("--prefix-groups", type=click.IntRange(1), default=1, help="So many different prefixes [1].")
@click.option(
    "--objective",
    type=click.Choice(["throughput", "cost", "goodput"]),
    default="throughput",
    show_default=True,
    help="Per GPU.",
)
@click.option("--slo", metavar="TEXT", help='A name, a file, or e.g. "ttft p99 <= 500 ms and tpot p99 <= 50 ms".')
@click.option(
    "--rate", type=float, help="Requests per second to serve (Poisson); then the fewest replicas are looked for."
)
@click.option("--max-gpus", type=click.IntRange(1), default=8, show_default=True, help="GPUs to use at most.")
@click.option("--routing", type=click.Choice(ROUTING), default="least-loaded", show_default=True, help="Of the fleet.")
@click.option(
    "--disaggregate",
    "kv_link",
    metavar="LINK",
    help="Try prefill and decode pools too, of every ratio; the KV cache moves over LINK: nvlink, pcie, ndr, 40GB/s, ...",
)
@click.option("--tp", metavar="N,...", help="tensor_parallel_size [1,2,4,8].")
@click.option("--pp", metavar="N,...", help="pipeline_parallel_size [1].")
@click.option("--quantization", metavar="NAME,...", help="e.g. none,fp8 [none].")
@click.option("--kv-cache-dtype", metavar="NAME,...", help="e.g. auto,fp8 [auto].")
@click.option("--max-num-seqs", metavar="N,...", help='Numbers or "default".')
@click.option("--max-num-batched-tokens", metavar="N,...", help='Numbers or "default".')
@click.option("--price", type=float, help="USD per GPU hour (default: the catalogue's typical on-demand price).")
@click.option(
    "--profile", type=click.Path(exists=True, dir_okay=False), help="A calibration written by `bench calibrate`."
)
@click.option("--top", type=click.IntRange(1), default=8, show_default=True, help="Engines to list.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def command(
    model: str, gpus: str, shape: str, prefix_tokens: int, prefix_groups: int, objective: str, slo: str | None,
    rate: float | None, max_gpus: int, routing: str, kv_link: str | None,
    tp: str | None, pp: str | None, quantization: str | None, kv_cache_dtype: str | None, max_num_seqs: str | None,
    max_num_batched_tokens: str | None, price: float | None, profile: str | None, top: int, as_json: bool,
) -> int:  # fmt: skip
    """Search how to serve MODEL best: GPU, parallelism, batch limits, precision and replicas, each point simulated.

    The winner is explained: what holds it back, and what every other choice would cost. Nothing is measured.
    """
    from bench.catalog.hardware import load_hardware
    from bench.catalog.model import load_model
    from bench.catalog.slo import load_slo
    from bench.config.experiment import parse_shape
    from bench.engines.simulated import simulate
    from bench.errors import BadInput
    from bench.sim.fleets import link_bytes_per_s
    from bench.sim.search import search
    from bench.sim.search_space import Demand, Space

    try:
        isl, osl = parse_shape(shape)
    except ValueError as e:
        raise BadInput(str(e), where="--shape") from None
    if rate is not None and not 0 < rate < float("inf"):
        raise BadInput(f"expected a number > 0, got {rate}", where="--rate")
    if price is not None and not 0 < price < float("inf"):
        raise BadInput(f"expected a number > 0, got {price}", where="--price")
    hardware = tuple(load_hardware(name.strip()) for name in gpus.split(",") if name.strip())
    if not hardware:
        raise BadInput("name at least one GPU", where="--gpu", next_step="e.g. --gpu H100-SXM,A100-80-SXM")
    space = Space(
        hardware,
        _numbers(tp, "--tp", (1, 2, 4, 8)),
        _numbers(pp, "--pp", (1,)),
        _names(quantization),
        _names(kv_cache_dtype),
        _numbers(max_num_seqs, "--max-num-seqs", (None,)),
        _numbers(max_num_batched_tokens, "--max-num-batched-tokens", (None,)),
        max_gpus,
        routing.replace("-", "_"),  # type: ignore[arg-type]
        kv_link,
    )
    if kv_link is not None:
        for h in hardware:
            link_bytes_per_s(kv_link, h)
    prices = _prices(hardware, price, needed=objective == "cost")
    begin = time.perf_counter()
    found = search(
        load_model(model), space, Demand(isl, osl, prefix_tokens, prefix_groups, rate), simulate,
        objective=objective,  # type: ignore[arg-type]
        slo=load_slo(slo) if slo else None, price_per_gpu_hour=prices,
        profile=Path(profile) if profile else None,
    )  # fmt: skip
    wall_s = time.perf_counter() - begin
    if as_json:
        click.echo(json.dumps(_json(found, objective, prices, wall_s), indent=1))
    else:
        _print(found, objective, prices, wall_s, top, f"{model} {isl}/{osl}", slo)
    return EXIT_DONE if found.ranked else EXIT_SOME_FAILED


def _prices(hardware: tuple[Any, ...], price: float | None, needed: bool) -> dict[str, float]:
    from bench.catalog.prices import load_prices
    from bench.errors import BadInput

    if price is not None:
        return {h.name: price for h in hardware}
    book = load_prices()
    out = {}
    for h in hardware:
        try:
            out[h.name] = float(book.gpu_range(h.name).typical.amount)
        except BadInput:
            if needed:
                raise
    return out


def _describe(p: Any) -> str:
    a = p.axes
    text = f"{a['gpu']} tp{a['tensor_parallel_size']}"
    text += f" pp{a['pipeline_parallel_size']}" if a["pipeline_parallel_size"] > 1 else ""
    text += f" {a['quantization']}" if a["quantization"] else ""
    text += f" kv-{a['kv_cache_dtype']}" if a["kv_cache_dtype"] else ""
    text += f" seqs{a['max_num_seqs']}" if a["max_num_seqs"] else ""
    return text + (f" batched{a['max_num_batched_tokens']}" if a["max_num_batched_tokens"] else "")


def _fleet(p: Any) -> str:
    return f"{p.shape.prefill}p+{p.shape.decode}d" if p.shape.disaggregated else str(p.num_engines)


def _line(p: Any, prices: dict[str, float]) -> str:
    from bench.sim.search import usd_per_million
    from bench.units import significant, usd_text

    v = p.values
    price = prices.get(p.setup.hardware.name)
    cost = usd_text(usd_per_million(p, price)) if price is not None else "n/a"
    level = f"c{p.level}" if p.level else "rate"
    return (
        f"{_describe(p):<40}{_fleet(p):>8} x{p.setup.num_gpus:<4}{level:>6}{significant(v['output_tokens_per_s']):>12}"
        f"{significant(v['output_tokens_per_s'] / p.num_gpus):>12}{v['ttft_p50_s'] * 1e3:>10,.0f}{v['ttft_p99_s'] * 1e3:>10,.0f}"
        f"{v['tpot_p50_s'] * 1e3:>9.1f}{v['tpot_p99_s'] * 1e3:>9.1f}{cost:>10}"
    )


def _print(
    found: Any, objective: str, prices: dict[str, float], wall_s: float, top: int, what: str, slo: str | None
) -> None:
    from bench.sim.scheduler import PROVED_AGAINST_VLLM
    from bench.sim.search_explain import explain

    click.echo(
        f"SIMULATED, nothing here was measured: {what}, best {objective} per GPU; {len(found.points)} configurations in {wall_s:.1f} s"
    )
    if not found.ranked:
        click.echo(f"no configuration {'meets the SLO' if slo else 'keeps up with the rate'}; the nearest:")
        for p in sorted(found.points, key=lambda p: p.values["ttft_p99_s"] + p.values["tpot_p99_s"])[:3]:
            click.echo(f"  {_describe(p)} x{p.num_engines} at {p.level or 'the rate'}: {p.broken}")
        return
    head = (
        f"{'engine':<40}{'engines':>8} {'GPUs':<5}{'load':>6}{'tok/s':>12}{'per GPU':>12}{'TTFT p50':>10}{'p99 ms':>10}"
        f"{'TPOT p50':>9}{'p99 ms':>9}{'$/M out':>10}"
    )
    click.echo(head)
    for p in found.ranked[:top]:
        click.echo(_line(p, prices))
    if any(p.shape.disaggregated for p in found.points):
        click.echo("p+d: engines of a prefill and a decode pool")
    click.echo("the winner as a fleet behind its router, other requests, more of them:")
    click.echo(_line(found.confirmed, prices) + (f"  {found.confirmed.broken}" if found.confirmed.broken else ""))
    click.echo("why:")
    for line in explain(found, objective):  # type: ignore[arg-type]
        click.echo(f"  {line}")
    step_time = found.ranked[0].setup.step_time
    click.echo(f"scheduler: proved step by step against vLLM {PROVED_AGAINST_VLLM}")
    click.echo(f"step times: {step_time.source}")
    for metric in ("output_tokens_per_s", "ttft", "tpot"):
        i = step_time.interval(metric)
        if i is not None:
            click.echo(
                f"  {i.confidence:.0%} interval of {metric}: {i.low_ratio:.2f} to {i.high_ratio:.2f} of the prediction"
            )


def _json(found: Any, objective: str, prices: dict[str, float], wall_s: float) -> dict[str, Any]:
    from bench.sim.scheduler import PROVED_AGAINST_VLLM
    from bench.sim.search import usd_per_million
    from bench.sim.search_explain import explain

    def one(p: Any) -> dict[str, Any]:
        price = prices.get(p.setup.hardware.name)
        return {
            **p.axes,
            "concurrency": p.level or None,
            "num_engines": p.num_engines,
            "prefill_engines": p.shape.prefill or None,
            "decode_engines": p.shape.decode or None,
            "num_gpus": p.num_gpus,
            "values": p.values,
            "slo_broken": p.broken,
            "usd_per_million_output_tokens": usd_per_million(p, price) if price is not None else None,
        }

    return {
        "origin": "simulated",
        "objective": objective,
        "scheduler_proved_against_vllm": PROVED_AGAINST_VLLM,
        "num_configurations": len(found.points),
        "wall_s": wall_s,
        "winner": one(found.confirmed) if found.confirmed else None,
        "ranked": [one(p) for p in found.ranked],
        "why": explain(found, objective) if found.ranked else [],  # type: ignore[arg-type]
        "refused": [{**axes, "reason": reason} for axes, reason in found.refused],
    }
