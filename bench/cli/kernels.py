"""``bench kernels``: measure what this machine reaches, write the raw samples, show one table and one picture."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from bench.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SOME_FAILED

if TYPE_CHECKING:
    from kernels.case import Case
    from kernels.config import SuiteConfig
    from kernels.device import Device
    from kernels.suite import CaseResult

EPILOG = """\b
bench kernels                          the quick suite: under a minute on 2 CPU cores
bench kernels --full --only gemm       every GEMM shape
bench kernels --config my.yaml --list  what a suite of your own would run
"""


@click.command(epilog=EPILOG)
@click.option("--quick", "name", flag_value="quick", default="quick", help="The quick suite (default).")
@click.option("--full", "name", flag_value="full", help="The full suite: minutes on a GPU, longer on a CPU.")
@click.option("--config", metavar="FILE", help="A suite of your own, or another name in configs/kernels/.")
@click.option(
    "--only",
    multiple=True,
    metavar="FAMILY",
    help="Only this family (repeatable): memory, gemm, attention, norm, moe, collectives, link, host.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results (default: results/kernels/DEVICE/UTC/).",
)
@click.option("--list", "listing", is_flag=True, help="Print the cases and run none.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and nothing else on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    name: str,
    config: str | None,
    only: tuple[str, ...],
    device: str,
    out: Path | None,
    listing: bool,
    as_json: bool,
) -> int:
    """Measure what this machine's memory, GEMM, attention and links reach.

    Every case is checked against a higher-precision answer before it is timed. What this machine cannot run is "n/a" with
    the reason. Results: samples.jsonl (raw), summary.json, table.txt, kernels.png and .svg.
    """
    from kernels.config import load_suite
    from kernels.suite import list_cases

    suite = load_suite(config or name)
    if listing:
        return _list(
            suite, list_cases(suite, "cuda" if device.startswith("cuda") else _device_kind(device), only), as_json
        )
    list_cases(suite, "cpu", only)  # a wrong --only ends here, before anything is started
    return _run(suite, device, only, out, as_json)


def _device_kind(device: str) -> str:
    if device == "cpu":
        return "cpu"
    from kernels.device import find_device

    return find_device(device).kind


def _list(suite: SuiteConfig, cases: list[Case], as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps([{"case_id": c.case_id, **c.to_dict()} for c in cases]))
    else:
        for case in cases:
            click.echo(case.case_id)
        click.echo(f"{len(cases)} cases in suite {suite.name} ({suite.digest})", err=True)
    return EXIT_DONE


def _run(suite: SuiteConfig, device: str, only: tuple[str, ...], out: Path | None, as_json: bool) -> int:
    import tempfile

    from kernels import picture, results, table
    from kernels.suite import iterate_lines, list_cases, run_suite

    started = datetime.now(timezone.utc)
    state = _Output(out, started)
    with tempfile.NamedTemporaryFile(prefix="bench-kernels-", suffix=".log", delete=False) as log:
        log_path = Path(log.name)
    try:
        run = run_suite(
            suite,
            device,
            lambda d: state.count(list_cases(suite, d.kind, only)),
            log_path,
            on_device=state.open,
            on_result=state.add,
        )
    finally:
        state.close(log_path)
    lines = list(iterate_lines(state.folder / results.SAMPLES))
    summary = results.summary_of(run, lines, started)
    results.write_summary(state.folder, summary)
    (state.folder / "table.txt").write_text(table.plain(summary))
    picture.draw(summary, state.folder / "kernels.png")
    if as_json:
        click.echo(json.dumps(summary))
    else:
        _show(summary, state.folder)
    if run.interrupted:
        return EXIT_INTERRUPTED
    bad = summary["counts"].get("wrong", 0) + summary["counts"].get("failed", 0)
    return EXIT_SOME_FAILED if bad else EXIT_DONE


def _show(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from kernels import table

    # A pipe has no width of its own: give it the table's.
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table.render(summary))
    console.print()
    for line in table.closing_lines(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary["counts"].items()))
    console.print(f"\n{counts}; {summary['wall_s']:.0f} s. Written to {folder}", soft_wrap=True, highlight=False)


class _Output:
    """The result folder while the suite runs: samples.jsonl grows line by line, progress goes to stderr."""

    def __init__(self, folder: Path | None, started: datetime) -> None:
        self._wanted = folder
        self._started = started
        self._file: IO[str] | None = None
        self._total = 0
        self._done = 0
        self.folder = folder or Path()

    def open(self, device: Device) -> None:
        from bench.errors import BadInput
        from kernels.results import SAMPLES

        utc = self._started.strftime("%Y%m%dT%H%M%SZ")
        self.folder = self._wanted or Path("results/kernels") / device.slug / utc
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / SAMPLES).open("x")
        except FileExistsError:
            raise BadInput("holds results already", where=str(self.folder), next_step="give another --out") from None
        except OSError as error:
            raise BadInput(
                f"cannot write: {error.strerror}", where=str(self.folder), next_step="give another --out"
            ) from None

    def count(self, cases: list[Case]) -> list[Case]:
        self._total = len(cases)
        return cases

    def add(self, result: CaseResult) -> None:
        assert self._file is not None
        self._file.write(json.dumps(result.to_dict()) + "\n")
        self._file.flush()
        self._done += 1
        text = f"[{self._done}/{self._total}] {result.case.case_id}: {result.answer['status']}"
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[2K{text[:118]}", nl=False, err=True)
            if self._done == self._total:
                click.echo("\r\x1b[2K", nl=False, err=True)
        elif self._done % 20 == 0 or self._done == self._total or result.answer["status"] in ("wrong", "failed"):
            click.echo(text, err=True)

    def close(self, log_path: Path) -> None:
        """Close the samples and keep the children's log beside them if it says anything."""
        if self._file is not None:
            self._file.close()
            text = log_path.read_bytes()
            if text:
                from kernels.results import LOG

                (self.folder / LOG).write_bytes(text)
        log_path.unlink(missing_ok=True)
