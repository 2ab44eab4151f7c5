"""Options of `bench load` that contradict each other, or would do nothing, are refused before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli import cli
from bench.cli.load_spec import cell_of, experiment_of
from bench.config.experiment import EndpointEngine
from bench.errors import BadInput
from bench.runner.schedules import stop_rule

URL = "http://127.0.0.1:9"  # nobody listens: whatever is not refused fails later, with another error


def refused(*args: str) -> str:
    done = CliRunner().invoke(cli, ["load", URL, *args], catch_exceptions=True, standalone_mode=False)
    assert isinstance(done.exception, BadInput), done.exception
    return str(done.exception)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--rate", "0"), "--rate: expected more than 0 requests per second"),
        (("--concurrency", "2", "--duration", "-3"), "--duration: expected more than 0 s"),
        (("--concurrency", "2", "--think", "1"), "--think has no effect here; add --turns"),
        (("--concurrency", "2", "--time-scale", "2"), "--time-scale has no effect here; add --trace"),
        (("--concurrency", "2", "--max-in-flight", "3"), "--max-in-flight has no effect here"),
        (("--concurrency", "2", "--arrivals", "gamma"), "--arrivals has no effect here"),
        (("--concurrency", "2", "--num-prefixes", "3"), "--num-prefixes has no effect here; add --prefix-tokens"),
        (("--concurrency", "2", "--lowest", "3"), "--lowest has no effect here; add --search"),
        (("--sweep", "1,2", "--burstiness", "0.5"), "--burstiness has no effect on a closed loop"),
        (("--rate", "2", "--arrivals", "constant", "--burstiness", "0.5"), "no effect on constant arrivals"),
        (("--search", "rate", "--slo", "ttft p99 <= 1 s", "--concurrency", "2"), "--search rate sets the rate itself"),
        (("--search", "rate", "--sweep", "1,2"), "--search and --sweep exclude each other"),
        (("--concurrency", "2", "--ca-file", __file__), "--ca-file has no effect without TLS"),
    ],
)
def test_what_would_do_nothing_is_refused(args: tuple[str, ...], says: str) -> None:
    assert says in refused(*args)


def options(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "shape": "64/8", "concurrency": None, "rate": None, "batch": None, "trace": None, "search": None, "sweep": None,
        "prompts": None, "api": "completions", "prefix_tokens": None, "turns": None, "name": "x", "model": "",
        "api_key_env": None, "extra_body": None, "warmup": None, "ramp_up": None, "cool_down": None, "seed": 0,
        "arrivals": "poisson", "burstiness": 1.0, "max_in_flight": None,
        "repeats": 1, "slo": None, "duration": None, "requests": None, "max_errors": None, "max_error_share": None,
    }  # fmt: skip
    return {**plain, **changes}


def test_marks_and_the_share_of_errors_reach_the_run() -> None:
    found = experiment_of(URL, options(concurrency=2, ramp_up=1.5, cool_down=0.5, max_error_share=0.2))
    assert (found.warmup.ramp_up_s, found.warmup.cool_down_s) == (1.5, 0.5)
    assert found.stop.max_error_ratio == 0.2
    assert stop_rule(cell_of(found)).max_error_ratio == 0.2


@pytest.mark.parametrize("field", ["stream", "max_tokens", "prompt", "model"])
def test_fields_that_the_generator_sets_cannot_be_overwritten(field: str) -> None:
    with pytest.raises(BadInput, match=f"extra_body: {field} is set by the load generator"):
        experiment_of(URL, options(concurrency=2, extra_body=f'{{"{field}": 1}}'))


def test_other_fields_of_the_body_go_through() -> None:
    found = experiment_of(URL, options(concurrency=2, extra_body='{"top_p": 0.9}'))
    assert isinstance(found.engine, EndpointEngine) and found.engine.extra_body == {"top_p": 0.9}
