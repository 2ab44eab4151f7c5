"""Energy windows with a counter of our own: refresh uncertainty, wrap-around, missing counters."""

from __future__ import annotations

import pytest

from kernels.case import Unsupported
from kernels.energy import EnergyCounter, measure_energy, rapl_counter


class Machine:
    """A clock that each call moves on by 10 ms, and a counter at 50 W."""

    def __init__(self, start_j: float = 0.0, wraps_at_j: float | None = None) -> None:
        self.now = 0.0
        self.start_j, self.wraps_at_j = start_j, wraps_at_j

    def run(self) -> None:
        self.now += 0.01

    def read(self) -> float:
        total = self.start_j + 50.0 * self.now
        return total % self.wraps_at_j if self.wraps_at_j else total

    def measure(self, window_s: float = 2.0):
        counter = EnergyCounter(self.read, 0.1, "test", self.wraps_at_j)
        return measure_energy(self.run, lambda: None, counter, window_s, 0.01, now=lambda: self.now)


def test_joules_per_call_and_power():
    reading = Machine().measure()
    assert reading.power_w == pytest.approx(50.0)
    assert reading.joules_per_call == pytest.approx(0.5)
    assert reading.window_s >= 2.0 and reading.num_calls == pytest.approx(reading.window_s / 0.01)


def test_the_counters_refresh_is_the_uncertainty():
    reading = Machine().measure(2.0)
    assert reading.uncertainty_j == pytest.approx(2 * 0.1 * 50.0)
    assert (
        Machine().measure(8.0).to_dict()["energy_j_per_call_uncertainty"]
        < reading.to_dict()["energy_j_per_call_uncertainty"]
    )


def test_a_counter_that_wraps_in_the_window():
    reading = Machine(start_j=950.0, wraps_at_j=1000.0).measure()
    assert reading.power_w == pytest.approx(50.0)


def test_rapl_sums_packages_and_leaves_their_parts_out(tmp_path):
    for name, energy in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 7_000_000), ("intel-rapl:0:0", 1_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("262143000000\n")
    counter = rapl_counter(tmp_path)
    assert counter.read() == pytest.approx(12.0) and counter.wraps_at_j == pytest.approx(2 * 262143.0)


def test_no_counter_is_a_reason(tmp_path):
    with pytest.raises(Unsupported, match="no RAPL"):
        rapl_counter(tmp_path)
