"""Energy of one call, from the device's own counter over a window of back-to-back calls.

NVIDIA: ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver loaded; Volta and newer), which the driver refreshes
about every 100 ms. CPU: the package counter of RAPL where the kernel lets it be read. A device without either is "n/a".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.case import Unsupported
from kernels.device import Device

#: How old a reading may be: one refresh of the counter. RAPL refreshes every millisecond.
NVML_PERIOD_S = 0.1
RAPL_PERIOD_S = 0.001


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """Joules over a window with what the counter's refresh makes uncertain (one period of power at each end)."""

    energy_j: float
    uncertainty_j: float
    window_s: float
    num_calls: int
    source: str

    @property
    def joules_per_call(self) -> float:
        """Energy of one call, gross: the device's idle power is in it."""
        return self.energy_j / self.num_calls

    @property
    def power_w(self) -> float:
        """Mean power over the window."""
        return self.energy_j / self.window_s

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "energy_j_per_call": self.joules_per_call,
            "energy_j_per_call_uncertainty": self.uncertainty_j / self.num_calls,
            "power_w": self.power_w,
            "window_s": self.window_s,
            "num_calls": self.num_calls,
            "sustained_time_s": self.window_s / self.num_calls,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class EnergyCounter:
    """A cumulative counter: joules on each call of ``read``."""

    read: Callable[[], float]
    period_s: float
    source: str
    wraps_at_j: float | None = None


def find_counter(device: Device) -> EnergyCounter:
    """The device's energy counter. Raises Unsupported with the reason where there is none."""
    return _nvml_counter(device) if device.kind == "cuda" else rapl_counter()


def _nvml_counter(device: Device) -> EnergyCounter:
    try:
        import pynvml

        pynvml.nvmlInit()
        if device.uuid is None:
            raise Unsupported("torch does not tell this GPU's UUID, so its counter cannot be told from another's")
        handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError as error:
        raise Unsupported("nvidia-ml-py is not installed") from error
    except pynvml.NVMLError as error:
        raise Unsupported(f"no energy counter: {error}") from error
    return EnergyCounter(
        lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3, NVML_PERIOD_S, "NVML total energy"
    )


def rapl_counter(root: Path = Path("/sys/class/powercap")) -> EnergyCounter:
    """The package domains of Intel or AMD RAPL, summed. Raises Unsupported when none can be read."""
    files = sorted(root.glob("intel-rapl:[0-9]*/energy_uj"))
    files = [f for f in files if f.parent.name.count(":") == 1]  # packages, not their core and dram parts
    try:
        for file in files:
            file.read_text()
    except OSError as error:
        raise Unsupported(f"RAPL cannot be read: {error.strerror}") from error
    if not files:
        raise Unsupported("no energy counter: this host shows no RAPL")
    limit_j = sum(int((f.parent / "max_energy_range_uj").read_text()) for f in files) * 1e-6
    return EnergyCounter(lambda: sum(int(f.read_text()) for f in files) * 1e-6, RAPL_PERIOD_S, "RAPL package", limit_j)


def measure_energy(
    run: Callable[[], object],
    wait: Callable[[], None],
    counter: EnergyCounter,
    window_s: float,
    call_s: float,
    now: Callable[[], float] = time.monotonic,
) -> EnergyReading:
    """Call ``run`` back to back for at least ``window_s`` and read the counter at both ends.

    ``wait`` returns when the device is idle; ``call_s`` is the time of one call, used to enqueue about 20 ms between waits.
    """
    batch = max(1, min(1000, int(0.02 / max(call_s, 1e-9))))
    wait()
    calls = 0
    before, start = counter.read(), now()
    while now() - start < window_s:
        for _ in range(batch):
            run()
        wait()
        calls += batch
    after, stop = counter.read(), now()
    energy = after - before
    if energy < 0 and counter.wraps_at_j:
        energy += counter.wraps_at_j
    power = energy / (stop - start)
    return EnergyReading(energy, 2 * counter.period_s * power, stop - start, calls, counter.source)
