# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The victim chooser against the golden model's ``victim`` and ``admits``.

The bench plays the three memories: each answers one cycle after its address. Random states make
ties, refusals and every way through the walk frequent; the bench fails when one never came up.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import Shapes, run_bench, seeds
from stmoe.expert_map import LaneState
from stmoe.victim_chooser import VictimChooser
from stmoe_golden.buffer import BufferState, Lane, admits, evictable, lowest, value_of, victim
from stmoe_golden.config import FRACTION_BITS, USE_BITS, EngineConfig, preset

SHAPES = {
    "one_layer": EngineConfig(num_layers=1, num_experts=6, use_shift=6),
    "one_expert": EngineConfig(num_layers=3, num_experts=1, top_k=1, quota=1),
    "single": EngineConfig(num_layers=1, num_experts=1, top_k=1, quota=1, admission_bonus=0),
    "odd": EngineConfig(num_layers=4, num_experts=13, top_k=3, use_shift=0, admission_bonus=0),
    "small": EngineConfig(num_layers=5, num_experts=6, admission_bonus=2047),
    # The bonus is larger than any value.
    "narrow": EngineConfig(
        num_layers=3,
        num_experts=4,
        top_k=1,
        quota=1,
        weight_bits=4,
        spatial_depth=0,
        admission_bonus=2047,
    ),  # fmt: skip
    "large": preset("gpt_oss_20b"),
    # Fewer lanes than experts.
    "halves": EngineConfig(num_layers=4, num_experts=12, lanes=6, top_k=3, admission_bonus=0),
    "thirds": EngineConfig(num_layers=3, num_experts=9, lanes=3, admission_bonus=2),
    "quarters": EngineConfig(num_layers=2, num_experts=8, lanes=2, use_shift=0),
    "lane": EngineConfig(num_layers=1, num_experts=5, lanes=1, quota=1, admission_bonus=0),
}
SEARCHES = {
    "one_layer": 60,
    "one_expert": 40,
    "single": 40,
    "odd": 50,
    "small": 60,
    "narrow": 60,
    "large": 25,
    "halves": 50,
    "thirds": 60,
    "quarters": 60,
    "lane": 40,
}


# pytest ---------------------------------------------------------------------------------------


def test_victim_is_the_golden_models() -> None:
    """All benches below, every shape, in one simulation."""
    run_bench(
        Shapes({name: VictimChooser(config) for name, config in SHAPES.items()}),
        "victim_chooser",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
    )


def test_lane_states_are_the_golden_models() -> None:
    assert {s.name: s.value for s in LaneState} == {s.name: int(s) for s in Lane}


# cocotb ---------------------------------------------------------------------------------------

SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
KEPT_LANES = [int(s) for s in Lane if not evictable(int(s))]
EVICTABLE_LANES = [int(s) for s in Lane if evictable(int(s))]


@dataclass
class Search:
    """One state of the buffer and one load that needs a slot."""

    buffer: BufferState
    score: np.ndarray
    use: np.ndarray
    latest: int
    load_layer: int
    load_expert: int
    current_set: np.ndarray
    demand: bool


def random_search(rng: np.random.Generator, config: EngineConfig) -> Search:
    layers, experts = config.num_layers, config.num_experts
    shape = (layers, experts)
    latest = int(rng.integers(layers))
    load_layer = latest if rng.random() < 0.4 else int(rng.integers(layers))
    current_set = np.zeros(experts, np.bool_)
    if rng.random() < 0.8:
        current_set[rng.permutation(experts)[: config.top_k]] = True
    elif rng.random() < 0.5:
        current_set = rng.random(experts) < 0.5

    # Which lanes may be evicted.
    kind = rng.choice(["any", "sparse", "full", "none", "set only", "elsewhere", "behind set"])
    may = {
        "any": rng.random(shape) < 0.4,
        "sparse": rng.random(shape) < 0.5 / experts,
        "full": np.ones(shape, np.bool_),
        "none": np.zeros(shape, np.bool_),
        "set only": np.zeros(shape, np.bool_),
        "elsewhere": rng.random(shape) < rng.choice([0.1, 0.6]),
        "behind set": rng.random(shape) < 0.5,
    }[kind]
    if kind in ("set only", "behind set"):
        may[latest] = current_set
    if kind == "elsewhere":
        may[load_layer] &= current_set if load_layer == latest else False
    lane = np.where(may, rng.choice(EVICTABLE_LANES, shape), rng.choice(KEPT_LANES, shape))

    # Which layers are over their quota.
    quota = rng.integers(0, experts + 1, layers)
    # "behind set": the walk tries the latest layer alone and finds its set only.
    if kind == "elsewhere" and rng.random() < 0.7:
        kind = "few"
    elif kind != "behind set":
        kind = rng.choice(["any", "all", "few"])
    held = {
        "any": quota + rng.integers(-1, 2, layers),
        "all": quota + rng.integers(1, 3, layers),
        "few": quota - (rng.random(layers) < 0.5),
        "behind set": quota - (rng.random(layers) < 0.5),
    }[kind]
    if kind == "behind set" or (kind == "few" and rng.random() < 0.3):
        held[latest] = quota[latest] + 1

    # What they are worth.
    top, most = 1 << (config.score_bits - 1), (1 << USE_BITS) - 1
    kind = rng.choice(["ties", "ties", "full", "extreme"])
    if kind == "ties":
        score, use = rng.integers(-1, 2, shape), rng.integers(0, 2, shape)
    elif kind == "full":
        score, use = rng.integers(-top, top, shape), rng.integers(0, most + 1, shape)
    else:
        score, use = rng.choice([-top, top - 1], shape), rng.choice([0, most], shape)
    load_expert = int(rng.integers(experts))
    bonus = config.admission_bonus << FRACTION_BITS
    if kind == "ties" and bonus < top - 1:
        score[load_layer, load_expert] -= bonus  # so that it decides by one, or is equal
    buffer = BufferState(
        lane.astype(np.int8),
        np.full(shape, -1, np.int32),
        np.maximum(held, 0).astype(np.int32),
        quota.astype(np.int32),
    )
    return Search(
        buffer,
        score.astype(np.int32),
        use.astype(np.int32),
        latest,
        load_layer,
        load_expert,
        current_set,
        bool(rng.random() < 0.5),
    )


def pack_row(row: np.ndarray, bits: int) -> int:
    """A row of lanes, each of ``bits`` bits, lane 0 lowest."""
    return sum((int(lane) & ((1 << bits) - 1)) << (bits * e) for e, lane in enumerate(row))


def pack_flags(flags: np.ndarray) -> int:
    return pack_row(flags, 1)


class TB:
    """One chooser of the simulation, and the memories it reads."""

    def __init__(self, dut, shape: str) -> None:
        self.dut = dut
        self.config = SHAPES[shape]
        self.port = {
            name: getattr(dut, f"{shape}__{name}")
            for name in VictimChooser(self.config).signature.members
        }
        self.memory: dict[str, list[int]] | None = None
        # Of the score_layer two cycles before: the layer, and the row of the score memory.
        self.addresses = (0, 0)
        self.row_address = self.score_address = 0  # the same of one cycle before
        self.waits = 0
        self.shown = (-1, -1)  # rows on the data inputs
        self.answer: dict[str, int] = {}  # while done
        self.rng = np.random.default_rng(0)
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    def get(self, name: str) -> int:
        return int(self.port[name].value)

    def junk(self, *names: str) -> None:
        for name in names:
            width = len(self.port[name])
            self.port[name].value = int.from_bytes(self.rng.bytes(width // 8 + 1)) % (1 << width)

    async def cycle(self) -> None:
        """Finish a cycle whose inputs are driven; returns when the next may be driven."""
        if self.memory is None:
            self.junk("row", "score", "use")
            self.shown = (-1, -1)
        elif self.addresses != self.shown:
            for name, rows in self.memory.items():
                self.port[name].value = rows[self.addresses[name != "row"]]
            self.shown = self.addresses
        await ReadOnly()
        self.addresses = (self.row_address, self.score_address)
        layer, folds = self.get("score_layer"), self.config.folds
        assert layer < self.config.num_layers, f"layer {layer} does not exist"
        self.row_address = layer
        # One fold more is asked for than there are, and not looked at.
        fold = self.get("score_fold") % folds if folds > 1 else 0
        self.score_address = layer * folds + fold
        if folds > 1 and int(self.port["wait"].value):
            self.score_address = layer * folds + (fold + 1) % folds  # what somebody else asks for
        names = ("done", "found", "admitted", "layer", "expert") if self.get("done") else ()
        self.answer = {name: self.get(name) for name in names}
        await FallingEdge(self.dut.clk)

    async def reset(self, seed: int) -> None:
        self.dut._log.warning("seed %d", seed)
        self.rng = np.random.default_rng(seed)
        self.memory = None
        self.port["start"].value = 0
        self.dut.rst.value = 1
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0
        self.addresses, self.score_address = (0, 0), 0
        await self.cycle()
        assert self.answer and not self.answer["found"], "an answer before the first start"

    async def search(self, s: Search) -> tuple[dict[str, int], int]:
        """The answer and after how many cycles from ``start`` it came."""
        config, port, b = self.config, self.port, s.buffer
        ready = np.array([[evictable(lane) for lane in row] for row in b.lane])
        port["demand"].value = int(s.demand)
        port["load_layer"].value = s.load_layer
        port["load_expert"].value = s.load_expert
        port["latest_layer"].value = s.latest
        port["current_set"].value = pack_flags(s.current_set)
        parts = (config.num_layers * config.folds, config.num_lanes)
        self.memory = {
            "row": [pack_row(row, 3) for row in b.lane],
            "score": [pack_row(row, config.score_bits) for row in s.score.reshape(parts)],
            "use": [pack_row(row, USE_BITS) for row in s.use.reshape(parts)],
        }
        self.waits = 0 if self.rng.random() < 0.5 else int(self.rng.integers(config.folds))
        self.shown = (-1, -1)
        over, any_ready = pack_flags(b.held > b.quota), pack_flags(ready.any(axis=1))
        port["over"].value, port["any_ready"].value = over, any_ready
        port["start"].value = 1
        levels = (config.num_experts - 1).bit_length()
        limit = (config.num_layers + 3) * (levels + 8 + config.folds)
        if config.folds > 1:
            port["wait"].value = int(self.rng.integers(2))
        await self.cycle()
        port["start"].value = 0
        for latency in range(1, limit):
            if config.folds > 1:
                # The scores are another's at first; later the chooser need not look at that.
                port["wait"].value = int(latency <= self.waits)
            await self.cycle()
            if self.answer:
                return self.answer, latency - self.waits
        raise AssertionError(f"no answer after {limit} cycles")

    async def idle(self, cycles: int) -> None:
        """The answer stands whatever the other inputs do, until the next start."""
        self.memory = None
        before = self.answer
        for _ in range(cycles):
            self.junk("current_set", "over", "any_ready")
            for name in ("load_layer", "latest_layer"):
                self.port[name].value = int(self.rng.integers(self.config.num_layers))
            self.port["load_expert"].value = int(self.rng.integers(self.config.num_experts))
            await self.cycle()
            assert self.answer == before, f"the answer {before} became {self.answer}"


def walk_finds(s: Search, use_shift: int) -> bool:
    """Whether some layer over its quota has an expert to give."""
    b = s.buffer
    nothing = np.zeros_like(s.current_set)
    return any(
        b.held[m] > b.quota[m]
        and lowest(
            b.lane[m], s.score[m], s.use[m], use_shift, s.current_set if m == s.latest else nothing
        )
        >= 0
        for m in range(len(b.held))
    )


@cocotb.test(timeout_time=10, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def victim_and_latency(dut, shape: str) -> None:
    """found, admitted, layer, expert are golden; the first choice takes its documented time."""
    tb = TB(dut, shape)
    config, shift = tb.config, tb.config.use_shift
    bonus = config.admission_bonus << FRACTION_BITS
    levels = (config.num_lanes - 1).bit_length()
    first_choice = 6 + levels if config.folds == 1 else 7 + levels + config.folds
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        await tb.reset(seed)
        for number in range(SEARCHES[shape]):
            s = random_search(tb.rng, config)
            layer, expert = victim(
                s.buffer, s.score, s.use, shift, s.load_layer, s.latest, s.current_set, s.demand
            )
            found = layer >= 0
            admitted = found and (
                s.demand
                or admits(s.score, s.use, shift, bonus, s.load_layer, s.load_expert, layer, expert)
            )
            answer, latency = await tb.search(s)
            where = f"{shape}, seed {seed}, search {number}: {s}"
            assert answer["found"] == found, f"found {answer['found']}, {where}"
            assert answer["admitted"] == admitted, f"admitted {answer['admitted']}, {where}"
            if found:
                got = (answer["layer"], answer["expert"])
                assert got == (layer, expert), f"victim {got}, not {(layer, expert)}, {where}"

            what = "demand" if s.demand else "prefetch"
            if walk_finds(s, shift):
                seen[f"{what} takes the walk's first"] += 1
                assert latency == first_choice, f"{latency} cycles, not {first_choice}, {where}"
                seen["the walk ends at the latest layer"] += layer == s.latest
            elif (
                found
                and layer == s.load_layer
                and not (s.current_set[expert] and layer == s.latest)
            ):
                seen[f"{what} takes its own layer's"] += 1
                tried = s.buffer.held[s.latest] > s.buffer.quota[s.latest] and any(
                    evictable(lane) for lane in s.buffer.lane[s.latest]
                )
                seen[f"{what} takes its own layer's after the latest"] += tried and (
                    layer != s.latest
                )
            elif found:
                seen["demand falls back to everywhere"] += 1
                seen["demand takes from the current set"] += bool(
                    layer == s.latest and s.current_set[expert]
                )
                seen["demand takes from another layer"] += layer != s.load_layer
            else:
                seen[f"{what} finds nothing"] += 1
            if found:
                worth = value_of(s.score[layer], s.use[layer], expert, shift)
                ties = sum(
                    evictable(s.buffer.lane[layer, e])
                    and value_of(s.score[layer], s.use[layer], e, shift) == worth
                    for e in range(config.num_experts)
                )
                seen["ties"] += ties > 1
                if not s.demand:
                    seen["admitted" if admitted else "refused"] += 1
                    row = s.load_layer
                    value = value_of(s.score[row], s.use[row], s.load_expert, shift)
                    seen["refused as equal"] += value + bonus == worth
            seen["load_layer is the latest"] += s.load_layer == s.latest
            await tb.idle(int(tb.rng.choice([0, 0, 1, 3])))
    dut._log.warning("%s: %s", shape, dict(seen))
    if len(SEEDS) >= 10:
        wanted = {
            "demand takes the walk's first",
            "prefetch takes the walk's first",
            "the walk ends at the latest layer",
            "demand takes its own layer's",
            "prefetch takes its own layer's",
            "demand falls back to everywhere",
            "demand takes from the current set",
            "demand finds nothing",
            "prefetch finds nothing",
            "refused",
            "refused as equal",
            "load_layer is the latest",
        }
        largest = (1 << config.score_bits) + ((1 << USE_BITS) << shift)
        if bonus > largest:
            wanted -= {"refused", "refused as equal"}
        if config.num_experts > 1:
            wanted |= {"ties", "admitted"}
        if config.num_layers > 1:
            wanted |= {
                "demand takes from another layer",
                "admitted",
                "demand takes its own layer's after the latest",
                "prefetch takes its own layer's after the latest",
            }
        missing = wanted - {name for name, count in seen.items() if count}
        assert not missing, f"{shape}: never seen: {sorted(missing)}"
