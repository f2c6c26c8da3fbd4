# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""Slot manager alone: predictor and DMA scheduler are models that answer at random times.

Every record goes to :class:`stmoe_golden.checker.Checker` in the cycle in which it is made; scores,
selections and the ends of transfers are what the models have decided.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter as Tally
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cocotb
import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

from simulation import Readers, pack, run_bench, seeds, unpack
from stmoe.payloads import (
    completion_layout,
    grant_layout,
    load_layout,
    release_layout,
    route_layout,
    selection_layout,
    token_layout,
)
from stmoe.register_map import COUNTERS
from stmoe.slot_manager import SlotManager, look_up_passes, record_layout
from stmoe_golden.buffer import Lane
from stmoe_golden.checker import Checker, Kind, Record, Settings
from stmoe_golden.config import USE_BITS, EngineConfig

CONFIGS = {
    # Few slots: pinned, loading and draining ones fill the buffer again and again.
    "crowded": EngineConfig(
        num_layers=3, num_experts=6, quota=0, staging=4, expert_bytes=16, gate_window=4
    ),
    "quotas": EngineConfig(
        num_layers=4, num_experts=5, top_k=3, quota=2, expert_bytes=16, gate_window=4
    ),
    # A queue so long that flushing it outlasts a commit.
    "long_queue": EngineConfig(
        num_layers=2, num_experts=24, select_max=24, expert_bytes=16, gate_window=4
    ),
    # Scores come in three parts, two lanes each, and not in the cycles after a route.
    "folds": EngineConfig(
        num_layers=3, num_experts=6, lanes=2, quota=1, staging=3, expert_bytes=16, gate_window=4
    ),
    # Selections of three layers, the last of which is the one before the latest.
    "ahead": EngineConfig(
        num_layers=4, num_experts=6, lookahead=3, quota=1, staging=3, select_max=3,
        expert_bytes=16, gate_window=4, threshold=-7, threshold_2=20, threshold_3=-3,
    ),
    # The states of a route's experts are looked up one a cycle, in three.
    "look_ups": EngineConfig(
        num_layers=2, num_experts=129, top_k=3, quota=3, staging=3, expert_bytes=16, gate_window=4
    ),
}  # fmt: skip


class ManagerTop(wiring.Component):
    """:class:`SlotManager`, with ``late`` in place of ``cancel_late``: one bit per transfer."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.inner = SlotManager(config)
        members = dict(self.inner.signature.members)
        del members["cancel_late"]
        super().__init__({**members, "late": In(config.transfers)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.manager = inner = self.inner
        for name, member in inner.signature.members.items():
            if name == "cancel_late":
                m.d.comb += inner.cancel_late.eq(self.late.bit_select(inner.cancel_transfer, 1))
                continue
            ours, theirs = getattr(self, name), getattr(inner, name)
            if not member.is_port:
                wiring.connect(m, wiring.flipped(ours), theirs)
            elif member.flow == In:
                m.d.comb += theirs.eq(ours)
            else:
                m.d.comb += ours.eq(theirs)
        return m


# pytest ---------------------------------------------------------------------------------------


def run(name: str, testcase: str, count: int = 10) -> None:
    run_bench(
        ManagerTop(CONFIGS[name]),
        f"slot_manager_{name}",
        Path(__file__).stem,
        testcase=testcase,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds(count))},
    )


@pytest.mark.parametrize(
    ("experts", "top_k", "passes"),
    [(8, 2, 1), (32, 4, 1), (64, 2, 1), (64, 4, 4), (64, 6, 6), (64, 8, 8), (65, 2, 2)]
    + [(128, 8, 8), (129, 3, 3), (256, 16, 16), (256, 1, 1), (1, 1, 1)],
)
def test_wide_routes_are_looked_up_rank_by_rank(experts: int, top_k: int, passes: int) -> None:
    config = EngineConfig(num_layers=1, num_experts=experts, top_k=top_k, quota=1)
    assert look_up_passes(config) == passes
    assert -(-top_k // passes) * experts <= max(128, experts)  # one rank, where that is more


@pytest.mark.parametrize("name", CONFIGS)
def test_every_decision_is_golden_and_no_slot_is_lost(name: str) -> None:
    run(name, "every_decision_is_golden", 10)


def test_pinned_slot_is_never_a_victim() -> None:
    run("crowded", "pinned_slot_is_never_a_victim")


def test_demand_cancels_last_prefetch_when_no_slot_is_left() -> None:
    run("crowded", "demand_cancels_last_prefetch")


def test_fill_that_completes_in_the_cycle_of_its_cancel_wins() -> None:
    run("crowded", "fill_beats_its_cancel")


def test_lost_slots_are_never_used_again() -> None:
    run("quotas", "lost_slots_are_never_used_again")


# cocotb ---------------------------------------------------------------------------------------

CONFIG = CONFIGS[os.environ.get("CONFIG", "crowded")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
RECORD, LOAD = record_layout(CONFIG), load_layout(CONFIG)
GRANT, COMPLETION = grant_layout(CONFIG), completion_layout(CONFIG)
TOKEN, ROUTE = token_layout(CONFIG), route_layout(CONFIG)
RELEASE, SELECTION = release_layout(CONFIG), selection_layout(CONFIG)
# Worked out by the configuration at every look.
FOLDS, LANES, SCORE_BITS = CONFIG.folds, CONFIG.num_lanes, CONFIG.score_bits
DONE, DRAINED, ERROR, TIMEOUT = range(4)
OTHERS = {"demand_bursts", "prefetch_bursts", "last_beats", "beats", "discarded_beats", "retries"}
"""Counters of the DMA scheduler."""


class Inbox(deque):
    """What a monitor has seen and the checker has not asked for."""

    def __iter__(self) -> Inbox:
        return self

    def __next__(self) -> Any:
        if not self:
            raise StopIteration
        return self.popleft()


class Oracle(Checker):
    """The checker, with the ends of transfers as the DMA model decides them."""

    def settle(self, t, cycle) -> None:
        pass

    def must_have_acted(self, record, before) -> None:
        pass

    def filled(self, t, cycle) -> bool:
        return False

    def prefetch_may_start(self, presented: int = 0, *, chosen: bool = False) -> bool:
        return not self.pending and self.prefetch_held() < self.config.prefetch_loads

    def next_ended(self, record, index):
        t = self.transfers.get(index)
        if t is None or t.ended != record.kind:
            self.fail(record, f"transfer {index} has not ended so: {t}")
        return t


class Rows:
    """A predictor whose rows and picks are random; both sides see the same."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        shape = (CONFIG.num_layers, CONFIG.num_experts)
        self.state = SimpleNamespace(score=np.zeros(shape, int), use=np.zeros(shape, int))
        self.params = SimpleNamespace(_replace=lambda **_: self.params)
        self.asked: list[tuple[int, int | None]] = []
        """Lanes that might be selected in the latest commit, and the threshold, of each layer."""
        self.picks: deque[tuple[int, int, int]] = deque()
        self.packed: dict[tuple[int, int], tuple[int, int]] = {}

    def token(self, new_sequence: bool) -> None:
        self.change()

    def route(self, layer: int, experts) -> None:
        self.change()

    def change(self) -> None:
        rng, state = self.rng, self.state
        self.asked.clear()
        self.packed.clear()
        limit = rng.choice((4, 200, 1 << (SCORE_BITS - 1)))
        for layer in range(CONFIG.num_layers):
            for e in range(CONFIG.num_experts):
                state.score[layer, e] = rng.randrange(-limit, limit)
                state.use[layer, e] = rng.randrange(rng.choice((2, 1 << USE_BITS)))

    def row(self, layer: int, fold: int) -> tuple[int, int]:
        """Scores and uses of a row, packed as the manager gets them."""
        if (layer, fold) not in self.packed:
            part, mask = slice(fold * LANES, (fold + 1) * LANES), (1 << SCORE_BITS) - 1
            score, use = self.state.score[layer][part], self.state.use[layer][part]
            self.packed[layer, fold] = (
                sum((int(v) & mask) << SCORE_BITS * i for i, v in enumerate(score)),
                sum(int(v) << USE_BITS * i for i, v in enumerate(use)),
            )
        return self.packed[layer, fold]

    def select(self, layer: int, allowed, threshold: int) -> list[int]:
        if threshold >> CONFIG.score_bits - 1 > 0:
            self.asked.append((0, None))  # none is to be selected
            return []
        self.asked.append((sum(1 << int(e) for e in np.flatnonzero(allowed)), threshold))
        absent = np.flatnonzero(allowed).tolist()
        picks = self.rng.sample(absent, self.rng.randint(0, min(len(absent), CONFIG.num_select)))
        self.picks.extend((layer, e, int(self.state.score[layer, e])) for e in picks)
        return picks


class TB:
    """Models on every side of the manager, and the checks of every cycle."""

    def __init__(self, dut) -> None:
        self.dut = dut
        self.now = Readers(dut)
        dut.rst.value = 1
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())

    async def reset(self, seed: int, *, routes: int, **knobs: Any) -> None:
        dut, self.rng = self.dut, random.Random(seed)
        dut._log.warning("seed %d", seed)
        self.knobs = SimpleNamespace(
            errors=0.1,
            timeouts=0,
            sequences=0.15,
            busy=0.3,
            load=(1, 60),
            use=(1, 40),
            illegal=0.1,
            route_rate=0.2,
        )
        vars(self.knobs).update(knobs)
        self.values: dict[str, int] = {}
        names = ["hold", "commit_request", "commit_done", "select_layer", "late", "start_transfer"]
        names += ["register_request", "threshold_changed", "threshold", "prefetch_ready"]
        names += ["victim_score", "victim_use", "start__ready", "selected__valid"]
        names += ["victim_wait"] if CONFIG.folds > 1 else []
        names += [
            f"{n}__{p}"
            for n in ("token", "route", "release", "completion")
            for p in ("valid", "payload")
        ]
        names += ["grant__ready", "predictor_token__ready", "predictor_route__ready"]
        for name in names:
            self.set(name, 0)
        self.set("adaptive", 1)
        floors = CONFIG.floors
        mask = (1 << CONFIG.score_bits) - 1
        self.set("threshold", floors[0] & mask)
        if CONFIG.look > 1:
            packed = (floors[n] & mask for n in range(1, CONFIG.look))
            self.set("farther", sum(f << CONFIG.score_bits * n for n, f in enumerate(packed)))
        width = len(dut.quota) // CONFIG.num_layers
        self.set("quota", sum(CONFIG.quota << width * i for i in range(CONFIG.num_layers)))
        dut.rst.value = 1
        for _ in range(4):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        self.cycle = 0
        self.shown_layer = None
        self.boxes = {n: Inbox() for n in ("tokens", "routes", "releases", "grants")}
        self.rows = Rows(self.rng)
        self.asked, self.waits = (0, 0), 0
        self.oracle = Oracle(
            CONFIG,
            segments=[[] for _ in range(CONFIG.num_layers)],
            settings=[Settings(floors[0], [CONFIG.quota] * CONFIG.num_layers)],
            **self.boxes,
            counters=[c.name for c in COUNTERS],
        )
        self.oracle.predictor = self.rows
        self.routes_left = routes
        self.offered: dict[str, Any] = {}
        self.count = Tally()
        self.seen = Tally()
        self.pins = Tally()
        self.due: list[list[int]] = []
        # Predictor model: idle, working (until), asking, committing (until), selecting.
        self.phase, self.until = "idle", 0
        self.work: tuple[int, bool] | None = None
        # DMA model: the end of each transfer in flight, and completions to be offered.
        self.flight: dict[int, dict[str, Any]] = {}
        self.lost: set[int] = set()
        self.ends: list[tuple[int, int]] = []
        self.latest_start = 0

    def set(self, name: str, value: int) -> None:
        if self.values.get(name) != value:
            self.values[name] = value
            getattr(self.dut, name).value = value

    def get(self, name: str) -> int:
        return self.now[name]()

    async def run(self, limit: int = 60_000, hook=None) -> None:
        """Until every route is taken, granted and released, and nothing is in flight."""
        idle, edge = 0, RisingEdge(self.dut.clk)
        while idle < 100:
            await edge
            self.sample()
            self.drive()
            if hook is not None:
                hook()
            waits = self.routes_left or self.due or self.flight or "route" in self.offered
            idle = 0 if waits or self.phase != "idle" else idle + 1
            self.cycle += 1
            assert self.cycle < limit, f"hangs: {self.phase}, {self.flight}, {self.offered}"
        assert not self.oracle.grants and not self.oracle.pending
        golden = self.oracle.counters
        for i, counter in enumerate(COUNTERS):
            if counter.name not in OTHERS:
                assert self.count[i] == golden[counter.name], counter.name

    # Sampling ----------------------------------------------------------------------------------

    def check_asked(self, when: str) -> None:
        """The predictor is told what may be selected, and by which threshold, as at the commit."""
        values = {}
        for what in ("absent", "threshold"):
            bits = CONFIG.num_experts if what == "absent" else SCORE_BITS
            first = self.get("absent" if what == "absent" else "select_threshold")
            farther = self.get(f"farther_{what}") if CONFIG.look > 1 else 0
            values[what] = [
                first,
                *(farther >> bits * n & (1 << bits) - 1 for n in range(CONFIG.look - 1)),
            ]
        mask = (1 << CONFIG.score_bits) - 1
        wanted = [
            (absent, values["threshold"][n] if threshold is None else threshold & mask)
            for n, (absent, threshold) in enumerate(self.rows.asked)
        ]
        got = list(zip(values["absent"], values["threshold"], strict=True))
        assert got == wanted, f"{when}: absent and threshold are {got}, not {wanted}"

    def took(self, name: str) -> bool:
        valid = self.values.get(f"{name}__valid")
        ready = self.values.get(f"{name}__ready")
        if valid is None:
            valid = self.get(f"{name}__valid")
        elif valid:
            ready = self.get(f"{name}__ready")
        return bool(valid and ready)

    def sample(self) -> None:
        cycle, boxes, dma = self.cycle, self.boxes, self.flight
        increment = self.get("increment")
        while increment:
            low = increment & -increment
            self.count[low.bit_length() - 1] += 1
            increment ^= low
        if self.took("token"):
            token = self.offered.pop("token")
            boxes["tokens"].append((cycle, token["new_sequence"], token["token_id"]))
        if self.took("route"):
            route = self.offered.pop("route")
            boxes["routes"].append((cycle, route["layer"], route["experts"]))
        if self.took("release"):
            slot = self.offered.pop("release")
            self.pins[slot] -= 1
            boxes["releases"].append((cycle, slot))
        if self.took("grant"):
            grant = unpack(GRANT, self.get("grant__payload"))
            boxes["grants"].append(
                (cycle, grant["layer"], grant["expert"], grant["slot"], grant["error"])
            )
            if not grant["error"]:
                self.pins[grant["slot"]] += 1
                self.due.append([cycle + self.rng.randint(*self.knobs.use), grant["slot"]])
        completed = self.offered.pop("completion") if self.took("completion") else None
        started = None
        shown = unpack(LOAD, self.get("start__payload"))["layer"]
        if self.get("start__valid"):
            assert shown == self.shown_layer, "the layer of a load came with it, not before"
        self.shown_layer = shown
        if self.took("start"):
            started = unpack(LOAD, self.get("start__payload"))
            started["transfer"] = self.values["start_transfer"]
        cancelled = self.get("cancel_transfer") if self.get("cancel") else None
        if cancelled is not None and self.values["late"] >> cancelled & 1:
            cancelled = None  # ignored
        if self.get("promote"):
            self.seen["promote"] += 1
            assert dma[self.get("promote_transfer")]["prefetch"]
            dma[self.get("promote_transfer")]["prefetch"] = 0
        if self.took("selected"):
            self.rows.picks.popleft()
        granted = self.get("commit_grant")
        if self.values["commit_done"]:
            self.check_asked(f"cycle {cycle}")
        taken = {n: self.took(f"predictor_{n}") for n in ("token", "route")}
        for name in ("record", "selection_record", "grant_record"):
            value = self.get(name)
            if value & 1:
                self.record(unpack(RECORD, value))
        if started is not None:
            index = started["transfer"]
            assert index not in dma and index not in self.lost
            dma[index] = {
                "prefetch": started["prefetch"],
                "cancelled": False,
                "slot": started["slot"],
                "end": cycle + self.rng.randint(*self.knobs.load),
            }
            self.latest_start = cycle
        if cancelled is not None:
            assert dma[cancelled]["prefetch"]
            dma[cancelled]["cancelled"] = True
            dma[cancelled]["end"] = cycle + self.rng.randint(1, 30)
        if completed is not None:
            index, status = completed
            del dma[index]
            if status == TIMEOUT:
                self.lost.add(index)
        # Predictor
        if taken["token"] or taken["route"]:
            assert self.phase == "idle"
            layer = 0
            if taken["route"]:
                layer = (self.oracle.latest + 1) % CONFIG.num_layers
            self.work = (layer, bool(taken["token"]))
            self.phase, self.until = "working", cycle + self.rng.randint(1, 40)
        if granted:
            assert self.values["commit_request"]
            self.phase, self.until = "committing", cycle + self.rng.randint(2, 6)
            self.until += CONFIG.look - 1

    def record(self, fields: dict[str, Any]) -> None:
        """Golden decides; then what holds at any time is looked at."""
        record = Record(
            self.cycle,
            int(fields["kind"]),
            0,
            *(fields[n] for n in ("layer", "expert", "slot", "flag", "data")),
        )
        oracle = self.oracle
        if record.kind == Kind.LOAD_START and record.flag & 2:
            assert not self.pins[record.slot], f"cycle {self.cycle}: victim in use: {record}"
            self.seen["evicted while others are pinned"] += sum(self.pins.values()) > 0
        if record.kind == Kind.LOAD_START or record.kind == Kind.GRANT and not record.flag:
            assert record.slot not in oracle.quarantined, f"lost, but used again: {record}"
        oracle.recent.append(record)
        oracle.check(record)
        oracle.checked += 1
        self.seen[Kind(record.kind).name] += 1
        if record.kind == Kind.CANCEL and record.flag:
            self.seen["made room"] += 1
        # Every slot is in exactly one state.
        lanes = oracle.buffer.lane
        slots = [*oracle.free, *oracle.quarantined]
        slots += oracle.buffer.slot[lanes != Lane.NONE].tolist()
        slots += [t.slot for t in oracle.transfers.values() if t.cancelled]
        assert sorted(slots) == list(range(CONFIG.num_slots)), f"cycle {self.cycle}: {slots}"

    # Driving -----------------------------------------------------------------------------------

    def offer(self, name: str, what: Any, layout, fields) -> None:
        self.offered[name] = what
        self.set(f"{name}__payload", pack(layout, fields))
        self.set(f"{name}__valid", 1)

    def drive(self) -> None:
        rng, knobs = self.rng, self.knobs
        # Rows come two cycles after their layer was given.
        (layer, fold), self.asked = self.asked, (self.get("victim_layer"), 0)
        if FOLDS > 1:
            self.asked = (self.asked[0], self.get("victim_fold"))
            if self.waits:
                # The predictor reads something else.
                self.asked = (rng.randrange(CONFIG.num_layers), rng.randrange(FOLDS))
                self.waits -= 1
            if self.get("predictor_route__valid") and self.get("predictor_route__ready"):
                self.waits = FOLDS - 1
            self.set("victim_wait", int(self.waits > 0))
        if layer < CONFIG.num_layers and fold < FOLDS:
            score, use = self.rows.row(layer, fold)
            self.set("victim_score", score)
            self.set("victim_use", use)
        self.drive_predictor()
        self.drive_dma()
        self.set("grant__ready", rng.random() >= knobs.busy)
        self.set("hold", rng.random() < knobs.busy / 8)
        for name in ("token", "route", "release"):
            if name not in self.offered:
                self.set(f"{name}__valid", 0)
        if "release" not in self.offered:
            ready = [item for item in self.due if item[0] <= self.cycle]
            if ready:
                item = rng.choice(ready)
                self.due.remove(item)
                self.offer("release", item[1], RELEASE, {"slot": item[1]})
        oracle = self.oracle
        if not self.routes_left and "route" not in self.offered:
            return
        if "token" not in self.offered and rng.random() < 0.3:
            new = rng.random() < knobs.sequences
            if not oracle.token_taken or new and rng.random() < 0.3:
                token = {"context": 0, "token_id": rng.getrandbits(32), "new_sequence": int(new)}
                self.offer("token", token, TOKEN, token)
        if self.routes_left and "route" not in self.offered and rng.random() < knobs.route_rate:
            experts = rng.sample(range(CONFIG.num_experts), CONFIG.top_k)
            if rng.random() < knobs.illegal:
                experts[0] = rng.choice((experts[-1], CONFIG.num_experts))
            route = {"context": 0, "layer": oracle.expected_layer, "experts": experts}
            self.routes_left -= 1
            self.offer("route", route, ROUTE, route)

    def drive_predictor(self) -> None:
        due = self.cycle >= self.until
        picks = self.rows.picks
        if self.phase == "working" and due:
            self.phase = "asking"
            self.set("select_layer", self.work[0])
        elif self.phase == "committing" and due:
            self.set("commit_done", 1)
            self.phase = "committed"
        elif self.phase == "committed":
            self.set("commit_done", 0)
            self.phase = "selecting"
        elif self.phase == "selecting" and not picks:
            self.phase = "idle"
        self.set("commit_request", int(self.phase == "asking"))
        offering = self.phase == "selecting" and bool(picks)
        held = self.values.get("selected__valid") and picks and offering
        if offering and (held or self.rng.random() < 0.6):
            layer, expert, score = picks[0]
            fields = {"layer": layer, "expert": expert, "score": score}
            self.set("selected__payload", pack(SELECTION, fields))
            self.set("selected__valid", 1)
        else:
            self.set("selected__valid", 0)
        idle = int(self.phase == "idle")
        self.set("predictor_token__ready", idle)
        self.set("predictor_route__ready", idle)

    def drive_dma(self) -> None:
        rng, knobs = self.rng, self.knobs
        late = self.values["late"]
        for index, load in self.flight.items():
            if late >> index & 1 or self.cycle < load["end"]:
                continue
            status, kind = DONE, Kind.FILL_DONE
            if load["cancelled"]:
                status, kind = DRAINED, Kind.DRAINED
            elif rng.random() < knobs.errors:
                status, kind = ERROR, Kind.ERROR
            if len(self.lost) < knobs.timeouts and rng.random() < 0.1:
                status, kind = TIMEOUT, Kind.WATCHDOG
            late |= 1 << index
            self.ends.append((index, status))
            self.oracle.transfers[index].ended = kind
        if "completion" not in self.offered:
            self.set("completion__valid", 0)
            if self.ends and rng.random() >= knobs.busy:
                index, status = self.ends.pop(rng.randrange(len(self.ends)))
                self.offer(
                    "completion",
                    (index, status),
                    COMPLETION,
                    {"transfer": index, "status": status},
                )
        for index in range(CONFIG.transfers):
            if index not in self.flight:
                late &= ~(1 << index)
        self.set("late", late)
        free = [t for t in range(CONFIG.transfers) if t not in self.flight and t not in self.lost]
        ready = bool(free) and rng.random() >= knobs.busy / 3
        if self.values["start_transfer"] not in free and free:
            self.set("start_transfer", free[0])
        self.set("start__ready", int(ready))
        self.set("prefetch_ready", int(bool(free) and rng.random() >= knobs.busy))


bench = cocotb.test(timeout_time=3, timeout_unit="ms")
"""Every bench ends in 300,000 cycles, or fails."""


@bench
async def every_decision_is_golden(dut) -> None:
    tb = TB(dut)
    seen = Tally()
    for seed in SEEDS:
        await tb.reset(seed, routes=100, load=(1, 120))
        await tb.run()
        seen += tb.seen
    if len(SEEDS) > 1:
        for kind in (
            "CANCEL",
            "PROMOTE",
            "DROP",
            "ERROR",
            "DRAINED",
            "ILLEGAL",
            "FILL_DONE",
            "THRESHOLD",
        ):
            assert seen[kind] > 2, f"{kind} is not covered: {seen}"


@bench
async def pinned_slot_is_never_a_victim(dut) -> None:
    """Every LOAD_START is held to the pins that this bench counts itself."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed, routes=40, use=(30, 200), load=(1, 10), errors=0)
        await tb.run()
        assert tb.seen["evicted while others are pinned"] > 10, tb.seen


@bench
async def demand_cancels_last_prefetch(dut) -> None:
    """Slow loads and interrupted tokens: prefetches of another layer hold the last slots."""
    tb = TB(dut)
    made_room = 0
    for seed in SEEDS:
        await tb.reset(
            seed, routes=40, load=(40, 300), use=(1, 300), sequences=0.1, errors=0, route_rate=0.01
        )
        await tb.run()
        made_room += tb.seen["made room"]
    assert made_room > 0, "no demand had to make room"


@bench
async def fill_beats_its_cancel(dut) -> None:
    """A prefetch is over just as routing disproves it: it is cancelled or filled, never both."""
    tb = TB(dut)
    outcomes = Tally()
    for seed in SEEDS:
        await tb.reset(seed, routes=60, errors=0, load=(200, 300), illegal=0)
        waits: dict[int, int] = {}

        def hook(waits=waits) -> None:
            # A few cycles after the route, each prefetch it disproves ends.
            oracle = tb.oracle
            for e in sorted(oracle.disproved):
                t = oracle.transfer_of(oracle.latest, e)
                if t.index not in waits:
                    waits[t.index] = tb.cycle + tb.rng.randint(4, 30)
                if tb.cycle >= waits[t.index] and t.index in tb.flight:
                    tb.flight[t.index]["end"] = min(tb.flight[t.index]["end"], tb.cycle)
                    outcomes["tried"] += 1
            for index in list(waits):
                if index not in tb.flight or tb.flight[index]["cancelled"]:
                    outcomes["cancelled" if index in tb.flight else "filled"] += 1
                    del waits[index]

        await tb.run(hook=hook)
    assert outcomes["cancelled"] > 2 and outcomes["filled"] > 2, outcomes


@bench
async def lost_slots_are_never_used_again(dut) -> None:
    """The watchdog gave some loads up: their demands get errors, their slots are out of use."""
    tb = TB(dut)
    for seed in SEEDS:
        await tb.reset(seed, routes=40, timeouts=3)
        await tb.run()
        assert len(tb.oracle.quarantined) == 3 == tb.seen["WATCHDOG"]
