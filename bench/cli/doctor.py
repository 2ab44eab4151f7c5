"""`bench doctor`: what this machine can measure, and what to do about the rest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import click

from bench.cli.console import console
from bench.errors import EXIT_DONE

_STYLES = {"ok": ("✓ ok", "green"), "limited": ("! limited", "yellow"), "missing": ("✗ missing", "red")}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer. ``verdict`` is ok, limited (works, with less) or missing; ``todo`` is empty when ok."""

    name: str
    found: str
    verdict: str
    todo: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def recommended_experiment() -> str:
    """The experiment that `make bench` runs here: the GPU default where vLLM can use a GPU, else the one for the CPU."""
    from bench.cli.doctor_checks import gpu_usable

    return "configs/experiments/default-gpu.yaml" if gpu_usable() else "configs/experiments/default-cpu.yaml"


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--default-experiment", is_flag=True, help="Print only the experiment that suits this machine.")
def command(as_json: bool, default_experiment: bool) -> int:
    """What this machine can measure, and what to do about the rest.

    Starts no engine and takes no GPU memory. The exit code is 0 whatever is found.
    """
    if default_experiment:
        click.echo(recommended_experiment())
        return EXIT_DONE
    from bench.cli.doctor_checks import all_checks

    checks = all_checks()
    experiment = recommended_experiment()
    if as_json:
        out = {"checks": [asdict(c) for c in checks], "recommended_experiment": experiment}
        click.echo(json.dumps(out, indent=1, default=str))
        return EXIT_DONE
    _print(checks, experiment)
    return EXIT_DONE


def _print(checks: list[Check], experiment: str) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table("check", "found", "verdict", "what to do", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for check in checks:
        words, style = _STYLES[check.verdict]
        table.add_row(Text(check.name), Text(check.found), Text(words, style=style), Text(check.todo), end_section=True)
    out.print(table)
    out.print()
    num_missing = sum(c.verdict == "missing" for c in checks)
    num_limited = sum(c.verdict == "limited" for c in checks)
    engine = next(c for c in checks if c.name == "vLLM")
    if engine.verdict == "missing":
        verdict = "No engine can be measured here yet."
    else:
        verdict = f"Ready to measure ({num_missing} missing, {num_limited} limited)."
    out.print(Text(verdict, style="bold"))
    out.print(Text(f"Start with: bench run {experiment}"))
