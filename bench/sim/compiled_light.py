"""Runs of steps in which every running request decodes, without looking at each request in each step.

Between arrivals, finishes and shortage of blocks nothing changes from step to step but lengths: every running request gets
one token, in the same order. Then a step is a few additions, plus the blocks of those requests that just filled one. What the
requests themselves missed is made up for by :func:`flush` before anything looks at them. The result is the same to the last
bit, block numbers included; ``tests/sim/test_compiled.py`` compares it with the loop that takes every step in full.

Compiled by ``bench/sim/compiled.py``.
"""

from __future__ import annotations

from bench.sim.compiled_kv import (
    ASYNC,
    BATCH_HEAD,
    BLOCK_SIZE,
    CAPACITY,
    COMPUTED,
    END,
    IN_FLIGHT_TOKENS,
    LIGHT_DONE,
    LIGHT_LEFT,
    LIGHT_MAX,
    LIGHT_OUT,
    LIGHT_SUM,
    MAX_RUNNING,
    NEXT_FULL,
    NUM_BATCHES,
    NUM_FREE,
    NUM_RUNNING,
    NUM_TOKENS,
    NUM_WAITING,
    OUTPUTS,
    OUTPUTS_SINCE,
    PLACEHOLDERS,
    STAGES,
    STEP,
    TOKENS,
    UNREPORTED,
    register_blocks,
    take_blocks,
)
from bench.sim.compiled_scheduler import FIRST_ADMITTED, HIT_TOKENS, NUM_CHUNKS, NUM_PREEMPTED

#: Shorter runs are not worth the two passes over the requests; longer ones are cut (output times are kept per step).
LEAST_STEPS, MOST_STEPS = 4, 1024
LIGHT = -1  # in place of a batch's length: all running requests, one token each


def enter(s, r):  # type: ignore[no-untyped-def]
    """After a step in full: how many more steps will be like it? Sets LIGHT_LEFT, 0 if too few."""
    n = s.rep[r, NUM_RUNNING]
    load = s.load
    if n == 0 or s.rep[r, STAGES] > 1 or load[0] > 0 or load[4] != n or s.state[FIRST_ADMITTED] != s.state[NUM_CHUNKS]:
        return
    if s.state[NUM_PREEMPTED] > 0 or (s.rep[r, NUM_WAITING] > 0 and n < s.rep[r, MAX_RUNNING]):
        return
    req, running, size = s.req, s.running, s.rep[r, BLOCK_SIZE]
    most = MOST_STEPS
    for k in range(n):
        i = running[r, k]
        # the last token of a request is left to a step in full
        most = min(most, req[i, END] - 2 - req[i, COMPUTED])
        if most < LEAST_STEPS or req[i, CAPACITY] - req[i, COMPUTED] >= size:
            return
    while blocks_needed(s, r, most) > s.rep[r, NUM_FREE]:
        most //= 2
        if most < LEAST_STEPS:
            return
    for residue in range(size):
        s.light_head[r, residue] = -1
    for k in range(n - 1, -1, -1):  # backwards, so that each list is in running order
        i = running[r, k]
        residue = req[i, CAPACITY] - req[i, COMPUTED]
        s.light_next[r, k] = s.light_head[r, residue]
        s.light_head[r, residue] = k
    s.rep[r, LIGHT_LEFT] = most
    s.rep[r, LIGHT_SUM] = int(load[5])
    s.rep[r, LIGHT_MAX] = int(load[6])


def blocks_needed(s, r, steps):  # type: ignore[no-untyped-def]
    """New blocks over that many steps."""
    size = s.rep[r, BLOCK_SIZE]
    total = 0
    for k in range(s.rep[r, NUM_RUNNING]):
        i = s.running[r, k]
        beyond = steps - (s.req[i, CAPACITY] - s.req[i, COMPUTED])
        if beyond > 0:
            total += (beyond + size - 1) // size
    return total


def light_schedule(s, r):  # type: ignore[no-untyped-def]
    """``schedule`` for a step in which all running requests get one token."""
    n = s.rep[r, NUM_RUNNING]
    done = s.rep[r, LIGHT_DONE]
    k = s.light_head[r, done % s.rep[r, BLOCK_SIZE]]
    while k >= 0:
        take_blocks(s.req, s.rep, s.block, s.same, s.table, r, s.running[r, k], 1)
        k = s.light_next[r, k]
    slot = (s.rep[r, BATCH_HEAD] + s.rep[r, NUM_BATCHES]) % s.batch.shape[1]
    s.batch[r, slot, 0] = LIGHT
    s.rep[r, NUM_BATCHES] += 1
    s.rep[r, STEP] += 1
    s.rep[r, LIGHT_DONE] = done + 1
    s.rep[r, LIGHT_LEFT] -= 1
    s.rep[r, LIGHT_SUM] += n
    s.rep[r, LIGHT_MAX] += 1
    s.rep[r, OUTPUTS_SINCE] = 0
    s.rep[r, UNREPORTED] = 0
    s.state[NUM_CHUNKS] = n
    s.state[FIRST_ADMITTED] = n
    s.state[NUM_PREEMPTED] = 0
    s.state[HIT_TOKENS] = 0
    load = s.load
    load[0], load[1], load[2], load[3] = 0, 0, 0.0, 0
    load[4], load[5], load[6], load[7] = n, s.rep[r, LIGHT_SUM], s.rep[r, LIGHT_MAX], n


def light_output(s, r, t):  # type: ignore[no-untyped-def]
    """Take in the output of a light batch at ``t``; nobody finishes by it."""
    s.light_t[r, s.rep[r, LIGHT_OUT]] = t
    s.rep[r, LIGHT_OUT] += 1
    s.rep[r, BATCH_HEAD] = (s.rep[r, BATCH_HEAD] + 1) % s.batch.shape[1]
    s.rep[r, NUM_BATCHES] -= 1


def flush(s, r, last_column, record):  # type: ignore[no-untyped-def]
    """Make up for what the running requests missed, and turn light batches still in flight into ordinary ones."""
    done, out = s.rep[r, LIGHT_DONE], s.rep[r, LIGHT_OUT]
    s.rep[r, LIGHT_LEFT] = 0
    if done == 0:
        return
    req = s.req
    asynchronous = s.rep[r, ASYNC] > 0
    n = s.rep[r, NUM_RUNNING]
    for k in range(n):
        i = s.running[r, k]
        req[i, COMPUTED] += done
        req[i, IN_FLIGHT_TOKENS] += done - out
        req[i, NUM_TOKENS] += out
        count = req[i, OUTPUTS]
        if record:
            at = req[i, TOKENS] + count
            for m in range(out):
                s.token_s[at + m] = s.light_t[r, m]
        req[i, OUTPUTS] = count + out
        if out > 0:
            s.time[i, last_column] = s.light_t[r, out - 1]
        ready = req[i, COMPUTED]
        if asynchronous:
            req[i, PLACEHOLDERS] += done - out
            # numbered when scheduled: all known tokens; when an output came: all but the last
            ready = req[i, NUM_TOKENS] if s.rep[r, OUTPUTS_SINCE] == 0 else req[i, NUM_TOKENS] - 1
        if ready >= req[i, NEXT_FULL]:
            register_blocks(req, s.rep, s.block, s.same, s.table, s.numbers, r, i, ready)
    for b in range(s.rep[r, NUM_BATCHES]):
        slot = (s.rep[r, BATCH_HEAD] + b) % s.batch.shape[1]
        if s.batch[r, slot, 0] == LIGHT:
            s.batch[r, slot, 0] = n
            for k in range(n):
                s.batch[r, slot, k + 1] = (s.running[r, k] << 32) | 3  # one token, and it yields the next
    s.rep[r, LIGHT_DONE] = 0
    s.rep[r, LIGHT_OUT] = 0
