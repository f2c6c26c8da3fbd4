# SPDX-License-Identifier: Apache-2.0
"""Learner: deltas and use counts of an event against the golden ``learn``."""

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
from stmoe.learner import DELTA_BITS, Learner
from stmoe_golden.config import USE_BITS, EngineConfig
from stmoe_golden.predictor import learn, new_state, params_of

# Margins in another order than the default's; one is beyond all scores.
CONFIG = EngineConfig(
    num_layers=1, num_experts=11, top_k=4, quota=4, weight_bits=4,
    margin_low=3, margin_step=2047, margin_high=20,
)  # fmt: skip


def test_learner_is_golden() -> None:
    run_bench(
        Learner(CONFIG),
        "learner",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not None"):
        Learner(None)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
EXPERTS = CONFIG.num_experts


def packed(values, width: int) -> int:
    return sum((int(v) & ((1 << width) - 1)) << (width * i) for i, v in enumerate(values))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def learner_is_golden(dut) -> None:
    """Scores around every margin, use counts around every step; outputs hold without enable."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    # Legal traffic stays one quarter above the lowest score.
    high = (1 << (CONFIG.score_bits - 1)) - 1
    margins = (CONFIG.margin_low, CONFIG.margin_step, CONFIG.margin_high)
    edges = [sign * 4 * m for m in margins for sign in (-1, 1)] + [0, high, -high]
    seen = set()
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        dut.enable.value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        expected = (0, 0)
        for _ in range(200):
            score = [
                max(-high, min(high, rng.choice(edges) + rng.randint(-2, 2)))
                if rng.random() < 0.7
                else rng.randint(-high, high)
                for _ in range(EXPERTS)
            ]
            use = [
                rng.choice((0, 1, 2, 31, 32, 33, 63, 64, 990, 991, 1022, 1023, rng.randrange(1024)))
                for _ in range(EXPERTS)
            ]
            experts = rng.sample(range(EXPERTS), CONFIG.top_k)
            enable = rng.random() < 0.7
            dut.score.value = packed(score, CONFIG.score_bits)
            dut.use.value = packed(use, USE_BITS)
            dut.used.value = sum(1 << e for e in experts)
            dut.enable.value = int(enable)
            await FallingEdge(dut.clk)
            assert (int(dut.delta.value), int(dut.use_next.value)) == expected
            if enable:
                # The bias starts at 0 here, so what learning leaves there is the delta.
                state = new_state(CONFIG)
                state.score[0], state.use[0] = score, use
                learn(params_of(CONFIG), state, 0, np.array(experts))
                seen.update(state.bias[0].tolist())
                expected = packed(state.bias[0], DELTA_BITS), packed(state.use[0], USE_BITS)
            await RisingEdge(dut.clk)
    # margin_step is beyond all scores, so one step is always taken.
    assert seen == set(range(-3, 4)) - {0}, "not every delta was seen"
