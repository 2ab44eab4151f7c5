"""``bench show RUN``: the records, numbers and provenance of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench.analysis.run_facts import RunFacts
    from bench.analysis.summary import RunSummary
    from bench.store import RunReader


@click.command("show")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--slo", help='A name in configs/slo/ or a text such as "ttft p99 <= 500 ms": adds goodput.')
@click.option(
    "--requests",
    "num_requests",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="How many request records to print.",
)
@click.option("--provenance", is_flag=True, help="Print where it ran and with what, in full.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(run: Path, slo: str | None, num_requests: int, provenance: bool, as_json: bool) -> None:
    """Show one RUN: its folder, or a cell's folder (its newest run)."""
    from bench.analysis.run_facts import run_facts
    from bench.analysis.summary import Yardsticks, summarise_run
    from bench.catalog.slo import load_slo

    reader = _open(run)
    summary = summarise_run(reader, Yardsticks(load_slo(slo) if slo else None))
    facts = run_facts(reader)
    if as_json:
        click.echo(json.dumps(_machine(reader, facts, summary, num_requests), indent=1, default=str))
        return
    _header(reader, facts)
    _numbers(summary)
    _views(facts)
    _warnings(summary)
    _records(reader, num_requests)
    _provenance(facts, provenance)


def _open(path: Path) -> RunReader:
    from bench.errors import BadInput
    from bench.store import MANIFEST, RunReader, list_runs

    if (path / MANIFEST).is_file():
        return RunReader.open(path)
    runs = list_runs(path)
    if runs:
        return runs[-1]
    raise BadInput("not a run", where=str(path), next_step="give a folder results/runs/<experiment>/<cell>/run-...")


def _machine(reader: RunReader, facts: RunFacts, summary: RunSummary, num_requests: int) -> dict[str, Any]:
    from bench.analysis.metrics import METRICS

    return {
        "folder": str(reader.folder),
        "status": facts.status,
        "origin": facts.origin,
        "reason": facts.reason,
        "summary": summary.to_dict(),
        "units": {k: METRICS[k].unit for k in summary.values},
        "requests": [r.to_dict() for r in reader.requests()[:num_requests]],
        "changed_files": reader.verify(),
        "manifest": reader.manifest,
    }


def _header(reader: RunReader, facts: RunFacts) -> None:
    click.secho(f"{facts.experiment} / {facts.cell_id} / {facts.run}", bold=True)
    origin = "" if facts.origin == "measured" else f", {facts.origin.upper()}"
    click.echo(f"status {facts.status}{origin}, repeat {facts.repeat}, started {facts.created_utc or 'unknown'}")
    if facts.reason:
        click.secho(f"reason: {facts.reason}", fg="red")
        error = reader.manifest.get("error")
        tail = str(error.get("log_tail") or "") if isinstance(error, dict) else ""
        for line in tail.strip().splitlines()[-12:]:
            click.echo(f"  | {line}")
    changed = reader.verify()
    if changed:
        click.secho(f"changed since it was written: {', '.join(changed)}", fg="red")
    if facts.spec is not None:
        level = facts.level or ("", 0)
        click.echo(
            f"{facts.spec.model} ({facts.spec.weights} weights), TP {facts.tensor_parallel_size}, {level[0]} {level[1]:g}"
        )
    engine = facts.engine
    kv = facts.kv_capacity_tokens
    held = f"{facts.num_gpus} GPUs" if facts.on_gpu else "no GPU" if facts.devices_known else "GPUs unknown"
    click.echo(
        f"{engine.get('kind') or 'engine unknown'} {engine.get('version') or ''}, {held}"
        + (f", KV cache {kv:,} tokens" if kv else "")
    )


def _numbers(summary: RunSummary) -> None:
    from bench.analysis.metrics import METRICS

    w = summary.window
    if w is None:
        click.echo("nothing was measured")
        return
    steady = "" if w.steady else ", NOT STEADY"
    span = f"{w.start_s:.2f} s to {w.end_s:.2f} s" if w.length_s > 0 else "length not in the file"
    click.echo(f"counted window: {span} ({w.kind}{steady}: {w.reason})")
    click.echo(
        f"requests: {summary.counts['num_requests']:.0f} in all, {summary.counts['num_warmup']:.0f} warm-up, {summary.counts['num_counted']:.0f} counted"
    )
    rows = _rows(summary.values)
    width = max(len(title) for title, _, _ in rows)
    group = ""
    for title, of_group, text in rows:
        if of_group != group:
            group = of_group
            click.secho(f"\n{group}", bold=True)
        click.echo(f"  {title:<{width}}  {text}")
    for key, text in summary.peaks.items():
        click.echo(f"  {METRICS[key].title}: peak {text}")
    if summary.absent:
        click.secho("\nnot available", bold=True)
        for key, why in summary.absent.items():
            click.echo(f"  {METRICS[key].title if key in METRICS else key}: {why}")


def _views(facts: RunFacts) -> None:
    """What the load generator says of itself, and the server's own counts beside the client's."""
    client, view = facts.client, facts.manifest.get("server_view")
    if client:
        click.secho("\nclient", bold=True)
        verdict = f"LIMITED: {client.get('reason')}" if client.get("client_limited") else "not the limit"
        click.echo(f"  verdict: {verdict}; receive times stamped by {client.get('stamps') or 'unknown'}")
        for key, title in (
            ("send_lateness", "send lateness"),
            ("loop_lag", "event-loop lag"),
            ("read_lag", "read lag"),
        ):
            q = client.get(key)
            if isinstance(q, dict) and q.get("num"):
                parts = [
                    f"{n} {_value_text(key, 's', q[f'{n}_s'])}"
                    for n in ("p50", "p99", "max")
                    if q.get(f"{n}_s") is not None
                ]
                click.echo(f"  {title}: {'   '.join(parts)}")
        if client.get("cpu_share"):
            click.echo("  CPU of each client process: " + ", ".join(f"{float(x):.1%}" for x in client["cpu_share"]))
    if isinstance(view, dict):
        click.secho("\nserver's own view beside the client's", bold=True)
        for title, server, mine in (
            ("requests", "server_requests", "client_requests"),
            ("prompt tokens", "server_prompt_tokens", "client_prompt_tokens"),
            ("output tokens", "server_output_tokens", "client_output_tokens"),
        ):
            theirs = view.get(server)
            click.echo(f"  {title}: server {'n/a' if theirs is None else f'{theirs:,.0f}'}, client {view.get(mine):,}")
        for key, title in (("ttft_mean_s", "mean TTFT"), ("tpot_mean_s", "mean TPOT")):
            pair = [view.get(f"{who}_{key}") for who in ("server", "client")]
            told = [
                f"{who} {_value_text(key, 's', v)}"
                for who, v in zip(("server", "client"), pair, strict=True)
                if v is not None
            ]
            if told:
                click.echo(f"  {title}: {', '.join(told)}")


def _rows(values: dict[str, float]) -> list[tuple[str, str, str]]:
    """(title, group, text): percentiles of one distribution on one line, all groups in the order of the definitions."""
    from bench.analysis.metrics import PERCENTILES, definitions

    out = []
    for d in definitions():
        parts = [(n, f"{d.key}_{n}_s") for n in (*(f"p{q}" for q in PERCENTILES), "mean")]
        if d.key in values:
            out.append((d.title, d.group, _value_text(d.key, d.unit, values[d.key])))
        elif any(key in values for _, key in parts):
            text = "   ".join(f"{n} {_value_text(key, 's', values[key])}" for n, key in parts if key in values)
            out.append((d.title, d.group, text))
    return sorted(out, key=lambda row: list(dict.fromkeys(d.group for d in definitions())).index(row[1]))


def _value_text(key: str, unit: str, value: float) -> str:
    from bench.units import bytes_text, duration_text, si, significant

    if unit == "s":
        return duration_text(value)
    if unit == "bytes":
        return bytes_text(value)
    if unit == "Hz":
        return si(value, unit)
    if key.endswith("_ratio"):
        return f"{value:.1%}"
    return f"{significant(value, 4)} {unit}".rstrip()


def _warnings(summary: RunSummary) -> None:
    if summary.warnings:
        click.secho("\nwarnings", bold=True)
    for w in summary.warnings:
        color = {"serious": "red", "warning": "yellow"}.get(w.severity)
        click.secho(f"  {w.severity}: {w.code}: {w.message}. {w.remedy}.", fg=color)


def _records(reader: RunReader, num_requests: int) -> None:
    from itertools import islice

    from bench.store import DATA_FILES

    click.secho("\nrecords", bold=True)
    for name in DATA_FILES:
        path = reader.folder / name
        if path.is_file():
            facts = reader.manifest.get("files", {}).get(name, {})
            lines = f", {facts['lines']:,} lines" if "lines" in facts else ""
            click.echo(f"  {name:<22} {path.stat().st_size:>12,} bytes{lines}")
    for record in islice(reader.iter_requests(), num_requests):
        click.echo("  " + json.dumps(record.to_dict(), ensure_ascii=False))


def _provenance(facts: RunFacts, full: bool) -> None:
    from bench.analysis.flat import flatten

    rows = flatten(facts.provenance)
    if not rows:
        return
    click.secho("\nprovenance", bold=True)
    for key, value in rows if full else rows[:12]:
        click.echo(f"  {key}: {value}")
    if not full and len(rows) > 12:
        click.echo(f"  ... {len(rows) - 12} more with --provenance")
