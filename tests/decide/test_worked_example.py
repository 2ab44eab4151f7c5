"""docs/self-host-or-api.md is what configs/ give today, and says what the worked example must say."""

from __future__ import annotations

import pytest

from bench.decide.decision import compare, load_decision
from scripts.worked_example import PAGE, page_text


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_text(), "run: python -m scripts.worked_example"
    for picture in ("self-host-or-api", "self-host-or-api-speed"):
        assert f"pictures/{picture}.png" in PAGE.read_text(encoding="utf-8")
        assert (PAGE.parent / "pictures" / f"{picture}.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "words",
    [
        "GPT-4o: $75.00** = 3.33 M × $2.50 + 6.67 M × $10.00",
        "2×A100: $33.33**",
        "$3.33 per million",
        "1×H100: $13.89**",
        "$1.39 per million",
        "Together: $3.50–9.00**",
        "Fireworks: $4.00**",
        "1×H100 around the clock: $2,880 a month",
        "SIMULATED",
        "5–10× cheaper",
        "$30–60 a month",
    ],
)
def test_it_says_what_it_must(words: str) -> None:
    assert words in PAGE.read_text(encoding="utf-8")


def test_its_figures_by_hand() -> None:
    compared = compare(load_decision("self-host-or-api")[0])
    cost = {o.option.name: o.option.monthly_usd for o in compared.options}
    assert cost["2×A100 by the hour"](50e6) == pytest.approx(50e6 / 500 / 3600 * 6)
    assert cost["1×H100 by the hour"](1e9) == pytest.approx(1e9 / 800 / 3600 * 4)
    assert cost["1×H100 around the clock"](1e9) == 4 * 720
    gpt = next(a for a in compared.apis if "gpt-4o" in a.name)
    assert gpt.monthly_usd(1e9, compared.mix) == pytest.approx(1e9 / 3 / 1e6 * 2.5 + 2e9 / 3 / 1e6 * 10)
    beats = next(p for p in compared.pairs if p.option.name == "1×H100 around the clock" and p.api is gpt)
    assert beats.crossing.first_tokens == pytest.approx(2880 / 7.5e-6)
