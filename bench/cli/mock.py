"""`bench mock`: an OpenAI server with exact times and faults on request."""

from __future__ import annotations

import click


@click.command("mock")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--uds", type=click.Path(), help="Listen on a Unix socket instead.")
@click.option(
    "--ttft",
    default="50",
    show_default=True,
    metavar="MS",
    help="Time to first token, or exponential(50), normal(50,5), lognormal(50,20).",
)
@click.option(
    "--itl", default="20", show_default=True, metavar="MS", help="Time between tokens, likewise. 0: as fast as it can."
)
@click.option(
    "--itl-per-running", default=0.0, metavar="MS", help="Added to every inter-token time for each running request."
)
@click.option("--max-running", type=click.IntRange(1), help="Requests served at once; others queue.")
@click.option("--in-step", is_flag=True, help="All streams write at the same instants.")
@click.option("--tokens-per-chunk", default=1, show_default=True, type=click.IntRange(1), help="Tokens in every event.")
@click.option("--model", default="mock", show_default=True, help="The model's name.")
@click.option("--seed", default=0, show_default=True, help="Of the drawn times and faults.")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="KIND[:ratio=R|:every=N][:at_chunk=K]",
    help="A fault to play; may be repeated. `--fault list` names them.",
)
@click.option("--log", "log_path", type=click.Path(), help="Where the ground-truth log goes.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Serving processes.")
@click.option("--tls-cert", type=click.Path(exists=True), help="Certificate (PEM): serve TLS.")
@click.option("--tls-key", type=click.Path(exists=True), help="Its key (PEM).")
@click.option("--api-key-env", metavar="NAME", help="Ask for the key that is in this environment variable.")
def command(
    host: str,
    port: int,
    uds: str | None,
    ttft: str,
    itl: str,
    itl_per_running: float,
    max_running: int | None,
    in_step: bool,
    tokens_per_chunk: int,
    model: str,
    seed: int,
    faults: tuple[str, ...],
    log_path: str | None,
    processes: int,
    tls_cert: str | None,
    tls_key: str | None,
    api_key_env: str | None,
) -> None:
    """Serve the OpenAI API with exact, seeded times, until Ctrl-C.

    The log holds what really happened, to the microsecond: see docs/load-generator.md.
    """
    from bench.load.mock import Delay, Fault, MockConfig, serve
    from bench.load.mock_config import FAULT_KINDS

    if "list" in faults:
        click.echo("\n".join(FAULT_KINDS))
        return
    serve(
        MockConfig(
            host=host,
            port=port,
            uds=uds,
            ttft=Delay.parse(ttft),
            itl=Delay.parse(itl),
            itl_per_running_s=itl_per_running / 1e3,
            max_running=max_running,
            in_step=in_step,
            tokens_per_chunk=tokens_per_chunk,
            model=model,
            seed=seed,
            faults=tuple(Fault.parse(f) for f in faults),
            log_path=log_path,
            processes=processes,
            tls_cert=tls_cert,
            tls_key=tls_key,
            api_key_env=api_key_env,
        )
    )
