"""What a GPU-hour costs: the band that offers span, purchases of the catalogue, and the break-even over the band."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bench.catalog.prices import load_prices
from bench.config.decision import Decision, SelfHostSpec
from bench.decide.decision import Compared, compare
from bench.decide.option_price import HourPrice, hour_price
from bench.errors import BadInput
from bench.report.decision_text import band_lines, by_price_text

BOOK = load_prices()
PURCHASE = "8-gpu-hgx-server-quotation-h100-sxm"
POWERED = {"purchase": PURCHASE, "power_w": 1000, "usd_per_kwh": 0.1}


def price(gpu: str = "H100-SXM", **fields: Any) -> HourPrice:
    return hour_price(SelfHostSpec.model_validate({"name": "x", "gpu": gpu, "tokens_per_s": 500, **fields}), BOOK, gpu)


def compared(**fields: Any) -> Compared:
    option = {"name": "ours", "gpu": "H100-SXM", "tokens_per_s": 800, **fields}
    return compare(
        Decision.model_validate(
            {"name": "t", "why": "a test", "mix": "1:2", "options": [option], "apis": ["example-gpt-4o"]}
        )
    )


def test_an_offer_brings_the_band_of_its_commitment() -> None:
    found = price(price="lambda")
    offers = BOOK.gpu_range("H100-SXM", "on_demand")
    assert found.band is not None and (found.band.low_usd, found.band.high_usd) == (
        offers.low.amount,
        offers.high.amount,
    )
    assert found.band.low_usd <= found.usd <= found.band.high_usd
    assert f"{len(offers.offers)} on-demand offers" in found.band.source
    # a lone offer and the round price of an example span nothing
    assert price(price="hyperstack-h100-sxm-reserved-from").band is None
    assert price(price="example-1xh100").band is None
    assert price(usd_per_gpu_hour=3).band is None


def test_a_band_of_ones_own() -> None:
    found = price(usd_per_gpu_hour=3, usd_per_gpu_hour_low=2, usd_per_gpu_hour_high=4)
    assert found.band is not None and (found.band.low_usd, found.usd, found.band.high_usd) == (2, 3, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"usd_per_gpu_hour": 3, "usd_per_gpu_hour_low": 2}, "together"),
        ({"usd_per_gpu_hour": 3, "usd_per_gpu_hour_low": 3.5, "usd_per_gpu_hour_high": 4}, "must lie between"),
        ({"price": "lambda", "usd_per_gpu_hour_low": 2, "usd_per_gpu_hour_high": 4}, "belongs to a typed-in"),
        ({"owned": {"usd_per_kwh": 0.1}}, "give capex_usd, life_years, power_w, or purchase"),
    ],
)
def test_contradictory_prices(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        price(**fields)


def test_a_purchase_fills_in_what_is_left_out() -> None:
    found = price(owned=POWERED)
    assert found.parts is not None and found.parts.capital_usd == pytest.approx(317_000 / 8 / (4 * 12 * 720))
    assert found.parts.power_usd == pytest.approx(1.3 * 0.1)
    assert "Thinkmate" in found.source
    longer = price(owned={**POWERED, "life_years": 8})
    assert longer.parts is not None and longer.parts.capital_usd == pytest.approx(found.parts.capital_usd / 2)


@pytest.mark.parametrize(
    ("gpu", "owned", "words"),
    [
        ("A100-80-SXM", POWERED, "is a price of H100-SXM, the option's GPU is A100-80-SXM"),
        ("H100-SXM", {"purchase": PURCHASE, "usd_per_kwh": 0.1}, "does not say power_w; give owned.power_w"),
        ("H100-SXM", {**POWERED, "purchase": "neocloud-tco-costn-h100-sxm"}, "is no purchase in USD; give capex_usd"),
        ("H100-SXM", {**POWERED, "purchase": "8-gpu-hgx-server"}, "did you mean 8-gpu-hgx-server-quotation-h100-sxm"),
    ],
)
def test_purchases_that_do_not_fit(gpu: str, owned: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        price(gpu, owned=owned)


def test_the_break_even_over_the_band() -> None:
    """Around the clock on the first stair, the crossing is in proportion to the price."""
    found = compared(usd_per_gpu_hour=4, usd_per_gpu_hour_low=2, usd_per_gpu_hour_high=6)
    pair = found.pairs[0]
    assert pair.by_price is not None and pair.first is not None
    low, high = (c.first_tokens for c in pair.by_price)
    assert low == pytest.approx(pair.first.value / 2) and high == pytest.approx(pair.first.value * 1.5)
    assert by_price_text(pair) == "192 M/month at $2.00/GPU-h to 576 M/month at $6.00/GPU-h"
    assert "offered at $2.00 to $6.00 (your own range); used: $4.00" in band_lines(found)[0]
    # without a band nothing is said, and the crossing is the same
    alone = compared(usd_per_gpu_hour=4)
    assert by_price_text(alone.pairs[0]) == "" and not band_lines(alone)
    assert alone.pairs[0].crossing == pair.crossing


def test_never_at_the_dear_end() -> None:
    pair = compared(usd_per_gpu_hour=4, usd_per_gpu_hour_low=2, usd_per_gpu_hour_high=40).pairs[0]
    assert by_price_text(pair).endswith("never at $40.00/GPU-h")
