"""The rules of ``bench/sim/kv_cache.py`` over flat arrays; compiled by ``bench/sim/compiled.py``.

The whole simulation lives in a few wide arrays (:data:`State`), because passing many small ones costs more than the work.
All replicas' blocks lie in one array: block b of a replica is ``BASE + b``, and its null block, at ``BASE``, is the anchor
of its free list. Without prefix caching which block is which does not matter, so only counts are kept.
"""

from __future__ import annotations

from collections import namedtuple

State = namedtuple(
    "State",
    "req "  # (request, column) int64: see the request columns below
    "time "  # (request, column) float64
    "rep "  # (replica, column) int64
    "clock "  # (replica, 2 + stages + depth) float64: next_s, link_free_s, stage_free_s.., batch_end_s..
    "coefficients "  # (replica, n) float64
    "running "  # (replica, position) int64: the running list
    "queue "  # (replica, 0: waiting / 1: inbox, n + 1) int64: rings
    "batch "  # (replica, slot, position) int64: batches in flight, request << 32 | tokens << 1 | emits
    "chunk "  # (position, 0: request / 1: tokens) int64: the step that is being decided
    "scratch "  # (0: skipped / 1: preempted / 2: got a token / 3: finished, n + 1) int64
    "block "  # (block, column) int64
    "same "  # (replica, number, 0: first / 1: last) int64: blocks that carry a number, -1: none
    "table "  # int64: the blocks of each request, from its TABLE column on
    "numbers "  # int64: the block numbers of each request, from its NUMBERS column on
    "state "  # int64: scalars
    "param "  # float64: scalars
    "load "  # (8,) float64: the step as StepLoad
    "limit "  # (n, 0: from time / 1: in flight) float64
    "event_t event "  # binary heap by (time, sequence): float64; (n, sequence / kind / index) int64
    "ring "  # (0: ready / 1: fresh, n + 1) int64
    "members "  # int64: requests by group
    "completed "  # int64
    "token_s "  # float64: engine time of every output token, from each request's TOKENS column on
    "seen "  # (router, number) int64: bit set of replicas that were sent this block
    "light_head light_next "  # (replica, residue), (replica, position) int64: who fills a block at which light step
    "light_t",  # (replica, n) float64: when the outputs of light steps came
)

# Columns of State.req; those that every step touches come first, to share cache lines
(
    NUM_TOKENS, COMPUTED, PLACEHOLDERS, IN_FLIGHT_TOKENS, STALE, STATUS, CAPACITY, NEXT_FULL, TOTAL, END, ELIGIBLE_STEP,
    OUTPUTS, TOKENS, PROMPT, STOP_AFTER, PRIORITY, RECEIVED, PREEMPTED_HERE, HIT, HELD, NUM_CACHED, TABLE, NUMBERS,
    NUM_NUMBERS, NEXT_TURN, FOLLOWS, OSL, ENDED, HITS, PREEMPTIONS, REPLICA, PREFILLED, NUM_REQ,
) = range(33)  # fmt: skip
# TOTAL: prompt + max_tokens, at this replica. END: tokens at which the request is finished here.
# Columns of State.rep: first the configuration, then what changes
(
    MAX_RUNNING, TOKEN_BUDGET, INPUT_BUDGET, MAX_MODEL_LEN, CHUNKED, ASYNC, BY_PRIORITY, LONG_CAP, LONG_ADAPTIVE,
    RESERVE_FULL, STAGES, V2_RUNNER, DEPTH, ROLE, BLOCK_SIZE, CACHING, WATERMARK, BASE, NUM_FREE, NUM_RUNNING, WAITING_HEAD,
    NUM_WAITING, INBOX_HEAD, NUM_INBOX, STEP, UNREPORTED, BATCH_HEAD, NUM_BATCHES, WAITS, EXECUTED, OUTSTANDING, LIGHT_LEFT, LIGHT_DONE, LIGHT_OUT,
    LIGHT_SUM, LIGHT_MAX, OUTPUTS_SINCE, FRUITLESS, MOST_FRUITLESS, NUM_REP,
) = range(40)  # fmt: skip
# Columns of State.block
NEXT, PREVIOUS, REF, NUMBER, SAME_NEXT, SAME_PREVIOUS, NUM_BLOCK = 0, 1, 2, 3, 4, 5, 6
NEVER = 1 << 60


def take_blocks(req, rep, block, same, table, r, i, count):  # type: ignore[no-untyped-def]
    """Append ``count`` free blocks to request i's table; they lose their numbers."""
    rep[r, NUM_FREE] -= count
    if rep[r, CACHING] > 0:
        anchor = rep[r, BASE]
        at = req[i, TABLE] + req[i, HELD]
        b = block[anchor, NEXT]
        for k in range(count):
            table[at + k] = b
            block[b, REF] = 1
            number = block[b, NUMBER]
            if number >= 0:
                before, after = block[b, SAME_PREVIOUS], block[b, SAME_NEXT]
                if before >= 0:
                    block[before, SAME_NEXT] = after
                else:
                    same[r, number, 0] = after
                if after >= 0:
                    block[after, SAME_PREVIOUS] = before
                else:
                    same[r, number, 1] = before
                block[b, NUMBER] = -1
            b = block[b, NEXT]
        block[anchor, NEXT] = b
        block[b, PREVIOUS] = anchor
    req[i, HELD] += count
    req[i, CAPACITY] = req[i, HELD] * rep[r, BLOCK_SIZE]


def register_blocks(req, rep, block, same, table, numbers, r, i, num_tokens):  # type: ignore[no-untyped-def]
    """Number the blocks that are full once ``num_tokens`` known tokens are in the cache (at least NEXT_FULL)."""
    size = rep[r, BLOCK_SIZE]
    first, own = req[i, TABLE], req[i, NUMBERS]
    full = num_tokens // size
    for k in range(req[i, NUM_CACHED], full):
        b, number = table[first + k], numbers[own + k]
        last = same[r, number, 1]
        block[b, NUMBER] = number
        block[b, SAME_NEXT] = -1
        block[b, SAME_PREVIOUS] = last
        if last >= 0:
            block[last, SAME_NEXT] = b
        else:
            same[r, number, 0] = b
        same[r, number, 1] = b
    req[i, NUM_CACHED] = full
    req[i, NEXT_FULL] = (full + 1) * size


def free_blocks(req, rep, block, table, r, i):  # type: ignore[no-untyped-def]
    """Release request i's blocks, the tail to be evicted first."""
    held = req[i, HELD]
    if rep[r, CACHING] == 0:
        rep[r, NUM_FREE] += held
    else:
        anchor = rep[r, BASE]
        front = anchor  # unnumbered blocks go to the front, one behind the other ...
        first = req[i, TABLE]
        for k in range(held - 1, -1, -1):
            b = table[first + k]
            block[b, REF] -= 1
            if block[b, REF] > 0:
                continue
            before = block[anchor, PREVIOUS]  # ... numbered ones to the back
            if block[b, NUMBER] < 0:
                before = front
                front = b
            after = block[before, NEXT]
            block[before, NEXT] = b
            block[b, PREVIOUS] = before
            block[b, NEXT] = after
            block[after, PREVIOUS] = b
            rep[r, NUM_FREE] += 1
    req[i, HELD] = 0
    req[i, CAPACITY] = 0
    req[i, NUM_CACHED] = 0


def find_hit(req, rep, block, same, table, numbers, r, i):  # type: ignore[no-untyped-def]
    """(blocks, how many of them nobody holds) of the longest cached prefix of request i; put into its table."""
    if rep[r, CACHING] == 0:
        return 0, 0
    first, own = req[i, TABLE], req[i, NUMBERS]
    hit = revived = 0
    for k in range((req[i, NUM_TOKENS] - 1) // rep[r, BLOCK_SIZE]):
        b = same[r, numbers[own + k], 0]
        if b < 0:
            break
        table[first + k] = b
        hit += 1
        if block[b, REF] == 0:
            revived += 1
    return hit, revived


def missing(rep, r, num_tokens, num_held):  # type: ignore[no-untyped-def]
    size = rep[r, BLOCK_SIZE]
    return max((num_tokens + size - 1) // size - num_held, 0)


def admit(req, rep, block, same, table, numbers, r, i, num_computed, num_new, hit, revived):  # type: ignore[no-untyped-def]
    """Blocks for a waiting request's first chunk behind the hit that ``find_hit`` left in its table; False if none."""
    watermark = rep[r, WATERMARK] if rep[r, NUM_RUNNING] > 0 else 0
    num_tokens, max_len, free = req[i, NUM_TOKENS], rep[r, MAX_MODEL_LEN], rep[r, NUM_FREE]
    if rep[r, RESERVE_FULL] > 0 and missing(rep, r, min(num_tokens, max_len), hit) + revived + watermark > free:
        return False
    needed = missing(rep, r, min(num_computed + num_new, max_len), hit)
    if needed + revived + watermark > free:
        return False
    first = req[i, TABLE]
    for k in range(hit):
        b = table[first + k]
        if block[b, REF] == 0:  # leaves the free list
            before, after = block[b, PREVIOUS], block[b, NEXT]
            block[before, NEXT] = after
            block[after, PREVIOUS] = before
            rep[r, NUM_FREE] -= 1
        block[b, REF] += 1
    req[i, HELD] = hit
    take_blocks(req, rep, block, same, table, r, i, needed)
    req[i, NUM_CACHED] = hit
    req[i, NEXT_FULL] = (hit + 1) * rep[r, BLOCK_SIZE] if rep[r, CACHING] > 0 else NEVER
    ready = min(num_computed + num_new, num_tokens)
    if ready >= req[i, NEXT_FULL]:
        register_blocks(req, rep, block, same, table, numbers, r, i, ready)
    return True


def grow(req, rep, block, same, table, numbers, r, i, num_new):  # type: ignore[no-untyped-def]
    """Blocks for ``num_new`` further tokens of a running request; False if they do not fit."""
    after = req[i, COMPUTED] + num_new
    needed = missing(rep, r, min(after, rep[r, MAX_MODEL_LEN]), req[i, HELD])
    if needed > rep[r, NUM_FREE]:
        return False
    if needed > 0:
        take_blocks(req, rep, block, same, table, r, i, needed)
    ready = min(after, req[i, NUM_TOKENS])
    if ready >= req[i, NEXT_FULL]:
        register_blocks(req, rep, block, same, table, numbers, r, i, ready)
    return True
