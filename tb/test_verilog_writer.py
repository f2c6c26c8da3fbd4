# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The Verilog that `stmoe generate` and the benches write is Amaranth's own."""

from __future__ import annotations

import os
from collections import Counter

import cocotb
import pytest
from amaranth.back import verilog
from amaranth.hdl import Module
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge, Timer

from lint_verilog import lint_text
from simulation import run_bench
from stmoe import verilog_writer
from stmoe.top import generate
from stmoe.verilog_writer import convert
from stmoe_golden.config import EngineConfig

os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")


class Memories(wiring.Component):
    """Two memories of zeros, one of them written, and one of other values."""

    ROWS, WIDTH = 48, 64

    def __init__(self) -> None:
        super().__init__(
            {"row": In(6), "enable": In(1), **{f"data_{n}": Out(self.WIDTH) for n in range(3)}}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for n, init in enumerate(([], [], [row**7 for row in range(self.ROWS)])):
            m.submodules[f"ram_{n}"] = ram = memory.Memory(
                shape=self.WIDTH, depth=self.ROWS, init=init, attrs={"no_rw_check": 1}
            )
            read, write = ram.read_port(), ram.write_port()
            m.d.comb += [
                read.addr.eq(self.row),
                getattr(self, f"data_{n}").eq(read.data),
                write.addr.eq(self.row),
                write.data.eq(~read.data),
                write.en.eq(self.enable if n else 0),
            ]
        return m


def test_the_text_is_amaranths_bit_for_bit():
    ours = convert(Memories(), name="memories", emit_src=False)
    assert ours == verilog.convert(Memories(), name="memories", emit_src=False)


@pytest.fixture
def small(monkeypatch):
    """What counts as large is small."""
    monkeypatch.setattr(verilog_writer, "LARGE", 1000)


def test_large_memories_of_zeros_are_a_loop_and_lint_clean(small):
    text = convert(Memories(), name="memories", emit_src=False)
    assert text.count(" < 48; ") == 2
    assert text.count("[47] = 64'h000") == 1  # 47 ** 7 is written as it was
    assert lint_text(text, "memories") == ""


def test_an_engine_for_256_experts_is_clean():
    """The shape of DeepSeek-V3: 58 layers of 256 experts, top-8, by eight folds of 32 lanes."""
    config = EngineConfig(
        num_layers=58, num_experts=256, top_k=8, lanes=32, quota=16, axi_data_width=256
    )
    assert lint_text(generate(config), "stmoe_engine") == ""


def test_a_memory_that_cannot_be_found_in_the_verilog_is_an_error():
    with pytest.raises(RuntimeError, match=r"\(48, 64\): 1.* expected, .* found"):
        verilog_writer._with_zeros("module m;\nendmodule\n", Counter({(48, 64): 1}))


def test_large_memories_begin_with_zeros_in_simulation(small):
    run_bench(
        Memories(),
        "large_memories",
        "test_verilog_writer",
        # What has no initial value begins with random bits.
        build_args=["--x-initial", "unique"],
        plusargs=["+verilator+rand+reset+2"],
    )


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def every_row_begins_with_its_value(dut):
    Clock(dut.clk, 10, "ns").start()
    dut.rst.value = 0
    dut.enable.value = 0
    for row in range(Memories.ROWS):
        dut.row.value = row
        await RisingEdge(dut.clk)
        await Timer(1, "ns")
        seen = [int(getattr(dut, f"data_{n}").value) for n in range(3)]
        assert seen == [0, 0, row**7 & (1 << Memories.WIDTH) - 1], row
