"""One request at a time, blocking: for probing a server before and beside a run, never for measuring."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from bench.errors import EngineUnavailable
from bench.load.target import Target, handshake_problem, resolve, tls_context


@dataclass(frozen=True, slots=True)
class Reply:
    """Status and body of an answer."""

    status: int
    body: bytes
    server: str | None = None

    def json(self) -> Any:
        """The body as JSON, None when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """A short text for error messages."""
        data = self.json()
        error = data.get("error", data) if isinstance(data, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        return " ".join(str(message or self.body.decode("utf-8", "replace")).split())[:200]


class _NoHandshake(OSError):
    """A connection came about, TLS on it did not."""


class _Connection(http.client.HTTPConnection):
    """An HTTP connection over whatever the target is: TCP, TLS or a Unix socket."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        super().__init__(target.host, target.port, timeout=timeout_s)
        self._target = target

    def connect(self) -> None:
        last: OSError | None = None
        for family, address in resolve(self._target):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(self.timeout)
            try:
                sock.connect(address)
            except OSError as e:
                sock.close()
                last = e
                continue
            context = tls_context(self._target)
            try:
                self.sock = context.wrap_socket(sock, server_hostname=self._target.host) if context else sock
            except ssl.SSLCertVerificationError:
                sock.close()
                raise
            except OSError as e:
                sock.close()
                raise _NoHandshake(handshake_problem(e)) from e
            return
        raise last or OSError("no address")


def ask(target: Target, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 10.0) -> Reply:
    """One request. The key goes along as for any other.

    Raises:
        EngineUnavailable: no connection, or no HTTP answer in time; the text says why.
    """
    headers = {"Accept": "*/*", "User-Agent": "tokenyield"}
    key = target.authorization()
    if key is not None:
        headers["Authorization"] = key
    if body is not None:
        headers["Content-Type"] = "application/json"
    connection = _Connection(target, timeout_s)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return Reply(response.status, response.read(), response.getheader("Server"))
    except ssl.SSLCertVerificationError as e:
        raise EngineUnavailable(
            f"certificate not accepted: {e.verify_message}",
            where=target.url,
            next_step="give the CA's certificates with ca_file (--ca-file)",
        ) from e
    except _NoHandshake as e:
        raise EngineUnavailable(f"no TLS handshake: {e}", where=target.url) from e
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        next_step = "is it running?"
        # no HTTP in the answer, or closed without one: what a port that waits for TLS does
        if not target.is_tls and isinstance(e, http.client.BadStatusLine | ConnectionResetError):
            next_step = "is it running? If the port speaks TLS: try https://"
            if not isinstance(e, ConnectionResetError):
                reason = "its answer is not HTTP"  # and may be any bytes
        raise EngineUnavailable(f"cannot reach the server: {reason}", where=target.url, next_step=next_step) from e
    finally:
        connection.close()
