"""What a GPU-hour of an option costs, and the band that the market's offers span around it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.catalog.prices import ApiPrice, GpuPrice, OwnedPrice, PriceBook
from bench.catalog.yaml_source import normalised
from bench.config.decision import OwnedSpec, SelfHostSpec
from bench.decide.ownership import HourParts, Owned, owned_hour
from bench.errors import BadInput


@dataclass(frozen=True, slots=True)
class PriceBand:
    """The cheapest and the dearest known USD per GPU-hour: a spread of offers, not a confidence interval."""

    low_usd: float
    high_usd: float
    source: str


@dataclass(frozen=True, slots=True)
class HourPrice:
    """USD per GPU-hour, where from, its parts (owned hardware only) and its band (None: one figure is known)."""

    usd: float
    source: str
    parts: HourParts | None = None
    band: PriceBand | None = None


def hour_price(spec: SelfHostSpec, book: PriceBook, gpu: str) -> HourPrice:
    """The price of one option. Raises BadInput: a price that is unknown, or not in dollars."""
    if spec.usd_per_gpu_hour is not None:
        return HourPrice(spec.usd_per_gpu_hour, spec.price_note or "your own price", band=_own_band(spec))
    if spec.owned is not None:
        parts = owned_hour(owned_of(spec.owned, book, gpu))
        bought = f"; purchase: {offer_text(book.owned_price(spec.owned.purchase))}" if spec.owned.purchase else ""
        return HourPrice(parts.total_usd, f"owned: capital, power, hosting and staff{bought}", parts)
    assert spec.price is not None
    offer = book.gpu_price(spec.price, gpu)
    if offer.currency != "USD":
        raise BadInput(f"price {offer.id} is in {offer.currency}", next_step="give one in USD")
    return HourPrice(offer.per_gpu_hour, offer_text(offer), band=_offers_band(offer, book))


def _own_band(spec: SelfHostSpec) -> PriceBand | None:
    low, high = spec.usd_per_gpu_hour_low, spec.usd_per_gpu_hour_high
    return None if low is None or high is None else PriceBand(low, high, spec.price_note or "your own range")


def _offers_band(offer: GpuPrice, book: PriceBook) -> PriceBand | None:
    """All offers of the same GPU under the same commitment; None for an example's round price and for a lone offer."""
    if offer.example:
        return None
    found = book.gpu_range(offer.gpu, offer.commitment)
    low, high = min(found.low.amount, offer.per_gpu_hour), max(found.high.amount, offer.per_gpu_hour)
    if low == high:
        return None
    return PriceBand(low, high, f"{len(found.offers)} {offer.commitment.replace('_', '-')} offers of the catalogue")


def owned_of(spec: OwnedSpec, book: PriceBook, gpu: str) -> Owned:
    """The owned hardware of a file, what it leaves out taken from the purchase that it names.

    Raises BadInput: the purchase is of another GPU, is a modelled hour, is not in dollars, or does not say all either.
    """
    values = spec.model_dump(exclude={"purchase"})
    if spec.purchase is not None:
        bought = book.owned_price(spec.purchase)
        where = f"owned.purchase: {bought.id}"
        if normalised(bought.gpu) != normalised(gpu):
            raise BadInput(f"is a price of {bought.gpu}, the option's GPU is {gpu}", where=where)
        if bought.capex_per_gpu is None or bought.currency != "USD":
            raise BadInput("is no purchase in USD", where=where, next_step="give capex_usd")
        listed = {
            "capex_usd": bought.capex_per_gpu,
            "life_years": bought.lifetime_years,
            "power_w": bought.power_w_per_gpu,
        }
        for name, value in listed.items():
            values[name] = value if values[name] is None else values[name]
            if values[name] is None:
                raise BadInput(f"does not say {name}", where=where, next_step=f"give owned.{name}")
    return Owned(**values)


def offer_text(offer: GpuPrice | ApiPrice | OwnedPrice) -> str:
    """Whose price it is, its source and date, in one line."""
    whose = offer.label if isinstance(offer, OwnedPrice) else offer.provider
    return f"{whose}, {offer.source}, {offer.as_of}"
