# SPDX-License-Identifier: Apache-2.0
"""ScoreMemory: one read port for two readers, a write port for each kind of row."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import cocotb
import pytest
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, RisingEdge

from simulation import run_bench, seeds
from stmoe.score_memory import ScoreMemory
from stmoe_golden.config import USE_BITS, EngineConfig

CONFIG = EngineConfig(num_layers=5, num_experts=3, top_k=2, quota=1)


def test_rows_are_what_was_written_last() -> None:
    run_bench(
        ScoreMemory(CONFIG),
        "score_memory",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 5"):
        ScoreMemory(5)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
LAYERS = CONFIG.num_layers
WIDTH = {"score": CONFIG.score_bits * CONFIG.num_experts, "use": USE_BITS * CONFIG.num_experts}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def rows_are_what_was_written_last(dut) -> None:
    """Either reader reads while rows are written; not the row that is being written."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        for name in ("write_score", "write_use", "score_row", "use_row", "own", "blank"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for _ in range(LAYERS + 1):
            await FallingEdge(dut.clk)
            dut.score_layer.value, dut.use_layer.value = (rng.randrange(LAYERS) for _ in range(2))
            clear = int(dut.clear_done.value)
            if clear:
                break
            await RisingEdge(dut.clk)
        assert clear, f"not clear {LAYERS + 1} cycles after reset"
        await RisingEdge(dut.clk)

        rows = {kind: [0] * LAYERS for kind in WIDTH}
        layers = {kind: int(getattr(dut, f"{kind}_layer").value) for kind in WIDTH}
        expected: dict[str, int] = {}
        asked: list[int] = []  # the layer of the cycle before
        for _ in range(300):
            written = set()
            changes = []
            for kind, width in WIDTH.items():
                write, layer, row = rng.random() < 0.5, layers[kind], rng.getrandbits(width)
                layers[kind] = rng.randrange(LAYERS)
                getattr(dut, f"write_{kind}").value = int(write)
                getattr(dut, f"{kind}_layer").value = layers[kind]  # of the next cycle
                getattr(dut, f"{kind}_row").value = row
                if write:
                    written.add(layer)
                    changes.append((kind, layer, row))
            own, blank = rng.random() < 0.5, rng.random() < 0.3
            read, other = rng.randrange(LAYERS), rng.randrange(LAYERS)
            dut.own.value, dut.blank.value = int(own), int(blank)
            dut.layer.value, dut.victim_layer.value = (read, other) if own else (other, read)
            await FallingEdge(dut.clk)
            for name, row in expected.items():
                assert int(getattr(dut, name).value) == row, name
            expected = {}
            if asked and asked[0] not in written:
                expected["score"] = 0 if blank else rows["score"][asked[0]]
                expected["use"] = rows["use"][asked[0]]
            asked = [read]
            for kind, layer, row in changes:
                rows[kind][layer] = row
            await RisingEdge(dut.clk)
