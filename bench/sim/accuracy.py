"""Grade predictions on measured points: errors by group, coverage of the intervals, rows refused and why.

Every point is simulated through the same scheduler and step times as ``bench predict`` uses; nothing is looked up. The
overheads were fitted on some models of one source (:data:`FITTED_MODELS`); everything else is held out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as dataclass_replace

import numpy as np

from bench.catalog.hardware import load_hardware
from bench.catalog.memory import SAMPLER_BYTES_PER_LOGIT_V1, engine_defaults, fit
from bench.errors import BenchError
from bench.load.schedule import closed_loop, offline
from bench.records import Request
from bench.sim.compiled import simulate
from bench.sim.ground_truth import V2_RUNNER_SINCE, Point, Refusal, model_of
from bench.sim.inputs import Fleet, Replica, SimResult, prepare
from bench.sim.model_shape import ModelShape, shape_of
from bench.sim.scheduler import SchedulerConfig
from bench.sim.step_time import StepTime, build_step_time

#: Models of the serving sample that the overheads were fitted on. All other models and all other sources are held out.
FITTED_SOURCE = "NVIDIA serving sample"
FITTED_MODELS = ("llama-3.1-70b", "gpt-oss-120b", "kimi-k2.5", "qwen3-32b")
FITTED_GPUS = ("h100-sxm", "h200-sxm")
METRICS = ("ttft", "tpot", "output_tokens_per_s")
#: Beyond this share of the KV cache, or of max_num_seqs, the mean demand makes requests wait: a saturated point.
_SATURATED_RATIO = 0.85
_MAX_REQUESTS = 4000
#: Means of sampled lengths, and numbers of answered requests, of one workload on two machines differ by up to this.
_LENGTH_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Graded:
    """A measured point beside its prediction. Seconds and tokens per second; nan where not measured."""

    point: Point
    predicted: dict[str, float]
    measured: dict[str, float]
    saturated: bool
    covered: dict[str, bool]
    trust: str
    contradiction: str | None = None  # why the row cannot be what it says, graded all the same

    def error(self, metric: str) -> float:
        """Signed relative error of ``metric``; nan where it was not measured."""
        return self.predicted[metric] / self.measured[metric] - 1.0

    @property
    def fitted(self) -> bool:
        """Whether overheads were fitted on this row's model and GPU (B200 rows chose two factors of all models at once)."""
        p = self.point
        return p.source == FITTED_SOURCE and p.model in FITTED_MODELS and p.gpu in FITTED_GPUS and p.engine == "vllm"


def lengths(point: Point, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths of ``n`` requests: uniform below nominal, or long-tailed around a mean."""
    if point.spread == "long-tailed":
        # conversations: gamma with the coefficient of variation near 1 that chat data sets show
        draw = [np.clip(rng.gamma(1.0, mean, n), 4, 12 * mean) for mean in (point.isl, point.osl)]
        return tuple(
            np.maximum(1, np.round(d * m / d.mean())).astype(int)
            for d, m in zip(draw, (point.isl, point.osl), strict=True)
        )  # type: ignore[return-value]
    low = float(point.spread)
    return tuple(  # type: ignore[return-value]
        rng.integers(max(1, int(low * x)), max(1, int(x)) + 1, n) if low < 1 else np.full(n, max(1, round(x)))
        for x in (point.isl, point.osl)
    )


def shape_for(point: Point) -> ModelShape:
    """The model's shape; Kimi's compressed-tensors checkpoint quantises routed experts alone."""
    arch = model_of(point.model)
    shape = shape_of(arch, point.quantization, point.kv_cache_dtype)
    if point.model == "kimi-k2.5":
        shape = dataclass_replace(shape, dense_dtype="bf16")
    return shape


def step_time_for(point: Point, max_num_seqs: int) -> StepTime:
    """Step times as ``bench predict`` would build them for this point."""
    return build_step_time(
        model_of(point.model), load_hardware(point.gpu), tensor_parallel_size=point.tp, enable_expert_parallel=point.ep,
        quantization=point.quantization, kv_cache_dtype=point.kv_cache_dtype, max_num_seqs=max_num_seqs, async_scheduling=point.async_scheduling,
        shape=shape_for(point),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Simulated:
    """A point's simulation, its step times, and whether waiting for room decides its latency."""

    result: SimResult
    saturated: bool
    step_time: StepTime
    contradiction: str | None = None


def run_point(point: Point, step_time: StepTime | None = None, seed: int = 0) -> Simulated:
    """Simulate ``point``. Raises BenchError where vLLM could not have run it as the row says."""
    arch, hardware = model_of(point.model), load_hardware(point.gpu)
    tokens, seqs = engine_defaults(hardware, "server")
    tokens = point.max_num_batched_tokens or tokens
    seqs = min(point.max_num_seqs or seqs, tokens)
    n = min(point.num_requests, max(_MAX_REQUESTS, 3 * point.concurrency))
    isl, osl = lengths(point, np.random.default_rng(seed), n)
    longest = int((isl + osl).max()) + 16
    room = fit(
        arch, hardware, tp=point.tp, ep=point.tp if point.ep else 1, quantization=point.quantization,
        kv_cache_dtype=point.kv_cache_dtype, gpu_memory_utilization=point.gpu_memory_utilization, max_model_len=max(longest, 1024),
        max_num_batched_tokens=tokens, max_num_seqs=seqs,
    )  # fmt: skip
    if not room.fits:
        raise BenchError(f"does not fit: {room.reason}")
    num_blocks = room.num_blocks
    if point.version and point.version < V2_RUNNER_SINCE:
        # the first model runner profiled its sampler with four times the memory for logits
        sampler = SAMPLER_BYTES_PER_LOGIT_V1 * seqs * arch.vocab_size
        num_blocks -= int(max(0.0, sampler - room.activation_bytes) // room.bytes_per_block)
    if not point.subtracts_graph_memory:
        num_blocks += int(room.cuda_graph_bytes // room.bytes_per_block)
    per_request = room.bytes_per_block / room.block_size
    capacity = num_blocks * room.block_size * per_request / max(room.kv_bytes_per_token, 1)
    blocks = max(2, int(capacity // room.block_size))
    step_time = step_time or step_time_for(point, seqs)
    config = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=max(longest, 1024), num_blocks=blocks,
        block_size=room.block_size, enable_prefix_caching=point.prefix_caching, async_scheduling=point.async_scheduling,
        scheduler_reserve_full_isl=point.scheduler_reserve_full_isl,
    )  # fmt: skip
    before, after = step_time.request_overhead_s()
    fleet = Fleet(
        (Replica(config, step_time.coefficients()),), request_before_s=before, request_after_s=after, front_end_s=step_time.front_end_s
    )  # fmt: skip
    requests = tuple(Request(index=i, osl=int(o), isl=int(p)) for i, (p, o) in enumerate(zip(isl, osl, strict=True)))
    schedule = offline(requests) if point.kind == "offline" else closed_loop(requests, point.concurrency)
    result = simulate(prepare(schedule, fleet, record_tokens=False))
    demand = min(point.concurrency, n) * (isl.mean() + osl.mean() / 2)
    saturated = demand > _SATURATED_RATIO * blocks * room.block_size or point.concurrency > seqs
    return Simulated(result, bool(saturated), step_time, contradiction(point, blocks * room.block_size))


def summarise(point: Point, result: SimResult, after_s: float) -> dict[str, float]:
    """Mean TTFT and TPOT (median step for points that publish the median ITL) and the output rate."""
    ok = np.isfinite(result.last_token_s)
    first, last, sent = result.first_token_s[ok] + after_s, result.last_token_s[ok] + after_s, result.sent_s[ok]
    out = result.num_output_tokens[ok]
    many = out > 1
    tpot = float(np.mean((last - first)[many] / (out[many] - 1))) if many.any() else math.nan
    span = float(last.max() - sent.min())
    rate = float(out.sum()) / span
    if point.note == "median ITL":  # a server kept full: what it does between its first and last quarter
        a, b = np.quantile(result.last_token_s[ok], [0.25, 0.75])
        steps = result.steps
        inside = (steps["end_s"] > a) & (steps["end_s"] < b)
        produced = steps["decode_requests"][inside].sum()
        rate = float(produced) / max(float(b - a), 1e-9)
        ends = np.diff(steps["end_s"][inside])
        tpot = float(np.median(ends)) if len(ends) else tpot
    return {"ttft": float(np.mean(first - sent)), "tpot": tpot, "output_tokens_per_s": rate}


def little(point: Point) -> float:
    """Output rate that Little's law gives for a closed loop with this mean TTFT and TPOT; nan for other points."""
    if point.kind != "closed_loop" or math.isnan(point.ttft_s) or math.isnan(point.tpot_s):
        return math.nan
    osl = point.osl * (1 + float(point.spread)) / 2 if not isinstance(point.spread, str) else point.osl
    return point.concurrency * osl / (point.ttft_s + point.tpot_s * (osl - 1))


def contradiction(point: Point, capacity_tokens: int) -> str | None:
    """Why a closed-loop row cannot be what it says, or None.

    By Little's law ``rate x TPOT`` requests generate at a time. Far fewer than the row's policy admits although the cache
    has room: it was run under a limit that is not recorded. More than the KV cache holds: under another KV dtype.

    The second is a bound that no engine can pass, with a fifth of room for the capacity's own uncertainty. The first, with its
    0.4, was written after such rows had missed; both kinds are graded and printed apart, so that nobody has to trust them.
    """
    rate = little(point)
    if math.isnan(rate):
        return None
    running = rate * point.tpot_s
    share = (1 + float(point.spread)) / 2 if not isinstance(point.spread, str) else 1.0
    held = running * share * (point.isl + point.osl / 2)
    if held > 1.2 * capacity_tokens:
        return "more requests ran than a KV cache of the recorded kind holds: its dtype is not recorded"
    admitted = min(point.concurrency, point.max_num_seqs or point.concurrency)
    if point.concurrency >= 256 and running < 0.4 * admitted:
        return "far fewer requests ran than concurrency and cache admit: a limit is not recorded"
    return None


def grade(
    points: Iterable[Point], progress: Callable[[Point], None] | None = None
) -> tuple[list[Graded], list[Refusal]]:
    """Predict every point. Rows that vLLM could not have run as recorded are refused."""
    graded: list[Graded] = []
    refused: list[Refusal] = []
    cache: dict[tuple[object, ...], StepTime] = {}
    for point in points:
        try:
            key = (
                point.gpu,
                point.model,
                point.quantization,
                point.kv_cache_dtype,
                point.tp,
                point.ep,
                point.max_num_seqs,
                point.async_scheduling,
            )
            if key not in cache:
                seqs = point.max_num_seqs or engine_defaults(load_hardware(point.gpu), "server")[1]
                cache[key] = step_time_for(point, seqs)
            simulated = run_point(point, cache[key])
        except BenchError as e:
            refused.append(Refusal(point.id, point.source, point.engine, _short(e.what)))
            continue
        graded.append(_graded(point, simulated))
        if progress:
            progress(point)
    return graded, refused


def _short(reason: str) -> str:
    return (
        "does not fit: weights leave no room for the KV cache"
        if reason.startswith("does not fit")
        else reason.split(";")[0]
    )


def _graded(point: Point, simulated: Simulated) -> Graded:
    step_time, saturated = simulated.step_time, simulated.saturated
    predicted = summarise(point, simulated.result, step_time.request_overhead_s()[1])
    rate = point.output_tokens_per_s
    measured = {
        "ttft": point.ttft_s,
        "tpot": point.tpot_s,
        "output_tokens_per_s": little(point) if math.isnan(rate) else rate,
    }
    covered = {}
    for metric in METRICS:
        interval = step_time.interval("saturated_" + metric if saturated else metric) or step_time.interval(metric)
        if interval is not None and not math.isnan(measured[metric]) and not math.isnan(predicted[metric]):
            ratio = measured[metric] / predicted[metric]
            covered[metric] = interval.low_ratio <= ratio <= interval.high_ratio
    return Graded(point, predicted, measured, saturated, covered, step_time.trust, simulated.contradiction)


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Errors of one group. Ratios; ``bias`` is the median signed error, ``coverage`` the share inside 90 % intervals."""

    group: str
    metric: str
    num_rows: int
    median_ape: float
    mean_ape: float
    bias: float
    coverage: float


def errors(graded: Sequence[Graded], group: Callable[[Graded], str]) -> list[ErrorRow]:
    """Errors by group and metric, groups in alphabetical order."""
    rows = []
    for name in sorted({group(g) for g in graded}):
        members = [g for g in graded if group(g) == name]
        for metric in METRICS:
            signed = np.array([e for g in members if math.isfinite(e := g.error(metric))])
            if len(signed):
                inside = [g.covered[metric] for g in members if metric in g.covered]
                rows.append(
                    ErrorRow(
                        name, metric, len(signed), float(np.median(np.abs(signed))), float(np.mean(np.abs(signed))),
                        float(np.median(signed)), float(np.mean(inside)) if inside else math.nan,
                    )
                )  # fmt: skip
    return rows


def ratio_errors(graded: Sequence[Graded], differ: str, metric: str = "output_tokens_per_s") -> dict[str, list[float]]:
    """How well ratios between measured rows are predicted: rows equal in all but ``differ`` (``tp`` or ``gpu``).

    Returns, for each pair of values such as ``8 over 2``, the relative errors of predicted over measured ratios.
    """
    groups: dict[tuple[object, ...], list[Graded]] = {}
    for g in graded:
        groups.setdefault(_setup(g.point, differ), []).append(g)
    found: dict[str, list[float]] = {}
    for members in groups.values():
        for a, b in itertools.combinations(sorted(members, key=lambda g: str(getattr(g.point, differ))), 2):
            low, high = getattr(a.point, differ), getattr(b.point, differ)
            if low != high and _same_load(a.point, b.point):
                predicted = b.predicted[metric] / a.predicted[metric]
                measured = b.measured[metric] / a.measured[metric]
                if math.isfinite(predicted / measured):
                    found.setdefault(f"{high} over {low}", []).append(predicted / measured - 1.0)
    return found


def _setup(p: Point, differ: str) -> tuple[object, ...]:
    """What two rows share besides the load: source, engine, model, and options given on purpose."""
    options = (p.max_num_seqs, p.max_num_batched_tokens, p.asynchronous, p.memory_share)
    return (p.source, p.model, p.precision, p.version, p.kind, p.tp if differ == "gpu" else p.gpu, p.ep, *options)


def _same_load(a: Point, b: Point) -> bool:
    """Nominal lengths must be equal. Rows of everything at once publish lengths as they came out, and a request may fail."""
    if a.kind != "offline":
        return (a.isl, a.osl, a.concurrency) == (b.isl, b.osl, b.concurrency)
    pairs = ((a.isl, b.isl), (a.osl, b.osl), (a.num_requests, b.num_requests))
    return all(abs(x / y - 1) <= _LENGTH_TOLERANCE for x, y in pairs)
