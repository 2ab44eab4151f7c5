"""Reading run folders, torn ends included."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import StoreError
from bench.records import ChunkRecord, EngineMetric, EngineStep, GpuSample, RequestRecord

if TYPE_CHECKING:
    import pyarrow as pa

from bench.store.arrow import read_arrow, read_records
from bench.store.files import (
    CHUNKS,
    FINAL_STATUSES,
    MANIFEST,
    METRICS,
    REQUESTS,
    SCHEMA_VERSION,
    STEPS,
    TELEMETRY,
    file_facts,
    process_start_s,
)


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
