# amaranth: UnusedElaboratable=no
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

from simulation import Shapes, run_bench, seeds
from stmoe.learner import DELTA_BITS, Learner
from stmoe.synthesis import GROUPS
from stmoe_golden.config import USE_BITS, EngineConfig
from stmoe_golden.predictor import learn, new_state, params_of

# Margins in another order than the default's; one is beyond all scores.
CONFIG = EngineConfig(
    num_layers=1, num_experts=11, top_k=4, quota=4, weight_bits=4,
    margin_low=3, margin_step=2047, margin_high=20,
)  # fmt: skip
FOLDED = CONFIG.replace(num_experts=12, lanes=4)
"""Works on a third of the experts at a time."""
CONFIGS = {"whole": CONFIG, "thirds": FOLDED}


def test_learner_is_golden() -> None:
    run_bench(
        Shapes({name: Learner(config) for name, config in CONFIGS.items()}),
        "learner",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not None"):
        Learner(None)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))


def packed(values, width: int) -> int:
    return sum((int(v) & ((1 << width) - 1)) << (width * i) for i, v in enumerate(values))


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(name=list(CONFIGS))
async def learner_is_golden(dut, name: str) -> None:
    """Scores around every margin, use counts around every step; outputs hold without enable."""
    config = CONFIGS[name]
    count, lanes = config.num_experts, config.num_lanes
    port = {p: getattr(dut, f"{name}__{p}") for p in Learner(config).signature.members}
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    # Legal traffic stays one quarter above the lowest score.
    high = (1 << (config.score_bits - 1)) - 1
    margins = (config.margin_low, config.margin_step, config.margin_high)
    edges = [sign * 4 * m for m in margins for sign in (-1, 1)] + [0, high, -high]
    seen = set()
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        port["enable"].value = 0
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
                for _ in range(count)
            ]
            use = [
                rng.choice((0, 1, 2, 31, 32, 33, 63, 64, 990, 991, 1022, 1023, rng.randrange(1024)))
                for _ in range(count)
            ]
            experts = rng.sample(range(count), config.top_k)
            enable = rng.random() < 0.7
            first = lanes * rng.randrange(config.folds)
            part = slice(first, first + lanes)
            port["score"].value = packed(score[part], config.score_bits)
            port["use"].value = packed(use[part], USE_BITS)
            port["used"].value = sum(1 << e - first for e in experts if e in range(count)[part])
            port["enable"].value = -int(enable) % (1 << GROUPS)
            await FallingEdge(dut.clk)
            assert (int(port["delta"].value), int(port["use_next"].value)) == expected
            if enable:
                # The bias starts at 0 here, so what learning leaves there is the delta.
                state = new_state(config)
                state.score[0], state.use[0] = score, use
                learn(params_of(config), state, 0, np.array(experts))
                delta, counts = state.bias[0][part], state.use[0][part]
                seen.update(delta.tolist())
                expected = packed(delta, DELTA_BITS), packed(counts, USE_BITS)
            await RisingEdge(dut.clk)
    # margin_step is beyond all scores, so one step is always taken.
    assert seen == set(range(-3, 4)) - {0}, "not every delta was seen"
