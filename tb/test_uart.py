# SPDX-License-Identifier: Apache-2.0
"""The UART against a line whose bits have exact lengths in real time."""

from __future__ import annotations

import random

import pytest
from amaranth.sim import Simulator

from simulation import seeds
from stmoe.harness.uart import UartReceiver, UartTransmitter

# (clock, baud): 4, 8.68, 16.67 and 25.5 clocks to a bit.
RATIOS = [(4_000_000, 1_000_000), (10_000_000, 1_152_000), (50_000_000, 3_000_000), (51, 2)]


def levels(data: list[int], gaps: list[float], bit: float) -> list[tuple[float, int]]:
    """(time, level) of every edge of a line that carries bytes, each after a gap of idle bits."""
    edges, time = [(0.0, 1)], 0.0
    for byte, gap in zip(data, gaps, strict=True):
        time += gap * bit
        for level in (0, *(byte >> i & 1 for i in range(8)), 1):
            edges.append((time, level))
            time += bit
    return edges


def received(edges: list[tuple[float, int]], end: float, clock_hz: int, baud: int):
    """What a receiver makes of a line: its bytes, and how many errors."""
    dut = UartReceiver(clock_hz=clock_hz, baud=baud)
    got, errors = [], 0

    async def bench(ctx):
        nonlocal errors
        at = 0
        for cycle in range(int(end) + 1):
            while at + 1 < len(edges) and edges[at + 1][0] <= cycle:
                at += 1
            ctx.set(dut.rx, edges[at][1])
            await ctx.tick()
            if ctx.get(dut.valid):
                got.append(ctx.get(dut.data))
            errors += ctx.get(dut.error)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return got, errors


@pytest.mark.parametrize(("clock_hz", "baud"), RATIOS)
@pytest.mark.parametrize("share", [-1, 0, 1])
def test_receiver_takes_every_byte_of_a_sender_that_is_off(clock_hz, baud, share):
    # A clock is a quarter of the shortest bit, so there the edge is known less well.
    error = share * (0.02 if clock_hz < 8 * baud else 0.03)
    for seed in seeds(2):
        print(f"seed {seed}")
        draw = random.Random(seed)
        bit = clock_hz / baud * (1 + error)
        data = [0x00, 0xFF, 0x55, 0xAA, *(draw.randrange(256) for _ in range(30))]
        gaps = [2 + draw.random(), *(draw.choice((0, 0, draw.random() * 3)) for _ in data[1:])]
        edges = levels(data, gaps, bit)
        assert received(edges, edges[-1][0] + 3 * bit, clock_hz, baud) == (data, 0)


def test_receiver_recovers_from_a_line_held_low():
    clock_hz, baud = RATIOS[2]
    bit = clock_hz / baud
    low = 40 * bit
    after = levels([0x5A, 0xC3], [2, 0], bit)
    edges = [(0.0, 1), (10.0, 0), *((t + low, level) for t, level in after)]
    assert received(edges, edges[-1][0] + 3 * bit, clock_hz, baud) == ([0x5A, 0xC3], 1)


def test_receiver_ignores_a_pulse_of_less_than_half_a_bit():
    clock_hz, baud = RATIOS[2]
    bit = clock_hz / baud
    after = levels([0x81], [6], bit)
    edges = [(0.0, 1), (20.0, 0), (20 + 0.3 * bit, 1), *((t + 30, x) for t, x in after[1:])]
    assert received(edges, edges[-1][0] + 3 * bit, clock_hz, baud) == ([0x81], 0)


@pytest.mark.parametrize(("clock_hz", "baud"), RATIOS)
def test_transmitter_keeps_time_and_leaves_no_gap(clock_hz, baud):
    dut = UartTransmitter(clock_hz=clock_hz, baud=baud)
    draw = random.Random(1)
    data = [0x00, 0xFF, *(draw.randrange(256) for _ in range(20))]
    bit = clock_hz / baud
    line: list[int] = []

    async def sender(ctx):
        await ctx.tick().repeat(7)
        for byte in data:
            ctx.set(dut.i.payload, byte)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
        ctx.set(dut.i.valid, 0)

    async def watcher(ctx):
        for _ in range(int(bit * 10 * (len(data) + 2))):
            line.append(ctx.get(dut.tx))
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(sender)
    simulator.add_testbench(watcher)
    simulator.run()
    at = line.index(0)
    for byte in data:
        # The start bit's edge is exact to a clock; each bit is sampled in its middle.
        assert line[at - 1 : at + 1] == [1, 0]
        sampled = [line[round(at + (i + 0.5) * bit - 0.5)] for i in range(10)]
        assert sampled == [0, *(byte >> i & 1 for i in range(8)), 1]
        # Back to back: 10 bits to the next start bit, rounded.
        following = next((i for i in range(at + int(9 * bit) + 1, len(line)) if not line[i]), None)
        if following is None:
            break
        assert abs(following - at - 10 * bit) <= 1
        at = following
    else:
        pytest.fail("more bytes than were sent")
    assert byte == data[-1] and set(line[at + int(10 * bit) :]) == {1}


@pytest.mark.parametrize(
    ("clock_hz", "baud", "said"),
    [
        (50_000_000, 12_500_001, "baud must be 763 to 12500000 with a clock of 50000000 Hz"),
        (50_000_000, 762, "baud must be 763 to 12500000"),
        (0, 1, "clock_hz must be 1 or more, not 0"),
    ],
)
def test_a_speed_that_cannot_be_is_refused(clock_hz, baud, said):
    for block in (UartReceiver, UartTransmitter):
        with pytest.raises(ValueError, match=said):
            block(clock_hz=clock_hz, baud=baud)
    with pytest.raises(TypeError, match="baud must be an integer"):
        UartReceiver(clock_hz=50_000_000, baud=1e6)
