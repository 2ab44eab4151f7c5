"""Samples of one device as columns: float64 arrays in order of time, NaN where there was no reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.records import GpuSample
from bench.telemetry.columns import COLUMN_NAMES, read_samples

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray
_NUMERIC = tuple(n for n in COLUMN_NAMES if n not in ("device", "lost"))


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Samples of one device.

    ``t_s`` is ascending, seconds since the run's start. ``columns`` has one float64 array of the same length for each
    numeric field of GpuSample. ``lost`` is a boolean array: rows in which the driver reported the GPU as lost.
    """

    device: str
    t_s: Array
    columns: Mapping[str, Array]
    lost: Array

    def readings(self, column: str) -> tuple[Array, Array]:
        """(times, values) of the rows in which ``column`` was read."""
        values = self.columns[column]
        there = np.isfinite(values)
        return self.t_s[there], values[there]

    def readings_in(self, column: str, start_s: float, end_s: float) -> tuple[Array, Array]:
        """As :meth:`readings`, limited to ``start_s <= t <= end_s``."""
        times, values = self.readings(column)
        inside = (times >= start_s) & (times <= end_s)
        return times[inside], values[inside]


def series_of(samples: Iterable[GpuSample]) -> dict[str, Series]:
    """Device -> its samples."""
    rows: dict[str, list[GpuSample]] = {}
    for sample in samples:
        rows.setdefault(sample.device, []).append(sample)
    found = {}
    for device, of_device in rows.items():
        columns = {
            n: np.array([np.nan if (v := getattr(s, n)) is None else v for s in of_device], dtype=np.float64)
            for n in _NUMERIC
        }
        found[device] = _ordered(device, columns, np.array([s.lost for s in of_device], dtype=bool))
    return found


def series_from_table(table: pa.Table) -> dict[str, Series]:
    """Device -> its samples, from the Arrow table of a telemetry file. Columns of another version are NaN or left out."""
    names = np.asarray(table.column("device").to_pylist(), dtype=object)
    present = set(table.column_names)
    length = table.num_rows
    whole = {
        n: np.array(table.column(n).cast("float64").to_numpy(), dtype=np.float64)
        if n in present
        else np.full(length, np.nan)
        for n in _NUMERIC
    }
    lost = (
        np.array([bool(x) for x in table.column("lost").to_pylist()]) if "lost" in present else np.zeros(length, bool)
    )
    found = {}
    for device in dict.fromkeys(names):
        mine = names == device
        found[str(device)] = _ordered(str(device), {n: c[mine] for n, c in whole.items()}, lost[mine])
    return found


def read_series(path: Path | str) -> dict[str, Series]:
    """Device -> its samples, from a telemetry file.

    Raises:
        StoreError: not a telemetry file.
    """
    return series_from_table(read_samples(path).table)


def _ordered(device: str, columns: dict[str, Array], lost: Array) -> Series:
    order = np.argsort(columns["t_s"], kind="stable")
    ordered = {n: c[order] for n, c in columns.items()}
    return Series(device=device, t_s=ordered["t_s"], columns=ordered, lost=lost[order])
