"""The telemetry file: Arrow IPC stream whose schema is the fields of :class:`bench.records.GpuSample`.

Each batch carries one pair of wall and monotonic clock readings in its metadata (``wall_ns``, ``monotonic_ns``), so that
samples can be laid beside logs with wall times even if the wall clock was stepped during the run. The stream is appended
to once a second; a torn last batch is dropped by the reader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from bench.errors import StoreError
from bench.records import GpuSample
from bench.units import MIB

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN_NAMES: tuple[str, ...] = tuple(f.name for f in fields(GpuSample))
#: Bytes kept while the disk refuses them (full); beyond that the oldest promise, a readable file, wins and rows are lost.
MAX_PENDING_BYTES = 32 * MIB


def sample_schema(metadata: dict[str, str] | None = None) -> pa.Schema:
    """Arrow schema of the file: one column for each field of GpuSample, in its order."""
    import pyarrow as pa

    arrow_types = {float: pa.float64(), int: pa.int64(), str: pa.string(), bool: pa.bool_()}
    hints = get_type_hints(GpuSample)
    columns = []
    for name in COLUMN_NAMES:
        kinds = [k for k in get_args(hints[name]) or (hints[name],) if k is not type(None)]
        columns.append(pa.field(name, arrow_types[kinds[0]], nullable=True))
    return pa.schema(columns, metadata=metadata)


class SampleWriter:
    """Appends samples to a file that is readable after every :meth:`flush`, even if this process is killed.

    What a full disk refuses is kept and tried again at the next flush; ``error`` holds the last refusal, and
    ``num_rows_lost`` counts rows given up after ``MAX_PENDING_BYTES``.

    Raises:
        StoreError: the file cannot be created.
    """

    def __init__(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        import io

        import pyarrow as pa

        self._pa = pa
        self._values: Callable[[GpuSample], tuple[Any, ...]] = attrgetter(*COLUMN_NAMES)
        self._rows: list[tuple[Any, ...]] = []
        self._schema = sample_schema(metadata)
        self._buffer = io.BytesIO()
        self._pending = b""
        self.num_rows = 0
        self.num_rows_lost = 0
        self.error: str | None = None
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise StoreError(f"cannot write telemetry: {exc.strerror}", where=str(path)) from exc
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        self._writer = pa.ipc.new_stream(self._buffer, self._schema, options=options)
        self._drain()

    def add(self, samples: Sequence[GpuSample]) -> None:
        """Keeps rows until the next flush."""
        self._rows.extend(map(self._values, samples))

    def flush(self, wall_ns: int, monotonic_ns: int) -> None:
        """Writes the rows since the last flush as one batch, stamped with a pair of clocks. Never raises on a full disk."""
        if self._rows:
            if len(self._pending) > MAX_PENDING_BYTES:
                self.num_rows_lost += len(self._rows)
            else:
                arrays = [
                    self._pa.array(c, type=f.type)
                    for c, f in zip(zip(*self._rows, strict=True), self._schema, strict=True)
                ]
                batch = self._pa.record_batch(arrays, schema=self._schema)
                pair = {"wall_ns": str(wall_ns), "monotonic_ns": str(monotonic_ns)}
                self._writer.write_batch(batch, custom_metadata=pair)
                self.num_rows += len(self._rows)
            self._rows.clear()
        self._drain()

    def close(self, wall_ns: int, monotonic_ns: int) -> None:
        """Flushes, marks the end of the stream and closes the file."""
        self.flush(wall_ns, monotonic_ns)
        self._writer.close()
        self._drain()
        os.close(self._fd)

    def _drain(self) -> None:
        data = self._pending + self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            self.error = None
        except OSError as exc:
            self.error = exc.strerror or str(exc)
        self._pending = data


def warm_up() -> None:
    """Writes one batch to nowhere: the first one costs a hundred times as much as the next."""
    writer = SampleWriter(Path(os.devnull))
    writer.add([GpuSample(t_s=0.0, device="")])
    writer.close(0, 0)


@dataclass(frozen=True, slots=True)
class SampleFile:
    """What a telemetry file holds. ``clock_pairs`` are (wall_ns, monotonic_ns) per batch; ``torn`` tells a cut-off end."""

    table: pa.Table
    metadata: dict[str, str]
    clock_pairs: tuple[tuple[int, int], ...] = ()
    torn: bool = False
    devices: tuple[str, ...] = field(default=())

    def samples(self) -> list[GpuSample]:
        """The rows as records."""
        rows = self.table.to_pylist()
        return [GpuSample(**{k: v for k, v in row.items() if k in COLUMN_NAMES}) for row in rows]


def read_samples(path: Path | str) -> SampleFile:
    """Reads a telemetry file, dropping a torn end.

    Raises:
        StoreError: there is no such file, or not even its schema is there.
    """
    import pyarrow as pa

    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise StoreError(f"cannot read telemetry: {exc.strerror}", where=str(path)) from exc
    try:
        reader = pa.ipc.open_stream(pa.py_buffer(data))
    except (pa.ArrowInvalid, EOFError, OSError) as exc:
        raise StoreError("not a telemetry file, or cut off before its first batch", where=str(path)) from exc
    batches, pairs, torn = [], [], False
    while True:
        try:
            batch, custom = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            break
        except (pa.ArrowInvalid, OSError):
            torn = True
            break
        batches.append(batch)
        pair = dict(custom or {})
        if b"wall_ns" in pair and b"monotonic_ns" in pair:
            pairs.append((int(pair[b"wall_ns"]), int(pair[b"monotonic_ns"])))
    table = pa.Table.from_batches(batches, schema=reader.schema)
    if "device" not in table.column_names or "t_s" not in table.column_names:
        raise StoreError("an Arrow file, but not of telemetry samples", where=str(path))
    names = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
    devices = tuple(dict.fromkeys(table.column("device").to_pylist()))
    return SampleFile(table=table, metadata=names, clock_pairs=tuple(pairs), torn=torn, devices=devices)
