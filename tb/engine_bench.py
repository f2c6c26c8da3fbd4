# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""What the benches of the whole engine share: observed top, memory, monitors, scoreboard, traffic.

Memory and register master are cocotbext-axi's. Monitors record every handshake with its cycle;
:class:`stmoe_golden.checker.Checker` decides from them what the event port must say.
:class:`EngineBench` plays the accelerator and holds the engine to golden; what it sends, and when,
its subclasses decide: :class:`RandomTraffic` here, scenes in ``test_directed.py``.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from typing import Any

import cocotb
from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import Event, RisingEdge
from cocotbext.axi import (
    AxiLiteBus,
    AxiLiteMaster,
    AxiRamRead,
    AxiRamWrite,
    AxiReadBus,
    AxiWriteBus,
)

from simulation import Readers, pack, unpack
from stmoe.payloads import (
    event_layout,
    fill_layout,
    grant_layout,
    release_layout,
    route_layout,
    token_layout,
)
from stmoe.register_map import COUNTERS, registers
from stmoe.top import EngineTop
from stmoe_golden.checker import Checker, Kind, Record, Segment, Settings
from stmoe_golden.config import FRACTION_BITS, NUM_SEGMENTS, PAGE_BYTES, EngineConfig

WATCHED = (
    "s_axis_token",
    "s_axis_route",
    "m_axis_grant",
    "s_axis_release",
    "m_axis_fill",
    "m_axis_event",
    "m_axi_ar",
    "m_axi_r",
    "m_axi_buf_aw",
    "m_axi_buf_w",
    "m_axi_buf_b",
)
TOKEN, ROUTE, GRANT, RELEASE, FILL, EVENT, AR, R, AW, W, B = (1 << i for i in range(len(WATCHED)))


class ObservedTop(wiring.Component):
    """:class:`EngineTop`, and for speed more outputs, one bit for each stream of WATCHED.

    ``took``: a handshake in this cycle. ``waits``: offered and not taken. ``unstable``: the engine
    withdrew or changed what it had offered in the cycle before.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.top = EngineTop(config)
        count = len(WATCHED)
        more = dict.fromkeys(("took", "waits", "unstable"), Out(count))
        super().__init__({**dict(self.top.signature.members), **more})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.top = top = self.top
        for name, member in top.signature.members.items():
            ours, theirs = getattr(self, name), getattr(top, name)
            m.d.comb += theirs.eq(ours) if member.flow == In else ours.eq(theirs)
        for i, prefix in enumerate(WATCHED):
            separator = "" if prefix.startswith("m_axi_") else "_t"
            names = [n for n in top.signature.members if n.startswith(prefix + separator)]
            if not names:
                continue  # fills go to banks, or to a buffer behind AXI
            valid = getattr(top, f"{prefix}{separator}valid")
            ready = getattr(top, f"{prefix}{separator}ready")
            m.d.comb += [self.took[i].eq(valid & ready), self.waits[i].eq(valid & ~ready)]
            if prefix.startswith("m_") and prefix not in ("m_axi_r", "m_axi_buf_b"):
                payload = Cat(getattr(top, n) for n in names if not n.endswith(("valid", "ready")))
                offered = Signal(name=f"{prefix}_offered")
                last = Signal(len(payload), name=f"{prefix}_last")
                m.d.sync += [offered.eq(valid & ~ready), last.eq(payload)]
                m.d.comb += self.unstable[i].eq(offered & (~valid | (payload != last)))
        return m


GUARD = None
"""In a slot's word that the load has not written."""

SLVERR = 2

EVERYTHING = 15
"""CONTROL: prefetching, learning, ordered, adaptive."""


def content(address: int, width: int) -> int:
    """The beat at an address, of ``width`` bits; every address bit matters."""
    value = (address + 1) * 0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835
    return (value ^ value >> 61) & ((1 << width) - 1)


class Tier(AxiRamRead):
    """Memory whose content follows from the address; it may fail or stay silent."""

    def __init__(self, bus, clock, reset, config: EngineConfig) -> None:
        super().__init__(bus, clock, reset, size=1 << config.axi_addr_width)
        self.data_width = config.axi_data_width
        self.ar_channel.queue_occupancy_limit = 64
        self.fails = lambda address: False
        self.silent = False

    async def _read(self, address: int, length: int) -> bytes:
        if self.silent:
            await Event().wait()
        if self.fails(address):
            raise OSError(f"no data at {address:#x}")
        return content(address, self.data_width).to_bytes(length, "little")


class Store(AxiRamWrite):
    """The expert buffer behind AXI: hands every beat that is written on; a write may fail."""

    def __init__(self, bus, clock, reset) -> None:
        super().__init__(bus, clock, reset, size=4096)
        for channel in (self.aw_channel, self.w_channel, self.b_channel):
            channel.queue_occupancy_limit = 64
        self.fails = lambda address: False
        self.silent = False
        self.write_beat = lambda address, data: None

    async def _write(self, address: int, data: bytes) -> None:
        if self.silent:
            await Event().wait()
        if self.fails(address):
            raise OSError(f"no memory at {address:#x}")
        self.write_beat(address, int.from_bytes(data, "little"))


def pauses(rng: random.Random) -> Iterator[bool]:
    """A pause generator: none, some, many or in stretches; never longer than 64 cycles."""
    share, stretch = rng.choice(((0, 1), (0.2, 1), (0.5, 1), (0.8, 1), (0.3, 16)))
    length = 0
    while True:
        pause = rng.random() < share and length < 48
        for _ in range(stretch):
            length = length + 1 if pause else 0
            yield pause


class Sink:
    """``tready`` of a stream, changed at random."""

    def __init__(self, signal) -> None:
        self.signal = signal
        self.pauses: Iterator[bool] = iter(())
        self.now = 1
        signal.value = 1

    def step(self) -> None:
        ready = not next(self.pauses, False)
        if ready != self.now:
            self.now = ready
            self.signal.value = ready


class EngineBench:
    """Accelerator, memory, register master, monitors and scoreboard round an :class:`ObservedTop`.

    A subclass offers tokens and routes with :meth:`offer_token` and :meth:`offer_route`, says with
    :meth:`took_grant` when a grant is released, and is called in every cycle (:meth:`drive`).

    Attributes
    ----------
    cycle : int
        Cycles since reset, as the event port counts them.
    log : dict of lists
        What :class:`Checker` wants of the monitors, and the records of the event port.
    segments : list [L] of list of :class:`Segment`
        Those of the last commit; ``sets`` are those of every commit, ``shadow_segments`` what was
        written last.
    due : list of (cycle, slot)
        Grants to be released.
    held : Tally
        Grants of each slot that have not been released.
    """

    MEMORY: type[Tier] = Tier

    def __init__(self, dut, config: EngineConfig) -> None:
        self.dut, self.config = dut, config
        self.beats = config.slot_beats
        self.map = {r.name: r for r in registers(config)}
        self.layouts = {
            "token": token_layout(config),
            "route": route_layout(config),
            "release": release_layout(config),
            "grant": grant_layout(config),
            "fill": fill_layout(config),
            "event": event_layout(config),
        }
        dut.rst.value = 1
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
        self.master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        self.ram = self.MEMORY(AxiReadBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, config)
        w, r = self.master.write_if, self.master.read_if
        self.axil_channels = (w.aw_channel, w.w_channel, w.b_channel, r.ar_channel, r.r_channel)
        self.behind_axi = config.buffer == "axi"
        self.memory_channels = [self.ram.ar_channel, self.ram.r_channel]
        if self.behind_axi:
            self.store = Store(AxiWriteBus.from_prefix(dut, "m_axi_buf"), dut.clk, dut.rst)
            self.store.write_beat = self._written
            store = self.store
            self.memory_channels += [store.aw_channel, store.w_channel, store.b_channel]
        streams = ("grant", "event") if self.behind_axi else ("grant", "fill", "event")
        self.sinks = {name: Sink(getattr(dut, f"m_axis_{name}_tready")) for name in streams}
        # Stepped with all else: a coroutine for each channel takes longer than the model.
        self.stalls: dict[Any, Iterator[bool]] = {}
        self.edge = RisingEdge(dut.clk)
        self.offers = {
            name: (getattr(dut, f"s_axis_{name}_tdata"), getattr(dut, f"s_axis_{name}_tvalid"))
            for name in ("token", "route", "release")
        }
        self.now = Readers(dut)
        self.running = False
        cocotb.start_soon(self._each_cycle())

    async def reset(self, seed: int, *, stalls: bool = True) -> None:
        """A new run, everything as after power-up; with ``stalls`` every stream has pauses."""
        dut, self.rng = self.dut, random.Random(seed)
        rng = self.rng
        dut._log.warning("seed %d", seed)
        self.running = False
        dut.rst.value = 1
        for _, valid in self.offers.values():
            valid.value = 0
        self.cycle = self.quiet = 0
        self.offered: dict[str, Any] = {}
        self.driven = dict.fromkeys(("token", "route", "release"), False)
        self.expected_layer, self.token_taken = 0, False
        self.held: Tally[int] = Tally()
        self.due: list[tuple[int, int]] = []
        self.buffer = [[GUARD] * self.beats for _ in range(self.config.num_slots)]
        self.log: dict[str, list] = {
            name: []
            for name in (
                "tokens",
                "routes",
                "grants",
                "releases",
                "addresses",
                "last_beats",
                "fills",
                "events",
                "write_addresses",
                "write_answers",
            )
        }
        self.waits = 0
        self.event_waits = 0
        self.taken: Tally[str] = Tally()
        self.foreign_tokens: set[int] = set()
        self.worst: Tally[int] = Tally()
        self.fill_beats = 0
        self.segments: list[list[Segment]] = []
        self.sets: list[list[list[Segment]]] = []
        self.shadow_segments: list[list[Segment]] = [[] for _ in range(self.config.num_layers)]
        self.last_beats: set[tuple[int, int]] = set()
        self.settings = [
            Settings(
                self.config.threshold << FRACTION_BITS, [self.config.quota] * self.config.num_layers
            )
        ]
        self.bad_writes: list[str] = []
        self.places = [(0, self.config.least_stride)]
        for memory in (self.ram, self.store) if self.behind_axi else (self.ram,):
            memory.fails = lambda address: False
            memory.silent = False
        self.stalls.clear()
        for channel in (*self.axil_channels, *self.memory_channels):
            channel.pause = False
            if stalls:
                self.stalls[channel] = pauses(random.Random(rng.random()))
        for sink in self.sinks.values():
            sink.pauses = pauses(random.Random(rng.random())) if stalls else iter(())
        for _ in range(4):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        self.running = True

    async def cycles(self, count: int) -> None:
        for _ in range(count):
            await self.edge

    def let_flow(self, *channels: Any) -> None:
        """No pauses any more on these channels of the buses."""
        for channel in channels:
            self.stalls.pop(channel, None)
            channel.pause = False

    # What a subclass decides -------------------------------------------------------------------

    def drive(self) -> None:
        """Called in every cycle after the monitors."""

    def took_grant(self, slot: int) -> None:
        """A grant without error was taken: say in ``due`` when it is released."""
        self.due.append((self.cycle, slot))

    def took_route(self, route: dict[str, Any], legal: bool) -> None:
        """A route was taken by the engine."""

    # Monitors ----------------------------------------------------------------------------------

    async def _each_cycle(self) -> None:
        """All monitors and all stream drivers, in one coroutine for speed."""
        edge = self.edge
        rst, took_now, waits_now, unstable_now = (
            self.now[name] for name in ("rst", "took", "waits", "unstable")
        )
        while True:
            await edge
            if not self.running or self.cycle == 0 and rst():
                continue
            took, unstable = took_now(), unstable_now()
            assert not unstable, (
                f"cycle {self.cycle}: an offer was withdrawn or changed on "
                f"{[p for i, p in enumerate(WATCHED) if unstable >> i & 1]}"
            )
            assert not self.bad_writes, self.bad_writes
            if took:
                self._monitor(took)
            self.waits = waits_now()
            self.event_waits += self.waits & EVENT > 0
            for channel, stalls in self.stalls.items():
                if (pause := next(stalls)) != channel.pause:
                    channel.pause = pause
            self._drive()
            self.quiet = self.quiet + 1 if not took else 0
            self.cycle += 1

    def _payload(self, name: str) -> dict[str, Any]:
        return unpack(self.layouts[name], self.now[f"m_axis_{name}_tdata"]())

    def _monitor(self, took: int) -> None:
        now, cycle, log = self.now, self.cycle, self.log
        if took & FILL:
            fill = self._payload("fill")
            self._filled(fill["slot"], fill["offset"], fill["data"])
            if (fill["offset"], fill["data"]) in self.last_beats:
                log["fills"].append((cycle, fill["slot"]))
        self.fill_beats += took & (FILL | W) > 0
        if took & AW:
            names = ("awid", "awaddr", "awlen", "awsize", "awburst")
            index, address, length, size, kind = (now[f"m_axi_buf_{name}"]() for name in names)
            assert (1 << size, kind) == (self.config.beat_bytes, 1)
            log["write_addresses"].append((cycle, index, address, length + 1))
        if took & B:
            log["write_answers"].append((cycle, now["m_axi_buf_bid"](), now["m_axi_buf_bresp"]()))
        if took & EVENT:
            log["events"].append(Record(**self._payload("event"), delivered=cycle))
        if took & AR:
            index, address, length = (now[f"m_axi_ar{name}"]() for name in ("id", "addr", "len"))
            log["addresses"].append((cycle, index, address, length + 1))
        if took & R:
            index, resp = now["m_axi_rid"](), now["m_axi_rresp"]()
            self.worst[index] = max(self.worst[index], resp)
            if now["m_axi_rlast"]():
                log["last_beats"].append((cycle, index, self.worst.pop(index)))
        if took & GRANT:
            grant = self._payload("grant")
            assert grant["context"] == 0
            log["grants"].append(
                (cycle, grant["layer"], grant["expert"], grant["slot"], grant["error"])
            )
            if not grant["error"]:
                slot = grant["slot"]
                self._check_content(grant["layer"], grant["expert"], slot)
                self.held[slot] += 1
                self.took_grant(slot)
        if took & RELEASE:
            slot = self.offered.pop("release")
            log["releases"].append((cycle, slot))
        if took & TOKEN:
            token = self.offered.pop("token")
            new_sequence = token["new_sequence"]
            if token["context"]:
                # The checker knows of no contexts: a flag that no TOKEN record can have.
                new_sequence = 2
                self.foreign_tokens.add(cycle)
            else:
                self.expected_layer, self.token_taken = 0, True
            log["tokens"].append((cycle, new_sequence, token["token_id"]))
        if took & ROUTE:
            route, legal = self.offered.pop("route")
            experts = route["experts"]
            if legal:
                self.taken["route"] += 1
                self.expected_layer = (route["layer"] + 1) % self.config.num_layers
                self.token_taken = self.expected_layer != 0
            elif route["context"]:
                # As above: surely illegal.
                experts = [self.config.num_experts] * self.config.top_k
            log["routes"].append((cycle, route["layer"], experts))
            self.took_route(route, legal)

    def _filled(self, slot: int, offset: int, data: int) -> None:
        """A beat was put into the buffer."""
        where = f"cycle {self.cycle}: slot {slot}, beat {offset}"
        assert slot < self.config.num_slots and offset < self.beats, where
        assert not self.held[slot], f"{where} is filled while in use"
        if offset == 0:
            self.buffer[slot] = [GUARD] * self.beats
        self.buffer[slot][offset] = data

    def _written(self, address: int, data: int) -> None:
        """A beat was written over AXI. No two places that slots have had overlap.

        What is wrong is kept for the next cycle: the memory takes an exception for a failed write.
        """
        for base, stride in self.places:
            slot, within = divmod(address - base, stride)
            if 0 <= slot < self.config.num_slots:
                try:
                    self._filled(slot, within // self.config.beat_bytes, data)
                except AssertionError as error:
                    self.bad_writes.append(str(error))
                return
        self.bad_writes.append(f"cycle {self.cycle}: a write to {address:#x}, outside the buffer")

    def _check_content(self, layer: int, expert: int, slot: int) -> None:
        """The slot holds the expert's bytes, all as the segments of one commit have them (the
        checker says which), and nothing beyond them was written."""

        def wanted(segments: list[Segment]) -> list[int | None]:
            beats: list[int | None] = [
                content(s.base + expert * s.stride + i * self.config.beat_bytes, width)
                for s in segments
                for i in range(s.beats)
            ]
            return beats + [GUARD] * (self.beats - len(beats))

        width = self.ram.data_width
        assert any(self.buffer[slot] == wanted(old[layer]) for old in reversed(self.sets)), (
            f"cycle {self.cycle}: slot {slot} does not hold expert {expert} of layer {layer}"
        )

    # Drivers -----------------------------------------------------------------------------------

    def _offer(self, name: str, fields: dict[str, Any], what: object = None) -> None:
        self.offered[name] = fields if what is None else what
        data, valid = self.offers[name]
        data.value = pack(self.layouts[name], fields)
        valid.value = 1
        self.driven[name] = True

    def offer_token(self, *, new_sequence: bool = False, context: int = 0) -> None:
        """From this cycle on, until it is taken."""
        token_id = self.rng.getrandbits(32)
        self._offer(
            "token",
            {"context": context, "token_id": token_id, "new_sequence": int(new_sequence)},
        )

    def offer_route(self, layer: int, experts: Sequence[int], context: int = 0, legal=True) -> None:
        """From this cycle on, until it is taken."""
        route = {"context": context, "layer": layer, "experts": list(experts)}
        self._offer("route", route, (route, legal))

    def _drive(self) -> None:
        for sink in self.sinks.values():
            sink.step()
        for name, driven in self.driven.items():
            if driven and name not in self.offered:
                self.offers[name][1].value = 0
                self.driven[name] = False
        if "release" not in self.offered:
            slot = self.next_release()
            if slot is not None:
                self._offer("release", {"slot": slot}, slot)
        self.drive()

    def next_release(self) -> int | None:
        """The slot that is released next, if any grant of it is due."""
        ready = [item for item in self.due if item[0] <= self.cycle]
        if not ready:
            return None
        item = self.rng.choice(ready)
        self.due.remove(item)
        self.held[item[1]] -= 1
        return item[1]

    # Registers ---------------------------------------------------------------------------------

    async def put(self, register: str, *index_value: int) -> int:
        """Write a register; the response."""
        *index, value = index_value
        data = (value & 0xFFFF_FFFF).to_bytes(4, "little")
        return int((await self.master.write(self.map[register].at(*index), data)).resp)

    async def get(self, register: str, *index: int) -> int:
        return await self.master.read_dword(self.map[register].at(*index))

    def random_segments(self) -> list[Segment]:
        """A layer in up to 4 parts, anywhere, also across 4 KiB; none has more beats than fit."""
        rng, beats, config = self.rng, self.beats, self.config
        total = rng.choice((beats, rng.randint(1, beats), rng.randint(1, beats)))
        cuts = sorted(rng.randint(0, total) for _ in range(NUM_SEGMENTS - 1))
        segments = []
        for a, b in zip([0, *cuts], [*cuts, total], strict=True):
            stride = max(1, b - a + rng.choice((0, 0, 1, 100))) * config.beat_bytes
            base = rng.getrandbits(config.axi_addr_width - 18) << 17
            base += (4096 - rng.randint(0, 2 * beats) * config.beat_bytes) % 8192
            segments.append(Segment(base, stride, b - a))
        return segments

    async def write_segments(self, layer: int, segments: list[Segment]) -> None:
        """Write the shadow registers of one layer; parts that are not given are unused."""
        for part in range(NUM_SEGMENTS):
            segment = segments[part] if part < len(segments) else Segment(0, 0, 0)
            words = [
                ("SEGMENT_BASE_LOW", segment.base),
                ("SEGMENT_BASE_HIGH", segment.base >> 32),
                ("SEGMENT_STRIDE", segment.stride),
                ("SEGMENT_BEATS", segment.beats),
            ]
            self.rng.shuffle(words)
            for name, value in words:
                assert await self.put(name, layer, part, value) == 0
        self.shadow_segments[layer] = list(segments)

    def note_segments(self, segments: list[list[Segment]]) -> None:
        """These are going to be active. Content follows from the address, so a beat tells whether
        it is its expert's last one."""
        self.segments = segments
        self.sets.append(segments)
        for parts in segments:
            used = [s for s in parts if s.beats]
            for expert in range(self.config.num_experts):
                end = used[-1].base + expert * used[-1].stride
                end += (used[-1].beats - 1) * self.config.beat_bytes
                beat = content(end, self.config.axi_data_width)
                self.last_beats.add((sum(s.beats for s in used) - 1, beat))

    async def program_segments(self, segments: list[list[Segment]] | None = None) -> None:
        """Write and commit those of every layer, any where none are given, the rest as it is.
        Before the first token."""
        segments = segments or [self.random_segments() for _ in range(self.config.num_layers)]
        for layer, parts in enumerate(segments):
            await self.write_segments(layer, parts)
        self.settings.append(dataclasses.replace(self.settings[-1], segments=segments))
        assert self.settings[-1].refusal(self.config) is None
        self.note_segments(segments)
        await self.put("COMMIT", 1)
        while await self.get("STATUS") & 1:
            pass

    async def commit(
        self,
        control: int = EVERYTHING,
        threshold: int | None = None,
        quota: list[int] | None = None,
        *,
        predictors: int | None = None,
        segments: list[list[Segment]] | None = None,
        place: tuple[int, int] | None = None,
        farther: tuple[int, ...] | None = None,
        wait: bool = True,
    ) -> bool:
        """Write all shadow registers and commit; a set that breaks a rule must be refused.

        ``threshold`` and ``farther`` (those of layers two and more ahead) in quarter units; what is
        not given is as after reset, but segments and ``place`` (base and stride of the slots, where
        the buffer is behind AXI) are those of the last commit. ``wait`` for the answer, which comes
        when the set is active. Returns whether it was legal.
        """
        config = self.config
        if threshold is None:
            threshold = config.threshold << FRACTION_BITS
        if quota is None:
            quota = [config.quota] * config.num_layers
        if predictors is None:
            predictors = self.map["PREDICTORS"].reset
        writes: list[tuple[Any, ...]] = [("CONTROL", control), ("THRESHOLD", threshold)]
        writes.append(("PREDICTORS", predictors))
        writes += [("QUOTA", layer, value) for layer, value in enumerate(quota)]
        if farther is None:
            farther = config.floors[1 : config.look]
        writes += [(f"THRESHOLD_{2 + n}", value) for n, value in enumerate(farther)]
        base, stride = place or self.places[-1]
        if self.behind_axi:
            writes += [("BUFFER_BASE_LOW", base), ("BUFFER_BASE_HIGH", base >> 32)]
            writes += [("SLOT_STRIDE", stride)]
        self.rng.shuffle(writes)
        for write in writes:
            await self.put(*write)
        segments = segments or self.segments or None
        for layer, parts in enumerate(segments or []):
            if parts != self.shadow_segments[layer]:
                await self.write_segments(layer, parts)
        bits = (bool(control >> bit & 1) for bit in range(4))
        settings = Settings(
            threshold, list(quota), *bits, predictors, segments, base, stride, farther
        )
        legal = settings.refusal(config) is None
        if legal:
            self.settings.append(settings)
            self.taken["relocation"] += (base, stride) != self.places[-1]
            if place:
                self.places.append(place)
            if segments is not None and segments != self.segments:
                self.note_segments(segments)
        self.taken["legal commit" if legal else "refused commit"] += 1
        await self.put("COMMIT", 1)
        if wait:
            status = await self.get("STATUS")
            assert status >> 1 & 1 == (not legal)
            if not legal:
                await self.put("STATUS", 2)
        return legal

    # End ---------------------------------------------------------------------------------------

    def owes(self) -> bool:
        """There is something left to be sent or released."""
        return bool(self.due or "route" in self.offered or "token" in self.offered)

    async def drain(self, patience: int = 30_000, quiet: int = 400) -> None:
        """Until all events are taken, granted and released, and no stream has moved for long."""
        last, since = None, self.cycle
        while True:
            await self.cycles(50)
            if not self.owes() and self.quiet > quiet:
                return
            progress = (len(self.log["events"]), self.taken["route"])
            if progress != last:
                last, since = progress, self.cycle
            assert self.cycle - since < patience, f"cycle {self.cycle}: no progress since {since}"

    def check(self, kind: type[Checker] = Checker) -> Any:
        """Every record is what the golden model says; the checker (of class ``kind``)."""
        log = dict(self.log)
        events = log.pop("events")
        if self.behind_axi:
            del log["fills"]
        checker = kind(
            self.config,
            segments=[[] for _ in range(self.config.num_layers)],
            settings=self.settings,
            **log,
            counters=[counter.name for counter in COUNTERS],
        )
        checker.run(events)
        checker.counters["discarded_beats"] = checker.counters["beats"] - self.fill_beats
        dropped = {r.cycle for r in events if r.kind == Kind.ILLEGAL and r.flag == 2}
        assert dropped == self.foreign_tokens, "tokens dropped"
        return checker

    def check_nothing_lost(self, checker: Checker) -> None:
        """At rest: every route has all its grants, every slot is free or holds an expert."""
        routed = self.config.top_k * self.taken["route"]
        assert len(self.log["grants"]) == routed
        assert checker.counters["releases"] == checker.counters["grants"]
        resident = sorted(int(s) for s in checker.buffer.slot[checker.buffer.slot >= 0])
        assert sorted([*checker.free, *resident]) == list(range(self.config.num_slots))
        assert not any(checker.pins) and not checker.quarantined

    async def check_tables(self, checker: Checker) -> None:
        """Every weight, read over AXI4-Lite, is golden's."""
        state = checker.predictor.state
        tables = [state.bias[:, None], state.temporal, *state.spatial]
        for number, table in enumerate(tables):
            for layer, rows in enumerate(table):
                for expert, row in enumerate(rows):
                    await self.put("TABLE_INDEX", number << 24 | layer << 16 | expert << 8)
                    got = [await self.get("TABLE_VALUE") for _ in row]
                    assert got == [int(w) & 0xFFFF_FFFF for w in row], (number, layer, expert)
        assert any(table.any() for table in tables)

    async def check_counters(self, checker: Checker) -> None:
        """Read over AXI4-Lite; and the interrupt's causes."""
        got = {}
        for i, counter in enumerate(COUNTERS):
            got[counter.name] = await self.get("COUNTER", i)
        wanted = {counter.name: checker.counters[counter.name] for counter in COUNTERS}
        assert got == wanted
        status = await self.get("IRQ_STATUS")
        causes = ("errors", "timeouts", "illegal", None, None)
        expected = sum((got[c] > 0) << i for i, c in enumerate(causes) if c)
        expected |= (self.taken["refused commit"] > 0) << 4
        assert status == expected
        for enable in (0, status, 31 & ~status):
            await self.put("IRQ_ENABLE", enable)
            await self.cycles(2)
            assert self.dut.irq.value == bool(status & enable)


class RandomTraffic(EngineBench):
    """Legal and illegal events at random: set ``routes_left``, then :meth:`drain`.

    Attributes
    ----------
    routes_left : int
        Routes still to be offered, illegal ones included.
    illegal : float
        Share of illegal routes; half as many tokens, and now and then releases nobody owes.
    event_rate : float
        Chance in each cycle that a token or route is offered where there is none.
    sequences : float
        Share of tokens that begin a new sequence.
    interrupts : float
        Share of those that may come in the middle of a token.
    delays : (int, int)
        Cycles from a grant to its release.
    """

    async def reset(self, seed: int, *, stalls: bool = True) -> None:
        self.routes_left = 0
        self.held_back = False
        self.previous: dict[int, list[int]] = {}
        self.rogues: list[int] = []  # releases that nobody owes
        self.rogue_wanted: bool | str = False
        draw = random.Random(f"traffic {seed}")
        self.delays = draw.choice(((0, 5), (0, 60), (20, 300)))
        self.illegal = draw.choice((0, 0.1, 0.3))
        self.event_rate = draw.choice((0.02, 0.2, 1))
        self.sequences, self.interrupts = 0.1, 0.05
        await super().reset(seed, stalls=stalls)

    def took_grant(self, slot: int) -> None:
        self.due.append((self.cycle + self.rng.randint(*self.delays), slot))

    def took_route(self, route: dict[str, Any], legal: bool) -> None:
        if legal:
            self.previous[route["layer"]] = route["experts"]
        self.rogue_wanted |= self.illegal > 0 and self.rng.random() < 0.1

    def owes(self) -> bool:
        return self.routes_left > 0 or bool(self.due or "route" in self.offered)

    def next_release(self) -> int | None:
        return self.rogues.pop() if self.rogues else super().next_release()

    def drive(self) -> None:
        rng, offered = self.rng, self.offered
        if self.held_back or not self.routes_left and "route" not in offered:
            return
        if "token" not in offered and rng.random() < self.event_rate:
            foreign = rng.random() < self.illegal / 2
            sequence = rng.random() < self.sequences
            # In the middle of a token only now and then; a foreign token may always come.
            interrupt = sequence and rng.random() < self.interrupts
            if not self.token_taken or foreign or interrupt:
                self.offer_token(new_sequence=sequence, context=int(foreign))
        if self.rogue_wanted:
            if "route" not in offered:
                self._go_rogue()
        elif self.routes_left and "route" not in offered and rng.random() < self.event_rate:
            self._offer_any_route()

    def _go_rogue(self) -> None:
        """Release what is not held, at a time at which it cannot hit a grant on its way."""
        if len(self.log["grants"]) < self.config.top_k * self.taken["route"]:
            return
        if self.rogue_wanted != "sent":
            self.rogue_wanted = "sent"
            slots = [s for s in range(1 << self.config.slot_bits) if not self.held[s]]
            for slot in self.rng.sample(slots, min(len(slots), 3)):
                self.rogues += [slot] * self.rng.choice((1, 2))
        elif not self.rogues and "release" not in self.offered:
            self.rogue_wanted = False

    def _offer_any_route(self) -> None:
        rng, layer, config = self.rng, self.expected_layer, self.config
        everyone = range(config.num_experts)
        experts = rng.sample(everyone, config.top_k)
        if layer in self.previous and rng.random() < 0.7:
            experts = list(self.previous[layer])
            if rng.random() < 0.5:
                other = rng.choice(everyone)
                if other not in experts:
                    experts[rng.randrange(config.top_k)] = other
        context, legal = 0, rng.random() >= self.illegal
        if not legal:
            kind = rng.choice(("expert", "duplicate", "layer", "context"))
            rank = rng.randrange(config.top_k)
            if kind == "duplicate" and config.top_k == 1:
                kind = "expert"
            if kind == "expert":
                experts[rank] = rng.randrange(config.num_experts, 1 << config.expert_bits)
            elif kind == "duplicate":
                experts[rank] = experts[rank - 1]
            elif kind == "layer":
                layer = rng.choice([x for x in range(1 << config.layer_bits) if x != layer])
            else:
                context = 1
        self.routes_left -= 1
        self.offer_route(layer, experts, context, legal)

    async def commits(self) -> None:
        """Commits at random times while routes are left."""
        rng, config = self.rng, self.config
        limit = 1 << (config.score_bits - 1)
        while self.routes_left:
            await self.cycles(rng.randrange(600))
            quota = [0] * config.num_layers
            spare = config.num_slots - config.top_k
            for _ in range(rng.randint(0, spare)):
                quota[rng.randrange(config.num_layers)] += 1
            threshold = rng.choice((-400, -40, 0, 40, 400, rng.randrange(-limit, limit)))
            fault = rng.randrange(8)
            if fault == 0:
                quota[rng.randrange(config.num_layers)] += spare + 1
            elif fault == 1:
                threshold = rng.choice((-limit - 1, limit, 1 << 30))
            farther = tuple(
                rng.choice((-400, -40, 0, 40, rng.randrange(-limit, limit)))
                for _ in range(1, config.look)
            )
            if fault == 5 and farther:
                farther = (*farther[:-1], rng.choice((-limit - 1, limit, 1 << 30)))
            control = EVERYTHING if rng.random() < 0.5 else rng.randrange(16)
            kinds = self.map["PREDICTORS"].reset
            predictors = kinds if rng.random() < 0.5 else rng.randint(0, kinds)
            segments = self.other_segments(broken=fault == 2) if rng.random() < 0.4 else None
            place = None
            if self.behind_axi and rng.random() < 0.5:
                # Each in a part of the address space of its own.
                pages = config.slot_pages + rng.choice((0, 0, 1, 7))
                part = len(self.places) * config.num_slots * (config.slot_pages + 8)
                place = ((part + rng.randrange(8)) * PAGE_BYTES, pages * PAGE_BYTES)
                if fault == 3:
                    place = (place[0], (config.slot_pages - 1) * PAGE_BYTES)
                elif fault == 4:
                    place = ((1 << config.axi_addr_width) - 2 * PAGE_BYTES, place[1])
            await self.commit(
                control,
                threshold,
                quota,
                predictors=predictors,
                segments=segments,
                place=place,
                farther=farther,
            )

    def other_segments(self, *, broken: bool = False) -> list[list[Segment]]:
        """Those of the last commit with one or two layers moved, grown or shrunk; ``broken``: and
        one rule broken by one number."""
        rng, config = self.rng, self.config
        segments = list(self.segments)
        for _ in range(rng.randint(1, 2)):
            segments[rng.randrange(config.num_layers)] = self.random_segments()
        if broken:
            layer = rng.randrange(config.num_layers)
            parts = list(segments[layer])
            number = rng.randrange(len(parts))
            part = parts[number]
            left = self.beats - sum(s.beats for s in parts)
            fault = rng.choice(("base", "reach", "stride", "beats", "none"))
            if fault == "base":
                part = dataclasses.replace(part, base=part.base + rng.choice((1, 2)))
            elif fault == "reach" and config.axi_addr_width < 64:
                part = dataclasses.replace(part, base=part.base | 1 << config.axi_addr_width)
            elif fault == "stride":
                part = dataclasses.replace(part, stride=part.stride + 1)
            else:
                part = dataclasses.replace(part, beats=part.beats + left + rng.choice((1, 1 << 20)))
            parts[number] = part
            segments[layer] = [Segment(0, 0, 0)] if fault == "none" else parts
        return segments
