"""Starting and stopping the sampling process from the program that measures.

>>> with Sampler(folder / "telemetry.arrow", t0_monotonic_s, devices=("GPU-...", "cpu")) as sampler:
...     measure()
>>> manifest["telemetry"] = sampler.stats
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

import bench
from bench.telemetry.source import CPU_DEVICE, Rates

_START_LIMIT_S = 30.0
_STOP_LIMIT_S = 10.0


class Sampler:
    """Samples ``devices`` into ``path`` in a process of its own while the ``with`` block runs.

    Telemetry never fails a measurement: where it cannot start, or dies, ``stats["error"]`` says why and the run goes on
    without it. The process ends with the ``with`` block, and by itself if this program is killed.

    Args:
        path: the Arrow file to write (created or overwritten).
        t0_monotonic_s: the run's origin on CLOCK_MONOTONIC (``time.monotonic()``); all ``t_s`` count from it.
        devices: UUIDs of the GPUs that the engine holds, and ``cpu`` for the host.
        source: ``auto``, or ``replay:FILE``.
        rates: how often each group of readings is taken.
        own_pids: processes that belong to the measurement; their descendants do too. This process always does.
        gpm: read the activity metrics of GPUs that have them (Hopper and newer); False leaves them to another profiler.

    After the block, ``stats`` holds what belongs into the manifest: rates, number of samples, the sampler's own CPU share,
    missed deadlines, jitter, clock pairs, facts of each device, and ``error`` (None if all went well).
    """

    def __init__(
        self,
        path: Path | str,
        t0_monotonic_s: float,
        *,
        devices: Sequence[str] = (CPU_DEVICE,),
        source: str = "auto",
        rates: Rates | None = None,
        own_pids: Sequence[int] = (),
        gpm: bool = True,
    ) -> None:
        self.path = Path(path)
        self.stats: dict[str, Any] = {"source": source, "devices": {}, "error": None}
        self._settings = {
            "path": str(self.path.absolute()),
            "t0_monotonic_s": t0_monotonic_s,
            "devices": list(devices),
            "source": source,
            "rates": asdict(rates or Rates()),
            "own_pids": [os.getpid(), *own_pids],
            "gpm": gpm,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = b""
        self._complaints: Any = None

    @property
    def error(self) -> str | None:
        """Why there is no telemetry, or None."""
        error: str | None = self.stats["error"]
        return error

    @property
    def pid(self) -> int | None:
        """The sampling process, while there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> Self:
        """Starts the process and waits until it samples. Sets :attr:`error` where it cannot."""
        self._complaints = tempfile.TemporaryFile()
        root = str(Path(bench.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # one thread: the math libraries that pyarrow and numpy bring would start one per core
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.telemetry.loop"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)},
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            self.stats["error"] = f"the sampler did not start: {exc}"
            self._end()
            return self
        answer = self._next_answer(_START_LIMIT_S)
        if not answer or "ready" not in answer:
            self.stats["error"] = (answer or {}).get("error") or f"the sampler did not start: {self._last_words()}"
            self._end()
        return self

    def stop(self) -> dict[str, Any]:
        """Ends the process, waits for it, and returns :attr:`stats`. Harmless when called twice."""
        if self._process is None:
            return self.stats
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        answer = self._next_answer(_STOP_LIMIT_S)
        if answer and "stats" in answer:
            self.stats.update(answer["stats"])
            if self.stats.get("write_error"):
                self.stats["error"] = f"telemetry could not be written in full: {self.stats['write_error']}"
        else:
            code = self._process.poll()
            why = f"it ended with code {code}" if code is not None else "it did not answer"
            self.stats["error"] = f"the sampler was lost: {why}; {self._last_words()}"
        self._end()
        return self.stats

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _next_answer(self, limit_s: float) -> dict[str, Any] | None:
        """The next JSON line from the process; None if it ends or the limit passes first."""
        assert self._process is not None and self._process.stdout is not None
        fd, until = self._process.stdout.fileno(), time.monotonic() + limit_s
        while b"\n" not in self._answers:
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            part = os.read(fd, 65536) if ready else b""
            if not part:
                return None
            self._answers += part
        line, self._answers = self._answers.split(b"\n", 1)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        return answer

    def _last_words(self) -> str:
        """The last line that the process wrote to standard error."""
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it gave no reason"

    def _end(self) -> None:
        """No process, no pipe is left behind."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            try:
                process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None
