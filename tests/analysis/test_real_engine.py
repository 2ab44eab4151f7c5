"""A real vLLM engine through the whole path: its tokens are our tokens, and a stored summary is what the records say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.analysis.summary import stored_summary, summarise_run
from bench.store import list_cells, list_runs

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """
name: tokens-add-up
why: "Are the tokens that we count those that vLLM counts?"
model: tiny-llama
weights: dummy
engine: {kind: vllm, args: {max_model_len: 512, max_num_seqs: 16, enforce_eager: true}}
load: {kind: offline, batch_size: 4}
workload: {isl: {kind: uniform, low: 16, high: 200}, osl: {kind: uniform, low: 1, high: 24}}
stop: {max_requests: 24}
repeats: 1
sweep:
  points:
    - {batch_size: 4}
    - {load: {kind: closed_loop, concurrency: 3}}
limits: {engine_start_s: 500, run_s: 200}
"""


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_tokens_counted_by_us_are_tokens_counted_by_vllm(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(EXPERIMENT)
    command = [sys.executable, "-m", "bench", "run", str(path), "--plain", "--results", str(tmp_path / "results")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "results" / "runs" / "tokens-add-up"
    runs = [r for cell in list_cells(folder) for r in list_runs(cell)]
    assert len(runs) == 2
    for run in runs:
        summary = summarise_run(run)
        c = summary.counts
        assert c["num_steps"] > 0 and c["all_output_tokens"] > 0
        assert c["step_decode_tokens"] == c["all_output_tokens"] - c["num_with_output"]
        assert c["step_prefill_tokens"] == c["all_input_tokens"] - c["all_cached_tokens"]
        assert stored_summary(run) == summary  # `bench run` wrote the report, and with it the summaries
        assert summary.origin == "measured"
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["origin"] == "measured" and report["answers"]
