"""What a run's device costs per hour: the user's own price, a named one, or the catalogue's range for that device."""

from __future__ import annotations

from bench.analysis.efficiency import hardware_of
from bench.analysis.run_facts import RunFacts
from bench.catalog.prices import GpuPrice, PriceBook, load_prices
from bench.catalog.yaml_source import catalogue_files, looks_like_path
from bench.config.experiment import Experiment
from bench.decide.cost import Price
from bench.errors import BadInput, UnknownName
from bench.records import Warning_


def device_price(
    experiment: Experiment | None, facts: RunFacts, own_usd_per_hour: float | None = None
) -> tuple[Price | None, list[Warning_], str]:
    """(price, doubts about it, why there is none).

    In this order: the price given here; ``gpu_price_usd_per_hour``; the offer, provider or file named in ``prices``; the
    median of the catalogue's on-demand offers for the device, with the lowest and highest beside it.
    """
    if not facts.devices_known:
        return None, [], facts.why_no_devices
    if own_usd_per_hour is not None:
        return Price(own_usd_per_hour, "your own price"), [], ""
    if experiment is not None and experiment.gpu_price_usd_per_hour is not None:
        return Price(experiment.gpu_price_usd_per_hour, "the experiment's own price"), [], ""
    named = experiment.prices if experiment is not None else None
    hardware = hardware_of(facts)
    gpu = hardware.name if hardware is not None and hardware.kind == "gpu" else None
    if named is None and gpu is None:
        return None, [], "no price is known for this device: set gpu_price_usd_per_hour, or give --gpu-price"
    is_file = named is not None and (looks_like_path(named) or named in catalogue_files("prices"))
    book = load_prices(named) if is_file and named is not None else load_prices()
    if named is not None and not is_file:
        try:
            offer = book.gpu_price(named, gpu)
        except UnknownName as e:  # a provider that does not offer this device: the report is made all the same
            return None, [], str(e)
        return _of_offer(offer), book.warnings([offer]), ""
    if gpu is None:
        return None, [], f"{named} has no price for this device: set gpu_price_usd_per_hour, or give --gpu-price"
    return _of_range(book, gpu)


def _of_offer(offer: GpuPrice) -> Price:
    if offer.currency != "USD":
        raise BadInput(f"price {offer.id} is in {offer.currency}", next_step="give one in USD")
    text = f"{offer.provider} {offer.commitment.replace('_', ' ')} ({offer.source})"
    return Price(offer.per_gpu_hour, text, str(offer.as_of), high_usd_per_hour=offer.per_gpu_hour_high)


def _of_range(book: PriceBook, gpu: str) -> tuple[Price | None, list[Warning_], str]:
    try:
        found = book.gpu_range(gpu)
    except BadInput as e:
        return None, [], str(e)
    n = len(found.offers)
    dates = sorted(o.as_of for o in found.offers)
    text = f"median of {n} on-demand offer{'s' if n > 1 else ''} for {gpu} in the catalogue"
    price = Price(found.typical.amount, text, f"{dates[0]} to {dates[-1]}", found.low.amount, found.high.amount)
    return price, book.warnings(found.offers), ""
