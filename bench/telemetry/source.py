"""What a source of samples is, how often it is asked, and counters that wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from bench.errors import BadInput
from bench.records import GpuSample

#: The name of the host in :attr:`bench.records.GpuSample.device`.
CPU_DEVICE = "cpu"


@dataclass(frozen=True, slots=True)
class Rates:
    """How often each group of readings is taken.

    The fast group (energy, power, throttle counters) is read on every tick, the middle group (GPM activity, clocks,
    utilisation) and the slow group (memory, temperature, processes) on every n-th. A column that was not read at a tick
    is None in that row.

    Raises:
        BadInput: a rate is not positive, or a slower group is asked for more often than the ticks come.
    """

    fast_hz: float = 20.0
    middle_hz: float = 5.0
    slow_hz: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.slow_hz <= self.middle_hz <= self.fast_hz <= 1000:
            raise BadInput(
                f"expected 0 < slow_hz <= middle_hz <= fast_hz <= 1000, got {self.slow_hz}, {self.middle_hz}, {self.fast_hz}",
                where="telemetry rates",
                next_step="the defaults are 1, 5 and 20",
            )

    @property
    def period_s(self) -> float:
        return 1.0 / self.fast_hz

    @property
    def middle_every(self) -> int:
        return max(1, round(self.fast_hz / self.middle_hz))

    @property
    def slow_every(self) -> int:
        return max(1, round(self.fast_hz / self.slow_hz))


@dataclass(frozen=True, slots=True)
class Tick:
    """One moment of sampling.

    ``t0_monotonic_s`` is the run's origin on CLOCK_MONOTONIC. ``wall_minus_monotonic_s`` was taken at this very tick, so
    a step of the wall clock falls on one tick alone.
    """

    index: int
    t0_monotonic_s: float
    wall_minus_monotonic_s: float


class Every:
    """Says on which ticks a slower group is due: each ``period`` ticks, the first time at once.

    After missed ticks the group is due at the next one that comes, not at the next multiple.
    """

    __slots__ = ("_next", "_period", "_phase")

    def __init__(self, period: int, phase: int = 0) -> None:
        self._period, self._phase, self._next = period, phase % period, 0

    def due(self, index: int) -> bool:
        if index < self._next:
            return False
        self._next = index - (index - self._phase) % self._period + self._period
        return True


class Source(Protocol):
    """Something that gives samples. Every method may be called from one thread only."""

    devices: tuple[str, ...]

    def read(self, tick: Tick) -> list[GpuSample]:
        """The rows of this tick; may be empty. A device that fails gives a row that says so, never an exception."""
        ...

    def facts(self) -> dict[str, dict[str, Any]]:
        """Per device what does not change during a run (name, limits, what is readable); goes into the manifest."""
        ...

    def close(self) -> None:
        """Frees the driver's objects."""
        ...


class Counter:
    """A cumulative counter of ``bits`` bits, made monotonic.

    A smaller value than before is a wrap where the step modulo 2**bits is plausible (at most ``max_step``); otherwise the
    counter was reset (driver reload) and the total starts again at the new value, so the record shows a decrease and no
    window across it can be read as energy.
    """

    __slots__ = ("_at_s", "_modulus", "_raw", "num_resets", "num_wraps", "total")

    def __init__(self, modulus: int) -> None:
        self._modulus = modulus
        self._raw: int | None = None
        self._at_s = 0.0
        self.total = 0
        self.num_wraps = 0
        self.num_resets = 0

    def advance(self, raw: int, now_s: float, most_per_s: float) -> int:
        """The total after a reading at ``now_s`` of a counter that grows by at most ``most_per_s``."""
        elapsed_s = 0.0 if self._raw is None else now_s - self._at_s
        self._at_s = now_s
        return self.update(raw, most_per_s * (elapsed_s + 1.0))

    def update(self, raw: int, max_step: float) -> int:
        """The total after this reading.

        Args:
            raw: the reading, in the counter's own unit.
            max_step: the largest step since the previous reading that is physically possible.
        """
        if self._raw is None:
            self.total = raw
        elif raw >= self._raw:
            self.total += raw - self._raw
        elif raw - self._raw + self._modulus <= max_step:
            self.total += raw - self._raw + self._modulus
            self.num_wraps += 1
        else:
            self.total = raw
            self.num_resets += 1
        self._raw = raw
        return self.total
