"""Dollars per million tokens: small pure functions, the formula in each docstring.

Price is dollars per device-hour; devices are the GPUs that the engine holds, or the host as one device on a machine
without GPU. Rates are tokens per second at the measured (or simulated) load; utilisation is the share of the paid time in
which the engine really serves that load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.errors import BadInput
from bench.records import Estimate
from bench.units import S_PER_HOUR, TOKENS_PER_MILLION

#: How many input tokens one output token weighs when cost is split by price: the ratio of GPT-4o's list prices
#: ($10 per million output, $2.50 per million input; OpenAI price list, 2024-10), which many APIs share.
DEFAULT_OUTPUT_PRICE_RATIO = 4.0

SplitRule = Literal["all_on_output", "blended", "price_ratio", "time"]
SPLIT_RULES: dict[SplitRule, str] = {
    "all_on_output": "all cost is charged to output tokens; input is free",
    "blended": "every token costs the same, input or output",
    "price_ratio": "an output token costs r times an input token",
    "time": "cost goes by the engine's time: steps with prompt tokens to input, the rest to output",
}


def rate_usd_per_s(price_usd_per_hour: float, num_devices: int) -> float:
    """price x devices / 3600: what a second of the whole engine costs."""
    if price_usd_per_hour < 0:
        raise BadInput(f"expected a price >= 0, got {price_usd_per_hour}", where="gpu_price_usd_per_hour")
    if num_devices < 1:
        raise BadInput(f"expected at least one device, got {num_devices}", where="num_devices")
    return price_usd_per_hour * num_devices / S_PER_HOUR


def usd_per_million(usd_per_s: float, tokens_per_s: float, utilisation: float = 1.0) -> float:
    """usd_per_s / (tokens_per_s x utilisation) x 10^6.

    $4/h for one GPU at 800 tokens/s: 4 / 3600 / 800 x 10^6 = $1.39 per million.

    Raises:
        BadInput: tokens_per_s is not positive, or utilisation not in (0, 1].
    """
    if not tokens_per_s > 0:
        raise BadInput(f"expected tokens/s > 0, got {tokens_per_s}", where="tokens_per_s")
    if not 0 < utilisation <= 1:
        raise BadInput(f"expected a utilisation above 0 and up to 1, got {utilisation}", where="utilisation")
    return usd_per_s / (tokens_per_s * utilisation) * TOKENS_PER_MILLION


def usd_per_million_estimate(usd_per_s: float, tokens_per_s: Estimate, utilisation: float = 1.0) -> Estimate:
    """:func:`usd_per_million` of a rate with an interval: exact at both ends, since cost falls monotonically with the rate.

    A rate whose interval reaches down to 0 gives a cost without upper end (None).
    """
    value = usd_per_million(usd_per_s, tokens_per_s.value, utilisation)
    low = high = None
    if tokens_per_s.high is not None and tokens_per_s.low is not None:
        low = usd_per_million(usd_per_s, tokens_per_s.high, utilisation)
        high = usd_per_million(usd_per_s, tokens_per_s.low, utilisation) if tokens_per_s.low > 0 else None
    method = f"{tokens_per_s.method}; ends carried through"
    return Estimate(value, low, high, tokens_per_s.confidence, method, tokens_per_s.num_runs, "USD")


def split_by_price_ratio(
    usd_per_s: float, input_tokens_per_s: float, output_tokens_per_s: float, ratio: float = DEFAULT_OUTPUT_PRICE_RATIO
) -> tuple[float, float]:
    """(input, output) USD per million: input = usd_per_s / (in + r x out) x 10^6, output = r x input.

    The two, times their tokens, add up to the whole cost.
    """
    if ratio <= 0:
        raise BadInput(f"expected a price ratio > 0, got {ratio}", where="output_price_ratio")
    per_input = usd_per_million(usd_per_s, input_tokens_per_s + ratio * output_tokens_per_s)
    return per_input, ratio * per_input


def split_by_time(
    usd_per_s: float, input_tokens_per_s: float, output_tokens_per_s: float, prefill_time_ratio: float
) -> tuple[float, float]:
    """(input, output) USD per million: input = usd_per_s x p / in x 10^6, output = usd_per_s x (1 - p) / out x 10^6.

    ``prefill_time_ratio`` p is the share of engine time in steps that processed prompt tokens. Chunked prefill mixes both
    phases in one step, so p counts decodes that rode along as prefill: an upper bound for input.
    """
    if not 0 <= prefill_time_ratio <= 1:
        raise BadInput(f"expected a share between 0 and 1, got {prefill_time_ratio}", where="prefill_time_ratio")
    per_input = usd_per_million(usd_per_s * prefill_time_ratio, input_tokens_per_s) if input_tokens_per_s > 0 else 0.0
    return per_input, usd_per_million(usd_per_s * (1 - prefill_time_ratio), output_tokens_per_s)


@dataclass(frozen=True, slots=True)
class Price:
    """What one device costs per hour, and who says so."""

    usd_per_hour: float
    source: str
    as_of: str = ""
    low_usd_per_hour: float | None = None
    high_usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Costs of one configuration at one utilisation, keyed as in METRICS."""

    utilisation: float
    price: Price
    num_devices: int
    estimates: dict[str, Estimate]


def token_cost(
    price: Price,
    num_devices: int,
    output_tokens_per_s: Estimate,
    total_tokens_per_s: Estimate,
    input_tokens_per_s: float,
    *,
    utilisation: float = 1.0,
    ratio: float = DEFAULT_OUTPUT_PRICE_RATIO,
) -> TokenCost:
    """Cost per million output (all on output), blended, and input and output split by price ratio.

    Split costs scale with the output rate's interval: in one cell, input and output come in a fixed proportion.
    """
    usd_per_s = rate_usd_per_s(price.usd_per_hour, num_devices)
    estimates = {
        "cost_usd_per_million_output_tokens": usd_per_million_estimate(usd_per_s, output_tokens_per_s, utilisation),
        "cost_usd_per_million_blended_tokens": usd_per_million_estimate(usd_per_s, total_tokens_per_s, utilisation),
    }
    per_input, _ = split_by_price_ratio(usd_per_s, input_tokens_per_s, output_tokens_per_s.value, ratio)
    whole = estimates["cost_usd_per_million_output_tokens"]
    as_input = whole.scaled(per_input / utilisation / whole.value if whole.value else 0.0)
    estimates["cost_usd_per_million_input_tokens"] = as_input
    estimates["cost_usd_per_million_output_tokens_split"] = as_input.scaled(ratio)
    return TokenCost(utilisation, price, num_devices, estimates)
