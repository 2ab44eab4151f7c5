"""How long the probes of a search are: long enough for the SLO's percentiles, and for a queue to show at any rate."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cli.load_search import own_requests
from bench.cli.load_spec import cell_of, experiment_of
from bench.config.experiment import CellSpec
from bench.runner.load_runs import at_level, with_num_requests
from bench.runner.schedules import num_measured
from tests.cli.test_load_options import URL, options


def probe(level: float, least: int, **o: Any) -> CellSpec:
    """The cell of a probe as a search makes it."""
    spec, _ = at_level(cell_of(experiment_of(URL, options(**o))), level)
    given = o.get("requests") is not None or o.get("duration") is not None
    return with_num_requests(spec, least if given else max(least, own_requests(level, spec)))


@pytest.mark.parametrize(("rate", "least", "expected"), [(1, 40, 40), (4, 30, 40), (50, 40, 500), (500, 40, 5000)])
def test_a_rate_is_held_for_ten_seconds(rate: float, least: int, expected: int) -> None:
    assert num_measured(probe(rate, least, search="rate")) == expected


@pytest.mark.parametrize(("concurrency", "expected"), [(1, 40), (2, 40), (64, 640)])
def test_a_concurrency_gets_the_requests_that_its_percentiles_need(concurrency: int, expected: int) -> None:
    """At concurrency 1 a p95 was undefined in all six runs, and the search ended "unresolved: noise"."""
    assert num_measured(probe(concurrency, 40, search="concurrency")) == expected


def test_lengths_that_were_given_stand_but_for_what_percentiles_need() -> None:
    assert num_measured(probe(8, 1, sweep="8", requests=12)) == 12
    assert probe(8, 1, sweep="8", requests=12).stop.min_requests == 0, "or the run would end with its first answer"
    assert num_measured(probe(8, 40, search="concurrency", requests=12)) == 40
    timed = probe(8, 40, search="rate", duration=3.0)
    assert num_measured(timed) == 24 and timed.stop.max_duration_s == 3.0
