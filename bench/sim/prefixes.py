"""Prompts as chains of block numbers: two requests share a number exactly where they share the whole prefix up to there.

vLLM hashes every full block together with its predecessor's hash. The simulator needs only to know which blocks are
equal, so each distinct prefix of full blocks gets a number. Blocks that reach into generated tokens get numbers of their
own per request: what a model will say is not known, and two requests rarely say the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.records import Request


def block_numbers(
    requests: Sequence[Request], prompt_tokens: np.ndarray, output_tokens: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Number every full block that any request can ever fill.

    Args:
        requests: only ``prompt_token_ids`` and ``prefix_tokens`` are read. A request without token ids is taken to share its
            first ``prefix_tokens`` tokens with every other such request, and nothing else.
        prompt_tokens, output_tokens: (num_requests,) int64 lengths in tokens.

    Returns:
        ``offsets`` (num_requests + 1,) and ``numbers`` (offsets[-1],) int64: request i owns
        ``numbers[offsets[i]:offsets[i + 1]]``, one per full block; and how many distinct numbers there are (0-based).
    """
    num_blocks = (prompt_tokens + output_tokens) // block_size
    offsets = np.zeros(len(requests) + 1, dtype=np.int64)
    np.cumsum(num_blocks, out=offsets[1:])
    numbers = np.arange(offsets[-1], dtype=np.int64)  # all different, until found equal below
    _share_token_prefixes(requests, prompt_tokens, block_size, offsets, numbers)
    _share_stated_prefixes(requests, block_size, offsets, numbers)
    return offsets, numbers, int(offsets[-1])


def _share_token_prefixes(
    requests: Sequence[Request], prompt_tokens: np.ndarray, block_size: int, offsets: np.ndarray, numbers: np.ndarray
) -> None:
    """Give equal numbers to equal prefixes, block by block; whoever stands alone drops out."""
    alive = [i for i, r in enumerate(requests) if r.prompt_token_ids is not None and prompt_tokens[i] >= block_size]
    depth = 0
    while len(alive) > 1:
        start, end = depth * block_size, (depth + 1) * block_size
        groups: dict[tuple[int, bytes], list[int]] = {}
        for i in alive:
            tokens = requests[i].prompt_token_ids
            assert tokens is not None
            parent = int(numbers[offsets[i] + depth - 1]) if depth else -1
            key = (parent, np.ascontiguousarray(tokens[start:end], dtype=np.int32).tobytes())
            groups.setdefault(key, []).append(i)
        alive = []
        for members in groups.values():
            if len(members) == 1:
                continue
            shared = numbers[offsets[members[0]] + depth]
            for i in members:
                numbers[offsets[i] + depth] = shared
                if end + block_size <= prompt_tokens[i]:
                    alive.append(i)
        depth += 1


def _share_stated_prefixes(
    requests: Sequence[Request], block_size: int, offsets: np.ndarray, numbers: np.ndarray
) -> None:
    """Requests without token ids share the prefix that they state."""
    stated = [(i, r.prefix_tokens // block_size) for i, r in enumerate(requests) if r.prompt_token_ids is None]
    stated = [(i, n) for i, n in stated if n]
    if not stated:
        return
    longest = max(stated, key=lambda entry: entry[1])[0]
    for i, n in stated:
        n = min(n, int(offsets[i + 1] - offsets[i]))
        numbers[offsets[i] : offsets[i] + n] = numbers[offsets[longest] : offsets[longest] + n]
