# SPDX-License-Identifier: Apache-2.0
"""Makes Verilog of the design in moe_node.py, and plays a few tokens in Amaranth's simulator."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from amaranth.back import verilog
from amaranth.hdl import Module
from amaranth.lib.wiring import connect
from amaranth.sim import Simulator
from moe_node import MoeNode

from stmoe.harness.memory_model import MemoryModel, word_at
from stmoe.payloads import route_layout, token_layout
from stmoe.register_map import registers
from stmoe_golden.config import EngineConfig

CONFIG = EngineConfig(expert_bytes=64, event_port=False)
TOKENS = 6
TIMEOUT = 20_000  # cycles


def address(layer: int, expert: int) -> int:
    """Where an expert lies in memory."""
    return (layer << 16) + expert * CONFIG.expert_bytes


async def send(ctx, port, payload) -> None:
    """One beat of a stream."""
    ctx.set(port.payload, payload)
    ctx.set(port.valid, 1)
    await ctx.tick().until(port.ready)
    ctx.set(port.valid, 0)


async def write(ctx, axil, offset: int, value: int) -> None:
    """One write over AXI4-Lite, which takes address and data together."""
    ctx.set(axil.aw.payload, offset)
    ctx.set(axil.w.payload, axil.w.payload.shape().const({"data": value, "strb": 0xF}))
    ctx.set(axil.aw.valid, 1)
    ctx.set(axil.w.valid, 1)
    await ctx.tick().until(axil.aw.ready & axil.w.ready)
    ctx.set(axil.aw.valid, 0)
    ctx.set(axil.w.valid, 0)
    ctx.set(axil.b.ready, 1)
    (answer,) = await ctx.tick().sample(axil.b.payload).until(axil.b.valid)
    ctx.set(axil.b.ready, 0)
    assert answer == 0, f"write to {offset:#06x}: response {answer}"


def simulate() -> int:
    """Plays the tokens and returns how many experts were used, each with the right contents."""
    top = Module()
    top.submodules.node = node = MoeNode(CONFIG)
    top.submodules.memory = memory = MemoryModel(CONFIG)
    connect(top, node.axi, memory.axi)
    words: list[int] = []
    wanted: list[int] = []

    async def software(ctx) -> None:
        table = {r.name: r for r in registers(CONFIG)}
        for layer in range(CONFIG.num_layers):
            for word, value in (
                ("BASE_LOW", address(layer, 0)),
                ("BASE_HIGH", 0),
                ("STRIDE", CONFIG.expert_bytes),
                ("BEATS", CONFIG.expert_bytes // CONFIG.beat_bytes),
            ):
                await write(ctx, node.axil, table[f"SEGMENT_{word}"].at(layer, 0), value)
        # Takes effect before any token that is offered from now on.
        await write(ctx, node.axil, table["COMMIT"].at(), 1)
        for token in range(TOKENS):
            first = {"context": 0, "token_id": 0, "new_sequence": token == 0}
            await send(ctx, node.token, token_layout(CONFIG).const(first))
            for layer in range(CONFIG.num_layers):
                # Every other token uses the same experts.
                experts = [(layer + 3 * (token % 2) + i) % CONFIG.num_experts for i in (0, 1)]
                wanted.extend(word_at(address(layer, expert)) for expert in experts)
                route = {"context": 0, "layer": layer, "experts": experts}
                await send(ctx, node.route, route_layout(CONFIG).const(route))
                while len(words) < len(wanted):
                    await ctx.tick()

    async def watch(ctx) -> None:
        used, cycles = False, 0
        async for _, _, now, word in ctx.tick().sample(node.used, node.word):
            if used:
                words.append(word)
            used = now
            cycles += 1
            if cycles == TIMEOUT:
                raise TimeoutError(f"not over after {TIMEOUT} cycles")

    simulator = Simulator(top)
    simulator.add_clock(1e-8)
    simulator.add_testbench(software)
    simulator.add_testbench(watch, background=True)
    simulator.run()
    # Those of one layer come in the order in which they are ready.
    size = CONFIG.top_k
    for i in range(0, len(wanted), size):
        assert sorted(words[i : i + size]) == sorted(wanted[i : i + size]), f"layer visit {i}"
    return len(words)


def main() -> int:
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "moe_node.v")
    output.write_text(verilog.convert(MoeNode(CONFIG), name="moe_node", emit_src=False))
    print(f"{output}: {output.read_text().count(chr(10))} lines of Verilog")
    print(f"{TOKENS} tokens, {simulate()} experts used, each with the right contents")
    print("PASS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
