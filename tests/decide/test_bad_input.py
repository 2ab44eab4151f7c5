"""Malformed and contradictory input of cost, breakeven and plan: exit code 2, one line, what to change, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cli import main

HOST = "{name: h, gpu: H100-SXM, usd_per_gpu_hour: 4, tokens_per_s: 800}"
CANDIDATE = "{gpu: H100-SXM, tensor_parallel_sizes: [1]}"


def decision(options: str = f"[{HOST}]", apis: str = "[example-gpt-4o]", more: str = "") -> str:
    return f"name: d\nwhy: a test\noptions: {options}\napis: {apis}\n{more}\n"


def demand(more: str = "", rate: str = "peak_rate_per_s: 5", lengths: str = "isl: 500\nosl: 50", slo: str = "ttft p99 <= 1 s", candidates: str = f"[{CANDIDATE}]", model: str = "llama-3.1-8b") -> str:  # fmt: skip
    return f"model: {model}\n{rate}\n{lengths}\nslo: {slo}\ncandidates: {candidates}\n{more}\n"


def host(**more: str) -> str:
    fields = {"name": "h", "gpu": "H100-SXM", "usd_per_gpu_hour": "4", "tokens_per_s": "800", **more}
    return "[{" + ", ".join(f"{k}: {v}" for k, v in fields.items() if v) + "}]"


FILES = {
    "negative price": ("breakeven", decision(host(usd_per_gpu_hour="-4")), "usd_per_gpu_hour"),
    "no price": ("breakeven", decision(host(usd_per_gpu_hour="")), "exactly one of"),
    "two prices": ("breakeven", decision(host(price="example-1xh100")), "exactly one of"),
    "no throughput": ("breakeven", decision(host(tokens_per_s="")), "give tokens_per_s, results or simulate"),
    "zero throughput": ("breakeven", decision(host(tokens_per_s="0")), "tokens_per_s"),
    "words for a number": ("breakeven", decision(host(tokens_per_s="fast")), "tokens_per_s"),
    "interval upside down": ("breakeven", decision(host(tokens_per_s_low="900", tokens_per_s_high="700")), "low and high"),
    "half an interval": ("breakeven", decision(host(tokens_per_s_low="700")), "together"),
    "unknown gpu": ("breakeven", decision(host(gpu="H1000")), "H1000"),
    "unknown field": ("breakeven", decision(host(speed="9")), "speed"),
    "unknown api": ("breakeven", decision(apis="[gpt-99]"), "gpt-99"),
    "no api": ("breakeven", decision(apis="[]"), "apis"),
    "batch price not listed": ("breakeven", decision(apis="[{name: example-fireworks, batch: true}]"), "no batch discount"),
    "mix without quotes": ("breakeven", decision(more="mix: 1.5"), "quotes"),
    "mix of nothing": ("breakeven", decision(more='mix: "0:0"'), "input:output"),
    "cached above all": ("breakeven", decision(more="cached_input: 1.5"), "cached_input"),
    "volume of nothing": ("breakeven", decision(more="volumes: [0]"), "volume"),
    "peak below mean": ("breakeven", decision(host(peak_to_mean="0.5")), "at least the mean"),
    "over full use": ("breakeven", decision(host(max_utilisation="1.2")), "max_utilisation"),
    "owned by the hour": ("breakeven", decision(host(usd_per_gpu_hour="", owned="{capex_usd: 1, life_years: 1, power_w: 1, usd_per_kwh: 1}", billing="by_hour")), "around the clock"),
    "owned for no time": ("breakeven", decision(host(usd_per_gpu_hour="", owned="{capex_usd: 1, life_years: 0, power_w: 1, usd_per_kwh: 1}")), "life_years"),
    "cooling for free": ("breakeven", decision(host(usd_per_gpu_hour="", owned="{capex_usd: 1, life_years: 1, power_w: 1, usd_per_kwh: 1, pue: 0.5}")), "PUE"),
    "two options of one name": ("breakeven", decision(f"[{HOST}, {HOST}]"), "same name"),
    "results that are not there": ("breakeven", decision(host(tokens_per_s="", results="/nowhere/at/all")), "results"),
    "simulated model too large": ("breakeven", decision(host(tokens_per_s="", simulate="{model: llama-3.1-405b}")), "llama-3.1-405b"),
    "price in euros": ("breakeven", decision(host(usd_per_gpu_hour="", price="euro-h100"), more="prices: [PRICES]"), "EUR"),
    "tab instead of a file": ("breakeven", "name: [", "2"),
    "negative rate": ("plan", demand(rate="peak_rate_per_s: -5"), "peak_rate_per_s"),
    "no demand": ("plan", demand(rate=""), "or a trace"),
    "trace and rate": ("plan", demand("trace: t.csv"), "its own rates"),
    "mean above peak": ("plan", demand("mean_rate_per_s: 9"), "above peak"),
    "short day": ("plan", demand("hourly: [1, 2, 3]"), "24"),
    "slo of nonsense": ("plan", demand(slo="fast please"), "SLO"),
    "slo nobody meets": ("plan", demand(slo="ttft p99 <= 1 ms"), "relax the SLO"),
    "slo that cannot be judged": ("plan", demand(slo="itl p99 <= 50 ms"), "as tpot"),
    "model that fits nowhere": ("plan", demand(model="llama-3.1-405b"), "more memory"),
    "unknown model": ("plan", demand(model="llama-99"), "llama-99"),
    "no candidates": ("plan", demand(candidates="[]"), "candidates"),
    "same candidate twice": ("plan", demand(candidates=f"[{CANDIDATE}, {CANDIDATE}]"), "same GPU"),
    "no head-room left": ("plan", demand("headroom: 1"), "headroom"),
    "growth without an end": ("plan", demand("growth_per_month: 0.1"), "horizon_months"),
    "trace that is not there": ("plan", demand("trace: /nowhere/t.csv", rate="", lengths=""), "trace"),
}  # fmt: skip

PRICES = """
description: of a test
currency: EUR
gpu_hours:
  - {id: euro-h100, provider: Test, gpu: H100-SXM, commitment: on_demand, per_gpu_hour: 3, source: a test, as_of: 2026-11-01}
"""


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says when it refuses; checks that it does, in one line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2, said
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in said.err, said.err
    return lines[0]


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_gets_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, text, words = FILES[case]
    (tmp_path / "prices.yaml").write_text(PRICES)
    path = tmp_path / "file.yaml"
    path.write_text(text.replace("PRICES", str(tmp_path / "prices.yaml")))
    said = run([command, str(path)], capsys)
    assert words in said, said
    assert len(said) > 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cost", "/nowhere"], "nowhere"),
        (["cost", "/nowhere", "--output-price-ratio", "-1"], "ratio"),
        (["breakeven"], "--gpu"),
        (["breakeven", "--gpu", "H100-SXM"], "tokens_per_s"),
        (["breakeven", "--gpu", "H100-SXM", "--tokens-per-s", "-3"], "tokens-per-s"),
        (["breakeven", "--gpu", "H100-SXM", "--tokens-per-s", "3", "--volume", "much"], "volume"),
        (["breakeven", "--gpu", "H100-SXM", "--tokens-per-s", "3", "--mix", "half"], "input:output"),
        (["breakeven", "nothing-of-the-kind"], "nothing-of-the-kind"),
        (["plan"], "--rate"),
        (["plan", "--rate", "-1"], "--rate"),
        (["plan", "--rate", "5", "--tp", "two"], "--tp"),
        (["plan", "--rate", "5", "--gpu-price", "H100-SXM=-2"], "--gpu-price"),
        (["plan", "--rate", "5", "--gpu", "L40S", "--gpu-price", "H100-SXM=2"], "not among the candidates"),
        (["plan", "--rate", "5", "--mean-rate", "9"], "above"),
        (["plan", "--rate", "5", "--isl", "-4"], "isl"),
    ],
)
def test_wrong_options_get_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(arguments, capsys)
    assert words in said, said
