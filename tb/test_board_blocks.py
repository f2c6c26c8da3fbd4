# SPDX-License-Identifier: Apache-2.0
"""Frames, packed records and signatures: the board's blocks against the host's code."""

from __future__ import annotations

import random
import zlib

import pytest
from amaranth.hdl import Signal
from amaranth.sim import Simulator

from simulation import seeds
from stmoe.board.host_link import deframe, enframe
from stmoe.board.messages import MessageReader, read_command, trace_commands, write_command
from stmoe.harness.board_commands import BoardCommands
from stmoe.harness.board_link import BoardLink
from stmoe.harness.board_protocol import (
    STAMP_RECORDS,
    HarnessRegister,
    config_hash,
    record_pieces,
    signature_of,
)
from stmoe.harness.bus_signature import BusSignature
from stmoe.harness.frame import FrameReceiver, FrameTransmitter
from stmoe.harness.record_packer import RecordPacker, record_widths
from stmoe.payloads import event_layout
from stmoe_golden.checker import Kind
from stmoe_golden.config import PRESETS, EngineConfig, preset


def run(dut, *benches) -> None:
    """Simulate until every bench has ended."""
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for bench in benches:
        simulator.add_testbench(bench)
    simulator.run()


# Frames -------------------------------------------------------------------------------------


def contents(draw: random.Random, count: int) -> list[bytes]:
    """Bytes that frames may carry, many of them flags and escapes."""
    alphabet = [0x7E, 0x7D, 0x5E, 0x5D, 0x20, 0, 255, *range(16)]
    return [
        bytes(draw.choice(alphabet) for _ in range(draw.choice((6, 7, 20)))) for _ in range(count)
    ]


def test_host_reads_the_frames_that_the_board_sends():
    draw = random.Random(1)
    sent = contents(draw, 12)
    # A content whose CRC itself holds a flag and an escape.
    for wanted in (0x7E, 0x7D):
        sent.append(
            next(
                text
                for n in range(10_000)
                if wanted in zlib.crc32(text := n.to_bytes(6, "big")).to_bytes(4, "big")
            )
        )
    dut = FrameTransmitter()
    line = bytearray()

    async def sender(ctx):
        for content in sent:
            for i, byte in enumerate(content):
                ctx.set(dut.i.payload, byte)
                ctx.set(dut.last, i == len(content) - 1)
                ctx.set(dut.i.valid, 1)
                await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)
            await ctx.tick().repeat(draw.randrange(3) + 1)
        await ctx.tick().repeat(100)

    async def receiver(ctx):
        expected = sum(len(enframe(content)) for content in sent)
        while len(line) < expected:
            ready = draw.random() < 0.5
            ctx.set(dut.o.ready, ready)
            _, _, valid, byte = await ctx.tick().sample(dut.o.valid, dut.o.payload)
            if valid and ready:
                line.append(byte)

    run(dut, sender, receiver)
    assert bytes(line) == b"".join(enframe(content) for content in sent)
    assert [deframe(part) for part in bytes(line).split(b"~") if part] == sent


def board_takes(line: bytes, errors_at: frozenset[int] = frozenset()) -> list[bytes | None]:
    """What the board makes of bytes on the line: each frame's content, None for a bad one."""
    dut = FrameReceiver()
    frames: list[bytes | None] = []
    taken = bytearray()

    async def bench(ctx):
        for i, byte in enumerate([*line, None, None]):
            ctx.set(dut.data, byte or 0)
            ctx.set(dut.valid, byte is not None and i not in errors_at)
            ctx.set(dut.error, i in errors_at)
            for _ in range(12):
                await ctx.tick()
                ctx.set(dut.valid, 0)
                ctx.set(dut.error, 0)
                if ctx.get(dut.good):
                    frames.append(bytes(taken[:-4]))
                if ctx.get(dut.bad):
                    frames.append(None)
                if ctx.get(dut.start):
                    taken.clear()
                if ctx.get(dut.take):
                    taken.append(ctx.get(dut.payload))

    run(dut, bench)
    return frames


def test_board_reads_the_frames_that_the_host_sends():
    sent = contents(random.Random(2), 20)
    # Flags may be shared, and there may be more of them.
    line = b"~~".join(enframe(content) for content in sent[:10])
    line += b"~" + b"~".join(enframe(content)[1:-1] for content in sent[10:]) + b"~"
    assert board_takes(line) == sent


def test_board_refuses_spoiled_frames_and_takes_the_next():
    draw = random.Random(3)
    for content in contents(draw, 10):
        frame = enframe(content)
        for _ in range(4):
            at = draw.randrange(1, len(frame) - 1)
            kind = draw.randrange(4)
            bad = {
                0: frame[:at] + frame[at + 1 :],
                1: frame[:at] + bytes([frame[at] ^ 1 << draw.randrange(8)]) + frame[at + 1 :],
                2: frame[:at] + frame[at : at + 1] + frame[at:],
                3: frame[:at] + b"~",
            }[kind]
            got = board_takes(bad + enframe(b"good one"))
            assert got[-1] == b"good one"
            assert content not in got
            assert all(frame is None for frame in got[:-1])
    got = board_takes(enframe(b"abcdefgh") + enframe(b"good one"), frozenset({3}))
    assert got == [None, b"good one"]


def test_spoiled_frames_are_refused_by_the_host_too():
    frame = enframe(bytes(range(40)))[1:-1]
    assert deframe(frame) == bytes(range(40))
    for at in range(len(frame)):
        assert deframe(frame[:at] + bytes([frame[at] ^ 4]) + frame[at + 1 :]) is None
        assert deframe(frame[:at] + frame[at + 1 :]) is None
    assert deframe(b"") is None


# Records ------------------------------------------------------------------------------------


def records_of(config: EngineConfig, draw: random.Random, count: int) -> list[dict[str, int]]:
    """Records that use what their kind uses, and now and then something else."""
    widths = record_widths(config)
    pieces, raw = record_pieces(config, 24, widths)
    cycle, result = 0, []
    for _ in range(count):
        cycle += draw.choice((0, 0, 1, 255, 256, 65535, 65536, 1 << 33, draw.randrange(500)))
        kind = draw.choice(list(Kind))
        used = pieces.get(kind, raw) if draw.random() < 0.8 else raw
        record = dict.fromkeys(widths, 0) | {"cycle": cycle & (1 << 40) - 1, "kind": int(kind)}
        for piece in used:
            record[piece.field] |= draw.getrandbits(piece.width) << piece.lsb
        result.append(record)
    return result


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_record_comes_out_as_it_went_in(name):
    config = preset(name)
    (seed,) = seeds(1)
    print(f"seed {seed}")
    draw = random.Random(seed)
    records = records_of(config, draw, 150)
    dut = RecordPacker(config, address_bits=24)
    layout = event_layout(config)
    stream, messages = bytearray(), 0
    taken_at: list[int] = []
    cycle = 1000

    async def sender(ctx):
        for record in records:
            if draw.random() < 0.3:
                ctx.set(dut.i.valid, 0)
                await ctx.tick().repeat(draw.randrange(1, 40))
            ctx.set(dut.i.payload, layout.const(record))
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            taken_at.append(cycle)
        ctx.set(dut.i.valid, 0)
        await ctx.tick().repeat(300)

    async def receiver(ctx):
        nonlocal messages, cycle
        while True:
            ready = draw.random() < 0.7
            ctx.set(dut.o.ready, ready)
            ctx.set(dut.cycle, cycle)
            _, _, valid, byte, last = await ctx.tick().sample(dut.o.valid, dut.o.payload, dut.last)
            cycle += 1
            if valid and ready:
                stream.append(byte)
                messages += last

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(sender)
    simulator.add_testbench(receiver, background=True)
    simulator.run()

    reader = MessageReader(config, 24)
    at = 0
    while at < len(stream):  # in pieces that cut messages
        size = draw.randrange(1, 40)
        reader.feed(bytes(stream[at : at + size]))
        at += size
    end = cycle
    reader.stamp(end)
    names = ("cycle", "kind", "context", "layer", "expert", "slot", "flag", "data")
    got = [dict(zip(names, event[:8], strict=True)) for event in reader.events]
    assert got == records
    assert reader.records == len(records)
    # A stamp is not before its records were taken, and not long after.
    assert messages == len(records) + (len(records) - 1) // STAMP_RECORDS
    for i, event in enumerate(reader.events):
        following = min(i + STAMP_RECORDS, len(records) - 1)
        latest = end if following >= len(records) // STAMP_RECORDS * STAMP_RECORDS else None
        assert taken_at[i] <= event.delivered
        assert event.delivered <= (latest or taken_at[following])
    # That is the point of packing them by kind.
    whole = sum(field.width for _, field in layout) // 8
    usual = [r for r in got if r["kind"] == Kind.RELEASE]
    assert usual and len(stream) < len(records) * (whole + 2)


# Signatures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 24, 53, 100])
def test_signature_is_what_the_host_computes(width):
    draw = random.Random(width)
    dut = BusSignature(width)
    words = []

    async def bench(ctx):
        for cycle in range(300):
            payload, took = draw.getrandbits(width), draw.random() < 0.4
            cycle |= draw.getrandbits(4) << 36
            ctx.set(dut.cycle, cycle)
            ctx.set(dut.payload, payload)
            ctx.set(dut.took, took)
            if took:
                words.append(cycle | payload << 40)
            await ctx.tick()
        ctx.set(dut.took, 0)
        await ctx.tick().repeat(2)
        assert ctx.get(dut.count) == len(words)
        assert ctx.get(dut.value) == signature_of(words)

    run(dut, bench)
    # Order, a bit, and how many: all of them tell.
    whole = signature_of(words)
    swapped = [words[1], words[0], *words[2:]]
    assert len({whole, signature_of(swapped), signature_of(words[:-1])}) == 3
    for bit in range(40 + width):
        assert signature_of([*words[:7], words[7] ^ 1 << bit, *words[8:]]) != whole


# Commands -----------------------------------------------------------------------------------


def test_commands_are_carried_out_in_order_and_answered():
    # The largest model: an expert's index has 9 bits on the port and 8 in a command.
    config = EngineConfig(num_layers=256, num_experts=256, top_k=16, quota=1)
    total = Signal(40, init=0x12_3456_789A)
    register = HarnessRegister
    dut = BoardCommands(
        config,
        written={register.TOKENS: 32, register.MEMORY_LATENCY: 24},
        read={register.CYCLE: total[:32], register.CYCLE + 1: total[32:]},
    )
    experts = list(range(255, 239, -1))
    script = [
        # (command, answer)
        (write_command(0x7FFC, 0xDEADBEEF), "1f"),
        (read_command(0x7FFC), "1e 10 41 52 63"),
        (write_command(0x0F00, 1), "5f"),
        (read_command(0x0F04), "7e 10 41 52 63"),
        (write_command(register.TOKENS.address, 0x1234_5678), "1f"),
        (write_command(register.MEMORY_LATENCY.address, 0xFF_FFFF), "1f"),
        (write_command(register.CYCLE.address, 1), "7f"),
        (write_command(0xFFFC, 1), "7f"),
        (bytes([3, 1]) + (0x7FFF_FFFE).to_bytes(4, "little"), ""),
        (read_command(register.CYCLE.address), "1e 9a 78 56 34"),
        (bytes([4, 255, *experts]), ""),
        (read_command(register.CYCLE.address + 4), "1e 12 00 00 00"),
        (read_command(register.CYCLE.address + 8), "7e"),
        (read_command(register.TOKENS.address), "7e"),
    ]
    seen: list[tuple] = []
    answers, answer = [], bytearray()
    draw = random.Random(4)

    async def host(ctx):
        for byte in b"".join(command for command, _ in script):
            ctx.set(dut.i.payload, byte)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)
            if draw.random() < 0.2:
                await ctx.tick().repeat(draw.randrange(1, 9))
        await ctx.tick().repeat(200)

    async def reads(ctx):
        while True:
            ready = draw.random() < 0.4
            ctx.set(dut.o.ready, ready)
            _, _, valid, byte, last = await ctx.tick().sample(dut.o.valid, dut.o.payload, dut.last)
            if valid and ready:
                answer.append(byte)
                if last:
                    answers.append(bytes(answer))
                    answer.clear()

    async def trace(ctx):
        while True:
            ready = draw.random() < 0.1
            ctx.set(dut.trace.ready, ready)
            _, _, valid, word = await ctx.tick().sample(dut.trace.valid, dut.trace.payload)
            if valid and ready:
                seen.append(("word", word))

    async def engine(ctx):
        """Takes address and data in either order; refuses low addresses."""
        while True:
            for channel in draw.sample(["aw", "w", "ar"], 3):
                bus = getattr(dut.axil, channel)
                if not ctx.get(bus.valid):
                    continue
                ctx.set(bus.ready, 1)
                _, _, payload = await ctx.tick().sample(bus.payload)
                ctx.set(bus.ready, 0)
                seen.append((channel, payload if channel != "w" else payload.data))
                kinds = [name for name, _ in seen]
                if channel == "ar":
                    ctx.set(dut.axil.r.payload, {"data": 0x6352_4110, "resp": 3 * (payload < 4096)})
                    ctx.set(dut.axil.r.valid, 1)
                    await ctx.tick().until(dut.axil.r.ready)
                    ctx.set(dut.axil.r.valid, 0)
                elif kinds.count("aw") == kinds.count("w"):
                    address = next(a for name, a in reversed(seen) if name == "aw")
                    ctx.set(dut.axil.b.payload, 2 * (address < 4096))
                    ctx.set(dut.axil.b.valid, 1)
                    await ctx.tick().until(dut.axil.b.ready)
                    ctx.set(dut.axil.b.valid, 0)
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(host)
    for bench in (reads, trace, engine):
        simulator.add_testbench(bench, background=True)
    simulator.run()
    # A failed read has its data all the same; only its response counts.
    wanted = [text for _, text in script if text]
    assert [a.hex(" ")[: len(w)] for a, w in zip(answers, wanted, strict=True)] == wanted
    assert all(len(a) == (5 if a[0] & 31 == 30 else 1) for a in answers)
    assert sorted(seen[:2], key=str) == [("aw", 0x7FFC), ("w", 0xDEADBEEF)]
    assert [a for name, a in seen if name == "ar"] == [0x7FFC, 0x0F04]
    token, route = (word for name, word in seen if name == "word")
    assert (token.is_token, token.new_sequence, token.token_id) == (1, 1, 0x7FFF_FFFE)
    assert (route.is_token, route.layer, list(route.experts)) == (0, 255, experts)


# The rest -----------------------------------------------------------------------------------


def test_configurations_have_hashes_of_their_own():
    hashes = {config_hash(config) for config in PRESETS.values()}
    tiny = preset("tiny")
    changed = {config_hash(tiny.replace(quota=quota)) for quota in range(1, 8)}
    assert len(hashes) == len(PRESETS) and len(changed) == 7
    assert config_hash(tiny) == config_hash(EngineConfig()) in hashes


def test_trace_commands_are_what_the_protocol_says():
    import numpy as np

    experts = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 255]]], np.uint16)
    text = trace_commands(experts, np.array([1, 0], np.uint8), np.array([0x1234567, 8], np.int32))
    assert text.hex(" ") == (
        "03 01 67 45 23 01 04 00 01 02 04 01 03 04 03 00 08 00 00 00 04 00 05 06 04 01 07 ff"
    )


@pytest.mark.parametrize("size", [256, 1000, 65536])
def test_a_ring_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="transmit_bytes must be a power of two, 512 to 32768"):
        BoardLink(0, transmit_bytes=size)
