"""What a manifest says, read in one place: everything else in analysis and reports asks here, not the raw JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from bench.config.experiment import (
    CellSpec,
    ClosedLoopLoad,
    FleetSpec,
    OfflineLoad,
    OpenLoopLoad,
    RampLoad,
    SimulatedEngine,
    load_level,
)
from bench.store import RunReader
from bench.telemetry.source import CPU_DEVICE

#: The level's name of an imported run whose file does not say how it was loaded; its value means nothing.
LOAD_UNKNOWN = "load unknown"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The facts of one run. ``engine`` is :class:`bench.records.EngineInfo` as a mapping; ``spec`` is None for imports."""

    experiment: str
    cell_id: str
    run: str  # folder name
    repeat: int
    status: str
    reason: str | None  # why it failed
    origin: str
    created_utc: str
    axes: dict[str, Any]
    spec: CellSpec | None
    engine: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def on_gpu(self) -> bool:
        return self.num_gpus > 0

    @property
    def num_gpus(self) -> int:
        """GPUs that the engine held (or would hold, when simulated); 0 on a CPU."""
        return max(0, _int(self.engine.get("num_gpus")) or 0)

    @property
    def num_devices(self) -> int:
        """What "per GPU" divides by: the GPUs held, or 1 for the host of a run without GPU."""
        return max(1, self.num_gpus)

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices whose telemetry counts: the engine's GPUs by UUID, or the host."""
        found = self.engine.get("device_uuids")
        uuids = tuple(str(u) for u in found) if isinstance(found, (list, tuple)) else ()
        return uuids or ((CPU_DEVICE,) if not self.on_gpu else ())

    @property
    def schedule_kind(self) -> str:
        """offline, closed_loop, open_loop or trace."""
        if "kind" in self.schedule:
            return str(self.schedule["kind"])
        load = self.spec.load if self.spec is not None else None
        if isinstance(load, RampLoad):
            return "closed_loop" if load.segments[0].concurrency else "open_loop"
        return str(load.kind) if load is not None else "offline"

    @property
    def target_in_flight(self) -> int | None:
        """Concurrency of a closed loop or batch size of offline batches; None where there is none."""
        load = self.spec.load if self.spec is not None else None
        if isinstance(load, OfflineLoad):
            return load.batch_size
        if isinstance(load, ClosedLoopLoad):
            return load.concurrency
        if isinstance(load, OpenLoopLoad):
            return None
        return _int(self.schedule.get("max_in_flight")) or None

    @property
    def level(self) -> tuple[str, float] | None:
        """(name, value) of the load: ("batch_size", 8)."""
        if self.spec is not None:
            return load_level(self.spec.load)
        return self._imported_level()

    def _imported_level(self) -> tuple[str, float] | None:
        """The load of a run without a spec, from its schedule."""
        name, key = {
            "closed_loop": ("concurrency", "max_in_flight"),
            "open_loop": ("rate_per_s", "rate_per_s"),
            "offline": ("batch_size", "batch_size"),
        }.get(str(self.schedule.get("kind")), ("", ""))
        value = self.schedule.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return (LOAD_UNKNOWN, 1.0) if self.origin == "imported" else None
        return name, float(value)

    @property
    def devices_known(self) -> bool:
        """False for an imported run that says nowhere how many GPUs its engine held."""
        return self.origin != "imported" or _int(self.engine.get("num_gpus")) is not None

    @property
    def why_no_devices(self) -> str:
        return "the number of GPUs is not in the imported file: give --gpus to `bench import`"

    @property
    def parallel_text(self) -> str:
        """How the engine was spread, for labels: "TP 2"; an imported run may only know its GPUs, or nothing."""
        if self.fleet is not None and self.fleet.text:
            return f"TP {self.tensor_parallel_size}, {self.fleet.text}"
        if self.origin != "imported" or "tensor_parallel_size" in self.effective_args:
            return f"TP {self.tensor_parallel_size}"
        if not self.devices_known:
            return "GPUs unknown"
        return f"{self.num_gpus} GPU{'s' if self.num_gpus != 1 else ''}" if self.on_gpu else "CPU"

    @property
    def fleet(self) -> FleetSpec | None:
        """The simulated engines behind a router; None for a real engine."""
        engine = self.spec.engine if self.spec is not None else None
        return engine.fleet if isinstance(engine, SimulatedEngine) else None

    @property
    def tensor_parallel_size(self) -> int:
        if self.spec is not None:
            return self.spec.tensor_parallel_size
        return _int(self.effective_args.get("tensor_parallel_size")) or 1

    @property
    def max_num_seqs(self) -> int | None:
        return _int(self.effective_args.get("max_num_seqs")) or None

    @property
    def effective_args(self) -> dict[str, Any]:
        """The engine's arguments as it understood them; empty where unknown."""
        return _mapping(self.engine.get("effective_args"))

    @property
    def kv_capacity_tokens(self) -> int | None:
        return _int(self.engine.get("kv_capacity_tokens")) or None

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """The GPUs of the machine as provenance has them."""
        found = self.provenance.get("gpus")
        return [g for g in found if isinstance(g, dict)] if isinstance(found, list) else []

    @property
    def fingerprint_devices(self) -> list[str]:
        found = self.fingerprint.get("devices")
        return [str(d) for d in found] if isinstance(found, list) else []

    @property
    def cpu(self) -> dict[str, Any]:
        return _mapping(self.provenance.get("cpu"))


def run_facts(run: RunReader) -> RunFacts:
    """The facts of a run, tolerant of what an older or foreign manifest lacks."""
    m = run.manifest
    error = m.get("error")
    return RunFacts(
        experiment=str(m.get("experiment") or run.folder.parent.parent.name),
        cell_id=str(m.get("cell_id") or run.folder.parent.name),
        run=run.folder.name,
        repeat=_int(m.get("repeat")) or _number_of(run.folder.name),
        status=run.status,
        reason=_text(error.get("reason") if isinstance(error, dict) else error),
        origin=run.origin,
        # an imported run's folder was created long after the run
        created_utc=str(m.get("t0_utc") or ("" if run.origin == "imported" else m.get("created_utc")) or ""),
        axes=_mapping(m.get("axes")),
        spec=_spec(m.get("cell")),
        engine=_mapping(m.get("engine")),
        provenance=_mapping(m.get("provenance")),
        fingerprint=_mapping(m.get("fingerprint")),
        schedule=_mapping(m.get("schedule")),
        client=_mapping(m.get("client")),
        telemetry=_mapping(m.get("telemetry")),
        manifest=m,
    )


#: May differ between engine starts of one configuration: seeds, ports, and what vLLM finds by profiling its memory.
_FREE_ARGS = frozenset({"seed", "port", "host", "num_gpu_blocks", "kv_cache_size_tokens"})


def checked_metadata(facts: RunFacts) -> dict[str, Any]:
    """What must be equal in runs that are put together: key -> value. Seeds and times are free to differ."""
    engine = facts.engine
    out: dict[str, Any] = {
        "origin": facts.origin,
        "cell_id": facts.cell_id,
        "engine.kind": engine.get("kind"),
        "engine.version": engine.get("version"),
        "engine.num_gpus": facts.num_gpus,
    }
    args = {k: v for k, v in facts.effective_args.items() if k not in _FREE_ARGS}
    out |= {f"engine.effective_args.{k}": v for k, v in sorted(args.items())}
    out |= {f"fingerprint.{k}": v for k, v in sorted(facts.fingerprint.items())}
    if facts.spec is not None:
        out["spec"] = facts.spec.model_dump(mode="json")
    return out


def _spec(raw: Any) -> CellSpec | None:
    if not isinstance(raw, dict):
        return None
    try:
        return CellSpec.model_validate(raw)
    except ValidationError:
        return None


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number_of(name: str) -> int:
    digits = name.removeprefix("run-").split("-", 1)[0]
    return int(digits) if digits.isdigit() else 0
