# SPDX-License-Identifier: Apache-2.0
"""Selector: every pick, its order and its cycle, against the golden ``select``."""

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

from simulation import run_bench, seeds, unpack
from stmoe.payloads import selection_layout
from stmoe.selector import Selector
from stmoe_golden.config import EngineConfig
from stmoe_golden.predictor import select

CONFIGS = {
    # No power of two: some nodes have a single child, at several levels.
    "odd": EngineConfig(num_layers=5, num_experts=11, top_k=3, quota=1),
    # Everything may be picked.
    "all": EngineConfig(num_layers=2, num_experts=8, top_k=2, quota=1, select_max=64),
    # A tree without a node.
    "one": EngineConfig(num_layers=3, num_experts=1, top_k=1, quota=1, select_max=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_selector_is_golden(name: str) -> None:
    run_bench(
        Selector(CONFIGS[name]),
        f"selector_{name}",
        Path(__file__).stem,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds())},
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        Selector(3)


CONFIG = CONFIGS[os.environ.get("CONFIG", "odd")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
EXPERTS, BITS = CONFIG.num_experts, CONFIG.score_bits
PICK = selection_layout(CONFIG)
MASK = (1 << BITS) - 1
LEVELS = (EXPERTS - 1).bit_length()


def scores(rng: random.Random) -> list[int]:
    """Many ties, both ends of the range, or anything."""
    high = MASK >> 1
    kind = rng.randrange(3)
    if kind == 0:
        return [rng.randint(-2, 2) for _ in range(EXPERTS)]
    if kind == 1:
        return [rng.choice((-high - 1, -high, -1, 0, high)) for _ in range(EXPERTS)]
    return [rng.randint(-high - 1, high) for _ in range(EXPERTS)]


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def selector_is_golden(dut) -> None:
    """Random rows, masks and thresholds; random stalls, and held back before the first pick."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    total = 0
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        fast = seed % 3 == 0  # nothing stalls: the cycle of every pick is known
        for name in ("start", "hold", "o__ready"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for _ in range(40):
            for _ in range(rng.randrange(3)):
                dut.o__ready.value = rng.getrandbits(1)
                await FallingEdge(dut.clk)
                assert not int(dut.o__valid.value) and not int(dut.over.value)
                await RisingEdge(dut.clk)
            row = scores(rng)
            allowed = rng.getrandbits(EXPERTS) | (rng.getrandbits(EXPERTS) if fast else 0)
            threshold = rng.choice([rng.choice(row), rng.choice(row) + 1, -1 << (BITS - 1)])
            threshold = min(threshold, MASK >> 1)
            layer = rng.randrange(CONFIG.num_layers)
            picks = select(
                np.array(row),
                np.array([allowed >> e & 1 for e in range(EXPERTS)], bool),
                threshold,
                CONFIG.num_select,
            )
            expected = [{"layer": layer, "expert": int(e), "score": row[e]} for e in picks.tolist()]
            dut.score.value = sum((s & MASK) << (BITS * e) for e, s in enumerate(row))
            dut.candidates.value = allowed
            dut.threshold.value = threshold & MASK
            dut.layer.value = layer
            dut.start.value = 1
            await RisingEdge(dut.clk)
            dut.start.value = 0
            # All inputs were taken with `start`.
            dut.score.value = rng.getrandbits(BITS * EXPERTS)
            dut.candidates.value = rng.getrandbits(EXPERTS)
            dut.threshold.value = rng.getrandbits(BITS)
            dut.layer.value = rng.randrange(CONFIG.num_layers)
            hold = 0 if fast or rng.random() < 0.5 else rng.randrange(20)
            taken, offered = [], None
            for cycle in range(1, 400):
                ready = fast or rng.random() < 0.6
                dut.o__ready.value = int(ready)
                dut.hold.value = int(cycle <= hold)
                await FallingEdge(dut.clk)
                valid, over = int(dut.o__valid.value), int(dut.over.value)
                payload = int(dut.o__payload.value) if valid else None
                assert cycle > hold or not (valid or over), "not held back"
                assert offered in (None, payload), "a pick was withdrawn or changed"
                offered = payload
                if valid and ready:
                    offered = None
                    taken.append(unpack(PICK, payload))
                    assert taken == expected[: len(taken)]
                    if fast:
                        due = 2 + LEVELS + 2 * (len(taken) - 1)
                        if EXPERTS > 1:
                            assert cycle == due, f"pick {len(taken)} in {cycle}, not {due}"
                await RisingEdge(dut.clk)
                if over:
                    break
            assert over, "no end"
            assert taken == expected
            if fast:
                assert cycle <= 3 * CONFIG.num_select + 8
            total += len(taken)
    dut._log.warning("%d picks", total)
    assert total
