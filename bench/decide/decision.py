"""A decision file resolved: prices looked up, throughput read from results, every pair compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.analysis.predicted import prediction_line
from bench.catalog.hardware import load_hardware
from bench.catalog.prices import PriceBook, load_prices
from bench.catalog.yaml_source import catalogue_files, load_yaml, looks_like_path, unknown_name, validate
from bench.config.decision import ApiSpec, Decision, SelfHostSpec
from bench.decide.breakeven import BreakEven, break_even
from bench.decide.option_price import HourPrice, hour_price
from bench.decide.options import ApiOption, Mix, SelfHost, parse_volume
from bench.decide.ownership import FineTune
from bench.decide.rates import Rate, resolve_rate
from bench.errors import BadInput
from bench.records import Warning_


@dataclass(frozen=True, slots=True)
class ResolvedOption:
    """A self-hosted option with where its price and its throughput come from, in words."""

    option: SelfHost
    price: HourPrice
    rate: Rate
    fine_tune: FineTune | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """Everything a decision page says."""

    name: str
    why: str
    mix: Mix
    volumes: tuple[float, ...]
    options: tuple[ResolvedOption, ...]
    apis: tuple[ApiOption, ...]
    pairs: tuple[BreakEven, ...]
    warnings: tuple[Warning_, ...] = ()

    def cheapest(self, volume_tokens: float) -> tuple[str, float]:
        """(name, dollars per month) of the cheapest option of all at this volume."""
        costs = [(o.option.name, o.option.monthly_usd(volume_tokens)) for o in self.options]
        costs += [(a.name, a.monthly_usd(volume_tokens, self.mix)) for a in self.apis]
        return min(costs, key=lambda c: c[1])


def load_decision(name_or_path: str) -> tuple[Decision, Path]:
    """A decision file by path, or by its stem in ``configs/decisions/``. Raises BadInput with file and line."""
    if looks_like_path(name_or_path):
        path = Path(name_or_path)
    else:
        known = catalogue_files("decisions")
        if name_or_path not in known:
            raise unknown_name("decision file", name_or_path, known)
        path = known[name_or_path]
    return validate(load_yaml(path), Decision), path


def compare(decision: Decision, curves: bool = True) -> Compared:
    """Resolve and compare. ``curves``: also simulate those curves that only a picture needs.

    Raises BadInput for a price, a GPU or results that are not there.
    """
    book = load_prices(*decision.prices)
    mix = Mix.parse(decision.mix, decision.cached_input)
    volumes = tuple(sorted(parse_volume(str(v)) for v in decision.volumes))
    options = tuple(resolve(spec, book, mix, curves) for spec in decision.options)
    apis = tuple(_api(a, book) for a in decision.apis)
    pairs = tuple(break_even(o.option, a, mix, _ends(o)) for o in options for a in apis)
    used: list[Any] = [a.price for a in apis]
    used += [book.gpu_price(s.price, s.gpu) for s in decision.options if s.price is not None]
    used += [book.owned_price(s.owned.purchase) for s in decision.options if s.owned and s.owned.purchase]
    warnings = tuple(book.warnings(used)) + tuple(_doubts(options, mix))
    return Compared(decision.name, decision.why, mix, volumes, options, apis, pairs, warnings)


def _ends(o: ResolvedOption) -> tuple[float, float] | None:
    return None if o.price.band is None else (o.price.band.low_usd, o.price.band.high_usd)


def _api(spec: str | ApiSpec, book: PriceBook) -> ApiOption:
    """An API of the file. Raises BadInput: unknown, or asked for a batch price that it does not list."""
    if isinstance(spec, str):
        return ApiOption(book.api_price(spec))
    price = book.api_price(spec.name)
    if spec.batch and price.batch_discount_ratio is None:
        raise BadInput("lists no batch discount", where=f"api {spec.name}", next_step="leave batch out")
    return ApiOption(price, spec.batch, spec.cached_input)


def _doubts(options: tuple[ResolvedOption, ...], mix: Mix) -> list[Warning_]:
    """What the throughputs rest on, one line per kind of doubt."""
    out = []
    for origin in dict.fromkeys(o.option.origin for o in options if o.option.origin != "measured"):
        names = ", ".join(o.option.name for o in options if o.option.origin == origin)
        text = f"throughput is {origin}, not measured: {names}"
        rates = [o.option.tokens_per_s for o in options if o.option.origin == origin]
        line = prediction_line(rates, "intervals")
        text += f" ({line})" if line else ""
        out.append(Warning_(origin, text, "measure it with `bench run` on that GPU"))
    for o in options:
        mixes = o.rate.mixes
        nearest = min((m.input_ratio for m in mixes), key=lambda r: abs(r - mix.input_ratio), default=None)
        held = bool(mixes) and not mixes[0].input_ratio <= mix.input_ratio <= mixes[-1].input_ratio
        if nearest is not None and held and abs(nearest - mix.input_ratio) > 0.1:
            text = f"{o.option.name}: its throughput is at {nearest:.0%} input tokens, the comparison at {mix.input_ratio:.0%}"
            out.append(Warning_("other-mix", text, "measure or simulate at the lengths of your own requests"))
    bare = ", ".join(o.option.name for o in options if o.option.tokens_per_s.low is None)
    if bare:
        text = f"throughput has no interval, so neither has the break-even: {bare}"
        out.append(Warning_("no-interval", text, "take it from at least 3 runs (results:)"))
    return out


def resolve(spec: SelfHostSpec, book: PriceBook, mix: Mix, curves: bool = True) -> ResolvedOption:
    """One option of the file with its numbers. See :class:`bench.config.decision.SelfHostSpec`."""
    hardware = load_hardware(spec.gpu)
    price = hour_price(spec, book, hardware.name)
    rate = resolve_rate(spec, hardware, mix, curves)
    fine_tune = FineTune(**spec.fine_tune.model_dump()) if spec.fine_tune else None
    option = SelfHost(
        name=spec.name,
        gpu=hardware.name,
        num_gpus=spec.num_gpus,
        usd_per_gpu_hour=price.usd,
        tokens_per_s=rate.tokens_per_s,
        origin=rate.origin,
        billing=spec.billing,
        min_replicas=spec.min_replicas,
        peak_to_mean=spec.peak_to_mean,
        max_utilisation_ratio=spec.max_utilisation,
        fixed_usd_per_month=spec.fixed_usd_per_month + (fine_tune.usd_per_month if fine_tune else 0.0),
        whole_hours=spec.whole_hours,
        num_sharing=fine_tune.num_adapters_sharing if fine_tune else 1,
    )
    return ResolvedOption(option, price, rate, fine_tune)
