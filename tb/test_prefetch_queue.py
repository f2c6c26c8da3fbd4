# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The prefetch queue against a Python deque: order, room for a selection, and the flush."""

from __future__ import annotations

import json
import os
import random
from collections import Counter, deque
from pathlib import Path

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import Shapes, pack, run_bench, seeds
from stmoe.payloads import selection_layout
from stmoe.prefetch_queue import PrefetchQueue
from stmoe_golden.config import EngineConfig, preset

SHAPES = {
    "tiny": preset("tiny"),
    "one": EngineConfig(select_max=1),
    "odd": EngineConfig(num_layers=5, num_experts=7, top_k=3, quota=3),
    "large": preset("olmoe_1b_7b"),
    "ahead": EngineConfig(select_max=3, lookahead=3),
}
CYCLES = 400


# pytest ---------------------------------------------------------------------------------------


def test_queue_keeps_order_and_flushes() -> None:
    """All benches below, every shape, in one simulation."""
    run_bench(
        Shapes({name: PrefetchQueue(config) for name, config in SHAPES.items()}),
        "prefetch_queue",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
    )


# cocotb ---------------------------------------------------------------------------------------

SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))


class TB:
    """One queue of the simulation: a driver on each side, and the deque it must equal."""

    def __init__(self, dut, shape: str) -> None:
        self.dut = dut
        self.config = SHAPES[shape]
        self.most = self.config.num_select * self.config.look
        self.layout = selection_layout(self.config)
        names = ("i__payload", "i__valid", "i__ready", "o__payload", "o__valid", "o__ready")
        self.port = {n: getattr(dut, f"{shape}__{n}") for n in (*names, "flush", "removed")}
        self.seen: Counter[str] = Counter()
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    def get(self, name: str) -> int:
        return int(self.port[name].value)

    async def reset(self, seed: int) -> None:
        self.dut._log.warning("seed %d", seed)
        self.rng = random.Random(seed)
        self.queue: deque[int] = deque()
        self.offer: int | None = None
        self.number = 0
        for name in ("i__valid", "o__ready", "flush"):
            self.port[name].value = 0
        self.dut.rst.value = 1
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0

    def pick(self) -> int:
        """A selection that differs from the ones just before it."""
        c, rng = self.config, self.rng
        self.number += 1
        low = 1 << (c.score_bits - 1)
        return pack(
            self.layout,
            {
                "layer": rng.randrange(c.num_layers),
                "expert": self.number % c.num_experts,
                "score": rng.randrange(-low, low),
            },
        )

    async def cycle(self, *, valid: bool, ready: bool, flush: bool) -> None:
        """One cycle: ``valid`` begins an offer; one that has begun stands until it is taken."""
        if self.offer is None and valid:
            self.offer = self.pick()
        self.port["i__valid"].value = self.offer is not None
        self.port["i__payload"].value = (
            self.offer if self.offer is not None else self.rng.getrandbits(self.layout.size)
        )
        self.port["o__ready"].value = ready
        self.port["flush"].value = flush
        await ReadOnly()
        entries = len(self.queue)
        taken = self.get("i__ready") and self.offer is not None
        if entries < self.most:
            assert self.get("i__ready"), f"blocked with {entries} of {self.most}"
        if flush:
            assert not self.get("o__valid"), "an entry is offered during a flush"
            assert self.get("removed") == (entries > 0), f"removed with {entries} entries"
            if entries:
                self.queue.popleft()
                self.seen["removed"] += 1
                self.seen["removed as one enters"] += bool(taken)
                self.seen["removed though ready"] += ready
        else:
            assert not self.get("removed"), "removed without a flush"
            assert self.get("o__valid") == (entries > 0), f"o.valid with {entries} entries"
            if entries:
                want = self.queue[0]
                assert self.get("o__payload") == want, f"{self.get('o__payload'):#x}, not {want:#x}"
                if ready:
                    self.queue.popleft()
                    self.seen["taken"] += 1
                else:
                    self.seen["stalled"] += 1
        self.seen["full selection"] += entries >= self.most
        if taken:
            self.queue.append(self.offer)
            self.offer = None
        await FallingEdge(self.dut.clk)


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def random_traffic(dut, shape: str) -> None:
    """Random offers, stalls and flushes of any length, with the input running on."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        flush = False
        for number in range(CYCLES):
            if number % 50 == 0:
                offers, takes = rng.choice((0.2, 0.5, 1)), rng.choice((0.1, 0.5, 1))
                begin, end = rng.choice((0, 0.02, 0.2)), rng.choice((0.1, 0.5))
            flush = rng.random() >= end if flush else rng.random() < begin
            await tb.cycle(valid=rng.random() < offers, ready=rng.random() < takes, flush=flush)
    dut._log.warning("%s: %s", shape, dict(tb.seen))
    if len(SEEDS) >= 10:
        missing = [name for name, count in tb.seen.items() if not count]
        assert not missing, f"{shape}: never seen: {missing}"


@cocotb.test(timeout_time=5, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def selection_after_selection(dut, shape: str) -> None:
    """As the engine uses it: flush until nothing is removed, then a whole selection enters
    without a stall, part of it starts, and the next flush removes exactly the rest."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    for seed in SEEDS:
        await tb.reset(seed)
        rng = tb.rng
        for _ in range(10):
            left = len(tb.queue)
            removed = tb.seen["removed"]
            for _ in range(left + 1):  # one more: nothing is removed
                await tb.cycle(valid=False, ready=rng.random() < 0.5, flush=True)
            assert tb.seen["removed"] - removed == left
            assert not tb.queue
            for _ in range(rng.randint(1, tb.config.num_select)):
                await tb.cycle(valid=True, ready=False, flush=False)
                assert tb.offer is None, "an entry of the selection was not taken"
            for _ in range(rng.randrange(2 * tb.config.num_select)):
                await tb.cycle(valid=False, ready=rng.random() < 0.3, flush=False)
