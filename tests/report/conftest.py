"""One synthetic experiment for all report tests: 2 TP x 4 batch sizes x 3 runs, one cell failed, one skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.report.write import ReportFiles, write_report
from tests.analysis.synthetic import experiment, write_experiment, write_run

SWEEP = {"grid": {"tensor_parallel_size": [1, 2], "batch_size": [1, 8, 64, 256]}}


#: How far the synthetic prediction says it may be off: low and high ratio, confidence, basis.
STATED = {m: [0.8, 1.15, 0.9, "made up"] for m in ("output_tokens_per_s", "ttft", "tpot")}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of the experiment."""
    root = tmp_path_factory.mktemp("results") / "runs"
    exp = experiment(sweep=SWEEP)
    from bench.config.sweep import expand

    cells = expand(exp)
    skip = {cells[-1].cell_id: "needs 2 GPUs, this machine has 1"}
    folder, cells = write_experiment(root, exp, skip=skip, simulated={"intervals": STATED})
    error = {
        "reason": "the engine died: CUDA out of memory",
        "code": "oom",
        "log_tail": "line 1\ntorch.OutOfMemoryError <script>alert(1)</script>",
    }
    write_run(folder, cells[-2], 9, t0_s=999.0 % 60, status="failed", error=error)
    return folder


@pytest.fixture(scope="session")
def files(results: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of it, written once."""
    return write_report(results, out=tmp_path_factory.mktemp("report"))
