"""For every test: what hypothesis may do, and where results of the code under test go."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A busy machine must not fail a property: no deadline. In CI the examples are the same every time, elsewhere they vary.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def own_results_folder() -> Iterator[None]:
    """`bench` puts --results into the environment of its process; in-process calls must not hand it to the next test."""
    before = os.environ.pop("TOKENYIELD_RESULTS", None)
    yield
    os.environ.pop("TOKENYIELD_RESULTS", None)
    if before is not None:
        os.environ["TOKENYIELD_RESULTS"] = before
