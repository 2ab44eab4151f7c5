"""The door to NVML: opened and closed here, and every "not supported" turned into None.

Package: nvidia-ml-py, imported as pynvml. Creating a session starts no CUDA context and takes no GPU memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.errors import EngineUnavailable

# Return codes of NVML (nvml.h, enum nvmlReturn_t).
INVALID_ARGUMENT, NOT_SUPPORTED, FUNCTION_NOT_FOUND = 2, 3, 13
GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND = 15, 16, 28
LOST_CODES = frozenset({GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND})
#: Codes that will not change while the driver runs: the reading need not be asked for again.
NEVER_CODES = frozenset({INVALID_ARGUMENT, NOT_SUPPORTED, FUNCTION_NOT_FOUND, 26})


class NvmlUnavailable(EngineUnavailable):
    """NVML cannot be used here: no NVIDIA driver, no library, or versions that do not match."""


class GpuLost(Exception):
    """The driver says that this GPU has fallen off the bus or needs a reset."""


@contextmanager
def nvml_session() -> Iterator[Any]:
    """Gives the initialised pynvml module.

    Raises:
        NvmlUnavailable: with the driver's reason.
    """
    try:
        import pynvml
    except ImportError as exc:
        raise NvmlUnavailable("nvidia-ml-py is not installed", next_step="pip install nvidia-ml-py") from exc
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        raise NvmlUnavailable(f"NVML does not start: {describe(exc)}", next_step=_remedy(exc)) from exc
    try:
        yield pynvml
    finally:
        ask(pynvml.nvmlShutdown)


def describe(exc: Exception) -> str:
    """The error in words. pynvml asks the library for the text and fails where the library itself is missing."""
    try:
        return str(exc)
    except Exception:
        return f"NVML error {getattr(exc, 'value', '?')}"


def _remedy(exc: Exception) -> str:
    code = getattr(exc, "value", None)
    if code == 12:
        return "no NVIDIA driver is installed here; without a GPU nothing need be done"
    if code == 18:
        return "the loaded kernel module and the library differ in version: reboot after a driver update"
    if code == 9:
        return "load the kernel module (nvidia-smi says why it does not load)"
    if code == 4:
        return "give this user access to /dev/nvidia* (in a container: --gpus all)"
    return "run nvidia-smi, which shows the same error with more detail"


def ask(call: Callable[..., Any], *args: Any) -> Any | None:
    """``call(*args)``, or None where NVML answers with any error, or the library or pynvml lacks the function."""
    try:
        return call(*args)
    except MemoryError:
        raise
    except Exception:
        return None


def all_uuids(nvml: Any) -> tuple[str, ...]:
    """UUIDs of every GPU that NVML lists, by index. A GPU whose handle cannot be had (lost) is left out."""
    uuids = []
    for index in range(ask(nvml.nvmlDeviceGetCount) or 0):
        handle = ask(nvml.nvmlDeviceGetHandleByIndex, index)
        uuid = ask(nvml.nvmlDeviceGetUUID, handle) if handle is not None else None
        if uuid:
            uuids.append(str(uuid))
    return tuple(uuids)


def used_memory_bytes(nvml: Any, handle: Any) -> int | None:
    """Bytes in use on the device; where the driver knows them apart, without what it reserves for itself."""
    info = ask(nvml.nvmlDeviceGetMemoryInfo, handle, getattr(nvml, "nvmlMemory_v2", None))
    if info is None:
        info = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    return None if info is None else int(info.used)
