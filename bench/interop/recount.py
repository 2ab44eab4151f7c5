"""The tool's own numbers, counted again from the imported records by our functions over the tool's own window.

Where both agree, the file was understood: units, failed requests, token counts and times mean what the reader takes them for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.analysis import metrics as m
from bench.analysis.columns import RequestColumns
from bench.interop.imported import ForeignRun

#: Above this relative difference a number counts as not reproduced. Files hold floats in full, so agreement is far closer.
TOLERANCE_RATIO = 0.005


@dataclass(frozen=True, slots=True)
class Recounted:
    """One number of the tool beside ours, in seconds, tokens, tokens/s or as a share."""

    key: str
    theirs: float
    ours: float

    @property
    def difference_ratio(self) -> float:
        """|ours - theirs| / |theirs|; the plain difference where theirs is zero."""
        return abs(self.ours - self.theirs) / (abs(self.theirs) or 1.0)

    @property
    def agrees(self) -> bool:
        return self.difference_ratio <= TOLERANCE_RATIO


def recount(run: ForeignRun) -> tuple[Recounted, ...]:
    """Every number of ``run.recount`` that the records give, beside the tool's. Empty for a run without records."""
    if not run.records:
        return ()
    ours = _ours(run)
    return tuple(Recounted(k, run.reported[k], ours[k]) for k in run.recount if k in ours)


def _ours(run: ForeignRun) -> dict[str, float]:
    c = RequestColumns.of(list(run.records))
    c = c.where(c.phase == "measured")
    good = c.where(c.ok)
    out: dict[str, float] = {}
    for key, values in (
        ("ttft_service", m.ttft_service_s(c)),
        ("tpot", m.tpot_s(c)),
        ("e2e_service", np.where(c.ok, c.done_s - c.sent_s, np.nan)),
        ("itl", _gaps(run, good)),
    ):
        data = values[~np.isnan(values)]
        if len(data):
            out[f"{key}_mean_s"] = float(data.mean())
            # the tool prints percentiles of any sample; only reports hold back what a sample does not allow
            out |= {f"{key}_p{q}_s": float(np.percentile(data, q)) for q in m.PERCENTILES}
    if len(c):
        out["error_ratio"] = 1 - len(good) / len(c)
    if len(good) and not np.isnan(good.isl).any():
        out["isl_mean_tokens"] = float(good.isl.mean())
    if len(good) and not np.isnan(good.osl).any():
        out["osl_mean_tokens"] = float(good.osl.mean())
    if run.duration_s:
        out["requests_per_s"] = len(good) / run.duration_s
        output, prompt = float(np.nansum(good.osl)), float(np.nansum(good.isl))
        out["output_tokens_per_s"] = output / run.duration_s
        out["total_tokens_per_s"] = (output + prompt) / run.duration_s
    return out


def _gaps(run: ForeignRun, good: RequestColumns) -> np.ndarray:
    if run.chunks is None:
        return np.zeros(0)
    return m.itl_s(run.chunks.index, run.chunks.t_s, good.index)
