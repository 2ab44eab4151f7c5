"""The numbers of one run that come from its requests and chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.analysis import metrics as m
from bench.analysis.columns import RequestColumns
from bench.analysis.run_facts import RunFacts
from bench.analysis.stats import percentile
from bench.analysis.steady_state import Window
from bench.analysis.steps import tokens_of_steps
from bench.store import CHUNKS, RunReader

if TYPE_CHECKING:
    from bench.catalog.slo import Slo


def counted_requests(c: RequestColumns, window: Window) -> RequestColumns:
    """The requests whose latencies count: measured ones that were due in the window (they may end after it).

    Choosing by the due time favours neither short nor long requests, as choosing by completion would.
    """
    return c.where((c.phase == "measured") & window.holds(c.due_s))


def request_metrics(
    everything: RequestColumns, window: Window, facts: RunFacts, slo: Slo | None
) -> tuple[dict[str, float], dict[str, str]]:
    c = counted_requests(everything, window)
    served = everything.where(everything.phase != "warmup")
    start, end, length = window.start_s, window.end_s, window.length_s
    output, prompt = m.output_tokens_in(served, start, end), m.input_tokens_in(served, start, end)
    values: dict[str, float] = {
        "window_s": length,
        "output_tokens_per_s": output / length,
        "input_tokens_per_s": prompt / length,
        "total_tokens_per_s": (output + prompt) / length,
        "output_tokens_per_s_per_gpu": output / length / facts.num_devices,
        "total_tokens_per_s_per_gpu": (output + prompt) / length / facts.num_devices,
        "requests_per_s": m.completed_in(served, start, end) / length,
        "in_flight_mean": m.in_flight_mean(served, start, end),
    }
    absent: dict[str, str] = {}
    if not facts.devices_known:
        for key in ("output_tokens_per_s_per_gpu", "total_tokens_per_s_per_gpu"):
            del values[key]
            absent[key] = facts.why_no_devices
    if facts.origin == "imported" and np.isnan(served.done_s).any():
        del values["in_flight_mean"]
        absent["in_flight_mean"] = "the file does not say when failed requests ended"
    ended = c.where(c.error != "aborted")  # cut off by the stop rule: neither served nor failed
    if len(ended):
        values["error_ratio"] = 1 - np.count_nonzero(ended.ok) / len(ended)
    for key, column in (("isl_mean_tokens", c.isl[c.ok]), ("osl_mean_tokens", c.osl[c.ok])):
        if len(column) and not np.isnan(column).all():
            values[key] = float(np.nanmean(column))
    cached = c.num_cached_tokens[c.ok]
    if len(cached) and not np.isnan(cached).all() and np.nansum(c.isl[c.ok]) > 0:
        values["prefix_cache_hit_ratio"] = float(np.nansum(cached) / np.nansum(c.isl[c.ok]))
    distributions = {"ttft": m.ttft_s(c), "ttft_service": m.ttft_service_s(c), "tpot": m.tpot_s(c), "e2e": m.e2e_s(c)}
    if facts.schedule_kind in ("open_loop", "trace"):
        distributions["send_lateness"] = m.send_lateness_s(c)
    for key, data in distributions.items():
        _distribution(key, data, values, absent)
    if values.get("tpot_p50_s"):
        values["output_tokens_per_s_per_user"] = 1 / values["tpot_p50_s"]
    if slo is not None:
        from bench.analysis.goodput import met_slo

        met = int(np.count_nonzero(met_slo(ended, slo)))
        values["goodput_requests_per_s"] = met / length
        if len(ended):
            values["slo_met_ratio"] = met / len(ended)
    else:
        absent["goodput_requests_per_s"] = "no SLO was given (`slo:` in the experiment)"
    return values, absent


def _distribution(key: str, data: np.ndarray, values: dict[str, float], absent: dict[str, str]) -> None:
    known = data[~np.isnan(data)]
    if not len(known):
        absent[f"{key}_p50_s"] = "undefined for every counted request"
        return
    values[f"{key}_mean_s"] = float(known.mean())
    for q in m.PERCENTILES:
        found = percentile(known, q)
        if found is None:
            absent[f"{key}_p{q}_s"] = f"too few requests for a p{q} (it needs {round(100 / (100 - q))} in a run)"
        else:
            values[f"{key}_p{q}_s"] = found


def chunk_metrics(
    run: RunReader, everything: RequestColumns, window: Window, values: dict[str, float], absent: dict[str, str]
) -> None:
    table = run.table(CHUNKS)
    if table is None or not table.num_rows:
        absent["itl_p50_s"] = "no chunks were recorded (nothing was streamed)"
        return
    index = np.asarray(table.column("index"), dtype=np.int64)
    c = counted_requests(everything, window)
    counted = c.index[c.ok]
    tokens = np.asarray(table.column("tokens"), dtype=np.int64)
    inside = np.isin(index, counted)
    if inside.any():
        values["tokens_per_chunk"] = float(tokens[inside].mean())
    _distribution("itl", m.itl_s(index, np.asarray(table.column("t_s"), dtype=np.float64), counted), values, absent)


def counts(c: RequestColumns, window: Window, steps: dict[str, np.ndarray] | None) -> dict[str, float]:
    served = c.where(c.phase != "warmup")
    counted = counted_requests(c, window)
    out = {
        "num_requests": float(len(c)),
        "num_warmup": float(np.count_nonzero(c.phase == "warmup")),
        "num_counted": float(len(counted)),
        "num_counted_ok": float(np.count_nonzero(counted.ok)),
        "window_output_tokens": m.output_tokens_in(served, window.start_s, window.end_s),
        "window_input_tokens": m.input_tokens_in(served, window.start_s, window.end_s),
        "all_output_tokens": float(np.nansum(c.osl)),
        "all_input_tokens": float(np.nansum(c.isl)),
        "all_cached_tokens": float(np.nansum(c.num_cached_tokens)),
        "num_with_output": float(np.count_nonzero(np.nan_to_num(c.osl) > 0)),
        "num_preempted": float(np.nansum(c.num_preemptions)),
    }
    if steps is not None:
        out["step_prefill_tokens"], out["step_decode_tokens"] = tokens_of_steps(steps)
        out["num_steps"] = float(len(steps["t_s"]))
    return out
