"""The host source on folders that look like /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.records import GpuSample
from bench.telemetry import host
from bench.telemetry.host import HostSource, cpu_times, rapl_domains
from bench.telemetry.source import Rates, Tick


class Machine:
    """A /proc and a /sys of one's own."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.powercap, self.cpu = folder / "proc", folder / "powercap", folder / "cpu"
        for path in (self.proc, self.powercap, self.cpu):
            path.mkdir()
        self.stat(0, 0)
        (self.proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 400 kB\n")

    def stat(self, busy: int, idle: int) -> None:
        (self.proc / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n")

    def package(self, number: int, energy_uj: int | None, wraps_at_uj: int = 10**9, name: str | None = None) -> Path:
        folder = self.powercap / f"intel-rapl:{number}"
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{name or f'package-{number}'}\n")
        (folder / "max_energy_range_uj").write_text(f"{wraps_at_uj}\n")
        if energy_uj is not None:
            (folder / "energy_uj").write_text(f"{energy_uj}\n")
        return folder

    def source(self) -> HostSource:
        return HostSource(Rates(), powercap=self.powercap, proc=self.proc, cpu_folder=self.cpu)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    return now


def read(source: HostSource, index: int, clock: list[float]) -> GpuSample | None:
    clock[0] = 1000.0 + index * 0.05
    rows = source.read(Tick(index, 1000.0, 0.0))
    return rows[0] if rows else None


def test_cpu_times_leave_out_waiting_and_stolen_time() -> None:
    #                     user nice system idle iowait irq softirq steal guest
    assert cpu_times(b"cpu  10   1    5      70   9      2   3       4     8") == (10 + 1 + 5 + 2 + 3, 104)


def test_utilisation_is_the_busy_share_since_the_last_look(machine: Machine, clock: list[float]) -> None:
    source = machine.source()
    first = read(source, 0, clock)
    assert first is not None and first.gpu_util_ratio is None and first.device == "cpu"
    assert first.memory_used_bytes == 600 * 1024
    machine.stat(30, 10)
    assert read(source, 1, clock) is None  # no energy to read, so no row between the middle ticks
    second = read(source, 4, clock)
    assert second is not None and second.gpu_util_ratio == pytest.approx(0.75)
    assert second.memory_used_bytes is None  # of the slow group
    source.close()


def test_energy_of_two_packages_and_their_wrap(machine: Machine, clock: list[float]) -> None:
    machine.package(0, 999_000_000, wraps_at_uj=10**9)
    machine.package(1, 5_000_000)
    source = machine.source()
    first = read(source, 0, clock)
    assert first is not None and first.energy_j == pytest.approx(1004.0)
    machine.package(0, 1_000_000)  # went on by 2 J, through the wrap at 10^9
    second = read(source, 1, clock)
    assert second is not None and second.energy_j == pytest.approx(1006.0, abs=1e-5)
    assert second.energy_t_s == pytest.approx(0.05)
    assert source.facts()["cpu"]["energy_counter_wraps"] == 1
    source.close()


def test_power_is_the_mean_of_a_second(machine: Machine, clock: list[float]) -> None:
    machine.package(0, 0)
    source = machine.source()
    powers = []
    for i in range(45):
        machine.package(0, int(i * 0.05 * 120e6))  # 120 W
        sample = read(source, i, clock)
        assert sample is not None
        powers.append(sample.power_average_w)
        assert sample.power_w is None
    assert powers[:20] == [None] * 20
    assert powers[-1] == pytest.approx(120, rel=1e-6)
    source.close()


def test_platform_and_sub_domains_are_not_counted_twice(machine: Machine) -> None:
    machine.package(0, 1)
    machine.package(1, 2, name="psys")
    (machine.powercap / "intel-rapl:0:0").mkdir()
    assert [d.name for d in rapl_domains(machine.powercap)] == ["package-0"]


def test_unreadable_energy_is_unknown(machine: Machine, clock: list[float]) -> None:
    machine.package(0, None)
    (domain,) = rapl_domains(machine.powercap)
    assert not domain.readable
    source = machine.source()
    sample = read(source, 0, clock)
    assert sample is not None and sample.energy_j is None
    assert source.facts()["cpu"]["num_rapl_unreadable"] == 1
    source.close()


def test_a_machine_that_tells_nothing(tmp_path: Path, clock: list[float]) -> None:
    nowhere = tmp_path / "none"
    source = HostSource(Rates(), powercap=nowhere, proc=nowhere, cpu_folder=nowhere)
    sample = read(source, 0, clock)
    assert sample is not None and sample == GpuSample(t_s=0.0, device="cpu")
    source.close()


def test_thermal_throttling(machine: Machine, clock: list[float]) -> None:
    folder = machine.cpu / "cpu0" / "thermal_throttle"
    folder.mkdir(parents=True)
    (folder / "package_throttle_total_time_ms").write_text("1500\n")
    source = machine.source()
    sample = read(source, 0, clock)
    assert sample is not None and sample.throttled_hw_thermal_s == pytest.approx(1.5)
    source.close()
