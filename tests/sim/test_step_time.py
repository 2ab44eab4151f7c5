"""Step times: physics that must hold, and the tables against the operations that they were made from."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import numpy as np
import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.sim import step_time_kernel as kernel
from bench.sim.efficiency import EFFICIENCY_FOLDER, curves_for, load_curves
from bench.sim.interface import StepTimeModel
from bench.sim.model_shape import shape_of
from bench.sim.op_times import Device, all_reduce_s, decode_attention_s, experts_s, gemm_s, layer_tokens_s
from bench.sim.step_time import build_step_time, changed, device_of

H100 = load_hardware("h100-sxm")
LLAMA_70B, LLAMA_8B = load_model("llama-3.1-70b"), load_model("llama-3.1-8b")


def gpu_s(step_time: StepTimeModel, prefill: tuple[int, int] = (0, 0), decode: tuple[int, int] = (0, 0)) -> float:
    """Device seconds: ``prefill`` = (requests, tokens each), ``decode`` = (requests, context each)."""
    n, each = prefill
    b, context = decode
    pairs = n * each * (each + 1) / 2
    return kernel.step_time_s(step_time.coefficients(), n, n * each, pairs, 0, b, b * context, context, n + b)[0]


def test_it_is_a_step_time_model() -> None:
    built = build_step_time(LLAMA_8B, H100)
    assert isinstance(built, StepTimeModel)
    assert built.trust == "shipped-curves" and "AIConfigurator 0.12.0" in built.source
    for metric in ("tpot", "ttft", "output_tokens_per_s", "itl_p99", "e2e"):
        interval = built.interval(metric)
        assert interval is not None and 0 < interval.low_ratio < 1 < interval.high_ratio


def test_decoding_cannot_beat_reading_the_weights_once() -> None:
    built = build_step_time(LLAMA_8B, H100)
    least = (LLAMA_8B.num_params - LLAMA_8B.num_embedding_params) * 2 / H100.memory_bandwidth_bytes_per_s
    assert least < gpu_s(built, decode=(1, 128)) < 2 * least


def test_prefill_cannot_beat_the_peak() -> None:
    built = build_step_time(LLAMA_8B, H100)
    least = 2 * LLAMA_8B.num_matmul_params_active * 8192 / H100.peak("bf16")
    assert least < gpu_s(built, prefill=(8, 1024)) < 2.5 * least


@pytest.mark.parametrize(
    "grow", [{"decode": (16, 1000)}, {"decode": (8, 4000)}, {"decode": (8, 1000), "prefill": (1, 512)}]
)
def test_more_work_takes_longer(grow: dict[str, tuple[int, int]]) -> None:
    built = build_step_time(LLAMA_70B, H100, tensor_parallel_size=4)
    assert gpu_s(built, **grow) > gpu_s(built, decode=(8, 1000))


def test_fp8_saves_less_than_half_of_decoding() -> None:
    bf16 = gpu_s(build_step_time(LLAMA_70B, H100, tensor_parallel_size=4, quantization="none"), decode=(8, 1000))
    fp8 = gpu_s(build_step_time(LLAMA_70B, H100, tensor_parallel_size=4, quantization="fp8"), decode=(8, 1000))
    assert 0.5 < fp8 / bf16 < 0.85


def test_tensor_parallelism_helps_less_than_ideally() -> None:
    times = [
        gpu_s(build_step_time(LLAMA_70B, H100, tensor_parallel_size=tp, quantization="fp8"), decode=(16, 1000))
        for tp in (2, 4, 8)
    ]
    assert times[0] > times[1] > times[2] > times[0] / 4


def test_fp8_without_tensor_cores_runs_at_16_bit_speed() -> None:
    a100 = device_of(load_hardware("a100-80-sxm"))
    m = np.array([8192.0])
    assert not a100.multiplies("fp8")
    assert gemm_s(a100, m, 8192, 8192, "fp8")[0] >= gemm_s(a100, m, 8192, 8192, "bf16")[0]
    assert gemm_s(a100, np.array([1.0]), 8192, 8192, "fp8")[0] < gemm_s(a100, np.array([1.0]), 8192, 8192, "bf16")[0]


def test_a_window_bounds_decode_attention() -> None:
    device, model = device_of(H100), shape_of(load_model("gpt-oss-120b"))
    windowed = next(g for g in model.groups if g.window)
    at = [
        decode_attention_s(device, windowed, "bf16", 1, np.array([64.0]), np.array([n]))[0] for n in (1024.0, 65536.0)
    ]
    assert at[0] == pytest.approx(at[1])


def test_all_reduce_is_free_alone_and_dear_over_pcie() -> None:
    size = np.array([1e6])
    assert all_reduce_s(device_of(H100), size, 1)[0] == 0
    assert all_reduce_s(device_of(load_hardware("l40s")), size, 4)[0] > 3 * all_reduce_s(device_of(H100), size, 4)[0]


def test_all_reduces_of_vllm_take_its_own_kernel_then_multicast_then_nccl() -> None:
    mib = 2.0**20
    hopper, ampere = device_of(H100), device_of(load_hardware("a100-80-sxm"))
    o = hopper.overheads

    def kernel_s(device: Device, size: float, ranks: int) -> float:
        whole = float(all_reduce_s(device, np.array([size * mib]), ranks)[0])
        return whole - o.all_reduce_wait_s * math.log2(ranks)

    # multicast: every byte crosses a link once, in the switch (4 and 8 Hopper GPUs)
    for ranks, size in ((8, 0.5), (8, 63.0), (4, 8.5), (4, 31.0)):
        assert kernel_s(hopper, size, ranks) == pytest.approx(o.nvls_start_s + size * mib / o.nvls_bytes_per_s)
    for ranks, size in ((8, 65.0), (4, 33.0), (2, 31.0)):
        assert kernel_s(hopper, size, ranks) != pytest.approx(
            o.nvls_start_s + size * mib / o.nvls_bytes_per_s, rel=0.01
        )
    # its own kernel goes on to 8 MiB where there is none, and NCCL carries what is larger at the bus bandwidth of nccl-tests
    assert kernel_s(ampere, 7.9, 8) < kernel_s(ampere, 8.1, 8) < 1.6 * kernel_s(ampere, 7.9, 8)
    assert 2 * 7 / 8 * 512 * mib / kernel_s(ampere, 512, 8) == pytest.approx(222e9, rel=0.1)


def test_ranks_wait_for_each_other_at_every_all_reduce() -> None:
    device, size = device_of(H100), np.array([1e4, 1e7])
    longer = dataclasses.replace(
        device, overheads=changed(device.overheads, all_reduce_wait_s=device.overheads.all_reduce_wait_s + 1e-5)
    )
    for ranks, doublings in ((1, 0), (2, 1), (8, 3)):
        assert all_reduce_s(longer, size, ranks) - all_reduce_s(device, size, ranks) == pytest.approx(doublings * 1e-5)


@pytest.mark.parametrize("gpu", ["h100-sxm", "h200-sxm", "a100-80-sxm"])
def test_few_wide_experts_use_the_device(gpu: str) -> None:
    device, model = device_of(load_hardware(gpu)), shape_of(load_model("mixtral-8x7b"))
    group, tokens = model.groups[0], np.array([1024.0, 4096.0])
    flops = 2 * tokens * group.experts_per_token * 3 * model.hidden_size * group.expert_width
    for ranks in (1, 2, 4, 8):
        share = flops / ranks / experts_s(device, model, group, ranks, False, tokens) / device.peak("bf16")
        assert (share > 0.25).all() and (share < 0.75).all()  # the kernel tables: 0.31 to 0.64


def test_experts_in_fp8_are_faster_where_the_device_multiplies_it_and_slower_to_compute_where_not() -> None:
    model, tokens = load_model("mixtral-8x7b"), np.array([16.0, 8192.0])
    narrow, wide = shape_of(model, "fp8"), shape_of(model)
    group = wide.groups[0]
    for gpu, faster in (("h100-sxm", True), ("h200-sxm", True), ("a100-80-sxm", False)):
        device = device_of(load_hardware(gpu))
        fp8, bf16 = (experts_s(device, shape, group, 2, False, tokens) for shape in (narrow, wide))
        assert fp8[0] < 0.8 * bf16[0]  # weights alone
        assert (fp8[1] < 0.8 * bf16[1]) if faster else (bf16[1] < fp8[1] < 1.3 * bf16[1])


def test_whole_experts_have_times_of_their_own() -> None:
    device, model = device_of(H100), shape_of(load_model("qwen3-30b-a3b"))
    split, whole = (experts_s(device, model, model.groups[0], 4, ep, np.array([4096.0]))[0] for ep in (False, True))
    assert split > 0 and whole > 0 and split != pytest.approx(whole, rel=0.01)


def test_the_tables_agree_with_the_operations_between_their_knots() -> None:
    device, model = device_of(H100), shape_of(LLAMA_8B)
    array = build_step_time(LLAMA_8B, H100).coefficients()
    tokens = np.array([700.0, 3333.0])
    group = model.groups[0]
    exact = group.count * layer_tokens_s(device, model, group, 1, False, tokens)
    read = [
        kernel.table_1d(array, kernel.HEADER, int(array[kernel.NUM_TOKEN_KNOTS]), array[kernel.TOKENS_PER_OCTAVE], t)
        for t in tokens
    ]
    assert np.asarray(read) == pytest.approx(exact, rel=0.04)


def test_batches_pad_to_cuda_graph_sizes() -> None:
    pads = {1: 1, 2: 2, 3: 4, 5: 8, 9: 16, 250: 256, 257: 272, 512: 512, 513: 513}
    assert {t: kernel.padded_tokens(float(t), 512.0) for t in pads} == pads
    assert kernel.padded_tokens(5.0, 0.0) == 5.0  # eager


def test_the_host_grows_with_the_running_requests() -> None:
    array = build_step_time(LLAMA_8B, H100).coefficients()
    few, many = (kernel.step_time_s(array, 0, 0, 0.0, 0, b, b * 500, 500, b)[1] for b in (1, 256))
    assert many > few > 0


def test_borrowed_curves_are_said_to_be_and_get_wider_intervals() -> None:
    own, borrowed = build_step_time(LLAMA_8B, H100), build_step_time(LLAMA_8B, load_hardware("l40s"))
    a, b = own.interval("tpot"), borrowed.interval("tpot")
    assert a is not None and b is not None
    assert "a100_sxm" in borrowed.source and "less trusted" in borrowed.source
    assert b.high_ratio - b.low_ratio > a.high_ratio - a.low_ratio


def test_an_unknown_device_falls_back_to_its_data_sheet() -> None:
    curves = curves_for("old-gpu", 7.0)
    assert curves.trust == "bare data sheet" and not curves.curves


def test_a_device_of_which_nothing_is_known_says_so() -> None:
    built = build_step_time(load_model("tiny-llama"), load_hardware("cpu"))
    interval = built.interval("tpot")
    assert built.trust == "data-sheet" and "bench calibrate" in built.source
    assert interval is not None and interval.high_ratio > 10


def test_a_layout_that_vllm_refuses_is_refused() -> None:
    with pytest.raises(BadInput, match="attention heads"):
        build_step_time(LLAMA_8B, H100, tensor_parallel_size=3)


def test_every_catalogued_model_and_gpu_gives_finite_positive_times() -> None:
    from bench.catalog.hardware import list_hardware
    from bench.catalog.model import list_models

    for hardware in (h for h in list_hardware() if h.kind == "gpu"):
        for model in (LLAMA_8B, load_model("gpt-oss-20b"), load_model("deepseek-v3")):
            array = build_step_time(model, hardware, tensor_parallel_size=1).coefficients()
            assert np.isfinite(array).all() and (array >= 0).all(), (hardware.name, model.name)
    for model in list_models():
        array = build_step_time(model, H100).coefficients()
        assert np.isfinite(array).all() and math.isfinite(array.sum()), model.name


def test_shipped_curves_are_utilisations() -> None:
    for name in ("a100_sxm", "h100_sxm", "h200_sxm"):
        curves = load_curves(EFFICIENCY_FOLDER / f"{name}.yaml")
        for key, curve in curves.curves.items():
            assert curve.held_out_error < 0.2, (name, key)
            # the gemm floor is paid once a kernel, so small ones may come out above 1
            assert np.exp(curve.log_utilisation).max() < 3.0, (name, key)


def test_the_kernel_file_holds_what_numba_can_compile() -> None:
    numba = pytest.importorskip("numba")
    spec = importlib.util.spec_from_file_location("kernel_copy", kernel.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for name in ("padded_tokens", "table_1d", "table_2d", "step_time_s"):
        setattr(copy, name, numba.njit(getattr(copy, name)))
    array = build_step_time(LLAMA_8B, H100).coefficients()
    for load in (
        (0, 0, 0.0, 0, 8, 8000, 1500, 8),
        (2, 700, 1e5, 64, 5, 4000, 1000, 9),
        (1, 5000, 1.3e7, 0, 0, 0, 0, 1),
    ):
        assert copy.step_time_s(array, *load) == pytest.approx(kernel.step_time_s(array, *load), rel=1e-12)
