"""The rules of ``bench/sim/scheduler.py`` over flat arrays; compiled by ``bench/sim/compiled.py``."""

from __future__ import annotations

from bench.sim.compiled_kv import (
    ASYNC,
    BATCH_HEAD,
    BLOCK_SIZE,
    BY_PRIORITY,
    CAPACITY,
    CHUNKED,
    COMPUTED,
    ELIGIBLE_STEP,
    END,
    HIT,
    IN_FLIGHT_TOKENS,
    INPUT_BUDGET,
    LONG_ADAPTIVE,
    LONG_CAP,
    MAX_MODEL_LEN,
    MAX_RUNNING,
    NEXT_FULL,
    NUM_BATCHES,
    NUM_RUNNING,
    NUM_TOKENS,
    NUM_WAITING,
    PLACEHOLDERS,
    PREEMPTED_HERE,
    PRIORITY,
    RECEIVED,
    STAGES,
    STALE,
    STATUS,
    STEP,
    TOKEN_BUDGET,
    TOTAL,
    UNREPORTED,
    V2_RUNNER,
    WAITING_HEAD,
    admit,
    find_hit,
    free_blocks,
    grow,
    register_blocks,
)  # fmt: skip

WAITING, RUNNING, PREEMPTED, FINISHED = 0, 1, 2, 3
ARRIVAL = 0  # column of State.time
SKIPPED, VICTIMS, GOT_TOKEN, FINISHES = 0, 1, 2, 3  # rows of State.scratch
# Of State.state, results of the last schedule. Chunks from FIRST_ADMITTED on are of requests that waited before.
NUM_CHUNKS, NUM_PREEMPTED, HIT_TOKENS, FIRST_ADMITTED = 0, 1, 2, 3
TOKENS_MASK = (1 << 31) - 1


def before(s, a, b):  # type: ignore[no-untyped-def]
    """Does request a come before b by (priority, arrival, index)?"""
    if s.req[a, PRIORITY] != s.req[b, PRIORITY]:
        return s.req[a, PRIORITY] < s.req[b, PRIORITY]
    if s.time[a, ARRIVAL] != s.time[b, ARRIVAL]:
        return s.time[a, ARRIVAL] < s.time[b, ARRIVAL]
    return a < b


def wrapped(s, k):  # type: ignore[no-untyped-def]
    size = s.queue.shape[2]
    return k - size if k >= size else k


def add_waiting(s, r, i):  # type: ignore[no-untyped-def]
    s.queue[r, 0, wrapped(s, s.rep[r, WAITING_HEAD] + s.rep[r, NUM_WAITING])] = i
    s.rep[r, NUM_WAITING] += 1


def put_back_waiting(s, r, i):  # type: ignore[no-untyped-def]
    """In front; by priority the place does not matter, for the first is looked for."""
    head = s.rep[r, WAITING_HEAD] - 1
    if head < 0:
        head += s.queue.shape[2]
    s.rep[r, WAITING_HEAD] = head
    s.queue[r, 0, head] = i
    s.rep[r, NUM_WAITING] += 1


def first_waiting(s, r):  # type: ignore[no-untyped-def]
    """Offset in the ring of the request that is next."""
    if s.rep[r, BY_PRIORITY] == 0:
        return 0
    head = s.rep[r, WAITING_HEAD]
    best = 0
    for k in range(1, s.rep[r, NUM_WAITING]):
        if before(s, s.queue[r, 0, wrapped(s, head + k)], s.queue[r, 0, wrapped(s, head + best)]):
            best = k
    return best


def remove_waiting(s, r, offset):  # type: ignore[no-untyped-def]
    """Take the request at ``offset`` out of the ring, the others keep their order."""
    head = s.rep[r, WAITING_HEAD]
    if offset == 0:
        s.rep[r, WAITING_HEAD] = wrapped(s, head + 1)
    else:
        for k in range(offset, s.rep[r, NUM_WAITING] - 1):
            s.queue[r, 0, wrapped(s, head + k)] = s.queue[r, 0, wrapped(s, head + k + 1)]
    s.rep[r, NUM_WAITING] -= 1


def remove_running(s, r, position):  # type: ignore[no-untyped-def]
    for k in range(position, s.rep[r, NUM_RUNNING] - 1):
        s.running[r, k] = s.running[r, k + 1]
    s.rep[r, NUM_RUNNING] -= 1


def preempt(s, r, i):  # type: ignore[no-untyped-def]
    free_blocks(s.req, s.rep, s.block, s.table, r, i)
    s.req[i, STATUS] = PREEMPTED
    s.req[i, COMPUTED] = 0
    s.req[i, STALE] = s.req[i, IN_FLIGHT_TOKENS]
    s.req[i, PLACEHOLDERS] = 0
    s.req[i, PREEMPTED_HERE] += 1
    put_back_waiting(s, r, i)


def pick_victim(s, r):  # type: ignore[no-untyped-def]
    """Position in the running list."""
    if s.rep[r, BY_PRIORITY] == 0:
        return s.rep[r, NUM_RUNNING] - 1
    worst = 0
    for k in range(1, s.rep[r, NUM_RUNNING]):
        a, b = s.running[r, worst], s.running[r, k]
        same = s.req[b, PRIORITY] == s.req[a, PRIORITY]
        if s.req[b, PRIORITY] > s.req[a, PRIORITY] or (same and s.time[b, ARRIVAL] > s.time[a, ARRIVAL]):
            worst = k
    return worst


def long_prefill_cap(s, r):  # type: ignore[no-untyped-def]
    cap = s.rep[r, LONG_CAP]
    num_requests = s.rep[r, NUM_RUNNING] + s.rep[r, NUM_WAITING]
    if cap <= 0 or num_requests <= 1:
        return 0
    if s.rep[r, LONG_ADAPTIVE] > 0:
        cap = max(cap, s.rep[r, INPUT_BUDGET] // num_requests)
    return cap


def take_back(s, i):  # type: ignore[no-untyped-def]
    """Remove a preempted request from the step's chunks; the tokens it had."""
    for k in range(s.state[NUM_CHUNKS]):
        if s.chunk[k, 0] == i:
            tokens = s.chunk[k, 1]
            for m in range(k, s.state[NUM_CHUNKS] - 1):
                s.chunk[m, 0] = s.chunk[m + 1, 0]
                s.chunk[m, 1] = s.chunk[m + 1, 1]
            s.state[NUM_CHUNKS] -= 1
            return tokens
    return 0


def make_room(s, r, i, position):  # type: ignore[no-untyped-def]
    """Preempt one request so that i may grow. (position of i, tokens given back, whether i itself had to go)."""
    index = pick_victim(s, r)
    victim = s.running[r, index]
    remove_running(s, r, index)
    if index < position:
        position -= 1
    returned = take_back(s, victim) if s.rep[r, BY_PRIORITY] > 0 else 0
    preempt(s, r, victim)
    s.scratch[VICTIMS, s.state[NUM_PREEMPTED]] = victim
    s.state[NUM_PREEMPTED] += 1
    return position, returned, victim == i


def schedule_running(s, r, cap, room):  # type: ignore[no-untyped-def]
    """Chunks for running requests; the token budget that is left."""
    req, chunk, running = s.req, s.chunk, s.running
    max_len, step = s.rep[r, MAX_MODEL_LEN], s.rep[r, STEP]
    position = 0
    while position < s.rep[r, NUM_RUNNING] and room > 0:
        i = running[r, position]
        placeholders, computed = req[i, PLACEHOLDERS], req[i, COMPUTED]
        ends_in_flight = placeholders > 0 and computed + 2 - placeholders >= req[i, TOTAL]
        if ends_in_flight or step < req[i, ELIGIBLE_STEP]:
            position += 1
            continue
        num_new = req[i, NUM_TOKENS] + placeholders - computed
        if 0 < cap < num_new:
            num_new = cap
        num_new = min(num_new, room, max_len - computed - 1)
        if num_new <= 0:
            position += 1
            continue
        after = computed + num_new
        # the common case is decided here: the blocks held are enough, and none of them becomes full
        if after > req[i, CAPACITY] or min(after, req[i, NUM_TOKENS]) >= req[i, NEXT_FULL]:
            gone = False
            while not gone and not grow(req, s.rep, s.block, s.same, s.table, s.numbers, r, i, num_new):
                position, returned, gone = make_room(s, r, i, position)
                room += returned
            if gone:
                return room
        k = s.state[NUM_CHUNKS]
        chunk[k, 0] = i
        chunk[k, 1] = num_new
        s.state[NUM_CHUNKS] = k + 1
        room -= num_new
        position += 1
    return room


def schedule_waiting(s, r, cap, room):  # type: ignore[no-untyped-def]
    """Admit from the waiting queue."""
    num_skipped = 0
    req = s.req
    while room > 0 and s.rep[r, NUM_WAITING] > 0 and s.rep[r, NUM_RUNNING] < s.rep[r, MAX_RUNNING]:
        offset = first_waiting(s, r)
        i = s.queue[r, 0, wrapped(s, s.rep[r, WAITING_HEAD] + offset)]
        if req[i, STALE] > 0:
            remove_waiting(s, r, offset)
            s.scratch[SKIPPED, num_skipped] = i
            num_skipped += 1
            continue
        hit, revived = find_hit(req, s.rep, s.block, s.same, s.table, s.numbers, r, i)
        num_computed = hit * s.rep[r, BLOCK_SIZE]
        if req[i, RECEIVED] > num_computed and req[i, PREEMPTED_HERE] == 0:
            num_computed = req[i, RECEIVED]
        num_new = req[i, NUM_TOKENS] - num_computed
        if 0 < cap < num_new:
            num_new = cap
        if s.rep[r, CHUNKED] == 0 and num_new > room:
            break
        num_new = min(num_new, room)
        if not admit(req, s.rep, s.block, s.same, s.table, s.numbers, r, i, num_computed, num_new, hit, revived):
            break
        remove_waiting(s, r, offset)
        s.running[r, s.rep[r, NUM_RUNNING]] = i
        s.rep[r, NUM_RUNNING] += 1
        req[i, STATUS] = RUNNING
        req[i, COMPUTED] = num_computed
        if req[i, HIT] < 0:
            req[i, HIT] = num_computed
        s.state[HIT_TOKENS] += num_computed
        k = s.state[NUM_CHUNKS]
        s.chunk[k, 0] = i
        s.chunk[k, 1] = num_new
        s.state[NUM_CHUNKS] = k + 1
        room -= num_new
    for k in range(num_skipped - 1, -1, -1):
        put_back_waiting(s, r, s.scratch[SKIPPED, k])


def schedule(s, r):  # type: ignore[no-untyped-def]
    """Decide replica r's next step, put it into its batch ring and sum it up in ``load``."""
    s.rep[r, STEP] += 1
    s.state[NUM_CHUNKS] = 0
    s.state[NUM_PREEMPTED] = 0
    s.state[HIT_TOKENS] = 0
    cap = long_prefill_cap(s, r)
    room = schedule_running(s, r, cap, min(s.rep[r, TOKEN_BUDGET], s.rep[r, INPUT_BUDGET]))
    s.state[FIRST_ADMITTED] = s.state[NUM_CHUNKS]
    if s.state[NUM_PREEMPTED] == 0 and s.rep[r, NUM_WAITING] > 0:
        schedule_waiting(s, r, cap, room)
    advance(s, r)
    s.rep[r, UNREPORTED] = 0


def advance(s, r):  # type: ignore[no-untyped-def]
    """Count the chunks as computed."""
    req, chunk, load, batch = s.req, s.chunk, s.load, s.batch
    slot = (s.rep[r, BATCH_HEAD] + s.rep[r, NUM_BATCHES]) % batch.shape[1]
    asynchronous = s.rep[r, ASYNC] > 0
    eligible = s.rep[r, STEP] + s.rep[r, STAGES] if s.rep[r, V2_RUNNER] > 0 else 0
    requests = tokens = context = decodes = decode_sum = decode_max = 0
    pairs = 0.0
    count = s.state[NUM_CHUNKS]
    for k in range(count):
        i, n = chunk[k, 0], chunk[k, 1]
        c = req[i, COMPUTED]
        req[i, COMPUTED] = c + n
        req[i, IN_FLIGHT_TOKENS] += n
        emits = c + n >= req[i, NUM_TOKENS] + req[i, PLACEHOLDERS]
        if emits and asynchronous:
            req[i, PLACEHOLDERS] += 1
            req[i, ELIGIBLE_STEP] = eligible
        batch[r, slot, k + 1] = (i << 32) | (n << 1) | (1 if emits else 0)
        if emits and n == 1:
            decodes += 1
            decode_sum += c + 1
            decode_max = max(decode_max, c + 1)
        else:
            requests += 1
            tokens += n
            context += c
            pairs += n * c + n * (n + 1) / 2
    batch[r, slot, 0] = count
    s.rep[r, NUM_BATCHES] += 1
    load[0], load[1], load[2], load[3] = requests, tokens, pairs, context
    load[4], load[5], load[6], load[7] = decodes, decode_sum, decode_max, s.rep[r, NUM_RUNNING]


def finish(s, r, i):  # type: ignore[no-untyped-def]
    free_blocks(s.req, s.rep, s.block, s.table, r, i)
    if s.req[i, STATUS] == RUNNING:
        for k in range(s.rep[r, NUM_RUNNING]):
            if s.running[r, k] == i:
                remove_running(s, r, k)
                break
    else:
        for k in range(s.rep[r, NUM_WAITING]):
            if s.queue[r, 0, wrapped(s, s.rep[r, WAITING_HEAD] + k)] == i:
                remove_waiting(s, r, k)
                break
    s.req[i, STATUS] = FINISHED
    s.rep[r, UNREPORTED] = 1


def update(s, r):  # type: ignore[no-untyped-def]
    """Take in the oldest batch's output; fills two rows of scratch, returns how many got a token and how many finished."""
    req, batch, scratch = s.req, s.batch, s.scratch
    slot = s.rep[r, BATCH_HEAD]
    asynchronous = s.rep[r, ASYNC] > 0
    num_got = num_finished = 0
    for k in range(1, batch[r, slot, 0] + 1):
        entry = batch[r, slot, k]
        i, n = entry >> 32, (entry >> 1) & TOKENS_MASK
        stale = req[i, STALE] > 0
        req[i, IN_FLIGHT_TOKENS] -= n
        if stale:
            req[i, STALE] -= n
        if entry & 1 == 0 or req[i, STATUS] == FINISHED:
            continue
        scratch[GOT_TOKEN, num_got] = i
        num_got += 1
        known = req[i, NUM_TOKENS] + 1
        req[i, NUM_TOKENS] = known
        if asynchronous:
            if not stale:
                req[i, PLACEHOLDERS] -= 1
            ready = req[i, COMPUTED] - req[i, PLACEHOLDERS]
            if ready >= req[i, NEXT_FULL] and req[i, STATUS] == RUNNING:
                register_blocks(req, s.rep, s.block, s.same, s.table, s.numbers, r, i, ready)
        if known >= req[i, END]:
            finish(s, r, i)
            scratch[FINISHES, num_finished] = i
            num_finished += 1
    s.rep[r, BATCH_HEAD] = (slot + 1) % batch.shape[1]
    s.rep[r, NUM_BATCHES] -= 1
    return num_got, num_finished
