"""What the check lets through and what it finds."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernels.checking import EXACT, TOLERANCE, compare, stratified_rows  # noqa: E402


def _reference(n: int = 4096) -> torch.Tensor:
    return torch.randn(64, n // 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_rounding_to_the_output_type_passes(dtype):
    from kernels.device import torch_dtype

    want = _reference()
    check = compare(want.to(torch_dtype(dtype)), want, TOLERANCE[dtype])
    assert check.passed and check.num_values == want.numel()
    # and the limit is no more than twenty times what rounding alone gives
    assert check.rms_error > TOLERANCE[dtype].rms_error / 200


@pytest.mark.parametrize(("dtype", "coarser"), [("fp32", "bf16"), ("fp16", "fp8"), ("bf16", "fp8")])
def test_rounding_to_a_coarser_type_fails(dtype, coarser):
    from kernels.device import torch_dtype

    want = _reference()
    assert not compare(want.to(torch_dtype(coarser)), want, TOLERANCE[dtype]).passed


def test_one_wrong_value_among_thousands_fails():
    want = _reference()
    got = want.clone()
    got[3, 5] += 0.1
    assert not compare(got, want, TOLERANCE["bf16"]).passed


def test_large_values_are_held_to_their_own_size():
    want = _reference()
    want[0, 0] = 100.0
    assert compare(want.to(torch.bfloat16), want, TOLERANCE["bf16"]).passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_fail_whatever_the_limit(bad):
    want = _reference()
    got = want.clone()
    got[1, 1] = bad
    assert not compare(got, want, TOLERANCE["fp8"]).passed


def test_exact_means_equal():
    want = torch.arange(10)
    assert compare(want.clone(), want, EXACT).passed
    got = want.clone()
    got[9] += 1
    check = compare(got, want, EXACT)
    assert not check.passed and check.max_error == 1


def test_a_shape_that_differs_is_a_bug_of_the_case():
    with pytest.raises(ValueError, match="shape"):
        compare(torch.zeros(2), torch.zeros(3), TOLERANCE["fp32"])


@pytest.mark.parametrize(("rows", "block"), [(1, 64), (64, 64), (1000, 64), (4097, 128)])
def test_every_tile_of_rows_holds_a_checked_row(rows, block):
    chosen = stratified_rows(rows, block, seed=3)
    assert chosen[0] == 0 and chosen[-1] == rows - 1 and chosen == sorted(set(chosen))
    for start in range(0, rows, block):
        assert any(start <= r < start + block for r in chosen)


@pytest.mark.parametrize("tolerance", [EXACT, TOLERANCE["bf16"]])
def test_zeros_agree_with_nothing(tolerance):
    """A device that runs no kernel leaves zeros everywhere, in the reference too."""
    zeros = torch.zeros(8)
    assert not compare(zeros, zeros, tolerance).passed
    assert compare(torch.ones(8), torch.ones(8), tolerance).passed
