# SPDX-License-Identifier: Apache-2.0
"""The timing model: the golden decisions, driven by a cycle model of accelerator, link and buffer.

Semantics are those of architecture sections 2, 3, 5, 8 and 10. What is *decided* is never written
here: learning, selection, victims and admission are the functions of
:mod:`stmoe_golden.predictor` and :mod:`stmoe_golden.buffer`. What is here is *when*: the
accelerator (attention, then K experts in the order of their grants, one at a time), the link
(bursts with a latency, in order, demand before prefetch, at most ``prefetch_outstanding`` bursts
of prefetch ahead of a demand) and the cycles that the engine itself takes.

Where the memory behind the link (the *near* tier) does not hold all experts, one that it lacks is
read from the *far* tier behind it, into the place of the one that was loaded longest ago. The far
tier reads whole experts, in the order in which their loads began, and all that it has been asked
for, even if the load is cancelled; a burst's address goes out once its data are in the near tier.

Time is in cycles, integers. A demand is never pre-empted, so all its bursts are timed at once; a
prefetch is timed burst by burst up to the next routing event. So everything between two events
happens in the order of time without an event queue.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from . import buffer as _buffer
from . import confidence as _confidence
from . import predictor as _predictor
from .buffer import READY, READY_UNUSED, Lane, admits, lowest, new_buffer, victim
from .compilation import NO_ARRAY_MADE
from .confidence import (
    GateParams,
    GateState,
    new_gate,
    note_bad,
    note_event,
    note_good,
    threshold_of,
)
from .config import EngineConfig
from .machine import (
    IDEAL,
    EngineCycles,
    Machine,
    TimingError,
    engine_cycles,
    machine_for_harness,
    machine_for_ratio,
)
from .policies.base import LARGEST, Plan, Policy, Retention
from .predictor import begin_sequence, new_state, observe, params_of, pick
from .traces import Trace, check_shape

__all__ = [
    "COUNTS",
    "IDEAL",
    "TIMELINE_KINDS",
    "EngineCycles",
    "Machine",
    "TimedResult",
    "TimingError",
    "TimingStopped",
    "engine_cycles",
    "machine_for_harness",
    "machine_for_ratio",
    "simulate",
]


class TimingStopped(Exception):
    """:func:`simulate` was told to stop."""


CHUNK = 256
"""Tokens per call of the compiled loop: between two calls an interrupt is seen."""

NEVER = 1 << 62
LOADING_PREFETCH = int(Lane.LOADING_PREFETCH)
PINNED = int(Lane.PINNED)
NONE = int(Lane.NONE)
OWN_LAYER, GLOBAL = int(Retention.LAYER), int(Retention.GLOBAL)
PROTECTED = LARGEST
"""Added to what an expert is worth while a guess says that the next layer needs it."""

kernel = njit(**NO_ARRAY_MADE)
inline = njit(forceinline=True, **NO_ARRAY_MADE)
"""For short functions."""


class PolicyParams(NamedTuple):
    """A policy's class attributes, for the compiled loop."""

    learned: bool
    guesses: bool
    prefetches: bool
    values: bool
    keeps: bool
    compares: bool
    form: int
    look: int
    use_shift: int
    record: bool
    gate: GateParams
    bonus: int


COUNTS = (
    "hits",
    "useful",
    "late",
    "misses",
    "prefetch_loads",
    "demand_loads",
    "cancelled",
    "useless",
    "pollution",
    "dropped",
    "link_cycles",
    "stall_cycles",
    "compute_cycles",
    "lru_misses",
    "lru_misses_prefetched",
    "selected",
    "evictions",
    "skipped",
    "far_loads",
    "far_cycles",
)
"""Columns of the counts of each layer; link cycles are those of the bursts asked for while the
layer ran, all others belong to the layer of the expert. ``far_loads`` are the loads of an expert
that the near tier did not hold."""

(
    HITS,
    USEFUL,
    LATE,
    MISSES,
    PREFETCH_LOADS,
    DEMAND_LOADS,
    CANCELLED,
    USELESS,
    POLLUTION,
    DROPPED,
    LINK,
    STALL,
    COMPUTE,
    LRU_MISSES,
    LRU_PREFETCHED,
    SELECTED,
    EVICTIONS,
    SKIPPED,
    FAR_LOADS,
    FAR_CYCLES,
) = range(len(COUNTS))

TIMELINE_KINDS = ("attention", "expert", "demand", "prefetch", "cancelled", "stall", "far")
"""Spans of a timeline: the accelerator's; a load from when it begins (it may wait for the far tier
then) to its last data, by how it began; a prefetch that was cancelled; waiting for experts; the far
tier reading an expert."""
ATTENTION, EXPERT, DEMAND, PREFETCH, CANCEL, WAIT, FAR_READ = range(len(TIMELINE_KINDS))

# Scalars of the run, in one array.
(
    NOW,  # the token before has ended
    ADDRESS,  # next address at the earliest
    CHANNEL,  # the link's data are free from here on
    ACTIVE,  # prefetch that has bursts left, -1 if none
    QUEUE_HEAD,
    QUEUE_LENGTH,
    LOOK,  # next prefetch is looked at from here on
    FREE,  # free slots
    HELD,  # prefetches that hold a slot
    UNUSED,  # residents prefetched and not used
    EVENT,  # routing events so far
    LATEST,  # layer of the latest event
    RING,
    RING_PREFETCH,
    DRAINING,
    ORDER,
    SPANS,
    BUSY_UNTIL,  # the engine takes no route before
    NEXT_END,  # no prefetch in flight ends before
    LOADS,  # loads begun so far
    NEAR_HELD,  # experts that the near tier holds
    FAR_FREE,  # the far tier is free from here on
    SCALARS,
) = range(23)


class RunState(NamedTuple):
    """All that changes while the loop runs, but for the predictor and the buffer."""

    c: np.ndarray
    """int64 [SCALARS]."""
    base: np.ndarray
    """int32 [L, E]: what experts are worth (the predictor's scores where it is learned)."""
    score: np.ndarray
    """int32 [L, E]: guesses (the predictor's scores where it is learned)."""
    use: np.ndarray
    """int32 [L, E]: the predictor's use counts, 0 otherwise."""
    gate: GateState
    """Levels, and what they are moved by."""
    current: np.ndarray
    """bool [E]: set of the latest event."""
    by_prefetch: np.ndarray
    """bool [L, E]: its latest load was a prefetch."""
    polluted: np.ndarray
    """bool [L, E]: a prefetch has evicted it."""
    ring: np.ndarray
    """int64: ends of the latest bursts."""
    ring_prefetch: np.ndarray
    """int64 [P, 2]: end and transfer of the latest bursts of prefetch."""
    transfers: np.ndarray
    """int64 [X, 9]: prefetches in flight, see below."""
    near: np.ndarray
    """int64 [L, E]: the number of its latest load, 0 where the near tier does not hold it; empty
    where there is no other."""
    far_begin: np.ndarray
    """int64 [L, E]: when the far tier began to deliver it the last time; empty as ``near``."""
    queue: np.ndarray
    """int64 [limit * look, 3]: layer, expert, time from which it is in the queue."""
    allowed: np.ndarray
    """bool [E]: experts that the selection under way may still pick."""
    picks: np.ndarray
    """int64 [limit]: those that it has picked."""
    grants: np.ndarray
    """int64 [K, 2]: time of the grant, expert."""
    free_slots: np.ndarray
    """int32 [slots]."""
    counts: np.ndarray
    """int64 [L, COUNTS]."""
    spans: np.ndarray
    """int64 [n, 6]: kind, begin, end, layer, expert, slot."""


# Columns of a transfer.
X_STATE, X_LAYER, X_EXPERT, X_SLOT, X_LEFT, X_END, X_BEGIN, X_ORDER, X_DELIVERY = range(9)
X_FREE, X_LOADING, X_DRAINING = range(3)


# The link ------------------------------------------------------------------------------------


@kernel
def _span(s, kind, begin, end, layer, expert, slot):
    """A line of the timeline, while there is room."""
    n = s.c[SPANS]
    if n < len(s.spans):
        s.spans[n, 0] = kind
        s.spans[n, 1] = begin
        s.spans[n, 2] = end
        s.spans[n, 3] = layer
        s.spans[n, 4] = expert
        s.spans[n, 5] = slot
        s.c[SPANS] = n + 1


@inline
def _burst_time(m, s, at, prefetch):
    """When the next address goes out, asked for from ``at`` on."""
    t = max(at, s.c[ADDRESS], s.ring[s.c[RING]])
    if prefetch:
        t = max(t, s.ring_prefetch[s.c[RING_PREFETCH], 0] + m.engine.ready)
    return t


@inline
def _burst(m, s, layer, t, cycles, transfer):
    """A burst whose address goes out at ``t``; the time at which its last data have come."""
    end = max(t + m.latency[layer], s.c[CHANNEL]) + cycles
    s.c[CHANNEL] = end
    s.c[ADDRESS] = t + m.engine.address
    s.ring[s.c[RING]] = end
    s.c[RING] = s.c[RING] + 1 if s.c[RING] + 1 < len(s.ring) else 0
    if transfer >= 0:
        i = s.c[RING_PREFETCH]
        s.ring_prefetch[i, 0] = end
        s.ring_prefetch[i, 1] = transfer
        s.c[RING_PREFETCH] = i + 1 if i + 1 < len(s.ring_prefetch) else 0
    s.counts[s.c[LATEST], LINK] += cycles
    return end


@kernel
def _look_up(m, q, s, layer, expert, slot, at):
    """A load that begins at ``at``: from when on the far tier delivers it, -1 where all of it is
    near."""
    s.c[LOADS] += 1
    held = s.near[layer, expert] > 0
    s.near[layer, expert] = s.c[LOADS]
    if held:
        begin = s.far_begin[layer, expert]
        return begin if begin + m.far_load[layer] > at else -1
    if s.c[NEAR_HELD] < m.near:
        s.c[NEAR_HELD] += 1
    else:
        oldest = s.c[LOADS]
        oldest_layer, oldest_expert = layer, expert
        for n in range(s.near.shape[0]):
            for e in range(s.near.shape[1]):
                if 0 < s.near[n, e] < oldest:
                    oldest = s.near[n, e]
                    oldest_layer, oldest_expert = n, e
        s.near[oldest_layer, oldest_expert] = 0
    begin = max(at + m.far_latency[layer], s.c[FAR_FREE])
    s.far_begin[layer, expert] = begin
    s.c[FAR_FREE] = begin + m.far_load[layer]
    s.counts[layer, FAR_LOADS] += 1
    s.counts[layer, FAR_CYCLES] += m.far_load[layer]
    if q.record:
        _span(s, FAR_READ, begin, s.c[FAR_FREE], layer, expert, slot)
    return begin


@inline
def _delivery(m, q, s, layer, expert, slot, at):
    """As :func:`_look_up`, where there may be no far tier."""
    return _look_up(m, q, s, layer, expert, slot, at) if len(s.near) > 0 else -1


@inline
def _arrived(m, layer, delivery, left):
    """When all but the last ``left`` cycles of a load have come from the far tier, at least."""
    if delivery < 0:
        return 0
    part = (m.load[layer] - left) * m.far_load[layer]
    return delivery + (part + m.load[layer] - 1) // m.load[layer]


@inline
def _load_demand(m, s, layer, left, at, delivery):
    """All bursts of a demand; the time at which its last data have come. ``delivery`` is what
    :func:`_delivery` said of the load."""
    depth = len(s.ring)
    n = -(-left // m.burst)
    if m.latency[layer] == 0 and m.engine.address == 0 and n > depth and delivery < 0:
        # Without latency the link never waits for an address, so only the last bursts matter.
        s.counts[s.c[LATEST], LINK] += left
        start = max(at, s.c[ADDRESS], s.c[CHANNEL])
        end = start + left
        s.c[CHANNEL] = end
        s.c[ADDRESS] = max(at, s.c[ADDRESS], start + (n - depth) * m.burst)
        for i in range(depth - 1):
            s.ring[i] = start + (n - depth + 1 + i) * m.burst
        s.ring[depth - 1] = end
        s.c[RING] = 0
        return end
    end = at
    while left > 0:
        cycles = min(left, m.burst)
        t = max(_burst_time(m, s, at, False), _arrived(m, layer, delivery, left - cycles))
        end = _burst(m, s, layer, t, cycles, -1)
        left -= cycles
    return end


@kernel
def _complete(s, b, until):
    """Prefetches that have ended by ``until`` become resident, or their slots free."""
    if s.c[NEXT_END] > until:
        return
    following = NEVER
    for x in range(len(s.transfers)):
        row = s.transfers[x]
        if row[X_STATE] == X_FREE or row[X_LEFT] > 0:
            continue
        if row[X_END] > until:
            following = min(following, row[X_END])
            continue
        layer, expert = row[X_LAYER], row[X_EXPERT]
        if row[X_STATE] == X_LOADING:
            b.lane[layer, expert] = READY_UNUSED
            s.c[UNUSED] += 1
        else:
            s.free_slots[s.c[FREE]] = row[X_SLOT]
            s.c[FREE] += 1
            s.c[DRAINING] -= 1
            b.held[layer] -= 1
        row[X_STATE] = X_FREE
        s.c[HELD] -= 1
    s.c[NEXT_END] = following


# The buffer ----------------------------------------------------------------------------------


@kernel
def _lowest_of_all(b, s, use_shift, latest):
    """The evictable expert of all layers that is worth least, the current set excepted."""
    nothing = s.current[:0]
    best_layer, best, best_value = -1, -1, 0
    for m in range(len(b.lane)):
        if b.held[m] == 0:
            continue
        kept = s.current if m == latest else nothing
        e = lowest(b.lane[m], s.base[m], s.use[m], use_shift, kept)
        if e >= 0:
            value = s.base[m, e] + (s.use[m, e] << use_shift)
            if best < 0 or value < best_value:
                best_layer, best, best_value = m, e, value
    return best_layer, best


@inline
def _victim(m, q, s, b, layer, demand):
    """Whose slot a load of ``layer`` takes: the golden walk, or another form of retention."""
    latest = s.c[LATEST]
    if q.form == OWN_LAYER:
        share = m.slots // len(b.held)
        if b.held[layer] >= max(1, share):
            kept = s.current if layer == latest else s.current[:0]
            e = lowest(b.lane[layer], s.base[layer], s.use[layer], q.use_shift, kept)
            if e >= 0:
                return layer, e
    elif q.form == GLOBAL:
        found, e = _lowest_of_all(b, s, q.use_shift, latest)
        if e >= 0:
            return found, e
    return victim(b, s.base, s.use, q.use_shift, layer, latest, s.current, demand)


@inline
def _evict(q, s, b, layer, expert, prefetch):
    """Takes a resident's slot."""
    slot = b.slot[layer, expert]
    if b.lane[layer, expert] == READY_UNUSED:
        s.counts[layer, USELESS] += 1
        note_bad(q.gate, s.gate, layer)
        s.c[UNUSED] -= 1
    b.lane[layer, expert] = NONE
    b.slot[layer, expert] = -1
    b.held[layer] -= 1
    s.counts[layer, EVICTIONS] += 1
    if prefetch:
        s.polluted[layer, expert] = True
    return slot


@inline
def _place(s, b, layer, expert, slot, prefetch):
    """Gives a slot to a load."""
    b.slot[layer, expert] = slot
    b.held[layer] += 1
    s.by_prefetch[layer, expert] = prefetch
    s.polluted[layer, expert] = False


@inline
def _take_free(s):
    """A free slot."""
    s.c[FREE] -= 1
    return s.free_slots[s.c[FREE]]


@kernel
def _start_prefetch(m, q, s, b, t):
    """The head of the queue at time ``t``: starts, is dropped, or finds no victim yet (False)."""
    layer = s.queue[s.c[QUEUE_HEAD], 0]
    expert = s.queue[s.c[QUEUE_HEAD], 1]
    at = t + m.engine.start
    if s.c[FREE] > 0:
        slot = _take_free(s)
    else:
        vl, ve = _victim(m, q, s, b, layer, False)
        at += m.engine.search
        if ve < 0:
            return False
        if q.compares and not admits(s.base, s.use, q.use_shift, q.bonus, layer, expert, vl, ve):
            s.counts[layer, DROPPED] += 1
            s.c[QUEUE_HEAD] += 1
            s.c[QUEUE_LENGTH] -= 1
            s.c[LOOK] = at
            return True
        slot = _evict(q, s, b, vl, ve, True)
    s.c[QUEUE_HEAD] += 1
    s.c[QUEUE_LENGTH] -= 1
    _place(s, b, layer, expert, slot, True)
    b.lane[layer, expert] = LOADING_PREFETCH
    s.counts[layer, PREFETCH_LOADS] += 1
    x = 0
    while s.transfers[x, X_STATE] != X_FREE:
        x += 1
    row = s.transfers[x]
    row[X_STATE] = X_LOADING
    row[X_LAYER] = layer
    row[X_EXPERT] = expert
    row[X_SLOT] = slot
    row[X_LEFT] = m.load[layer]
    row[X_BEGIN] = at
    row[X_END] = at
    row[X_DELIVERY] = _delivery(m, q, s, layer, expert, slot, at)
    row[X_ORDER] = s.c[ORDER]
    s.c[ORDER] += 1
    s.c[HELD] += 1
    s.c[ACTIVE] = x
    return True


@kernel
def _advance(m, q, s, b, until):
    """Prefetches go on until the time ``until``."""
    while True:
        x = s.c[ACTIVE]
        if x >= 0:
            row = s.transfers[x]
            cycles = min(row[X_LEFT], m.burst)
            arrived = _arrived(m, row[X_LAYER], row[X_DELIVERY], row[X_LEFT] - cycles)
            t = max(_burst_time(m, s, row[X_BEGIN], True), arrived)
            if t >= until:
                return
            end = _burst(m, s, row[X_LAYER], t, cycles, x)
            row[X_LEFT] -= cycles
            row[X_END] = end + m.engine.fill
            if row[X_LEFT] == 0:
                s.c[NEXT_END] = min(s.c[NEXT_END], row[X_END])
                s.c[ACTIVE] = -1
                s.c[LOOK] = t + m.engine.ready
                if q.record:
                    _span(s, PREFETCH, row[X_BEGIN], end, row[X_LAYER], row[X_EXPERT], row[X_SLOT])
            continue
        if s.c[QUEUE_LENGTH] == 0:
            return
        t = max(s.c[LOOK], s.queue[s.c[QUEUE_HEAD], 2])
        t = max(t, s.ring_prefetch[s.c[RING_PREFETCH], 0] + m.engine.ready)
        if t >= until:
            return
        _complete(s, b, t)
        if s.c[HELD] < m.prefetch_loads and _start_prefetch(m, q, s, b, t):
            continue
        # Nothing can change before the next load ends.
        if s.c[NEXT_END] == NEVER:
            return
        s.c[LOOK] = s.c[NEXT_END]


@kernel
def _cancel(q, s, b, x, now):
    """Nothing more of a prefetch is asked for; its slot drains."""
    row = s.transfers[x]
    row[X_STATE] = X_DRAINING
    row[X_LEFT] = 0
    s.c[DRAINING] += 1
    s.counts[row[X_LAYER], CANCELLED] += 1
    note_bad(q.gate, s.gate, row[X_LAYER])
    b.lane[row[X_LAYER], row[X_EXPERT]] = NONE
    b.slot[row[X_LAYER], row[X_EXPERT]] = -1
    s.c[NEXT_END] = min(s.c[NEXT_END], row[X_END])
    if s.c[ACTIVE] == x:
        s.c[ACTIVE] = -1
        s.c[LOOK] = now


# The loop ------------------------------------------------------------------------------------


@kernel
def _wait_for_slot(m, q, s, b, layer, granted, now):
    """No slot and no victim for a demand: make room (architecture section 2), and wait for the
    next thing that may help. Returns the time then."""
    if s.c[DRAINING] == 0:
        newest = -1
        for x in range(len(s.transfers)):
            if s.transfers[x, X_STATE] == X_LOADING and (
                newest < 0 or s.transfers[x, X_ORDER] > s.transfers[newest, X_ORDER]
            ):
                newest = x
        if newest >= 0:
            _cancel(q, s, b, newest, now)
    t = s.c[NEXT_END]
    # Experts that have been granted run in that order, and are released.
    ran = s.c[BUSY_UNTIL]
    first = NEVER
    for _ in range(granted):
        best = -1
        for k in range(granted):
            if s.grants[k, 1] >= 0 and (best < 0 or s.grants[k, 0] < s.grants[best, 0]):
                best = k
        ran = max(ran, s.grants[best, 0]) + m.expert[layer]
        e = s.grants[best, 1]
        s.grants[best, 1] = -1 - e
        if b.lane[layer, e] == PINNED:
            if ran <= now:
                b.lane[layer, e] = READY
                first = min(first, now)
            else:
                first = min(first, ran)
    for k in range(granted):
        if s.grants[k, 1] < 0:
            s.grants[k, 1] = -1 - s.grants[k, 1]
    t = max(now, min(t, first))
    _complete(s, b, t)
    return t


@inline
def _route(m, q, s, b, layer, used, now, missed_by_lru, token_misses):
    """A routing event taken at ``now``: grants, promotions, cancels and demands.

    Fills ``grants``; returns the time from which the score may be committed.
    """
    g = m.engine
    counts = s.counts[layer]
    idle = s.c[HELD] == 0  # demands have all ended with their layer
    s.c[LATEST] = layer
    s.c[QUEUE_LENGTH] = 0
    s.current[:] = False
    for e in used:
        s.current[e] = True
    granted = 0
    missing = 0
    bits = 0
    at = now + g.grant
    for k in range(len(used)):
        e = used[k]
        lane = b.lane[layer, e]
        if missed_by_lru >> k & 1:
            counts[LRU_MISSES] += 1
        if lane == READY or lane == READY_UNUSED:
            counts[HITS] += 1
            if lane == READY_UNUSED:
                counts[USEFUL] += 1
                note_good(q.gate, s.gate, layer, False)
                s.c[UNUSED] -= 1
            if missed_by_lru >> k & 1 and s.by_prefetch[layer, e]:
                counts[LRU_PREFETCHED] += 1
            b.lane[layer, e] = PINNED
            s.grants[granted, 0] = at
            s.grants[granted, 1] = e
            granted += 1
            at += g.grant_next
        elif lane == NONE:
            missing += 1
            bits |= 1 << k
        else:  # on its way
            note_good(q.gate, s.gate, layer, True)
            bits |= 1 << k
    if q.gate.levels > 0:
        note_event(q.gate, s.gate, layer, idle)
    if s.c[HELD] > 0:
        for x in range(len(s.transfers)):
            row = s.transfers[x]
            if row[X_STATE] != X_LOADING or row[X_LAYER] != layer:
                continue
            e = row[X_EXPERT]
            if not s.current[e]:
                if q.record:
                    _span(s, CANCEL, row[X_BEGIN], now, layer, e, row[X_SLOT])
                _cancel(q, s, b, x, now)
                continue
            # Promoted: what is left of it is a demand's.
            counts[LATE] += 1
            end = row[X_END]
            if row[X_LEFT] > 0:
                since = max(now + g.load, row[X_BEGIN])
                end = _load_demand(m, s, layer, row[X_LEFT], since, row[X_DELIVERY]) + g.fill
                s.c[ACTIVE] = -1
                if q.record:
                    _span(s, PREFETCH, row[X_BEGIN], end, layer, e, row[X_SLOT])
            for i in range(len(s.ring_prefetch)):
                if s.ring_prefetch[i, 1] == x:
                    s.ring_prefetch[i, 0] = 0
                    s.ring_prefetch[i, 1] = -1
            row[X_STATE] = X_FREE
            s.c[HELD] -= 1
            b.lane[layer, e] = PINNED
            s.grants[granted, 0] = max(end, now + g.grant)
            s.grants[granted, 1] = e
            granted += 1
        _complete(s, b, now)
    counts[MISSES] += missing
    ready = now + g.load
    if missing:
        s.c[BUSY_UNTIL] = now
        for e in used:
            if b.lane[layer, e] != NONE:
                continue
            if s.polluted[layer, e]:
                counts[POLLUTION] += 1
            found = ready
            if s.c[FREE] > 0:
                slot = _take_free(s)
            else:
                vl, ve = _victim(m, q, s, b, layer, True)
                while ve < 0 and s.c[FREE] == 0:
                    found = _wait_for_slot(m, q, s, b, layer, granted, found)
                    vl, ve = _victim(m, q, s, b, layer, True)
                found += g.search
                if s.c[FREE] > 0:
                    slot = _take_free(s)
                else:
                    slot = _evict(q, s, b, vl, ve, False)
            _place(s, b, layer, e, slot, False)
            b.lane[layer, e] = PINNED
            counts[DEMAND_LOADS] += 1
            delivery = _delivery(m, q, s, layer, e, slot, found)
            end = _load_demand(m, s, layer, m.load[layer], found, delivery)
            if q.record:
                _span(s, DEMAND, found, end, layer, e, slot)
            s.grants[granted, 0] = end + g.fill
            s.grants[granted, 1] = e
            granted += 1
            ready = found + g.load_next
    token_misses[layer] = bits
    return ready


@inline
def _run(m, q, s, b, layer, count, now):
    """Runs the granted experts in the order of their grants; returns when the last has run."""
    t = now
    grants = s.grants
    for i in range(count):
        best = i
        for k in range(i + 1, count):
            if grants[k, 0] < grants[best, 0]:
                best = k
        at, e = grants[best, 0], grants[best, 1]
        # The others keep their order: ties go to the one granted first.
        for k in range(best, i, -1):
            grants[k, 0] = grants[k - 1, 0]
            grants[k, 1] = grants[k - 1, 1]
        if at > t:
            s.counts[layer, STALL] += at - t
            if q.record:
                _span(s, WAIT, t, at, layer, e, -1)
            t = at
        if q.record:
            _span(s, EXPERT, t, t + m.expert[layer], layer, e, b.slot[layer, e])
        t += m.expert[layer]
    s.counts[layer, COMPUTE] += m.attention[layer] + count * m.expert[layer]
    return t


@kernel
def _choose(m, q, s, b, layer, at):
    """Selects for ``layer`` and those after it at the score commit; the picks replace the queue.
    Returns when the selection is over."""
    s.c[QUEUE_HEAD] = 0
    n = 0
    t = at
    for distance in range(1, q.look + 1):
        for e in range(len(s.allowed)):
            s.allowed[e] = b.lane[layer, e] == NONE
        threshold = threshold_of(q.gate, s.gate, layer, distance)
        count = pick(s.score[layer], s.allowed, threshold, s.picks)
        s.counts[layer, SELECTED] += count
        t += m.engine.pick
        for expert in s.picks[:count]:
            s.queue[n, 0] = layer
            s.queue[n, 1] = expert
            s.queue[n, 2] = t
            t += m.engine.pick_next
            n += 1
        layer = layer + 1 if layer + 1 < len(m.attention) else 0
    s.c[QUEUE_LENGTH] = n
    return t


@kernel
def _protect(q, s, layer):
    """What a guess names is not to be evicted before its layer has been routed."""
    for e in range(s.score.shape[1]):
        if s.score[layer, e] >= threshold_of(q.gate, s.gate, layer, 1):
            s.base[layer, e] |= PROTECTED


@inline
def _copy(source, target):
    """``target[:] = source``, for which Numba would make an array in case they overlap."""
    for e in range(len(target)):
        target[e] = source[e]


def _compiled(source: int) -> Callable[..., None]:
    """The loop over some consecutive tokens, which goes on where the last call ended.

    Numba's cache looks at a function's own file and what it closes over: closing over ``source``,
    the checksum of the files of the golden decisions, makes a change there recompile it.
    """

    @njit(nogil=True, **NO_ARRAY_MADE)  # several policies are timed at once
    def run(
        m,
        q,
        p,
        ps,
        s,
        b,
        experts,
        starts,
        guess,
        first,
        worth,
        used,
        lru,
        misses,
        latency,
        occupancy,
    ):
        assert source >= 0
        layers = len(m.attention)
        g = m.engine
        n = 0
        for token in range(len(experts)):
            begun = s.c[NOW] + g.token
            t = begun
            if q.prefetches:
                _advance(m, q, s, b, t)
                _complete(s, b, t)
                if q.learned and starts[token]:
                    begin_sequence(p, ps)
                if q.guesses:
                    _copy(first[token], s.score[0])
                    if not q.learned:
                        _protect(q, s, 0)
                _choose(m, q, s, b, 0, t)
            for layer in range(layers):
                count = experts.shape[2]
                if len(used) > 0:
                    s.counts[layer, SKIPPED] += count - used[n]
                    count = used[n]
                chosen = experts[token, layer, :count]
                if q.record:
                    _span(s, ATTENTION, t, t + m.attention[layer], layer, -1, -1)
                t = max(t + m.attention[layer], s.c[BUSY_UNTIL]) + g.route
                if s.c[QUEUE_LENGTH] > 0 or s.c[ACTIVE] >= 0:
                    _advance(m, q, s, b, t)
                if s.c[NEXT_END] <= t:
                    _complete(s, b, t)
                committed = _route(m, q, s, b, layer, chosen, t, lru[token, layer], misses[token])
                end = _run(m, q, s, b, layer, count, t)
                s.c[EVENT] += 1
                if q.learned:
                    observe(p, ps, layer, experts[token, layer])
                elif q.values:
                    _copy(worth[n], s.base[layer])
                else:
                    if q.guesses:
                        for e in range(s.base.shape[1]):
                            s.base[layer, e] &= PROTECTED - 1
                    for e in chosen:
                        s.base[layer, e] = s.c[EVENT]
                if q.prefetches:
                    following = layer + 1 if layer + 1 < layers else 0
                    if q.guesses:
                        _copy(guess[n], s.score[following])
                        if not q.learned:
                            _protect(q, s, following)
                    at = max(committed, t + g.commit)
                    s.c[LOOK] = at
                    s.c[BUSY_UNTIL] = _choose(m, q, s, b, following, at)
                # Released: a victim only once the next event is the latest.
                for e in chosen:
                    b.lane[layer, e] = READY
                t = end
                if not q.keeps:
                    _advance(m, q, s, b, t)
                    for e in chosen:
                        s.free_slots[s.c[FREE]] = b.slot[layer, e]
                        s.c[FREE] += 1
                        b.slot[layer, e] = -1
                        b.lane[layer, e] = NONE
                        b.held[layer] -= 1
                n += 1
            s.c[NOW] = t
            latency[token] = t - begun + g.token
            if len(occupancy) > 0:
                loading = s.c[HELD]
                occupancy[token, 0] = m.slots - s.c[FREE] - loading - s.c[UNUSED]
                occupancy[token, 1] = s.c[UNUSED]
                occupancy[token, 2] = loading

    return run


_RUN = _compiled(
    zlib.crc32(
        b"".join(
            Path(str(module.__file__)).read_bytes() for module in (_predictor, _buffer, _confidence)
        )
    )
)


# Results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedResult:
    """What a timed run measured, in its second half unless it says otherwise. Cycles are those of
    :class:`Machine`."""

    policy: str
    tokens: int
    """All tokens, warm-up included."""
    tokens_measured: int
    cycles: int
    """From the start of the first measured token to the end of the last."""
    total_cycles: int
    """The same of the whole run."""
    compute_cycles: int
    """What the measured tokens would take if no expert were ever waited for."""
    latency: np.ndarray
    """int64 [measured tokens]: cycles from one token's end to the next one's."""
    per_layer: dict[str, np.ndarray]
    """int64 [L] for each of :data:`COUNTS`, and ``hidden_cycles``: link cycles behind compute, at
    least."""
    needed: int
    """Experts that the measured tokens use, those that adaptive gating skips included."""
    link_cycles: int
    loads: float
    """Loads by cycles of the link, so that one cancelled half way counts as half."""
    seconds: float
    """CPU time of the compiled loop and the policy: what it takes on a quiet core."""
    misses: np.ndarray
    """uint16 [all tokens, L]: bit k is set where the expert of rank k was not resident."""
    machine: Machine
    occupancy: np.ndarray | None = None
    """int32 [measured tokens, 3]: slots that hold used experts, prefetched ones that are not used
    yet, and loads on their way, as each token ends; the rest is free."""
    timeline: np.ndarray | None = None
    """int64 [n, 6]: kind (index in :data:`TIMELINE_KINDS`), begin, end, layer, expert, slot (-1
    where there is none), from the first measured token on."""

    @property
    def time(self) -> float:
        """Time relative to pure compute."""
        return self.cycles / self.compute_cycles

    @property
    def hidden(self) -> float | None:
        """Link time behind compute, relative to pure compute. Not known where there is a far tier:
        the link may rest while the accelerator waits for that."""
        if self.machine.tiered:
            return None
        return self.total("hidden_cycles") / self.compute_cycles

    def total(self, name: str) -> int:
        """A count, of all layers."""
        return int(self.per_layer[name].sum())

    @property
    def tokens_per_s(self) -> float:
        """Speed of the replay itself."""
        return self.tokens / max(self.seconds, 1e-9)


def _new_run(m: Machine, policy: Policy, config: EngineConfig, state: Any, spans: int) -> RunState:
    layers, experts = config.num_layers, config.num_experts
    learned = policy.learned
    c = np.zeros(SCALARS, np.int64)
    c[ACTIVE], c[FREE], c[LATEST], c[NEXT_END] = -1, m.slots, layers - 1, NEVER
    own = learned and not policy.prefetches
    tiers = (layers, experts) if m.tiered else (0, 0)
    return RunState(
        c=c,
        base=state.score if learned else np.zeros((layers, experts), np.int32),
        score=state.score if own else np.zeros((layers, experts), np.int32),
        use=state.use if learned else np.zeros((layers, experts), np.int32),
        gate=new_gate(layers),
        current=np.zeros(experts, np.bool_),
        by_prefetch=np.zeros((layers, experts), np.bool_),
        polluted=np.zeros((layers, experts), np.bool_),
        ring=np.zeros(m.max_outstanding, np.int64),
        ring_prefetch=np.zeros((m.prefetch_outstanding, 2), np.int64),
        transfers=np.zeros((max(1, m.prefetch_loads), 9), np.int64),
        near=np.zeros(tiers, np.int64),
        far_begin=np.zeros(tiers, np.int64),
        queue=np.zeros((max(1, policy.limit * policy.look), 3), np.int64),
        allowed=np.zeros(experts, np.bool_),
        picks=np.zeros(max(0, int(policy.limit)), np.int64),
        grants=np.zeros((config.top_k, 2), np.int64),
        free_slots=np.arange(m.slots, dtype=np.int32)[::-1].copy(),
        counts=np.zeros((layers, len(COUNTS)), np.int64),
        spans=np.zeros((spans, 6), np.int64),
    )


_NO_ROWS = np.zeros((0, 0), np.int32)
_NO_COUNTS = np.zeros(0, np.int32)
NO_PLAN = Plan()
_COMPILED = False


def _warm_up() -> None:
    """Have the loop compiled (or loaded), so that no measured time holds it."""
    global _COMPILED
    if _COMPILED:
        return
    _COMPILED = True
    from .synthetic import markov_trace

    config = EngineConfig()
    trace = markov_trace(num_tokens=2)
    machine = machine_for_ratio(config, 1.0)
    policy = Policy(config)
    simulate(trace, config, machine, policy)


_PLANNED: set[tuple[type[Policy], str]] = set()


def _warm_up_plan(policy: Policy, trace: Trace) -> None:
    """Have a policy's own compiled functions compiled, by another one of its kind."""
    kind, known = type(policy), (type(policy), trace.experts.dtype.name)
    if kind.plan is Policy.plan or known in _PLANNED:
        return
    few = trace.head(2)
    other = kind(policy.config)
    other.prepare(few)
    other.plan(few, 0, few.num_tokens, few.starts(), False)
    _PLANNED.add(known)


def _params(policy: Policy, config: EngineConfig, gate: GateParams, record: bool) -> PolicyParams:
    return PolicyParams(
        learned=policy.learned,
        guesses=policy.prefetches,
        prefetches=policy.prefetches or policy.learned,
        values=policy.values,
        keeps=policy.keeps,
        compares=policy.compares,
        form=int(policy.retention),
        look=int(policy.look),
        use_shift=config.use_shift if policy.learned else 0,
        record=record,
        gate=gate,
        bonus=policy.bonus,
    )


def simulate(
    trace: Trace,
    config: EngineConfig,
    machine: Machine,
    policy: Policy,
    *,
    lru_misses: np.ndarray | None = None,
    occupancy: bool = False,
    timeline: int = 0,
    warm_up: int | None = None,
    stop: threading.Event | None = None,
) -> TimedResult:
    """Time a policy on a trace: the first half of the tokens warms up, the second is measured.

    Parameters
    ----------
    trace, config
        Of one shape; the buffer is the machine's.
    machine : Machine
    policy : Policy
        A new one: it keeps what it has learned.
    lru_misses : uint16 [T, L], optional
        ``misses`` of an LRU run of the same buffer, for the share of them that was prefetched.
    occupancy : bool
        Record how the buffer is filled.
    timeline : int
        Record so many spans of the timeline.
    warm_up : int, optional
        Tokens that are not measured, where it is not the first half.
    stop : threading.Event, optional
        Once it is set, :class:`TimingStopped` is raised: how another thread is interrupted.
    """
    check_shape(trace, config)
    if machine.slots < config.top_k:
        raise TimingError(f"slots must be at least top_k ({config.top_k}), not {machine.slots}")
    if machine.tiered and machine.near < 1:
        raise TimingError(f"near must be at least 1 where there is a far tier, not {machine.near}")
    _warm_up()
    layers, top_k = config.num_layers, config.top_k
    tokens = trace.num_tokens
    warm = tokens // 2 if warm_up is None else warm_up
    if not 0 <= warm < tokens:
        raise TimingError(f"warm_up must be 0 to {tokens - 1}, not {warm}")
    params = params_of(config, ordered=trace.ordered)
    state = new_state(config if policy.learned else config.replace(spatial_depth=0))
    gate = policy.gate()
    run = _new_run(machine, policy, config, state, timeline)
    buffer = new_buffer(config)._replace(quota=machine.quota.astype(np.int32))
    starts = trace.starts()
    lru = lru_misses if lru_misses is not None else np.zeros((tokens, layers), np.uint16)
    misses = np.zeros((tokens, layers), np.uint16)
    latency = np.zeros(tokens, np.int64)
    occupied = np.zeros((tokens if occupancy else 0, 3), np.int32)

    _warm_up_plan(policy, trace)
    began = time.thread_time()
    policy.prepare(trace)
    begin_cycle = 0
    for half, (start, end) in enumerate(((0, warm), (warm, tokens))):
        if half:
            begin_cycle = int(run.c[NOW])
            run.counts[:] = 0
        for first in range(start, end, CHUNK):
            if stop is not None and stop.is_set():
                raise TimingStopped(policy.name)
            last = min(first + CHUNK, end)
            plan = policy.plan(trace, first, last, starts, bool(half)) or NO_PLAN
            _RUN(
                machine,
                _params(policy, config, gate, bool(half) and timeline > 0),
                params,
                state,
                run,
                buffer,
                trace.experts[first:last].astype(np.int64, order="C"),
                starts[first:last],
                plan.guess if plan.guess is not None else _NO_ROWS,
                plan.first if plan.first is not None else _NO_ROWS,
                plan.worth if plan.worth is not None else _NO_ROWS,
                plan.used if plan.used is not None else _NO_COUNTS,
                lru[first:last],
                misses[first:last],
                latency[first:last],
                occupied[first:last],
            )
    seconds = time.thread_time() - began
    counts = {name: run.counts[:, i].copy() for i, name in enumerate(COUNTS)}
    counts["hidden_cycles"] = np.maximum(counts["link_cycles"] - counts["stall_cycles"], 0)
    measured = tokens - warm
    total = int(run.c[NOW])
    return TimedResult(
        policy=policy.name,
        tokens=tokens,
        tokens_measured=measured,
        cycles=total - begin_cycle,
        total_cycles=total,
        compute_cycles=measured * int((machine.attention + top_k * machine.expert).sum()),
        latency=latency[warm:],
        per_layer=counts,
        needed=measured * layers * top_k,
        link_cycles=int(counts["link_cycles"].sum()),
        loads=float(counts["link_cycles"].sum() / machine.load.mean()),
        seconds=seconds,
        misses=misses,
        machine=machine,
        occupancy=occupied[warm:] if occupancy else None,
        timeline=run.spans[: int(run.c[SPANS])] if timeline else None,
    )
