# SPDX-License-Identifier: Apache-2.0
"""Finds the resident expert that is worth least."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import FRACTION_BITS, USE_BITS, EngineConfig

from .expert_map import LaneState, lane_bits
from .folded_lanes import expert_of, fold_and_lane, sublane_bits
from .synthesis import group_copies, group_of

__all__ = ["VictimChooser"]


class _LowestValue(wiring.Component):
    """Pipelined minimum over the lanes, one comparison level per cycle; ties to the lowest lane.

    Latency is ``levels`` cycles, ceil(log2(num_lanes)); a new row may enter every cycle. With
    several folds it is one cycle more, and the answer is the lowest of all rows from the last one
    with ``first`` on, ties to the row that came first.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.levels = (config.num_lanes - 1).bit_length() + (config.folds > 1)
        folds = {"first": In(1), "fold": In(config.fold_bits)} if config.folds > 1 else {}
        super().__init__(
            {
                "values": In(data.ArrayLayout(signed(config.value_bits), config.num_lanes)),
                "mask": In(config.num_lanes),
                **folds,
                "found": Out(1),
                "lane": Out(lane_bits(config)),
                "value": Out(signed(config.value_bits)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        # One number decides: the value, its sign turned so that it counts from 0, below a bit for a
        # lane that is out of the question.
        width = c.value_bits
        nodes = []
        for e in range(c.num_lanes):
            value = self.values[e].as_unsigned()
            nodes.append((Cat(value[:-1], ~value[-1], ~self.mask[e]), e))
        level = 0
        lane_width = lane_bits(c) if c.folds == 1 else sublane_bits(c)
        while len(nodes) > 1:
            above = []
            for i in range(0, len(nodes), 2):
                pair = nodes[i : i + 2]
                key = Signal(width + 1, name=f"key_{level}_{i}", reset_less=True)
                lane = Signal(lane_width, name=f"lane_{level}_{i}", reset_less=True)
                if len(pair) == 1:
                    ((k, n),) = pair
                    m.d.sync += [key.eq(k), lane.eq(n)]
                else:
                    (k0, n0), (k1, n1) = pair
                    second = Signal(name=f"second_{level}_{i}")
                    m.d.comb += second.eq(k1 < k0)
                    m.d.sync += [key.eq(Mux(second, k1, k0)), lane.eq(Mux(second, n1, n0))]
                above.append((key, lane))
            nodes = above
            level += 1
        ((key, lane),) = nodes
        found, value = ~key[-1], Cat(key[: width - 1], ~key[width - 1]).as_signed()
        if c.folds == 1:
            m.d.comb += [self.found.eq(found), self.value.eq(value), self.lane.eq(lane)]
            return m
        first, fold = self.first, self.fold
        for n in range(level):
            first_next = Signal(name=f"first_{n}")
            fold_next = Signal(c.fold_bits, name=f"fold_{n}")
            m.d.sync += [first_next.eq(first), fold_next.eq(fold)]
            first, fold = first_next, fold_next
        # While the inputs stay as they are the last row comes again and again: it is not lower.
        lower = found & (~self.found | (value < self.value))
        with m.If(first | lower):
            m.d.sync += [
                self.found.eq(found),
                self.value.eq(value),
                self.lane.eq(expert_of(c, fold, Value.cast(lane))),
            ]
        return m


class VictimChooser(wiring.Component):
    """Walks the layers and picks the evictable expert of lowest value.

    For a load of ``load_layer`` after the latest event at ``latest_layer``: the layers
    latest-1, latest-2, ..., latest (mod L), the first that is over its quota and has an evictable
    expert outside the current set; else ``load_layer`` itself; else, for a demand only, the lowest
    value of all layers, the current set not excepted. An expert is evictable when it is ready and
    has no pins. Its value is ``score + (use << use_shift)``; ties go to the first layer of the
    walk and the lowest expert.

    The answer comes with ``done``, which stays high until the next ``start`` (and is high after
    reset). The walk's first choice takes :attr:`latency` cycles from ``start``, 6 + ceil(log2(E)).
    The last resort of a demand looks at one layer after the other, as many cycles each; one without
    an evictable expert costs 2. With F folds, more than one, the first choice takes 7 + F +
    ceil(log2(num_lanes)) cycles, and as many more as there are cycles with ``wait`` from the one
    after ``start`` on.

    Source: architecture section 2, *Victim*.

    Members
    -------
    start : In
        One cycle; the other inputs hold until ``done``, ``demand`` until the answer is used.
    demand, load_layer, load_expert, latest_layer, current_set : In
    score_layer : Out
        Layer whose row is looked at two cycles later. While not ``busy`` it is ``load_layer``,
        whose scores are asked for in the cycle of ``start``.
    row, score, use : In
        Of the ``score_layer`` of two cycles before: lanes of the expert map, and the predictor's.
    score_fold : Out
        Only where there are several: which fold of ``score_layer``.
    wait : In
        Only where there are several folds: what is asked for in this cycle does not come. Not
        looked at after the first cycle without it since ``start``.
    over, any_ready : In
        Flags of each layer from the expert map.
    busy : Out
        From the cycle after ``start`` until ``done``.
    done, found, admitted, layer, expert : Out
        ``admitted``: found, and for a prefetch its value with ``config.admission_bonus`` is more
        than the victim's. All are registers, and of use only with ``done``.
    layer_ahead, expert_ahead : Out
        ``layer`` and ``expert`` of the next cycle, in the cycle before ``done``.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        experts, lanes = c.num_experts, c.num_lanes
        folds = {"score_fold": Out(c.fold_bits), "wait": In(1)} if c.folds > 1 else {}
        super().__init__(
            {
                "start": In(1),
                "demand": In(1),
                "load_layer": In(c.layer_bits),
                "load_expert": In(lane_bits(c)),
                "latest_layer": In(c.layer_bits),
                "current_set": In(experts),
                "score_layer": Out(c.layer_bits),
                **folds,
                "row": In(data.ArrayLayout(LaneState, experts)),
                "score": In(data.ArrayLayout(signed(c.score_bits), lanes)),
                "use": In(data.ArrayLayout(unsigned(USE_BITS), lanes)),
                "over": In(c.num_layers),
                "any_ready": In(c.num_layers),
                "busy": Out(1),
                "done": Out(1, init=1),
                "found": Out(1),
                "admitted": Out(1),
                "layer": Out(c.layer_bits),
                "expert": Out(lane_bits(c)),
                "layer_ahead": Out(c.layer_bits),
                "expert_ahead": Out(lane_bits(c)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from ``start`` to ``done`` when the walk's first choice is taken."""
        c = self.config
        return 6 + (c.num_lanes - 1).bit_length() + (c.folds + 1 if c.folds > 1 else 0)

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layers, experts, lanes = c.num_layers, c.num_experts, c.num_lanes
        m.submodules.lowest = lowest = _LowestValue(c)

        # The walk's first match: the highest layer below latest_layer, else the highest of all. In
        # two registers, as it is far from the map's counters to the address of the rows.
        below = Signal(layers)
        m.d.comb += below.eq(Cat(self.latest_layer > index for index in range(layers - 1)))

        def highest(name, flags):
            """Registers of registers: whether any flag is set, and the highest that is."""
            held = Signal(layers, name=f"{name}_flags")
            index = Signal(c.layer_bits, name=f"{name}_index")
            some = Signal(name=f"{name}_some")
            m.d.sync += [held.eq(flags), some.eq(held.any())]
            for n in range(layers):
                with m.If(held[n]):
                    m.d.sync += index.eq(n)
            return some, index

        over_quota = Signal(layers)
        m.d.comb += over_quota.eq(self.over & self.any_ready)
        some_below, index_below = highest("below", over_quota & below)
        some_over, index_over = highest("over", over_quota)

        layer, layer_next = Signal(c.layer_bits), Signal(c.layer_bits)
        m.d.sync += layer.eq(layer_next)
        excluding = Signal()
        everywhere = Signal()
        value = [
            Signal(signed(c.value_bits), name=f"lane_value_{e}", reset_less=True)
            for e in range(lanes)
        ]
        mask = Signal(lanes)
        # What is to be loaded goes through the tree as well, alone and ahead of the walk.
        candidate_value = Signal(signed(c.value_bits))
        worth = candidate_value + (c.admission_bonus << FRACTION_BITS)
        candidate = Signal(worth.shape())
        weighing = Signal()
        weighed = Signal(lowest.levels + 1)
        m.d.sync += [weighed.eq(Cat(weighing, weighed)), candidate.eq(worth)]
        with m.If(weighed[-1]):
            m.d.sync += candidate_value.eq(lowest.value)
        count = Signal(range(max(2, lowest.levels + 2)))
        best_value = Signal(signed(c.value_bits))
        tried_own = Signal()
        lower = Signal()
        excluded = Signal(experts)

        m.d.comb += [
            lowest.mask.eq(mask),
            *(lowest.values[e].eq(value[e]) for e in range(lanes)),
        ]
        m.d.sync += [
            lower.eq(lowest.value < best_value),
            # The layer is that of the cycle before in all in which this is looked at.
            excluded.eq(Mux(excluding & (layer == self.latest_layer), self.current_set, 0)),
        ]

        fold, first, next_fold = Signal(c.fold_bits), Signal(), Signal(c.fold_bits)
        load_fold, load_lane = fold_and_lane(c, self.load_expert)
        if c.folds > 1:
            m.d.comb += [lowest.fold.eq(fold), lowest.first.eq(first)]
            m.d.sync += first.eq(0)

        # The states in which a layer is decided upon, from registers of their own, as the address
        # of its rows goes far: in WALK, OWN, NEXT; and in COMPARE when the tree answers.
        in_walk, in_own, in_next, answered = Signal(), Signal(), Signal(), Signal()
        m.d.sync += [bit.eq(0) for bit in (in_walk, in_own, in_next, answered)]

        # The row that is here goes into the tree, of it the lanes that may go, or in WALK the one
        # of what is to be loaded. Known a cycle ahead, as it goes to every lane.
        takes_next = Signal()
        takes = group_copies(m, takes_next, "takes")
        may_go = [
            ((self.row[e] == LaneState.READY) | (self.row[e] == LaneState.READY_UNUSED))
            & ~excluded[e]
            for e in range(experts)
        ]
        some = Array(Cat(may_go[n * lanes : (n + 1) * lanes]) for n in range(c.folds))[next_fold]
        for e in range(lanes):
            with m.If(takes[group_of(e, lanes)]):
                m.d.sync += [
                    mask[e].eq(Mux(in_walk, load_lane == e, some[e])),
                    value[e].eq(self.score[e] + (self.use[e] << c.use_shift)),
                ]

        def keep():
            m.d.sync += [
                self.found.eq(lowest.found),
                self.admitted.eq(lowest.found & (self.demand | (candidate > lowest.value))),
                best_value.eq(lowest.value),
                self.layer.eq(layer),
                self.expert.eq(lowest.lane),
            ]

        # When the tree's answer is here it is what comes next, unless all layers are compared: then
        # `done` comes cycles later.
        m.d.comb += [
            self.layer_ahead.eq(Mux(answered, layer, self.layer)),
            self.expert_ahead.eq(Mux(answered, lowest.lane, self.expert)),
        ]

        before, last = Signal(c.layer_bits), Signal()
        # Where the walk through all layers goes on from, if it does after this answer.
        around = Mux(answered & ~everywhere, self.latest_layer, layer_next)
        m.d.sync += before.eq(Mux(around == 0, layers - 1, around - 1))

        m.d.comb += layer_next.eq(
            Mux(
                in_walk,
                Mux(some_below, index_below, Mux(some_over, index_over, self.load_layer)),
                Mux(in_own, self.load_layer, Mux(in_next, before, layer)),
            )
        )

        with m.FSM() as fsm:
            m.d.comb += self.busy.eq(~self.done)
            # A cycle ahead: the score memory has a register of its own for the address.
            if c.folds == 1:
                m.d.comb += self.score_layer.eq(Mux(self.done, self.load_layer, layer_next))
            else:
                m.d.comb += self.score_layer.eq(
                    Mux(fsm.ongoing("WAIT"), self.load_layer, layer_next)
                )
            with m.State("IDLE"):
                m.d.sync += [
                    tried_own.eq(0),
                    everywhere.eq(0),
                    excluding.eq(1),
                ]
                with m.If(self.start):
                    m.d.sync += self.done.eq(0)
                    m.next = "CANDIDATE" if c.folds == 1 else "WAIT"
            if c.folds > 1:
                with m.State("WAIT"):
                    m.d.comb += self.score_fold.eq(load_fold)
                    with m.If(~self.wait):
                        m.next = "CANDIDATE"
            with m.State("CANDIDATE"):
                m.d.sync += in_walk.eq(1)
                m.d.comb += takes_next.eq(1)
                m.next = "WALK"
            with m.State("WALK"):
                # The scores of the layer to be loaded are here; the layers to be walked follow.
                if c.folds > 1:
                    m.d.sync += first.eq(1)
                m.d.sync += tried_own.eq(~some_over)
                m.d.comb += weighing.eq(1)
                m.next = "READ"
            with m.State("OWN"):
                m.d.sync += tried_own.eq(1)
                m.next = "READ"
            with m.State("READ"):
                m.d.sync += count.eq(0)
                m.d.comb += takes_next.eq(1)
                m.next = "ROW"
                if c.folds > 1:
                    m.d.comb += self.score_fold.eq(1)
                    m.d.sync += next_fold.eq(0)
            with m.State("ROW"):
                if c.folds == 1:
                    m.d.sync += answered.eq(lowest.levels == 0)
                    m.next = "COMPARE"
                else:
                    m.d.comb += [
                        self.score_fold.eq(next_fold + 2),
                        takes_next.eq(next_fold != c.folds - 1),
                    ]
                    m.d.sync += [
                        fold.eq(next_fold),
                        next_fold.eq(next_fold + 1),
                        first.eq(next_fold == 0),
                    ]
                    with m.If(next_fold == c.folds - 1):
                        m.next = "COMPARE"
            with m.State("COMPARE"):
                m.d.sync += [
                    count.eq(count + 1),
                    answered.eq(count == lowest.levels - 1),
                ]
                with m.If(answered):
                    with m.If(~everywhere):
                        keep()
                    with m.If(everywhere):
                        m.next = "KEEP"
                    with m.Elif(lowest.found):
                        m.d.sync += self.done.eq(1)
                        m.next = "IDLE"
                    with m.Elif(~tried_own & (self.load_layer != layer)):
                        m.d.sync += in_own.eq(1)
                        m.next = "OWN"
                    with m.Elif(self.demand):
                        m.d.sync += [
                            everywhere.eq(1),
                            excluding.eq(0),
                            last.eq(0),
                            in_next.eq(1),
                        ]
                        m.next = "NEXT"
                    with m.Else():
                        m.d.sync += self.done.eq(1)
                        m.next = "IDLE"
            with m.State("KEEP"):
                # The tree's answer stands: its inputs have not changed.
                with m.If(lowest.found & (lower | ~self.found)):
                    keep()
                m.d.sync += in_next.eq(1)
                m.next = "NEXT"
            with m.State("NEXT"):
                # Everywhere: from the latest layer down, round to the latest layer again.
                m.d.sync += last.eq(before == self.latest_layer)
                m.next = "SKIP"
                with m.If(last):
                    m.d.sync += self.done.eq(1)
                    m.next = "IDLE"
            with m.State("SKIP"):
                with m.If(self.any_ready.bit_select(layer, 1)):
                    m.next = "READ"
                with m.Else():
                    m.d.sync += in_next.eq(1)
                    m.next = "NEXT"
        return m
