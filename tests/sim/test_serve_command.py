"""Options of published serve commands: what a simulation needs of them, and what it must refuse."""

from __future__ import annotations

import pytest

from bench.sim.ground_truth import published_points
from bench.sim.serve_command import ServeCommand, serve_command


@pytest.mark.parametrize(
    ("notes", "wanted"),
    [
        ("section=1; cmd=vllm serve openai/gpt-oss-20b; requests=1000", ServeCommand()),
        ("cmd=vllm serve m -tp 4 --max-model-len 32768 --enable-expert-parallel;", ServeCommand(tp=4, ep=True)),
        (
            "cmd=vllm serve m --tensor-parallel-size=2 --async-scheduling --max-num-batched-tokens 8192;",
            ServeCommand(tp=2, async_scheduling=True, max_num_batched_tokens=8192),
        ),
        (
            "cmd=vllm serve m --gpu-memory-utilization 0.85 --no-enable-prefix-caching --max-num-seqs 64 -dp 2;",
            ServeCommand(memory_share=0.85, prefix_caching=False, max_num_seqs=64, dp=2),
        ),
        ("cmd=vllm serve m --tool-call-parser hermes --trust-remote-code;", ServeCommand()),
    ],
)
def test_a_command_says_how_the_engine_ran(notes: str, wanted: ServeCommand) -> None:
    assert serve_command(notes) == wanted


def test_an_option_that_is_not_modelled_is_named() -> None:
    found = serve_command("cmd=vllm serve m --speculative-config {};")
    assert found is not None and found.unknown in ("--speculative-config", "{}")


@pytest.mark.parametrize(
    "notes", ["", "requests=1000", "cmd=python3 -m sglang.launch_server;", "cmd=vllm serve m --max-num-ba"]
)
def test_no_command_and_a_command_cut_off_are_no_command(notes: str) -> None:
    assert serve_command(notes) is None


def test_published_rows_run_as_their_command_says() -> None:
    points, _ = published_points()
    lab = [p for p in points if p.source.startswith("GPUStack")]
    tuned = [p for p in lab if p.max_num_batched_tokens and p.model == "gpt-oss-20b"]
    assert tuned and all(p.async_scheduling for p in tuned)
    plain = [p for p in lab if p.asynchronous is None]
    assert plain and not any(p.async_scheduling for p in plain if p.version < (0, 14))
    # four of a machine's eight GPUs, and a default of one where the command names no size
    assert any(p.model == "qwen3-235b-a22b" and p.tp == 4 for p in lab)
    assert any(p.model == "gpt-oss-120b" and p.tp == 1 for p in lab)
    assert any(p.ep for p in lab) and all(p.prefix_caching for p in lab)
