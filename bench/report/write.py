"""From a Report to files: Markdown, one HTML file, pictures, and tables for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.errors import StoreError
from bench.report.build import Options, build
from bench.report.model import Report

FOLDER = "report"


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where the parts of a report were written."""

    html: Path
    markdown: Path
    csv: Path
    json: Path
    charts: tuple[Path, ...]
    report: Report

    def paths(self) -> dict[str, str]:
        """kind -> path, for machines."""
        return {
            "html": str(self.html),
            "markdown": str(self.markdown),
            "csv": str(self.csv),
            "json": str(self.json),
            "charts": str(self.html.parent / "charts"),
        }


def write_report(
    folder: Path, options: Options | None = None, out: Path | None = None, beside: Sequence[Path] = ()
) -> ReportFiles:
    """Make the report of the results in ``folder`` and write it to ``out`` (default: ``report/`` in the results folder).

    Results in the folders ``beside`` it (a prediction, another machine) are laid into the same charts and tables.

    report.html, report.md, charts/*.png and *.svg, cells.csv (every estimate) and report.json.

    Raises:
        BadInput: an option cannot be used, or there are no results.
        StoreError: the folder cannot be written.
    """
    from bench.analysis.frames import cells_frame
    from bench.report import charts, html, markdown

    report, data, _ = build(folder, options, beside)
    out = out or folder / FOLDER
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn: dict[str, str] = {}
        pictures: list[Path] = []
        for chart in report.charts:
            figure = charts.draw(chart)
            drawn[chart.name] = charts.svg_text(figure)
            pictures += charts.save(figure, drawn[chart.name], chart.name, out / "charts")
        files = ReportFiles(
            out / "report.html", out / "report.md", out / "cells.csv", out / "report.json", tuple(pictures), report
        )
        files.html.write_text(html.render(report, drawn), encoding="utf-8")
        files.markdown.write_text(markdown.render(report), encoding="utf-8")
        cells_frame(data.summaries, report.derived).to_csv(files.csv, index=False)
        files.json.write_text(json.dumps(machine_form(report), indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        where = str(e.filename or out)
        raise StoreError(f"cannot write the report: {e.strerror or e}", where=where, next_step="give --out DIR") from e
    return files


def machine_form(report: Report) -> dict[str, Any]:
    """The parts of a report that a program would read."""
    return {
        "schema_version": 1,
        "experiment": report.title,
        "state": report.state,
        "origin": report.origin_label or "measured",
        "answers": [asdict(a) for a in report.answers],
        "charts": [{"name": c.name, "title": c.title, "answer": c.answer} for c in report.charts],
        "warnings": [{**asdict(d.warning), "cells": list(d.cells)} for d in report.doubts],
        "failures": [asdict(f) for f in report.failures],
    }
