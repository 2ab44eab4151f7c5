"""`bench catalog`: the models, hardware, prices and SLOs that are known, each fact with its source."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import click

from bench.cli import HintingGroup
from bench.cli.console import console
from bench.errors import EXIT_DONE

if TYPE_CHECKING:
    from rich.table import Table

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")


class _Catalog(HintingGroup):
    """Takes ``gpus`` for ``hardware``: every other command says --gpu."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, "hardware" if cmd_name in ("gpu", "gpus") else cmd_name)


@click.group("catalog", cls=_Catalog)
def command() -> None:
    """List what is known, or show one entry with the source of every fact.

    Files of your own in ./configs or $TOKENYIELD_CONFIGS come first; see docs/catalogue.md.
    """


@command.command("models")
@click.argument("name", required=False)
@_JSON
def models(name: str | None, as_json: bool) -> int:
    """Models: all, or NAME (also a hub id, a folder or a config.json) with its arithmetic and sources."""
    from bench.catalog.model import list_models, load_model

    if name is not None:
        return _show(_model_facts(load_model(name)), as_json)
    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "num_params": m.num_params,
            "num_active_params": m.num_active_params,
            "num_layers": m.num_layers,
            "attention": _attention(m),
            "kv_bytes_per_token": m.kv_bytes_per_token(),
            "weights": m.quant().name,
            "weight_bytes": m.weight_bytes(),
            "max_position": m.max_position,
            "hub_id": m.hub_id,
        }
        for m in list_models()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return EXIT_DONE
    from bench.cli.fit import billions
    from bench.units import bytes_text

    table = _table(
        "name", "parameters>", "active>", "layers>", "attention", "KV / token>", "weights>", "context>", "hub id"
    )
    for r in rows:
        active = billions(r["num_active_params"]) if r["num_active_params"] < 0.99 * r["num_params"] else ""
        table.add_row(
            r["name"], billions(r["num_params"]), active, str(r["num_layers"]), r["attention"], bytes_text(r["kv_bytes_per_token"]),
            f"{bytes_text(r['weight_bytes'])} {r['weights']}", f"{r['max_position']:,}", r["hub_id"] or "",
        )  # fmt: skip
    return _print(table)


def _attention(m: Any) -> str:
    """``MLA``, ``GQA 32/8``, ``GQA 64/8, sliding 128``..."""
    if m.mla is not None:
        text = f"MLA {m.mla.kv_lora_rank}+{m.mla.qk_rope_head_dim}"
    elif m.num_kv_heads == m.num_heads:
        text = f"MHA {m.num_heads}"
    else:
        text = f"{'MQA' if m.num_kv_heads == 1 else 'GQA'} {m.num_heads}/{m.num_kv_heads}"
    windows = {(k.attention, k.window) for k in m.layers if k.attention != "full"}
    return text + "".join(f", {kind} {size:,}" for kind, size in sorted(windows))


def _model_facts(m: Any) -> dict[str, Any]:
    from bench.catalog.facts import Fact
    from bench.catalog.quant import list_formats

    facts = {k: _fact(v) for k, v in m.facts.items() if isinstance(v, Fact)}
    moe = None if m.moe is None else {name: getattr(m.moe, name) for name in m.moe.__slots__}
    return {
        "name": m.name,
        "description": m.facts.get("description"),
        "license": m.facts.get("license"),
        "hub_id": m.hub_id,
        "num_params": m.num_params,
        "num_active_params": m.num_active_params,
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "attention": _attention(m),
        "moe": moe,
        "kv_bytes_per_token": m.kv_bytes_per_token(),
        "kv_bytes_per_token_fp8": m.kv_bytes_per_token("fp8"),
        "weight_bytes": {"checkpoint": m.weight_bytes(), **{f.name: m.weight_bytes(f.name) for f in list_formats()}},
        "published": facts,
        "notes": list(m.notes),
    }


@command.command("hardware")
@click.argument("name", required=False)
@_JSON
def hardware(name: str | None, as_json: bool) -> int:
    """Devices (also: gpus): all, or NAME with the source of every number."""
    from bench.catalog.hardware import list_hardware, load_hardware

    if name is not None:
        h = load_hardware(name)
        return _show({"name": h.name, "description": h.description, "aliases": list(h.aliases), "nvml_names": list(h.nvml_names),
                      "link": h.link, "facts": {k: _fact(v) for k, v in h.facts.items()}}, as_json)  # fmt: skip
    devices = list_hardware()
    if as_json:
        keep = ("name", "kind", "memory_bytes", "usable_memory_bytes", "memory_bandwidth_bytes_per_s", "peak_flops",
                "link_bandwidth_bytes_per_s", "pcie_bandwidth_bytes_per_s", "tdp_w", "num_sms", "l2_bytes", "compute_capability")  # fmt: skip
        click.echo(json.dumps([{k: getattr(h, k) for k in keep} for h in devices], indent=1))
        return EXIT_DONE
    from bench.units import bytes_text, si

    table = _table("name", "memory>", "CUDA sees>", "bandwidth>", "bf16>", "fp8>", "link>", "TDP>", "also called")
    for h in devices:
        if h.kind == "cpu":
            table.add_row(h.name, "", "", "", "", "", "", "", "measure it: `bench kernels`")
            continue
        table.add_row(
            h.name, bytes_text(h.memory_bytes), bytes_text(h.usable_memory_bytes), si(h.memory_bandwidth_bytes_per_s, "B/s"),
            si(h.peak_flops.get("bf16", float("nan")), "FLOP/s"), si(h.peak_flops.get("fp8", float("nan")), "FLOP/s"),
            si(h.link_bandwidth_bytes_per_s, "B/s"), f"{h.tdp_w:g} W", ", ".join(h.aliases[:2]),
        )  # fmt: skip
    return _print(table)


@command.command("prices")
@click.argument("name", required=False)
@click.option(
    "--file", "files", multiple=True, type=click.Path(), help="Price file of your own, laid over the catalogue."
)
@_JSON
def prices(name: str | None, files: tuple[str, ...], as_json: bool) -> int:
    """Prices: ranges by GPU and every API, or those of NAME (a GPU, a provider, an API model or an id)."""
    from bench.catalog.prices import load_prices
    from bench.catalog.yaml_source import normalised, unknown_name

    book = load_prices(*files)
    everything: list[Any] = [*book.gpu_hours, *book.owned, *book.api]
    if name is None and not as_json:
        return _price_overview(book)
    chosen = everything
    if name is not None:
        wanted = normalised(name)

        def texts(p: Any) -> set[str]:
            words = (
                p.id,
                getattr(p, "gpu", ""),
                getattr(p, "provider", ""),
                getattr(p, "model", ""),
                getattr(p, "label", ""),
            )
            return {normalised(w) for w in words if w}

        chosen = [p for p in everything if wanted in texts(p)]
        if not chosen:
            raise unknown_name("price", name, {w for p in everything for w in (p.id, getattr(p, "gpu", None)) if w})
    if as_json:
        rows = [{n: getattr(p, n) for n in _field_names(p)} for p in chosen]
        click.echo(json.dumps(rows, indent=1, default=str))
        return EXIT_DONE
    table = _table("id", "price>", "as of", "days old>", "source")
    for p in chosen:
        table.add_row(
            p.id, _price_text(p), str(p.as_of), f"{p.age_days():,}", p.source + (f" ({p.note})" if p.note else "")
        )
    _print(table)
    for warning in book.warnings(chosen):
        click.echo(f"old: {warning.message}; {warning.remedy}", err=True)
    return EXIT_DONE


def _field_names(value: Any) -> list[str]:
    from dataclasses import fields

    return [f.name for f in fields(value)]


def _price_text(p: Any) -> str:
    from bench.catalog.prices import ApiPrice, Price

    if isinstance(p, ApiPrice):
        parts = [Price(p.input_per_million, p.currency, "million_tokens").text.split("/")[0] + " in"]
        if p.cached_input_per_million is not None:
            parts.append(Price(p.cached_input_per_million, p.currency, "million_tokens").text.split("/")[0] + " cached")
        parts.append(Price(p.output_per_million, p.currency, "million_tokens").text.split("/")[0] + " out")
        batch = f", batch -{100 * p.batch_discount_ratio:.0f} %" if p.batch_discount_ratio else ""
        return ", ".join(parts) + " per M tokens" + batch
    if p.per_gpu_hour is None:
        return Price(p.capex_per_gpu, p.currency, "gpu").text + f", {p.lifetime_years:g} years"
    text = Price(p.per_gpu_hour, p.currency, "gpu_hour").text
    high = getattr(p, "per_gpu_hour_high", None)
    return text if high is None else f"{text.split('/')[0]} to {Price(high, p.currency, 'gpu_hour').text}"


def _price_overview(book: Any) -> int:
    table = _table("GPU", "low>", "typical>", "high>", "on-demand offers>", "newest", title="GPU hours, on demand, USD")
    used = []
    for gpu in sorted({p.gpu for p in book.gpu_hours if p.commitment == "on_demand" and not p.example}):
        r = book.gpu_range(gpu)
        used += r.offers
        newest = max(p.as_of for p in r.offers)
        table.add_row(gpu, r.low.text, r.typical.text, r.high.text, str(len(r.offers)), str(newest))
    _print(table)
    used += _other_offers(book)
    table = _table("API", "price>", "as of", title="APIs")
    newest_api = {p.id: p for p in sorted(book.api, key=lambda p: p.as_of)}
    for p in sorted(newest_api.values(), key=lambda p: p.id):
        table.add_row(p.id, _price_text(p), str(p.as_of))
    _print(table)
    old = book.warnings([*used, *newest_api.values()])
    if old:
        click.echo(
            f"{len(old)} of these prices are older than half a year; `bench catalog prices NAME` shows which.", err=True
        )
    return EXIT_DONE


def _other_offers(book: Any) -> list[Any]:
    """Print what is not rented by the hour on demand: commitments, spot, dedicated endpoints and owned hardware."""
    table = _table("GPU", "commitment", "low>", "high>", "offers>", "newest", title="GPU hours, other terms, USD")
    shown: list[Any] = []
    pairs = {(p.gpu, p.commitment) for p in book.gpu_hours if p.commitment != "on_demand" and not p.example}
    for gpu, commitment in sorted(pairs):
        r = book.gpu_range(gpu, commitment)
        shown += r.offers
        newest = max(p.as_of for p in r.offers)
        words = commitment.replace("_", " ")
        table.add_row(gpu, words, r.low.text, r.high.text, str(len(r.offers)), str(newest))
    _print(table)
    table = _table("owned", "price>", "as of", title="Owned hardware: purchases, and modelled hours")
    newest_owned = {p.id: p for p in sorted(book.owned, key=lambda p: p.as_of)}
    for p in sorted(newest_owned.values(), key=lambda p: p.id):
        table.add_row(p.id, _price_text(p), str(p.as_of))
    _print(table)
    return [*shown, *newest_owned.values()]


@command.command("slo")
@click.argument("name", required=False)
@_JSON
def slo(name: str | None, as_json: bool) -> int:
    """Service-level objectives: all, or NAME (or a text such as "ttft p99 <= 500 ms") as it is understood."""
    from bench.catalog.slo import list_slo, load_slo

    if name is not None:
        s = load_slo(name)
        limits = [{"metric": x.metric, "percentile": x.percentile, "limit_s": x.limit_s} for x in s.limits]
        return _show({"name": s.name, "description": s.description, "slo": s.text, "limits": limits, "required_ratio": s.required_ratio,
                      "source": s.source, "as_of": str(s.as_of) if s.as_of else None}, as_json)  # fmt: skip
    entries = list_slo()
    if as_json:
        click.echo(
            json.dumps(
                [{"name": s.name, "slo": s.text, "source": s.source, "as_of": str(s.as_of)} for s in entries], indent=1
            )
        )
        return EXIT_DONE
    table = _table("name", "limits", "what for")
    for s in entries:
        table.add_row(s.name or "", s.text, s.description)
    return _print(table)


# --- printing --------------------------------------------------------------------------------------------------------


def _fact(fact: Any) -> dict[str, Any]:
    out = {"value": fact.value, "source": fact.source, "as_of": str(fact.as_of)}
    return {**out, "note": fact.note} if fact.note else out


def _table(*columns: str, title: str | None = None) -> Table:
    """A table; a column whose name ends in ``>`` is set flush right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        justify: Literal["left", "right"] = "right" if name.endswith(">") else "left"
        # names are what other commands take: never cut
        table.add_column(name.removesuffix(">"), justify=justify, overflow="fold", no_wrap=name in ("id", "name"))
    return table


def _print(table: Table) -> int:

    console().print(table)
    return EXIT_DONE


def _show(data: dict[str, Any], as_json: bool) -> int:
    """One entry: JSON, or its keys and values with facts on lines of their own."""
    if as_json:
        click.echo(json.dumps(data, indent=1, default=str))
        return EXIT_DONE

    out = console()
    for key, value in data.items():
        if value in (None, "", [], {}):
            continue
        if not isinstance(value, dict):
            out.print(f"[bold]{key}[/bold]: {_plain(value)}")
            continue
        out.print(f"[bold]{key}[/bold]:")
        for name, item in value.items():
            if isinstance(item, dict) and "source" in item:
                note = f"; {item['note']}" if item.get("note") else ""
                out.print(f"  {name}: {_plain(item['value'])}  [dim]{item['source']}, {item['as_of']}{note}[/dim]")
            else:
                out.print(f"  {name}: {_plain(item)}")
    return EXIT_DONE


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:,.6g}"
