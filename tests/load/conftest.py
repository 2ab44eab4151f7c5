"""Shared pieces of the load generator's tests: short mocks, short limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from bench.load.driver import LoadOptions, LoadResult, drive
from bench.load.mock import Delay, MockConfig, running_mock
from bench.load.schedule import closed_loop
from bench.load.share import Limits
from bench.load.target import Target
from bench.records import Request, Schedule

FAST = {"ttft": Delay(0.01), "itl": Delay(0.002)}
LIMITS = Limits(connect_s=1.0, first_byte_s=1.0, stall_s=0.6, total_s=4.0)


def make_requests(n: int, osl: int = 8, isl: int = 5) -> list[Request]:
    ids = np.arange(300, 300 + isl, dtype=np.int32)
    return [Request(index=i, osl=osl, isl=isl, prompt_token_ids=ids) for i in range(n)]


@pytest.fixture
def serve_mock() -> Callable[..., Any]:
    """``with serve_mock(faults=...) as url``."""

    @contextmanager
    def serving(**config: Any) -> Iterator[str]:
        with running_mock(MockConfig(**{**FAST, **config})) as url:
            yield url

    return serving


def run(url: str, schedule: Schedule | None = None, **more: Any) -> LoadResult:
    """Drive ``url``; four requests, two in flight, unless told otherwise."""
    options = LoadOptions(limits=LIMITS, **{"exact_osl": True, "drain_s": 1.0, **more.pop("options", {})})
    target = Target(url, model="mock", **more)
    return drive(schedule or closed_loop(make_requests(4), 2), target, options)
