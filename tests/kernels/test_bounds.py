"""Verdicts on what a kernel run must hold: from made-up rows, and from this CPU's own kernels."""

from __future__ import annotations

import dataclasses
import time

import pytest

from kernels.bounds import Bound, bounds_of
from kernels.case import make_case

CACHE = 2**20


def _row(family, op, impl, dtype, shape, seconds, num_bytes, flops=1.0, **more):
    case = make_case(family, op, impl, dtype, shape)
    row = {"case_id": case.case_id, **case.to_dict(), "status": "ok", "reason": None, "backend": impl}
    row |= {"bytes": num_bytes, "flops": flops, "time_s": {"value": seconds}}
    row |= {"bytes_per_s": {"value": num_bytes / seconds}}
    return {**row, **more}


def _referee(**seconds):
    return {"clock": "a clock", "seconds": {name: [s, 0.9 * s, 1.1 * s] for name, s in seconds.items()}}


def _summary(*rows, copy=1e9):
    peaks = {"measured": {"copy_bytes_per_s": {"value": copy} if copy else None}}
    return {"cases": list(rows), "peaks": peaks, "device": {"l2_bytes": CACHE}}


def _verdicts(*rows, **more):
    return {b["name"]: b for b in bounds_of(_summary(*rows, **more))}


COPY, GEMM = "memory copy against torch's best", "bf16 GEMM against torch's best"
NORM, DECODE = "Triton rmsnorm_residual against copy", "Triton paged decode against the best library"


@pytest.mark.parametrize("best_s, verdict", [(0.95, "met"), (0.91, "met"), (0.89, "missed"), (1.3, "met")])
def test_copy_is_held_against_the_fastest_of_torchs_ways(best_s, verdict):
    row = _row("memory", "copy", "torch", "fp32", {"bytes": 100}, 1.0, 200)
    bound = _verdicts({**row, "referee": _referee(slow=2.0, fast=best_s)})[COPY]
    assert (bound["verdict"], bound["value"], bound["limit"]) == (verdict, pytest.approx(best_s), 0.90)
    assert "fast" in bound["reason"] and bound["case_id"] == row["case_id"]


def test_the_largest_refereed_gemm_of_the_type_counts():
    small = _row("gemm", "linear", "torch", "bf16", {"m": 1, "n": 8, "k": 8}, 1.0, 10, referee=_referee(a=0.1))
    large = _row("gemm", "linear", "torch", "bf16", {"m": 8, "n": 8, "k": 8}, 1.0, 20, referee=_referee(a=0.96))
    other = _row("gemm", "linear", "torch", "fp32", {"m": 9, "n": 8, "k": 8}, 1.0, 99, referee=_referee(a=0.1))
    bound = _verdicts(small, large, other)[GEMM]
    assert (bound["verdict"], bound["value"], bound["limit"]) == ("met", pytest.approx(0.96), 0.95)
    worse = {**large, "referee": _referee(a=0.94)}
    assert _verdicts(small, worse)[GEMM]["verdict"] == "missed"


def test_our_norm_kernel_is_held_against_copy_where_its_traffic_leaves_the_cache():
    def row(tokens, share, num_bytes):
        return _row(
            "norm", "rmsnorm_residual", "triton", "bf16", {"tokens": tokens}, num_bytes / share / 1e9, num_bytes
        )

    big = 32 * CACHE
    assert _verdicts(row(1, 5.0, CACHE), row(2, 0.92, big))[NORM]["verdict"] == "met"
    missed = _verdicts(row(1, 5.0, CACHE), row(2, 0.88, big))[NORM]
    assert missed["verdict"] == "missed" and missed["value"] == pytest.approx(0.88)
    inside = _verdicts(row(1, 5.0, CACHE))[NORM]
    assert inside["verdict"] == "n/a" and "less than 16 x the last-level cache" in inside["reason"]
    assert _verdicts(row(2, 0.92, big), copy=None)[NORM]["reason"] == "no copy was timed"


def test_paged_decode_is_compared_with_the_fastest_library_at_every_shape():
    def row(impl, batch, seconds, status="ok"):
        shape = {"batch": batch, "context": 1024, "heads": 32}
        return {**_row("attention", "paged_decode", impl, "bf16", shape, seconds, 100), "status": status}

    rows = (
        row("triton", 1, 2.0),
        row("vllm_fa", 1, 1.5),
        row("torch", 1, 3.0),
        row("triton", 8, 1.0),
        row("torch", 8, 2),
    )
    bounds = _verdicts(*rows)
    one, eight = (bounds[f"Triton paged decode, {b} x 1024, against the best library"] for b in (1, 8))
    assert (one["value"], one["verdict"], one["reason"]) == (pytest.approx(0.75), "compared", "vllm_fa")
    assert eight["value"] == pytest.approx(2.0) and eight["limit"] is None
    alone = _verdicts(row("triton", 1, 2.0))[DECODE]
    assert (alone["verdict"], alone["reason"]) == ("n/a", "no library was timed beside it")
    absent = {**row("triton", 1, 2.0, "n/a"), "reason": "no GPU"}
    assert _verdicts(absent)[DECODE]["reason"] == "no GPU"


def test_a_run_without_such_cases_says_so_for_each_bound():
    assert {b["reason"] for b in bounds_of(_summary())} == {"the suite has no such case"}


def test_a_wrong_case_is_never_met():
    row = _row("memory", "copy", "torch", "fp32", {"bytes": 100}, 1.0, 200, referee=_referee(a=1.0))
    bound = _verdicts({**row, "status": "wrong", "reason": "error max 1"})[COPY]
    assert (bound["verdict"], bound["reason"]) == ("n/a", "error max 1")


def test_the_text_of_a_bound_names_share_limit_and_verdict():
    bound = Bound("copy", "missed", 0.853, 0.9, "id", "torch's best is clone")
    assert bound.text() == "copy: 85.3% (at least 90% asked): missed; torch's best is clone"
    assert (
        dataclasses.replace(bound, value=None, limit=None, verdict="n/a").text() == "copy: n/a; torch's best is clone"
    )


def test_the_referee_times_every_way_by_its_own_clock():
    pytest.importorskip("torch")
    from kernels.referee import hear

    heard = hear({"quick": lambda: None, "slow": lambda: time.sleep(2e-4)}, min_run_s=0.01)
    assert set(heard["seconds"]) == {"quick", "slow"} and "torch" in heard["clock"]
    assert min(heard["seconds"]["slow"]) >= 2e-4 > max(heard["seconds"]["quick"])


def test_this_cpus_own_copy_and_gemm_get_a_verdict(cpu):
    """The whole way from a suite's ``referee: true`` to a verdict; which one it is depends on who else is at work here."""
    pytest.importorskip("torch")
    from kernels import results
    from kernels.child import run_case
    from kernels.config import SuiteConfig
    from kernels.suite import list_cases
    from kernels.timing import TimingPlan

    gemm = {"dtypes": ["bf16"], "m": [64], "layers": [{"name": "x", "n": 64, "k": 64}], "referee": True}
    memory = {"ops": ["copy", "read"], "sizes_bytes": [65536], "referee": True}
    suite = SuiteConfig.model_validate({"name": "mine", "why": "test", "memory": [memory], "gemm": [gemm]})
    plan = TimingPlan(min_repeats=6, max_repeats=6, budget_s=0.01, warmup_s=0.001)
    rows = []
    for case in list_cases(suite, "cpu"):
        answer = run_case(case, cpu, plan, 0, None, 0.0)
        rows.append(results._row({"case_id": case.case_id, **case.to_dict(), **answer}))
    assert [bool(r.get("referee")) for r in rows] == [True, False, True]  # torch has one way to read
    bounds = {b["name"]: b for b in bounds_of(_summary(*rows))}
    for name, ways in ((COPY, ("copy_", "clone", "mul by 1")), (GEMM, ("matmul", "linear", "mm"))):
        assert bounds[name]["verdict"] in ("met", "missed") and 0 < bounds[name]["value"] < 1e3
        assert any(way in bounds[name]["reason"] for way in ways)
