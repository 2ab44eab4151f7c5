"""Counts while a run goes on, and the verdict whether it is one at all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from bench.config.experiment import StopSpec
from bench.records import RequestRecord

RATE_WINDOW_S = 5.0
PROGRESS_EVERY_S = 0.25


class Tally:
    """Counts while a run goes on: for the display and for the verdict whether the run is one at all."""

    def __init__(self, report: Callable[[int, float], None] | None = None) -> None:
        self._report = report
        self._recent: deque[tuple[float, int]] = deque()
        self._last_report = 0.0
        self.num_measured = self.num_errors = self.tokens = self.num_seen = 0
        self.first_s = self.last_s = 0.0
        self._error: str | None = None

    def add(self, record: RequestRecord) -> None:
        now = time.monotonic()
        self.num_seen += 1
        tokens = record.osl or 0
        if record.phase == "measured":
            if record.error is None:
                start = record.sent_s or 0.0
                self.first_s = start if self.num_measured == 0 else min(self.first_s, start)
                self.last_s = max(self.last_s, record.done_s or 0.0)
                self.num_measured += 1
                self.tokens += tokens
            elif record.error != "aborted":
                self.num_errors += 1
                self._error = self._error or f"{record.error}: {record.error_detail or 'no detail'}"
        if self._report is None:
            return
        self._recent.append((now, tokens))
        while self._recent and self._recent[0][0] < now - RATE_WINDOW_S:
            self._recent.popleft()
        if now - self._last_report >= PROGRESS_EVERY_S:
            self._last_report = now
            span = max(now - self._recent[0][0], 0.5)
            self._report(self.num_seen, sum(t for _, t in self._recent) / span)

    def overall_rate(self) -> float | None:
        span = self.last_s - self.first_s
        return self.tokens / span if span > 0 else None

    def failure(self, stop: StopSpec) -> str | None:
        """Why this is no usable run, or None."""
        total = self.num_measured + self.num_errors
        if self.num_measured == 0:
            first = f"; first: {self._error}" if self._error else ""
            return f"no request completed ({self.num_errors:,} failed{first})"
        if stop.max_errors is not None and self.num_errors > stop.max_errors:
            return f"{self.num_errors:,} of {total:,} requests failed, {stop.max_errors:,} are allowed; first: {self._error}"
        if stop.max_error_ratio is not None and self.num_errors > stop.max_error_ratio * total:
            share, most = self.num_errors / total, stop.max_error_ratio
            return f"{share:.1%} of requests failed, {most:.1%} are allowed; first: {self._error}"
        return None


__all__ = ["Tally"]
