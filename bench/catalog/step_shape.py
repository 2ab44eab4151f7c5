"""One engine step as a handful of sums over its batch: token counts, query-key pairs and keys read.

Causal attention counts only the pairs it needs; a window or chunk bounds how far back a query sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from bench.catalog.arch import AttentionKind, ModelArch
from bench.errors import BadInput

#: Order of the feature vector. ``..._windowed`` are the same sums for layers with a window or chunk.
FEATURES = (
    "any_tokens",  # 1 for every step that runs
    "has_prefill",  # 0 or 1
    "has_decode",  # 0 or 1
    "tokens",  # rows of the matrix products: scheduled tokens, or the padded size under a CUDA graph
    "prefill_tokens",
    "decode_requests",
    "sampled",  # rows of the output head: vLLM computes logits for every scheduled request
    "prefill_pairs",  # sum over prefill chunks of (query, key) pairs
    "prefill_rows",  # sum over prefill chunks of keys read: context before plus the chunk
    "decode_rows",  # sum over decoding requests of keys read: context with the new token
    "prefill_pairs_windowed",
    "prefill_rows_windowed",
    "decode_rows_windowed",
)
NUM_FEATURES = len(FEATURES)
_NUM_FLAGS = 3
F = {name: i for i, name in enumerate(FEATURES)}


#: A number of tokens, or an int64 array of them for many requests at once.
Count = TypeVar("Count", int, np.ndarray)


def prefill_pairs(
    num_tokens: Count, context: Count, attention: AttentionKind = "full", window: int | None = None
) -> Count:
    """(query, key) pairs of a chunk of ``num_tokens`` after ``context`` tokens, causal, in one layer and head."""
    return _pairs_before(context + num_tokens, attention, window) - _pairs_before(context, attention, window)


def _least(a: Count, b: int | Count) -> Count:
    return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)


def _pairs_before(x: Count, attention: AttentionKind, window: int | None) -> Count:
    """Pairs of the first ``x`` positions: the query at position p sees p+1 keys, at most its window or chunk's part."""
    if attention == "full" or not window:
        return x * (x + 1) // 2
    if attention == "sliding":
        full = _least(x, window)
        return full * (full + 1) // 2 + (x - full) * window
    whole, rest = divmod(x, window)
    return whole * (window * (window + 1) // 2) + rest * (rest + 1) // 2


def prefill_rows(
    num_tokens: Count, context: Count, attention: AttentionKind = "full", window: int | None = None
) -> Count:
    """Distinct keys that a chunk reads in one layer."""
    end = context + num_tokens
    if attention == "full" or not window:
        return end
    if attention == "sliding":
        return _least(end, num_tokens + window - 1)
    return end - context // window * window


def decode_rows(length: Count, attention: AttentionKind = "full", window: int | None = None) -> Count:
    """Keys that one new token reads when the sequence is ``length`` long with it."""
    if attention == "full" or not window:
        return length
    return _least(length, window) if attention == "sliding" else (length - 1) % window + 1


def window_of(model: ModelArch) -> tuple[AttentionKind, int | None]:
    """The one kind of window that the model's layers have beside full attention; ("full", None) without any."""
    found = {(k.attention, k.window) for k in model.layers if k.attention != "full"}
    if len(found) > 1:
        raise BadInput(f"{model.name} mixes windows {sorted(str(w) for _, w in found)}; one kind is covered")
    return next(iter(found), ("full", None))


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sums over the requests of one step, named as :data:`FEATURES`. Build with :meth:`of`, or :meth:`uniform`."""

    tokens: float
    prefill_tokens: float
    decode_requests: float
    sampled: float
    prefill_pairs: float
    prefill_rows: float
    decode_rows: float
    prefill_pairs_windowed: float = 0.0
    prefill_rows_windowed: float = 0.0
    decode_rows_windowed: float = 0.0

    @classmethod
    def of(
        cls,
        model: ModelArch,
        prefill: Iterable[tuple[int, int]] = (),
        decode: Iterable[int] = (),
        padded_tokens: int | None = None,
    ) -> StepShape:
        """From ``prefill`` chunks (new tokens, tokens already in the cache) and ``decode`` lengths (with the new token)."""
        kind, window = window_of(model)
        chunks, lengths = list(prefill), list(decode)
        new = sum(n for n, _ in chunks)
        return cls(
            tokens=padded_tokens if padded_tokens is not None else new + len(lengths),
            prefill_tokens=new,
            decode_requests=len(lengths),
            sampled=len(chunks) + len(lengths),
            prefill_pairs=sum(prefill_pairs(n, c) for n, c in chunks),
            prefill_rows=sum(prefill_rows(n, c) for n, c in chunks),
            decode_rows=sum(lengths),
            prefill_pairs_windowed=sum(prefill_pairs(n, c, kind, window) for n, c in chunks),
            prefill_rows_windowed=sum(prefill_rows(n, c, kind, window) for n, c in chunks),
            decode_rows_windowed=sum(decode_rows(x, kind, window) for x in lengths),
        )

    @classmethod
    def uniform(
        cls,
        model: ModelArch,
        prefill_requests: int = 0,
        prefill_tokens: int = 0,
        prefill_context: int = 0,
        decode_requests: int = 0,
        decode_context: int = 0,
        padded_tokens: int | None = None,
    ) -> StepShape:
        """All requests of a phase alike: ``prefill_tokens`` new tokens each after ``prefill_context``; decodes at one length."""
        chunks = [(prefill_tokens, prefill_context)] * prefill_requests
        return cls.of(model, chunks, [decode_context] * decode_requests, padded_tokens)

    @classmethod
    def from_totals(
        cls,
        model: ModelArch,
        prefill_tokens: float,
        prefill_requests: float,
        decode_requests: float,
        context_tokens: float,
        padded_tokens: float | None = None,
    ) -> StepShape:
        """One step of :func:`features_of_totals`; ``padded_tokens`` as in :meth:`of`."""
        totals = (prefill_tokens, prefill_requests, decode_requests, context_tokens)
        sums = features_of_totals(model, *(np.array([float(x)]) for x in totals))[0, _NUM_FLAGS:].tolist()
        return cls(sums[0] if padded_tokens is None else padded_tokens, *sums[1:])

    def features(self) -> np.ndarray:
        """The vector that :class:`StepCoefficients` multiplies, float64, length :data:`NUM_FEATURES`."""
        sums = [float(getattr(self, f.name)) for f in fields(self)]
        flags = [float(self.tokens > 0), float(self.prefill_tokens > 0), float(self.decode_requests > 0)]
        return np.array([*flags, *sums])


def features_of_totals(
    model: ModelArch,
    prefill_tokens: np.ndarray,
    prefill_requests: np.ndarray,
    decode_requests: np.ndarray,
    context_tokens: np.ndarray,
) -> np.ndarray:
    """Feature vectors (n, NUM_FEATURES) from what an engine reports of n steps, with every request of a phase taken at their mean.

    ``context_tokens`` is the sum over scheduled requests of tokens already in the cache (``EngineStep``). Exact for
    full attention in steps of decodes alone; with prefill it assumes equal chunks, from an empty cache when decodes
    run beside them.
    """
    kind, window = window_of(model)
    p, r, d, context = (
        np.asarray(x, dtype=np.float64) for x in (prefill_tokens, prefill_requests, decode_requests, context_tokens)
    )

    def mean(total: np.ndarray, number: np.ndarray) -> np.ndarray:
        return np.divide(total, number, out=np.zeros_like(total), where=number > 0)

    # A fresh prompt is the rule in a mixed step: the contexts then belong to the decodes.
    before = np.where(d > 0, 0.0, mean(context, r + d))
    mean_decode = np.where(d > 0, mean(context - before * r, d) + 1, 0.0)
    chunk = mean(p, r)
    n, c, length = (np.rint(x).astype(np.int64) for x in (chunk, before, mean_decode))
    sums = (
        p + d, p, d, r + d, r * (chunk * before + chunk * (chunk + 1) / 2), r * (chunk + before), d * mean_decode,
        r * prefill_pairs(n, c, kind, window), r * prefill_rows(n, c, kind, window), d * decode_rows(length, kind, window),
    )  # fmt: skip
    return np.column_stack([p + d > 0, p > 0, d > 0, *sums]).astype(np.float64)


def request_features(model: ModelArch, isl: Sequence[int], osl: Sequence[int]) -> np.ndarray:
    """Feature vector summed over all steps that serve whole requests, whatever the batching; flags are left at 0.

    A prompt of P tokens and O outputs is P prefill tokens (whole prompt in one chunk) and O - 1 decode steps at lengths
    P+1 ... P+O-1. Used for the work of a run, where only weights depend on the number of steps.
    """
    kind, window = window_of(model)
    x = np.zeros(NUM_FEATURES)
    for p, o in zip(isl, osl, strict=True):
        steps = max(0, o - 1)
        x[F["tokens"]] += p + steps
        x[F["prefill_tokens"]] += p
        x[F["decode_requests"]] += steps
        x[F["sampled"]] += max(1, o)
        x[F["prefill_pairs"]] += prefill_pairs(p, 0)
        x[F["prefill_rows"]] += p
        x[F["decode_rows"]] += prefill_pairs(steps, p)
        x[F["prefill_pairs_windowed"]] += prefill_pairs(p, 0, kind, window)
        x[F["prefill_rows_windowed"]] += prefill_rows(p, 0, kind, window)
        x[F["decode_rows_windowed"]] += prefill_pairs(steps, p, kind, window)
    return x
