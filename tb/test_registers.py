# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""Registers: the AXI4-Lite port against a model of the map, commits, counters, interrupt."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter as Tally
from pathlib import Path

import cocotb
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge, Timer, gather
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
from cocotbext.axi.axil_channels import (
    AxiLiteARTransaction,
    AxiLiteAWTransaction,
    AxiLiteWTransaction,
)

from simulation import Readers, run_bench, seeds, unpack
from stmoe.axil_flat import connect_axil, flat_axil_ports
from stmoe.payloads import segment_layout, segment_write_layout
from stmoe.register_map import COUNTER_INDEX, COUNTERS, Access, quota_bits, registers
from stmoe.registers import CounterBank, Registers
from stmoe.table_reader import table_index_layout
from stmoe_golden.config import EngineConfig, preset

CONFIGS = {
    "tiny": preset("tiny"),
    # Nothing is a power of two, and the address has no high word.
    "odd": EngineConfig(
        num_layers=5,
        num_experts=7,
        top_k=3,
        quota=3,
        staging=9,
        axi_addr_width=32,
        axi_data_width=128,
        expert_bytes=1040,
        weight_bits=6,
        threshold=-20,
        adaptive=False,
    ),
}


COUNTER_BITS = {"tiny": 32, "odd": 10}
"""Narrow counters bring the wrap into reach."""


class RegistersTop(wiring.Component):
    """:class:`Registers` with the flat bus names; the other members are as they are."""

    def __init__(self, config: EngineConfig, *, counter_bits: int = 32) -> None:
        self.registers = Registers(config, counter_bits=counter_bits)
        others = {n: v for n, v in self.registers.signature.members.items() if n != "axil"}
        super().__init__({**flat_axil_ports(self.registers.addr_width), **others})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.registers = inner = self.registers
        connect_axil(m, self, inner.axil)
        for name, member in inner.signature.members.items():
            if name == "axil":
                continue
            ours, theirs = getattr(self, name), getattr(inner, name)
            if not member.is_port:
                wiring.connect(m, wiring.flipped(ours), theirs)
            elif member.flow == wiring.In:
                m.d.comb += theirs.eq(ours)
            else:
                m.d.comb += ours.eq(theirs)
        return m


# pytest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_registers_follow_the_map(name: str) -> None:
    """All benches below, for one configuration."""
    run_bench(
        RegistersTop(CONFIGS[name], counter_bits=COUNTER_BITS[name]),
        f"registers_{name}",
        Path(__file__).stem,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds())},
        public=[("*registers", "cycle")],
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        Registers(3)
    with pytest.raises(ValueError, match="counter_bits must be 6 to 32, not 33"):
        Registers(preset("tiny"), counter_bits=33)
    with pytest.raises(ValueError, match=r"threshold must be -4096 to 4095 units .*, not 8000"):
        Registers(preset("tiny").replace(threshold=8000))
    with pytest.raises(ValueError, match="count must be 4 to 126, not 3"):
        CounterBank(count=3)
    with pytest.raises(ValueError, match="width must be more than 5, not 5"):
        CounterBank(count=30, width=5)
    with pytest.raises(ValueError, match="addr_width must be 3 to 64, not 2"):
        flat_axil_ports(2)
    with pytest.raises(TypeError, match="addr_width must be an integer, not '12'"):
        flat_axil_ports("12")


# cocotb ---------------------------------------------------------------------------------------

CONFIG = CONFIGS[os.environ.get("CONFIG", "tiny")]
COUNTER_WIDTH = COUNTER_BITS[os.environ.get("CONFIG", "tiny")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
MAP = {r.name: r for r in registers(CONFIG)}
OKAY, SLVERR = 0, 2
KINDS = (1 << (CONFIG.depth + 2)) - 1
"""PREDICTORS with every kind enabled."""
USED = {"CONTROL": 15, "PREDICTORS": KINDS, "IRQ_ENABLE": 31, "TABLE_INDEX": 0x0FFF_FFFF}
"""Bits that are kept, of the registers that have fewer than 32."""
CAUSES = ("error", "watchdog", "illegal", "counter_wrap", "commit_refused")


bench = cocotb.test(timeout_time=4, timeout_unit="ms")
"""Every bench ends in 400,000 cycles, or fails."""


class TB:
    """Clock, bus master with random stalls, checks that hold in every cycle."""

    def __init__(self, dut) -> None:
        self.dut = dut
        self.now = Readers(dut)
        self.edge = RisingEdge(dut.clk)
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
        self.master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        self.aw = self.master.write_if.aw_channel
        self.w = self.master.write_if.w_channel
        self.b = self.master.write_if.b_channel
        self.ar = self.master.read_if.ar_channel
        self.r = self.master.read_if.r_channel
        self.rng = random.Random(0)
        self.stall_ready = 0.0
        self.cycle_moves = False  # a bench sets the cycle count
        self.patient = True
        self.longest_use = 40
        cocotb.start_soon(self._watch())
        cocotb.start_soon(self._take_segments())
        cocotb.start_soon(self._use_segments())
        cocotb.start_soon(self._give_weights())

    async def reset(self, seed: int, *, stalls: bool = True) -> None:
        """A new run: everything as after power-up, random stalls from ``seed``."""
        dut = self.dut
        dut._log.warning("seed %d", seed)
        self.rng = rng = random.Random(seed)
        inputs = ("commit_grant", "increment", "initialised", "busy", "error", "watchdog")
        for name in (*inputs, "illegal"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        for _ in range(4):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for channel in (self.aw, self.w, self.b, self.ar, self.r):
            share = rng.choice((0, 0.2, 0.5, 0.8)) if stalls else 0
            channel.set_pause_generator(
                self._pauses(random.Random(rng.random()), share) if share else None
            )
            if not share:
                channel.pause = False
        self.stall_ready = rng.choice((0, 0.3, 0.8)) if stalls else 0
        await RisingEdge(dut.clk)

    @staticmethod
    def _pauses(rng, share):
        while True:
            yield rng.random() < share

    async def cycles(self, count: int) -> None:
        for _ in range(count):
            await self.edge

    def active(self):
        """The active configuration, as sampled now."""
        now = self.now
        sign = 1 << (CONFIG.score_bits - 1)
        return (
            now["prefetching"](),
            now["learning"](),
            now["ordered"](),
            now["adaptive"](),
            (now["threshold"]() ^ sign) - sign,
            now["quota"](),
            now["kinds"](),
        )

    async def _take_segments(self) -> None:
        ready, was = self.dut.segment_write__ready, None
        while True:
            if (is_ready := self.rng.random() >= self.stall_ready) != was:
                ready.value = was = is_ready
            await self.edge

    async def _use_segments(self) -> None:
        """Loads that keep to the segments before a commit."""
        old, rst, bank_now = self.dut.old_segments, self.now["rst"], self.now["segment_bank"]
        bank, old.value = 0, 0
        while True:
            await self.edge
            if rst():
                bank = 0
            elif bank != bank_now():
                bank ^= 1
                old.value = 1
                left = self.rng.randrange(self.longest_use // 4, self.longest_use)
                while left and not rst():
                    await self.edge
                    left -= 1
                bank = int(not rst() and bank)
                old.value = 0

    def segments(self) -> dict[tuple[int, int], int]:
        """The active set, as far as it was handed over: (layer, segment) to value."""
        return self.sets[self.now["segment_bank"]()]

    async def _give_weights(self) -> None:
        """Answers requests for weights, now and then after so long that the reader gives up."""
        requested, index = self.now["read_request"], self.now["read_index"]
        valid, value = self.dut.read_valid, self.dut.read_value
        while True:
            valid.value = 0
            value.value = self.rng.getrandbits(len(value))
            await self.edge
            if not requested():
                continue
            asked = index()
            for _ in range(self.rng.choice((0, 1, 4, 30)) if self.patient else 5000):
                await self.edge
                if not requested():
                    break
            else:
                assert index() == asked, "the index moved while it was asked for"
                valid.value = 1
                value.value = weight_at(**unpack(table_index_layout(CONFIG), asked))
                await self.edge
                assert requested(), "a request was withdrawn early"

    async def _watch(self) -> None:
        """Protocol and configuration rules; counts what happens."""
        edge, now = self.edge, self.now
        rst, cycle_now, bank_now = now["rst"], now["cycle"], now["segment_bank"]
        requested, granted, committed = (
            now[name] for name in ("commit_request", "commit_grant", "committed")
        )
        threshold_changed, increments = now["threshold_changed"], now["increment"]
        channels = [
            (
                name,
                [now[payload] for payload in payloads],
                now[f"{prefix}valid"],
                now[f"{prefix}ready"],
            )
            for name, prefix, payloads in (
                ("b", "s_axil_b", ["s_axil_bresp"]),
                ("r", "s_axil_r", ["s_axil_rdata", "s_axil_rresp"]),
                ("segment_write", "segment_write__", ["segment_write__payload"]),
            )
        ]
        requests = [
            (name, now[f"s_axil_{name}valid"], now[f"s_axil_{name}ready"])
            for name in ("aw", "w", "ar")
        ]
        while True:
            held = {}
            active = None
            cycle = None
            request = grant = 0
            self.counts = counts = [0] * len(COUNTERS)
            self.sets = ({}, {})
            self.bank_changes = 0
            bank = 0
            self.commits = 0
            self.threshold_changes = 0
            self.taken = taken = Tally()  # handshakes of each channel
            self.last_taken = {}  # cycle of the latest
            while not rst():  # a bench begins where the one before it ended
                await edge
            while rst():
                await edge
            while not rst():
                for name, payload, valid, ready in channels:
                    if not valid():
                        assert name not in held, f"{name}: valid fell without ready"
                        continue
                    offered = tuple(read() for read in payload)
                    assert held.pop(name, offered) == offered, (
                        f"{name}: payload changed while waiting"
                    )
                    if not ready():
                        held[name] = offered
                    else:
                        taken[name] += 1
                        if name == "segment_write":
                            row = unpack(segment_write_layout(CONFIG), offered[0])
                            assert not requested(), "the set is complete"
                            assert not now["old_segments"](), "the set is in use"
                            idle = self.sets[1 - bank_now()]
                            idle[row["layer"], row["segment"]] = row["value"]
                count = cycle_now()
                for name, valid, ready in requests:
                    if valid() and ready():
                        taken[name] += 1
                        self.last_taken[name] = count
                assert taken["b"] <= min(taken["aw"], taken["w"])
                assert taken["r"] <= taken["ar"]

                before, active = active, self.active()
                assert before in (None, active) or grant, "active values changed without a commit"
                if bank != bank_now():
                    assert grant, "segments changed without a commit"
                    self.bank_changes += 1
                    bank ^= 1
                if request:
                    assert requested() == (not grant)
                request = requested()
                grant = request and granted()
                assert committed() == grant
                self.commits += grant
                if threshold_changed():
                    assert grant
                    self.threshold_changes += 1

                assert cycle is None or self.cycle_moves or count == (cycle + 1) % (1 << 40)
                assert cycle is not None or count == 0, "the first cycle is 0"
                cycle = count
                increment = increments()
                while increment:
                    low = increment & -increment
                    counts[low.bit_length() - 1] += 1
                    increment ^= low
                await edge

    # Accesses with any strobes; the master itself only writes whole ranges of bytes.

    async def write(self, address: int, value: int, strobes: int = 0xF) -> int:
        """The response to one write, AW and W in any order."""
        gap = self.rng.choice((0, 0, 1, 5))

        async def address_phase():
            await self.aw.send(AxiLiteAWTransaction(awaddr=address, awprot=gap))

        async def data_phase():
            await self.w.send(AxiLiteWTransaction(wdata=value, wstrb=strobes))

        phases = [address_phase, data_phase]
        self.rng.shuffle(phases)
        await phases[0]()
        await self.cycles(gap)
        await phases[1]()
        return int((await self.b.recv()).bresp)

    async def read(self, address: int) -> tuple[int, int]:
        """(response, data) of one read."""
        await self.ar.send(AxiLiteARTransaction(araddr=address, arprot=0))
        answer = await self.r.recv()
        return int(answer.rresp), int(answer.rdata)

    async def get(self, register: str, *index: int) -> int:
        """What a register reads; it must answer OKAY."""
        response, value = await self.read(MAP[register].at(*index))
        assert response == OKAY, register
        return value

    async def put(self, register: str, *index_value: int) -> None:
        """Write a whole register; it must answer OKAY."""
        *index, value = index_value
        assert await self.write(MAP[register].at(*index), value & 0xFFFF_FFFF) == OKAY

    async def grant(self, delay: int) -> None:
        """Wait for a commit request, and grant it ``delay`` cycles later."""
        while self.dut.commit_request.value != 1:
            await RisingEdge(self.dut.clk)
        await self.cycles(delay)
        self.dut.commit_grant.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.commit_grant.value = 0

    async def pulse(self, name: str) -> None:
        getattr(self.dut, name).value = 1
        await RisingEdge(self.dut.clk)
        getattr(self.dut, name).value = 0


def signed32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def weight_at(table: int, layer: int, expert: int, lane: int) -> int:
    """Some number for each weight, as the port of the tables gives it: two's complement."""
    return hash((table, layer, expert, lane)) & ((1 << CONFIG.bias_bits) - 1)


def pack_quota(quotas) -> int:
    return sum(q << (i * quota_bits(CONFIG)) for i, q in enumerate(quotas))


WORDS = ("SEGMENT_BASE_LOW", "SEGMENT_BASE_HIGH", "SEGMENT_STRIDE", "SEGMENT_BEATS")
PLACES = list(itertools.product(range(CONFIG.num_layers), range(4)))
Words = dict[tuple[int, int], list[int]]
"""The four words of each segment, by layer and segment."""


def legal(threshold: int, quotas, words: Words | None = None) -> bool:
    """The rule of docs/architecture.md 4.3, and the ranges; of segments only if they are given."""
    limit = 1 << (CONFIG.score_bits - 1)
    good = (
        sum(quotas) + CONFIG.top_k <= CONFIG.num_slots
        and max(quotas) <= CONFIG.num_experts
        and -limit <= threshold < limit
    )
    for layer in range(CONFIG.num_layers if words else 0):
        parts = [words[layer, part] for part in range(4)]
        beats = sum(part[3] for part in parts)
        good &= beats >= 1 and beats * CONFIG.beat_bytes <= CONFIG.expert_bytes
        for low, high, stride, _ in parts:
            good &= low % CONFIG.beat_bytes == stride % CONFIG.beat_bytes == 0
            good &= high < 1 << (CONFIG.axi_addr_width - 32)
    return bool(good)


def values_of(words: Words) -> dict[tuple[int, int], int]:
    """What the engine gets of them."""
    layout = segment_layout(CONFIG)
    return {
        place: layout.const({"base": high << 32 | low, "stride": stride, "beats": beats})
        .as_value()
        .value
        for place, (low, high, stride, beats) in words.items()
    }


def some_words(rng) -> Words:
    """Legal ones of all layers; some fill their slot."""
    beat, words = CONFIG.beat_bytes, {}
    for layer in range(CONFIG.num_layers):
        total = rng.choice((CONFIG.slot_beats, rng.randint(1, CONFIG.slot_beats)))
        cuts = sorted(rng.randint(0, total) for _ in range(3))
        for part, (a, b) in enumerate(zip([0, *cuts], [*cuts, total], strict=True)):
            base = rng.getrandbits(CONFIG.axi_addr_width) // beat * beat
            stride = rng.getrandbits(32) // beat * beat
            words[layer, part] = [base & 0xFFFF_FFFF, base >> 32, stride, b - a]
    return words


class Model:
    """What software sees, from the documents: reads, responses and active values."""

    def __init__(self) -> None:
        self.values = {"IRQ_STATUS": 0, "STATUS": 0, "SCRATCH": 0, "IRQ_ENABLE": 0}
        self.values["CONTROL"] = 7 | CONFIG.adaptive << 3
        self.values["TABLE_INDEX"] = 0
        self.values["PREDICTORS"] = KINDS
        self.values["THRESHOLD"] = (CONFIG.threshold * 4) & 0xFFFF_FFFF
        self.quota = [CONFIG.quota] * CONFIG.num_layers
        self.words: Words = {place: [0] * 4 for place in PLACES}
        self.words_changed = False
        self.segments: dict[tuple[int, int], int] = {}  # that are active
        self.where = {r.at(*i): (r.name, i) for r in MAP.values() for i in r.elements()}
        self.active = self._shadow()
        self.commits = self.threshold_changes = 0

    def _shadow(self):
        control = self.values["CONTROL"]
        return (
            control & 1,
            control >> 1 & 1,
            control >> 2 & 1,
            control >> 3 & 1,
            signed32(self.values["THRESHOLD"]),
            pack_quota(self.quota),
            self.values["PREDICTORS"],
        )

    def write(self, address: int, value: int, strobes: int) -> int:
        name, index = self.where.get(address & ~3, (None, ()))
        mask = sum(0xFF << (8 * i) for i in range(4) if strobes >> i & 1)

        def merge(old: int) -> int:
            return (old & ~mask) | (value & mask)

        if name is None or MAP[name].access is Access.RO:
            return SLVERR
        if name in ("STATUS", "IRQ_STATUS"):
            self.values[name] &= ~(value & mask)
        elif name in ("SCRATCH", "THRESHOLD", *USED):
            used = USED.get(name, 0xFFFF_FFFF)
            self.values[name] = merge(self.values[name]) & used
        elif name == "QUOTA":
            new = merge(self.quota[index[0]])
            self.quota[index[0]] = min(new, CONFIG.num_experts + 1)
        elif name == "COMMIT":
            if value & mask & 1:
                self.commit()
        else:
            words, which = self.words[index], WORDS.index(name)
            words[which] = merge(words[which])
            self.words_changed |= strobes != 0
        return OKAY

    def commit(self) -> None:
        words = self.words if self.words_changed else None
        if legal(signed32(self.values["THRESHOLD"]), self.quota, words):
            self.commits += 1
            self.threshold_changes += self.active[4] != self._shadow()[4]
            self.active = self._shadow()
            if words:
                self.segments, self.words_changed = values_of(words), False
        else:
            self.values["STATUS"] |= 2
            self.values["IRQ_STATUS"] |= 16

    def weight(self) -> tuple[int, int]:
        """A read of TABLE_VALUE: the weight, and the lane moves on."""
        c, index = CONFIG, self.values["TABLE_INDEX"]
        table, layer, expert, lane = index >> 24, index >> 16 & 255, index >> 8 & 255, index & 255
        exists = table < c.depth + 2 and layer < c.num_layers and lane < c.num_experts
        if not exists or expert >= (c.num_experts if table else 1):
            return SLVERR, 0
        self.values["TABLE_INDEX"] = index - lane + (lane + 1) % c.num_experts
        value = weight_at(table, layer, expert, lane)
        return OKAY, (value - ((value >> (c.bias_bits - 1)) << c.bias_bits)) & 0xFFFF_FFFF

    def read(self, address: int) -> tuple[int, int | None]:
        """(response, data); data is None when it is not for the model to say."""
        name, index = self.where.get(address & ~3, (None, ()))
        if name is None or MAP[name].access is Access.WO:
            return SLVERR, 0
        if name == "QUOTA":
            return OKAY, self.quota[index[0]]
        if name == "TABLE_VALUE":
            return self.weight()
        if name in self.values:
            return OKAY, self.values[name]
        if name in ("COUNTER", "CYCLE_LOW", "CYCLE_HIGH"):
            return OKAY, None
        return OKAY, MAP[name].reset


@bench
async def reset_values(dut) -> None:
    """Reset values, against literals and the configuration, over the master's own reads."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        c = CONFIG
        assert tb.active() == (
            1,
            1,
            1,
            c.adaptive,
            c.threshold * 4,
            pack_quota([c.quota] * c.num_layers),
            KINDS,
        )
        expected = {
            "IDENTITY": int.from_bytes(b"STMO", "big"),
            "CAPABILITY0": c.num_layers | c.num_experts << 16,
            "CAPABILITY1": c.top_k | c.depth << 8 | c.look << 16 | c.num_contexts << 24,
            "CAPABILITY2": c.num_slots | c.transfers << 16 | c.weight_bits << 24,
            "CAPABILITY3": c.axi_data_width | c.axi_addr_width << 16 | c.event_port << 24,
            "CAPABILITY4": c.score_bits | 30 << 8 | 4 << 16,
            "CAPABILITY5": c.expert_bytes,
            "SCRATCH": 0,
            "CONTROL": 7 | c.adaptive << 3,
            "PREDICTORS": KINDS,
            "THRESHOLD": c.threshold * 4 & 0xFFFF_FFFF,
            "COMMIT": 0,
            "STATUS": 0,
            "IRQ_STATUS": 0,
            "IRQ_ENABLE": 0,
            "CYCLE_HIGH": 0,
        }
        expected = {MAP[name].at(): value for name, value in expected.items()}
        expected[MAP["TABLE_INDEX"].at()] = 0
        expected |= {MAP["QUOTA"].at(i): c.quota for i in range(c.num_layers)}
        expected |= {MAP["COUNTER"].at(i): 0 for i in range(len(COUNTERS))}
        order = list(expected)
        tb.rng.shuffle(order)
        for address in order:
            answer = await tb.master.read(address, 4)
            assert answer.resp == OKAY
            got = int.from_bytes(answer.data, "little")
            assert got == expected[address], f"{address:#x}: {got:#x}"
        assert dut.irq.value == 0


@bench
async def random_accesses(dut) -> None:
    """Any address, value and strobes, pulses in between: the model says what is answered."""
    tb = TB(dut)
    seen = Tally()
    for seed in SEEDS:
        await tb.reset(seed)
        rng, model = tb.rng, Model()
        if seed % 2:
            # Else nearly every commit is refused for the sake of a layer without beats.
            for place, words in some_words(rng).items():
                for name, value in zip(WORDS, words, strict=True):
                    assert model.write(MAP[name].at(*place), value, 0xF) == OKAY
                    await tb.put(name, *place, value)

        async def grants(rng):
            while True:
                await tb.grant(rng.choice((0, 1, 20)))

        granter = cocotb.start_soon(grants(random.Random(seed)))
        by_name = list(MAP)
        known = list(model.where)
        for _ in range(250):
            address = rng.choice(known)
            register = MAP[rng.choice(by_name)]
            if rng.random() < 0.7:
                address = rng.choice([register.at(*i) for i in register.elements()])
            if rng.random() < 0.1:
                address = rng.randrange(1 << len(dut.s_axil_awaddr)) & ~3
            address |= rng.choice((0, 0, 0, rng.randrange(4)))
            name = model.where.get(address & ~3, ("unknown",))[0]
            if rng.random() < 0.2:
                cause = rng.choice(("error", "watchdog", "illegal"))
                await tb.pulse(cause)
                model.values["IRQ_STATUS"] |= 1 << CAUSES.index(cause)
            state = rng.randrange(4)
            dut.initialised.value, dut.busy.value = state & 1, state >> 1
            if rng.random() < 0.55:
                value = rng.getrandbits(32)
                if rng.random() < 0.8:  # values that often make a legal set
                    value = {
                        "QUOTA": rng.randrange(CONFIG.quota + 3),
                        "THRESHOLD": rng.randrange(-2000, 2000) & 0xFFFF_FFFF,
                        "COMMIT": 1,
                        "TABLE_INDEX": rng.choice((0, 1 << 24, (CONFIG.depth + 1) << 24))
                        | rng.randrange(CONFIG.num_layers) << 16
                        | rng.randrange(CONFIG.num_experts) << 8
                        | rng.randrange(CONFIG.num_experts),
                        "SEGMENT_BASE_LOW": value // CONFIG.beat_bytes * CONFIG.beat_bytes,
                        "SEGMENT_BASE_HIGH": value >> (64 - CONFIG.axi_addr_width),
                        "SEGMENT_STRIDE": value // CONFIG.beat_bytes * CONFIG.beat_bytes,
                        "SEGMENT_BEATS": rng.randrange(4),
                    }.get(name, value)
                strobes = rng.choice((0xF, 0xF, rng.randrange(16)))
                expected = model.write(address, value, strobes)
                got = await tb.write(address, value, strobes)
                seen[name, "write", got] += 1
                assert got == expected, f"write {address:#x} ({name}): {got}"
            else:
                increments = rng.getrandbits(len(COUNTERS))
                dut.increment.value = increments
                await tb.cycles(rng.randrange(3))
                dut.increment.value = 0
                await RisingEdge(dut.clk)
                response, expected = model.read(address)
                got_response, got = await tb.read(address)
                seen[name, "read", got_response] += 1
                if name == "COUNTER":
                    expected = tb.counts[model.where[address & ~3][1][0]]
                if name == "STATUS":
                    expected |= state << 2
                    got &= ~0b1_0001  # commit_pending, old_segments: other benches
                assert got_response == response, f"read {address:#x} ({name})"
                assert expected is None or got == expected, (
                    f"read {address:#x} ({name}): {got:#x}, not {expected:#x}"
                )
            irq = model.values["IRQ_STATUS"] & model.values["IRQ_ENABLE"] != 0
            assert int(dut.irq.value) == irq
        for _ in range(2000):
            if dut.commit_request.value == 0:
                break
            await RisingEdge(dut.clk)
        await tb.cycles(3)
        granter.cancel()
        assert tb.active() == model.active
        assert (tb.commits, tb.threshold_changes) == (model.commits, model.threshold_changes)
        assert tb.segments() == model.segments
    if len(SEEDS) > 1:
        for register in MAP.values():
            for kind, allowed in (("write", register.writable), ("read", register.readable)):
                assert seen[register.name, kind, OKAY if allowed else SLVERR], register.name
        for kind in ("read", "write"):
            assert seen["unknown", kind, SLVERR] and not seen["unknown", kind, OKAY]
        assert seen["TABLE_VALUE", "read", SLVERR] > 2 and seen["TABLE_VALUE", "read", OKAY] > 5
        assert seen["STATUS", "read", OKAY]


@bench
async def a_row_reads_lane_by_lane(dut) -> None:
    """One write of TABLE_INDEX, then every weight of a row, and the first again."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        rng, model = tb.rng, Model()
        table = rng.randrange(CONFIG.depth + 2)
        expert = rng.randrange(CONFIG.num_experts) if table else 0
        index = table << 24 | rng.randrange(CONFIG.num_layers) << 16 | expert << 8
        await tb.put("TABLE_INDEX", index)
        model.values["TABLE_INDEX"] = index
        for _ in range(CONFIG.num_experts + 1):
            assert await tb.read(MAP["TABLE_VALUE"].at()) == model.weight()
        assert await tb.get("TABLE_INDEX") == model.values["TABLE_INDEX"]


@bench
async def a_read_of_a_weight_gives_up_when_no_pause_comes(dut) -> None:
    """After 4,096 cycles it answers SLVERR, the index stays, and the bus goes on."""
    tb = TB(dut)
    await tb.reset(SEEDS[0], stalls=False)
    await tb.put("TABLE_INDEX", 1)
    tb.patient = False
    begun = int(dut.cycle.value)
    assert await tb.read(MAP["TABLE_VALUE"].at()) == (SLVERR, 0)
    assert 4096 <= int(dut.cycle.value) - begun < 4120
    tb.patient = True
    assert await tb.get("TABLE_INDEX") == 1
    model = Model()
    model.values["TABLE_INDEX"] = 1
    assert await tb.read(MAP["TABLE_VALUE"].at()) == model.weight()


@bench
async def commits_are_atomic(dut) -> None:
    """A legal set takes effect at the grant and not before, an illegal one never. Segments that
    nobody has written are not looked at."""
    tb = TB(dut)
    outcomes = Tally()
    limit = 1 << (CONFIG.score_bits - 1)
    spare = CONFIG.num_slots - CONFIG.top_k
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        for _ in range(8):
            before = tb.active()
            control, kinds = rng.randrange(16), rng.randrange(KINDS + 1)
            # Sums right at the limit, ranges right at their ends.
            total = min(
                rng.choice((spare, spare, spare + 1, 0, rng.randrange(spare))),
                CONFIG.num_layers * CONFIG.num_experts,
            )
            quotas = [0] * CONFIG.num_layers
            for _ in range(total):
                free = [i for i, q in enumerate(quotas) if q < CONFIG.num_experts]
                quotas[rng.choice(free)] += 1
            written = list(quotas)
            if rng.random() < 0.25:  # one is too large, the sum is not
                quotas = [0] * CONFIG.num_layers
                quotas[rng.randrange(len(quotas))] = CONFIG.num_experts + 1
                written = [q and rng.choice((q, 1 << 31, 256, 0x100 | q)) for q in quotas]
            threshold = rng.choice((-limit, limit - 1, rng.randrange(-limit, limit), before[4]))
            if rng.random() < 0.25:
                threshold = rng.choice((-limit - 1, limit, (1 << 31) - 1, -(1 << 31)))
            writes = [("CONTROL", control), ("THRESHOLD", threshold), ("PREDICTORS", kinds)]
            writes += [("QUOTA", i, q) for i, q in enumerate(written)]
            rng.shuffle(writes)
            for write in writes:
                await tb.put(*write)
            assert tb.active() == before, "a shadow is not active before the commit"
            # Refused by this alone?
            reasons = (
                sum(quotas) > spare,
                max(quotas) > CONFIG.num_experts,
                not -limit <= threshold < limit,
            )
            commits, changes = tb.commits, tb.threshold_changes
            await tb.put("COMMIT", 1)
            status = await tb.get("STATUS")
            if any(reasons):
                if sum(reasons) == 1:
                    outcomes[reasons.index(True)] += 1
                assert status & 3 == 2
                assert await tb.get("IRQ_STATUS") == 16
                await tb.cycles(30)
                assert dut.commit_request.value == 0
                assert tb.active() == before and tb.commits == commits
                await tb.put("STATUS", 2)
                await tb.put("IRQ_STATUS", 16)
                continue
            outcomes["legal"] += 1
            assert status & 3 == 1 and await tb.get("IRQ_STATUS") == 0
            await tb.cycles(rng.randrange(30))
            assert tb.active() == before
            await tb.grant(0)
            await tb.cycles(2)
            after = (*(control >> bit & 1 for bit in range(4)), threshold)
            assert tb.active() == (*after, pack_quota(quotas), kinds)
            assert tb.commits == commits + 1
            assert tb.threshold_changes == changes + (threshold != before[4])
            assert await tb.get("STATUS") & 3 == 0
    if len(SEEDS) > 1:
        assert all(outcomes[reason] for reason in (0, 1, 2, "legal")), outcomes


@bench
async def shadow_writes_wait_for_a_pending_commit(dut) -> None:
    """They change neither the pending set nor get lost; all other accesses go on."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        before = tb.active()
        await tb.put("THRESHOLD", 100 + seed)
        await tb.put("COMMIT", 1)
        # Before any shadow write is queued, writes elsewhere still go on.
        await tb.put("SCRATCH", seed)
        await tb.put("IRQ_ENABLE", seed & 31)
        assert await tb.write(MAP["IDENTITY"].at(), 0) == SLVERR
        quota = rng.randrange(CONFIG.quota)
        choices = [
            ("CONTROL", 5),
            ("THRESHOLD", 7),
            ("PREDICTORS", 2),
            ("QUOTA", CONFIG.num_layers - 1, quota),
            ("SEGMENT_BEATS", 1, 2, 0),
            ("COMMIT", 0),
        ]
        late = rng.choice(choices)
        taken = tb.taken["aw"], tb.taken["w"]
        waiting = cocotb.start_soon(tb.put(*late))
        for _ in range(40):
            assert await tb.get("SCRATCH") == seed
            assert await tb.get("STATUS") & 3 == 1
            assert (tb.taken["aw"], tb.taken["w"]) == taken, "not taken while pending"
        assert not waiting.done() and tb.active() == before
        await tb.grant(0)
        await tb.cycles(2)
        assert tb.active() == (*before[:4], 100 + seed, *before[5:])
        await waiting
        if MAP[late[0]].readable and late[0] != "COMMIT":
            assert await tb.get(*late[:-1]) == late[-1]
        assert tb.active() == (*before[:4], 100 + seed, *before[5:])
        if late[0] == "SEGMENT_BEATS":
            await tb.put("COMMIT", 1)
            assert await tb.get("STATUS") & 3 == 2, "it was written, so the segments are checked"
            continue
        await tb.put("COMMIT", 1)
        cocotb.start_soon(tb.grant(0))
        await tb.put("CONTROL", 15)  # its answer comes after the grant
        await tb.cycles(2)
        quotas = [CONFIG.quota] * CONFIG.num_layers
        if late[0] == "QUOTA":
            quotas[-1] = quota
        assert tb.active() == (
            1,
            int(late[0] != "CONTROL"),
            1,
            int(late[0] != "CONTROL" and CONFIG.adaptive),
            7 if late[0] == "THRESHOLD" else 100 + seed,
            pack_quota(quotas),
            2 if late[0] == "PREDICTORS" else KINDS,
        )


@bench
async def segments_are_committed_whole_or_refused(dut) -> None:
    """Each rule right at its limits; nothing changes before the grant or after a refusal; what is
    not written stays; without a write the sets do not change places."""
    tb, outcomes = TB(dut), Tally()
    last_beats = CONFIG.slot_beats
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        written: Words = {place: [0] * 4 for place in PLACES}
        good: Words | None = None
        wrote = False
        for _ in range(7):
            words = some_words(rng)
            if good is not None:  # as it is, but for a few
                few = rng.sample(range(CONFIG.num_layers), rng.choice((0, 0, 1, 2)))
                words = {p: list(words[p] if p[0] in few else good[p]) for p in PLACES}
            layer, part = rng.choice(PLACES)
            word = words[layer, part]
            fault = rng.choice(("low", "high", "stride", "sum", "beats", "none"))
            if rng.random() < 0.5:
                fault = None
            if fault == "low":
                word[0] |= rng.randrange(1, CONFIG.beat_bytes)
            elif fault == "high":
                word[1] |= 1 << rng.randrange(CONFIG.axi_addr_width - 32, 32)
            elif fault == "stride":
                word[2] |= rng.randrange(1, CONFIG.beat_bytes)
            elif fault == "sum":
                word[3] += last_beats + 1 - sum(words[layer, p][3] for p in range(4))
            elif fault == "beats":
                word[3] |= 1 << rng.randrange(CONFIG.offset_bits, 32)
            elif fault == "none":
                for p in range(4):
                    words[layer, p][3] = 0
            assert legal(0, [0], words) == (fault is None)
            writes = [
                (MAP[name].at(*p), words[p][i])
                for p in PLACES
                for i, name in enumerate(WORDS)
                if words[p][i] != written[p][i]
            ]
            rng.shuffle(writes)
            wrote |= bool(writes)
            for address, value in writes:
                strobes = rng.choice((0xF, rng.randrange(16)))
                assert await tb.write(address, value, strobes) == OKAY
                if strobes != 0xF:
                    assert await tb.write(address, value, 0xF & ~strobes) == OKAY
            written = words
            before, banks, commits = dict(tb.segments()), tb.bank_changes, tb.commits
            await tb.put("COMMIT", 1)
            assert tb.segments() == before
            status = await tb.get("STATUS") & 3
            if fault:
                outcomes[fault] += 1
                assert status == 2, fault
                await tb.put("STATUS", 2)
                assert (tb.segments(), tb.bank_changes, tb.commits) == (before, banks, commits)
                continue
            outcomes["legal" if writes else "unchanged"] += 1
            assert status == 1
            await tb.cycles(rng.randrange(20))
            assert tb.segments() == before
            await tb.grant(0)
            await tb.cycles(2)
            assert tb.segments() == values_of(words)
            assert tb.bank_changes == banks + wrote
            good, wrote = words, False
    if len(SEEDS) > 1:
        assert all(outcomes[f] for f in ("low", "high", "stride", "sum", "beats", "none"))
        assert outcomes["legal"] and outcomes["unchanged"], outcomes


@bench
async def a_commit_of_segments_waits_for_loads_that_use_the_old_ones(dut) -> None:
    """It is not taken while they do, and reads go on; a commit of anything else does not wait."""
    tb = TB(dut)
    tb.longest_use = 400
    for seed in SEEDS:
        await tb.reset(seed)
        words = some_words(tb.rng)
        for place, values in words.items():
            for name, value in zip(WORDS, values, strict=True):
                await tb.put(name, *place, value)
        await tb.put("COMMIT", 1)
        await tb.grant(0)
        while dut.old_segments.value == 0:
            await RisingEdge(dut.clk)
        assert await tb.get("STATUS") >> 4 == 1
        # No read of STATUS says that neither a commit is pending nor the old places are read.
        while dut.old_segments.value == 1:
            await RisingEdge(dut.clk)
        for last in (False, False, True):
            tb.longest_use, delay = (2400 if last else 400), tb.rng.randrange(12)
            await tb.put("SEGMENT_BEATS", 0, 0, words[0, 0][3])
            await tb.put("COMMIT", 1)
            granting = cocotb.start_soon(tb.grant(delay))
            while (status := await tb.get("STATUS")) & 1:
                pass
            assert status >> 4 == 1
            await granting
            while not last and dut.old_segments.value == 1:
                await RisingEdge(dut.clk)
        granting = cocotb.start_soon(tb.grant(0))
        await tb.put("THRESHOLD", seed)
        await tb.put("COMMIT", 1)
        await granting
        stride = words[0, 0][2] ^ CONFIG.beat_bytes
        await tb.put("SEGMENT_STRIDE", 0, 0, stride)
        granting = cocotb.start_soon(tb.grant(0))
        taken, before = tb.taken["aw"], dict(tb.segments())
        waiting = cocotb.start_soon(tb.put("COMMIT", 1))
        reads, changes = 0, tb.bank_changes
        # Not when they are in use again, after this very commit.
        while dut.old_segments.value == 1 and tb.bank_changes == changes:
            assert tb.taken["aw"] == taken, "taken while the other set is in use"
            assert tb.segments() == before
            assert await tb.get("THRESHOLD") == seed
            reads += 1
        await waiting
        await granting
        await tb.cycles(2)
        words[0, 0][2] = stride
        assert reads
        assert tb.segments() == values_of(words)


@bench
async def reads_and_writes_at_once(dut) -> None:
    """Both directions busy, several queued: each is answered, in order, with its own data."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        values = [rng.getrandbits(32) for _ in range(40)]

        async def writer(values=values, rng=rng):
            for value in values:
                count = rng.choice((2, 3, 4))
                start = rng.randrange(5 - count)
                data = value.to_bytes(4, "little")[start : start + count]
                address = MAP["SCRATCH"].at() + start
                assert (await tb.master.write(address, data)).resp == OKAY
                tb.scratch.append(
                    (tb.scratch[-1] & ~(((1 << 8 * count) - 1) << 8 * start))
                    | int.from_bytes(data, "little") << 8 * start
                )

        async def reader(rng=rng):
            for _ in range(60):
                low = len(tb.scratch)
                which = rng.randrange(3)
                if which == 0:
                    answer = await tb.master.read(MAP["SCRATCH"].at(), 4)
                    got = int.from_bytes(answer.data, "little")
                    assert answer.resp == OKAY
                    # The write in progress may have taken effect before its answer.
                    expected = tb.scratch[low - 1 :]
                    if got not in expected:
                        await tb.cycles(60)
                        expected = tb.scratch[low - 1 :]
                    assert got in expected
                elif which == 1:
                    answer = await tb.master.read(MAP["IDENTITY"].at(), 8)
                    assert answer.data[:4] == b"OMTS" and answer.resp == OKAY
                else:
                    assert (await tb.master.read(0x3000, 4)).resp == SLVERR

        async def stranger():
            for i in range(40):  # no two neighbours are answered alike
                address, response = ((MAP["IRQ_ENABLE"].at(), OKAY), (0x3000, SLVERR))[i % 2]
                assert (await tb.master.write(address, bytes(4))).resp == response

        tb.scratch = [0]
        await gather(writer(), reader(), reader(), stranger(), stranger())
        assert await tb.get("SCRATCH") == tb.scratch[-1]
        assert tb.taken["aw"] == tb.taken["w"] == tb.taken["b"] >= 120


@bench
async def counters_are_exact(dut) -> None:
    """No event is lost at any rate, and a read while counting is of a moment within it."""
    tb = TB(dut)
    count, modulus = len(COUNTERS), 1 << COUNTER_WIDTH
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng

        async def drive(rng=rng):
            while True:
                kind = rng.randrange(4)
                rates = [rng.choice((0, 0.02, 0.5, 1)) for _ in range(count)]
                for _ in range(rng.choice((1, 40, 200))):
                    if kind == 0:
                        value = (1 << count) - 1
                    elif kind == 1:
                        value = 0
                    else:
                        value = sum((rng.random() < p) << i for i, p in enumerate(rates))
                    dut.increment.value = value
                    await RisingEdge(dut.clk)

        driver = cocotb.start_soon(drive())
        for _ in range(25):
            i = rng.randrange(count)
            low = tb.counts[i]
            got = await tb.get("COUNTER", i)
            assert (got - low) % modulus <= tb.counts[i] - low < modulus, COUNTERS[i].name
        driver.cancel()
        dut.increment.value = (1 << count) - 1  # longer than any small register lasts
        await tb.cycles(3 * count + rng.randrange(count))
        dut.increment.value = 0
        await RisingEdge(dut.clk)
        order = list(range(count))
        rng.shuffle(order)
        for i in order:
            got = await tb.get("COUNTER", i)
            assert tb.counts[i] > 3 * count and got == tb.counts[i] % modulus, COUNTERS[i].name


@bench
async def each_counter_has_its_own_bit(dut) -> None:
    """Counter i is bit i of ``increment``, in the documented order; also long bursts."""
    tb = TB(dut)
    await tb.reset(SEEDS[0], stalls=False)
    for i, counter in enumerate(COUNTERS):
        assert COUNTER_INDEX[counter.name] == i
        dut.increment.value = 1 << i
        await tb.cycles(i + 1)
    dut.increment.value = 1 << COUNTER_INDEX["beats"]
    await tb.cycles(1000)
    dut.increment.value = 0
    for i, counter in enumerate(COUNTERS):
        expected = (i + 1 + 1000 * (counter.name == "beats")) % (1 << COUNTER_WIDTH)
        assert await tb.get("COUNTER", i) == expected


@bench
async def counter_reads_take_a_round_at_most(dut) -> None:
    """And any other read 4 cycles from its address to its answer."""
    tb = TB(dut)
    await tb.reset(SEEDS[0], stalls=False)
    await tb.cycles(16 * CONFIG.num_layers)  # the shadow registers are set

    async def latency(address: int) -> int:
        await tb.ar.send(AxiLiteARTransaction(araddr=address, arprot=0))
        waited = 0
        while dut.s_axil_arvalid.value == 0:
            await RisingEdge(dut.clk)
        while dut.s_axil_rvalid.value == 0:
            await RisingEdge(dut.clk)
            waited += 1
        await tb.r.recv()
        return waited

    slowest = 0
    for i in itertools.chain(range(len(COUNTERS)), range(len(COUNTERS))):
        await tb.cycles(i)
        slowest = max(slowest, await latency(MAP["COUNTER"].at(i)))
    assert slowest <= 4 + len(COUNTERS)
    assert await latency(MAP["SCRATCH"].at()) == 4


@bench
async def an_event_wins_over_its_clear(dut) -> None:
    """A pulse in the cycle of the clear, or later, stays; irq is the OR of the enabled bits."""
    tb = TB(dut)
    same_cycle = 0
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        for _ in range(25):
            cause, enable = rng.randrange(3), rng.randrange(32)
            await tb.put("IRQ_ENABLE", enable)
            await tb.put("IRQ_STATUS", 31)
            assert await tb.get("IRQ_STATUS") == 0 and dut.irq.value == 0
            delay = rng.randrange(14)

            async def pulse(cause=cause, delay=delay) -> int:
                await tb.cycles(delay)
                await tb.pulse(CAUSES[cause])
                return int(dut.cycle.value)

            pulsing = cocotb.start_soon(pulse())
            await tb.put("IRQ_STATUS", 31)
            pulsed, cleared = await pulsing, tb.last_taken["aw"]
            same_cycle += pulsed == cleared
            await tb.cycles(2)
            expected = (pulsed >= cleared) << cause
            assert await tb.get("IRQ_STATUS") == expected, (pulsed, cleared)
            assert int(dut.irq.value) == bool(expected & enable)
    assert same_cycle or len(SEEDS) == 1


@bench
async def the_cycle_count_reads_whole(dut) -> None:
    """CYCLE_LOW is the cycle of a moment within the read."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed)
        for _ in range(10):
            low = int(dut.cycle.value)
            got = await tb.get("CYCLE_LOW")
            assert low <= got <= int(dut.cycle.value)


@cocotb.test(timeout_time=4, timeout_unit="ms", skip=COUNTER_WIDTH == 32)
async def a_counter_warns_before_it_wraps(dut) -> None:
    """When half of the range is reached, once each time round; counting goes on."""
    tb = TB(dut)
    half = 1 << (COUNTER_WIDTH - 1)
    for seed in SEEDS[:4]:
        await tb.reset(seed)
        rng = tb.rng
        bit = rng.randrange(len(COUNTERS))
        await tb.put("IRQ_ENABLE", 8)
        count = 0
        for target in (half - 1, half, half + 5, 2 * half - 1, 2 * half, 3 * half - 1, 3 * half):
            while count < target:
                dut.increment.value = 1 << bit
                await RisingEdge(dut.clk)
                count += 1
                if rng.random() < 0.02:
                    dut.increment.value = 0
                    await tb.cycles(rng.randrange(40))
            dut.increment.value = 0
            await RisingEdge(dut.clk)
            assert await tb.get("COUNTER", bit) == target % (2 * half)
            warned = target in (half, 3 * half)
            assert await tb.get("IRQ_STATUS") == 8 * warned, target
            assert int(dut.irq.value) == warned
            await tb.put("IRQ_STATUS", 8)
        others = [await tb.get("COUNTER", i) for i in range(len(COUNTERS)) if i != bit]
        assert not any(others)


@bench
async def cycle_high_belongs_to_cycle_low(dut) -> None:
    """Across 2^32 the two words read as one number."""
    tb = TB(dut)
    await tb.reset(SEEDS[0])
    tb.cycle_moves = True
    for start in ((1 << 32) - 20, (7 << 32) - 9, (1 << 40) - 30):
        await Timer(2, unit="ns")
        dut.registers.cycle.value = start
        await tb.cycles(2)
        for _ in range(12):
            low = int(dut.cycle.value)
            word = await tb.get("CYCLE_LOW")
            high = int(dut.cycle.value)
            await tb.cycles(tb.rng.randrange(9))
            for _ in range(tb.rng.randrange(3)):
                await tb.get("SCRATCH")  # does not sample CYCLE_HIGH
            got = await tb.get("CYCLE_HIGH") << 32 | word
            assert (got - low) % (1 << 40) <= (high - low) % (1 << 40), hex(got)
