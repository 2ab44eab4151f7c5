"""The event loop as a client sees it when the compiled path serves beside it."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from bench.load.compiled_loop import CompiledLoop


class LoopGate:
    """The event loop as the client sees it. While the compiled path serves, what is to be done soon or later is done
    there, and descriptors given to the event loop earn it a turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.compiled: CompiledLoop | None = None

    def _taken(self) -> CompiledLoop | None:
        return self.compiled if self.compiled is not None and self.compiled.active else None

    def call_soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        compiled = self._taken()
        if compiled is None:
            self._loop.call_soon(function, *arguments)
        else:
            compiled.soon.append((function, arguments))

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        compiled = self._taken()
        if compiled is None:
            self._loop.call_later(delay_s, function)
        else:
            at = time.monotonic_ns() + round(delay_s * 1e9)
            heapq.heappush(compiled.held, (at, next(compiled.serial), function))

    def _watch(self) -> None:
        if self.compiled is not None:
            self.compiled.turn_due = True

    def add_reader(self, fd: Any, function: Callable[[], None]) -> None:
        self._watch()
        self._loop.add_reader(fd, function)

    def add_writer(self, fd: Any, function: Callable[[], None]) -> None:
        self._watch()
        self._loop.add_writer(fd, function)

    def remove_reader(self, fd: Any) -> None:
        self._watch()
        self._loop.remove_reader(fd)

    def remove_writer(self, fd: Any) -> None:
        self._watch()
        self._loop.remove_writer(fd)
