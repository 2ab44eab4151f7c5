"""The client of ``bench/sim/loop.py`` over flat arrays: what is sent when, and the events of a run; compiled by ``compiled.py``."""

from __future__ import annotations

import math

from bench.sim.compiled_kv import ENDED, FOLLOWS, NEXT_TURN

READY, ARRIVE, DONE, LIMIT = 0, 1, 2, 3
# Columns of State.time besides ARRIVAL (at the replica where it is now)
SENT, DUE_ABS, QUEUED, SCHEDULED, FIRST, LAST, THINK, DUE, NUM_TIME = 1, 2, 3, 4, 5, 6, 7, 8, 9
# State.state, after the results of the last schedule
(
    NUM_EVENTS, SEQUENCE, READY_HEAD, NUM_READY, FRESH_HEAD, NUM_FRESH, IN_FLIGHT, GROUP, LEFT, NUM_COMPLETED, NUM_GROUPS,
    TIMED_GROUP, ROUTING, DISAGGREGATED, RECORD_TOKENS, TURN, TURN_DECODE, NEXT_MEMBER, NUM_DONE,
    STOPPED, HAS_MINIMA, MIN_REQUESTS, STALLED, NUM_STATE,
) = range(4, 28)  # fmt: skip
# State.param
(
    DEADLINE, BEFORE, AFTER, TRANSFER, TRANSFER_PER_TOKEN, MAX_DURATION, MIN_DURATION, BEGIN, FRONT_END, FRONT_END_FREE,
    NUM_PARAM,
) = range(11)  # fmt: skip


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
    count = int(min(limit - s.state[IN_FLIGHT], s.state[NUM_READY] + s.state[NUM_FRESH]))
    if count <= 0:
        return
    s.param[FRONT_END_FREE] = max(s.param[FRONT_END_FREE], t) + count * s.param[FRONT_END]
    arrival_s = s.param[FRONT_END_FREE] + (s.param[BEFORE] - s.param[FRONT_END])
    for _ in range(count):
        if s.state[NUM_FRESH] > 0:
            i = pop_ring(s, 1, FRESH_HEAD, NUM_FRESH)
        else:
            i = pop_ring(s, 0, READY_HEAD, NUM_READY)
        s.state[IN_FLIGHT] += 1
        s.time[i, SENT] = t
        push_event(s, arrival_s, ARRIVE, i)


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


def completed(s, t, i, how):  # type: ignore[no-untyped-def]
    s.req[i, ENDED] = how
    s.completed[s.state[NUM_COMPLETED]] = i
    s.state[NUM_COMPLETED] += 1
    push_event(s, t + s.param[AFTER], DONE, i)
