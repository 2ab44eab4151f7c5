"""`bench fit`: what fits on which GPUs: weights, KV cache, concurrency at a shape, and the smallest number of GPUs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from bench.cli.console import console
from bench.errors import EXIT_DONE, EXIT_SOME_FAILED, BadInput

if TYPE_CHECKING:
    from bench.catalog.arch import ModelArch
    from bench.catalog.memory import MemoryFit


@click.command("fit")
@click.argument("model")
@click.option(
    "--gpu", "gpus", multiple=True, required=True, help="GPU by catalogue name; several: repeat or use commas."
)
@click.option(
    "--tp",
    default=None,
    metavar="N[,N]",
    help="tensor_parallel_size to show  [default: 1, 2, 4, 8 and more until it fits]",
)
@click.option("--pp", default="1", metavar="N[,N]", show_default=True, help="pipeline_parallel_size to show.")
@click.option("--expert-parallel", is_flag=True, help="Divide whole experts over the GPUs (enable_expert_parallel).")
@click.option("--isl", type=click.IntRange(1), default=1024, show_default=True, help="Input tokens of a request.")
@click.option("--osl", type=click.IntRange(1), default=1024, show_default=True, help="Output tokens of a request.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Requests at once that must fit."
)
@click.option(
    "--quantization",
    default=None,
    help="Weight format: bf16, fp8, int8, awq, gptq, mxfp4...  [default: the checkpoint's]",
)
@click.option("--kv-cache-dtype", default=None, help="auto or fp8.")
@click.option("--gpu-memory-utilization", type=float, default=None, help="[default: vLLM's 0.92]")
@click.option("--max-model-len", type=click.IntRange(1), default=None, help="[default: the model's]")
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=None, help="[default: vLLM's for the GPU]")
@click.option("--max-num-seqs", type=click.IntRange(1), default=None, help="[default: vLLM's for the GPU]")
@click.option("--block-size", type=click.IntRange(1), default=None, help="Tokens of a KV block.")
@click.option("--enforce-eager", is_flag=True, help="No CUDA graphs.")
@click.option("--server", is_flag=True, help="Defaults of `vllm serve` instead of the offline class.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of tables.")
def command(
    model: str, gpus: tuple[str, ...], tp: str | None, pp: str, isl: int, osl: int, concurrency: int, **options: Any
) -> int:
    """Say what of MODEL fits on a GPU: a catalogue name, a config.json, a folder with one, or a hub id."""
    from bench.catalog.hardware import load_hardware
    from bench.catalog.memory import fit, smallest
    from bench.catalog.model import load_model

    as_json, expert_parallel = options.pop("as_json"), options.pop("expert_parallel")
    options["usage"] = "server" if options.pop("server") else "llm"
    arch = load_model(model)
    results = []
    for name in [g.strip() for text in gpus for g in text.split(",") if g.strip()]:
        hardware = load_hardware(name)
        if hardware.kind != "gpu":
            raise BadInput(
                f"{hardware.name} is not a GPU", next_step="on a CPU the KV cache is what VLLM_CPU_KVCACHE_SPACE says"
            )
        best = smallest(arch, hardware, isl, osl, concurrency, **options)
        layouts = _layouts(tp, pp, best)
        fits = [fit(arch, hardware, t, p, ep=t if expert_parallel and t > 1 else 1, **options) for t, p in layouts]
        results.append((hardware.name, best, fits))
    if as_json:
        click.echo(json.dumps(_json(arch, results, isl, osl, concurrency), indent=1))
    else:
        _print(arch, results, isl, osl, concurrency)
    found = any(f.fits and f.max_concurrency(isl, osl) >= concurrency for _, _, fits in results for f in fits)
    return EXIT_DONE if found else EXIT_SOME_FAILED


def _layouts(tp: str | None, pp: str, best: MemoryFit | None) -> list[tuple[int, int]]:
    """(TP, PP) pairs to show: those asked for, or powers of two, with the smallest that fits among them."""
    stages = _numbers(pp, "--pp")
    if tp is not None:
        return [(t, p) for p in stages for t in _numbers(tp, "--tp")]
    layouts = [(t, p) for p in stages for t in (1, 2, 4, 8)]
    if best is not None and (best.tp, best.pp) not in layouts:
        layouts.append((best.tp, best.pp))
    return layouts


def _numbers(text: str, option: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if not values or min(values) < 1:
        raise BadInput(f"expected whole numbers > 0, got {text!r}", where=option, next_step=f"write {option} 1,2,4")
    return values


def _json(arch: ModelArch, results: list[Any], isl: int, osl: int, concurrency: int) -> dict[str, Any]:
    def row(f: MemoryFit) -> dict[str, Any]:
        return {**asdict(f), "num_gpus": f.num_gpus, "max_concurrency": f.max_concurrency(isl, osl) if f.fits else 0}

    return {
        "model": arch.name,
        "num_params": arch.num_params,
        "num_active_params": arch.num_active_params,
        "isl": isl,
        "osl": osl,
        "concurrency": concurrency,
        "gpus": [
            {"gpu": name, "smallest": row(best) if best else None, "layouts": [row(f) for f in fits]}
            for name, best, fits in results
        ],
    }


def _print(arch: ModelArch, results: list[Any], isl: int, osl: int, concurrency: int) -> None:
    from rich.table import Table

    from bench.units import bytes_text

    out = console()
    active = f", {billions(arch.num_active_params)} active" if arch.is_moe else ""
    out.print(
        f"[bold]{arch.name}[/bold]: {billions(arch.num_params)} parameters{active}, {arch.num_layers} layers, "
        f"checkpoint in {arch.quant(None).name}, at most {arch.max_position:,} tokens"
    )
    for note in arch.notes:
        out.print(f"[yellow]note: {note}[/yellow]")
    for name, best, fits in results:
        first = fits[0]
        table = Table(
            "TP", "PP", "weights", "activations", "graphs, CUDA", "KV cache", "KV tokens", f"requests of {isl:,}+{osl:,}",
            "verdict", title=f"{name}: {bytes_text(first.total_bytes)}, vLLM asks for {first.gpu_memory_utilization:g} of it; "
            f"weights {first.quantization}, KV cache {first.kv_cache_dtype}", title_justify="left",
        )  # fmt: skip
        for column in table.columns[:8]:
            column.justify = "right"
        for f in fits:
            table.add_row(*_cells(f, isl, osl, concurrency))
        out.print(table)
        if best is None:
            out.print(f"No layout of up to 64 x {name} holds {concurrency:,} requests of {isl:,}+{osl:,} tokens.")
        else:
            out.print(
                f"Smallest: [bold]{best.num_gpus} x {name}[/bold] (TP {best.tp}, PP {best.pp}) hold "
                f"{best.max_concurrency(isl, osl):,} requests of {isl:,}+{osl:,} tokens at once."
            )
    out.print(
        "Per GPU. Weights and bytes per KV block are exact; activations, graphs and CUDA's share are estimates, so the KV "
        "cache is good to the ± given. An engine's own log (GPU KV cache size) is the measured answer."
    )


def billions(count: float) -> str:
    """A number of parameters as people say it: 70.6 B, 5.00 M."""
    from bench.units import significant

    return f"{significant(count / 1e9)} B" if count >= 5e8 else f"{significant(count / 1e6)} M"


def _cells(f: MemoryFit, isl: int, osl: int, concurrency: int) -> list[str]:
    from bench.units import bytes_text

    if not f.weight_bytes:
        return [str(f.tp), str(f.pp), "", "", "", "", "", "", f"[yellow]no: {f.reason}[/yellow]"]
    other = f.cuda_graph_bytes + f.non_torch_bytes
    parts = [bytes_text(f.weight_bytes), bytes_text(f.activation_bytes), bytes_text(other)]
    if not f.fits:
        return [str(f.tp), str(f.pp), *parts, "none", "", "", f"[yellow]no: {f.reason}[/yellow]"]
    most = f.max_concurrency(isl, osl)
    if isl + osl > f.max_model_len:
        verdict = f"[yellow]no: ISL + OSL exceeds max_model_len {f.max_model_len:,}[/yellow]"
    elif most >= concurrency:
        verdict = "[green]fits[/green]" + (", max_num_seqs is the limit" if f.max_num_seqs == most else "")
        if f.longest_request_tokens < f.max_model_len:
            verdict += f", with --max-model-len {f.longest_request_tokens} or less"
    else:
        verdict = f"[yellow]no: {most:,} of {concurrency:,} requests fit[/yellow]"
    cache = f"{bytes_text(f.kv_cache_bytes)} ± {bytes_text(f.uncertain_bytes)}"
    return [str(f.tp), str(f.pp), *parts, cache, f"{f.kv_capacity_tokens:,}", f"{most:,}", verdict]
