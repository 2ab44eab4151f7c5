"""Decision pages: self-host or API, and what fleet to buy. One HTML file that opens from disk, Markdown and pictures.

The HTML of a comparison holds an explorer whose arithmetic (``templates/explorer.js``) is that of ``bench.decide``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import __version__
from bench.decide.decision import Compared, ResolvedOption
from bench.decide.options import ApiOption
from bench.decide.plan import Plan
from bench.errors import StoreError
from bench.records import Warning_
from bench.report import decision_pictures as pictures
from bench.report.decision_tables import COST_FORMULAS, PLAN_FORMULAS, decision_tables, of_prediction, plan_tables
from bench.report.decision_text import (
    answer_sentence,
    autoscaled_text,
    band_lines,
    flip_lines,
    flips_sentence,
    growth_text,
    plan_answer,
    risk_text,
    volume_text,
)
from bench.report.html import inline_svg
from bench.report.markdown import table_lines
from bench.report.model import Chart, Table
from bench.units import significant, usd_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class DecisionFiles:
    """Where the parts of a page were written."""

    html: Path
    markdown: Path
    charts: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything a decision page says."""

    title: str
    why: str
    kind: str  # what it is, in two words
    origin_label: str
    answer: str
    lines: tuple[str, ...]  # further findings, one line each
    charts: tuple[tuple[Chart, Figure], ...]
    tables: tuple[Table, ...]
    formulas: tuple[tuple[str, str], ...]
    warnings: tuple[Warning_, ...]
    explorer: dict[str, Any] | None = None
    mix_hint: str = ""  # what the explorer does to throughput when the ratio moves
    created_utc: str = ""
    version: str = __version__


def write_decision(compared: Compared, out: Path) -> DecisionFiles:
    """Write the page of a comparison to ``out``. Raises StoreError when it cannot be written."""
    return _write(decision_page(compared), out, "decision")


def write_plan(plan: Plan, out: Path) -> DecisionFiles:
    """Write the page of a fleet plan to ``out``. Raises StoreError when it cannot be written."""
    return _write(plan_page(plan), out, "plan")


# --- what the pages say ------------------------------------------------------------------------------------------


def origin_label(origins: Sequence[str]) -> str:
    """The badge on pages and pictures: "" when every throughput was measured."""
    others = sorted({o for o in origins if o != "measured"})
    if not others:
        return ""
    text = " and ".join(others)
    return f"partly {text}" if "measured" in origins else f"throughput {text}, not measured"


def decision_page(compared: Compared) -> Page:
    """The page of a comparison."""
    hosts = [o.option for o in compared.options]
    say = {v: answer_sentence(hosts, compared.apis, compared.mix, v) for v in compared.volumes}
    middle = compared.volumes[len(compared.volumes) // 2]
    flips = [flips_sentence(hosts, compared.apis, compared.mix, v) for v in compared.volumes]
    label = origin_label([h.origin for h in hosts])
    charts = [
        _chart("break_even", "Dollars per month against volume", _break_even_answer(compared), label, compared, pictures.break_even),
        _chart("cost_bars", "Cost per million tokens at full use", _bars_answer(compared), label, compared, pictures.bars),
        _chart("utilisation", "Cost per million tokens against utilisation", _utilisation_answer(compared), label, compared, pictures.utilisation),
    ]  # fmt: skip
    curved = [o.rate.curve for o in compared.options if o.rate.curve is not None]
    if curved:
        speed_label = origin_label([c.origin for c in curved]).replace("throughput ", "")
        charts.append(_chart("speed", "What speed for each user costs", _speed_answer(compared), speed_label, compared, pictures.speed))  # fmt: skip
    missing = () if curved else ("No chart of cost against speed per user: no option has results or simulate.",)
    return Page(
        title=compared.name,
        why=compared.why,
        kind="self-host or API",
        origin_label=label,
        answer=say[middle],
        lines=(*(text for v, text in say.items() if v != middle), *flips, *band_lines(compared), *missing),
        charts=tuple(charts),
        tables=decision_tables(compared),
        formulas=COST_FORMULAS,
        warnings=compared.warnings,
        explorer=explorer_data(compared),
        mix_hint=_mix_hint(compared) + of_prediction(compared, "In brackets and as bars"),
        created_utc=_now(),
    )


def plan_page(plan: Plan) -> Page:
    """The page of a fleet plan."""
    label = origin_label([f.origin for f in plan.fleets])
    label = label.replace("throughput", "capacity")
    scaled = autoscaled_text(plan)
    save = f"{scaled[0].upper()}{scaled[1:]}." if scaled else "Autoscaling would save nothing: the load is flat."
    flips = flip_lines(plan)
    changes = (flips[0][0].upper() + flips[0][1:] + ".") if flips else "There is one candidate only."
    charts = (
        _chart("fleets", "Fleets that meet the SLO", f"Solid: up around the clock; light: autoscaled. {save}", label, plan, pictures.fleets),
        _chart("day", "The day's load and the winner's capacity", f"The peak is {plan.peak_per_s:.4g} requests/s, the mean {sum(plan.rates_per_s) / 24:.4g}; load: {plan.load_source}.", label, plan, pictures.day),
        _chart("sensitivity", "Which fleet is cheapest at which peak", changes, label, plan, pictures.sensitivity),
    )  # fmt: skip
    lines = [f"Runner-up: {plan.why_runner_up_lost}."] if plan.why_runner_up_lost else []
    lines += [scaled] if scaled else []
    lines += flips + [risk_text(name, v) for name, v in plan.risks]
    lines += [growth_text(plan)] if plan.stages else []
    lines = [f"{text[0].upper()}{text[1:]}" for text in lines]
    return Page(
        title=plan.demand.name,
        why=plan.demand.why,
        kind="fleet plan",
        origin_label=label,
        answer=plan_answer(plan) + ".",
        lines=tuple(lines),
        charts=charts,
        tables=plan_tables(plan),
        formulas=PLAN_FORMULAS,
        warnings=plan.warnings,
        created_utc=_now(),
    )


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _chart(name: str, title: str, answer: str, label: str, subject: Any, draw: Any) -> tuple[Chart, Figure]:
    chart = Chart(name, title, answer, origin_label=label)
    return chart, draw(subject, chart)


def _break_even_answer(compared: Compared) -> str:
    found = [p for p in compared.pairs if p.first is not None and p.first.value > 0]
    if not found:
        return "No crossing lies above zero: every pair is decided at any volume."
    first = min(found, key=lambda p: p.first.value if p.first else 0.0)
    assert first.first is not None
    return (
        f"First crossing (circles; bars: its interval): {first.option.name} beats {first.api.name} from "
        f"{volume_text(first.first.value)} tokens a month on. Solid: self-hosted, in whole replicas; dashed: APIs."
        + (
            " Shaded: from the cheapest to the dearest known GPU-hour."
            if any(o.price.band for o in compared.options)
            else ""
        )
    )


def _bars_answer(compared: Compared) -> str:
    host = min((o.option for o in compared.options), key=pictures.full_use)
    api = min(compared.apis, key=lambda a: a.usd_per_token(compared.mix))
    theirs = api.usd_per_token(compared.mix) * 1e6
    return (
        f"Every hour used, {host.name} costs {usd_text(pictures.full_use(host))} per million tokens; the cheapest API, "
        f"{api.name}, {usd_text(theirs)}. Input:output {compared.mix.text}."
    )


def _utilisation_answer(compared: Compared) -> str:
    host = min((o.option for o in compared.options), key=pictures.full_use)
    parts = []
    for a in compared.apis:
        share = pictures.full_use(host) / (a.usd_per_token(compared.mix) * 1e6)
        parts.append(f"{a.name} {share:.0%}" if share <= 1 else f"{a.name} never")
    return f"{pictures.config_name(host)} is cheaper per token above a utilisation of: {', '.join(parts)}."


def _speed_answer(compared: Compared) -> str:
    curved = [o for o in pictures.distinct(compared.options) if o.rate.curve is not None]
    o = min(curved, key=lambda o: pictures.full_use(o.option.at_rate(o.rate.curve.best.total_tokens_per_s.value)))  # type: ignore[union-attr]
    assert o.rate.curve is not None
    usd = o.option.usd_per_replica_hour / 3600 * 1e6
    full = o.rate.curve.best
    fast = max(o.rate.curve.points, key=lambda p: p.output_tokens_per_s_per_user)
    return (
        f"{pictures.config_name(o.option)}: {usd_text(usd / full.total_tokens_per_s.value)} per million at "
        f"{significant(full.output_tokens_per_s_per_user)} tokens/s per user (concurrency {full.concurrency:g}), "
        f"{usd_text(usd / fast.total_tokens_per_s.value)} at {significant(fast.output_tokens_per_s_per_user)} "
        f"(concurrency {fast.concurrency:g}), all at full use. Numbers beside the points: concurrency; dashed: APIs."
    )


def _mix_hint(compared: Compared) -> str:
    moved = [o.option.name for o in compared.options if len(o.rate.mixes) > 1]
    held = [o.option.name for o in compared.options if len(o.rate.mixes) < 2]
    parts = (
        [f"throughput follows the input:output ratio between the known mixes for {', '.join(moved)}"] if moved else []
    )
    parts += [f"throughput is held while the ratio changes for {', '.join(held)} (one mix is known)"] if held else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


# --- the explorer's data -----------------------------------------------------------------------------------------


def explorer_data(compared: Compared) -> dict[str, Any]:
    """What the explorer starts from."""
    mix = compared.mix
    middle = compared.volumes[len(compared.volumes) // 2]
    low, high = pictures.volume_range(compared)
    # open on a pair whose curves cross: two lines that never meet show little
    crossing = [i for i, p in enumerate(compared.pairs) if p.crossing.first_tokens]
    option, api = divmod(crossing[0], len(compared.apis)) if crossing else (0, 0)
    return {
        "option": option,
        "api": api,
        "colors": pictures.colors(compared),
        "input_parts": mix.input_parts,
        "output_parts": mix.output_parts,
        "cached_ratio": mix.cached_ratio,
        "volume": middle,
        "low": low,
        "high": high,
        "options": [_option_data(o) for o in compared.options],
        "apis": [_api_data(a) for a in compared.apis],
    }


def _option_data(o: ResolvedOption) -> dict[str, Any]:
    out = asdict(o.option)
    rate = out.pop("tokens_per_s")
    mixes = [(m.input_ratio, m.tokens_per_s) for m in o.rate.mixes]
    return {
        **out,
        "tokens_per_s": rate["value"],
        "low_tokens_per_s": rate["low"],
        "high_tokens_per_s": rate["high"],
        "mixes": [{"input_ratio": s, "value": e.value, "low": e.low, "high": e.high} for s, e in mixes],
    }


def _api_data(a: ApiOption) -> dict[str, Any]:
    p = a.price
    cached = p.input_per_million if p.cached_input_per_million is None else p.cached_input_per_million
    return {
        "name": a.name,
        "input_per_million": p.input_per_million,
        "cached_per_million": cached,
        "output_per_million": p.output_per_million,
        "discount_ratio": (p.batch_discount_ratio or 0.0) if a.batch else 0.0,
        "cached_ratio": a.cached_ratio,
    }


# --- files -------------------------------------------------------------------------------------------------------


def _write(page: Page, out: Path, stem: str) -> DecisionFiles:
    from bench.report import charts

    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn: dict[str, str] = {}
        written: list[Path] = []
        for chart, figure in page.charts:
            drawn[chart.name] = charts.svg_text(figure)
            written += charts.save(figure, drawn[chart.name], chart.name, out / "charts")
        files = DecisionFiles(out / f"{stem}.html", out / f"{stem}.md", tuple(written))
        files.html.write_text(render_html(page, drawn), encoding="utf-8")
        files.markdown.write_text(render_markdown(page), encoding="utf-8")
    except OSError as e:
        where = str(e.filename or out)
        raise StoreError(f"cannot write the page: {e.strerror or e}", where=where, next_step="give --out DIR") from e
    return files


def render_html(page: Page, svgs: dict[str, str]) -> str:
    """The page as one file; nothing is loaded."""
    import jinja2
    from markupsafe import Markup

    folder = resources.files("bench.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )

    def inside(name: str) -> Markup:
        return Markup((folder / name).read_text(encoding="utf-8"))

    data = json.dumps(page.explorer) if page.explorer is not None else "null"
    return environment.from_string(str(inside("decision.html.j2"))).render(
        p=page,
        css=inside("report.css") + inside("decision.css"),
        sort_js=inside("report.js"),
        arithmetic_js=inside("explorer.js"),
        controls_js=inside("explorer_controls.js"),
        # "</" inside a name must not end the script
        data=Markup(data.replace("</", "<\\/")),
        svg={name: Markup(inline_svg(text, name)) for name, text in svgs.items()},
    )


def render_markdown(page: Page) -> str:
    """The page as Markdown; pictures are linked from charts/ beside it."""
    out = [f"# {page.title}: {page.kind}", ""]
    if page.origin_label:
        out += [f"**{page.origin_label.upper()}**", ""]
    out += [f"> {page.why}", "", f"**{page.answer}**", "", *(f"- {line}" for line in page.lines), ""]
    for chart, _ in page.charts:
        label = f" ({chart.origin_label})" if chart.origin_label else ""
        out += [f"## {chart.title}{label}", "", chart.answer, "", f"![{chart.title}](charts/{chart.name}.png)", ""]
    out += ["## Tables", ""]
    for table in page.tables:
        out += table_lines(table, page.origin_label if table.name in ("costs", "fleets") else "")
    out += ["## Warnings", "", *(f"- {w.severity}: {w.message}; {w.remedy}" for w in page.warnings)]
    out += ["" if page.warnings else "None.", "## Formulas", "", "| What | Formula |", "|---|---|"]
    out += [f"| {name} | {formula.replace('|', '/')} |" for name, formula in page.formulas]
    out += ["", f"Written {page.created_utc} by tokenyield {page.version}."]
    return "\n".join(out).rstrip() + "\n"
