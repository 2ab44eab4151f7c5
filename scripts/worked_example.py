"""Write docs/self-host-or-api.md from configs/: the worked example, every figure computed.

``python scripts/worked_example.py`` writes the page and its pictures; a test fails when the page is out of date.
Simulated figures are deterministic and are labelled so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.catalog.prices import load_prices
from bench.decide.batching import SpeedCurve, batch_curve
from bench.decide.breakeven import crossing
from bench.decide.capacity import ReplicaSpec
from bench.decide.decision import Compared, compare, load_decision
from bench.decide.options import HOURS_PER_MONTH, ApiOption, SelfHost
from bench.report.decision_text import share_text, volume_text
from bench.units import S_PER_HOUR, significant, usd_text

DECISION = "self-host-or-api"
PAGE = Path(__file__).parent.parent / "docs" / "self-host-or-api.md"
#: (GPUs of a replica, GPU, model): what is simulated beside the two of the decision file.
CURVES = (
    (2, "A100-80-SXM", "llama-3.1-70b"),
    (2, "H100-SXM", "llama-3.1-70b"),
    (1, "A100-80-SXM", "llama-3.1-8b"),
    (1, "H100-SXM", "llama-3.1-8b"),
)
ISL, OSL = 333, 667  # 1:2
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def page_text() -> str:
    """The whole page."""
    compared = compare(load_decision(DECISION)[0])
    curves = {
        (n, gpu, model): batch_curve(ReplicaSpec(load_hardware(gpu), load_model(model), n), ISL, OSL, CONCURRENCIES)
        for n, gpu, model in CURVES
    }
    parts = [_intro(compared), _ten_million(compared), _volumes(compared), _clock(compared)]
    parts += [_batching(compared, curves), _claims(compared, curves), _end(compared, curves)]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def _option(compared: Compared, name: str) -> SelfHost:
    return next(o.option for o in compared.options if o.option.name == name)


def _api(compared: Compared, word: str) -> ApiOption:
    return next(a for a in compared.apis if word in a.name)


def _per_million(o: SelfHost) -> float:
    return o.usd_per_replica_hour / S_PER_HOUR / o.tokens_per_s.value * 1e6


def _intro(compared: Compared) -> str:
    rows = [
        f"| {o.option.name} | {usd_text(o.option.usd_per_replica_hour)} an hour for {o.option.num_gpus} GPU{'s' if o.option.num_gpus > 1 else ''}, "
        f"{o.option.tokens_per_s.value:g} tokens/s (assumed) | {o.price.source} |"
        for o in compared.options
        if o.option.billing == "by_hour"
    ]
    for a in compared.apis:
        p = a.price
        rows.append(
            f"| {a.name} | {usd_text(p.input_per_million)} per million in, {usd_text(p.output_per_million)} out | {p.source}, {p.as_of} |"
        )
    table = "\n".join(rows)
    return f"""
# Self-host or API: a worked example

<!-- Written by scripts/worked_example.py from configs/decisions/{DECISION}.yaml; edit those, not this page. -->

At which volume does an open model on rented GPUs beat GPT-4o, and the hosted open models? The figures below are the ones
that popular comparisons use: round prices, and throughputs of 500 and 800 tokens/s that nobody here measured. They are
worth computing because they decide the answer, and because batching moves them by more than any price does.

| Option | Price and throughput | Source |
|---|---|---|
{table}

A month is {HOURS_PER_MONTH:g} hours. Volumes count input and output together at {compared.mix.text} input:output.
`bench breakeven {DECISION}` prints the same figures, `--out DIR` writes them as a page with an explorer. Each formula is in
[cost-model.md](cost-model.md)."""


def _ten_million(compared: Compared) -> str:
    volume = 10e6
    gpt, low, high, fire = (_api(compared, w) for w in ("gpt-4o", "low end", "high end", "Fireworks"))
    i = volume * compared.mix.input_ratio / 1e6
    o = volume / 1e6 - i
    lines = [
        f"- **GPT-4o: {usd_text(gpt.monthly_usd(volume, compared.mix))}** = {i:.2f} M × {usd_text(gpt.price.input_per_million)} "
        f"+ {o:.2f} M × {usd_text(gpt.price.output_per_million)}, that is {usd_text(gpt.usd_per_token(compared.mix) * 1e6)} per million."
    ]
    for name in ("2×A100 by the hour", "1×H100 by the hour"):
        h = _option(compared, name)
        hours = volume / h.tokens_per_s.value / S_PER_HOUR
        lines.append(
            f"- **{name.removesuffix(' by the hour')}: {usd_text(h.monthly_usd(volume))}** of GPU time at full use = 10 M / "
            f"{h.tokens_per_s.value:g} tokens/s = {hours:.2f} h × {usd_text(h.usd_per_replica_hour)}, that is {usd_text(_per_million(h))} per million."
        )
    lines.append(
        f"- **Together: {usd_text(low.monthly_usd(volume, compared.mix))}–{high.monthly_usd(volume, compared.mix):.2f}** and "
        f"**Fireworks: {usd_text(fire.monthly_usd(volume, compared.mix))}** for hosted open models, input and output at one price."
    )
    return "## 10 million tokens a month\n\n" + "\n".join(lines)


def _volumes(compared: Compared) -> str:
    heads = " | ".join(f"{volume_text(v)} a month" for v in compared.volumes)
    rows = []
    for o in compared.options:
        s = o.option
        cells = []
        for v in compared.volumes:
            used = f" ({share_text(s.utilisation(v))} used)" if s.billing == "around_clock" else ""
            cells.append(usd_text(s.monthly_usd(v)) + used)
        rows.append(f"| {s.name} | {' | '.join(cells)} |")
    for a in compared.apis:
        cells = [usd_text(a.monthly_usd(v, compared.mix)) for v in compared.volumes]
        rows += [f"| {a.name} | {' | '.join(cells)} |"]
    table = "\n".join(rows)
    best = "; ".join(f"{volume_text(v)}: {compared.cheapest(v)[0]}" for v in compared.volumes)
    beats_gpt = []
    gpt = _api(compared, "gpt-4o")
    for v in compared.volumes:
        winners = [
            o.option.name for o in compared.options if o.option.monthly_usd(v) < gpt.monthly_usd(v, compared.mix)
        ]
        beats_gpt.append(f"at {volume_text(v)} {', '.join(winners)}")
    return f"""
## The same at 50 million and 1 billion

| | {heads} |
|---|{"--:|" * len(compared.volumes)}
{table}

Cheapest of all: {best}. At these throughputs no self-hosted option beats the hosted open models at any volume: even a GPU
that never idles costs {usd_text(_per_million(_option(compared, "1×H100 by the hour")))} per million tokens. Cheaper than GPT-4o: {"; ".join(beats_gpt)}.

![Dollars per month against tokens per month](pictures/self-host-or-api.png)"""


def _clock(compared: Compared) -> str:
    gpt = _api(compared, "gpt-4o")
    a = gpt.usd_per_token(compared.mix)
    lines = []
    for name in ("1×H100 around the clock", "2×A100 around the clock"):
        o = _option(compared, name)
        found = crossing(o, a)
        assert found.first_tokens is not None
        lines.append(
            f"- {name}: {usd_text(o.usd_per_replica_month)} a month whatever the volume. It overtakes GPT-4o at "
            f"{volume_text(found.first_tokens)} tokens a month, {o.utilisation(found.first_tokens):.0%} used; one replica is full at "
            f"{volume_text(o.capacity_tokens_per_month)}."
        )
    text = "\n".join(lines)
    return f"""
## By the hour or around the clock

By the hour a GPU costs only while it works: that needs a provider that starts and stops within minutes, work that can wait
for the start, and no idle second in between. A service that answers at any time pays around the clock:

{text}"""


def _curve_row(compared: Compared, key: tuple[int, str, str], curve: SpeedCurve) -> str:
    n, gpu, model = key
    usd = _hour_usd(compared, gpu) * n
    cells = []
    for c in (1, 8, 32, 256):
        p = next(p for p in curve.points if p.concurrency == c)
        cells.append(f"{significant(p.total_tokens_per_s.value)} ({significant(p.output_tokens_per_s_per_user)})")
    best = curve.best.total_tokens_per_s
    assert best.low is not None and best.high is not None
    money = f"{usd_text(usd / S_PER_HOUR / best.value * 1e6)} ({usd_text(usd / S_PER_HOUR / best.high * 1e6)} – {usd_text(usd / S_PER_HOUR / best.low * 1e6)})"
    return f"| {n}×{gpu}, {model} | {' | '.join(cells)} | {money} |"


def _hour_usd(compared: Compared, gpu: str) -> float:
    return next(o.option.usd_per_gpu_hour for o in compared.options if o.option.gpu == gpu)


def _where(curve: SpeedCurve, tokens_per_s: float) -> str:
    """Between which concurrencies a throughput lies on the curve."""
    below = [p.concurrency for p in curve.points if p.total_tokens_per_s.value < tokens_per_s]
    above = [p.concurrency for p in curve.points if p.total_tokens_per_s.value >= tokens_per_s]
    if not above:
        return "more than the configuration reaches"
    return f"{max(below):g} to {min(above):g} requests at a time" if below else "a single request at a time"


def _batching(compared: Compared, curves: dict[tuple[int, str, str], SpeedCurve]) -> str:
    rows = "\n".join(_curve_row(compared, k, c) for k, c in curves.items())
    big, small = curves[CURVES[0]], curves[CURVES[3]]
    return f"""
## What batching does to 500 and 800 tokens/s (SIMULATED)

Throughput is not a property of a GPU: it grows with the number of requests served at a time. Simulated with vLLM's
scheduler and the shipped step times (`bench.sim`), requests of {ISL} input and {OSL} output tokens; tokens/s of input and
output together, in brackets the tokens/s that each user sees. Prices as above, at full use; intervals at 90 %.

| SIMULATED | 1 at a time | 8 | 32 | 256 | USD per million at the best |
|---|--:|--:|--:|--:|--:|
{rows}

500 tokens/s on 2×A100 is what a 70B model gives at {_where(big, 500)}; 800 tokens/s on one H100 is what an 8B model gives
at {_where(small, 800)}. Both are lightly loaded engines: full batches raise the 8B model's throughput
{significant(small.best.total_tokens_per_s.value / 800)} times, and the 70B model's on 2×A100, where the KV cache is short of memory, {significant(big.best.total_tokens_per_s.value / 500)} times.

![What speed for each user costs](pictures/self-host-or-api-speed.png)"""


def _claims(compared: Compared, curves: dict[tuple[int, str, str], SpeedCurve]) -> str:
    gpt, fire = _api(compared, "gpt-4o"), _api(compared, "Fireworks")
    api = gpt.usd_per_token(compared.mix) * 1e6
    h100, a100 = _option(compared, "1×H100 around the clock"), _option(compared, "2×A100 around the clock")
    fast = h100.at_rate(curves[CURVES[3]].best.total_tokens_per_s.value)
    rows = []
    for o, text in ((a100, "2×A100 at 500 tokens/s"), (h100, "1×H100 at 800 tokens/s"), (fast, f"1×H100, 8B model, full batches ({significant(fast.tokens_per_s.value)} tokens/s, SIMULATED)")):  # fmt: skip
        cells = []
        for times in (1, 5, 10):
            share = _per_million(o) * times / api
            volume = share * o.capacity_tokens_per_month
            cells.append(f"{share:.0%} ({volume_text(volume)})" if share <= 1 else "never")
        rows.append(f"| {text} | {significant(api / _per_million(o))}× | {' | '.join(cells)} |")
    table = "\n".join(rows)
    hours = (30 / h100.usd_per_replica_hour, 60 / h100.usd_per_replica_hour)
    tokens = tuple(h * S_PER_HOUR * h100.tokens_per_s.value for h in hours)
    offers = [
        p for p in load_prices().gpu_hours if p.commitment == "on_demand" and p.currency == "USD" and not p.example
    ]
    least = min(offers, key=lambda p: p.per_gpu_hour)
    against = fire.usd_per_token(compared.mix) * 1e6
    return f"""
## Popular claims, and what they assume

**"Self-hosting is 5–10× cheaper."** Than GPT-4o at {usd_text(api)} per million, with GPUs paid around the clock, this needs the
following utilisation (in brackets tokens a month on one replica):

| | At full use | as cheap as | 5× cheaper | 10× cheaper |
|---|--:|--:|--:|--:|
{table}

So it holds against a frontier model's list price, for work that an open model of that size does well enough, on GPUs that are
kept busy with full batches. It does not hold against hosted open models: at 800 tokens/s a full H100 costs
{significant(_per_million(h100) / against)} times what Fireworks charges ({usd_text(against)} per million). With full batches of an 8B model it would cost
{significant(_per_million(fast) / against)} times as much (SIMULATED), from {share_text(_per_million(fast) / against)} utilisation on; but such a small model's API price is lower than that of "open models" in general,
so compare with the price of the same model.

**"$30–60 a month."** {usd_text(30)} to {usd_text(60)} buy {hours[0]:g} to {hours[1]:g} hours of one H100 at {usd_text(h100.usd_per_replica_hour)}: {volume_text(tokens[0])} to {volume_text(tokens[1])} tokens at 800 tokens/s, if every
paid second works. It assumes batch work in a few hours a month on a GPU that is given back at once. A server that is always
there costs {usd_text(h100.usd_per_replica_month)} on that H100. The cheapest on-demand GPU of the catalogue ({least.gpu}, {least.provider}, {usd_text(least.per_gpu_hour)} an hour, {least.as_of}) is
{usd_text(least.per_gpu_hour * HOURS_PER_MONTH)} around the clock; whether it holds the model and how fast it serves is another question (`bench fit`)."""


def _end(compared: Compared, curves: dict[tuple[int, str, str], SpeedCurve]) -> str:
    h100 = _option(compared, "1×H100 around the clock")
    fast = h100.at_rate(curves[CURVES[3]].best.total_tokens_per_s.value)
    lines = []
    for word in ("gpt-4o", "high end", "Fireworks", "low end"):
        api = _api(compared, word)
        slow = crossing(h100, api.usd_per_token(compared.mix)).first_tokens
        quick = crossing(fast, api.usd_per_token(compared.mix)).first_tokens
        text = [volume_text(v) if v is not None else "never" for v in (slow, quick)]
        lines.append(f"| {api.name} | {text[0]} | {text[1]} |")
    table = "\n".join(lines)
    return f"""
## Where each option wins

One H100 around the clock ({usd_text(h100.usd_per_replica_month)} a month) is the cheaper one from so many tokens a month on:

| against | at 800 tokens/s | at {significant(fast.tokens_per_s.value)} tokens/s (8B model, full batches, SIMULATED) |
|---|--:|--:|
{table}

- **Hosted open models** win against anything that is paid around the clock at small volumes: they charge nothing for idle
  time. At 500 and 800 tokens/s they win at every volume.
- **Self-hosting by the hour** wins against GPT-4o at any volume, where the work can be batched into few hours. With full
  batches of an 8B model it would also beat hosted open models (SIMULATED: {usd_text(10 * _per_million(fast))} for 10 M tokens), if the model will do and the
  minutes in which the engine starts are few: three of them cost {usd_text(h100.usd_per_replica_hour / 20)}.
- **Self-hosting around the clock** wins above the volumes of the table, and only with the throughput that goes with them.
- **GPT-4o** wins where its quality is needed, or below those volumes.

What is left out here: staff, a second replica for failures, load that is uneven over the day, and the quality of the answers.
A decision file takes the first three (`fixed_usd_per_month`, `min_replicas`, `peak_to_mean`); each moves the break-even up."""


def write_pictures(folder: Path) -> None:
    """The two pictures of the page."""
    from bench.report.charts import save, svg_text
    from bench.report.decision import decision_page

    page = decision_page(compare(load_decision(DECISION)[0]))
    for name, target in (("break_even", "self-host-or-api"), ("speed", "self-host-or-api-speed")):
        figure = next(f for c, f in page.charts if c.name == name)
        save(figure, svg_text(figure), target, folder)[1].unlink()  # the page links the PNG


def main() -> int:
    PAGE.write_text(page_text(), encoding="utf-8")
    write_pictures(PAGE.parent / "pictures")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
