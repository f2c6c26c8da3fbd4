# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""AXI reads across unrelated clocks: nothing lost or reordered, full rate, and clean resets.

Manager and memory are cocotbext-axi's, each on its own clock.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import cocotb
import pytest
from amaranth.hdl import (
    ClockDomain,
    ClockSignal,
    Module,
    ResetSignal,
    Signal,
    Value,
    _ir,
    _nir,
)
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.simtime import get_sim_time
from cocotb.triggers import First, RisingEdge, Timer, gather
from cocotbext.axi import (
    AxiLiteBus,
    AxiLiteMaster,
    AxiMasterRead,
    AxiRamRead,
    AxiReadBus,
)

from simulation import ROOT, pack, run_bench, seeds, unpack
from stmoe.axi_cdc import RESET_CYCLES, AxiReadCrossing, CrossingReset, StreamCrossing
from stmoe.axi_flat import connect_axi4_read, flat_axi4_read_ports
from stmoe.payloads import fill_layout, grant_layout, release_layout, route_layout, token_layout
from stmoe.register_map import COUNTER_INDEX, registers
from stmoe.top import EngineTop
from stmoe_golden.config import EngineConfig, preset

CONFIG = preset("tiny").replace(num_transfers=8)
PERIODS = ((10.0, 10.0), (10.0, 3.7), (10.0, 27.1), (4.1, 10.0), (10.0, 9.98), (5.0, 40.0))
"""Clock periods in ns of manager and memory: alike but out of phase, faster, slower, and nearly
alike, so that the edges slide past one another."""

ENGINE = EngineConfig(expert_bytes=128, event_port=False, max_burst=8, max_outstanding=4)


class CrossingTop(wiring.Component):
    """Crossing and reset: ``s_axi_*`` belongs to ``clk``, ``m_axi_*`` to ``m_axi_aclk``."""

    def __init__(self) -> None:
        clocks = {"clk": In(1), "rst": In(1), "m_axi_aclk": In(1)}
        resets = {"s_axi_areset": Out(1), "m_axi_areset": Out(1)}
        sides = {name: member.flip() for name, member in self.flat("s_axi").items()} | self.flat(
            "m_axi"
        )
        super().__init__({**clocks, **resets, **sides})

    @staticmethod
    def flat(prefix: str) -> dict[str, wiring.Member]:
        return flat_axi4_read_ports(CONFIG, prefix=prefix)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.domains.sync = ClockDomain()
        m.domains.memory = ClockDomain()
        m.submodules.reset = reset = CrossingReset()
        m.submodules.crossing = crossing = AxiReadCrossing(CONFIG)
        m.d.comb += [
            ClockSignal("sync").eq(self.clk),
            ClockSignal("memory").eq(self.m_axi_aclk),
            reset.reset.eq(self.rst),
            ResetSignal("sync").eq(reset.manager_reset),
            ResetSignal("memory").eq(reset.memory_reset),
            self.s_axi_areset.eq(reset.manager_reset),
            self.m_axi_areset.eq(reset.memory_reset),
        ]
        connect_axi4_read(m, CONFIG, self, crossing.memory, prefix="m_axi")
        ar, r = crossing.manager.ar, crossing.manager.r
        m.d.comb += [
            ar.payload.id.eq(self.s_axi_arid),
            ar.payload.addr.eq(self.s_axi_araddr),
            ar.payload.len.eq(self.s_axi_arlen),
            ar.valid.eq(self.s_axi_arvalid),
            self.s_axi_arready.eq(ar.ready),
            self.s_axi_rid.eq(r.payload.id),
            self.s_axi_rdata.eq(r.payload.data),
            self.s_axi_rresp.eq(r.payload.resp),
            self.s_axi_rlast.eq(r.payload.last),
            self.s_axi_rvalid.eq(r.valid),
            r.ready.eq(self.s_axi_rready),
        ]
        return m


# pytest ---------------------------------------------------------------------------------------


def run(testcase: str, count: int, top: wiring.Component | None = None) -> None:
    """A simulation for each seed: the models of one bench never meet those of another."""
    for seed in seeds(count):
        run_bench(
            top or CrossingTop(),
            "engine_memory_clock" if top else "axi_crossing",
            Path(__file__).stem,
            testcase=testcase,
            seed=seed,
            env={"NUMBER": seed},
        )


def test_every_read_comes_back_whole_at_any_clocks() -> None:
    run("random_reads", 6)


def test_the_slower_clock_is_used_in_every_cycle() -> None:
    run("full_rate", len(PERIODS))


def test_a_beat_is_there_after_the_second_edge() -> None:
    run("latency", len(PERIODS))


def test_a_reset_of_any_length_leaves_nothing_behind() -> None:
    run("resets", 6)


def test_engine_waits_for_the_memorys_clock() -> None:
    run("memory_clock_stands_still", 1)


def test_engine_with_a_memory_clock_loads_the_right_bytes() -> None:
    run("engine", 4, EngineTop(ENGINE, memory_clock=True))


class Crossings:
    """Where one clock's registers feed the other's, from Amaranth's own netlist of a component.

    ``direct`` are registers fed by a register of the other clock and nothing else, ``logic`` by
    anything more, ``asynchronous`` those that it sets, ``memories`` are written by one clock and
    read by the other. All as ``module/submodule/register[bit]``; ``registers`` are all there are.
    """

    def __init__(self, component: wiring.Component) -> None:
        ports = {}
        for path, member, value in component.signature.flatten(component):
            flow = _ir.PortDirection.Input if member.flow == In else _ir.PortDirection.Output
            ports["__".join(map(str, path))] = (Value.cast(value), flow)
        self.netlist = netlist = _ir.build_netlist(_ir.Fragment.get(component, None), ports)
        names = {}
        for number, module in enumerate(netlist.modules):
            for signal in module.signal_names:
                for bit, net in enumerate(netlist.signals[signal]):
                    if not net.is_const and netlist.cells[net.cell].module_idx == number:
                        index = f"[{bit}]" if len(signal) > 1 else ""
                        names.setdefault(net, f"{'/'.join(module.name[1:])}/{signal.name}{index}")
        self.registers, self.direct, self.logic = set(), set(), set()
        self.asynchronous, self.memories = set(), set()
        written = {}
        for cell in netlist.cells:
            if isinstance(cell, _nir.SyncWritePort):
                written.setdefault(cell.memory, set()).add(cell.clk)
        for index, cell in enumerate(netlist.cells):
            if isinstance(cell, _nir.FlipFlop):
                for bit, net in enumerate(cell.data):
                    name = names.get(_nir.Net.from_cell(index, bit), f"?{index}[{bit}]")
                    self.registers.add(name)
                    if self.clocks_of(net) - {cell.clk}:
                        source = netlist.cells[net.cell]
                        alone = isinstance(source, _nir.FlipFlop)
                        (self.direct if alone else self.logic).add(name)
                    if self.clocks_of(cell.arst) - {cell.clk}:
                        self.asynchronous.add(name)
            elif isinstance(cell, _nir.SyncReadPort | _nir.SyncWritePort):
                place = "/".join(netlist.modules[cell.module_idx].name[1:])
                if any(self.clocks_of(net) - {cell.clk} for net in cell.input_nets() - {cell.clk}):
                    self.logic.add(f"{place}/{netlist.cells[cell.memory].name} port")
                if written[cell.memory] != {cell.clk}:
                    self.memories.add(f"{place}/{netlist.cells[cell.memory].name}")
            elif isinstance(cell, _nir.AsyncReadPort):
                # It would be seen by registers of any clock, and none is expected.
                place = "/".join(netlist.modules[cell.module_idx].name[1:])
                if len(written[cell.memory]) != 1:
                    self.memories.add(f"{place}/{netlist.cells[cell.memory].name}")

    def clocks_of(self, net) -> set:
        """Clocks of the registers that a net depends on through logic."""
        clocks, seen, todo = set(), set(), [net]
        while todo:
            net = todo.pop()
            if net.is_const or net in seen:
                continue
            seen.add(net)
            cell = self.netlist.cells[net.cell]
            if isinstance(cell, _nir.FlipFlop | _nir.SyncReadPort):
                clocks.add(cell.clk)
            elif not isinstance(cell, _nir.Top):
                todo += [source for source, _ in cell.comb_edges_to(net.bit)]
            if isinstance(cell, _nir.AsyncReadPort):
                clocks |= {
                    c.clk
                    for c in self.netlist.cells
                    if isinstance(c, _nir.SyncWritePort) and c.memory == cell.memory
                }
        return clocks


@pytest.fixture(scope="module")
def crossings() -> Crossings:
    return Crossings(EngineTop(ENGINE, memory_clock=True))


def test_nothing_crosses_but_synchronisers_and_fifo_memories(crossings: Crossings) -> None:
    """Each synchroniser is fed by a register, with no logic that could glitch in between."""
    assert crossings.logic == set()
    pointers = {("ar", 3), ("r", 5)}  # a bit more than the address, for full and empty
    assert crossings.direct == {"crossing_reset/answer_cdc/stage0"} | {
        f"crossing/{fifo}/fifo/{side}_cdc/stage0[{bit}]"
        for fifo, width in pointers
        for side in ("produce", "consume")
        for bit in range(width)
    }
    assert crossings.memories == {f"crossing/{fifo}/fifo/storage" for fifo in ("ar", "r")}
    assert crossings.asynchronous == {
        f"{place}/stage{i}"
        for place in (
            "crossing_reset/reset_cdc",
            "crossing/ar/fifo/rst_cdc",
            "crossing/r/fifo/rst_cdc",
        )
        for i in range(2)
    }


def test_an_unsynchronised_path_would_be_seen() -> None:
    class Careless(CrossingTop):
        def elaborate(self, platform: object) -> Module:
            m = super().elaborate(platform)
            wrong = Signal()
            m.d.memory += wrong.eq(self.s_axi_arvalid & m.submodules.reset.manager_reset)
            m.d.comb += self.m_axi_arqos.eq(wrong)
            return m

    # The register is an output of the top, and has its name.
    assert Crossings(Careless()).logic == {"/m_axi_arqos[0]"}


def test_vivado_constraints_name_every_crossing_and_nothing_that_is_not_there(
    crossings: Crossings,
) -> None:
    """By the names that Vivado gives to the registers of the generated Verilog."""

    def cell(name: str) -> str:
        base, bracket, index = name.partition("[")
        return f"top/engine/{base}_reg{bracket}{index}"

    cells = {cell(name) for name in crossings.registers}
    cells |= {f"top/engine/{memory}_reg_0_3_0_5" for memory in crossings.memories}
    lines = (ROOT / "examples/clock_crossing/stmoe_cdc.xdc").read_text().splitlines()
    covered: dict[str, set[str]] = {"set_max_delay": set(), "ASYNC_REG": set(), "false": set()}
    sources: set[str] = set()
    for line in lines:
        for pattern in re.findall(r"-regexp \{(.*?)\}\]", line):
            matched = {name for name in cells if re.fullmatch(pattern, name)}
            assert matched, f"nothing is named {pattern}"
            if line.startswith("set_max_delay"):
                to = line.index(pattern) > line.index("-to")
                (covered["set_max_delay"] if to else sources).update(matched)
            elif line.startswith("set_false_path"):
                covered["false"] |= matched
            elif "ASYNC_REG" in line:
                covered["ASYNC_REG"] |= matched
    assert {cell(name) for name in crossings.direct} <= covered["set_max_delay"]
    assert {f"top/engine/{memory}_reg_0_3_0_5" for memory in crossings.memories} <= sources
    assert {cell(name) for name in crossings.asynchronous} == covered["false"]
    stages = {n for n in cells if re.search(r"crossing.*_cdc/stage[01]_reg", n)}
    assert covered["ASYNC_REG"] == stages


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data_depth": 12}, ValueError, "data_depth must be a power of two, 4 to 4096, not 12"),
        ({"address_depth": 2}, ValueError, "address_depth must be a power of two, .* not 2"),
        ({"data_depth": "16"}, TypeError, "data_depth must be an integer, not '16'"),
    ],
)
def test_wrong_parameters_are_refused(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        AxiReadCrossing(CONFIG, **arguments)
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        AxiReadCrossing(3)
    with pytest.raises(ValueError, match="depth must be a power of two, 4 to 4096, not 8192"):
        StreamCrossing(8, i_domain="sync", o_domain="memory", depth=8192)


# cocotb ---------------------------------------------------------------------------------------

SEED = int(os.environ.get("NUMBER", "1"))
TWO_CLOCKS = PERIODS[SEED % len(PERIODS)]
RAM_BYTES = 1 << 16


def pauses(rng: random.Random):
    share = rng.choice((0, 0.2, 0.5, 0.8))
    while True:
        yield rng.random() < share


class TB:
    """Both clocks, a manager, a memory, and rules that hold in every cycle."""

    def __init__(self, dut, seed: int, periods: tuple[float, float]) -> None:
        dut._log.warning("seed %d, periods %s", seed, periods)
        self.dut, self.rng = dut, random.Random(seed)
        self.periods = periods
        dut.rst.value = 1
        self.clocks = [
            Clock(signal, round(period * 500) * 2, unit="ps")
            for signal, period in zip((dut.clk, dut.m_axi_aclk), periods, strict=True)
        ]
        for clock in self.clocks:
            cocotb.start_soon(self.start(clock))
        self.master = AxiMasterRead(AxiReadBus.from_prefix(dut, "s_axi"), dut.clk, dut.s_axi_areset)
        self.ram = AxiRamRead(
            AxiReadBus.from_prefix(dut, "m_axi"), dut.m_axi_aclk, dut.m_axi_areset, size=RAM_BYTES
        )
        self.image = self.rng.randbytes(RAM_BYTES)
        self.ram.write(0, self.image)
        self.channels = [
            self.master.ar_channel,
            self.master.r_channel,
            self.ram.ar_channel,
            self.ram.r_channel,
        ]
        r = ("rid", "rdata", "rresp", "rlast")
        ar = ("arid", "araddr", "arlen")
        self.watches = [
            cocotb.start_soon(self.watch(dut.clk, dut.s_axi_areset, "s_axi_r", r)),
            cocotb.start_soon(self.watch(dut.m_axi_aclk, dut.m_axi_areset, "m_axi_ar", ar)),
        ]

    async def start(self, clock: Clock) -> None:
        """Starts a clock in any phase."""
        await Timer(self.rng.randrange(1, round(clock.period)), "ps")
        clock.start()

    async def watch(self, clock, reset, prefix: str, names: tuple[str, ...]) -> None:
        """An offer stays as it is until it is taken; nothing is offered in reset."""
        valid, ready = getattr(self.dut, f"{prefix}valid"), getattr(self.dut, f"{prefix}ready")
        payload = [getattr(self.dut, f"{prefix[:6]}{name}") for name in names]
        held = None
        self.beats = {**getattr(self, "beats", {}), prefix: 0}
        while True:
            await RisingEdge(clock)
            if reset.value == 1:
                assert valid.value == 0, f"{prefix}valid in reset"
                held = None
                continue
            now = [signal.value for signal in payload] if valid.value == 1 else None
            assert held is None or held == now, f"{prefix}: {now} instead of {held}"
            held = now if ready.value == 0 else None
            self.beats[prefix] += now is not None and held is None

    def stall(self) -> None:
        for channel in self.channels:
            channel.set_pause_generator(pauses(random.Random(self.rng.random())))

    async def reset(self, cycles: int = 1) -> None:
        """A pulse on ``rst``; returns when the manager is out of reset."""
        dut = self.dut
        dut.rst.value = 1
        for _ in range(cycles):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        await RisingEdge(dut.clk)
        assert dut.s_axi_areset.value == 1, "in the cycle after one with rst"
        while dut.s_axi_areset.value == 1:
            await RisingEdge(dut.clk)

    async def read(self) -> None:
        """One read of any length and place, checked."""
        length = self.rng.choice((1, 8, self.rng.randint(1, 100), self.rng.randint(1, 2000)))
        address = self.rng.randrange(RAM_BYTES - length)
        index = self.rng.randrange(1 << CONFIG.transfer_bits)
        answer = await self.master.read(address, length, arid=index)
        assert answer.data == self.image[address : address + length], f"{length} at {address:#x}"
        assert answer.resp == 0


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def random_reads(dut):
    """Many reads at once, random stalls on all four channels."""
    tb = TB(dut, SEED, TWO_CLOCKS)
    await tb.reset(tb.rng.randint(1, 8))
    for _ in range(6):
        tb.stall()
        await gather(*(tb.read() for _ in range(12)))
    assert tb.beats["s_axi_r"] > 500


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def full_rate(dut):
    """Without stalls, beats come in 97 of 100 cycles of the slower clock or more."""
    tb = TB(dut, SEED, TWO_CLOCKS)
    await tb.reset()
    reads = [cocotb.start_soon(tb.master.read(4096 * i, 4096)) for i in range(8)]
    slower = dut.clk if tb.periods[0] > tb.periods[1] else dut.m_axi_aclk
    for _ in range(100):
        await RisingEdge(slower)
    before, cycles = tb.beats["s_axi_r"], 2000
    for _ in range(cycles):
        await RisingEdge(slower)
    rate = (tb.beats["s_axi_r"] - before) / cycles
    dut._log.warning("rate %.4f", rate)
    assert rate >= 0.97, f"{rate:.3f} beats a cycle at periods {tb.periods}"
    await gather(*reads)


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def latency(dut):
    """From a handshake to the edge at which the other side sees it, in cycles of that side."""
    tb = TB(dut, SEED, TWO_CLOCKS)
    await tb.reset()
    for _ in range(40):
        read = cocotb.start_soon(tb.master.read(0, CONFIG.beat_bytes))
        address = await delay(dut, "s_axi_ar", dut.clk, "m_axi_ar", dut.m_axi_aclk)
        beat = await delay(dut, "m_axi_r", dut.m_axi_aclk, "s_axi_r", dut.clk)
        for seen, period in ((address, tb.periods[1]), (beat, tb.periods[0])):
            assert 2 * period - 0.01 <= seen <= 3 * period + 0.01, f"{seen} ns of {period} ns"
        await read
        await Timer(tb.rng.randrange(1, 100_000), "ps")


async def delay(dut, one: str, one_clock, other: str, other_clock) -> float:
    """Time in ns from a handshake of ``one`` to the first edge that samples ``other`` valid."""
    valid, ready = getattr(dut, f"{one}valid"), getattr(dut, f"{one}ready")
    while True:
        await RisingEdge(one_clock)
        if valid.value == 1 and ready.value == 1:
            break
    begin = get_sim_time("ns")
    while True:
        await RisingEdge(other_clock)
        if getattr(dut, f"{other}valid").value == 1:
            return get_sim_time("ns") - begin


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def resets(dut):
    """At any moment, of any length, again before the one before is over: then all is as new."""
    tb = TB(dut, SEED, TWO_CLOCKS)
    await tb.reset()
    for _ in range(10):
        tb.stall()
        lost = [cocotb.start_soon(tb.read()) for _ in range(6)]
        await Timer(tb.rng.randrange(1, 2_000_000), "ps")
        await RisingEdge(dut.clk)
        for task in lost:
            task.cancel()
        memory = cocotb.start_soon(memory_reset_cycles(dut))
        for _ in range(tb.rng.choice((0, 0, 1, 3))):
            dut.rst.value = 1
            await RisingEdge(dut.clk)
            dut.rst.value = 0
            for _ in range(tb.rng.randrange(1, 120)):
                await RisingEdge(dut.clk)
        await tb.reset(tb.rng.choice((1, 1, 2, 50)))
        assert await memory >= RESET_CYCLES
        assert dut.m_axi_areset.value == 0
        for _ in range(40):  # a beat left behind would come now
            await RisingEdge(dut.clk)
            assert dut.s_axi_rvalid.value == 0
            assert dut.m_axi_arvalid.value == 0
        await gather(*(tb.read() for _ in range(4)))


async def memory_reset_cycles(dut) -> int:
    """Edges of its clock that the memory sees in reset, the next time that it is."""
    while dut.m_axi_areset.value == 0:
        await First(RisingEdge(dut.m_axi_areset), RisingEdge(dut.clk))
    cycles = 0
    while dut.m_axi_areset.value == 1:
        await RisingEdge(dut.m_axi_aclk)
        cycles += dut.m_axi_areset.value == 1
    return cycles


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def memory_clock_stands_still(dut):
    tb = TB(dut, 1, (10.0, 7.0))
    await tb.reset()
    await tb.read()
    tb.clocks[1].stop()
    dut.rst.value = 1
    await RisingEdge(dut.clk)
    dut.rst.value = 0
    for _ in range(500):
        await RisingEdge(dut.clk)
        assert dut.m_axi_areset.value == 1
    assert dut.s_axi_areset.value == 1
    tb.clocks[1].start()
    while dut.s_axi_areset.value == 1:
        await RisingEdge(dut.clk)
    await tb.read()


LAYOUTS = {
    "token": token_layout(ENGINE),
    "route": route_layout(ENGINE),
    "release": release_layout(ENGINE),
    "grant": grant_layout(ENGINE),
    "fill": fill_layout(ENGINE),
}


class EngineTB:
    """An engine on two clocks with a memory; every grant is compared with the memory."""

    def __init__(self, dut, seed: int, periods: tuple[float, float]) -> None:
        dut._log.warning("seed %d, periods %s", seed, periods)
        self.dut, self.rng = dut, random.Random(seed)
        dut.rst.value = 1
        dut.s_axis_token_tvalid.value = 0
        dut.s_axis_route_tvalid.value = 0
        dut.s_axis_release_tvalid.value = 0
        dut.m_axis_fill_tready.value = 1
        self.tasks = [
            cocotb.start_soon(Clock(signal, round(period * 500) * 2, unit="ps").start())
            for signal, period in zip((dut.clk, dut.m_axi_aclk), periods, strict=True)
        ]
        self.master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        self.ram = AxiRamRead(
            AxiReadBus.from_prefix(dut, "m_axi"),
            dut.m_axi_aclk,
            dut.m_axi_aresetn,
            reset_active_level=False,
            size=RAM_BYTES,
        )
        self.image = self.rng.randbytes(RAM_BYTES)
        self.ram.write(0, self.image)
        for channel in (self.ram.ar_channel, self.ram.r_channel):
            channel.set_pause_generator(pauses(random.Random(self.rng.random())))
        self.buffer: dict[int, bytearray] = {}
        self.granted: list[tuple[int, int]] = []
        self.used: list[int] = []

    def address(self, layer: int, expert: int) -> int:
        return (layer * ENGINE.num_experts + expert) * ENGINE.expert_bytes

    async def send(self, name: str, fields: dict) -> None:
        valid = getattr(self.dut, f"s_axis_{name}_tvalid")
        getattr(self.dut, f"s_axis_{name}_tdata").value = pack(LAYOUTS[name], fields)
        valid.value = 1
        await RisingEdge(self.dut.clk)
        while getattr(self.dut, f"s_axis_{name}_tready").value == 0:
            await RisingEdge(self.dut.clk)
        valid.value = 0

    async def accelerator(self) -> None:
        """Keeps what is filled in, and checks what is granted."""
        dut = self.dut
        size, beat = ENGINE.expert_bytes, ENGINE.beat_bytes
        dut.m_axis_grant_tready.value = 0
        while True:
            await RisingEdge(dut.clk)
            if dut.m_axis_fill_tvalid.value == 1 and dut.m_axis_fill_tready.value == 1:
                fill = unpack(LAYOUTS["fill"], int(dut.m_axis_fill_tdata.value))
                slot = self.buffer.setdefault(fill["slot"], bytearray(size))
                place = fill["offset"] * beat
                slot[place : place + beat] = fill["data"].to_bytes(beat, "little")
            dut.m_axis_fill_tready.value = int(self.rng.random() < 0.8)
            if dut.m_axis_grant_tvalid.value == 1 and dut.m_axis_grant_tready.value == 1:
                grant = unpack(LAYOUTS["grant"], int(dut.m_axis_grant_tdata.value))
                dut.m_axis_grant_tready.value = 0
                begin = self.address(grant["layer"], grant["expert"])
                assert not grant["error"]
                assert self.buffer[grant["slot"]] == self.image[begin : begin + size], grant
                self.granted.append((grant["layer"], grant["expert"]))
                self.used.append(grant["slot"])
            else:
                dut.m_axis_grant_tready.value = int(self.rng.random() < 0.5)

    async def releases(self) -> None:
        while True:
            await RisingEdge(self.dut.clk)
            if self.used:
                await self.send("release", {"slot": self.used.pop(0)})


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def engine(dut):
    """Registers, tokens and grants on one clock, the memory on another."""
    table = {r.name: r for r in registers(ENGINE)}
    tb = EngineTB(dut, SEED, TWO_CLOCKS)
    for _ in range(3):
        await RisingEdge(dut.clk)
    dut.rst.value = 0
    for layer in range(ENGINE.num_layers):
        beats = ENGINE.expert_bytes // ENGINE.beat_bytes
        for word, value in (
            ("BASE_LOW", tb.address(layer, 0)),
            ("BASE_HIGH", 0),
            ("STRIDE", ENGINE.expert_bytes),
            ("BEATS", beats),
        ):
            await tb.master.write_dword(table[f"SEGMENT_{word}"].at(layer, 0), value)
    await tb.master.write_dword(table["COMMIT"].at(), 1)
    tb.tasks += [cocotb.start_soon(tb.accelerator()), cocotb.start_soon(tb.releases())]
    tokens, wanted = 12, []
    for token in range(tokens):
        await tb.send("token", {"context": 0, "token_id": 0, "new_sequence": token == 0})
        for layer in range(ENGINE.num_layers):
            experts = tb.rng.sample(range(ENGINE.num_experts), ENGINE.top_k)
            wanted += [(layer, expert) for expert in experts]
            await tb.send("route", {"context": 0, "layer": layer, "experts": experts})
            for _ in range(tb.rng.randrange(40)):
                await RisingEdge(dut.clk)
    while len(tb.granted) < len(wanted):
        await RisingEdge(dut.clk)
    assert sorted(tb.granted) == sorted(wanted)
    while int(await tb.master.read_dword(table["STATUS"].at())) & 8:
        pass

    count = {
        name: int(await tb.master.read_dword(table["COUNTER"].at(COUNTER_INDEX[name])))
        for name in ("grants", "demand_bursts", "prefetch_bursts", "last_beats")
    }
    assert count["grants"] == len(wanted)
    assert count["prefetch_bursts"] > 0
    assert count["last_beats"] == count["demand_bursts"] + count["prefetch_bursts"]
