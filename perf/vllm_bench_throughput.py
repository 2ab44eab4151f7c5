"""vLLM's own `vllm bench throughput` on requests that are given: the other side of `perf.throughput`.

Runs vLLM's code as it is (its argument parser, its `LLM.from_engine_args`, its timed `_run_vllm_requests`); only where the
requests come from and how many passes one engine start serves is ours. Reads JSON lines {"requests": [[prompt token ids, osl], ...]}
from standard input and answers each with {"elapsed_s": ..., "output_tokens": ...} on the file descriptor given first.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    from vllm.benchmarks import throughput
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # older releases
        from vllm.utils import FlexibleArgumentParser  # type: ignore[attr-defined,no-redef]
    from vllm import LLM

    parser = FlexibleArgumentParser()
    throughput.add_cli_args(parser)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(sys.argv[2:])))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        elapsed_s, outputs = throughput._run_vllm_requests(llm, samples(line), **options(throughput))
        tokens = sum(len(o.token_ids) for output in outputs or () for o in output.outputs)
        print(json.dumps({"elapsed_s": elapsed_s, "output_tokens": tokens}), file=answers, flush=True)


def samples(line: str) -> list[Any]:
    from vllm.benchmarks.datasets import SampleRequest

    return [
        SampleRequest(prompt={"prompt_token_ids": ids}, prompt_len=len(ids), expected_output_len=osl)  # type: ignore[arg-type]
        for ids, osl in json.loads(line)["requests"]
    ]


def options(throughput: Any) -> dict[str, Any]:
    """What `vllm bench throughput` passes for a plain run, as far as this release takes it."""
    import inspect

    values = {
        "n": 1,
        "disable_detokenize": True,
        "do_profile": False,
        "prequeue_requests": False,
        "enable_lora": False,
    }
    known = inspect.signature(throughput._run_vllm_requests).parameters
    return {k: v for k, v in values.items() if k in known}


if __name__ == "__main__":
    main()
