"""A reduced accuracy gate: a fixed handful of published points must stay within stated errors.

The whole gate is ``make accuracy``. The points here were chosen by position (every k-th of each model), not by how well
they do; the limits are those of the issue with a little room for the small sample.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from bench.sim.accuracy import FITTED_MODELS, Graded, errors, grade, lengths, little, ratio_errors
from bench.sim.ground_truth import Point, published_points, serving_points, version_of

SERVING, REFUSED = serving_points()
QUICK = [
    p for p in SERVING if p.gpu in ("h100-sxm", "h200-sxm") and p.concurrency <= 64 and p.osl <= 1024 and p.ttft_s < 3.5
]


def sample(points: list[Point], model: str, count: int) -> list[Point]:
    members = sorted((p for p in points if p.model == model), key=lambda p: p.id)
    return members[:: max(1, len(members) // count)][:count]


@pytest.fixture(scope="module")
def graded() -> list[Graded]:
    chosen = [p for m in ("llama-3.1-70b", "gpt-oss-120b", "kimi-k2.5", "minimax-m2.5") for p in sample(QUICK, m, 6)]
    found, refused = grade(chosen)
    assert not refused
    return found


def median(graded: list[Graded], metric: str, **wanted: object) -> float:
    members = [g for g in graded if all(getattr(g.point, k, getattr(g, k, None)) == v for k, v in wanted.items())]
    return float(np.median([abs(g.error(metric)) for g in members]))


def test_the_median_errors_meet_the_targets(graded: list[Graded]) -> None:
    assert median(graded, "tpot") <= 0.07
    assert median(graded, "ttft") <= 0.15
    assert median(graded, "output_tokens_per_s") <= 0.10


def test_a_model_that_was_never_fitted_is_not_far_off(graded: list[Graded]) -> None:
    assert "minimax-m2.5" not in FITTED_MODELS
    assert median(graded, "tpot", model="minimax-m2.5") <= 0.15


def test_most_points_lie_inside_their_intervals(graded: list[Graded]) -> None:
    covered = [c for g in graded for c in g.covered.values()]
    assert np.mean(covered) >= 0.85


def test_a_source_that_was_never_fitted_is_not_far_off() -> None:
    points, _ = published_points()
    arena = [p for p in points if p.source.startswith("ML.ENERGY") and p.gpu == "h100-sxm" and p.concurrency <= 128]
    found, _ = grade(sample(arena, "llama-3.1-8b", 3) + sample(arena, "qwen3-32b", 3))
    assert median(found, "output_tokens_per_s") <= 0.15


def test_grading_is_deterministic() -> None:
    point = sample(QUICK, "llama-3.1-70b", 1)
    first, second = (grade(point)[0][0].predicted for _ in range(2))
    assert first == second


def test_rows_are_refused_with_a_reason_and_never_lost() -> None:
    reasons = Counter(r.reason for r in REFUSED)
    assert all(reasons) and sum(reasons.values()) == len(REFUSED)
    published, refused = published_points()
    assert published and refused
    assert {r.reason for r in refused} >= {"prompt or output lengths not published", "model not in the catalogue"}


def test_a_point_that_cannot_fit_is_refused() -> None:
    big = next(p for p in SERVING if p.model == "kimi-k2.5")
    import dataclasses

    found, refused = grade([dataclasses.replace(big, tp=1)])
    assert not found and "does not fit" in refused[0].reason


def test_lengths_follow_the_policy_of_the_source() -> None:
    point = next(p for p in SERVING if p.isl == 1024)
    isl, _ = lengths(point, np.random.default_rng(0), 5000)
    assert isl.min() >= 819 and isl.max() == 1024 and abs(isl.mean() - 921.5) < 5
    import dataclasses

    tailed = dataclasses.replace(point, spread="long-tailed")
    isl, _ = lengths(tailed, np.random.default_rng(0), 5000)
    assert isl.mean() == pytest.approx(1024, rel=0.01) and isl.max() > 3000


def test_littles_law_gives_the_rate_of_a_closed_loop() -> None:
    point = next(p for p in SERVING if p.osl == 1024 and p.concurrency == 16)
    import dataclasses

    exact = dataclasses.replace(point, ttft_s=1.0, tpot_s=0.01)
    assert little(exact) == pytest.approx(16 * 921.6 / (1.0 + 0.01 * 920.6))
    assert math.isnan(little(dataclasses.replace(exact, kind="offline")))


def test_versions_are_read_from_many_spellings() -> None:
    assert version_of("0.18.0") == (0, 18) and version_of("vLLM 0.10.0, RHEL 9.6") == (0, 10)
    assert version_of("v0.9.2") == (0, 9) and version_of("nightly-5b8c") == () and version_of("") == ()


def test_groups_are_summed_up_with_bias_and_coverage(graded: list[Graded]) -> None:
    rows = errors(graded, lambda g: g.point.model)
    assert {r.group for r in rows} == {g.point.model for g in graded}
    for row in rows:
        assert row.num_rows == sum(g.point.model == row.group for g in graded)
        assert row.mean_ape >= 0 and abs(row.bias) <= row.mean_ape * 3 + 1e-9 and 0 <= row.coverage <= 1


def pretend(point: Point, predicted: float, **changed: object) -> Graded:
    """``point`` with other facts, graded without a simulation."""
    import dataclasses

    point = dataclasses.replace(point, **changed)  # type: ignore[arg-type]
    return Graded(point, {"output_tokens_per_s": predicted}, {"output_tokens_per_s": 100.0}, False, {}, "own curves")


def test_a_pair_shares_everything_but_what_differs() -> None:
    published, _ = published_points()
    one = next(p for p in published if p.kind == "offline" and p.gpu == "a100-80-sxm" and p.asynchronous is None)
    other = {"gpu": "h100-sxm", "osl": one.osl * 1.01, "num_requests": int(one.num_requests * 0.99)}
    pairs = ratio_errors([pretend(one, 100.0), pretend(one, 120.0, **other)], "gpu")
    assert pairs == {"h100-sxm over a100-80-sxm": [pytest.approx(0.2)]}
    for unlike in (
        {"osl": one.osl * 1.1},
        {"asynchronous": True},
        {"max_num_batched_tokens": 4096},
        {"tp": 2 * one.tp},
    ):
        assert not ratio_errors([pretend(one, 100.0), pretend(one, 120.0, **{**other, **unlike})], "gpu")


def test_nominal_lengths_of_closed_loops_must_be_equal() -> None:
    one = next(p for p in SERVING if p.isl == 1024)
    same, near = ({"gpu": "other", "isl": isl} for isl in (1024.0, 1000.0))
    assert ratio_errors([pretend(one, 100.0), pretend(one, 110.0, **same)], "gpu")
    assert not ratio_errors([pretend(one, 100.0), pretend(one, 110.0, **near)], "gpu")
