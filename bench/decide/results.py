"""Results folders as decisions read them: the cells with complete runs, summarised."""

from __future__ import annotations

from pathlib import Path

from bench.analysis.predicted import with_stated
from bench.analysis.summary import Summary, summarise_cell
from bench.errors import BadInput, StoreError
from bench.runner.results import experiment_folder, read_plan
from bench.store import list_cells, list_runs


def results_folder(name_or_path: str) -> Path:
    """The results folder of an experiment by path or by name. Raises BadInput."""
    path = Path(name_or_path)
    folder = path if path.is_dir() else experiment_folder(name_or_path)
    if not folder.is_dir():
        raise BadInput("no results here", where=str(folder), next_step="`bench run` or `bench predict` makes some")
    return folder


def summaries(folder: Path, cell: str | None = None) -> list[Summary]:
    """Summaries of the cells of a results folder that have complete runs; those whose id contains ``cell``.

    Simulated ones carry the prediction's own intervals, so that nothing is decided on those over its repeats.
    """
    try:
        paths = [folder / c.cell_id for c in read_plan(folder)[1]]
    except StoreError:
        paths = list_cells(folder)  # results without a plan (imported ones): every cell counts
    out = []
    for path in paths:
        if cell and cell not in path.name:
            continue
        runs = [r for r in list_runs(path) if r.status == "complete"]
        if runs:
            out.append(with_stated(summarise_cell(runs)))
    if not out:
        what = f"no complete runs of a cell whose id contains {cell!r}" if cell else "no complete runs"
        raise BadInput(what, where=str(folder), next_step="`bench status` says what there is")
    return out
