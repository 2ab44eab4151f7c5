"""The run folder: what was flushed is readable whatever happens, and the manifest tells the truth about it."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import StoreError
from bench.records import ChunkRecord, EngineStep, GpuSample, RequestRecord
from bench.store import (
    CHUNKS,
    MANIFEST,
    REQUESTS,
    STEPS,
    RunReader,
    RunWriter,
    list_cells,
    list_runs,
    read_records,
    run_folder_name,
    write_json_atomically,
)


def request(index: int) -> RequestRecord:
    return RequestRecord(
        index, "measured", 10, 5, None, 0.5 * index, 0.5 * index + 0.1, 0.5 * index + 0.3, 0.5 * index + 0.3
    )


def step(number: int) -> EngineStep:
    return EngineStep(number, 0.1 * number, 0.1, 3, 1, 0.25, 100, 3, 1, 3, context_tokens=None)


def written(folder: Path, num: int = 20) -> Path:
    writer = RunWriter(folder, {"cell_id": "c", "origin": "measured"})
    for i in range(num):
        writer.append_request(request(i))
        writer.append_step(step(i))
        writer.append_chunk(ChunkRecord(i, 0.5, 2))
    writer.finish("complete")
    return folder


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    run = RunReader.open(written(tmp_path / "run-1-x"))
    assert run.status == "complete" and run.origin == "measured"
    assert run.requests() == [request(i) for i in range(20)]
    assert run.steps() == [step(i) for i in range(20)]
    assert run.chunks()[3] == ChunkRecord(3, 0.5, 2)
    assert run.telemetry() == [] and run.metrics() == []
    assert run.problems == [] and run.verify() == []
    assert run.manifest["files"][REQUESTS]["lines"] == 20


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path / "run-1-x")
    with open(folder / REQUESTS, "a") as f:
        f.write("{}\n")
    assert RunReader.open(folder).verify() == [REQUESTS]


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), name=st.sampled_from([REQUESTS, STEPS, CHUNKS]))
def test_a_file_torn_anywhere_is_readable(tmp_path_factory: pytest.TempPathFactory, cut: float, name: str) -> None:
    folder = tmp_path_factory.mktemp("torn") / "run-1-x"
    writer = RunWriter(folder, {"cell_id": "c"})
    for i in range(30):
        writer.append_request(request(i))
        writer.append_step(step(i))
        writer.append_chunk(ChunkRecord(i, 0.5, 2))
        if i % 7 == 0:
            writer.flush()
    writer.finish("complete")
    path = folder / name
    size = path.stat().st_size
    keep = int(size * cut)
    with open(path, "r+b") as f:
        f.truncate(keep)
    run = RunReader.open(folder)
    got = {REQUESTS: run.requests, STEPS: run.steps, CHUNKS: run.chunks}[name]()
    assert len(got) <= 30
    expected = {REQUESTS: request, STEPS: step, CHUNKS: lambda i: ChunkRecord(i, 0.5, 2)}[name]
    assert got == [expected(i) for i in range(len(got))]
    assert len(got) == 30 or run.problems or name != REQUESTS or keep == 0 or path.read_bytes().endswith(b"\n")


def test_columns_at_once(tmp_path: Path) -> None:
    import numpy as np

    writer = RunWriter(tmp_path / "run-1-x", {"cell_id": "c"})
    writer.append_chunk_columns(
        index=np.arange(4), t_s=np.linspace(0, 1, 4), tokens=np.ones(4, dtype=int), num_events=np.ones(4, dtype=int)
    )
    columns = {
        f.name: np.array([getattr(step(i), f.name) for i in range(3)])
        for f in fields(EngineStep)
        if f.name not in ("num_preemptions", "context_tokens", "cached_tokens")
    }
    writer.append_step_columns(**columns)
    writer.append_telemetry_columns(t_s=np.array([0.0, 0.1]), device=["a", "b"], power_w=np.array([1.0, 2.0]))
    writer.finish("complete")
    run = RunReader.open(writer.folder)
    assert [c.index for c in run.chunks()] == [0, 1, 2, 3]
    assert run.steps() == [step(0), step(1), step(2)]
    # what is not given is as in a record that was made without it
    assert run.telemetry() == [GpuSample(0.0, "a", power_w=1.0), GpuSample(0.1, "b", power_w=2.0)]


def test_a_run_whose_writer_is_gone_is_interrupted(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run-1-x", {"cell_id": "c"})
    assert RunReader.open(writer.folder).status == "running"
    manifest = json.loads((writer.folder / MANIFEST).read_text())
    manifest["writer_start_s"] -= 100  # the pid now belongs to another process
    write_json_atomically(writer.folder / MANIFEST, manifest)
    assert RunReader.open(writer.folder).status == "interrupted"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a run folder"):
        RunReader.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{not json")
    with pytest.raises(StoreError, match="cannot be read"):
        RunReader.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"schema_version": 99}')
    with pytest.raises(StoreError, match="newer version"):
        RunReader.open(tmp_path)
    written(tmp_path / "run-1-x")
    with pytest.raises(StoreError, match="exists"):
        RunWriter(tmp_path / "run-1-x", {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run-1-x", {"cell_id": "c"})
    (writer.folder / REQUESTS).symlink_to("/dev/full")
    (writer.folder / STEPS).symlink_to("/dev/full")
    with pytest.raises(StoreError, match="free some space"):
        for i in range(5000):
            writer.append_request(request(i))
        writer.flush()
    with pytest.raises(StoreError, match="free some space"):
        writer.append_step(step(1))
        for appender in writer._appenders.values():
            appender.flush()


def test_unknown_columns_and_keys_of_a_newer_version_are_dropped(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "t.arrow"
    table = pa.table({"t_s": [0.5], "device": ["cpu"], "novel": [1]})
    with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as w:
        w.write_table(table)
    assert read_records(path, GpuSample)[0] == [GpuSample(0.5, "cpu")]
    assert RequestRecord.from_dict({"index": 1, "phase": "measured", "novel": 2}).index == 1


def test_listing(tmp_path: Path) -> None:
    cell = tmp_path / "exp" / "cell-a"
    cell.mkdir(parents=True)
    written(cell / run_folder_name(1))
    (cell / "run-2-broken").mkdir()
    (tmp_path / "exp" / "empty").mkdir()
    assert len(list_runs(cell)) == 1
    assert list_cells(tmp_path / "exp") == [cell]
    assert list_runs(tmp_path / "nowhere") == [] and list_cells(tmp_path / "nowhere") == []
