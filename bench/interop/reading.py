"""Reading a foreign file: JSON or JSON lines, and typed access that says in one line what is missing or wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BadInput
from bench.records import ErrorClass

#: Phrases in a tool's error text -> our class of failure. The first that occurs decides.
_ERROR_PHRASES: tuple[tuple[str, ErrorClass], ...] = (
    ("too many requests", "http_429"),
    ("internal server error", "http_5xx"),
    ("bad gateway", "http_5xx"),
    ("service unavailable", "http_5xx"),
    ("gateway timeout", "http_5xx"),
    ("gateway time-out", "http_5xx"),
    ("server error '5", "http_5xx"),
    ("bad request", "http_4xx"),
    ("unauthorized", "http_4xx"),
    ("forbidden", "http_4xx"),
    ("not found", "http_4xx"),
    ("unprocessable", "http_4xx"),
    ("entity too large", "http_4xx"),
    ("client error '4", "http_4xx"),
    ("connecttimeout", "connect_timeout"),
    ("connection timeout to host", "connect_timeout"),
    ("timeout", "timeout"),
    ("timed out", "timeout"),
    ("cannot connect", "connect"),
    ("connectorerror", "connect"),
    ("connection refused", "connect"),
    ("connecterror", "connect"),
    ("connection error", "connect"),
    ("serverdisconnected", "reset"),
    ("server disconnected", "reset"),
    ("connectionreset", "reset"),
    ("connection reset", "reset"),
    ("clientoserror", "reset"),
    ("payloaderror", "truncated"),
    ("incomplete", "truncated"),
    ("never received a valid chunk", "truncated"),
    ("jsondecodeerror", "malformed_sse"),
    ("cancel", "aborted"),
)


def error_class(text: str, code: int | None = None) -> tuple[ErrorClass, bool]:
    """(class, whether it was recognised) of a failure by its HTTP status and the tool's words.

    What is not recognised becomes ``server_error``; its text is kept in the record.
    """
    import re

    if code is None:
        found = re.search(r"\b(?:status(?: code)?|http(?: error)?)[ :=]+([45]\d\d)\b", text, re.IGNORECASE)
        code = int(found[1]) if found else None
    if code is not None and 400 <= code < 600:
        return ("http_429" if code == 429 else "http_4xx" if code < 500 else "http_5xx"), True
    lowered = text.lower()
    for phrase, found_class in _ERROR_PHRASES:
        if phrase in lowered:
            return found_class, True
    return "server_error", False


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """A file as read: ``documents`` holds its JSON values (one, or one a line). ``path`` names it in every error."""

    path: Path
    documents: tuple[Any, ...]
    is_lines: bool
    dropped: tuple[str, ...] = ()  # lines that could not be read

    @property
    def first(self) -> Any:
        return self.documents[0]


def read_file(path: Path) -> ForeignFile:
    """Read a JSON or JSON-lines file.

    Raises:
        BadInput: it is not there, empty, no text, no JSON, or cut off.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise BadInput("this is a folder", where=str(path), next_step="name the result files in it") from None
    except UnicodeDecodeError:
        raise BadInput("not a text file", where=str(path), next_step="give the tool's JSON result file") from None
    except OSError as e:
        raise BadInput(f"cannot be read: {e.strerror or e}", where=str(path)) from None
    if not text.strip():
        raise BadInput(
            "the file is empty", where=str(path), next_step="the tool may still have been running, or failed"
        )
    try:
        return ForeignFile(path, (json.loads(text),), is_lines=False)
    except (ValueError, RecursionError) as whole:
        return _read_lines(path, text, whole)


def _read_lines(path: Path, text: str, whole: Exception) -> ForeignFile:
    documents, dropped = [], []
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, line in lines:
        try:
            documents.append(json.loads(line))
        except (ValueError, RecursionError):
            dropped.append(f"line {number}: no JSON")
    last_is_torn = (
        len(dropped) == 1 and len(documents) == len(lines) - 1 and dropped[0].startswith(f"line {lines[-1][0]}:")
    )
    structured = all(isinstance(d, dict) for d in documents)
    if not documents or not structured or (dropped and not last_is_torn):
        where = f"{path}:{getattr(whole, 'lineno', 1)}"
        at_end = getattr(whole, "pos", 0) >= len(text.rstrip()) - 1 or "Unterminated" in str(whole)
        what = "the file is cut off" if at_end else f"not JSON: {getattr(whole, 'msg', whole)}"
        raise BadInput(what, where=where, next_step="copy it again, or let the tool write it again")
    return ForeignFile(path, tuple(documents), is_lines=True, dropped=tuple(dropped))


#: A request with more tokens than this is a mistake in the file.
MOST_TOKENS = 2**40


class Part:
    """A mapping inside a foreign file with its place, so that every error names both.

    Every getter raises BadInput for a value of the wrong kind; ``None`` and absent keys are the same.
    """

    def __init__(self, data: Any, path: Path, at: str = "") -> None:
        if not isinstance(data, Mapping):
            raise BadInput(f"expected an object, got {_kind(data)}", where=f"{path}{': ' + at if at else ''}")
        self.data, self.path, self.at = data, path, at

    def where(self, key: str = "") -> str:
        place = ".".join(p for p in (self.at, key) if p)
        return f"{self.path}: {place}" if place else str(self.path)

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def part(self, key: str) -> Part | None:
        value = self.data.get(key)
        return None if value is None else Part(value, self.path, ".".join(p for p in (self.at, key) if p))

    def need(self, key: str) -> Any:
        value = self.data.get(key)
        if value is None:
            raise BadInput(
                "is missing", where=self.where(key), next_step="the file may be cut off or of another version"
            )
        return value

    def number(self, key: str) -> float | None:
        """A finite number, or None. Strings such as "inf" are refused; ask :meth:`text` first where they may stand."""
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadInput(f"expected a number, got {value!r:.60}", where=self.where(key))
        return float(value) if math.isfinite(value) else None

    def needed_number(self, key: str) -> float:
        value = self.number(key)
        if value is None:
            raise BadInput(
                "is missing", where=self.where(key), next_step="the file may be cut off or of another version"
            )
        return value

    def integer(self, key: str) -> int | None:
        value = self.number(key)
        if value is not None and value != int(value):
            raise BadInput(f"expected a whole number, got {value!r}", where=self.where(key))
        return None if value is None else int(value)

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        return None if value is None or isinstance(value, (dict, list)) else str(value)

    def sequence(self, key: str) -> Sequence[Any] | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise BadInput(f"expected a list, got {_kind(value)}", where=self.where(key))
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        """A list of numbers as float64; null becomes NaN."""
        values = self.sequence(key)
        if values is None:
            return None
        try:
            return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)
        except (TypeError, ValueError):
            raise BadInput("expected a list of numbers", where=self.where(key)) from None


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}.get(type(value), repr(value)[:40])


def utc_text(unix_s: float | None) -> str | None:
    """Unix seconds as ISO 8601 in UTC; None for what is no time of day."""
    from datetime import datetime, timezone

    if unix_s is None or not 1e9 < unix_s < 1e11:
        return None
    return datetime.fromtimestamp(unix_s, timezone.utc).isoformat(timespec="microseconds")
