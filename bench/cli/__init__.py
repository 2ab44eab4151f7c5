"""The command line. One file per command; nothing heavy is imported before a command runs.

``COMMANDS`` is the order in which a user meets them. The help lines stand here so that ``bench --help`` imports none
of the commands.
"""

from __future__ import annotations

import importlib
import keyword
import os
import sys
from typing import Any

import click

from bench import __version__
from bench.errors import EXIT_INTERRUPTED, EXIT_SOME_FAILED, BenchError

#: name -> (section, one line of help); the module is bench.cli.<name with - as _>, its attribute ``command`` (a name that is
#: a keyword of Python has a _ behind it: import_).
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("Measure", "What this machine can measure, and what to do about the rest."),
    "validate": ("Measure", "Check an experiment file and print its cells."),
    "run": ("Measure", "Run an experiment; continues where it stopped."),
    "status": ("Measure", "What is complete, missing and failed."),
    "show": ("Measure", "One run: its records, numbers and provenance."),
    "import": ("Measure", "Turn another tool's result files into results of this one."),
    "report": ("Measure", "Write the report of an experiment (Markdown and HTML)."),
    "load": ("Serve", "Drive any OpenAI-compatible URL with load, and measure it."),
    "mock": ("Serve", "A mock OpenAI server with exact times and faults on request."),
    "kernels": ("Explain", "Measure what this machine's memory, GEMM, attention and links reach."),
    "roofline": ("Explain", "What bounds a step of a model on a GPU."),
    "catalog": ("Predict", "The models, GPUs, prices and SLOs that are known, with sources."),
    "fit": ("Predict", "What fits: weights, KV cache, concurrency, and how many GPUs."),
    "calibrate": ("Predict", "Fit the step-time model to recorded runs."),
    "predict": ("Predict", "Run an experiment on GPUs that are not at hand (simulated)."),
    "optimize": ("Predict", "Search parallelism, batch limits and precision under an SLO (simulated)."),
    "cost": ("Decide", "Dollars per million tokens of a run or an experiment."),
    "breakeven": ("Decide", "From which volume self-hosting beats an API."),
    "plan": ("Decide", "The cheapest fleet for a demand and an SLO."),
}


class HintingGroup(click.Group):
    """Names the nearest command when there is none of that name."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            path, names = ctx.command_path, self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], names, n=1)
            hint = f"did you mean `{path} {near[0]}`?" if near else f"`{path} --help` lists the commands"
            raise click.UsageError(f"no such command {args[0]!r}; {hint}", ctx=None) from None


class LazyGroup(HintingGroup):
    """Imports a command's module only when that command is called; prints help by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"bench.cli.{name}_" if keyword.iskeyword(name) else f"bench.cli.{name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(s for s, _ in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (s, text) in COMMANDS.items() if s == section])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bench")
def cli() -> None:
    """Measure, explain, predict and price self-hosted LLM inference.

    Start with `bench doctor`, then `bench run configs/experiments/...`. Shell completion: see README.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bench``: the one place where errors become a line and an exit code."""
    try:
        status = cli.main(args=argv, prog_name="bench", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("bench: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as e:
        click.echo(f"bench: {e.format_message()}", err=True)
        sys.exit(e.exit_code if e.exit_code != 1 else 2)
    except BenchError as e:
        click.echo(f"bench: {e}", err=True)
        sys.exit(e.exit_code)
    except BrokenPipeError:
        # the reader of our output went away (`bench show | head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as e:
        # a defect of ours: still one line, with the details kept where they can be sent along
        if os.environ.get("TOKENYIELD_DEBUG"):
            raise
        click.echo(f"bench: {_internal_error(e)}", err=True)
        sys.exit(EXIT_SOME_FAILED)


def _internal_error(error: Exception) -> str:
    """One line for an unexpected exception; its traceback goes to a file of its own."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    what = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="bench-error-", suffix=".txt", delete=False) as f:
            f.write(f"bench {__version__} {' '.join(sys.argv[1:2])}\n{text}")
        return f"{what}; this is a defect of bench: please report it with {f.name}"
    except OSError:
        return f"{what}; this is a defect of bench: run again with TOKENYIELD_DEBUG=1 and report what it prints"


if __name__ == "__main__":
    main()
