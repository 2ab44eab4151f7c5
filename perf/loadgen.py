"""Load generators side by side against one mock server: CPU, and the error of what they report.

    python -m perf.loadgen [--clients tokenyield,real-time,C,vllm,GuideLLM,AIPerf] [--out FILE] [--quick]

Each case is a closed loop: every stream makes two requests of 100 chunks, 20 ms between chunks. The truth is the mock's log
(the kernel's receive stamp of each request, the clock before each write). CPU is that of the client's whole process tree,
sampled from /proc, from the first request's arrival to the last write; for ours the parsing after the window is given
apart. Results are added to FILE by client, so that clients can be measured in separate calls on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.processes import descendants
from bench.load.mock import Delay, MockConfig, Truth, read_truth, running_mock
from bench.load.self_test import TimingError, machine_name, pacing_test
from perf.loadgen_clients import ALL, Case, Client, InC, Ours, OursRealTime, child_environment, named

CASES = ((64, False), (256, False), (1000, False), (1000, True))
NUM_CHUNKS, ITL_S, TTFT_S = 100, 0.02, 0.05
CASE_LIMIT_S = 120.0


class CpuMeter:
    """CPU seconds of a process tree over time: the scheduler's own count (ns) of every thread, every 5 ms (ours parses as
    soon as the last byte is there: a coarser look would count some of that). What a thread used before it ended is kept."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.times: list[float] = []
        self.used: list[float] = []
        self._last: dict[str, int] = {}
        self._gone = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        now: dict[str, int] = {}
        for pid in {self.pid, *descendants(self.pid)}:
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/schedstat", "rb") as f:
                        now[task] = int(f.read().split()[0])
            except OSError:
                continue
        self._gone += sum(v for p, v in self._last.items() if p not in now)
        self._last = now
        self.times.append(time.monotonic())
        self.used.append((self._gone + sum(now.values())) / 1e9)

    def _run(self) -> None:
        while not self._over.wait(0.005):
            self._look()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def between(self, start_s: float, end_s: float) -> float:
        a, b = np.interp([start_s, end_s], self.times, self.used)
        return float(b - a)

    def after(self, t_s: float) -> float:
        return float(self.used[-1] - np.interp(t_s, self.times, self.used)) if self.used else 0.0


def run_case(
    client: Client, num_streams: int, in_step: bool, num_requests: int, num_tokens: int, *, zero: bool
) -> dict[str, Any]:
    """One measurement. ``zero``: answers at once (the cost of a request)."""
    with tempfile.TemporaryDirectory(prefix="perf-loadgen-") as name:
        folder = Path(name)
        log = folder / "truth"
        timing = (Delay(0.0), Delay(0.0)) if zero else (Delay(TTFT_S), Delay(ITL_S))
        config = MockConfig(ttft=timing[0], itl=timing[1], in_step=in_step, log_path=str(log), head_early=not zero)
        with running_mock(config) as url:
            case = Case(url, num_streams, num_requests, num_tokens, folder)
            with open(folder / "output", "wb") as output:
                process = subprocess.Popen(
                    client.command(case),
                    env=child_environment(client),
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                meter = CpuMeter(process.pid)
                try:
                    process.wait(CASE_LIMIT_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                finally:
                    meter.stop()
        if process.returncode:
            text = (folder / "output").read_text(errors="replace")
            if os.environ.get("PERF_VERBOSE"):
                print(text[-6000:])
            tail = text.strip().splitlines()[-1:]
            return {"failed": f"exit status {process.returncode}: {' '.join(tail)[:300]}"}
        return evaluate(client, case, read_truth(log), meter)


def evaluate(client: Client, case: Case, truth: list[Truth], meter: CpuMeter) -> dict[str, Any]:
    """Errors against the log, and CPU per chunk and request."""
    by_id = {t.request_id: t for t in truth if len(t.writes_ns) > 1}
    reported = [r for r in client.results(case) if r.request_id in by_id]
    ttft = np.asarray([r.ttft_s - by_id[r.request_id].ttft_s for r in reported])
    e2e = np.asarray([r.e2e_s - by_id[r.request_id].e2e_s for r in reported])
    gaps = []
    for r in reported:
        true = np.diff(by_id[r.request_id].writes_ns[1:]) / 1e9
        # `vllm bench serve` reports one gap more: to the event that holds nothing but the finish reason.
        if len(r.itl_s) and len(r.itl_s) - len(true) in (0, 1):
            gaps.append(r.itl_s[: len(true)] - true)
    start = min(t.arrival_ns for t in by_id.values()) / 1e9
    end = max(int(t.writes_ns[-1]) for t in by_id.values()) / 1e9
    chunks = sum(len(t.writes_ns) - 1 for t in by_id.values())
    cpu = meter.between(start, end)
    return {
        "num_requests": len(by_id),
        "num_matched": len(reported),
        "wall_s": end - start,
        "cpu_us_per_chunk": cpu / chunks * 1e6,
        "cpu_us_per_request": cpu / len(by_id) * 1e6,
        "cpu_after_us_per_chunk": meter.after(end) / chunks * 1e6,
        "chunks_per_s": chunks / (end - start),
        "ttft": dataclasses.asdict(TimingError.of(ttft)),
        "itl": dataclasses.asdict(TimingError.of(np.concatenate(gaps) if gaps else np.zeros(0))),
        "e2e": dataclasses.asdict(TimingError.of(e2e)),
    }


def worst(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One case of several rounds: CPU by the median round (the single rounds stay beside it), errors by the worst."""
    failed = [f for f in found if "failed" in f]
    if failed:
        return failed[0]
    out = {k: float(np.median([f[k] for f in found])) for k in found[0] if isinstance(found[0][k], (int, float))}
    out |= {k: int(out[k]) for k in ("num_requests", "num_matched")}
    out["cpu_us_per_chunk_rounds"] = [f["cpu_us_per_chunk"] for f in found]
    for error in ("ttft", "itl", "e2e"):
        out[error] = {k: max((f[error][k] for f in found), key=abs) for k in found[0][error]}
    return out


def measure(clients: list[Client], cases: tuple[tuple[int, bool], ...], rounds: int, *, quick: bool) -> dict[str, Any]:
    """Every case of every client, by its name. In each round the clients take turns case by case, so that a machine whose
    speed drifts is no client's advantage."""
    out: dict[str, Any] = {}
    ready = []
    for client in clients:
        try:
            out[client.name] = {"version": client.prepare(), "cases": {}}
            ready.append(client)
        except (RuntimeError, OSError, subprocess.SubprocessError) as e:
            out[client.name] = {"skipped": str(e)}
    for num_streams, in_step in cases:
        label = f"{num_streams}{' in step' if in_step else ''}"
        found: dict[str, list[dict[str, Any]]] = {c.name: [] for c in ready}
        for k in range(rounds):
            for client in ready:
                if k < client.max_rounds:
                    chunks = 40 if quick else NUM_CHUNKS
                    case = run_case(client, num_streams, in_step, 2 * num_streams, chunks, zero=False)
                    found[client.name].append(case)
                    print(f"{client.name:24} {label:>12}: {line(case)}", flush=True)
        for name, rows in found.items():
            out[name]["cases"][label] = worst(rows)
    for client in ready:
        single = run_case(client, 8, False, client.num_single, 1, zero=True)
        out[client.name]["single"] = single
        print(
            f"{client.name:24} single: {single.get('cpu_us_per_request', float('nan')):.0f} us of CPU each", flush=True
        )
        out[client.name]["load_average"] = os.getloadavg()
    return out


def line(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"failed ({found['failed']})"
    t, i = found["ttft"], found["itl"]
    return (
        f"CPU {found['cpu_us_per_chunk']:7.1f} us/chunk   TTFT error p50 {t['p50_s'] * 1e6:9.1f}  p99 {t['p99_s'] * 1e6:11.1f} us"
        f"   ITL error p99 {i['p99_s'] * 1e6:9.1f} us   ({found['num_matched']}/{found['num_requests']} matched)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default=",".join(c.name.split()[0] for c in ALL))
    parser.add_argument("--streams", help="Only these cases, e.g. 64,1000,1000s (s: in step).")
    parser.add_argument("--out", type=Path, default=Path("results/perf/loadgen.json"))
    parser.add_argument(
        "--rounds", type=int, default=3, help="Of ours, C and the nearest peer; others are measured once."
    )
    parser.add_argument("--quick", action="store_true", help="40 chunks a request: a smoke test.")
    args = parser.parse_args()
    cases: tuple[tuple[int, bool], ...] = CASES
    if args.streams:
        cases = tuple((int(s.rstrip("s")), s.endswith("s")) for s in args.streams.split(","))
    data: dict[str, Any] = {"clients": {}}
    if args.out.exists():
        data = json.loads(args.out.read_text())
    data["machine"] = f"{machine_name().split(', ', 1)[1]}, Linux {'.'.join(platform.release().split('.')[:2])}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = measure(named(args.clients.split(",")), cases, args.rounds, quick=args.quick)
    for name, rows in found.items():
        old = data["clients"].get(name, {})
        if "cases" in old and "cases" in rows:
            rows["cases"] = {**old["cases"], **rows["cases"]}
        data["clients"][name] = rows
    if "tokenyield" in found and not args.streams:
        data["pacing"] = [dataclasses.asdict(pacing_test(r)) for r in (200.0, 1000.0)]
        print(f"open loop: {data['pacing']}", flush=True)
    args.out.write_text(json.dumps(data, indent=1))
    print(f"written: {args.out}")
    return verdict(data)


def rounds_of(found: dict[str, Any]) -> list[float]:
    """CPU per chunk of each round, us."""
    return list(found.get("cpu_us_per_chunk_rounds", [found["cpu_us_per_chunk"]]))


def verdict(data: dict[str, Any]) -> int:
    """The targets, judged on what is there. 1 when one is missed."""
    clients = data["clients"]
    ours, in_c = clients.get(Ours.name, {}), clients.get(InC.name, {})
    peers = [c for n, c in clients.items() if n not in (Ours.name, OursRealTime.name, InC.name) and "cases" in c]
    missed = 0

    def check(what: str, value: float, limit: float) -> None:
        nonlocal missed
        good = value <= limit
        missed += not good
        print(f"{'ok    ' if good else 'MISSED'} {what}: {value:.3g} (limit {limit:.3g})")

    for label, found in ours.get("cases", {}).items():
        if "failed" in found:
            missed += 1
            continue
        if label.startswith("1000"):
            check(f"TTFT error p99 at {label} streams, us", found["ttft"]["p99_s"] * 1e6, 100)
        check(f"ITL error p99 at {label} streams, us", found["itl"]["p99_s"] * 1e6, 100)
        c = in_c.get("cases", {}).get(label)
        if c and "failed" not in c:
            pairs = zip(rounds_of(found), rounds_of(c), strict=False)
            check(
                f"CPU per chunk / C at {label} (median round)",
                float(np.median([a / max(b, 1e-3) for a, b in pairs])),
                1.3,
            )
        theirs = [
            p["cases"][label]["cpu_us_per_chunk"] for p in peers if "cpu_us_per_chunk" in p["cases"].get(label, {})
        ]
        if theirs:
            check(f"CPU per chunk / best peer at {label}", found["cpu_us_per_chunk"] / min(theirs), 0.2)
    for p in data.get("pacing", []):
        if p["rate_per_s"] == 1000:
            check("lateness p99 at 1,000 requests/s, ms", p["lateness_p99_s"] * 1e3, 1.0)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
