"""A calibrated engine as a small readable file: ``results/profiles/<name>.json``."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bench.catalog.model import ModelArch, load_model
from bench.catalog.yaml_source import normalised
from bench.errors import BadInput, BenchError
from bench.sim import step_time_kernel as kernel
from bench.sim.interface import Interval
from bench.store import write_json_atomically

SCHEMA_VERSION = 1
#: Coefficients of the calibrated step time; see bench/sim/calibrate.py.
PARAMETERS = (
    "linear_scale", "decode_attention_scale", "prefill_attention_scale", "fixed_s", "per_request_s",
    "per_prefill_token_s", "prefill_fixed_s",
)  # fmt: skip
_LEAST_INTERVAL_RATIO = 0.03


@dataclass(frozen=True, slots=True)
class Layout:
    """What the recorded engine was; a profile holds for engines of the same layout. Names are vLLM's own."""

    model: str
    hardware: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_num_seqs: int = 256
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True)
class Profile:
    """A calibrated engine: what ``results/profiles/<name>.json`` holds.

    ``parameters`` are those of :data:`PARAMETERS`; ``errors`` the cross-validated ones: ``step_median_ape`` and
    ``step_p90_ape`` of single steps, ``cell_time_mean_ape`` of the summed time of a left-out cell, and per cell its
    signed error. ``request_before_s`` and ``request_after_s`` are what a request spends outside the engine, 0 where not recorded.
    """

    name: str
    layout: Layout
    parameters: dict[str, float]
    errors: dict[str, Any]
    num_steps: int
    runs: tuple[str, ...]
    created_utc: str
    engine_version: str = ""
    request_before_s: float = 0.0
    request_after_s: float = 0.0
    num_kv_blocks: int | None = None
    block_size: int | None = None
    schema_version: int = SCHEMA_VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"calibrated on {len(self.runs)} recorded runs of {self.layout.model} on {self.layout.hardware} (profile {self.name})"

    def fingerprint(self) -> str:
        """sha256 (hex) over everything the profile holds: equal for equal contents, wherever and however the file lies."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def provenance(self, path: str | None = None) -> dict[str, Any]:
        """What the manifest of a prediction keeps of the profile that it used; ``path`` is where it lay then.

        ``runs`` are those that it was fitted on, so that nobody needs the file to tell a fit from a prediction.
        """
        return {
            "name": self.name,
            "path": path,
            "sha256": self.fingerprint(),
            "created_utc": self.created_utc,
            "engine_version": self.engine_version,
            "num_steps": self.num_steps,
            "runs": list(self.runs),
        }

    def adjustments(self) -> dict[int, float]:
        """Header positions of ``step_time_kernel`` and their calibrated values.

        Recorded periods contain the host's share, so that nothing of it is added once more.
        """
        p, k = self.parameters, kernel
        return {
            k.LINEAR_SCALE: p["linear_scale"],
            k.DECODE_ATTENTION_SCALE: p["decode_attention_scale"],
            k.PREFILL_ATTENTION_SCALE: p["prefill_attention_scale"],
            k.GPU_FIXED_S: p["fixed_s"],
            k.GPU_PER_REQUEST_S: p["per_request_s"],
            k.GPU_PER_PREFILL_TOKEN_S: p["per_prefill_token_s"],
            k.GPU_PREFILL_FIXED_S: p["prefill_fixed_s"],
            k.HOST_FIXED_S: 1e-6,
            k.HOST_PER_RUNNING_S: 0.0,
            k.HOST_PIECEWISE_S: 0.0,
            k.HOST_EAGER_S: 0.0,
            k.HOST_PER_PREFILL_REQUEST_S: 0.0,
            k.GAP_S: 0.0,
            k.GAP_PER_RUNNING_S: 0.0,
            k.SKEW_RATIO: 0.0,
        }

    def intervals(self) -> dict[str, Interval]:
        """90 % intervals from the left-out cells: their spread, t-like widened for how few they are."""
        signed = [float(e) for e in self.errors["cells"].values()]
        n = max(len(signed), 1)
        spread = math.sqrt(sum(e * e for e in signed) / n) if signed else 0.1
        width = max(_LEAST_INTERVAL_RATIO, 1.645 * spread * math.sqrt(1 + 2 / n))
        basis = f"{n} cells of {len(self.runs)} recorded runs, each predicted without itself"
        return {
            m: Interval(max(0.05, 1 - factor * width), 1 + factor * width, 0.90, basis)
            for m, factor in (("tpot", 1.0), ("output_tokens_per_s", 1.0), ("ttft", 2.0))
        }

    def is_of(self, model: ModelArch) -> bool:
        """Whether ``model`` is the architecture that was calibrated, under whatever alias, folder or hub id it ran."""
        named = normalised(Path(self.layout.model).name)
        if named in {normalised(n.rsplit("/", 1)[-1]) for n in (model.name, model.hub_id) if n}:
            return True
        other = _architecture(self.layout.model)
        return other is not None and replace(other, name=model.name, hub_id=model.hub_id) == model

    def check_layout(self, layout: Layout) -> None:
        """Raises BadInput when ``layout`` is another engine than the calibrated one."""
        for name in (
            "model",
            "hardware",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "enable_expert_parallel",
            "quantization",
            "kv_cache_dtype",
        ):
            mine, asked = getattr(self.layout, name), getattr(layout, name)
            if mine != asked and not {mine, asked} <= {None, "auto"}:
                raise BadInput(
                    f"profile {self.name} was calibrated with {name} {mine}, not {asked}",
                    next_step="calibrate on runs of that engine, or predict without the profile",
                )


@functools.lru_cache(maxsize=16)
def _architecture(name: str) -> ModelArch | None:
    """The architecture that a run was of; None where its name says nothing here (a folder that is gone, a hub out of reach)."""
    try:
        return load_model(name)
    except BenchError:
        return None


def save_profile(profile: Profile, folder: Path) -> Path:
    """Write ``<folder>/<name>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{profile.name}.json"
    write_json_atomically(path, asdict(profile))
    return path


def _check_names(prefix: str, data: Any, known: Collection[str], needed: Collection[str]) -> None:
    """Raises ValueError where ``data`` is not a mapping with what is ``needed`` and, if anything is, only what is ``known``."""
    if not isinstance(data, dict):
        raise ValueError(
            f"{prefix.removesuffix('.') or 'it'} is {type(data).__name__}, expected a mapping of names to values"
        )
    missing = next((name for name in needed if name not in data), None)
    if missing is not None:
        raise ValueError(f"{prefix}{missing} is missing")
    unknown = next((name for name in data if known and name not in known), None)
    if unknown is not None:
        raise ValueError(f"{prefix}{unknown} is not known here")


def _made(kind: type, prefix: str, data: Any) -> Any:
    """The dataclass ``kind`` from its JSON form. Raises ValueError with the name of what is missing or unknown."""
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    _check_names(prefix, data, [f.name for f in fields(kind)], needed)
    return kind(**data)


def _check_numbers(p: Profile) -> None:
    """Raises ValueError that names the first entry that is missing or is not the number it should be."""
    _check_names("parameters.", p.parameters, PARAMETERS, PARAMETERS)
    numbers: dict[str, Any] = {f"parameters.{name}": value for name, value in p.parameters.items()}
    numbers |= {"request_before_s": p.request_before_s, "request_after_s": p.request_after_s}
    whole: dict[str, Any] = {"num_steps": p.num_steps, "schema_version": p.schema_version}
    whole |= {name: getattr(p, name) for name in ("num_kv_blocks", "block_size") if getattr(p, name) is not None}
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs"):
        whole[f"layout.{name}"] = getattr(p.layout, name)
    for name, value in {**numbers, **whole}.items():
        kind, text = (int, "a whole number") if name in whole else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}, expected {text} >= 0")
    _check_names("errors.", p.errors, (), ("cells",))
    _check_names("errors.cells.", p.errors["cells"], (), ())
    for cell, error in p.errors["cells"].items():
        if isinstance(error, bool) or not isinstance(error, (int, float)) or not math.isfinite(error):
            raise ValueError(f"errors.cells.{cell} is {error!r}, expected a number")


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises BadInput where it is none, or of a newer version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        _check_names("", data, (), ("schema_version", "layout", "runs"))
        version = data["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BadInput(f"written by a newer version ({version})", where=str(path), next_step="update")
        data["layout"] = _made(Layout, "layout.", data["layout"])
        if not isinstance(data["runs"], list):
            raise ValueError(f"runs is {data['runs']!r}, expected a list")
        data["runs"] = tuple(data["runs"])
        profile: Profile = _made(Profile, "", data)
        _check_numbers(profile)
        return profile
    except OSError as e:
        raise BadInput(
            f"cannot read: {e.strerror}", where=str(path), next_step="write one with `bench calibrate`"
        ) from e
    except ValueError as e:
        raise BadInput(
            f"not a calibration profile: {e}", where=str(path), next_step="write one with `bench calibrate`"
        ) from e
