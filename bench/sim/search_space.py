"""What a search is asked, what it looks through, and what it finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.catalog.hardware import Hardware
from bench.sim.fleets import FleetShape
from bench.sim.inputs import RoutingPolicy
from bench.sim.setup import EngineSetup

Objective = Literal["throughput", "cost", "goodput"]


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked: nominal lengths (drawn from 80-100 % of them, as InferenceX does), shared prefixes, maybe a rate."""

    isl: int
    osl: int
    prefix_tokens: int = 0
    prefix_groups: int = 1  # so many different prefixes, drawn per request
    rate_per_s: float | None = None
    low_ratio: float = 0.8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Space:
    """Values per axis; the product is searched. None in a list is vLLM's own default."""

    gpus: tuple[Hardware, ...]
    tensor_parallel_size: tuple[int, ...] = (1, 2, 4, 8)
    pipeline_parallel_size: tuple[int, ...] = (1,)
    quantization: tuple[str | None, ...] = (None,)
    kv_cache_dtype: tuple[str | None, ...] = (None,)
    max_num_seqs: tuple[int | None, ...] = (None,)
    max_num_batched_tokens: tuple[int | None, ...] = (None,)
    max_gpus: int = 8
    routing: RoutingPolicy = "least_loaded"
    kv_link: str | None = None  # given: fleets of a prefill and a decode pool are tried too, joined by this link
    fixed: dict[str, Any] = field(default_factory=dict)  # further engine arguments, the same for all


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated configuration. Rates are of the whole fleet; ``level`` is the concurrency of one engine, or 0 at a rate.

    ``setup`` is one engine of the fleet, ``shape`` the whole fleet.
    """

    setup: EngineSetup
    level: int
    shape: FleetShape
    values: dict[str, float]
    broken: str | None  # the SLO limit that does not hold, with its value
    score: float = 0.0

    @property
    def num_engines(self) -> int:
        return self.shape.num_engines

    @property
    def num_gpus(self) -> int:
        return self.num_engines * self.setup.num_gpus

    @property
    def axes(self) -> dict[str, Any]:
        a, m = self.setup.args, self.setup.memory
        return {
            "gpu": self.setup.hardware.name,
            "tensor_parallel_size": m.tp,
            "pipeline_parallel_size": m.pp,
            "quantization": a.get("quantization"),
            "kv_cache_dtype": a.get("kv_cache_dtype"),
            "max_num_seqs": a.get("max_num_seqs"),
            "max_num_batched_tokens": a.get("max_num_batched_tokens"),
            "pools": self.pools,
        }

    @property
    def pools(self) -> str | None:
        """Prefill to decode engines in lowest terms."""
        if not self.shape.disaggregated:
            return None
        common = math.gcd(self.shape.prefill, self.shape.decode)
        return f"{self.shape.prefill // common}:{self.shape.decode // common}"


@dataclass(slots=True)
class Found:
    """Everything simulated, the best point per engine (best first), engines that cannot run, and the winner as a fleet."""

    points: list[Point]
    ranked: list[Point]
    refused: list[tuple[dict[str, Any], str]]
    confirmed: Point | None
    notes: list[str] = field(default_factory=list)
