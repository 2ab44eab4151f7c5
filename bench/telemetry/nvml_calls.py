"""The calls of NVML that a tick makes: a list of fields in one call, GPM metrics, and rates from counters."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench.telemetry.driver import NOT_SUPPORTED, ask
from bench.units import KIB, MIB

# Field ids of nvmlDeviceGetFieldValues. All counters are of the whole device; scope 0 is the GPU.
ENERGY_MJ, ENERGY_MJ_NEWER = 83, 191
POWER_AVERAGE_MW, POWER_INSTANT_MW = 185, 186
THROTTLED_NS = {
    "throttled_sw_power_s": 74,
    "throttled_sync_boost_s": 76,
    "throttled_sw_thermal_s": 269,
    "throttled_hw_thermal_s": 270,
    "throttled_hw_power_s": 271,
}
PCIE_TX_BYTES, PCIE_RX_BYTES = 197, 198
MEMORY_TEMPERATURE_C = 82
NVLINK_DATA_TX_KIB, NVLINK_DATA_RX_KIB = 138, 139  # scope = link
MAX_NVLINKS = 36

GPM_PERCENT = {"sm_active_ratio": 2, "sm_occupancy_ratio": 3, "tensor_active_ratio": 5, "dram_bandwidth_ratio": 10}
GPM_MIB_PER_S = {
    "pcie_tx_bytes_per_s": 20,
    "pcie_rx_bytes_per_s": 21,
    "nvlink_rx_bytes_per_s": 60,
    "nvlink_tx_bytes_per_s": 61,
}
#: Two GPM samples must be this far apart, or every metric reads zero.
GPM_MIN_GAP_S = 0.1

# nvmlFieldValue_t: fieldId, scopeId, timestamp (us since 1970), latency (us), valueType, nvmlReturn, 8 bytes of value.
_FORMAT = "IIqqII8s"
_NUM_PARTS = 7
# nvmlValueType_t -> how to read the first bytes of the value
_VALUE_UNPACK: dict[int, Callable[[bytes], tuple[Any, ...]]] = {
    0: struct.Struct("<d").unpack_from,
    1: struct.Struct("<I").unpack_from,
    2: struct.Struct("<Q").unpack_from,
    3: struct.Struct("<Q").unpack_from,
    4: struct.Struct("<q").unpack_from,
    5: struct.Struct("<i").unpack_from,
    6: struct.Struct("<H").unpack_from,
}
MODULUS = {1: 2**32, 6: 2**16}
# A board takes well under this: a larger step of the energy counter is a reset, not a wrap.
MAX_BOARD_MW = 20_000_000

Field = tuple[int, int]
THROTTLE_COLUMN = {field_id: column for column, field_id in THROTTLED_NS.items()}
TRAFFIC = {
    PCIE_TX_BYTES: ("pcie_tx_bytes_per_s", 1),
    PCIE_RX_BYTES: ("pcie_rx_bytes_per_s", 1),
    NVLINK_DATA_TX_KIB: ("nvlink_tx_bytes_per_s", KIB),
    NVLINK_DATA_RX_KIB: ("nvlink_rx_bytes_per_s", KIB),
}


class FieldList:
    """A prepared list of fields of one GPU, read with one call into an array that is kept between calls.

    The library's function is called itself: ``pynvml.nvmlDeviceGetFieldValues`` makes and fills a new array each time,
    which is half of the cost of a tick.
    """

    __slots__ = ("_array", "_call", "_nvml", "_struct", "ids")

    def __init__(self, nvml: Any, handle: Any, ids: Sequence[Field]) -> None:
        self._nvml, self.ids = nvml, tuple(ids)
        self._struct = struct.Struct("<" + _FORMAT * len(self.ids))
        self._array = (nvml.c_nvmlFieldValue_t * len(self.ids))()
        for slot, (field_id, scope) in zip(self._array, self.ids, strict=True):
            slot.fieldId, slot.scopeId = field_id, scope
        library = ctypes.CDLL("libnvidia-ml.so.1")  # the one that pynvml has loaded
        self._call = partial(library.nvmlDeviceGetFieldValues, handle, len(self.ids), ctypes.byref(self._array))

    def read(self) -> dict[Field, tuple[int, int, int | float, int]]:
        """Reads all of them.

        Returns:
            field -> (time stamp in us since 1970, value type, value, return code);
            the value is meaningless on an error code.

        Raises:
            pynvml.NVMLError: the call failed as a whole.
        """
        if not self.ids:
            return {}
        code = self._call()
        if code != 0:
            raise self._nvml.NVMLError(code)
        parts = self._struct.unpack_from(self._array)
        found: dict[Field, tuple[int, int, int | float, int]] = {}
        for at, field in zip(range(0, len(parts), _NUM_PARTS), self.ids, strict=True):
            kind, code = parts[at + 4], parts[at + 5]
            value = _VALUE_UNPACK[kind](parts[at + 6])[0] if code == 0 and kind in _VALUE_UNPACK else 0
            if kind not in _VALUE_UNPACK and code == 0:
                code = NOT_SUPPORTED  # a value type of a newer driver
            found[field] = (parts[at + 2], kind, value, code)
        return found


class GpmReader:
    """GPM metrics of one GPU: differences between two samples of the hardware counters."""

    __slots__ = ("_device", "_metrics", "_newer", "_nvml", "_older", "_taken_s", "ids")

    def __init__(self, nvml: Any, device: Any) -> None:
        self._nvml, self._device = nvml, device
        self._older, self._newer = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        self.ids = {**GPM_PERCENT, **GPM_MIB_PER_S}
        self._metrics = nvml.c_nvmlGpmMetricsGet_t()
        self._metrics.version = nvml.NVML_GPM_METRICS_GET_VERSION
        self._metrics.numMetrics = len(self.ids)
        for slot, metric_id in zip(self._metrics.metrics, self.ids.values(), strict=False):
            slot.metricId = metric_id
        self._taken_s = time.monotonic()
        nvml.nvmlGpmSampleGet(device, self._older)

    def read(self) -> dict[str, float]:
        """Column -> value since the previous call; empty where less than ``GPM_MIN_GAP_S`` has passed."""
        now = time.monotonic()
        if now - self._taken_s < GPM_MIN_GAP_S:
            return {}
        self._nvml.nvmlGpmSampleGet(self._device, self._newer)
        self._metrics.sample1, self._metrics.sample2 = self._older, self._newer
        self._older, self._newer, self._taken_s = self._newer, self._older, now
        self._nvml.nvmlGpmMetricsGet(self._metrics)
        found = {}
        for slot, column in zip(self._metrics.metrics, self.ids, strict=False):
            if slot.nvmlReturn == 0:
                found[column] = slot.value * (MIB if column in GPM_MIB_PER_S else 0.01)
        return found

    def close(self) -> None:
        for sample in (self._older, self._newer):
            ask(self._nvml.nvmlGpmSampleFree, sample)


class Rate:
    """Bytes per second from a counter, between two readings of the middle or slow group."""

    __slots__ = ("_at_s", "_total")

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._total = 0

    def update(self, total: int, at_s: float) -> float | None:
        before_s, before = self._at_s, self._total
        self._at_s, self._total = at_s, total
        if before_s is None or at_s <= before_s or total < before:
            return None
        return (total - before) / (at_s - before_s)
