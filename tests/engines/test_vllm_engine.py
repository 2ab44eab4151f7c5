"""Real vLLM, in two engine starts: what is recorded adds up, and whatever ends the engine is clear."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.engines.host import EngineDied, EngineLaunch, EngineProcess, EngineStartFailed
from bench.engines.processes import process_table
from bench.errors import BadInput
from bench.records import RequestRecord, Schedule, StopRule
from tests.engines.sinks import KeepingSink, some_requests

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARGS = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 256, "enforce_eager": True}
START_LIMIT_S = 600.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.fixture(scope="module")
def engine(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    launch = EngineLaunch("vllm", model, "dummy", ARGS, load_kind="closed_loop")
    process = EngineProcess(launch, tmp_path_factory.mktemp("log") / "engine.log")
    process.start(START_LIMIT_S)
    yield process
    process.stop()


def serve(engine: EngineProcess, schedule: Schedule) -> tuple[list[RequestRecord], KeepingSink]:
    sink = KeepingSink()
    records = list(engine.run(schedule, sink, time.monotonic(), run_limit_s=300, idle_limit_s=120))
    return records, sink


def check_sums(records: list[RequestRecord], sink: KeepingSink, schedule: Schedule) -> None:
    """Tokens counted by us, by vLLM's statistics and by the steps of its scheduler are the same."""
    num_out, num_in = sum(r.osl or 0 for r in records), sum(r.isl or 0 for r in records)
    check = sink.manifest["token_check"]
    assert check["equal"] is True
    assert num_out == check["output_tokens_counted"] == check["output_tokens_vllm"]
    assert num_in == check["prompt_tokens_counted"] == check["prompt_tokens_vllm"]
    assert num_out == sum(r.osl for r in schedule.requests)
    cached = sum(r.num_cached_tokens or 0 for r in records)
    assert sum(s.prefill_tokens for s in sink.steps) == num_in - cached
    # the first token of a request comes out of the step that ends its prefill
    assert sum(s.decode_tokens for s in sink.steps) == num_out - len(records)
    # k-th decode step of a request: isl + k - 1 tokens are in the cache; a prompt in one chunk has none before it
    expected = sum(r.isl * (r.osl - 1) + (r.osl - 1) * (r.osl - 2) // 2 for r in schedule.requests if r.isl)
    context = sum(s.context_tokens or 0 for s in sink.steps)
    longest = max(r.isl or 0 for r in schedule.requests)
    assert context == expected if longest < 64 else context > expected


def check_times(records: list[RequestRecord], end_s: float) -> None:
    for r in records:
        order = [r.sent_s, r.queued_s, r.scheduled_s, r.engine_first_token_s, r.engine_last_token_s, r.done_s]
        assert None not in order and order == sorted(order) and order[0] >= 0 and order[-1] <= end_s  # type: ignore
        assert r.first_token_s is not None and r.engine_first_token_s is not None
        assert r.first_token_s >= r.engine_first_token_s and r.error is None and r.osl == r.requested_osl


def test_one_start_serves_every_load_and_the_records_add_up(engine: EngineProcess) -> None:
    info = engine.info
    assert info is not None and info.kv_capacity_tokens and info.max_model_len == 512 and len(info.pids) >= 4
    assert info.effective_args["enforce_eager"] is True and info.notes["front_end"] == "AsyncLLM"
    requests = some_requests(20, num_warmup=4, isl=32, osl=12, seed=1)
    due = np.concatenate([np.zeros(4), np.linspace(0, 0.3, 16)])
    schedules = [
        Schedule("offline", requests, None, 4),
        Schedule("closed_loop", some_requests(20, num_warmup=4, isl=32, osl=12, seed=2), None, 4),
        Schedule("open_loop", some_requests(20, num_warmup=4, isl=32, osl=12, seed=3), due, None),
        Schedule("offline", some_requests(20, isl=300, osl=8, seed=4), None, None),  # prefill in chunks of 256
        Schedule("offline", requests, None, 4),  # the same prompts again: nothing may be cached from the first run
    ]
    for schedule in schedules:
        begin = time.monotonic()
        records, sink = serve(engine, schedule)
        assert sorted(r.index for r in records) == list(range(20))
        check_sums(records, sink, schedule)
        check_times(records, time.monotonic() - begin)
        assert all(r.num_cached_tokens == 0 for r in records)
        assert [s.step for s in sink.steps] == list(range(len(sink.steps)))
        assert all(s.t_s > 0 and (s.step_time_s or 0) > 0 and 0 <= (s.kv_usage_ratio or 0) <= 1 for s in sink.steps)
        if schedule.kind == "offline":
            assert not sink.chunk_tokens
        else:
            assert sink.chunk_tokens == {r.index: r.osl for r in schedule.requests}
        if schedule.max_in_flight:
            assert max(s.num_running for s in sink.steps) <= schedule.max_in_flight


def test_a_maximum_duration_cuts_off_and_the_engine_serves_on(engine: EngineProcess) -> None:
    schedule = Schedule(
        "closed_loop", some_requests(2000, isl=32, osl=64, seed=5), None, 8, StopRule(max_duration_s=1.0)
    )
    records, sink = serve(engine, schedule)
    cut = [r for r in records if r.error == "aborted"]
    assert sink.manifest["stop_reason"] == "max-duration" and len(cut) == 8 and len(records) < 2000
    again = Schedule("offline", some_requests(8, isl=32, osl=8, seed=6), None, 8)
    records, sink = serve(engine, again)
    check_sums(records, sink, again)


def test_what_does_not_fit_is_refused_and_the_engine_serves_on(engine: EngineProcess) -> None:
    with pytest.raises(BadInput, match="600 tokens of context, but max_model_len is 512"):
        serve(engine, Schedule("offline", some_requests(2, isl=500, osl=100), None, 2))
    records, _ = serve(engine, Schedule("offline", some_requests(2, isl=16, osl=4), None, 2))
    assert len(records) == 2


def test_two_ranks_through_llm_and_a_killed_worker(model: str, tmp_path: Path) -> None:
    launch = EngineLaunch("vllm", model, "dummy", {**ARGS, "tensor_parallel_size": 2})
    engine = EngineProcess(launch, tmp_path / "engine.log")
    try:
        info = engine.start(START_LIMIT_S)
        assert info.effective_args["tensor_parallel_size"] == 2 and info.notes["front_end"] == "LLM"
        schedule = Schedule("offline", some_requests(20, num_warmup=4, isl=32, osl=12), None, 4)
        records, sink = serve(engine, schedule)
        check_sums(records, sink, schedule)
        with pytest.raises(BadInput, match="started for offline batches"):
            serve(engine, Schedule("closed_loop", some_requests(2), None, 2))
        endless = Schedule("offline", some_requests(4000, isl=32, osl=64, seed=9), None, 4)
        stream = engine.run(endless, KeepingSink(), time.monotonic(), run_limit_s=300, idle_limit_s=120)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        records, sink = serve(engine, schedule)  # nothing of the run that was broken off is left in it
        check_sums(records, sink, schedule)
        stream = engine.run(endless, KeepingSink(), time.monotonic(), run_limit_s=300, idle_limit_s=120)
        next(stream)
        worker = next(p for p in info.pids if "Worker" in Path(f"/proc/{p}/cmdline").read_text())
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(EngineDied, match=r"a process of the engine .*Worker") as caught:
            list(stream)
        # "killed" where we saw the exit status before the worker's parent collected it
        assert caught.value.reason in ("killed", "crash") and caught.value.log_tail
    finally:
        engine.stop()
    assert not set(info.pids) & set(process_table())
    assert not list(Path("/dev/shm").glob(f"tokenyield-{engine._marker}*"))


@pytest.mark.parametrize(
    ("args", "words"),
    [({"max_num_sequences": 3}, "did you mean max_num_seqs"), ({"model": "x"}, "cannot be set")],
)
def test_wrong_arguments_are_named(model: str, tmp_path: Path, args: dict[str, Any], words: str) -> None:
    engine = EngineProcess(EngineLaunch("vllm", model, "dummy", args), tmp_path / "engine.log")
    with pytest.raises(EngineStartFailed, match=words) as caught:
        engine.start(START_LIMIT_S)
    assert caught.value.reason == "bad-argument" and "\n" not in str(caught.value)
