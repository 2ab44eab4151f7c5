"""Which GPUs there are, which an engine holds, who else runs on them, and when their memory is free again."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.telemetry.driver import NvmlUnavailable, all_uuids, ask, nvml_session, used_memory_bytes
from bench.units import MIB, bytes_text

#: What may stay in use on a GPU whose engine has ended (driver, persistence daemon, display) beyond what was there before.
RELEASE_TOLERANCE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with a compute context on a GPU. ``pid`` is as the driver sees it (the host's, even inside a container)."""

    pid: int
    used_bytes: int | None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class GpuState:
    """A GPU now. ``memory_used_bytes`` leaves out what the driver reserves, where it tells them apart."""

    uuid: str
    index: int
    name: str
    memory_bytes: int | None
    memory_used_bytes: int | None
    power_limit_w: float | None
    max_sm_clock_hz: float | None
    gpm: bool
    energy_counter: bool
    mig: bool
    processes: tuple[GpuProcess, ...] | None


@dataclass(frozen=True, slots=True)
class Released:
    """What waiting for the GPUs' memory came to. ``remaining_bytes`` holds the devices that are not free yet."""

    released: bool
    waited_s: float
    remaining_bytes: dict[str, int]
    processes: dict[str, tuple[GpuProcess, ...]]

    def __str__(self) -> str:
        if self.released:
            return f"GPU memory is free after {self.waited_s:.1f} s"
        parts = []
        for uuid, used in self.remaining_bytes.items():
            who = (
                ", ".join(f"{p.name or 'process'} {p.pid}" for p in self.processes.get(uuid, ())) or "no process listed"
            )
            parts.append(f"{uuid}: {bytes_text(used)} in use ({who})")
        return f"GPU memory still in use after {self.waited_s:.1f} s: " + "; ".join(parts)


def processes_on(nvml: Any, handle: Any) -> tuple[GpuProcess, ...] | None:
    """Compute processes on a GPU; None where the driver does not tell."""
    found = ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if found is None:
        return None
    return tuple(GpuProcess(int(p.pid), None if p.usedGpuMemory is None else int(p.usedGpuMemory)) for p in found)


class Ownership:
    """Tells processes of the measurement from foreign ones.

    A process is ours if it, one of its ancestors, its process group or its session is one of ``own_pids``. Inside a
    container without the host's pid namespace the driver's pids name other processes or none: then the answer is None.
    """

    def __init__(self, own_pids: Sequence[int]) -> None:
        self._own = frozenset(own_pids)
        self._known: dict[int, bool | None] = {}

    def is_own(self, pid: int) -> bool | None:
        """True, False, or None where no such process can be seen here."""
        if pid in self._own:
            return True
        current, seen = pid, 0
        while current > 1 and seen < 64:
            parents = _stat(current)
            if parents is None:
                return None if seen == 0 else False
            if self._own & set(parents):
                return True
            current, seen = parents[0], seen + 1
        return False

    def num_foreign(self, processes: Sequence[GpuProcess]) -> int | None:
        """How many of them are not ours; None where that cannot be told and none is known to be foreign."""
        pids = {p.pid for p in processes}
        self._known = {pid: own for pid, own in self._known.items() if pid in pids}
        for pid in pids - self._known.keys():
            self._known[pid] = self.is_own(pid)
        foreign = sum(own is False for own in self._known.values())
        if not foreign and None in self._known.values():
            self._known = {pid: own for pid, own in self._known.items() if own is not None}
            return None
        return foreign


def _stat(pid: int) -> tuple[int, int, int] | None:
    """(parent, process group, session) of a process from /proc; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rfind(")") + 2 :].split()  # the name in brackets may itself hold spaces and brackets
    return int(fields[1]), int(fields[2]), int(fields[3])


def _process_name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() or None
    except OSError:
        return None


def list_gpus() -> tuple[GpuState, ...]:
    """Every GPU that NVML lists, by index; empty where there is no driver or no GPU."""
    try:
        with nvml_session() as nvml:
            return tuple(_state(nvml, uuid) for uuid in all_uuids(nvml))
    except NvmlUnavailable:
        return ()


def _state(nvml: Any, uuid: str) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    limit_mw = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle) or ask(nvml.nvmlDeviceGetPowerManagementLimit, handle)
    max_mhz = ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
    support = ask(nvml.nvmlGpmQueryDeviceSupport, handle)
    energy = ask(nvml.nvmlDeviceGetFieldValues, handle, [(83, 0), (191, 0)])
    mig = ask(nvml.nvmlDeviceGetMigMode, handle)
    index = ask(nvml.nvmlDeviceGetIndex, handle)
    processes = processes_on(nvml, handle)
    if processes is not None:
        processes = tuple(GpuProcess(p.pid, p.used_bytes, _process_name(p.pid)) for p in processes)
    return GpuState(
        uuid=uuid,
        index=-1 if index is None else index,
        name=str(ask(nvml.nvmlDeviceGetName, handle) or "unknown GPU"),
        memory_bytes=None if memory is None else int(memory.total),
        memory_used_bytes=used_memory_bytes(nvml, handle),
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
        max_sm_clock_hz=None if max_mhz is None else max_mhz * 1e6,
        gpm=bool(support is not None and support.isSupportedDevice),
        energy_counter=energy is not None and any(v.nvmlReturn == 0 for v in energy),
        mig=bool(mig and mig[0]),
        processes=processes,
    )


def visible_devices(env: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """UUIDs of the GPUs that a CUDA program started with ``env`` would see, in its order.

    ``CUDA_VISIBLE_DEVICES`` holds indices, UUIDs or beginnings of UUIDs; as in CUDA, the list ends at its first entry
    that names nothing, and a device named twice ends it empty. Indices are NVML's (PCI bus order), which are CUDA's too
    under ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` or where all GPUs are of one kind.
    """
    env = os.environ if env is None else env
    try:
        with nvml_session() as nvml:
            present = all_uuids(nvml)
            return select_visible(present, env.get("CUDA_VISIBLE_DEVICES"), lambda u: _is_known(nvml, u))
    except NvmlUnavailable:
        return ()


def _is_known(nvml: Any, uuid: str) -> bool:
    return ask(nvml.nvmlDeviceGetHandleByUUID, uuid) is not None


def select_visible(present: Sequence[str], wanted: str | None, is_known: Any = None) -> tuple[str, ...]:
    """``CUDA_VISIBLE_DEVICES=wanted`` applied to the UUIDs that are present; None means that it is not set."""
    if wanted is None:
        return tuple(present)
    chosen: list[str] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdigit():
            matches = [present[int(entry)]] if int(entry) < len(present) else []
        elif entry.startswith("GPU-"):
            matches = [u for u in present if u.startswith(entry)]
        elif entry.startswith("MIG-") and is_known is not None and is_known(entry):
            matches = [entry]
        else:
            matches = []
        if len(matches) != 1:
            break
        if matches[0] in chosen:
            return ()
        chosen.append(matches[0])
    return tuple(chosen)


def devices_of_pids(pids: Sequence[int]) -> tuple[str, ...]:
    """UUIDs of the GPUs on which one of ``pids`` or of their descendants has a compute context, by index.

    Empty where there is no driver, or where the driver's pids are not those seen here (a container): then ask
    :func:`visible_devices` with the engine's environment.
    """
    ownership = Ownership(pids)
    return tuple(g.uuid for g in list_gpus() if any(ownership.is_own(p.pid) for p in g.processes or ()))


def held_devices(
    pids: Sequence[int], env: Mapping[str, str] | None = None, num_gpus: int | None = None
) -> tuple[str, ...]:
    """The GPUs that an engine holds: by its processes, else the first ``num_gpus`` that it can see."""
    found = devices_of_pids(pids)
    if found and (num_gpus is None or len(found) == num_gpus):
        return found
    visible = visible_devices(env)
    return visible if num_gpus is None else visible[:num_gpus]


def foreign_processes(devices: Sequence[str], own_pids: Sequence[int]) -> dict[str, tuple[GpuProcess, ...]]:
    """Per device, the compute processes that are not ours or one of our descendants. Devices without any are left out."""
    ownership = Ownership(own_pids)
    found = {}
    for gpu in list_gpus():
        if gpu.uuid in devices:
            others = tuple(p for p in gpu.processes or () if not ownership.is_own(p.pid))
            if others:
                found[gpu.uuid] = others
    return found


def memory_used(devices: Sequence[str]) -> dict[str, int]:
    """Bytes in use on each device; devices that cannot be asked are left out. Take it before an engine starts."""
    return {g.uuid: g.memory_used_bytes for g in list_gpus() if g.uuid in devices and g.memory_used_bytes is not None}


def wait_for_release(
    devices: Sequence[str],
    *,
    used_before_bytes: Mapping[str, int] | None = None,
    limit_s: float = 60.0,
    tolerance_bytes: int = RELEASE_TOLERANCE_BYTES,
    poll_s: float = 0.1,
) -> Released:
    """Waits until the memory of ``devices`` is back to what it was before, at most ``limit_s``.

    Args:
        devices: UUIDs; ``cpu`` is passed over.
        used_before_bytes: use before the engine started (:func:`memory_used`); a missing device counts as 0.
        limit_s: seconds to wait at most; the last state is reported, nothing is raised.
        tolerance_bytes: how much more may stay in use.
        poll_s: seconds between looks.
    """
    before = used_before_bytes or {}
    wanted = [d for d in devices if d.startswith(("GPU-", "MIG-"))]
    start = time.monotonic()
    while True:
        used = memory_used(wanted) if wanted else {}
        over = {d: u for d, u in used.items() if u > before.get(d, 0) + tolerance_bytes}
        waited = time.monotonic() - start
        if not over or waited >= limit_s:
            break
        time.sleep(min(poll_s, max(0.0, limit_s - waited)))
    who = {g.uuid: g.processes or () for g in list_gpus() if g.uuid in over} if over else {}
    return Released(released=not over, waited_s=waited, remaining_bytes=over, processes=who)
