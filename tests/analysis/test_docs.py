"""The page of definitions is the table of definitions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.analysis.metrics import definitions

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_metrics_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location(
        "write_metric_definitions", ROOT / "scripts" / "write_metric_definitions.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert all(d.title in page for d in definitions())
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == page, "run: python scripts/write_metric_definitions.py"
