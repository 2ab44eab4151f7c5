"""Doubts about a measurement: typed warnings, each with its cause and its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from bench.analysis.run_facts import RunFacts
from bench.analysis.stats import outliers
from bench.analysis.steady_state import MIN_STEADY_S
from bench.records import Estimate, Warning_
from bench.telemetry.window import cross_check_activity
from bench.units import duration_text

if TYPE_CHECKING:
    from bench.analysis.summary import RunSummary

Severity = Literal["note", "warning", "serious"]


class _Add(Protocol):
    """Takes down one warning."""

    def __call__(
        self, code: str, message: str, remedy: str, severity: Severity = "warning", size: float = 0.0
    ) -> None: ...


MIN_RUNS = 3
MIN_CPU_WINDOW_S = 5.0
ERROR_WARNING_RATIO = 0.01
ERROR_SERIOUS_RATIO = 0.05
LATENESS_WARNING_S = 0.010
PREFIX_HIT_RATIO = 0.01
SPREAD_RATIO = 0.05
#: Gravest first.
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")
AT_WORST = "at worst, "
KV_SPREAD_RATIO = 0.02
#: Cores kept busy by something else just before a run, while the engine was idle.
HOST_BUSY_RATIO = 0.15
#: Below this share of both peaks something other than the device sets the pace.
FAR_BELOW_RATIO = 0.30


def run_warnings(facts: RunFacts, run: RunSummary, problems: tuple[str, ...]) -> tuple[Warning_, ...]:
    """Every doubt about one run."""
    found: list[Warning_] = []

    def add(code: str, message: str, remedy: str, severity: Severity = "warning", size: float = 0.0) -> None:
        found.append(Warning_(code, message, remedy, severity, facts.run, size))

    _origin(facts, add)
    for problem in problems:
        add(
            "torn-file", problem, "nothing to do: what was complete has been kept; run again for a whole record", "note"
        )
    if run.window is None:
        add("nothing-measured", "no measured request was sent", "look at engine.log in the run's folder", "serious")
        return tuple(found)
    _window(facts, run, add)
    _errors(run, add)
    _telemetry(facts, run, add)
    _client(facts, run, add)
    _engine(facts, run, add)
    if facts.fleet is None or not facts.fleet.prefill:  # a decode pool computes the last prompt token a second time
        _tokens(run, add)
    return tuple(found)


def _origin(facts: RunFacts, add: _Add) -> None:
    if facts.origin == "simulated":
        source = _note(facts, "step_time_source") or facts.engine.get("version") or "the simulator"
        add("simulated", f"simulated, not measured ({source})", "measure the configurations that matter", "note")
    elif facts.origin == "imported":
        source = facts.manifest.get("imported_from") or "another tool's file"
        add("imported", f"imported from {source}, not measured here", "trust it as far as its source", "note")
        _imported(facts, add)
    weights = facts.spec.weights if facts.spec is not None else facts.manifest.get("weights")
    if weights == "dummy" and facts.origin == "measured":
        add(
            "dummy-weights",
            "random weights: throughput and memory hold, but not what depends on the values: MoE routing (real routing is "
            "uneven), speculative acceptance, output lengths without ignore_eos, answer quality",
            "set weights: auto for a model where these matter",
            "note",
        )


def _imported(facts: RunFacts, add: _Add) -> None:
    """What the reader of the foreign file could not map, and which of the tool's own numbers its records do not give."""
    about = facts.manifest.get("imported")
    if not isinstance(about, dict):
        return
    notes, differing = about.get("notes"), about.get("not_reproduced")
    if isinstance(notes, list) and notes:
        text = "; ".join(str(n) for n in notes)
        add("imported-mapping", f"how the file was read: {text}", "see docs/importing.md for the definitions", "note")
    if isinstance(differing, list) and differing:
        text = f"the file's records do not give its own summary: {', '.join(str(k) for k in differing)}"
        add(
            "imported-differs",
            text,
            "look at both in the run's manifest; the file may be damaged or of another version",
        )
    if "imported_metrics" in facts.manifest:
        add("imported-summary", "only the other tool's summary was in the file: windows and percentiles are by its rules",
            "import per-request records where the tool can write them", "note")  # fmt: skip


def _note(facts: RunFacts, key: str) -> str:
    notes = facts.engine.get("notes")
    return str(notes.get(key) or "") if isinstance(notes, dict) else ""


def _window(facts: RunFacts, run: RunSummary, add: _Add) -> None:
    window = run.window
    assert window is not None
    if window.kind == "imported":
        return
    length = duration_text(window.length_s)
    if not window.steady:
        add("not-steady", f"no steady state: {window.reason}", "raise stop.min_requests or stop.min_duration_s")
    if facts.origin != "measured":
        return
    if facts.on_gpu and window.length_s < MIN_STEADY_S:
        text = f"the counted window is {length}; below {MIN_STEADY_S:g} s clocks and temperature have not settled"
        add("window-too-short", text, f"set stop.min_duration_s: {MIN_STEADY_S:g}", size=-window.length_s)
    elif not facts.on_gpu and window.length_s < MIN_CPU_WINDOW_S:
        text = f"the counted window is {length}; below {MIN_CPU_WINDOW_S:g} s a hiccup of the machine weighs heavily"
        add("window-too-short", text, f"set stop.min_duration_s: {MIN_CPU_WINDOW_S:g}", "note", -window.length_s)


def _errors(run: RunSummary, add: _Add) -> None:
    share = run.values.get("error_ratio", 0.0)
    if share <= 0:
        return
    classes = ", ".join(f"{n} x {name}" for name, n in sorted(run.errors.items()))
    severity: Severity = (
        "serious" if share > ERROR_SERIOUS_RATIO else "warning" if share > ERROR_WARNING_RATIO else "note"
    )
    add(
        "errors",
        f"{share:.1%} of the counted requests failed ({classes})",
        "look at engine.log and at requests.jsonl",
        severity,
        share,
    )


def _telemetry(facts: RunFacts, run: RunSummary, add: _Add) -> None:
    """What telemetry's own doubts (throttling, foreign processes, energy) do not cover."""
    error = facts.telemetry.get("error")
    if error and facts.origin == "measured":
        add("telemetry-failed", f"no or partial telemetry: {error}", "`bench doctor` says what is readable here")
    mfu, mbu = run.values.get("mfu_ratio"), run.values.get("mbu_ratio")
    device = facts.device_names[0] if facts.device_names else ""
    for w in cross_check_activity(
        device,
        mfu=mfu,
        mbu=mbu,
        tensor_active_ratio=run.values.get("tensor_active_ratio"),
        dram_bandwidth_ratio=run.values.get("dram_bandwidth_ratio"),
    ):
        add(w.code, w.message, w.remedy, w.severity)


def _client(facts: RunFacts, run: RunSummary, add: _Add) -> None:
    if facts.client.get("client_limited"):
        reason = facts.client.get("reason") or "the client could not keep up"
        add("client-limited", f"the load generator was the limit: {reason}",
            "give it more processes or another machine; these numbers say little of the server", "serious")  # fmt: skip
    late = run.values.get("send_lateness_p99_s", run.values.get("send_lateness_p95_s"))
    if facts.schedule_kind in ("open_loop", "trace") and late is not None and late > LATENESS_WARNING_S:
        cap = facts.schedule.get("max_in_flight")
        why = f"max_in_flight {cap} held requests back" if cap else "the client sent late"
        add("schedule-late", f"requests went out {duration_text(late)} late at p99: {why}",
            "latencies count from the due time, so they hold; lower the rate or raise the limit if this was not meant",
            size=late)  # fmt: skip


def _engine(facts: RunFacts, run: RunSummary, add: _Add) -> None:
    workload = facts.spec.workload if facts.spec is not None else None
    hits = run.values.get("prefix_cache_hit_ratio", 0.0)
    if hits > PREFIX_HIT_RATIO and workload is not None and workload.prefix is None and workload.sessions is None:
        add("prefix-cache-hits", f"{hits:.0%} of the prompt tokens came from the prefix cache, which the workload did not ask for",
            "use other seeds for each repeat, or enable_prefix_caching: false", "serious", hits)  # fmt: skip
    if run.values.get("num_preemptions", 0) > 0:
        add("preemptions", f"{run.values['num_preemptions']:.0f} preemptions: the KV cache was too small for this load",
            "lower max_num_seqs or the batch size, or give the cache more memory", "warning",
            run.values["num_preemptions"])  # fmt: skip
    cap, running, waiting = facts.max_num_seqs, run.values.get("running_max"), run.values.get("waiting_mean")
    if cap and running is not None and running >= cap and (waiting or 0) > 0.5:
        add("batch-cap", f"max_num_seqs {cap} was reached while {waiting:.1f} requests waited on average",
            "raise max_num_seqs if memory allows: the cap, not the GPU, set the throughput", size=waiting or 0.0)  # fmt: skip
    mfu, mbu = run.values.get("mfu_ratio"), run.values.get("mbu_ratio")
    if mfu is not None and mbu is not None and facts.on_gpu and max(mfu, mbu) < FAR_BELOW_RATIO:
        add("far-below-roofline", f"MFU {mfu:.0%} and MBU {mbu:.0%}: neither compute nor memory is busy. {_likely_cause(facts, run)}",
            "compare with `bench roofline`; look at the step times", "warning", -max(mfu, mbu))  # fmt: skip
    _oversubscribed(facts, add)
    _host_busy(facts, add)
    _server_view(facts, add)


def _likely_cause(facts: RunFacts, run: RunSummary) -> str:
    args = facts.effective_args
    running, in_flight = run.values.get("running_mean"), facts.target_in_flight
    if args.get("enforce_eager"):
        return "Likely cause: enforce_eager, every kernel is launched from Python"
    if running is not None and in_flight and running < 0.7 * in_flight:
        return (
            f"Likely cause: of {in_flight} requests in flight only {running:.0f} ran on average (batch cap or KV cache)"
        )
    if running is not None and running < 8:
        return "Likely cause: a batch this small is bound by launches and the host"
    return "Likely cause: host work between steps (scheduler, sampling, detokenising)"


def _host_busy(facts: RunFacts, add: _Add) -> None:
    busy = facts.manifest.get("host_busy_before_ratio")
    if isinstance(busy, (int, float)) and busy > HOST_BUSY_RATIO:
        add(
            "host-busy",
            f"something else kept {busy:.0%} of this host's cores busy just before the run, while the engine was idle",
            "stop other programs and run again"
            if not facts.on_gpu
            else "host work can slow small models; stop it and run again",
            size=busy,
        )


def _server_view(facts: RunFacts, add: _Add) -> None:
    """Where the server's own counters disagree with the client, or show what the workload did not ask for."""
    view = facts.manifest.get("server_view")
    if not isinstance(view, dict):
        return
    for text in view.get("disagreements") or ():
        add(
            "server-disagrees",
            str(text),
            "see server_view in the run's manifest; look for other clients of this server",
        )
    for text in view.get("warnings") or ():
        add("server-view", str(text), "see server_view in the run's manifest")


def _oversubscribed(facts: RunFacts, add: _Add) -> None:
    if facts.on_gpu or facts.origin != "measured" or facts.spec is None or facts.spec.engine.kind == "endpoint":
        return
    cpu = facts.cpu
    cores = cpu.get("cgroup_limit") or cpu.get("num_usable") or cpu.get("num_cores")
    ranks = facts.spec.num_devices
    if isinstance(cores, (int, float)) and cores and ranks > cores:
        add(
            "oversubscribed-cpu",
            f"{ranks} ranks share {cores:g} cores",
            "use a smaller tensor_parallel_size on this host",
        )
    elif ranks > 1:
        add("shared-cpu", f"{ranks} ranks share one host's cores and memory: TP here shows that the path works, not how GPUs scale",
            "measure TP scaling on a machine with as many GPUs", "note")  # fmt: skip


def _tokens(run: RunSummary, add: _Add) -> None:
    c = run.counts
    guessed = sorted({"tokenizer", "chunks", "schedule"} & set(run.token_sources))
    if guessed:
        add("tokens-not-from-server", f"token counts come from {', '.join(guessed)}, not from the engine or the server's usage",
            "ask the server for usage (stream_options.include_usage)")  # fmt: skip
    if "step_decode_tokens" not in c or c.get("num_preempted") or run.values.get("num_preemptions") or run.errors:
        return  # recomputed and cut-off tokens are computed but never delivered
    ours_out, theirs_out = c["all_output_tokens"] - c["num_with_output"], c["step_decode_tokens"]
    ours_in, theirs_in = c["all_input_tokens"] - c["all_cached_tokens"], c["step_prefill_tokens"]
    if ours_out != theirs_out or ours_in != theirs_in:
        add("token-count-mismatch",
            f"the engine's steps computed {theirs_in:.0f} prompt and {theirs_out:.0f} decode tokens, the requests say {ours_in:.0f} and {ours_out:.0f}",
            "some steps were not recorded, or requests were dropped: treat step statistics with care")  # fmt: skip


def worst(same: Sequence[Warning_]) -> Warning_:
    """The gravest of warnings with one code, by severity and then by size; "at worst" where others differ in size."""
    grave = max(same, key=lambda w: (-SEVERITIES.index(w.severity), w.size))
    if len({w.size for w in same}) > 1 and not grave.message.startswith(AT_WORST):
        return replace(grave, message=AT_WORST + grave.message)
    return grave


# --- cells -------------------------------------------------------------------------------------------------------


def cell_warnings(facts: RunFacts, runs: Sequence[RunSummary], estimates: dict[str, Estimate]) -> tuple[Warning_, ...]:
    """Every doubt about a cell: its runs' warnings, each kind once with the number of runs, and its own."""
    out: list[Warning_] = []
    by_code: dict[str, list[Warning_]] = {}
    for run in runs:
        of_run: dict[str, list[Warning_]] = {}
        for w in run.warnings:
            of_run.setdefault(w.code, []).append(w)
        for code, same in of_run.items():
            by_code.setdefault(code, []).append(worst(same))
    for code, same in by_code.items():
        w = worst(same)
        of_runs = "" if len(same) == len(runs) else f" ({len(same)} of {len(runs)} runs)"
        out.append(Warning_(code, w.message + of_runs, w.remedy, w.severity, facts.cell_id, w.size))
    if facts.origin == "measured" and len(runs) < MIN_RUNS:
        text = f"{len(runs)} run{'s' if len(runs) > 1 else ''}: too few for an interval worth trusting"
        out.append(Warning_("too-few-runs", text, f"set repeats: {MIN_RUNS} or more", "warning", facts.cell_id))
    kv = [v for r in runs if (v := r.counts.get("kv_capacity_tokens"))]
    if kv and max(kv) > (1 + KV_SPREAD_RATIO) * min(kv):
        text = f"KV-cache capacity differs from engine start to engine start ({min(kv):,.0f} to {max(kv):,.0f} tokens)"
        out.append(
            Warning_(
                "kv-capacity-differs",
                text,
                "free the GPU of other processes before each start",
                "warning",
                facts.cell_id,
            )
        )
    rates = [r.values["output_tokens_per_s"] for r in runs if "output_tokens_per_s" in r.values]
    if len(rates) >= 2 and np.mean(rates) > 0:
        spread = float(np.std(rates, ddof=1) / np.mean(rates))
        if spread > SPREAD_RATIO and facts.origin == "measured":
            text = f"output tokens/s varies by {spread:.0%} (standard deviation) from run to run"
            out.append(
                Warning_(
                    "noisy",
                    text,
                    "keep the machine idle otherwise, lengthen the runs, add repeats",
                    "warning",
                    facts.cell_id,
                    spread,
                )
            )
        for i in outliers(rates):
            text = f"{runs[i].run} is an outlier: {rates[i]:.4g} output tokens/s against a median of {np.median(rates):.4g} (kept)"
            out.append(
                Warning_("outlier", text, "look at its telemetry and log; it is never dropped", "note", facts.cell_id)
            )
    return tuple(out)
