"""What a sending process is given and what it tells of itself: its share of the schedule, time limits, measures."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of a request, in seconds. ``first_byte_s`` None: the total limit alone holds until the answer starts
    (servers may queue for long); it is counted from the sending."""

    connect_s: float = 10.0
    first_byte_s: float | None = None
    stall_s: float = 60.0
    total_s: float = 600.0
    first_ns: int = field(init=False)
    stall_ns: int = field(init=False)
    total_ns: int = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("first", self.first_byte_s or self.total_s),
            ("stall", self.stall_s),
            ("total", self.total_s),
        ):
            object.__setattr__(self, f"{name}_ns", int(value * 1e9))


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of a schedule. Arrays of equal length, one row a request.

    ``due_ns`` is relative to the start of the main part, -1: due when a slot is free. ``follows`` is the row of the
    session's next turn, or -1. ``is_root``: not a follow-up turn.
    """

    positions: np.ndarray
    due_ns: np.ndarray
    think_ns: np.ndarray
    follows: np.ndarray
    is_root: np.ndarray
    is_warmup: np.ndarray
    body_at: np.ndarray  # (n + 1,) offsets into the body file


@dataclass(slots=True)
class Measures:
    """What the process observed about itself."""

    tick_lag_ns: array[int]
    read_lag_ns: array[int]
    offsets: list[tuple[int, int]]
    num_connections: int = 0
    num_retries: int = 0
    num_unsolicited: int = 0
    num_failed_connects: int = 0
