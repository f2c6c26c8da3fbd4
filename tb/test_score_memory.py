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

from simulation import Shapes, run_bench, seeds
from stmoe.score_memory import ScoreMemory
from stmoe_golden.config import USE_BITS, EngineConfig

CONFIGS = {
    "whole": EngineConfig(num_layers=5, num_experts=3, top_k=2, quota=1),
    # A row for each of three folds, each of two lanes.
    "thirds": EngineConfig(num_layers=5, num_experts=6, lanes=2, top_k=2, quota=1),
}


def test_rows_are_what_was_written_last() -> None:
    run_bench(
        Shapes({name: ScoreMemory(config) for name, config in CONFIGS.items()}),
        "score_memory",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 5"):
        ScoreMemory(5)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))


class Ports:
    """The ports of one shape; a row is addressed by its number, fold by fold of layer 0 first."""

    def __init__(self, dut, name: str):
        self.dut, self.name, self.clk, self.rst = dut, name, dut.clk, dut.rst
        self.folds = CONFIGS[name].folds

    def __getattr__(self, port: str):
        return getattr(self.dut, f"{self.name}__{port}")

    def address(self, prefix: str, row: int) -> None:
        layer, fold = divmod(row, self.folds)
        getattr(self, f"{prefix}layer").value = layer
        if self.folds > 1:
            getattr(self, f"{prefix}fold").value = fold


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(name=list(CONFIGS))
async def rows_are_what_was_written_last(dut, name: str) -> None:
    """Either reader reads while rows are written; not the row that is being written."""
    config, dut = CONFIGS[name], Ports(dut, name)
    count, lanes = config.num_layers * config.folds, config.num_lanes
    clearing = config.num_layers << config.fold_bits if config.folds > 1 else count
    width = {"score": config.score_bits * lanes, "use": USE_BITS * lanes}
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    for seed in SEEDS:
        dut.dut._log.warning("%s, seed %d", name, seed)
        rng = random.Random(seed)
        for port in ("write_score", "write_use", "score_row", "use_row", "own", "blank"):
            getattr(dut, port).value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for _ in range(clearing + 2):
            await FallingEdge(dut.clk)
            clear = int(dut.clear_done.value)
            if clear:
                break
            await RisingEdge(dut.clk)
        assert clear, f"not clear {clearing + 2} cycles after reset"
        await RisingEdge(dut.clk)

        rows = {kind: [0] * count for kind in width}
        writes: dict[str, int | None] = dict.fromkeys(width)  # row that is written in this cycle
        expected: dict[str, int] = {}
        asked: list = []  # the row of the cycle before, or what it held
        blanked = False  # in the cycle before
        for _ in range(300):
            written = set()
            changes = []
            for kind, bits in width.items():
                index, row = writes[kind], rng.getrandbits(bits)
                getattr(dut, f"{kind}_row").value = row
                if index is not None:
                    written.add(index)
                    changes.append((kind, index, row))
                # What is written in the next cycle.
                write, following = rng.random() < 0.5, rng.randrange(count)
                writes[kind] = following if write else None
                getattr(dut, f"write_{kind}").value = int(write)
                dut.address(f"{kind}_", following)
            own, blank = rng.random() < 0.5, rng.random() < 0.3
            read, other = rng.randrange(count), rng.randrange(count)
            dut.own.value, dut.blank.value = int(own), int(blank)
            dut.address("", read if own else other)
            dut.address("victim_", other if own else read)
            await FallingEdge(dut.clk)
            for kind, row in expected.items():
                assert int(getattr(dut, kind).value) == row, kind
            expected = {}
            if config.folds > 1:
                # In block RAM a write is seen a cycle later.
                before = {kind: rows[kind][read] for kind in width}
                if asked and asked[0] is not None:
                    expected["score"] = 0 if blanked else asked[0]["score"]
                    expected["use"] = asked[0]["use"]
                asked = [None if read in written else before]
            else:
                if asked and asked[0] not in written:
                    expected["score"] = 0 if blanked else rows["score"][asked[0]]
                    expected["use"] = rows["use"][asked[0]]
                asked = [read]
            blanked = blank
            for kind, index, row in changes:
                rows[kind][index] = row
            await RisingEdge(dut.clk)
