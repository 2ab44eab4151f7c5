"""Names of a run folder's files, and JSON written all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.errors import StoreError

if TYPE_CHECKING:
    pass

SCHEMA_VERSION = 1
FLUSH_INTERVAL_S = 1.0
MANIFEST, REQUESTS, CHUNKS, STEPS, METRICS, TELEMETRY, ENGINE_LOG, SUMMARY = (
    "manifest.json",
    "requests.jsonl",
    "chunks.arrow",
    "engine_steps.arrow",
    "engine_metrics.arrow",
    "telemetry.arrow",
    "engine.log",
    "summary.json",
)
DATA_FILES = (REQUESTS, CHUNKS, STEPS, METRICS, TELEMETRY)
#: A run in a final status never changes again. "running" with a dead writer is an interrupted run.
FINAL_STATUSES = ("complete", "failed")


def utc_now_text() -> str:
    """The current time as 20261124T053000Z, fit for a folder name."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def write_json_atomically(path: Path, data: Any) -> None:
    """Replace ``path`` with ``data`` as JSON so that a reader sees the old or the new file, never a part.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    try:
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                json.dump(data, f, indent=1, ensure_ascii=False, default=json_default)
                f.write("\n")
                f.flush()
                os.fsync(f.fileno())
            os.chmod(tmp, 0o644)
            os.replace(tmp, path)
        except BaseException:
            Path(tmp).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise store_error(path, e) from e


def json_default(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def store_error(path: Path, e: OSError) -> StoreError:
    reason = e.strerror or str(e)
    hint = "free some space and run the same command again: finished runs are kept" if e.errno in (28, 122) else None
    return StoreError(f"cannot write: {reason}", where=str(path), next_step=hint)


def file_facts(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256", and "lines" for text} of a finished file."""
    h, lines, size = hashlib.sha256(), 0, 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
            size += len(block)
            lines += block.count(b"\n")
    facts: dict[str, Any] = {"bytes": size, "sha256": h.hexdigest()}
    if path.suffix in (".jsonl", ".log"):
        facts["lines"] = lines
    return facts


def process_start_s(pid: int) -> float | None:
    """Start time of a process (Unix s), to tell a living writer from a recycled pid."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def run_folder_name(repeat: int) -> str:
    return f"run-{repeat}-{utc_now_text()}"
