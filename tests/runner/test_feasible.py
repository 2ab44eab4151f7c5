"""Which cells a machine cannot run, and the words it says so in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.config.experiment import CellSpec
from bench.config.loading import load
from bench.config.sweep import make_cell
from bench.errors import BadInput
from bench.runner.feasible import Machine, check_engine_args, why_not
from bench.runner.run_time import rough_run_s


def machine(num_gpus: int, gpu: str | None = None, cores: int = 8, vllm: bool = True) -> Machine:
    hardware = load_hardware(gpu) if gpu else None
    memory = hardware.memory_bytes if hardware else None
    return Machine(num_gpus, gpu, memory, cores, 64 * 2**30, vllm, hardware)


def reason(m: Machine, model: str, *, isl: int = 100, osl: int = 100, kind: str = "vllm", **args: Any) -> str | None:
    spec = CellSpec.model_validate(
        {
            "model": model,
            "weights": "dummy",
            "engine": {"kind": kind, "args": args},
            "load": {"kind": "offline", "batch_size": 8},
            "workload": {"isl": isl, "osl": osl},
        }
    )
    return why_not(make_cell({}, spec), m, load_model(model))


def test_what_runs() -> None:
    assert reason(machine(1, "H100-SXM"), "llama-3.1-8b") is None
    assert reason(machine(4, "A100-80-SXM"), "llama-3.1-70b", tensor_parallel_size=4) is None
    assert reason(machine(0, cores=2), "tiny-llama", tensor_parallel_size=2) is None


@pytest.mark.parametrize(
    ("m", "model", "args", "words"),
    [
        (machine(0, vllm=False), "tiny-llama", {}, "vLLM is not installed"),
        (machine(2, "H100-SXM"), "llama-3.1-8b", {"tensor_parallel_size": 4}, "needs 4 GPUs, this machine has 2"),
        (machine(0, cores=2), "tiny-llama", {"tensor_parallel_size": 4}, "needs 4 CPU ranks, this machine has 2 cores"),
        (machine(8, "H100-SXM"), "llama-3.1-8b", {"tensor_parallel_size": 3}, "not divisible by"),
        (machine(1, "H100-SXM"), "llama-3.1-70b", {}, ""),
        (machine(1, "L4"), "qwen3-32b", {}, ""),
        (machine(1, "H100-SXM"), "llama-3.1-8b", {"max_model_len": 100}, "max_model_len is 100"),
        (machine(0), "llama-3.1-70b", {}, "of memory"),
    ],
)
def test_what_does_not(m: Machine, model: str, args: dict[str, Any], words: str) -> None:
    said = reason(m, model, **args)
    assert said is not None and words in said
    assert "\n" not in said and len(said) < 200


@pytest.mark.parametrize(
    ("args", "sweep", "line", "field"),
    [
        ("{max_num_seq: 8}", "{}", 5, "engine.args.max_num_seq"),
        ("{}", "{grid: {engine.args.max_num_seq: [1, 2]}}", 9, "sweep.grid.engine.args.max_num_seq[0]"),
        (
            "{}",
            "{points: [{batch_size: 2}, {engine.args.max_num_seq: 2}]}",
            9,
            "sweep.points[1].engine.args.max_num_seq",
        ),
    ],
)
def test_a_wrong_engine_argument_has_its_line(tmp_path: Path, args: str, sweep: str, line: int, field: str) -> None:
    path = tmp_path / "typo.yaml"
    lines = ["name: typo", "why: where is it", "model: tiny-llama", "engine:", f"  {{kind: vllm, args: {args}}}"]
    lines += ["load: {kind: offline, batch_size: 2}", "workload: {shape: 8/8}", "sweep:", f"  {sweep}"]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(BadInput) as caught:
        check_engine_args(load(path))
    assert str(caught.value).startswith(f"{path}:{line}: {field}: ")
    assert "did you mean max_num_seqs" in str(caught.value)


def test_engines_elsewhere_are_never_refused() -> None:
    spec = CellSpec.model_validate(
        {
            "model": "llama-3.1-70b",
            "engine": {"kind": "endpoint", "url": "http://127.0.0.1:1"},
            "load": {"kind": "closed_loop", "concurrency": 1},
            "workload": {"isl": 10, "osl": 10},
        }
    )
    assert why_not(make_cell({}, spec), machine(0, vllm=False), None) is None


def test_the_estimate_grows_with_the_work() -> None:
    def cell(batch: int, osl: int) -> Any:
        return make_cell(
            {},
            CellSpec.model_validate(
                {
                    "model": "llama-3.1-8b",
                    "engine": {"kind": "vllm"},
                    "load": {"kind": "offline", "batch_size": batch},
                    "workload": {"isl": 1000, "osl": osl},
                }
            ),
        )

    arch, m = load_model("llama-3.1-8b"), machine(1, "H100-SXM")
    assert 0 < rough_run_s(cell(1, 100), m, arch) < rough_run_s(cell(1, 1000), m, arch)
    assert rough_run_s(cell(8, 100), m, arch) < rough_run_s(cell(256, 100), m, arch)


def timed(load: dict[str, Any], **more: Any) -> Any:
    spec = {"model": "tiny-llama", "engine": {"kind": "vllm"}, "load": load, "workload": {"isl": 16, "osl": 4}, **more}
    return make_cell({}, CellSpec.model_validate(spec))


def test_arrivals_decide_how_long_an_open_loop_takes() -> None:
    m, arch = machine(0), load_model("tiny-llama")
    load = {"kind": "open_loop", "rate_per_s": 2}
    by_count = rough_run_s(timed(load, stop={"min_requests": 100}), m, arch)
    by_time = rough_run_s(timed(load, stop={"min_duration_s": 50}), m, arch)
    assert by_count == pytest.approx(50, rel=0.1) and by_time == pytest.approx(50, rel=0.1)


def test_a_trace_takes_as_long_as_it_says(tmp_path: Path) -> None:
    rows = [f'{{"timestamp": {t * 1000}, "input_length": 16, "output_length": 4}}' for t in range(61)]
    (tmp_path / "day.jsonl").write_text("\n".join(rows) + "\n")
    m, arch = machine(0), load_model("tiny-llama")
    load = {"kind": "trace", "path": "day.jsonl"}
    whole = rough_run_s(timed(load), m, arch, base=tmp_path)
    assert whole == pytest.approx(60, rel=0.1)
    assert rough_run_s(timed({**load, "time_scale": 0.5}), m, arch, base=tmp_path) == pytest.approx(30, rel=0.15)
    assert rough_run_s(timed(load, stop={"max_requests": 11}), m, arch, base=tmp_path) == pytest.approx(10, rel=0.35)
    assert rough_run_s(timed(load, stop={"max_duration_s": 5}), m, arch, base=tmp_path) < 10
    (tmp_path / "noon.jsonl").write_text("\n".join([*rows, '{"timestamp": "noon"}']) + "\n")
    with pytest.raises(BadInput, match=r"noon\.jsonl:62"):
        rough_run_s(timed({**load, "path": str(tmp_path / "noon.jsonl")}), m, arch)
