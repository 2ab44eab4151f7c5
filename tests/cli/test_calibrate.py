"""What `bench calibrate` prints of a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cli.calibrate import _print, find_runs
from bench.errors import BadInput
from bench.sim.profile import PARAMETERS, Layout, Profile
from bench.store import RunWriter

ERRORS = {"method": "leave one cell out", "step_median_ape": 0.05, "step_p90_ape": 0.2, "cell_time_mean_ape": 0.1, "cells": {"a": 0.1}}  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], **parameters: float) -> str:
    values = {**dict.fromkeys(PARAMETERS, 1e-3), "linear_scale": 1.2, "decode_attention_scale": 0.9,
              "prefill_attention_scale": 0.8, **parameters}  # fmt: skip
    _print(Profile("p", Layout("tiny-llama", "cpu"), values, ERRORS, 100, ("e/a/run-1",), "2026-11-24T00:00:00+00:00"))
    return capsys.readouterr().out


def test_coefficients_on_their_bound_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, prefill_attention_scale=5.19e-322, per_prefill_token_s=1.6e-17, prefill_fixed_s=0.0)
    assert "e-3" not in text and "e-1" not in text
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "prefill attention x 0 (no effect seen in these runs)" in lines
    assert "per prompt token 0 µs (no effect seen in these runs)" in lines
    assert "more in a step with prompts 0 ms (no effect seen in these runs)" in lines
    assert "Do not predict batches, prompts or contexts beyond" in text


def test_coefficients_that_count_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, per_request_s=8.6e-5, per_prefill_token_s=2e-9)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {"per request in a step 86 µs", "per prompt token 0.002 µs", "decode attention x 0.9"} <= lines
    assert "no effect" not in text and "beyond" not in text


def test_runs_of_a_server_that_was_not_started_here_say_what_they_lack(tmp_path: Path) -> None:
    cell = {"engine": {"kind": "endpoint", "url": "http://127.0.0.1:9"}}
    RunWriter(tmp_path / "run-1-x", {"origin": "measured", "cell": cell}).finish("complete")
    with pytest.raises(
        BadInput, match=r"holds no engine steps to fit; calibrate on `bench run` with engine\.kind vllm"
    ):
        find_runs((tmp_path,))
