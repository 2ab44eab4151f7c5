"""Every error that may reach a user, as one clear line: where it is, what is wrong, what to do next.

The command line catches :class:`BenchError` in one place, prints it and exits with ``exit_code``. Anything that happens
*during* a measurement (a failed request, a crashed engine) is not an exception but a record; see ``bench.records``.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_SOME_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class BenchError(Exception):
    """One line for the user.

    Args:
        what: what is wrong, e.g. ``expected a number > 0, got "10/s"``.
        where: the place, e.g. ``configs/experiments/x.yaml:14: load.rate_per_s``.
        next_step: what the user can do, e.g. ``write 10``.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        self.what = what
        self.where = where
        self.next_step = next_step
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.next_step}" if self.next_step else text

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (engines live in children): keep the three parts, not only the text.
        return (_rebuild, (type(self), self.what, self.where, self.next_step))


def _rebuild(cls: type[BenchError], what: str, where: str | None, next_step: str | None) -> BenchError:
    return cls(what, where=where, next_step=next_step)


class BadInput(BenchError):
    """A file, an option or a value that the user gave cannot be used."""


class UnknownName(BadInput):
    """A name that is not in the catalogue; ``next_step`` lists the nearest known ones."""


class EngineUnavailable(BenchError):
    """The engine cannot be started here at all (not installed, no such GPU, out of memory at start, ...)."""

    exit_code = EXIT_SOME_FAILED


class StoreError(BenchError):
    """A run folder cannot be written or read (disk full, not a run folder, written by a newer version)."""


class DoesNotFit(BadInput):
    """Weights or KV cache exceed the memory at hand."""
