"""A fact: a value with where it was read and when that was true."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Fact(Generic[Value]):
    """``value`` with its ``source`` (a public document) and ``as_of`` (the day for which it holds)."""

    value: Value
    source: str
    as_of: datetime.date
    note: str | None = None

    def age_days(self, today: datetime.date | None = None) -> int:
        """Whole days from ``as_of`` to ``today`` (negative for a date to come)."""
        return ((today or datetime.date.today()) - self.as_of).days
