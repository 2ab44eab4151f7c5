"""A real ``vllm serve`` on the CPU, driven end to end: one start, closed and open loop."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

from bench.engines.host import EngineLaunch
from bench.load.schedule import closed_loop, open_loop
from bench.records import ChunkRecord, EngineMetric, EngineStep, GpuSample, RequestRecord
from bench.workload.synthetic import FixedLength, UniformLength, build_requests

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


class Sink:
    """Keeps everything in memory."""

    def __init__(self) -> None:
        self.columns: list[dict[str, Any]] = []
        self.metrics: list[EngineMetric] = []
        self.manifest: dict[str, Any] = {}

    def append_chunk(self, chunk: ChunkRecord) -> None:
        raise AssertionError("chunks come as columns")

    def append_chunk_columns(self, **columns: Any) -> None:
        self.columns.append(columns)

    def append_step(self, step: EngineStep) -> None: ...
    def append_step_columns(self, **columns: Any) -> None: ...
    def append_telemetry(self, sample: GpuSample) -> None: ...
    def append_telemetry_columns(self, **columns: Any) -> None: ...

    def append_metric(self, metric: EngineMetric) -> None:
        self.metrics.append(metric)

    def update_manifest(self, **values: Any) -> None:
        self.manifest.update(values)


def check(records: list[RequestRecord], sink: Sink, asked_output: int) -> None:
    """The three views agree: what was asked and streamed, the chunks, and the server's counters."""
    assert [r.error for r in records] == [None] * len(records), [r.error_detail for r in records if r.error][:1]
    output = sum(r.osl or 0 for r in records)
    assert output == asked_output
    assert sum(int(c["tokens"].sum()) for c in sink.columns) == output
    view = sink.manifest["server_view"]
    assert view["server_output_tokens"] == output
    assert view["server_prompt_tokens"] == sum(r.isl or 0 for r in records)
    assert view["disagreements"] == () and not view["warnings"], view
    client = sink.manifest["client"]
    assert client["stamps"] == "kernel" and client["checked_tokens_ratio"] == 1.0
    assert {m.name for m in sink.metrics} >= {"vllm:num_requests_running", "vllm:kv_cache_usage_perc"}


def test_closed_and_open_loop(tmp_path: Path) -> None:
    from bench.catalog.model import load_model, materialise
    from bench.engines.vllm_server import VllmServer

    model = tmp_path / "model"
    materialise(load_model("tiny-llama"), model)
    launch = EngineLaunch("vllm_server", str(model), weights="dummy", args={"max_model_len": 1024, "max_num_seqs": 16})
    with VllmServer(launch) as engine:
        info = engine.info()
        assert info.max_model_len == 1024 and info.kv_capacity_tokens
        lengths = {"isl": UniformLength(20, 60), "osl": FixedLength(12), "vocab_size": 4096}
        requests = build_requests(32, seed=11, **lengths)  # type: ignore[arg-type]
        sink = Sink()
        records = list(engine.run(closed_loop(requests, 8), sink, time.monotonic()))
        check(records, sink, 32 * 12)
        requests = build_requests(30, seed=12, **lengths)  # type: ignore[arg-type]
        sink = Sink()
        records = list(engine.run(open_loop(requests, 10.0, seed=3), sink, time.monotonic()))
        check(records, sink, 30 * 12)
        assert all(r.due_s is not None and r.sent_s is not None and r.sent_s >= r.due_s for r in records)
        pids = info.pids
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1]
