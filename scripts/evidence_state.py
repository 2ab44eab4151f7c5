"""The state of an evidence programme on disk, and how it calls ``bench``."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bench.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from scripts import evidence_results as measured
from scripts.evidence_parts import Part, Programme

ROOT = Path(__file__).resolve().parents[1]
STATE = "state.json"
SCHEMA_VERSION = 1
#: Weights are random and every prompt is token ids: nothing is fetched, so nothing may try to.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def utc() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class PartFailed(Exception):
    """A part cannot be completed; the text says why and stands in the state file."""


class OutOfTime(Exception):
    """This call's time (``--stop-after``) is over; what was measured is kept, and the next call continues."""


def refuse(text: str) -> NoReturn:
    """End with one line for the user and the exit code of bad input."""
    print(text, file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


@dataclass(slots=True)
class Evidence:
    """One programme in one folder, with its state on disk."""

    plan: Programme
    folder: Path
    budget_s: float
    stop_at: float = (
        math.inf
    )  # time.monotonic() at which whatever runs is interrupted, to be continued by the next call
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.folder / STATE
        if file.exists():
            self.state = json.loads(file.read_text())
            if self.state.get("programme") != self.plan.name:
                refuse(f"{self.folder} holds the programme {self.state.get('programme')}; give another --out")
        else:
            self.state = {
                "schema_version": SCHEMA_VERSION,
                "programme": self.plan.name,
                "parts": {},
                "started_utc": utc(),
            }

    def save(self) -> None:
        """Write the state atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / (STATE + ".part")
        part.write_text(json.dumps(self.state, indent=1) + "\n")
        os.replace(part, self.folder / STATE)

    def status(self, name: str) -> str:
        """``missing``, ``complete``, ``partial`` (some runs failed), ``failed`` or ``not possible here``."""
        return str(self.state["parts"].get(name, {}).get("status", "missing"))

    def is_done(self, part: Part) -> bool:
        """Whether a part is complete, and not made from something that has changed since."""
        if self.status(part.name) != "complete":
            return False
        order = {name: entry.get("order", 0) for name, entry in self.state["parts"].items()}
        before = self.plan.parts[: self.plan.parts.index(part)]
        return not part.derived or all(order.get(p.name, 0) < order[part.name] for p in before)

    def learned(self, experiment: str) -> dict[str, str]:
        """Which axes a cell of ``experiment`` must have for calibration to have seen it (impossible ones: none did)."""
        return self.plan.learn_only if experiment == self.plan.offline[0] else {"": "never"}

    @property
    def results(self) -> Path:
        """Where the runs go."""
        return self.folder / "results"

    @property
    def kernels(self) -> Path | None:
        """The newest complete result of ``bench kernels``; where a report of these results looks for it."""
        found = [p.parent for p in self.results.glob("kernels/*/*/summary.json") if measured.is_complete(p)]
        return max(found, key=lambda p: p.name, default=None)

    @property
    def gpu_used_s(self) -> float:
        """GPU time of all parts so far, failed tries included."""
        return sum(p.get("gpu_used_s", 0.0) for p in self.state["parts"].values())

    @property
    def gpu(self) -> str | None:
        """The catalogue's name of the device, once the kernels have been measured; None when it is not in there."""
        return measured.hardware_of(self.kernels) if self.kernels else None


def bench(evidence: Evidence, name: str, argv: list[str], limit_s: float, output: Path | None = None) -> int:
    """``bench ARGV`` in a process group of its own, its output in logs/NAME.log (stdout in ``output`` if given).

    Past its limit it gets an interrupt, which ends engines cleanly, and is killed half a minute later. Raises PartFailed
    then, OutOfTime at the end of this call's time, and KeyboardInterrupt when the command says that it was interrupted; a
    user's interrupt is passed on the same way. Should this process be killed, the kernel interrupts the command.
    """
    logs = evidence.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench", *argv]
    environment = {**OFFLINE, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), environment.get("PYTHONPATH")) if p)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((logs / f"{name}.log").open("ab"))
        log.write(f"$ bench {' '.join(argv)}\n".encode())
        log.flush()
        out: Any = stack.enter_context(output.open("wb")) if output else log
        process = subprocess.Popen(
            command,
            cwd=Path.cwd(),
            env=environment,
            stdout=out,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_as_child_of(os.getpid()),
        )
        left_s = evidence.stop_at - time.monotonic()
        try:
            code = process.wait(max(0.0, min(limit_s, left_s)))
        except subprocess.TimeoutExpired:
            if left_s < limit_s:
                raise OutOfTime from None
            raise PartFailed(f"not finished after {limit_s:.0f} s; the same command continues it") from None
        finally:
            _end(process)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _as_child_of(parent: int) -> Callable[[], None]:
    """What a command does before it starts: hear interrupts, whatever started us, and be interrupted when we are killed."""
    from bench.engines.processes import signal_on_parent_death

    def before_exec() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to it
        if sys.platform.startswith("linux"):
            signal_on_parent_death(signal.SIGINT, parent)

    return before_exec


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign, wait_s in ((signal.SIGINT, 30.0), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: kill it now
                process.wait(wait_s)
