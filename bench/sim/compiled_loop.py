"""The event loop of ``bench/sim/loop.py`` and the rules of ``router.py`` over flat arrays; compiled by ``compiled.py``."""

from __future__ import annotations

import math

import numpy as np

from bench.sim.compiled_kv import (
    BATCH_HEAD,
    BLOCK_SIZE,
    COMPUTED,
    DEPTH,
    ELIGIBLE_STEP,
    END,
    ENDED,
    EXECUTED,
    FOLLOWS,
    HIT,
    HITS,
    IN_FLIGHT_TOKENS,
    INBOX_HEAD,
    LIGHT_LEFT,
    MAX_MODEL_LEN,
    NEXT_TURN,
    NUM_BATCHES,
    NUM_FREE,
    NUM_INBOX,
    NUM_NUMBERS,
    NUM_RUNNING,
    NUM_TOKENS,
    NUM_WAITING,
    NUMBERS,
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

READY, ARRIVE, DONE, LIMIT = 0, 1, 2, 3
BY_LENGTH, BY_STOP, REJECTED = 1, 2, 3
ROUND_ROBIN, LEAST_LOADED, PREFIX_AWARE = 0, 1, 2
ROLE_BOTH, ROLE_PREFILL, ROLE_DECODE = 0, 1, 2
IDLE_SLEEP_S = 1e-3
MIN_MATCH_RATIO, MAX_IMBALANCE = 0.5, 32
NUM_STEP_COLUMNS = 17
# Columns of State.time besides ARRIVAL (at the replica where it is now)
SENT, DUE_ABS, QUEUED, SCHEDULED, FIRST, LAST, THINK, DUE, NUM_TIME = 1, 2, 3, 4, 5, 6, 7, 8, 9
# State.state, after the results of the last schedule
(
    NUM_EVENTS, SEQUENCE, READY_HEAD, NUM_READY, FRESH_HEAD, NUM_FRESH, IN_FLIGHT, GROUP, LEFT, NUM_COMPLETED, NUM_GROUPS,
    TIMED_GROUP, ROUTING, DISAGGREGATED, RECORD_TOKENS, TURN, TURN_DECODE, NEXT_MEMBER, NUM_DONE,
    STOPPED, HAS_MINIMA, MIN_REQUESTS, NUM_STATE,
) = range(4, 27)  # fmt: skip
# State.param
DEADLINE, BEFORE, AFTER, TRANSFER, TRANSFER_PER_TOKEN, MAX_DURATION, MIN_DURATION, BEGIN, NUM_PARAM = range(9)
# State.clock: when the replica acts next (inf: idle), then stages' and batches' times
NEXT_S, STAGE_FREE_S = 0, 1


def push_event(s, t, kind, index):  # type: ignore[no-untyped-def]
    k = s.state[NUM_EVENTS]
    sequence = s.state[SEQUENCE]
    s.state[NUM_EVENTS] = k + 1
    s.state[SEQUENCE] = sequence + 1
    while k > 0:
        parent = (k - 1) >> 1
        if s.event_t[parent] <= t:  # an equal time has the smaller sequence
            break
        s.event_t[k] = s.event_t[parent]
        for c in range(3):
            s.event[k, c] = s.event[parent, c]
        k = parent
    s.event_t[k] = t
    s.event[k, 0], s.event[k, 1], s.event[k, 2] = sequence, kind, index


def pop_event(s):  # type: ignore[no-untyped-def]
    """(kind, index) of the earliest event."""
    kind, index = s.event[0, 1], s.event[0, 2]
    n = s.state[NUM_EVENTS] - 1
    s.state[NUM_EVENTS] = n
    t, sequence, last_kind, last_index = s.event_t[n], s.event[n, 0], s.event[n, 1], s.event[n, 2]
    k = 0
    while True:
        child = 2 * k + 1
        if child >= n:
            break
        right = child + 1
        if right < n and (
            s.event_t[right] < s.event_t[child]
            or (s.event_t[right] == s.event_t[child] and s.event[right, 0] < s.event[child, 0])
        ):
            child = right
        if t < s.event_t[child] or (t == s.event_t[child] and sequence < s.event[child, 0]):
            break
        s.event_t[k] = s.event_t[child]
        for c in range(3):
            s.event[k, c] = s.event[child, c]
        k = child
    s.event_t[k] = t
    s.event[k, 0], s.event[k, 1], s.event[k, 2] = sequence, last_kind, last_index
    return kind, index


def push_ring(s, which, head, count, i):  # type: ignore[no-untyped-def]
    k = s.state[head] + s.state[count]
    size = s.ring.shape[1]
    s.ring[which, k - size if k >= size else k] = i
    s.state[count] += 1


def pop_ring(s, which, head, count):  # type: ignore[no-untyped-def]
    i = s.ring[which, s.state[head]]
    k = s.state[head] + 1
    s.state[head] = 0 if k == s.ring.shape[1] else k
    s.state[count] -= 1
    return i


def start_group(s, t):  # type: ignore[no-untyped-def]
    """Release the next group that has members; ``members`` holds, group by group, a count and then the requests."""
    while s.state[LEFT] == 0 and s.state[GROUP] + 1 < s.state[NUM_GROUPS] and not over(s, t):
        s.state[GROUP] += 1
        at = s.state[NEXT_MEMBER]
        count = s.members[at]
        s.state[LEFT] = count
        s.state[NEXT_MEMBER] = at + 1 + count
        if s.state[GROUP] == s.state[TIMED_GROUP]:
            s.param[BEGIN] = t
            s.param[DEADLINE] = t + s.param[MAX_DURATION]
            for k in range(1, len(s.limit)):
                push_event(s, t + s.limit[k, 0], LIMIT, 0)
        for k in range(at + 1, at + 1 + count):
            i = s.members[k]
            due = s.time[i, DUE]
            if not math.isnan(due):
                s.time[i, DUE_ABS] = t + due
                if s.req[i, FOLLOWS] == 0:
                    push_event(s, t + due, READY, i)
            elif s.req[i, FOLLOWS] == 0:
                push_ring(s, 1, FRESH_HEAD, NUM_FRESH, i)
    send(s, t)


def over(s, t):  # type: ignore[no-untyped-def]
    """Whether the stop rule lets nothing more out."""
    counts = s.state[HAS_MINIMA] > 0 and s.state[GROUP] >= s.state[TIMED_GROUP]
    enough = s.state[NUM_DONE] >= s.state[MIN_REQUESTS]
    if counts and enough and t - s.param[BEGIN] >= s.param[MIN_DURATION]:
        s.state[STOPPED] = 1
    return s.state[STOPPED] > 0


def send(s, t):  # type: ignore[no-untyped-def]
    if over(s, t):
        return
    limit = math.inf
    if s.state[GROUP] >= s.state[TIMED_GROUP]:
        limit = s.limit[0, 1]
        for k in range(1, len(s.limit)):
            if s.param[BEGIN] + s.limit[k, 0] <= t:
                limit = s.limit[k, 1]
    while s.state[IN_FLIGHT] < limit and (s.state[NUM_READY] > 0 or s.state[NUM_FRESH] > 0):
        if s.state[NUM_FRESH] > 0:
            i = pop_ring(s, 1, FRESH_HEAD, NUM_FRESH)
        else:
            i = pop_ring(s, 0, READY_HEAD, NUM_READY)
        s.state[IN_FLIGHT] += 1
        s.time[i, SENT] = t
        push_event(s, t + s.param[BEFORE], ARRIVE, i)


def done(s, t, i):  # type: ignore[no-untyped-def]
    s.state[IN_FLIGHT] -= 1
    s.state[LEFT] -= 1
    if s.state[GROUP] >= s.state[TIMED_GROUP]:
        s.state[NUM_DONE] += 1
    following = s.req[i, NEXT_TURN]
    if following >= 0:
        ready = t + s.time[following, THINK]
        if not math.isnan(s.time[following, DUE_ABS]):
            ready = max(ready, s.time[following, DUE_ABS])
        push_event(s, ready, READY, following)
    if s.state[LEFT] == 0:
        start_group(s, t)
    else:
        send(s, t)


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


def completed(s, t, i, how):  # type: ignore[no-untyped-def]
    s.req[i, ENDED] = how
    s.completed[s.state[NUM_COMPLETED]] = i
    s.state[NUM_COMPLETED] += 1
    push_event(s, t + s.param[AFTER], DONE, i)


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
    else:
        num_got, num_finished = update(s, r)
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
            req[i, PREFILLED] = 1
            push_event(s, t + s.param[TRANSFER] + s.param[TRANSFER_PER_TOKEN] * req[i, PROMPT], ARRIVE, i)
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
    while s.state[STOPPED] == 0 or s.state[IN_FLIGHT] > 0:
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
