# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The whole engine under random and illegal traffic, every event held to the golden model.

Memory and register master are cocotbext-axi's. Monitors in this bench record every handshake with
its cycle; :class:`stmoe_golden.checker.Checker` decides from them what the event port must say.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter as Tally
from pathlib import Path

import cocotb
import pytest
from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import Event, RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster, AxiRamRead, AxiReadBus

from simulation import pack, run_bench, seeds, unpack
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
from stmoe_golden.config import FRACTION_BITS, NUM_SEGMENTS, EngineConfig, preset

CONFIGS = {
    "tiny": preset("tiny").replace(
        expert_bytes=256, event_depth=64, watchdog_cycles=1024, gate_window=4, gate_patience=16
    ),
    # As few slots as there may be: what one event needs.
    "least_slots": EngineConfig(
        num_layers=3, num_experts=5, quota=0, staging=2, expert_bytes=128, max_burst=4
    ),
    # No lookahead, so nothing is ever prefetched; and as few loads in flight as there may be.
    "one_layer": EngineConfig(
        num_layers=1, num_experts=4, num_transfers=2, expert_bytes=128, max_burst=8
    ),
    # Every expert in every event.
    "all_experts": EngineConfig(
        num_layers=2, num_experts=3, top_k=3, quota=1, staging=4, expert_bytes=128
    ),
    "wide": EngineConfig(
        axi_data_width=128,
        max_burst=16,
        expert_bytes=512,
        quota=1,
        staging=6,
        admission_bonus=0,
        adaptive=False,
        gate_window=8,
        gate_levels=3,
        gate_step=100,
    ),  # fmt: skip
}

WATCHED = (
    "s_axis_token",
    "s_axis_route",
    "m_axis_grant",
    "s_axis_release",
    "m_axis_fill",
    "m_axis_event",
    "m_axi_ar",
    "m_axi_r",
)
TOKEN, ROUTE, GRANT, RELEASE, FILL, EVENT, AR, R = (1 << i for i in range(len(WATCHED)))


class ObservedTop(wiring.Component):
    """:class:`EngineTop`, and for speed more outputs, one bit for each stream of WATCHED.

    ``took``: a handshake in this cycle. ``waits``: offered and not taken. ``unstable``: the engine
    withdrew or changed what it had offered in the cycle before.
    """

    def __init__(self, config: EngineConfig) -> None:
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
            separator = "" if prefix in ("m_axi_ar", "m_axi_r") else "_t"
            names = [n for n in top.signature.members if n.startswith(prefix + separator)]
            valid = getattr(top, f"{prefix}{separator}valid")
            ready = getattr(top, f"{prefix}{separator}ready")
            m.d.comb += [self.took[i].eq(valid & ready), self.waits[i].eq(valid & ~ready)]
            if prefix.startswith("m_") and prefix != "m_axi_r":
                payload = Cat(getattr(top, n) for n in names if not n.endswith(("valid", "ready")))
                offered = Signal(name=f"{prefix}_offered")
                last = Signal(len(payload), name=f"{prefix}_last")
                m.d.sync += [offered.eq(valid & ~ready), last.eq(payload)]
                m.d.comb += self.unstable[i].eq(offered & (~valid | (payload != last)))
        return m


# pytest ---------------------------------------------------------------------------------------


def run(name: str, testcase: str, count: int) -> None:
    run_bench(
        ObservedTop(CONFIGS[name]),
        f"engine_{name}",
        Path(__file__).stem,
        testcase=testcase,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds(count))},
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_random_traffic_matches_golden(name: str) -> None:
    """Legal and illegal events, commits at any time, stalls on every stream."""
    run(name, "random_traffic", 10)


def test_read_error_is_retried_then_granted() -> None:
    run("tiny", "read_errors_are_retried", 1)


def test_lasting_read_error_gives_error_grants_and_leaks_no_slot() -> None:
    run("tiny", "lasting_read_errors_leak_no_slot", 1)


def test_memory_that_never_answers_does_not_hang_the_engine() -> None:
    run("tiny", "dead_memory_never_hangs_the_engine", 2)


def test_full_event_port_loses_nothing() -> None:
    run("tiny", "full_event_port_loses_nothing", 1)


# cocotb ---------------------------------------------------------------------------------------

CONFIG = CONFIGS[os.environ.get("CONFIG", "tiny")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
MAP = {r.name: r for r in registers(CONFIG)}
BEATS = CONFIG.expert_bytes // CONFIG.beat_bytes
SLVERR = 2
GUARD = None
"""In a slot's word that the load has not written."""


def content(address: int) -> int:
    """The beat at an address; every address bit matters."""
    value = (address + 1) * 0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835
    return (value ^ value >> 61) & ((1 << CONFIG.axi_data_width) - 1)


class Tier(AxiRamRead):
    """Memory whose content follows from the address; it may fail or stay silent."""

    def __init__(self, bus, clock, reset) -> None:
        super().__init__(bus, clock, reset, size=1 << CONFIG.axi_addr_width)
        self.ar_channel.queue_occupancy_limit = 64
        self.fails = lambda address: False
        self.silent = False

    async def _read(self, address: int, length: int) -> bytes:
        if self.silent:
            await Event().wait()
        if self.fails(address):
            raise OSError(f"no data at {address:#x}")
        return content(address).to_bytes(length, "little")


def pauses(rng: random.Random):
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
        self.pauses = iter(())
        self.now = 1
        signal.value = 1

    def step(self) -> None:
        ready = not next(self.pauses, False)
        if ready != self.now:
            self.now = ready
            self.signal.value = ready


class TB:
    """Accelerator, memory, register master, monitors and scoreboard."""

    def __init__(self, dut) -> None:
        self.dut = dut
        dut.rst.value = 1
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
        self.master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        self.ram = Tier(AxiReadBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst)
        w, r = self.master.write_if, self.master.read_if
        self.axil_channels = (w.aw_channel, w.w_channel, w.b_channel, r.ar_channel, r.r_channel)
        self.sinks = {
            name: Sink(getattr(dut, f"m_axis_{name}_tready")) for name in ("grant", "fill", "event")
        }
        self.running = False
        cocotb.start_soon(self._each_cycle())

    async def reset(self, seed: int, *, stalls: bool = True) -> None:
        """A new run, everything as after power-up."""
        dut, self.rng = self.dut, random.Random(seed)
        rng = self.rng
        dut._log.warning("seed %d", seed)
        self.running = False
        dut.rst.value = 1
        for name in ("token", "route", "release"):
            getattr(dut, f"s_axis_{name}_tvalid").value = 0
        self.cycle = self.quiet = 0
        self.offered: dict[str, object] = {}
        self.driven = dict.fromkeys(("token", "route", "release"), False)
        self.routes_left = 0
        self.sent = Tally()
        self.expected_layer, self.token_taken = 0, False
        self.previous: dict[int, list[int]] = {}
        self.held = Tally()  # grants of each slot that have not been released
        self.due: list[tuple[int, int]] = []  # (cycle, slot) to be released
        self.rogues: list[int] = []  # releases that nobody owes
        self.rogue_wanted = False
        self.delays = rng.choice(((0, 5), (0, 60), (20, 300)))
        self.illegal = rng.choice((0, 0.1, 0.3))
        self.event_rate = rng.choice((0.02, 0.2, 1))
        self.buffer = [[GUARD] * BEATS for _ in range(CONFIG.num_slots)]
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
            )
        }
        self.event_waits = 0
        self.taken = Tally()
        self.foreign_tokens: set[int] = set()
        self.worst = Tally()
        self.fill_beats = 0
        self.settings = [
            Settings(CONFIG.threshold << FRACTION_BITS, [CONFIG.quota] * CONFIG.num_layers)
        ]
        self.ram.fails = lambda address: False
        self.ram.silent = False
        for channel in (*self.axil_channels, self.ram.ar_channel, self.ram.r_channel):
            channel.set_pause_generator(pauses(random.Random(rng.random())) if stalls else None)
            channel.pause = False
        for sink in self.sinks.values():
            sink.pauses = pauses(random.Random(rng.random())) if stalls else iter(())
        for _ in range(4):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        self.running = True

    async def cycles(self, count: int) -> None:
        for _ in range(count):
            await RisingEdge(self.dut.clk)

    # Monitors ----------------------------------------------------------------------------------

    async def _each_cycle(self) -> None:
        """All monitors and all stream drivers, in one coroutine for speed."""
        dut = self.dut
        edge = RisingEdge(dut.clk)
        while True:
            await edge
            if not self.running or self.cycle == 0 and dut.rst.value == 1:
                continue
            took = int(dut.took.value)
            assert int(dut.unstable.value) == 0, (
                f"cycle {self.cycle}: an offer was withdrawn or changed on "
                f"{[p for i, p in enumerate(WATCHED) if int(dut.unstable.value) >> i & 1]}"
            )
            if took:
                self._monitor(took)
            self.event_waits += int(dut.waits.value) & EVENT > 0
            self._drive()
            self.quiet = self.quiet + 1 if not took else 0
            self.cycle += 1

    def _payload(self, name: str, layout) -> dict[str, object]:
        return unpack(layout, int(getattr(self.dut, f"m_axis_{name}_tdata").value))

    def _monitor(self, took: int) -> None:
        dut, cycle, log = self.dut, self.cycle, self.log
        if took & FILL:
            fill = self._payload("fill", FILL_LAYOUT)
            slot, offset = fill["slot"], fill["offset"]
            assert slot < CONFIG.num_slots and offset < BEATS, f"cycle {cycle}: {fill}"
            assert not self.held[slot], f"cycle {cycle}: slot {slot} is filled while in use"
            if offset == 0:
                self.buffer[slot] = [GUARD] * BEATS
            self.buffer[slot][offset] = fill["data"]
            self.fill_beats += 1
            if (offset, fill["data"]) in self.last_beats:
                log["fills"].append((cycle, slot))
        if took & EVENT:
            log["events"].append(Record(**self._payload("event", EVENT_LAYOUT), delivered=cycle))
        if took & AR:
            log["addresses"].append(
                (
                    cycle,
                    int(dut.m_axi_arid.value),
                    int(dut.m_axi_araddr.value),
                    int(dut.m_axi_arlen.value) + 1,
                )
            )
        if took & R:
            index, resp = int(dut.m_axi_rid.value), int(dut.m_axi_rresp.value)
            self.worst[index] = max(self.worst[index], resp)
            if dut.m_axi_rlast.value == 1:
                log["last_beats"].append((cycle, index, self.worst.pop(index)))
        if took & GRANT:
            grant = self._payload("grant", GRANT_LAYOUT)
            assert grant["context"] == 0
            log["grants"].append(
                (cycle, grant["layer"], grant["expert"], grant["slot"], grant["error"])
            )
            if not grant["error"]:
                slot = grant["slot"]
                self._check_content(grant["layer"], grant["expert"], slot)
                self.held[slot] += 1
                self.due.append((cycle + self.rng.randint(*self.delays), slot))
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
                self.previous[route["layer"]] = experts
                self.expected_layer = (route["layer"] + 1) % CONFIG.num_layers
                self.token_taken = self.expected_layer != 0
            elif route["context"]:
                experts = [CONFIG.num_experts] * CONFIG.top_k  # as above: surely illegal
            log["routes"].append((cycle, route["layer"], experts))
            self.rogue_wanted |= self.illegal > 0 and self.rng.random() < 0.1

    def _check_content(self, layer: int, expert: int, slot: int) -> None:
        """The slot holds the expert's bytes, and nothing beyond them was written."""
        wanted = [
            content(s.base + expert * s.stride + beat * CONFIG.beat_bytes)
            for s in self.segments[layer]
            for beat in range(s.beats)
        ]
        if wanted:
            wanted += [GUARD] * (BEATS - len(wanted))
            assert self.buffer[slot] == wanted, (
                f"cycle {self.cycle}: slot {slot} does not hold expert {expert} of layer {layer}"
            )

    # Drivers -----------------------------------------------------------------------------------

    def _offer(self, name: str, layout, fields, what: object = None) -> None:
        self.offered[name] = fields if what is None else what
        getattr(self.dut, f"s_axis_{name}_tdata").value = pack(layout, fields)
        getattr(self.dut, f"s_axis_{name}_tvalid").value = 1
        self.driven[name] = True

    def _drive(self) -> None:
        rng, offered = self.rng, self.offered
        for sink in self.sinks.values():
            sink.step()
        for name, driven in self.driven.items():
            if driven and name not in offered:
                getattr(self.dut, f"s_axis_{name}_tvalid").value = 0
                self.driven[name] = False
        if "release" not in offered:
            slot = self._next_release()
            if slot is not None:
                self._offer("release", RELEASE_LAYOUT, {"slot": slot}, slot)
        if not self.routes_left and "route" not in offered:
            return
        if "token" not in offered and rng.random() < self.event_rate:
            foreign = rng.random() < self.illegal / 2
            sequence = rng.random() < 0.1
            # In the middle of a token only now and then; a foreign token may always come.
            if not self.token_taken or foreign or sequence and rng.random() < 0.05:
                self._offer(
                    "token",
                    TOKEN_LAYOUT,
                    {
                        "context": int(foreign),
                        "token_id": rng.getrandbits(32),
                        "new_sequence": int(sequence),
                    },
                )
        if self.rogue_wanted:
            if "route" not in offered:
                self._go_rogue()
        elif self.routes_left and "route" not in offered and rng.random() < self.event_rate:
            self._offer_route()

    def _next_release(self) -> int | None:
        if self.rogues:
            return self.rogues.pop()
        ready = [item for item in self.due if item[0] <= self.cycle]
        if not ready:
            return None
        item = self.rng.choice(ready)
        self.due.remove(item)
        self.held[item[1]] -= 1
        return item[1]

    def _go_rogue(self) -> None:
        """Release what is not held, at a time at which it cannot hit a grant on its way."""
        if len(self.log["grants"]) < CONFIG.top_k * self.taken["route"]:
            return
        if self.rogue_wanted != "sent":
            self.rogue_wanted = "sent"
            slots = [s for s in range(1 << CONFIG.slot_bits) if not self.held[s]]
            for slot in self.rng.sample(slots, min(len(slots), 3)):
                self.rogues += [slot] * self.rng.choice((1, 2))
        elif not self.rogues and "release" not in self.offered:
            self.rogue_wanted = False

    def _offer_route(self) -> None:
        rng, layer = self.rng, self.expected_layer
        everyone = range(CONFIG.num_experts)
        experts = rng.sample(everyone, CONFIG.top_k)
        if layer in self.previous and rng.random() < 0.7:
            experts = list(self.previous[layer])
            if rng.random() < 0.5:
                other = rng.choice(everyone)
                if other not in experts:
                    experts[rng.randrange(CONFIG.top_k)] = other
        route = {"context": 0, "layer": layer, "experts": experts}
        legal = rng.random() >= self.illegal
        if not legal:
            kind = rng.choice(("expert", "duplicate", "layer", "context"))
            rank = rng.randrange(CONFIG.top_k)
            if kind == "expert":
                experts[rank] = rng.randrange(CONFIG.num_experts, 1 << CONFIG.expert_bits)
            elif kind == "duplicate":
                experts[rank] = experts[rank - 1]
            elif kind == "layer":
                wrong = [x for x in range(1 << CONFIG.layer_bits) if x != layer]
                route["layer"] = rng.choice(wrong)
            else:
                route["context"] = 1
        self.routes_left -= 1
        self._offer("route", ROUTE_LAYOUT, route, (route, legal))

    # Registers ---------------------------------------------------------------------------------

    async def put(self, register: str, *index_value: int) -> int:
        """Write a register; the response."""
        *index, value = index_value
        data = (value & 0xFFFF_FFFF).to_bytes(4, "little")
        return int((await self.master.write(MAP[register].at(*index), data)).resp)

    async def get(self, register: str, *index: int) -> int:
        return await self.master.read_dword(MAP[register].at(*index))

    async def program_segments(self) -> None:
        """Each layer in up to 4 parts, anywhere, also across 4 KiB."""
        rng, beat = self.rng, CONFIG.beat_bytes
        self.segments: list[list[Segment]] = []
        for layer in range(CONFIG.num_layers):
            total = rng.choice((BEATS, rng.randint(1, BEATS), rng.randint(1, BEATS)))
            if rng.random() < 0.03:
                total = 0
            cuts = sorted(rng.randint(0, total) for _ in range(NUM_SEGMENTS - 1))
            parts = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
            self.segments.append([])
            for part, beats in enumerate(parts):
                stride = max(1, beats + rng.choice((0, 0, 1, 100))) * beat
                base = rng.getrandbits(CONFIG.axi_addr_width - 18) << 17
                base += (4096 - rng.randint(0, 2 * BEATS) * beat) % 8192
                segment = Segment(base, stride, beats)
                self.segments[-1].append(segment)
                await self.put("SEGMENT_BASE_LOW", layer, part, base)
                await self.put("SEGMENT_BASE_HIGH", layer, part, base >> 32)
                await self.put("SEGMENT_STRIDE", layer, part, stride)
                assert await self.put("SEGMENT_BEATS", layer, part, beats) == 0
        # Content follows from the address, so a beat tells whether it is its expert's last one.
        self.last_beats = set()
        for segments in self.segments:
            used = [s for s in segments if s.beats]
            for expert in range(CONFIG.num_experts if used else 0):
                end = used[-1].base + expert * used[-1].stride + (used[-1].beats - 1) * beat
                self.last_beats.add((sum(s.beats for s in used) - 1, content(end)))

    async def commit(self, control: int, threshold: int, quota: list[int]) -> None:
        """Write all shadow registers and commit; a set that breaks a rule must be refused."""
        rng, limit = self.rng, 1 << (CONFIG.score_bits - 1)
        writes = [("CONTROL", control), ("THRESHOLD", threshold)]
        writes += [("QUOTA", layer, value) for layer, value in enumerate(quota)]
        rng.shuffle(writes)
        for write in writes:
            await self.put(*write)
        legal = (
            sum(quota) + CONFIG.top_k <= CONFIG.num_slots
            and max(quota) <= CONFIG.num_experts
            and -limit <= threshold < limit
        )
        if legal:
            self.settings.append(
                Settings(threshold, quota, *(bool(control >> bit & 1) for bit in range(4)))
            )
        self.taken["legal commit" if legal else "refused commit"] += 1
        await self.put("COMMIT", 1)
        status = await self.get("STATUS")
        assert status >> 1 & 1 == (not legal)
        if not legal:
            await self.put("STATUS", 2)

    async def commits(self) -> None:
        """Commits at random times while routes are left."""
        rng, limit = self.rng, 1 << (CONFIG.score_bits - 1)
        while self.routes_left:
            await self.cycles(rng.randrange(600))
            quota = [0] * CONFIG.num_layers
            spare = CONFIG.num_slots - CONFIG.top_k
            for _ in range(rng.randint(0, spare)):
                quota[rng.randrange(CONFIG.num_layers)] += 1
            threshold = rng.choice((-400, -40, 0, 40, 400, rng.randrange(-limit, limit)))
            fault = rng.randrange(8)
            if fault == 0:
                quota[rng.randrange(CONFIG.num_layers)] += spare + 1
            elif fault == 1:
                threshold = rng.choice((-limit - 1, limit, 1 << 30))
            control = 15 if rng.random() < 0.5 else rng.randrange(16)
            await self.commit(control, threshold, quota)

    # End ---------------------------------------------------------------------------------------

    async def drain(self, patience: int = 30_000) -> None:
        """Until every event has been taken, granted and released, and the engine is quiet."""
        last, since = None, self.cycle
        while True:
            await self.cycles(50)
            waits = self.routes_left or self.due or "route" in self.offered
            if not waits and self.quiet > 400:
                return
            progress = (len(self.log["events"]), self.routes_left)
            if progress != last:
                last, since = progress, self.cycle
            assert self.cycle - since < patience, f"cycle {self.cycle}: no progress since {since}"

    def check(self) -> Checker:
        """Every record is what the golden model says."""
        log = dict(self.log)
        events = log.pop("events")
        checker = Checker(
            CONFIG,
            segments=self.segments,
            settings=self.settings,
            **log,
            counters=[counter.name for counter in COUNTERS],
        )
        checker.run(events)
        checker.counters["discarded_beats"] = checker.counters["beats"] - self.fill_beats
        dropped = {r.cycle for r in events if r.kind == Kind.ILLEGAL and r.flag == 2}
        assert dropped == self.foreign_tokens, "tokens dropped"
        return checker

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


FILL_LAYOUT = fill_layout(CONFIG)
EVENT_LAYOUT = event_layout(CONFIG)
GRANT_LAYOUT = grant_layout(CONFIG)
RELEASE_LAYOUT = release_layout(CONFIG)
ROUTE_LAYOUT = route_layout(CONFIG)
TOKEN_LAYOUT = token_layout(CONFIG)

bench = cocotb.test(timeout_time=5, timeout_unit="ms")
"""Every bench ends in 500,000 cycles, or fails."""


@bench
async def random_traffic(dut) -> None:
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        tb.routes_left = 80
        commits = cocotb.start_soon(tb.commits())
        await tb.drain()
        await commits
        await tb.drain()
        assert len(tb.log["grants"]) == CONFIG.top_k * tb.taken["route"]
        checker = tb.check()
        await tb.check_counters(checker)
        for channel in tb.axil_channels:
            channel.set_pause_generator(None)
            channel.pause = False
        if seed == SEEDS[-1]:
            await tb.check_tables(checker)
        dut._log.warning("seed %d: %d cycles, %d records", seed, tb.cycle, checker.checked)


@bench
async def read_errors_are_retried(dut) -> None:
    """Every burst may fail a few times: no grant has an error, every slot has the right bytes."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        faults, rng = Tally(), random.Random(seed)
        marked = {
            segments[-1].base + expert * segments[-1].stride
            for segments in tb.segments
            for expert in range(CONFIG.num_experts)
            if segments[-1].beats
        }

        def fails(address: int, faults=faults, rng=rng, marked=marked) -> bool:
            # One address of an expert, never more often than a load is retried.
            if address not in marked or faults[address] >= CONFIG.retry_limit:
                return False
            faults[address] += 1
            return rng.random() < 0.7

        tb.ram.fails = fails
        tb.routes_left = 60
        await tb.drain()
        checker = tb.check()
        assert checker.counters["retries"] > 5
        assert checker.counters["error_grants"] == checker.counters["errors"] == 0
        await tb.check_counters(checker)


@bench
async def lasting_read_errors_leak_no_slot(dut) -> None:
    """Experts that cannot be read get error grants and the interrupt; their slots serve others."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed, stalls=seed > 1)
        await tb.program_segments()
        await tb.put("IRQ_ENABLE", 1)
        broken = {
            s.base + expert * s.stride + (s.beats - 1) * CONFIG.beat_bytes
            for segments in tb.segments
            for s in segments
            for expert in range(0, CONFIG.num_experts, 2)
            if s.beats
        }
        tb.ram.fails = broken.__contains__
        tb.illegal = 0
        tb.routes_left = 60
        await tb.drain()
        assert dut.irq.value == 1
        errors = sum(grant[4] for grant in tb.log["grants"])
        assert errors > 10
        tb.ram.fails = lambda address: False
        tb.routes_left = 60
        await tb.drain()
        assert len(tb.log["grants"]) == CONFIG.top_k * tb.taken["route"]
        assert sum(grant[4] for grant in tb.log["grants"][-CONFIG.top_k * 40 :]) == 0
        checker = tb.check()
        assert not checker.quarantined
        assert len(checker.free) + (checker.buffer.slot >= 0).sum() == CONFIG.num_slots
        await tb.check_counters(checker)


@bench
async def dead_memory_never_hangs_the_engine(dut) -> None:
    """No beat ever comes: every grant is an error, the watchdog reports, tokens are still taken."""
    tb = TB(dut)
    for seed in SEEDS[:2]:
        await tb.reset(seed, stalls=False)
        await tb.program_segments()
        await tb.put("IRQ_ENABLE", 2)
        tb.segments = [s or [Segment(0, 0, 1)] for s in tb.segments]
        tb.ram.silent = True
        tb.illegal = 0
        tb.event_rate = 0.2
        # One address waits at the memory, or all are taken.
        tb.ram.ar_channel.queue_occupancy_limit = (64, 1)[seed % 2]
        tb.routes_left = 40
        await tb.drain()
        tb.ram.ar_channel.queue_occupancy_limit = 64
        assert tb.taken["route"] == 40
        assert [g[4] for g in tb.log["grants"]] == [1] * (40 * CONFIG.top_k)
        kinds = Tally(Kind(r.kind).name for r in tb.log["events"])
        assert kinds["WATCHDOG"] >= 2 and kinds["ROUTE"] == 40
        assert dut.irq.value == 1 and await tb.get("IRQ_STATUS") & 2
        names = [counter.name for counter in COUNTERS]
        counters = {name: await tb.get("COUNTER", i) for i, name in enumerate(names)}
        assert counters["timeouts"] == kinds["WATCHDOG"]
        assert counters["error_grants"] == 40 * CONFIG.top_k and counters["grants"] == 0
        assert counters["routes"] == 40 and counters["filled"] == 0


@bench
async def full_event_port_loses_nothing(dut) -> None:
    """No record is taken for 2,000 cycles at a time: the engine waits, then goes on as golden."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        tb.event_rate = 0.3

        def stall(rng):
            while True:
                for _ in range(rng.randint(50, 800)):
                    yield False
                for _ in range(2000):
                    yield True

        tb.sinks["event"].pauses = stall(random.Random(seed))
        tb.routes_left = 60
        await tb.drain()
        tb.sinks["event"].pauses = iter(())
        await tb.drain()
        assert tb.event_waits > 4000
        checker = tb.check()
        await tb.check_counters(checker)
