"""Results of InferenceX (formerly InferenceMAX): ``agg_*.json``, one object or a list of them.

Times are in seconds, without a unit in their names; ``*_intvty`` is 1 / TPOT. Throughput is per GPU: of all GPUs of one server, or,
with prefill and decode on GPUs of their own, output per *decode* GPU and input per *prefill* GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.errors import BadInput
from bench.interop.imported import ForeignRun, ImportedLoad
from bench.interop.reading import ForeignFile, Part

NAME = "inferencex"
TOOL = "InferenceX"
_METRICS = {"ttft": "ttft_service", "tpot": "tpot", "itl": "itl", "e2el": "e2e_service"}
_STATISTICS = {"mean": "mean", "median": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}


def recognise(document: Any) -> bool:
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, Mapping) and {"hw", "conc", "tput_per_gpu"} <= set(first)


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """Every row of the file.

    Raises:
        BadInput: with file, key and reason.
    """
    listed = isinstance(file.first, list)
    rows = file.first if listed else file.documents
    for i, raw in enumerate(rows):
        yield _row(Part(raw, file.path, f"[{i}]" if listed else f"line {i + 1}" if len(rows) > 1 else ""))


def _row(row: Part) -> ForeignRun:
    concurrency = row.integer("conc")
    if concurrency is None:
        raise BadInput("is missing", where=row.where("conc"))
    reported: dict[str, float] = {}
    for theirs, ours in _METRICS.items():
        for word, name in _STATISTICS.items():
            value = row.number(f"{word}_{theirs}")
            if value is not None:
                reported[f"{ours}_{name}_s"] = value
    gpus, notes = _throughput(row, reported)
    tp = row.integer("tp")
    args: dict[str, Any] = {"tensor_parallel_size": tp} if tp is not None else {}
    for key in ("ep", "dp_attention", "precision", "spec_decoding", "disagg", "mtp"):
        if row.has(key):
            args[key] = row.data[key]
    return ForeignRun(
        format=NAME, tool=TOOL, part=row.at, model=row.text("model"),
        load=ImportedLoad("closed_loop", concurrency=concurrency), isl_tokens=row.number("isl"),
        osl_tokens=row.number("osl"), reported=reported, notes=tuple(notes), engine=row.text("framework"),
        engine_version=row.text("image"), engine_args=args, gpu=row.text("hw"), num_gpus=gpus,
        absent={"error_ratio": "not in the file"},
    )  # fmt: skip


def _throughput(row: Part, reported: dict[str, float]) -> tuple[int | None, list[str]]:
    """Fills the rates in; returns (GPUs, notes)."""
    notes = ["lengths, where stated, are nominal; the number of requests is not in the file"]
    total, output = row.number("tput_per_gpu"), row.number("output_tput_per_gpu")
    prefill, decode = row.integer("num_prefill_gpu"), row.integer("num_decode_gpu")
    if prefill is not None and decode is not None:
        gpus, output_gpus = prefill + decode, decode
        notes.append(
            f"{prefill} GPUs prefill and {decode} decode: its output rate is per decode GPU, ours per GPU of both"
        )
    else:
        found = row.integer("tp")
        if found is None:
            return None, [*notes, "the number of GPUs is not in the file: throughput per GPU cannot be made a total"]
        gpus = output_gpus = found
    if total is not None:
        reported["total_tokens_per_s"] = total * gpus
    if output is not None:
        reported["output_tokens_per_s"] = output * output_gpus
    return gpus, notes
