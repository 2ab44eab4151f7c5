"""The clients that are compared: how each is started, and what it says of each request.

Every client gives back a list of :class:`Reported`, matched with the mock's log by the request number that the mock puts
into the first token (or by the request id that the client sent).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.load.mock import hashed_id

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".perf"
_NUMBER = re.compile(r"#(\d+)")


@dataclass(frozen=True, slots=True)
class Reported:
    """One request as a client reports it (seconds). ``itl_s`` empty: the client does not report gaps."""

    request_id: int
    ttft_s: float
    e2e_s: float
    itl_s: np.ndarray


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: a closed loop. ``url`` is the mock's."""

    url: str
    num_streams: int
    num_requests: int
    num_tokens: int
    folder: Path


class Client:
    """A load generator. ``skip_reason`` is set when it cannot be had here."""

    name = ""
    max_rounds = 1  # how often a case is measured at most
    num_single = 400  # requests of a single token that its cost per request is taken from

    def prepare(self) -> str:
        """Install what is needed; the version. Raises RuntimeError with the reason to skip it."""
        raise NotImplementedError

    def command(self, case: Case) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def results(self, case: Case) -> list[Reported]:
        raise NotImplementedError


class Ours(Client):
    """At ordinary priority, as the others run."""

    name = "tokenyield"
    max_rounds = 3
    num_single = 8000
    real_time = False

    def prepare(self) -> str:
        import bench

        return bench.__version__

    def command(self, case: Case) -> list[str]:
        code = (
            "import sys, json, numpy as np\n"
            "from bench.load.driver import drive, LoadOptions\n"
            "from bench.load.schedule import closed_loop\n"
            "from bench.load.target import Target\n"
            "from bench.records import Request\n"
            "url, streams, n, osl, out = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]\n"
            "ids = np.arange(300, 316, dtype=np.int32)\n"
            "rs = [Request(index=i, osl=osl, isl=16, prompt_token_ids=ids) for i in range(n)]\n"
            f"r = drive(closed_loop(rs, streams), Target(url, model='mock'), LoadOptions(real_time={self.real_time}))\n"
            "b = list(r.chunk_blocks())\n"
            "np.savez(out + '/chunks.npz', **{k: np.concatenate([x[k] for x in b]) for k in b[0]})\n"
            "open(out + '/records.json', 'w').write(json.dumps([x.to_dict() for x in r.records]))\n"
            "open(out + '/honesty.json', 'w').write(json.dumps(r.honesty.to_dict()))\n"
            "r.close()\n"
        )
        numbers = (case.num_streams, case.num_requests, case.num_tokens)
        return [sys.executable, "-c", code, case.url, *map(str, numbers), str(case.folder)]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT)}

    def results(self, case: Case) -> list[Reported]:
        records = json.loads((case.folder / "records.json").read_text())
        with np.load(case.folder / "chunks.npz") as data:
            index, times = data["index"], data["t_s"]
        order = np.argsort(index, kind="stable")
        found, starts = np.unique(index[order], return_index=True)
        gaps = {i: np.diff(p) for i, p in zip(found.tolist(), np.split(times[order], starts[1:]), strict=True)}
        return [
            Reported(r["index"], r["first_token_s"] - r["sent_s"], r["done_s"] - r["sent_s"], gaps[r["index"]])
            for r in records
            if "error" not in r
        ]


class OursRealTime(Ours):
    """As it runs against a server on its own machine, where the kernel allows it: sooner, at some more CPU a chunk."""

    name = "real-time tokenyield"
    real_time = True


class InC(Client):
    name = "C (epoll)"
    max_rounds = 3
    num_single = 8000

    def prepare(self) -> str:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("no C compiler")
        ENVIRONMENTS.mkdir(exist_ok=True)
        source = Path(__file__).with_name("c_client.c")
        subprocess.run([compiler, "-O2", "-o", ENVIRONMENTS / "c_client", source], check=True)
        return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]

    def command(self, case: Case) -> list[str]:
        port = case.url.rsplit(":", 1)[1]
        numbers = (case.num_streams, case.num_requests, case.num_tokens)
        return [str(ENVIRONMENTS / "c_client"), port, *map(str, numbers), str(case.folder / "out.bin")]

    def results(self, case: Case) -> list[Reported]:
        data, at, out = (case.folder / "out.bin").read_bytes(), 0, []
        while at < len(data):
            request, sent, n = struct.unpack_from("<3q", data, at)
            stamps = np.frombuffer(data, dtype="<i8", count=n, offset=at + 24)
            at += 24 + 8 * n
            # The first read is the response's head, when it came by itself.
            first = 1 if n == case.num_tokens + 1 else 0
            out.append(
                Reported(
                    request, (stamps[first] - sent) / 1e9, (stamps[-1] - sent) / 1e9, np.diff(stamps[first:]) / 1e9
                )
            )
        return out


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes: peers need one to make prompts, and this one needs no download."""
    path = folder / "tokenizer"
    if path.exists():
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<eos>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "model_max_length": 4096}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def make_hub_cache(folder: Path) -> Path:
    """The same tokenizer as an entry of a hub cache, for tools that take none from a folder while offline."""
    home = folder / "hub-home"
    entry = home / "hub" / "models--perf--bytes"
    snapshot = entry / "snapshots" / ("0" * 40)
    if not snapshot.exists():
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text("0" * 40)
        shutil.copytree(make_tokenizer(folder), snapshot)
        (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    return home


class VllmBench(Client):
    name = "vllm bench serve"
    max_rounds = 3

    def prepare(self) -> str:
        from bench.engines.vllm_versions import installed_version

        version = installed_version()
        if version is None:
            raise RuntimeError("vLLM is not installed")
        make_tokenizer(ENVIRONMENTS)
        return version

    def command(self, case: Case) -> list[str]:
        # Its own command line refuses to start where the distribution is not named vllm; this is what it runs.
        code = (
            "import asyncio\n"
            "from vllm.benchmarks.serve import add_cli_args, main_async\n"
            "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
            "p = FlexibleArgumentParser(); add_cli_args(p); asyncio.run(main_async(p.parse_args()))\n"
        )
        options = {
            "--backend": "openai", "--base-url": case.url, "--endpoint": "/v1/completions", "--model": "mock",
            "--tokenizer": str(ENVIRONMENTS / "tokenizer"), "--dataset-name": "random", "--random-input-len": "16",
            "--random-output-len": str(case.num_tokens), "--num-prompts": str(case.num_requests),
            "--max-concurrency": str(case.num_streams), "--result-dir": str(case.folder),
            "--result-filename": "result.json", "--ready-check-timeout-sec": "0",
        }  # fmt: skip
        flags = ["--save-result", "--save-detailed", "--disable-tqdm", "--ignore-eos"]
        return [sys.executable, "-c", code, *(x for pair in options.items() for x in pair), *flags]

    def environment(self) -> dict[str, str]:
        return {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

    def results(self, case: Case) -> list[Reported]:
        data = json.loads((case.folder / "result.json").read_text())
        out = []
        for text, ttft, itl in zip(data["generated_texts"], data["ttfts"], data["itls"], strict=True):
            found = _NUMBER.search(text or "")
            if found:
                gaps = np.asarray(itl)
                out.append(Reported(int(found[1]), ttft, ttft + float(gaps.sum()), gaps))
        return out


def _install(name: str, package: str) -> Path:
    """A virtual environment of its own below .perf/. Raises RuntimeError when it cannot be made."""
    home = ENVIRONMENTS / name
    if not (home / "bin" / name).exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        done = subprocess.run([home / "bin" / "pip", "install", "-q", package], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            raise RuntimeError(f"cannot install {package}: {lines[-1]}")
    return home


def _version(home: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version('{package}'))"
    return subprocess.run([home / "bin" / "python", "-c", code], capture_output=True, text=True).stdout.strip()


class GuideLlm(Client):
    name = "GuideLLM"

    def prepare(self) -> str:
        self.home = _install("guidellm", "guidellm==0.8.1")
        make_tokenizer(ENVIRONMENTS)
        return _version(self.home, "guidellm")

    def command(self, case: Case) -> list[str]:
        return [
            str(self.home / "bin" / "guidellm"), "run",
            "--backend", f"kind=openai_http,target={case.url},model=mock,request_format=/v1/completions",
            "--profile", f"kind=concurrent,streams={case.num_streams}",
            "--constraint", f"kind=max_requests,count={case.num_requests}",
            "--tokenizer", f"kind=huggingface_auto,model={ENVIRONMENTS / 'tokenizer'}",
            "--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={case.num_tokens}",
            "--output", f"kind=json,path={case.folder / 'out.json'}",
            "--disable-console",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", "GUIDELLM__LOGGING__DISABLED": "true"}

    def results(self, case: Case) -> list[Reported]:
        data = json.loads((case.folder / "out.json").read_text())
        out = []
        for r in data["benchmarks"][0]["requests"]["successful"]:
            found = _NUMBER.search(r.get("output") or "")
            t = r["info"]["timings"]
            first = t.get("first_token_iteration") or t.get("first_iteration")
            if found and first:
                out.append(
                    Reported(
                        int(found[1]), first - t["request_start"], t["request_end"] - t["request_start"], np.zeros(0)
                    )
                )
        return out


class AiPerf(Client):
    name = "AIPerf"

    def prepare(self) -> str:
        self.home = _install("aiperf", "aiperf==0.13.0")
        make_hub_cache(ENVIRONMENTS)
        return _version(self.home, "aiperf")

    def command(self, case: Case) -> list[str]:
        return [
            str(self.home / "bin" / "aiperf"), "profile", "--model", "mock", "--url", case.url,
            "--endpoint-type", "completions", "--streaming", "--concurrency", str(case.num_streams),
            "--request-count", str(case.num_requests), "--tokenizer", "perf/bytes",
            "--isl", "16", "--isl-stddev", "0", "--osl", str(case.num_tokens), "--extra-inputs", "ignore_eos:true",
            "--output-artifact-dir", str(case.folder), "--ui", "none", "--no-server-metrics", "--no-gpu-telemetry",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(ENVIRONMENTS / "hub-home")}

    def results(self, case: Case) -> list[Reported]:
        out = []
        for path in case.folder.rglob("profile_export.jsonl"):
            for line in path.read_text().splitlines():
                r = json.loads(line)
                meta, metrics = r["metadata"], r["metrics"]
                if r.get("error") or "time_to_first_token" not in metrics:
                    continue
                name = meta.get("x_request_id") or meta.get("request_id") or ""
                number = int(name) if name.isdigit() else hashed_id(str(name).encode())
                ttft = metrics["time_to_first_token"]["value"] / 1e3
                e2e = metrics["request_latency"]["value"] / 1e3
                gaps = metrics.get("inter_chunk_latency", {}).get("value") or []
                out.append(Reported(number, ttft, e2e, np.asarray(gaps, dtype=float).ravel() / 1e3))
        return out


ALL: tuple[type[Client], ...] = (Ours, OursRealTime, InC, VllmBench, GuideLlm, AiPerf)


def named(names: Iterable[str]) -> list[Client]:
    """Clients by the first letters of their names."""
    wanted = [n.lower() for n in names]
    return [c() for c in ALL if any(c.name.lower().startswith(w) for w in wanted)]


def child_environment(client: Client) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **client.environment()}
