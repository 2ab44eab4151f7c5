"""Our scheduler against recorded traces of vLLM's: the same proof where vLLM is not installed."""

from __future__ import annotations

import gzip
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from bench.sim.scheduler import PROVED_AGAINST_VLLM
from tests.sim.cases import Case
from tests.sim.driver import Ours, drive
from tests.sim.make_golden import condensed

PATH = Path(__file__).parent / "golden" / f"vllm-{PROVED_AGAINST_VLLM}.json.gz"
GOLDEN: dict[str, Any] = json.loads(gzip.decompress(PATH.read_bytes()))


def test_the_traces_are_of_the_version_that_is_claimed() -> None:
    assert GOLDEN["vllm"] == PROVED_AGAINST_VLLM


@pytest.mark.parametrize("entry", GOLDEN["cases"], ids=lambda entry: entry["name"])
def test_every_step_is_the_recorded_one(entry: dict[str, Any]) -> None:
    case = Case.from_dict({"config": entry["config"], "requests": entry["requests"]})
    for number, (got, expected) in enumerate(zip_longest(condensed(drive(case, Ours(case))), entry["trace"])):
        assert got == expected, f"entry {number} of the trace differs"
