"""Engines behind a router: how many, who gets which request, and prefill and decode pools with a link between them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware
from bench.errors import BadInput
from bench.sim.inputs import Role, RoutingPolicy

#: Line rates of one port in bytes/s, one direction, with where they stand. A transfer never beats them; it may well be slower.
LINKS: dict[str, tuple[float, str]] = {
    "xdr": (100e9, "InfiniBand XDR, 4 lanes: 800 Gb/s (InfiniBand Trade Association roadmap)"),
    "ndr": (50e9, "InfiniBand NDR, 4 lanes: 400 Gb/s (InfiniBand Trade Association roadmap)"),
    "hdr": (25e9, "InfiniBand HDR, 4 lanes: 200 Gb/s (InfiniBand Trade Association roadmap)"),
    "400gbe": (50e9, "IEEE 802.3bs, 400 Gb/s"),
    "200gbe": (25e9, "IEEE 802.3bs, 200 Gb/s"),
    "100gbe": (12.5e9, "IEEE 802.3ba, 100 Gb/s"),
    "25gbe": (3.125e9, "IEEE 802.3by, 25 Gb/s"),
    "10gbe": (1.25e9, "IEEE 802.3ae, 10 Gb/s"),
}
DEVICE_LINKS = ("nvlink", "pcie")
_OWN = re.compile(r"(\d+(?:\.\d+)?)\s*G([bB])/s")  # bits or bytes: case counts


@dataclass(frozen=True, slots=True)
class FleetShape:
    """Equal engines behind a router: ``engines`` of them, or ``prefill`` and ``decode`` of them in two pools.

    Attributes:
        routing: how requests are spread; with pools, over the members of each.
        kv_link: with pools, what a prompt's KV cache moves over: a name of :data:`LINKS`, ``nvlink`` or ``pcie`` of the GPU,
            or a rate such as ``40 GB/s``. Each GPU has one of its own, and moves its own part of the cache.
    """

    engines: int = 1
    routing: RoutingPolicy = "least_loaded"
    prefill: int = 0
    decode: int = 0
    kv_link: str | None = None

    def __post_init__(self) -> None:
        where = "fleet"
        if self.engines < 1 or min(self.prefill, self.decode) < 0:
            raise BadInput("expected at least one engine", where=where)
        if (self.prefill > 0) != (self.decode > 0):
            raise BadInput("a prefill pool needs a decode pool and the other way round", where=where)
        if self.disaggregated and self.engines != 1:
            raise BadInput("give the size of the pools or the number of engines, not both", where=where)
        if self.disaggregated and self.kv_link is None:
            raise BadInput(
                "pools move the KV cache over a link",
                where=where,
                next_step=f"name it: {', '.join((*DEVICE_LINKS, *LINKS))}",
            )
        if self.kv_link is not None and not self.disaggregated:
            raise BadInput(
                "without a prefill and a decode pool no KV cache moves", where=where, next_step="leave the link out"
            )

    @property
    def disaggregated(self) -> bool:
        return self.prefill > 0

    @property
    def num_engines(self) -> int:
        return self.prefill + self.decode if self.disaggregated else self.engines

    @property
    def roles(self) -> tuple[Role, ...]:
        """One per engine."""
        together: Role = "both"
        first: Role = "prefill"
        second: Role = "decode"
        if not self.disaggregated:
            return (together,) * self.engines
        return (first,) * self.prefill + (second,) * self.decode


ONE_ENGINE = FleetShape()


def link_bytes_per_s(name: str, hardware: Hardware) -> float:
    """Bytes/s of one GPU's link in one direction.

    Raises:
        BadInput: the name is unknown, or the GPU has no such link.
    """
    key = name.strip().lower()
    if key == "pcie":
        return hardware.pcie_bandwidth_bytes_per_s
    if key == "nvlink":
        if hardware.link not in ("nvswitch", "nvlink-bridge"):
            raise BadInput(f"{hardware.name} has no NVLink", where="kv_link", next_step="take pcie or a network")
        return hardware.link_bandwidth_bytes_per_s
    if key in LINKS:
        return LINKS[key][0]
    own = _OWN.fullmatch(name.strip())
    if own and float(own.group(1)) > 0:
        return float(own.group(1)) * 1e9 / (8 if own.group(2) == "b" else 1)
    raise BadInput(
        f'unknown link "{name}"',
        where="kv_link",
        next_step=f"one of {', '.join((*DEVICE_LINKS, *LINKS))}, or a rate such as 40 GB/s",
    )


def transfer_s_per_token(
    shape: FleetShape, model: ModelArch, hardware: Hardware, kv_cache_dtype: str | None, tp: int, pp: int
) -> float:
    """Seconds that one prompt token's KV takes from a prefill to a decode engine; 0 without pools.

    Every rank moves its own part at the same time, so the fullest rank decides: all layers of its stage, its KV heads (the
    whole latent vector of an MLA model). Layers with a window are counted in full.
    """
    if shape.kv_link is None:
        return 0.0
    return model.kv_bytes_per_token(kv_cache_dtype, tp, pp) / link_bytes_per_s(shape.kv_link, hardware)
