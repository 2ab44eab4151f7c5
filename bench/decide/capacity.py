"""How many requests per second one replica serves within an SLO, found by simulating it; and a fleet's check.

A replica is one engine (GPU, TP, precision, batch limits). Its capacity is the highest Poisson rate at which the SLO is
met, found by doubling and bisection over simulations of vLLM's scheduler (``bench.sim``). Nothing here is measured: every
number carries the origin ``simulated`` and the interval of the step-time model it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware
from bench.catalog.memory import engine_defaults, fit
from bench.catalog.slo import Slo
from bench.errors import BadInput
from bench.load.arrivals import due_times
from bench.records import Request, Schedule
from bench.sim.compiled import simulate
from bench.sim.inputs import Fleet, Replica, RoutingPolicy, SimResult, prepare
from bench.sim.profile import Profile
from bench.sim.scheduler import SchedulerConfig
from bench.sim.setup import http_overhead_s
from bench.sim.step_time import StepTime, build_step_time
from bench.workload.lengths import Length
from bench.workload.synthetic import stream

#: Requests of one simulation: a p99 rests on the slowest 1 %, so 15 of them.
NUM_REQUESTS = 1500
#: The first part of a simulated run fills the engines and is not counted.
WARM_UP_RATIO = 0.2
#: Relative width at which the search for the highest rate stops.
RATE_TOLERANCE = 0.03
_MAX_DOUBLINGS = 18
_BRACKET_REQUESTS = 400
_FIRST_RATE = 8.0
_LEAST_RATE = 0.01
#: A wait in the engine's queue that counts as one: below it nobody notices.
NOTICEABLE_WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One way to serve the model: device, parallelism, precision and batch limits, under vLLM's own names."""

    hardware: Hardware
    model: ModelArch
    tensor_parallel_size: int = 1
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    profile: Profile | None = None

    @property
    def name(self) -> str:
        form = f" {self.quantization}" if self.quantization else ""
        limits = f" budget {self.max_num_batched_tokens}" if self.max_num_batched_tokens else ""
        return f"{self.hardware.name} TP{self.tensor_parallel_size}{form}{limits}"


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    """A replica ready to be simulated."""

    spec: ReplicaSpec
    config: SchedulerConfig
    step_time: StepTime
    kv_capacity_tokens: int

    def fleet(self, num_replicas: int, routing: RoutingPolicy = "least_loaded") -> Fleet:
        """``num_replicas`` behind a router, each an HTTP server of its own (``Fleet`` takes their front ends as one, so many
        times as fast)."""
        before, after, front_end_s = http_overhead_s(self.step_time)
        return Fleet(
            (Replica(self.config, self.step_time.coefficients()),) * num_replicas,
            routing,
            request_before_s=before,
            request_after_s=after,
            front_end_s=front_end_s / num_replicas,
        )


def replica_model(spec: ReplicaSpec, longest_tokens: int) -> ReplicaModel | str:
    """The replica, or one clause that says why it cannot serve requests of ``longest_tokens`` tokens."""
    tokens, seqs = engine_defaults(spec.hardware, "server")
    tokens = spec.max_num_batched_tokens or tokens
    seqs = min(spec.max_num_seqs or seqs, tokens)
    length = max(longest_tokens, 512)
    if length > spec.model.max_position:
        return f"requests reach {length:,} tokens, the model takes {spec.model.max_position:,}"
    room = fit(
        spec.model,
        spec.hardware,
        tp=spec.tensor_parallel_size,
        quantization=spec.quantization,
        kv_cache_dtype=spec.kv_cache_dtype,
        max_model_len=length,
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        usage="server",
    )
    if not room.fits:
        return room.reason or "does not fit"
    if room.num_blocks * room.block_size < length:
        return f"the KV cache holds {room.num_blocks * room.block_size:,} tokens, one request reaches {length:,}"
    config = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        num_blocks=room.num_blocks,
        block_size=room.block_size,
        enable_prefix_caching=False,
    )
    try:
        step_time = build_step_time(
            spec.model,
            spec.hardware,
            tensor_parallel_size=spec.tensor_parallel_size,
            quantization=spec.quantization,
            kv_cache_dtype=spec.kv_cache_dtype,
            max_num_seqs=seqs,
            profile=spec.profile,
        )
    except BadInput as e:
        return e.what
    return ReplicaModel(spec, config, step_time, room.kv_capacity_tokens)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Lengths of the requests; arrivals are Poisson at whatever rate is asked."""

    isl: Length
    osl: Length
    seed: int = 0

    @property
    def longest_tokens(self) -> int:
        """The longest request to plan for: the bound of the distributions, else six means."""
        parts = [d.max_tokens or int(6 * d.mean_tokens) for d in (self.isl, self.osl)]
        return sum(parts)

    @property
    def tokens_per_request(self) -> float:
        return self.isl.mean_tokens + self.osl.mean_tokens

    def schedule(self, rate_per_s: float, num_requests: int = NUM_REQUESTS) -> Schedule:
        """Open loop, Poisson. The same seed gives the same lengths and the same gaps at every rate."""
        isl = self.isl.sample(stream(self.seed, "isl"), num_requests)
        osl = self.osl.sample(stream(self.seed, "osl"), num_requests)
        due = due_times("poisson", num_requests, rate_per_s, stream(self.seed, "arrivals"))
        requests = tuple(Request(i, int(o), int(p)) for i, (p, o) in enumerate(zip(isl, osl, strict=True)))
        return Schedule("open_loop", requests, due, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a simulated run met the SLO. ``worst`` = largest (value / limit) over the limits; met means <= 1."""

    met: bool
    worst: float
    values: dict[str, float]  # limit's text -> simulated seconds
    good_ratio: float  # share of requests within every limit
    output_tokens_per_s: float
    waited_ratio: float = 0.0  # share of requests that waited in the queue for longer than NOTICEABLE_WAIT_S
    wait_p99_s: float = 0.0


def judge(result: SimResult, slo: Slo, after_s: float, stretch: float = 1.0) -> Verdict:
    """Hold a simulated run against the SLO. ``stretch`` multiplies its latencies (the high end of the interval).

    Raises:
        BadInput: the SLO has a limit that a simulation without per-token times cannot judge (itl).
    """
    ended = np.isfinite(result.last_token_s)
    order = np.argsort(result.due_s, kind="stable")
    counted = order[int(len(order) * WARM_UP_RATIO) :]
    ok = counted[ended[counted]]
    due = result.due_s[ok]
    out = result.num_output_tokens[ok]
    first, last = result.first_token_s[ok] + after_s, result.last_token_s[ok] + after_s
    seconds = {
        "ttft": (first - due) * stretch,
        "tpot": np.where(out > 1, (last - first) / np.maximum(out - 1, 1), 0.0) * stretch,
        "e2e": (last - due) * stretch,
    }
    values, worst = {}, 0.0
    good = np.ones(len(ok), dtype=bool)
    for limit in slo.limits:
        if limit.metric not in seconds:
            raise BadInput(f"SLO: a plan cannot judge {limit.metric}", next_step="give the limit as tpot")
        data = seconds[limit.metric]
        value = float(np.percentile(data, limit.percentile)) if limit.percentile is not None else float(data.max())
        if len(ok) < len(counted):
            value = math.inf  # requests that never ended
        if limit.percentile is None and slo.min_ratio is not None:
            value = float(np.percentile(data, 100 * slo.min_ratio))
        values[limit.text] = value
        worst = max(worst, value / limit.limit_s)
        good &= data <= limit.limit_s
    ratio = float(good.sum() / len(counted)) if len(counted) else 0.0
    if slo.min_ratio is not None and ratio < slo.min_ratio:
        worst = max(worst, 1.0 + (slo.min_ratio - ratio))
    span = float(last.max() - due.min()) if len(ok) else math.inf
    wait = np.nan_to_num(result.scheduled_s[counted] - result.queued_s[counted], nan=np.inf)
    waited = float((wait > NOTICEABLE_WAIT_S).mean()) if len(counted) else 0.0
    wait_p99 = float(np.percentile(wait, 99, method="higher")) if len(counted) else 0.0
    return Verdict(worst <= 1.0, worst, values, ratio, float(out.sum()) / span, waited, wait_p99)


def run_fleet(
    model: ReplicaModel,
    num_replicas: int,
    traffic: Traffic,
    rate_per_s: float,
    slo: Slo,
    *,
    num_requests: int = NUM_REQUESTS,
    stretch: float = 1.0,
    routing: RoutingPolicy = "least_loaded",
) -> Verdict:
    """Simulate ``num_replicas`` behind a router at ``rate_per_s`` and judge the run."""
    fleet = model.fleet(num_replicas, routing)
    result = simulate(prepare(traffic.schedule(rate_per_s, num_requests), fleet, record_tokens=False))
    return judge(result, slo, fleet.request_after_s, stretch)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate that one replica serves within the SLO.

    ``rate_per_s`` is None where not even a single request at a time meets it; ``reason`` then says by how much.
    """

    model: ReplicaModel | None
    rate_per_s: float | None
    verdict: Verdict | None
    reason: str = ""
    origin: str = "simulated"
    source: str = ""
    label: str = ""  # of a measured capacity, which has no model
    devices: int = 0

    @property
    def name(self) -> str:
        return self.model.spec.name if self.model is not None else self.label

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.model.spec.tensor_parallel_size if self.model is not None else max(1, self.devices)


def capacity(spec: ReplicaSpec, traffic: Traffic, slo: Slo, *, stretch: float = 1.0) -> Capacity:
    """Search by doubling, then bisection, until the rate is known to ``RATE_TOLERANCE``."""
    model = replica_model(spec, traffic.longest_tokens)
    if isinstance(model, str):
        return Capacity(None, None, None, model)
    source = model.step_time.source

    def at(rate: float, num_requests: int = NUM_REQUESTS) -> Verdict:
        return run_fleet(model, 1, traffic, rate, slo, num_requests=num_requests, stretch=stretch)

    # alone in the engine: far apart, so that no request meets another
    alone = run_fleet(model, 1, traffic, 1e-3, slo, num_requests=60, stretch=stretch)
    if not alone.met:
        worst = "; ".join(f"{t}: {v * 1e3:,.0f} ms" for t, v in alone.values.items())
        return Capacity(model, None, alone, f"a request alone in the engine misses the SLO ({worst})", source=source)
    low, high = _bracket(lambda rate: at(rate, _BRACKET_REQUESTS).met)
    # the short runs of the bracket are noisy: the full run decides at both ends
    best: tuple[float, Verdict] | None = None
    for _ in range(_MAX_DOUBLINGS):
        if low <= 0 or (verdict := at(low)).met:
            best = (low, verdict) if low > 0 else None
            break
        low, high = low / 2, low
    while (verdict := at(high)).met:
        best, low, high = (high, verdict), high, high * 2
    while high - low > RATE_TOLERANCE * high and high > _LEAST_RATE:
        middle = (low + high) / 2
        verdict = at(middle)
        if verdict.met:
            best, low = (middle, verdict), middle
        else:
            high = middle
    if best is None:
        return Capacity(model, None, alone, f"no rate above {_LEAST_RATE:g} requests/s meets the SLO", source=source)
    return Capacity(model, best[0], best[1], source=source)


def _bracket(met: Callable[[float], bool]) -> tuple[float, float]:
    """(a rate that is met, twice that rate), or (0, the least rate), by doubling or halving from a usual one."""
    rate = _FIRST_RATE
    if met(rate):
        for _ in range(_MAX_DOUBLINGS):
            if not met(rate * 2):
                break
            rate *= 2
        return rate, rate * 2
    for _ in range(_MAX_DOUBLINGS):
        rate /= 2
        if met(rate):
            return rate, rate * 2
        if rate < _LEAST_RATE:
            break
    return 0.0, rate


def batch_limits(hardware: Hardware) -> Sequence[tuple[int | None, int | None]]:
    """(max_num_seqs, max_num_batched_tokens) worth trying: vLLM's defaults, and a smaller token budget, which trades prompt
    throughput for steadier decoding."""
    tokens, _ = engine_defaults(hardware, "server")
    smaller = 2048 if tokens > 2048 else 1024
    return ((None, None), (None if smaller >= 1024 else 256, smaller))


def with_limits(spec: ReplicaSpec, limits: tuple[int | None, int | None]) -> ReplicaSpec:
    seqs, tokens = limits
    if seqs is None and tokens is not None:
        seqs = min(engine_defaults(spec.hardware, "server")[1], tokens)
    return replace(spec, max_num_seqs=seqs, max_num_batched_tokens=tokens)
