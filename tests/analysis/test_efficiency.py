"""MFU and MBU against arithmetic done by hand for Llama 3.1 8B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.analysis.efficiency import efficiency, hardware_of, step_work
from bench.analysis.run_facts import RunFacts, run_facts
from bench.analysis.steady_state import Window
from bench.catalog.model import load_model
from bench.config.experiment import VllmServerEngine
from bench.config.sweep import expand
from bench.roofline import Ceilings
from tests.analysis.synthetic import experiment, write_run

WINDOW = Window(0.0, 10.0, "steady", True, "")


def facts_of(tmp_path: Path, tp: int = 1, **run: Any) -> RunFacts:
    cell = expand(experiment(sweep={"grid": {"tensor_parallel_size": [tp], "batch_size": [1]}}))[0]
    return run_facts(write_run(tmp_path, cell, 1, **run))


def decode_steps(num: int, batch: int, context: int) -> dict[str, np.ndarray]:
    def full(value: float) -> np.ndarray:
        return np.full(num, value)

    return {
        "t_s": np.linspace(0.1, 9.9, num), "prefill_tokens": full(0), "prefill_requests": full(0),
        "decode_requests": full(batch), "context_tokens": full(batch * context),
    }  # fmt: skip


def test_a_decode_step_reads_the_weights_once_and_the_cache(tmp_path: Path) -> None:
    model = load_model("llama-3.1-8b")
    flops, size = step_work(facts_of(tmp_path), model, decode_steps(1, 1, 999), WINDOW)
    matrices = model.num_params - model.num_embedding_params  # the embedding is a lookup
    cache = model.kv_bytes_per_token() * 1000
    assert size == pytest.approx(2 * matrices + cache, rel=0.01)
    attention = 4 * model.num_heads * model.head_dim * 1000 * model.num_layers
    assert flops == pytest.approx(2 * model.num_matmul_params_active + attention, rel=0.01)


def test_tp_divides_the_work_of_a_rank(tmp_path: Path) -> None:
    model = load_model("llama-3.1-8b")
    one = step_work(facts_of(tmp_path / "a", 1), model, decode_steps(3, 64, 500), WINDOW)
    four = step_work(facts_of(tmp_path / "b", 4), model, decode_steps(3, 64, 500), WINDOW)
    assert four[0] == pytest.approx(one[0] / 4, rel=0.02)
    assert four[1] == pytest.approx(one[1] / 4, rel=0.05)


def test_mfu_and_mbu_name_their_peaks(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    found = efficiency(facts, decode_steps(1000, 64, 500), WINDOW)
    hardware = hardware_of(facts)
    assert hardware is not None and hardware.name == "H100-SXM"
    flops, size = step_work(facts, load_model("llama-3.1-8b"), decode_steps(1000, 64, 500), WINDOW)
    assert found.values["mfu_ratio"] == pytest.approx(flops / 10 / 989.4e12)
    assert found.values["mbu_ratio"] == pytest.approx(size / 10 / 3.35e12)
    assert "989.4 TFLOP/s bf16" in found.peaks["mfu_ratio"] and "data sheet" in found.peaks["mbu_ratio"]


def test_a_cpu_has_no_peak_unless_it_was_measured(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, num_gpus=0)
    steps = decode_steps(10, 1, 100)
    assert "bench kernels" in efficiency(facts, steps, WINDOW).absent["mfu_ratio"]
    measured = Ceilings("this machine", {"fp32": 1e11}, 1e10, 0.0, "measured kernels")
    found = efficiency(facts, steps, WINDOW, measured)
    assert found.values["mfu_ratio"] > 0 and "measured kernels" in found.peaks["mfu_ratio"]


def test_without_steps_there_is_a_reason(tmp_path: Path) -> None:
    assert "no engine steps" in efficiency(facts_of(tmp_path), None, WINDOW).absent["mfu_ratio"]


def test_a_served_engine_says_what_would_record_steps(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    assert facts.spec is not None
    served = facts.spec.model_copy(update={"engine": VllmServerEngine(kind="vllm_server")})
    reason = efficiency(replace(facts, spec=served), None, WINDOW).absent["mbu_ratio"]
    assert "`vllm serve`" in reason and "engine.kind: vllm`" in reason
