"""What a kernel case is, and what comes back from running one.

A case is a value: it can be listed, compared, written to JSON and read back, and it holds no tensor. Preparing it on a
device gives a :class:`Prepared`: something to call, something to check it against, and the work that one call does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "checked", "n/a", "wrong", "failed"]
# ok       measured and correct
# checked  correct, but not timed (Triton's interpreter on a CPU: its speed says nothing)
# n/a      this machine cannot run it; the reason says why
# wrong    the answer is off; no time is reported for a wrong answer
# failed   crashed, hung or ran out of time

ClockKind = Literal["device", "graph", "host"]
Bound = Literal["compute", "memory", "link", "overhead"]

#: The tag of a case whose energy is measured as well.
WEIGH = "energy"
#: The tag of a case that torch's own benchmark times as well (see kernels.referee).
REFEREE = "referee"


class Unsupported(Exception):
    """This machine cannot run the case; the text is the reason that the table shows."""


@dataclass(frozen=True, slots=True)
class Case:
    """One point to measure.

    ``shape`` and ``tags`` are sorted pairs so that equal cases are equal values. ``tags`` name where a shape comes from
    (layer, models) and take no part in the identity.
    """

    family: str
    op: str
    impl: str
    dtype: str
    shape: tuple[tuple[str, int], ...]
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def case_id(self) -> str:
        """Stable name: ``gemm/linear/torch/bf16/k=4096,m=64,n=6144``."""
        dims = ",".join(f"{k}={v}" for k, v in self.shape)
        return f"{self.family}/{self.op}/{self.impl}/{self.dtype}/{dims}"

    def dim(self, name: str) -> int:
        """The size called ``name``; raises KeyError when the case has none."""
        return dict(self.shape)[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; inverse of :meth:`from_dict`."""
        return {
            "family": self.family,
            "op": self.op,
            "impl": self.impl,
            "dtype": self.dtype,
            "shape": dict(self.shape),
            "tags": dict(self.tags),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        """Inverse of :meth:`to_dict`."""
        return make_case(data["family"], data["op"], data["impl"], data["dtype"], data["shape"], data.get("tags") or {})


def make_case(
    family: str, op: str, impl: str, dtype: str, shape: dict[str, int], tags: dict[str, str] | None = None
) -> Case:
    """A Case with its shape and tags in canonical order."""
    return Case(family, op, impl, dtype, tuple(sorted(shape.items())), tuple(sorted((tags or {}).items())))


@dataclass(frozen=True, slots=True)
class Work:
    """What one call does, by arithmetic (not by counters).

    ``bytes_read`` and ``bytes_written`` are the least traffic to device memory that the operation needs; ``link_bytes``
    is what each rank must send over its link.
    """

    flops: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    link_bytes: float = 0.0
    num_calls: int = 1  # for overhead cases: how many launches one timed call makes

    @property
    def num_bytes(self) -> float:
        """Read + written bytes."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class Check:
    """The comparison of one output with a higher-precision answer.

    ``max_error`` is the largest error as a share of the value or of the reference's root mean square, whichever is larger;
    ``rms_error`` the root mean square error as a share of the reference's. Both read the same for every shape.
    """

    passed: bool
    output: str
    reference: str  # how the expected answer was made: "fp64", "exact", ...
    max_error: float
    max_tolerance: float
    rms_error: float
    rms_tolerance: float
    num_values: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A case with its tensors on the device.

    ``run`` does the work once on the current stream. ``check`` runs it on its own inputs and compares; it is called
    before anything is timed. ``flush`` asks for a cold cache before every call. ``capturable`` says that a CUDA graph
    may hold it. ``timed=False`` marks work whose speed means nothing (an interpreter). ``rivals``: every way in which torch
    offers to do the same work, by name; what a referee times.
    """

    run: Callable[[], object]
    check: Callable[[], list[Check]]
    work: Work
    flush: bool = True
    clock: ClockKind = "device"
    capturable: bool = False
    backend: str = ""
    timed: bool = True
    notes: dict[str, Any] = field(default_factory=dict)
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
