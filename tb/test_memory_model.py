# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The memory model: what it answers, when, in which order, and how it fails."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict, deque

import cocotb
import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import pack, run_bench, seeds, unpack
from stmoe.harness.memory_model import MemoryModel, address_of, content, half_at, word_at
from stmoe.harness.memory_model import beat_at as python_beat
from stmoe.payloads import axi4_read_signature
from stmoe_golden.config import preset

CONFIG = preset("tiny").replace(axi_data_width=128)
DEPTH = 6
BEAT = CONFIG.beat_bytes
OKAY, SLVERR = 0, 2
SETTINGS = {
    "latency": 1,
    "beats_numerator": 1,
    "beats_denominator": 1,
    "reorder": 0,
    "interleave": 0,
    "error_address": 0,
    "error_count": 0,
    "stuck": 0,
    "stuck_address": 0,
}


def payload_of(name: str):
    """Payload layout of an AXI channel."""
    members = axi4_read_signature(CONFIG).members
    return members[name].signature.members["payload"].shape


def beat_at(address: int) -> int:
    """The beat at ``address``, from the function of the address that is documented."""
    beat = 0
    for i in reversed(range(BEAT // 8)):
        word = address // 8 + i
        mixed = word ^ word << 22 ^ word << 44 ^ 0x9E3779B97F4A7C15
        beat = beat << 64 | mixed & (1 << 64) - 1
    return beat


class Bench:
    """Sends addresses, takes beats and checks them; ``log`` is what was seen.

    Every beat is checked as it is taken: it must be the next one of the oldest burst of its ID.
    """

    def __init__(self, dut, rng: random.Random):
        self.dut = dut
        self.rng = rng
        self.ar, self.r = payload_of("ar"), payload_of("r")
        self.now = 0
        self.to_send: deque[tuple[int, int, int]] = deque()
        self.bursts: dict[int, deque] = defaultdict(deque)
        self.order: deque = deque()
        self.beats: list[tuple[int, int, int]] = []  # cycle, ID, address
        self.first_delays: list[int] = []
        self.errors = 0
        self.overtaken = 0
        self.interleaved = 0
        self.stalled = None
        self.valid_cycles = 0
        self.set_values: dict[str, int] = {}

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self.set_values[name] = value
            getattr(self.dut, name).value = value

    async def reset(self, **settings: int) -> None:
        self.set(**{**SETTINGS, **settings})
        self.dut.axi__ar__valid.value = 0
        self.dut.axi__r__ready.value = 0
        self.dut.rst.value = 1
        await FallingEdge(self.dut.clk)
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0

    def ask(self, address: int, beats: int, index: int) -> None:
        self.to_send.append((address, beats, index))

    def ask_at_random(self) -> None:
        beats = self.rng.choice((1, 2, self.rng.randint(1, 16)))
        page = self.rng.randrange((1 << CONFIG.axi_addr_width) // 4096)
        place = self.rng.randint(0, 4096 // BEAT - beats)
        self.ask(page * 4096 + place * BEAT, beats, self.rng.randrange(1 << CONFIG.transfer_bits))

    @property
    def pending(self) -> bool:
        return bool(self.to_send) or any(self.bursts.values())

    async def cycle(self, *, ask: bool = True, take: bool = True) -> None:
        dut = self.dut
        sending = self.to_send[0] if self.to_send and (ask or self.asking) else None
        self.asking = sending is not None
        dut.axi__ar__valid.value = int(sending is not None)
        if sending is not None:
            address, beats, index = sending
            dut.axi__ar__payload.value = pack(
                self.ar, {"id": index, "addr": address, "len": beats - 1}
            )
        dut.axi__r__ready.value = int(take)
        await ReadOnly()
        outstanding = sum(len(bursts) for bursts in self.bursts.values())
        assert int(dut.outstanding.value) == outstanding
        accepts = outstanding < DEPTH and not self.set_values["stuck_address"]
        assert int(dut.axi__ar__ready.value) == accepts, "ar.ready"
        valid = int(dut.axi__r__valid.value)
        self.valid_cycles += valid
        beat = int(dut.axi__r__payload.value) if valid else None
        if self.stalled is not None:
            assert beat == self.stalled, "a beat changed before it was taken"
        self.stalled = None if take else beat
        if valid and take:
            self.check(unpack(self.r, beat))
        if sending is not None and accepts:
            self.to_send.popleft()
            self.asking = False
            burst = {"address": address, "beats": beats, "place": 0, "since": self.now}
            self.bursts[index].append(burst)
            self.order.append(burst)
        await FallingEdge(dut.clk)
        self.now += 1

    asking = False

    def check(self, seen: dict) -> None:
        assert self.bursts[seen["id"]], f"a beat of ID {seen['id']}, which has no burst"
        burst = self.bursts[seen["id"]][0]
        address = burst["address"] + burst["place"] * BEAT
        if burst["place"] == 0:
            self.first_delays.append(self.now - burst["since"])
            assert self.first_delays[-1] >= max(1, self.set_values["latency"])
        others = [other for other in self.order if other is not burst]
        self.overtaken += burst is not self.order[0] and burst["place"] == 0
        self.interleaved += any(other["place"] for other in others)
        if not self.set_values["reorder"]:
            assert burst is self.order[0], "out of order"
        if not self.set_values["interleave"]:
            assert not any(other["place"] for other in others), "interleaved"
        wrong = (
            address == self.set_values["error_address"] // BEAT * BEAT
            and self.errors < self.set_values["error_count"]
        )
        self.errors += wrong
        inverted = (1 << CONFIG.axi_data_width) - 1 if wrong else 0
        assert seen["resp"] == (SLVERR if wrong else OKAY), f"response at {address:#x}"
        assert seen["data"] == beat_at(address) ^ inverted, f"data at {address:#x}"
        burst["place"] += 1
        assert seen["last"] == (burst["place"] == burst["beats"])
        if seen["last"]:
            self.bursts[seen["id"]].popleft()
            self.order.remove(burst)
        self.beats.append((self.now, seen["id"], address))

    async def drain(self, limit: int = 5000, **stalls) -> None:
        for _ in range(limit):
            if not self.pending:
                return
            await self.cycle(**{k: self.rng.random() < share for k, share in stalls.items()})
        raise AssertionError(f"not answered within {limit} cycles")


async def bench_of(dut, seed: int = 1, **settings: int) -> Bench:
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    bench = Bench(dut, random.Random(seed))
    await bench.reset(**settings)
    return bench


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def random_reads(dut):
    """Seeded random bursts, stalls and settings."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    overtaken = interleaved = errors = 0
    for seed in json.loads(os.environ["SEEDS"]):
        rng = random.Random(seed)
        bench = Bench(dut, rng)
        denominator = rng.randint(1, 5)
        reorder = seed % 2
        await bench.reset(
            latency=rng.choice((0, 1, 2, rng.randint(3, 60))),
            beats_numerator=rng.randint(1, denominator),
            beats_denominator=denominator,
            reorder=reorder,
            interleave=int(reorder and seed % 3 == 0),
        )
        try:
            for _ in range(60):
                bench.ask_at_random()
            address, beats, _ = rng.choice(bench.to_send)
            bench.set(error_address=address + rng.randrange(beats * BEAT), error_count=1)
            await bench.drain(ask=rng.choice((1.0, 0.3)), take=rng.choice((1.0, 0.5)))
            assert bench.errors == 1
        except AssertionError as error:
            raise AssertionError(f"SEED={seed}: {error}") from error
        overtaken += bench.overtaken
        interleaved += bench.interleaved
        errors += bench.errors
    print(f"random_reads: {overtaken} bursts overtook, {interleaved} beats interleaved")
    if len(json.loads(os.environ["SEEDS"])) >= 3:
        assert overtaken > 20 and interleaved > 20


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def latency_and_bandwidth(dut):
    """Exact latency when idle, no gap at full speed, and otherwise the rate that is set."""
    bench = await bench_of(dut)
    for latency in (0, 1, 2, 17, 100):
        bench.set(latency=latency)
        bench.first_delays.clear()
        bench.ask(0x123450, 3, 1)
        await bench.drain()
        assert bench.first_delays == [max(1, latency)]

    for latency, beats in ((1, 2), (1, 16), (80, 16)):
        bench.set(latency=latency)
        bench.beats.clear()
        for number in range(40):
            bench.ask(number * 4096, beats, number % 8)
        await bench.drain()
        cycles = bench.beats[-1][0] - bench.beats[0][0] + 1
        if latency < DEPTH * beats:
            assert cycles == len(bench.beats) == 40 * beats, "a gap between beats"

    for numerator, denominator in ((1, 2), (2, 3), (3, 7), (1, 16), (5, 5), (9, 2), (250, 999)):
        bench.set(latency=5, beats_numerator=numerator, beats_denominator=denominator)
        bench.beats.clear()
        for number in range(20):
            bench.ask(number * 4096, 16, number % 8)
        await bench.drain(limit=20000)
        cycles = bench.beats[-1][0] - bench.beats[0][0]
        expected = max(1.0, denominator / numerator) * (len(bench.beats) - 1)
        assert abs(cycles - expected) <= denominator / numerator + 1, (numerator, denominator)
    bench.set(beats_numerator=0)
    bench.ask(0, 4, 0)
    taken = len(bench.beats)
    for _ in range(100):
        await bench.cycle()
    assert len(bench.beats) <= taken + 1
    bench.set(beats_numerator=1, beats_denominator=1)
    await bench.drain()


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def errors_and_silence(dut):
    """SLVERR on the beat asked for, as often as asked for; silence while it is stuck."""
    bench = await bench_of(dut)
    for count in (1, 3):
        bench.set(error_address=0x8021, error_count=count)
        bench.errors = 0
        for number in range(5):
            bench.ask(0x8000, 4, number % 3)
            bench.ask(0x9000, 4, number % 3)
        await bench.drain(take=0.5)
        assert bench.errors == count
        bench.set(error_count=0)
        await bench.cycle()

    bench.ask(0x4000, 8, 2)
    for _ in range(4):
        await bench.cycle()
    await bench.cycle(take=False)
    assert bench.stalled is not None
    bench.set(stuck=1)
    await bench.cycle(take=False)  # what stands on the bus stays
    await bench.cycle()
    taken, valid = len(bench.beats), bench.valid_cycles
    for _ in range(50):
        await bench.cycle()
    assert len(bench.beats) == taken and bench.valid_cycles == valid, "a beat while stuck"
    bench.set(stuck=0)
    await bench.drain()
    bench.set(stuck_address=1)
    bench.ask(0x4000, 8, 2)
    for _ in range(20):
        await bench.cycle()
    assert bench.pending
    bench.set(stuck_address=0)
    await bench.drain()


@pytest.mark.parametrize("scene", ["random_reads", "latency_and_bandwidth", "errors_and_silence"])
def test_memory(scene):
    run_bench(
        MemoryModel(CONFIG, depth=DEPTH),
        "memory_model",
        "test_memory_model",
        testcase=scene,
        env={"SEEDS": seeds(12)},
    )


@pytest.mark.parametrize("width", [32, 64, 128, 256, 512])
def test_content_in_hardware_is_that_of_python_and_tells_its_address(width):
    m = Module()
    address, beat, back = Signal(48), Signal(width), Signal(64)
    m.d.comb += [beat.eq(content(address, data_width=width)), back.eq(address_of(beat))]
    rng = random.Random(1)
    bits = 34 if width == 32 else 48
    beat_bits = (width // 8 - 1).bit_length()
    addresses = [0, (1 << bits) - width // 8, *(1 << bit for bit in range(beat_bits, bits))]
    addresses += [rng.randrange(1 << bits - beat_bits) << beat_bits for _ in range(200)]

    async def testbench(ctx):
        for value in addresses:
            ctx.set(address, value)
            got = ctx.get(beat)
            words = [word_at(value + 8 * i) << 64 * i for i in range(width // 64)]
            assert got == (sum(words) if words else half_at(value)) == python_beat(value, width)
            assert ctx.get(back) == value

    simulator = Simulator(m)
    simulator.add_testbench(testbench)
    simulator.run()


def test_no_two_words_are_alike():
    rng = random.Random(1)
    near = {word_at(8 * word) for word in range(1 << 16)}
    assert len(near) == 1 << 16
    for _ in range(1000):
        a, b = rng.getrandbits(45), rng.getrandbits(45)
        assert (word_at(8 * a) == word_at(8 * b)) == (a == b)
    assert word_at(0x1000) == word_at(0x1007) != word_at(0x1008)


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth must be 1 to 1024, not 0"):
        MemoryModel(CONFIG, depth=0)
    with pytest.raises(TypeError, match="depth must be an integer, not '8'"):
        MemoryModel(CONFIG, depth="8")
