"""What this client can do on this machine, measured against the mock: capacity, timing error, pacing.

The truth is the mock's log: the kernel's receive stamp of each request and the clock just before each write. The client's
capacity is stated as chunks per second of one process at one chunk a read: the inverse of its CPU time per chunk.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import __version__
from bench.load import schedule as schedules
from bench.load.driver import LoadOptions, LoadResult, drive
from bench.load.mock import Delay, MockConfig, Truth, read_truth, running_mock
from bench.load.target import Target
from bench.records import Request, Schedule

_PROMPT = np.arange(300, 316, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class TimingError:
    """Reported minus true time, absolute, in seconds."""

    p50_s: float
    p99_s: float
    max_s: float
    num: int

    @classmethod
    def of(cls, errors_s: np.ndarray) -> TimingError:
        size = np.abs(errors_s)
        if len(size) == 0:
            return cls(float("nan"), float("nan"), float("nan"), 0)
        p50, p99 = np.percentile(size, [50, 99])
        return cls(float(p50), float(p99), float(size.max()), len(size))


@dataclass(frozen=True, slots=True)
class StreamTest:
    """A closed loop of ``num_streams`` streams against the mock."""

    num_streams: int
    in_step: bool
    ttft: TimingError
    itl: TimingError
    e2e: TimingError
    cpu_us_per_chunk: float
    chunks_per_read: float
    chunks_per_s: float
    num_failed: int
    stamps: str
    receive_path: str


@dataclass(frozen=True, slots=True)
class PacingTest:
    """An open loop at ``rate_per_s``: how late requests were sent."""

    rate_per_s: float
    lateness_p50_s: float
    lateness_p99_s: float
    lateness_max_s: float
    num: int


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Everything that the self-test measured."""

    version: str
    machine: str
    measured_unix_s: float
    capacity_chunks_per_s: float
    capacity_requests_per_s: float
    streams: tuple[StreamTest, ...]
    pacing: tuple[PacingTest, ...]
    receive_path: str
    event_loop_chunks_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _requests(n: int, osl: int) -> list[Request]:
    return [Request(index=i, osl=osl, isl=len(_PROMPT), prompt_token_ids=_PROMPT) for i in range(n)]


def errors_against_truth(result: LoadResult, truth: Sequence[Truth]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(TTFT, ITL, E2E) errors in seconds: what the client reports minus what the mock logged. ITL pairs a stream's gaps
    with the mock's only where every chunk was one read."""
    by_id = {t.request_id: t for t in truth}
    good = [r for r in result.records if r.error is None and r.index in by_id]
    ttft, e2e = [], []
    for r in good:
        t = by_id[r.index]
        assert r.first_token_s is not None and r.sent_s is not None and r.done_s is not None
        ttft.append(r.first_token_s - r.sent_s - t.ttft_s)
        e2e.append(r.done_s - r.sent_s - t.e2e_s)
    itl = []
    for block in result.chunk_blocks():
        order = np.argsort(block["index"], kind="stable")
        index, times = block["index"][order], block["t_s"][order]
        found, starts = np.unique(index, return_index=True)
        for i, part in zip(found.tolist(), np.split(times, starts[1:]), strict=True):
            match = by_id.get(i)
            if match is not None and len(match.writes_ns) - 1 == len(part):
                itl.append(np.diff(part) - np.diff(match.writes_ns[1:]) / 1e9)
    return np.asarray(ttft), np.concatenate(itl) if itl else np.zeros(0), np.asarray(e2e)


def _drive(config: MockConfig, schedule: Schedule, options: LoadOptions) -> tuple[LoadResult, list[Truth]]:
    with tempfile.TemporaryDirectory(prefix="tokenyield-selftest-") as folder:
        log = os.path.join(folder, "truth")
        with running_mock(replace(config, log_path=log)) as url:
            result = drive(schedule, Target(url, model="mock"), options)
        return result, read_truth(log)


def stream_test(
    num_streams: int,
    *,
    in_step: bool = False,
    num_chunks: int = 100,
    itl_s: float = 0.02,
    options: LoadOptions | None = None,
) -> StreamTest:
    """Two requests for each stream, of ``num_chunks`` chunks at ``itl_s``."""
    config = MockConfig(ttft=Delay(0.05), itl=Delay(itl_s), in_step=in_step)
    schedule = schedules.closed_loop(_requests(2 * num_streams, num_chunks), num_streams)
    result, truth = _drive(config, schedule, options or LoadOptions(exact_osl=True, receive_path="compiled"))
    try:
        ttft, itl, e2e = errors_against_truth(result, truth)
        h = result.honesty
        return StreamTest(
            num_streams,
            in_step,
            TimingError.of(ttft),
            TimingError.of(itl),
            TimingError.of(e2e),
            h.cpu_us_per_chunk or float("nan"),
            h.chunks_per_read or float("nan"),
            h.chunks_per_s or float("nan"),
            sum(r.error is not None for r in result.records),
            h.stamps,
            h.receive_path,
        )
    finally:
        result.close()


def pacing_test(rate_per_s: float, duration_s: float = 5.0, options: LoadOptions | None = None) -> PacingTest:
    """Constant arrivals of short requests."""
    n = round(rate_per_s * duration_s)
    config = MockConfig(ttft=Delay(0.002), itl=Delay(0.0))
    schedule = schedules.open_loop(_requests(n, 2), rate_per_s, arrivals="constant")
    result, _ = _drive(config, schedule, options or LoadOptions())
    try:
        late = result.honesty.send_lateness
        p50, p99, most = (float("nan") if v is None else v for v in (late.p50_s, late.p99_s, late.max_s))
        return PacingTest(rate_per_s, p50, p99, most, late.num)
    finally:
        result.close()


def request_cost_s(num_streams: int = 8, n: int = 2000) -> float:
    """CPU seconds of the client for one request of a single chunk, answered at once."""
    config = MockConfig(ttft=Delay(0.0), itl=Delay(0.0), head_early=False)
    result, _ = _drive(config, schedules.closed_loop(_requests(n, 1), num_streams), LoadOptions())
    try:
        return (result.honesty.cpu_us_per_chunk or float("nan")) / 1e6
    finally:
        result.close()


def machine_name() -> str:
    """What a stored capacity holds for: host, processor, cores, interpreter."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    return f"{platform.node()}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def run_self_test(say: Callable[[str], None] = lambda _: None, *, quick: bool = False) -> SelfTest:
    """Measure (about half a minute; ``quick``: 4 s, capacity alone) and remember the result for this machine."""
    sizes = [(64, False)] if quick else [(64, False), (256, False), (1000, False), (1000, True)]
    streams = []
    for n, in_step in sizes:
        say(f"{n} streams at 20 ms between tokens{', all in step' if in_step else ''}")
        streams.append(stream_test(n, in_step=in_step, num_chunks=60 if quick else 100))
    pacing = []
    for rate in [] if quick else [200.0, 1000.0]:
        say(f"{rate:g} requests/s, constant")
        pacing.append(pacing_test(rate))
    say("single requests")
    cost = request_cost_s(n=500 if quick else 2000)
    best = min(s.cpu_us_per_chunk for s in streams)
    say("64 streams on the event loop's path (TLS, short runs)")
    plain = stream_test(64, num_chunks=30, options=LoadOptions(exact_osl=True, receive_path="event_loop"))
    result = SelfTest(
        __version__,
        machine_name(),
        time.time(),
        1e6 / best,
        1 / cost,
        tuple(streams),
        tuple(pacing),
        streams[0].receive_path,
        1e6 / plain.cpu_us_per_chunk,
    )
    _remember(result)
    return result


def _store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tokenyield" / "client-capacity.json"


def _remember(result: SelfTest) -> None:
    path = _store()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result.to_dict()))
    except OSError:
        pass  # no home folder: the capacity is measured again next time


def known_capacity() -> tuple[dict[str, float], str] | None:
    """(receive path -> chunks/s of one process, where from) as measured earlier on this machine with this version;
    None: never."""
    try:
        data = json.loads(_store().read_text())
        if data["machine"] != machine_name() or data["version"] != __version__:
            return None
        when = time.strftime("%Y-%m-%d", time.gmtime(data["measured_unix_s"]))
        return _by_path(data), f"self-test of {when} on this machine"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_path(data: dict[str, Any]) -> dict[str, float]:
    found = {"event loop": float(data["event_loop_chunks_per_s"])}
    if data["receive_path"] == "compiled":
        found["compiled"] = float(data["capacity_chunks_per_s"])
    return found


def capacity() -> tuple[dict[str, float], str]:
    """The known capacity, else a quick measurement of it."""
    known = known_capacity()
    if known is not None:
        return known
    result = run_self_test(quick=True)
    return _by_path(result.to_dict()), "quick self-test before this run"
