"""The explorer in a real browser against the Python it repeats: numbers to 1e-9, words to the letter, controls by events."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.config.decision import Decision
from bench.decide.breakeven import crossing
from bench.decide.decision import Compared, compare
from bench.decide.options import ApiOption, Mix, SelfHost
from bench.decide.rates import MixedRate, rate_at
from bench.records import Estimate
from bench.report.decision import DecisionFiles, explorer_data, write_decision
from bench.report.decision_text import answer_sentence
from tests.report.test_browser import CHROMIUM, chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium on this machine")]

NUM_RANDOM = 400


@pytest.fixture(scope="module")
def compared() -> Compared:
    h100 = {
        "gpu": "H100-SXM",
        "usd_per_gpu_hour": 4.0,
        "tokens_per_s": 800,
        "tokens_per_s_low": 700,
        "tokens_per_s_high": 950,
    }
    found = compare(
        Decision.model_validate(
            {
                "name": "explorer",
                "why": "a test",
                "mix": "1:2",
                "cached_input": 0.25,
                "volumes": ["10M", "1B", "30B"],
                "options": [
                    {"name": "clock", **h100, "peak_to_mean": 2.5, "max_utilisation": 0.8, "min_replicas": 2},
                    {"name": "hour </script>", **h100, "billing": "by_hour", "fixed_usd_per_month": 900},
                    {"name": "started hours", **h100, "billing": "by_hour", "whole_hours": True},
                    {"name": "shared", **h100, "num_gpus": 2, "fine_tune": {"one_off_usd": 6000, "months": 6, "num_adapters_sharing": 3}},
                ],
                "apis": ["example-gpt-4o", {"name": "example-gpt-4o", "batch": True, "cached_input": 0.5}, "example-fireworks"],
            }
        )
    )  # fmt: skip
    # one option whose throughput is known at three mixes
    known = (rate(0.2, 700), rate(1 / 3, 800), rate(0.8, 2500))
    last = found.options[-1]
    last = replace(last, rate=replace(last.rate, mixes=known, tokens_per_s=known[1].tokens_per_s))
    last = replace(last, option=replace(last.option, tokens_per_s=known[1].tokens_per_s))
    return replace(found, options=(*found.options[:-1], last))


def rate(share: float, value: float) -> MixedRate:
    return MixedRate(share, Estimate(value, 0.9 * value, 1.2 * value, unit="tokens/s"), "a test")


@pytest.fixture(scope="module")
def files(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> DecisionFiles:
    return write_decision(compared, tmp_path_factory.mktemp("decision"))


def random_controls(compared: Compared, n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    out = []
    for _ in range(n):
        ten = lambda low, high: float(10 ** rng.uniform(low, high))  # noqa: E731
        out.append(
            {
                "volume": ten(5, 12), "input_parts": float(rng.uniform(0, 20)), "output_parts": float(rng.uniform(0.01, 20)),
                "option": int(rng.integers(len(compared.options))), "api": int(rng.integers(len(compared.apis))),
                "usd_per_gpu_hour": ten(-1, 1.3), "tokens_per_s": ten(1, 5), "max_utilisation_ratio": float(rng.uniform(0.01, 1)),
                "peak_to_mean": float(rng.uniform(1, 10)), "min_replicas": int(rng.integers(1, 9)),
                "input_per_million": ten(-2, 2), "output_per_million": ten(-2, 2),
            }
        )  # fmt: skip
    return out


def by_python(compared: Compared, c: dict[str, Any]) -> dict[str, Any]:
    """What the explorer must show, by ``bench.decide``."""
    mix = Mix(c["input_parts"], c["output_parts"], compared.mix.cached_ratio)
    scale = c["tokens_per_s"] / compared.options[c["option"]].option.tokens_per_s.value
    hosts: list[SelfHost] = [
        replace(o.option, tokens_per_s=rate_at(o.rate.mixes, mix.input_ratio)) if len(o.rate.mixes) > 1 else o.option
        for o in compared.options
    ]
    e = hosts[c["option"]].tokens_per_s
    assert e.low is not None and e.high is not None
    hosts[c["option"]] = host = replace(
        hosts[c["option"]],
        usd_per_gpu_hour=c["usd_per_gpu_hour"],
        tokens_per_s=replace(e, value=e.value * scale, low=e.low * scale, high=e.high * scale),
        max_utilisation_ratio=c["max_utilisation_ratio"],
        peak_to_mean=c["peak_to_mean"],
        min_replicas=c["min_replicas"],
    )
    apis: list[ApiOption] = list(compared.apis)
    p = apis[c["api"]].price
    cached = p.cached_input_per_million
    if cached is not None:
        cached *= c["input_per_million"] / p.input_per_million
    price = replace(
        p, input_per_million=c["input_per_million"], output_per_million=c["output_per_million"], cached_input_per_million=cached
    )  # fmt: skip
    apis[c["api"]] = api = replace(apis[c["api"]], price=price)
    volume = c["volume"]
    found = crossing(host, api.usd_per_token(mix))
    assert host.tokens_per_s.low is not None and host.tokens_per_s.high is not None
    return {
        "monthly_usd": [*(o.monthly_usd(volume) for o in hosts), *(a.monthly_usd(volume, mix) for a in apis)],
        "replicas": [o.num_replicas(volume) for o in hosts],
        "utilisation": [o.utilisation(volume) for o in hosts],
        "first_tokens": found.first_tokens,
        "always_tokens": found.always_tokens,
        "low_tokens": crossing(host.at_rate(host.tokens_per_s.high), api.usd_per_token(mix)).first_tokens,
        "high_tokens": crossing(host.at_rate(host.tokens_per_s.low), api.usd_per_token(mix)).first_tokens,
        "answer": answer_sentence(hosts, apis, mix, volume),
    }


def in_browser(files: DecisionFiles, folder: Path, script: str) -> Any:
    """The JSON that ``script`` assigns to ``out`` in a copy of the page."""
    probe = f"<script>let out; {script}; const e = document.createElement('pre'); e.id = 'probe'; e.textContent = JSON.stringify(out); document.body.append(e);</script></body>"
    page = folder / "probe.html"
    page.write_text(files.html.read_text().replace("</body>", probe))
    dom = chromium(folder / "profile", "--virtual-time-budget=5000", "--dump-dom", page.as_uri())
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, flags=re.S)
    assert found is not None, dom[-2000:]
    return json.loads(unescape(found[1]))


def same(a: Any, b: Any) -> bool:
    if isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(b, float) or isinstance(a, float):
        return a is not None and b is not None and a == pytest.approx(b, rel=1e-9)
    return bool(a == b)


def test_every_number_and_word_is_that_of_python(compared: Compared, files: DecisionFiles, tmp_path: Path) -> None:
    controls = random_controls(compared, NUM_RANDOM)
    data = json.dumps(explorer_data(compared)).replace("</", "<\\/")
    found = in_browser(files, tmp_path, f"out = {json.dumps(controls)}.map((c) => EXPLORER.explore({data}, c))")
    crossings = 0
    for c, js in zip(controls, found, strict=True):
        for key, value in by_python(compared, c).items():
            assert same(js[key], value), (key, js[key], value, c)
        crossings += js["first_tokens"] is not None and js["first_tokens"] > 0
    assert crossings > NUM_RANDOM / 10  # the settings reach both sides of "never"


def test_each_control_changes_answer_chart_and_table(compared: Compared, files: DecisionFiles, tmp_path: Path) -> None:
    """Type into every number and move every slider as a user would, and read what the page then shows."""
    script = """
      const read = () => ({answer: document.getElementById('explorer-answer').textContent, pair: document.getElementById('explorer-pair').textContent,
        chart: document.querySelector('#explorer-chart svg').outerHTML, table: document.querySelector('#explorer-table tbody').textContent,
        monthly: JSON.parse(document.documentElement.dataset.explored).monthly_usd});
      const fire = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input', {bubbles: true})); };
      const reset = () => document.getElementById('explorer-reset').click();
      out = {start: read(), moved: {}, slid: {}};
      const values = {volume: 2.5e9, input_parts: 7, output_parts: 9, usd_per_gpu_hour: 1.5, tokens_per_s: 4321, max_utilisation_ratio: 0.4,
        peak_to_mean: 4, min_replicas: 5, input_per_million: 0.123, output_per_million: 33};
      for (const [key, value] of Object.entries(values)) {
        reset(); fire('c-' + key, value); out.moved[key] = read();
        reset(); const s = document.getElementById('s-' + key);
        fire('s-' + key, Number(s.min) + 0.7 * (Number(s.max) - Number(s.min)));
        out.slid[key] = {...read(), number: Number(document.getElementById('c-' + key).value)};
      }
      reset(); fire('c-option', 3); out.option = read();
      reset(); fire('c-api', 2); out.api = read();
      reset(); fire('c-tokens_per_s', -5); out.bad = {...read(), invalid: document.getElementById('c-tokens_per_s').getAttribute('aria-invalid')};
      reset(); out.again = read();
      out.loaded = performance.getEntriesByType('resource').map((e) => e.name);
      out.values = values
    """
    found = in_browser(files, tmp_path, script)
    hosts = [o.option for o in compared.options]
    middle = compared.volumes[1]
    assert found["start"]["answer"] == answer_sentence(hosts, compared.apis, compared.mix, middle)
    assert found["again"] == found["start"] and found["loaded"] == []
    base = {
        "volume": middle, "input_parts": 1.0, "output_parts": 2.0, "option": 0, "api": 0, "usd_per_gpu_hour": 4.0, "tokens_per_s": 800.0,
        "max_utilisation_ratio": 0.8, "peak_to_mean": 2.5, "min_replicas": 2, "input_per_million": 2.5, "output_per_million": 10.0,
    }  # fmt: skip
    for key, value in found["values"].items():
        shown, wanted = found["moved"][key], by_python(compared, {**base, key: value})
        assert same(shown["monthly"], wanted["monthly_usd"]), key
        assert shown["answer"] == wanted["answer"], key
        assert shown["chart"] != found["start"]["chart"], key
        changed = [shown[k] != found["start"][k] for k in ("answer", "pair", "table")]
        assert any(changed), key
        slid = found["slid"][key]
        assert same(slid["monthly"], by_python(compared, {**base, key: slid["number"]})["monthly_usd"]), key
        assert slid["chart"] != found["start"]["chart"], key
    assert found["option"]["pair"] != found["start"]["pair"] and found["api"]["pair"] != found["start"]["pair"]
    assert found["bad"]["invalid"] == "true" and found["bad"]["answer"] == found["start"]["answer"]


def test_an_address_carries_a_setting(compared: Compared, files: DecisionFiles, tmp_path: Path) -> None:
    at = files.html.as_uri() + "#volume=2e10&option=1&api=2&usd_per_gpu_hour=0.5&tokens_per_s=nonsense"
    dom = chromium(tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom", at)
    assert "At 20.0 B tokens a month" in dom
    assert re.search(r'data-explored="[^"]*monthly_usd', dom)


def test_it_fits_a_narrow_window(files: DecisionFiles, tmp_path: Path) -> None:
    probe = "<script>document.title = document.documentElement.scrollWidth + '/' + window.innerWidth</script></body>"
    page = tmp_path / "narrow.html"
    page.write_text(files.html.read_text().replace("</body>", probe))
    dom = chromium(tmp_path / "profile", "--window-size=500,900", "--dump-dom", page.as_uri())
    found = re.search(r"<title>(\d+)/(\d+)</title>", dom)
    assert found is not None and int(found[1]) <= int(found[2])
