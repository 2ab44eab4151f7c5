"""A decision file resolved: prices looked up, throughput read from results, every pair compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.analysis.efficiency import hardware_of
from bench.analysis.summary import Summary, summarise_cell
from bench.catalog.hardware import Hardware, load_hardware
from bench.catalog.model import load_model
from bench.catalog.prices import PriceBook, load_prices
from bench.catalog.yaml_source import catalogue_files, load_yaml, looks_like_path, unknown_name, validate
from bench.config.decision import ApiSpec, Decision, SelfHostSpec
from bench.decide.batching import SpeedCurve, SpeedPoint, batch_curve
from bench.decide.breakeven import BreakEven, break_even
from bench.decide.capacity import ReplicaSpec
from bench.decide.option_price import HourPrice, hour_price
from bench.decide.options import ApiOption, Mix, SelfHost, parse_volume
from bench.decide.ownership import FineTune
from bench.errors import BadInput, StoreError
from bench.records import Estimate, Warning_
from bench.runner.results import experiment_folder, read_plan
from bench.sim.profile import load_profile
from bench.store import list_cells, list_runs


@dataclass(frozen=True, slots=True)
class ResolvedOption:
    """A self-hosted option with where its price and its throughput come from, in words."""

    option: SelfHost
    price: HourPrice
    rate_source: str
    fine_tune: FineTune | None = None
    curve: SpeedCurve | None = None  # throughput against speed per user
    prefill_time_ratio: float | None = None  # at the throughput that counts, where it is known


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
    options = tuple(resolve(spec, book, curves) for spec in decision.options)
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
        out.append(Warning_(origin, text, "measure it with `bench run` on that GPU"))
    for o in options:
        point = o.curve.best if o.curve is not None and o.option.origin != "assumed" else None
        if point is None:
            continue
        share = 1 - point.output_tokens_per_s.value / point.total_tokens_per_s.value
        if abs(share - mix.input_ratio) > 0.1:
            text = f"{o.option.name}: its throughput is at {share:.0%} input tokens, the comparison at {mix.input_ratio:.0%}"
            out.append(Warning_("other-mix", text, "measure or simulate at the lengths of your own requests"))
    bare = ", ".join(o.option.name for o in options if o.option.tokens_per_s.low is None)
    if bare:
        text = f"throughput has no interval, so neither has the break-even: {bare}"
        out.append(Warning_("no-interval", text, "take it from at least 3 runs (results:)"))
    return out


def resolve(spec: SelfHostSpec, book: PriceBook, curves: bool = True) -> ResolvedOption:
    """One option of the file with its numbers. See :class:`bench.config.decision.SelfHostSpec`."""
    hardware = load_hardware(spec.gpu)
    price = hour_price(spec, book, hardware.name)
    needed = curves or (spec.tokens_per_s is None and spec.results is None)
    curve = _simulated(spec, hardware) if spec.simulate is not None and needed else None
    rate, rate_source, origin, prefill = _rate(spec, hardware.name, curve)
    if spec.results is not None:
        curve = _measured_curve(spec, hardware.name) or curve
    fine_tune = FineTune(**spec.fine_tune.model_dump()) if spec.fine_tune else None
    option = SelfHost(
        name=spec.name,
        gpu=hardware.name,
        num_gpus=spec.num_gpus,
        usd_per_gpu_hour=price.usd,
        tokens_per_s=rate,
        origin=origin,
        billing=spec.billing,
        min_replicas=spec.min_replicas,
        peak_to_mean=spec.peak_to_mean,
        max_utilisation_ratio=spec.max_utilisation,
        fixed_usd_per_month=spec.fixed_usd_per_month + (fine_tune.usd_per_month if fine_tune else 0.0),
        whole_hours=spec.whole_hours,
        num_sharing=fine_tune.num_adapters_sharing if fine_tune else 1,
    )
    return ResolvedOption(option, price, rate_source, fine_tune, curve, prefill)


def _simulated(spec: SelfHostSpec, hardware: Hardware) -> SpeedCurve:
    s = spec.simulate
    assert s is not None
    profile = load_profile(Path(s.profile)) if s.profile else None
    replica = ReplicaSpec(hardware, load_model(s.model), spec.num_gpus, s.quantization, profile=profile)
    return batch_curve(replica, s.isl, s.osl, s.concurrencies)


def _measured_curve(spec: SelfHostSpec, gpu: str) -> SpeedCurve | None:
    """All cells of the results on as many GPUs, by speed per user."""
    assert spec.results is not None
    points, origins = [], set()
    for s in summaries(results_folder(spec.results)):
        device, e = hardware_of(s.facts), s.estimates
        user = e.get("output_tokens_per_s_per_user")
        if device is None or device.name != gpu or s.facts.num_gpus not in (0, spec.num_gpus) or user is None:
            continue
        level = s.facts.level[1] if s.facts.level else float("nan")
        share = e.get("prefill_time_ratio")
        points.append(
            SpeedPoint(
                float(level),
                e["total_tokens_per_s"],
                e["output_tokens_per_s"],
                user.value,
                share.value if share else None,
            )
        )
        origins.add(s.origin)
    points.sort(key=lambda p: -p.output_tokens_per_s_per_user)
    return SpeedCurve(tuple(points), " and ".join(sorted(origins)), f"cells of {spec.results}") if points else None


def _rate(spec: SelfHostSpec, gpu: str, curve: SpeedCurve | None) -> tuple[Estimate, str, str, float | None]:
    """(tokens/s, where from, origin, share of time in prefill)."""
    if spec.tokens_per_s is not None:
        rate = Estimate(
            spec.tokens_per_s,
            spec.tokens_per_s_low,
            spec.tokens_per_s_high,
            method="typed in",
            num_runs=0,
            unit="tokens/s",
        )
        return rate, "typed in", "assumed", None
    if spec.results is None:
        assert curve is not None and spec.simulate is not None
        at = spec.simulate.at_concurrency
        point = next((p for p in curve.points if p.concurrency == at), curve.best)
        return (
            point.total_tokens_per_s,
            f"{curve.source}, concurrency {point.concurrency:g}",
            "simulated",
            point.prefill_time_ratio,
        )
    summary = best_cell(results_folder(spec.results), spec.cell)
    hardware = hardware_of(summary.facts)
    if hardware is None or hardware.name != gpu:
        raise BadInput(
            f"its results are of {hardware.name if hardware else 'a device that the catalogue does not know'}, not of {gpu}",
            where=f"option {spec.name}",
            next_step="name the GPU that they were measured on, or type in tokens_per_s",
        )
    if summary.facts.num_gpus not in (0, spec.num_gpus):
        raise BadInput(
            f"its results used {summary.facts.num_gpus} GPUs a replica, the option says {spec.num_gpus}",
            where=f"option {spec.name}",
            next_step="set num_gpus to the former, or choose another cell",
        )
    rate = summary.estimates["total_tokens_per_s"]
    prefill = summary.estimates.get("prefill_time_ratio")
    source = f"{summary.experiment}, cell {summary.cell_id}, {rate.num_runs} runs"
    return rate, source, summary.origin, prefill.value if prefill else None


def results_folder(name_or_path: str) -> Path:
    """The results folder of an experiment by path or by name. Raises BadInput."""
    path = Path(name_or_path)
    folder = path if path.is_dir() else experiment_folder(name_or_path)
    if not folder.is_dir():
        raise BadInput("no results here", where=str(folder), next_step="`bench run` or `bench predict` makes some")
    return folder


def summaries(folder: Path, cell: str | None = None) -> list[Summary]:
    """Summaries of the cells of a results folder that have complete runs; those whose id contains ``cell``."""
    try:
        paths = [folder / c.cell_id for c in read_plan(folder)[1]]
    except StoreError:
        paths = list_cells(folder)  # results without a plan (imported ones): every cell counts
    out = []
    for path in paths:
        if cell and cell not in path.name:
            continue
        runs = [r for r in list_runs(path) if r.status == "complete"]
        if runs:
            out.append(summarise_cell(runs))
    if not out:
        what = f"no complete runs of a cell whose id contains {cell!r}" if cell else "no complete runs"
        raise BadInput(what, where=str(folder), next_step="`bench status` says what there is")
    return out


def best_cell(folder: Path, cell: str | None = None) -> Summary:
    """The cell with the highest total throughput among those asked for."""
    found = [s for s in summaries(folder, cell) if "total_tokens_per_s" in s.estimates]
    if not found:
        raise BadInput("no cell has a throughput", where=str(folder))
    return max(found, key=lambda s: s.estimates["total_tokens_per_s"].value)
