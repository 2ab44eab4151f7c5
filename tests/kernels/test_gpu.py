"""On a GPU: every case of the tiny suite runs and is right, and the figures hold together. Skipped without one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernels import results  # noqa: E402
from kernels.config import SuiteConfig, load_suite  # noqa: E402
from kernels.suite import SuiteRun, list_cases, run_suite  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def _measure(suite: SuiteConfig, tmp_path) -> tuple[SuiteRun, dict]:
    import datetime

    run = run_suite(suite, "cuda", lambda device: list_cases(suite, device.kind), tmp_path / "log")
    lines = [r.to_dict() for r in run.results]
    return run, results.summary_of(run, lines, datetime.datetime.now(datetime.timezone.utc))


def test_the_tiny_suite_is_right_on_this_gpu(tmp_path):
    run, summary = _measure(load_suite("tiny"), tmp_path)
    bad = [(r["case_id"], r["reason"]) for r in summary["cases"] if r["status"] in ("wrong", "failed")]
    assert not bad
    assert {r["family"] for r in summary["cases"] if r["status"] == "ok"} >= {
        "memory",
        "gemm",
        "attention",
        "norm",
        "moe",
        "link",
        "host",
    }
    assert all(
        r.answer["timing"]["clock"] != "perf_counter"
        for r in run.results
        if r.case.family == "gemm" and "timing" in r.answer
    )


def test_bandwidth_gemm_and_our_kernels_reach_what_they_should(tmp_path):
    """HBM copy and a large bf16 GEMM against the data sheet; our norm kernels against copy (shares, so any card will do)."""
    suite = SuiteConfig.model_validate(
        {
            "name": "shares",
            "why": "test",
            "memory": [{"ops": ["copy"], "sizes_bytes": [2**30]}],
            "gemm": [{"dtypes": ["bf16"], "m": [8192], "layers": [{"name": "square", "n": 8192, "k": 8192}]}],
            "norm": [
                {
                    "tokens": [16384],
                    "hidden": 4096,
                    "intermediate": 14336,
                    "num_heads": 32,
                    "num_kv_heads": 8,
                    "ops": ["rmsnorm_residual", "silu_mul"],
                    "impls": ["triton"],
                }
            ],
        }
    )
    _, summary = _measure(suite, tmp_path)
    copy = summary["peaks"]["measured"]["copy_bytes_per_s"]["value"]
    if summary["peaks"]["nominal"]:
        assert copy > 0.7 * summary["peaks"]["nominal"]["bandwidth_bytes_per_s"]
        assert (
            summary["peaks"]["measured"]["flops_per_s"]["bf16"]["value"]
            > 0.5 * summary["peaks"]["nominal"]["flops_per_s"]["bf16"]
        )
    for r in summary["cases"]:
        if r["family"] == "norm":
            assert r["bytes_per_s"]["value"] >= 0.9 * copy, r["case_id"]
