"""The border between the scheduler simulation and the step-time model: what one step is, and what it costs.

The scheduler simulation decides *who runs and how many tokens each*; it sums that up in a handful of numbers per step
(:class:`StepLoad`) and asks the step-time model how long the device and the host are busy with it. The cost function
lives in ``bench/sim/step_time_kernel.py`` as **one plain function over scalars and one flat float64 array**::

    def step_time_s(coef, prefill_requests, prefill_tokens, prefill_pairs, prefill_context,
                    decode_requests, decode_context_sum, decode_context_max, num_running) -> (gpu_s, host_s)

so that the same source runs as ordinary Python and, compiled by numba, inside the hot loop (``bench/sim/compiled.py``
compiles a second copy of that file; it must therefore hold nothing but pure functions of numbers and float64 arrays,
``math``, helper functions of the same file and module-level numeric constants: no numpy objects, no dataclasses, no
keyword arguments, no exceptions as control flow).

Arguments (int64 unless said otherwise), all of one step:

``prefill_requests``
    scheduled requests that work on tokens they already know: prompts, chunks of prompts, and recomputation after a
    preemption (every scheduled request whose chunk is longer than one token, or does not end in a new token).
``prefill_tokens``
    tokens of those requests in this step.
``prefill_pairs`` (float64)
    query-key pairs of causal attention of those chunks: sum of ``n * c + n * (n + 1) / 2`` for a chunk of ``n`` tokens
    behind ``c`` tokens of context.
``prefill_context``
    sum of ``c``: tokens already in the KV cache that those chunks read (prefix-cache hits and earlier chunks).
``decode_requests``
    scheduled requests with exactly one token that yields the next token.
``decode_context_sum``, ``decode_context_max``
    KV tokens that the decodes read, the new one included: sum over them, and the largest.
``num_running``
    length of the running list after scheduling (host cost grows with it; requests in flight that were not scheduled
    in this step count).

Total tokens of the step are ``prefill_tokens + decode_requests``; sampled rows are
``prefill_requests + decode_requests`` (vLLM computes logits for the last token of every scheduled request).

Returns ``(gpu_s, host_s)``, both > 0 and finite:

``gpu_s``
    how long the device is busy with the batch from start to sampled tokens. With pipeline parallelism it is the time
    through **all** stages (the loop divides it evenly over ``pipeline_parallel_size`` stages and overlaps batches).
``host_s``
    serial work of the engine-core process per step (schedule, prepare inputs, launch, process outputs). The loop lets it
    overlap with the device under asynchronous scheduling, so the period comes out as ``max(gpu_s, host_s)``, and as
    ``gpu_s + host_s`` without. A gap that nothing overlaps belongs into both numbers.

``prefill_tokens + decode_requests`` is 0 for a step in which nothing could be scheduled; the loop never asks for its cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class StepLoad(NamedTuple):
    """What one step computes; the arguments of ``step_time_s`` after ``coef``, in order. See the module's text."""

    prefill_requests: int
    prefill_tokens: int
    prefill_pairs: float
    prefill_context: int
    decode_requests: int
    decode_context_sum: int
    decode_context_max: int
    num_running: int


@dataclass(frozen=True, slots=True)
class Interval:
    """Relative bounds of a prediction: truth lies in [low, high] x prediction with ``confidence``, e.g. 0.9 .. 1.12."""

    low_ratio: float
    high_ratio: float
    confidence: float = 0.90
    basis: str = ""  # on what rows it was found, or why it is a guess


@runtime_checkable
class StepTimeModel(Protocol):
    """Where a step's cost comes from. Implemented in ``bench/sim/step_time.py``."""

    @property
    def source(self) -> str:
        """Source in words, e.g. ``calibrated on 3 runs of ... (profile X)`` or ``shipped efficiency curves, H100-SXM``."""
        ...

    @property
    def trust(self) -> str:
        """One of ``user-runs``, ``user-kernels``, ``shipped-curves``, ``data-sheet``: best first."""
        ...

    def coefficients(self) -> np.ndarray:
        """Flat, contiguous float64 array: everything ``step_time_s`` needs about model, hardware, TP, PP, dtypes."""
        ...

    def request_overhead_s(self) -> tuple[float, float]:
        """(before, after): seconds between the client's send and the engine's queue (HTTP, tokenise), and between the
        engine's output and the client (detokenise, HTTP). Fixed per request; (0, 0) where unknown."""
        ...

    def interval(self, metric: str) -> Interval | None:
        """Honest relative interval for ``metric`` (``ttft``, ``tpot``, ``output_tokens_per_s``, ...), None if unknown."""
        ...
