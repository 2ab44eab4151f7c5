"""The simulator as an engine: the same schedules in, the same records out, in virtual time.

Times in records are virtual seconds since the run's start; a run of minutes takes milliseconds of wall time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.engines.base import RecordSink
from bench.engines.host import EngineLaunch
from bench.errors import BadInput
from bench.records import EngineInfo, RequestRecord, Schedule
from bench.sim.arrival_limited import throughput_interval
from bench.sim.defaults import Usage
from bench.sim.fleets import FleetShape
from bench.sim.inputs import SimInputs, SimResult, prepare
from bench.sim.interface import Interval
from bench.sim.outputs import chunk_columns, request_records, step_columns
from bench.sim.scheduler import PROVED_AGAINST_VLLM
from bench.sim.setup import EngineSetup, engine_setup

#: Predicted power is written at this rate (virtual time), as a live sampler would see it.
TELEMETRY_HZ = 10.0
MAX_TELEMETRY_SAMPLES = 20_000


def build(launch: EngineLaunch) -> SimulatedEngine:
    spec = launch.spec
    if not spec.get("gpu"):
        raise BadInput("a simulated engine needs a GPU", where="engine.gpu", next_step="write `gpu: H100-SXM`")
    profile = spec.get("profile")
    setup = engine_setup(
        load_model(launch.model),
        load_hardware(str(spec["gpu"])),
        launch.args,
        usage="llm" if launch.load_kind == "offline" else "server",
        profile=Path(profile) if profile else None,
        shape=FleetShape(**(spec.get("fleet") or {})),
    )
    return SimulatedEngine(setup)


class SimulatedEngine:
    """Serves schedules in virtual time. ``setup`` is what is simulated; ``power`` adds predicted GPU power."""

    def __init__(self, setup: EngineSetup, *, record_tokens: bool = True, power: bool = True) -> None:
        self.setup = setup
        self._record_tokens = record_tokens
        self._power = power

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def info(self) -> EngineInfo:
        s, c = self.setup, self.setup.config
        num_gpus = 0 if s.hardware.kind == "cpu" else s.num_gpus
        effective: dict[str, Any] = {
            **s.args,
            "max_num_seqs": c.max_num_seqs,
            "max_num_batched_tokens": c.max_num_batched_tokens,
            "max_model_len": c.max_model_len,
            "block_size": c.block_size,
            "enable_prefix_caching": c.enable_prefix_caching,
            "enable_chunked_prefill": c.enable_chunked_prefill,
            "async_scheduling": c.async_scheduling,
        }
        return EngineInfo(
            kind="simulated",
            version=f"scheduler of vLLM {PROVED_AGAINST_VLLM}",
            effective_args=effective,
            num_gpus=num_gpus,
            device_uuids=tuple(f"simulated-{i}" for i in range(num_gpus)),
            kv_capacity_tokens=(c.num_blocks - 1) * c.block_size,
            num_kv_blocks=c.num_blocks,
            block_size=c.block_size,
            max_model_len=c.max_model_len,
            notes={"simulated": s.facts(), "device_names": [s.hardware.name] * num_gpus},
        )

    def run(self, schedule: Schedule, sink: RecordSink, t0_monotonic_s: float) -> Iterator[RequestRecord]:
        inputs = prepare(schedule, self.setup.fleet(), record_tokens=self._record_tokens)
        result = simulate(inputs)
        sink.append_step_columns(**step_columns(inputs, result))
        if self._record_tokens:
            sink.append_chunk_columns(**chunk_columns(schedule, inputs, result))
        power = self._telemetry(inputs, result, sink) if self._power else None
        facts = {**self.setup.facts(), "virtual_duration_s": result.end_s}
        if power is not None:
            facts["intervals"]["power"] = [power.low_ratio, power.high_ratio, power.confidence, power.basis]
        engine = self.setup.step_time.interval("output_tokens_per_s")
        if schedule.kind in ("open_loop", "trace") and engine is not None:
            i = throughput_interval(inputs, simulate, engine)
            facts["intervals"]["output_tokens_per_s"] = [i.low_ratio, i.high_ratio, i.confidence, i.basis]
        sink.update_manifest(simulated=facts)
        yield from request_records(schedule, inputs, result)

    def _telemetry(self, inputs: SimInputs, result: SimResult, sink: RecordSink) -> Interval | None:
        """Predicted power per GPU, and its interval (the widest of the replicas); nothing for devices whose power limit or peaks
        are not known."""
        if not len(result.steps["end_s"]):
            return None
        s, widest = self.setup, None
        for replica in range(len(inputs.fleet.replicas)):
            samples = _power_series(s, result, replica)
            if samples is None:
                return None
            t, power, interval = samples
            if widest is None or interval.high_ratio / interval.low_ratio > widest.high_ratio / widest.low_ratio:
                widest = interval
            energy = np.concatenate([[0.0], np.cumsum(np.diff(t) * power[1:])])
            for index in range(replica * s.memory.num_gpus, (replica + 1) * s.memory.num_gpus):
                sink.append_telemetry_columns(
                    t_s=t, device=[f"simulated-{index}"] * len(t), index=np.full(len(t), index), power_w=power,
                    energy_j=energy, energy_t_s=t,
                )  # fmt: skip
        return widest


def _power_series(s: EngineSetup, result: SimResult, replica: int) -> tuple[np.ndarray, np.ndarray, Interval] | None:
    """(times, mean watts of one GPU since the time before, interval of the power) of one replica, at TELEMETRY_HZ of virtual time."""
    from bench.sim.power import step_power

    mine = result.steps["replica"] == replica
    steps = {name: column[mine] for name, column in result.steps.items()}
    try:
        predicted = step_power(
            s.model, s.hardware, steps, result.end_s, tp=s.memory.tp, pp=s.memory.pp,
            quantization=s.args.get("quantization"), kv_cache_dtype=s.args.get("kv_cache_dtype"),
            step_time=s.step_time.interval("tpot"),
        )  # fmt: skip
    except BadInput:
        return None
    ends = steps["end_s"]
    if not len(ends):
        return None
    begins = np.maximum(np.concatenate([[0.0], ends[:-1]]), ends - steps["gpu_s"] - steps["host_s"])
    idle_w = max(0.0, (predicted.mean_power_w * result.end_s - float(((ends - begins) * predicted.power_w).sum())))
    idle_w /= max(result.end_s - float((ends - begins).sum()), 1e-9)
    count = int(min(max(2, result.end_s * TELEMETRY_HZ), MAX_TELEMETRY_SAMPLES))
    t = np.linspace(0.0, result.end_s, count + 1)
    # energy at any time: piecewise linear over busy spans, idle power in between
    knots = np.column_stack([begins, ends]).ravel()
    busy = np.column_stack([np.zeros(len(ends)), (ends - begins) * (predicted.power_w - idle_w)]).ravel()
    energy = np.interp(t, knots, np.cumsum(busy), left=0.0) + idle_w * t
    power = np.concatenate([[idle_w], np.diff(energy) / np.diff(t)])
    return t, power, predicted.interval


def simulate(inputs: SimInputs) -> SimResult:
    """Compiled where numba is there, else the readable loop: the result is the same, the time is not."""
    try:
        from bench.sim import compiled

        return compiled.simulate(inputs)
    except ImportError:
        from bench.sim import loop
        from bench.sim.step_time_kernel import step_time_s

        return loop.simulate(inputs, step_time_s)


__all__ = ["SimulatedEngine", "Usage", "build", "simulate"]
