# SPDX-License-Identifier: Apache-2.0
"""Link utilisation of the DMA scheduler: ``python tb/bench_dma.py [LATENCY ...]``.

Experts of 4 KiB are loaded back to back through :class:`MemoryModel`; everything, counters
included, is hardware, so that a run is a matter of seconds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cocotb
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge

from simulation import BUILD, run_bench
from stmoe.dma_scheduler import DmaScheduler
from stmoe.harness.memory_model import MemoryModel
from stmoe_golden.config import EngineConfig, preset

EXPERTS = 64
EXPERT_BYTES = 4096
CONFIG = preset("gpt_oss_20b").replace(
    expert_bytes=EXPERT_BYTES, max_burst=64, max_outstanding=8, prefetch_outstanding=2
)


class DmaBench(wiring.Component):
    """Loads ``EXPERTS`` experts, one after the other as fast as the scheduler takes them.

    Members
    -------
    go : :py:`In(1)`
        Begin, once the segment table is written.
    prefetch : :py:`In(1)`
        Load them as prefetches, of which ``prefetch_outstanding`` bursts may be on their way.
    latency : :py:`In(24)`
        Of the memory.
    done : :py:`Out(1)`
        All loads have completed.
    beats : :py:`Out(32)`
        Beats taken on ``axi.r``.
    cycles : :py:`Out(32)`
        Cycles from the first beat offered to the last one taken, both included.
    wrong : :py:`Out(32)`
        Completions other than DONE.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "go": In(1),
                "prefetch": In(1),
                "latency": In(24),
                "done": Out(1),
                "beats": Out(32),
                "cycles": Out(32),
                "wrong": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.scheduler = scheduler = DmaScheduler(config)
        m.submodules.memory = memory = MemoryModel(config, depth=config.max_outstanding)
        wiring.connect(m, scheduler.axi, memory.axi)
        m.d.comb += memory.latency.eq(self.latency)

        # One segment for each layer, written while `go` is low; then that set is used.
        written = Signal(range(config.num_layers + 1))
        row = scheduler.segment_write.payload
        m.d.comb += [
            scheduler.segment_write.valid.eq(written != config.num_layers),
            row.layer.eq(written),
            row.value.base.eq(written * config.num_experts * config.expert_bytes),
            row.value.stride.eq(config.expert_bytes),
            row.value.beats.eq(config.slot_beats),
            scheduler.bank.eq(written == config.num_layers),
        ]
        with m.If(written != config.num_layers):
            m.d.sync += written.eq(written + 1)

        started = Signal(range(EXPERTS + 1))
        completed = Signal(range(EXPERTS + 1))
        load = scheduler.start.payload
        shown_layer = Signal.like(load.layer)  # a load's layer is shown a cycle before it starts
        m.d.sync += shown_layer.eq(load.layer)
        m.d.comb += [
            load.prefetch.eq(self.prefetch),
            scheduler.start.valid.eq(
                self.go
                & (started != EXPERTS)
                & (scheduler.prefetch_ready | ~self.prefetch)
                & (shown_layer == load.layer)
            ),
            load.layer.eq(started[config.expert_bits - 1 :]),
            load.expert.eq(started[: config.expert_bits - 1]),
            load.slot.eq(started),
            scheduler.fill.ready.eq(1),
            scheduler.completion.ready.eq(1),
            self.done.eq(completed == EXPERTS),
        ]
        with m.If(scheduler.start.valid & scheduler.start.ready):
            m.d.sync += started.eq(started + 1)
        with m.If(scheduler.completion.valid):
            m.d.sync += completed.eq(completed + 1)
            with m.If(scheduler.completion.payload.status.as_value() != 0):
                m.d.sync += self.wrong.eq(self.wrong + 1)

        total = EXPERTS * config.slot_beats
        begun = Signal()
        bus = memory.axi.r
        with m.If(bus.valid & bus.ready):
            m.d.sync += self.beats.eq(self.beats + 1)
        with m.If(bus.valid):
            m.d.sync += begun.eq(1)
        with m.If((begun | bus.valid) & (self.beats != total)):
            m.d.sync += self.cycles.eq(self.cycles + 1)
        return m


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def utilisation(dut):
    """Measures each [latency, prefetch] of ``CASES`` and writes what was counted to ``RESULT``."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    results = []
    for latency, prefetch in json.loads(os.environ["CASES"]):
        dut.go.value = 0
        dut.prefetch.value = prefetch
        dut.latency.value = latency
        dut.rst.value = 1
        await ClockCycles(dut.clk, 2)
        dut.rst.value = 0
        await ClockCycles(dut.clk, CONFIG.num_layers + 2)
        dut.go.value = 1
        await RisingEdge(dut.done)
        await ClockCycles(dut.clk, 2)
        assert int(dut.wrong.value) == 0
        results.append([int(dut.beats.value), int(dut.cycles.value)])
    Path(os.environ["RESULT"]).write_text(json.dumps(results))


def measure(cases: list[tuple[int, int]]) -> list[float]:
    """Share of cycles that carry a beat, from the first to the last, for each case.

    A case is (latency of the memory in cycles, 1 to load as prefetches).
    """
    result = BUILD / "bench" / f"dma-utilisation-{os.getpid()}.json"
    result.unlink(missing_ok=True)
    run_bench(
        DmaBench(CONFIG),
        "dma_bench",
        "bench_dma",
        testcase="utilisation",
        env={"CASES": cases, "RESULT": str(result)},
    )
    counted = json.loads(result.read_text())
    result.unlink()
    expected = EXPERTS * EXPERT_BYTES // CONFIG.beat_bytes
    for (latency, _), (beats, _) in zip(cases, counted, strict=True):
        if beats != expected:
            raise RuntimeError(f"{beats} beats at latency {latency}, not {expected}")
    return [beats / cycles for beats, cycles in counted]


def measure_utilisation(latency: int, *, prefetch: bool = False) -> float:
    """Share of cycles that carry a beat, from the first to the last, at this memory latency."""
    return measure([(latency, int(prefetch))])[0]


def report(latencies: list[int]) -> list[str]:
    """One line for each latency, demands and prefetches, under a heading."""
    cases = [(latency, prefetch) for latency in latencies for prefetch in (0, 1)]
    lines = [
        f"{EXPERTS} experts of {EXPERT_BYTES} bytes, {CONFIG.axi_data_width}-bit AXI, bursts of "
        f"{CONFIG.max_burst}, {CONFIG.max_outstanding} outstanding "
        f"({CONFIG.prefetch_outstanding} of prefetches)"
    ]
    shares = iter(measure(cases))
    for latency in latencies:
        lines.append(
            f"latency {latency:4} cycles: {100 * next(shares):6.2f} % of cycles carry a beat, "
            f"{100 * next(shares):6.2f} % with prefetches"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(report([int(text) for text in sys.argv[1:]] or [1, 10, 30, 100])))
