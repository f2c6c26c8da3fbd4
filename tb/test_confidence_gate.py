# SPDX-License-Identifier: Apache-2.0
"""Confidence gate: thresholds against the golden model's, event by event."""

from __future__ import annotations

import json
import os
import random
from collections import Counter as Tally
from pathlib import Path

import cocotb
import pytest
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, RisingEdge

from simulation import run_bench, seeds
from stmoe.confidence_gate import ConfidenceGate
from stmoe_golden.confidence import (
    gate_params,
    new_gate,
    note_bad,
    note_event,
    note_good,
    threshold_of,
)
from stmoe_golden.config import EngineConfig

# Small windows, so that everything happens often; the step brings the highest score into reach.
CONFIG = EngineConfig(
    num_layers=5, num_experts=9, top_k=3, quota=1, weight_bits=4, threshold=-20,
    gate_levels=5, gate_step=256, gate_window=8, gate_strict=6, gate_lenient=2, gate_patience=6,
    lookahead=2, gate_late=3,
)  # fmt: skip


def test_confidence_gate_is_golden() -> None:
    run_bench(
        ConfidenceGate(CONFIG),
        "confidence_gate",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 7"):
        ConfidenceGate(7)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))


def signed(value: int) -> int:
    return value - (value >> (CONFIG.score_bits - 1) << CONFIG.score_bits)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def confidence_gate_is_golden(dut) -> None:
    """Events and bad prefetches three cycles apart and more; the floor and the switch change
    between them; every layer's threshold is looked at all the time."""
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    limit = 1 << (CONFIG.score_bits - 1)
    seen: Tally[str] = Tally()
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        for name in ("event", "bad", "layer", "event_layer", "bad_layer", "good", "idle", "late"):
            getattr(dut, name).value = 0
        adaptive, floor = 1, CONFIG.threshold * 4
        dut.adaptive.value, dut.floor.value = adaptive, floor & (2 * limit - 1)
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for _ in range(CONFIG.num_layers + 1):
            await RisingEdge(dut.clk)
        state = new_gate(CONFIG.num_layers)
        flood = (0, 0)
        quality, p_idle, p_late = rng.random(), rng.choice((0.1, 0.5, 0.9)), rng.random()
        for _ in range(400):
            params = gate_params(CONFIG, adaptive=bool(adaptive))._replace(floors=(floor,) * 4)
            # Now and then nothing but bad prefetches of one layer, more than a count holds.
            flood = (rng.randrange(CONFIG.num_layers), 24) if rng.random() < 0.01 else flood
            layer = flood[0] if flood[1] else rng.randrange(CONFIG.num_layers)
            moved = False
            event = not flood[1] and rng.random() < 0.6
            flood = (flood[0], max(0, flood[1] - 1))
            if event:
                good = sum(rng.random() < quality for _ in range(CONFIG.top_k))
                idle = int(rng.random() < p_idle)
                late = sum(rng.random() < p_late for _ in range(good))
                dut.late.value = late
                dut.event_layer.value, dut.good.value, dut.idle.value = layer, good, idle
                dut.bad_layer.value = rng.randrange(CONFIG.num_layers)
                before, was_near = int(state.level[layer]), int(state.near[layer])
                for n in range(good):
                    note_good(params, state, layer, n < late)
                moved = bool(note_event(params, state, layer, bool(idle)))
                seen["near" if state.near[layer] else "far"] += state.near[layer] != was_near
                if moved:
                    seen["up" if state.level[layer] > before else "down"] += 1
                    seen["idle" if 2 * idle else "busy"] += 1
            else:
                dut.bad_layer.value = layer
                dut.event_layer.value = rng.randrange(CONFIG.num_layers)
                dut.good.value = rng.randrange(CONFIG.top_k + 1)
                dut.late.value = rng.randrange(CONFIG.top_k + 1)
                note_bad(params, state, layer)
                seen["saturated"] += int(state.bad[layer] == 2 * CONFIG.gate_window - 1)
            dut.event.value, dut.bad.value = int(event), int(not event)
            await RisingEdge(dut.clk)
            dut.event.value = dut.bad.value = 0
            for cycle in range(3):
                await FallingEdge(dut.clk)
                assert int(dut.busy.value) == 1, cycle
                await RisingEdge(dut.clk)
            await FallingEdge(dut.clk)
            assert int(dut.busy.value) == 0
            if event:
                assert int(dut.changed.value) == moved
            if moved:
                want = int(threshold_of(params, state, layer, 1))
                assert signed(int(dut.changed_threshold.value)) == want
                seen["highest"] += want == limit - 1
            # The threshold of any layer, two cycles after it was asked for.
            for _ in range(rng.randrange(3)):
                asked = rng.randrange(CONFIG.num_layers)
                await RisingEdge(dut.clk)
                dut.layer.value = asked
                await RisingEdge(dut.clk)
                dut.layer.value = rng.randrange(CONFIG.num_layers)
                await RisingEdge(dut.clk)
                await FallingEdge(dut.clk)
                want = int(threshold_of(params, state, asked, 1))
                assert signed(int(dut.threshold.value)) == want, asked
                none = int(threshold_of(params, state, asked, 2)) >= limit
                assert bool(int(dut.near.value)) == none, asked
            await RisingEdge(dut.clk)
            if rng.random() < 0.05:
                adaptive = int(rng.random() < 0.8)
                floor = rng.choice((CONFIG.threshold * 4, rng.randrange(-limit, limit)))
                dut.adaptive.value, dut.floor.value = adaptive, floor & (2 * limit - 1)
                seen["off"] += 1 - adaptive
            if rng.random() < 0.05:
                quality, p_late = rng.random(), rng.random()
    for what in ("up", "down", "idle", "busy", "near", "far", "saturated", "highest", "off"):
        assert seen[what] > 10, f"{what} happened {seen[what]} times"
