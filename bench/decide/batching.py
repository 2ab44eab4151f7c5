"""What batching does to one replica: tokens per second and speed per user at rising concurrency, simulated.

Everything here carries the origin ``simulated`` and the 90 % interval of the step-time model it rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.analysis.predicted import OF_PREDICTION
from bench.decide.capacity import ReplicaModel, ReplicaSpec, replica_model
from bench.errors import BadInput
from bench.records import Estimate, Request, Schedule
from bench.sim.compiled import simulate
from bench.sim.inputs import prepare

#: Rounds of a closed loop that are simulated, and those at both ends that are not counted.
_ROUNDS, _EDGE_ROUNDS = 6, 1


@dataclass(frozen=True, slots=True)
class SpeedPoint:
    """One level of load on one replica. Rates are of the whole replica, ``per_user`` is 1 / median TPOT."""

    concurrency: float
    total_tokens_per_s: Estimate
    output_tokens_per_s: Estimate
    output_tokens_per_s_per_user: float
    prefill_time_ratio: float | None = None  # share of the engine's time in steps with prompt tokens


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """Levels of load of one option, by rising concurrency."""

    points: tuple[SpeedPoint, ...]
    origin: str
    source: str
    model: str = ""

    @property
    def best(self) -> SpeedPoint:
        return max(self.points, key=lambda p: p.total_tokens_per_s.value)


def batch_curve(spec: ReplicaSpec, isl: int, osl: int, concurrencies: Sequence[int]) -> SpeedCurve:
    """Simulate a closed loop of equal requests at each concurrency, ascending.

    Raises:
        BadInput: the model does not fit, or no step times are known for the GPU.
    """
    model = replica_model(spec, isl + osl)
    if isinstance(model, str):
        raise BadInput(
            f"{spec.model.name} cannot be simulated on {spec.name}: {model}",
            next_step="use more GPUs, a smaller precision or shorter requests",
        )
    points = tuple(_point(model, isl, osl, c) for c in sorted(set(concurrencies)))
    text = f"simulated: {spec.model.name} on {spec.name}, ISL {isl:,}, OSL {osl:,}; {model.step_time.source}"
    return SpeedCurve(points, "simulated", text, spec.model.name)


def _point(model: ReplicaModel, isl: int, osl: int, concurrency: int) -> SpeedPoint:
    """Counted from the end of the first round to the end of the last but one: completions come round by round."""
    n = concurrency * _ROUNDS
    requests = tuple(Request(i, osl, isl) for i in range(n))
    result = simulate(
        prepare(Schedule("closed_loop", requests, max_in_flight=concurrency), model.fleet(1), record_tokens=False)
    )
    done = np.sort(result.last_token_s)
    first, last = concurrency * _EDGE_ROUNDS - 1, n - concurrency * _EDGE_ROUNDS - 1
    span = float(done[last] - done[first])
    rate = (last - first) / span
    tpot = float(np.median((result.last_token_s - result.first_token_s) / max(1, osl - 1)))
    steps = result.steps
    time = steps["end_s"] - steps["scheduled_s"]
    prefill = float(time[steps["prefill_tokens"] > 0].sum() / time.sum())
    return SpeedPoint(
        float(concurrency),
        _estimate(model, rate * (isl + osl)),
        _estimate(model, rate * osl),
        1.0 / tpot if tpot > 0 else float("inf"),
        prefill,
    )


def _estimate(model: ReplicaModel, value: float) -> Estimate:
    interval = model.step_time.interval("output_tokens_per_s")
    if interval is None:
        return Estimate(value, None, None, method="simulated, no interval known", num_runs=0, unit="tokens/s")
    low, high = value * interval.low_ratio, value * interval.high_ratio
    return Estimate(value, low, high, interval.confidence, f"simulated; {OF_PREDICTION}", 0, "tokens/s")
