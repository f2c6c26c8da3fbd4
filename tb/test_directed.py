# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The whole engine in the very situations that random traffic misses, held to the golden model.

Each scene leads the engine into one situation, proves from golden's state (:class:`Situations`) or
from the monitors that it was there, and has every event, every counter and every slot's contents
checked. All scenes of a shape are one simulation. Which scene is for what, and where else it is
tested:

=============================================  ====================================================
situation                                      scene, and other benches
=============================================  ====================================================
K demands, every other slot loads or drains    demands_get_slots_while_all_others_load_or_drain,
                                               demand_cancels_the_last_prefetch_for_its_slot
demand for what is being prefetched            demand_for_what_is_being_prefetched;
                                               test_dma_scheduler: promote_sweep
demand for what is draining                    demand_for_what_is_draining
cancel at, and in the cycle of, the last beat  cancel_at_and_around_the_last_beat;
                                               test_dma_scheduler: cancel_sweep,
                                               test_slot_manager: fill_beats_its_cancel
quota 0; exactly the least slots               quotas_from_none_to_the_least_slots; test_engine:
                                               least_slots, all_experts (as many slots as K)
layer wrap                                     lookahead_wraps_to_the_next_token; test_predictor
sequence change, prefetches in all states      sequence_changes_with_prefetches_in_every_state,
                                               sequence_changes_as_a_queued_prefetch_may_start
saturation of rows, use counts and scores      counts_saturate_at_both_ends; test_correlation_table,
                                               test_learner, test_predictor: narrow. No traffic
                                               makes a score larger than all rows at their ends do
back-to-back events, the same row              back_to_back_events_touch_the_same_rows;
                                               test_predictor: predictor_is_golden
single layer, single expert                    smallest_shapes_under_any_traffic, and all other
                                               scenes of these shapes; test_engine: one_layer
E and L no powers of two                       every shape here
4 KiB boundary at every offset                 bursts_split_at_4_kib_from_every_offset;
                                               test_dma_scheduler: axi_ram
prefetch bursts ahead of a demand              prefetch_bursts_ahead_of_a_demand_are_few;
                                               test_dma_scheduler: random_loads
release held back for long                     releases_held_back_for_long_lose_nothing
full event port                                full_event_port_holds_prefetches_in_every_state;
                                               test_engine: full_event_port_loses_nothing,
                                               test_event_port
reconfiguration under load                     switches_change_with_prefetches_in_every_state,
                                               commits_one_after_the_other,
                                               segments_move_under_loads;
                                               test_engine: random_traffic (legal and refused)
=============================================  ====================================================
"""

from __future__ import annotations

import functools
import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cocotb
import pytest
from cocotb.triggers import Event, RisingEdge

from engine_bench import ROUTE, EngineBench, ObservedTop, RandomTraffic, Tier
from simulation import build, run_bench
from stmoe_golden.buffer import Lane
from stmoe_golden.checker import Checker, Kind, Record, Segment, Transfer
from stmoe_golden.config import PAGE_BYTES, EngineConfig

SHAPES = {
    # Few slots, of which any number may load or drain at once; four bursts to an expert.
    "crowded": EngineConfig(
        num_layers=3,
        num_experts=5,
        quota=0,
        staging=6,
        weight_bits=4,
        expert_bytes=128,
        max_burst=4,
        event_depth=64,
        gate_window=4,
        gate_patience=16,
    ),
    "one_layer": EngineConfig(
        num_layers=1, num_experts=5, quota=1, staging=2, weight_bits=4, expert_bytes=128
    ),
    "one_expert": EngineConfig(
        num_layers=2, num_experts=1, top_k=1, quota=0, staging=2, gate_window=4, expert_bytes=128
    ),
}
SHAPE = os.environ.get("SHAPE", "crowded")
CONFIG = SHAPES[SHAPE]
K = CONFIG.top_k
BEAT = CONFIG.beat_bytes

PREFETCHING, LEARNING, ORDERED, ADAPTIVE = 1, 2, 4, 8
"""Bits of CONTROL."""

LOWEST = -1 << (CONFIG.score_bits - 1)
"""A threshold that every score passes."""


# Scenes ---------------------------------------------------------------------------------------

SCENES: dict[str, list[str]] = {shape: [] for shape in SHAPES}


def scene(*shapes: str) -> Callable:
    """A cocotb test of these shapes; 400,000 cycles and it fails."""

    def register(coroutine):
        for shape in shapes:
            SCENES[shape].append(coroutine.__name__)
        if SHAPE not in shapes:
            return coroutine
        return cocotb.test(timeout_time=4, timeout_unit="ms")(coroutine)

    return register


class GatedTier(Tier):
    """Memory that answers only as many beats as it is allowed to."""

    def __init__(self, bus, clock, reset, config: EngineConfig) -> None:
        super().__init__(bus, clock, reset, config)
        self.allowed: float = math.inf
        self._more = Event()

    def allow(self, beats: float) -> None:
        """So many beats more."""
        self.allowed += beats
        self._more.set()

    async def _read(self, address: int, length: int) -> bytes:
        while self.allowed < 1:
            self._more.clear()
            await self._more.wait()
        self.allowed -= 1
        return await super()._read(address, length)


SWITCHES = ("prefetching", "learning", "adaptive", "predictors", "quota", "threshold", "segments")
"""Settings that a commit changes under load."""

PENDING, OLD_SEGMENTS = 1 << 0, 1 << 4
"""In STATUS: a COMMIT, or one of other segments, would wait."""


def decided(cancel: Record) -> int:
    """The cycle in which the DMA scheduler was told to cancel: the one before its record."""
    return cancel.cycle - 1


class Situations(Checker):
    """The golden checker, and in what situations it has seen the engine.

    ``seen`` counts them by name. ``cancels``: of every cancelled load whose last beat was on its
    way or has come, by how many cycles it was cancelled after that beat's handshake.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: Tally[str] = Tally()
        self.cancels: list[int] = []
        self.cancelled_at: dict[int, int] = {}
        self.beat_at: dict[int, int] = {}

    def routed(self, record: Record) -> list[int]:
        """Experts of a ROUTE."""
        bits = self.config.expert_bits
        return [record.data >> bits * rank & (1 << bits) - 1 for rank in range(K)]

    def loads(self) -> dict[str, list[Transfer]]:
        """Loads in flight by what they are."""
        kinds: dict[str, list[Transfer]] = {"demand": [], "loading": [], "draining": []}
        for t in self.transfers.values():
            kinds["draining" if t.cancelled else "loading" if t.prefetch else "demand"].append(t)
        return kinds

    def state(self) -> list[str]:
        """In what states there are prefetches."""
        loads = self.loads()
        states = [name for name in ("loading", "draining") if loads[name]]
        states += ["queued"] if self.queue else []
        states += ["promoted"] if any(t.promoted >= 0 for t in loads["demand"]) else []
        return states

    @staticmethod
    def phase(t: Transfer) -> str:
        """How far a load has come."""
        if t.ended:
            return "ended"
        if t.issued == 0:
            return "unissued"
        return "partly issued" if t.issued < len(t.plan) else "owed"

    def check(self, record: Record) -> None:
        if record.kind == Kind.ROUTE:
            for expert in self.routed(record):
                for t in self.transfers.values():
                    if (t.layer, t.expert) == (record.layer, expert):
                        what = "draining" if t.cancelled else "prefetch" if t.prefetch else "demand"
                        self.seen[f"demand for {what} {self.phase(t)}"] += 1
            missing = all(
                self.buffer.lane[record.layer, e] == Lane.NONE for e in self.routed(record)
            )
            if missing and len(self.transfers) == self.config.num_slots - K:
                others = "loading and draining" if self.loads()["draining"] else "loading"
                rest = "free" if len(self.free) == K else "to be evicted"
                self.seen[f"K demands, all others {others}, K {rest}"] += 1
        elif record.kind == Kind.TOKEN and record.flag:
            self.seen["sequence with " + " ".join(sorted(self.state()))] += 1
        elif record.kind == Kind.REGISTER_COMMIT and self.settings:
            new = self.settings[0]
            for name in SWITCHES:
                if getattr(new, name) != getattr(self.active, name):
                    for state in self.state():
                        self.seen[f"{name} changed with {state}"] += 1
            for layer, (before, after) in enumerate(zip(self.active.quota, new.quota, strict=True)):
                if after < self.buffer.held[layer] <= before:
                    self.seen["quota cut below what is held"] += 1
            for kind, loads in self.loads().items():
                for t in loads:
                    if new.segments and new.segments[t.layer] != self.segments[t.layer]:
                        self.seen[f"layer moved with {kind}"] += 1
        elif record.kind == Kind.RETRY and record.expert in self.transfers:
            t = self.transfers[record.expert]
            if t.plan != self.plan(t.layer, t.expert):
                self.seen["start again where it was"] += 1
        elif record.kind == Kind.CANCEL and record.data in self.transfers:
            t = self.transfers[record.data]
            self.seen["cancel to make room" if record.flag else "cancel of disproved"] += 1
            self.cancelled_at[t.index] = decided(record)
            if t.ended:
                self.cancels.append(decided(record) - self.beat_at[t.index])
        if record.delivered - record.cycle > 1000:
            self.seen["record late with " + " ".join(sorted(self.state()))] += 1
        cancelled = {t.index for t in self.transfers.values() if t.cancelled}
        super().check(record)
        if record.kind == Kind.LAST_BEAT:
            self.beat_at[record.expert] = record.cycle
            t = self.transfers[record.expert]
            if t.index in cancelled and t.ended and t.issued == len(t.plan):
                self.cancels.append(self.cancelled_at[t.index] - record.cycle)
        if record.kind == Kind.CANCEL and (self.queue or self.picks):
            self.seen["cancel with others queued"] += 1


class Director(EngineBench):
    """Leads the engine through a scene, without any chance.

    Attributes
    ----------
    releasing : bool
        Grants are released at once; else not before it is set.
    rogue : int or None
        A slot that is released again and again, owed or not.
    at : dict
        What to do in the cycles to come.
    shut : set of str
        Sinks that take nothing.
    """

    MEMORY = GatedTier
    ram: GatedTier

    async def begin(
        self,
        *,
        beats: int = 4,
        control: int = PREFETCHING | ORDERED,
        segments: list[list[Segment]] | None = None,
    ) -> None:
        """From reset to a token before its layer 0: nothing is resident or on its way yet. Every
        expert has so many beats; every absent one of the next layer is selected."""
        self.releasing, self.rogue = True, None
        self.at, self.shut = defaultdict[int, list[Callable[[], None]]](list), set[str]()
        self.ram.allowed = math.inf
        await self.reset(1, stalls=False)
        for name, sink in self.sinks.items():
            sink.pauses = self._shut(name)
        layers = range(CONFIG.num_layers)
        await self.program_segments(
            segments or [[Segment((layer + 1) << 20, PAGE_BYTES, beats)] for layer in layers]
        )
        await self.commit(control & ~PREFETCHING, LOWEST)
        await self.token()
        await self.happens(Kind.SCORE_COMMIT)
        await self.commit(control, LOWEST)

    def _shut(self, name: str) -> Iterator[bool]:
        while True:
            yield name in self.shut

    def drive(self) -> None:
        for action in self.at.pop(self.cycle, ()):
            action()

    def next_release(self) -> int | None:
        if self.rogue is not None:
            return self.rogue
        return super().next_release() if self.releasing else None

    async def until(self, condition: Callable[[], Any], patience: int = 2000) -> None:
        """The end of the first cycle in which it holds."""
        start = self.cycle
        while not condition():
            await RisingEdge(self.dut.clk)
            if self.cycle - start > patience:
                records = "\n".join(str(r) for r in self.log["events"][-30:])
                raise AssertionError(f"cycle {self.cycle}: waited since {start}\n{records}")

    async def token(self, *, new_sequence: bool = False) -> None:
        self.offer_token(new_sequence=new_sequence)
        await self.until(lambda: "token" not in self.offered)

    async def route(self, *experts: int) -> int:
        """The next layer's event, when it has been taken; the cycle in which it was."""
        self.offer_route(self.expected_layer, experts)
        await self.until(lambda: "route" not in self.offered)
        return int(self.log["routes"][-1][0])

    def events(self, kind: Kind, **fields: int) -> list[Record]:
        """Records so far of a kind, with these fields."""
        return [
            r
            for r in self.log["events"]
            if r.kind == kind and all(getattr(r, n) == v for n, v in fields.items())
        ]

    async def happens(self, kind: Kind, count: int = 1, **fields: int) -> Record:
        """There are so many such records; the latest of them."""
        await self.until(lambda: len(self.events(kind, **fields)) >= count)
        return self.events(kind, **fields)[-1]

    async def prefetches_in_every_state(self) -> None:
        """From reset to prefetches of layer 2 that are queued and one that loads, while one of
        layer 1 drains; the memory gives nothing more."""
        await self.begin(beats=12)
        self.ram.allowed = 2 * 12
        await self.route(3, 4)
        await self.happens(Kind.FILL_DONE, 2)
        await self.cycles(60)
        await self.route(3, 4)
        await self.happens(Kind.CANCEL)
        # One of the two bursts that the cancelled prefetch is owed comes; so another can start.
        self.ram.allow(4)
        await self.happens(Kind.LOAD_START, layer=2)

    async def finish(self) -> Situations:
        """Open every gate, come to rest, hold all that happened to golden."""
        self.ram.allow(math.inf)
        self.ram.ar_channel.pause = False
        self.releasing, self.rogue = True, None
        self.shut.clear()
        await self.drain(quiet=180)
        checker = self.check(Situations)
        self.check_nothing_lost(checker)
        await self.check_counters(checker)
        return checker


@scene("crowded")
async def demands_get_slots_while_all_others_load_or_drain(dut) -> None:
    """K demands while each other slot is of a load: the K free, or to be evicted."""
    d = Director(dut, CONFIG)
    await d.begin()
    d.ram.allowed = 0
    await d.route(3, 4)
    await d.happens(Kind.BURST, 4)
    await d.route(3, 4)
    await d.happens(Kind.LOAD_START, 6)
    checker = await d.finish()
    assert checker.seen["K demands, all others loading, K free"], checker.seen

    await d.begin()
    d.ram.allowed = 2 * 4
    await d.route(3, 4)
    await d.until(lambda: len(d.log["releases"]) == K)
    # One of the two prefetches is promoted, the other drains; a third takes the last free slot.
    await d.happens(Kind.BURST, 4)
    await d.route(0, 4)
    await d.happens(Kind.LOAD_START, 6)
    await d.route(3, 4)
    await d.happens(Kind.LOAD_START, 8)
    checker = await d.finish()
    wanted = "K demands, all others loading and draining, K to be evicted"
    assert checker.seen[wanted], checker.seen


@scene("crowded")
async def demand_for_what_is_being_prefetched(dut) -> None:
    """A prefetch is promoted at every beat of its life, and before its first address is taken."""
    d, seen = Director(dut, CONFIG), Tally[str]()
    for beats in range(-1, 14):
        await d.begin(beats=12)
        d.ram.allowed = 24 + max(0, beats)
        await d.route(3, 4)
        await d.until(lambda: len(d.log["addresses"]) == 6)
        if beats < 0:
            d.ram.ar_channel.pause = True
        await d.happens(Kind.FILL_DONE, 2)
        await d.cycles(60)
        await d.route(0, 4)
        checker = await d.finish()
        seen += checker.seen
    for phase in ("unissued", "partly issued", "owed"):
        assert seen[f"demand for prefetch {phase}"], seen


@scene("crowded")
async def demand_for_what_is_draining(dut) -> None:
    """A cancelled prefetch is demanded before its beats have come: it loads into another slot."""
    d = Director(dut, CONFIG)
    await d.begin()
    d.ram.allowed = 2 * 4
    await d.route(3, 4)
    await d.happens(Kind.BURST, 4)
    await d.route(3, 4)
    cancelled = await d.happens(Kind.CANCEL, layer=1, expert=0)
    await d.token(new_sequence=True)
    await d.route(3, 4)
    await d.route(0, 3)
    again = await d.happens(Kind.LOAD_START, 2, layer=1, expert=0)
    assert not d.events(Kind.DRAINED) and again.slot != cancelled.slot
    checker = await d.finish()
    assert checker.seen["demand for draining owed"] == 1, checker.seen
    assert checker.counters["drained"] == checker.counters["cancelled"] > 0


@scene("crowded")
async def cancel_at_and_around_the_last_beat(dut) -> None:
    """The last beat of a prefetch comes in each cycle round the one of its cancel, on the bus and
    (the slot's memory having been slow) in the buffer: the fill wins exactly when it is in time."""
    d, gaps = Director(dut, CONFIG), set[int]()
    for slow_buffer in (False, True):
        # By the cycle of the fill after the one in which a cancel would be: what became of it.
        outcomes: dict[int, set[Kind]] = {}
        to_cancel = None
        for shift in range(16, 8, -1):
            await d.begin()
            d.ram.allowed = 2 * 4 + 3
            await d.route(3, 4)
            await d.happens(Kind.BURST, 3)
            await d.cycles(40)
            if slow_buffer:
                d.shut.add("fill")
                d.ram.allow(1)
                await d.cycles(20)
            routed = d.cycle + 10
            d.at[routed].append(lambda: d.offer_route(1, (3, 4)))
            d.at[routed + shift].append(lambda: (d.shut.clear(), d.ram.allow(1)))
            await d.until(lambda routed=routed: d.cycle > routed + 60)
            checker = await d.finish()
            gaps.update(checker.cancels)
            slot = d.events(Kind.LOAD_START, layer=1, expert=0)[0].slot
            ends = d.events(Kind.CANCEL, layer=1, expert=0)
            if to_cancel is None:
                # The latest beat is the first to be tried: surely too late for a fill.
                to_cancel = decided(ends[0]) - routed
            ends += d.events(Kind.FILL_DONE, layer=1, expert=0)
            assert len(ends) == 1
            filled = [c for c, s in d.log["fills"] if s == slot and c < routed + 60][:1]
            if ends[0].kind == Kind.CANCEL:
                assert decided(ends[0]) - routed == to_cancel
            if filled:
                gap = filled[0] - routed - to_cancel
                outcomes.setdefault(gap, set()).add(Kind(ends[0].kind))
        for gap, kinds in outcomes.items():
            assert kinds == {Kind.FILL_DONE if gap <= 0 else Kind.CANCEL}, (gap, kinds)
        # A beat leaves the bus a cycle before it is on `fill`: only a slow buffer has some later.
        assert {-1, 0} <= set(outcomes) and (1 in outcomes) == slow_buffer, outcomes
    # A cancel in the cycle of the last beat on the bus, and in the one before it.
    assert {-1, 0} <= gaps, gaps


@scene("crowded")
async def prefetch_bursts_ahead_of_a_demand_are_few(dut) -> None:
    """A demand comes at every beat of a prefetch: ahead of its first burst are as many bursts of
    prefetch as `prefetch_outstanding` allows at most, counted on the bus, and at times so many."""
    d, ahead = Director(dut, CONFIG), Tally[int]()
    for beats in range(-1, 14):
        await d.begin(beats=12)
        d.ram.allowed = 24 + max(0, beats)
        await d.route(3, 4)
        await d.until(lambda: len(d.log["addresses"]) == 6)
        d.ram.ar_channel.pause = beats < 0
        await d.happens(Kind.FILL_DONE, 2)
        await d.cycles(60)
        await d.route(4, 3)
        await d.happens(Kind.LOAD_START, 3 + K)
        if beats < 0:
            # An address of a prefetch stands on the bus: it counts.
            await d.cycles(20)
            d.ram.ar_channel.pause = False
        await d.happens(Kind.SCORE_COMMIT, 3)
        await d.cycles(60)
        checker = await d.finish()
        assert checker.counters["demand_loads"] == 2 * K
        # Once again without the checker, from the handshakes alone but for whose they are.
        demand = next(r.cycle for r in d.events(Kind.LOAD_START) if r.layer == 1 and not r.flag & 1)
        owed: Tally[int] = Tally()
        kinds = {r.data >> 16: r.flag & 1 for r in d.events(Kind.LOAD_START) if r.cycle <= demand}
        ends = [(cycle, 0, index) for cycle, index, _ in d.log["last_beats"]]
        starts = [(cycle, 1, index) for cycle, index, *_ in d.log["addresses"]]
        for cycle, begins, index in sorted(ends + starts):
            if cycle > demand and begins and not kinds[index]:
                break
            owed[index] += 1 if begins else -1
        count = sum(owed[index] for index, prefetch in kinds.items() if prefetch)
        assert (beats < 0) <= count <= CONFIG.prefetch_outstanding, (beats, count)
        ahead[count] += 1
    assert ahead[CONFIG.prefetch_outstanding], ahead


@scene("crowded")
async def sequence_changes_with_prefetches_in_every_state(dut) -> None:
    """Those queued are dropped; one that loads and one that drains go on to their ends."""
    d = Director(dut, CONFIG)
    await d.prefetches_in_every_state()
    await d.cycles(30)
    replaced = len(d.events(Kind.SELECT, layer=2)) - 1
    await d.token(new_sequence=True)
    await d.route(0, 3)
    await d.route(0, 3)
    await d.route(0, 3)
    checker = await d.finish()
    assert checker.seen["sequence with draining loading queued"] == 1, checker.seen
    assert checker.counters["replaced"] >= replaced >= 2
    assert checker.counters["sequences"] == 1


@scene("crowded")
async def sequence_changes_as_a_queued_prefetch_may_start(dut) -> None:
    """The link has room for one more prefetch in each cycle round the new sequence: it starts
    before the token is taken, or never."""
    d, outcomes = Director(dut, CONFIG), Tally[bool]()
    for shift in range(16):
        await d.begin(beats=8)
        d.ram.allowed = 2 * 8 + 3
        await d.route(3, 4)
        await d.happens(Kind.BURST, 6)
        await d.cycles(60)
        assert len(d.events(Kind.SELECT)) > len(d.events(Kind.LOAD_START, flag=1)) == 1
        # The first of two bursts ends: nothing but room for another prefetch comes of it.
        d.at[d.cycle + shift].append(lambda: d.ram.allow(1))
        d.at[d.cycle + 10].append(lambda: d.offer_token(new_sequence=True))
        await d.happens(Kind.TOKEN, 2)
        await d.cycles(30)
        checker = await d.finish()
        assert checker.seen["sequence with loading queued"]
        token = d.events(Kind.TOKEN)[-1].cycle
        second = [r.cycle for r in d.events(Kind.LOAD_START, layer=1) if r.flag & 1][1:]
        assert all(cycle < token for cycle in second)
        outcomes[bool(second)] += 1
    assert len(outcomes) == 2, outcomes


@scene("crowded")
async def lookahead_wraps_to_the_next_token(dut) -> None:
    """The last layer's event prefetches for layer 0 of a token that has not come: there in time,
    or on its way and promoted, or on its way and disproved."""
    d = Director(dut, CONFIG)
    for outcome in ("useful", "promoted", "disproved"):
        await d.begin(control=ORDERED)
        for _ in range(CONFIG.num_layers):
            await d.route(3, 4)
        await d.until(lambda: len(d.log["releases"]) == CONFIG.num_slots)
        # All slots are taken by the sets of three layers: what follows are hits.
        await d.token()
        for _ in range(CONFIG.num_layers - 1):
            await d.route(3, 4)
        d.ram.allowed = math.inf if outcome == "useful" else 0
        await d.commit(PREFETCHING | ORDERED, LOWEST)
        await d.route(3, 4)
        await d.cycles(200)
        tokens = len(d.log["tokens"])
        wrapped = d.events(Kind.LOAD_START, layer=0, flag=3)[-1]
        await d.commit(ORDERED, LOWEST)
        await d.token()
        await d.route(4, 3 if outcome == "disproved" else wrapped.expert)
        await d.cycles(60)
        checker = await d.finish()
        last_route = d.events(Kind.ROUTE, layer=CONFIG.num_layers - 1)[-1].cycle
        assert last_route < wrapped.cycle < d.log["tokens"][tokens][0]
        if outcome == "useful":
            assert checker.counters["useful"] == 1
        elif outcome == "promoted":
            assert checker.seen["demand for prefetch owed"] == 1
        else:
            assert d.events(Kind.CANCEL, layer=0, expert=wrapped.expert)


@scene("crowded")
async def releases_held_back_for_long_lose_nothing(dut) -> None:
    """Every slot is pinned for 4,000 cycles: demands and routes wait, no pinned slot is taken."""
    d = Director(dut, CONFIG)
    await d.begin()
    d.releasing = False
    for experts in ((0, 1), (2, 3), (3, 4)):
        await d.route(*experts)
    await d.until(lambda: len(d.log["grants"]) == 3 * K)
    await d.token()
    await d.route(2, 3)
    assert sum(d.held.values()) == CONFIG.num_slots
    d.offer_route(1, (0, 1))
    waited = 0
    for _ in range(4000):
        await RisingEdge(dut.clk)
        waited += d.waits & ROUTE > 0
    assert waited > 3900 and len(d.log["grants"]) == 3 * K
    before = len(d.events(Kind.LOAD_START))
    checker = await d.finish()
    assert checker.counters["grants"] == 5 * K and checker.counters["evictions"] >= K
    assert len(d.events(Kind.LOAD_START)) > before


@scene("crowded")
async def demand_cancels_the_last_prefetch_for_its_slot(dut) -> None:
    """All slots are pinned or load, so a demand takes that of the prefetch started last."""
    d = Director(dut, CONFIG)
    await d.begin()
    d.releasing = False
    await d.route(0, 1)
    await d.happens(Kind.FILL_DONE, 6)
    d.ram.allowed = 0
    await d.route(0, 1)
    await d.until(lambda: len(d.log["grants"]) == 2 * K)
    last = await d.happens(Kind.LOAD_START, 2, layer=2)
    await d.token(new_sequence=True)
    await d.route(3, 4)
    cancel = await d.happens(Kind.CANCEL, flag=1)
    assert (cancel.layer, cancel.expert) == (2, last.expert)
    checker = await d.finish()
    assert checker.seen["cancel to make room"], checker.seen


@scene("crowded")
async def full_event_port_holds_prefetches_in_every_state(dut) -> None:
    """No record is taken for 3,000 cycles while prefetches are queued, loading and draining."""
    d = Director(dut, CONFIG)
    await d.prefetches_in_every_state()
    await d.cycles(20)
    d.shut.add("event")
    d.ram.allow(math.inf)
    start = d.cycle
    experts = [(0, 1), (3, 4), (2, 0), (4, 1)]
    while d.cycle < start + 3000:
        await RisingEdge(dut.clk)
        # Tokens could go on for ever, as none needs a grant; and so could illegal releases.
        if "token" not in d.offered and (not d.token_taken or not d.offered):
            d.offer_token(new_sequence=d.token_taken)
        if "route" not in d.offered and d.cycle < start + 400:
            d.offer_route(d.expected_layer, experts[d.taken["route"] % len(experts)])
        d.rogue = CONFIG.num_slots if d.cycle > start + 400 else None
    last = max(c for name in ("tokens", "routes", "releases") for c, *_ in d.log[name])
    assert last < start + 1500 and d.event_waits > 2000
    assert max(c for c, *_ in d.log["addresses"]) < start + 1500
    checker = await d.finish()
    assert checker.seen["record late with draining loading queued"], checker.seen


def legal_traffic(tb: RandomTraffic) -> None:
    """Nothing illegal, a fast accelerator and many interrupted tokens."""
    tb.illegal, tb.event_rate, tb.delays = 0, 1, (0, 20)
    tb.sequences, tb.interrupts = 0.2, 1


@scene("crowded")
async def quotas_from_none_to_the_least_slots(dut) -> None:
    """All slots are staging; then all but K belong to layers, which is as few as there may be; a
    slot more is refused."""
    tb, useful = RandomTraffic(dut, CONFIG), 0
    for quota in ([0, 0, 0], [2, 1, 1], [0, 4, 0]):
        await tb.reset(1)
        await tb.program_segments()
        legal_traffic(tb)
        if quota == [0, 0, 0]:
            assert [await tb.get("QUOTA", layer) for layer in range(3)] == quota
        else:
            assert sum(quota) + K == CONFIG.num_slots
            assert not await tb.commit(15, LOWEST, [quota[0] + 1, *quota[1:]])
        assert await tb.commit(15, LOWEST, quota)
        tb.routes_left = 60
        await tb.drain()
        checker = tb.check(Situations)
        tb.check_nothing_lost(checker)
        await tb.check_counters(checker)
        assert checker.counters["evictions"] > 20
        useful += checker.counters["useful"]
        assert list(checker.buffer.quota) == quota and not checker.settings
    assert useful


@scene("crowded", "one_layer")
async def counts_saturate_at_both_ends(dut) -> None:
    """One set again and again: rows, biases and use counts come to both their ends and stay; with
    all rows there, so do the scores, which are as wide as the largest sum needs."""
    d = Director(dut, CONFIG)
    await d.begin(beats=1, control=LEARNING | ORDERED)
    for number in range(190 if CONFIG.num_layers == 1 else 175):
        if number:
            await d.token()
        for _ in range(CONFIG.num_layers):
            # The last expert but one is used at first, and later forgotten.
            await d.route(0, CONFIG.num_experts - 2 if number < 3 else 1)
    checker = await d.finish()
    state = checker.predictor.state
    weight, bias = 1 << CONFIG.weight_bits - 1, 1 << CONFIG.bias_bits - 1
    tables = [state.temporal, *state.spatial[: CONFIG.depth]]
    for table in tables:
        assert (table.min(), table.max()) == (-weight, weight - 1)
    assert (state.bias.min(), state.bias.max()) == (-bias, bias - 1)
    assert state.use.max() == 1023 and state.use[:, CONFIG.num_experts - 2].max() == 0
    most = sum(CONFIG.gains) * len(tables)
    assert state.score[0].max() == 4 * (bias - 1) + most * (weight - 1)
    assert state.score[0].min() == -4 * bias - most * weight
    await d.check_tables(checker)


@scene("crowded", "one_layer")
async def back_to_back_events_touch_the_same_rows(dut) -> None:
    """Each event waits before the one before it is over, and learns in the rows that one read."""
    d = Director(dut, CONFIG)
    await d.begin(beats=1, control=PREFETCHING | LEARNING | ORDERED)
    sets = ((0, 1), (1, 0), (0, CONFIG.num_experts - 1))
    offers: list[int] = []
    while len(offers) < 60:
        await RisingEdge(dut.clk)
        if not d.token_taken and "token" not in d.offered:
            d.offer_token()
        if "route" not in d.offered:
            d.offer_route(d.expected_layer, sets[len(offers) // 3 % 3])
            offers.append(d.cycle)
    checker = await d.finish()
    # Expert 0 is in every set, so its row is read by every event and learns with the next one,
    # which has been waiting since before the rows of the one before it were committed.
    commits = [r.cycle for r in d.events(Kind.SCORE_COMMIT) if r.cycle > offers[0]]
    last = CONFIG.num_layers - 1
    of_routes = [c for i, c in enumerate(commits) if i % (CONFIG.num_layers + 1) <= last]
    assert len(d.events(Kind.ROUTE)) == len(offers) == len(of_routes)
    assert all(offer < c for offer, c in zip(offers[1:], of_routes, strict=False))
    await d.check_tables(checker)


@scene("crowded")
async def bursts_split_at_4_kib_from_every_offset(dut) -> None:
    """Experts of 16 beats, from 16 beats before a page's end to beyond it."""
    d, offsets = Director(dut, CONFIG), set[int]()
    for first in (16, 1):
        segments = [
            [Segment((layer + 1 << 16) - BEAT * (first - 5 * layer), PAGE_BYTES + BEAT, 16)]
            for layer in range(CONFIG.num_layers)
        ]
        await d.begin(control=PREFETCHING | ORDERED, segments=segments)
        for number, experts in enumerate(((0, 1), (2, 3), (4, 0))):
            if number:
                await d.token()
            for _ in range(CONFIG.num_layers):
                await d.route(*experts)
        checker = await d.finish()
        assert checker.counters["filled"] >= 15
        starts = {s[0].base + e * s[0].stride for s in segments for e in range(5)}
        assert starts <= {address for _, _, address, _ in d.log["addresses"]}
        offsets |= {-a % PAGE_BYTES // BEAT for a in starts}
        for _, _, address, beats in d.log["addresses"]:
            assert address % PAGE_BYTES + beats * BEAT <= PAGE_BYTES
    assert set(range(17)) <= offsets, offsets


@scene("one_layer", "one_expert")
async def smallest_shapes_under_any_traffic(dut) -> None:
    """A single layer, whose next layer is itself; a single expert, which is in every event."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in range(1, 6):
        await tb.reset(seed)
        await tb.program_segments()
        tb.sequences, tb.interrupts = 0.2, 1
        tb.routes_left = 60
        commits = cocotb.start_soon(tb.commits())
        await tb.drain()
        await commits
        await tb.drain()
        checker = tb.check(Situations)
        tb.check_nothing_lost(checker)
        await tb.check_counters(checker)
    await tb.check_tables(checker)


# Scenes of reconfiguration --------------------------------------------------------------------


class GatedTraffic(RandomTraffic):
    """Random traffic from a memory that stops where it is told to."""

    MEMORY = GatedTier
    ram: GatedTier

    async def reset(self, seed: int, *, stalls: bool = True) -> None:
        self.ram.allowed = math.inf
        await super().reset(seed, stalls=stalls)


def random_quota(tb: RandomTraffic) -> list[int]:
    """Any legal one."""
    quota = [0] * CONFIG.num_layers
    for _ in range(tb.rng.randint(0, CONFIG.num_slots - K)):
        quota[tb.rng.randrange(CONFIG.num_layers)] += 1
    return [min(q, CONFIG.num_experts) for q in quota]


async def rest_and_check(tb: RandomTraffic) -> Situations:
    """To rest, then golden, nothing lost, counters and every weight."""
    await tb.drain()
    checker = tb.check(Situations)
    tb.check_nothing_lost(checker)
    await tb.check_counters(checker)
    return checker


@scene("crowded")
async def switches_change_with_prefetches_in_every_state(dut) -> None:
    """Prefetching, learning, the adaptive gate, kinds of predictor, quotas, thresholds and segments
    change under load, each while prefetches are queued, loading, promoted and draining."""
    tb, seen = GatedTraffic(dut, CONFIG), Tally[str]()
    for seed in range(1, 7):
        await tb.reset(seed)
        await tb.program_segments()
        legal_traffic(tb)
        tb.routes_left = 150
        while tb.routes_left:
            await tb.cycles(tb.rng.randrange(120))
            while await tb.get("STATUS") & (PENDING | OLD_SEGMENTS):
                pass
            # What is on its way stays so until the commit has been taken.
            tb.ram.allowed = tb.rng.randrange(30)
            control = tb.rng.choice((15, tb.rng.randrange(16)))
            await tb.commit(
                control,
                tb.rng.choice((LOWEST, LOWEST, -100, 0)),
                random_quota(tb),
                predictors=tb.rng.randrange(1 << CONFIG.depth + 2),
                segments=tb.other_segments(),
            )
            tb.ram.allow(math.inf)
        checker = await rest_and_check(tb)
        seen += checker.seen
    await tb.check_tables(checker)
    for name in SWITCHES:
        for state in ("queued", "loading", "promoted", "draining"):
            assert seen[f"{name} changed with {state}"], (name, state, seen)
    assert seen["quota cut below what is held"], seen


@scene("crowded")
async def commits_one_after_the_other(dut) -> None:
    """As fast as AXI4-Lite lets them: each takes effect whole, between two operations."""
    tb = RandomTraffic(dut, CONFIG)
    await tb.reset(1, stalls=False)
    await tb.program_segments()
    legal_traffic(tb)
    tb.routes_left = 200
    commits = 0
    while tb.routes_left:
        # Nothing but CONTROL, QUOTA of one layer or THRESHOLD between two commits.
        settings = tb.settings[-1]
        quota, threshold = list(settings.quota), settings.threshold
        control = 15
        commits += 1
        if commits % 3 == 0:
            quota = [0] * CONFIG.num_layers
            quota[tb.rng.randrange(CONFIG.num_layers)] = tb.rng.randint(0, 4)
        elif commits % 3 == 1:
            threshold = tb.rng.choice([t for t in (LOWEST, -100, 0, 40) if t != threshold])
        else:
            control = tb.rng.choice((11, 13, 14, 7))
        await tb.commit(control, threshold, quota, wait=False)
    checker = await rest_and_check(tb)
    cycles = sorted(r.cycle for r in tb.log["events"] if r.kind == Kind.REGISTER_COMMIT)
    # And that of the segments.
    assert len(cycles) == commits + 1 > 40, len(cycles)
    assert not checker.settings


@scene("crowded")
async def segments_move_under_loads(dut) -> None:
    """Layers move, grow and shrink while loads of theirs are under way, as demands and as
    prefetches, and start again after errors: each ends as it began."""
    tb, seen = RandomTraffic(dut, CONFIG), Tally[str]()
    for seed in range(1, 4):
        await tb.reset(seed)
        await tb.program_segments()
        legal_traffic(tb)
        tb.ram.fails = lambda address: tb.rng.random() < 0.05
        tb.routes_left = 120
        while tb.routes_left:
            await tb.cycles(tb.rng.randrange(40))
            await tb.commit(15, LOWEST, segments=tb.other_segments(), wait=False)
        seen += (await rest_and_check(tb)).seen
    assert seen["layer moved with demand"] > 20 and seen["layer moved with loading"] > 2, seen
    assert seen["start again where it was"] > 20, seen


# pytest ---------------------------------------------------------------------------------------


@functools.cache
def outcome(shape: str) -> dict[str, str]:
    """What became of each scene of a shape, all in one simulation: a failure's text, or none."""
    top, name = ObservedTop(SHAPES[shape]), f"directed_{shape}"
    log = ""
    try:
        run_bench(top, name, Path(__file__).stem, env={"SHAPE": shape})
    except AssertionError as error:
        log = str(error)
    results = build(top, name) / "results-all-1.xml"
    cases = ElementTree.parse(results).iter("testcase") if results.exists() else ()
    failed = {
        case.attrib["name"]: any(case.find(kind) is not None for kind in ("failure", "error"))
        for case in cases
    }
    assert bool(log) == any(failed.values()), log or "no scene ran"
    return {scene: log if bad else "" for scene, bad in failed.items()}


@pytest.mark.parametrize(
    ("shape", "name"), [(shape, name) for shape in SHAPES for name in SCENES.get(shape, ())]
)
def test_scene_is_golden(shape: str, name: str) -> None:
    failures = outcome(shape)
    assert name in failures, f"{name} did not run"
    assert not failures[name], failures[name]
