"""Prices: carried whole, sourced, aged, never mixed."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from bench.catalog.prices import Price, load_prices, read_prices
from bench.errors import BadInput, UnknownName

BOOK = load_prices()
DAY = datetime.date(2026, 11, 24)


def test_the_published_rows_are_all_there() -> None:
    real = [p for p in (*BOOK.gpu_hours, *BOOK.owned, *BOOK.api) if not p.example]
    assert len(real) == 175
    for p in (*BOOK.gpu_hours, *BOOK.owned, *BOOK.api):
        assert len(p.source) > 3 and p.currency == "USD" and datetime.date(2022, 1, 1) <= p.as_of <= DAY


def test_the_worked_example() -> None:
    gpt4o = BOOK.api_price("example-gpt-4o")
    assert gpt4o.cost(10e6 / 3, 20e6 / 3).amount == pytest.approx(75.0)
    assert gpt4o.cost(10e6 / 3, 20e6 / 3, batch=True).amount == pytest.approx(37.5)
    assert gpt4o.cost(1e6, 0, cached_input_tokens=1e6).amount == pytest.approx(1.25)
    low, high = BOOK.api_price("example-together-low"), BOOK.api_price("example-together-high")
    assert [p.cost(1e7 / 3, 2e7 / 3).amount for p in (low, high)] == pytest.approx([3.5, 9.0])
    assert BOOK.api_price("example-fireworks").cost(1e7 / 3, 2e7 / 3).amount == pytest.approx(4.0)
    assert BOOK.gpu_price("example-2xa100-80").per_gpu_hour * 2 == 6.0
    assert BOOK.gpu_price("example-1xh100").per_gpu_hour == 4.0


def test_ranges_leave_examples_out_and_take_the_newest_of_an_offer() -> None:
    r = BOOK.gpu_range("H100-SXM")
    assert (r.low.amount, r.high.amount) == (2.4, 12.29)
    assert r.low.amount <= r.typical.amount <= r.high.amount
    assert not any(p.example for p in r.offers)
    vast = BOOK.gpu_offers("H100-SXM", provider="Vast.ai")
    assert [p.per_gpu_hour for p in vast] == [2.4]  # 6.15 was an earlier check of the same offer
    assert all(p.commitment == "spot" for p in BOOK.gpu_offers("H100-SXM", "spot"))
    with pytest.raises(BadInput, match="no EUR on-demand price for H100-SXM"):
        BOOK.gpu_range("H100-SXM", currency="EUR")


def test_look_ups() -> None:
    assert BOOK.api_price("OpenAI/gpt-4o").output_per_million == 10
    assert BOOK.api_price("gpt-4o").as_of == datetime.date(2026, 8, 5)  # the newer of two
    assert BOOK.gpu_price("lambda", "H100-SXM").provider == "Lambda"
    with pytest.raises(UnknownName, match="did you mean"):
        BOOK.api_price("gpt-4p")
    with pytest.raises(UnknownName):
        BOOK.gpu_price("nobody", "H100-SXM")


def test_old_prices_draw_a_warning() -> None:
    old, new = BOOK.api_price("Together/DeepSeek-V3"), BOOK.gpu_price("lambda", "H100-SXM")
    warnings = BOOK.warnings([old, new], DAY)
    assert [w.code for w in warnings] == ["old-price"]
    assert "445 days old" in warnings[0].message
    assert BOOK.warnings([old], old.as_of) == []
    assert BOOK.warnings([old], old.as_of - datetime.timedelta(days=1))[0].code == "future-price"


def test_money_is_never_mixed() -> None:
    usd = Price(2.0, "USD", "gpu_hour")
    assert (usd + usd).amount == 4.0 and usd < usd.times(2)
    for other in (Price(2.0, "EUR", "gpu_hour"), Price(2.0, "USD", "million_tokens")):
        with pytest.raises(BadInput, match="cannot be put together"):
            _ = usd + other
        with pytest.raises(BadInput, match="cannot be put together"):
            _ = usd < other
    assert (usd.text, Price(0.038, "USD", "million_tokens").text) == ("$2.00/GPU-h", "$0.038/M tokens")
    assert Price(1234.5, "EUR", "month").text == "EUR 1,234.50/month"


def test_a_file_of_ones_own_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        """currency: USD
gpu_hours:
  - {id: example-1xh100, provider: Mine, gpu: H100-SXM, per_gpu_hour: 1.5, source: my contract, as_of: 2026-11-01}
api:
  - {id: openai/gpt-4o, provider: OpenAI, model: gpt-4o, input_per_million: 1, output_per_million: 2, source: my deal, as_of: 2026-11-01}
"""
    )
    book = load_prices(path)
    assert book.gpu_price("example-1xh100").per_gpu_hour == 1.5
    assert book.api_price("openai/gpt-4o").output_per_million == 2
    assert len([p for p in book.api if p.id == "openai/gpt-4o"]) == 1
    assert len(read_prices(path).gpu_hours) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("per_gpu_hour: -1", "greater than or equal to 0"),
        ("per_gpu_hour: .nan", "finite"),
        ("per_gpu_hour: 4 USD", "valid number"),
        ("per_gpu_hour: 1, commitment: forever", "on_demand"),
        ("per_gpu_hr: 1", "did you mean per_gpu_hour"),
    ],
)
def test_rows_that_make_no_sense(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        f"currency: USD\ngpu_hours:\n  - {{provider: P, gpu: L4, {row}, source: none known, as_of: 2026-01-01}}\n"
    )
    with pytest.raises(BadInput, match=message) as e:
        load_prices(path)
    assert "p.yaml:3" in str(e.value)


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, message in (("currency: dollars\n", "currency"), ("currency: USD\n", "holds no prices")):
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            load_prices(path)
    with pytest.raises(UnknownName):
        load_prices("nosuchfile")


def test_token_counts_must_make_sense() -> None:
    with pytest.raises(BadInput, match="do not make sense"):
        BOOK.api_price("example-gpt-4o").cost(1, 1, cached_input_tokens=2)
    with pytest.raises(BadInput, match="lists no batch discount"):
        BOOK.api_price("example-fireworks").cost(1, 1, batch=True)
