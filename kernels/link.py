"""Copies between host and GPU (pinned memory, PCIe) and between two GPUs (NVLink or PCIe): the plain link bandwidth."""

from __future__ import annotations

from kernels import config
from kernels.case import Case, Check, Prepared, Unsupported, Work, make_case
from kernels.checking import EXACT, compare
from kernels.device import Device
from kernels.inputs import generator, random_tensor

FAMILY = "link"


def cases(group: config.LinkGroup) -> list[Case]:
    """One case per direction and size."""
    return [make_case(FAMILY, op, "torch", "fp32", {"bytes": s}) for op in group.ops for s in group.sizes_bytes]


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """A source and a destination. Raises Unsupported without a GPU (or a second one for device_to_device)."""
    import torch

    if device.kind != "cuda":
        raise Unsupported("a CPU has no link of its own to measure")
    size = case.dim("bytes")
    device.require_memory(2 * size)
    here = random_tensor([size // 4], "fp32", device, generator(device, seed))
    backend = "cudaMemcpyAsync, pinned"
    if case.op == "device_to_device":
        if device.num_devices < 2:
            raise Unsupported("one GPU: nothing to copy to")
        peer = (device.index + 1) % device.num_devices
        can = torch.cuda.can_device_access_peer(device.index, peer)
        backend = "peer access" if can else "through the host: no peer access"
        source, target = here, torch.empty_like(here, device=f"cuda:{peer}")
    else:
        host = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        host.copy_(here)
        source, target = (
            (host, torch.empty_like(here)) if case.op == "host_to_device" else (here, torch.empty_like(host))
        )
        if target.device.type == "cpu":
            target = target.pin_memory()

    def check() -> list[Check]:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return [compare(target.cpu(), source.cpu(), EXACT)]

    # Bytes are counted on the link; device memory moves them too, but that is not what bounds the copy.
    return Prepared(
        lambda: target.copy_(source, non_blocking=True), check, Work(link_bytes=size), flush=False, backend=backend
    )
