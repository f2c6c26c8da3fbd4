# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The buffer's write manager against a reference written from its contract, and against AxiRam.

The reference (:class:`Reference`) knows every beat that was handed over, in order; each burst must
be the next of them, cut where the contract says and nowhere else. The memory answers bursts of
different IDs in any order, at any time, sometimes with an error.
"""

from __future__ import annotations

import json
import os
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cocotb
import pytest
from amaranth.hdl import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiRamWrite, AxiWriteBus

from lint_verilog import lint_text
from simulation import pack, run_bench, seeds
from stmoe.axi_flat import connect_axi4_write, flat_axi4_write_ports
from stmoe.buffer_writer import BufferWriter
from stmoe.payloads import buffer_place_layout, fill_layout
from stmoe.top import generate
from stmoe_golden.config import EngineConfig, preset

PAGE = 4096
SLVERR, DECERR = 2, 3

CONFIGS = {
    # Slots of more than two pages, bursts that are no power of two, six transfers of three bits.
    "narrow": preset("tiny").replace(
        buffer="axi", expert_bytes=9000, max_burst=20, max_outstanding=5, prefetch_outstanding=2
    ),
    # A burst of 256 beats is a quarter of a page; the slot ends in the middle of a beat.
    "half": preset("tiny").replace(
        buffer="axi", axi_data_width=32, expert_bytes=8198, max_burst=256, axi_addr_width=32
    ),
    # Bursts as long as a page.
    "widest": preset("gpt_oss_20b").replace(
        buffer="axi", axi_data_width=512, expert_bytes=9000, max_burst=256, axi_addr_width=48
    ),
    # The least of everything.
    "least": preset("tiny").replace(
        buffer="axi",
        num_layers=1,
        top_k=1,
        num_transfers=1,
        max_outstanding=1,
        prefetch_outstanding=1,
        max_burst=1,
        expert_bytes=64,
    ),
}


class FlatWriter(wiring.Component):
    """:class:`BufferWriter` with AXI's flat names, and payloads as numbers."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.block = BufferWriter(config)
        plain = ("fill_transfer", "fill_last", "drop", "abort", "owed", "failed", "moved", "idle")
        members = dict(self.block.signature.members)
        super().__init__(
            {
                "fill_payload": In(fill_layout(config).size),
                "fill_valid": In(1),
                "fill_ready": Out(1),
                "place": In(buffer_place_layout(config).size),
                **{name: members[name] for name in plain},
                **flat_axi4_write_ports(config),
            }
        )
        self.plain = {name: members[name].flow for name in plain}

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.block = block = self.block
        connect_axi4_write(m, self.config, self, block.axi)
        m.d.comb += [
            Cat(block.fill.payload).eq(self.fill_payload),
            block.fill.valid.eq(self.fill_valid),
            self.fill_ready.eq(block.fill.ready),
            Cat(block.place).eq(self.place),
        ]
        for name, flow in self.plain.items():
            ours, theirs = getattr(self, name), getattr(block, name)
            m.d.comb += theirs.eq(ours) if flow is In else ours.eq(theirs)
        return m


@dataclass(eq=False)
class Beat:
    """A beat that was handed over."""

    transfer: int
    slot: int
    offset: int
    data: int
    ends: bool
    """A burst may end here though the next beat continues it: a read burst does, or its load was
    cancelled or given up."""


@dataclass(eq=False)
class Load:
    """What the source has to send of one transfer."""

    transfer: int
    slot: int
    words: list[int]
    sent: int = 0
    in_burst: int = 0
    """Beats left of the read burst under way."""
    stop: int = -1
    """Beats after which it is cancelled; -1: never."""
    passes: int = 1
    faulty: bool = False
    read_bursts: int = 0


@dataclass(eq=False)
class Written:
    """A burst on its way through the memory."""

    transfer: int
    address: int
    beats: list[Beat]
    arrived: int = 0
    data: list[int] = field(default_factory=list)


class Reference:
    """What the contract allows, from the handshakes of the cycles before."""

    def __init__(self, config: EngineConfig, base: int, stride: int) -> None:
        self.config, self.base, self.stride = config, base, stride
        self.handed: deque[Beat] = deque()
        self.addressed: deque[Written] = deque()
        self.waiting: list[Written] = []
        self.early: deque[tuple[int, int]] = deque()
        self.owed = [0] * config.transfers
        self.outstanding = 0
        self.memory: dict[int, int] = {}
        self.bursts = 0

    def address(self, slot: int, offset: int) -> int:
        return self.base + slot * self.stride + offset * self.config.beat_bytes

    def aw(self, transfer: int, address: int, beats: int) -> None:
        """The next ``beats`` of those handed over, one behind the other, and no cut for nothing."""
        config = self.config
        assert beats <= config.burst_beats and len(self.handed) >= beats, "too long"
        burst = [self.handed.popleft() for _ in range(beats)]
        first = burst[0]
        for i, beat in enumerate(burst):
            assert (beat.transfer, beat.slot) == (first.transfer, first.slot)
            assert beat.offset == first.offset + i
        assert (transfer, address) == (first.transfer, self.address(first.slot, first.offset))
        end = address + beats * config.beat_bytes
        assert address // PAGE == (end - 1) // PAGE, "it crosses 4 KiB"
        last = burst[-1]
        reason = last.ends or beats == config.burst_beats or end % PAGE == 0
        if not reason:
            assert self.handed, "cut before the next beat has come"
            following = self.handed[0]
            reason = (following.transfer, following.offset) != (last.transfer, last.offset + 1)
        assert reason, f"cut for nothing after {last}"
        self.addressed.append(Written(transfer, address, burst))
        self.outstanding += 1
        assert self.outstanding <= config.max_outstanding
        self.bursts += 1

    def w(self, word: int, last: int) -> None:
        """The next beat of the bursts in the order of their addresses (which may come later)."""
        self.early.append((word, last))

    def settle(self) -> None:
        """Data to addresses."""
        while self.early and self.addressed:
            burst = self.addressed[0]
            word, last = self.early.popleft()
            assert word == burst.beats[burst.arrived].data
            burst.arrived += 1
            burst.data.append(word)
            assert bool(last) == (burst.arrived == len(burst.beats))
            if last:
                self.waiting.append(self.addressed.popleft())

    def answerable(self) -> list[Written]:
        """The oldest burst of each ID of which all data has come."""
        oldest: dict[int, Written] = {}
        for burst in self.waiting:
            oldest.setdefault(burst.transfer, burst)
        return list(oldest.values())

    def answered(self, burst: Written) -> None:
        """Only now the data is in the memory."""
        self.waiting.remove(burst)
        for i, word in enumerate(burst.data):
            self.memory[burst.address + i * self.config.beat_bytes] = word
        self.owed[burst.transfer] -= len(burst.beats)
        self.outstanding -= 1


class Source:
    """Loads that are sent, cancelled, sent again, in order or interleaved by beats."""

    def __init__(self, rng: random.Random, config: EngineConfig, loads: int, plain: bool) -> None:
        self.rng, self.config, self.left, self.plain = rng, config, loads, plain
        self.loads: dict[int, Load] = {}
        self.interleave = not plain and rng.random() < 0.5
        self.current: Load | None = None
        self.done = 0

    def start(self) -> None:
        rng, config = self.rng, self.config
        free = [t for t in range(config.transfers) if t not in self.loads]
        if not self.left or not free:
            return
        self.left -= 1
        taken = {load.slot for load in self.loads.values()}
        slot = rng.choice([s for s in range(config.num_slots) if s not in taken])
        most = config.slot_beats
        # Mostly short, else interleaved beats take for ever; some as long as a slot.
        beats = most if self.plain else rng.randint(1, rng.choice((min(most, 48), most // 2, most)))
        words = [rng.getrandbits(config.axi_data_width) for _ in range(beats)]
        load = Load(rng.choice(free), slot, words)
        if not self.plain:
            load.stop = rng.randrange(beats + 1) if rng.random() < 0.3 else -1
            load.passes = rng.choice((1, 1, 2))
        self.loads[load.transfer] = load

    def next(self) -> Load | None:
        """Whose beat comes next: within a read burst the same, unless interleaved."""
        if self.current is not None and self.current.in_burst and not self.interleave:
            return self.current
        ready = [load for load in self.loads.values() if load.sent < len(load.words)]
        self.current = self.rng.choice(ready) if ready else None
        load = self.current
        if load is not None and not load.in_burst:
            most = min(self.config.burst_beats, len(load.words) - load.sent)
            load.in_burst = most if self.plain else self.rng.randint(1, most)
            load.read_bursts += 1
        return load


def pauses(rng: random.Random, share: float) -> Iterator[bool]:
    """A channel's pauses, each cycle by itself."""
    while True:
        yield rng.random() < share


def run(name: str, testcase: str, count: int) -> None:
    run_bench(
        FlatWriter(CONFIGS[name]),
        f"buffer_writer_{name}",
        Path(__file__).stem,
        testcase=testcase,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds(count))},
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_beat_is_written_once_and_owed_until_answered(name: str) -> None:
    """Stalls on every channel, answers in any order, errors, cancels, retries."""
    run(name, "random_loads", 10)


@pytest.mark.parametrize("name", ["narrow", "widest"])
def test_one_beat_in_every_cycle(name: str) -> None:
    """With AW and W taken at once the source never waits; a read burst is one write burst."""
    run(name, "full_throughput", 1)


def test_axi_ram_holds_what_was_written() -> None:
    """cocotbext-axi's memory, with pauses on all of its channels."""
    run("narrow", "axi_ram", 2)


def test_verilog_has_the_write_port_in_place_of_fill_and_is_clean() -> None:
    text = generate(preset("tiny").replace(buffer="axi"))
    assert lint_text(text, "stmoe_engine") == ""
    ports = text[text.index("module stmoe_engine(") :]
    ports = ports[: ports.index(";")]
    assert all(f"m_axi_buf_{name}" in ports for name in ("awaddr", "wstrb", "bid"))
    assert "m_axis_fill" not in ports


def test_only_a_configuration_is_taken() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        BufferWriter(3)


# cocotb ---------------------------------------------------------------------------------------

CONFIG = CONFIGS[os.environ.get("CONFIG", "narrow")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))

LOADS = 8
"""In each run."""

bench = cocotb.test(timeout_time=5, timeout_unit="ms")


class Bench:
    """Source, reference and (unless ``ram``) memory, stepped once a cycle."""

    def __init__(self, dut, *, ram: bool = False) -> None:
        self.dut, self.ram = dut, ram
        dut.rst.value = 1
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    async def run(self, seed: int, loads: int, *, plain: bool = False) -> None:
        dut, config, rng = self.dut, CONFIG, random.Random(seed)
        dut._log.warning("seed %d", seed)
        stride = rng.choice((1, 1, 2, 5)) * config.least_stride
        room = (1 << config.axi_addr_width) - config.num_slots * stride
        base = (room if seed % 3 == 0 else rng.randrange(min(room, 1 << 31))) // PAGE * PAGE
        self.ref = ref = Reference(config, base, stride)
        self.source = source = Source(rng, config, loads, plain)
        place = {"base": base // PAGE, "stride": stride // PAGE}
        dut.place.value = pack(buffer_place_layout(config), place)
        for name in ("fill_valid", "drop", "abort"):
            getattr(dut, name).value = 0
        if not self.ram:
            for name in ("awready", "wready", "bvalid"):
                getattr(dut, f"m_axi_buf_{name}").value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        rates = {c: 1.0 if plain else rng.choice((1, 1, 0.5, 0.3)) for c in ("fill", "aw", "w")}
        rates["b"] = 1.0 if plain else rng.choice((1, 0.5, 0.25))
        errors = 0 if plain else rng.choice((0, 0.1))
        offered: tuple[Load, Beat] | None = None
        answering: Written | None = None
        latest: Beat | None = None
        self.stalled = self.beats = self.begun = 0
        quiet, ready = 0, {"aw": 0, "w": 0}
        stood: dict[str, int] = {}
        self.cycle = 0
        while quiet < 20:
            await RisingEdge(dut.clk)
            self.cycle += 1
            assert self.cycle < 60_000, "it hangs"
            # The cycle that ends here.
            owed = sum((n > 0) << t for t, n in enumerate(ref.owed))
            assert int(dut.owed.value) == owed, f"cycle {self.cycle}"
            assert int(dut.idle.value) == (owed == 0)
            if offered is not None:
                self.stalled += not int(dut.fill_ready.value)
                if int(dut.fill_ready.value):
                    load, beat = offered
                    ref.handed.append(beat)
                    ref.owed[beat.transfer] += 1
                    latest, offered = beat, None
                    self.beats += 1
            for channel in ("aw", "w"):
                names = ("id", "addr", "len") if channel == "aw" else ("data", "last", "strb")
                if not int(getattr(dut, f"m_axi_buf_{channel}valid").value):
                    assert channel not in stood, f"{channel} was withdrawn"
                    continue
                values = [int(getattr(dut, f"m_axi_buf_{channel}{n}").value) for n in names]
                assert stood.get(channel, values) == values, f"{channel} has changed"
                stood[channel] = values
                taken = ready[channel]
                if self.ram:
                    taken = int(getattr(dut, f"m_axi_buf_{channel}ready").value)
                if not taken:
                    continue
                del stood[channel]
                if channel == "aw":
                    ref.aw(values[0], values[1], values[2] + 1)
                else:
                    assert values[2] == (1 << config.beat_bytes) - 1
                    ref.w(values[0], values[1])
            failed = 0
            if self.ram:
                if int(dut.m_axi_buf_bvalid.value):
                    index = int(dut.m_axi_buf_bid.value)
                    ref.answered(next(b for b in ref.answerable() if b.transfer == index))
            elif answering is not None:
                assert int(dut.m_axi_buf_bready.value) == 1
                failed = (self.resp >= SLVERR) << answering.transfer
                self.source.loads[answering.transfer].faulty |= failed > 0
                ref.answered(answering)
                answering = None
            assert int(dut.failed.value) == failed
            ref.settle()
            self.finish(offered[0] if offered else None)

            # The cycle that begins here.
            source.start()
            drop, abort = 0, rng.random() < (0 if plain else 0.005)
            if abort and latest is not None and offered is None:
                latest.ends = True
            abort &= offered is None
            if offered is None and rng.random() < rates["fill"] and not abort:
                load = source.next()
                if load is not None:
                    if 0 <= load.stop <= load.sent:
                        # Discarded: no beat on `fill`, the load is over where it is.
                        drop, load.words = 1, load.words[: load.sent]
                        load.passes, load.in_burst = 1, 0
                        dut.fill_transfer.value = load.transfer
                        for beat in reversed(ref.handed):
                            if beat.transfer == load.transfer:
                                beat.ends = True
                                break
                    else:
                        offset, last = load.sent, load.in_burst == 1
                        beat = Beat(load.transfer, load.slot, offset, load.words[offset], last)
                        load.sent, load.in_burst = load.sent + 1, load.in_burst - 1
                        offered = load, beat
                        fields = {"slot": load.slot, "offset": offset, "data": beat.data}
                        dut.fill_payload.value = pack(fill_layout(config), fields)
                        dut.fill_transfer.value = load.transfer
                        dut.fill_last.value = int(last)
            dut.fill_valid.value = int(offered is not None)
            dut.drop.value = drop
            dut.abort.value = int(abort)
            if not self.ram:
                for channel in ready:
                    ready[channel] = int(rng.random() < rates[channel])
                    getattr(dut, f"m_axi_buf_{channel}ready").value = ready[channel]
                can = ref.answerable()
                if can and rng.random() < rates["b"]:
                    answering = rng.choice(can)
                    self.resp = rng.choice((SLVERR, DECERR)) if rng.random() < errors else 0
                    dut.m_axi_buf_bid.value = answering.transfer
                    dut.m_axi_buf_bresp.value = self.resp
                dut.m_axi_buf_bvalid.value = int(answering is not None)
            quiet = 0 if source.left or source.loads or offered is not None else quiet + 1

    def finish(self, offered: Load | None) -> None:
        """Loads of which nothing is owed: sent again, or checked and over."""
        ref, source = self.ref, self.source
        for load in list(source.loads.values()):
            if load is offered or load.sent < len(load.words) or ref.owed[load.transfer]:
                continue
            load.passes -= 1
            if load.passes:
                load.sent = 0
                continue
            for offset, word in enumerate(load.words):
                address = ref.address(load.slot, offset)
                assert self.content(address) == word, f"slot {load.slot}, beat {offset}"
            self.begun += load.read_bursts
            source.done += 1
            del source.loads[load.transfer]

    def content(self, address: int) -> int | None:
        return self.ref.memory.get(address)


@bench
async def random_loads(dut) -> None:
    tb = Bench(dut)
    for seed in SEEDS:
        await tb.run(seed, LOADS)
        assert tb.source.done == LOADS and not tb.ref.handed and not tb.ref.waiting


@bench
async def full_throughput(dut) -> None:
    tb = Bench(dut)
    await tb.run(1, 30, plain=True)
    assert tb.stalled == 0 and tb.beats == 30 * CONFIG.slot_beats
    # Every read burst is one write burst, and one more where it is cut at a page's end.
    pages = CONFIG.slot_beats * CONFIG.beat_bytes // PAGE
    assert tb.begun <= tb.ref.bursts <= tb.begun + 30 * pages


@bench
async def axi_ram(dut) -> None:
    tb = Bench(dut, ram=True)
    bus = AxiWriteBus.from_prefix(dut, "m_axi_buf")
    ram = AxiRamWrite(bus, dut.clk, dut.rst, size=1 << CONFIG.axi_addr_width)
    tb.content = lambda address: int.from_bytes(ram.read(address, CONFIG.beat_bytes), "little")
    for seed in SEEDS:
        draw = random.Random(seed)
        for channel in (ram.aw_channel, ram.w_channel):
            channel.set_pause_generator(pauses(draw, 0.3))
        ram.b_channel.set_pause_generator(pauses(draw, 0.5))
        await tb.run(seed, LOADS)
        assert tb.source.done == LOADS
