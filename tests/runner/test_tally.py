"""The verdict whether a run is one: none completed, more errors than allowed, or a larger share of them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.config.experiment import StopSpec
from bench.records import RequestRecord
from bench.runner.tally import Tally


def record(error: Any = None, phase: Any = "measured") -> RequestRecord:
    times = (0.0, 0.1, 0.2, 0.2) if error is None else (None, None, None, 0.1)
    return RequestRecord(
        0, phase, 8, 4, None, *times, error=error, error_detail="Connection refused" if error else None
    )


def verdict(records: list[RequestRecord], **stop: Any) -> str | None:
    tally = Tally()
    for r in records:
        tally.add(r)
    return tally.failure(StopSpec.model_validate(stop))


GOOD, BAD = record(), record("connect")


@pytest.mark.parametrize(
    ("records", "stop", "says"),
    [
        ([GOOD, BAD, BAD], {}, None),
        ([GOOD, BAD, BAD], {"max_errors": 2}, None),
        (
            [GOOD, BAD, BAD],
            {"max_errors": 1},
            "2 of 3 requests failed, 1 are allowed; first: connect: Connection refused",
        ),
        ([GOOD, GOOD, BAD, record("aborted")], {"max_error_ratio": 0.2}, "33.3% of requests failed, 20.0% are allowed"),
        ([BAD, BAD], {}, "no request completed (2 failed; first: connect: Connection refused)"),
        ([record(phase="ramp_up"), record("aborted")], {}, "no request completed (0 failed)"),
        ([], {}, "no request completed (0 failed)"),
    ],
)
def test_failure(records: list[RequestRecord], stop: dict[str, Any], says: str | None) -> None:
    found = verdict(records, **stop)
    assert found is None if says is None else says in str(found)
