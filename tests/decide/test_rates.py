"""Throughput at the decision's own mix, from cells or simulations at several mixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config.decision import Decision
from bench.decide.decision import Compared, compare
from bench.decide.options import Mix
from bench.decide.rates import MixedRate, mixes_text, rate_at
from bench.records import Estimate
from tests.analysis.synthetic import experiment, write_experiment

positive = st.floats(1e-6, 1.0)


def known(share: float, value: float, spread: float = 0.1) -> MixedRate:
    e = Estimate(value, value * (1 - spread), value * (1 + spread), unit="tokens/s", num_runs=3)
    return MixedRate(share, e, f"cell at {share:.0%}")


@given(positive, positive, st.floats(0, 1), st.floats(0, 0.45), st.floats(0.55, 1))
def test_seconds_per_token_that_add_up_are_found_exactly(
    input_s: float, output_s: float, share: float, left: float, right: float
) -> None:
    """A replica that takes input_s per input token and output_s per output token, known at two mixes."""

    def true_rate(s: float) -> float:
        return 1 / (s * input_s + (1 - s) * output_s)

    mixes = (known(left, true_rate(left)), known(right, true_rate(right)))
    found = rate_at(mixes, share)
    held = min(max(share, left), right)  # beyond the outermost it is held
    assert found.value == pytest.approx(true_rate(held), rel=1e-9)
    assert found.low is not None and found.high is not None and found.low <= found.value <= found.high


def test_the_ends_of_the_range_and_unknown_intervals() -> None:
    mixes = (known(0.2, 400), known(0.5, 1000), known(0.8, 2000))
    assert rate_at(mixes, 0.5) is mixes[1].tokens_per_s
    assert rate_at(mixes, 0.05) is mixes[0].tokens_per_s and rate_at(mixes, 0.99) is mixes[2].tokens_per_s
    bare = replace(mixes[1], tokens_per_s=Estimate(1000, None, None))
    between = rate_at((mixes[0], bare), 0.3)
    assert between.low is None and between.high is None and 400 < between.value < 1000
    assert "held beyond its 20% input tokens" in mixes_text(mixes, Mix(1, 9))
    assert mixes_text(mixes, Mix(1, 1)) == "cell at 50%"
    assert "between cell at 20%" in mixes_text(mixes, Mix(1, 2))


def decided(mix: str, **option: object) -> Compared:
    base = {"name": "ours", "gpu": "H100-SXM", "usd_per_gpu_hour": 4}
    spec = {"name": "d", "why": "a test", "mix": mix, "options": [{**base, **option}], "apis": ["example-gpt-4o"]}
    return compare(Decision.model_validate(spec), curves=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured cells at two shapes, 4:1 and 1:4, each at two batch sizes."""
    exp = experiment(sweep={"grid": {"shape": ["1024/256", "256/1024"], "batch_size": [16, 64]}})
    return write_experiment(tmp_path_factory.mktemp("runs"), exp, origin="measured")[0]


def test_measured_cells_at_several_mixes(folder: Path) -> None:
    found = {mix: decided(mix, results=str(folder)).options[0] for mix in ("4:1", "1:1", "1:4", "99:1")}
    shares = [m.input_ratio for m in found["1:1"].rate.mixes]
    assert shares == pytest.approx([0.2, 0.8], abs=0.02)
    rates = {mix: o.option.tokens_per_s.value for mix, o in found.items()}
    assert rates["1:4"] < rates["1:1"] < rates["4:1"]  # output is what takes time
    assert rates["99:1"] == rates["4:1"]
    assert 1 / rates["1:1"] == pytest.approx((1 / rates["1:4"] + 1 / rates["4:1"]) / 2, rel=0.02)
    # of each mix the cell with the highest throughput, and it is named
    assert found["4:1"].rate.source.count("bs64") == 1 and "bs16" not in found["1:1"].rate.source
    assert found["1:1"].rate.source.startswith("between ")
    assert found["1:1"].option.tokens_per_s.low is not None


def test_a_single_mix_is_held_with_a_warning(folder: Path) -> None:
    one = decided("1:1", results=str(folder), cell="1024x256")
    assert len(one.options[0].rate.mixes) == 1
    assert "other-mix" in {w.code for w in one.warnings}
    assert "other-mix" not in {w.code for w in decided("1:1", results=str(folder)).warnings}


def test_simulated_throughput_is_that_of_the_decisions_mix() -> None:
    simulate = {"model": "llama-3.1-8b", "isl": 300, "osl": 600, "concurrencies": [16]}
    same = decided("1:2", simulate=simulate).options[0]
    moved = decided("4:1", simulate=simulate).options[0]
    assert len(same.rate.mixes) == 1 and len(moved.rate.mixes) == 2
    assert moved.option.tokens_per_s.value > same.option.tokens_per_s.value
    assert "ISL 720, OSL 180" in moved.rate.source and moved.option.origin == "simulated"
