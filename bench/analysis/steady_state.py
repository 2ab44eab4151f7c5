"""Which part of a run is counted.

Warm-up is recorded and never counted. Of the rest:

* offline batches: the whole batch window, from the first submission to the last token; filling and draining are part of
  what a batch costs.
* closed loop: from the moment the target concurrency is in flight until the last request is sent, that is, until the
  first moment when no new request can be admitted.
* open loop and trace: from the moment the requests in flight first reach the level at which they settle (their median
  over the second half of the arrivals; the running maximum itself is reached late and by chance when arrivals are random)
  until the last request is sent.

A request that could not be sent because no connection came about counts as sent when it was due: a server that dies in
the middle of a run does not end the window with its last answer.

Where that leaves too little, the whole span is counted and the window says that it is not steady, and why.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.analysis.columns import RequestColumns

#: On a GPU a figure is called steady from this length on.
MIN_STEADY_S = 30.0
#: A window below this share of the sending span, or with fewer starts than the concurrency, is not used.
MIN_WINDOW_SHARE = 0.2
#: In an open loop: requests in flight grow by this factor from the second to the last quarter = more comes than is served.
GROWTH_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Window:
    """The counted part of a run, in seconds since its start."""

    start_s: float
    end_s: float
    kind: str  # "batch", "steady", "whole"
    steady: bool
    reason: str

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def holds(self, t_s: np.ndarray) -> np.ndarray:
        """Mask: which of the times lie in the window."""
        return (t_s >= self.start_s) & (t_s <= self.end_s)


def find_window(c: RequestColumns, kind: str, target_in_flight: int | None) -> Window | None:
    """The counted window of a run, or None when nothing but warm-up was sent.

    Args:
        c: all requests of the run.
        kind: the schedule's kind: offline, closed_loop, open_loop or trace.
        target_in_flight: the concurrency of a closed loop.
    """
    c = c.where((c.phase != "warmup") & ~np.isnan(c.tried_s))
    if not len(c):
        return None
    measured = c.where(c.phase == "measured")
    if not len(measured):
        return None
    first, last_sent = float(measured.tried_s.min()), float(measured.tried_s.max())
    ends = measured.done_s[~np.isnan(measured.done_s)]
    last_done = float(ends.max()) if len(ends) else last_sent
    whole = Window(first, max(last_done, first), "whole", False, "")
    if kind == "offline":
        return Window(first, last_done, "batch", True, "whole batch window: filling and draining included")
    times, level = in_flight(c.where(~np.isnan(c.sent_s)))
    if not len(times):
        return _whole(whole, "no request could be sent")
    if kind == "closed_loop":
        target = target_in_flight or int(level.max())
        reached = np.flatnonzero(level >= target)
        if not len(reached):
            return _whole(whole, f"the target concurrency {target} was never reached (at most {int(level.max())})")
        start = float(times[reached[0]])
    else:
        start, growing = _settled(times, level, first, last_sent)
        if growing:
            return _whole(whole, "requests in flight kept growing: more arrived than was served")
        target = max(1, target_in_flight or 1)
    start = max(start, first)
    starts = int(np.count_nonzero((measured.due_s >= start) & (measured.due_s <= last_sent)))
    if last_sent - start < MIN_WINDOW_SHARE * (whole.end_s - whole.start_s) or starts < target:
        return _whole(whole, f"only {starts} requests began while {target} were in flight; the run is too short")
    begun = "target concurrency reached" if kind == "closed_loop" else "settled requests in flight reached"
    return Window(start, last_sent, "steady", True, f"from {begun} to last request sent")


def in_flight(c: RequestColumns) -> tuple[np.ndarray, np.ndarray]:
    """(times, requests in flight from that time on), ascending; a request not done stays in flight."""
    done = c.done_s[~np.isnan(c.done_s)]
    times = np.concatenate([c.sent_s, done])
    steps = np.concatenate([np.ones(len(c)), -np.ones(len(done))])
    # at equal times a departure comes first: a slot is freed before it is filled again
    order = np.lexsort((steps, times))
    return times[order], np.cumsum(steps[order])


def _settled(times: np.ndarray, level: np.ndarray, first: float, last: float) -> tuple[float, bool]:
    """(moment the level at which it settles is first reached, whether it kept growing) for an open loop."""
    grid = np.linspace(first, last, 401)[1:]
    at = level[np.clip(np.searchsorted(times, grid, side="right") - 1, 0, None)]
    second, fourth = at[100:200].mean(), at[300:].mean()
    if fourth > GROWTH_FACTOR * second and fourth > second + 2:
        return first, True
    settled = max(1.0, float(np.median(at[200:])))
    reached = np.flatnonzero(level >= settled)
    return (float(times[reached[0]]) if len(reached) else first), False


def _whole(whole: Window, reason: str) -> Window:
    return Window(whole.start_s, whole.end_s, "whole", False, reason)
