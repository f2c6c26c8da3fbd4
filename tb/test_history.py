# SPDX-License-Identifier: Apache-2.0
"""History: what a layer used last, against the golden model's history."""

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
from stmoe.expert_map import lane_bits
from stmoe.history import History
from stmoe_golden.config import EngineConfig
from stmoe_golden.predictor import begin_sequence, new_state, params_of, remember

CONFIG = EngineConfig(num_layers=5, num_experts=7, top_k=3, quota=2)


def test_history_is_golden() -> None:
    run_bench(
        History(CONFIG),
        "history",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 'tiny'"):
        History("tiny")


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
BITS = lane_bits(CONFIG)


def packed(experts) -> int:
    return sum(int(e) << (BITS * i) for i, e in enumerate(experts))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def history_is_golden(dut) -> None:
    """Reads, writes and new sequences at random, often all in one cycle."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    params = params_of(CONFIG)
    known_reads = 0
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        for name in ("read", "write", "forget"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        state = new_state(CONFIG)
        expected = None  # the row of the last read, if there was one
        for _ in range(400):
            read, write, forget = (rng.random() < p for p in (0.5, 0.5, 0.06))
            write = write and not forget
            read_layer, write_layer = (rng.randrange(CONFIG.num_layers) for _ in range(2))
            experts = rng.sample(range(CONFIG.num_experts), CONFIG.top_k)
            # A row is not read in the cycle in which it is written.
            read = read and not (write and read_layer == write_layer)
            dut.read.value, dut.read_layer.value = int(read), read_layer
            dut.write.value, dut.write_layer.value = int(write), write_layer
            dut.write_row.value = packed(experts)
            dut.forget.value = int(forget)
            await FallingEdge(dut.clk)
            if expected is not None:
                assert int(dut.known.value) == (expected[0] >= 0)
                if expected[0] >= 0:
                    known_reads += 1
                    assert int(dut.row.value) == packed(expected)
            if read:
                expected = state.history[read_layer].tolist()
            if write:
                remember(state, write_layer, experts)
            if forget:
                begin_sequence(params, state)
            await RisingEdge(dut.clk)
    assert known_reads > 100 * len(SEEDS)
