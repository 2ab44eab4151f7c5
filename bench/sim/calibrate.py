"""Fit step times to engine steps that ``bench run`` recorded: bounded least squares, and an honest error.

The time of a step is taken as

    a * (projections, MLP, norms, all-reduce) + d * (decode attention) + p * (prefill attention)
      + fixed + per_request * sampled rows + per_prefill_token * prompt tokens + prefill_fixed

where the three tables in brackets are those of the uncalibrated model (``bench/sim/step_time.py``) and every coefficient
is bounded from below by zero. On a device with efficiency curves a ridge pulls each coefficient towards the
uncalibrated model by as much as the data leave open; on a device without (a host CPU) the data alone decide. Relative
residuals are weighed robustly, so that a stray slow step does not bend the fit. That makes it a fit of the *median* step,
while rates follow from the *mean*, which the longer tail of slow steps raises by some percent: the whole is therefore
raised to the total time of the recorded steps, of which none counts for more than three times its fitted time.

The error that is reported is cross-validated: each cell (or, with one cell, each fifth of its steps) is predicted by a
fit that never saw it. Recordings that cannot tell the coefficients apart are refused with what to run in addition.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from bench.catalog.hardware import Hardware, load_hardware, match_device
from bench.catalog.model import ModelArch, load_model
from bench.errors import BadInput
from bench.sim import step_time_kernel as kernel
from bench.sim.profile import PARAMETERS, Layout, Profile
from bench.store import RunReader

#: The uncalibrated model's values of PARAMETERS, and how far a ridge lets the data pull each (one "sigma").
_PRIOR = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
_PRIOR_SIGMA = np.array([0.3, 0.5, 0.5, 3e-3, 5e-5, 5e-6, 1e-2])
_RIDGE_STEPS = 20.0  # the ridge weighs as much as this many steps
_MIN_STEPS, _MIN_PREFILL_STEPS, _MIN_BATCHES = 60, 5, 3
_MAX_STEPS = 40_000
_MOST_OF_A_STEP = (
    3.0  # slower than this many times its fitted time is an accident of the machine, not the engine's tail
)
#: What binds a CPU engine's threads to cores; None where nothing does.
_CORES = ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Steps:
    """Recorded steps as arrays, one value a step; ``cell`` numbers the cell that a step comes from."""

    time_s: np.ndarray
    prefill_requests: np.ndarray
    prefill_tokens: np.ndarray
    prefill_pairs: np.ndarray
    decode_requests: np.ndarray
    decode_context: np.ndarray
    num_running: np.ndarray
    cell: np.ndarray
    cell_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.time_s)

    def where(self, mask: np.ndarray) -> Steps:
        names = [f.name for f in fields(self) if f.name != "cell_names"]
        return Steps(**{n: getattr(self, n)[mask] for n in names}, cell_names=self.cell_names)


def recorded_steps(run: RunReader) -> Any:
    """The table of the run's engine steps; None where none were recorded."""
    table = run.table("engine_steps.arrow")
    return table if table is not None and table.num_rows else None


def steps_of_runs(runs: Sequence[RunReader]) -> Steps:
    """The usable steps of recorded runs: those that followed another one without a pause.

    Raises BadInput for runs that recorded none.
    """
    columns: dict[str, list[np.ndarray]] = {}
    names = sorted({str(r.manifest.get("cell_id", r.folder.parent.name)) for r in runs})
    for run in runs:
        table = recorded_steps(run)
        if table is None:
            continue
        c = {n: np.asarray(table.column(n).to_pandas(), dtype=np.float64) for n in table.column_names}
        ok = np.isfinite(c["step_time_s"]) & (c["step_time_s"] > 0) & (c["prefill_tokens"] + c["decode_tokens"] > 0)
        prompts, tokens, decodes = c["prefill_requests"], c["prefill_tokens"], c["decode_requests"]
        context = np.nan_to_num(c.get("context_tokens", np.zeros(len(ok))))
        chunk = tokens / np.maximum(prompts, 1)
        # The recorded context is one sum: of the decodes where there are any, else of the prompt's earlier chunks.
        earlier = np.where(decodes > 0, 0.0, context)
        part = {
            "time_s": c["step_time_s"],
            "prefill_requests": prompts,
            "prefill_tokens": tokens,
            "prefill_pairs": chunk * earlier + tokens * (chunk + 1) / 2,
            "decode_requests": decodes,
            "decode_context": np.where(decodes > 0, context + decodes, 0.0),
            "num_running": c["num_running"],
            "cell": np.full(len(ok), names.index(str(run.manifest.get("cell_id", run.folder.parent.name)))),
        }
        for key, values in part.items():
            columns.setdefault(key, []).append(values[ok])
    if not columns:
        where = str(runs[0].folder) if runs else None
        raise BadInput(
            "no engine steps are recorded",
            where=where,
            next_step="run the experiment with the vllm engine of `bench run`",
        )
    joined = {k: np.concatenate(v) for k, v in columns.items()}
    steps = Steps(**joined, cell_names=tuple(names))
    if len(steps) > _MAX_STEPS:
        steps = steps.where(np.sort(np.random.default_rng(0).choice(len(steps), _MAX_STEPS, replace=False)))
    return steps


def design(steps: Steps, array: np.ndarray) -> np.ndarray:
    """(num_steps, len(PARAMETERS)): seconds that each parameter contributes at the value 1."""
    k = kernel
    base = array.copy()
    for position in (k.LINEAR_SCALE, k.DECODE_ATTENTION_SCALE, k.PREFILL_ATTENTION_SCALE, k.GPU_FIXED_S, k.GPU_PER_REQUEST_S,
                     k.GPU_PER_PREFILL_TOKEN_S, k.GPU_PREFILL_FIXED_S, k.GAP_S, k.GAP_PER_RUNNING_S, k.SKEW_RATIO):  # fmt: skip
        base[position] = 0.0
    tables = []
    for position in (k.LINEAR_SCALE, k.DECODE_ATTENTION_SCALE, k.PREFILL_ATTENTION_SCALE):
        one = base.copy()
        one[position] = 1.0
        tables.append(_gpu_s(steps, one))
    prompts = steps.prefill_requests > 0
    rows = steps.prefill_requests + steps.decode_requests
    others = [np.ones(len(steps)), rows, steps.prefill_tokens, prompts.astype(float)]
    return np.stack([*tables, *others], axis=1)


def _gpu_s(steps: Steps, array: np.ndarray) -> np.ndarray:
    seen: dict[tuple[float, ...], float] = {}
    out = np.empty(len(steps))
    for i in range(len(steps)):
        key = (
            steps.prefill_requests[i], steps.prefill_tokens[i], steps.prefill_pairs[i], steps.decode_requests[i],
            steps.decode_context[i], steps.num_running[i],
        )  # fmt: skip
        if key not in seen:
            prompts, tokens, pairs, decodes, context, running = key
            mean = context / decodes if decodes else 0
            seen[key] = kernel.step_time_s(array, prompts, tokens, pairs, 0, decodes, context, mean, running)[0]
        out[i] = seen[key]
    return out


def solve(matrix: np.ndarray, time_s: np.ndarray, with_prior: bool) -> np.ndarray:
    """Bounded robust least squares on relative errors; the parameters in the order of :data:`PARAMETERS`."""
    from scipy.optimize import lsq_linear

    scale = 1.0 / time_s
    weight = np.ones(len(time_s))
    x = _PRIOR.copy()
    columns = np.maximum(np.abs(matrix * scale[:, None]).max(axis=0), 1e-30)
    for _ in range(6):
        w = (np.sqrt(weight) * scale)[:, None]
        a, b = matrix * w, (time_s * w[:, 0])
        if with_prior:
            ridge = math.sqrt(_RIDGE_STEPS) * 0.1 / _PRIOR_SIGMA
            a = np.vstack([a, np.diag(ridge)])
            b = np.concatenate([b, ridge * _PRIOR])
        solution = lsq_linear(a / columns, b, bounds=(0.0, np.inf))
        x = solution.x / columns
        residual = np.abs(matrix @ x - time_s) * scale
        weight = 1.0 / np.maximum(residual, 0.02)
        weight /= weight.mean()
    return np.asarray(x)


def fit(matrix: np.ndarray, time_s: np.ndarray, with_prior: bool) -> np.ndarray:
    """:func:`solve`, raised from the median step to the mean one: the parameters that add up to the recorded time."""
    x = solve(matrix, time_s, with_prior)
    fitted = matrix @ x
    return np.asarray(x * (np.minimum(time_s, _MOST_OF_A_STEP * fitted).sum() / fitted.sum()))


def check_determined(steps: Steps, with_prior: bool) -> None:
    """Raises BadInput, with what to record in addition, where the steps cannot decide the parameters."""
    decode_only = steps.prefill_requests == 0
    prompts = ~decode_only
    batches = np.unique(steps.decode_requests[decode_only])
    missing = []
    if len(steps) < _MIN_STEPS:
        missing.append(f"{len(steps)} steps are recorded, at least {_MIN_STEPS} are needed")
    if not with_prior and len(batches) < _MIN_BATCHES:
        found = ", ".join(f"{b:.0f}" for b in batches) or "none"
        missing.append(f"decode steps of at least {_MIN_BATCHES} batch sizes are needed (found: {found})")
    if prompts.sum() < _MIN_PREFILL_STEPS:
        missing.append(
            f"{int(prompts.sum())} steps with prompts are recorded, at least {_MIN_PREFILL_STEPS} are needed"
        )
    elif not with_prior and np.ptp(np.log2(np.maximum(steps.prefill_tokens[prompts], 1))) < 0.5:
        missing.append("prompts of different lengths are needed: all steps hold about as many prompt tokens")
    if missing:
        raise BadInput(
            "the recorded steps do not determine the step-time model: " + "; ".join(missing),
            next_step="record runs at several batch sizes and prompt lengths",
        )


def cross_validate(matrix: np.ndarray, steps: Steps, with_prior: bool) -> dict[str, Any]:
    """Errors on what each fit did not see: cells in turn, or fifths of the steps where there is one cell."""
    groups = steps.cell
    names = {int(c): steps.cell_names[int(c)] for c in np.unique(groups)}
    if len(names) == 1:
        groups = (np.arange(len(steps)) * 5) // len(steps)
        names = {i: f"fifth {i + 1} of {steps.cell_names[0]}" for i in range(5)}
    predicted = np.empty(len(steps))
    cells = {}
    for number, name in names.items():
        out = groups == number
        x = fit(matrix[~out], steps.time_s[~out], with_prior)
        predicted[out] = matrix[out] @ x
        cells[name] = float(predicted[out].sum() / steps.time_s[out].sum() - 1.0)
    ape = np.abs(predicted / steps.time_s - 1.0)
    return {
        "method": "leave one cell out" if len(np.unique(steps.cell)) > 1 else "leave a fifth of the steps out",
        "step_median_ape": float(np.median(ape)),
        "step_p90_ape": float(np.quantile(ape, 0.9)),
        "cell_time_mean_ape": float(np.mean(np.abs(list(cells.values())))),
        "cells": cells,
    }


def layout_of(manifest: dict[str, Any]) -> Layout:
    """The layout of a run from its manifest. Raises BadInput where the model or device is not known here."""
    cell = manifest.get("cell") or {}
    args = {
        **(manifest.get("engine") or {}).get("effective_args", {}),
        **((cell.get("engine") or {}).get("args") or {}),
    }
    return Layout(
        model=str(cell.get("model", "")),
        hardware=hardware_of(manifest),
        tensor_parallel_size=int(args.get("tensor_parallel_size") or 1),
        pipeline_parallel_size=int(args.get("pipeline_parallel_size") or 1),
        enable_expert_parallel=bool(args.get("enable_expert_parallel") or False),
        quantization=args.get("quantization"),
        kv_cache_dtype=args.get("kv_cache_dtype"),
        max_num_seqs=int(args.get("max_num_seqs") or 256),
        enforce_eager=bool(args.get("enforce_eager") or False),
    )


def engine_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What tells the engine of a run from another one: its layout, and what shares its host's cores or its arithmetic.

    Data-parallel engines of one run share the host; on a CPU an engine is as fast as the cores that it is bound to.
    """
    cell, engine = manifest.get("cell") or {}, manifest.get("engine") or {}
    asked = (cell.get("engine") or {}).get("args") or {}
    args = {**engine.get("effective_args", {}), **asked}
    out = {
        **asdict(layout_of(manifest)),
        "data_parallel_size": int(args.get("data_parallel_size") or 1),
        # a server does not say what its "auto" came to
        "dtype": asked.get("dtype") or "auto",
    }
    if not engine.get("num_gpus"):
        environment = (engine.get("notes") or {}).get("environment") or {}
        out |= {name: environment.get(name) for name in _CORES}
        out["usable cores"] = ((manifest.get("provenance") or {}).get("cpu") or {}).get("num_usable")
    return out


def hardware_of(manifest: dict[str, Any]) -> str:
    """Catalogue name of the device that a run was measured on. Raises BadInput for an unknown GPU."""
    engine = manifest.get("engine") or {}
    if not engine.get("num_gpus"):
        return load_hardware("cpu").name
    for name, memory in _device_names(manifest.get("provenance") or {}):
        found = match_device(name, memory)
        if found is not None:
            return found.name
    raise BadInput(
        "the run's GPU is not in the catalogue", next_step="add it under configs/hardware with its nvml_names"
    )


def _device_names(tree: Any) -> list[tuple[str, int]]:
    """(name, memory) of every mapping in the provenance that looks like a device."""
    found = []
    if isinstance(tree, dict):
        if isinstance(tree.get("name"), str):
            found.append((tree["name"], int(tree.get("memory_bytes") or 0)))
        for value in tree.values():
            found += _device_names(value)
    elif isinstance(tree, list):
        for value in tree:
            found += _device_names(value)
    return found


def base_array(layout: Layout) -> tuple[np.ndarray, ModelArch, Hardware]:
    """The uncalibrated coefficients of a layout."""
    from bench.sim.step_time import build_step_time

    model, hardware = load_model(layout.model), load_hardware(layout.hardware)
    built = build_step_time(
        model, hardware, tensor_parallel_size=layout.tensor_parallel_size, pipeline_parallel_size=layout.pipeline_parallel_size,
        enable_expert_parallel=layout.enable_expert_parallel, quantization=layout.quantization,
        kv_cache_dtype=layout.kv_cache_dtype, max_num_seqs=layout.max_num_seqs,
        enforce_eager=layout.enforce_eager or hardware.kind == "cpu",
    )  # fmt: skip
    return built.coefficients(), model, hardware


def calibrate(runs: Sequence[RunReader], name: str) -> Profile:
    """A profile from recorded runs of one engine.

    Raises:
        BadInput: runs of different engines, simulated runs, no recorded steps, or steps that do not determine the model.
    """
    if not runs:
        raise BadInput("no runs given", next_step="name run folders or the folder of an experiment")
    for run in runs:
        if run.manifest.get("origin") != "measured":
            raise BadInput("only measured runs calibrate", where=str(run.folder), next_step="leave simulated runs out")
    own = engine_of(runs[0].manifest)
    for run in runs[1:]:
        other = engine_of(run.manifest)
        # a server's manifest has no value where the engine in process says "auto"
        unlike = {
            k: (v, other.get(k)) for k, v in own.items() if v != other.get(k) and {v, other.get(k)} != {None, "auto"}
        }
        differ = [f"{k}: {one} and {two}" for k, (one, two) in unlike.items()]
        if differ:
            raise BadInput(
                f"the runs are of different engines ({', '.join(differ)})",
                where=f"{runs[0].folder} and {run.folder}",
                next_step="calibrate one engine at a time",
            )
    layout = layout_of(runs[0].manifest)
    array, _, hardware = base_array(layout)
    with_prior = hardware.kind != "cpu"
    steps = steps_of_runs(runs)
    check_determined(steps, with_prior)
    matrix = design(steps, array)
    x = fit(matrix, steps.time_s, with_prior)
    before, after = request_overheads(runs)
    engine = runs[0].manifest.get("engine") or {}
    return Profile(
        name=name,
        layout=layout,
        parameters=dict(zip(PARAMETERS, map(float, x), strict=True)),
        errors=cross_validate(matrix, steps, with_prior),
        num_steps=len(steps),
        # a run without steps, as of a server, was not fitted on: its cells are predictions
        runs=tuple(
            f"{r.manifest.get('experiment')}/{r.folder.parent.name}/{r.folder.name}"
            for r in runs
            if recorded_steps(r) is not None
        ),
        created_utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        engine_version=str(engine.get("version", "")),
        request_before_s=before,
        request_after_s=after,
        num_kv_blocks=engine.get("num_kv_blocks"),
        block_size=engine.get("block_size"),
        extra={k: v for k, v in own.items() if k not in asdict(layout) and v is not None},
    )


def request_overheads(runs: Sequence[RunReader]) -> tuple[float, float]:
    """(before the queue, after the engine) in seconds, over successful requests; 0 where not recorded.

    Before: the 5 % quantile of (queued - sent). An engine takes requests in between two steps, so that the rest of that
    time is the wait for a running step, which the simulation contains. After: the median of (client's first token -
    engine's); exactly 0 offline, where the engine's own time is the client's.

    Neither can be negative on one clock. Raises BadInput for records that say so: they would bend every TTFT unseen.
    """
    before, after = [], []
    for run in runs:
        for r in run.iter_requests():
            if r.error is None and r.phase == "measured":
                if r.queued_s is not None and r.sent_s is not None:
                    before.append(r.queued_s - r.sent_s)
                if r.first_token_s is not None and r.engine_first_token_s is not None:
                    after.append(r.first_token_s - r.engine_first_token_s)
    found = (float(np.quantile(before, 0.05)) if before else 0.0, float(np.median(after)) if after else 0.0)
    for seconds, what in zip(
        found, ("reached its queue before they were sent", "had tokens after the client"), strict=True
    ):
        if seconds < 0:
            raise BadInput(
                f"the engine's times are not on the client's clock: by them requests {what} ({1e3 * seconds:.3g} ms)",
                where=str(runs[0].folder),
                next_step="calibrate on runs whose engine ran on the client's host",
            )
    return found
