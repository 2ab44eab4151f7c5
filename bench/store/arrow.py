"""Records as Arrow IPC streams that are appended to, and read whatever their end looks like."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

from bench.store.files import store_error


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


def warm_up() -> None:
    """Do now what pyarrow does at the first array it makes: import pandas, a second of CPU (``array`` looks whether it was
    given a series). Before a clock starts, so that it falls into no measurement."""
    import pyarrow as pa

    pa.array([0])


class ArrowAppender:
    """Appends records of one type to an Arrow IPC stream file, a batch per flush."""

    def __init__(self, path: Path, record_type: type) -> None:
        self.path, self.schema = path, schema_of(record_type)
        self._defaults = {f.name: None if f.default is MISSING else f.default for f in fields(record_type)}
        self._columns: dict[str, list[Any]] = {n: [] for n in self.schema.names}
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self.num_rows = 0

    def append(self, record: Any) -> None:
        for name, column in self._columns.items():
            column.append(getattr(record, name))

    def append_columns(self, columns: dict[str, Any]) -> None:
        """Write a batch of whole columns at once (for millions of rows); missing ones get the record's default, or null."""
        import pyarrow as pa

        self.flush()
        n = len(next(iter(columns.values())))
        arrays = [
            pa.array(columns[f.name], type=f.type)
            if f.name in columns
            else pa.repeat(pa.scalar(self._defaults[f.name], f.type), n)
            for f in self.schema
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
            raise store_error(self.path, e) from e
        self.num_rows += batch.num_rows

    def close(self) -> None:
        self.flush()
        if self._writer is not None and self._file is not None:
            try:
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as e:
                raise store_error(self.path, e) from e
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


def records_to_columns(records: Iterable[Any]) -> dict[str, list[Any]]:
    """Records of one type as columns, for a data frame."""
    rows = [asdict(r) for r in records]
    return {k: [r[k] for r in rows] for k in rows[0]} if rows else {}
