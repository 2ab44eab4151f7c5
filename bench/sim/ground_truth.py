"""Measured serving points that others published, as a common form to grade predictions on.

Three files under ``configs/ground_truth`` hold them as facts with their sources:

* ``serving_points.csv``: closed-loop points with mean TTFT and TPOT, the measured sample shipped with NVIDIA
  AIConfigurator 0.12.0 (Apache-2.0). Its policy: lengths uniform in 80-100 % of nominal, ten requests a slot,
  ``max_num_seqs`` = max(256, concurrency), ``max_num_batched_tokens`` 8,192, prefix caching off.
* ``published.csv``: rates of vLLM and TensorRT-LLM from benchmarks, documentation and leaderboards.
* ``power.csv``: the same with power or energy, for ``bench/sim/power.py``.

A row that does not say enough to be predicted is *refused* with the reason, never guessed.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from bench.catalog.model import ModelArch, load_model
from bench.sim.serve_command import ServeCommand, serve_command

GROUND_TRUTH_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ground_truth"

#: vLLM releases: asynchronous scheduling on by default; 0.92 of the memory by default; first with the V1 engine alone;
#: first taken to run the second model runner (known to be the default in 0.32).
ASYNC_SINCE, UTILISATION_092_SINCE, V1_SINCE, V2_RUNNER_SINCE = (0, 14), (0, 22), (0, 9), (0, 26)
#: A waiting prompt must fit whole before its first chunk runs (vLLM pull request 37307, spring 2026); memory of CUDA graphs
#: is subtracted from the KV cache (0.21's own start log says so).
RESERVE_FULL_ISL_SINCE, GRAPH_MEMORY_SINCE = (0, 20), (0, 21)
#: Rows of the serving sample without a release carry a date in their name; the newest release until then was 0.19 (rows of
#: the same day name it).
_NEWEST_ON = (("2026_03", (0, 19)), ("2026_04_0", (0, 19)))

_GPUS = {
    "h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm", "b200_sxm": "b200", "H100-SXM-80GB": "h100-sxm",
    "H200-SXM-141GB": "h200-sxm", "A100-SXM-80GB": "a100-80-sxm", "A100-SXM-40GB": "a100-40-sxm", "B200-180GB": "b200",
    "L40S-48GB": "l40s", "RTX-4090-24GB": "rtx-4090", "H100-80GB": "h100-sxm", "A100-80GB": "a100-80-sxm",
    "A100-PCIe-80GB": "a100-80-pcie",
}  # fmt: skip
#: (pattern, catalogue name or folder of ``models``), first match wins.
_MODELS = (
    ("minimax-m2", "minimax-m2.5"), ("kimi-k2", "kimi-k2.5"), ("gpt-oss-120b", "gpt-oss-120b"), ("gpt-oss-20b", "gpt-oss-20b"),
    ("qwen3-coder-30b|qwen3-30b", "qwen3-30b-a3b"), ("qwen3-235b", "qwen3-235b-a22b"), ("qwen3-32b", "qwen3-32b"),
    ("qwen3-14b", "qwen3-14b"), ("qwen3-8b", "qwen3-8b"), ("qwen2.5-7b", "qwen2.5-7b"), ("qwen2.5-32b", "qwen2.5-32b"),
    ("qwen2.5-72b", "qwen2.5-72b"), ("llama-4-scout", "llama-4-scout"), ("llama-4-maverick", "llama-4-maverick"),
    ("llama-3[.]?1?-405b|llama-3.1-405b", "llama-3.1-405b"), ("llama-3.3-70b|llama-3.1-70b|llama-3-70b", "llama-3.1-70b"),
    ("llama-3.1-8b|llama-3-8b", "llama-3.1-8b"), ("mixtral-8x22b", "mixtral-8x22b"), ("mixtral-8x7b", "mixtral-8x7b"),
    ("mistral-7b", "mistral-7b"), ("mistral-large", "mistral-large-2"), ("mistral-nemo", "mistral-nemo-12b"),
)  # fmt: skip
#: Requests of a full-load run by (input, output) tokens, the same table in every release of NVIDIA's TensorRT-LLM overview.
_FULL_LOAD_REQUESTS = {
    (128, 128): 30000, (128, 2048): 3000, (2048, 128): 3000, (1000, 1000): 3000, (500, 2000): 3000, (20000, 2000): 1000,
}  # fmt: skip
_STAND_INS = ("minimax-m2.5", "kimi-k2.5", "qwen3-14b")
_BLOCK_FP8 = ("qwen3", "minimax", "deepseek")


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point. Times in seconds, nan where not published. ``spread``: low end of uniform lengths, or
    ``"long-tailed"`` for conversations of which only the mean is known."""

    id: str
    source: str
    engine: str
    version: tuple[int, ...]
    gpu: str
    model: str
    precision: str
    quantization: str | None
    tp: int
    ep: bool
    isl: float
    osl: float
    spread: float | str
    kind: str  # "closed_loop": concurrency; "offline": num_requests at once
    concurrency: int
    num_requests: int
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    ttft_s: float = math.nan
    tpot_s: float = math.nan
    output_tokens_per_s: float = math.nan
    note: str = ""
    kv_cache_dtype: str | None = None
    memory_share: float | None = None  # gpu_memory_utilization where it is not the version's default
    asynchronous: bool | None = None  # asynchronous scheduling where it is not the version's default
    prefix_caching: bool = False  # finds a preempted request's own blocks again, even where no two prompts share one

    @property
    def async_scheduling(self) -> bool:
        if self.asynchronous is not None:
            return self.asynchronous
        return not self.version or self.version >= ASYNC_SINCE

    @property
    def gpu_memory_utilization(self) -> float:
        if self.memory_share is not None:
            return self.memory_share
        return 0.90 if self.version and self.version < UTILISATION_092_SINCE else 0.92

    @property
    def scheduler_reserve_full_isl(self) -> bool:
        return not self.version or self.version >= RESERVE_FULL_ISL_SINCE

    @property
    def subtracts_graph_memory(self) -> bool:
        return not self.version or self.version >= GRAPH_MEMORY_SINCE

    @property
    def model_class(self) -> str:
        arch = model_of(self.model)
        if arch.is_moe:
            return "MoE large" if arch.num_params > 1.5e11 else "MoE"
        return "dense large" if arch.num_params > 4e10 else "dense small" if arch.num_params < 1.2e10 else "dense"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that cannot be predicted, and why."""

    id: str
    source: str
    engine: str
    reason: str


@functools.lru_cache(maxsize=64)
def model_of(name: str) -> ModelArch:
    """Catalogue entry, or the stand-in that exists for grading only."""
    if name in _STAND_INS:
        return load_model(GROUND_TRUTH_FOLDER / "models" / name / "config.json")
    return load_model(name)


def full_load_requests(isl: float, osl: float) -> int:
    """How many requests NVIDIA's TensorRT-LLM overview queues for these lengths: 1,500 unless its table says otherwise."""
    return _FULL_LOAD_REQUESTS.get((int(isl), int(osl)), 1500)


def version_of(text: str) -> tuple[int, ...]:
    """``0.18.0`` -> (0, 18); unknown -> ()."""
    found = re.match(r"(?:vLLM )?v?(\d+)\.(\d+)", text or "")
    return (int(found.group(1)), int(found.group(2))) if found else ()


def _newest_on(name: str) -> tuple[int, ...]:
    """The newest release on the date that a row's name begins with; () where it names none."""
    return next((version for date, version in _NEWEST_ON if name.startswith(date)), ())


def points_gpu(label: str) -> str | None:
    """Catalogue name of a GPU as the files write it, or None."""
    return _GPUS.get(label)


def _number(text: str | None) -> float:
    try:
        return float(text) if text not in (None, "") else math.nan
    except ValueError:
        return math.nan


def points_model(label: str) -> str | None:
    """Catalogue name of a model as the files write it, or None."""
    low = label.lower().replace("meta-", "")
    return next((name for pattern, name in _MODELS if re.search(pattern, low)), None)


def points_quantization(precision: str, model: str) -> tuple[str | None, str | None]:
    """(vLLM quantisation, reason for refusal) of a published precision."""
    if "gpt-oss" in model:
        return None, None  # the checkpoint's own MXFP4, whatever a table calls it
    p = precision.lower()
    if p in ("", "nan", "bf16", "fp16"):
        return "none", None
    if p == "fp8":
        return ("fp8_block" if model.startswith(_BLOCK_FP8) else "fp8"), None
    if p in ("int4", "awq-int4", "gptq-int4", "w4a16"):
        return "int4", None
    if p == "w8a8":
        return "int8", None
    return None, f"precision {precision} is not modelled"


def serving_points(
    folder: Path = GROUND_TRUTH_FOLDER, engines: tuple[str, ...] = ("vllm",)
) -> tuple[list[Point], list[Refusal]]:
    """Points of ``serving_points.csv``."""
    points: list[Point] = []
    refused: list[Refusal] = []
    seen: set[tuple[str, ...]] = set()
    with (folder / "serving_points.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["engine"] not in engines:
                continue
            key = tuple(v for k, v in row.items() if k != "id")
            if key in seen:
                continue  # the sample repeats some points under several ids
            seen.add(key)
            made = _serving_point(row)
            (points if isinstance(made, Point) else refused).append(made)  # type: ignore[arg-type]
    return points, refused


def _serving_point(row: dict[str, str]) -> Point | Refusal:
    def refuse(reason: str) -> Refusal:
        return Refusal(row["id"], "NVIDIA serving sample", row["engine"], reason)

    gpu, model = _GPUS.get(row["gpu"]), points_model(row["model"])
    if gpu is None or model is None:
        return refuse(f"{'GPU' if gpu is None else 'model'} not in the catalogue")
    precision = row["precision"] if row["precision"] not in ("", "nan") else "bf16"
    precision = "mxfp4" if "gpt-oss" in model else precision
    quantization, reason = points_quantization(precision, model)
    if precision == "fp4" or reason:
        return refuse(reason or "NVFP4: no kernel times known")
    tp, dp, ep = int(float(row["tp"])), _number(row["dp"]), int(_number(row["moe_ep"]) or 0)
    moe_tp = _number(row["moe_tp"])
    if dp > 1:
        return refuse("attention data parallelism: concurrency per replica unknown")
    if model_of(model).is_moe and not math.isnan(moe_tp) and max(moe_tp, 1) * max(ep, 1) != tp:
        return refuse("experts are spread over more GPUs than attention: attention data parallelism")
    if math.isnan(dp) and precision == "fp8" and ep == 0:
        return refuse("layout not recorded (no data or expert parallel size)")
    c = int(row["concurrency"])
    return Point(
        row["id"], "NVIDIA serving sample", row["engine"], version_of(row["engine_version"]) or _newest_on(row["id"]), gpu, model, precision,
        quantization, tp, ep > 1, float(row["isl"]), float(row["osl"]), 0.8, "closed_loop", c, 10 * c, max(256, c), 8192,
        float(row["ttft_ms"]) * 1e-3, float(row["tpot_ms"]) * 1e-3,
    )  # fmt: skip


def published_points(
    folder: Path = GROUND_TRUTH_FOLDER, engines: tuple[str, ...] = ("vLLM",)
) -> tuple[list[Point], list[Refusal]]:
    """Points of ``published.csv``."""
    points: list[Point] = []
    refused: list[Refusal] = []
    with (folder / "published.csv").open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if row["engine"] in engines:
                made = _published_point(row, f"published-{number}")
                (points if isinstance(made, Point) else refused).append(made)  # type: ignore[arg-type]
    return points, refused


def _published_point(row: dict[str, str], name: str) -> Point | Refusal:
    source, notes = row["source"], row["notes"] or ""

    def refuse(reason: str) -> Refusal:
        return Refusal(name, source, row["engine"], reason)

    gpu, model = _GPUS.get(row["gpu"]), points_model(row["model"])
    if gpu is None or model is None:
        return refuse(f"{'GPU' if gpu is None else 'model'} not in the catalogue")
    quantization, reason = points_quantization(row["precision"] or "", model)
    if reason:
        return refuse(reason)
    isl, osl = _number(row["isl"]), _number(row["osl"])
    arena = source.startswith("ML.ENERGY Leaderboard v3") and "LM Arena" in notes
    if arena:
        isl = 150.0  # chat prompts; the file has no input lengths, and decoding hardly depends on them
    if math.isnan(isl) or math.isnan(osl):
        return refuse("prompt or output lengths not published")
    command = serve_command(notes)
    if command is not None and command.unknown:
        return refuse(f"the serve command's {command.unknown} is not modelled")
    size = _parallel_size(row, command)
    if isinstance(size, str):
        return refuse(size)
    command = command or ServeCommand(tp=size)
    if "MTP" in notes or "speculative" in notes.lower() or ("dp=1" not in notes and "dp=" in notes):
        return refuse("speculative decoding or data parallelism")
    load = _published_load(row, isl, osl, arena)
    if isinstance(load, str):
        return refuse(load)
    fixed = {
        "id": name, "source": source, "engine": row["engine"].lower(), "version": version_of(row["engine_version"]), "gpu": gpu,
        "model": model, "precision": row["precision"] or "bf16", "quantization": quantization, "tp": size, "ep": command.ep,
        "isl": isl, "osl": osl, "output_tokens_per_s": _number(row["output_tok_s_total"]),
        "kv_cache_dtype": "fp8" if row["kv_dtype"] == "fp8" else None, "memory_share": command.memory_share,
        "asynchronous": command.async_scheduling, "prefix_caching": command.prefix_caching,
        "max_num_seqs": command.max_num_seqs, "max_num_batched_tokens": command.max_num_batched_tokens,
    }  # fmt: skip
    return Point(**(fixed | load))  # type: ignore[arg-type]


def _published_load(row: dict[str, str], isl: float, osl: float, arena: bool) -> dict[str, object] | str:
    """Fields of a point that say how a published row was loaded, or why that cannot be told."""
    version, c = version_of(row["engine_version"]), _number(row["concurrency_or_batch"])
    ttft, tpot = _number(row["ttft_ms_p50"]) * 1e-3, _number(row["tpot_ms_p50"]) * 1e-3
    if arena:
        return {"spread": "long-tailed", "kind": "closed_loop", "concurrency": int(2 * c), "num_requests": int(6 * c),
                "max_num_seqs": int(c), "max_num_batched_tokens": 8192, "tpot_s": tpot, "note": "median ITL"}  # fmt: skip
    closed = row["mode"] == "concurrency" and not math.isnan(c)
    if version and version < V1_SINCE and not (closed and c <= 1):
        return "vLLM's V0 engine: another scheduler"
    if closed:
        n = max(4, int(10 * c)) if c > 1 else 2
        latency = {"ttft_s": ttft, "tpot_s": tpot} if c > 1 else {}
        return {"spread": 1.0, "kind": "closed_loop", "concurrency": int(c), "num_requests": n, **latency}
    found = re.search(r"requests=(\d+)", row["notes"] or "")
    if row["mode"] in ("server", "offline") and row["request_rate"] == "inf" and found:
        n = int(found.group(1))
        spread = "long-tailed" if isl < 400 and osl > 50 else 1.0
        return {"spread": spread, "kind": "offline", "concurrency": n, "num_requests": n}
    if row["engine"] == "TensorRT-LLM" and row["mode"] == "offline":
        n = full_load_requests(isl, osl)
        return {"spread": 1.0, "kind": "offline", "concurrency": n, "num_requests": n, "max_num_seqs": 2048,
                "max_num_batched_tokens": 8192}  # fmt: skip
    return "arrival rate or number of requests not published"


def _parallel_size(row: dict[str, str], command: ServeCommand | None) -> int | str:
    """Tensor parallel size of a published row, or why it cannot be told. A serve command goes before the table's columns."""
    if command is not None:
        if command.dp * command.pp > 1:
            return "data or pipeline parallelism"
        return command.tp
    tp, num_gpus = _number(row["tp"]), _number(row["n_gpus"])
    if math.isnan(tp) and num_gpus == 1:
        tp = 1.0
    if math.isnan(tp):
        return "tensor parallel size not published"
    if num_gpus > tp * max(1.0, _number(row["pp"]) if row["pp"] else 1.0):
        return "more GPUs than the tensor parallel size: replicas or data parallelism"
    return int(tp)
