"""Devices: peak rates, memory, links and power from data sheets, one YAML file each under ``configs/hardware/``.

Every number is a fact with its ``source`` and ``as_of``. FLOP/s are *dense*: data sheets print twice as much under "with
sparsity", which no LLM engine reaches. Links are one direction: data sheets print the sum of both.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bench.catalog.facts import Fact
from bench.catalog.yaml_source import (
    Document,
    catalogue_files,
    load_yaml_cached,
    looks_like_path,
    normalised,
    unknown_name,
    validate,
)
from bench.errors import BadInput

#: Keys of ``peak_flops``. fp4 stands for the device's dense 4-bit float rate (NVFP4/MXFP4).
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4")
Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
# Two devices of one name that differ in memory (A100 40/80 GB) are told apart by what the driver reports, within this.
_MEMORY_MATCH_RATIO = 0.12


class _Sourced(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    source: Annotated[str, Field(min_length=3)]
    as_of: datetime.date
    note: str | None = None


class _Number(_Sourced):
    value: Positive


class _Count(_Sourced):
    value: PositiveInt


class _Word(_Sourced):
    value: Annotated[str, Field(pattern=r"^\d+\.\d+$")]


class HardwareFile(BaseModel):
    """The YAML form of one device. A ``cpu`` has no nominal peaks: they are measured (``bench kernels``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    kind: Literal["gpu", "cpu"] = "gpu"
    vendor: str
    description: str = ""
    aliases: tuple[str, ...] = ()
    nvml_names: tuple[str, ...] = ()
    memory_bytes: _Count | None = None
    cuda_memory_bytes: _Count | None = None
    memory_bandwidth_bytes_per_s: _Number | None = None
    peak_flops: dict[Dtype, _Number] = Field(default_factory=dict)
    link_bandwidth_bytes_per_s: _Number | None = None
    link: Literal["nvswitch", "nvlink-bridge", "pcie", "none"] = "none"
    pcie_bandwidth_bytes_per_s: _Number | None = None
    tdp_w: _Number | None = None
    num_sms: _Count | None = None
    l2_bytes: _Count | None = None
    compute_capability: _Word | None = None

    @model_validator(mode="after")
    def _complete(self) -> HardwareFile:
        if self.kind == "gpu":
            needed = ("memory_bytes", "memory_bandwidth_bytes_per_s", "pcie_bandwidth_bytes_per_s", "tdp_w", "num_sms")
            missing = [n for n in needed if getattr(self, n) is None]
            missing += [] if self.peak_flops else ["peak_flops"]
            if missing:
                raise ValueError(f"a gpu needs {', '.join(missing)}")
        return self


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. ``facts`` holds the source of every number under the same name (``peak_flops.bf16`` for rates).

    Attributes:
        memory_bytes: nominal device memory, 0 for a host CPU (its memory is whatever is installed).
        usable_memory_bytes: what CUDA reports as total (the base of ``gpu_memory_utilization``); nominal if unknown.
        peak_flops: dtype -> dense FLOP/s (multiply and add count as two). Empty for a CPU.
        link_bandwidth_bytes_per_s: GPU to GPU, one direction; equals the PCIe figure where there is no other link.
        link: how GPUs of one node are joined: all to all, pairs by a bridge, or through the PCIe root.
    """

    name: str
    kind: Literal["gpu", "cpu"]
    vendor: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    peak_flops: dict[str, float]
    link_bandwidth_bytes_per_s: float
    pcie_bandwidth_bytes_per_s: float
    tdp_w: float
    num_sms: int
    l2_bytes: int
    compute_capability: str | None
    nvml_names: tuple[str, ...]
    link: str = "none"
    usable_memory_bytes: int = 0
    aliases: tuple[str, ...] = ()
    description: str = ""
    facts: dict[str, Fact[Any]] = field(default_factory=dict, repr=False, compare=False)
    path: str | None = field(default=None, compare=False)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s at ``dtype``. Raises BadInput for a dtype that the device has no rate for."""
        if dtype in self.peak_flops:
            return self.peak_flops[dtype]
        known = ", ".join(self.peak_flops) or "none: measure them with `bench kernels`"
        raise BadInput(f"{self.name} has no peak rate for {dtype!r}", next_step=f"it has {known}")

    def link_bytes_per_s(self, group: int = 2) -> float:
        """Bytes/s of one direction between GPUs of a ``group`` in one node: a bridge joins two cards and no more."""
        if self.link == "nvlink-bridge" and group > 2:
            return self.pcie_bandwidth_bytes_per_s
        return self.link_bandwidth_bytes_per_s

    def compute_dtype(self, *wanted: str) -> str:
        """The first dtype of ``wanted`` that the device computes in; else the best 16-bit one, else fp32.

        Weights in a format without tensor-core support (fp8 on an A100, int4 anywhere) are expanded and multiplied in
        16 bits, so the rate that counts is the 16-bit one.
        """
        for dtype in (*wanted, "bf16", "fp16", "tf32", "fp32"):
            if dtype in self.peak_flops:
                return dtype
        raise BadInput(f"{self.name} has no peak rates", next_step="measure them with `bench kernels`")


def load_hardware(name_or_path: str) -> Hardware:
    """A device by catalogue name, alias or YAML file.

    Names match without regard to case, spaces, dashes and underscores. Raises UnknownName (a BadInput) with the nearest
    names, and BadInput for a file that is not a valid device.
    """
    text = str(name_or_path)
    if looks_like_path(text):
        return _parse(load_yaml_cached(Path(text).expanduser()), text)
    wanted = normalised(text)
    devices = list_hardware()
    for device in devices:
        if wanted == normalised(device.name):
            return device
    for device in devices:
        if wanted in {normalised(a) for a in device.aliases}:
            return device
    raise unknown_name("hardware", text, [d.name for d in devices])


def list_hardware() -> list[Hardware]:
    """Every device of the catalogue, by name; a file of the user's own replaces the project's of the same stem."""
    devices = [_parse(load_yaml_cached(path), str(path)) for path in catalogue_files("hardware").values()]
    return sorted(devices, key=lambda d: d.name)


def match_device(nvml_name: str, memory_bytes: int | None = None) -> Hardware | None:
    """The catalogue entry of a device as NVML names it, or None.

    ``memory_bytes`` is what the driver reports as total (0 or None when unknown); it must agree with the entry within
    12 %, so that a MIG slice or a variant with other memory is not taken for the full card.
    """
    wanted = normalised(nvml_name)
    found = [d for d in list_hardware() if wanted in {normalised(n) for n in d.nvml_names}]
    if memory_bytes:
        found = [d for d in found if abs(d.memory_bytes - memory_bytes) <= _MEMORY_MATCH_RATIO * d.memory_bytes]
    return found[0] if found else None


def _parse(document: Document, path: str) -> Hardware:
    spec = validate(document, HardwareFile)
    facts: dict[str, Fact[Any]] = {}
    for name in HardwareFile.model_fields:
        value = getattr(spec, name)
        if isinstance(value, (_Number, _Count, _Word)):
            facts[name] = Fact(value.value, value.source, value.as_of, value.note)
    for dtype, peak in spec.peak_flops.items():
        facts[f"peak_flops.{dtype}"] = Fact(peak.value, peak.source, peak.as_of, peak.note)

    def number(name: str) -> Any:
        return facts[name].value if name in facts else 0

    pcie = float(number("pcie_bandwidth_bytes_per_s"))
    return Hardware(
        name=spec.name,
        kind=spec.kind,
        vendor=spec.vendor,
        memory_bytes=number("memory_bytes"),
        memory_bandwidth_bytes_per_s=float(number("memory_bandwidth_bytes_per_s")),
        peak_flops={d: p.value for d in DTYPES for name, p in spec.peak_flops.items() if name == d},
        link_bandwidth_bytes_per_s=float(number("link_bandwidth_bytes_per_s")) or pcie,
        pcie_bandwidth_bytes_per_s=pcie,
        tdp_w=float(number("tdp_w")),
        num_sms=number("num_sms"),
        l2_bytes=number("l2_bytes"),
        compute_capability=facts["compute_capability"].value if "compute_capability" in facts else None,
        nvml_names=spec.nvml_names,
        link=spec.link,
        usable_memory_bytes=number("cuda_memory_bytes") or number("memory_bytes"),
        aliases=spec.aliases,
        description=spec.description,
        facts=facts,
        path=path,
    )
