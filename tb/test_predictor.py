# SPDX-License-Identifier: Apache-2.0
"""Predictor: every pick and every score and use row against the golden model."""

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
from simulation import pack, run_bench, seeds, unpack
from stmoe.payloads import selection_layout
from stmoe.predictor import Predictor
from stmoe_golden.config import USE_BITS, EngineConfig, preset
from stmoe_golden.predictor import Predictor as Golden
from stmoe_golden.predictor import params_of

CONFIGS = {
    "tiny": preset("tiny"),
    # The table widths of gpt_oss_20b; L is no power of two and layers wrap at once.
    "wide": EngineConfig(num_layers=5, num_experts=32, top_k=4, spatial_depth=3, quota=4),
    # D is clamped to 1: the layer ahead is the layer before.
    "pair": EngineConfig(num_layers=2, num_experts=3, top_k=2, quota=1),
    # One layer: no spatial table, nothing ahead, nothing selected.
    "single": EngineConfig(num_layers=1, num_experts=6, top_k=3, quota=6),
    # top_k = E; weights, biases and with them the scores saturate in both directions.
    "narrow": EngineConfig(
        num_layers=3, num_experts=5, top_k=5, quota=5, weight_bits=4, select_max=64,
        margin_low=2047, margin_step=2047, margin_high=0, threshold=-10,
    ),
    # No spatial table although there is a layer ahead: it is selected from its own row.
    "temporal": EngineConfig(
        num_layers=3, num_experts=7, top_k=1, quota=1, staging=3, spatial_depth=0,
        weight_bits=4, margin_low=2047, margin_step=0, margin_high=2047, select_max=5,
    ),
    # Two ranks share a gain step, and K is no power of two.
    "six": EngineConfig(num_layers=4, num_experts=11, top_k=6, quota=3, spatial_depth=2),
}  # fmt: skip


# pytest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_predictor_is_golden(name: str) -> None:
    run_bench(
        Predictor(CONFIGS[name]),
        f"predictor_{name}",
        Path(__file__).stem,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds())},
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        Predictor(3)


# cocotb ---------------------------------------------------------------------------------------

CONFIG = CONFIGS[os.environ.get("CONFIG", "tiny")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
EVENTS = 60
PICK = selection_layout(CONFIG)
PARAMS = {
    (learning, ordered): params_of(CONFIG, learning=learning, ordered=ordered)
    for learning in (False, True)
    for ordered in (False, True)
}


def lanes(value: int, width: int, *, signed: bool) -> list[int]:
    """Lanes of a row read through the victim port."""
    row = [(value >> (width * e)) & ((1 << width) - 1) for e in range(CONFIG.num_experts)]
    return [x - (1 << width) if signed and x >> (width - 1) else x for x in row]


class TB:
    """One predictor beside its golden model; time passes only in :meth:`cycle`.

    Inputs change just after the rising edge and everything is looked at on the falling edge. All
    inputs that the contract does not call stable are random in every cycle.
    """

    def __init__(self, dut) -> None:
        self.dut = dut
        self.driven: dict[str, int] = {}
        self.worst: dict[str, int] = {}
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    def drive(self, name: str, value: int) -> None:
        if self.driven.get(name) != value:
            self.driven[name] = value
            getattr(self.dut, name).value = value

    def read(self, name: str) -> int:
        return int(getattr(self.dut, name).value)

    async def reset(self, seed: int) -> None:
        """Everything as after power-up but for what is in the memories."""
        self.dut._log.warning("seed %d", seed)
        self.rng = rng = random.Random(seed)
        self.fast = seed % 3 == 0  # no stalls at all: latencies are asserted
        self.golden = Golden(CONFIG)
        self.now = 0
        self.busy = self.committing = self.stable = False
        self.sweep: list[int] = []
        self.asked: int | None = None
        self.offered: int | None = None
        self.picks: list[dict] = []
        for name in ("token__valid", "token__payload", "route__valid", "route__payload"):
            self.drive(name, 0)
        for name in ("commit_grant", "absent", "selected__ready", "victim_layer", "rst"):
            self.drive(name, int(name == "rst"))
        for name in ("threshold", "learning", "ordered", "prefetching"):
            self.drive(name, 0)
        for _ in range(3):
            await RisingEdge(self.dut.clk)
        self.drive("rst", 0)
        # Nothing is taken before the tables are clear, however hard one asks.
        asking = rng.random() < 0.5
        self.drive("token__valid", int(asking))
        rows = CONFIG.num_layers << max(1, (CONFIG.num_experts - 1).bit_length())
        for _ in range(rows + 10):
            await FallingEdge(self.dut.clk)
            if self.read("clear_done"):
                break
            assert not self.read("token__ready") and not self.read("route__ready")
            await RisingEdge(self.dut.clk)
        else:
            raise AssertionError(f"not clear {rows + 10} cycles after reset")
        self.drive("token__valid", 0)
        self.sweep = list(range(CONFIG.num_layers))

    def noise(self) -> None:
        """Random values on all inputs that are not stable now."""
        rng = self.rng
        bits = CONFIG.score_bits
        if not self.stable:
            self.drive("threshold", rng.getrandbits(bits))
            self.drive("prefetching", rng.getrandbits(1))
            self.drive("absent", rng.getrandbits(CONFIG.num_experts))
        if not (self.driven["token__valid"] or self.driven["route__valid"]):
            self.drive("learning", rng.getrandbits(1))
            self.drive("ordered", rng.getrandbits(1))

    async def cycle(self) -> None:
        """One cycle with the inputs as they are; checks what holds in every cycle."""
        self.noise()
        rng = self.rng
        # A row read in the cycle before is out; what is read now is seen in the next.
        expected, self.asked = self.asked, None
        if self.sweep or (not self.committing and rng.random() < 0.2):
            layer = self.sweep.pop() if self.sweep else rng.randrange(CONFIG.num_layers)
            self.drive("victim_layer", layer)
            self.asked = layer
            state = self.golden.state
            self.next_rows = (state.score[layer].tolist(), state.use[layer].tolist())
        self.drive("selected__ready", int(self.fast or rng.random() < 0.6))
        await FallingEdge(self.dut.clk)
        if expected is not None:
            score = lanes(self.read("victim_score"), CONFIG.score_bits, signed=True)
            use = lanes(self.read("victim_use"), USE_BITS, signed=False)
            assert (score, use) == self.rows, f"layer {expected}: {score, use} not {self.rows}"
        if self.asked is not None:
            self.rows = self.next_rows
        if self.busy:
            assert not self.read("token__ready") and not self.read("route__ready")
        valid = self.read("selected__valid")
        pick = self.read("selected__payload") if valid else None
        assert self.offered in (None, pick), "a pick was withdrawn or changed"
        self.offered = pick
        if valid:
            self.first = min(self.first, self.now)
            if self.driven["selected__ready"]:
                self.picks.append(unpack(PICK, pick))
                self.offered = None
        self.now += 1

    async def step(self) -> None:
        """To the next cycle: inputs may be changed after this."""
        await RisingEdge(self.dut.clk)

    async def pause(self, count: int) -> None:
        for _ in range(count):
            await self.cycle()
            await self.step()

    def stall(self, most: int = 6) -> int:
        return 0 if self.fast or self.rng.random() < 0.5 else self.rng.randrange(most)

    def note(self, name: str, cycles: int, limit: int) -> None:
        self.worst[name] = max(self.worst.get(name, 0), cycles)
        assert cycles <= limit, f"{name}: {cycles} cycles, not {limit} or fewer"

    async def event(self, stream: str, payload: int, select_layer: int, apply) -> None:
        """One token or route from its handshake to ``selection_over``.

        ``apply(learning, ordered)`` brings the golden model to where the commit ends.
        """
        rng = self.rng
        await self.pause(self.stall(20))
        # Handshake. Settings of this cycle hold for the event.
        learning, ordered = rng.random() < 0.85, rng.random() < 0.6
        self.drive("learning", int(learning))
        self.drive("ordered", int(ordered))
        self.drive(f"{stream}__payload", payload)
        self.drive(f"{stream}__valid", 1)
        self.first = 1 << 60
        self.picks = []
        await self.cycle()
        assert self.read(f"{stream}__ready"), "not ready although idle"
        taken = self.now
        await self.step()
        self.drive(f"{stream}__valid", 0)
        self.drive(f"{stream}__payload", rng.getrandbits(len(getattr(self.dut, f"{stream}__payload"))))
        self.busy = True

        # The request comes, and is held until it is granted.
        wait = self.stall(9)
        while True:
            # A grant is given in the very cycle of the request when there is no delay.
            await FallingEdge(self.dut.clk)
            grant = self.read("commit_request") and wait == 0
            self.drive("commit_grant", int(grant))
            if grant:
                self.committing, self.sweep_left = True, len(self.sweep)
                assert not self.sweep
            await self.cycle_from_here()
            if self.read("commit_request"):
                assert self.read("select_layer") == select_layer or not CONFIG.look
                wait -= 1
            else:
                assert wait >= 0
            assert not self.read("commit_done") and not self.read("selection_over")
            assert self.now - taken < 200, "no commit_request"
            if grant:
                break
            await self.step()
