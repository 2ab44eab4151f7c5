"""What a report says: the answers, what is missing, labels of what was not measured, and that it loads nothing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.analysis.metrics import definitions
from bench.analysis.summary import summarise_cell
from bench.cli.report import command as report_command
from bench.cli.show import command as show_command
from bench.errors import BadInput, StoreError
from bench.report.build import Options, build
from bench.report.collect import find_folder
from bench.report.write import ReportFiles, write_report
from bench.store import list_cells, list_runs
from tests.analysis.synthetic import experiment, write_experiment


def answer(files: ReportFiles, question: str) -> str:
    found = next(a for a in files.report.answers if a.question == question)
    return f"{found.headline} | {found.figure} | {found.sentence} | {found.caveat}"


def test_the_answers_name_the_right_configurations(files: ReportFiles, results: Path) -> None:
    rates = {}
    for cell in list_cells(results):
        summary = summarise_cell([r for r in list_runs(cell) if r.status == "complete"])
        rates[cell.name] = summary.estimates["output_tokens_per_s"].value
    best = max(rates, key=lambda k: rates[k])
    assert best.startswith("tp1-bs256")  # tp2-bs256 would be faster, but was skipped
    assert answer(files, "Highest throughput").startswith("TP 1, batch 256 |")
    assert answer(files, "Lowest latency").startswith("TP 2, batch 1 |")
    assert "$" in answer(files, "Lowest cost") and "TP 1, batch 256" in answer(files, "Lowest cost")
    for a in files.report.answers:
        # nothing is stated of a whole answer's latency, and repeats of a simulation would say too little
        latency = a.question == "Lowest latency"
        said = "No interval is stated by the prediction" if latency else "90% interval of the prediction itself"
        assert said in a.sentence, a.question


def test_what_failed_or_is_missing_is_said(files: ReportFiles) -> None:
    by_kind = {f.what.split(" ")[0]: f for f in files.report.failures}
    assert "needs 2 GPUs" in by_kind["skipped"].reason
    assert "out of memory" in by_kind["failed"].reason and "OutOfMemoryError" in by_kind["failed"].log_tail
    markdown = files.markdown.read_text()
    assert "needs 2 GPUs" in markdown and "out of memory" in markdown


def test_an_unfinished_experiment_still_has_a_report(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(results, copy)
    cells = list_cells(copy)
    for run in list_runs(cells[0])[1:]:
        shutil.rmtree(run.folder)
    shutil.rmtree(cells[1])
    report, _, _ = build(copy)
    missing = {c: f.reason for f in report.failures if f.what == "missing" for c in f.cells}
    assert missing[cells[0].name].startswith("1 of 3 runs")
    assert missing[cells[1].name].startswith("0 of 3 runs")
    assert "continues where it stopped" in report.state
    # one run alone has no interval, and says so
    written = write_report(copy, out=tmp_path / "out")
    assert written.html.is_file()


def test_without_any_complete_run_the_report_says_so(tmp_path: Path) -> None:
    folder, _ = write_experiment(tmp_path, experiment(sweep={"grid": {"batch_size": [4]}}), repeats=1, status="failed")
    files = write_report(folder)
    assert "No cell has a complete run yet" in files.html.read_text()
    assert "No cell has a complete run yet" in files.markdown.read_text()
    assert files.report.charts == ()


def test_runs_that_differ_become_a_failure_not_the_end(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(results, copy)
    path = list_runs(list_cells(copy)[0])[0].folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["engine_version"] = "vllm 0.31.0"
    path.write_text(json.dumps(manifest))
    report, _, _ = build(copy)
    refused = [f for f in report.failures if f.what == "refused"]
    assert len(refused) == 1 and "fingerprint.engine_version" in refused[0].reason


def test_simulated_numbers_are_labelled_everywhere(files: ReportFiles) -> None:
    page, markdown = files.html.read_text(), files.markdown.read_text()
    assert files.report.origin_label == "simulated, not measured here"
    for table in files.report.tables:
        assert f"### {table.title} (simulated, not measured here)" in markdown
    assert page.count("simulated, not measured here") >= len(files.report.tables) + 1
    assert all(c.origin_label == "simulated, not measured here" for c in files.report.charts)
    assert set(cell_origins(files)) == {"simulated"}


def cell_origins(files: ReportFiles) -> list[str]:
    import pandas as pd

    return list(pd.read_csv(files.csv)["origin"])


def test_the_table_for_programs_holds_costs_and_scaling_too(files: ReportFiles) -> None:
    import pandas as pd

    frame = pd.read_csv(files.csv)
    found = set(frame["metric"])
    assert {"output_tokens_per_s", "tp_scaling_ratio", "cost_usd_per_million_output_tokens"} <= found
    assert "cost_usd_per_million_output_tokens_at_0.5_utilisation" in found
    one = frame[(frame.metric == "tp_scaling_ratio")]
    assert set(one.tensor_parallel_size) == {2} and ((one["low"] < one["value"]) & (one["value"] < one["high"])).all()


def test_measured_numbers_carry_no_label(tmp_path: Path) -> None:
    folder, _ = write_experiment(tmp_path, experiment(sweep={"grid": {"batch_size": [4, 8]}}), origin="measured")
    files = write_report(folder)
    assert files.report.origin_label == ""
    assert "not measured here" not in files.html.read_text()
    assert any("Random weights" in line for line in files.report.keep_in_mind)


def test_the_head_says_what_was_measured_on_what(files: ReportFiles) -> None:
    assert files.report.setup == "llama-3.1-8b (random weights), vllm 0.32.0, H100-SXM"
    assert files.report.setup in files.html.read_text() and files.report.setup in files.markdown.read_text()


def test_every_definition_is_printed(files: ReportFiles) -> None:
    page, markdown = files.html.read_text(), files.markdown.read_text()
    for d in definitions():
        assert d.title in page and d.title in markdown


class _Loads(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            inside = (value or "").startswith(("#", "data:"))
            if name in ("src", "srcset", "poster", "data", "action", "background") or (
                name in ("href", "xlink:href") and not inside
            ):
                self.found.append(f"{tag} {name}={value}")


def test_the_page_loads_nothing(files: ReportFiles) -> None:
    page = files.html.read_text()
    loads = _Loads()
    loads.feed(page)
    assert loads.found == []
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    assert not re.search(r"https?://", page)


def test_text_from_logs_is_escaped(files: ReportFiles) -> None:
    page = files.html.read_text()
    assert "<script>alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page


def test_ids_of_the_page_are_unique(files: ReportFiles) -> None:
    ids = re.findall(r'\bid="([^"]+)"', files.html.read_text())
    assert len(ids) == len(set(ids))


def test_references_inside_the_page_resolve(files: ReportFiles) -> None:
    page = files.html.read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= ids


def test_prices_and_slo_can_be_given(results: Path) -> None:
    cheap, dear = (build(results, Options(gpu_price_usd_per_hour=p))[0] for p in (1.0, 2.0))
    figures = [next(a.figure for a in r.answers if a.question == "Lowest cost") for r in (cheap, dear)]
    low, high = (float(f.split()[0].strip("$")) for f in figures)
    assert high == pytest.approx(2 * low, rel=0.01)
    within = build(results, Options(slo="e2e p99 <= 100 s"))[0]
    assert any(
        a.question == "Highest throughput within the SLO" and a.headline.startswith("TP") for a in within.answers
    )
    never = build(results, Options(slo="e2e p99 <= 1 ms"))[0]
    found = next(a for a in never.answers if a.question == "Highest throughput within the SLO")
    assert found.figure == "not met"
    with pytest.raises(BadInput, match="SLO"):
        build(results, Options(slo="ttft <= fast"))


def test_the_catalogue_s_price_has_a_range(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(results, copy)
    plan = json.loads((copy / "plan.json").read_text())
    plan["experiment"]["gpu_price_usd_per_hour"] = None
    (copy / "plan.json").write_text(json.dumps(plan))
    report, _, _ = build(copy)
    price = dict(report.statements)["Price"]
    assert "median of" in price and "H100-SXM" in price and "Offers range from" in price


def test_folders_names_and_files_lead_to_the_results(results: Path, tmp_path: Path) -> None:
    assert find_folder(str(results)) == results
    assert find_folder("synthetic", results.parent) == results
    with pytest.raises(BadInput, match=r"no results of an experiment 'nothing'.*synthetic"):
        find_folder("nothing", results.parent)
    with pytest.raises(BadInput, match="no results in this folder"):
        find_folder(str(tmp_path))
    with pytest.raises(BadInput, match="no results yet"):
        find_folder("default-cpu", results.parent)


def test_an_unwritable_place_is_one_clear_error(results: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="cannot write the report"):
        write_report(results, out=blocked / "report")


def test_command_line(results: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(report_command, [str(results), "--out", str(tmp_path), "--json"])
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data["origin"] == "simulated, not measured here" and Path(data["paths"]["html"]).is_file()
    text = CliRunner().invoke(report_command, [str(results), "--out", str(tmp_path)])
    assert "Highest throughput: TP 1, batch 256" in text.output and "SIMULATED" in text.output


def test_show_command(results: Path) -> None:
    run = list_runs(list_cells(results)[0])[0].folder
    text = CliRunner().invoke(show_command, [str(run)])
    assert text.exit_code == 0 and "Output tokens/s" in text.output and "SIMULATED" in text.output
    data = json.loads(CliRunner().invoke(show_command, [str(run), "--json"]).stdout)
    assert data["summary"]["values"]["output_tokens_per_s"] > 0 and data["units"]["output_tokens_per_s"] == "tokens/s"
    assert data["changed_files"] == []
    (run / "requests.jsonl").open("a").write("x")
    try:
        assert "changed since it was written: requests.jsonl" in CliRunner().invoke(show_command, [str(run)]).output
    finally:
        content = (run / "requests.jsonl").read_text()
        (run / "requests.jsonl").write_text(content[:-1])


def test_show_refuses_what_is_no_run(tmp_path: Path) -> None:
    found = CliRunner().invoke(show_command, [str(tmp_path)])
    assert isinstance(found.exception, BadInput) and "not a run" in str(found.exception)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Measured results, and a prediction of the same sweep that is off by some per cent."""
    root = tmp_path_factory.mktemp("side")
    sweep = {"grid": {"tensor_parallel_size": [1, 2], "batch_size": [1, 16]}}
    ours, _ = write_experiment(root / "m", experiment(name="machine", sweep=sweep), origin="measured")
    engine = {"kind": "simulated", "gpu": "H100-SXM"}
    theirs, _ = write_experiment(
        root / "s", experiment(name="guess", sweep=sweep, engine=engine), repeats=1, noise=0.05, seed=3
    )
    return ours, theirs


def test_a_prediction_is_laid_over_the_measurement_with_its_error(predicted: tuple[Path, Path], tmp_path: Path) -> None:
    files = write_report(predicted[0], out=tmp_path, beside=[predicted[1]])
    report = files.report
    assert report.origin_label == "partly simulated"
    assert all("simulated" not in a.headline for a in report.answers)  # a guess is never the answer
    table = next(t for t in report.tables if t.name == "prediction")
    assert len(table.rows) == 4
    for row in table.rows:
        measured, simulated, error = (row[i].sort for i in (2, 3, 4))
        assert isinstance(measured, float) and isinstance(simulated, float)
        assert error == pytest.approx(100 * (simulated / measured - 1))
    chart = next(c for c in report.charts if c.name == "throughput")
    lines = {line.label: line for line in chart.panels[0].lines}
    assert set(lines) == {f"{tp} ({origin})" for tp in ("TP 1", "TP 2") for origin in ("measured", "simulated")}
    for tp in ("TP 1", "TP 2"):
        assert lines[f"{tp} (simulated)"].dashed and not lines[f"{tp} (measured)"].dashed
        assert lines[f"{tp} (simulated)"].color == lines[f"{tp} (measured)"].color
    front = next(c for c in report.charts if c.name == "interactivity")
    assert not any(p.front for line in front.panels[0].lines if "simulated" in line.label for p in line.points)


def test_two_machines_are_told_apart(predicted: tuple[Path, Path], tmp_path: Path) -> None:
    other, _ = write_experiment(
        tmp_path, experiment(name="machine", sweep={"grid": {"tensor_parallel_size": [1, 2], "batch_size": [1, 16]}}), origin="measured",
        fingerprint={"devices": ["NVIDIA A100-SXM4-80GB"], "engine_version": "vllm 0.32.0"},
        provenance={"gpus": [{"name": "NVIDIA A100-SXM4-80GB"}]},
    )  # fmt: skip
    report, data, layout = build(predicted[0], beside=[other])
    assert set(layout.lines) == {"H100-SXM TP 1", "H100-SXM TP 2", "A100-80-SXM TP 1", "A100-80-SXM TP 2"}
    assert len({s.key for s in data.summaries}) == 8  # equal cell ids, two folders
    assert next(t for t in report.tables if t.name == "cost").rows


def test_a_predicted_host_cpu_is_the_one_measured_beside_it(tmp_path: Path) -> None:
    sweep = {"points": [{"batch_size": 4}, {"batch_size": 1}, {"batch_size": 4, "isl": 384}]}
    xeon = {"cpu": "Xeon", "devices": ["cpu"]}
    ours, _ = write_experiment(
        tmp_path, experiment(name="host", sweep=sweep), origin="measured", num_gpus=0, repeats=1, fingerprint=xeon
    )
    guess = experiment(name="guess", sweep=sweep, engine={"kind": "simulated", "gpu": "cpu"})
    theirs, _ = write_experiment(tmp_path, guess, num_gpus=0, repeats=1, fingerprint={})
    report, _, layout = build(ours, beside=[theirs])
    assert layout.lines == ("TP 1 (measured)", "TP 1 (simulated)")
    assert len({p.color for p in layout.placed}) == 1
    front = next(c for c in report.charts if c.name == "interactivity")
    assert [p.note for p in front.panels[0].lines[0].points] == ["1", "4"]
    # a cell that leaves an axis alone is named by the fixed part's value, which one other cell alone sweeps
    assert layout.panels == ("ISL 1024", "ISL 384")
    table = next(t for t in report.tables if t.name == "throughput")
    assert [row[2].text for row in table.rows[:3]] == ["1024", "1024", "384"]
