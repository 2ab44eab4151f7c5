"""A report as one HTML file that opens from disk: styles, script and pictures are inside, nothing is loaded."""

from __future__ import annotations

import re
from importlib import resources

from bench.report.model import Report
from bench.report.palette import GRID, INK, MUTED, PALETTE

#: Greys and colours of the pictures, as the page's style sheet names them, so that dark mode can swap them.
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", **{c: f"--series-{i}" for i, c in enumerate(PALETTE)}}


def render(report: Report, svgs: dict[str, str]) -> str:
    """The page.

    Args:
        report: what to say.
        svgs: chart name -> SVG text, as ``charts.svg_text`` gives it.
    """
    import jinja2
    from markupsafe import Markup

    folder = resources.files("bench.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    workloads = list(dict.fromkeys(a.workload for a in report.answers))
    return template.render(
        r=report,
        groups=[(w, [a for a in report.answers if a.workload == w]) for w in workloads],
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),
        js=Markup((folder / "report.js").read_text(encoding="utf-8")),
        svg={name: Markup(inline_svg(text, name)) for name, text in svgs.items()},
    )


def inline_svg(text: str, name: str) -> str:
    """SVG for the inside of a page: no prolog, ids of its own, colours by CSS variables, size by the page."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'<g id="patch_1">.*?</g>', "", body, count=1, flags=re.S)  # the white background
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'href="#{name}-\2"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'\s+xmlns:xlink="[^"]*"|\s+xmlns="[^"]*"', "", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(f": {color}", f": var({variable})")
    return re.sub(r'<svg\b[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', body, count=1)
