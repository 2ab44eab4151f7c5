"""Taking secrets out of what is recorded. In doubt something is removed: a lost option value harms nobody.

What counts as a secret: values of options, variables, headers, JSON keys and URL parameters whose names say so; user
information in URLs; strings in the shape of well-known tokens; and, wherever else they turn up, the values of secret
environment variables and of secrets already found in the same command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

REMOVED = "***"


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Names whose last word is one of these hold a secret ...
_SECRET_LAST_WORDS = _set_of(
    "password passwd pwd pass passphrase secret secrets credential credentials authorization "
    "authentication bearer cookie auth jwt pat sig signature apikey authtoken accesstoken"
)
# (run together, as in PGPASSWORD)
_SECRET_ENDINGS = (
    "password",
    "passwd",
    "secret",
    "apikey",
    "accesskey",
    "secretkey",
    "privatekey",
    "authtoken",
    "hftoken",
)
# ... and those ending in key or token do, unless the word before makes it a word of this field.
_HARMLESS_TOKENS = _set_of(
    "eos bos pad unk sep cls mask stop per first last next special image output input prompt draft each "
    "time inter a the"
)
_SECRET_KEYS = _set_of(
    "api access secret private auth subscription account encryption signing client service master license "
    "ssh deploy x hf wandb openai anthropic azure aws google gcp nvidia ngc storage shared"
)
_NEGATIONS = frozenset(("no", "without", "skip"))

# The shapes of tokens that are secrets under any name.
_TOKEN_SHAPES = re.compile(
    r"""(?x)
    -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    | (?<![A-Za-z0-9])(?:
        sk-[A-Za-z0-9_-]{8,} | sk_(?:live|test)_[A-Za-z0-9]{8,} | rk_live_[A-Za-z0-9]{8,}
      | hf_[A-Za-z0-9]{8,} | api_org_[A-Za-z0-9]{8,}
      | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[A-Za-z0-9_-]{8,}
      | xox[a-z]-[A-Za-z0-9-]{8,} | nvapi-[A-Za-z0-9_-]{8,} | AIza[A-Za-z0-9_-]{20,} | ya29\.[A-Za-z0-9_-]{8,}
      | (?:AKIA|ASIA)[A-Z0-9]{12,} | pypi-[A-Za-z0-9_-]{16,} | gsk_[A-Za-z0-9]{16,} | r8_[A-Za-z0-9]{16,}
      | eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?
    )
    """,
    re.DOTALL,
)
_SCHEME = re.compile(r"(?i)\b(bearer|basic|digest|negotiate)((?:\s|%20|\+)+)[^\s\"',;&]+")
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}://)[^/?#\s\"'<>]*@")
# Lengths are bounded and names begin at a border, so that a long word without secrets costs time in proportion to its
# length only.
_NAME = r"[A-Za-z_](?:[A-Za-z0-9_.-]|%(?:5[fF]|2[dDeE])){0,200}"
_BORDER = r"(?:(?<![A-Za-z0-9_%])|(?<=%[0-9A-Fa-f]{2}))"
# NAME=value, --name=value, "name": value, ?name=value&..., name%3Dvalue; and --name value within one word
_BEFORE_VALUE = (
    re.compile(rf"{_BORDER}(?P<name>{_NAME})[\"']?\s*(?:=|:|%3[dDaA])\s*"),
    re.compile(rf"(?<![\w-])(?P<name>--?{_NAME})\s+"),
)
_VALUE = re.compile(
    r"(?i:bearer|basic|digest|negotiate)\s+[^\s\"'&;,}\])]+|\"(?:[^\"\\]|\\.)*\"?|'(?:[^'\\]|\\.)*'?|[^\s\"'&;,}\])]+"
)
_HEADER = re.compile(rf"(?P<name>{_NAME})(?P<mid>\s*:\s*)(?P<value>.+)\Z", re.DOTALL)
_WHOLE_WORD = re.compile(rf"(?P<name>-{{0,2}}{_NAME})=(?P<value>.*)\Z", re.DOTALL)
_SHORTEST_ECHO = 6  # a shorter value would take too much innocent text with it


def is_secret_name(name: str) -> bool:
    """Whether an option, variable, header or parameter of this name holds a secret.

    ``--api-key``, ``HF_TOKEN``, ``X-Api-Key``, ``dbPassword`` do; ``--max-tokens``, ``tokenizer``, ``--eos-token``,
    ``--api-key-file`` and ``--no-auth`` do not.
    """
    words = [w.lower() for w in _WORDS.findall(re.sub("%[0-9A-Fa-f]{2}", "_", name))]
    if not words or words[0] in _NEGATIONS:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last.isdigit() and len(words) > 1:  # API_KEY_2
        last, before = before, words[-3] if len(words) > 2 else ""
    if last in _SECRET_LAST_WORDS or last.endswith(_SECRET_ENDINGS):
        return True
    if last == "token":
        return before not in _HARMLESS_TOKENS
    return (last == "key" and before == "") or (last in ("key", "keys") and before in _SECRET_KEYS)


def redact_text(text: str, known: Iterable[str] = ()) -> str:
    """``text`` without secrets.

    Args:
        text: a word of a command line, a URL, a header, a line of a log, a JSON document.
        known: secrets already known, removed wherever they stand.
    """
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    text = _TOKEN_SHAPES.sub(REMOVED, text)
    text = _URL_USER.sub(rf"\g<1>{REMOVED}@", text)
    header = _HEADER.match(text)
    if header and is_secret_name(header["name"]) and not header["value"].startswith("//"):
        return f"{header['name']}{header['mid']}{REMOVED}"
    text = _SCHEME.sub(rf"\g<1>\g<2>{REMOVED}", text)
    return _cut_all(text)


def _secret_spans(text: str) -> list[tuple[int, int]]:
    """Where values of secret names stand. Values of other names are looked into: --header=X-Api-Key:abc, -c 'x --token abc'."""
    spans = []
    for pattern in _BEFORE_VALUE:
        at = 0
        while (before := pattern.search(text, at)) is not None:
            at = before.end()
            value = _VALUE.match(text, at) if is_secret_name(before["name"]) else None
            if value is not None:
                spans.append(value.span())
                at = value.end()
    return sorted(spans)


def _cut_all(text: str) -> str:
    parts, at = [], 0
    for start, end in _secret_spans(text):
        if start < at:
            continue
        quote = text[start] if text[start] in "\"'" else ""
        parts += [text[at:start], quote, REMOVED, quote]
        at = end
    return "".join([*parts, text[at:]])


def _found_in(words: Sequence[str]) -> set[str]:
    """Secret values in a command line, to be removed wherever else they stand."""
    found = {m["value"] for m in map(_WHOLE_WORD.match, words) if m and is_secret_name(m["name"])}
    found |= {m["value"] for m in map(_HEADER.match, words) if m and is_secret_name(m["name"])}
    for position, word in enumerate(words):
        found |= {word[start:end].strip("\"'") for start, end in _secret_spans(word)}
        if word.startswith("-") and "=" not in word and is_secret_name(word) and position + 1 < len(words):
            found.add(words[position + 1])
    return {secret for secret in found if len(secret) >= _SHORTEST_ECHO and REMOVED not in secret}


def _secret_values(environment: Mapping[str, str]) -> set[str]:
    return {
        v
        for k, v in environment.items()
        if is_secret_name(k) and len(v) >= _SHORTEST_ECHO and not Path(v).is_absolute()
    }


def redact_command_line(words: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """The words of a command line without secrets and with the working folder written ``.`` and the home folder ``~``.

    Args:
        words: as in ``sys.argv``.
        environment: where secret variables are looked up whose values may stand in the words; default ``os.environ``.
    """
    known = _found_in(words) | _secret_values(os.environ if environment is None else environment)
    shown: list[str] = []
    hide_next = False
    for word in words:
        if hide_next:
            shown.append(REMOVED)
            hide_next = word == "="
            continue
        whole = _WHOLE_WORD.match(word)
        if whole and is_secret_name(whole["name"]):
            # the shell has already taken the quotes away, so the value goes to the end of the word, blanks included
            shown.append(f"{whole['name']}={REMOVED}" if whole["value"] else word)
            hide_next = not whole["value"]
            continue
        hide_next = word.startswith("-") and " " not in word and is_secret_name(word)
        shown.append(shorten_paths(redact_text(word, known)))
    return shown


def redact_environment(environment: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """The variables whose names begin with one of ``prefixes``; secret ones are there with their value removed."""
    known = _secret_values(environment)
    return {
        name: REMOVED if is_secret_name(name) else shorten_paths(redact_text(value, known))
        for name, value in sorted(environment.items())
        if name.startswith(tuple(prefixes))
    }


def shorten_paths(text: str) -> str:
    """``text`` with the working folder written ``.`` and the home folder ``~``: neither says anything about a result."""
    try:
        here = os.getcwd()
    except OSError:  # the working folder was deleted
        here = ""
    return shorten_home(_shorten(text, here, "."))


def shorten_home(text: str, home: str | None = None) -> str:
    """``text`` with the home folder written ``~``."""
    home = os.path.expanduser("~") if home is None else home
    return text if home == "~" else _shorten(text, home, "~")


def _shorten(text: str, folder: str, sign: str) -> str:
    folder = folder.rstrip("/")
    if not folder:
        return text
    return re.sub(rf"(?<![A-Za-z0-9_.~-]){re.escape(folder)}(?![A-Za-z0-9_.-])", sign, text)
