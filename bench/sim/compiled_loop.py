"""The event loop of ``bench/sim/loop.py`` over flat arrays; compiled by ``compiled.py``."""

from __future__ import annotations

import math

import numpy as np

from bench.sim.compiled_client import (
    ARRIVE,
    DEADLINE,
    DISAGGREGATED,
    DONE,
    FIRST,
    IN_FLIGHT,
    LAST,
    NUM_EVENTS,
    NUM_READY,
    QUEUED,
    READY,
    READY_HEAD,
    RECORD_TOKENS,
    SCHEDULED,
    STALLED,
    STOPPED,
    TRANSFER,
    TRANSFER_PER_TOKEN,
    completed,
    done,
    pop_event,
    push_event,
    push_ring,
    send,
    start_group,
)  # fmt: skip
from bench.sim.compiled_kv import (
    BATCH_HEAD,
    COMPUTED,
    DEPTH,
    ELIGIBLE_STEP,
    END,
    EXECUTED,
    FRUITLESS,
    HIT,
    HITS,
    IN_FLIGHT_TOKENS,
    INBOX_HEAD,
    LIGHT_LEFT,
    MAX_MODEL_LEN,
    MOST_FRUITLESS,
    NUM_BATCHES,
    NUM_FREE,
    NUM_INBOX,
    NUM_RUNNING,
    NUM_TOKENS,
    NUM_WAITING,
    OSL,
    OUTPUTS,
    OUTPUTS_SINCE,
    OUTSTANDING,
    PLACEHOLDERS,
    PREEMPTED_HERE,
    PREEMPTIONS,
    PREFILLED,
    PROMPT,
    RECEIVED,
    REPLICA,
    ROLE,
    STAGES,
    STALE,
    STATUS,
    STOP_AFTER,
    TOKENS,
    TOTAL,
    UNREPORTED,
    WAITS,
)  # fmt: skip
from bench.sim.compiled_light import LIGHT, enter, flush, light_output, light_schedule
from bench.sim.compiled_router import ROLE_PREFILL, is_member, pick_replica
from bench.sim.compiled_scheduler import (
    ARRIVAL,
    FINISHES,
    FIRST_ADMITTED,
    GOT_TOKEN,
    HIT_TOKENS,
    NUM_CHUNKS,
    NUM_PREEMPTED,
    VICTIMS,
    add_waiting,
    schedule,
    update,
    wrapped,
)  # fmt: skip
from bench.sim.step_time_kernel import step_time_s

BY_LENGTH, BY_STOP, REJECTED = 1, 2, 3
IDLE_SLEEP_S = 1e-3
NUM_STEP_COLUMNS = 17
# State.clock: when the replica acts next (inf: idle), when its link is free, then stages' and batches' times
NEXT_S, LINK_FREE_S, STAGE_FREE_S = 0, 1, 2


def arrive(s, t, i):  # type: ignore[no-untyped-def]
    req = s.req
    if math.isnan(s.time[i, QUEUED]):
        s.time[i, QUEUED] = t
    router = req[i, PREFILLED]
    member = 0
    while not is_member(s, router, member):
        member += 1
    if req[i, PROMPT] >= s.rep[member, MAX_MODEL_LEN]:
        completed(s, t, i, REJECTED)
        return
    r = pick_replica(s, router, i)
    prefill_only = s.state[DISAGGREGATED] > 0 and router == 0
    s.time[i, ARRIVAL] = t
    req[i, NUM_TOKENS] = req[i, PROMPT]
    max_tokens = 1 if prefill_only else req[i, OSL]
    req[i, TOTAL] = req[i, PROMPT] + max_tokens
    stop = req[i, STOP_AFTER] if req[i, STOP_AFTER] >= 0 and not prefill_only else max_tokens
    req[i, END] = min(req[i, PROMPT] + max(min(stop, max_tokens), 1), s.rep[r, MAX_MODEL_LEN])
    for column in (COMPUTED, PLACEHOLDERS, IN_FLIGHT_TOKENS, STALE, ELIGIBLE_STEP, STATUS, PREEMPTED_HERE):
        req[i, column] = 0
    req[i, RECEIVED] = req[i, PROMPT] - 1 if router > 0 else 0
    req[i, HIT] = -1
    s.queue[r, 1, wrapped(s, s.rep[r, INBOX_HEAD] + s.rep[r, NUM_INBOX])] = i
    s.rep[r, NUM_INBOX] += 1
    if math.isinf(s.clock[r, NEXT_S]):
        s.clock[r, NEXT_S] = t


def dispatch(s, r, t, steps, row):  # type: ignore[no-untyped-def]
    """Schedule a batch at ``t``, put it down in ``steps[row]``; the time at which it was handed to the device."""
    stages = s.rep[r, STAGES]
    slot = (s.rep[r, BATCH_HEAD] + s.rep[r, NUM_BATCHES]) % s.batch.shape[1]
    end_column = s.clock.shape[1] - s.batch.shape[1] + slot
    if s.rep[r, LIGHT_LEFT] > 0:
        light_schedule(s, r)
    else:
        flush(s, r, LAST, s.state[RECORD_TOKENS] > 0)
        schedule(s, r)
        enter(s, r)
    for k in range(s.state[NUM_PREEMPTED]):
        s.req[s.scratch[VICTIMS, k], PREEMPTIONS] += 1
    s.rep[r, FRUITLESS] += s.state[NUM_PREEMPTED]
    if s.rep[r, FRUITLESS] > s.rep[r, MOST_FRUITLESS]:
        s.state[STALLED] = 1
    for k in range(s.state[FIRST_ADMITTED], s.state[NUM_CHUNKS]):
        i = s.chunk[k, 0]
        if math.isnan(s.time[i, SCHEDULED]):
            s.time[i, SCHEDULED] = t
            s.req[i, HITS] = s.req[i, HIT]
    if s.state[NUM_CHUNKS] == 0:
        s.clock[r, end_column] = t
        return t
    s.rep[r, EXECUTED] = 1
    load = s.load
    gpu_s, host_s = step_time_s(
        s.coefficients[r], int(load[0]), int(load[1]), load[2], int(load[3]), int(load[4]), int(load[5]), int(load[6]),
        int(load[7]),
    )  # fmt: skip
    handed_over = t + host_s
    end = handed_over
    for stage in range(stages):
        end = max(end, s.clock[r, STAGE_FREE_S + stage]) + gpu_s / stages
        s.clock[r, STAGE_FREE_S + stage] = end
    s.clock[r, end_column] = end
    steps[row, 0], steps[row, 1], steps[row, 2], steps[row, 3], steps[row, 4] = r, t, end, gpu_s, host_s
    for k in range(8):
        steps[row, 5 + k] = load[k]
    steps[row, 13], steps[row, 14] = s.rep[r, NUM_WAITING], s.rep[r, NUM_FREE]
    steps[row, 15], steps[row, 16] = s.state[NUM_PREEMPTED], s.state[HIT_TOKENS]
    return handed_over


def has_requests(s, r):  # type: ignore[no-untyped-def]
    return s.rep[r, NUM_RUNNING] > 0 or s.rep[r, NUM_WAITING] > 0 or s.rep[r, UNREPORTED] > 0


def act(s, r, steps, row):  # type: ignore[no-untyped-def]
    """What replica r does at its time; 1 if that filled ``steps[row]``."""
    t = s.clock[r, NEXT_S]
    if s.rep[r, WAITS] > 0:
        take_output(s, r, t)
        return 0
    if s.rep[r, NUM_INBOX] > 0:
        s.rep[r, LIGHT_LEFT] = 0  # a step in full has to look at the new ones
    for _ in range(s.rep[r, NUM_INBOX]):
        add_waiting(s, r, s.queue[r, 1, s.rep[r, INBOX_HEAD]])
        s.rep[r, INBOX_HEAD] = wrapped(s, s.rep[r, INBOX_HEAD] + 1)
    s.rep[r, NUM_INBOX] = 0
    s.rep[r, EXECUTED] = 0
    if has_requests(s, r):
        t = dispatch(s, r, t, steps, row)
        if s.rep[r, NUM_BATCHES] < s.rep[r, DEPTH] and (s.rep[r, EXECUTED] > 0 or has_requests(s, r)):
            s.clock[r, NEXT_S] = t if s.rep[r, EXECUTED] > 0 else t + IDLE_SLEEP_S
            return s.rep[r, EXECUTED]
    elif s.rep[r, NUM_BATCHES] == 0:
        s.clock[r, NEXT_S] = math.inf
        return 0
    s.rep[r, WAITS] = 1
    oldest = s.clock[r, s.clock.shape[1] - s.batch.shape[1] + s.rep[r, BATCH_HEAD]]
    s.clock[r, NEXT_S] = max(t, oldest)
    return s.rep[r, EXECUTED]


def take_output(s, r, t):  # type: ignore[no-untyped-def]
    num_got = num_finished = 0
    if s.batch[r, s.rep[r, BATCH_HEAD], 0] == LIGHT:
        light_output(s, r, t)
        s.rep[r, FRUITLESS] = 0
    else:
        num_got, num_finished = update(s, r)
        if num_got > 0:
            s.rep[r, FRUITLESS] = 0
    s.rep[r, OUTPUTS_SINCE] += 1
    s.rep[r, WAITS] = 0
    if s.rep[r, EXECUTED] == 0 and has_requests(s, r):
        s.clock[r, NEXT_S] += IDLE_SLEEP_S
    req, time, scratch = s.req, s.time, s.scratch
    prefills = s.rep[r, ROLE] == ROLE_PREFILL
    if not prefills:
        record = s.state[RECORD_TOKENS] > 0
        for k in range(num_got):
            i = scratch[GOT_TOKEN, k]
            count = req[i, OUTPUTS]
            if count == 0:
                time[i, FIRST] = t
                req[i, REPLICA] = r
            if record:
                s.token_s[req[i, TOKENS] + count] = t
            req[i, OUTPUTS] = count + 1
            time[i, LAST] = t
    for k in range(num_finished):
        i = scratch[FINISHES, k]
        s.rep[r, OUTSTANDING] -= 1
        if prefills:
            begin = max(t + s.param[TRANSFER], s.clock[r, LINK_FREE_S])
            s.clock[r, LINK_FREE_S] = begin + s.param[TRANSFER_PER_TOKEN] * req[i, PROMPT]
            req[i, PREFILLED] = 1
            push_event(s, s.clock[r, LINK_FREE_S], ARRIVE, i)
        else:
            completed(s, t, i, BY_STOP if 0 <= req[i, STOP_AFTER] <= req[i, OUTPUTS] else BY_LENGTH)


def longer_table(steps):  # type: ignore[no-untyped-def]
    """The same rows in a table twice as long."""
    longer = np.empty((2 * len(steps), NUM_STEP_COLUMNS), dtype=np.float64)
    for k in range(len(steps)):
        for c in range(NUM_STEP_COLUMNS):
            longer[k, c] = steps[k, c]
    return longer


def run(s):  # type: ignore[no-untyped-def]
    """The whole simulation: (table of steps, how many rows of it, end time)."""
    num_replicas = len(s.rep)
    steps = np.empty((4096, NUM_STEP_COLUMNS), dtype=np.float64)
    row = np.int64(0)  # typed: a bare 0 makes numba compile everything below a second time for the literal
    now = 0.0
    start_group(s, 0.0)
    while (s.state[STOPPED] == 0 or s.state[IN_FLIGHT] > 0) and s.state[STALLED] == 0:
        r = np.int64(0)
        for k in range(1, num_replicas):
            if s.clock[k, NEXT_S] < s.clock[r, NEXT_S]:
                r = np.int64(k)
        event_s = s.event_t[0] if s.state[NUM_EVENTS] > 0 else math.inf
        upcoming = min(event_s, s.clock[r, NEXT_S])
        if math.isinf(upcoming) or upcoming > s.param[DEADLINE]:
            break
        now = upcoming
        if event_s <= s.clock[r, NEXT_S]:
            kind, i = pop_event(s)
            if kind == READY:
                push_ring(s, 0, READY_HEAD, NUM_READY, i)
                send(s, now)
            elif kind == ARRIVE:
                arrive(s, now, i)
            elif kind == DONE:
                done(s, now, i)
            else:
                send(s, now)
            continue
        if row == len(steps):
            steps = longer_table(steps)
        row += act(s, r, steps, row)
    for k in range(num_replicas):
        flush(s, k, LAST, s.state[RECORD_TOKENS] > 0)
    return steps, row, now
