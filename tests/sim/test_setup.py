"""vLLM's defaults by device and use, and engines built from vLLM's arguments."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput, DoesNotFit
from bench.sim.defaults import batch_limits, capture_sizes, padded_batch
from bench.sim.fleets import FleetShape
from bench.sim.inputs import Fleet
from bench.sim.interface import Interval
from bench.sim.profile import PARAMETERS, Layout, Profile
from bench.sim.setup import engine_setup
from bench.sim.step_time_kernel import padded_tokens


@pytest.mark.parametrize(
    ("gpu", "usage", "args", "expected"),
    [
        ("H100-SXM", "server", {}, (8192, 1024)),
        ("H100-SXM", "llm", {}, (16384, 1024)),
        ("A100-80-SXM", "server", {}, (2048, 256)),  # an A100 80GB is no H100 here
        ("A100-80-SXM", "llm", {}, (8192, 256)),
        ("B200", "server", {}, (16384, 1024)),
        ("A100-80-SXM", "server", {"performance_mode": "throughput"}, (4096, 512)),
        ("H100-SXM", "server", {"max_num_batched_tokens": 512}, (512, 512)),
        ("H100-SXM", "server", {"max_num_seqs": 4}, (8192, 4)),
        ("H100-SXM", "server", {"max_num_seqs": 1}, (4096, 1)),
        ("A100-80-SXM", "server", {"enable_chunked_prefill": False}, (4096, 256)),
    ],
)
def test_batch_limits(gpu: str, usage: str, args: dict[str, object], expected: tuple[int, int]) -> None:
    assert batch_limits(args, load_hardware(gpu), usage, 4096) == expected  # type: ignore[arg-type]


def test_capture_sizes_and_padding() -> None:
    sizes = capture_sizes(256, 8192)
    assert sizes[:6] == [1, 2, 4, 8, 16, 24] and sizes[-1] == 512 and 272 in sizes and 264 not in sizes
    assert capture_sizes(4, 8192) == [1, 2, 4, 8]
    assert capture_sizes(1024, 8192, blackwell=True)[-1] == 1024
    assert capture_sizes(256, 100)[-2:] == [96, 100]
    for n in range(1, 600):
        # the step-time kernel pads by arithmetic; both must agree wherever no odd budget is captured
        assert padded_batch(n, sizes) == padded_tokens(float(n), 512.0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_capture_sizes_are_those_of_the_installed_vllm() -> None:
    import inspect

    from vllm.config import VllmConfig

    source = inspect.getsource(VllmConfig._set_cudagraph_sizes)
    for rule in (
        "range(8, min(max_cudagraph_capture_size + 1, 256), 8)",
        "[1, 2, 4]",
        "256, max_cudagraph_capture_size + 1, 16",
    ):
        assert rule in source


def test_an_engine_from_vllms_arguments() -> None:
    setup = engine_setup(
        load_model("llama-3.1-8b"), load_hardware("H100-SXM"),
        {"max_model_len": 4096, "data_parallel_size": 2, "max_num_seqs": 128, "made_up": 1, "seed": 0},
    )  # fmt: skip
    assert setup.num_gpus == 2 and len(setup.fleet().replicas) == 2
    assert setup.config.async_scheduling and setup.config.enable_prefix_caching and setup.config.max_num_seqs == 128
    assert setup.ignored == ("made_up",)
    assert setup.facts()["kv_source"] == "memory formula"
    assert setup.config.num_blocks == setup.memory.num_blocks
    own = engine_setup(
        load_model("llama-3.1-8b"), load_hardware("H100-SXM"), {"max_model_len": 4096, "num_gpu_blocks_override": 500}
    )
    assert own.config.num_blocks == 500 and own.kv_source == "num_gpu_blocks_override"


def test_the_front_end_is_that_of_a_server_and_divided_by_how_many_there_are() -> None:
    def fleet(over_http: bool | None = None, shape: FleetShape | None = None, **args: int) -> Fleet:
        model, h100 = load_model("llama-3.1-8b"), load_hardware("H100-SXM")
        return engine_setup(model, h100, {"max_model_len": 4096, **args}, over_http=over_http, shape=shape).fleet()

    one = fleet()
    assert 0 < one.front_end_s < one.request_before_s
    assert fleet(api_server_count=4).front_end_s == one.front_end_s / 4
    assert fleet(data_parallel_size=2).front_end_s == one.front_end_s / 2
    assert fleet(shape=FleetShape(engines=3)).front_end_s == one.front_end_s / 3
    assert fleet(over_http=False).front_end_s == fleet(over_http=False).request_before_s == 0.0


def test_a_calibration_saw_no_server_so_that_one_adds_its_time() -> None:
    setup = engine_setup(load_model("llama-3.1-8b"), load_hardware("H100-SXM"), {"max_model_len": 4096})
    own = replace(setup, step_time=replace(setup.step_time, trust="user-runs", overhead_s=(0.002, 0.001)))
    server, in_process = own.fleet(), replace(own, over_http=False).fleet()
    assert server.front_end_s == setup.step_time.front_end_s > 0
    assert server.request_before_s == 0.002 + server.front_end_s
    assert (in_process.front_end_s, in_process.request_before_s, in_process.request_after_s) == (0.0, 0.002, 0.001)


def test_engines_that_vllm_would_not_start_are_refused() -> None:
    h100, model = load_hardware("H100-SXM"), load_model("llama-3.1-70b")
    with pytest.raises(DoesNotFit, match="does not fit"):
        engine_setup(model, h100, {})
    with pytest.raises(DoesNotFit, match="max_model_len"):
        engine_setup(model, h100, {"quantization": "fp8"})  # 128k tokens do not fit beside 70 GB of weights
    with pytest.raises(BadInput, match="speculative"):
        engine_setup(load_model("llama-3.1-8b"), h100, {"speculative_config": {"method": "ngram"}})
    with pytest.raises(BadInput, match="scheduling_policy"):
        engine_setup(load_model("llama-3.1-8b"), h100, {"scheduling_policy": "lifo"})


def test_a_model_with_windows_gets_as_many_blocks_as_hold_the_same_requests() -> None:
    setup = engine_setup(
        load_model("gpt-oss-120b"), load_hardware("H100-SXM"),
        {"max_model_len": 8192, "tensor_parallel_size": 2}, typical_tokens=2048,
    )  # fmt: skip
    assert setup.config.num_blocks == setup.memory.equivalent_blocks(2048)


def test_a_calibration_is_no_narrower_about_a_server_than_nothing_at_all() -> None:
    """It was fitted in process; less that is known must not give a narrower interval."""
    model, h100 = load_model("llama-3.1-8b"), load_hardware("H100-SXM")
    profile = Profile(
        "p", Layout("llama-3.1-8b", h100.name), {**dict.fromkeys(PARAMETERS, 1e-4), "linear_scale": 1.0},
        {"cells": {"a": 0.01, "b": -0.01}}, 100, ("e/a/run-1",), "2026-11-24T00:00:00+00:00",
    )  # fmt: skip

    def interval(metric: str, profile: Profile | None, over_http: bool) -> Interval:
        setup = engine_setup(model, h100, {"max_model_len": 4096}, profile=profile, over_http=over_http)
        return setup.step_time.intervals[metric]

    for metric in ("ttft", "tpot", "output_tokens_per_s"):
        own, served, bare = (interval(metric, *how) for how in ((profile, False), (profile, True), (None, True)))
        assert (
            served.low_ratio <= bare.low_ratio < own.low_ratio and own.high_ratio < bare.high_ratio <= served.high_ratio
        )
        assert "no HTTP server" in served.basis and "no HTTP server" not in own.basis
