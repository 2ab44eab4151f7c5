"""What one sending process has still to send, and when: its share of the schedule in order, and turns that follow others."""

from __future__ import annotations

import heapq

import numpy as np

from bench.load.share import Share


class Agenda:
    """Rows of a share. ``queue[next:]`` are the root requests still to be sent in this phase; ``later`` holds turns of sessions
    whose predecessor is over."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.due: list[int] = share.due_ns.tolist()
        self.queue: list[int] = []
        self.next = self.start_ns = 0
        self.later: list[tuple[int, int]] = []  # (ready ns, row)
        self.num_followups = int((~share.is_root).sum())

    def start(self, rows: np.ndarray, start_ns: int) -> None:
        """A phase begins: due times count from ``start_ns`` (CLOCK_MONOTONIC)."""
        self.queue, self.next, self.start_ns = rows.tolist(), 0, start_ns

    def candidate(self, now: int) -> tuple[int, int]:
        """(row, due) of the request to send now, due 0 meaning "when a slot is free"; or (-1, when to look again)."""
        row, due = -1, 0
        if self.next < len(self.queue):
            row = self.queue[self.next]
            due = self.due[row]
            due = 0 if due < 0 else due + self.start_ns
        if self.later and (row < 0 or due == 0 or self.later[0][0] < due):
            ready = self.later[0][0]
            if ready <= now or row < 0 or due > ready:
                row, due = self.later[0][1], ready
        if row >= 0 and due > now:
            return -1, due
        return row, due

    def take(self, row: int) -> None:
        """The candidate is being sent."""
        if self.later and row == self.later[0][1]:
            heapq.heappop(self.later)
        else:
            self.next += 1

    @property
    def num_left(self) -> int:
        """Root requests still to be sent."""
        return len(self.queue) - self.next

    @property
    def is_over(self) -> bool:
        return self.next >= len(self.queue) and not self.later

    @property
    def due_is_free(self) -> bool:
        """Whether the next root request is due when a slot is free (a closed loop)."""
        return self.next < len(self.queue) and self.due[self.queue[self.next]] < 0

    def follow_up(self, row: int, end_ns: int) -> None:
        """A request is over: the next turn of its session becomes due."""
        follows = int(self.share.follows[row]) if self.num_followups else -1
        if follows >= 0:
            ready = end_ns + int(self.share.think_ns[follows])
            due = self.due[follows]
            heapq.heappush(self.later, (max(ready, due + self.start_ns if due >= 0 else 0), follows))

    def overdue(self, now: int) -> list[tuple[int, int]]:
        """(row, due) of root requests that were due before ``now`` and have not been sent."""
        found = []
        for row in self.queue[self.next :]:
            due = self.due[row]
            if due < 0 or due + self.start_ns > now:
                break
            found.append((row, due + self.start_ns))
        return found
