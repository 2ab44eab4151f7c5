"""TensorRT-LLM at full load: its limits by its own rule, and a few rows that nothing was fitted on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from bench.catalog.hardware import load_hardware
from bench.errors import BadInput
from bench.sim import anchors
from bench.sim.anchors import Anchor
from bench.sim.ground_truth import Point, full_load_requests
from bench.sim.op_times import all_reduce_s
from bench.sim.step_time import device_of
from bench.sim.step_time_kernel import HEADER, NUM_TOKEN_KNOTS
from bench.sim.tensorrt_llm import (
    OWN_ALL_REDUCE_BYTES,
    _coefficients,
    engine_limits,
    fitted_on,
    full_load,
    full_load_rate,
    load_engine_profile,
    published_full_load,
)

POINTS = published_full_load()


def published(version: tuple[int, int], gpu: str, precision: str, tp: int, isl: int, osl: int) -> Point:
    """A row of the 70B model."""
    wanted = (version, gpu, "llama-3.1-70b", precision, tp, isl, osl)
    return next(p for p in POINTS if (p.version, p.gpu, p.model, p.precision, p.tp, p.isl, p.osl) == wanted)


@pytest.mark.parametrize(
    ("requests", "isl", "osl", "batch", "tokens"),
    [(29, 128, 2048, 64, 2048), (500, 1000, 1000, 512, 2048), (1500, 2048, 128, 1536, 25600 + 0), (9000, 5000, 500, 4096, 32768)],
)  # fmt: skip
def test_engines_are_built_for_the_lengths_of_the_benchmark(
    requests: int, isl: int, osl: int, batch: int, tokens: int
) -> None:
    assert engine_limits(requests, isl, osl) == (batch, tokens)


def test_no_request_is_admitted_that_would_not_fit_at_full_length() -> None:
    one, two = (full_load(published((0, 17), "h100-sxm", "fp8", tp, 128, 2048)) for tp in (1, 2))
    assert 25 <= one.num_running <= 33 and two.num_running > 7 * one.num_running
    assert one.kv_cache_dtype == "fp8"
    too_big = dataclasses.replace(published((0, 17), "a100-80-sxm", "fp16", 2, 128, 128), tp=1)
    assert full_load(too_big).num_running == 0 and math.isnan(full_load_rate(too_big))


def test_release_014_has_limits_of_its_own() -> None:
    small = full_load(published((0, 14), "h200-sxm", "fp8", 2, 128, 128))
    assert (small.num_running, small.max_num_tokens) == (256, 1024)
    # the file has another entry for sequences of 4,096 tokens, whose decoder takes most of the KV cache
    long, same = (full_load(published((0, 14), "h100-sxm", "fp16", 2, i, o)) for i, o in ((2048, 2048), (128, 4096)))
    assert long.num_running < 0.7 * same.num_running
    # a step takes no more tokens than the engine was built for
    assert full_load(published((0, 14), "h200-sxm", "fp8", 4, 128, 128)).num_running == 1024


def test_the_decoder_takes_memory_for_every_request_of_the_limit_until_pytorch_samples() -> None:
    old = published((0, 17), "h100-sxm", "fp8", 4, 1000, 1000)
    new = dataclasses.replace(old, version=(0, 20))
    assert full_load(old).num_running < full_load(new).num_running


def test_a_run_queues_as_many_requests_as_the_page_says() -> None:
    assert full_load_requests(128.0, 128.0) == 30000 and full_load_requests(5000.0, 500.0) == 1500
    assert {p.num_requests for p in POINTS if (p.isl, p.osl) == (20000, 2000)} == {1000}


def test_a_tuned_product_never_loses_by_running_fewer_rows() -> None:
    found = _coefficients(load_engine_profile().overheads((0, 17)), "h100-sxm", "llama-3.1-70b", "fp8", "fp8", 1)
    assert (np.diff(found[HEADER : HEADER + int(found[NUM_TOKEN_KNOTS])]) >= 0).all()


def test_all_reduces_of_release_014_take_longer_the_more_so_the_more_gpus_they_join() -> None:
    old, new = (load_engine_profile().overheads(v) for v in ((0, 14), (0, 17)))
    assert abs(old.gap_s - new.gap_s) < 1e-3 and new.all_reduce_wait_s < old.all_reduce_wait_s < 1e-4
    assert dataclasses.replace(old, gap_s=new.gap_s, all_reduce_wait_s=new.all_reduce_wait_s) == new
    first, later = (dataclasses.replace(device_of(load_hardware("h100-sxm")), overheads=o) for o in (old, new))
    small = np.array([1e5])
    longer = [(all_reduce_s(first, small, n) - all_reduce_s(later, small, n))[0] for n in (1, 2, 4, 8)]
    step = old.all_reduce_wait_s - new.all_reduce_wait_s
    assert longer == pytest.approx([0, step, 2 * step, 3 * step])
    point = published((0, 14), "h100-sxm", "fp8", 2, 128, 2048)
    profile = load_engine_profile()
    assert full_load_rate(point) < full_load_rate(point, dataclasses.replace(profile, values_014={}))


@pytest.mark.parametrize(("gpu", "bus_bytes_per_s"), [("h100-sxm", 444e9), ("a100-80-sxm", 222e9)])
def test_small_all_reduces_take_the_own_kernel_and_large_ones_nccl(gpu: str, bus_bytes_per_s: float) -> None:
    device = dataclasses.replace(device_of(load_hardware(gpu)), own_all_reduce_bytes=OWN_ALL_REDUCE_BYTES)
    for ranks, limit in ((4, 1e6), (8, 5e5)):
        below, above = all_reduce_s(device, np.array([0.99 * limit, 1.01 * limit]), ranks)
        assert 1.3 * below < above < 2.5 * below
    # on two GPUs the own kernel goes on to 16 MB
    one, two = all_reduce_s(device, np.array([1e6, 2e6]), 2)
    assert one < two < 2 * one < 40e-6
    # what nccl-tests calls bus bandwidth; half of it where a table of elements is taken for one of bytes
    largest = 2.0**29
    assert 2 * 7 / 8 * largest / all_reduce_s(device, np.array([largest]), 8)[0] == pytest.approx(
        bus_bytes_per_s, rel=0.1
    )


def test_rows_that_were_not_fitted_are_predicted() -> None:
    chosen = [p for p in POINTS if p.model == "llama-3.1-8b" and p.version == (0, 14) and p.osl < 3000][::4]
    assert len(chosen) >= 6 and not any(fitted_on(p) for p in chosen)
    errors = [full_load_rate(p) / p.output_tokens_per_s - 1 for p in chosen]
    assert np.median(np.abs(errors)) <= 0.15


def test_few_rows_are_fitted_on() -> None:
    fitted = [p for p in POINTS if fitted_on(p)]
    assert 30 <= len(fitted) <= len(POINTS) / 5
    assert not any(p.model in ("llama-3.1-8b", "llama-3.1-405b") or p.gpu == "a100-80-pcie" for p in fitted)
    assert not any(p.model == "llama-3.1-70b" and p.gpu == "h100-sxm" and p.version == (0, 14) for p in fitted)


def test_a_broken_profile_is_told(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("source: x\noverheads: {no_such_overhead: 1}\noverheads_014: {}\ninterval: [0.9, 1.1]\n")
    with pytest.raises(BadInput, match="engine profile"):
        load_engine_profile(path)


def test_an_anchor_passes_by_its_error_and_says_so() -> None:
    good = Anchor("ratio", 2.1, 2.0, "x")
    bad = dataclasses.replace(good, predicted=1.6)
    assert good.met and "met" in good.line() and not bad.met and "MISSED" in bad.line()
    assert good.error == pytest.approx(0.05) and "pair by pair" not in good.line()
    assert dataclasses.replace(bad, limit=None).met
    # of several pairs the medians are compared, as they are published; what most pairs miss by is told beside it
    pairs = dataclasses.replace(good, num_pairs=25, pair_error=-0.2)
    assert "+5.0%" in pairs.line() and "pair by pair -20.0% (over 10%)" in pairs.line() and pairs.met
    assert "over" not in dataclasses.replace(pairs, pair_error=0.07).line()


def test_only_ratios_of_one_thing_in_the_anchors_release_without_a_fitted_row_have_a_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tuple((p, 2.0 * p.output_tokens_per_s) for p in POINTS)
    assert any(fitted_on(p) for p, _ in rows)
    monkeypatch.setattr(anchors, "graded_full_load", lambda: rows)
    in_order = list(anchors.generation_anchors())
    found = {a.name: a for a in in_order}
    assert len(found) == len(in_order) and all(a.error == pytest.approx(0) == a.pair_error for a in in_order)
    names = {a.name for a in in_order if a.limit == anchors.RATIO_TARGET}
    assert {"H200 / H100, FP8, 70B", "H100 FP8 / FP16, 70B", "H100 / A100 SXM, FP16, Mixtral-8x7B"} <= names
    assert not any("fitted" in n or "later" in n or "H100 FP8 / A100" in n for n in names)
    assert found["H200 / H100, FP8, 7B, fitted on"].num_pairs == 9  # release 0.14
    assert found["H200 / H100, FP8, 7B, later releases"].num_pairs == 9
    assert [a.limit is None for a in in_order] == sorted(a.limit is None for a in in_order)


def test_mixtral_is_predicted_though_none_of_it_was_fitted() -> None:
    chosen = [p for p in POINTS if p.model == "mixtral-8x7b" and p.gpu != "a100-80-pcie" and p.osl < 3000]
    assert len(chosen) >= 100 and not any(fitted_on(p) for p in chosen)
    errors = np.array([full_load_rate(p) / p.output_tokens_per_s - 1 for p in chosen[::5]])
    assert np.median(np.abs(errors)) <= 0.10 and np.quantile(np.abs(errors), 0.9) <= 0.25
