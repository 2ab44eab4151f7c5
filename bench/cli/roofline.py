"""`bench roofline`: what bounds a step of a model on a device, per operation, as tables and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.cli.console import console
from bench.errors import EXIT_DONE, BadInput

if TYPE_CHECKING:
    from bench.catalog.arch import ModelArch
    from bench.roofline import Bound, Ceilings, StepRoofline, StepShape


@click.command("roofline")
@click.argument("model")
@click.option("--gpu", default=None, help="Device by catalogue name; may be left out with --kernels.")
@click.option(
    "--kernels",
    type=click.Path(exists=True, path_type=Path),
    default=None,
    help="Ceilings measured by `bench kernels`: a folder under results/kernels/.",
)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Requests that decode together.")
@click.option("--isl", type=click.IntRange(1), default=1024, show_default=True, help="Input tokens of a request.")
@click.option("--osl", type=click.IntRange(1), default=1024, show_default=True, help="Output tokens of a request.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="tensor_parallel_size.")
@click.option(
    "--pp",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="pipeline_parallel_size; the first stage is shown.",
)
@click.option("--expert-parallel", is_flag=True, help="Divide whole experts over the GPUs.")
@click.option("--quantization", default=None, help="Weight format  [default: the checkpoint's]")
@click.option("--kv-cache-dtype", default=None, help="auto or fp8.")
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Tokens of the prefill step.",
)
@click.option(
    "--step-ms",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Measured milliseconds of the decode step (a TPOT): its MFU and MBU.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=None,
    help="Lay the cells of results/runs/<experiment> on the picture.",
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Picture to write (PNG and SVG).")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of tables.")
def command(
    model: str, gpu: str | None, kernels: Path | None, batch: int, isl: int, osl: int, tp: int, pp: int, expert_parallel: bool,
    quantization: str | None, kv_cache_dtype: str | None, max_num_batched_tokens: int, step_ms: float | None, results: Path | None, out: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Show what bounds a decode step and a prefill step of MODEL, operation by operation, at the device's ceilings.

    The decode step holds --batch requests at a context of ISL + OSL/2; the prefill step whole prompts of ISL tokens up to
    --max-num-batched-tokens. Times are least times: real kernels reach a share of them.
    """
    from bench.catalog.model import load_model
    from bench.roofline import StepShape, step_ops, step_roofline

    arch, ceilings = load_model(model), _ceilings(gpu, kernels)
    prompts = max(1, min(batch, max_num_batched_tokens // isl))
    shapes = {
        "decode": StepShape.uniform(arch, decode_requests=batch, decode_context=isl + osl // 2),
        "prefill": StepShape.uniform(arch, prefill_requests=prompts, prefill_tokens=min(isl, max_num_batched_tokens)),
    }
    ep = tp if expert_parallel and tp > 1 else 1
    steps = {
        phase: step_roofline(step_ops(arch, shape, tp, pp, quantization, kv_cache_dtype, ep), ceilings)
        for phase, shape in shapes.items()
    }
    dtypes = _dtypes(arch, ceilings, quantization)
    points, left_out = _points(results, gpu)
    written: list[Path] = []
    if out is not None:
        from bench.report.roofline_picture import draw_roofline

        title = (
            f"{arch.name}, TP {tp}, {arch.quant(quantization).name} on {ceilings.name}: batch {batch}, {isl:,}/{osl:,}"
        )
        written = draw_roofline(ceilings, dtypes, {k: v.ops for k, v in steps.items()}, points, title, out)
    if as_json:
        data = _json(arch, ceilings, steps, shapes, dtypes, points, written)
        if step_ms is not None:
            decode, time_s = steps["decode"], step_ms / 1e3
            data["measured_decode_step"] = {
                "time_s": time_s,
                "mfu_ratio": decode.mfu(time_s, dtypes[0]),
                "mbu_ratio": decode.mbu(time_s),
            }
        click.echo(json.dumps(data, indent=1))
        return EXIT_DONE
    _print(arch, ceilings, steps, shapes, dtypes, tp)
    if step_ms is not None:
        _print_measured(steps["decode"], step_ms / 1e3, dtypes[0])
    for line in left_out:
        click.echo(f"left out: {line}", err=True)
    for path in written:
        click.echo(f"picture: {path}")
    return EXIT_DONE


def _ceilings(gpu: str | None, kernels: Path | None) -> Ceilings:
    from bench.catalog.hardware import load_hardware
    from bench.roofline import Ceilings, load_kernel_ceilings

    hardware = load_hardware(gpu) if gpu else None
    if kernels is not None:
        return load_kernel_ceilings(kernels, hardware)
    if hardware is None:
        raise BadInput("give --gpu or --kernels", next_step="`bench catalog hardware` lists the GPUs")
    return Ceilings.from_hardware(hardware)


def _dtypes(arch: ModelArch, ceilings: Ceilings, quantization: str | None) -> list[str]:
    """Dtypes whose ceilings count here: the weights' product and the model's own, as far as the device has them."""
    wanted = [arch.quant(quantization).compute_dtype, arch.dtype]
    found = [d for d in dict.fromkeys(wanted) if d in ceilings.flops]
    return found or [next(iter(ceilings.flops))]


def _points(results: Path | None, gpu: str | None) -> tuple[list[Any], list[str]]:
    if results is None:
        return [], []
    from bench.catalog.hardware import load_hardware
    from bench.report.roofline_cells import cell_points

    return cell_points(results, gpu=load_hardware(gpu).name if gpu else None)


def _step_numbers(step: StepRoofline, shape: StepShape, dtype: str) -> dict[str, float]:
    time_s = step.time_s
    bounds: tuple[Bound, ...] = ("compute", "memory", "link")
    return {
        "time_s": time_s,
        "tokens_per_s": shape.tokens / time_s if time_s else 0.0,
        "flops": step.flops,
        "bytes": step.bytes,
        "mfu_ratio": step.mfu(time_s, dtype) if time_s else 0.0,
        "mbu_ratio": step.mbu(time_s) if time_s else 0.0,
        **{f"{b}_bound_ratio": step.share(b) for b in bounds},
    }


def _json(
    arch: ModelArch, ceilings: Ceilings, steps: dict[str, StepRoofline], shapes: dict[str, StepShape], dtypes: list[str],
    points: list[Any], written: list[Path],
) -> dict[str, Any]:  # fmt: skip
    def op_row(o: Any) -> dict[str, Any]:
        row = {name: getattr(o.op, name) for name in o.op.__slots__}
        return {**row, "time_s": o.time_s, "bound": o.bound, "mfu_ratio": o.mfu_ratio, "mbu_ratio": o.mbu_ratio, "compute_s": o.compute_s, "memory_s": o.memory_s, "link_s": o.link_s}  # fmt: skip

    return {
        "model": arch.name,
        "device": ceilings.name,
        "ceilings": {
            "source": ceilings.source,
            "flops": ceilings.flops,
            "memory_bytes_per_s": ceilings.memory_bytes_per_s,
            "link_bytes_per_s": ceilings.link_bytes_per_s,
            "measured": sorted(ceilings.measured),
        },
        "steps": {
            phase: {
                **_step_numbers(step, shapes[phase], dtypes[0]),
                "mfu_dtype": dtypes[0],
                "ops": [op_row(o) for o in step.ops],
            }
            for phase, step in steps.items()
        },
        "cells": [
            {**{n: getattr(p, n) for n in p.__slots__}, "flops_per_byte": p.intensity_flops_per_byte} for p in points
        ],
        "pictures": [str(p) for p in written],
    }


def _print(
    arch: ModelArch,
    ceilings: Ceilings,
    steps: dict[str, StepRoofline],
    shapes: dict[str, StepShape],
    dtypes: list[str],
    tp: int,
) -> None:
    from rich.table import Table

    from bench.units import bytes_text, duration_text, si

    out = console()
    link = f", link {si(ceilings.link(tp), 'B/s')}" if ceilings.link(tp) else ""
    peaks = ", ".join(f"{d} {si(ceilings.peak(d), 'FLOP/s')}" for d in dtypes)
    out.print(
        f"[bold]{arch.name}[/bold] on {ceilings.name}, one of {tp} rank(s). Ceilings ({ceilings.source}): {peaks}, "
        f"memory {si(ceilings.memory_bytes_per_s, 'B/s')}{link}"
    )
    for phase, step in steps.items():
        shape, total = shapes[phase], step.time_s
        table = Table(
            "operation", "calls", "FLOP", "bytes", "message", "FLOP/byte", "least time", "share", "MFU", "MBU", "bound by",
            title=f"{phase} step: {shape.tokens:,.0f} tokens", title_justify="left",
        )  # fmt: skip
        for column in table.columns[1:10]:
            column.justify = "right"
        for o in step.ops:
            op = o.op
            table.add_row(
                op.name, f"{op.count:g}", si(op.flops, "") if op.flops else "", bytes_text(op.bytes),
                bytes_text(op.comm_bytes) if op.comm_bytes else "", f"{op.intensity_flops_per_byte:.3g}" if op.flops else "",
                duration_text(o.time_s), f"{100 * o.time_s / total:.1f} %", f"{100 * o.mfu_ratio:.0f} %" if op.flops else "",
                f"{100 * o.mbu_ratio:.0f} %", o.bound,
            )  # fmt: skip
        out.print(table)
        n = _step_numbers(step, shape, dtypes[0])
        out.print(
            f"Least time {duration_text(total)}, at most {n['tokens_per_s']:,.0f} tokens/s; MFU {100 * n['mfu_ratio']:.0f} % of "
            f"{dtypes[0]}, MBU {100 * n['mbu_ratio']:.0f} %; time bound by memory {100 * n['memory_bound_ratio']:.0f} %, compute "
            f"{100 * n['compute_bound_ratio']:.0f} %, link {100 * n['link_bound_ratio']:.0f} %."
        )


def _print_measured(step: StepRoofline, time_s: float, dtype: str) -> None:
    """MFU and MBU of a decode step that somebody timed."""
    from bench.units import duration_text

    click.echo(
        f"A measured decode step of {duration_text(time_s)} takes {time_s / step.time_s:.2f} x the least time: MFU "
        f"{100 * step.mfu(time_s, dtype):.1f} % of {dtype}, MBU {100 * step.mbu(time_s):.0f} %."
    )
    if time_s < step.time_s * 0.98:
        click.echo(
            "That is faster than the ceilings allow: check the batch, the lengths, the parallel layout and the device.",
            err=True,
        )
