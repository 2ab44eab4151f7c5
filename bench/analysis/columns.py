"""Request records as columns: float64 arrays in which NaN stands for "not known"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.records import RequestRecord

_TIMES = ("due_s", "sent_s", "first_token_s", "last_token_s", "done_s")
_COUNTS = ("isl", "osl", "first_chunk_tokens", "num_chunks", "num_cached_tokens", "num_preemptions")


@dataclass(frozen=True, slots=True)
class RequestColumns:
    """Requests of one run, one array element each, all of equal length.

    Times are seconds since the run's start. ``due_s`` is ``sent_s`` where the record has none (closed loop: a request is
    due when a slot is free), and the time of the failure for one that failed before it could be sent (connection refused).
    ``ok`` is False for requests with an error.
    """

    index: np.ndarray
    phase: np.ndarray  # of str
    due_s: np.ndarray
    sent_s: np.ndarray
    first_token_s: np.ndarray
    last_token_s: np.ndarray
    done_s: np.ndarray
    isl: np.ndarray
    osl: np.ndarray
    first_chunk_tokens: np.ndarray
    num_chunks: np.ndarray
    num_cached_tokens: np.ndarray
    num_preemptions: np.ndarray
    ok: np.ndarray  # of bool
    error: np.ndarray  # of str, "" for none
    token_source: np.ndarray  # of str: who counted ISL and OSL, "" where not recorded

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> RequestColumns:
        columns = {
            name: np.array([_nan(getattr(r, name)) for r in records], dtype=np.float64) for name in (*_TIMES, *_COUNTS)
        }
        due = columns["due_s"]
        due = np.where(np.isnan(due), columns["sent_s"], due)
        failed = np.array([r.error not in (None, "aborted") for r in records], dtype=bool)
        columns["due_s"] = np.where(np.isnan(due) & failed, columns["done_s"], due)
        return cls(
            index=np.array([r.index for r in records], dtype=np.int64),
            phase=np.array([r.phase for r in records], dtype=object),
            ok=np.array([r.error is None for r in records], dtype=bool),
            error=np.array([r.error or "" for r in records], dtype=object),
            token_source=np.array([r.token_source or "" for r in records], dtype=object),
            **columns,
        )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tried_s(self) -> np.ndarray:
        """When each request was sent; for those that failed before that (no connection), when they were due. NaN for
        requests that the end of the run kept from being sent."""
        failed = ~self.ok & (self.error != "aborted")
        return np.where(np.isnan(self.sent_s) & failed, self.due_s, self.sent_s)

    def where(self, mask: np.ndarray) -> RequestColumns:
        """The requests for which ``mask`` (bool, same length) is True."""
        return RequestColumns(**{name: getattr(self, name)[mask] for name in self.__slots__})


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
