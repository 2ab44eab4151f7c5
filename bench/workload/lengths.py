"""Distributions of prompt and output lengths, in tokens.

Every distribution is a frozen value with ``sample(rng, n) -> int64 array of n`` and ``mean_tokens``. Samples are whole
numbers >= 1. Bounds clip (they do not resample), so the share of mass at a bound is visible in the records.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bench.errors import BadInput


class Length(Protocol):
    """A distribution of token counts."""

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """``n`` lengths >= 1 as int64."""
        ...

    @property
    def mean_tokens(self) -> float:
        """Expected length before clipping."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Largest length that can occur, None if unbounded."""
        ...


def _whole(values: np.ndarray, low: int, high: int | None) -> np.ndarray:
    return np.clip(np.rint(values), max(1, low), high).astype(np.int64)


def _check_bounds(where: str, low: int, high: int | None) -> None:
    if low < 1:
        raise BadInput(f"the least length must be >= 1, got {low}", where=where)
    if high is not None and high < low:
        raise BadInput(f"the greatest length {high} is below the least {low}", where=where)


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always ``tokens``."""

    tokens: int

    def __post_init__(self) -> None:
        _check_bounds("FixedLength", self.tokens, None)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return np.full(n, self.tokens, dtype=np.int64)

    @property
    def mean_tokens(self) -> float:
        return float(self.tokens)

    @property
    def max_tokens(self) -> int | None:
        return self.tokens


@dataclass(frozen=True, slots=True)
class UniformLength:
    """Whole numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_bounds("UniformLength", self.low, self.high)

    @classmethod
    def from_ratio(cls, tokens: int, low_ratio: float = 0.8) -> UniformLength:
        """From ``low_ratio`` x tokens to tokens: InferenceX draws its lengths from 80-100 % of the nominal one."""
        if not 0 < low_ratio <= 1:
            raise BadInput(f"expected a ratio in (0, 1], got {low_ratio}", where="UniformLength.low_ratio")
        return cls(max(1, math.ceil(tokens * low_ratio)), tokens)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.integers(self.low, self.high + 1, size=n, dtype=np.int64)

    @property
    def mean_tokens(self) -> float:
        return (self.low + self.high) / 2

    @property
    def max_tokens(self) -> int | None:
        return self.high


@dataclass(frozen=True, slots=True)
class NormalLength:
    """Normal with ``mean`` and ``sd``, rounded, clipped to [low, high]."""

    mean: float
    sd: float
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        _check_bounds("NormalLength", self.low, self.high)
        if self.sd < 0 or not math.isfinite(self.mean) or not math.isfinite(self.sd):
            raise BadInput(f"expected a finite mean and sd >= 0, got {self.mean}, {self.sd}", where="NormalLength")

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return _whole(rng.normal(self.mean, self.sd, size=n), self.low, self.high)

    @property
    def mean_tokens(self) -> float:
        return self.mean

    @property
    def max_tokens(self) -> int | None:
        return self.high


@dataclass(frozen=True, slots=True)
class LognormalLength:
    """Lognormal with the given ``mean`` and ``sd`` of the lengths themselves (not of their logarithm), clipped."""

    mean: float
    sd: float
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        _check_bounds("LognormalLength", self.low, self.high)
        if self.mean <= 0 or self.sd < 0:
            raise BadInput(f"expected mean > 0 and sd >= 0, got {self.mean}, {self.sd}", where="LognormalLength")

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        # For X = exp(N(mu, s)): s^2 = ln(1 + sd^2/mean^2), mu = ln(mean) - s^2/2.
        s2 = math.log1p((self.sd / self.mean) ** 2)
        return _whole(rng.lognormal(math.log(self.mean) - s2 / 2, math.sqrt(s2), size=n), self.low, self.high)

    @property
    def mean_tokens(self) -> float:
        return self.mean

    @property
    def max_tokens(self) -> int | None:
        return self.high


@dataclass(frozen=True, slots=True)
class EmpiricalLength:
    """Drawn with replacement from observed ``values`` (e.g. the lengths of a trace), optionally weighted."""

    values: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise BadInput("no values", where="EmpiricalLength")
        _check_bounds("EmpiricalLength", min(self.values), None)
        if self.weights is not None:
            bad = len(self.weights) != len(self.values) or min(self.weights) < 0 or sum(self.weights) <= 0
            if bad:
                raise BadInput("expected one weight >= 0 for each value, not all 0", where="EmpiricalLength")

    def _probabilities(self) -> np.ndarray | None:
        if self.weights is None:
            return None
        w = np.asarray(self.weights, dtype=np.float64)
        return w / w.sum()

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.choice(np.asarray(self.values, dtype=np.int64), size=n, p=self._probabilities())

    @property
    def mean_tokens(self) -> float:
        return float(np.average(np.asarray(self.values, dtype=np.float64), weights=self._probabilities()))

    @property
    def max_tokens(self) -> int | None:
        return max(self.values)


_SCENARIO = {
    "D": re.compile(r"^D\((\d+),(\d+)\)$"),
    "N": re.compile(r"^N\(([\d.]+),([\d.]+)\)/\(([\d.]+),([\d.]+)\)$"),
    "U": re.compile(r"^U\((\d+),(\d+)\)/\((\d+),(\d+)\)$"),
}

#: Shapes that the field reports under these names: (input, output).
KNOWN_SHAPES: dict[str, tuple[Length, Length]] = {
    "1k/1k": (FixedLength(1024), FixedLength(1024)),
    "8k/1k": (FixedLength(8192), FixedLength(1024)),
    "1k/8k": (FixedLength(1024), FixedLength(8192)),
    "2048/128": (FixedLength(2048), FixedLength(128)),
    "512/2048": (FixedLength(512), FixedLength(2048)),
    "128/128": (FixedLength(128), FixedLength(128)),
    "chat": (NormalLength(512, 128), NormalLength(256, 64)),
    "rag": (NormalLength(4096, 512), NormalLength(512, 128)),
}


def parse_scenario(text: str) -> tuple[Length, Length]:
    """(ISL, OSL) of a short scenario: a name of ``KNOWN_SHAPES``, ``IN/OUT``, or genai-bench's
    ``D(in,out)``, ``N(mean,sd)/(mean,sd)``, ``U(min,max)/(min,max)``.

    Raises:
        BadInput: the text is none of these.
    """
    compact = text.replace(" ", "")
    if compact in KNOWN_SHAPES:
        return KNOWN_SHAPES[compact]
    if m := re.match(r"^(\d+)/(\d+)$", compact):
        return FixedLength(int(m[1])), FixedLength(int(m[2]))
    if m := _SCENARIO["D"].match(compact):
        return FixedLength(int(m[1])), FixedLength(int(m[2]))
    if m := _SCENARIO["N"].match(compact):
        a, b, c, d = (float(g) for g in m.groups())
        return NormalLength(a, b), NormalLength(c, d)
    if m := _SCENARIO["U"].match(compact):
        i, j, k, o = (int(g) for g in m.groups())
        return UniformLength(i, j), UniformLength(k, o)
    known = ", ".join(KNOWN_SHAPES)
    raise BadInput(
        f'unknown scenario "{text}"',
        next_step=f"write one of {known}, or D(in,out), N(mean,sd)/(mean,sd), U(min,max)/(min,max)",
    )
