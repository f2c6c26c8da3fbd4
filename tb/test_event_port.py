# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The event port against the list of records sent: order, cycles, and none lost under hold."""

from __future__ import annotations

import json
import os
import random
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import cocotb
import pytest
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import Shapes, run_bench, seeds, unpack
from stmoe.event_port import SOURCES, EventPort
from stmoe.payloads import CYCLE_BITS, EventKind, event_layout
from stmoe.slot_manager import record_layout
from stmoe_golden.config import EngineConfig, preset

SHAPES = {
    "tiny": preset("tiny").replace(event_depth=64),
    "odd": EngineConfig(
        num_layers=5, num_experts=7, top_k=3, quota=3, max_outstanding=20, event_depth=128
    ),
    "large": preset("gpt_oss_20b"),
}


# pytest ---------------------------------------------------------------------------------------


def test_every_record_comes_out_in_order() -> None:
    """All benches below, every shape, in one simulation."""
    run_bench(
        Shapes({name: EventPort(config) for name, config in SHAPES.items()}),
        "event_port",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
    )


def test_fifo_without_room_for_the_margin_is_refused() -> None:
    """With a margin as deep as the FIFO, ``hold`` would never fall and the engine never start."""
    with pytest.raises(ValueError, match="event_depth"):
        EventPort(preset("tiny").replace(event_depth=64, max_outstanding=64))


# cocotb ---------------------------------------------------------------------------------------

SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
KINDS = [kind.value for kind in EventKind]
EARLY = 4
"""Entries before the margin at which ``hold`` may rise: records on their way into the FIFO."""


class TB:
    """One port of the simulation: an engine that honours ``hold``, and a scoreboard."""

    def __init__(self, dut, shape: str) -> None:
        self.dut = dut
        self.config = c = SHAPES[shape]
        names = ("events__payload", "events__valid", "events__ready", "hold", "cycle")
        self.port = {n: getattr(dut, f"{shape}__{n}") for n in (*names, *SOURCES)}
        self.event = event_layout(c)
        # Packed by hand: Amaranth's own constants take most of the bench's time.
        self.record_fields = dict(record_layout(c))
        self.event_fields = dict(self.event)
        self.record_bits = record_layout(c).size
        self.margin = c.event_margin
        self.seen: Counter[str] = Counter()
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    def get(self, name: str) -> int:
        return int(self.port[name].value)

    async def reset(self, seed: int) -> None:
        self.dut._log.warning("seed %d", seed)
        self.rng = random.Random(seed)
        self.now = self.rng.choice((0, (1 << 32) - 50, self.rng.getrandbits(CYCLE_BITS - 1)))
        self.expected: deque[tuple[int, int]] = deque()  # entry, packed record
        self.entry = 0  # cycles with records so far
        self.levels = [0] * 6  # entries not delivered, latest cycles
        self.budget = self.margin  # cycles with records that may still follow
        self.held = False
        self.standing: int | None = None
        for name in SOURCES:
            self.port[name].value = 0
        self.port["events__ready"].value = 0
        self.dut.rst.value = 1
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0

    @property
    def level(self) -> int:
        """Entries that are not wholly delivered."""
        return self.entry - self.expected[0][0] if self.expected else 0

    def put(self, name: str) -> None:
        """A random record of this cycle on one source; it is expected as an event."""
        rng, record, event = self.rng, self.record_fields, self.event_fields
        packed, expected = 1 << record["valid"].offset, self.now << event["cycle"].offset
        for field, place in record.items():
            if field == "valid":
                continue
            value = rng.choice(KINDS) if field == "kind" else rng.getrandbits(place.width)
            packed |= value << place.offset
            expected |= value << event[field].offset
        self.port[name].value = packed
        self.expected.append((self.entry, expected))

    def send(self, share: float) -> None:
        """Records of this cycle on each source with a chance of ``share``; junk where not valid."""
        sources = [name for name in SOURCES if self.rng.random() < share]
        self.silent(except_for=sources)
        for name in sources:
            self.put(name)
        self.entry += len(sources) > 0
        if sources and self.held:
            self.budget -= 1
            self.seen["record under hold"] += 1
            self.seen["margin used up"] += self.budget == 0
        self.seen["all sources in one cycle"] += len(sources) == len(SOURCES)

    def silent(self, except_for: Sequence[str] = ()) -> None:
        """No records, only junk beside the valid bits."""
        valid = 1 << self.record_fields["valid"].offset
        for name in SOURCES:
            if name not in except_for:
                self.port[name].value = self.rng.getrandbits(self.record_bits) & ~valid

    def take(self, payload: int) -> None:
        """A record has been delivered: it must be the oldest."""
        assert self.expected, f"never sent: {unpack(self.event, payload)}"
        entry, want = self.expected.popleft()
        assert payload == want, (
            f"record {unpack(self.event, payload)}, not {unpack(self.event, want)} "
            f"(entry {entry} of {self.entry})"
        )
        self.seen["record"] += 1

    async def cycle(self, *, share: float, ready: bool, eager: bool = True) -> None:
        """One cycle. Under ``hold``, records come only while the margin lasts and if ``eager``."""
        port = self.port
        hold = bool(self.get("hold"))  # a register: known before this cycle's records
        if hold and not self.held:
            self.budget = self.margin
            self.seen["hold rises"] += 1
            least = self.config.event_depth - self.margin - EARLY
            assert max(self.levels) >= least, f"hold with {self.levels} entries"
        self.seen["hold falls"] += self.held and not hold
        self.held = hold
        port["cycle"].value = self.now
        if not hold or (eager and self.budget):
            self.send(share)
        else:
            self.silent()
        port["events__ready"].value = ready
        await ReadOnly()
        assert hold == bool(self.get("hold")), "hold depends on this cycle's inputs"
        valid, payload = self.get("events__valid"), self.get("events__payload")
        if self.standing is not None:
            assert valid, "events.valid fell before ready"
            assert payload == self.standing, "the record changed while it waited"
        self.standing = payload if valid and not ready else None
        if valid and ready:
            self.take(payload)
        self.levels = [*self.levels[1:], self.level]
        self.now = (self.now + 1) % (1 << CYCLE_BITS)
        await FallingEdge(self.dut.clk)

    async def drain(self) -> None:
        """Take everything that is left; nothing is lost, and ``hold`` is low in the end."""
        for _ in range(len(self.expected) + 8):
            await self.cycle(share=0, ready=True)
        assert not self.expected, f"{len(self.expected)} records lost"
        assert not self.get("events__valid"), "a record too many"
        assert not self.get("hold"), "hold with nothing left"


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def random_traffic(dut, shape: str) -> None:
    """Any mix of records and stalls; every record once, in order, with its cycle."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        for number in range(300):
            if number % 40 == 0:
                share, takes = rng.choice((0.02, 0.1, 0.3, 1)), rng.choice((0.1, 0.5, 0.9, 1))
                eager = rng.random() < 0.3
            await tb.cycle(share=share, ready=rng.random() < takes, eager=eager)
        await tb.drain()
    assert tb.seen["record"] and tb.seen["all sources in one cycle"]


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def nothing_is_lost_in_a_long_stall(dut, shape: str) -> None:
    """Records in every cycle until ``hold``, then in ``event_margin`` more, before any is taken."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        share = 1 if seed == SEEDS[0] else rng.choice((0.4, 0.8, 1))
        for _ in range(rng.randrange(8)):
            await tb.cycle(share=0.3, ready=True)
        for _ in range(3 * tb.config.event_depth):
            await tb.cycle(share=share, ready=False)
        assert tb.held and tb.budget == 0
        await tb.drain()  # hold falls
        for _ in range(10):  # and the port works on
            await tb.cycle(share=0.3, ready=rng.random() < 0.5)
        await tb.drain()
    dut._log.warning("%s: %s", shape, dict(tb.seen))
    for what in ("hold rises", "hold falls", "margin used up"):
        assert tb.seen[what] >= len(SEEDS), f"{shape}: {what} {tb.seen[what]} times"


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def margin_holds_when_hold_falls_and_rises(dut, shape: str) -> None:
    """Near the edge, where ``hold`` comes and goes, the whole margin is there every time."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    for seed in SEEDS[:4]:
        await tb.reset(seed)
        rng = tb.rng
        for number in range(4 * tb.config.event_depth):
            if number % 60 == 0:
                share, takes = rng.choice((0.1, 0.3)), rng.choice((0, 0.5, 1))
            eager = rng.random() < 0.8
            await tb.cycle(share=share, ready=rng.random() < takes, eager=eager)
        await tb.drain()


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def one_record_a_cycle_keeps_up(dut, shape: str) -> None:
    """A record in every cycle and a ready sink: entries do not pile up."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    await tb.reset(SEEDS[0])
    for number in range(100):
        name = SOURCES[number % len(SOURCES)]
        tb.silent(except_for=[name])
        tb.put(name)
        tb.entry += 1
        tb.port["cycle"].value = tb.now
        tb.port["events__ready"].value = 1
        await ReadOnly()
        if tb.get("events__valid"):
            tb.take(tb.get("events__payload"))
        assert tb.level <= 4, f"{tb.level} entries have piled up"
        tb.now += 1
        await FallingEdge(dut.clk)
    await tb.drain()
