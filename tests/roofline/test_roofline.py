"""Least times, what bounds them, utilisation, measured ceilings, the command and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.roofline import (
    Ceilings,
    Op,
    StepShape,
    load_kernel_ceilings,
    roofline_time,
    run_work,
    step_ops,
    step_roofline,
    wire_bytes,
)

H100 = load_hardware("H100")
LLAMA = load_model("llama-3.1-8b")


def test_time_is_the_highest_of_three_ceilings() -> None:
    c = Ceilings("x", {"bf16": 100.0}, 10.0, 1.0, "test")
    gemm = Op("g", "gemm", 1, flops=1000, bytes=10, comm_bytes=0, dtype="bf16")
    assert (roofline_time(gemm, c).time_s, roofline_time(gemm, c).bound) == (10.0, "compute")
    copy = Op("c", "norm", 1, flops=0, bytes=50, comm_bytes=0, dtype="bf16")
    assert (roofline_time(copy, c).time_s, roofline_time(copy, c).bound) == (5.0, "memory")
    reduce = Op("r", "all_reduce", 1, flops=0, bytes=0, comm_bytes=4, dtype="bf16", group=4)
    assert (roofline_time(reduce, c).time_s, roofline_time(reduce, c).bound) == (6.0, "link")
    assert c.ridge_flops_per_byte("bf16") == 10.0


def test_wire_bytes() -> None:
    assert [wire_bytes("all_reduce", 8, p) for p in (1, 2, 8)] == [0, 8, 14]
    assert wire_bytes("all_gather", 8, 4) == 6
    assert wire_bytes("p2p", 8, 2) == 8


def test_formats_without_tensor_cores_run_at_sixteen_bits() -> None:
    a100 = Ceilings.from_hardware(load_hardware("A100"))
    assert a100.peak("fp8") == a100.peak("bf16") == 312e12
    with pytest.raises(BadInput, match="measure them"):
        Ceilings.from_hardware(load_hardware("cpu"))


def test_decode_is_memory_bound_and_prefill_compute_bound() -> None:
    decode = step_roofline(step_ops(LLAMA, StepShape.uniform(LLAMA, decode_requests=16, decode_context=1024)), H100)
    prefill = step_roofline(step_ops(LLAMA, StepShape.uniform(LLAMA, prefill_requests=8, prefill_tokens=1024)), H100)
    assert decode.share("memory") > 0.99
    assert prefill.share("compute") > 0.8
    # 8B in 16 bits from 3.35 TB/s: 15.0 GB of weights but the table take 4.5 ms, the cache of 16 x 1024 tokens 0.64 ms,
    # activations the last per cent
    assert decode.time_s == pytest.approx(15.01e9 / 3.35e12 + 16 * 1024 * 131072 / 3.35e12, rel=0.02)
    assert decode.mbu(decode.time_s) == pytest.approx(1.0, abs=0.01)
    assert decode.mbu(2 * decode.time_s) == pytest.approx(0.5, abs=0.01)
    assert 0.8 < prefill.mfu(prefill.time_s) <= 1.0


@given(batch=st.integers(1, 512), context=st.integers(1, 20_000))
def test_least_time_grows_with_the_work(batch: int, context: int) -> None:
    def time_s(b: int, n: int) -> float:
        return step_roofline(
            step_ops(LLAMA, StepShape.uniform(LLAMA, decode_requests=b, decode_context=n)), H100
        ).time_s

    assert time_s(batch + 1, context) > time_s(batch, context)
    assert time_s(batch, context + 1) > time_s(batch, context)


def test_generations_and_formats_order_as_their_data_sheets() -> None:
    m = load_model("llama-3.1-70b")
    shape = StepShape.uniform(m, decode_requests=64, decode_context=1500)

    def time_s(gpu: str, quant: str | None = None) -> float:
        return step_roofline(step_ops(m, shape, tp=8, quant=quant), load_hardware(gpu)).time_s

    assert time_s("A100") > time_s("H100") > time_s("H200") > time_s("B200")
    assert time_s("H100", "fp8") < time_s("H100")


def test_the_work_of_a_run() -> None:
    """One request: the sum over its steps; FLOPs do not depend on how many steps shared the weights."""
    isl, osl = 100, 20
    alone = run_work(LLAMA, [isl], [osl], num_steps=osl)
    shapes = [StepShape.of(LLAMA, [(isl, 0)])] + [StepShape.of(LLAMA, decode=[isl + i]) for i in range(1, osl)]
    steps = [step_roofline(step_ops(LLAMA, s), H100) for s in shapes]
    assert alone.flops == pytest.approx(sum(s.flops for s in steps))
    assert alone.bytes == pytest.approx(sum(s.bytes for s in steps), rel=1e-6)
    both = run_work(LLAMA, [isl] * 2, [osl] * 2, num_steps=osl)
    assert both.flops == pytest.approx(2 * alone.flops)
    assert both.bytes < 1.1 * alone.bytes
    assert run_work(LLAMA, [isl], [osl], osl, tp=2).flops == pytest.approx(alone.flops / 2, rel=0.01)
    assert alone.mfu(1.0, alone.flops) == 1.0 and alone.mbu(2.0, alone.bytes) == 0.5
    with pytest.raises(BadInput):
        run_work(LLAMA, [], [], 1)


KERNELS = {
    "kind": "kernels",
    "device": {"name": "Test CPU"},
    "peaks": {
        "measured": {
            "flops_per_s": {"fp32": {"value": 1e11}, "bf16": {"value": 2e11}},
            "bandwidth_bytes_per_s": {"value": 2e10},
            "link_bytes_per_s": None,
        }
    },
}


def test_measured_ceilings(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(KERNELS))
    c = load_kernel_ceilings(tmp_path)
    assert (c.name, c.peak("bf16"), c.memory_bytes_per_s) == ("Test CPU", 2e11, 2e10)
    assert c.measured == {"fp32", "bf16", "memory"}
    over = load_kernel_ceilings(tmp_path, H100)
    assert over.link_bytes_per_s == 450e9 and over.memory_bytes_per_s == 2e10 and over.peak("fp8") == 1978.9e12
    for text in ("[]", "{", '{"kind": "kernels"}'):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(BadInput):
            load_kernel_ceilings(tmp_path)
    with pytest.raises(BadInput, match="bench kernels"):
        load_kernel_ceilings(tmp_path / "nosuch")


def test_the_command_and_its_picture(tmp_path: Path) -> None:
    from bench.cli import cli

    out = tmp_path / "pictures" / "roof.png"
    args = [
        "roofline",
        "llama-3.1-8b",
        "--gpu",
        "H100",
        "--tp",
        "2",
        "--quantization",
        "fp8",
        "--out",
        str(out),
        "--json",
    ]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    data = json.loads(done.output)
    ops = data["steps"]["decode"]["ops"]
    assert sum(o["time_s"] for o in ops) == pytest.approx(data["steps"]["decode"]["time_s"])
    assert {o["bound"] for o in ops} == {"memory", "link"}
    assert out.read_bytes()[:4] == b"\x89PNG" and "<svg" in out.with_suffix(".svg").read_text()[:2000]
    table = CliRunner().invoke(cli, args[:-3], catch_exceptions=False, env={"COLUMNS": "160"}).output
    assert "attention_decode" in table and "Least time" in table
    assert isinstance(CliRunner().invoke(cli, ["roofline", "llama-3.1-8b"]).exception, BadInput)
