"""The rules of ``bench/sim/router.py`` over flat arrays; compiled by ``bench/sim/compiled.py``."""

from __future__ import annotations

from bench.sim.compiled_client import ROUTING, TURN
from bench.sim.compiled_kv import (
    BLOCK_SIZE,
    NUM_NUMBERS,
    NUMBERS,
    OUTSTANDING,
    PROMPT,
    ROLE,
)  # fmt: skip

ROUND_ROBIN, LEAST_LOADED, PREFIX_AWARE = 0, 1, 2
ROLE_BOTH, ROLE_PREFILL, ROLE_DECODE = 0, 1, 2
MIN_MATCH_RATIO, MAX_IMBALANCE = 0.5, 32


def is_member(s, router, r):  # type: ignore[no-untyped-def]
    """Router 0 serves arrivals, router 1 the decode pool."""
    return (s.rep[r, ROLE] == ROLE_DECODE) == (router == 1)


def pick_replica(s, router, i):  # type: ignore[no-untyped-def]
    num_replicas = len(s.rep)
    chosen = -1
    if s.state[ROUTING] == ROUND_ROBIN:
        members = 0
        for r in range(num_replicas):
            if is_member(s, router, r):
                members += 1
        turn = s.state[TURN + router] % members
        s.state[TURN + router] += 1
        for r in range(num_replicas):
            if is_member(s, router, r):
                if turn == 0:
                    chosen = r
                turn -= 1
    else:
        for r in range(num_replicas):
            if is_member(s, router, r) and (chosen < 0 or s.rep[r, OUTSTANDING] < s.rep[chosen, OUTSTANDING]):
                chosen = r
        if s.state[ROUTING] == PREFIX_AWARE:
            chosen = pick_by_prefix(s, router, i, chosen)
    s.rep[chosen, OUTSTANDING] += 1
    return chosen


def pick_by_prefix(s, router, i, least):  # type: ignore[no-untyped-def]
    offset = s.req[i, NUMBERS]
    num_blocks = min(s.req[i, PROMPT] // s.rep[least, BLOCK_SIZE], s.req[i, NUM_NUMBERS])
    best, best_match = least, 0
    for r in range(len(s.rep)):
        if not is_member(s, router, r):
            continue
        match = 0
        while match < num_blocks and (s.seen[router, s.numbers[offset + match]] >> r) & 1 == 1:
            match += 1
        if match > best_match:
            best, best_match = r, match
    if best_match < MIN_MATCH_RATIO * num_blocks:
        best = least
    if s.rep[best, OUTSTANDING] - s.rep[least, OUTSTANDING] > MAX_IMBALANCE:
        best = least
    for k in range(num_blocks):
        s.seen[router, s.numbers[offset + k]] |= 1 << best
    return best
