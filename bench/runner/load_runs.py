"""Runs against a URL without an experiment file: one endpoint session, any number of cells, ordinary run folders."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from typing_extensions import Self

from bench import __version__
from bench.config.experiment import CellSpec, Experiment, TelemetrySpec, TraceLoad
from bench.config.sweep import Cell, make_cell
from bench.engines.endpoint import EndpointEngine
from bench.errors import BadInput, BenchError
from bench.load.driver import LoadOptions, Progress
from bench.load.target import Target
from bench.records import EngineInfo
from bench.runner.marks import mark_by_sent
from bench.runner.results import comparable_cells, experiment_folder, run_number, write_resolved
from bench.runner.schedules import LengthPairs, build_schedule
from bench.runner.tally import Tally
from bench.runner.telemetry import sampled
from bench.store import TELEMETRY, RunWriter, list_runs, run_folder_name
from bench.workload.synthetic import repeat_seed

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_LEAD_S = 0.25


class LoadSession:
    """An endpoint under test. Cells are run one after the other on the same connection settings and the same server.

    Args:
        experiment: name, question and everything fixed; its engine must be of kind ``endpoint``.
        provenance: where this client runs, for the manifests.
        on_progress: told several times a second how far a run is.
        lengths: of a data set, in place of the workload's; ``dataset`` says in the manifest which.
    """

    def __init__(
        self,
        experiment: Experiment,
        target: Target,
        options: LoadOptions,
        *,
        vocab_size: int,
        provenance: dict[str, Any],
        root: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        lengths: LengthPairs | None = None,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        self.experiment, self.options, self.vocab_size = experiment, options, vocab_size
        self.provenance = provenance
        tokens = getattr(experiment.engine, "prompts", "text") == "token_ids"
        self.engine = EndpointEngine(target, options, probe_tokens=tokens)
        self.engine.on_progress = on_progress
        self.lengths, self.dataset = lengths, dataset
        self.folder = experiment_folder(experiment.name, root)
        self.cells: list[Cell] = []
        local = target.is_unix or target.host in _LOCAL_HOSTS
        # A remote server's load is not this host's: its devices are not sampled.
        self.telemetry = TelemetrySpec(source="host" if local else "none")

    def __enter__(self) -> Self:
        """Raises EngineUnavailable or BadInput when the server cannot be used."""
        self.engine.__enter__()
        self.info: EngineInfo = self.engine.info()
        self._leave_out_too_long()
        return self

    def _leave_out_too_long(self) -> None:
        """Exchanges of a data set that the server cannot take as a whole are not asked for, and the manifest says how
        many those are."""
        most = self.info.max_model_len
        if self.lengths is None or most is None:
            return
        isl, osl = self.lengths
        fits = isl + osl <= most
        if not fits.any():
            raise BadInput(f"no exchange of the data set fits the server's {most} tokens", where="--sharegpt")
        self.lengths = isl[fits], osl[fits]
        if self.dataset is not None:
            self.dataset = {**self.dataset, "num_too_long": int((~fits).sum())}

    def __exit__(self, *exc: object) -> None:
        self.engine.__exit__(*exc)

    def run(self, spec: CellSpec, axes: dict[str, Any]) -> Path:
        """One run of one cell; returns its folder, complete.

        Raises:
            BenchError: the run failed as a whole (its folder says so, too).
        """
        cell = make_cell(axes, spec)
        if not self.cells:
            self.cells = comparable_cells(self.folder, spec)
            write_resolved(self.folder, self.experiment, tuple(self.cells), {})
        if all(c.cell_id != cell.cell_id for c in self.cells):
            self.cells.append(cell)
            write_resolved(self.folder, self.experiment, tuple(self.cells), {})
        number = 1 + max((run_number(r) for r in list_runs(self.folder / cell.cell_id)), default=0)
        seed = repeat_seed(spec.seed, number)
        base = Path.cwd() if isinstance(spec.load, TraceLoad) else None
        schedule = build_schedule(spec, seed=seed, vocab_size=self.vocab_size, base=base, lengths=self.lengths)
        folder = self.folder / cell.cell_id / run_folder_name(number)
        writer = RunWriter(folder, self._manifest(cell, number, seed))
        started = time.monotonic()
        with self._outcome(writer, started):
            t0 = time.monotonic() + _LEAD_S
            writer.update_manifest(
                t0_monotonic_s=t0,
                t0_utc=datetime.fromtimestamp(time.time() + _LEAD_S, timezone.utc).isoformat(timespec="microseconds"),
                schedule={
                    "kind": schedule.kind,
                    "digest": schedule.digest(),
                    "num_requests": len(schedule.requests),
                    "max_in_flight": schedule.max_in_flight,
                },
            )
            with sampled(self.telemetry, folder / TELEMETRY, t0, self.info, ()) as telemetry:
                time.sleep(max(0.0, t0 - time.monotonic()))
                tally = Tally()
                for record in mark_by_sent(self.engine.run(schedule, writer, t0), schedule.kind, spec.warmup):
                    writer.append_request(record)
                    tally.add(record)
            failure = tally.failure(spec.stop)
            error = {"reason": failure, "code": "requests-failed", "log_tail": ""} if failure else None
            writer.finish(
                "failed" if failure else "complete",
                telemetry=telemetry.facts(),
                duration_s=time.monotonic() - started,
                ended_s=time.monotonic() - t0,
                **({"error": error} if error else {}),
            )
        return folder

    @contextlib.contextmanager
    def _outcome(self, writer: RunWriter, started: float) -> Iterator[None]:
        """Whatever happens, the folder says so."""
        try:
            yield
        except BenchError as e:
            error = {"reason": str(e), "code": "bench-error", "log_tail": ""}
            with contextlib.suppress(BenchError, OSError):
                writer.finish("failed", error=error, duration_s=time.monotonic() - started)
            raise
        except BaseException:
            with contextlib.suppress(BenchError, OSError, ValueError):
                writer.finish("interrupted")
            raise

    def _manifest(self, cell: Cell, number: int, seed: int) -> dict[str, Any]:
        return {
            "tokenyield_version": __version__,
            "created_utc": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            "experiment": self.experiment.name,
            "cell_id": cell.cell_id,
            "axes": cell.axes_dict(),
            "cell": cell.spec.model_dump(mode="json"),
            "repeat": number,
            "run_number": number,
            "seed": seed,
            "origin": "measured",
            "weights": cell.spec.weights,
            "engine": asdict(self.info),
            "fingerprint": {"engine_url": self.engine.target.url, "served_model": self.engine.target.model},
            "provenance": self.provenance,
            **({"dataset": self.dataset} if self.dataset else {}),
        }


def at_level(spec: CellSpec, level: float) -> tuple[CellSpec, dict[str, Any]]:
    """The cell at another request rate (open loop) or concurrency (closed loop), and its axis."""
    if spec.load.kind == "open_loop":
        return spec.model_copy(update={"load": spec.load.model_copy(update={"rate_per_s": level})}), {
            "rate_per_s": level
        }
    number = round(level)
    return spec.model_copy(update={"load": spec.load.model_copy(update={"concurrency": number})}), {
        "concurrency": number
    }


def with_num_requests(spec: CellSpec, least: int) -> CellSpec:
    """The cell with at least ``least`` measured requests, so that its percentiles are defined.

    Without a maximum they are the least number before the run may end (a duration that the cell has stays its end).
    """
    stop = spec.stop
    if stop.max_requests is None:
        stop = stop.model_copy(update={"min_requests": max(stop.min_requests, least)})
    elif stop.max_requests < least:
        whole = stop.min_requests == stop.max_requests  # an open loop ends with its last arrival
        stop = stop.model_copy(update={"max_requests": least, "min_requests": least if whole else stop.min_requests})
    return spec.model_copy(update={"stop": stop})


__all__ = ["LoadSession", "at_level", "with_num_requests"]
