"""An option's throughput: typed in, from results or simulated; at the decision's own mix where several mixes are known.

Serving input and output tokens takes time that adds up: with t_in and t_out seconds of a replica per token, a share s of
input gives 1 / throughput = s t_in + (1 - s) t_out, a line in s. Between two mixes that are known, 1 / throughput is therefore
interpolated linearly in the share of input; beyond the outermost it is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.analysis.efficiency import hardware_of
from bench.analysis.summary import Summary
from bench.catalog.hardware import Hardware
from bench.catalog.model import load_model
from bench.config.decision import SelfHostSpec, SimulateSpec
from bench.decide.batching import SpeedCurve, SpeedPoint, batch_curve
from bench.decide.capacity import ReplicaSpec
from bench.decide.options import Mix
from bench.decide.results import results_folder, summaries
from bench.errors import BadInput
from bench.records import Estimate
from bench.sim.profile import load_profile

#: Shares of input nearer than this are one mix.
SAME_MIX = 0.02
#: Further shares of input that are simulated for an option whose throughput is simulated.
_SIMULATED_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class MixedRate:
    """Tokens/s of a replica, input and output together, at one share of input tokens."""

    input_ratio: float
    tokens_per_s: Estimate
    source: str


@dataclass(frozen=True, slots=True)
class Rate:
    """What an option's throughput is at the decision's mix, and all that is known of it."""

    tokens_per_s: Estimate
    source: str
    origin: str
    prefill_time_ratio: float | None = None
    curve: SpeedCurve | None = None  # throughput against speed per user
    mixes: tuple[MixedRate, ...] = ()  # by rising share of input; empty where the mix of the throughput is not known


def rate_at(mixes: Sequence[MixedRate], input_ratio: float) -> Estimate:
    """Throughput at a share of input: 1 / rate on the line between the two neighbouring mixes, held beyond the outermost.

    The ends of the interval lie on the lines between the neighbours' ends.
    """
    below = [m for m in mixes if m.input_ratio <= input_ratio]
    above = [m for m in mixes if m.input_ratio >= input_ratio]
    if not below or not above:
        return (above or below)[0 if above else -1].tokens_per_s
    a, b = below[-1], above[0]
    if a is b or b.input_ratio == a.input_ratio:
        return a.tokens_per_s
    w = (input_ratio - a.input_ratio) / (b.input_ratio - a.input_ratio)

    def between(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None or min(x, y) <= 0 else 1 / ((1 - w) / x + w / y)

    one, two = a.tokens_per_s, b.tokens_per_s
    value = between(one.value, two.value)
    assert value is not None
    method = one.method if one.method == two.method else f"{one.method}; {two.method}"
    return Estimate(
        value, between(one.low, two.low), between(one.high, two.high), min(one.confidence, two.confidence),
        f"{method}; between two mixes", min(one.num_runs, two.num_runs), one.unit,
    )  # fmt: skip


def resolve_rate(spec: SelfHostSpec, hardware: Hardware, mix: Mix, curves: bool) -> Rate:
    """The throughput of one option of a decision file at the decision's mix.

    Args:
        curves: also simulate a curve that only a picture needs.

    Raises BadInput: results that are not there or contradict the option; a model that cannot be simulated.
    """
    if spec.results is not None:
        return _from_results(spec, hardware, mix, curves)
    if spec.tokens_per_s is not None:
        typed = Estimate(
            spec.tokens_per_s, spec.tokens_per_s_low, spec.tokens_per_s_high, method="typed in", num_runs=0, unit="tokens/s"
        )  # fmt: skip
        shown = _curve(spec.simulate, spec.num_gpus, hardware) if spec.simulate is not None and curves else None
        return Rate(typed, "typed in", "assumed", curve=shown)
    assert spec.simulate is not None
    return _simulated(spec.simulate, spec.num_gpus, hardware, mix, curves)


# --- from results ------------------------------------------------------------------------------------------------


def _from_results(spec: SelfHostSpec, hardware: Hardware, mix: Mix, curves: bool) -> Rate:
    assert spec.results is not None
    folder = results_folder(spec.results)
    found = [s for s in summaries(folder, spec.cell) if "total_tokens_per_s" in s.estimates]
    if not found:
        raise BadInput("no cell has a throughput", where=str(folder))
    best = max(found, key=_total)
    _check(spec, best, hardware.name)
    alike = [s for s in found if _same_replica(s, best)]
    mixes = _measured_mixes(alike)
    curve = _measured_curve(spec, hardware.name)
    if curve is None and spec.simulate is not None and curves:
        curve = _curve(spec.simulate, spec.num_gpus, hardware)
    prefill = best.estimates.get("prefill_time_ratio")
    share = prefill.value if prefill else None
    if len(mixes) < 2:
        return Rate(best.estimates["total_tokens_per_s"], _cell_text(best), best.origin, share, curve, mixes)
    at = rate_at(mixes, mix.input_ratio)
    return Rate(at, mixes_text(mixes, mix), best.origin, share, curve, mixes)


def _total(s: Summary) -> float:
    return s.estimates["total_tokens_per_s"].value


def _same_replica(a: Summary, b: Summary) -> bool:
    one, two = hardware_of(a.facts), hardware_of(b.facts)
    same = (one.name if one else None) == (two.name if two else None) and a.facts.num_devices == b.facts.num_devices
    return same and a.origin == b.origin and _served(a) == _served(b)


def _served(s: Summary) -> tuple[str | None, object]:
    """What is served: cells of another model or another precision are no further mix of this one."""
    spec = s.facts.spec
    return (spec.model, spec.engine_args.get("quantization")) if spec is not None else (None, None)


def _measured_mixes(cells: Sequence[Summary]) -> tuple[MixedRate, ...]:
    """For each mix of mean ISL and OSL the cell with the highest throughput, by rising share of input."""
    out: list[MixedRate] = []
    for s in sorted(cells, key=_total, reverse=True):
        isl, osl = (s.estimates.get(k) for k in ("isl_mean_tokens", "osl_mean_tokens"))
        if isl is None or osl is None or not isl.value + osl.value > 0:
            continue
        share = isl.value / (isl.value + osl.value)
        if all(abs(share - m.input_ratio) > SAME_MIX for m in out):
            out.append(MixedRate(share, s.estimates["total_tokens_per_s"], _cell_text(s)))
    return tuple(sorted(out, key=lambda m: m.input_ratio))


def _cell_text(s: Summary) -> str:
    return f"{s.experiment}, cell {s.cell_id}, {s.estimates['total_tokens_per_s'].num_runs} runs"


def mixes_text(mixes: Sequence[MixedRate], mix: Mix) -> str:
    """Which of the known mixes the throughput at ``mix`` comes from, in words."""
    at = mix.input_ratio
    below = [m for m in mixes if m.input_ratio <= at]
    above = [m for m in mixes if m.input_ratio >= at]
    if not below or not above:
        end = (above or below)[0 if above else -1]
        return f"{end.source} (held beyond its {end.input_ratio:.0%} input tokens)"
    a, b = below[-1], above[0]
    if a is b:
        return a.source
    return f"between {a.source} ({a.input_ratio:.0%} input tokens) and {b.source} ({b.input_ratio:.0%})"


def _check(spec: SelfHostSpec, summary: Summary, gpu: str) -> None:
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


# --- simulated ---------------------------------------------------------------------------------------------------


def _simulated(s: SimulateSpec, num_gpus: int, hardware: Hardware, mix: Mix, curves: bool) -> Rate:
    """The curve at the lengths asked for; at other mixes (as many tokens in all, the concurrency that counts) single points.

    Other mixes are simulated where the decision is at another mix, or a page wants to move it.
    """
    curve = _curve(s, num_gpus, hardware)
    point = next((p for p in curve.points if p.concurrency == s.at_concurrency), curve.best)
    own = MixedRate(
        s.isl / (s.isl + s.osl), point.total_tokens_per_s, f"{curve.source}, concurrency {point.concurrency:g}"
    )
    if not curves and abs(own.input_ratio - mix.input_ratio) <= SAME_MIX:
        return Rate(own.tokens_per_s, own.source, "simulated", point.prefill_time_ratio, curve, (own,))
    total, concurrency = s.isl + s.osl, int(point.concurrency)
    found = [own]
    for share in sorted({mix.input_ratio, *(_SIMULATED_SHARES if curves else ())}):
        isl = min(total - 1, max(1, round(total * share)))
        at = isl / total
        if all(abs(at - m.input_ratio) > SAME_MIX for m in found):
            other = batch_curve(_replica(s, num_gpus, hardware), isl, total - isl, (concurrency,))
            found.append(MixedRate(at, other.best.total_tokens_per_s, f"{other.source}, concurrency {concurrency}"))
    mixes = tuple(sorted(found, key=lambda m: m.input_ratio))
    rate = rate_at(mixes, mix.input_ratio)
    return Rate(rate, mixes_text(mixes, mix), "simulated", point.prefill_time_ratio, curve, mixes)


def _curve(s: SimulateSpec, num_gpus: int, hardware: Hardware) -> SpeedCurve:
    return batch_curve(_replica(s, num_gpus, hardware), s.isl, s.osl, s.concurrencies)


def _replica(s: SimulateSpec, num_gpus: int, hardware: Hardware) -> ReplicaSpec:
    profile = load_profile(Path(s.profile)) if s.profile else None
    return ReplicaSpec(hardware, load_model(s.model), num_gpus, s.quantization, profile=profile)
