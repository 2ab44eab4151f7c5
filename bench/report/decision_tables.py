"""The tables of decision pages, and the formulas behind every number in them."""

from __future__ import annotations

from bench.analysis.predicted import prediction_line
from bench.decide.cost import DEFAULT_OUTPUT_PRICE_RATIO, split_by_price_ratio, split_by_time
from bench.decide.decision import Compared, ResolvedOption
from bench.decide.ownership import HourParts
from bench.decide.plan import Plan
from bench.records import Estimate
from bench.report.decision_text import (
    by_price_text,
    checked_text,
    crossing_text,
    mixes_known,
    share_text,
    volume_text,
    wait_text,
)
from bench.report.model import Column, Field, Table
from bench.units import significant, usd_text

#: (name, formula) of everything that a decision page computes; docs/cost-model.md explains them.
COST_FORMULAS: tuple[tuple[str, str], ...] = (
    ("Engine's dollars per second", "price per GPU-hour × GPUs / 3600"),
    ("USD per million tokens", "dollars per second / (tokens per second × utilisation) × 10⁶"),
    ("API, USD per month", "volume × (i (1 − c) p_in + i c p_cached + o p_out) / 10⁶ × (1 − batch discount); i, o: shares of input and output; c: cached share of the input"),
    ("Room of a replica", "K = tokens/s × 3600 × 720 × utilisation at the peak / (peak / mean) / adapters that share it"),
    ("Replicas", "n(V) = max(least replicas, ⌈V / K⌉)"),
    ("Self-hosting around the clock", "S(V) = fixed + n(V) × GPUs × price × 720 / adapters"),
    ("Self-hosting by the hour", "S(V) = fixed + V / (tokens/s × 3600 × utilisation) × GPUs × price; hours rounded up where a started hour is paid in full"),
    ("Break-even", "first stair n ≥ fixed / (a K − C) with V = (fixed + n C) / a; a: API dollars per token, C: dollars of a replica-month; never where a K ≤ C; for good after the last stair n ≤ (fixed + C) / (a K − C) + 1"),
    ("Interval of a break-even", "the same at both ends of the throughput's interval: break-even falls as throughput rises, so the ends map to the ends"),
    ("Throughput at a mix", "1 / throughput = (1 − w) / a + w / b between the two known mixes a and b around it; w: how far its share of input tokens lies from a's to b's"),
    ("Band of GPU prices", "the break-even at the cheapest and at the dearest known offer of that GPU under that commitment, at the throughput's value"),
    ("Sensitivity", "GPU prices, throughput, API prices or the volume changed alone, in steps of 2 % up to a factor of 100, until the cheapest is of the other kind"),
    ("Owned GPU-hour: capital", "capex × (1 + spare) × ((1 − resale) / (years × 12 × 720) + (1 + resale) / 2 × interest / (12 × 720))"),
    ("Owned GPU-hour: power", "W / 1000 × PUE × USD per kWh"),
    ("Owned GPU-hour: hosting and staff", "(hosting + staff hours × USD per hour) × (1 + spare) / 720"),
    ("Fine-tuning", "one-off / months, added to the fixed dollars of a month"),
    ("Input and output by price ratio", f"input = dollars per second / (in/s + r × out/s) × 10⁶, output = r × input, r = {DEFAULT_OUTPUT_PRICE_RATIO:g}"),
    ("Input and output by time", "input = dollars per second × p / (in/s) × 10⁶, output = dollars per second × (1 − p) / (out/s) × 10⁶; p: share of the engine's time in steps with prompt tokens"),
)  # fmt: skip

PLAN_FORMULAS: tuple[tuple[str, str], ...] = (
    ("Capacity of a replica", "highest Poisson rate at which a simulation of vLLM's scheduler meets the SLO, by bisection to 3 %"),
    ("Serving replicas", "⌈peak / (capacity × (1 − head-room))⌉, one more while the simulated peak misses the SLO"),
    ("Redundancy", "N + spares; with z zones a multiple of z, at least N z / (z − 1): any one zone may be lost"),
    ("USD per month", "replicas × GPUs × price × 720"),
    ("USD per million tokens", "USD per month / (mean rate × 720 × 3600 × (ISL + OSL)) × 10⁶"),
    ("Autoscaled", "each hour what its rate needs, plus the redundancy; a replica that an hour adds is paid from its engine's start on"),
    ("Used", "mean rate / (capacity × replicas)"),
    ("Growth", "peak × (1 + growth) ^ months; fleets are sized for the horizon"),
    ("Sensitivity", "price, capacity or peak of the winner scaled in steps of 2 % until another candidate is cheaper"),
)  # fmt: skip


def _text(title: str, unit: str = "") -> Column:
    return Column(title, unit, numeric=False)


def _usd(value: float | None, detail: str = "") -> Field:
    return Field("", "", "") if value is None else Field(usd_text(value), value, detail)


def decision_tables(compared: Compared) -> tuple[Table, ...]:
    """Costs, crossings, parts, the split, prices and where throughput comes from."""
    return (
        _costs(compared),
        _crossings(compared),
        _parts(compared),
        _split(compared),
        _prices(compared),
        _rates(compared),
    )


def _costs(compared: Compared) -> Table:
    heads = (_text("Option"), Column("Tokens/s"), _text("Origin"), Column("At full use", "USD/M tokens"))
    columns = heads + tuple(Column(f"{volume_text(v)} a month", "USD") for v in compared.volumes)
    rows = []
    for o in compared.options:
        s = o.option
        e = s.tokens_per_s
        interval = "" if e.low is None or e.high is None else f"{significant(e.low)} – {significant(e.high)}"
        row = [Field(s.name, s.name), Field(significant(e.value), e.value, interval), Field(s.origin, s.origin)]
        row.append(_usd(s.usd_per_replica_hour / 3600 / e.value * 1e6))
        for v in compared.volumes:
            used = (
                f"{s.num_replicas(v)} replicas, {share_text(s.utilisation(v))} used"
                if s.billing == "around_clock"
                else ""
            )
            row.append(_usd(s.monthly_usd(v), f"{usd_text(s.usd_per_million(v))}/M" + (f"; {used}" if used else "")))
        rows.append(tuple(row))
    for a in compared.apis:
        row = [Field(a.name, a.name), Field("", ""), Field("API", "API"), _usd(a.usd_per_token(compared.mix) * 1e6)]
        rows.append(tuple(row + [_usd(a.monthly_usd(v, compared.mix)) for v in compared.volumes]))
    cheapest = ", ".join(f"{volume_text(v)}: {compared.cheapest(v)[0]}" for v in compared.volumes)
    note = f"Cheapest at {cheapest}. A month is 720 hours.{of_prediction(compared, 'Small print')}"
    return Table("costs", "Dollars per month", columns, tuple(rows), note)


def of_prediction(compared: Compared, what: str) -> str:
    """A sentence on intervals of simulated options; "" without such."""
    line = prediction_line((o.option.tokens_per_s for o in compared.options), what)
    return f" {line}." if line else ""


def _crossings(compared: Compared) -> Table:
    columns = (_text("Self-hosted"), _text("beats"), Column("From", "tokens a month"), _text("Over the band of GPU prices"), Column("API", "USD/M tokens"), Column("Self-hosted at full use", "USD/M tokens"))  # fmt: skip
    rows = tuple(
        (
            Field(p.option.name, p.option.name),
            Field(p.api.name, p.api.name),
            Field(crossing_text(p), p.crossing.first_tokens if p.crossing.first_tokens is not None else float("inf")),
            Field(by_price_text(p) or "one price known"),
            _usd(p.api_usd_per_million),
            _usd(p.full_use_usd_per_million),
        )
        for p in compared.pairs
    )
    note = "In brackets: the crossing at both ends of the throughput's interval (the ends are carried through, no Monte Carlo needed: the crossing is monotone). The band is the spread of offers, no interval."
    note += of_prediction(compared, "In brackets")
    return Table("crossings", "Where the curves cross", columns, rows, note)


def _parts(compared: Compared) -> Table:
    columns = (
        _text("Option"), _text("Held"), Column("GPU-hour", "USD"), Column("capital", "USD/GPU-h"), Column("power", "USD/GPU-h"),
        Column("hosting", "USD/GPU-h"), Column("staff", "USD/GPU-h"), Column("A replica", "USD/month"), Column("Fixed", "USD/month"),
        Column("of it fine-tuning", "USD/month"), Column("Adapters sharing"),
    )  # fmt: skip
    rows = []
    for o in compared.options:
        s = o.option
        tune = o.fine_tune.usd_per_month if o.fine_tune else 0.0
        held = (
            "owned" if o.price.parts else "rented by the hour" if s.billing == "by_hour" else "rented around the clock"
        )
        row = (
            Field(s.name, s.name),
            Field(held, held),
            _usd(s.usd_per_gpu_hour),
            *_hour(o.price.parts),
            _usd(s.usd_per_replica_month),
        )
        rows.append((*row, _usd(s.fixed_usd_per_month), _usd(tune), Field(str(s.num_sharing), s.num_sharing)))
    note = "Owned hardware is the sum of its parts; of rented GPUs only the price is known. A replica's month is this model's share of it."
    return Table("parts", "What a GPU-hour consists of", columns, tuple(rows), note)


def _hour(parts: HourParts | None) -> tuple[Field, ...]:
    if parts is None:
        return (Field("in the price", ""), *(Field("", ""),) * 3)
    return tuple(_usd(v) for v in (parts.capital_usd, parts.power_usd, parts.hosting_usd, parts.staff_usd))


def _split(compared: Compared) -> Table:
    columns = (_text("Option"), Column("Input by price ratio", "USD/M"), Column("Output by price ratio", "USD/M"), Column("Input by time", "USD/M"), Column("Output by time", "USD/M"))  # fmt: skip
    rows = tuple(_split_row(o, compared.mix.input_ratio) for o in compared.options)
    note = f"At full use. By price ratio: an output token costs {DEFAULT_OUTPUT_PRICE_RATIO:g} input tokens. By time: steps with prompt tokens go to input; n/a where the engine's steps are not known."
    return Table("split", "Input and output apart", columns, rows, note)


def _split_row(o: ResolvedOption, input_ratio: float) -> tuple[Field, ...]:
    s = o.option
    usd, rate_in = s.usd_per_replica_hour / 3600, s.tokens_per_s.value * input_ratio
    rate_out = s.tokens_per_s.value - rate_in
    by_price = split_by_price_ratio(usd, rate_in, rate_out)
    timed: tuple[Field, ...] = (Field("n/a", "", "typed in"),) * 2
    if o.rate.prefill_time_ratio is not None and rate_out > 0:
        timed = tuple(_usd(v) for v in split_by_time(usd, rate_in, rate_out, o.rate.prefill_time_ratio))
    return (Field(s.name, s.name), *(_usd(v) for v in by_price), *timed)


def _prices(compared: Compared) -> Table:
    columns = (_text("What"), _text("Price"), _text("Source"), _text("As of"))
    rows = []
    for o in compared.options:
        s = o.option
        rows.append(
            (
                Field(s.name, s.name),
                Field(f"{usd_text(s.usd_per_gpu_hour)} per GPU-hour", s.usd_per_gpu_hour, _band(o)),
                Field(o.price.source),
                Field(""),
            )
        )
    for a in compared.apis:
        p = a.price
        cached = "" if p.cached_input_per_million is None else f", cached {usd_text(p.cached_input_per_million)}"
        batch = (
            ""
            if p.batch_discount_ratio is None
            else f"; batch −{p.batch_discount_ratio:.0%}{' (used)' if a.batch else ''}"
        )
        text = f"in {usd_text(p.input_per_million)}{cached}, out {usd_text(p.output_per_million)} per million{batch}"
        rows.append((Field(a.name, a.name), Field(text), Field(p.source), Field(str(p.as_of))))
    return Table("prices", "Prices", columns, tuple(rows))


def _band(o: ResolvedOption) -> str:
    band = o.price.band
    return "" if band is None else f"{usd_text(band.low_usd)} – {usd_text(band.high_usd)}: {band.source}"


def _rates(compared: Compared) -> Table:
    columns = (_text("Option"), _text("Origin"), _text("Throughput from"), _text("Its interval"), _text("Known at input shares of"), _text("Speed curve from"))  # fmt: skip
    rows = tuple(
        (
            Field(o.option.name),
            Field(o.option.origin),
            Field(o.rate.source),
            Field(_interval_text(o.option.tokens_per_s)),
            Field(mixes_known(o.rate)),
            Field(o.rate.curve.source if o.rate.curve else "none"),
        )
        for o in compared.options
    )
    note = "Between two known mixes 1 / throughput lies on a line in the share of input tokens; beyond the outermost, and where one mix is known, throughput is held."
    return Table("rates", "Where throughput comes from", columns, rows, note)


def _interval_text(e: Estimate) -> str:
    return f"none: {e.method}" if e.low is None or e.high is None else f"{e.confidence:.0%}: {e.method}"


# --- plans -------------------------------------------------------------------------------------------------------


def plan_tables(plan: Plan) -> tuple[Table, ...]:
    """Fleets, what a lost replica does, growth, and who is not in the list."""
    tables = [_fleets(plan)]
    if plan.risks:
        tables.append(_risks(plan))
    if plan.stages:
        tables.append(_growth(plan))
    prices = tuple((Field(f.name), Field(f"{usd_text(f.usd_per_gpu_hour)} per GPU-hour"), Field(f.price_source), Field(f"{f.origin}: {f.trust}, {f.capacity_source}"), Field(f.interval_text or "none")) for f in plan.fleets)  # fmt: skip
    heads = (
        _text("Fleet"),
        _text("Price"),
        _text("Source"),
        _text("Capacity from"),
        _text("Interval of its latencies"),
    )
    tables.append(Table("prices", "Prices and where capacity comes from", heads, prices))
    lost = tuple((Field(x.name), Field(x.reason)) for x in plan.lost)
    if lost:
        tables.append(Table("lost", "Not in the list", (_text("Candidate"), _text("Why")), lost))
    return tuple(tables)


def _fleets(plan: Plan) -> Table:
    columns = (
        _text("Fleet"), Column("Serving"), Column("Spare"), Column("GPUs"), _text("Batch limits"), Column("Requests/s", "each"),
        Column("Up always", "USD/month"), Column("per million", "USD/M tokens"), Column("Used", "%"), Column("Autoscaled", "USD/month"),
        Column("per million", "USD/M tokens"), _text("SLO at the peak"), Column("Serving at the slow end"), _text("Origin"),
    )  # fmt: skip
    rows = []
    for f in plan.fleets:
        c = f.cost
        limits = "vLLM's defaults"
        if f.spec is not None and f.spec.max_num_batched_tokens is not None:
            limits = f"max_num_batched_tokens {f.spec.max_num_batched_tokens}, max_num_seqs {f.spec.max_num_seqs}"
        slow = Field("n/a", "", "misses the SLO at any load") if f.num_conservative is None else Field(str(f.num_conservative), f.num_conservative)  # fmt: skip
        rows.append((
            Field(f.name, f.name), Field(str(c.num_serving), c.num_serving, f"{f.added} added by the check" if f.added else ""),
            Field(str(c.num_replicas - c.num_serving), c.num_replicas - c.num_serving), Field(str(c.num_gpus), c.num_gpus), Field(limits),
            Field(significant(f.capacity_per_s), f.capacity_per_s), _usd(c.always_usd_per_month), _usd(c.always_usd_per_million),
            Field(f"{100 * c.utilisation_ratio:.0f}", c.utilisation_ratio), _usd(c.scaled_usd_per_month), _usd(c.scaled_usd_per_million),
            Field(checked_text(f)), slow, Field(f.origin),
        ))  # fmt: skip
    note = "Slow end: replicas needed where the prediction's 90 % interval is at its slow end. Each plan is simulated at its peak with its spares down, and at 1.5 times the peak."
    return Table("fleets", "Fleets, cheapest first", columns, tuple(rows), note)


def _risks(plan: Plan) -> Table:
    columns = (_text("The winner with"), _text("SLO"), Column("Over a limit", "% of requests"), Column("Queue > 0.1 s", "% of requests"), Column("Queue p99", "ms"))  # fmt: skip
    rows = tuple(
        (
            Field(name),
            Field("met" if v.met else "MISSED"),
            Field(f"{100 * (1 - v.good_ratio):.2f}", 1 - v.good_ratio),
            Field(f"{100 * v.waited_ratio:.2f}", v.waited_ratio),
            Field(wait_text(v).removesuffix(" ms"), v.wait_p99_s),
        )
        for name, v in plan.risks
    )
    return Table("risks", "Queueing at the peak, with replicas lost (simulated)", columns, rows)


def _growth(plan: Plan) -> Table:
    columns = (Column("Month"), Column("Peak", "requests/s"), Column("Replicas"), Column("Up always", "USD/month"))
    rows = tuple(
        (Field(str(s.month), s.month), Field(f"{s.peak_per_s:.4g}", s.peak_per_s), Field(str(s.num_replicas), s.num_replicas), _usd(s.usd_per_month))
        for s in plan.stages
    )  # fmt: skip
    return Table("growth", f"The winner as demand grows by {plan.demand.growth_per_month:.0%} a month", columns, rows)
