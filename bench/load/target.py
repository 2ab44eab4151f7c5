"""Where requests go and how they are written: URL, TLS, addresses, HTTP heads and JSON bodies.

The API key is read from the environment by the process that sends, and is in no file, record, log or argument.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from bench.errors import BadInput
from bench.records import Request

ApiKind = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible endpoint.

    Args:
        url: ``http(s)://host[:port][/v1]`` or ``unix:/path/to.sock``. A URL with user info or a query is refused: both
            may hold secrets, and URLs go into the manifest.
        api: ``completions`` (token ids or text) or ``chat`` (messages).
        api_key_env: name of the environment variable that holds the key; None: no key is sent.
        ca_file: certificates to trust besides the system's (a private CA). Certificates are always verified.
        ignore_eos: ask the server (vLLM, SGLang) not to stop early, so that the output length is exact.
        continuous_usage: ask for the token count in every chunk (vLLM), which makes the tokens per chunk exact.
        max_tokens_field: newer OpenAI models take ``max_completion_tokens`` only.
        extra_body: further fields of the JSON body, sent as they are.
    """

    url: str
    model: str = ""
    api: ApiKind = "completions"
    api_key_env: str | None = None
    ca_file: str | None = None
    ignore_eos: bool = False
    continuous_usage: bool = False
    include_usage: bool = True
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: float | None = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            if not parts.path:
                raise BadInput("expected unix:/path/to.sock", where=self.url)
            return
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(
                f'expected a URL, got "{self.url}"', next_step="write http://host:port, https://host/v1 or unix:/path"
            )
        if parts.username or parts.password or parts.query:
            raise BadInput(
                "a URL with a user, a password or a query is refused: it may hold a secret and would be recorded",
                next_step="put the key in an environment variable and name it with --api-key-env",
            )
        try:
            parts.port  # noqa: B018 - the property raises on a bad port
        except ValueError as e:
            raise BadInput(f"{e}", where=self.url) from e

    @property
    def is_unix(self) -> bool:
        return self.url.startswith("unix:")

    @property
    def is_tls(self) -> bool:
        return self.url.startswith("https:")

    @property
    def host(self) -> str:
        return "localhost" if self.is_unix else str(urlsplit(self.url).hostname)

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (443 if self.is_tls else 80)

    def path(self, leaf: str) -> str:
        """Path of an API call below the base URL: a base without a path gets ``/v1``."""
        base = "" if self.is_unix else urlsplit(self.url).path.rstrip("/")
        for known in ("/chat/completions", "/completions"):
            base = base.removesuffix(known)
        return f"{base or '/v1'}/{leaf}"

    @property
    def request_path(self) -> str:
        return self.path("chat/completions" if self.api == "chat" else "completions")

    def root_path(self, leaf: str) -> str:
        """Path beside the API (``/metrics``, ``/health``): the base without its ``/v1``."""
        base = "" if self.is_unix else urlsplit(self.url).path.rstrip("/")
        return f"{base.removesuffix('/v1')}/{leaf}"

    def authorization(self) -> str | None:
        """The key's header value, read now. Raises BadInput when the variable is not set."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise BadInput(
                f"the environment variable {self.api_key_env} is not set", next_step=f"export {self.api_key_env}=..."
            )
        if not key.isascii() or any(c in key for c in "\r\n"):
            raise BadInput(f"the value of {self.api_key_env} is no key: it has line ends or is not ASCII")
        return f"Bearer {key}"

    def request_head(self) -> bytes:
        """The HTTP head up to, and without, the two per-request fields."""
        host = self.host if ":" not in self.host else f"[{self.host}]"
        default = self.is_unix or self.port == (443 if self.is_tls else 80)
        lines = [
            f"POST {self.request_path} HTTP/1.1",
            f"Host: {host if default else f'{host}:{self.port}'}",
            "User-Agent: tokenyield",
            "Accept: text/event-stream",
            "Accept-Encoding: identity",
            "Content-Type: application/json",
        ]
        key = self.authorization()
        if key is not None:
            lines.append(f"Authorization: {key}")
        return "\r\n".join(lines).encode() + b"\r\n"

    def body(self, request: Request, *, stream: bool = True) -> bytes:
        """The JSON body of one request.

        Raises:
            BadInput: the API cannot carry this kind of prompt.
        """
        fields: dict[str, Any] = {"model": self.model, self.max_tokens_field: request.osl}
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if stream:
            fields["stream"] = True
            options = {"include_usage": True} if self.include_usage else {}
            if self.continuous_usage:
                options["continuous_usage_stats"] = True
            if options:
                fields["stream_options"] = options
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if request.priority:
            fields["priority"] = request.priority
        fields.update(self.extra_body)
        rest = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)[1:].encode()
        if self.api == "chat":
            messages = request.messages or (({"role": "user", "content": request.text},) if request.text else None)
            if messages is None:
                raise BadInput(
                    "the chat API takes messages, not token ids", next_step="use --prompt text, or --api completions"
                )
            return b'{"messages":' + json.dumps(messages, ensure_ascii=False).encode() + b"," + rest
        if request.prompt_token_ids is not None:
            return b'{"prompt":[' + encode_token_ids(request.prompt_token_ids) + b"]," + rest
        if request.text is None:
            raise BadInput("the completions API takes token ids or text, not messages", next_step="use --api chat")
        return b'{"prompt":' + json.dumps(request.text, ensure_ascii=False).encode() + b"," + rest


def handshake_problem(e: OSError) -> str:
    """Why TLS did not come about, and what to look at: only who speaks TLS sends an alert, all else may be plain HTTP."""
    reason = "timed out" if isinstance(e, TimeoutError) else str(getattr(e, "reason", None) or e.strerror or e)
    return reason if "ALERT" in reason.upper() else f"{reason}; the server may speak plain HTTP: try http://"


@lru_cache(maxsize=1)
def _digits() -> list[bytes]:
    return [b"%d" % i for i in range(1 << 18)]


def encode_token_ids(ids: np.ndarray) -> bytes:
    """Comma-separated decimal ids."""
    values = ids.tolist()
    table = _digits()
    if values and max(values) < len(table):
        return b",".join([table[v] for v in values])
    return ",".join(map(str, values)).encode()


Address = tuple[int, Any]


def resolve(target: Target) -> list[Address]:
    """(family, sockaddr) of every address of the target, in the resolver's order. Done once, before the clock starts.

    Raises:
        BadInput: the name has no address.
    """
    if target.is_unix:
        return [(int(socket.AF_UNIX), urlsplit(target.url).path)]
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise BadInput(f"cannot find the host: {reason}", where=target.url, next_step="check the name") from e
    return list(dict.fromkeys((int(family), sockaddr) for family, _, _, _, sockaddr in found))


def tls_context(target: Target) -> ssl.SSLContext | None:
    """A verifying TLS context, None for plain targets. Raises BadInput when ``ca_file`` cannot be read."""
    if not target.is_tls:
        return None
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if target.ca_file:
        try:
            context.load_verify_locations(target.ca_file)
        except (OSError, ssl.SSLError) as e:
            raise BadInput(f"cannot read certificates: {e}", where=target.ca_file) from e
    return context


def request_rest(position: int, body: bytes) -> bytes:
    """What follows the common head of a request (``Target.request_head``): the fields of its own, and its body. The position
    in the schedule is its id. No secret is in it, so that it may lie on disk."""
    return b"Content-Length: %d\r\nX-Request-Id: %d\r\n\r\n%b" % (len(body), position, body)
