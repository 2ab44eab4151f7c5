"""The tables of a report: one row a cell, every number with its interval, every gap with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.analysis.metrics import METRICS
from bench.decide.cost import TokenCost
from bench.records import Estimate
from bench.report.layout import NOT_SAID, Layout, Placed, axis_tail, axis_title, axis_value, value_text, varying_axes
from bench.report.model import Column, Field, Table
from bench.units import GIB, significant, usd_text

#: metric -> (column title, unit as printed, factor from the base unit)
PRINTED: dict[str, tuple[str, str, float]] = {
    "output_tokens_per_s": ("Output", "tokens/s", 1),
    "total_tokens_per_s": ("Total", "tokens/s", 1),
    "output_tokens_per_s_per_gpu": ("Output per GPU", "tokens/s", 1),
    "output_tokens_per_s_per_user": ("Per user", "tokens/s", 1),
    "requests_per_s": ("Requests", "1/s", 1),
    "goodput_requests_per_s": ("Goodput", "1/s", 1),
    "slo_met_ratio": ("Met SLO", "%", 100),
    "error_ratio": ("Errors", "%", 100),
    "ttft_p50_s": ("TTFT p50", "ms", 1e3),
    "ttft_p90_s": ("TTFT p90", "ms", 1e3),
    "ttft_p95_s": ("TTFT p95", "ms", 1e3),
    "ttft_p99_s": ("TTFT p99", "ms", 1e3),
    "ttft_service_p50_s": ("Service TTFT p50", "ms", 1e3),
    "tpot_p50_s": ("TPOT p50", "ms", 1e3),
    "tpot_p95_s": ("TPOT p95", "ms", 1e3),
    "tpot_p99_s": ("TPOT p99", "ms", 1e3),
    "itl_p50_s": ("ITL p50", "ms", 1e3),
    "itl_p99_s": ("ITL p99", "ms", 1e3),
    "e2e_p50_s": ("E2E p50", "s", 1),
    "e2e_p95_s": ("E2E p95", "s", 1),
    "e2e_p99_s": ("E2E p99", "s", 1),
    "send_lateness_p99_s": ("Send lateness p99", "ms", 1e3),
    "isl_mean_tokens": ("Mean ISL", "tokens", 1),
    "osl_mean_tokens": ("Mean OSL", "tokens", 1),
    "in_flight_mean": ("In flight", "requests", 1),
    "running_mean": ("Running", "requests", 1),
    "waiting_mean": ("Waiting", "requests", 1),
    "step_time_p50_s": ("Step p50", "ms", 1e3),
    "prefill_time_ratio": ("Time in prefill steps", "%", 100),
    "kv_usage_max_ratio": ("KV cache, most", "%", 100),
    "num_preemptions": ("Preemptions", "", 1),
    "prefix_cache_hit_ratio": ("Prefix hits", "%", 100),
    "gpu_util_ratio": ("Utilisation", "%", 100),
    "sm_active_ratio": ("SM active", "%", 100),
    "memory_used_bytes": ("Memory", "GiB", 1 / GIB),
    "power_w": ("Power", "W", 1),
    "energy_j_per_output_token": ("Energy, gross", "J/output token", 1),
    "energy_net_j_per_output_token": ("Energy, net", "J/output token", 1),
    "temperature_max_c": ("Hottest", "°C", 1),
    "throttled_s": ("Throttled", "s", 1),
    "mfu_ratio": ("MFU", "%", 100),
    "mbu_ratio": ("MBU", "%", 100),
    "tp_scaling_ratio": ("TP scaling", "%", 100),
    "window_s": ("Window", "s", 1),
}
THROUGHPUT = ("output_tokens_per_s", "total_tokens_per_s", "output_tokens_per_s_per_gpu", "output_tokens_per_s_per_user", "requests_per_s",
              "goodput_requests_per_s", "slo_met_ratio", "error_ratio", "tp_scaling_ratio")  # fmt: skip
LATENCY = ("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_service_p50_s", "tpot_p50_s", "tpot_p95_s", "tpot_p99_s", "itl_p50_s",
           "itl_p99_s", "e2e_p50_s", "e2e_p95_s", "e2e_p99_s", "send_lateness_p99_s")  # fmt: skip
DEVICES = ("gpu_util_ratio", "sm_active_ratio", "memory_used_bytes", "power_w", "energy_j_per_output_token",
           "energy_net_j_per_output_token", "mfu_ratio", "mbu_ratio", "temperature_max_c", "throttled_s")  # fmt: skip
ENGINE = ("isl_mean_tokens", "osl_mean_tokens", "in_flight_mean", "running_mean", "waiting_mean", "step_time_p50_s",
          "prefill_time_ratio", "kv_usage_max_ratio", "num_preemptions", "prefix_cache_hit_ratio", "window_s")  # fmt: skip
#: Shown even where no cell has a value, because a reader looks for them; the others then go.
_ALWAYS = frozenset(
    {
        "output_tokens_per_s",
        "ttft_p50_s",
        "tpot_p50_s",
        "e2e_p50_s",
        "gpu_util_ratio",
        "energy_j_per_output_token",
        "mfu_ratio",
        "mbu_ratio",
    }
)

Lookup = Callable[[Placed, str], Estimate | None]


def number(value: float, unit: str) -> str:
    """A printed number: three significant digits, but counts and per cents without false decimals."""
    if unit == "%" and abs(value) >= 10:
        return f"{value:.0f}"
    return significant(value, 4 if unit == "tokens" else 3)


def estimate_field(e: Estimate | None, unit: str = "", factor: float = 1.0, why: str = "") -> Field:
    """A table's cell for an estimate; its detail is the interval, or the reason why there is no value."""
    if e is None:
        return Field("n/a", float("-inf"), why or "not measured")
    detail = ""
    if e.low is not None and e.high is not None and e.high > e.low:
        detail = f"{number(e.low * factor, unit)} – {number(e.high * factor, unit)}"
    return Field(number(e.value * factor, unit), e.value * factor, detail)


def axis_columns(layout: Layout) -> tuple[list[Column], Callable[[Placed], list[Field]]]:
    """The columns that name a cell, and what stands in them: TP, load level, and every other axis that varies."""
    names = _other_axes(layout)
    several = len({p.level for p in layout.placed}) > 1
    columns = [Column("Setup", numeric=False), Column(_load_title(layout), numeric=not several)]
    columns += [Column(axis_title(n), numeric=False) for n in names]

    def fields(p: Placed) -> list[Field]:
        load = Field(p.load_text, f"{p.level} {p.x:014.3f}") if several else Field(p.x_text, p.x)
        return [Field(p.line, p.line), load, *(_axis_field(axis_value(p.summary.facts, n)) for n in names)]

    return columns, fields


def _load_title(layout: Layout) -> str:
    levels = {p.level for p in layout.placed}
    return "Load" if len(levels) > 1 else layout.level.replace("_", " ").capitalize()


def _axis_field(value: Any) -> Field:
    return Field(
        "" if value is NOT_SAID else value_text(value),
        value if isinstance(value, (int, float)) else "" if value is NOT_SAID else value_text(value),
    )


def _other_axes(layout: Layout) -> list[str]:
    hidden = {"tensor_parallel_size", "gpu", "load", *(p.level for p in layout.placed)}
    return [n for n in varying_axes([p.summary.facts for p in layout.placed]) if axis_tail(n) not in hidden]


def metric_table(
    name: str, title: str, layout: Layout, keys: Sequence[str], lookup: Lookup, note: str = ""
) -> Table | None:
    """One row a cell, one column a metric; columns that nobody has a value for are left out."""
    shown = [k for k in keys if k in _ALWAYS or any(lookup(p, k) is not None for p in layout.placed)]
    if not any(lookup(p, k) is not None for p in layout.placed for k in shown):
        return None
    head, fields = axis_columns(layout)
    on_gpu = any(p.summary.facts.on_gpu for p in layout.placed)
    columns = [Column(_title(k, on_gpu), PRINTED[k][1], True, METRICS[k].formula) for k in shown]
    rows = []
    for p in layout.placed:
        row = fields(p)
        for k in shown:
            _, unit, factor = PRINTED[k]
            row.append(estimate_field(lookup(p, k), unit, factor, _why(p, k)))
        rows.append((*row, Field(str(len(p.summary.runs)), len(p.summary.runs))))
    return Table(name, title, (*head, *columns, Column("Runs")), tuple(rows), note)


def _title(key: str, on_gpu: bool) -> str:
    title = PRINTED[key][0]
    return title if on_gpu else title.replace("per GPU", "of host")


def _why(p: Placed, key: str) -> str:
    if key == "tp_scaling_ratio":
        return "the smallest TP at this load is the yardstick, or has no result"
    absent = p.summary.absent
    stem = key.rsplit("_p", 1)[0]
    return absent.get(key) or absent.get(f"{stem}_p50_s") or absent.get("*") or "not recorded"


def cost_table(layout: Layout, full: dict[str, TokenCost], stated: dict[str, TokenCost], ratio: float) -> Table | None:
    """Dollars per million tokens of each kind, at full use and at the stated utilisation."""
    if not full:
        return None
    head, fields = axis_columns(layout)
    kinds = (
        ("cost_usd_per_million_output_tokens", "Output"),
        ("cost_usd_per_million_blended_tokens", "Blended"),
        ("cost_usd_per_million_input_tokens", "Input, split"),
        ("cost_usd_per_million_output_tokens_split", "Output, split"),
    )
    share = next(iter(stated.values())).utilisation if stated else 1.0
    uses = [(full, "full use")] + ([(stated, f"{share:.0%} use")] if share < 1 else [])
    columns = [
        Column(f"{title}, {use}", "USD/M", True, METRICS[key].formula) for _, use in uses for key, title in kinds
    ]
    rows = []
    for p in layout.placed:
        row = fields(p)
        for costs, _ in uses:
            cost = costs.get(p.summary.key)
            row += [usd_field(cost.estimates[key] if cost else None) for key, _ in kinds]
        rows.append(tuple(row))
    note = (
        f"Output: all cost charged to output tokens. Blended: all tokens alike. Split: an output token costs {ratio:g} times an "
        "input token (the ratio of GPT-4o's list prices)."
    )
    return Table("cost", "Cost per million tokens", (*head, *columns), tuple(rows), note)


def usd_field(e: Estimate | None) -> Field:
    if e is None:
        return Field("n/a", float("inf"), "no price, or nothing was produced")
    detail = ""
    if e.low is not None:
        detail = (
            f"{usd_text(e.low)} – {usd_text(e.high)}" if e.high is not None else f"{usd_text(e.low)} – no upper end"
        )
    return Field(usd_text(e.value), e.value, detail)


def runs_table(layout: Layout) -> Table:
    """Every run that was counted, so that each estimate can be followed to its folder."""
    head, fields = axis_columns(layout)
    columns = (
        *head,
        Column("Run", numeric=False),
        Column("Output", "tokens/s"),
        Column("TTFT p50", "ms"),
        Column("TPOT p50", "ms"),
        Column("Window", "s"),
        Column("Counted", "requests"),
        Column("Window kind", numeric=False),
    )
    rows = []
    for p in layout.placed:
        for run in p.summary.runs:
            v, w = run.values, run.window
            cells = [
                Field(run.run, run.run),
                *(
                    Field(number(v[k] * f, ""), v[k] * f) if k in v else Field("n/a", float("-inf"))
                    for k, f in (
                        ("output_tokens_per_s", 1.0),
                        ("ttft_p50_s", 1e3),
                        ("tpot_p50_s", 1e3),
                        ("window_s", 1.0),
                    )
                ),
                Field(f"{run.counts.get('num_counted', 0):.0f}", run.counts.get("num_counted", 0.0)),
                Field("" if w is None else w.kind, "" if w is None else w.kind, "" if w is None else w.reason),
            ]
            rows.append((*fields(p), *cells))
    return Table("runs", "Runs", columns, tuple(rows))
