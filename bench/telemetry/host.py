"""Samples of the host: CPU utilisation, memory, package energy where it is readable. Device name ``cpu``.

* CPU utilisation from ``/proc/stat``: busy share of all cores since the last middle tick (the kernel counts in steps of
  10 ms, so shorter windows would be quantised).
* Package energy from RAPL (Linux powercap, ``intel-rapl:<n>``, AMD included): microjoules since boot, wrapping at
  ``max_energy_range_uj``. Since Linux 5.10 only root may read it (CVE-2020-8694), unless the machine allows it.
* Thermal throttling from ``thermal_throttle/package_throttle_total_time_ms`` (Intel).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import GpuSample
from bench.telemetry.source import CPU_DEVICE, Counter, Every, Rates, Tick
from bench.units import KIB, MICRO, MILLI

POWERCAP = Path("/sys/class/powercap")
PROC = Path("/proc")
CPU_FOLDER = Path("/sys/devices/system/cpu")
# No package takes this much: a larger step of the counter is a reset.
_MAX_PACKAGE_UW = 5_000_000_000
#: power_average_w is the mean over this long, as the GPUs' driver does it.
POWER_MEAN_S = 1.0


@dataclass(frozen=True, slots=True)
class RaplDomain:
    """One CPU package. ``readable`` is False where the kernel refuses this user; ``modulus_uj`` is where it wraps."""

    name: str
    path: Path
    readable: bool
    modulus_uj: int


def rapl_domains(root: Path = POWERCAP) -> tuple[RaplDomain, ...]:
    """Every CPU package that the kernel meters (sub-domains such as core and dram are parts of a package or its neighbours)."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue
        try:
            name = (folder / "name").read_text().strip()
            modulus = int((folder / "max_energy_range_uj").read_text()) + 1
        except (OSError, ValueError):
            continue
        if not name.startswith("package"):
            continue  # psys covers the whole platform and would count the packages twice
        try:
            int((folder / "energy_uj").read_text())
            readable = True
        except (OSError, ValueError):
            readable = False
        found.append(RaplDomain(name, folder / "energy_uj", readable, modulus))
    return tuple(found)


class _File:
    """A small file of /proc or /sys kept open and read again from its beginning."""

    __slots__ = ("_fd",)

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        return os.pread(self._fd, 4096, 0)

    def close(self) -> None:
        os.close(self._fd)


def _open(path: Path) -> _File | None:
    try:
        return _File(path)
    except OSError:
        return None


def cpu_times(first_line: bytes) -> tuple[int, int]:
    """(busy, all) in kernel ticks from the first line of /proc/stat. Waiting for I/O and stolen time are not busy.

    Columns: user nice system idle iowait irq softirq steal guest guest_nice; guest is contained in user (man 5 proc).
    """
    numbers = [int(x) for x in first_line.split()[1:9]]
    busy = numbers[0] + numbers[1] + numbers[2] + sum(numbers[5:7])
    return busy, sum(numbers)


class HostSource:
    """Samples of this host.

    Args:
        rates: energy is read at the fast rate, utilisation at the middle rate, the rest at the slow rate.
        powercap, proc, cpu_folder: other roots, for tests.
    """

    devices: tuple[str, ...] = (CPU_DEVICE,)

    def __init__(
        self,
        rates: Rates,
        *,
        powercap: Path = POWERCAP,
        proc: Path = PROC,
        cpu_folder: Path = CPU_FOLDER,
    ) -> None:
        self._slow_due, self._middle_due = Every(rates.slow_every), Every(rates.middle_every)
        self._stat = _open(proc / "stat")
        self._meminfo = _open(proc / "meminfo")
        domains = rapl_domains(powercap)
        self._num_unreadable = sum(not d.readable for d in domains)
        opened = [(d, _open(d.path)) for d in domains if d.readable]
        self._rapl = [(d, file, Counter(d.modulus_uj)) for d, file in opened if file is not None]
        self._throttle = _open(cpu_folder / "cpu0/thermal_throttle/package_throttle_total_time_ms")
        self._last_times: tuple[int, int] | None = None
        self._energy_history: deque[tuple[float, float]] = deque()

    def read(self, tick: Tick) -> list[GpuSample]:
        now = time.monotonic()
        values: dict[str, Any] = {"t_s": now - tick.t0_monotonic_s, "device": CPU_DEVICE}
        slow, middle = self._slow_due.due(tick.index), self._middle_due.due(tick.index)
        if self._rapl:
            self._read_energy(values, now, tick)
        elif not (middle or slow):
            return []
        if middle:
            self._read_utilisation(values)
        if slow:
            values["memory_used_bytes"] = self._memory_used_bytes()
            throttled = None if self._throttle is None else _integer(self._throttle)
            values["throttled_hw_thermal_s"] = None if throttled is None else throttled * MILLI
        return [GpuSample(**values)]

    def _read_energy(self, values: dict[str, Any], now: float, tick: Tick) -> None:
        total_uj = 0
        for _, file, counter in self._rapl:
            raw = _integer(file)
            if raw is None:
                return
            total_uj += counter.advance(raw, now, _MAX_PACKAGE_UW)
        energy_j = total_uj * MICRO
        values["energy_j"], values["energy_t_s"] = energy_j, now - tick.t0_monotonic_s
        history = self._energy_history
        history.append((now, energy_j))
        while len(history) > 2 and now - history[1][0] >= POWER_MEAN_S:
            history.popleft()
        since_s, since_j = history[0]
        if now - since_s >= POWER_MEAN_S and energy_j >= since_j:
            values["power_average_w"] = (energy_j - since_j) / (now - since_s)

    def _read_utilisation(self, values: dict[str, Any]) -> None:
        if self._stat is None:
            return
        try:
            times = cpu_times(self._stat.read().split(b"\n", 1)[0])
        except (OSError, ValueError, IndexError):
            return
        before, self._last_times = self._last_times, times
        if before is not None and times[1] > before[1]:
            busy = (times[0] - before[0]) / (times[1] - before[1])
            values["gpu_util_ratio"] = min(1.0, max(0.0, busy))

    def _memory_used_bytes(self) -> int | None:
        if self._meminfo is None:
            return None
        try:
            lines = dict(line.split(b":", 1) for line in self._meminfo.read().split(b"\n") if b":" in line)
            total, available = (int(lines[k].split()[0]) for k in (b"MemTotal", b"MemAvailable"))
        except (OSError, ValueError, KeyError):
            return None
        return (total - available) * KIB

    def facts(self) -> dict[str, dict[str, Any]]:
        """What the host lets us read."""
        return {
            CPU_DEVICE: {
                "name": "host CPU",
                "num_cpus": os.cpu_count(),
                "rapl_domains": [d.name for d, _, _ in self._rapl],
                "num_rapl_unreadable": self._num_unreadable,
                "energy_counter_wraps": sum(c.num_wraps for _, _, c in self._rapl),
                "energy_counter_resets": sum(c.num_resets for _, _, c in self._rapl),
            }
        }

    def close(self) -> None:
        files: Sequence[_File | None] = [self._stat, self._meminfo, self._throttle, *(f for _, f, _ in self._rapl)]
        for file in files:
            if file is not None:
                file.close()


def _integer(file: _File) -> int | None:
    try:
        return int(file.read())
    except (OSError, ValueError):
        return None
