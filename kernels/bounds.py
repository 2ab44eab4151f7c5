"""What the figures of a kernel run must hold, and whether they do: a verdict a bound, computed from summary.json alone.

* A large copy reaches 90 % and a large bf16 GEMM 95 % of the best that torch reaches by any of its own ways, timed in the
  same process by torch's own benchmark (``kernels.referee``).
* Our Triton kernels of the layers between GEMMs (RMSNorm + residual, SiLU * mul) reach 90 % of the bandwidth of copy.
* Our paged decode attention is compared with the best library at every shape; no share is asked of it.

A miss is a result: it is printed and stored, and nothing is left out for it. Where nothing could be compared it is "n/a"
with the reason.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["met", "missed", "compared", "n/a"]
COPY_SHARE, GEMM_SHARE, NORM_SHARE = 0.90, 0.95, 0.90
#: Traffic of a Triton kernel in last-level caches for its rate to be one of memory: what stays in the cache at its end (one
#: cache at most) is then a sixteenth, below the tenth that the bound leaves.
TRAFFIC_IN_CACHES = 16.0
_OURS = ("rmsnorm_residual", "silu_mul")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """One bound: ``value`` is a share (1 = as fast), ``limit`` the least that is asked for (None: nothing is)."""

    name: str
    verdict: Verdict
    value: float | None
    limit: float | None
    case_id: str | None
    reason: str

    def text(self) -> str:
        """One line for people."""
        asked = "" if self.limit is None else f" (at least {self.limit:.0%} asked)"
        share = "" if self.value is None else f": {self.value:.1%}{asked}"
        return f"{self.name}{share}: {self.verdict}; {self.reason}"


def bounds_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bound of a run as plain JSON values; ``summary`` as ``kernels.results.summarise`` makes it."""
    rows = summary["cases"]
    copy = summary["peaks"]["measured"].get("copy_bytes_per_s")
    return [
        asdict(b)
        for b in (
            refereed("memory copy against torch's best", rows, ("memory", "copy", None), COPY_SHARE),
            refereed("bf16 GEMM against torch's best", rows, ("gemm", "linear", "bf16"), GEMM_SHARE),
            *(against_copy(op, rows, copy, summary["device"]["l2_bytes"]) for op in _OURS),
            *against_library(rows),
        )
    ]


def refereed(name: str, rows: list[Row], kind: tuple[str, str, str | None], limit: float) -> Bound:
    """The refereed case that does most of one family, operation and type, against the best of torch's own ways."""
    family, op, dtype = kind
    mine = [r for r in rows if (r["family"], r["op"]) == (family, op) and dtype in (None, r["dtype"])]
    found = [r for r in mine if r["status"] == "ok" and r.get("referee")]
    if not found:
        return Bound(name, "n/a", None, limit, None, _why_none(mine, "no case of this run was refereed"))
    row = max(found, key=lambda r: (r["bytes"], r["flops"]))
    way, best_s = min(medians(row["referee"]).items(), key=lambda item: item[1])
    share = best_s / row["time_s"]["value"]
    reason = f"torch's best is {way}, {row['referee']['clock']}"
    return Bound(name, _judge(share, limit), share, limit, row["case_id"], reason)


def medians(referee: dict[str, Any]) -> dict[str, float]:
    """Median seconds of every way."""
    return {way: statistics.median(seconds) for way, seconds in referee["seconds"].items()}


def against_copy(op: str, rows: list[Row], copy: dict[str, Any] | None, cache_bytes: int) -> Bound:
    """Our Triton kernel at its largest size against the bandwidth of copy."""
    name = f"Triton {op} against copy"
    mine = [r for r in rows if (r["family"], r["op"], r["impl"]) == ("norm", op, "triton")]
    timed = [r for r in mine if r["status"] == "ok" and r.get("bytes_per_s")]
    if not timed or not copy:
        return Bound(name, "n/a", None, NORM_SHARE, None, _why_none(mine, "no copy was timed"))
    row = max(timed, key=lambda r: r["bytes"])
    if row["bytes"] < TRAFFIC_IN_CACHES * cache_bytes:
        reason = (
            f"its traffic, {row['bytes'] / 2**20:.0f} MiB, is less than {TRAFFIC_IN_CACHES:.0f} x the last-level cache"
        )
        return Bound(name, "n/a", None, NORM_SHARE, row["case_id"], reason)
    share = row["bytes_per_s"]["value"] / copy["value"]
    return Bound(name, _judge(share, NORM_SHARE), share, NORM_SHARE, row["case_id"], "bytes/s of both")


def against_library(rows: list[Row]) -> list[Bound]:
    """Our paged decode at every shape against the fastest library there."""
    mine = [r for r in rows if (r["family"], r["op"]) == ("attention", "paged_decode")]
    ours = [r for r in mine if r["impl"] == "triton"]
    out = []
    for row in ours:
        rivals = [r for r in mine if r["impl"] != "triton" and r["shape"] == row["shape"] and r["status"] == "ok"]
        if row["status"] != "ok" or not rivals:
            continue
        best = min(rivals, key=lambda r: r["time_s"]["value"])
        share = best["time_s"]["value"] / row["time_s"]["value"]
        s = row["shape"]
        name = f"Triton paged decode, {s['batch']} x {s['context']}, against the best library"
        out.append(Bound(name, "compared", share, None, row["case_id"], best["backend"]))
    if out:
        return out
    reason = _why_none(ours, "no library was timed beside it")
    return [Bound("Triton paged decode against the best library", "n/a", None, None, None, reason)]


def _judge(share: float, limit: float) -> Verdict:
    return "met" if share >= limit else "missed"


def _why_none(rows: list[Row], otherwise: str) -> str:
    """Why none of ``rows`` counts: the first reason that one gives, else ``otherwise``."""
    if not rows:
        return "the suite has no such case"
    return next((str(r["reason"]) for r in rows if r["status"] != "ok" and r.get("reason")), otherwise)
