"""A small experiment on the null engine, and `bench` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

EXPERIMENT = """
name: kills
why: to see what a kill leaves behind
model: tiny-llama
weights: dummy
engine: {{kind: "null", time_per_token_s: 0.002, fail: {fail}}}
load: {{kind: closed_loop}}
workload: {{isl: 16, osl: 10}}
warmup: {{num_requests: 2}}
stop: {{min_requests: {requests}, max_errors: {max_errors}}}
repeats: {repeats}
limits: {{engine_start_s: 60, run_s: 60, idle_s: {idle_s}}}
telemetry: {{source: {telemetry}}}
sweep: {{grid: {{concurrency: [1, 2], osl: {osl}}}}}
"""


class Tool:
    """`bench` run as users run it, with everything it starts marked so that leftovers can be found."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"mark-{uuid.uuid4().hex}"
        self.results = folder / "results"
        self.experiment = folder / "kills.yaml"
        self.write()

    def write(
        self, *, fail: str = "none", repeats: int = 2, osl: str = "[5, 10]", requests: int = 12, idle_s: float = 30,
        telemetry: str = "auto", max_errors: str = "null",
    ) -> None:  # fmt: skip
        text = EXPERIMENT.format(
            fail=fail,
            repeats=repeats,
            osl=osl,
            requests=requests,
            idle_s=idle_s,
            telemetry=telemetry,
            max_errors=max_errors,
        )
        self.experiment.write_text(text)

    def start(self, *args: str, results: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bench", "run", str(self.experiment), "--plain", "--no-report"]
        command += ["--results", str(results or self.results), *args]
        env = {**os.environ, "TOKENYIELD_TEST_MARK": self.mark}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def run(self, *args: str, results: Path | None = None) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, results=results)
        out, err = process.communicate(timeout=300)  # half a minute where nothing else runs
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def leftovers(self, wait_s: float = 15.0) -> list[str]:
        """Processes of ours that are still there after at most ``wait_s``."""
        until = time.monotonic() + wait_s
        while (found := self._marked()) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _marked(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TOKENYIELD_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found

    def children(self, text: str) -> list[psutil.Process]:
        """Living processes of ours whose command line contains ``text``."""
        out = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("TOKENYIELD_TEST_MARK") == self.mark
                if mine and text in " ".join(process.cmdline()) and process.status() != "zombie":
                    out.append(process)
            except psutil.Error:
                continue
        return out

    def wait_for(self, text: str, limit_s: float = 30.0) -> psutil.Process:
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            if found := self.children(text):
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no process with {text!r} within {limit_s} s")


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[Tool]:
    made = Tool(tmp_path)
    yield made
    for process in made.children(""):
        process.kill()
