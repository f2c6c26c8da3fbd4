# SPDX-License-Identifier: Apache-2.0
"""Draws the timing diagrams of docs/integration.md from a simulation of the engine.

``python tb/draw_timing.py`` writes them into the document; a test checks that they are the same as
what the engine does now. The simulation is Amaranth's own: the engine behind its flat ports with
the preset ``tiny``, experts of eight beats, prefetching switched off, and a memory that answers
six cycles after the address.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")

from amaranth.sim import Simulator

from simulation import pack, unpack
from stmoe.payloads import grant_layout, release_layout, route_layout, token_layout
from stmoe.register_map import registers
from stmoe.top import EngineTop
from stmoe_golden.config import EngineConfig, preset

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "integration.md"
LATENCY = 6
BEATS = 8
STRIDE = 64


def config() -> EngineConfig:
    """What is drawn."""
    return preset("tiny").replace(expert_bytes=BEATS * 8, event_port=False)


class Trace:
    """Values of the watched signals in every cycle."""

    def __init__(self) -> None:
        self.rows: dict[str, list[str | int]] = {}

    def note(self, name: str, value: str | int) -> None:
        self.rows.setdefault(name, []).append(value)

    def draw(self, first: int, last: int, names: list[str]) -> str:
        """Text: a line for each signal, three columns a cycle, cycles counted from ``first``."""
        width = max(map(len, names)) + 2
        lines = ["cycle".ljust(width) + "".join(f"{i:<3}" for i in range(last - first + 1))]
        for name in names:
            line, before = "", None
            for value in self.rows[name][first : last + 1]:
                if isinstance(value, str):
                    line += f"{value:<3}" if value else "·  "
                else:
                    edge = "▁▔"[value] if before in (None, value) else "╱╲"[before]
                    line += edge + "▁▔"[value] * 2
                    before = value
            lines.append(name.ljust(width) + line)
        return "\n".join(line.rstrip() for line in lines)


def simulate() -> tuple[Trace, dict[str, int]]:
    """Two tokens of one sequence; the cycles in which things happened."""
    c = config()
    top = EngineTop(c)
    trace, marks = Trace(), {}
    table = {r.name: r for r in registers(c)}

    async def write(ctx, name: str, value: int, *index: int) -> None:
        ctx.set(top.s_axil_awaddr, table[name].at(*index))
        ctx.set(top.s_axil_wdata, value)
        ctx.set(top.s_axil_wstrb, 15)
        ctx.set(top.s_axil_awvalid, 1)
        ctx.set(top.s_axil_wvalid, 1)
        await ctx.tick().until(top.s_axil_awready & top.s_axil_wready)
        ctx.set(top.s_axil_awvalid, 0)
        ctx.set(top.s_axil_wvalid, 0)
        ctx.set(top.s_axil_bready, 1)
        await ctx.tick().until(top.s_axil_bvalid)

    async def memory(ctx) -> None:
        ctx.set(top.m_axi_arready, 1)
        waiting: list[tuple[int, int, int]] = []
        now = 0
        while True:
            beat = waiting[0] if waiting and waiting[0][0] <= now else None
            ctx.set(top.m_axi_rvalid, int(beat is not None))
            if beat:
                ctx.set(top.m_axi_rid, beat[1])
                ctx.set(top.m_axi_rlast, beat[2])
            _, _, asked, ident, length, took = await ctx.tick().sample(
                top.m_axi_arvalid, top.m_axi_arid, top.m_axi_arlen, top.m_axi_rready
            )
            now += 1
            if beat and took:
                waiting.pop(0)
            if asked:
                start = max(now - 1 + LATENCY, waiting[-1][0] + 1 if waiting else 0)
                waiting += [(start + i, ident, int(i == length)) for i in range(length + 1)]

    async def send(ctx, name: str, layout, fields: dict) -> None:
        data, valid, ready = (
            getattr(top, f"s_axis_{name}_{part}") for part in ("tdata", "tvalid", "tready")
        )
        ctx.set(data, pack(layout, fields))
        ctx.set(valid, 1)
        await ctx.tick().until(ready)
        ctx.set(valid, 0)

    held: list[int] = []

    async def accelerator(ctx) -> None:
        ctx.set(top.m_axis_grant_tready, 1)
        ctx.set(top.m_axis_fill_tready, 1)
        for layer in range(c.num_layers):
            await write(ctx, "SEGMENT_BASE_LOW", layer << 16, layer, 0)
            await write(ctx, "SEGMENT_STRIDE", STRIDE, layer, 0)
            await write(ctx, "SEGMENT_BEATS", BEATS, layer, 0)
        await write(ctx, "CONTROL", 0b1110)  # no prefetches, so that the link shows demands alone
        await write(ctx, "COMMIT", 1)
        ctx.set(top.s_axil_bready, 0)
        await ctx.tick().repeat(80)  # the tables are cleared

        async def route(layer: int, experts: list[int]) -> None:
            fields = {"context": 0, "layer": layer, "experts": experts}
            await send(ctx, "route", route_layout(c), fields)
            for _ in range(c.top_k):
                while not held:
                    await ctx.tick()
                await send(ctx, "release", release_layout(c), {"slot": held.pop(0)})

        token = {"context": 0, "token_id": 0, "new_sequence": 1}
        marks["token"] = len(trace.rows["clk"])
        await send(ctx, "token", token_layout(c), token)
        await ctx.tick().repeat(24)
        marks["miss"] = len(trace.rows["clk"])
        await route(0, [3, 5])
        for layer in range(1, c.num_layers):
            await ctx.tick().repeat(40)
            await route(layer, [1, 2])
        await ctx.tick().repeat(40)
        await send(ctx, "token", token_layout(c), token | {"new_sequence": 0})
        await ctx.tick().repeat(40)
        marks["hit"] = len(trace.rows["clk"])
        await route(0, [3, 5])
        marks["end"] = len(trace.rows["clk"])

    watched = [
        ("token", "s_axis_token"),
        ("route", "s_axis_route"),
        ("grant", "m_axis_grant"),
        ("release", "s_axis_release"),
        ("fill", "m_axis_fill"),
    ]

    async def monitor(ctx) -> None:
        signals = [
            getattr(top, f"{prefix}_{part}")
            for _, prefix in watched
            for part in ("tvalid", "tready", "tdata")
        ]
        axi = [top.m_axi_arvalid, top.m_axi_araddr, top.m_axi_rvalid, top.m_axi_rlast]
        while True:
            _, _, *values = await ctx.tick().sample(*signals, *axi)
            trace.note("clk", 1)
            for i, (name, _) in enumerate(watched):
                valid, ready, data = values[3 * i : 3 * i + 3]
                trace.note(f"{name}.valid", int(valid))
                trace.note(f"{name}.ready", int(ready))
                text = ""
                if valid and name == "grant":
                    grant = unpack(grant_layout(c), data)
                    text = f"e{grant['expert']}"
                    if ready:
                        held.append(grant["slot"])
                trace.note(f"{name}.expert" if name == "grant" else f"{name}.data", text)
            arvalid, araddr, rvalid, rlast = values[-4:]
            trace.note("m_axi.arvalid", int(arvalid))
            expert = (araddr & 0xFFFF) // STRIDE
            trace.note("m_axi.araddr", f"e{expert}" if arvalid else "")
            trace.note("m_axi.rvalid", int(rvalid))
            trace.note("m_axi.rlast", int(rvalid and rlast))

    simulator = Simulator(top)
    simulator.add_clock(1e-8)
    simulator.add_testbench(monitor, background=True)
    simulator.add_testbench(memory, background=True)
    simulator.add_testbench(accelerator)
    simulator.run()
    return trace, marks


def diagrams() -> dict[str, str]:
    """Name to text."""
    trace, marks = simulate()

    def first(name: str, start: int) -> int:
        """The first cycle from ``start`` on in which both valid and ready are high."""
        rows = trace.rows
        for i in range(start, len(rows["clk"])):
            if rows[f"{name}.valid"][i] and rows[f"{name}.ready"][i]:
                return i
        raise AssertionError(f"no {name} from cycle {start} on")

    token = first("token", marks["token"])
    miss = first("route", marks["miss"])
    hit = first("route", marks["hit"])
    both = [f"{name}.{part}" for name in ("token", "route") for part in ("valid", "ready")]
    axi = ["m_axi.arvalid", "m_axi.araddr", "m_axi.rvalid", "m_axi.rlast"]
    used = ["grant.valid", "grant.expert", "release.valid", "release.ready"]
    released = first("release", hit)
    return {
        "token": trace.draw(token - 2, token + 8, both[:2]),
        "miss": trace.draw(miss - 2, miss + 14, [*both[2:], *axi]),
        "fill": trace.draw(miss + 9, miss + 40, [*axi[2:], "fill.valid", *used]),
        "hit": trace.draw(hit - 2, max(hit + 14, released + 3), [*both[2:], *used]),
    }


def with_diagrams(text: str) -> str:
    """The document with each diagram in its place."""
    for name, drawing in diagrams().items():
        begin, end = f"<!-- timing: {name} -->\n```\n", "\n```\n"
        if begin not in text:
            raise SystemExit(f"draw_timing: {DOCUMENT} has no place for the diagram {name}")
        start = text.index(begin) + len(begin)
        text = text[:start] + drawing + text[text.index(end, start - 1) :]
    return text


def main() -> None:
    """Write the diagrams into the document, or with ``--print`` to stdout."""
    if sys.argv[1:] == ["--print"]:
        for name, drawing in diagrams().items():
            print(f"{name}\n{drawing}\n")
        return
    DOCUMENT.write_text(with_diagrams(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
