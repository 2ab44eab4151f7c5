"""What every part of a configuration file is made of: numbers that refuse text, and the frozen model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Scalar = bool | int | float | str | None
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]


def _refuse_bool_and_text(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError(f"expected a number, got {value!r}")
    return value


PositiveFloat = Annotated[float, BeforeValidator(_refuse_bool_and_text), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_refuse_bool_and_text), Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, BeforeValidator(_refuse_bool_and_text), Field(gt=0, le=1, allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of every part of an experiment file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
