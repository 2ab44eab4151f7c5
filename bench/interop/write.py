"""Writes imported runs as ordinary run folders, so that every command that reads results reads them too."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench import __version__
from bench.catalog.hardware import Hardware, list_hardware, match_device
from bench.catalog.yaml_source import normalised
from bench.errors import BadInput
from bench.interop.imported import ForeignRun, enough_for
from bench.interop.recount import Recounted, recount
from bench.provenance.secrets import REMOVED, is_secret_name, redact_text
from bench.runner.results import PLAN, experiment_folder, only_one, run_number
from bench.store import RunReader, RunWriter, file_facts, list_cells, list_runs, run_folder_name

_FROM_SEND = "the file times from the send, ours counts from the due time; in an open loop they differ"


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says because no file does. A hint may add to the file, never contradict it."""

    gpu: Hardware | None = None
    num_gpus: int | None = None
    tensor_parallel_size: int | None = None
    model: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one run of a file. ``already``: it had been imported before, and was left alone."""

    source: Path
    run: ForeignRun
    folder: Path
    cell_id: str
    already: bool
    checks: tuple[Recounted, ...]
    unknown: tuple[str, ...]

    @property
    def disagreeing(self) -> tuple[Recounted, ...]:
        return tuple(c for c in self.checks if not c.agrees)


def write_runs(
    name: str, found: Iterable[tuple[Path, ForeignRun]], hints: Hints, root: Path | None = None
) -> list[Written]:
    """Write every run into the experiment ``name``.

    Raises:
        BadInput: the experiment holds measured runs, or a hint contradicts a file.
        StoreError: the disk is full or not writable.
    """
    folder = experiment_folder(name, root)
    if (folder / PLAN).is_file():
        raise BadInput("holds measured or simulated runs; imported ones are kept apart", where=str(folder),
                       next_step="choose another --name, and lay them side by side with `bench report --with`")  # fmt: skip
    with only_one(folder):
        known = _imported_before(folder)
        return [_write(name, folder, path, run, hints, known) for path, run in found]


def _imported_before(folder: Path) -> dict[tuple[str, str], RunReader]:
    """(sha256 of the file, part) -> its run."""
    out = {}
    for cell in list_cells(folder):
        for run in list_runs(cell):
            about = run.manifest.get("imported")
            if isinstance(about, dict) and run.status == "complete":
                out[(str(about.get("sha256")), str(about.get("part")))] = run
    return out


def _write(
    name: str, folder: Path, path: Path, run: ForeignRun, hints: Hints, known: dict[tuple[str, str], RunReader]
) -> Written:
    about = {"file": path.name, **file_facts(path)}
    device, num_gpus, tp = _devices(run, hints, path)
    checks = recount(run)
    unknown = _unknown(run, hints, device, num_gpus, tp)
    before = known.get((about["sha256"], run.part))
    if before is not None:
        return Written(path, run, before.folder, before.folder.parent.name, True, checks, unknown)
    cell_id, axes = _cell(run, hints, device, num_gpus, tp)
    cell_folder = folder / cell_id
    number = 1 + max((run_number(r) for r in list_runs(cell_folder)), default=0)
    args = dict(run.engine_args) | ({"tensor_parallel_size": tp} if tp is not None else {})
    load = _load(run, hints)
    manifest: dict[str, Any] = {
        "tokenyield_version": __version__,
        "created_utc": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "t0_utc": run.started_utc,
        "experiment": name,
        "cell_id": cell_id,
        "axes": axes,
        "repeat": number,
        "run_number": number,
        "origin": "imported",
        "model": hints.model or run.model,
        "hardware": device.name if device is not None else None,
        "engine": {
            "kind": hints.engine or run.engine or "",
            "version": hints.engine_version or run.engine_version or "",
            "num_gpus": num_gpus,
            "effective_args": args,
        },
        "schedule": load.to_dict() if load is not None else {},
        "imported_from": f"{run.tool} ({path.name}{', ' + run.part if run.part else ''})",
        "imported": _about(run, about, checks),
        "provenance": {"imported": _provenance(run, about)},
    }
    manifest["imported_absent"] = dict(run.absent)
    if not run.records:
        manifest |= _metrics(run, num_gpus, load.times_from_send if load is not None else False)
    writer = RunWriter(cell_folder / run_folder_name(number), manifest)
    for record in run.records:
        detail = record.error_detail
        writer.append_request(record if detail is None else replace(record, error_detail=redact_text(detail)))
    if run.chunks is not None and len(run.chunks.index):
        writer.append_chunk_columns(index=run.chunks.index, t_s=run.chunks.t_s, tokens=run.chunks.tokens,
                                    num_events=np.ones(len(run.chunks.index), dtype=np.int64))  # fmt: skip
    writer.finish("complete", duration_s=run.duration_s)
    known[(about["sha256"], run.part)] = RunReader.open(writer.folder)
    return Written(path, run, writer.folder, cell_id, False, checks, unknown)


def _about(run: ForeignRun, about: dict[str, Any], checks: tuple[Recounted, ...]) -> dict[str, Any]:
    return {
        **about,
        "part": run.part,
        "companions": [{"file": p.name, **file_facts(p)} for p in run.companions],
        "format": run.format,
        "tool": run.tool,
        "tool_version": run.tool_version,
        "model": run.model,
        "gpu": run.gpu,
        "local_date": run.local_date,
        "notes": list(run.notes),
        "reported": dict(run.reported),
        "recounted": [asdict(c) for c in checks],
        "not_reproduced": [c.key for c in checks if not c.agrees],
    }


def _provenance(run: ForeignRun, about: dict[str, Any]) -> dict[str, Any]:
    """What the report's provenance shows, in the order in which it matters."""
    known = {
        "tool": run.tool, "tool version": run.tool_version, "file": about["file"], "sha256": about["sha256"],
        "part": run.part or None, "local date": run.local_date, "GPU as the file names it": run.gpu, **run.settings,
    }  # fmt: skip
    return {k: _without_secrets(k, v) for k, v in known.items() if v not in (None, "", {})}


def _without_secrets(name: str, value: Any) -> Any:
    """What a user wrote into the other tool's metadata may hold a key."""
    if is_secret_name(name):
        return REMOVED
    if isinstance(value, dict):
        return {k: _without_secrets(str(k), v) for k, v in value.items()}
    return redact_text(value) if isinstance(value, str) else value


def _load(run: ForeignRun, hints: Hints) -> Any:
    if run.load is not None and run.load.kind == "offline" and run.load.batch_size is None and hints.batch_size:
        return replace(run.load, batch_size=hints.batch_size)
    return run.load


def _devices(run: ForeignRun, hints: Hints, path: Path) -> tuple[Hardware | None, int | None, int | None]:
    """(device, GPUs held, tensor parallelism): the file's where it says so, else the user's, else unknown.

    Raises:
        BadInput: the file and the user disagree.
    """
    in_file = run.engine_args.get("tensor_parallel_size")
    tp_in_file = int(in_file) if isinstance(in_file, (int, str)) and str(in_file).isdigit() else None
    for what, theirs, ours in (
        ("--gpus", run.num_gpus, hints.num_gpus),
        ("--tp", tp_in_file, hints.tensor_parallel_size),
    ):
        if theirs is not None and ours is not None and theirs != ours:
            raise BadInput(
                f"the file says {theirs}, {what} says {ours}", where=str(path), next_step=f"leave {what} out"
            )
    device = hints.gpu
    if device is None and run.gpu is not None:
        # by full name alone: "H100" may be any of several boards
        exact = [d for d in list_hardware() if normalised(d.name) == normalised(run.gpu)]
        device = exact[0] if exact else match_device(run.gpu)
    num_gpus = run.num_gpus if run.num_gpus is not None else hints.num_gpus
    if num_gpus is None and device is not None and device.kind == "cpu":
        num_gpus = 0
    return device, num_gpus, tp_in_file if tp_in_file is not None else hints.tensor_parallel_size


def _unknown(
    run: ForeignRun, hints: Hints, device: Hardware | None, num_gpus: int | None, tp: int | None
) -> tuple[str, ...]:
    """Options whose value neither the file nor the user gave."""
    load = _load(run, hints)
    missing = {
        "--gpu": device is None,
        "--gpus": num_gpus is None,
        "--tp": tp is None,
        "--model": not (hints.model or run.model),
        "--engine-version": not (hints.engine_version or run.engine_version),
        "--batch-size": load is not None and load.kind == "offline" and load.batch_size is None,
    }
    return tuple(k for k, v in missing.items() if v)


def _cell(
    run: ForeignRun, hints: Hints, device: Hardware | None, num_gpus: int | None, tp: int | None
) -> tuple[str, dict[str, Any]]:
    """(cell id, axes). Runs with equal facts are repeats of one cell."""
    load = _load(run, hints)
    shape = f"{_length(run.isl_tokens)}/{_length(run.osl_tokens)}" if run.isl_tokens and run.osl_tokens else None
    level = {
        k: v for k, v in (load.to_dict() if load is not None else {}).items() if k not in ("kind", "max_in_flight")
    }
    if load is not None and load.kind == "closed_loop":
        level = {"concurrency": load.concurrency}
    axes = {
        "model": hints.model or run.model,
        "gpu": device.name if device is not None else run.gpu,
        "tensor_parallel_size": tp,
        "shape": shape,
        "tool": run.tool,  # numbers of two tools are never points of one line
        **level,
    }
    identity = {
        **axes, "format": run.format, "load": load.to_dict() if load is not None else None, "num_gpus": num_gpus,
        "engine": hints.engine or run.engine, "engine_version": hints.engine_version or run.engine_version,
        "args": dict(run.engine_args),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = [f"tp{tp}" if tp is not None else f"{num_gpus}gpu" if num_gpus else ""]
    short = {"concurrency": "c", "rate_per_s": "rps", "batch_size": "bs"}
    words += [f"{short[k]}{v:g}" for k, v in level.items() if v is not None]
    words.append((shape or "").replace("/", "x").replace("~", ""))
    slug = "-".join(w for w in words if w) or run.format
    return f"{slug}-{digest}", {k: v for k, v in axes.items() if v is not None}


def _length(tokens: float | None) -> str:
    """A whole number as it is; a mean of drawn lengths to two digits, so that repeats of one setting stay one cell."""
    if tokens is None:
        return "?"
    return f"{tokens:.0f}" if tokens == round(tokens) else f"~{float(f'{tokens:.2g}'):g}"


def _metrics(run: ForeignRun, num_gpus: int | None, from_due: bool) -> dict[str, Any]:
    """``imported_metrics`` of a run without records: the tool's numbers that are ours by definition, and why others are not."""
    values: dict[str, float] = {}
    absent = dict(run.absent)
    for key, value in run.reported.items():
        if not enough_for(key, run.num_completed):
            absent[_due_key(key) if from_due else key] = "too few requests for this percentile by our rule"
            continue
        if not key.startswith("e2e_service"):
            values[key] = value
        if key.startswith(("ttft_service", "e2e_service")):
            if from_due:
                values[_due_key(key)] = value
            else:
                absent[_due_key(key)] = _FROM_SEND if run.load is not None else "the load is not in the file"
    if "output_tokens_per_s" in values and "total_tokens_per_s" in values:
        values.setdefault("input_tokens_per_s", values["total_tokens_per_s"] - values["output_tokens_per_s"])
    if num_gpus:
        for key in ("output_tokens_per_s", "total_tokens_per_s"):
            if key in values:
                values[f"{key}_per_gpu"] = values[key] / num_gpus
    if values.get("tpot_p50_s"):
        values["output_tokens_per_s_per_user"] = 1 / values["tpot_p50_s"]
    if run.duration_s:
        values["window_s"] = run.duration_s
    counts = {"num_completed": run.num_completed, "num_failed": run.num_failed, "errors": dict(run.errors)}
    return {"imported_metrics": values, "imported_absent": absent, "imported_counts": counts}


def _due_key(key: str) -> str:
    return key.replace("_service", "")


def experiment_name(text: str) -> str:
    """``text`` as the name of an experiment: small letters, digits, dots, dashes."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return slug[:80] or "imported"
