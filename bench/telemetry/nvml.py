"""Samples of NVIDIA GPUs through NVML.

One ``nvmlDeviceGetFieldValues`` call per GPU and tick brings energy, power, throttle and PCIe counters, each with the
driver's own time stamp. The middle group adds clocks, utilisation and, on Hopper and newer, GPM activity; the slow group
memory, temperatures and processes. What a GPU does not support is None for ever, never zero. ``nvmlDeviceGetPcieThroughput``
is left out on purpose: it blocks for 20 ms per direction.

Meaning and units of the fields: NVIDIA, "NVML API Reference Guide" (field value enums, GPM metrics).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from bench.errors import UnknownName
from bench.records import GpuSample
from bench.telemetry.driver import (
    LOST_CODES,
    NEVER_CODES,
    GpuLost,
    all_uuids,
    ask,
    describe,
    nvml_session,
    used_memory_bytes,
)
from bench.telemetry.gpus import Ownership, processes_on
from bench.telemetry.nvml_calls import (
    ENERGY_MJ,
    ENERGY_MJ_NEWER,
    MAX_BOARD_MW,
    MAX_NVLINKS,
    MEMORY_TEMPERATURE_C,
    MODULUS,
    NVLINK_DATA_RX_KIB,
    NVLINK_DATA_TX_KIB,
    PCIE_RX_BYTES,
    PCIE_TX_BYTES,
    POWER_AVERAGE_MW,
    POWER_INSTANT_MW,
    THROTTLE_COLUMN,
    THROTTLED_NS,
    TRAFFIC,
    Field,
    FieldList,
    GpmReader,
    Rate,
)
from bench.telemetry.source import Counter, Every, Rates, Tick
from bench.units import MICRO, MILLI, NANO


class _Gpu:
    """Everything that is kept of one GPU between ticks."""

    def __init__(self, nvml: Any, uuid: str, rates: Rates, phase: int, gpm: bool) -> None:
        self.nvml, self.uuid = nvml, uuid
        self.slow_due, self.middle_due = Every(rates.slow_every, phase), Every(rates.middle_every, phase)
        self.handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.index: int | None = ask(nvml.nvmlDeviceGetIndex, self.handle)
        self.lost = False
        self.num_read_errors = 0
        self.counters: dict[Field, Counter] = {}
        self.rates: dict[str, Rate] = {}
        self.refused: set[str] = set()  # calls that this GPU or driver will never support
        self.gpm = self._start_gpm() if gpm else None
        self._choose_fields()

    def _start_gpm(self) -> GpmReader | None:
        support = ask(self.nvml.nvmlGpmQueryDeviceSupport, self.handle)
        if support is None or not support.isSupportedDevice:
            return None
        made = ask(GpmReader, self.nvml, self.handle)
        return made if isinstance(made, GpmReader) else None

    def _supported(self, ids: Iterable[Field]) -> list[Field]:
        """Those of ``ids`` that the driver knows for this GPU. Refused ones are dropped: asking again costs time."""
        wanted = list(ids)
        try:
            found = FieldList(self.nvml, self.handle, wanted).read()
        except self.nvml.NVMLError as exc:
            if exc.value not in NEVER_CODES:
                return wanted  # a passing error says nothing about what is supported
            if len(wanted) == 1:
                return []
            return [f for one in wanted for f in self._supported([one])]  # an old driver refuses the whole list
        return [f for f in wanted if found[f][3] not in NEVER_CODES]

    def _choose_fields(self) -> None:
        fast = [(i, 0) for i in (ENERGY_MJ, POWER_INSTANT_MW, POWER_AVERAGE_MW, *THROTTLED_NS.values())]
        if self.gpm is None:  # else GPM tells the traffic, five times a second
            fast += [(PCIE_TX_BYTES, 0), (PCIE_RX_BYTES, 0)]
        supported = self._supported(fast)
        self.energy_field: Field | None = (ENERGY_MJ, 0)
        if (ENERGY_MJ, 0) not in supported:
            newer = self._supported([(ENERGY_MJ_NEWER, 0)])
            supported += newer
            self.energy_field = newer[0] if newer else None
        links: list[Field] = []
        if self.gpm is None:
            pairs = [(i, link) for link in range(MAX_NVLINKS) for i in (NVLINK_DATA_TX_KIB, NVLINK_DATA_RX_KIB)]
            links = self._supported(pairs)
        self.links = links
        self.fast = FieldList(self.nvml, self.handle, supported)
        slow = [*supported, *self._supported([(MEMORY_TEMPERATURE_C, 0)]), *links]
        self.slow = FieldList(self.nvml, self.handle, slow)

    def call(self, name: str, *args: Any) -> Any | None:
        """``nvml.<name>(handle, *args)``; None where it fails, not asked again where it can never work.

        Raises:
            GpuLost: the GPU is gone.
        """
        if name in self.refused:
            return None
        function = getattr(self.nvml, name, None)
        if function is None:
            self.refused.add(name)
            return None
        try:
            return function(self.handle, *args)
        except self.nvml.NVMLError as exc:
            if exc.value in LOST_CODES:
                raise GpuLost from exc
            if exc.value in NEVER_CODES:
                self.refused.add(name)
            else:
                self.num_read_errors += 1
            return None

    def count(self, field: Field, kind: int, raw: int, now_s: float, per_s: float) -> int:
        """The unwrapped total of a counter; ``per_s`` is the fastest that it can grow."""
        counter = self.counters.get(field)
        if counter is None:
            counter = self.counters[field] = Counter(MODULUS.get(kind, 2**64))
        return counter.advance(raw, now_s, per_s)


class NvmlSource:
    """Samples of the GPUs named by UUID, and of no other.

    Args:
        devices: UUIDs (``GPU-...`` or ``MIG-...``).
        rates: how often each group is read.
        own_pids: processes that belong to the measurement, with all their descendants; others on the GPU are foreign.
        gpm: read the GPM activity metrics of GPUs that have them.

    Raises:
        NvmlUnavailable: there is no working driver.
        UnknownName: a UUID that the driver does not know.
    """

    def __init__(self, devices: Sequence[str], rates: Rates, own_pids: Sequence[int] = (), gpm: bool = True) -> None:
        self.devices = tuple(devices)
        self._session = nvml_session()
        self._nvml = self._session.__enter__()
        self._ownership = Ownership(own_pids)
        self._gpus: list[_Gpu] = []
        for position, uuid in enumerate(self.devices):
            try:
                self._gpus.append(_Gpu(self._nvml, uuid, rates, position, gpm))
            except self._nvml.NVMLError as exc:
                known = ", ".join(all_uuids(self._nvml)) or "none"
                self.close()
                raise UnknownName(
                    f"no GPU {uuid} here ({describe(exc)})", where="telemetry devices", next_step=f"present: {known}"
                ) from exc

    def read(self, tick: Tick) -> list[GpuSample]:
        rows = []
        for gpu in self._gpus:
            # The groups of different GPUs fall on different ticks, so that no tick has to do all of the work.
            slow, middle = gpu.slow_due.due(tick.index), gpu.middle_due.due(tick.index)
            if gpu.lost and not slow:
                continue  # a lost GPU is asked once a second whether it came back
            values: dict[str, Any] = {"t_s": 0.0, "device": gpu.uuid, "index": gpu.index}
            try:
                self._read_fields(gpu, tick, values, slow)
                if middle:
                    self._read_middle(gpu, values)
                if slow:
                    self._read_slow(gpu, values)
                gpu.lost = False
            except GpuLost:
                gpu.lost = True
                values = {"device": gpu.uuid, "index": gpu.index, "lost": True}
                values["t_s"] = time.monotonic() - tick.t0_monotonic_s
            rows.append(GpuSample(**values))
        return rows

    def _read_fields(self, gpu: _Gpu, tick: Tick, values: dict[str, Any], slow: bool) -> None:
        now = time.monotonic()
        values["t_s"] = now - tick.t0_monotonic_s
        try:
            found = (gpu.slow if slow else gpu.fast).read()
        except self._nvml.NVMLError as exc:
            if exc.value in LOST_CODES:
                raise GpuLost from exc
            gpu.num_read_errors += 1
            return
        totals: dict[Field, int] = {}
        for field, (stamp_us, kind, value, code) in found.items():
            field_id = field[0]
            if code != 0:
                if code in LOST_CODES:
                    raise GpuLost
                gpu.num_read_errors += code not in NEVER_CODES
            elif field_id == POWER_INSTANT_MW:
                values["power_w"] = value * MILLI
            elif field_id == POWER_AVERAGE_MW:
                values["power_average_w"] = value * MILLI
            elif field_id == MEMORY_TEMPERATURE_C:
                values["memory_temperature_c"] = float(value)
            elif field == gpu.energy_field:
                values["energy_j"] = gpu.count(field, kind, int(value), now, MAX_BOARD_MW) * MILLI
                stamp_s = stamp_us * MICRO - tick.wall_minus_monotonic_s
                # a driver that does not stamp, or a wall clock stepped between stamp and tick: take our own time
                values["energy_t_s"] = (stamp_s if abs(stamp_s - now) < 1.0 else now) - tick.t0_monotonic_s
            elif field_id in TRAFFIC:  # read on every tick: 32 bits of bytes wrap several times a second
                totals[field] = gpu.count(field, kind, int(value), now, float(MODULUS.get(kind, 0)))
            else:
                column = THROTTLE_COLUMN[field_id]
                values[column] = gpu.count(field, kind, int(value), now, 1.1e9) * NANO
        self._rates_of(gpu, totals, values, now, slow)

    def _rates_of(self, gpu: _Gpu, totals: dict[Field, int], values: dict[str, Any], now: float, slow: bool) -> None:
        """PCIe and NVLink traffic from counters, where GPM does not tell: once a second, an exact mean of that second."""
        if not slow:
            return
        sums: dict[str, int] = {}
        for (field_id, _), total in totals.items():
            column, unit = TRAFFIC[field_id]
            sums[column] = sums.get(column, 0) + total * unit
        for column, total in sums.items():
            rate = gpu.rates.setdefault(column, Rate()).update(total, now)
            if rate is not None:
                values[column] = rate

    def _read_middle(self, gpu: _Gpu, values: dict[str, Any]) -> None:
        nvml = self._nvml
        for column, kind in (("sm_clock_hz", nvml.NVML_CLOCK_SM), ("memory_clock_hz", nvml.NVML_CLOCK_MEM)):
            mhz = gpu.call("nvmlDeviceGetClockInfo", kind)
            values[column] = None if mhz is None else mhz * 1e6
        reasons = gpu.call("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # drivers before 535 know only the older name
            reasons = gpu.call("nvmlDeviceGetCurrentClocksThrottleReasons")
        values["throttle_reasons"] = reasons
        used = gpu.call("nvmlDeviceGetUtilizationRates")
        if used is not None:
            values["gpu_util_ratio"], values["memory_util_ratio"] = used.gpu * 0.01, used.memory * 0.01
        if gpu.gpm is not None:
            try:
                values.update(gpu.gpm.read())
            except nvml.NVMLError as exc:
                if exc.value in LOST_CODES:
                    raise GpuLost from exc
                gpu.num_read_errors += 1

    def _read_slow(self, gpu: _Gpu, values: dict[str, Any]) -> None:
        values["memory_used_bytes"] = used_memory_bytes(self._nvml, gpu.handle)
        celsius = gpu.call("nvmlDeviceGetTemperatureV", self._nvml.NVML_TEMPERATURE_GPU)
        if celsius is None:
            celsius = gpu.call("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)
        values["temperature_c"] = None if celsius is None else float(celsius)
        processes = processes_on(self._nvml, gpu.handle)
        values["num_foreign_processes"] = None if processes is None else self._ownership.num_foreign(processes)

    def facts(self) -> dict[str, dict[str, Any]]:
        """Per device: name, limits, and which readings there are."""
        nvml, found = self._nvml, {}
        for gpu in self._gpus:
            h = gpu.handle
            memory = ask(nvml.nvmlDeviceGetMemoryInfo, h)
            limit_mw = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, h) or ask(nvml.nvmlDeviceGetPowerManagementLimit, h)
            max_mhz = ask(nvml.nvmlDeviceGetMaxClockInfo, h, nvml.NVML_CLOCK_SM)
            max_memory_mhz = ask(nvml.nvmlDeviceGetMaxClockInfo, h, nvml.NVML_CLOCK_MEM)
            counter = gpu.counters.get(gpu.energy_field) if gpu.energy_field else None
            found[gpu.uuid] = {
                "index": gpu.index,
                "name": ask(nvml.nvmlDeviceGetName, h),
                "memory_bytes": None if memory is None else int(memory.total),
                "power_limit_w": None if limit_mw is None else limit_mw * MILLI,
                "max_sm_clock_hz": None if max_mhz is None else max_mhz * 1e6,
                "max_memory_clock_hz": None if max_memory_mhz is None else max_memory_mhz * 1e6,
                "energy_field": None if gpu.energy_field is None else gpu.energy_field[0],
                "energy_counter_wraps": 0 if counter is None else counter.num_wraps,
                "energy_counter_resets": 0 if counter is None else counter.num_resets,
                "gpm": gpu.gpm is not None,
                "num_nvlinks_read": len(gpu.links) // 2,
                "num_read_errors": gpu.num_read_errors,
                "lost": gpu.lost,
            }
        return found

    def close(self) -> None:
        for gpu in self._gpus:
            if gpu.gpm is not None:
                gpu.gpm.close()
        self._gpus = []
        self._session.__exit__(None, None, None)
