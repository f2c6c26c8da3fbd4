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
from amaranth.hdl import ClockDomain, DomainRenamer, Module
from amaranth.lib import wiring
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, RisingEdge

from simulation import run_bench, seeds, unpack
from stmoe.payloads import selection_layout
from stmoe.selector import Selector
from stmoe.synthesis import GROUPS
from stmoe_golden.config import EngineConfig
from stmoe_golden.predictor import select

CONFIGS = {
    # No power of two: some nodes have a single child, at several levels.
    "odd": EngineConfig(num_layers=5, num_experts=11, top_k=3, quota=1),
    # Everything may be picked.
    "all": EngineConfig(num_layers=2, num_experts=8, top_k=2, quota=1, select_max=64),
    # A tree without a node.
    "one": EngineConfig(num_layers=3, num_experts=1, top_k=1, quota=1, select_max=1),
    # Folds: two, and a number that is no power of two of such a number of lanes; a list that never
    # fills; a lane at a time; one pick.
    "halves": EngineConfig(num_experts=8, lanes=4, top_k=2, quota=1),
    "thirds": EngineConfig(num_experts=9, lanes=3, top_k=2, quota=1),
    "pairs": EngineConfig(num_experts=6, lanes=2, top_k=2, quota=1, select_max=64),
    "singles": EngineConfig(num_experts=6, lanes=1, top_k=3, quota=1, select_max=3),
    "best": EngineConfig(num_experts=4, lanes=2, top_k=1, quota=1, select_max=1),
}


def listed(row: list[int], allowed: int, threshold: int, config: EngineConfig) -> list[int]:
    """How many candidates of each fold are put in the list of the best so far."""
    best: list[int] = []
    counts = []
    for first in range(0, config.num_experts, config.num_lanes):
        lanes = range(first, first + config.num_lanes)
        able = [row[e] for e in lanes if allowed >> e & 1 and row[e] >= threshold]
        counts.append(0)
        for score in sorted(able, reverse=True):
            if len(best) == config.num_select and score <= best[-1]:
                break
            best = sorted([*best, score], reverse=True)[: config.num_select]
            counts[-1] += 1
    return counts


class SideBySide(wiring.Component):
    """Several components in one model, which takes far less time to build than one model each.

    The members of each have its name in front, and each has a clock and a reset of its own
    (``NAME_clk``, ``NAME_rst``), so that those that are not under test cost no simulation time.
    """

    def __init__(self, components: dict[str, wiring.Component]):
        self.components = components
        members: dict[str, wiring.Member] = {}
        for name, component in components.items():
            members[f"{name}_clk"] = members[f"{name}_rst"] = wiring.In(1)
            members[name] = wiring.Out(component.signature)
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name, component in self.components.items():
            m.domains += (domain := ClockDomain(name))
            m.d.comb += [
                domain.clk.eq(getattr(self, f"{name}_clk")),
                domain.rst.eq(getattr(self, f"{name}_rst")),
            ]
            m.submodules[name] = DomainRenamer(name)(component)
            wiring.connect(m, wiring.flipped(getattr(self, name)), component)
        return m


def test_selector_is_golden() -> None:
    """Builds all configurations and runs all coroutines below."""
    run_bench(
        SideBySide({name: Selector(config) for name, config in CONFIGS.items()}),
        "selectors",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        Selector(3)


SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))


class Prefixed:
    """The ports of one component of :class:`SideBySide`."""

    def __init__(self, dut, name: str):
        self.dut, self.name = dut, name
        self.clk, self.rst = getattr(dut, f"{name}_clk"), getattr(dut, f"{name}_rst")

    def __getattr__(self, port: str):
        handle = getattr(self.dut, f"{self.name}__{port}")
        setattr(self, port, handle)
        return handle


def scores(rng: random.Random, experts: int, high: int) -> list[int]:
    """Many ties, both ends of the range, or anything."""
    kind = rng.randrange(3)
    if kind == 0:
        return [rng.randint(-2, 2) for _ in range(experts)]
    if kind == 1:
        return [rng.choice((-high - 1, -high, -1, 0, high)) for _ in range(experts)]
    return [rng.randint(-high - 1, high) for _ in range(experts)]


@cocotb.test(timeout_time=4, timeout_unit="ms")
@cocotb.parametrize(name=list(CONFIGS))
async def selector_is_golden(dut, name: str) -> None:
    """Random rows, masks and thresholds; random stalls, and held back before the first pick."""
    config, log = CONFIGS[name], dut._log
    experts, bits = config.num_experts, config.score_bits
    layout = selection_layout(config)
    mask = (1 << bits) - 1
    lanes = config.num_lanes
    levels = (lanes - 1).bit_length()
    dut = Prefixed(dut, name)
    cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    total = 0
    for seed in SEEDS:
        log.warning("%s, seed %d", name, seed)
        rng = random.Random(seed)
        fast = seed % 3 == 0  # nothing stalls: the cycle of every pick is known
        for port in ("start", "hold", "o__ready", *(["load"] if config.folds == 1 else [])):
            getattr(dut, port).value = 0
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        for _ in range(40):
            for _ in range(rng.randrange(3)):
                dut.o__ready.value = rng.getrandbits(1)
                if config.folds == 1:
                    # Nothing comes of a row that is loaded without a start.
                    dut.load.value = -rng.getrandbits(1) % (1 << GROUPS)
                    dut.candidates.value = rng.getrandbits(lanes)
                await FallingEdge(dut.clk)
                assert not int(dut.o__valid.value) and not int(dut.over.value)
                await RisingEdge(dut.clk)
            row = scores(rng, experts, mask >> 1)
            allowed = rng.getrandbits(experts) | (rng.getrandbits(experts) if fast else 0)
            threshold = rng.choice([rng.choice(row), rng.choice(row) + 1, -1 << (bits - 1)])
            threshold = min(threshold, mask >> 1)
            layer = rng.randrange(config.num_layers)
            picks = select(
                np.array(row),
                np.array([allowed >> e & 1 for e in range(experts)], bool),
                threshold,
                config.num_select,
            )
            expected = [{"layer": layer, "expert": int(e), "score": row[e]} for e in picks.tolist()]
            dut.threshold.value = threshold & mask
            dut.layer.value = layer
            dut.start.value = 1
            if config.folds == 1:
                dut.load.value = (1 << GROUPS) - 1
            for fold in range(config.folds):
                part = row[fold * lanes : (fold + 1) * lanes]
                dut.score.value = sum((s & mask) << (bits * e) for e, s in enumerate(part))
                dut.candidates.value = allowed >> fold * lanes & (1 << lanes) - 1
                if config.folds > 1:
                    dut.fold.value = fold
                    dut.o__ready.value = rng.getrandbits(1)
                    await FallingEdge(dut.clk)
                    assert not int(dut.o__valid.value) and not int(dut.over.value)
                await RisingEdge(dut.clk)
                # All other inputs were taken with `start`, of the first fold.
                dut.threshold.value = rng.getrandbits(bits)
                dut.layer.value = rng.randrange(config.num_layers)
            dut.start.value = 0
            if config.folds == 1:
                dut.load.value = 0
            dut.score.value = rng.getrandbits(bits * lanes)
            dut.candidates.value = rng.getrandbits(lanes)
            hold = 0 if fast or rng.random() < 0.5 else rng.randrange(20)
            taken, offered = [], None
            first, step = 2 + levels, 2
            if config.folds > 1:
                puts = listed(row, allowed, threshold, config)
                first = 1 + config.folds * (2 + levels) + sum(puts) * (2 if lanes > 1 else 1)
                step = 1
            for cycle in range(config.folds, 400):
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
                    taken.append(unpack(layout, payload))
                    assert taken == expected[: len(taken)]
                    if fast:
                        due = first + step * (len(taken) - 1)
                        if experts > 1:
                            assert cycle == due, f"pick {len(taken)} in {cycle}, not {due}"
                await RisingEdge(dut.clk)
                if over:
                    break
            assert over, "no end"
            assert taken == expected
            if fast:
                last = first + step * len(expected)
                assert cycle <= (last if config.folds > 1 else 3 * config.num_select + 8)
            total += len(taken)
    log.warning("%d picks", total)
    assert total
