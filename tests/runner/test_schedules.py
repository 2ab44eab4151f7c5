"""From a cell to its schedule: the right number of requests, fresh prompts for every run, warm-up apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.config.experiment import CellSpec
from bench.errors import BadInput
from bench.runner.schedules import (
    MAX_POOL_TOKENS,
    build_schedule,
    longest_sequence_tokens,
    num_measured,
    num_warmup,
    ramp_profile,
)
from bench.workload.synthetic import repeat_seed


def spec(load: dict[str, Any], **more: Any) -> CellSpec:
    base: dict[str, Any] = {
        "model": "tiny-llama",
        "weights": "dummy",
        "engine": {"kind": "vllm"},
        "load": load,
        "workload": {"isl": 20, "osl": 6},
    }
    return CellSpec.model_validate({**base, **more})


def test_offline_is_whole_batches_after_one_warm_up_batch() -> None:
    schedule = build_schedule(
        spec({"kind": "offline", "batch_size": 4}, stop={"min_requests": 9}), seed=1, vocab_size=4096
    )
    phases = [r.phase for r in schedule.requests]
    assert phases == ["warmup"] * 4 + ["measured"] * 12
    assert schedule.max_in_flight == 4
    assert [r.index for r in schedule.requests] == list(range(16))


def test_closed_loop_has_ten_requests_a_slot_unless_told_otherwise() -> None:
    cell = spec({"kind": "closed_loop", "concurrency": 3})
    assert num_measured(cell) == 30 and num_warmup(cell) == 3
    assert num_measured(spec({"kind": "closed_loop", "concurrency": 3}, stop={"max_requests": 7})) == 7


def test_a_minimum_duration_never_runs_out_of_requests_before_the_pool_does() -> None:
    cell = spec(
        {"kind": "closed_loop", "concurrency": 3}, stop={"min_duration_s": 5}, workload={"isl": 50_000, "osl": 1}
    )
    assert num_measured(cell) == MAX_POOL_TOKENS // 50_000


def test_runs_share_no_prompt_and_equal_seeds_share_all() -> None:
    cell = spec({"kind": "offline", "batch_size": 4})
    first = build_schedule(cell, seed=repeat_seed(0, 1), vocab_size=4096)
    again = build_schedule(cell, seed=repeat_seed(0, 1), vocab_size=4096)
    second = build_schedule(cell, seed=repeat_seed(0, 2), vocab_size=4096)
    assert first.digest() == again.digest() != second.digest()
    starts = {tuple(np.asarray(r.prompt_token_ids)[:16].tolist()) for s in (first, second) for r in s.requests}
    assert len(starts) == len(first.requests) + len(second.requests)  # not one block of 16 tokens is shared


def test_open_loop_lasts_as_long_as_asked() -> None:
    cell = spec({"kind": "open_loop", "rate_per_s": 50}, stop={"max_duration_s": 4}, warmup={"num_requests": 0})
    schedule = build_schedule(cell, seed=3, vocab_size=4096)
    assert len(schedule.requests) == 200
    assert schedule.due_s is not None and 2.5 < schedule.due_s[-1] < 6


def test_ramps() -> None:
    load = {"kind": "ramp", "segments": [{"duration_s": 2, "rate_per_s": 10}, {"duration_s": 2, "rate_per_s": 30}]}
    cell = spec(load)
    assert num_measured(cell) == 80
    profile = ramp_profile(cell.load)  # type: ignore[arg-type]
    assert profile.rate_at(1) == 10 and profile.rate_at(3) == 30
    load["segments"][1]["hold"] = False  # type: ignore[index]
    assert ramp_profile(spec(load).load).rate_at(3) == pytest.approx(20)  # type: ignore[arg-type]
    levels = {"kind": "ramp", "segments": [{"duration_s": 2, "concurrency": 1}, {"duration_s": 2, "concurrency": 4}]}
    schedule = build_schedule(spec(levels), seed=1, vocab_size=4096)
    assert schedule.in_flight_steps == ((0.0, 1), (2.0, 4)) and schedule.stop.max_duration_s == 4


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(BadInput, match="sessions"):
        build_schedule(
            spec({"kind": "offline", "batch_size": 2}, workload={"isl": 9, "osl": 9, "sessions": {"turns": 2}}),
            seed=1,
            vocab_size=4096,
        )


def test_sessions_and_traces_are_warmed_up_too(tmp_path: Path) -> None:
    load = {"kind": "closed_loop", "concurrency": 3}
    cell = spec(load, workload={"isl": 9, "osl": 4, "sessions": {"turns": 2}}, stop={"min_requests": 8})
    conversations = build_schedule(cell, seed=1, vocab_size=300).requests
    assert [r.phase for r in conversations] == ["warmup"] * 3 + ["measured"] * 8
    assert [r.index for r in conversations] == list(range(11))
    assert {r.session for r in conversations[3:]} == {0, 1, 2, 3} and {r.session for r in conversations[:3]} == {None}

    trace = tmp_path / "t.jsonl"
    rows = [(0, 20), (100, 30), (250, 40)]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": [n]}) + "\n" for t, n in rows
        )
    )
    cell = spec({"kind": "trace", "path": "t.jsonl"}, warmup={"num_requests": 4})
    schedule = build_schedule(cell, seed=1, vocab_size=300, base=tmp_path)
    assert [r.phase for r in schedule.requests] == ["warmup"] * 4 + ["measured"] * 3
    assert [r.isl for r in schedule.requests] == [20, 30, 40, 20, 20, 30, 40]
    assert [r.index for r in schedule.requests] == list(range(7))
    assert schedule.due_s is not None and schedule.due_s.tolist() == [0, 0, 0, 0, 0, 0.1, 0.25]
    warm, measured = (np.concatenate([np.asarray(r.prompt_token_ids) for r in part]) for part in (
        schedule.requests[:3], schedule.requests[4:]))  # fmt: skip
    assert not np.array_equal(warm, measured)


def test_longest_sequence() -> None:
    assert longest_sequence_tokens(spec({"kind": "offline", "batch_size": 1})) == 26
    cell = spec({"kind": "closed_loop", "concurrency": 1}, workload={"isl": 9, "osl": 9, "sessions": {"turns": 3}})
    assert longest_sequence_tokens(cell) == 54


def test_lengths_of_a_data_set_are_drawn_in_pairs() -> None:
    cell = spec({"kind": "closed_loop", "concurrency": 2}, stop={"max_requests": 7}, warmup={"num_requests": 2})
    pairs = np.array([10, 20, 30]), np.array([1, 2, 3])
    built = build_schedule(cell, seed=3, vocab_size=1000, lengths=pairs)
    again = build_schedule(cell, seed=3, vocab_size=1000, lengths=pairs)
    assert [r.phase for r in built.requests] == ["warmup"] * 2 + ["measured"] * 7
    assert all(r.isl == 10 * r.osl == len(r.prompt_token_ids) for r in built.requests)
    drawn = [r.osl for r in built.requests[2:]]
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [1, 2, 3], "each once before any twice"
    assert built.digest() == again.digest()
