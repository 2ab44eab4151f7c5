"""What is asked: prompt and output lengths, and what prompts share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bench.config.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Ratio, Spec

#: Shapes the field knows by name, as (ISL, OSL) in tokens.
NAMED_SHAPES: dict[str, tuple[int, int]] = {
    "1k/1k": (1024, 1024),
    "8k/1k": (8192, 1024),
    "1k/8k": (1024, 8192),
    "2048/128": (2048, 128),
    "512/2048": (512, 2048),
    "128/128": (128, 128),
    "128/2048": (128, 2048),
}


class FixedLengthSpec(Spec):
    """Every request has the same number of tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: PositiveInt


class UniformLengthSpec(Spec):
    """Uniform over the whole numbers ``low``..``high``, both included."""

    kind: Literal["uniform"]
    low: PositiveInt
    high: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> UniformLengthSpec:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class _SpreadLengthSpec(Spec):
    """A mean and a standard deviation of the lengths, in tokens, clipped to ``low``..``high``."""

    mean: PositiveFloat
    sd: NonNegativeFloat
    low: PositiveInt = 1
    high: PositiveInt | None = None


class NormalLengthSpec(_SpreadLengthSpec):
    """Normal, rounded, clipped."""

    kind: Literal["normal"]


class LognormalLengthSpec(_SpreadLengthSpec):
    """Lognormal with the given mean and standard deviation of the lengths themselves (not of their logarithm), clipped."""

    kind: Literal["lognormal"]


class NominalLengthSpec(Spec):
    """Uniform over ``low_ratio``..1 of ``tokens``: how InferenceX and NVIDIA draw lengths (0.8 to 1 of nominal)."""

    kind: Literal["nominal"]
    tokens: PositiveInt
    low_ratio: Ratio = 0.8


def _length_shorthand(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"kind": "fixed", "tokens": value}
    return value


LengthSpec = Annotated[
    Annotated[
        FixedLengthSpec | UniformLengthSpec | NormalLengthSpec | LognormalLengthSpec | NominalLengthSpec,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_length_shorthand),
]


def max_length_tokens(spec: Any) -> int:
    """The longest length to plan for, in tokens: mean + 6 sd where a distribution has no bound."""
    if isinstance(spec, (FixedLengthSpec, NominalLengthSpec)):
        return spec.tokens
    if isinstance(spec, UniformLengthSpec):
        return spec.high
    if spec.high is not None:
        return int(spec.high)
    return int(spec.mean + 6 * spec.sd) + 1


def mean_length_tokens(spec: Any) -> float:
    """The expected length in tokens, ignoring truncation."""
    if isinstance(spec, FixedLengthSpec):
        return float(spec.tokens)
    if isinstance(spec, NominalLengthSpec):
        return spec.tokens * (1 + spec.low_ratio) / 2
    if isinstance(spec, UniformLengthSpec):
        return (spec.low + spec.high) / 2
    return float(spec.mean)


# --- workload ----------------------------------------------------------------------------------------------------


class PrefixSpec(Spec):
    """Shared prefixes: ``share`` of the requests begin with one of ``num_prefixes`` prefixes of ``tokens`` tokens.

    The prefix is part of the ISL, not added to it.
    """

    tokens: PositiveInt
    num_prefixes: PositiveInt = 1
    share: Ratio = 1.0


class SessionSpec(Spec):
    """Multi-turn sessions: each turn's prompt is the whole conversation so far plus new tokens."""

    turns: PositiveInt
    think_s: NonNegativeFloat = 0.0


class WorkloadSpec(Spec):
    """What is asked: prompt and output lengths, and what prompts share.

    ``shape: 8k/1k`` is short for isl and osl. Lengths are whole numbers or distributions.
    """

    isl: LengthSpec
    osl: LengthSpec
    prefix: PrefixSpec | None = None
    sessions: SessionSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, data: Any) -> Any:
        if isinstance(data, dict) and "shape" in data:
            shape = data["shape"]
            rest = {k: v for k, v in data.items() if k != "shape"}
            isl, osl = parse_shape(shape)
            return {"isl": isl, "osl": osl, **rest}
        return data


def parse_shape(shape: Any) -> tuple[int, int]:
    """'8k/1k' or '1000/200' -> (ISL, OSL) in tokens. Raises ValueError."""
    if isinstance(shape, str):
        if shape in NAMED_SHAPES:
            return NAMED_SHAPES[shape]
        found = re.fullmatch(r"(\d+)(k?)/(\d+)(k?)", shape)
        if found:
            isl, osl = (int(found[i]) * (1024 if found[i + 1] else 1) for i in (1, 3))
            if isl > 0 and osl > 0:
                return isl, osl
    raise ValueError(f'expected a shape such as "1k/1k" or "1000/200", got {shape!r}')
