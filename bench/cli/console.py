"""Where tables go: the terminal at its own width; wide enough for every column when the output is a pipe or a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: rich takes 80 columns where there is no terminal and cuts names to fit; a file has no such limit.
PIPE_WIDTH = 180


def console() -> Console:
    """A rich console for standard output, without markup surprises in numbers and paths."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
