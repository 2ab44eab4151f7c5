"""How much CPU time does the HTTP front end of ``vllm serve`` take for a request, and for a chunk of its stream?

    python -m scripts.measure_front_end [--json FILE] [--log FILE]

Starts ``vllm serve`` with a model so small that the engine is no limit (one layer, random weights, a tokenizer trained on
this project's documentation), sends streaming completions at a concurrency of 8, all at once, short and long, as token ids
and as text, and reads the CPU time of the server's process from ``/proc/PID/task/*/schedstat``: its main thread, on
which the one event loop runs, and all its other threads together (tokenisation). Least squares then gives milliseconds of the
main thread per request, per prompt token and per chunk. Linux only; about two minutes on two cores; a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bench.engines.launch import EngineLaunch
from bench.engines.vllm_server import VllmServer
from bench.errors import BadInput, BenchError
from bench.load.driver import LoadOptions, drive
from bench.load.schedule import closed_loop
from bench.records import Request

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
    "max_position_embeddings": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARGS = {
    "max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "enforce_eager": True,
    "enable_prefix_caching": False,
}  # fmt: skip
VOCABULARY = 8000
#: Prompt length of which the fixed part of the regression is.
BASE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Load:
    """``num_requests`` of ``isl`` and ``osl`` tokens, ``concurrency`` at a time."""

    num_requests: int
    concurrency: int
    isl: int
    osl: int
    text: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """What one load took. Milliseconds of CPU are per request; seconds are the client's wall time."""

    load: Load
    main_thread_ms: float
    other_threads_ms: float
    chunks: float
    span_s: float
    ttft_min_s: float
    ttft_median_s: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of the main thread: of a request of 128 prompt tokens, of each further one, and of each chunk."""

    request_ms: float
    prompt_token_ms: float
    chunk_ms: float
    median_error: float


def loads() -> list[Load]:
    """Streams of 1, 4 and 32 tokens at a concurrency of 8 and all at once, and long prompts."""
    out = []
    for text in (False, True):
        out += [Load(150, 8, 128, osl, text) for osl in (1, 4, 32)]
        out += [Load(60, 8, isl, 4, text) for isl in (1024, 3000)]
        out += [Load(400, 400, 128, osl, text) for osl in (1, 4, 32)]
        out.append(Load(1000, 1000, 128, 4, text))
    return out


def regress(rows: list[Measured]) -> Costs:
    """Least squares of relative errors; raises BadInput when the rows cannot tell the parts apart."""
    matrix = np.array([[1.0, r.load.isl - BASE_TOKENS, r.chunks] for r in rows]).reshape(-1, 3)
    told = [k for k in range(3) if k == 0 or np.ptp(matrix[:, k]) > 0] if len(rows) else []
    if len(rows) <= len(told) or 2 not in told:
        raise BadInput("too few loads to tell requests and chunks apart", next_step="measure more output lengths")
    found = np.array([r.main_thread_ms for r in rows])
    parts = np.zeros(3)
    parts[told] = np.linalg.lstsq(matrix[:, told] / found[:, None], np.ones(len(rows)), rcond=None)[0]
    error = float(np.median(np.abs(matrix @ parts / found - 1.0)))
    return Costs(float(parts[0]), float(parts[1]), float(parts[2]), error)


def write_model(folder: Path) -> None:
    """A model's folder with a tokenizer, without weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    project = Path(__file__).resolve().parents[1]
    texts = [*project.glob("docs/*.md"), *project.glob("bench/**/*.py")]
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(path) for path in texts],
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    ).save_pretrained(folder)


def requests(load: Load, folder: Path, seed: int) -> tuple[Request, ...]:
    """Random prompts: ids, or the text that they decode to (which may encode to some tokens more or fewer)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(seed)
    out = []
    for index in range(load.num_requests):
        ids = rng.integers(10, VOCABULARY // 2, load.isl).astype(np.int32)
        prompt: dict[str, Any] = {"text": tokenizer.decode(ids.tolist())} if load.text else {"prompt_token_ids": ids}
        out.append(Request(index=index, osl=load.osl, isl=load.isl, **prompt))
    return tuple(out)


def cpu_s(pid: int) -> tuple[float, float]:
    """CPU seconds of the process so far: (main thread, all others)."""
    main = other = 0.0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        seconds = int(path.read_text().split()[0]) / 1e9
        if path.parent.name == str(pid):
            main += seconds
        else:
            other += seconds
    return main, other


def measure(server: VllmServer, load: Load, folder: Path, seed: int) -> Measured:
    assert server.target is not None and server.process is not None
    schedule = closed_loop(requests(load, folder, seed), load.concurrency)
    before = cpu_s(server.process.pid)
    result = drive(schedule, server.target, LoadOptions(exact_osl=True), t0_monotonic_s=time.monotonic())
    try:
        records = [r for r in result.records if r.error is None]
        time.sleep(0.3)  # the server closes a stream after its last byte
        after = cpu_s(server.process.pid)
    finally:
        result.close(keep_raw=False)
    if len(records) < load.num_requests:
        raise BenchError(f"{load.num_requests - len(records)} of {load.num_requests} requests failed")
    sent = np.array([r.sent_s for r in records], dtype=float)
    first = np.array([r.first_token_s for r in records], dtype=float)
    main_ms, other_ms = (1e3 * (b - a) / load.num_requests for a, b in zip(before, after, strict=True))
    return Measured(
        load, main_ms, other_ms, float(np.mean([r.num_chunks or 0 for r in records])),
        float(max(r.done_s for r in records if r.done_s is not None) - sent.min()), float((first - sent).min()),
        float(np.median(first - sent)),
    )  # fmt: skip


@contextlib.contextmanager
def server_writes_to(log: Path) -> Iterator[TextIO]:
    """Standard output and error go to ``log``, for a server inherits them; gives what the output was, for our own lines."""
    sys.stdout.flush()
    own = [os.dup(1), os.dup(2)]
    try:
        with open(log, "wb") as file, os.fdopen(os.dup(own[0]), "w") as out:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield out
    finally:
        for number, saved in enumerate(own, start=1):
            os.dup2(saved, number)
            os.close(saved)


def measure_all(log: Path) -> list[Measured]:
    """Start the server, send every load, stop the server."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="tokenyield-front-end-") as name, server_writes_to(log) as out:
        folder = Path(name)
        write_model(folder)
        with VllmServer(EngineLaunch("vllm_server", name, "dummy", dict(ARGS), load_kind="closed_loop")) as server:
            measure(server, Load(60, 8, 128, 8, True), folder, seed=0)  # warm-up
            for seed, load in enumerate(loads(), start=1):
                rows.append(measure(server, load, folder, seed))
                print(line(rows[-1]), file=out, flush=True)
    return rows


def line(m: Measured) -> str:
    x = m.load
    what = f"{x.num_requests:5d} of {x.isl}/{x.osl}, {x.concurrency} at a time, {'text' if x.text else 'ids'}"
    return (
        f"{what:42s} main thread {m.main_thread_ms:6.3f} ms, others {m.other_threads_ms:6.3f} ms, {m.chunks:5.1f} chunks,"
        f" {m.span_s:6.2f} s, TTFT from {1e3 * m.ttft_min_s:6.1f} ms, median {1e3 * m.ttft_median_s:7.1f}"
    )


def report(rows: list[Measured]) -> dict[str, Costs]:
    """Print and give back the costs by kind of prompt and load."""
    found = {}
    for text in (False, True):
        for at_once in (False, True):
            mine = [r for r in rows if r.load.text == text and (r.load.concurrency >= r.load.num_requests) == at_once]
            name = f"{'text' if text else 'ids'}, {'all at once' if at_once else '8 at a time'}"
            c = found[name] = regress(mine)
            print(
                f"{name:18s} {c.request_ms:.3f} ms a request, {1e3 * c.prompt_token_ms:.2f} us a further prompt token,"
                f" {c.chunk_ms:.3f} ms a chunk (median error {c.median_error:.1%})"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the CPU time of vLLM's HTTP front end.")
    parser.add_argument("--json", type=Path, help="write loads and costs here")
    parser.add_argument("--log", type=Path, default=Path("front-end-server.log"), help="what the server says goes here")
    arguments = parser.parse_args()
    try:
        rows = measure_all(arguments.log)
        costs = report(rows)
    except BenchError as e:
        print(f"measure_front_end: {e}", file=sys.stderr)
        return e.exit_code
    if arguments.json:
        data = {
            "loads": [dataclasses.asdict(r) for r in rows],
            "costs": {k: dataclasses.asdict(v) for k, v in costs.items()},
        }
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
