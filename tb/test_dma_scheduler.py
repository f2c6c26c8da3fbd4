# SPDX-License-Identifier: Apache-2.0
"""The DMA scheduler against a reference written from its contract, and against AxiRamRead.

The reference (:class:`Reference`) follows every handshake and knows for each cycle what the
contract allows: which burst may be presented, which beat must stand on ``fill``, whether a cancel
is late, how each load ends. It computes addresses beat by beat from the segment table.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from dataclasses import dataclass, field

import cocotb
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly
from cocotbext.axi import AxiRamRead, AxiReadBus

import bench_dma
from simulation import Readers, pack, run_bench, seeds
from stmoe.axi_flat import connect_axi4_read, flat_axi4_read_ports
from stmoe.dma_scheduler import (
    DmaScheduler,
    burst_record_layout,
    last_record_layout,
    retry_record_layout,
)
from stmoe.harness.memory_model import beat_at as memory_beat
from stmoe.payloads import (
    CompletionStatus,
    axi4_read_signature,
    completion_layout,
    fill_layout,
    load_layout,
    segment_write_layout,
)
from stmoe_golden.config import NUM_SEGMENTS, EngineConfig, preset

DONE, DRAINED, ERROR, TIMEOUT = (s.value for s in CompletionStatus)
PAGE = 4096
OKAY, SLVERR, DECERR = 0, 2, 3

CONFIGS = {
    # Six transfers: the last IDs of the field's range do not exist.
    "narrow": preset("tiny").replace(
        expert_bytes=1024,
        max_burst=16,
        max_outstanding=5,
        prefetch_outstanding=2,
        retry_limit=2,
        watchdog_cycles=256,
    ),
    # One burst at a time for prefetch, no alignment to help, no retry, a single spare transfer.
    "wide": preset("gpt_oss_20b").replace(
        expert_bytes=2048,
        max_burst=4,
        max_outstanding=3,
        prefetch_outstanding=1,
        retry_limit=0,
        num_transfers=5,
        watchdog_cycles=300,
    ),
    # Half-words, bursts that are no power of two, experts that are no multiple of either.
    "half": preset("tiny").replace(
        axi_data_width=32, expert_bytes=5002, max_burst=100, watchdog_cycles=2048
    ),
    # The longest burst is a page of 64 beats, not 256.
    "widest": preset("tiny").replace(
        axi_data_width=512, expert_bytes=9000, max_burst=256, watchdog_cycles=1024
    ),
    # A burst of 256 beats is half a page.
    "long": preset("tiny").replace(expert_bytes=4999, max_burst=256, watchdog_cycles=2048),
    "odd": preset("tiny").replace(
        axi_data_width=256, expert_bytes=2001, max_burst=7, watchdog_cycles=512
    ),
    # The least of everything.
    "least": preset("tiny").replace(
        num_layers=1,
        top_k=1,
        num_transfers=1,
        max_outstanding=1,
        prefetch_outstanding=1,
        max_burst=1,
        expert_bytes=64,
        retry_limit=1,
        watchdog_cycles=256,
    ),
}


def beat_at(config: EngineConfig, address: int) -> int:
    """The beat that the memory holds at ``address``."""
    return memory_beat(address, config.axi_data_width)


def beat_addresses(table: list[tuple[int, int, int]], config: EngineConfig, expert: int):
    """(segment, address) of every beat of an expert, in order; rows are (base, stride, beats)."""
    for segment, (base, stride, beats) in enumerate(table):
        for i in range(beats):
            yield segment, base + expert * stride + i * config.beat_bytes


def expected_bursts(table, config: EngineConfig, expert: int) -> list[tuple[int, int]]:
    """(address, beats) of every burst: a new one at a segment, a page, or after max_burst."""
    bursts: list[list[int]] = []
    before = None
    for segment, address in beat_addresses(table, config, expert):
        full = bursts and bursts[-1][1] == config.max_burst
        if segment != before or address % PAGE == 0 or full:
            bursts.append([address, 0])
        bursts[-1][1] += 1
        before = segment
    return [(address, beats) for address, beats in bursts]


@dataclass(eq=False)
class Load:
    """One load in flight, as the reference sees it."""

    transfer: int
    prefetch: bool
    layer: int
    expert: int
    slot: int
    tables: list
    bursts: list[tuple[int, int]]
    beats: list[int]
    demand_since: int | None
    started_at: int
    presented: int = 0
    finished_on_bus: int = 0
    finished: int = 0
    received: int = 0
    failed: bool = False
    retries: int = 0
    cancelled_at: int | None = None
    lost: bool = False
    status: int | None = None
    ended_at: int = 0
    worst: int = OKAY
    on_bus: list[int] = field(default_factory=list)

    @property
    def unissued(self) -> bool:
        return self.cancelled_at is None and not self.lost and self.presented < len(self.bursts)

    @property
    def complete(self) -> bool:
        return not self.unissued and self.finished == self.presented

    @property
    def ended(self) -> bool:
        return self.status is not None


@dataclass
class Beat:
    """One beat between the bus and ``fill``."""

    load: Load
    data: int
    resp: int
    last: bool


class Reference:
    """What the contract says, cycle by cycle. ``step`` raises AssertionError on a deviation."""

    def __init__(self, config: EngineConfig, tables):
        self.config = config
        self.tables = tables
        self.older = False
        """In the cycle before, a load kept to other tables than the active ones."""
        self.now = 0
        self.loads: dict[int, Load] = {}
        self.order: list[Load] = []
        self.register: list[Beat] = []
        self.standing = False
        self.previous = None
        self.presenting: Load | None = None
        self.silence = 0
        self.dead = False
        self.lost: list[Load] = []
        self.stale: list[tuple[int, list[Load]]] = []
        self.waited = {"address": 0, "start": 0, "prefetch_ready": 0}
        self.count: dict[str, int] = {}

    def note(self, what: str) -> None:
        self.count[what] = self.count.get(what, 0) + 1

    def on_their_way(self, *, prefetch: bool) -> int:
        loads = [*self.loads.values(), *(x for x in self.lost if self.loads.get(x.transfer) != x)]
        return sum(
            load.presented - load.finished_on_bus for load in loads if load.prefetch or not prefetch
        )

    def taken_beat(self, fill_ready: bool):
        """The beat that will be taken in this cycle, and whether it is discarded."""
        if not self.register:
            return None, False
        load = self.register[0].load
        gone = (
            load.cancelled_at is not None and load.cancelled_at < self.now or load.lost
        ) and not self.standing
        if gone or fill_ready:
            return self.register[0], gone
        return None, False

    def wait(self, what: str, could: bool, did: bool) -> None:
        """Something that may happen must happen within a few cycles."""
        self.waited[what] = self.waited[what] + 1 if could and not did else 0
        assert self.waited[what] <= 10 + 2 * self.config.transfers, f"no {what} for long"

    def check_progress(self, i: dict, o: dict) -> None:
        """Neither an address nor a start that the contract allows is held back."""
        config = self.config
        loads = self.loads.values()
        self.stale = [(t, x) for t, x in self.stale if any(y.unissued for y in x)]
        taken = {*self.loads, *(x.transfer for x in self.lost), *(t for t, _ in self.stale)}
        free = len(taken) < config.transfers or (o["dead"] and len(loads) < config.transfers)
        waiting = [x for x in loads if x.unissued]
        demands = any(not x.prefetch for x in waiting)
        owed = sum(x.presented - x.finished for x in [*loads, *self.lost])
        owed_prefetch = sum(x.presented - x.finished for x in [*loads, *self.lost] if x.prefetch)
        room = demands or owed_prefetch < config.prefetch_outstanding
        self.wait(
            "address",
            bool(waiting) and owed < config.max_outstanding and room and not i["hold"],
            o["ar_valid"],
        )
        idle = not any(x.prefetch and (x.unissued or x.failed) for x in loads)
        prefetch = i["start_valid"] and i["start"]["prefetch"]
        self.wait("start", i["start_valid"] and free and (idle or not prefetch), o["start_ready"])
        self.wait(
            "prefetch_ready",
            free and idle and not o["dead"] and owed_prefetch < config.prefetch_outstanding,
            o["prefetch_ready"],
        )

    def retries_left(self, load: Load) -> bool:
        return load.retries < self.config.retry_limit

    def end(self, load: Load, status: int) -> None:
        load.status = status
        load.ended_at = self.now

    def settle(self, load: Load) -> None:
        """Decide how a load that is complete ends; one that is to be retried does not."""
        if load.ended or not load.complete:
            return
        if load.cancelled_at is not None:
            self.end(load, DRAINED)
        elif not load.failed:
            self.end(load, DONE)
        elif not self.retries_left(load):
            self.end(load, ERROR)

    def step(self, i: dict, o: dict) -> None:
        """One cycle: ``i`` was driven, ``o`` was seen."""
        config = self.config
        before = self.previous
        ar, r = o["ar"], i["r"]
        lost_ids = {load.transfer for load in self.lost}
        assert o["busy"] == bool(self.loads), "busy"
        assert o["dead"] == self.dead, "dead"
        assert o["old_segments"] == self.older, "old_segments"
        self.older = any(load.tables is not i["tables"] for load in self.loads.values())
        # That all transfers are lost shows one cycle late, when there is none left to start.
        self.dead |= len({x.transfer for x in self.lost}) == config.transfers
        expires = self.silence == config.watchdog_cycles
        active = (o["ar_valid"] and i["ar_ready"]) or i["r_valid"] or bool(self.register) or expires

        # Presented addresses ---
        stands = before is not None and before[1]["ar_valid"] and not before[0]["ar_ready"]
        if stands:
            assert o["ar_valid"] and ar == before[1]["ar"], "an address changed before it was taken"
        elif o["ar_valid"]:
            assert not o["dead"], "an address was presented when dead"
            load = self.loads.get(ar["id"])
            assert load is not None, f"burst of transfer {ar['id']}, which is free"
            assert load.unissued, f"burst of transfer {ar['id']}, which has none left"
            assert (ar["addr"], ar["len"] + 1) == load.bursts[load.presented], (
                f"burst {ar['addr']:#x} of {ar['len'] + 1}, not {load.bursts[load.presented]}"
            )
            last_byte = ar["addr"] + (ar["len"] + 1) * config.beat_bytes - 1
            assert ar["addr"] // PAGE == last_byte // PAGE, "a burst crosses 4 KiB"
            assert ar["len"] < config.max_burst <= 256, "a burst is too long"
            assert not before[0]["hold"], "an address was presented under hold"
            if load.prefetch:
                for other in self.order:
                    assert not other.unissued or other.demand_since >= self.now - 1, (
                        f"prefetch {load.transfer} before demand {other.transfer}"
                    )
                self.note("prefetch burst")
            else:
                first = next(other for other in self.order if other.unissued)
                assert first.transfer == load.transfer, (
                    f"demand {load.transfer} (since {load.demand_since}) before {first.transfer} "
                    f"(since {first.demand_since})"
                )
                self.note("demand burst")
            load.presented += 1
            self.presenting = load
            self.order = [other for other in self.order if other.unissued]
            assert self.on_their_way(prefetch=False) <= config.max_outstanding
            if load.prefetch:
                assert self.on_their_way(prefetch=True) <= config.prefetch_outstanding
        handshake = o["ar_valid"] and i["ar_ready"]
        record = o["record_burst"]
        assert record["valid"] == handshake
        if handshake:
            load = self.presenting
            assert (record["transfer"], record["addr"], record["len"]) == (
                ar["id"],
                ar["addr"],
                ar["len"],
            )
            assert load.lost or record["prefetch"] == load.prefetch

        # The beat before `fill` ---
        assert o["r_ready"] == (len(self.register) < 2), "r.ready"
        beat, discarded = self.taken_beat(i["fill_ready"])
        assert o["fill_valid"] == (bool(self.register) and not discarded), "fill.valid"
        assert o["discard"] == (beat is not None and discarded), "discard"
        if o["fill_valid"]:
            load = self.register[0].load
            want = {"slot": load.slot, "offset": load.received, "data": self.register[0].data}
            assert o["fill"] == want, f"fill {o['fill']}, not {want}"
            if self.register[0].resp < SLVERR:
                assert o["fill"]["data"] == beat_at(config, load.beats[load.received])
        self.standing = o["fill_valid"] and not i["fill_ready"]
        if beat is not None:
            self.register.pop(0)
            load = beat.load
            load.received += 1
            load.failed |= beat.resp >= SLVERR
            load.finished += beat.last
            if beat.last:
                self.settle(load)

        waiting = any(not x.lost and x.presented > x.finished for x in self.loads.values())
        waiting |= beat is not None and beat.last and not beat.load.lost
        self.silence = self.silence + 1 if waiting and not active else 0
        if expires:
            assert not o["start_ready"], "a load starts in the cycle of the watchdog"
            for load in self.loads.values():
                if not load.ended:
                    load.lost = True
                    self.lost.append(load)
                    self.end(load, TIMEOUT)
            self.order = []
            self.dead = (
                self.dead
                or o["ar_valid"]
                or self.on_their_way(prefetch=False) == config.max_outstanding
            )
            self.note("watchdog")

        # Cancel ---
        target = self.loads.get(i["cancel_transfer"])
        late = True
        if target is not None and target.cancelled_at is None and not target.lost:
            late = target.ended
            assert o["cancel_late"] == late, f"cancel_late of {target} is {o['cancel_late']}"
        elif target is None and i["cancel_transfer"] < config.transfers:
            assert o["cancel_late"], "cancel of a free transfer is not late"
        if i["cancel"]:
            self.note("late cancel" if late else "cancel")
            if late and target is not None and target.ended_at == self.now:
                self.note("cancel with the last beat")
            if not late:
                if target in self.order:
                    earlier = self.order[: self.order.index(target)]
                    self.stale.append((target.transfer, earlier))
                    self.note("cancel of a demand in the order")
                target.cancelled_at = self.now
                self.order = [other for other in self.order if other is not target]
                self.settle(target)
                if target.ended:
                    self.note("drained at once")

        # The bus ---
        record = o["record_last"]
        bus_beat = i["r_valid"] and o["r_ready"]
        assert record["valid"] == (bus_beat and r["last"])
        if bus_beat:
            load = r["load"]
            load.worst = max(load.worst, r["resp"])
            if r["last"]:
                load.finished_on_bus += 1
                assert (record["transfer"], record["resp"]) == (load.transfer, load.worst)
                load.worst = OKAY
            self.register.append(Beat(load, r["data"], r["resp"], r["last"]))

        # Retry ---
        if o["record_retry"]["valid"]:
            load = self.loads[o["record_retry"]["transfer"]]
            assert load.complete and load.failed and self.retries_left(load) and not load.ended
            assert load.finished == len(load.bursts)
            load.presented = load.finished = load.finished_on_bus = load.received = 0
            load.failed = False
            load.retries += 1
            self.note("retry")
            if load.tables is not i["tables"]:
                self.note("retry from the old segments")
            if not load.prefetch:
                load.demand_since = self.now
                self.order.append(load)
            else:
                assert not any(
                    x.prefetch and x.unissued for x in self.loads.values() if x is not load
                )
                self.note("retry of a prefetch")

        # Promote ---
        if i["promote"]:
            load = self.loads.get(i["promote_transfer"])
            if load and load.prefetch and not load.ended and load.cancelled_at is None:
                load.prefetch = False
                load.demand_since = self.now
                self.note("promote")
                if load.unissued:
                    self.order.append(load)
                    self.note("promote with bursts left")

        # Start and completion ---
        if o["prefetch_ready"]:
            assert not any(x.prefetch and x.unissued for x in self.loads.values())
            assert len(set(self.loads) | lost_ids) < config.transfers
            assert self.on_their_way(prefetch=True) < config.prefetch_outstanding
            assert not o["dead"]
        if o["completion_valid"] and i["completion_ready"]:
            done = o["completion"]
            load = self.loads.pop(done["transfer"])
            assert load.ended and load.ended_at < self.now, f"{load} has not ended"
            assert done["status"] == load.status, f"{load} ended with {done['status']}"
            for other in self.loads.values():
                assert not other.ended or other.ended_at > load.ended_at - config.transfers, (
                    "completions out of order"
                )
            self.note(f"status {load.status}")
        if i["start_valid"] and o["start_ready"]:
            load = i["start"]
            index = o["start_transfer"]
            assert index < config.transfers and index not in self.loads
            assert o["dead"] or index not in lost_ids, "a lost ID is used again"
            table = self.tables[load["layer"]]
            new = Load(
                transfer=index,
                prefetch=bool(load["prefetch"]),
                layer=load["layer"],
                expert=load["expert"],
                slot=load["slot"],
                tables=self.tables,
                bursts=[] if o["dead"] else expected_bursts(table, config, load["expert"]),
                beats=[a for _, a in beat_addresses(table, config, load["expert"])],
                demand_since=None if load["prefetch"] else self.now,
                started_at=self.now,
            )
            self.loads[index] = new
            if new.prefetch:
                assert not any(
                    x.prefetch and x.unissued for x in self.loads.values() if x is not new
                ), "two prefetches have bursts left"
            elif new.bursts:
                self.order.append(new)
            if not new.bursts:
                self.end(new, ERROR if o["dead"] else DONE)
                self.note("refused load" if o["dead"] else "empty load")
        self.check_progress(i, o)
        # A load that starts in the next cycle keeps to those of this one.
        self.tables = i["tables"]
        self.previous = (i, o)
        self.now += 1


class Fields:
    """Reads and packs one struct port."""

    def __init__(self, layout):
        self.layout = layout
        self.fields = [(name, f.offset, (1 << f.width) - 1) for name, f in layout]

    def unpack(self, value: int) -> dict[str, int]:
        return {name: (value >> offset) & mask for name, offset, mask in self.fields}

    def pack(self, **values: int) -> int:
        assert set(values) == {name for name, _, _ in self.fields}
        return sum((values[name] & mask) << offset for name, offset, mask in self.fields)


@dataclass
class Burst:
    """One burst in the memory of the bench."""

    load: Load
    addr: int
    beats: int
    due: int
    place: int = 0


class Bench:
    """Drives the scheduler from all sides in lock step with the reference.

    Inputs change at the falling edge; once they have settled, what stands on all ports is what
    the next rising edge samples.
    """

    def __init__(self, dut, config: EngineConfig, rng: random.Random):
        self.dut = dut
        self.config = config
        self.rng = rng
        self.driven: dict[str, int] = {}
        axi = axi4_read_signature(config)
        self.r_fields = Fields(payload_of(axi, "r"))
        self.load_fields = Fields(load_layout(config))
        self.now = Readers(dut)
        self.outputs = {
            "ar": ("axi__ar__payload", Fields(payload_of(axi, "ar"))),
            "fill": ("fill__payload", Fields(fill_layout(config))),
            "completion": ("completion__payload", Fields(completion_layout(config))),
            "record_burst": ("record_burst", Fields(burst_record_layout(config))),
            "record_last": ("record_last", Fields(last_record_layout(config))),
            "record_retry": ("record_retry", Fields(retry_record_layout(config))),
        }
        self.bits = {
            "ar_valid": "axi__ar__valid",
            "r_ready": "axi__r__ready",
            "fill_valid": "fill__valid",
            "completion_valid": "completion__valid",
            "start_ready": "start__ready",
            "start_transfer": "start_transfer",
            "cancel_late": "cancel_late",
            "prefetch_ready": "prefetch_ready",
            "busy": "busy",
            "old_segments": "old_segments",
            "dead": "dead",
            "discard": "discard",
        }

    def drive(self, name: str, value: int) -> None:
        if self.driven.get(name) != value:
            self.driven[name] = value
            getattr(self.dut, name).value = value

    async def reset(self, tables) -> None:
        """Reset, write the segment tables and use them, begin a new reference."""
        self.driven.clear()
        self.bank, self.tables, self.rows = 1, tables, []
        self.next_tables, self.moved_at = None, 0
        # A stream of its own: what else happens does not hang on it.
        self.moves = random.Random()
        self.moves.setstate(self.rng.getstate())
        for name in ("start__valid", "promote", "cancel", "hold", "completion__ready", "bank"):
            self.drive(name, 0)
        for name in ("axi__ar__ready", "axi__r__valid", "fill__ready", "segment_write__valid"):
            self.drive(name, 0)
        self.dut.rst.value = 1
        await FallingEdge(self.dut.clk)
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0
        for row in self.rows_of(tables):
            self.drive("segment_write__payload", row)
            self.drive("segment_write__valid", 1)
            await FallingEdge(self.dut.clk)
        self.drive("segment_write__valid", 0)
        self.drive("bank", self.bank)
        await FallingEdge(self.dut.clk)
        self.reference = Reference(self.config, tables)
        self.memory: dict[int, list[Burst]] = {}
        self.r: dict | None = None
        self.pending: dict | None = None
        self.shown_layer: int | None = None
        self.seen: dict = {}

    def rows_of(self, tables) -> list[int]:
        """Payloads of ``segment_write``."""
        shape = segment_write_layout(self.config)
        rows = []
        for layer, table in enumerate(tables):
            for segment, (base, stride, beats) in enumerate(table):
                row = {"base": base, "stride": stride, "beats": beats}
                rows.append(pack(shape, {"layer": layer, "segment": segment, "value": row}))
        return rows

    def move(self, tables) -> None:
        """Write other tables in the cycles to come, then use them; not while any load keeps to
        those before, or others are being written."""
        ref = self.reference
        others = any(load.tables is not self.tables for load in ref.loads.values())
        if others or self.next_tables or ref.now < self.moved_at + 3:
            return
        self.next_tables, self.rows = tables, self.rows_of(tables)
        ref.note("move")

    def _move(self) -> None:
        self.drive("segment_write__valid", int(bool(self.rows)))
        if self.rows:
            self.drive("segment_write__payload", self.rows.pop())
        elif self.next_tables is not None and self.moves.random() < 0.3:
            self.tables, self.next_tables = self.next_tables, None
            self.bank ^= 1
            self.moved_at = self.reference.now
            self.drive("bank", self.bank)

    def next_r(self, *, latency_over, gap: float, mix: float, errors: float):
        """The beat that the memory puts on the bus in this cycle, if any."""
        if self.r is not None:
            return
        ready = [i for i, bursts in self.memory.items() if bursts and latency_over(bursts[0])]
        if not ready or self.rng.random() < gap:
            return
        begun = [i for i in ready if self.memory[i][0].place]
        choice = begun[0] if begun and self.rng.random() >= mix else self.rng.choice(ready)
        burst = self.memory[choice][0]
        address = burst.addr + burst.place * self.config.beat_bytes
        resp = OKAY
        data = beat_at(self.config, address)
        if self.rng.random() < errors:
            resp = self.rng.choice((SLVERR, DECERR))
            data = self.rng.getrandbits(self.config.axi_data_width)
        burst.place += 1
        last = burst.place == burst.beats
        if last:
            self.memory[choice].pop(0)
        self.r = {"load": burst.load, "data": data, "resp": resp, "last": last, "id": choice}

    async def cycle(
        self,
        *,
        start: dict | None = None,
        announce: dict | None = None,
        cancel: int | None = None,
        promote: int | None = None,
        idle_target: int = 0,
        hold: int = 0,
        ar_ready: int = 1,
        fill_ready: int = 1,
        completion_ready: int = 1,
        latency: int = 1,
    ) -> dict:
        """One cycle. A ``start`` is held until it is taken; its layer stands there for a cycle
        before it is valid, as the contract has it. An announced load stands on ``start`` without
        being valid. Returns what was seen."""
        ref = self.reference
        if self.pending is None:
            self.pending = start
        shown = self.pending or announce
        valid = self.pending is not None and self.pending["layer"] == self.shown_layer
        if shown:
            self.shown_layer = shown["layer"]
        self._move()
        r = self.r or {"id": 0, "data": 0, "resp": 0, "last": 0, "load": None}
        i = {
            "start_valid": valid,
            "start": self.pending,
            "promote": promote is not None,
            "promote_transfer": promote,
            "cancel": cancel is not None,
            "cancel_transfer": idle_target if cancel is None else cancel,
            "hold": hold,
            "ar_ready": ar_ready,
            "r_valid": self.r is not None,
            "r": r,
            "fill_ready": fill_ready,
            "completion_ready": completion_ready,
            "tables": self.tables,
        }
        self.drive("start__valid", int(i["start_valid"]))
        if shown:
            self.drive("start__payload", self.load_fields.pack(**shown))
        self.drive("promote", int(i["promote"]))
        self.drive("promote_transfer", promote or 0)
        self.drive("cancel", int(i["cancel"]))
        self.drive("cancel_transfer", i["cancel_transfer"])
        self.drive("hold", hold)
        self.drive("axi__ar__ready", ar_ready)
        self.drive("axi__r__valid", int(i["r_valid"]))
        if i["r_valid"]:
            beat = {k: int(r[k]) for k in ("id", "data", "resp", "last")}
            self.drive("axi__r__payload", self.r_fields.pack(**beat))
        self.drive("fill__ready", fill_ready)
        self.drive("completion__ready", completion_ready)

        await ReadOnly()
        now = self.now
        o = {k: now[port]() for k, port in self.bits.items()}
        for k, (port, fields) in self.outputs.items():
            o[k] = fields.unpack(now[port]())
        try:
            ref.step(i, o)
        except AssertionError as error:
            raise AssertionError(f"cycle {ref.now}: {error}") from error
        o["started"] = i["start_valid"] and o["start_ready"]
        if o["started"]:
            self.pending = None
        if i["r_valid"] and o["r_ready"]:
            self.r = None
        if o["ar_valid"] and ar_ready:
            ar = o["ar"]
            burst = Burst(ref.presenting, ar["addr"], ar["len"] + 1, ref.now - 1 + latency)
            self.memory.setdefault(ar["id"], []).append(burst)
        self.seen = o
        await FallingEdge(self.dut.clk)
        return o


def payload_of(signature, name: str):
    """Payload layout of a stream in a signature."""
    return signature.members[name].signature.members["payload"].shape


def random_tables(config: EngineConfig, rng: random.Random) -> list[list[tuple[int, int, int]]]:
    """A segment table with pages crossed, empty rows before, between and behind, and one layer
    without any beat."""
    tables = []
    slot_beats = config.slot_beats
    for layer in range(config.num_layers):
        left = slot_beats if rng.random() < 0.8 else rng.randint(1, min(6, slot_beats))
        table = []
        for _ in range(NUM_SEGMENTS):
            beats = rng.choice((0, 1, rng.randint(0, left), rng.randint(0, left)))
            beats = 0 if layer == 1 else min(left, beats)
            left -= beats
            page = rng.randrange(1 << (config.axi_addr_width - 13)) * PAGE
            offset = rng.choice((0, rng.randrange(PAGE), PAGE - config.beat_bytes))
            base = (page + offset) // config.beat_bytes * config.beat_bytes
            # The sum stays within the address: 2**9 experts at most.
            stride = rng.choice((0, rng.getrandbits(12), rng.getrandbits(24), rng.getrandbits(32)))
            stride = stride // config.beat_bytes * config.beat_bytes
            top = (1 << config.axi_addr_width) - 1
            span = config.num_experts * stride + slot_beats * config.beat_bytes
            while base + span > top:
                base //= 2
            if rng.random() < 0.3:  # the last expert ends with the last byte that there is
                base = top + 1 - beats * config.beat_bytes - (config.num_experts - 1) * stride
            table.append((base // config.beat_bytes * config.beat_bytes, stride, beats))
        tables.append(table)
    return tables


def start_clock(dut) -> None:
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())


async def random_traffic(bench: Bench, cycles: int) -> None:
    """Loads, cancels and promotions at random, biased to the moments that matter."""
    rng, ref, config = bench.rng, bench.reference, bench.config
    p_start = rng.choice((0.05, 0.2, 1.0))
    p_prefetch = rng.choice((0.3, 0.6, 0.9))
    p_cancel = rng.choice((0.0, 0.01, 0.05))
    p_promote = rng.choice((0.0, 0.01, 0.05))
    p_hold = rng.choice((0.0, 0.0, 0.2))
    p_ar = rng.choice((1.0, 0.5, 0.1))
    p_fill = rng.choice((1.0, 0.9, 0.3))
    p_completion = rng.choice((1.0, 0.5, 0.05))
    p_gap = rng.choice((0.0, 0.1, 0.7))
    p_mix = rng.choice((0.0, 0.1, 1.0))
    p_error = rng.choice((0.0, 0.005, 0.05))
    longest = rng.choice((1, 8, 100))
    p_move = bench.moves.choice((0.0, 0.01, 0.5))
    crowd = rng.choice((2, config.transfers - 1, config.transfers))
    # In every third run the memory falls silent until a watchdog has seen it.
    silent_from = rng.randrange(cycles) if rng.random() < 0.33 else None
    mute_address = rng.random() < 0.5
    ids = range(config.transfers)
    for step in itertools.count():
        silent = silent_from is not None and step >= silent_from and not ref.count.get("watchdog")
        answered = not any(bench.memory.values()) and not bench.seen.get("ar_valid")
        if step >= cycles and not ref.loads and bench.pending is None and answered and not bench.r:
            break
        assert step < 20 * cycles, f"not finished after {step} cycles: {ref.loads}"
        going = step < cycles
        start = cancel = promote = None
        wants = bench.pending is None and len(ref.loads) < crowd
        if going and wants and rng.random() < p_start:
            prefetch = int(rng.random() < p_prefetch)
            # A manager asks `prefetch_ready` first; now and then it does not.
            if not prefetch or bench.seen.get("prefetch_ready") or rng.random() < 0.1:
                start = {
                    "prefetch": prefetch,
                    "layer": rng.randrange(config.num_layers),
                    "expert": rng.randrange(config.num_experts),
                    "slot": rng.randrange(config.num_slots),
                }
        fill_ready = int(rng.random() < p_fill)
        if going and bench.moves.random() < p_move:
            bench.move(random_tables(config, bench.moves))
        prefetches = [t for t, x in ref.loads.items() if x.prefetch and not x.ended]
        beat, gone = ref.taken_beat(fill_ready)
        if beat is not None and not gone and beat.last and going:
            at_end = beat.load.finished + 1 == len(beat.load.bursts)
            if at_end and p_cancel and rng.random() < 0.4:
                cancel = beat.load.transfer
        if cancel is None and rng.random() < p_cancel:
            cancel = rng.choice(prefetches) if prefetches and rng.random() < 0.8 else None
            if cancel is None:
                cancel = rng.choice(ids)
        if prefetches and rng.random() < p_promote:
            promote = rng.choice(prefetches)
        if not silent:
            bench.next_r(
                latency_over=lambda burst: burst.due <= ref.now,
                gap=p_gap,
                mix=p_mix,
                errors=p_error,
            )
        await bench.cycle(
            start=start,
            cancel=cancel,
            promote=promote,
            idle_target=rng.randrange(config.transfers),
            hold=int(rng.random() < p_hold),
            ar_ready=int(rng.random() < p_ar and not (silent and mute_address)),
            fill_ready=fill_ready,
            completion_ready=int(rng.random() < p_completion),
            latency=rng.randint(1, longest),
        )
    assert ref.on_their_way(prefetch=False) == 0


def config_of_test() -> EngineConfig:
    return CONFIGS[os.environ["CONFIG"]]


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def random_loads(dut):
    """Seeded random traffic; every kind of event must have happened over all seeds."""
    config = config_of_test()
    start_clock(dut)
    total: dict[str, int] = {}
    for seed in json.loads(os.environ["SEEDS"]):
        rng = random.Random(seed)
        bench = Bench(dut, config, rng)
        await bench.reset(random_tables(config, rng))
        try:
            await random_traffic(bench, 2500)
        except AssertionError as error:
            raise AssertionError(f"SEED={seed}: {error}") from error
        for what, count in bench.reference.count.items():
            total[what] = total.get(what, 0) + count
    print(f"random_loads {os.environ['CONFIG']}: {total}")
    if len(json.loads(os.environ["SEEDS"])) > 1:
        needed = ["prefetch burst", "demand burst", "cancel", "late cancel"]
        needed += ["cancel with the last beat", "drained at once", "promote"]
        needed += ["empty load"] if config.num_layers > 1 else []
        needed += ["promote with bursts left", "status 0", "status 1", "status 2"]
        needed += ["cancel of a demand in the order", "watchdog", f"status {TIMEOUT}"]
        needed += ["move"]
        needed += ["retry", "retry from the old segments"] if config.retry_limit else []
        # With a single transfer a prefetch seldom lives long enough to start again.
        needed += ["retry of a prefetch"] if config.retry_limit and config.transfers > 1 else []
        for what in needed:
            assert total.get(what), f"never happened: {what}"


class Scene:
    """Steps a bench through a scene with a memory that answers at once, unless it is silent."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.ref = bench.reference
        self.silent = False
        self.errors = 0.0
        self.settings: dict = {}

    async def cycle(self, **inputs) -> dict:
        if not self.silent:
            self.bench.next_r(
                latency_over=lambda burst: burst.due <= self.ref.now,
                gap=0.0,
                mix=0.0,
                errors=self.errors,
            )
        return await self.bench.cycle(**{**self.settings, **inputs})

    async def start(
        self,
        layer: int,
        *,
        prefetch: int,
        expert: int = 1,
        slot: int = 1,
        announced: int | None = None,
    ) -> int:
        """Start a load; returns its transfer, in the cycle after the handshake. ``announced`` is
        the layer on ``start`` in the two cycles before, where the rest differs."""
        load = {"prefetch": prefetch, "layer": layer, "expert": expert, "slot": slot}
        if announced is not None:
            other = {"prefetch": 1 - prefetch, "expert": expert ^ 1, "slot": slot ^ 1}
            for _ in range(2):
                await self.cycle(announce={**other, "layer": announced})
        for _ in range(100):
            seen = await self.cycle(start=load)
            if seen["started"]:
                return seen["start_transfer"]
        raise AssertionError("a load was not taken within 100 cycles")

    async def idle(self, limit: int = 2000, **inputs) -> list[dict]:
        """Until nothing is in flight; returns the completions."""
        done = []
        for _ in range(limit):
            if not self.ref.loads and self.bench.r is None:
                return done
            seen = await self.cycle(**inputs)
            if seen["completion_valid"]:
                done.append(seen["completion"])
        raise AssertionError(f"not idle within {limit} cycles: {self.ref.loads}")


def tables_of(config: EngineConfig, *layers: tuple[tuple[int, int], ...]):
    """Segment tables of layers given as (offset in a page in beats, beats) for each segment."""
    tables = []
    for layer, segments in enumerate(layers):
        table = []
        for segment, (offset, beats) in enumerate(segments):
            base = (1 + layer * NUM_SEGMENTS + segment) << 20
            table.append((base + offset * config.beat_bytes, 2 * PAGE, beats))
        tables.append(table + [(0, 0, 0)] * (NUM_SEGMENTS - len(table)))
    return tables + [[(0, 0, 0)] * NUM_SEGMENTS] * (config.num_layers - len(tables))


async def scene_of(dut, *layers) -> Scene:
    config = config_of_test()
    start_clock(dut)
    bench = Bench(dut, config, random.Random(1))
    await bench.reset(tables_of(config, *layers))
    return Scene(bench)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def first_address(dut):
    """An address stands on the bus three cycles after the start of a load whose layer stood there
    for two cycles before, else four; also if a prefetch is waiting."""
    scene = await scene_of(dut, ((3, 20),), ((0, 1), (0, 0), (5, 7)), ((509, 100),))

    async def cycles_to_address(transfer: int) -> int:
        for cycles in range(1, 20):
            seen = await scene.cycle()
            if seen["ar_valid"] and seen["ar"]["id"] == transfer:
                return cycles
        raise AssertionError("no address")

    for layer, prefetch, before in itertools.product(range(3), range(2), range(3)):
        transfer = await scene.start(layer, prefetch=prefetch, announced=before)
        assert await cycles_to_address(transfer) == (3 if before == layer else 4)
        await scene.idle()
    for before in range(2):
        scene.silent = True
        await scene.start(2, prefetch=1)
        for _ in range(20):
            await scene.cycle()
        transfer = await scene.start(0, prefetch=0, announced=before)
        assert await cycles_to_address(transfer) == 3 + before
        scene.silent = False
        await scene.idle()


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def cancel_sweep(dut):
    """A cancel in every cycle of a load's life, with and without a slow buffer."""
    scene = await scene_of(dut, ((510, 6), (0, 0), (0, 17)))
    ref, rng = scene.ref, scene.bench.rng
    for p_fill, p_ar, prefetch in ((1.0, 1.0, 1), (0.4, 1.0, 0), (0.8, 0.3, 1)):
        statuses = []
        for delay in range(1, 70):
            transfer = await scene.start(0, prefetch=prefetch)
            ended, late = None, None
            for cycle in range(1, 400):
                seen = await scene.cycle(
                    cancel=transfer if cycle == delay else None,
                    idle_target=transfer,
                    fill_ready=int(rng.random() < p_fill),
                    ar_ready=int(rng.random() < p_ar),
                )
                if cycle == delay:
                    late = seen["cancel_late"]
                if seen["completion_valid"]:
                    ended = seen["completion"]
                    break
            assert ended is not None, f"no completion, cancel after {delay}"
            if late is not None:
                assert ended["status"] == (DONE if late else DRAINED)
                statuses.append(late)
            await scene.idle()
        if p_fill == p_ar == 1.0:
            assert statuses == [0] * statuses.count(0) + [1] * statuses.count(1), "late is late"
            assert 0 < statuses.count(1) < len(statuses)
    assert ref.count["cancel with the last beat"] >= 1, "no cancel met the last beat"
    print(f"cancel_sweep: {ref.count}")


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def promote_sweep(dut):
    """A promotion in every cycle of a prefetch's life, with a demand before and one after it."""
    scene = await scene_of(dut, ((510, 6), (0, 0), (0, 40)), ((0, 33),))
    for delay in range(1, 60):
        transfer = await scene.start(0, prefetch=1)
        first = await scene.start(1, prefetch=0) if delay % 3 == 0 else None
        for _ in range(delay):
            await scene.cycle()
        await scene.cycle(promote=transfer)
        second = await scene.start(1, prefetch=0)
        done = await scene.idle()
        assert all(c["status"] == DONE for c in done)
        wanted = {x for x in (transfer, first, second) if x is not None}
        assert {c["transfer"] for c in done} <= wanted and second in {c["transfer"] for c in done}
    assert scene.ref.count["promote with bursts left"] > 10
    print(f"promote_sweep: {scene.ref.count}")


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def retries(dut):
    """A load is read again as a whole retry_limit times, then it is an error; a cancel ends it."""
    config = config_of_test()
    scene = await scene_of(dut, ((510, 20), (7, 1)), ((0, 5),))
    ref = scene.ref
    for bad in range(config.retry_limit + 2):
        for prefetch in (0, 1):
            before = ref.count.get("retry", 0)
            await scene.start(0, prefetch=prefetch)
            scene.errors = 1.0 if bad else 0.0
            done = []
            while ref.loads:
                seen = await scene.cycle()
                assert ref.now < 100_000
                if ref.count.get("retry", 0) - before == bad:
                    scene.errors = 0.0
                done += [seen["completion"]["status"]] if seen["completion_valid"] else []
            assert done == [DONE if bad <= config.retry_limit else ERROR]
            assert ref.count.get("retry", 0) - before == min(bad, config.retry_limit)
    # A prefetch's retry waits for the prefetch that has bursts left; meanwhile a cancel drains it.
    for action in ("wait", "cancel", "promote"):
        scene.errors, scene.silent = 1.0, False
        first = await scene.start(1, prefetch=1)
        for _ in range(8):
            await scene.cycle()
        second = await scene.start(0, prefetch=1)
        for _ in range(12):
            await scene.cycle(hold=1)
        assert ref.loads[first].complete and not ref.loads[first].ended
        assert ref.loads[second].unissued
        await scene.cycle(
            hold=1,
            cancel=first if action == "cancel" else None,
            promote=first if action == "promote" else None,
        )
        scene.errors = 0.0
        done = {c["transfer"]: c["status"] for c in await scene.idle()}
        assert done == {first: DRAINED if action == "cancel" else DONE, second: DONE}, action


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def watchdog(dut):
    """Silence of the memory ends all loads; their IDs stay away, the others go on."""
    config = config_of_test()
    wait = config.watchdog_cycles
    scene = await scene_of(dut, ((510, 6), (0, 17)), ((0, 1),))
    ref, bench = scene.ref, scene.bench

    # Beats stay away: one cancelled, one prefetch, one demand, then late beats, then new loads.
    scene.silent = True
    one = await scene.start(1, prefetch=0)
    two = await scene.start(0, prefetch=1)
    three = await scene.start(1, prefetch=0)
    for _ in range(10):
        await scene.cycle()
    await scene.cycle(cancel=three)
    begun = ref.now
    done = await scene.idle(limit=wait + 50)
    assert ref.now - begun >= wait - 10 and ref.count["watchdog"] == 1
    assert {c["transfer"]: c["status"] for c in done} == dict.fromkeys((one, two, three), TIMEOUT)
    assert not ref.dead
    fresh = await scene.start(0, prefetch=0)
    assert fresh not in (one, two, three)
    scene.silent = False
    assert [c["status"] for c in await scene.idle()] == [DONE]
    while any(bench.memory.values()) or bench.r or ref.register:
        seen = await scene.cycle()
        assert not seen["fill_valid"], "a late beat was filled"
    for transfer in (one, two, three):
        late = await scene.cycle(cancel=transfer)
        assert late["cancel_late"]

    # A slow buffer is no silence.
    await scene.start(0, prefetch=0)
    for _ in range(10):
        await scene.cycle()
    for _ in range(2 * wait):
        await scene.cycle(fill_ready=0)
    assert [c["status"] for c in await scene.idle()] == [DONE]

    # The address channel is stuck: the address stays, later loads are refused.
    scene.settings = {"ar_ready": 0}
    stuck = await scene.start(0, prefetch=0)
    other = await scene.start(1, prefetch=1)
    done = await scene.idle(limit=wait + 50)
    assert {c["transfer"]: c["status"] for c in done} == {stuck: TIMEOUT, other: TIMEOUT}
    assert ref.dead
    for number in range(3 * config.transfers):
        seen = await scene.cycle()
        assert seen["ar_valid"] and seen["ar"]["id"] == stuck and not seen["prefetch_ready"]
        transfer = await scene.start(number % 2, prefetch=number % 3 == 0)
        assert (await scene.cycle(cancel=transfer))["cancel_late"]
        assert [c["status"] for c in await scene.idle()] == [ERROR]
    scene.settings = {}
    for _ in range(20):
        await scene.cycle()
    assert not scene.bench.seen["ar_valid"], "the address was taken at last"

    # After a reset all is well; then all transfers are lost at once, in use and refused as many.
    await bench.reset(ref.tables)
    scene = Scene(bench)
    ref = scene.ref
    scene.silent = True
    await scene.start(0, prefetch=1)
    while len(ref.loads) < config.transfers:
        await scene.start(1, prefetch=0)
    done = await scene.idle(limit=wait + 50)
    assert [c["status"] for c in done] == [TIMEOUT] * config.transfers and ref.dead
    for _ in range(2):
        scene.settings = {"completion_ready": 0}
        loads = [await scene.start(0, prefetch=0) for _ in range(config.transfers)]
        assert set(loads) == set(range(config.transfers))
        scene.settings = {}
        done = await scene.idle()
        assert [c["status"] for c in done] == [ERROR] * config.transfers
    scene.silent = False
    for _ in range(100):
        seen = await scene.cycle()
        assert not seen["fill_valid"]
    assert ref.count[f"status {ERROR}"] == 2 * config.transfers
    print(f"watchdog: {ref.count}")


@pytest.mark.parametrize("name", CONFIGS)
def test_random_traffic_agrees_with_the_contract(name):
    run_bench(
        DmaScheduler(CONFIGS[name]),
        "dma_scheduler",
        "test_dma_scheduler",
        testcase="random_loads",
        env={"CONFIG": name, "SEEDS": seeds(12)},
    )


@pytest.mark.parametrize(
    "scene", ["first_address", "cancel_sweep", "promote_sweep", "retries", "watchdog"]
)
def test_scene(scene):
    run_bench(
        DmaScheduler(CONFIGS["narrow"]),
        "dma_scheduler",
        "test_dma_scheduler",
        testcase=scene,
        env={"CONFIG": "narrow"},
    )


class FlatScheduler(wiring.Component):
    """The scheduler with its AXI port under the flat names that AxiRamRead looks for."""

    KEPT = ("start", "start_transfer", "completion", "fill", "segment_write", "bank")

    def __init__(self, config: EngineConfig):
        self._config = config
        self._scheduler = DmaScheduler(config)
        members = self._scheduler.signature.members
        super().__init__(
            {**{name: members[name] for name in self.KEPT}, **flat_axi4_read_ports(config)}
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.scheduler = scheduler = self._scheduler
        for name in self.KEPT:
            if name == "start_transfer":
                m.d.comb += self.start_transfer.eq(scheduler.start_transfer)
            elif name == "bank":
                m.d.comb += scheduler.bank.eq(self.bank)
            else:
                wiring.connect(m, getattr(scheduler, name), wiring.flipped(getattr(self, name)))
        connect_axi4_read(m, self._config, self, scheduler.axi)
        return m


class WatchedRam(AxiRamRead):
    """Remembers every byte that was read from it."""

    def __init__(self, *args, **kwargs):
        self.reads: list[tuple[int, int]] = []
        super().__init__(*args, **kwargs)

    async def _read(self, address, length):
        self.reads.append((address, length))
        return await super()._read(address, length)


RAM_BYTES = 1 << 16


def sweep_loads(config: EngineConfig, rng: random.Random) -> list[list[tuple[int, int]]]:
    """(address, beats) of the segments of each load: every offset round a page boundary with
    every length round a burst, 1 to 4 segments, in any order, never overlapping."""
    burst, beat = config.max_burst, config.beat_bytes
    page_beats = PAGE // beat
    offsets = [page_beats + d for d in (0, 1, 2, burst - 1, burst, -1, -2, 1 - burst, -burst)]
    offsets += [page_beats - burst - 1, page_beats + burst + 1, page_beats - 2 * burst - 1]
    lengths = [1, 2, burst - 1, burst, burst + 1, 2 * burst - 1, 2 * burst, 2 * burst + 1]
    cases = list(itertools.product(offsets, lengths))
    rng.shuffle(cases)
    loads = []
    while cases:
        count = min(len(cases), rng.randint(1, NUM_SEGMENTS))
        pages = rng.sample(range(RAM_BYTES // (2 * PAGE)), count)
        segments, left = [], config.expert_bytes // beat
        for page in pages:
            offset, beats = cases[-1]
            if beats > left:
                break
            cases.pop()
            left -= beats
            segments.append((2 * PAGE * page + offset * beat, beats))
        loads.append(segments)
    return loads


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def axi_ram(dut):
    """Loads from a third party's memory: the right bytes, in order, and no other byte read."""
    config = CONFIGS["narrow"]
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    rng = random.Random(int(os.environ["RAM_SEED"]))
    kept = ("start__valid", "segment_write__valid", "completion__ready", "fill__ready", "bank")
    for name in kept:
        getattr(dut, name).value = 0
    dut.rst.value = 1
    ram = WatchedRam(AxiReadBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, size=RAM_BYTES)
    image = rng.randbytes(RAM_BYTES)
    ram.write(0, image)
    for _ in range(3):
        await FallingEdge(dut.clk)
    dut.rst.value = 0

    def pauses(share):
        while True:
            yield rng.random() < share

    ram.ar_channel.set_pause_generator(pauses(0.3))
    ram.r_channel.set_pause_generator(pauses(0.2))
    row_shape, load_fields = segment_write_layout(config), Fields(load_layout(config))
    fill_fields = Fields(fill_layout(config))
    loads = sweep_loads(config, rng)
    for number, segments in enumerate(loads):
        # Segments fall on any of the four rows; expert 3 lies three strides after the base.
        layer = number % config.num_layers
        expert = number % config.num_experts
        rows = rng.sample(range(NUM_SEGMENTS), len(segments))
        table = dict(zip(sorted(rows), segments, strict=True))
        for row in range(NUM_SEGMENTS):
            address, beats = table.get(row, (0, 0))
            stride = min(address, PAGE) // (expert or 1) // config.beat_bytes * config.beat_bytes
            value = {"base": address - expert * stride, "stride": stride, "beats": beats}
            dut.segment_write__payload.value = pack(
                row_shape, {"layer": layer, "segment": row, "value": value}
            )
            dut.segment_write__valid.value = 1
            await FallingEdge(dut.clk)
        dut.segment_write__valid.value = 0
        dut.bank.value = 1 - number % 2
        dut.start__payload.value = load_fields.pack(
            prefetch=number % 2, layer=layer, expert=expert, slot=number % config.num_slots
        )
        await FallingEdge(dut.clk)
        dut.start__valid.value = 1
        dut.completion__ready.value = 1
        ram.reads.clear()
        wanted = [image[a : a + n * config.beat_bytes] for a, n in segments]
        got = bytearray()
        for _ in range(5000):
            fill_ready = int(rng.random() < 0.8)
            dut.fill__ready.value = fill_ready
            await ReadOnly()
            taken = int(dut.start__ready.value)
            ended = int(dut.completion__valid.value)
            if int(dut.fill__valid.value) and fill_ready:
                fill = fill_fields.unpack(int(dut.fill__payload.value))
                assert fill["slot"] == number % config.num_slots
                assert fill["offset"] * config.beat_bytes == len(got)
                got += fill["data"].to_bytes(config.beat_bytes, "little")
            if ended:
                status = int(dut.completion__payload.value) >> config.transfer_bits
            await FallingEdge(dut.clk)
            if taken:
                dut.start__valid.value = 0
            if ended:
                break
        else:
            raise AssertionError(f"load {number} did not end")
        assert status == DONE
        assert bytes(got) == b"".join(wanted), f"load {number}: wrong data of {segments}"
        # Guard: the bytes read are those of the segments, each once.
        read = sorted(itertools.chain(*(range(a, a + n) for a, n in ram.reads)))
        assert read == sorted(
            itertools.chain(*(range(a, a + n * config.beat_bytes) for a, n in segments))
        ), f"load {number}: other bytes than {segments} were read: {ram.reads}"
    print(f"axi_ram SEED={os.environ['RAM_SEED']}: {len(loads)} loads")


def test_axi_ram_of_cocotbext():
    scheduler = FlatScheduler(CONFIGS["narrow"])
    for seed in seeds(2):
        run_bench(
            scheduler,
            "dma_scheduler_flat",
            "test_dma_scheduler",
            testcase="axi_ram",
            seed=seed,
            env={"RAM_SEED": seed},
        )


def test_the_link_is_full():
    """64 experts of 4 KiB; and the meter shows it when the latency cannot be hidden."""
    near, far, too_far = bench_dma.measure([(1, 0), (100, 0), (2000, 0)])
    print(f"utilisation {near:.4f} at latency 1, {far:.4f} at 100, {too_far:.4f} at 2000")
    assert near >= 0.995
    assert far >= 0.95
    assert too_far < 0.5
