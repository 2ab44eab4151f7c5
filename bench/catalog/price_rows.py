"""What a price file may say: the YAML side of :mod:`bench.catalog.prices`. Pydantic models, frozen, unknown fields refused."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: "reserved" is for offers that do not say for how long.
Commitment = Literal["on_demand", "reserved", "reserved_1y", "reserved_3y", "spot", "dedicated_endpoint"]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveAmount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PriceRow(BaseModel):
    """What every price says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str | None = None
    source: Annotated[str, Field(min_length=3)]
    as_of: datetime.date
    note: str | None = None
    example: bool = False  # a round figure for a worked example, left out of ranges over offers


class GpuRow(PriceRow):
    """A rented GPU's hour. ``per_gpu_hour_high`` closes a published range."""

    provider: str
    gpu: str
    commitment: Commitment = "on_demand"
    per_gpu_hour: Amount
    per_gpu_hour_high: Amount | None = None
    terms: str | None = None
    min_gpus: Annotated[int, Field(gt=0)] = 1


class OwnedRow(PriceRow):
    """Owned hardware: a purchase with its life, or somebody's modelled hour."""

    label: str
    gpu: str
    per_gpu_hour: Amount | None = None
    capex_per_gpu: PositiveAmount | None = None
    lifetime_years: PositiveAmount | None = None
    power_w_per_gpu: PositiveAmount | None = None

    @model_validator(mode="after")
    def _one_basis(self) -> OwnedRow:
        if (self.per_gpu_hour is None) == (self.capex_per_gpu is None):
            raise ValueError("give either capex_per_gpu or a modelled per_gpu_hour")
        if self.capex_per_gpu is not None and self.lifetime_years is None:
            raise ValueError("capex_per_gpu needs lifetime_years")
        return self


class ApiRow(PriceRow):
    """An API's list price per million tokens."""

    provider: str
    model: str
    input_per_million: Amount
    cached_input_per_million: Amount | None = None
    output_per_million: Amount
    batch_discount_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    tokens_per_s_per_user: PositiveAmount | None = None
    terms: str | None = None


class PriceFile(BaseModel):
    """The YAML form: one currency a file, and any of the three kinds of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    description: str = ""
    currency: Currency
    gpu_hours: tuple[GpuRow, ...] = ()
    owned: tuple[OwnedRow, ...] = ()
    api: tuple[ApiRow, ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> PriceFile:
        if not (self.gpu_hours or self.owned or self.api):
            raise ValueError("holds no prices: give gpu_hours, owned or api")
        return self
