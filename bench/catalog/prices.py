"""Prices: GPU hours, owned hardware and APIs, one YAML file a kind under ``configs/prices/``, each fact with its source.

Amounts carry their currency and what they are for (:class:`Price`); adding or comparing two that differ in either is
refused, so dollars never meet euros and hours never meet tokens by accident. Prices age fast: anything older than
:data:`STALE_DAYS` draws a warning with its age.
"""

from __future__ import annotations

import datetime
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.catalog.price_rows import ApiRow, Commitment, GpuRow, OwnedRow, PriceFile
from bench.catalog.yaml_source import (
    Document,
    catalogue_files,
    load_yaml,
    load_yaml_cached,
    looks_like_path,
    normalised,
    unknown_name,
    validate,
)
from bench.errors import BadInput
from bench.records import Warning_

#: The same H100 hour moved by more than half within weeks in autumn 2026: half a year is old.
STALE_DAYS = 180

Per = Literal["gpu_hour", "gpu", "million_tokens", "month", "kwh", "once"]
_PER_TEXT: dict[str, str] = {
    "gpu_hour": "GPU-h",
    "gpu": "GPU",
    "million_tokens": "M tokens",
    "month": "month",
    "kwh": "kWh",
    "once": "",
}


@dataclass(frozen=True, slots=True)
class Price:
    """An amount of money for a unit of something. Only equal currencies and units add and compare."""

    amount: float
    currency: str
    per: Per

    def _same(self, other: Price) -> None:
        if (self.currency, self.per) != (other.currency, other.per):
            what = f"{self.currency} per {self.per} and {other.currency} per {other.per} cannot be put together"
            raise BadInput(what, next_step="convert one of them and say at which rate")

    def __add__(self, other: Price) -> Price:
        self._same(other)
        return Price(self.amount + other.amount, self.currency, self.per)

    def __lt__(self, other: Price) -> bool:
        self._same(other)
        return self.amount < other.amount

    def times(self, factor: float) -> Price:
        """The same price scaled by a pure number."""
        return Price(self.amount * factor, self.currency, self.per)

    @property
    def text(self) -> str:
        """``$2.50/GPU-h``; other currencies by their code."""
        sign = "$" if self.currency == "USD" else f"{self.currency} "
        digits = next((d for d in (2, 3) if round(self.amount, d) == self.amount), 2 if self.amount >= 1 else 4)
        unit = _PER_TEXT[self.per]
        return f"{sign}{self.amount:,.{digits}f}" + (f"/{unit}" if unit else "")


# --- in motion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sourced:
    id: str
    currency: str
    source: str
    as_of: datetime.date
    note: str | None
    path: str
    example: bool

    def age_days(self, today: datetime.date | None = None) -> int:
        """Whole days since the price held."""
        return ((today or datetime.date.today()) - self.as_of).days


@dataclass(frozen=True, slots=True)
class GpuPrice(_Sourced):
    """A rented GPU for an hour. ``gpu`` is a catalogue name where the catalogue has the device.

    ``per_gpu_hour_high`` closes a published range; ``terms`` is the provider's own word for the offer.
    """

    provider: str
    gpu: str
    commitment: Commitment
    per_gpu_hour: float
    per_gpu_hour_high: float | None
    terms: str | None
    min_gpus: int

    @property
    def price(self) -> Price:
        return Price(self.per_gpu_hour, self.currency, "gpu_hour")


@dataclass(frozen=True, slots=True)
class OwnedPrice(_Sourced):
    """Owned hardware: the purchase per GPU and its life, or somebody's modelled total per GPU hour."""

    label: str
    gpu: str
    per_gpu_hour: float | None
    capex_per_gpu: float | None
    lifetime_years: float | None
    power_w_per_gpu: float | None


@dataclass(frozen=True, slots=True)
class ApiPrice(_Sourced):
    """An API's list price. Cached input falls back to input; the batch discount is a share taken off both."""

    provider: str
    model: str
    input_per_million: float
    cached_input_per_million: float | None
    output_per_million: float
    batch_discount_ratio: float | None
    tokens_per_s_per_user: float | None
    terms: str | None

    def cost(
        self, input_tokens: float, output_tokens: float, cached_input_tokens: float = 0.0, batch: bool = False
    ) -> Price:
        """What so many tokens cost; ``cached_input_tokens`` are among ``input_tokens``.

        cost = (fresh x input + cached x cached_input + output x output_price) / 1e6, times (1 - discount) in batch.
        """
        if min(input_tokens, output_tokens, cached_input_tokens) < 0 or cached_input_tokens > input_tokens:
            raise BadInput(f"token counts do not make sense: {input_tokens}, {output_tokens}, {cached_input_tokens}")
        if batch and self.batch_discount_ratio is None:
            raise BadInput(f"{self.id} lists no batch discount")
        cached_price = (
            self.input_per_million if self.cached_input_per_million is None else self.cached_input_per_million
        )
        total = (input_tokens - cached_input_tokens) * self.input_per_million + cached_input_tokens * cached_price
        total = (total + output_tokens * self.output_per_million) / 1e6
        discount = self.batch_discount_ratio if batch and self.batch_discount_ratio is not None else 0.0
        return Price(total * (1 - discount), self.currency, "once")


@dataclass(frozen=True, slots=True)
class PriceRange:
    """Low, typical (median) and high of several offers for one device, with the offers."""

    low: Price
    typical: Price
    high: Price
    offers: tuple[GpuPrice, ...]


@dataclass(frozen=True, slots=True)
class PriceBook:
    """All prices at hand. Several rows for one offer at different dates are kept; look-ups take the newest."""

    gpu_hours: tuple[GpuPrice, ...]
    owned: tuple[OwnedPrice, ...]
    api: tuple[ApiPrice, ...]

    def gpu_offers(
        self, gpu: str, commitment: Commitment | None = None, provider: str | None = None, currency: str | None = None
    ) -> list[GpuPrice]:
        """The newest price of each offer for ``gpu``, cheapest first; example rows only when their provider is named."""
        wanted, who = normalised(gpu), normalised(provider or "")
        newest: dict[tuple[str, str, str], GpuPrice] = {}
        for p in sorted(self.gpu_hours, key=lambda p: p.as_of):
            if normalised(p.gpu) != wanted or (commitment and p.commitment != commitment):
                continue
            if (
                (p.example and not who)
                or (who and not normalised(p.provider).startswith(who))
                or (currency and p.currency != currency)
            ):
                continue
            newest[(p.provider, p.commitment, p.terms or "")] = p
        return sorted(newest.values(), key=lambda p: (p.currency, p.per_gpu_hour))

    def gpu_range(
        self, gpu: str, commitment: Commitment | None = "on_demand", provider: str | None = None, currency: str = "USD"
    ) -> PriceRange:
        """Low, typical and high for ``gpu`` in one currency. Raises BadInput when no offer is known."""
        offers = self.gpu_offers(gpu, commitment, provider, currency)
        if not offers:
            known = sorted({p.gpu for p in self.gpu_hours})
            step = f"give your own price per GPU hour, or one of: {', '.join(known)}"
            terms = f"{commitment.replace('_', '-')} " if commitment else ""
            raise BadInput(f"no {currency} {terms}price for {gpu}", next_step=step)
        amounts = [p.per_gpu_hour for p in offers]
        low, mid, high = min(amounts), statistics.median(amounts), max(amounts)
        prices = [Price(a, currency, "gpu_hour") for a in (low, mid, high)]
        return PriceRange(prices[0], prices[1], prices[2], tuple(offers))

    def api_price(self, name: str) -> ApiPrice:
        """An API price by id, "provider/model" or model name; the newest of several. Raises UnknownName."""
        wanted = normalised(name)
        by_id = [p for p in self.api if wanted in (normalised(p.id), normalised(f"{p.provider}/{p.model}"))]
        found = by_id or [p for p in self.api if normalised(p.model) == wanted]
        if found:
            return max(found, key=lambda p: p.as_of)
        raise unknown_name("API price", name, {p.id for p in self.api})

    def gpu_price(self, name: str, gpu: str | None = None) -> GpuPrice:
        """One GPU price by id, or by provider for ``gpu`` (its cheapest on-demand offer). Raises UnknownName."""
        wanted = normalised(name)
        found = [p for p in self.gpu_hours if normalised(p.id) == wanted]
        if found:
            return max(found, key=lambda p: p.as_of)
        if gpu:
            offers = self.gpu_offers(gpu, provider=name)
            first = [p for p in offers if p.commitment == "on_demand"] or offers
            if first:
                return first[0]
        raise unknown_name("GPU price", name, {p.id for p in self.gpu_hours})

    def owned_price(self, name: str) -> OwnedPrice:
        """A purchase or a modelled hour of owned hardware by id; the newest of several. Raises UnknownName."""
        found = [p for p in self.owned if normalised(p.id) == normalised(name)]
        if not found:
            raise unknown_name("owned hardware", name, {p.id for p in self.owned})
        return max(found, key=lambda p: p.as_of)

    def warnings(
        self, used: Iterable[GpuPrice | OwnedPrice | ApiPrice], today: datetime.date | None = None
    ) -> list[Warning_]:
        """One warning for each price of ``used`` that is older than :data:`STALE_DAYS`, or dated in the future."""
        found = []
        for p in used:
            age = p.age_days(today)
            if age > STALE_DAYS:
                text = f"{p.id}: price of {p.as_of} is {age} days old"
                found.append(
                    Warning_("old-price", text, "look it up again and put it into a price file of your own", scope=p.id)
                )
            elif age < 0:
                text = f"{p.id}: price is dated {p.as_of}, {-age} days from now"
                found.append(Warning_("future-price", text, "correct as_of", scope=p.id))
        return found


def load_prices(*own_files: str | Path) -> PriceBook:
    """The catalogue's prices with the user's files on top.

    ``own_files`` are paths, or stems in ``configs/prices/``. A row of a later file replaces every row of the same id.
    Raises BadInput for a file that is not valid, UnknownName for a stem that does not exist.
    """
    catalogue = catalogue_files("prices")
    documents = [load_yaml_cached(path) for stem, path in catalogue.items()]
    for name in own_files:
        text = str(name)
        if looks_like_path(text):
            documents.append(load_yaml(Path(text).expanduser()))
        elif text in catalogue:
            documents.append(load_yaml_cached(catalogue[text]))
        else:
            raise unknown_name("price file", text, catalogue)
    return _book(documents, overriding=len(own_files))


def read_prices(path: str | Path) -> PriceBook:
    """The prices of one file alone."""
    return _book([load_yaml(Path(path).expanduser())], overriding=0)


def _book(documents: list[Document], overriding: int) -> PriceBook:
    gpu: list[GpuPrice] = []
    owned: list[OwnedPrice] = []
    api: list[ApiPrice] = []
    for i, document in enumerate(documents):
        spec = validate(document, PriceFile)
        new_gpu = [_gpu(r, spec.currency, document.name) for r in spec.gpu_hours]
        new_owned = [_owned(r, spec.currency, document.name) for r in spec.owned]
        new_api = [_api(r, spec.currency, document.name) for r in spec.api]
        if i >= len(documents) - overriding:
            gpu = [p for p in gpu if p.id not in {n.id for n in new_gpu}]
            owned = [p for p in owned if p.id not in {n.id for n in new_owned}]
            api = [p for p in api if p.id not in {n.id for n in new_api}]
        gpu += new_gpu
        owned += new_owned
        api += new_api
    return PriceBook(tuple(gpu), tuple(owned), tuple(api))


def _slug(*parts: str | None) -> str:
    text = "-".join(p for p in parts if p).lower()
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def _gpu(r: GpuRow, currency: str, path: str) -> GpuPrice:
    name = r.id or _slug(r.provider, r.gpu, r.commitment.replace("_", "-"), r.terms)
    return GpuPrice(
        name, currency, r.source, r.as_of, r.note, path, r.example, r.provider, r.gpu, r.commitment, r.per_gpu_hour, r.per_gpu_hour_high,
        r.terms, r.min_gpus,
    )  # fmt: skip


def _owned(r: OwnedRow, currency: str, path: str) -> OwnedPrice:
    name = r.id or _slug(r.label, r.gpu)
    return OwnedPrice(
        name, currency, r.source, r.as_of, r.note, path, r.example, r.label, r.gpu, r.per_gpu_hour, r.capex_per_gpu, r.lifetime_years,
        r.power_w_per_gpu,
    )  # fmt: skip


def _api(r: ApiRow, currency: str, path: str) -> ApiPrice:
    name = r.id or f"{_slug(r.provider)}/{_slug(r.model)}"
    return ApiPrice(
        name, currency, r.source, r.as_of, r.note, path, r.example, r.provider, r.model, r.input_per_million, r.cached_input_per_million,
        r.output_per_million, r.batch_discount_ratio, r.tokens_per_s_per_user, r.terms,
    )  # fmt: skip
