# SPDX-License-Identifier: Apache-2.0
"""CorrelationTable: rows that learn in a pipeline, saturating, and are clear after reset."""

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
from stmoe.correlation_table import CorrelationTable, lanes_of_memories
from stmoe.learner import DELTA_BITS
from stmoe_golden.predictor import clip

# Narrow weights, so that they reach both ends.
ROWS, WIDTH = 6, 4
LANES = int(os.environ.get("LANES", "3"))
MEMORIES = len(lanes_of_memories(LANES))


@pytest.mark.parametrize(("lanes", "memories"), [(3, 1), (64, 4)])
def test_rows_learn_as_in_golden(lanes: int, memories: int) -> None:
    assert len(lanes_of_memories(lanes)) == memories
    run_bench(
        CorrelationTable(rows=ROWS, lanes=lanes, width=WIDTH),
        f"correlation_table_{memories}",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds()), "LANES": str(lanes)},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


@pytest.mark.parametrize("lanes", [1, 36, 37, 54, 64, 73, 128, 500])
def test_memories_hold_every_lane(lanes: int) -> None:
    memories = lanes_of_memories(lanes)
    assert sum(memories) == lanes
    assert len(memories) <= 4  # the kinds of register that synthesis keeps apart
    assert min(memories) > 0 and len(set(memories[:-1])) <= 1
    assert (len(memories) == 1) == (lanes <= 36)


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must be 1 or more, not 0"):
        CorrelationTable(rows=0, lanes=3, width=4)
    with pytest.raises(ValueError, match="lanes must be 1 or more, not '3'"):
        CorrelationTable(rows=1, lanes="3", width=4)
    with pytest.raises(ValueError, match="width must be 3 or more, not 2"):
        CorrelationTable(rows=1, lanes=3, width=2)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
MAX = (1 << (WIDTH - 1)) - 1
ROW_BITS = (ROWS - 1).bit_length()


def packed(values: list[int], width: int) -> int:
    return sum((v & ((1 << width) - 1)) << (width * i) for i, v in enumerate(values))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def rows_learn_as_in_golden(dut) -> None:
    """Any row in any cycle; only the distance that learning asks for is kept."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    ends = set()
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        dut.learn.value = 0
        dut.row.value = 0
        dut.blank.value = (1 << LANES) - 1
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for _ in range(ROWS + 4):
            await FallingEdge(dut.clk)
            dut.row.value = packed([rng.randrange(ROWS)] * MEMORIES, ROW_BITS)
            dut.delta.value = rng.getrandbits(DELTA_BITS * LANES)
            clear = int(dut.clear_done.value)
            if clear:
                break
            await RisingEdge(dut.clk)
        assert clear, f"not clear {ROWS + 4} cycles after reset"
        await RisingEdge(dut.clk)

        table = [[0] * LANES for _ in range(ROWS)]
        free = [0] * ROWS  # the cycle from which on a row may be presented again
        shown: list[tuple] = [()] * 6  # presented in this cycle, one cycle before, ...
        bias = [rng.choice((-1, 1)) for _ in range(LANES)]
        for now in range(500):
            if now % 60 == 0:
                bias = [rng.choice((-1, 1)) for _ in range(LANES)]
            row = rng.choice([r for r in range(ROWS) if free[r] <= now])
            learn = rng.random() < 0.6
            if learn:
                free[row] = now + 5
            # A row that learns is not blanked: what is written would be.
            blank = 0 if learn or rng.random() < 0.7 else rng.getrandbits(LANES)
            delta = [rng.randint(0, 3) * b if rng.random() < 0.8 else rng.randint(-3, 3)
                     for b in bias]  # fmt: skip
            shown = [(row, learn, blank), *shown[:5]]
            dut.row.value = packed([row] * MEMORIES, ROW_BITS)
            # What belongs to the row of one cycle before.
            dut.learn.value = int(bool(shown[1]) and shown[1][1])
            dut.blank.value = shown[1][2] if shown[1] else 0
            dut.delta.value = packed(delta, DELTA_BITS)
            await FallingEdge(dut.clk)
            if shown[1]:
                read, learnt, blank = shown[1]
                weights = [0 if blank >> e & 1 else w for e, w in enumerate(table[read])]
                if learnt:
                    table[read] = [clip(w + d, MAX) for w, d in zip(weights, delta, strict=True)]
                    ends.update(table[read])
                shown[1] = (read, learnt, weights, weights if blank else table[read])
            if shown[2]:
                assert int(dut.weights.value) == packed(shown[2][2], WIDTH), f"row {shown[2][0]}"
            if shown[4]:
                assert int(dut.learnt.value) == packed(shown[4][3], WIDTH), f"row {shown[4][0]}"
            await RisingEdge(dut.clk)
        dut.learn.value = 0
    assert {MAX, -MAX - 1} <= ends, "the weights never saturated"
