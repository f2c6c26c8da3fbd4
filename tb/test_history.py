# SPDX-License-Identifier: Apache-2.0
"""History: what the layers used last, against the golden model's history."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import cocotb
import numpy as np
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


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 'tiny'"):
        History("tiny")


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
BITS = lane_bits(CONFIG)


def packed(experts) -> int:
    return sum(int(e) << (BITS * i) for i, e in enumerate(experts))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def history_is_golden(dut) -> None:
    """Events in layer order with pauses, and new sequences anywhere."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    params = params_of(CONFIG)
    layers, depth = CONFIG.num_layers, CONFIG.depth
    known_sets = 0
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        for name in ("write", "forget", "layer", "row"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        state = new_state(CONFIG)
        layer = 0
        for _ in range(200):
            dut.layer.value = layer
            dut.write.value = dut.forget.value = 0
            for _ in range(rng.randrange(3) + 2):
                dut.row.value = rng.getrandbits(BITS * CONFIG.top_k)
                await RisingEdge(dut.clk)
            experts = rng.sample(range(CONFIG.num_experts), CONFIG.top_k)
            forget = rng.random() < 0.06
            dut.forget.value, dut.write.value = int(forget), int(not forget)
            dut.row.value = packed(experts)
            await FallingEdge(dut.clk)
            # Here is what the event of this cycle has needed all along.
            recent, recent_known = int(dut.recent.value), int(dut.recent_known.value)
            width = BITS * CONFIG.top_k
            found = [(int(dut.previous_known.value), int(dut.previous.value))] + [
                (recent_known >> d & 1, recent >> d * width & (1 << width) - 1)
                for d in range(depth)
            ]
            sources = [layer] + [(layer - d) % layers for d in range(1, depth + 1)]
            for source, (known, row) in zip(sources, found, strict=True):
                expected = state.history[source].tolist()
                assert known == (expected[0] >= 0), f"layer {source} at layer {layer}"
                if known:
                    known_sets += 1
                    assert row == packed(expected), f"layer {source} at layer {layer}"
            await RisingEdge(dut.clk)
            if forget:
                begin_sequence(params, state)
                layer = 0
            else:
                remember(state, layer, np.array(experts))
                layer = (layer + 1) % layers
    assert known_sets > 100 * len(SEEDS)
