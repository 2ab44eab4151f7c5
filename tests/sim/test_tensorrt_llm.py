"""TensorRT-LLM at full load: its limits by its own rule, and a few rows that nothing was fitted on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from bench.errors import BadInput
from bench.sim.anchors import Anchor, engine_point
from bench.sim.tensorrt_llm import (
    engine_limits,
    fitted_on,
    full_load,
    full_load_rate,
    load_engine_profile,
    published_full_load,
)

POINTS = published_full_load()


@pytest.mark.parametrize(
    ("requests", "isl", "osl", "batch", "tokens"),
    [(29, 128, 2048, 64, 2048), (500, 1000, 1000, 512, 2048), (1500, 2048, 128, 1536, 25600 + 0), (9000, 5000, 500, 4096, 32768)],
)  # fmt: skip
def test_engines_are_built_for_the_lengths_of_the_benchmark(
    requests: int, isl: int, osl: int, batch: int, tokens: int
) -> None:
    assert engine_limits(requests, isl, osl) == (batch, tokens)


def test_no_request_is_admitted_that_would_not_fit_at_full_length() -> None:
    one, two = (full_load(engine_point(("h100-sxm", "llama-3.1-70b", "fp8", tp), 128, 2048)) for tp in (1, 2))
    assert 25 <= one.num_running <= 33 and two.num_running > 7 * one.num_running
    assert one.kv_cache_dtype == "fp8"
    too_big = engine_point(("h100-sxm", "llama-3.1-70b", "none", 1), 128, 128)
    assert full_load(too_big).num_running == 0 and math.isnan(full_load_rate(too_big))


def test_rows_that_were_not_fitted_are_predicted() -> None:
    chosen = [p for p in POINTS if p.model == "llama-3.1-8b" and p.version == (0, 14) and p.osl < 3000][::4]
    assert len(chosen) >= 6 and not any(fitted_on(p) for p in chosen)
    errors = [full_load_rate(p) / p.output_tokens_per_s - 1 for p in chosen]
    assert np.median(np.abs(errors)) <= 0.15


def test_few_rows_are_fitted_on() -> None:
    fitted = [p for p in POINTS if fitted_on(p)]
    assert 30 <= len(fitted) <= len(POINTS) / 5
    assert not any(p.model in ("llama-3.1-8b", "llama-3.1-405b") or p.gpu == "a100-80-pcie" for p in fitted)


def test_a_broken_profile_is_told(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("source: x\noverheads: {no_such_overhead: 1}\ninterval: [0.9, 1.1]\n")
    with pytest.raises(BadInput, match="engine profile"):
        load_engine_profile(path)


def test_an_anchor_passes_by_its_error_and_says_so() -> None:
    good = Anchor("ratio", 2.1, 2.0, "x", error=0.05)
    bad = dataclasses.replace(good, error=-0.2)
    assert good.met and "met" in good.line() and not bad.met and "MISSED" in bad.line()
    assert dataclasses.replace(bad, limit=None).met
