"""From a model, a GPU and vLLM's engine arguments to a fleet that can be simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware
from bench.catalog.memory import MemoryFit, fit
from bench.errors import BadInput, DoesNotFit
from bench.sim.defaults import SCHEDULER_ARGS, Usage, scheduler_config
from bench.sim.fleets import ONE_ENGINE, FleetShape, transfer_s_per_token
from bench.sim.inputs import Fleet, Replica
from bench.sim.interface import Interval
from bench.sim.profile import Profile, load_profile
from bench.sim.scheduler import PROVED_AGAINST_VLLM, SchedulerConfig
from bench.sim.step_time import StepTime, build_step_time, load_overheads

#: Arguments that step times or memory follow; with SCHEDULER_ARGS these are all that the simulation reads.
LAYOUT_ARGS = frozenset(
    [
        "tensor_parallel_size",
        "data_parallel_size",
        "api_server_count",
        "enable_expert_parallel",
        "quantization",
        "kv_cache_dtype",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "enforce_eager",
        "dtype",
    ]
)
#: Arguments that change nothing that is simulated.
NEUTRAL_ARGS = frozenset(
    [
        "seed",
        "disable_log_stats",
        "trust_remote_code",
        "load_format",
        "download_dir",
        "tokenizer",
        "tokenizer_mode",
        "served_model_name",
        "host",
        "port",
        "disable_log_requests",
        "enable_log_requests",
        "hf_overrides",
        "skip_tokenizer_init",
        "revision",
    ]
)


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One engine (all its data-parallel ranks) on one kind of GPU, or a fleet of them, ready to simulate.

    Attributes:
        memory: what fits; its capacity is replaced where ``kv_source`` says so.
        kv_source: where the number of KV blocks comes from: ``memory formula``, ``num_gpu_blocks_override`` or ``profile``.
        num_replicas: data-parallel ranks of one engine.
        ignored: engine arguments that are given and not simulated.
        shape: how many such engines there are, behind what router.
        profile: what a manifest keeps of the calibration behind ``step_time`` (``Profile.provenance``); None without one.
    """

    model: ModelArch
    hardware: Hardware
    args: dict[str, Any]
    usage: Usage
    memory: MemoryFit
    config: SchedulerConfig
    step_time: StepTime
    kv_source: str
    num_replicas: int
    ignored: tuple[str, ...]
    over_http: bool = True
    shape: FleetShape = ONE_ENGINE
    profile: dict[str, Any] | None = None

    @property
    def num_gpus(self) -> int:
        return self.memory.num_gpus * self.num_replicas * self.shape.num_engines

    def fleet(self) -> Fleet:
        """The engines of ``shape`` behind their router (data-parallel ranks of one engine are replicas too)."""
        coefficients = self.step_time.coefficients()
        by_role = {role: Replica(self.config, coefficients, role) for role in set(self.shape.roles)}
        before, after, front_end_s = http_overhead_s(self.step_time)
        if not self.over_http:
            # the shipped overheads are those of an HTTP server, a calibration's those of engines without one
            calibrated = self.step_time.trust == "user-runs"
            before, after = self.step_time.request_overhead_s() if calibrated else (0.0, 0.0)
            front_end_s = 0.0
        return Fleet(
            tuple(by_role[role] for role in self.shape.roles for _ in range(self.num_replicas)),
            self.shape.routing,
            # the proxy gets the prefill engine's answer and asks the decode engine: one more way out and in
            transfer_latency_s=before + after if self.shape.disaggregated else 0.0,
            transfer_s_per_token=self._transfer_s_per_token,
            request_before_s=before,
            request_after_s=after,
            front_end_s=front_end_s / self._num_front_ends,
        )

    @property
    def _num_front_ends(self) -> int:
        """API servers that take requests in, by default one a data-parallel rank as in ``vllm serve``; together they are
        taken as one that is so many times as fast."""
        entries = sum(role != "decode" for role in self.shape.roles)
        return entries * int(self.args.get("api_server_count") or self.num_replicas)

    @property
    def _transfer_s_per_token(self) -> float:
        m = self.memory
        return transfer_s_per_token(self.shape, self.model, self.hardware, self.args.get("kv_cache_dtype"), m.tp, m.pp)

    def facts(self) -> dict[str, Any]:
        """What a manifest keeps of the prediction's sources."""
        return {
            "gpu": self.hardware.name,
            "scheduler_proved_against_vllm": PROVED_AGAINST_VLLM,
            "step_time_source": self.step_time.source,
            "step_time_trust": self.step_time.trust,
            "profile": self.profile,
            "kv_source": self.kv_source,
            "kv_cache_bytes": self.memory.kv_cache_bytes,
            "kv_uncertain_bytes": self.memory.uncertain_bytes,
            "not_simulated": list(self.ignored),
            "fleet": {**asdict(self.shape), "kv_transfer_s_per_token": self._transfer_s_per_token},
            "intervals": {
                metric: None if i is None else [i.low_ratio, i.high_ratio, i.confidence, i.basis]
                for metric in ("ttft", "tpot", "output_tokens_per_s")
                for i in [self.step_time.interval(metric)]
            },
        }


def http_overhead_s(step_time: StepTime) -> tuple[float, float, float]:
    """Of a request to one engine behind ``vllm serve``: seconds before the engine's queue, seconds from its output to the client,
    and of the former those that the server's front end spends on one request at a time (the others wait)."""
    before, after = step_time.request_overhead_s()
    if step_time.trust == "user-runs":
        before += step_time.front_end_s  # the runs that calibrate have no HTTP server
    return before, after, step_time.front_end_s


#: A host has no memory of its own in the catalogue; vLLM takes what VLLM_CPU_KVCACHE_SPACE says. A profile's blocks count.
_CPU_KV_BYTES = 2**30


def engine_setup(
    model: ModelArch,
    hardware: Hardware,
    args: Mapping[str, Any],
    *,
    usage: Usage = "server",
    profile: Profile | Path | None = None,
    kernels: Path | None = None,
    typical_tokens: int = 2048,
    over_http: bool | None = None,
    shape: FleetShape | None = None,
) -> EngineSetup:
    """The engine that vLLM would start with ``args`` on ``hardware``.

    Args:
        usage: "llm" for offline batches in process, "server" else; vLLM's defaults differ.
        profile: a calibration (or its file); ``kernels``: a result of ``bench kernels``. See ``build_step_time``.
        typical_tokens: length of a request, for models whose layers hold different windows of the KV cache: the simulator
            keeps one block table and gets as many blocks as hold the same number of such requests.
        over_http: requests come through an HTTP server (None: as ``usage`` says).
        shape: several such engines behind a router (None: one).

    Raises:
        DoesNotFit: weights or KV cache exceed the memory. BadInput: arguments that vLLM would refuse.
    """
    args = {k: v for k, v in args.items() if v is not None}
    path = str(profile) if isinstance(profile, Path) else None
    if isinstance(profile, Path):
        profile = load_profile(profile)
    tp, pp = int(args.get("tensor_parallel_size", 1)), int(args.get("pipeline_parallel_size", 1))
    experts = bool(args.get("enable_expert_parallel", False))
    memory = _memory(model, hardware, args, usage, tp, pp, experts)
    max_model_len = _max_model_len(model, args)
    blocks, source = _num_blocks(memory, args, profile, min(typical_tokens, max_model_len))
    config = scheduler_config(args, hardware, usage, max_model_len, blocks, memory.block_size)
    step_time = build_step_time(
        model,
        hardware,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_expert_parallel=experts,
        quantization=args.get("quantization"),
        kv_cache_dtype=args.get("kv_cache_dtype"),
        max_num_seqs=config.max_num_seqs,
        enforce_eager=bool(args.get("enforce_eager", False)),
        async_scheduling=config.async_scheduling,
        profile=profile,
        kernels=kernels,
    )
    ignored = tuple(sorted(set(args) - SCHEDULER_ARGS - LAYOUT_ARGS - NEUTRAL_ARGS))
    dp = int(args.get("data_parallel_size", 1))
    http = usage == "server" if over_http is None else over_http
    if http and profile is not None:
        step_time = dataclasses.replace(step_time, intervals=without_server(step_time.intervals))
    return EngineSetup(
        model, hardware, dict(args), usage, memory, config, step_time, source, dp, ignored, http, shape or ONE_ENGINE,
        None if profile is None else profile.provenance(path),
    )  # fmt: skip


def without_server(calibrated: Mapping[str, Interval]) -> dict[str, Interval]:
    """Intervals of a calibrated engine behind an HTTP server. Engine steps are recorded in process, so that no calibration has
    seen what a server adds and takes: each interval reaches as far as that of an engine that was never fitted."""
    known = load_overheads().intervals["own-curves-other-models"]
    return {
        m: dataclasses.replace(
            i,
            low_ratio=min(i.low_ratio, known[m][0]),
            high_ratio=max(i.high_ratio, known[m][1]),
            basis=f"{i.basis}; no HTTP server among them: as wide as that of an engine never fitted at least",
        )
        for m, i in calibrated.items()
    }


def _max_model_len(model: ModelArch, args: Mapping[str, Any]) -> int:
    """vLLM's check: no longer than the model's positions reach, unless the model's config is overridden."""
    length = int(args.get("max_model_len") or model.max_position)
    if length > model.max_position and not args.get("hf_overrides"):
        raise BadInput(
            f"max_model_len is {length:,}, {model.name} takes at most {model.max_position:,} tokens; vLLM refuses to start",
            next_step=f"ask for at most {model.max_position:,} tokens of prompt and output",
        )
    return length


def _memory(
    model: ModelArch, hardware: Hardware, args: Mapping[str, Any], usage: Usage, tp: int, pp: int, experts: bool
) -> MemoryFit:
    memory = fit(
        model,
        hardware,
        tp,
        pp,
        tp if experts else 1,
        quantization=args.get("quantization"),
        kv_cache_dtype=args.get("kv_cache_dtype"),
        gpu_memory_utilization=args.get("gpu_memory_utilization"),
        max_model_len=args.get("max_model_len"),
        max_num_batched_tokens=args.get("max_num_batched_tokens"),
        max_num_seqs=args.get("max_num_seqs"),
        block_size=args.get("block_size"),
        enforce_eager=bool(args.get("enforce_eager", False)),
        usage=usage,
        kv_cache_memory_bytes=args.get("kv_cache_memory_bytes") or (_CPU_KV_BYTES if hardware.kind == "cpu" else None),
    )
    if not memory.fits:
        gpus = f"{tp * pp} x {hardware.name}" if tp * pp > 1 else hardware.name
        raise DoesNotFit(
            f"{model.name} ({memory.quantization}) does not fit {gpus}: {memory.reason}",
            next_step="more GPUs (tensor_parallel_size), a smaller dtype, or see `bench fit`",
        )
    return memory


def _num_blocks(
    memory: MemoryFit, args: Mapping[str, Any], profile: Profile | None, typical_tokens: int
) -> tuple[int, str]:
    override = args.get("num_gpu_blocks_override")
    if override:
        return int(override), "num_gpu_blocks_override"
    if profile is not None and profile.num_kv_blocks and profile.block_size == memory.block_size:
        return profile.num_kv_blocks, "profile"
    blocks = memory.equivalent_blocks(typical_tokens) if len(memory.groups) > 1 else memory.num_blocks
    length = memory.max_model_len
    if memory.longest_request_tokens < length:
        raise DoesNotFit(
            f"the KV cache of {memory.model} on {memory.hardware} holds a request of {memory.longest_request_tokens:,} tokens, "
            f"max_model_len is {length:,}",
            next_step=f"set max_model_len to at most {memory.longest_request_tokens}, or use more GPUs; vLLM refuses to start",
        )
    # one table for layers with windows: what vLLM's own check allowed must be allowed here too
    return max(blocks, -(-length // memory.block_size) + 1), "memory formula"
