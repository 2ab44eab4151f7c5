"""Runs a suite: lists its cases, feeds them to measuring processes, and keeps what they answer as it comes.

Nothing of torch is imported here. A case that crashes its process or outlives its limit is a failed case; the rest goes
on in a new process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.errors import BadInput, EngineUnavailable
from kernels.case import REFEREE, WEIGH, Case
from kernels.config import FAMILIES, SuiteConfig
from kernels.device import Device

#: Import of torch and creation of a CUDA context on a cold disk.
START_LIMIT_S = 180.0
#: A collective's ranks start on its first case; they have their own limit inside the child.
_GRACE_S = 75.0


def list_cases(suite: SuiteConfig, device_kind: str, only: tuple[str, ...] = ()) -> list[Case]:
    """Every case of the suite for this kind of device, each once. Raises BadInput for an unknown family in ``only``."""
    for family in only:
        if family not in FAMILIES:
            raise BadInput(
                f'no such family: "{family}"', where="--only", next_step=f"choose from {', '.join(FAMILIES)}"
            )
    found: dict[str, Case] = {}
    for family in FAMILIES:
        if only and family not in only:
            continue
        module = importlib.import_module(f"kernels.{family}")
        for group in suite.groups(family, device_kind):
            extra = [(tag, "yes") for tag in (WEIGH, REFEREE) if getattr(group, tag, False)]
            for case in module.cases(group):
                found.setdefault(case.case_id, replace(case, tags=tuple(sorted((*case.tags, *extra)))))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case and what the measuring process said of it (see ``docs/kernels.md``, samples.jsonl)."""

    case: Case
    answer: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """One line of samples.jsonl."""
        return {"case_id": self.case.case_id, **self.case.to_dict(), **self.answer}


@dataclass(slots=True)
class SuiteRun:
    """Everything that came back. ``interrupted`` when the user stopped it."""

    suite: SuiteConfig
    device: Device | None = None
    software: dict[str, Any] = field(default_factory=dict)
    results: list[CaseResult] = field(default_factory=list)
    wall_s: float = 0.0
    interrupted: bool = False


OnDevice = Callable[[Device], None]
OnResult = Callable[[CaseResult], None]


def run_suite(
    suite: SuiteConfig,
    wanted_device: str,
    cases_for: Callable[[Device], list[Case]],
    log_path: Path,
    on_device: OnDevice = lambda device: None,
    on_result: OnResult = lambda result: None,
) -> SuiteRun:
    """Run all cases. ``cases_for`` is asked once the device is known; ``log_path`` takes the children's stderr.

    KeyboardInterrupt ends the child and returns what is there. Raises BadInput when the device is not there and
    EngineUnavailable when no measuring process comes up (torch missing).
    """
    run = SuiteRun(suite)
    begin = time.monotonic()
    child = _Child(suite, wanted_device, log_path)
    try:
        run.device, run.software = child.device(START_LIMIT_S)
        on_device(run.device)
        left = cases_for(run.device)
        while left:
            left = left[_feed(child, left, run, on_result) :]
            child.close()
            if left:
                child = _Child(suite, wanted_device, log_path)
                child.device(START_LIMIT_S)
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        child.close()
    run.wall_s = time.monotonic() - begin
    return run


def _feed(child: _Child, cases: list[Case], run: SuiteRun, on_result: OnResult) -> int:
    """Give ``cases`` to one child; returns how many got a result (at least one, so the caller always gets on)."""

    def note(index: int, answer: dict[str, Any]) -> None:
        result = CaseResult(cases[index], answer)
        run.results.append(result)
        on_result(result)

    child.send({"cases": [c.to_dict() for c in cases]})
    done = 0
    while done < len(cases):
        limit = run.suite.case_limit_s + (_GRACE_S if cases[done].family == "collectives" else 0.0)
        line = child.read(limit)
        if line is None:
            note(done, {"status": "failed", "reason": child.why(limit)})
            return done + 1
        if line["event"] != "result":
            continue
        answer = {k: v for k, v in line.items() if k not in ("event", "index")}
        note(done, answer)
        done += 1
        if answer["status"] == "failed" and done < len(cases) and child.ended(5.0):
            return done  # it left on purpose, to be replaced
    return done


class _Child:
    """One measuring process, in a process group of its own, ended by :meth:`close` whatever it does."""

    def __init__(self, suite: SuiteConfig, device: str, log_path: Path) -> None:
        environment = dict(os.environ)
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH")) if p)
        # Ranks on one machine need no network.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if suite.triton_on_cpu == "interpret" and not device.startswith("cuda"):
            environment["TRITON_INTERPRET"] = "1"
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kernels.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._buffer = b""
        self.send(
            {
                "device": device,
                "plan": asdict(suite.timing.plan()),
                "seed": suite.seed,
                "energy_window_s": suite.energy.window_s,
                "case_limit_s": suite.case_limit_s,
            }
        )

    def send(self, message: dict[str, Any]) -> None:
        """One line to the process. That it is gone shows when its answer is read."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps(message).encode() + b"\n")
            self._in.flush()

    def device(self, limit_s: float) -> tuple[Device, dict[str, Any]]:
        """The first answer: the device and the software. Raises BadInput or EngineUnavailable."""
        line = self.read(limit_s)
        if line and line["event"] == "error":
            raise BadInput(line["what"], where=line["where"], next_step=line["next_step"])
        if line is None:
            raise EngineUnavailable(
                f"the measuring process did not start: {self.why(limit_s)}",
                next_step="is torch installed? pip install 'tokenyield[kernels]'",
            )
        return Device.from_dict(line["device"]), line["software"]

    def close(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        for stream in (self._in, self._out):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def read(self, limit_s: float) -> dict[str, Any] | None:
        """The next line, or None when the process ended or said nothing for ``limit_s``."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                return None
            part = self._out.read(65536)
            if not part:
                return None
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        parsed = json.loads(line)
        assert isinstance(parsed, dict)
        return parsed

    def ended(self, wait_s: float) -> bool:
        """Whether the process leaves within ``wait_s`` without another line (False as soon as it speaks)."""
        if self._buffer:
            return False
        ready = self._selector.select(wait_s)
        if not ready:
            return False
        part = self._out.read(65536)
        self._buffer += part or b""
        return not part

    def why(self, limit_s: float) -> str:
        """Why :meth:`read` gave None, with the end of the log."""
        try:
            status = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return f"no answer within {limit_s:.0f} s; the measuring process was ended"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the measuring process {how}; its log: {_log_tail(self._log_path)}"


def _log_tail(path: Path, num_lines: int = 3) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-num_lines:])[-300:] if lines else "(empty)"


def iterate_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a samples.jsonl; a torn last line (a kill while writing) is dropped."""
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
