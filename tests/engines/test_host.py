"""Engines in processes of their own: whatever ends them is one clear error, and nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.engines.host import EngineDied, EngineLaunch, EngineProcess, EngineStartFailed
from bench.engines.processes import process_table
from bench.errors import BadInput, EngineUnavailable, StoreError
from bench.records import Schedule, StopRule
from tests.engines.sinks import KeepingSink, some_requests

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
START_LIMIT_S = 60.0

MakeEngine = Callable[..., EngineProcess]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeEngine]:
    engines: list[EngineProcess] = []

    def build(**spec: Any) -> EngineProcess:
        env = spec.pop("env", {})
        launch = EngineLaunch("null", "no-model", env=env, spec={"kind": "null", **spec})
        engine = EngineProcess(launch, tmp_path / "engine.log")
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.stop()


def serve(engine: EngineProcess, schedule: Schedule, sink: KeepingSink | None = None, **limits: float) -> list[Any]:
    limits = {"run_limit_s": 60.0, "idle_limit_s": 30.0, **limits}
    return list(engine.run(schedule, sink or KeepingSink(), time.monotonic(), **limits))


def alive(pids: tuple[int, ...]) -> set[int]:
    return set(pids) & set(process_table())


def wait_until_gone(pids: tuple[int, ...], limit_s: float = 20.0) -> set[int]:
    deadline = time.monotonic() + limit_s
    while (left := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


CLOSED = Schedule("closed_loop", some_requests(24, num_warmup=4), None, 4)


def test_one_start_serves_every_kind_of_schedule(make: MakeEngine, tmp_path: Path) -> None:
    engine = make()
    info = engine.start(START_LIMIT_S)
    assert info.kind == "null" and info.start_s is not None and info.start_s > 0 and len(info.pids) == 2
    requests = some_requests(20, num_warmup=4)
    import numpy as np

    schedules = [
        CLOSED,
        Schedule("offline", requests, None, 4),
        Schedule("offline", requests, None, None),
        Schedule("open_loop", requests, np.linspace(0, 0.05, 20), None),
    ]
    for number, schedule in enumerate(schedules):
        engine.log_path = tmp_path / f"run-{number}.log"
        sink = KeepingSink()
        records = serve(engine, schedule, sink)
        assert sorted(r.index for r in records) == [r.index for r in schedule.requests]
        assert [r.phase for r in records[:4]] == ["warmup"] * 4
        assert all(r.error is None and r.osl == 4 for r in records)
        assert sink.manifest["stop_reason"] == "requests-used-up"
        assert engine.log_path.read_text().count("serving") == 1  # its own part of the log, no more
    engine.stop()
    engine.stop()
    assert engine.pids == () and not alive(info.pids)
    with pytest.raises(EngineUnavailable):
        serve(engine, CLOSED)


@pytest.mark.parametrize(
    ("fail", "reason", "words"),
    [
        ("crash", "crash", "SIGABRT"),
        ("oom", "out-of-memory", "out of memory"),
        ("hang", "hang", "no request completed"),
    ],
)
def test_an_engine_that_fails_in_a_run_says_why(make: MakeEngine, fail: str, reason: str, words: str) -> None:
    engine = make(fail=fail)
    pids = engine.start(START_LIMIT_S).pids
    with pytest.raises(EngineDied, match=words) as caught:
        # only a hang waits for the limit; on a busy machine a crash takes seconds to be seen as one
        serve(engine, CLOSED, idle_limit_s=1.0 if fail == "hang" else 60.0)
    assert caught.value.reason == reason
    assert "null.py" in caught.value.log_tail  # the stack is in the log
    assert "\n" not in str(caught.value)
    assert not alive(pids) and engine.pids == ()


def test_a_run_past_its_limit_is_ended(make: MakeEngine) -> None:
    engine = make(time_per_token_s=0.05)
    pids = engine.start(START_LIMIT_S).pids
    with pytest.raises(EngineDied, match="not over after 1 s") as caught:
        serve(engine, Schedule("closed_loop", some_requests(500), None, 2), run_limit_s=1.0)
    assert caught.value.reason == "time-limit" and not alive(pids)


def test_a_failed_start_says_why(make: MakeEngine) -> None:
    engine = make(fail="start")
    with pytest.raises(EngineStartFailed, match="asked to fail at its start; write") as caught:
        engine.start(START_LIMIT_S)
    assert isinstance(caught.value, EngineUnavailable) and caught.value.reason == "unavailable"
    assert "EngineUnavailable" in caught.value.log_tail and engine.pids == ()


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    engine = EngineProcess(EngineLaunch("nothing", "m"), tmp_path / "engine.log")
    with pytest.raises(EngineStartFailed, match='unknown engine kind "nothing"'):
        engine.start(START_LIMIT_S)


def test_failed_requests_are_records(make: MakeEngine) -> None:
    engine = make(fail="request")
    engine.start(START_LIMIT_S)
    records = serve(engine, CLOSED)
    errors = [r for r in records if r.error]
    assert {r.error for r in errors} == {"engine_error"} and len(errors) == 10  # every second of 20 measured
    assert all(r.phase == "measured" and r.osl is None for r in errors)


@pytest.mark.parametrize("which", ["engine", "guardian"])
def test_a_killed_child_is_reported_and_cleared_away(make: MakeEngine, which: str) -> None:
    engine = make(time_per_token_s=0.02)
    pids = engine.start(START_LIMIT_S).pids
    guardian = engine._process.pid  # type: ignore[union-attr]
    (inner,) = set(pids) - {guardian}
    records = engine.run(
        Schedule("closed_loop", some_requests(2000), None, 2),
        KeepingSink(),
        time.monotonic(),
        run_limit_s=60,
        idle_limit_s=30,
    )
    next(records)
    os.kill(inner if which == "engine" else guardian, signal.SIGKILL)
    with pytest.raises(EngineDied, match="killed") as caught:
        list(records)
    assert caught.value.reason == "killed" and not wait_until_gone(pids)


def test_a_sink_error_breaks_off_the_run_and_the_engine_serves_on(make: MakeEngine) -> None:
    engine = make()
    engine.start(START_LIMIT_S)
    full = KeepingSink(StoreError("cannot write: No space left on device", where="requests.jsonl"))
    with pytest.raises(StoreError, match="No space left"):
        serve(engine, CLOSED, full)
    assert len(serve(engine, CLOSED)) == 24


def test_a_closed_iterator_breaks_off_the_run(make: MakeEngine) -> None:
    engine = make(time_per_token_s=0.01)
    engine.start(START_LIMIT_S)
    records = engine.run(
        Schedule("closed_loop", some_requests(5000), None, 2),
        KeepingSink(),
        time.monotonic(),
        run_limit_s=600,
        idle_limit_s=30,
    )
    next(records)
    begin = time.monotonic()
    records.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 10
    assert len(serve(engine, CLOSED)) == 24


def test_a_maximum_duration_cuts_off_what_is_in_flight(make: MakeEngine) -> None:
    engine = make(time_per_token_s=0.02)
    engine.start(START_LIMIT_S)
    sink = KeepingSink()
    schedule = Schedule("closed_loop", some_requests(1000, num_warmup=2, osl=20), None, 4, StopRule(max_duration_s=0.5))
    records = serve(engine, schedule, sink)
    assert sink.manifest["stop_reason"] == "max-duration"
    assert [r.error for r in records].count("aborted") == 4
    assert len(records) < 1000


def test_a_wait_for_a_due_time_is_no_hang(make: MakeEngine) -> None:
    import numpy as np

    engine = make()
    engine.start(START_LIMIT_S)
    schedule = Schedule("open_loop", some_requests(2), np.array([0.0, 3.5]))
    assert len(serve(engine, schedule, idle_limit_s=2.0)) == 2


# A daemon of the engine's own that leaves its session, as some libraries start them; loaded by Python at its start
ESCAPING = """
import os
def escape():
    if os.environ.get("ESCAPED"):
        return
    os.environ["ESCAPED"] = "1"
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            os.execvp("sleep", ["sleep", "1000"])
        os._exit(0)
if os.environ.get("TOKENYIELD_ENGINE_ID"):
    os.register_at_fork(after_in_child=escape)
"""


def escaping_env(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ESCAPING)
    return {"PYTHONPATH": str(folder)}


def escaped(pids: tuple[int, ...]) -> set[int]:
    table = process_table()
    return {p for p in pids if p in table and table[p].session == p and table[p].ppid != os.getpid()}


def test_daemons_that_left_the_session_are_ended_too(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(env=escaping_env(tmp_path))
    engine.start(START_LIMIT_S)
    serve(engine, CLOSED)
    sleepers = tuple(p for p in engine.pids if "sleep" in Path(f"/proc/{p}/cmdline").read_text())
    assert len(sleepers) == 1
    engine.stop()
    assert not alive(sleepers)


TOOL = """
import sys, time
from pathlib import Path
from bench.engines.host import EngineLaunch, EngineProcess
from bench.records import Schedule
from tests.engines.sinks import KeepingSink, some_requests
engine = EngineProcess(EngineLaunch("null", "m", spec={{"kind": "null", "time_per_token_s": 0.02}}, env={env!r}), Path({log!r}))
engine.start(60)
records = engine.run(Schedule("closed_loop", some_requests(5000), None, 2), KeepingSink(), time.monotonic(),
                     run_limit_s=600, idle_limit_s=60)
next(records)
print(*engine.pids, flush=True)
for _ in records:
    pass
"""


@pytest.mark.parametrize("hung", [False, True])
def test_killing_the_tool_leaves_no_process(tmp_path: Path, hung: bool) -> None:
    code = textwrap.dedent(TOOL).format(env=escaping_env(tmp_path), log=str(tmp_path / "engine.log"))
    root = Path(__file__).resolve().parents[2]
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert tool.stdout is not None
    pids = tuple(int(p) for p in tool.stdout.readline().split())
    assert len(pids) == 3 and alive(pids) == set(pids)
    if hung:  # an engine that hears nothing any more must go too
        os.kill(pids[1], signal.SIGSTOP)
    tool.kill()
    tool.wait()
    assert not wait_until_gone(pids)


SHARING = """
import mmap, os
if os.environ.get("TOKENYIELD_ENGINE_ID"):
    fd = os.open("/dev/shm/psm_" + os.environ["TOKENYIELD_ENGINE_ID"], os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(fd, 4096)
    shared = mmap.mmap(fd, 4096)
    os.close(fd)
"""


def test_killing_the_tool_leaves_no_shared_memory(tmp_path: Path) -> None:
    """The engine ends by itself when the tool is gone, before anybody can look at what it has mapped."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs /dev/shm")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHARING)
    code = textwrap.dedent(TOOL).format(env={"PYTHONPATH": str(tmp_path / "site")}, log=str(tmp_path / "engine.log"))
    root = Path(__file__).resolve().parents[2]
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert tool.stdout is not None
    pids = tuple(int(p) for p in tool.stdout.readline().split())
    marker = Path(f"/proc/{pids[0]}/environ").read_text().partition("TOKENYIELD_ENGINE_ID=")[2].partition("\0")[0]
    shared = Path(f"/dev/shm/psm_{marker}")
    assert shared.is_file()
    os.kill(pids[0], signal.SIGSTOP)  # the guardian comes last, as on a busy machine
    tool.kill()
    tool.wait()
    assert not wait_until_gone(pids[1:])
    os.kill(pids[0], signal.SIGCONT)
    assert not wait_until_gone(pids) and not shared.exists()


def test_an_exception_in_the_engine_is_one_line(make: MakeEngine) -> None:
    engine = make()
    engine.start(START_LIMIT_S)
    impossible = Schedule("closed_loop", some_requests(4), None, 2)
    object.__setattr__(impossible, "stop", "not a rule")
    with pytest.raises(EngineDied, match="AttributeError"):
        serve(engine, impossible)


def test_errors_survive_pickling() -> None:
    import pickle

    error = EngineDied("it crashed", next_step="look", reason="crash", log_tail="a\nb")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.log_tail) == (str(error), "crash", "a\nb")
    assert not isinstance(error, BadInput)
