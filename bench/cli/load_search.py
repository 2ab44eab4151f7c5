"""Searches and sweeps of `bench load`: every probe is a run of its own, on the one running server."""

from __future__ import annotations

from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli.load_spec import SECONDS_PER_RATE
from bench.cli.load_text import Speaker, base_cell
from bench.config.experiment import CellSpec, Experiment
from bench.errors import EXIT_DONE, EXIT_SOME_FAILED, BadInput
from bench.runner.load_runs import LoadSession, at_level, with_num_requests
from bench.runner.schedules import REQUESTS_PER_SLOT
from bench.runner.search import LevelResult, Margin, Probe, SearchResult, SweepPoint, find_highest, find_knee
from bench.units import duration_text, significant

if TYPE_CHECKING:
    from bench.catalog.slo import Slo

_BOUNDS = {"rate": (0.01, 10_000.0), "concurrency": (1.0, 4096.0)}


def margins(slo: Slo, values: dict[str, float]) -> tuple[Margin, ...]:
    """How a run stands to each limit, and to the share of requests that must meet all of them."""
    out = []
    for limit in slo.limits:
        if limit.percentile is None:
            continue
        key = f"{limit.metric}_p{limit.percentile:g}_s"
        out.append(Margin(f"{limit.metric} p{limit.percentile:g}", values.get(key), limit.limit_s))
    if slo.min_ratio is not None or not out:
        out.append(Margin("share of good requests", values.get("slo_met_ratio"), slo.required_ratio, at_least=True))
    return tuple(out)


def needed_requests(slo: Slo) -> int:
    """Requests for which every percentile of the SLO is defined, with room for the edges of the window."""
    ranks = [x.percentile for x in slo.limits if x.percentile is not None]
    return max(40, *(ceil(150 / (100 - q)) for q in ranks)) if ranks else 40


def own_requests(level: float, spec: CellSpec) -> int:
    """Requests of a run at this level where the user sets none: ten for each slot, or ten seconds of arrivals.

    The number has to grow with the rate: a hundred requests at 500/s are over before a queue could show that the server
    cannot take them.
    """
    return REQUESTS_PER_SLOT * round(level) if spec.load.kind == "closed_loop" else ceil(SECONDS_PER_RATE * level)


def search(session: LoadSession, experiment: Experiment, slo: Slo | None, o: dict[str, Any], say: Speaker) -> int:
    """Run what --search or --sweep asks for."""
    folders: list[Path] = []
    spec, _ = base_cell(experiment)

    def run(level: float, number: int, least: int) -> dict[str, Any]:
        at, axes = at_level(spec, level)
        # lengths that the user gave stand, but for what the SLO's percentiles need
        given = o["requests"] is not None or o["duration"] is not None
        folders.append(
            session.run(with_num_requests(at, least if given else max(least, own_requests(level, at))), axes)
        )
        return _values(say, folders[-1], slo, level, number)

    if o["sweep"]:
        return _sweep(run, o, say, folders, slo)
    if slo is None:
        raise BadInput("a search needs limits", next_step='give --slo "ttft p99 <= 500 ms"')
    least, kind = needed_requests(slo), o["search"]

    def probe(level: float, number: int) -> Probe:
        entry = run(level, number, max(least, 4 * round(level)) if kind == "concurrency" else least)
        return Probe(level, margins(slo, entry["values"]), entry["folder"])

    low, high = _BOUNDS[kind]
    low, high = o["lowest"] or low, o["highest"] or high
    start = min(max(low, o["rate"] or o["concurrency"] or 1.0), high)

    def told(level: LevelResult) -> None:
        say.line(f"{kind} {level.level:g}: {level.verdict} ({len(level.probes)} runs; {level.why})")

    result = find_highest(
        probe,
        start=start,
        lowest=low,
        highest=high,
        tolerance_ratio=o["tolerance"],
        whole=kind == "concurrency",
        on_level=told,
    )
    say.line(_sentence(kind, result, slo))
    say.end(folders, slo, search=asdict(result))
    return EXIT_DONE if result.status in ("found", "all meet") else EXIT_SOME_FAILED


def _values(say: Speaker, folder: Path, slo: Any, level: float, number: int) -> dict[str, Any]:
    quiet = Speaker(True)
    entry = quiet.run(folder, slo, number)
    say._runs.append(entry)
    return entry


def _sentence(kind: str, result: SearchResult, slo: Slo) -> str:
    unit = " requests/s" if kind == "rate" else " in flight"
    text = slo.text
    if result.status == "found":
        return f"highest {kind} that meets {text}: {result.highest_met:g}{unit} (not met at {result.lowest_not_met:g})"
    if result.status == "none meets":
        return f"not even {kind} {result.lowest_not_met:g}{unit} meets {text}"
    if result.status == "all meet":
        return f"{kind} {result.highest_met:g}{unit}, the highest tried, still meets {text}; raise --highest"
    met = f"{result.highest_met:g}" if result.highest_met is not None else "no level"
    limit = f"{result.lowest_not_met:g}" if result.lowest_not_met is not None else "no level"
    levels = ", ".join(f"{x:g}" for x in result.unresolved_levels) or "none"
    return (
        f"unresolved: {text} is met at {met}, not met at {limit}; noise allows no verdict at {levels}. "
        "Use longer runs (--requests, --duration)"
    )


def _sweep(run: Any, o: dict[str, Any], say: Speaker, folders: list[Path], slo: Any) -> int:
    try:
        levels = sorted({float(x) for x in o["sweep"].split(",")})
    except ValueError:
        raise BadInput(f'expected levels such as 1,2,4,8, got "{o["sweep"]}"', where="--sweep") from None
    points = []
    say.line(f"{'level':>8}{'output tokens/s':>18}{'E2E p50':>12}{'TTFT p50':>12}")
    # Interleaved: repeats of all levels in turn, so that drift does not look like load.
    for number in range(o["repeats"]):
        for level in levels:
            entry = run(level, number, 1)
            v = entry["values"]
            if "output_tokens_per_s" not in v or "e2e_mean_s" not in v:
                raise BadInput(
                    "a run has no steady part to take numbers from",
                    where=entry["folder"],
                    next_step="give more --requests",
                )
            points.append(SweepPoint(level, v["output_tokens_per_s"], v["e2e_mean_s"], entry["folder"]))
            ttft = v.get("ttft_p50_s")
            say.line(
                f"{level:>8g}{significant(v['output_tokens_per_s']):>18}{duration_text(v['e2e_p50_s']):>12}"
                f"{'-' if ttft is None else duration_text(ttft):>12}"
            )
    knee = find_knee(points)
    edge = "; it is at the edge of the sweep, so look further" if knee.at_edge else ""
    spread = "" if knee.low == knee.high else f" (between {knee.low:g} and {knee.high:g})"
    say.line(
        f"knee (throughput / latency is greatest): {knee.level:g}{spread}{edge}; throughput reaches 95 % of its highest, "
        f"{significant(knee.max_throughput_per_s)} tokens/s, at {knee.saturation_level:g}"
    )
    say.end(folders, slo, knee=asdict(knee), points=[asdict(p) for p in points])
    return EXIT_DONE
