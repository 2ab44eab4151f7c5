"""Parts of an experiment that are fine alone and not together: refused with their line when the file is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.config.loading import load
from bench.errors import BadInput

BASE = """name: conflicts
why: to be refused
model: tiny-llama
weights: dummy
engine: {engine}
load: {load}
workload: {workload}
"""
VLLM, CLOSED, PLAIN = "{kind: vllm}", "{kind: closed_loop, concurrency: 2}", "{isl: 64, osl: 8}"
ENDPOINT = '{kind: endpoint, url: "http://x"}'


def written(tmp_path: Path, engine: str = VLLM, load_: str = CLOSED, workload: str = PLAIN, more: str = "") -> Path:
    path = tmp_path / "e.yaml"
    path.write_text(BASE.format(engine=engine, load=load_, workload=workload) + more)
    return path


@pytest.mark.parametrize(
    ("parts", "line", "field", "words"),
    [
        ({"workload": "{isl: 64, osl: 8, prefix: {tokens: 64}}"}, 7, "workload.prefix.tokens", "leave none of an ISL"),
        (
            {"workload": "{isl: 64, osl: 8, sessions: {turns: 2}}", "load_": "{kind: offline, batch_size: 2}"},
            7,
            "workload.sessions",
            "closed_loop",
        ),
        (
            {"workload": "{isl: 64, osl: 8, sessions: {turns: 2}, prefix: {tokens: 8}}"},
            7,
            "workload.prefix",
            "has no effect on sessions",
        ),
        (
            {"workload": "{isl: 64, osl: 8, sessions: {turns: 2}}", "engine": ENDPOINT},
            7,
            "workload.sessions",
            "token_ids",
        ),
        ({"load_": "{kind: open_loop, rate_per_s: 2, burstiness: 0.5}"}, 6, "load.burstiness", "arrivals: gamma"),
        ({"load_": "{kind: trace, path: nowhere.jsonl}"}, 6, "load.path", "no such file"),
        ({"load_": "{kind: trace, path: /dev/null}", "engine": ENDPOINT}, 6, "load.kind", "sent text"),
        ({"more": "slo: nope\n"}, 8, "slo", "unknown SLO"),
        ({"more": "prices: nope\n"}, 8, "prices", "unknown GPU price"),
        ({"more": "telemetry: {rate_hz: 5000}\n"}, 8, "telemetry.rate_hz", "1000"),
    ],
)
def test_refused_with_its_line(tmp_path: Path, parts: dict[str, str], line: int, field: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(written(tmp_path, **parts))
    text = str(caught.value)
    assert f"e.yaml:{line}: {field}: " in text and words in text and "\n" not in text


@pytest.mark.parametrize(
    "parts",
    [
        {"workload": "{isl: 64, osl: 8, prefix: {tokens: 63}}"},
        {"workload": "{isl: 64, osl: 8, sessions: {turns: 2}}"},
        {"load_": "{kind: open_loop, rate_per_s: 2, arrivals: gamma, burstiness: 0.5}"},
        {"more": "slo: ttft p99 <= 500 ms\nprices: lambda\n"},
    ],
)
def test_what_goes_together_is_taken(tmp_path: Path, parts: dict[str, str]) -> None:
    assert len(load(written(tmp_path, **parts)).cells) == 1


def test_a_conflict_in_a_swept_value_is_shown_at_the_sweep(tmp_path: Path) -> None:
    more = "sweep: {grid: {workload.prefix: [{tokens: 8}, {tokens: 80}]}}\n"
    with pytest.raises(BadInput, match=r"e\.yaml:8: sweep\.grid\.workload\.prefix"):
        load(written(tmp_path, more=more))


def test_a_changed_trace_is_another_cell(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"  # found beside the experiment file
    path = written(tmp_path, load_="{kind: trace, path: t.jsonl}")
    ids = []
    for tokens in (20, 20, 21):
        trace.write_text(f'{{"timestamp": 0, "input_length": {tokens}, "output_length": 5, "hash_ids": [0]}}\n')
        ids.append(load(path).cells[0].cell_id)
    assert ids[0] == ids[1] != ids[2]
