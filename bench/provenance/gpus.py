"""Facts of the GPUs and their driver for a manifest, through NVML. Without a driver there are none, and the reason is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAX_NVLINKS = 36
# nvml.h, nvmlGpuTopologyLevel_t, in the words of `nvidia-smi topo -m`
_TOPOLOGY = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}


def gpu_facts() -> dict[str, Any]:
    """``gpus`` (a list, empty without a driver), ``gpu_driver`` (driver, NVML and CUDA versions), ``gpu_topology``."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as exc:  # no package, no library, no driver: a machine without GPU
        return {"gpus": [], "gpu_driver": {"error": _describe(exc)}, "gpu_topology": None}
    try:
        count = _ask(pynvml.nvmlDeviceGetCount) or 0
        handles = [h for i in range(count) if (h := _ask(pynvml.nvmlDeviceGetHandleByIndex, i)) is not None]
        cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        return {
            "gpus": [_one(pynvml, h) for h in handles],
            "gpu_driver": {
                "driver": _ask(pynvml.nvmlSystemGetDriverVersion),
                "nvml": _ask(pynvml.nvmlSystemGetNVMLVersion),
                "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
                "num_unreachable_gpus": count - len(handles),
            },
            "gpu_topology": _topology(pynvml, handles),
        }
    finally:
        _ask(pynvml.nvmlShutdown)


def _describe(exc: Exception) -> str:
    try:
        return str(exc) or type(exc).__name__
    except Exception:  # pynvml asks the missing library for the text
        return f"NVML error {getattr(exc, 'value', '?')}"


def _ask(call: Callable[..., Any], *args: Any) -> Any | None:
    try:
        return call(*args)
    except Exception:
        return None


def _one(nvml: Any, handle: Any) -> dict[str, Any]:
    def ask(name: str, *args: Any) -> Any | None:
        function = getattr(nvml, name, None)
        return None if function is None else _ask(function, handle, *args)

    memory = ask("nvmlDeviceGetMemoryInfo")
    pci = ask("nvmlDeviceGetPciInfo")
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    ecc, mig = ask("nvmlDeviceGetEccMode"), ask("nvmlDeviceGetMigMode")
    bounds = ask("nvmlDeviceGetPowerManagementLimitConstraints")
    active = [ask("nvmlDeviceGetNvLinkState", link) == 1 for link in range(_MAX_NVLINKS)]
    persistence, mode = ask("nvmlDeviceGetPersistenceMode"), ask("nvmlDeviceGetComputeMode")
    return {
        "index": ask("nvmlDeviceGetIndex"),
        "uuid": ask("nvmlDeviceGetUUID"),
        "name": ask("nvmlDeviceGetName"),
        "memory_bytes": None if memory is None else int(memory.total),
        "pci_id": None if pci is None else _text(pci.busId),
        "pci_device_id": None if pci is None else f"0x{pci.pciDeviceId:08x}",
        "vbios": ask("nvmlDeviceGetVbiosVersion"),
        "compute_capability": None if capability is None else f"{capability[0]}.{capability[1]}",
        "power_limit_w": _milli(ask("nvmlDeviceGetEnforcedPowerLimit") or ask("nvmlDeviceGetPowerManagementLimit")),
        "power_limit_default_w": _milli(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        "power_limit_range_w": None if bounds is None else [_milli(b) for b in bounds],
        "max_sm_clock_hz": _mega(ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM)),
        "max_memory_clock_hz": _mega(ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM)),
        "sm_clock_hz": _mega(ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)),
        "memory_clock_hz": _mega(ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)),
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig": None if mig is None else bool(mig[0]),
        "persistence": None if persistence is None else bool(persistence),
        "compute_mode": None if mode is None else _COMPUTE_MODES.get(mode, str(mode)),
        "pcie": {
            "generation": ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            "max_generation": ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            "width": ask("nvmlDeviceGetCurrPcieLinkWidth"),
            "max_width": ask("nvmlDeviceGetMaxPcieLinkWidth"),
        },
        "num_nvlinks": sum(active),
    }


def _topology(nvml: Any, handles: list[Any]) -> list[list[str]] | None:
    """How each pair of GPUs is connected below NVLink, as a matrix in the order of ``gpus``; None for a single GPU."""
    if len(handles) < 2:
        return None
    rows = []
    for a, one in enumerate(handles):
        row = []
        for b, other in enumerate(handles):
            level = None if a == b else _ask(nvml.nvmlDeviceGetTopologyCommonAncestor, one, other)
            row.append("X" if a == b else _TOPOLOGY.get(level, "unknown") if level is not None else "unknown")
        rows.append(row)
    return rows


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _milli(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _mega(value: float | None) -> float | None:
    return None if value is None else value * 1e6
