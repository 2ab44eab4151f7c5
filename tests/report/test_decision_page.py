"""Decision and plan pages: every part is there, labelled, drawn, and nothing is loaded from anywhere."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from bench.config.decision import Decision
from bench.config.demand import Demand
from bench.decide.decision import Compared, compare
from bench.decide.plan import Plan, make_plan
from bench.report.decision import DecisionFiles, decision_page, origin_label, plan_page, write_decision, write_plan
from bench.report.decision_tables import COST_FORMULAS, PLAN_FORMULAS

OWNED = {
    "capex_usd": 30_000, "life_years": 4, "power_w": 1000, "usd_per_kwh": 0.12, "hosting_usd_per_month": 150, "spare_ratio": 0.1,
    "staff_hours_per_month": 1, "usd_per_staff_hour": 90,
}  # fmt: skip


@pytest.fixture(scope="module")
def compared() -> Compared:
    simulate = {"model": "llama-3.1-8b", "isl": 300, "osl": 600, "concurrencies": [1, 8, 64]}
    options = [
        {"name": "rented", "gpu": "H100-SXM", "usd_per_gpu_hour": 4, "simulate": simulate, "min_replicas": 2, "peak_to_mean": 3},
        {"name": "owned", "gpu": "H100-SXM", "owned": OWNED, "simulate": simulate, "fine_tune": {"one_off_usd": 3000}},
        {"name": "typed in", "gpu": "A100-80-SXM", "num_gpus": 2, "usd_per_gpu_hour": 2, "tokens_per_s": 500, "tokens_per_s_low": 400, "tokens_per_s_high": 600},
    ]  # fmt: skip
    apis = ["example-gpt-4o", {"name": "example-gpt-4o", "batch": True}]
    return compare(
        Decision.model_validate({"name": "page", "why": "a test", "mix": "1:2", "options": options, "apis": apis})
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(
        Demand.model_validate(
            {
                "model": "llama-3.1-8b", "peak_rate_per_s": 150, "isl": 500, "osl": 60, "slo": "ttft p99 <= 1 s and tpot p95 <= 50 ms",
                "hourly": [1] * 8 + [10] * 12 + [3] * 4, "growth_per_month": 0.05, "horizon_months": 6,
                "candidates": [{"gpu": g, "tensor_parallel_sizes": [1]} for g in ("H100-SXM", "A100-80-SXM")],
            }
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def decision_files(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> DecisionFiles:
    return write_decision(compared, tmp_path_factory.mktemp("decision"))


@pytest.fixture(scope="module")
def plan_files(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> DecisionFiles:
    return write_plan(plan, tmp_path_factory.mktemp("plan"))


def test_the_decision_page_says_everything(compared: Compared, decision_files: DecisionFiles) -> None:
    page, text = unescape(decision_files.html.read_text()), decision_files.markdown.read_text()
    assert {p.stem for p in decision_files.charts} == {"break_even", "cost_bars", "utilisation", "speed"}
    for name, _ in COST_FORMULAS:
        assert name in page and name in text
    for words in (
        "capital",
        "power",
        "hosting",
        "staff",
        "fine-tuning",
        "Input by time",
        "OpenAI API pricing page",
        "2026-08-05",
    ):
        assert words in page and words in text, words
    assert "simulated" in page.lower() and "ASSUMED AND SIMULATED" in text
    for w in compared.warnings:
        assert w.message in text
    # intervals reach the crossings
    assert re.search(r"M/month \(\d+ M – \d+ M\)", text)


def test_the_plan_page_says_everything(plan: Plan, plan_files: DecisionFiles) -> None:
    page, text = unescape(plan_files.html.read_text()), plan_files.markdown.read_text()
    assert {p.stem for p in plan_files.charts} == {"fleets", "day", "sensitivity"}
    for name, _ in PLAN_FORMULAS:
        assert name in page
    for words in (
        "Runner-up",
        "Flips if",
        "one more lost",
        "Growth of 5% a month",
        "CAPACITY SIMULATED",
        "autoscaling",
    ):
        assert words in text, words
    assert plan.stages[0].peak_per_s == 150 and plan.stages[-1].month == 6
    assert plan.stages[-1].usd_per_month >= plan.stages[0].usd_per_month


def test_losing_replicas_never_helps(plan: Plan) -> None:
    good = [v.good_ratio for _, v in plan.risks]
    waited = [v.waited_ratio for _, v in plan.risks]
    assert len(good) == 3 and good == sorted(good, reverse=True) and waited == sorted(waited)
    assert plan.risks[1][1].met


@pytest.mark.parametrize("which", ["decision_files", "plan_files"])
def test_pages_load_nothing_and_pictures_are_drawn(which: str, request: pytest.FixtureRequest) -> None:
    from matplotlib.image import imread

    files: DecisionFiles = request.getfixturevalue(which)
    page = files.html.read_text()
    assert not re.search(r'(src|href)="(?!#)', page) and "@import" not in page
    # namespaces of SVG and the sources of prices are texts, not addresses that a browser would follow
    assert "url(http" not in page and "fetch(" not in page
    for path in files.charts:
        assert path.stat().st_size > 5_000
        if path.suffix == ".png":
            image = imread(path)[..., :3]
            assert image.shape[1] > 1300 and 0.01 < (image.min(axis=-1) < 0.9).mean() < 0.6
    assert {p.suffix for p in files.charts} == {".png", ".svg"}


@pytest.mark.parametrize("which", ["compared", "plan"])
def test_labels_in_pictures_neither_overlap_nor_leave(which: str, request: pytest.FixtureRequest) -> None:
    subject = request.getfixturevalue(which)
    page = decision_page(subject) if which == "compared" else plan_page(subject)
    for chart, figure in page.charts:
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        width, height = figure.get_size_inches() * figure.dpi
        for ax in figure.axes:
            boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in ax.texts if t.get_text()]
            for i, (name, box) in enumerate(boxes):
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (
                    chart.name,
                    name,
                )
                for other_name, other in boxes[i + 1 :]:
                    assert not box.padded(-2).overlaps(other.padded(-2)), (chart.name, name, other_name)


def test_the_label_of_an_origin() -> None:
    assert origin_label(["measured"]) == ""
    assert origin_label(["measured", "simulated"]) == "partly simulated"
    assert "not measured" in origin_label(["assumed", "simulated"])


def test_stairs_are_drawn_where_they_are(compared: Compared) -> None:
    from bench.report.decision_pictures import stair_volumes

    option = compared.options[2].option
    k = option.capacity_tokens_per_month
    volumes = stair_volumes(option, k / 2, 5 * k)
    costs = [option.monthly_usd(v) for v in volumes]
    assert volumes == sorted(volumes) and costs == sorted(costs)
    jumps = [volumes[i] for i in np.flatnonzero(np.diff(costs) > 0)]
    assert jumps == pytest.approx([k, 2 * k, 3 * k, 4 * k])


def test_a_folder_that_cannot_be_written(compared: Compared, tmp_path: Path) -> None:
    from bench.errors import StoreError

    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_decision(compared, tmp_path / "file" / "page")
