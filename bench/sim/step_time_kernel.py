"""The cost of one step, as pure arithmetic over a flat array: read by plain Python and compiled by numba alike.

``bench/sim/step_time.py`` lays the array out (:data:`HEADER` numbers, then four tables); ``bench/sim/interface.py`` says
what the arguments mean. Nothing here knows a model or a GPU: the tables were computed for one engine beforehand, so that
a simulated step costs a few table reads.

Tables, all in seconds, over uniform knots in log2 of their axes (axis values 1, 2^(1/r), ...):

* tokens: everything whose time depends on the number of tokens alone (projections, MLP, experts, norms, all-reduce);
* rows: LM head and sampler against the number of sampled rows;
* decode attention: decoding requests x mean KV length;
* prefill attention: prompt tokens x mean KV length per query.
"""

from __future__ import annotations

import math

# Header positions. Plain numbers: the compiled copy of this file sees them as constants.
GPU_FIXED_S = 0
LINEAR_SCALE = 1
DECODE_ATTENTION_SCALE = 2
PREFILL_ATTENTION_SCALE = 3
SKEW_RATIO = 4
GPU_PER_REQUEST_S = 5
GPU_PER_PREFILL_TOKEN_S = 6
HOST_FIXED_S = 7
HOST_PER_RUNNING_S = 8
HOST_PIECEWISE_S = 9
HOST_EAGER_S = 10
GRAPH_MAX_TOKENS = 11
HOST_PER_PREFILL_REQUEST_S = 12
TOKENS_PER_OCTAVE = 13
NUM_TOKEN_KNOTS = 14
ROWS_PER_OCTAVE = 15
NUM_ROW_KNOTS = 16
ATTENTION_PER_OCTAVE = 17
NUM_DECODE_KNOTS = 18
NUM_DECODE_LENGTH_KNOTS = 19
NUM_PREFILL_KNOTS = 20
NUM_PREFILL_LENGTH_KNOTS = 21
GAP_S = 22
GAP_PER_RUNNING_S = 23
GPU_PREFILL_FIXED_S = 24
HEADER = 25


def padded_tokens(tokens: float, graph_max_tokens: float) -> float:
    """Batch size after padding to vLLM's CUDA-graph capture sizes: 1, 2, 4, by 8 to 256, then by 16."""
    if tokens > graph_max_tokens:
        return tokens
    if tokens <= 2.0:
        return tokens
    if tokens <= 4.0:
        return 4.0
    step = 8.0 if tokens <= 256.0 else 16.0
    padded = math.ceil(tokens / step) * step
    return padded if padded <= graph_max_tokens else tokens


def table_1d(coef, start, num_knots, per_octave, value):  # type: ignore[no-untyped-def]  # numba infers the types
    """Linear interpolation at ``log2(value)``; beyond the last knot in proportion to ``value``."""
    x = math.log2(max(value, 1.0)) * per_octave
    i = int(x)
    if i >= num_knots - 1:
        last = 2.0 ** ((num_knots - 1) / per_octave)
        return coef[start + num_knots - 1] * value / last
    # the knots are log-spaced but times are close to linear in the value, so the weight is taken in the value
    low = 2.0 ** (i / per_octave)
    high = 2.0 ** ((i + 1) / per_octave)
    w = (value - low) / (high - low)
    return coef[start + i] * (1.0 - w) + coef[start + i + 1] * w


def table_2d(coef, start, num_a, num_b, per_octave, a, b):  # type: ignore[no-untyped-def]
    """Bilinear interpolation in the values of both axes; the border is extended in proportion to each."""
    a = max(a, 1.0)
    b = max(b, 1.0)
    i = min(int(math.log2(a) * per_octave), num_a - 2)
    j = min(int(math.log2(b) * per_octave), num_b - 2)
    a0 = 2.0 ** (i / per_octave)
    a1 = 2.0 ** ((i + 1) / per_octave)
    b0 = 2.0 ** (j / per_octave)
    b1 = 2.0 ** ((j + 1) / per_octave)
    u = (a - a0) / (a1 - a0)
    v = (b - b0) / (b1 - b0)
    p = start + i * num_b + j
    low = coef[p] * (1.0 - v) + coef[p + 1] * v
    high = coef[p + num_b] * (1.0 - v) + coef[p + num_b + 1] * v
    return low * (1.0 - u) + high * u


def step_time_s(  # type: ignore[no-untyped-def]
    coef, prefill_requests, prefill_tokens, prefill_pairs, prefill_context, decode_requests, decode_context_sum,
    decode_context_max, num_running,
):  # fmt: skip
    """(gpu_s, host_s) of one step; arguments as ``bench/sim/interface.py`` says."""
    tokens = float(prefill_tokens + decode_requests)
    graph_max = coef[GRAPH_MAX_TOKENS]
    rows = float(prefill_requests + decode_requests)
    token_start = HEADER
    row_start = token_start + int(coef[NUM_TOKEN_KNOTS])
    decode_start = row_start + int(coef[NUM_ROW_KNOTS])
    num_decode = int(coef[NUM_DECODE_KNOTS])
    num_decode_length = int(coef[NUM_DECODE_LENGTH_KNOTS])
    prefill_start = decode_start + num_decode * num_decode_length

    padded = padded_tokens(tokens, graph_max)
    linear = table_1d(coef, token_start, int(coef[NUM_TOKEN_KNOTS]), coef[TOKENS_PER_OCTAVE], padded)
    linear += table_1d(coef, row_start, int(coef[NUM_ROW_KNOTS]), coef[ROWS_PER_OCTAVE], rows)
    gpu = coef[GPU_FIXED_S] + coef[LINEAR_SCALE] * linear + coef[GPU_PER_REQUEST_S] * rows
    per_octave = coef[ATTENTION_PER_OCTAVE]
    if decode_requests > 0:
        batch = float(decode_requests)
        mean = float(decode_context_sum) / batch
        attention = table_2d(coef, decode_start, num_decode, num_decode_length, per_octave, batch, mean)
        # Uneven lengths: the last work groups are those of the longest requests.
        if coef[SKEW_RATIO] > 0.0 and decode_context_max > mean:
            longest = float(decode_context_max)
            uneven = table_2d(coef, decode_start, num_decode, num_decode_length, per_octave, batch, longest)
            alone = table_2d(coef, decode_start, num_decode, num_decode_length, per_octave, 1.0, longest)
            attention = max(attention + min(coef[SKEW_RATIO] * (uneven - attention), alone), alone)
        gpu += coef[DECODE_ATTENTION_SCALE] * attention
    if prefill_tokens > 0:
        queries = float(prefill_tokens)
        gpu += coef[PREFILL_ATTENTION_SCALE] * table_2d(
            coef, prefill_start, int(coef[NUM_PREFILL_KNOTS]), int(coef[NUM_PREFILL_LENGTH_KNOTS]), per_octave,
            queries, prefill_pairs / queries,
        )  # fmt: skip
        gpu += coef[GPU_PER_PREFILL_TOKEN_S] * queries + coef[GPU_PREFILL_FIXED_S]

    host = (
        coef[HOST_FIXED_S]
        + coef[HOST_PER_RUNNING_S] * num_running
        + coef[HOST_PER_PREFILL_REQUEST_S] * prefill_requests
    )
    if tokens > graph_max:
        host += coef[HOST_EAGER_S]
    elif prefill_requests > 0:
        host += coef[HOST_PIECEWISE_S]
    gap = coef[GAP_S] + coef[GAP_PER_RUNNING_S] * num_running
    return gpu + gap, host + gap
