"""The line that `bench load` keeps up to date on a terminal while a run goes on."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

from bench.load.driver import Progress

_EVERY_S, _WINDOW_S = 0.25, 3.0
_STAGES = {"connect": "connecting", "warmup": "warm-up", "drain": "ending"}


class ProgressLine:
    """Requests done, errors and rates of the last seconds, rewritten in place. Nothing where ``out`` is no terminal."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = sys.stderr if out is None else out
        self.enabled = self.out.isatty()
        self._next = 0.0
        self._width = 0
        self._seen: deque[tuple[float, int, int]] = deque()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if not self.enabled or now < self._next:
            return
        self._next = now + _EVERY_S
        if progress.stage == "parse":  # the window is over
            self.end()
            return
        self._seen.append((now, progress.num_done, progress.num_reads))
        while len(self._seen) > 2 and self._seen[0][0] < now - _WINDOW_S:
            self._seen.popleft()
        self._write(self.text(progress))

    def text(self, p: Progress) -> str:
        """The line for ``p``; rates over the last seconds that were seen."""
        parts = [
            f"  {_STAGES.get(p.stage, '')} {p.elapsed_s:.0f} s".replace("   ", "  "),
            f"{p.num_done:,} of {p.num_total:,} done",
            f"{p.num_errors:,} errors",
            f"{p.in_flight:,} in flight",
        ]
        if len(self._seen) > 1:
            (t0, done0, reads0), (t1, done1, reads1) = self._seen[0], self._seen[-1]
            if t1 > t0:
                parts.append(f"{max(0, done1 - done0) / (t1 - t0):,.1f} requests/s")
                parts.append(f"{max(0, reads1 - reads0) / (t1 - t0):,.0f} reads/s")
        return ", ".join(parts)

    def _write(self, text: str) -> None:
        self.out.write("\r" + text.ljust(self._width))
        self.out.flush()
        self._width = len(text)

    def end(self) -> None:
        """Take the line away."""
        if self.enabled and self._width:
            self.out.write("\r" + " " * self._width + "\r")
            self.out.flush()
            self._width = 0
        self._seen.clear()
