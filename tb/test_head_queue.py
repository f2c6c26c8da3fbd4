# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The queue with a register as its head against a Python deque: order, room, and both heads."""

from __future__ import annotations

import json
import os
import random
from collections import deque
from pathlib import Path

import cocotb
import pytest
from amaranth.hdl import Module, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import run_bench, seeds
from stmoe.head_queue import HeadQueue

WIDTH = 6
DEPTHS = (1, 2, 3, 8)
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))


class Depths(wiring.Component):
    """Queues side by side, so that all depths are one simulation."""

    def __init__(self) -> None:
        self.queues = {f"q{depth}": HeadQueue(unsigned(WIDTH), depth=depth) for depth in DEPTHS}
        super().__init__({name: Out(queue.signature) for name, queue in self.queues.items()})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name, queue in self.queues.items():
            m.submodules[name] = queue
            wiring.connect(m, wiring.flipped(getattr(self, name)), queue)
        return m


def test_queue_keeps_order() -> None:
    run_bench(Depths(), "head_queue", Path(__file__).stem, env={"SEEDS": json.dumps(seeds())})


@pytest.mark.parametrize("depth", [0, -1, 2.0, "4"])
def test_wrong_depths_are_refused(depth) -> None:
    with pytest.raises(ValueError, match=f"depth must be 1 or more, not {depth!r}"):
        HeadQueue(unsigned(1), depth=depth)


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(depth=DEPTHS)
async def random_traffic(dut, depth: int) -> None:
    """Random offers and stalls: nothing is lost, and an entry is there in the next cycle."""
    names = ("i__payload", "i__valid", "i__ready", "o__payload", "o__valid", "o__ready")
    port = {n: getattr(dut, f"q{depth}__{n}") for n in (*names, "second", "second_valid")}
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    full = passed = 0
    for seed in SEEDS:
        dut._log.warning("seed %d", seed)
        rng = random.Random(seed)
        queue: deque[int] = deque()
        offer = None
        port["i__valid"].value = port["o__ready"].value = 0
        dut.rst.value = 1
        await FallingEdge(dut.clk)
        dut.rst.value = 0
        for number in range(400):
            if number % 50 == 0:
                offers, takes = rng.choice((0.2, 0.5, 1)), rng.choice((0.1, 0.5, 1))
            if offer is None and rng.random() < offers:
                offer = rng.getrandbits(WIDTH)
            take = rng.random() < takes
            port["i__valid"].value = offer is not None
            port["i__payload"].value = rng.getrandbits(WIDTH) if offer is None else offer
            port["o__ready"].value = take
            await ReadOnly()
            ready = int(port["i__ready"].value)
            assert ready or len(queue) >= depth, f"blocked with {len(queue)} of {depth}"
            assert int(port["o__valid"].value) == bool(queue)
            assert int(port["second_valid"].value) == (len(queue) > 1)
            if queue:
                assert int(port["o__payload"].value) == queue[0]
            if len(queue) > 1:
                assert int(port["second"].value) == queue[1]
            full += not ready
            if queue and take:
                queue.popleft()
                passed += 1
            if ready and offer is not None:
                queue.append(offer)
                offer = None
            await FallingEdge(dut.clk)
    assert full and passed
