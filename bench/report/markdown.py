"""A report as one Markdown file; pictures are linked from charts/ beside it."""

from __future__ import annotations

from bench.report.model import Answer, Field, Report, Table


def render(report: Report) -> str:
    """The whole report as Markdown text."""
    out = [f"# {report.title}", ""]
    if report.origin_label:
        out += [f"**{report.origin_label.upper()}**", ""]
    if report.why:
        out += [f"> {line}" for line in report.why.splitlines()] + [""]
    if report.setup:
        out += [report.setup + ".", ""]
    out += [f"{report.state}. Written {report.created_utc} by tokenyield {report.version}.", "", "## In short", ""]
    out += _answers(report)
    if report.keep_in_mind:
        out += ["", "Keep in mind:", "", *(f"- {line}" for line in report.keep_in_mind)]
    out += ["", "## Charts", ""]
    for chart in report.charts:
        label = f" ({report.origin_label})" if chart.origin_label else ""
        out += [f"### {chart.title}{label}", "", chart.answer, "", f"![{chart.title}](charts/{chart.name}.png)", ""]
    for title, why in report.missing_charts:
        out += [f"No chart of {title[0].lower()}{title[1:]}: {why}.", ""]
    out += ["## Tables", ""]
    for table in report.tables:
        out += table_lines(table, report.origin_label)
    out += _failures(report)
    out += ["## Warnings", ""]
    for d in report.doubts:
        where = f" Cells: {len(d.cells)}." if d.cells else ""
        out.append(
            f"- **{d.warning.code}** ({d.warning.severity}): {d.warning.message}. {d.warning.remedy[:1].upper()}{d.warning.remedy[1:]}.{where}"
        )
    out += ["" if report.doubts else "None.", "## How it was measured", ""]
    out += [f"- **{name}**: {text}" for name, text in report.statements]
    out += ["", "## Definitions", "", "| Metric | Unit | Definition |", "|---|---|---|"]
    out += [f"| {_cell(d.title)} | {_cell(d.unit or '1')} | {_cell(d.formula)} |" for d in report.definitions]
    out += ["", "## Provenance", ""]
    for section, rows in report.provenance:
        out += [f"### {section}", "", "| | |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows), ""]
    if report.configuration:
        out += ["## Configuration", "", "```yaml", report.configuration.rstrip(), "```", ""]
    return "\n".join(out).rstrip() + "\n"


def _answers(report: Report) -> list[str]:
    if not report.answers:
        return ["No cell has a complete run yet."]
    workloads = list(dict.fromkeys(a.workload for a in report.answers))
    out = []
    for workload in workloads:
        if workload:
            out += [f"**{workload}**", ""]
        out += [_answer(a) for a in report.answers if a.workload == workload]
        out.append("")
    return out[:-1]


def _answer(a: Answer) -> str:
    text = f"- **{a.question}: {a.headline}, {a.figure}.** {a.sentence}"
    return f"{text} {a.caveat}".rstrip()


def table_lines(table: Table, origin_label: str) -> list[str]:
    title = f"### {table.title}" + (f" ({origin_label})" if origin_label else "")
    heads = [f"{c.title} ({c.unit})" if c.unit else c.title for c in table.columns]
    out = [title, "", "| " + " | ".join(_cell(h) for h in heads) + " |"]
    out.append("|" + "|".join("--:" if c.numeric else "---" for c in table.columns) + "|")
    reasons: dict[str, int] = {}
    out += ["| " + " | ".join(_cell(_field(f, reasons)) for f in row) + " |" for row in table.rows]
    out.append("")
    if table.note:
        out += [table.note, ""]
    if reasons:
        out += ["n/a: " + "; ".join(f"({n}) {why}" for why, n in reasons.items()) + ".", ""]
    return out


def _field(f: Field, reasons: dict[str, int]) -> str:
    if f.text == "n/a":
        return f"n/a ({reasons.setdefault(f.detail, len(reasons) + 1)})" if f.detail else "n/a"
    return f"{f.text} ({f.detail})" if f.detail and f.detail[:1] in "0123456789$-" else f.text


def _failures(report: Report) -> list[str]:
    if not report.failures:
        return []
    out = ["## Failed, missing and skipped", ""]
    for f in report.failures:
        cells = ", ".join(f"`{c}`" for c in f.cells)
        out.append(f"- **{f.what}**: {' '.join(f.reason.split())} ({cells})")
        if f.log_tail:
            out += ["", "  ```", *(f"  {line}" for line in f.log_tail.splitlines()), "  ```", ""]
    return [*out, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
