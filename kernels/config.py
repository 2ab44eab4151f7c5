"""Which cases to measure and how long: ``configs/kernels/*.yaml``, typed.

A family is a list of groups; each group lists values whose combinations are its cases, and may be limited to one kind of
device. So quick and full, CPU and GPU are values in one file and not code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bench.catalog.yaml_source import catalogue_files, load_yaml, looks_like_path, unknown_name, validate
from kernels.timing import FEWEST_REPEATS, TimingPlan

Positive = Annotated[int, Field(gt=0, strict=True)]
Sizes = Annotated[tuple[Positive, ...], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
FloatDtype = Literal["fp32", "bf16", "fp16"]
DeviceKind = Literal["cpu", "cuda"]

FAMILIES = ("memory", "gemm", "attention", "norm", "moe", "collectives", "link", "host")


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Group(_Spec):
    """Base of all groups. ``devices`` limits the group; empty means everywhere. ``energy`` weighs its cases as well."""

    devices: tuple[DeviceKind, ...] = ()
    energy: bool = False


class RefereedGroup(Group):
    """``referee``: torch's own benchmark times every way in which torch does the same, beside the suite's figure."""

    referee: bool = False


class MemoryGroup(RefereedGroup):
    """Arrays of ``sizes_bytes`` each."""

    ops: tuple[Literal["copy", "read", "write", "triad"], ...] = ("copy", "read", "write", "triad")
    dtype: FloatDtype = "fp32"
    sizes_bytes: Sizes


class LinearLayer(_Spec):
    """One weight matrix [n, k]."""

    name: str
    n: Positive
    k: Positive
    model: str = ""


class GemmGroup(RefereedGroup):
    """Linear layers given here, or those of catalogue models; ``m`` tokens per call."""

    dtypes: tuple[Dtype, ...]
    m: Sizes
    layers: tuple[LinearLayer, ...] = ()
    models: tuple[str, ...] = ()
    tensor_parallel_size: Positive = 1

    @model_validator(mode="after")
    def _some_layer(self) -> GemmGroup:
        if not self.layers and not self.models:
            raise ValueError("give layers: or models:")
        return self


class AttentionGroup(Group):
    """``prefill``: pairs of batch and length; ``decode``: pairs of batch and context."""

    dtype: FloatDtype = "bf16"
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Literal[32, 64, 128, 256] = 128
    block_size: Positive = 16
    prefill: tuple[tuple[Positive, Positive], ...] = ()
    decode: tuple[tuple[Positive, Positive], ...] = ()
    impls: tuple[Literal["flashinfer", "vllm_fa", "torch", "triton"], ...] = (
        "flashinfer",
        "vllm_fa",
        "torch",
        "triton",
    )

    @model_validator(mode="after")
    def _heads(self) -> AttentionGroup:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads})")
        return self


class NormGroup(Group):
    """The layers between GEMMs at the sizes of one model."""

    dtype: FloatDtype = "bf16"
    ops: tuple[Literal["rmsnorm_residual", "silu_mul", "rope"], ...] = ("rmsnorm_residual", "silu_mul", "rope")
    tokens: Sizes
    hidden: Positive
    intermediate: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive = 128
    impls: tuple[Literal["torch", "vllm", "triton"], ...] = ("torch", "vllm", "triton")


class MoeGroup(Group):
    """One expert projection [num_experts, n, k] with ``top_k`` experts a token."""

    dtype: FloatDtype = "bf16"
    layer: str = "expert gate_up"
    num_experts: Positive
    top_k: Positive
    n: Positive
    k: Positive
    tokens: Sizes
    impls: tuple[Literal["torch", "grouped_mm", "triton"], ...] = ("torch", "grouped_mm", "triton")

    @model_validator(mode="after")
    def _routing(self) -> MoeGroup:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) is above num_experts ({self.num_experts})")
        return self


class CollectivesGroup(Group):
    """torch.distributed over ``num_ranks`` processes: NCCL with one GPU a rank, gloo on a CPU."""

    ops: tuple[Literal["all_reduce", "all_gather", "reduce_scatter", "send_recv"], ...] = (
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "send_recv",
    )
    dtype: FloatDtype = "bf16"
    num_ranks: tuple[Annotated[int, Field(ge=2, strict=True)], ...] = (2,)
    sizes_bytes: Sizes


class LinkGroup(Group):
    """Plain copies over PCIe (pinned memory) and between two GPUs."""

    ops: tuple[Literal["host_to_device", "device_to_host", "device_to_device"], ...] = (
        "host_to_device",
        "device_to_host",
        "device_to_device",
    )
    sizes_bytes: Sizes


class HostGroup(Group):
    """What the host pays per launch."""

    ops: tuple[Literal["launch", "launch_wait", "graph_replay", "graph_node", "triton_launch"], ...] = (
        "launch",
        "launch_wait",
        "graph_replay",
        "graph_node",
        "triton_launch",
    )


class TimingSpec(_Spec):
    """See :class:`kernels.timing.TimingPlan`."""

    min_repeats: Annotated[int, Field(ge=FEWEST_REPEATS, strict=True)] = 7
    max_repeats: Positive = 50
    budget_s: Seconds = 0.3
    warmup_s: Seconds = 0.05
    min_sample_s: Seconds = 5e-5
    flush_limit_bytes: Positive = 256 * 2**20

    @model_validator(mode="after")
    def _ordered(self) -> TimingSpec:
        if self.max_repeats < self.min_repeats:
            raise ValueError(f"max_repeats ({self.max_repeats}) is below min_repeats ({self.min_repeats})")
        return self

    def plan(self) -> TimingPlan:
        """As the plain value that crosses into the measuring process."""
        return TimingPlan(**self.model_dump())


class EnergySpec(_Spec):
    """Energy per call, for groups with ``energy: true``: run back to back for ``window_s`` between two counter readings.

    A counter refreshes about every 100 ms, so a window under 2 s says little.
    """

    window_s: Annotated[float, Field(ge=2.0, le=60.0)] = 2.0


class SuiteConfig(_Spec):
    """A suite of cases. ``case_limit_s`` ends a case that hangs; ``triton_on_cpu`` runs our kernels in the interpreter."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    why: str
    seed: int = 0
    case_limit_s: Seconds = 60.0
    triton_on_cpu: Literal["skip", "interpret"] = "skip"
    timing: TimingSpec = TimingSpec()
    energy: EnergySpec = EnergySpec()
    memory: tuple[MemoryGroup, ...] = ()
    gemm: tuple[GemmGroup, ...] = ()
    attention: tuple[AttentionGroup, ...] = ()
    norm: tuple[NormGroup, ...] = ()
    moe: tuple[MoeGroup, ...] = ()
    collectives: tuple[CollectivesGroup, ...] = ()
    link: tuple[LinkGroup, ...] = ()
    host: tuple[HostGroup, ...] = ()

    @property
    def digest(self) -> str:
        """8 hex digits of the canonical JSON: results of different suites are told apart by it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def groups(self, family: str, device_kind: str) -> list[Any]:
        """The groups of ``family`` that apply to this kind of device."""
        return [g for g in getattr(self, family) if not g.devices or device_kind in g.devices]


def load_suite(name_or_path: str) -> SuiteConfig:
    """A suite by name (``configs/kernels/<name>.yaml``) or file. Raises BadInput with the line of what is wrong."""
    if looks_like_path(name_or_path):
        return validate(load_yaml(Path(name_or_path)), SuiteConfig)
    files = catalogue_files("kernels")
    if name_or_path not in files:
        raise unknown_name("kernel suite", name_or_path, files)
    return validate(load_yaml(files[name_or_path]), SuiteConfig)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One weight matrix [n, k] and whose it is."""

    name: str
    n: int
    k: int
    model: str


def layer_shapes(group: GemmGroup) -> list[LayerShape]:
    """Distinct weight shapes of a group; a shape that several layers or models share names the first and is kept once."""
    found: dict[tuple[int, int], LayerShape] = {}
    for layer in group.layers:
        found.setdefault((layer.n, layer.k), LayerShape(layer.name, layer.n, layer.k, layer.model))
    for name in group.models:
        from kernels.model_shapes import linear_layers

        for shape in linear_layers(name, group.tensor_parallel_size):
            found.setdefault((shape.n, shape.k), shape)
    return list(found.values())
