# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The expert map against plain Python lists: lanes, places, slots and the counts of each layer.

Every input is random in every cycle. A read's data hold every write up to the second cycle before
the one of its address and no later one; contents that no seed has written yet are not looked at.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import Shapes, pack, run_bench, seeds, unpack
from stmoe.expert_map import ExpertMap, LaneState, lane_bits, slot_info_layout
from stmoe_golden.config import EngineConfig, preset

SHAPES = {
    # Nothing is a power of two.
    "odd": EngineConfig(num_layers=5, num_experts=6, top_k=3, quota=3, staging=7),
    "single": EngineConfig(num_layers=1, num_experts=1, top_k=1, quota=1),
    "large": preset("gpt_oss_20b"),
}
CYCLES = {"odd": 600, "single": 150, "large": 400}


# pytest ---------------------------------------------------------------------------------------


def test_map_reads_what_was_written_and_counts() -> None:
    """All benches below, every shape, in one simulation."""
    run_bench(
        Shapes({name: ExpertMap(config) for name, config in SHAPES.items()}),
        "expert_map",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
    )


# cocotb ---------------------------------------------------------------------------------------

SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
STATES = [s.value for s in LaneState]
LANE = 3  # bits of a LaneState


class Model:
    """What the map's contract says of its contents."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.lanes: dict[tuple[int, int], int] = {}
        self.places: dict[int, int] = {}
        self.infos: dict[int, dict[str, int]] = {}
        self.held = [0] * config.num_layers
        self.ready = [0] * config.num_layers


class TB:
    """One map of the simulation, driven with everything random, checked in every cycle."""

    def __init__(self, dut, shape: str) -> None:
        self.dut = dut
        self.config = c = SHAPES[shape]
        block = ExpertMap(c)
        self.port = {n: getattr(dut, f"{shape}__{n}") for n in block.signature.members}
        self.place_layout = block.place_layout
        self.info_layout = slot_info_layout(c)
        self.seen: Counter[str] = Counter()
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    def get(self, name: str) -> int:
        return int(self.port[name].value)

    def drive(self, **values: int) -> None:
        for name, value in values.items():
            self.port[name].value = value

    async def reset(self, seed: int) -> None:
        self.dut._log.warning("seed %d", seed)
        self.rng = random.Random(seed)
        self.model = Model(self.config)
        self.reads: dict[str, int] = {}
        self.wanted: dict[str, Any] = {}
        self.writing: list[Callable[[], None]] = []
        self.counted = (list(self.model.held), list(self.model.ready))
        self.changes = False
        self.drive(row_write=0, place_write=0, info_write=0)
        self.drive(held_add=0, held_sub=0, ready_add=0, ready_sub=0)
        self.dut.rst.value = 1
        await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0

    def check(self, quota: list[int]) -> None:
        """The outputs of this cycle: reads of the cycle before, flags of now."""
        c, model = self.config, self.model
        if self.reads:
            row, layer = self.get("row"), self.reads["row_layer"]
            for e in range(c.num_experts):
                lane = (row >> (LANE * e)) & ((1 << LANE) - 1)
                want = self.wanted["row"].get(e)
                assert want is None or lane == want, f"row {layer} lane {e}: {lane}, not {want}"
            want = self.wanted["place"]
            place = self.get("place")
            assert want is None or place == want, f"place {self.reads}: {place:#x}, not {want:#x}"
            want = self.wanted["info"]
            info = unpack(self.info_layout, self.get("info"))
            assert want is None or info == want, f"info {self.reads}: {info}, not {want}"
        held, ready = self.counted
        over = sum((held[m] > quota[m]) << m for m in range(c.num_layers))
        assert self.get("over") == over, f"over {self.get('over'):b}, not {over:b}"
        flags = sum((ready[m] > 0) << m for m in range(c.num_layers))
        assert self.get("any_ready") == flags, f"any_ready {self.get('any_ready'):b}: {flags:b}"
        settling = (held, ready) != (model.held, model.ready)
        assert self.get("settling") or not settling, "settling, but the map does not say so"
        assert not self.get("settling") or self.changes, "nothing changes, but the map says so"
        self.seen["over and not"] += 0 < over < (1 << c.num_layers) - 1
        self.seen["over"] += over > 0
        self.seen["at quota"] += held == quota and any(quota)
        self.seen["any_ready"] += flags > 0
        self.seen["nothing ready"] += flags == 0

    async def cycle(self) -> None:
        """Drive one random cycle, check its outputs, then account for what it wrote."""
        rng, c, model = self.rng, self.config, self.model
        layers, experts = c.num_layers, c.num_experts
        some = rng.choice((0.1, 0.5, 0.9))

        # Half of the reads are of what is written in the same cycle.
        row_write, row_layer = rng.random() < 0.5, rng.randrange(layers)
        lanes = rng.choice((0, 1 << rng.randrange(experts), (1 << experts) - 1, -1))
        lanes = lanes if lanes >= 0 else rng.getrandbits(experts)
        row = [rng.choice(STATES) for _ in range(experts)]
        row_read = row_layer if rng.random() < 0.5 else rng.randrange(layers)

        eb = lane_bits(c)
        span = 1 if rng.random() < 0.5 else layers
        place_write = rng.random() < 0.5
        place_address = rng.randrange(experts) | rng.randrange(span) << eb
        place = {"slot": rng.randrange(c.num_slots), "transfer": rng.randrange(c.transfers)}
        place_packed = pack(self.place_layout, place)
        place_read = rng.randrange(experts) | rng.randrange(span) << eb
        place_read = place_address if rng.random() < 0.5 else place_read

        info_write = rng.random() < 0.5
        span = 4 if rng.random() < 0.5 else c.num_slots
        info_slot = rng.randrange(min(span, c.num_slots))
        info = {
            "resident": rng.getrandbits(1),
            "pins": rng.randrange(4 * c.top_k + 1),
            "layer": rng.randrange(layers),
            "expert": rng.randrange(experts),
        }
        info_read = info_slot if rng.random() < 0.5 else rng.randrange(min(span, c.num_slots))

        # Counts stay within what there is: slots of the buffer, experts of a layer.
        held_layer, ready_layer = rng.randrange(layers), rng.randrange(layers)
        held_sub = rng.random() < 1 - some and model.held[held_layer] > 0
        held_add = rng.random() < some and (sum(model.held) < c.num_slots or held_sub)
        ready_add = rng.random() < some
        ready = model.ready[ready_layer] + ready_add
        ready_sub = rng.randrange(min(ready, c.top_k) + 1) if rng.random() < 1 - some else 0
        if ready - ready_sub > experts:
            ready_add = False

        quota = [min(experts, max(0, held + rng.randrange(-1, 2))) for held in model.held]
        if rng.random() < 0.3:
            quota = [rng.randrange(experts + 1) for _ in range(layers)]

        bits = experts.bit_length()
        self.drive(
            row_layer=row_read,
            row_write=row_write,
            row_write_layer=row_layer,
            row_write_lanes=lanes,
            row_write_data=sum(s << (LANE * e) for e, s in enumerate(row)),
            place_read=place_read,
            place_write=place_write,
            place_write_address=place_address,
            place_write_data=place_packed,
            info_read=info_read,
            info_write=info_write,
            info_write_slot=info_slot,
            info_write_data=pack(self.info_layout, info),
            held_layer=held_layer,
            held_add=held_add,
            held_sub=held_sub,
            ready_layer=ready_layer,
            ready_add=ready_add,
            ready_sub=ready_sub,
            quota=sum(q << (bits * layer) for layer, q in enumerate(quota)),
        )
        await ReadOnly()
        self.check(quota)

        self.reads = {"row_layer": row_read, "place_read": place_read, "info_read": info_read}
        self.wanted = {
            "row": {e: model.lanes.get((row_read, e)) for e in range(experts)},
            "place": model.places.get(place_read),
            "info": model.infos.get(info_read),
        }
        # A write of this cycle is on its way through a register.
        for do in self.writing:
            do()
        self.writing = []
        if row_write:
            written = {(row_layer, e): row[e] for e in range(experts) if lanes >> e & 1}
            self.writing.append(partial(model.lanes.update, written))
            self.seen["row read as it is written"] += row_read == row_layer and lanes != 0
            some_lanes = 0 < lanes < (1 << experts) - 1
            self.seen["some lanes of it"] += row_read == row_layer and some_lanes
        if place_write:
            self.writing.append(partial(model.places.update, {place_address: place_packed}))
            self.seen["place read as it is written"] += place_read == place_address
        if info_write:
            self.writing.append(partial(model.infos.update, {info_slot: info}))
            self.seen["info read as it is written"] += info_read == info_slot
        # The flags are a cycle behind the counts.
        self.counted = (list(model.held), list(model.ready))
        self.changes = held_add or held_sub or ready_add or ready_sub > 0
        model.held[held_layer] += held_add - held_sub
        model.ready[ready_layer] += ready_add - ready_sub
        self.seen["held both ways"] += held_add and held_sub
        self.seen["ready both ways"] += ready_add and ready_sub > 0
        self.seen["most ready lost at once"] += ready_sub == c.top_k
        self.seen["all experts ready"] += max(model.ready) == experts
        await FallingEdge(self.dut.clk)


@cocotb.test(timeout_time=10, timeout_unit="ms")
@cocotb.parametrize(shape=list(SHAPES))
async def reads_writes_and_counts(dut, shape: str) -> None:
    """Every cycle: reads hold all writes so far, flags follow the counts and the quotas."""
    tb = TB(dut, shape)
    await FallingEdge(dut.clk)
    for seed in SEEDS:
        await tb.reset(seed)
        for _ in range(CYCLES[shape]):
            await tb.cycle()
    dut._log.warning("%s: %s", shape, dict(tb.seen))
    if len(SEEDS) >= 10:
        impossible = {
            "single": {"over and not", "some lanes of it"},
            "odd": set(),
            "large": {"all experts ready", "at quota"},
        }[shape]
        missing = {name for name, count in tb.seen.items() if not count} - impossible
        assert not missing, f"{shape}: never seen: {sorted(missing)}"
