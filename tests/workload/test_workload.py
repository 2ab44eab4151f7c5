"""Requests: lengths, tokens, prefixes, sessions, traces and data sets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from bench.errors import BadInput
from bench.load.schedule import closed_loop
from bench.workload import synthetic as s
from bench.workload.dataset import read_sharegpt, sharegpt_lengths, sharegpt_requests
from bench.workload.lengths import parse_scenario
from bench.workload.trace import detect_format, read_trace, trace_requests


@pytest.mark.parametrize(
    ("length", "low", "high", "mean"),
    [
        (s.FixedLength(7), 7, 7, 7),
        (s.UniformLength(3, 9), 3, 9, 6),
        (s.UniformLength.from_ratio(1000), 800, 1000, 900),
        (s.NormalLength(500, 50), 200, 800, 500),
        (s.NormalLength(10, 100, 5, 20), 5, 20, 12.5),
        (s.LognormalLength(300, 150), 1, 5000, 300),
        (s.EmpiricalLength((5, 10), (3.0, 1.0)), 5, 10, 6.25),
    ],
)
def test_lengths(length: s.Length, low: int, high: int, mean: float) -> None:
    x = length.sample(np.random.default_rng(0), 20_000)
    assert x.dtype == np.int64 and low <= x.min() and x.max() <= high
    assert x.mean() == pytest.approx(mean, rel=0.02)


def test_lognormal_has_the_sd_it_was_asked_for() -> None:
    x = s.LognormalLength(300, 150).sample(np.random.default_rng(0), 200_000)
    assert x.std() == pytest.approx(150, rel=0.03)


@pytest.mark.parametrize(
    "make",
    [
        lambda: s.FixedLength(0),
        lambda: s.UniformLength(5, 4),
        lambda: s.NormalLength(5, -1),
        lambda: s.LognormalLength(0, 1),
        lambda: s.EmpiricalLength(()),
        lambda: s.UniformLength.from_ratio(10, 0),
        lambda: s.SharedPrefix(0),
        lambda: parse_scenario("X(1,2)"),
        lambda: s.build_requests(0, s.FixedLength(1), s.FixedLength(1), vocab_size=1000, seed=0),
        lambda: s.build_requests(1, s.FixedLength(1), s.FixedLength(1), vocab_size=100, seed=0),
    ],
)
def test_nonsense_is_refused(make) -> None:
    with pytest.raises(BadInput):
        make()


def test_scenarios() -> None:
    assert parse_scenario("D(100, 200)") == (s.FixedLength(100), s.FixedLength(200))
    assert parse_scenario("N(480,240)/(300,150)") == (s.NormalLength(480, 240), s.NormalLength(300, 150))
    assert parse_scenario("U(50,100)/(200,250)") == (s.UniformLength(50, 100), s.UniformLength(200, 250))
    assert parse_scenario("8k/1k") == (s.FixedLength(8192), s.FixedLength(1024))
    assert parse_scenario("77/5") == (s.FixedLength(77), s.FixedLength(5))


def build(seed: int = 1, **more):
    return s.build_requests(50, s.UniformLength(8, 40), s.NormalLength(20, 5), vocab_size=5000, seed=seed, **more)


def test_same_seed_same_bytes_and_fresh_tokens_for_each_repeat() -> None:
    digests = [closed_loop(build(seed), 4).digest() for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert len({s.repeat_seed(5, k) for k in range(100)}) == 100
    first = {tuple(r.prompt_token_ids[:4]) for r in build(s.repeat_seed(5, 0))}
    second = {tuple(r.prompt_token_ids[:4]) for r in build(s.repeat_seed(5, 1))}
    assert first.isdisjoint(second)


def test_one_axis_leaves_the_others_alone() -> None:
    a = s.build_requests(20, s.UniformLength(8, 40), s.FixedLength(5), vocab_size=5000, seed=1)
    b = s.build_requests(20, s.UniformLength(8, 40), s.UniformLength(1, 9), vocab_size=5000, seed=1)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.prompt_token_ids, y.prompt_token_ids)


def test_tokens_stay_in_range_and_cannot_be_changed() -> None:
    for r in build():
        assert r.prompt_token_ids.dtype == np.int32 and r.isl == len(r.prompt_token_ids)
        assert r.prompt_token_ids.min() >= 256 and r.prompt_token_ids.max() < 5000
        with pytest.raises(ValueError):
            r.prompt_token_ids[0] = 1


def test_shared_prefixes() -> None:
    items = s.build_requests(
        400, s.FixedLength(32), s.FixedLength(4), vocab_size=5000, seed=3, prefix=s.SharedPrefix(16, 0.5, 4)
    )
    shared = [r for r in items if r.prefix_tokens]
    assert 160 < len(shared) < 240 and {r.prefix_tokens for r in shared} == {16}
    assert len({tuple(r.prompt_token_ids[:16]) for r in shared}) == 4
    assert len({tuple(r.prompt_token_ids[:16]) for r in items if not r.prefix_tokens}) == 400 - len(shared)
    assert len({tuple(r.prompt_token_ids[16:]) for r in items}) == 400
    short = s.build_requests(5, s.FixedLength(4), s.FixedLength(4), vocab_size=5000, seed=3, prefix=s.SharedPrefix(16))
    assert {r.prefix_tokens for r in short} == {3}, "a prompt keeps a token of its own"


def test_sessions_grow_by_prompt_answer_and_turn() -> None:
    items = s.build_sessions(
        4,
        s.FixedLength(10),
        s.FixedLength(5),
        s.FixedLength(3),
        s.Sessions(s.UniformLength(2, 4), 1.0),
        vocab_size=5000,
        seed=2,
    )
    for k in range(4):
        turns = [r for r in items if r.session == k]
        assert [r.turn for r in turns] == list(range(len(turns))) and turns[0].think_s == 0
        for a, b in itertools.pairwise(turns):
            assert b.isl == a.isl + 3 + 5 and b.prefix_tokens == a.isl and b.think_s > 0
            np.testing.assert_array_equal(b.prompt_token_ids[: a.isl], a.prompt_token_ids)


def test_phases() -> None:
    phases = [r.phase for r in s.with_phases(build(), num_warmup=5, num_ramp_up=3, num_cool_down=2)]
    assert phases == ["warmup"] * 5 + ["ramp_up"] * 3 + ["measured"] * 40 + ["cool_down"] * 2
    with pytest.raises(BadInput):
        s.with_phases(build(), num_warmup=50)


def test_text_and_messages() -> None:
    text = s.build_requests(3, s.FixedLength(6), s.FixedLength(2), vocab_size=1, seed=1, form="text")
    chat = s.build_requests(3, s.FixedLength(6), s.FixedLength(2), vocab_size=1, seed=1, form="messages")
    assert all(len(r.text.split()) == 6 and r.isl is None for r in text)
    assert chat[0].messages == ({"role": "user", "content": text[0].text},)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_mooncake_blocks_are_shared(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 500, "input_length": 1030, "output_length": 6, "hash_ids": [7, 8, 3]},
        {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [9, 8]},
    ]
    t = read_trace(write(tmp_path / "m.jsonl", "\n".join(json.dumps(r) for r in rows)))
    assert t.due_s.tolist() == [0.0, 0.5, 2.5] and t.num_reordered == 1
    a, b, c = trace_requests(t, vocab_size=9000, seed=1)
    np.testing.assert_array_equal(a.prompt_token_ids[:1024], b.prompt_token_ids[:1024])
    assert (a.prefix_tokens, b.prefix_tokens, c.prefix_tokens) == (0, 1024, 599)
    np.testing.assert_array_equal(c.prompt_token_ids[:76], b.prompt_token_ids[1024:1100])
    assert [r.osl for r in trace_requests(t, vocab_size=9000, seed=1, max_isl=100, max_osl=5)] == [5, 5, 5]


def test_burstgpt_azure_bailian(tmp_path: Path) -> None:
    b = write(
        tmp_path / "b.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,C,10,3,13,x\n6.5,C,4,0,4,x\n",
    )
    with pytest.raises(BadInput, match=r"b\.csv:3.*Response tokens"):
        read_trace(b)
    t = read_trace(b, skip_bad=True)
    assert (len(t.rows), t.num_skipped, t.rows[0].isl) == (1, 1, 10)
    a = write(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
    )
    assert read_trace(a).due_s == pytest.approx([0.0, 0.052], abs=1e-6)
    rows = [
        {
            "chat_id": 1,
            "parent_chat_id": -1,
            "timestamp": 0.0,
            "input_length": 20,
            "output_length": 2,
            "turn": 1,
            "hash_ids": [1, 2],
        },
        {
            "chat_id": 2,
            "parent_chat_id": 1,
            "timestamp": 2.0,
            "input_length": 40,
            "output_length": 2,
            "turn": 2,
            "hash_ids": [1, 2, 3],
        },
    ]
    q = read_trace(write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows))))
    assert q.block_tokens == 16
    assert trace_requests(q, vocab_size=900, seed=0)[1].prefix_tokens == 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b,c\n1,2,3\n",
        "{nonsense\n",
        '{"timestamp": 1}\n',
        '{"timestamp": "x", "input_length": 1, "output_length": 1}\n',
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput) as e:
        read_trace(write(tmp_path / "bad.jsonl", text))
    assert "bad.jsonl" in str(e.value)
    with pytest.raises(BadInput):
        detect_format(tmp_path / "missing")


def test_sharegpt(tmp_path: Path) -> None:
    data = [
        {"conversations": [{"from": "human", "value": "a" * 40}, {"from": "gpt", "value": "b" * 80}]},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q" * 8},
                {"role": "assistant", "content": "r" * 12},
            ]
        },
        {"conversations": [{"from": "gpt", "value": "only"}]},
        "junk",
    ]
    e = read_sharegpt(write(tmp_path / "s.json", json.dumps(data)))
    isl, osl = sharegpt_lengths(e)
    assert isl.tolist() == [10, 2] and osl.tolist() == [20, 3]
    r = sharegpt_requests(e, 5, seed=1, vocab_size=900)
    assert sorted({(x.isl, x.osl) for x in r}) == [(2, 3), (10, 20)] and len(r) == 5
    assert {x.osl for x in sharegpt_requests(e, 5, seed=1, vocab_size=900, max_isl=5)} == {3}
    assert sharegpt_requests(e, 2, seed=1, form="text")[0].text is not None
    for bad in ("{}", "[]", "not json"):
        with pytest.raises(BadInput):
            read_sharegpt(write(tmp_path / "bad.json", bad))
