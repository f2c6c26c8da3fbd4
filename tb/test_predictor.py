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
from stmoe.predictor import Predictor, route_layout, token_layout
from stmoe.table_reader import table_index_layout
from stmoe_golden.config import USE_BITS, EngineConfig, preset
from stmoe_golden.predictor import Predictor as Golden
from stmoe_golden.predictor import params_of
from test_selector import Prefixed, SideBySide, listed

CONFIGS = {
    "tiny": preset("tiny"),
    # The table widths of gpt_oss_20b; L is no power of two and layers wrap at once.
    "wide": EngineConfig(num_layers=5, num_experts=32, top_k=4, spatial_depth=4, quota=4),
    # D is clamped to 1: the layer ahead is the layer before.
    "pair": EngineConfig(num_layers=2, num_experts=3, top_k=2, quota=1),
    # One layer: no spatial table, nothing ahead, nothing selected.
    "single": EngineConfig(num_layers=1, num_experts=6, top_k=3, quota=6),
    # top_k = E, no power of two, and two ranks share a gain; weights and biases saturate in both
    # directions.
    "narrow": EngineConfig(
        num_layers=3, num_experts=5, top_k=5, quota=5, weight_bits=4, select_max=64,
        margin_low=2047, margin_step=2047, margin_high=0, threshold=-10,
    ),
    # No spatial table although there is a layer ahead: it is selected from its own row.
    "temporal": EngineConfig(
        num_layers=3, num_experts=7, top_k=1, quota=1, staging=3, spatial_depth=0,
        weight_bits=4, margin_low=2047, margin_step=0, margin_high=2047, select_max=5,
    ),
    # The rows are corrected long after the commit.
    "many": EngineConfig(num_layers=3, num_experts=12, top_k=12, spatial_depth=1, quota=1),
    "many_folds": EngineConfig(
        num_layers=3, num_experts=6, top_k=5, lanes=1, spatial_depth=1, quota=1
    ),
    # Fewer lanes than experts: two folds; four, of a D that takes all layers.
    "halves": EngineConfig(num_layers=3, num_experts=8, top_k=3, lanes=4, quota=1),
    "quarters": EngineConfig(
        num_layers=5, num_experts=16, top_k=4, lanes=4, spatial_depth=4, quota=4
    ),
    # Neither lanes nor folds a power of two; no layer ahead; a lane at a time.
    "thirds": EngineConfig(num_layers=2, num_experts=9, top_k=2, lanes=3, quota=1),
    "single_halves": EngineConfig(num_layers=1, num_experts=6, top_k=3, lanes=3, quota=6),
    "lane": EngineConfig(
        num_layers=3, num_experts=6, top_k=1, lanes=1, quota=1, staging=3, spatial_depth=0,
        weight_bits=4, margin_low=2047, margin_step=0, margin_high=2047, select_max=2,
    ),
    # Nothing selected ahead, and no spatial table: only the layer's own scores count.
    "blind": EngineConfig(num_layers=3, num_experts=4, spatial_depth=0, lookahead=0, quota=1),
    # Several layers ahead: fewer spatial tables than that, none, and with folds.
    "ahead": EngineConfig(num_layers=5, num_experts=8, spatial_depth=1, lookahead=3, quota=1),
    "ahead_of_none": EngineConfig(num_layers=5, num_experts=5, spatial_depth=0, lookahead=4),
    "ahead_folds": EngineConfig(
        num_layers=6, num_experts=9, top_k=3, lanes=3, spatial_depth=2, lookahead=4, select_max=2
    ),
}  # fmt: skip


# pytest ---------------------------------------------------------------------------------------


def test_predictor_is_golden() -> None:
    """Builds all configurations and runs all coroutines below."""
    run_bench(
        SideBySide({name: Predictor(config) for name, config in CONFIGS.items()}),
        "predictors",
        Path(__file__).stem,
        env={"SEEDS": json.dumps(seeds())},
        build_args=["-CFLAGS", "-O0"],  # the build takes longer than the run
    )


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 3"):
        Predictor(3)


# cocotb ---------------------------------------------------------------------------------------

SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))
EVENTS = 30


class TB:
    """One predictor beside its golden model; time passes only in :meth:`cycle`.

    Inputs change just after the rising edge and outputs are looked at on the falling edge. All
    inputs that the contract does not call stable are random in every cycle.
    """

    def __init__(self, dut, name: str) -> None:
        self.name, self.config = name, CONFIGS[name]
        self.log, self.dut = dut._log, Prefixed(dut, name)
        self.pick = selection_layout(self.config)
        self.driven: dict[str, int] = {}
        self.worst: dict[str, int] = {}
        self.total_picks = self.total_weights = 0
        self.now = 0
        cocotb.start_soon(Clock(self.dut.clk, 10, unit="ns").start())

    def drive(self, name: str, value: int) -> None:
        if self.driven.get(name) != value:
            self.driven[name] = value
            getattr(self.dut, name).value = value

    def read(self, name: str) -> int:
        return int(getattr(self.dut, name).value)

    def lanes(self, name: str, width: int, *, signed: bool) -> list[int]:
        """A row read through the victim port."""
        value, mask = self.read(name), (1 << width) - 1
        row = [value >> (width * e) & mask for e in range(self.config.num_lanes)]
        return [x - (1 << width) if signed and x >> (width - 1) else x for x in row]

    async def reset(self, seed: int) -> None:
        """Everything as after power-up, but for what the memories hold by now.

        Every other reset is of one cycle, and all but the first come while an event is under way,
        or just was.
        """
        if self.now:
            await self.abandon()
        self.log.warning("%s, seed %d", self.name, seed)
        self.rng = rng = random.Random(seed)
        self.fast = seed % 3 == 0  # no stalls at all: latencies are asserted
        self.golden = Golden(self.config)
        self.now = 0
        self.taken, self.routing = -2, False
        self.busy = self.committing = self.requested = self.over = False
        self.apply = self.done = None
        self.farther: list[tuple[int, int]] = []
        self.wait = 0
        # Rows that the reads of the last two cycles must give.
        self.asked: tuple | None = None
        self.asked_before: tuple | None = None
        self.offered: int | None = None
        self.recent: list[int] = []
        self.reading: tuple[int, int, int, int] | None = None
        for name in ("token__valid", "token__payload", "route__valid", "route__payload"):
            self.drive(name, 0)
        for name in ("commit_grant", "absent", "selected__ready", "victim_layer", "rst"):
            self.drive(name, int(name == "rst"))
        for name in ("threshold", "learning", "ordered", "kinds", "prefetching", "read_request"):
            self.drive(name, 0)
        for _ in range(1 if seed % 2 else 3):
            await RisingEdge(self.dut.clk)
        self.drive("rst", 0)
        # Nothing is taken before the tables are clear, however hard one asks.
        self.drive("token__valid", rng.getrandbits(1))
        rows = self.config.num_layers << max(1, (self.config.num_experts - 1).bit_length())
        rows <<= self.config.fold_bits if self.config.folds > 1 else 0
        for _ in range(rows + 10):
            await FallingEdge(self.dut.clk)
            clear = self.read("clear_done")
            if clear:
                break
            assert not self.read("token__ready") and not self.read("route__ready")
            await RisingEdge(self.dut.clk)
            self.drive("token__valid", rng.getrandbits(1))
        assert clear, f"not clear {rows + 10} cycles after reset"
        self.drive("token__valid", 0)
        await RisingEdge(self.dut.clk)
        folds, layers = range(self.config.folds), range(self.config.num_layers)
        self.rows = [(layer, fold) for layer in layers for fold in folds]
        self.sweep = list(self.rows)
        # Some runs have no reads at all: they must not be what makes a run right.
        self.asks, self.was_reading = seed % 4 != 0, 0

    async def abandon(self) -> None:
        """A token and a route, as fast as may be, which do not come to their end. Unchecked."""
        rng = self.rng
        route = pack(route_layout(self.config), {"layer": 0, "experts": self.some_set()})
        for name in ("learning", "ordered", "prefetching", "selected__ready", "token__valid"):
            self.drive(name, 1)
        self.drive("token__payload", rng.getrandbits(1))
        self.drive("kinds", (1 << (self.config.depth + 2)) - 1)
        for _ in range(rng.randrange(2, 24 + 24 * self.config.folds)):
            await FallingEdge(self.dut.clk)
            grant = self.read("commit_request") and not self.driven["commit_grant"]
            taken = [name for name in ("token", "route") if self.read(f"{name}__ready")]
            await RisingEdge(self.dut.clk)
            self.drive("commit_grant", int(grant))
            if self.driven["token__valid"] and "token" in taken:
                self.drive("token__valid", 0)
                self.drive("route__payload", route)
                self.drive("route__valid", 1)
            elif "route" in taken:
                self.drive("route__valid", 0)

    async def cycle(self) -> None:
        """One cycle; checks what holds in every cycle."""
        rng = self.rng
        # Stable from the cycle after the grant until commit_done; else changed now and then.
        first = self.committing and self.now == self.granted + 1
        if first or (not self.committing and rng.random() < 0.2):
            self.drive("threshold", self.some_threshold())
            self.drive("prefetching", int(rng.random() < 0.9))
            self.drive("absent", rng.getrandbits(self.config.num_experts))
        if first or (rng.random() < 0.2 and not self.committing and self.done is None):
            bits = self.config.score_bits
            thresholds = [self.some_threshold() for _ in range(1, self.config.look)]
            absents = [rng.getrandbits(self.config.num_experts) for _ in thresholds]
            self.farther = list(zip(absents, thresholds, strict=True))
            if self.farther:
                packed = sum(t << n * bits for n, t in enumerate(thresholds))
                self.drive("farther_threshold", packed)
                bits = self.config.num_experts
                self.drive("farther_absent", sum(a << n * bits for n, a in enumerate(absents)))
        if self.busy and rng.random() < 0.2:
            self.drive("learning", rng.getrandbits(1))
            self.drive("ordered", rng.getrandbits(1))
            self.drive("kinds", rng.getrandbits(self.config.depth + 2))
        self.drive("selected__ready", int(self.fast or rng.random() < 0.6))
        self._ask_for_a_weight()
        expected, self.asked_before, self.asked = self.asked_before, self.asked, None
        # The port is the predictor's own in the cycle in which an event is taken.
        if not self.committing and self.now != self.taken and (self.sweep or rng.random() < 0.2):
            layer, fold = self.sweep.pop() if self.sweep else rng.choice(self.rows)
            self.drive("victim_layer", layer)
            if self.config.folds > 1:
                self.drive("victim_fold", fold)
            state, lanes = self.golden.state, self.config.num_lanes
            part = slice(fold * lanes, (fold + 1) * lanes)
            self.asked = (layer, state.score[layer][part].tolist(), state.use[layer][part].tolist())
        await FallingEdge(self.dut.clk)
        if self.config.folds > 1:
            # A route's scores are graded, a fold a cycle; what is asked for meanwhile is lost.
            wait = self.routing and self.taken < self.now < self.taken + self.config.folds
            assert self.read("victim_wait") == wait
            if wait and self.asked:
                self.sweep, self.asked = list(self.rows), None

        if expected is not None:
            score = self.lanes("victim_score", self.config.score_bits, signed=True)
            use = self.lanes("victim_use", USE_BITS, signed=False)
            assert score == expected[1], f"scores of layer {expected[0]}: {score}"
            assert use == expected[2], f"use counts of layer {expected[0]}: {use}"
        if self.busy:
            assert not self.read("token__ready") and not self.read("route__ready")
        self._check_commit()
        if self.driven["commit_grant"]:
            self.asked = None  # so it is from the grant on
        self._check_picks()
        read = self._check_weight()
        grant = self.driven["commit_grant"]
        await RisingEdge(self.dut.clk)
        self.now += 1
        if grant:
            self.drive("commit_grant", 0)
        if read:
            self.reading = None
            self.drive("read_request", 0)
        self.was_reading = self.driven["read_request"]

    def _ask_for_a_weight(self) -> None:
        """Software reads the tables while events go on; the index means nothing otherwise."""
        rng, config = self.rng, self.config
        if self.reading is not None:
            return
        experts = config.num_experts
        table = rng.randrange(config.depth + 2)
        # Mostly what has just been learnt.
        expert = rng.choice(self.recent) if self.recent and rng.random() < 0.8 else 0
        index = (table, rng.randrange(config.num_layers), expert, rng.randrange(experts))
        layout = table_index_layout(config)
        fields = dict(zip(("table", "layer", "expert", "lane"), index, strict=True))
        self.drive("read_index", pack(layout, fields))
        if rng.random() < 0.3 and self.asks:
            self.reading = index
            self.drive("read_request", 1)

    def _check_weight(self) -> bool:
        """The weight that is given is golden's, as of the last event that ended."""
        valid = bool(self.read("read_valid"))
        if not valid:
            return False
        assert self.was_reading, "a weight that was not asked for before"
        table, layer, expert, lane = self.reading
        state = self.golden.state
        if table == 0:
            wanted = state.bias[layer, lane]
        elif table == 1:
            wanted = state.temporal[layer, expert, lane]
        else:
            wanted = state.spatial[table - 2, layer, expert, lane]
        value, bits = self.read("read_value"), self.config.bias_bits
        got = value - (value >> (bits - 1) << bits)
        assert got == wanted, f"weight {self.reading}: {got}, not {wanted}"
        self.total_weights += got != 0
        return True

    def _check_commit(self) -> None:
        """Grants a request after a random delay; its end is where golden changes."""
        request, done = self.read("commit_request"), self.read("commit_done")
        assert not (request and self.committing), "requested again before commit_done"
        if self.requested and not self.committing:
            assert request, "the request was withdrawn"
        if request:
            if not self.requested:
                self.requested_at = self.now
            self.requested = True
            assert self.apply is not None, "nothing to commit"
            assert self.read("select_layer") == self.select_layer
            if self.wait or self.sweep:
                self.wait = max(0, self.wait - 1)
            else:
                # The grant may come in the cycle of the request, as the manager gives it.
                self.drive("commit_grant", 1)
                self.committing, self.granted = True, self.now
        if done:
            assert self.committing and self.now > self.granted
            self.committing = self.requested = False
            self.done = self.now
            self.apply()
            self.apply = None
            self.sweep = list(self.rows)
            self.expected = self.expected_picks()

    def expected_picks(self) -> list[dict]:
        if not self.config.look or not self.driven["prefetching"]:
            return []
        expected, layer, self.puts = [], self.select_layer, []
        for absent, bits in [(self.driven["absent"], self.driven["threshold"]), *self.farther]:
            allowed = np.array([absent >> e & 1 for e in range(self.config.num_experts)], bool)
            threshold = bits - ((bits >> self.config.score_bits - 1) << self.config.score_bits)
            picks = self.golden.select(layer, allowed, threshold)
            row = self.golden.state.score[layer]
            self.puts.append(sum(listed(row.tolist(), absent, threshold, self.config)))
            expected += [{"layer": layer, "expert": int(e), "score": int(row[e])} for e in picks]
            layer = (layer + 1) % self.config.num_layers
        return expected

    def some_threshold(self) -> int:
        """Mostly near the scores there are, else anything."""
        rng = self.rng
        if rng.random() < 0.2:
            return rng.getrandbits(self.config.score_bits)
        score = int(rng.choice(self.golden.state.score.ravel())) + rng.randint(-1, 1)
        return score & ((1 << self.config.score_bits) - 1)

    def _check_picks(self) -> None:
        pick = self.read("selected__payload") if self.read("selected__valid") else None
        assert self.offered in (None, pick), "a pick was withdrawn or changed"
        self.offered = pick
        if pick is not None:
            assert self.done is not None, "picked before the commit"
            self.first = min(self.first, self.now)
            if self.driven["selected__ready"]:
                self.picks.append(unpack(self.pick, pick))
                self.offered = None
                assert len(self.picks) <= len(self.expected), f"too much: {self.picks[-1]}"
                assert self.picks[-1] == self.expected[len(self.picks) - 1]
        self.over = bool(self.read("selection_over"))
        if self.over:
            assert self.done is not None and self.now > self.done
            assert self.busy and self.offered is None
            assert self.picks == self.expected, f"missing {self.expected[len(self.picks) :]}"

    def stall(self, most: int) -> int:
        return 0 if self.fast or self.rng.random() < 0.5 else self.rng.randrange(most)

    def note(self, name: str, cycles: int, limit: int) -> None:
        self.worst[name] = max(self.worst.get(name, 0), cycles)
        assert cycles <= limit, f"{name}: {cycles} cycles, not {limit} or fewer"

    async def event(
        self, stream: str, payload: int, select_layer: int, apply, new_sequence: bool = False
    ) -> None:
        """One token or route from its handshake to ``selection_over``.

        ``apply`` brings the golden model, which has the event's settings, to where the commit ends.
        """
        rng = self.rng
        for _ in range(self.stall(12)):
            await self.cycle()
        # The settings of the handshake's cycle hold for the whole event.
        learning, ordered = rng.random() < 0.85, rng.random() < 0.6
        # Mostly all kinds, as rows that learn seldom hold little.
        bits = self.config.depth + 2
        kinds = rng.getrandbits(bits) if rng.random() < 0.3 else (1 << bits) - 1
        self.drive("learning", int(learning))
        self.drive("ordered", int(ordered))
        self.drive("kinds", kinds)
        params = params_of(self.config, learning=learning, ordered=ordered, predictors=kinds)
        self.drive(f"{stream}__payload", payload)
        self.drive(f"{stream}__valid", 1)
        self.requested = False
        self.done = None
        self.first = 1 << 60
        self.picks: list[dict] = []
        self.wait = self.stall(9)
        self.select_layer = select_layer
        taken = self.taken = self.now
        self.routing = stream == "route"
        await self.cycle()
        assert self.read(f"{stream}__ready"), "not ready although idle"

        def applied() -> None:
            self.golden.params = params
            apply()

        self.apply = applied
        self.busy = True
        self.drive(f"{stream}__valid", 0)
        other = getattr(self.dut, f"{stream}__payload")
        self.drive(f"{stream}__payload", rng.getrandbits(len(other)))
        while not self.over:
            await self.cycle()
            assert self.now - taken < 400 * self.config.folds, "no end"
        self.busy = self.over = False
        self.total_picks += len(self.picks)
        if self.fast:
            c, ended = self.config, self.now - 1
            levels, folds = (c.num_lanes - 1).bit_length(), c.folds
            request, done = self.requested_at - taken, self.done - self.granted
            pick, longest = 5 + levels, 5 + levels
            if folds > 1 and self.expected:
                pick, longest = (
                    6 + folds * (2 + levels) + puts * (2 if c.num_lanes > 1 else 1)
                    for puts in (self.puts[0], max(self.puts))
                )
            if stream == "route":
                ahead = max(c.depth, c.look)
                gains = c.gains if ordered else (4,) * c.top_k
                steps = sum(max(1, a - b) for a, b in zip(gains, (*gains[1:], 0), strict=True))
                corrected = taken + folds * (steps + c.top_k) + (3 if folds == 1 else 5)
                settle = max(4 - folds if c.depth else 0, 6 - (ahead + 1) * folds, 1)
                if folds == 1:
                    wanted = steps + max(4 if c.depth else 0, 6 - ahead)
                else:
                    wanted = folds * steps + 2 + settle
                self.note("route to commit request", request, wanted)
                wanted = ahead + 3 if folds == 1 else (ahead + 1) * folds + 4
                self.note("grant to commit_done", done, wanted)
            else:
                corrected = taken
                self.note("token to commit request", request, 1)
                rows = c.num_layers if new_sequence else max(1, c.look)
                wanted = rows * folds + (4 if new_sequence or folds > 1 else 2)
                self.note("token's commit", done, wanted)
                pick += 2 * (new_sequence and folds == 1)
            nearest = any(p["layer"] == select_layer for p in self.picks)
            if nearest:
                due = max(self.granted + pick, self.done + 1, corrected + 1)
                assert self.first == due, f"first pick in {self.first}, not {due}"
            # From one layer's last pick to the next one's first it takes no longer than that.
            over = max(1, c.look) * (longest + 2 * c.num_select)
            over += 2 * (stream == "token" and new_sequence and folds == 1)
            self.note("first to over", ended - max(self.done, corrected), over)
            if stream == "route" and (c.top_k, c.num_select, folds) == (4, 8, 1):
                self.note("route to idle", ended + 1 - self.granted, 2 * c.num_select + 24)

    async def token(self, new_sequence: bool) -> None:
        payload = pack(token_layout(), {"new_sequence": int(new_sequence)})
        await self.event("token", payload, 0, lambda: self.golden.token(new_sequence), new_sequence)

    async def route(self, layer: int, experts: list[int]) -> None:
        payload = pack(route_layout(self.config), {"layer": layer, "experts": experts})
        following = (layer + 1) % self.config.num_layers
        await self.event("route", payload, following, lambda: self.golden.route(layer, experts))

    def some_set(self) -> list[int]:
        """K experts, mostly those of the sets before: rows that have just been written."""
        rng, k = self.rng, self.config.top_k
        fresh = rng.sample(range(self.config.num_experts), k)
        chosen = [e for e in self.recent if rng.random() < 0.7]
        rng.shuffle(chosen)
        chosen += [e for e in fresh if e not in chosen]
        self.recent = chosen[:k]
        return chosen[:k]


@cocotb.test(timeout_time=10, timeout_unit="ms")
@cocotb.parametrize(name=list(CONFIGS))
async def predictor_is_golden(dut, name: str) -> None:
    """Legal traffic: layers in order, a token before layer 0, new sequences anywhere."""
    tb = TB(dut, name)
    layers = tb.config.num_layers
    for seed in SEEDS:
        await tb.reset(seed)
        events = 0
        new_sequence = True
        while events < EVENTS:
            await tb.token(new_sequence)
            new_sequence = tb.rng.random() < 0.15
            for layer in range(layers):
                events += 1
                await tb.route(layer, tb.some_set())
                if tb.rng.random() < 0.03:
                    new_sequence = True  # this one ends in the middle of a token
                    break
        for _ in range(layers + 2):
            await tb.cycle()
    tb.log.warning("%s: %d picks; worst latencies: %s", name, tb.total_picks, tb.worst)
    assert tb.total_picks or not tb.config.look
    assert tb.total_weights > 20, "hardly a weight was read"
