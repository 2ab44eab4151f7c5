"""Units: constants, and the printing of quantities.

Inside the project every quantity is in its base unit and says so in its name (``_s``, ``_bytes``, ``_j``, ``_w``,
``_hz``, ``_flops``, ``_usd``, ``_tokens``, ``_ratio`` for shares 0-1). Other units exist only where a number is printed.
"""

from __future__ import annotations

import math

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
TERA, GIGA, MEGA, KILO, MILLI, MICRO, NANO = 1e12, 1e9, 1e6, 1e3, 1e-3, 1e-6, 1e-9
S_PER_HOUR = 3600.0
HOURS_PER_YEAR = 8760.0
J_PER_KWH = 3.6e6
TOKENS_PER_MILLION = 1e6

_SI = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")]


def significant(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits with thousands separators and no exponent: 12345.6 -> '12,300'."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    rounded = round(value, digits - 1 - exponent)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{rounded:,.{decimals}f}"


def si(value: float, unit: str, digits: int = 3) -> str:
    """``value`` with an SI prefix: si(3.35e12, 'B/s') -> '3.35 TB/s'."""
    if value is None or math.isnan(value):
        return "n/a"
    for factor, prefix in _SI:
        if abs(value) >= factor * 0.9995:
            return f"{significant(value / factor, digits)} {prefix}{unit}".rstrip()
    return f"{significant(value, digits)} {unit}".rstrip()


def bytes_text(value: float, digits: int = 3) -> str:
    """Bytes with a binary prefix: 85899345920 -> '80.0 GiB'."""
    for factor, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(value) >= factor:
            return f"{significant(value / factor, digits)} {name}"
    return f"{int(value)} B"


def duration_text(seconds: float) -> str:
    """A duration for people: 0.0123 -> '12.3 ms', 75 -> '1 min 15 s', 7260 -> '2 h 01 min'."""
    if seconds is None or math.isnan(seconds):
        return "n/a"
    if seconds < 1:
        return si(seconds, "s")
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def counted(number: int, noun: str) -> str:
    """A count with its noun: 1 -> '1 cell', 1200 -> '1,200 cells'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def usd_text(value: float, digits: int = 3) -> str:
    """Dollars with cents above 1 and significant digits below: 1234.5 -> '$1,235', 3.3333 -> '$3.33'."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "$∞"
    sign = "-" if value < 0 else ""
    value = abs(value)
    if value >= 1000:
        return f"{sign}${value:,.0f}"
    if value >= 1 or value == 0:
        return f"{sign}${value:,.2f}"
    return f"{sign}${significant(value, digits)}"
