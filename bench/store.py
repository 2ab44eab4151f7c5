"""The run folder: append-only records on disk, readable after a kill at any instant.

Layout of ``results/runs/<experiment>/<cell_id>/run-<n>-<utc>/``::

    manifest.json         written first as "running", replaced atomically at the end with counts and sha256 of each file
    requests.jsonl        one RequestRecord a line, appended as requests complete
    chunks.arrow          Arrow IPC stream of ChunkRecord (streaming loads)
    engine_steps.arrow    Arrow IPC stream of EngineStep
    engine_metrics.arrow  Arrow IPC stream of EngineMetric (scraped /metrics)
    telemetry.arrow       Arrow IPC stream of GpuSample (written by the sampler's own process)
    engine.log            the engine's output
    summary.json          derived: safe to delete

A torn last line or batch is dropped with a warning, never refused: at most one flush interval is lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from bench.errors import StoreError
from bench.records import ChunkRecord, EngineMetric, EngineStep, GpuSample, RequestRecord

if TYPE_CHECKING:
    import pyarrow as pa

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
                json.dump(data, f, indent=1, ensure_ascii=False, default=_json_default)
                f.write("\n")
                f.flush()
                os.fsync(f.fileno())
            os.chmod(tmp, 0o644)
            os.replace(tmp, path)
        except BaseException:
            Path(tmp).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise _store_error(path, e) from e


def _json_default(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def _store_error(path: Path, e: OSError) -> StoreError:
    reason = e.strerror or str(e)
    hint = "free some space and run the same command again: finished runs are kept" if e.errno in (28, 122) else None
    return StoreError(f"cannot write: {reason}", where=str(path), next_step=hint)


def schema_of(record_type: type) -> pa.Schema:
    """The Arrow schema of a flat record dataclass; optional fields are nullable columns."""
    import pyarrow as pa

    arrow = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    hints = typing.get_type_hints(record_type)
    out = []
    for f in fields(record_type):
        hint = hints[f.name]
        nullable = False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            inner = [a for a in typing.get_args(hint) if a is not type(None)]
            nullable, hint = True, inner[0]
        out.append(pa.field(f.name, arrow[hint], nullable=nullable))
    return pa.schema(out)


class ArrowAppender:
    """Appends records of one type to an Arrow IPC stream file, a batch per flush."""

    def __init__(self, path: Path, record_type: type) -> None:
        self.path, self.schema = path, schema_of(record_type)
        self._columns: dict[str, list[Any]] = {n: [] for n in self.schema.names}
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self.num_rows = 0

    def append(self, record: Any) -> None:
        for name, column in self._columns.items():
            column.append(getattr(record, name))

    def append_columns(self, columns: dict[str, Any]) -> None:
        """Write a batch of whole columns at once (for millions of rows); missing columns become null."""
        import pyarrow as pa

        self.flush()
        n = len(next(iter(columns.values())))
        arrays = [
            pa.array(columns[f.name], type=f.type) if f.name in columns else pa.nulls(n, f.type) for f in self.schema
        ]
        self._write(pa.record_batch(arrays, schema=self.schema))

    def flush(self) -> None:
        first = next(iter(self._columns.values()))
        if not first:
            return
        import pyarrow as pa

        arrays = [pa.array(self._columns[f.name], type=f.type) for f in self.schema]
        for column in self._columns.values():
            column.clear()
        self._write(pa.record_batch(arrays, schema=self.schema))

    def _write(self, batch: Any) -> None:
        import pyarrow as pa

        try:
            if self._writer is None:
                self._file = open(self.path, "wb")
                self._writer = pa.ipc.new_stream(self._file, self.schema)
            self._writer.write_batch(batch)
            assert self._file is not None
            self._file.flush()
        except OSError as e:
            raise _store_error(self.path, e) from e
        self.num_rows += batch.num_rows

    def close(self) -> None:
        self.flush()
        if self._writer is not None and self._file is not None:
            try:
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as e:
                raise _store_error(self.path, e) from e
            finally:
                self._file.close()
                self._writer = self._file = None


def read_arrow(path: Path) -> tuple[pa.Table | None, str | None]:
    """(table, warning). A torn last batch is dropped; an absent or empty file is (None, ...)."""
    import pyarrow as pa

    if not path.exists():
        return None, None
    batches: list[Any] = []
    with pa.OSFile(str(path), "rb") as source:
        try:
            reader = pa.ipc.open_stream(source)
        except (pa.ArrowInvalid, OSError):
            return None, f"{path.name}: no complete header, nothing could be read"
        schema = reader.schema
        warning = None
        while True:
            try:
                batches.append(reader.read_next_batch())
            except StopIteration:
                break
            except (pa.ArrowInvalid, OSError):
                warning = f"{path.name}: the last batch was torn and has been dropped ({len(batches)} batches kept)"
                break
    return pa.Table.from_batches(batches, schema=schema), warning


def read_records(path: Path, record_type: type) -> tuple[list[Any], str | None]:
    """(records, warning) of an Arrow stream written by :class:`ArrowAppender`; unknown columns are dropped."""
    table, warning = read_arrow(path)
    if table is None:
        return [], warning
    known = [f.name for f in fields(record_type) if f.name in table.schema.names]
    columns = [table.column(n).to_pylist() for n in known]
    return [record_type(**dict(zip(known, row, strict=True))) for row in zip(*columns, strict=True)], warning


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


class RunWriter:
    """Writes one run folder as the run happens. Use as a context manager or call :meth:`finish` yourself.

    Args:
        folder: created; must not hold a run yet.
        manifest: everything known before the start (experiment, cell, seeds, origin, provenance, ...).

    Raises:
        StoreError: from any method when the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except OSError as e:
            raise _store_error(folder, e) from e
        self.manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "t0_utc": None,
            "t0_monotonic_s": None,
            "writer_pid": os.getpid(),
            "writer_start_s": process_start_s(os.getpid()),
            "warnings": [],
            **manifest,
        }
        self._requests: IO[str] | None = None
        self._appenders: dict[str, ArrowAppender] = {}
        self._last_flush = time.monotonic()
        self.num_requests = 0
        write_json_atomically(folder / MANIFEST, self.manifest)

    def update_manifest(self, **values: Any) -> None:
        """Merge ``values`` and write the manifest again (atomically)."""
        self.manifest.update(values)
        write_json_atomically(self.folder / MANIFEST, self.manifest)

    def append_request(self, record: RequestRecord) -> None:
        try:
            if self._requests is None:
                self._requests = open(self.folder / REQUESTS, "a", encoding="utf-8")
            self._requests.write(json.dumps(record.to_dict(), ensure_ascii=False, default=_json_default) + "\n")
        except OSError as e:
            raise _store_error(self.folder / REQUESTS, e) from e
        self.num_requests += 1
        self._maybe_flush()

    def append_chunk(self, chunk: ChunkRecord) -> None:
        self._appender(CHUNKS, ChunkRecord).append(chunk)
        self._maybe_flush()

    def append_chunk_columns(self, **columns: Any) -> None:
        """Whole columns of chunks: index, t_s, tokens, num_events (numpy arrays of equal length)."""
        self._appender(CHUNKS, ChunkRecord).append_columns(columns)

    def append_step(self, step: EngineStep) -> None:
        self._appender(STEPS, EngineStep).append(step)
        self._maybe_flush()

    def append_metric(self, metric: EngineMetric) -> None:
        self._appender(METRICS, EngineMetric).append(metric)
        self._maybe_flush()

    def append_telemetry(self, sample: GpuSample) -> None:
        """Only for simulated and imported runs; a live sampler writes telemetry.arrow itself."""
        self._appender(TELEMETRY, GpuSample).append(sample)
        self._maybe_flush()

    def _appender(self, name: str, record_type: type) -> ArrowAppender:
        if name not in self._appenders:
            self._appenders[name] = ArrowAppender(self.folder / name, record_type)
        return self._appenders[name]

    def _maybe_flush(self) -> None:
        now = time.monotonic()
        if now - self._last_flush >= FLUSH_INTERVAL_S:
            self.flush()
            self._last_flush = now

    def flush(self) -> None:
        try:
            if self._requests is not None:
                self._requests.flush()
        except OSError as e:
            raise _store_error(self.folder / REQUESTS, e) from e
        for appender in self._appenders.values():
            appender.flush()

    def finish(self, status: str, **values: Any) -> None:
        """Close every file, then replace the manifest with its final form. ``status`` is "complete" or "failed"."""
        if self._requests is not None:
            try:
                self._requests.flush()
                os.fsync(self._requests.fileno())
                self._requests.close()
            except OSError as e:
                raise _store_error(self.folder / REQUESTS, e) from e
            self._requests = None
        for appender in self._appenders.values():
            appender.close()
        names = [n for n in (*DATA_FILES, ENGINE_LOG) if (self.folder / n).exists()]
        facts = {n: file_facts(self.folder / n) for n in names}
        self.update_manifest(status=status, files=facts, finished_utc=utc_now_text(), **values)


def process_start_s(pid: int) -> float | None:
    """Start time of a process (Unix s), to tell a living writer from a recycled pid."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class RunReader:
    """Reads one run folder. Everything is read on demand; ``problems`` collects what was dropped."""

    folder: Path
    manifest: dict[str, Any]
    problems: list[str]

    @classmethod
    def open(cls, folder: Path) -> RunReader:
        """Raises StoreError when ``folder`` is no run folder or was written by a newer version."""
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError("not a run folder: it has no manifest.json", where=str(folder)) from None
        except (OSError, ValueError) as e:
            raise StoreError(f"manifest cannot be read: {e}", where=str(path), next_step="delete this folder") from e
        version = manifest.get("schema_version", 0) if isinstance(manifest, dict) else None
        if not isinstance(version, int):
            raise StoreError("manifest is not one of a run", where=str(path), next_step="delete this folder")
        if version > SCHEMA_VERSION:
            raise StoreError(
                "written by a newer version of tokenyield", where=str(path), next_step="upgrade tokenyield"
            )
        return cls(folder, manifest, [])

    @property
    def status(self) -> str:
        """complete, failed, running, or interrupted ("running" whose writer is gone)."""
        status = str(self.manifest.get("status", "interrupted"))
        if status != "running":
            return status if status in FINAL_STATUSES else "interrupted"
        pid, start = self.manifest.get("writer_pid"), self.manifest.get("writer_start_s")
        alive = pid is not None and start is not None and process_start_s(int(pid)) == start
        return "running" if alive else "interrupted"

    @property
    def origin(self) -> str:
        return str(self.manifest.get("origin", "measured"))

    def requests(self) -> list[RequestRecord]:
        return list(self.iter_requests())

    def iter_requests(self) -> Iterator[RequestRecord]:
        path = self.folder / REQUESTS
        if not path.exists():
            return
        with open(path, encoding="utf-8", errors="replace") as f:
            for number, line in enumerate(f, 1):
                try:
                    if not line.endswith("\n"):
                        raise ValueError("torn")
                    yield RequestRecord.from_dict(json.loads(line))
                except (ValueError, TypeError):
                    self.problems.append(f"{REQUESTS}:{number}: unreadable line dropped")

    def _records(self, name: str, record_type: type) -> list[Any]:
        records, warning = read_records(self.folder / name, record_type)
        if warning:
            self.problems.append(warning)
        return records

    def table(self, name: str) -> pa.Table | None:
        """One Arrow file (e.g. ``store.CHUNKS``) as a table, or None when the run has none."""
        table, warning = read_arrow(self.folder / name)
        if warning:
            self.problems.append(warning)
        return table

    def steps(self) -> list[EngineStep]:
        return self._records(STEPS, EngineStep)

    def telemetry(self) -> list[GpuSample]:
        return self._records(TELEMETRY, GpuSample)

    def metrics(self) -> list[EngineMetric]:
        return self._records(METRICS, EngineMetric)

    def chunks(self) -> list[ChunkRecord]:
        return self._records(CHUNKS, ChunkRecord)

    def verify(self) -> list[str]:
        """Names of files that differ from what the manifest recorded (size or sha256)."""
        wrong = []
        for name, facts in self.manifest.get("files", {}).items():
            path = self.folder / name
            if not path.exists() or file_facts(path)["sha256"] != facts["sha256"]:
                wrong.append(name)
        return wrong


def run_folder_name(repeat: int) -> str:
    return f"run-{repeat}-{utc_now_text()}"


def list_runs(cell_folder: Path) -> list[RunReader]:
    """Every readable run of a cell, oldest first. Folders without a readable manifest are skipped."""
    runs = []
    if cell_folder.is_dir():
        for child in sorted(cell_folder.iterdir()):
            if child.name.startswith("run-") and child.is_dir():
                try:
                    runs.append(RunReader.open(child))
                except StoreError:
                    continue
    return sorted(runs, key=lambda r: (str(r.manifest.get("created_utc", "")), r.folder.name))


def list_cells(experiment_folder: Path) -> list[Path]:
    """Cell folders of an experiment's results, by name; numbers in names count as numbers (c4 before c16)."""
    if not experiment_folder.is_dir():
        return []
    found = [p for p in experiment_folder.iterdir() if p.is_dir() and any(p.glob("run-*/manifest.json"))]
    return sorted(found, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])


def records_to_columns(records: Iterable[Any]) -> dict[str, list[Any]]:
    """Records of one type as columns, for a data frame."""
    rows = [asdict(r) for r in records]
    return {k: [r[k] for r in rows] for k in rows[0]} if rows else {}
