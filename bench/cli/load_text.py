"""What `bench load` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.config.experiment import CellSpec, Experiment, load_level
from bench.units import duration_text, si, significant

#: Key of the analysis -> how it is called here, in the order in which it is printed.
_ROWS = (
    ("requests_per_s", "requests/s"),
    ("output_tokens_per_s", "output tokens/s"),
    ("total_tokens_per_s", "all tokens/s"),
    ("goodput_requests_per_s", "goodput (requests/s)"),
    ("slo_met_ratio", "share that met the SLO"),
)
_TIMES = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2e", "E2E"), ("send_lateness", "send lateness"))

_PATHS = {"compiled": "compiled path"}


def base_cell(experiment: Experiment) -> tuple[CellSpec, dict[str, Any]]:
    """The cell of an experiment without a sweep, and its axis."""
    from bench.cli.load_spec import cell_of

    spec = cell_of(experiment)
    name, value = load_level(spec.load)
    return spec, {name: value}


def _time(value: float | None) -> str:
    return "-" if value is None else duration_text(value)


def summary_lines(values: dict[str, float]) -> list[str]:
    """The numbers of one run."""
    lines = [f"  {label:<24}{significant(values[key])}" for key, label in _ROWS if key in values]
    if share := values.get("error_ratio"):
        lines.append(f"  {'share of errors':<24}{share:.1%}")
    lines.append(f"  {'':<24}{'p50':>10}{'p95':>10}{'p99':>10}")
    for key, label in _TIMES:
        cells = [values.get(f"{key}_p{q}_s") for q in (50, 95, 99)]
        if any(c is not None for c in cells):
            lines.append(f"  {label:<24}" + "".join(f"{_time(c):>10}" for c in cells))
    return lines


def _lateness(late: dict[str, Any]) -> str:
    """How late requests were sent, where they had a due time."""
    if late.get("p50_s") is None:
        return ""
    return f"sent late by {_time(late['p50_s'])} p50, {_time(late['p99_s'])} p99, {_time(late['max_s'])} max; "


def honesty_lines(client: dict[str, Any]) -> list[str]:
    """What the client says of itself."""
    if not client:
        return []
    late, lag = client.get("send_lateness") or {}, client.get("loop_lag") or {}
    cpu = ", ".join(f"{share:.0%}" for share in client.get("cpu_share", ()))
    priority = "real-time" if client.get("real_time") else "ordinary"
    capacity = client.get("capacity_chunks_per_s")
    lines = [
        f"  client: {client['num_processes']} process(es), {cpu} of a core at {priority} priority, stamps by the {client['stamps']}, "
        f"answers read by the {_PATHS.get(client.get('receive_path', ''), client.get('receive_path', 'event loop'))}",
        f"  {_lateness(late)}event loop late by {_time(lag.get('p99_s'))} p99",
    ]
    if client.get("chunks_per_read"):
        text = f"  {client['chunks_per_read']:.2f} chunks a read, {client['cpu_us_per_chunk']:.1f} µs of CPU a chunk"
        if capacity:
            text += f"; capacity {si(capacity, 'chunks/s')} a process ({client.get('capacity_source')})"
        lines.append(text)
    if client.get("client_limited"):
        lines.append(f"  CLIENT-LIMITED: {'; '.join(client['reasons'])}")
    else:
        lines.append("  the client was not the limit")
    lines += [f"  note: {text}" for text in client.get("notes", ())]
    if client.get("errors"):
        lines.append("  errors: " + ", ".join(f"{k} {v}" for k, v in sorted(client["errors"].items())))
    return lines


def server_lines(view: dict[str, Any] | None) -> list[str]:
    """The server's own view, where it gives one."""
    if not view:
        return []
    lines = []
    if view.get("server_output_tokens") is not None:
        lines.append(
            f"  /metrics: {view['server_prompt_tokens']:.0f} prompt and {view['server_output_tokens']:.0f} output tokens "
            f"(client: {view['client_prompt_tokens']} and {view['client_output_tokens']})"
        )
    if view.get("server_ttft_mean_s") is not None:
        lines.append(
            f"  mean TTFT: server {_time(view['server_ttft_mean_s'])}, client {_time(view['client_ttft_mean_s'])}"
        )
    lines += [f"  VIEWS DISAGREE: {text}" for text in view.get("disagreements", ())]
    lines += [f"  warning: {text}" for text in view.get("warnings", ())]
    return lines


class Speaker:
    """Text as it happens, or one JSON object at the end."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._runs: list[dict[str, Any]] = []

    def line(self, text: str) -> None:
        if not self.as_json:
            click.echo(text)

    def run(self, folder: Path, slo: Any, number: int) -> dict[str, Any]:
        """Summarise a run and print it. Returns the analysis' values."""
        from bench.analysis.summary import Yardsticks, summarise_run
        from bench.store import RunReader

        reader = RunReader.open(folder)
        summary = summarise_run(reader, Yardsticks(slo))
        client, view = reader.manifest.get("client") or {}, reader.manifest.get("server_view")
        entry = {
            "folder": str(folder),
            "status": reader.status,
            "values": summary.values,
            "errors": summary.errors,
            "warnings": [w.message for w in summary.warnings],
            "client": client,
            "server_view": view,
        }
        self._runs.append(entry)
        self.line(f"run {number + 1}: {reader.status}  {folder}")
        if reader.status != "complete":
            self.line(f"  {(reader.manifest.get('error') or {}).get('reason', '')}")
        for text in (*summary_lines(summary.values), *honesty_lines(client), *server_lines(view)):
            self.line(text)
        return entry

    def end(self, folders: list[Path], slo: Any, **more: Any) -> None:
        """The end: the JSON, or where everything is."""
        if self.as_json:
            click.echo(json.dumps({"runs": self._runs, **more}, indent=1, default=str))
        elif folders:
            click.echo(f"records: {folders[-1].parent}; `bench show {folders[-1]}`")


def self_test_text(result: Any) -> str:
    """The table of `bench load --self-test`."""

    def us(seconds: float) -> str:
        return f"{seconds * 1e6:,.0f}" if seconds == seconds else "-"

    lines = [
        result.machine,
        f"capacity of one process: {result.capacity_chunks_per_s:,.0f} chunks/s (one a read), "
        f"{result.capacity_requests_per_s:,.0f} requests/s; on the event loop's path (TLS) "
        f"{result.event_loop_chunks_per_s:,.0f} chunks/s",
        "",
        "error against the mock's log, µs    TTFT p50 / p99      ITL p50 / p99      E2E p50 / p99   CPU µs/chunk",
    ]
    for s in result.streams:
        label = f"{s.num_streams} streams{', in step' if s.in_step else ''}, {s.stamps} stamps"
        parts = [f"{us(e.p50_s):>7} / {us(e.p99_s):<7}" for e in (s.ttft, s.itl, s.e2e)]
        lines.append(f"{label:<34}" + "   ".join(parts) + f"   {s.cpu_us_per_chunk:>8.1f}")
        if s.num_failed:
            lines.append(f"  {s.num_failed} requests failed")
    lines += ["", "open loop, sent late by, µs            p50      p99      max"]
    lines += [
        f"{p.rate_per_s:g} requests/s, constant".ljust(32)
        + "".join(f"{us(x):>9}" for x in (p.lateness_p50_s, p.lateness_p99_s, p.lateness_max_s))
        for p in result.pacing
    ]
    return "\n".join(lines)
