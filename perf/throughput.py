"""Our offline tokens/s against vLLM's own `vllm bench throughput`: same engine arguments, same requests, one run.

Two engines are up at once, ours through `EngineProcess` with everything it records, vLLM's through its own benchmark code.
They serve the same requests in turns, and the one that waits is stopped (SIGSTOP), so both see the same machine within
seconds. The target is a ratio of at least 0.98, judged by the median of the pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.catalog.model import load_model, materialise
from bench.engines.host import EngineLaunch, EngineProcess
from bench.engines.processes import descendants, shared_memory_of
from bench.engines.vllm_setup import CPU_KV_CACHE_GIB
from bench.records import EngineStep, Request, Schedule

TARGET_RATIO = 0.98
START_LIMIT_S = 900.0
RUN_LIMIT_S = 600.0


class Sink:
    """Takes what a run folder's writer would take; steps are counted so that their cost is in the measurement."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.manifest: dict[str, Any] = {}

    def append_step(self, step: EngineStep) -> None:
        self.num_steps += 1

    def update_manifest(self, **values: Any) -> None:
        self.manifest.update(values)

    def append_chunk(self, chunk: Any) -> None: ...

    def append_chunk_columns(self, **columns: Any) -> None: ...

    def append_metric(self, metric: Any) -> None: ...

    def append_telemetry(self, sample: Any) -> None: ...


def build_requests(num: int, isl: int, osl: int, vocab_size: int, seed: int) -> tuple[Request, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        Request(index=i, osl=osl, isl=isl, prompt_token_ids=rng.integers(256, vocab_size, isl).astype(np.int32))
        for i in range(num)
    )


class Ours:
    def __init__(self, model: str, args: dict[str, Any], log: Path) -> None:
        self._engine = EngineProcess(EngineLaunch("vllm", model, "dummy", args), log)

    def start(self) -> None:
        self._engine.start(START_LIMIT_S)

    def pids(self) -> tuple[int, ...]:
        return self._engine.pids

    def run(self, requests: tuple[Request, ...]) -> float:
        """Output tokens per second, from submission to the last request's end."""
        sink = Sink()
        schedule = Schedule("offline", requests)
        records = list(
            self._engine.run(schedule, sink, time.monotonic(), run_limit_s=RUN_LIMIT_S, idle_limit_s=RUN_LIMIT_S)
        )
        assert sink.manifest["token_check"]["equal"] and sink.num_steps > 0 and len(records) == len(requests)
        begin_s = min(r.due_s for r in records if r.due_s is not None)
        end_s = max(r.done_s for r in records if r.done_s is not None)
        return sum(r.osl or 0 for r in records) / (end_s - begin_s)

    def stop(self) -> None:
        self._engine.stop()


class Theirs:
    def __init__(self, model: str, args: dict[str, Any], log: Path) -> None:
        read, write = os.pipe()
        options = ["--model", model, "--load-format", "dummy", "--skip-tokenizer-init"]
        for name, value in args.items():
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
        }
        self._log = log
        with open(log, "ab") as f:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perf.vllm_bench_throughput", str(write), *options],
                stdin=subprocess.PIPE,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(write,),
                start_new_session=True,
                text=True,
            )
        os.close(write)
        self._answers = os.fdopen(read)

    def start(self) -> None:
        self._answer()

    def pids(self) -> tuple[int, ...]:
        return (self._process.pid, *descendants(self._process.pid))

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise SystemExit("vllm bench throughput ended:\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, requests: tuple[Request, ...]) -> float:
        assert self._process.stdin is not None
        ids = [[r.prompt_token_ids.tolist(), r.osl] for r in requests if r.prompt_token_ids is not None]
        self._process.stdin.write(json.dumps({"requests": ids}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return float(answer["output_tokens"] / answer["elapsed_s"])

    def stop(self) -> None:
        pids = self.pids()
        shared = shared_memory_of(pids)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for path in shared:
            Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def waiting(side: Ours | Theirs) -> Iterator[None]:
    """Stop the processes of the side whose turn it is not."""
    pids = side.pids()
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)


def measure(num_pairs: int, num_requests: int, isl: int, osl: int, model_name: str, args: dict[str, Any]) -> Any:
    """[(ours, theirs)] in output tokens per second, in the order measured; which side goes first is drawn per pair."""
    arch = load_model(model_name)
    vocab_size = int(arch.vocab_size)
    with tempfile.TemporaryDirectory(prefix="tokenyield-perf-") as name:
        folder = Path(name)
        materialise(arch, folder / "model")
        sides: list[Ours | Theirs] = []
        try:
            ours = Ours(str(folder / "model"), args, folder / "ours.log")
            sides.append(ours)
            ours.start()
            theirs = Theirs(str(folder / "model"), args, folder / "theirs.log")
            sides.append(theirs)
            theirs.start()
            order = random.Random(0)
            pairs = []
            for k in range(-1, num_pairs):  # the first pair warms up
                requests = build_requests(num_requests, isl, osl, vocab_size, seed=1000 + k)
                result: dict[int, float] = {}
                for side in order.sample([0, 1], 2):
                    with waiting(sides[1 - side]):
                        result[side] = sides[side].run(requests)
                if k >= 0:
                    pairs.append((result[0], result[1]))
            return pairs
        finally:
            for side_to_end in sides:
                side_to_end.stop()


def interval(ratios: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.array(ratios), (4000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    """0: target met; 1: missed."""
    parser = argparse.ArgumentParser(prog="python -m perf.throughput", description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--model", default="tiny-llama", help="a name in configs/models/")
    parser.add_argument("--args", default='{"max_model_len": 512, "max_num_seqs": 64, "enforce_eager": true}')
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    a = parser.parse_args(argv)
    pairs = measure(a.pairs, a.requests, a.isl, a.osl, a.model, json.loads(a.args))
    ratios = [ours / theirs for ours, theirs in pairs]
    ratio, (low, high) = statistics.median(ratios), interval(ratios)
    ours, theirs = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    met = not math.isnan(ratio) and ratio >= TARGET_RATIO
    print(f"{a.model}, {a.requests} requests of {a.isl}/{a.osl} at once, {a.pairs} pairs, engine arguments {a.args}")
    print(f"tokenyield           {ours:>10,.1f} output tokens/s (median)")
    print(f"vllm bench throughput{theirs:>10,.1f} output tokens/s (median)")
    print(f"ratio {ratio:.4f} (95 % {low:.4f} to {high:.4f}); target >= {TARGET_RATIO}: {'met' if met else 'MISSED'}")
    if a.json:
        figures = {"ratio": ratio, "low": low, "high": high, "pairs": pairs, "met": met}
        Path(a.json).write_text(json.dumps(figures, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
