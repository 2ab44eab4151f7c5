"""Where an experiment file says what a cell came to: on an axis of its sweep, or in its own place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.config.sweep import Cell, axis_path

if TYPE_CHECKING:
    from bench.config.loading import LoadedExperiment


def where_written(loaded: LoadedExperiment, cell: Cell, path: tuple[str, ...]) -> tuple[Any, ...]:
    """The place in the document of the field at ``path`` (``("engine", "args", "dtype")``), as this cell has it."""
    grid = loaded.document.data.get("sweep", {}).get("grid") or {}
    for name, value in cell.axes_dict().items():
        if axis_path(name) == path[: len(axis_path(name))]:
            values = grid.get(name)
            if isinstance(values, list) and value in values:
                return ("sweep", "grid", name, values.index(value))
            points = loaded.document.data["sweep"].get("points") or []
            number = next((i for i, p in enumerate(points) if p.get(name) == value), 0)
            return ("sweep", "points", number, name)
    return path
