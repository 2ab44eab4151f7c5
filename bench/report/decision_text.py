"""The words of decision pages, and of the commands that print the same: sentences about costs, crossings and fleets."""

from __future__ import annotations

from collections.abc import Sequence

from bench.decide.breakeven import BreakEven, crossing
from bench.decide.capacity import NOTICEABLE_WAIT_S, Verdict
from bench.decide.decision import Compared
from bench.decide.options import ApiOption, Mix, SelfHost
from bench.decide.plan import Plan, SizedFleet
from bench.decide.rates import Rate
from bench.decide.sensitivity import decision_flips
from bench.units import significant, usd_text

NEVER = "never: even as full as it may get, a GPU costs more per token than the API"


def volume_text(tokens: float) -> str:
    """10,000,000 -> '10.0 M'."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= factor * 0.9995:
            return f"{significant(tokens / factor)} {letter}"
    return significant(tokens)


def share_text(ratio: float) -> str:
    """0.004 -> '<1%'."""
    return "<1%" if 0 < ratio < 0.01 else f"{ratio:.0%}"


def crossing_text(pair: BreakEven) -> str:
    """From which volume on, with its interval, in words."""
    if pair.crossing.first_tokens is None or pair.first is None:
        return NEVER
    if pair.crossing.first_tokens == 0:
        return "at any volume"
    text = f"{volume_text(pair.first.value)}/month"
    if pair.first.low is not None:
        high = "never" if pair.never_within_interval or pair.first.high is None else volume_text(pair.first.high)
        text += f" ({volume_text(pair.first.low)} – {high})"
    always = pair.crossing.always_tokens
    if always is not None and always > pair.crossing.first_tokens * 1.001:
        text += f"; for good from {volume_text(always)}"
    return text


def by_price_text(pair: BreakEven) -> str:
    """The crossing at the cheapest and at the dearest known GPU-hour, in words; "" where one price is known."""
    if pair.price_ends is None or pair.by_price is None:
        return ""
    ends = []
    for usd, found in zip(pair.price_ends, pair.by_price, strict=True):
        where = "never" if found.first_tokens is None else f"{volume_text(found.first_tokens)}/month"
        ends.append(f"{where} at {usd_text(usd)}/GPU-h")
    return " to ".join(ends)


def band_lines(compared: Compared) -> list[str]:
    """What the bands of GPU prices are, a line each; bands say what is asked for, not how sure a figure is."""
    out: dict[str, None] = {}
    for o in compared.options:
        if (band := o.price.band) is not None:
            usd = f"{usd_text(band.low_usd)} to {usd_text(band.high_usd)}"
            out[f"GPU-hours of {o.option.gpu} are offered at {usd} ({band.source}); used: {usd_text(o.price.usd)}"] = (
                None
            )
    return list(out)


def mixes_known(rate: Rate) -> str:
    """At which shares of input tokens a throughput is known: '20%, 50% and 80%'."""
    shares = [f"{m.input_ratio:.0%}" for m in rate.mixes]
    if not shares:
        return "not stated"
    return shares[0] if len(shares) == 1 else f"{', '.join(shares[:-1])} and {shares[-1]}"


def answer_sentence(options: Sequence[SelfHost], apis: Sequence[ApiOption], mix: Mix, volume_tokens: float) -> str:
    """The decision at one volume in one sentence. ``explorer.js`` says the same, word by word."""
    host = min(options, key=lambda o: o.monthly_usd(volume_tokens))
    api = min(apis, key=lambda a: a.monthly_usd(volume_tokens, mix))
    ours, theirs = host.monthly_usd(volume_tokens), api.monthly_usd(volume_tokens, mix)
    found = crossing(host, api.usd_per_token(mix))
    if found.first_tokens is None or found.always_tokens is None:
        when = f"never beats {api.name}, whatever the volume"
    elif found.first_tokens == 0:
        when = f"beats {api.name} at any volume"
    elif found.always_tokens > found.first_tokens * 1.001:
        when = (
            f"beats {api.name} from {volume_text(found.first_tokens)} tokens a month on, "
            f"for good from {volume_text(found.always_tokens)}"
        )
    else:
        when = f"beats {api.name} from {volume_text(found.first_tokens)} tokens a month on"
    head = f"At {volume_text(volume_tokens)} tokens a month"
    if ours <= theirs:
        times = "" if not ours > 0 else f", {significant(theirs / ours)} times as much"
        return (
            f"{head}, self-hosting is cheapest: {host.name} for {usd_text(ours)} a month; the cheapest API, {api.name}, "
            f"costs {usd_text(theirs)}{times}; {host.name} {when}."
        )
    times = "" if not theirs > 0 else f", {significant(ours / theirs)} times as much"
    return (
        f"{head}, an API is cheapest: {api.name} for {usd_text(theirs)} a month; the cheapest self-hosted option, "
        f"{host.name}, costs {usd_text(ours)}{times}; {host.name} {when}."
    )


def plan_answer(plan: Plan) -> str:
    """The plan in one sentence."""
    best = plan.fleets[0]
    c = best.cost
    spare = c.num_replicas - c.num_serving
    return (
        f"{c.num_replicas} × {best.name} ({c.num_gpus} GPUs, {c.num_serving} to serve and {spare} spare) carry "
        f"{plan.peak_per_s:.4g} requests/s within {plan.slo.text} for ${c.always_usd_per_month:,.0f} a month"
        f" (${c.always_usd_per_million:.3g} per million tokens)"
    )


def flips_sentence(options: Sequence[SelfHost], apis: Sequence[ApiOption], mix: Mix, volume_tokens: float) -> str:
    """What must change before the answer at a volume flips, in one sentence."""
    found = decision_flips(options, apis, mix, volume_tokens)
    head = f"At {volume_text(volume_tokens)} tokens a month"
    if not found:
        return f"{head} nothing flips the answer within a factor of 100 in price, throughput or volume."
    words = {"gpu_price": "GPU prices were", "throughput": "throughput were", "api_price": "API prices were"}
    parts = []
    for f in found:
        if f.lever == "volume":
            parts.append(f"the volume were {volume_text(volume_tokens * f.factor)} ({f.winner})")
        else:
            parts.append(f"{words[f.lever]} {significant(f.factor)} times as high ({f.winner})")
    return f"{head} the answer flips if, each alone, {'; or '.join(parts)}."


def autoscaled_text(plan: Plan) -> str:
    """Which fleet is cheapest when it follows the day; "" where autoscaling saves nothing."""
    best = min(plan.fleets, key=lambda f: f.cost.scaled_usd_per_month)
    c = best.cost
    if c.scaled_usd_per_month >= plan.fleets[0].cost.always_usd_per_month * (1 - 1e-9):
        return ""
    same = "the same fleet" if best is plan.fleets[0] else f"{c.num_replicas} × {best.name}"
    return (
        f"with autoscaling (engines start in {plan.demand.engine_start_s:g} s, paid meanwhile) {same} is cheapest: "
        f"{usd_text(c.scaled_usd_per_month)} a month, {usd_text(c.scaled_usd_per_million)} per million tokens"
    )


def checked_text(f: SizedFleet) -> str:
    """What the simulation of the peak said, in one cell of a table."""
    if f.at_peak is None:
        return f.origin  # measured or imported: the load itself met the SLO
    met = "met" if f.at_peak.met else "MISSED"
    beyond = "" if f.beyond is None else f"; at 1.5×: {'met' if f.beyond.met else 'missed'}"
    return f"{met}, worst at {f.at_peak.worst:.0%} of its limit{beyond}"


def wait_text(v: Verdict) -> str:
    """The 99th percentile of waiting in the engine's queue."""
    return "∞" if v.wait_p99_s == float("inf") else f"{v.wait_p99_s * 1e3:,.0f} ms"


def risk_text(name: str, v: Verdict) -> str:
    """What the peak does to the winner with some replicas lost, in one line."""
    return (
        f"at the peak, {name}: SLO {'met' if v.met else 'MISSED'}; {1 - v.good_ratio:.1%} of requests over a limit, "
        f"{v.waited_ratio:.1%} queue for longer than {NOTICEABLE_WAIT_S:g} s, queue p99 {wait_text(v)} (SIMULATED)"
    )


def growth_text(plan: Plan) -> str:
    """Now and at the horizon; "" without growth."""
    if not plan.stages:
        return ""
    now, then = plan.stages[0], plan.stages[-1]
    return (
        f"growth of {plan.demand.growth_per_month:.0%} a month: {now.num_replicas} replicas "
        f"({usd_text(now.usd_per_month)} a month) now, {then.num_replicas} ({usd_text(then.usd_per_month)}) in "
        f"{then.month} months; fleets are sized for the latter"
    )


def flip_lines(plan: Plan) -> list[str]:
    """What must change before the answer flips, one line each."""
    f = plan.flips
    if f is None:
        return []
    best, out = plan.fleets[0].name, []
    if f.price_factor is not None:
        out.append(f"flips if the price of {best} rises {f.price_factor - 1:.0%} (then {f.price_winner})")
    if f.throughput_factor is not None:
        less = 1 - f.throughput_factor
        out.append(f"flips if its capacity is {less:.0%} lower than thought (then {f.throughput_winner})")
    if f.less_volume_factor is not None:
        peak = f.less_volume_factor * plan.peak_per_s
        out.append(f"flips if the peak is only {peak:.3g} requests/s (then {f.less_volume_winner})")
    if f.more_volume_factor is not None:
        peak = f.more_volume_factor * plan.peak_per_s
        out.append(f"flips if the peak is {peak:.3g} requests/s (then {f.more_volume_winner})")
    return out or ["nothing flips it within a factor of ten in price, capacity or volume"]
