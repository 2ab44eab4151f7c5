"""The recorded file, counters, rates, and playing a recording back."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bench.errors import BadInput, StoreError
from bench.records import GpuSample
from bench.telemetry.columns import COLUMN_NAMES, SampleWriter, read_samples, sample_schema
from bench.telemetry.replay import ReplaySource
from bench.telemetry.sampler import Sampler
from bench.telemetry.series import read_series, series_of
from bench.telemetry.source import Counter, Every, Rates, Tick
from bench.telemetry.window import report_window

from .conftest import counter_samples


def write(path: Path, batches: list[list[GpuSample]]) -> Path:
    writer = SampleWriter(path, {"t0_monotonic_s": "1.0"})
    for i, batch in enumerate(batches):
        writer.add(batch)
        writer.flush(10 + i, 20 + i)
    writer.close(99, 99)
    return path


def full_sample(t_s: float) -> GpuSample:
    values: dict[str, object] = {}
    for i, f in enumerate(dataclasses.fields(GpuSample)):
        kind = str(f.type)
        values[f.name] = f"GPU-{i}" if kind == "str" else True if kind == "bool" else i if "int" in kind else i + 0.5
    return dataclasses.replace(GpuSample(**values), t_s=t_s)  # type: ignore[arg-type]


def test_every_field_of_the_record_comes_back(tmp_path: Path) -> None:
    samples = [full_sample(0.0), GpuSample(t_s=1.0, device="cpu"), full_sample(2.0)]
    file = read_samples(write(tmp_path / "t.arrow", [samples]))
    assert file.samples() == samples
    assert file.metadata["t0_monotonic_s"] == "1.0"
    assert file.clock_pairs == ((10, 20),)
    assert [f.name for f in sample_schema()] == list(COLUMN_NAMES) == [f.name for f in dataclasses.fields(GpuSample)]


def test_any_cut_off_file_keeps_its_whole_batches(tmp_path: Path) -> None:
    path = write(tmp_path / "t.arrow", [[GpuSample(float(i), "cpu")] * 10 for i in range(4)])
    data = path.read_bytes()
    counts = []
    for length in range(0, len(data) + 1, 64):
        path.write_bytes(data[:length])
        try:
            counts.append(read_samples(path).table.num_rows)
        except StoreError:
            counts.append(-1)
    assert counts == sorted(counts)
    assert set(counts) == {-1, 0, 10, 20, 30, 40}


def test_what_was_flushed_is_readable_before_the_end(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path / "t.arrow")
    writer.add([GpuSample(1.0, "cpu")])
    writer.flush(1, 2)
    assert read_samples(tmp_path / "t.arrow").table.num_rows == 1
    writer.close(3, 4)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    for data in (b"", b"not arrow at all", b"\xff\xff\xff\xff\x10\x00\x00\x00"):
        path.write_bytes(data)
        with pytest.raises(StoreError):
            read_samples(path)
    table = pa.table({"a": [1]})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(StoreError, match="not of telemetry"):
        read_samples(path)
    with pytest.raises(StoreError, match="cannot read"):
        read_samples(tmp_path / "none.arrow")


def test_series_from_file_and_from_samples_agree(tmp_path: Path) -> None:
    samples = counter_samples(300, 5, device="a") + counter_samples(200, 5, device="b", temperature_c=50.0)
    from_file = read_series(write(tmp_path / "t.arrow", [samples]))
    for device, series in series_of(samples).items():
        other = from_file[device]
        for column, values in series.columns.items():
            np.testing.assert_array_equal(values, other.columns[column])
        np.testing.assert_array_equal(series.lost, other.lost)


def test_counter_wraps_and_resets() -> None:
    counter = Counter(2**32)
    assert counter.update(2**32 - 5, 0) == 2**32 - 5
    assert counter.update(10, max_step=100) == 2**32 + 10
    assert counter.update(20, max_step=100) == 2**32 + 20
    assert (counter.num_wraps, counter.num_resets) == (1, 0)
    # the way round would be far too long for the time that passed: a reset
    assert counter.update(3, max_step=100) == 3
    assert (counter.num_wraps, counter.num_resets) == (1, 1)
    wide = Counter(2**64)
    wide.update(5_000, 0)
    assert wide.update(7, max_step=10**9) == 7 and wide.num_resets == 1


def test_slower_groups_are_due_once_a_period_even_after_missed_ticks() -> None:
    every = Every(20, phase=3)
    assert [i for i in range(70) if every.due(i)] == [0, 3, 23, 43, 63]
    every = Every(20)
    # ticks 20 and 40 were missed
    assert [i for i in (0, 5, 19, 22, 30, 39, 44, 59, 60) if every.due(i)] == [0, 22, 44, 60]


@pytest.mark.parametrize("rates", [(0, 0, 0), (20, 30, 1), (20, 5, 6), (20, 5, -1), (5000, 5, 1)])
def test_impossible_rates(rates: tuple[float, float, float]) -> None:
    with pytest.raises(BadInput, match="slow_hz"):
        Rates(*rates)


def test_replay_keeps_readings_and_moves_times(tmp_path: Path) -> None:
    samples = [s for t in counter_samples(300, 2) for s in (t, dataclasses.replace(t, device="other"))]
    path = write(tmp_path / "t.arrow", [samples])
    source = ReplaySource(path, ["GPU-x"], speed=100)
    t0 = time.monotonic() - 50
    rows: list[GpuSample] = []
    while len(rows) < len(samples) // 2:
        rows += source.read(Tick(0, t0, 0.0))
        time.sleep(0.001)
    assert {r.device for r in rows} == {"GPU-x"}
    assert [r.energy_j for r in rows] == [s.energy_j for s in samples if s.device == "GPU-x"]
    assert rows[0].t_s == pytest.approx(50, abs=0.5)
    assert rows[-1].t_s - rows[0].t_s == pytest.approx(2.0 / 100)
    assert rows[5].energy_t_s == pytest.approx(rows[5].t_s)
    assert source.read(Tick(1, t0, 0.0)) == []


def test_a_replayed_recording_feeds_the_sampler_and_its_consumers(tmp_path: Path) -> None:
    recording = write(tmp_path / "old.arrow", [counter_samples(300, 3, sm_clock_hz=1.5e9)])
    with Sampler(tmp_path / "new.arrow", time.monotonic(), devices=["GPU-x"], source=f"replay:{recording}") as sampler:
        time.sleep(2.6)
    assert sampler.error is None and sampler.stats["devices"]["GPU-x"]["name"] == "replayed"
    series = read_series(tmp_path / "new.arrow")["GPU-x"]
    report = report_window(series, {"max_sm_clock_hz": 2e9}, series.t_s[0] + 0.3, series.t_s[0] + 2.3)
    assert report.energy.energy_j == pytest.approx(600, rel=0.03)
    assert report.clock_drop_ratio == pytest.approx(0.25)


def test_replaying_a_device_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "t.arrow", [counter_samples(300, 1)])
    with pytest.raises(BadInput, match="it holds GPU-x"):
        ReplaySource(path, ["GPU-y"])
