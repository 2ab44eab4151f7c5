"""Nested facts as rows that a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as (dotted name, text); empty values are left out, lists of plain values are joined."""
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        if value is None or value == "" or value == [] or value == ():
            return []
        text = ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
        return [(prefix, text)]
    out = []
    for k, v in items:
        out += flatten(v, f"{prefix}.{k}" if prefix else k)
    return out
