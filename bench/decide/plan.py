"""The cheapest fleets for a demand and an SLO: search, check by simulating the demand, say why the others lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware, load_hardware
from bench.catalog.model import load_model
from bench.catalog.prices import PriceBook, load_prices
from bench.catalog.slo import Slo, load_slo
from bench.config.demand import CandidateSpec, Demand
from bench.decide.capacity import (
    Capacity,
    ReplicaSpec,
    Traffic,
    Verdict,
    batch_limits,
    capacity,
    replica_model,
    run_fleet,
    with_limits,
)
from bench.decide.fleet import (
    FleetCost,
    Flips,
    Rival,
    fleet_cost,
    flips,
    replicas_for,
    with_redundancy,
)
from bench.decide.measured import measured_capacity
from bench.decide.traffic import growth_factor, load_of
from bench.errors import BadInput
from bench.records import Warning_
from bench.sim.profile import load_profile
from bench.units import usd_text

#: A check simulates this many requests at the peak, and at least this many seconds of it.
CHECK_REQUESTS = 3000
CHECK_S = 60.0
#: How often the check may add a replica before the candidate is given up.
MAX_ADDED = 3
#: Beyond this rate per GPU price, the search looks at no more than this many of the best candidates in full.
NUM_CHECKED = 6


@dataclass(frozen=True, slots=True)
class SizedFleet:
    """A candidate sized and priced, with the checks that were made."""

    name: str
    spec: ReplicaSpec | None
    capacity_per_s: float
    capacity_source: str
    origin: str
    trust: str
    usd_per_gpu_hour: float
    price_source: str
    gpus_per_replica: int
    cost: FleetCost
    at_peak: Verdict | None  # the serving replicas alone (redundancy down) at the peak
    beyond: Verdict | None  # the same at 1.5 x the peak
    num_conservative: int | None  # serving replicas at the bad end of the prediction's interval
    interval_text: str
    added: int = 0  # replicas that the check had to add


@dataclass(frozen=True, slots=True)
class Lost:
    """A candidate that is no plan, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stage:
    """The winning configuration at one month of the growth."""

    month: int
    peak_per_s: float
    num_replicas: int
    usd_per_month: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of `bench plan`. Rates are those at the horizon."""

    demand: Demand
    slo: Slo
    rates_per_s: tuple[float, ...]
    peak_per_s: float
    fleets: tuple[SizedFleet, ...]  # cheapest first
    lost: tuple[Lost, ...]
    why_runner_up_lost: str
    flips: Flips | None
    warnings: tuple[Warning_, ...]
    load_source: str = ""
    stages: tuple[Stage, ...] = ()  # empty without growth
    risks: tuple[tuple[str, Verdict], ...] = ()  # the winner at the peak with ever fewer replicas


@dataclass(frozen=True, slots=True)
class _Priced:
    spec: CandidateSpec
    hardware: Hardware
    usd_per_gpu_hour: float
    source: str


def make_plan(demand: Demand, progress: Callable[[str], None] = lambda text: None) -> Plan:
    """Search the candidates of ``demand``.

    Raises:
        BadInput: a model, GPU, price or SLO that is not known, or a demand that no candidate can meet (with the nearest
        miss and what to change).
    """
    slo, model = load_slo(demand.slo), load_model(demand.model)
    _check_slo(slo)
    today = load_of(demand)
    load = today.grown(growth_factor(demand))
    traffic, rates, peak = load.traffic, load.rates_per_s, load.peak_per_s
    book = load_prices()
    priced = [_price(c, book) for c in demand.candidates]
    found, lost = _capacities(demand, priced, model, traffic, slo, progress)
    if not found:
        raise _nobody(demand, slo, lost)
    sized = [_size(demand, p, c, traffic, rates, peak) for p, c in found]
    sized.sort(key=lambda f: f.cost.always_usd_per_month)
    checked: list[SizedFleet] = []
    for fleet in sized[:NUM_CHECKED]:
        progress(f"checking {fleet.name}")
        result = _check(demand, fleet, traffic, slo, rates, peak)
        if isinstance(result, Lost):
            lost.append(result)
        else:
            checked.append(result)
    if not checked:
        raise _nobody(demand, slo, lost)
    rest = [Lost(f.name, f"more expensive: ${f.cost.always_usd_per_month:,.0f} a month") for f in sized[NUM_CHECKED:]]
    checked.sort(key=lambda f: f.cost.always_usd_per_month)
    rivals = [_rival(demand, f) for f in [*checked, *sized[NUM_CHECKED:]]]
    return Plan(
        demand=demand,
        slo=slo,
        rates_per_s=rates,
        peak_per_s=peak,
        fleets=tuple(checked),
        lost=(*lost, *rest),
        why_runner_up_lost=_why(checked),
        flips=flips(rivals[0], rivals[1:], peak) if len(rivals) > 1 else None,
        warnings=_warnings(checked[0]),
        load_source=load.source,
        stages=_stages(demand, rivals[0], today.peak_per_s),
        risks=_risks(checked[0], traffic, peak, slo),
    )


def _check_slo(slo: Slo) -> None:
    """Refuse before anything is simulated what a simulation without per-token times cannot judge."""
    for limit in slo.limits:
        if limit.metric == "itl":
            raise BadInput("SLO: a plan cannot judge itl", where=slo.text, next_step="give the limit as tpot")


def _stages(demand: Demand, winner: Rival, peak_now_per_s: float) -> tuple[Stage, ...]:
    """The winner's fleet month by month (at most 13 of them), from now to the horizon."""
    if not demand.horizon_months or not demand.growth_per_month:
        return ()
    step = -(-demand.horizon_months // 12)
    months = sorted({*range(0, demand.horizon_months + 1, step), demand.horizon_months})
    peaks = [peak_now_per_s * growth_factor(demand, m) for m in months]
    return tuple(
        Stage(m, p, winner.num_replicas(p), winner.usd_per_month(p)) for m, p in zip(months, peaks, strict=True)
    )


def _risks(fleet: SizedFleet, traffic: Traffic, peak: float, slo: Slo) -> tuple[tuple[str, Verdict], ...]:
    """The winner at its peak: whole, with its spares lost, and with one replica lost beyond them."""
    if fleet.spec is None or fleet.at_peak is None:
        return ()
    model = replica_model(fleet.spec, traffic.longest_tokens)
    assert not isinstance(model, str)
    serving, total = fleet.cost.num_serving, fleet.cost.num_replicas
    n = max(CHECK_REQUESTS, int(peak * CHECK_S))
    out = []
    if total > serving:
        whole = run_fleet(model, total, traffic, peak, slo, num_requests=n)
        out.append((f"all {total} replicas up", whole))
    out.append((f"{serving} up (spares lost)" if total > serving else f"all {serving} up (no spares)", fleet.at_peak))
    if serving > 1:
        less = run_fleet(model, serving - 1, traffic, peak, slo, num_requests=n)
        out.append((f"{serving - 1} up (one more lost)", less))
    return tuple(out)


def _price(c: CandidateSpec, book: PriceBook) -> _Priced:
    hardware = load_hardware(c.gpu)
    if c.usd_per_gpu_hour is not None:
        return _Priced(c, hardware, c.usd_per_gpu_hour, "your own price")
    if c.price is not None:
        offer = book.gpu_price(c.price, hardware.name)
        if offer.currency != "USD":
            raise BadInput(f"price {offer.id} is in {offer.currency}", next_step="give one in USD")
        return _Priced(c, hardware, offer.per_gpu_hour, f"{offer.provider}, {offer.as_of}")
    found = book.gpu_range(hardware.name)
    n = len(found.offers)
    text = f"median of {n} on-demand offers ({found.low.text} to {found.high.text})"
    return _Priced(c, hardware, found.typical.amount, text)


def _capacities(
    demand: Demand,
    priced: list[_Priced],
    model: ModelArch,
    traffic: Traffic,
    slo: Slo,
    progress: Callable[[str], None],
) -> tuple[list[tuple[_Priced, Capacity]], list[Lost]]:
    """The best batch limits of every (GPU, TP, precision), simulated side by side; and who cannot serve at all."""
    jobs: list[tuple[_Priced, ReplicaSpec]] = []
    found: list[tuple[_Priced, Capacity]] = []
    lost: list[Lost] = []
    for p in priced:
        if p.spec.results is not None:
            found += [(p, c) for c in measured_capacity(p.spec.results, p.hardware, slo)]
            continue
        profile = load_profile(Path(p.spec.profile)) if p.spec.profile else None
        jobs += [
            (p, ReplicaSpec(p.hardware, model, tp, quantization, profile=profile))
            for quantization in p.spec.quantizations
            for tp in p.spec.tensor_parallel_sizes
        ]

    def work(job: tuple[_Priced, ReplicaSpec]) -> tuple[_Priced, list[Capacity]]:
        p, spec = job
        progress(f"simulating {spec.name}")
        first = capacity(spec, traffic, slo)
        tries = [first]
        if first.model is not None:
            tries += [capacity(with_limits(spec, limits), traffic, slo) for limits in batch_limits(p.hardware)[1:]]
        return p, tries

    # the compiled simulation releases the interpreter's lock, so two threads use two cores
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (_, spec), (p, tries) in zip(jobs, pool.map(work, jobs), strict=True):
            best = max(tries, key=lambda c: c.rate_per_s or 0.0)
            if best.rate_per_s:
                found.append((p, best))
            else:
                lost.append(Lost(spec.name, tries[0].reason))
    return found, lost


def _size(
    demand: Demand, p: _Priced, c: Capacity, traffic: Traffic, rates: tuple[float, ...], peak: float, more: int = 0
) -> SizedFleet:
    assert c.rate_per_s is not None
    serving = replicas_for(peak, c.rate_per_s, demand.headroom) + more
    gpus = c.num_gpus
    cost = _cost(demand, c.rate_per_s, serving, gpus, p.usd_per_gpu_hour, traffic, rates)
    trust = c.model.step_time.trust if c.model is not None else c.origin
    interval = c.model.step_time.interval("ttft") if c.model is not None else None
    text = "" if interval is None else f"{interval.low_ratio:.2f} – {interval.high_ratio:.2f} × (90 %)"
    name = c.name
    return SizedFleet(
        name, c.model.spec if c.model else None, c.rate_per_s, c.source, c.origin, trust, p.usd_per_gpu_hour, p.source,
        gpus, cost, None, None, None, text, more,
    )  # fmt: skip


def _cost(
    demand: Demand, rate: float, serving: int, gpus: int, usd: float, traffic: Traffic, rates: tuple[float, ...]
) -> FleetCost:
    return fleet_cost(
        capacity_per_s=rate,
        num_serving=serving,
        num_replicas=with_redundancy(serving, demand.spare_replicas, demand.zones),
        gpus_per_replica=gpus,
        usd_per_gpu_hour=usd,
        rates_per_s=rates,
        tokens_per_request=traffic.tokens_per_request,
        headroom=demand.headroom,
        engine_start_s=demand.engine_start_s,
    )


def _check(
    demand: Demand, fleet: SizedFleet, traffic: Traffic, slo: Slo, rates: tuple[float, ...], peak: float
) -> SizedFleet | Lost:
    """Simulate the peak against the serving replicas behind the router; add replicas while the SLO is missed."""
    if fleet.spec is None:
        return fleet  # a measured capacity: nothing to simulate with
    model = replica_model(fleet.spec, traffic.longest_tokens)
    assert not isinstance(model, str)
    n = max(CHECK_REQUESTS, int(peak * CHECK_S))
    for added in range(MAX_ADDED + 1):
        serving = fleet.cost.num_serving + added
        at_peak = run_fleet(model, serving, traffic, peak, slo, num_requests=n)
        if at_peak.met:
            break
    else:
        worst = max(at_peak.values, key=lambda k: at_peak.values[k])
        return Lost(fleet.name, f"{serving} replicas miss the SLO at the peak ({worst}: {at_peak.values[worst]:.3g} s)")
    beyond = run_fleet(model, serving, traffic, 1.5 * peak, slo, num_requests=int(1.5 * n))
    stretch = max((i.high_ratio for m in ("ttft", "tpot") if (i := model.step_time.interval(m))), default=1.0)
    worst_case = capacity(fleet.spec, traffic, slo, stretch=stretch)
    conservative = (
        replicas_for(peak, worst_case.rate_per_s, demand.headroom) if worst_case.rate_per_s is not None else None
    )
    cost = _cost(demand, fleet.capacity_per_s, serving, fleet.gpus_per_replica, fleet.usd_per_gpu_hour, traffic, rates)
    return replace(fleet, cost=cost, at_peak=at_peak, beyond=beyond, num_conservative=conservative, added=added)


def _rival(demand: Demand, f: SizedFleet) -> Rival:
    return Rival(
        f.name,
        f.capacity_per_s,
        f.usd_per_gpu_hour * f.gpus_per_replica,
        demand.spare_replicas,
        demand.zones,
        demand.headroom,
    )


def _why(fleets: list[SizedFleet]) -> str:
    """Why the second lost to the first, in the terms that decide: price per unit of capacity, or rounding up."""
    if len(fleets) < 2:
        return ""
    a, b = fleets[0], fleets[1]
    per_a = a.usd_per_gpu_hour * a.gpus_per_replica / a.capacity_per_s
    per_b = b.usd_per_gpu_hour * b.gpus_per_replica / b.capacity_per_s
    more = b.cost.always_usd_per_month / a.cost.always_usd_per_month - 1
    head = f"{b.name} costs {more:.0%} more: "
    if per_b > per_a:
        text = (
            f"an hour's price per request/s is {usd_text(per_b)} against {usd_text(per_a)} "
            f"({b.capacity_per_s:.3g} requests/s for ${b.usd_per_gpu_hour * b.gpus_per_replica:.2f}/h a replica, "
            f"against {a.capacity_per_s:.3g} for ${a.usd_per_gpu_hour * a.gpus_per_replica:.2f}/h)"
        )
    else:
        text = (
            f"its capacity is cheaper (${per_b:.4g} against ${per_a:.4g} per request/s and hour), but whole replicas and "
            f"redundancy round up to {b.cost.num_replicas} against {a.cost.num_replicas}"
        )
    return head + text


def _warnings(winner: SizedFleet) -> tuple[Warning_, ...]:
    out = []
    if winner.origin == "simulated":
        text = f"capacities are simulated ({winner.trust}: {winner.capacity_source}), not measured"
        out.append(Warning_("simulated", text, "rent one GPU for an hour, `bench calibrate` on it, and plan again"))
    if winner.num_conservative is not None and winner.num_conservative > winner.cost.num_serving:
        text = (
            f"at the slow end of the prediction's 90 % interval {winner.num_conservative} serving replicas are needed, "
            f"not {winner.cost.num_serving}"
        )
        out.append(
            Warning_("prediction-interval", text, "measure before you buy; the interval shrinks with calibration")
        )
    elif winner.origin == "simulated" and winner.num_conservative is None:
        text = "at the slow end of the prediction's 90 % interval this configuration misses the SLO at any load"
        out.append(Warning_("prediction-interval", text, "measure before you buy"))
    return tuple(out)


def _nobody(demand: Demand, slo: Slo, lost: list[Lost]) -> BadInput:
    """Nobody can serve: the most telling reason, and what to change."""
    misses = [x for x in lost if "misses the SLO" in x.reason]
    first = misses[0] if misses else lost[0]
    step = (
        "relax the SLO, or add faster GPUs or higher tensor parallelism"
        if misses
        else "add GPUs with more memory, or a smaller precision"
    )
    return BadInput(
        f"no candidate can serve {demand.model} within {slo.text}: {first.name}: {first.reason}",
        where="plan",
        next_step=step,
    )
