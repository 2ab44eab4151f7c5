"""Costs, break-even and fleets from run folders: measured, simulated and imported alike, each under its label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.catalog.hardware import load_hardware
from bench.catalog.slo import load_slo
from bench.cli import cli
from bench.config.decision import Decision
from bench.config.demand import Demand
from bench.decide.decision import compare
from bench.decide.measured import measured_capacity
from bench.decide.plan import make_plan
from bench.errors import BadInput
from tests.analysis.synthetic import experiment, write_experiment

SLO = "ttft p99 <= 30 s and tpot p95 <= 50 ms"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = experiment(sweep={"grid": {"tensor_parallel_size": [1, 2], "batch_size": [1, 16, 64]}})
    return write_experiment(tmp_path_factory.mktemp("runs"), exp, origin="measured")[0]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = experiment(sweep={"grid": {"batch_size": [16]}})
    return write_experiment(tmp_path_factory.mktemp("imported"), exp, origin="imported", hardware="H100-SXM")[0]


def costs(folder: Path, *more: str) -> dict:  # type: ignore[type-arg]
    done = CliRunner().invoke(cli, ["cost", str(folder), "--json", *more])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)  # type: ignore[no-any-return]


def test_bench_cost_prices_an_experiment(folder: Path) -> None:
    found = costs(folder, "--utilisation", "0.25")
    assert len(found["cells"]) == 6
    for cell in found["cells"]:
        rate = cell["output_tokens_per_s"]
        full = cell["full_use"]["cost_usd_per_million_output_tokens"]
        assert full["value"] == pytest.approx(4.0 * cell["num_devices"] / 3600 / rate["value"] * 1e6)
        # the interval of the rate, its ends turned round
        assert full["low"] == pytest.approx(4.0 * cell["num_devices"] / 3600 / rate["high"] * 1e6)
        assert full["high"] == pytest.approx(4.0 * cell["num_devices"] / 3600 / rate["low"] * 1e6)
        used = cell["stated_use"]["cost_usd_per_million_output_tokens"]
        assert used["value"] == pytest.approx(4 * full["value"])
        assert set(cell["split_by_time"]) == {"input_usd_per_million", "output_usd_per_million"}
    half = costs(folder, "--gpu-price", "2", "--cell", found["cells"][0]["cell_id"])
    value = half["cells"][0]["full_use"]["cost_usd_per_million_output_tokens"]["value"]
    assert value == pytest.approx(found["cells"][0]["full_use"]["cost_usd_per_million_output_tokens"]["value"] / 2)


def test_bench_cost_prices_a_single_run_and_imported_results(folder: Path, imported: Path) -> None:
    run = next(p for p in sorted(folder.glob("*/run-*")) if (p / "manifest.json").is_file())
    assert len(costs(run)["cells"]) == 1
    found = costs(imported)
    assert {c["origin"] for c in found["cells"]} == {"imported"}
    table = CliRunner().invoke(cli, ["cost", str(imported)], env={"COLUMNS": "200"})
    assert "IMPORTED" in table.output


def option(folder: Path, **more: object) -> dict:  # type: ignore[type-arg]
    return {"name": "measured", "gpu": "H100-SXM", "usd_per_gpu_hour": 4, "results": str(folder), **more}


def decide(**change: object) -> Decision:
    base = {"name": "d", "why": "a test", "mix": "4:1", "apis": ["example-gpt-4o"]}
    return Decision.model_validate({**base, **change})


def test_break_even_from_measured_cells(folder: Path) -> None:
    found = compare(decide(options=[option(folder, cell="tp1")]))
    o = found.options[0]
    assert o.option.origin == "measured" and o.option.tokens_per_s.low is not None
    assert o.rate.curve is not None and len(o.rate.curve.points) == 3 and o.rate.curve.origin == "measured"
    assert o.rate.prefill_time_ratio is not None and 0 < o.rate.prefill_time_ratio < 1
    pair = found.pairs[0]
    assert pair.first is not None and pair.first.low is not None and pair.first.high is not None
    assert pair.first.low <= pair.first.value <= pair.first.high
    assert "simulated" not in {w.code for w in found.warnings}


def test_imported_results_are_labelled(imported: Path) -> None:
    found = compare(decide(options=[option(imported)]))
    assert found.options[0].option.origin == "imported" and "imported" in {w.code for w in found.warnings}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"gpu": "A100-80-SXM"}, "not of A100"), ({"num_gpus": 4}, "GPUs a replica"), ({"cell": "nothing"}, "nothing")],
)
def test_results_that_contradict_the_option(folder: Path, change: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(BadInput, match=words) as caught:
        compare(decide(options=[option(folder, **{"cell": "tp1", **change})]))
    assert caught.value.next_step


def test_a_fleet_from_measured_capacity(folder: Path) -> None:
    found = measured_capacity(str(folder), load_hardware("H100-SXM"), load_slo(SLO))
    assert [c.num_gpus for c in found] == [1, 2]
    assert all(c.origin == "measured" and c.model is None for c in found)
    with pytest.raises(BadInput, match="no measured cell"):
        measured_capacity(str(folder), load_hardware("H100-SXM"), load_slo("ttft p99 <= 1 us"))
    demand = Demand.model_validate(
        {
            "model": "llama-3.1-8b", "peak_rate_per_s": 100, "isl": 1024, "osl": 256, "slo": SLO,
            "candidates": [{"gpu": "H100-SXM", "results": str(folder), "usd_per_gpu_hour": 4}],
        }
    )  # fmt: skip
    plan = make_plan(demand)
    best = plan.fleets[0]
    assert best.origin == "measured" and best.at_peak is None and plan.risks == ()
    assert best.cost.num_serving * best.capacity_per_s * 0.85 >= 100 - 1e-9


def test_simulated_throughput_carries_the_predictions_own_interval(tmp_path: Path) -> None:
    """Costs and crossings of predicted cells: not the interval over repeats, which a simulation repeats almost exactly."""
    stated = {"intervals": {"output_tokens_per_s": [0.5, 1.25, 0.9, "rows"], "ttft": None, "tpot": None}}
    engine = {"kind": "simulated", "gpu": "H100-SXM"}
    exp = experiment(engine=engine, sweep={"grid": {"batch_size": [64]}})
    guess, _ = write_experiment(tmp_path, exp, repeats=3, simulated=stated)
    (cell,) = costs(guess)["cells"]
    for use in ("full_use", "stated_use"):
        for cost in cell[use].values():
            assert (cost["low"], cost["high"]) == pytest.approx((cost["value"] / 1.25, cost["value"] / 0.5))
            assert cost["confidence"] == 0.9 and "interval of the prediction itself (rows)" in cost["method"]
    text = CliRunner().invoke(cli, ["cost", str(guess)], catch_exceptions=False).output
    assert "the 90% interval of the prediction itself" in " ".join(text.split())
    compared = compare(decide(options=[option(guess)]), curves=False)
    (o,), (pair, *_) = compared.options, compared.pairs
    rate = o.option.tokens_per_s
    assert (rate.low, rate.high) == pytest.approx((0.5 * rate.value, 1.25 * rate.value))
    assert pair.first is None or "interval of the prediction itself" in pair.first.method
    assert any("interval of the prediction itself" in w.message for w in compared.warnings)
