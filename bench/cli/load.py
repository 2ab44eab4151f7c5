"""`bench load`: drive any OpenAI-compatible URL, without an experiment file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from bench.errors import EXIT_DONE, EXIT_SOME_FAILED

_EXAMPLES = """
Examples:

\b
  bench load http://localhost:8000 --concurrency 32 --shape 1k/1k --duration 60
  bench load https://api.example.com/v1 --model m --api chat --api-key-env KEY --rate 2 --requests 200
  bench load http://localhost:8000 --search rate --slo "ttft p99 <= 500 ms and tpot p95 <= 40 ms for 95 % of requests"
  bench load http://localhost:8000 --sweep 1,2,4,8,16,32,64
  bench load --self-test
"""


@click.command("load", epilog=_EXAMPLES)
@click.argument("url", required=False)
@click.option("--self-test", is_flag=True, help="Measure this client on this machine against the mock (about 40 s).")
@click.option("--model", default="", help="The model's name (default: the only one that the server lists).")
@click.option("--api", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option(
    "--prompts",
    type=click.Choice(["token_ids", "text"]),
    help="How prompts are sent (default: token_ids; text for chat).",
)
@click.option(
    "--api-key-env", metavar="NAME", help="Environment variable that holds the key. It is never written anywhere."
)
@click.option("--ca-file", type=click.Path(exists=True, dir_okay=False), help="Certificates of a private CA.")
@click.option("--concurrency", type=click.IntRange(1), help="Closed loop: so many requests in flight.")
@click.option("--rate", type=float, help="Open loop: requests per second.")
@click.option("--arrivals", type=click.Choice(["poisson", "constant", "gamma"]), default="poisson", show_default=True)
@click.option(
    "--burstiness",
    type=float,
    default=1.0,
    show_default=True,
    help="Of gamma arrivals: 1 is Poisson, below 1 burstier.",
)
@click.option(
    "--max-in-flight", type=click.IntRange(1), help="Cap of an open loop; latency still counts from the due time."
)
@click.option("--batch", type=click.IntRange(1), help="Offline: batches of so many requests.")
@click.option(
    "--trace", type=click.Path(exists=True, dir_okay=False), help="Replay a trace (Mooncake, Bailian, BurstGPT, Azure)."
)
@click.option(
    "--time-scale", type=float, default=1.0, show_default=True, help="Of a trace: 0.5 plays it twice as fast."
)
@click.option(
    "--shape",
    default="128/128",
    show_default=True,
    help="Prompt/output lengths: 1k/1k, 512/64, N(512,128)/(256,64), U(1,9)/(1,9).",
)
@click.option(
    "--sharegpt",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Lengths from a ShareGPT file in place of --shape (4 characters a token).",
)
@click.option("--prefix-tokens", type=click.IntRange(1), help="Length of shared prefixes.")
@click.option(
    "--prefix-share", type=float, default=1.0, show_default=True, help="Share of requests that begin with one."
)
@click.option("--num-prefixes", type=click.IntRange(1), default=1, show_default=True, help="How many different ones.")
@click.option("--turns", type=click.IntRange(2), help="Multi-turn sessions of so many turns.")
@click.option("--think", type=float, default=0.0, show_default=True, help="Mean think time between turns, in seconds.")
@click.option(
    "--requests", type=click.IntRange(1), help="Measured requests (default: 10 for each slot, or what the rate needs)."
)
@click.option("--duration", type=float, help="Seconds of the measured part.")
@click.option("--warmup", type=click.IntRange(0), help="Warm-up requests (default: one for each slot).")
@click.option("--ramp-up", type=click.FloatRange(0), metavar="S", help="Seconds after it that are marked, not counted.")
@click.option("--cool-down", type=click.FloatRange(0), metavar="S", help="Seconds at the end, likewise.")
@click.option("--max-errors", type=click.IntRange(0), help="Stop after more errors than this.")
@click.option(
    "--max-error-share", type=click.FloatRange(0, 1), help="Stop when more than this share failed (of 20 or more)."
)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Runs, each with fresh prompts.")
@click.option("--slo", help='Limits, such as "ttft p99 <= 500 ms": adds goodput; what a search looks for.')
@click.option(
    "--search",
    type=click.Choice(["rate", "concurrency"]),
    help="Find the highest rate or concurrency that meets --slo.",
)
@click.option(
    "--tolerance", type=float, default=0.05, show_default=True, help="How closely a search encloses its answer."
)
@click.option("--lowest", type=float, help="Least level of a search.")
@click.option("--highest", type=float, help="Greatest level of a search.")
@click.option("--sweep", metavar="LEVELS", help="Saturation sweep: levels with commas; finds the knee.")
@click.option("--processes", type=click.IntRange(1), help="Sending processes (default: one, more for many streams).")
@click.option(
    "--cpus", metavar="LIST", help="Cores for the sending processes, such as 14,15: keeps them off the engine's."
)
@click.option(
    "--vocab-size", type=click.IntRange(300), default=10_000, show_default=True, help="Token ids are drawn below this."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--extra-body", metavar="JSON", help="Further fields of each request's body.")
@click.option("--name", default="load", show_default=True, help="Name of the results' folder.")
@click.option("--results", type=click.Path(file_okay=False), help="Folder for results (default: results/).")
@click.option("--keep-raw", is_flag=True, help="Keep the raw responses and say where they are.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.pass_context
def command(context: click.Context, url: str | None, self_test: bool, **options: Any) -> int:
    """Drive URL (http://, https:// or unix:/path) with load, and measure it.

    Give --concurrency (closed loop), --rate (open loop), --batch or --trace. Every run is an ordinary run folder:
    `bench show` reads it, `bench report` puts them together.
    """
    from bench.cli.load_conflicts import check
    from bench.cli.load_text import self_test_text
    from bench.errors import BadInput

    if self_test:
        from bench.load.self_test import run_self_test

        quiet = options["as_json"]
        result = run_self_test(lambda line: None if quiet else click.echo(f"  {line}", err=True))
        click.echo(json.dumps(result.to_dict(), indent=1) if quiet else self_test_text(result))
        return EXIT_DONE
    if url is None:
        raise BadInput("no URL", next_step="bench load http://host:port --concurrency 8, or bench load --self-test")
    written = click.core.ParameterSource.COMMANDLINE
    check({**options, "url": url}, {n for n in options if context.get_parameter_source(n) is written})
    if options["results"]:
        from bench.runner.results import RESULTS_VARIABLE

        os.environ[RESULTS_VARIABLE] = options["results"]
    return _measure(url, options)


def _measure(url: str, o: dict[str, Any]) -> int:
    from bench.catalog.slo import load_slo
    from bench.cli import load_text
    from bench.cli.load_progress import ProgressLine
    from bench.cli.load_spec import experiment_of, lengths_of, options_of, target_of
    from bench.provenance import collect
    from bench.runner.load_runs import LoadSession

    slo = load_slo(o["slo"]) if o["slo"] else None
    lengths, dataset = lengths_of(o)
    experiment = experiment_of(url, o, lengths)
    target = target_of(url, o)
    say = load_text.Speaker(o["as_json"])
    progress = ProgressLine()
    with LoadSession(
        experiment,
        target,
        options_of(o, say),
        vocab_size=o["vocab_size"],
        provenance=collect(),
        on_progress=progress,
        lengths=lengths,
        dataset=dataset,
    ) as session:
        say.line(f"{session.info.effective_args.get('model', '')} at {url}")
        if o["search"] or o["sweep"]:
            from bench.cli import load_search

            return load_search.search(session, experiment, slo, o, say)
        spec, axes = load_text.base_cell(experiment)
        folders: list[Path] = []
        for number in range(o["repeats"]):
            try:
                folders.append(session.run(spec, axes))
            finally:
                progress.end()
            say.run(folders[-1], slo, number)
        return _end(folders, slo, say)


def _end(folders: list[Path], slo: Any, say: Any) -> int:
    from bench.store import RunReader

    say.end(folders, slo)
    failed = any(RunReader.open(f).status != "complete" for f in folders)
    return EXIT_SOME_FAILED if failed else EXIT_DONE
