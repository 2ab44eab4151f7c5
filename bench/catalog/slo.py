"""Service-level objectives: limits on latency, as text ("ttft p99 <= 500 ms and tpot p95 <= 40 ms") or by name.

Grammar (case and extra spaces do not matter)::

    slo    = limit { ("and" | ",") limit } [ "for" number "%" "of requests" ]
    limit  = metric [ "p" number ] ("<=" | "<") number unit
    metric = "ttft" | "tpot" | "itl" | "e2e"          unit = "us" | "ms" | "s"

A limit with a percentile is a statement about a run: that share of its requests must stay under it. Without one it is
every request's. For goodput each request is held against all limits, whatever their percentile: a request is good when it
meets every one; "for 95 % of requests" is the share of good requests that the whole SLO asks for.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from bench.catalog.yaml_source import (
    Document,
    catalogue_files,
    load_yaml_cached,
    looks_like_path,
    normalised,
    unknown_name,
    validate,
)
from bench.errors import BadInput

SloMetric = Literal["ttft", "tpot", "itl", "e2e"]
METRICS: tuple[SloMetric, ...] = get_args(SloMetric)
_UNITS_S = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLE = 'write for example "ttft p99 <= 500 ms and tpot p95 <= 40 ms for 95 % of requests"'
_NUMBER = r"\d+(?:\.\d+)?"
_LIMIT = re.compile(rf"(\w+)\s*(?:p\s*({_NUMBER}))?\s*(<=|<|≤)\s*({_NUMBER})\s*([a-zµ]+)")
_SHARE = re.compile(rf"\s+for\s+(?:at\s+least\s+)?({_NUMBER})\s*%(?:\s*of\s+(?:all\s+)?requests)?\s*$")


@dataclass(frozen=True, slots=True)
class SloLimit:
    """``metric`` at most ``limit_s`` seconds, for ``percentile`` per cent of requests (None: for every request)."""

    metric: SloMetric
    limit_s: float
    percentile: float | None = None

    @property
    def text(self) -> str:
        """As it is written: ``ttft p99 <= 500 ms``."""
        rank = f" p{self.percentile:g}" if self.percentile is not None else ""
        value = f"{self.limit_s:g} s" if self.limit_s >= 1 else f"{self.limit_s * 1e3:g} ms"
        return f"{self.metric} {rank.strip()} <= {value}" if rank else f"{self.metric} <= {value}"


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that hold together.

    Attributes:
        min_ratio: the share of requests (0-1) that must meet every limit; None when the text does not say.
        source, as_of: where a named one comes from.
    """

    limits: tuple[SloLimit, ...]
    min_ratio: float | None = None
    name: str | None = None
    description: str = ""
    source: str | None = None
    as_of: datetime.date | None = None

    @property
    def text(self) -> str:
        """The SLO in the grammar; parses back to the same limits."""
        share = f" for {self.min_ratio * 100:g} % of requests" if self.min_ratio is not None else ""
        return " and ".join(limit.text for limit in self.limits) + share

    @property
    def required_ratio(self) -> float:
        """Share of good requests asked for: what the text says, else the lowest percentile of its limits, else all."""
        if self.min_ratio is not None:
            return self.min_ratio
        ranks = [limit.percentile for limit in self.limits if limit.percentile is not None]
        return min(ranks) / 100 if ranks else 1.0

    def limit(self, metric: str) -> SloLimit | None:
        """The tightest limit on ``metric``, or None."""
        found = [x for x in self.limits if x.metric == metric]
        return min(found, key=lambda x: x.limit_s) if found else None

    def request_meets(self, **seconds: float | None) -> bool:
        """Whether one request meets every limit. ``seconds`` by metric (``ttft=0.2, tpot=0.03``).

        A metric that is missing or None fails its limit, except TPOT and ITL: they are undefined for one output token.
        """
        for limit in self.limits:
            value = seconds.get(limit.metric)
            if value is None:
                if limit.metric in ("tpot", "itl"):
                    continue
                return False
            if value > limit.limit_s:
                return False
        return True


class SloFile(BaseModel):
    """The YAML form of one named SLO."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    aliases: tuple[str, ...] = ()
    slo: str
    source: Annotated[str, Field(min_length=3)]
    as_of: datetime.date


def parse_slo(text: str) -> Slo:
    """An SLO from its text. Raises BadInput that says which part is not understood."""
    rest = " ".join(str(text).lower().split())
    ratio = None
    share = _SHARE.search(rest)
    if share:
        ratio = float(share.group(1)) / 100
        if not 0 < ratio <= 1:
            raise BadInput(f"SLO: {share.group(1)} % of requests: expected more than 0 and at most 100")
        rest = rest[: share.start()]
    limits = [_parse_limit(part.strip(), text) for part in re.split(r"\s+and\s+|,", rest)]
    seen = [(x.metric, x.percentile) for x in limits]
    for key in seen:
        if seen.count(key) > 1:
            raise BadInput(f"SLO: two limits on {key[0]}", next_step="keep the tighter one")
    return Slo(tuple(limits), ratio)


def _parse_limit(part: str, text: str) -> SloLimit:
    match = _LIMIT.fullmatch(part)
    if match is None:
        raise BadInput(f"SLO: cannot read {part or text!r}", next_step=_EXAMPLE)
    name, rank, _, number, unit = match.groups()
    metric = next((m for m in METRICS if m == name), None)
    if metric is None:
        raise BadInput(f"SLO: unknown metric {name!r}", next_step=f"known: {', '.join(METRICS)}")
    if unit not in _UNITS_S:
        raise BadInput(f"SLO: {part!r}: unknown unit {unit!r}", next_step="write us, ms or s")
    percentile = float(rank) if rank is not None else None
    if percentile is not None and not 0 < percentile < 100:
        raise BadInput(f"SLO: percentile p{rank}: expected more than 0 and less than 100")
    limit_s = float(number) * _UNITS_S[unit]
    if limit_s <= 0:
        raise BadInput(f"SLO: {part!r}: the limit must be above 0")
    return SloLimit(metric, round(limit_s, 12), percentile)


def load_slo(name_path_or_text: str | Path) -> Slo:
    """A named SLO of ``configs/slo/``, a YAML file, or an SLO written out. Raises BadInput or UnknownName."""
    text = str(name_path_or_text)
    if "<" in text or "≤" in text:
        return parse_slo(text)
    if looks_like_path(text):
        return _from_document(load_yaml_cached(Path(text).expanduser()))
    documents = {stem: load_yaml_cached(path) for stem, path in catalogue_files("slo").items()}
    wanted = normalised(text)
    for stem, document in documents.items():
        data: dict[str, Any] = document.data if isinstance(document.data, dict) else {}
        if wanted in {normalised(str(n)) for n in (stem, data.get("name"), *(data.get("aliases") or []))}:
            return _from_document(document)
    raise unknown_name("SLO", text, documents)


def list_slo() -> list[Slo]:
    """Every named SLO, by name."""
    return sorted(
        (_from_document(load_yaml_cached(p)) for p in catalogue_files("slo").values()), key=lambda s: s.name or ""
    )


def _from_document(document: Document) -> Slo:
    spec = validate(document, SloFile)
    try:
        parsed = parse_slo(spec.slo)
    except BadInput as e:
        raise document.bad(e.what, ("slo",), e.next_step) from None
    return Slo(parsed.limits, parsed.min_ratio, spec.name, spec.description, spec.source, spec.as_of)
