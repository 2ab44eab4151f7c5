"""Which requests met an SLO."""

from __future__ import annotations

import numpy as np

from bench.analysis import metrics as m
from bench.analysis.columns import RequestColumns
from bench.catalog.slo import Slo


def met_slo(c: RequestColumns, slo: Slo) -> np.ndarray:
    """Mask: requests that met all limits of ``slo``; a limit's percentile plays no part here.

    A request with an error has not met it, nor has one without a TTFT or E2E that a limit needs. TPOT and ITL are
    undefined for a single output token and then do not count against it. A request's ITL is the mean gap between its
    chunks, (last - first) / (chunks - 1).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        gaps = np.where(c.num_chunks > 1, (c.last_token_s - c.first_token_s) / (c.num_chunks - 1), np.nan)
    measured = {"ttft": m.ttft_s(c), "tpot": m.tpot_s(c), "itl": gaps, "e2e": m.e2e_s(c)}
    met = c.ok.copy()
    for limit in slo.limits:
        values = measured[limit.metric]
        with np.errstate(invalid="ignore"):
            below = values <= limit.limit_s
        met &= below | np.isnan(values) if limit.metric in ("tpot", "itl") else below
    return met
