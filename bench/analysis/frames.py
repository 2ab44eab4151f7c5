"""Summaries and records as pandas frames, for reports and for anybody's own analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.analysis.columns import RequestColumns
from bench.analysis.summary import Summary
from bench.records import Estimate, RequestRecord

if TYPE_CHECKING:
    import pandas as pd


def cells_frame(
    summaries: Sequence[Summary], derived: Mapping[str, Mapping[str, Estimate]] | None = None
) -> pd.DataFrame:
    """Tidy: one row for each cell and metric, with interval, number of runs, method and origin.

    ``derived`` adds estimates by Summary.key (costs, TP scaling). Columns: experiment, cell_id, origin, tensor_parallel_size, num_devices, level, level_value, the sweep's axes (``axis.*``),
    metric, unit, value, low, high, confidence, method, num_runs.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for s in summaries:
        level, x = s.facts.level or ("", float("nan"))
        cell = {
            "experiment": s.experiment,
            "cell_id": s.cell_id,
            "origin": s.origin,
            "tensor_parallel_size": s.facts.tensor_parallel_size,
            "num_devices": s.num_devices,
            "level": level,
            "level_value": x,
            **{
                f"axis.{k}": v if isinstance(v, (int, float, str)) or v is None else str(v)
                for k, v in s.facts.axes.items()
            },
        }
        rows += [
            {**cell, "metric": key, "unit": e.unit, "value": e.value, "low": e.low, "high": e.high, "confidence": e.confidence,
             "method": e.method, "num_runs": e.num_runs}
            for key, e in {**s.estimates, **(derived or {}).get(s.key, {})}.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def runs_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """One row a run: cell_id, run, repeat, origin, window, and a column for each metric."""
    import pandas as pd

    rows = []
    for s in summaries:
        for r in s.runs:
            window = {} if r.window is None else {"window_kind": r.window.kind, "steady": r.window.steady}
            rows.append(
                {"cell_id": s.cell_id, "run": r.run, "repeat": r.repeat, "origin": r.origin, **window, **r.values}
            )
    return pd.DataFrame(rows)


def requests_frame(records: Sequence[RequestRecord]) -> pd.DataFrame:
    """One row a request: raw times and counts (NaN = not known) and the derived latencies in seconds."""
    import pandas as pd

    from bench.analysis import metrics as m

    c = RequestColumns.of(records)
    frame = pd.DataFrame({name: getattr(c, name) for name in RequestColumns.__slots__})
    for key, function in (
        ("ttft_s", m.ttft_s),
        ("ttft_service_s", m.ttft_service_s),
        ("tpot_s", m.tpot_s),
        ("e2e_s", m.e2e_s),
        ("send_lateness_s", m.send_lateness_s),
    ):
        frame[key] = function(c)
    return frame
