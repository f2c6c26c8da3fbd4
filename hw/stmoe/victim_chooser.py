# SPDX-License-Identifier: Apache-2.0
"""Finds the resident expert that is worth least."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import USE_BITS, EngineConfig

from .expert_map import LaneState, lane_bits

__all__ = ["VictimChooser"]


class _LowestValue(wiring.Component):
    """Pipelined minimum over E lanes, one comparison level per cycle; ties to the lowest lane.

    Latency is ``levels`` cycles, ceil(log2(E)); a new row may enter every cycle.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.levels = (config.num_experts - 1).bit_length()
        super().__init__(
            {
                "values": In(data.ArrayLayout(signed(config.value_bits), config.num_experts)),
                "mask": In(config.num_experts),
                "found": Out(1),
                "lane": Out(lane_bits(config)),
                "value": Out(signed(config.value_bits)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        nodes = []
        for e in range(c.num_experts):
            nodes.append((self.mask[e], self.values[e], e))
        level = 0
        while len(nodes) > 1:
            above = []
            for i in range(0, len(nodes), 2):
                pair = nodes[i : i + 2]
                found = Signal(name=f"found_{level}_{i}")
                value = Signal(signed(c.value_bits), name=f"value_{level}_{i}")
                lane = Signal(lane_bits(c), name=f"lane_{level}_{i}")
                if len(pair) == 1:
                    ((f, v, n),) = pair
                    m.d.sync += [found.eq(f), value.eq(v), lane.eq(n)]
                else:
                    (f0, v0, n0), (f1, v1, n1) = pair
                    second = Signal(name=f"second_{level}_{i}")
                    m.d.comb += second.eq(f1 & (~f0 | (v1 < v0)))
                    m.d.sync += [
                        found.eq(f0 | f1),
                        value.eq(Mux(second, v1, v0)),
                        lane.eq(Mux(second, n1, n0)),
                    ]
                above.append((found, value, lane))
            nodes = above
            level += 1
        ((found, value, lane),) = nodes
        m.d.comb += [self.found.eq(found), self.value.eq(value), self.lane.eq(lane)]
        return m


class VictimChooser(wiring.Component):
    """Walks the layers and picks the evictable expert of lowest value.

    For a load of ``load_layer`` after the latest event at ``latest_layer``: the layers
    latest-1, latest-2, ..., latest (mod L), the first that is over its quota and has an evictable
    expert outside the current set; else ``load_layer`` itself; else, for a demand only, the lowest
    value of all layers, the current set not excepted. An expert is evictable when it is ready and
    has no pins. Its value is ``score + (use << use_shift)``; ties go to the first layer of the
    walk and the lowest expert.

    The answer comes with ``done``, which stays high until the next ``start``. The walk's first
    choice takes 4 + ceil(log2(E)) cycles from ``start``, for a prefetch 2 more.

    Source: architecture section 2, *Victim*.

    Members
    -------
    start : In
        One cycle; the other inputs hold until ``done``, ``demand`` until the answer is used.
    demand, load_layer, load_expert, latest_layer, current_set : In
    row_layer, row : Out, In
        The expert map's row port; also the address of ``score`` and ``use``.
    score, use : In
        Row of ``row_layer``, one cycle later.
    over, any_ready : In
        Flags of each layer from the expert map.
    done, found, admitted, layer, expert : Out
        ``admitted``: found, and for a prefetch its value is more than the victim's.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        experts = c.num_experts
        super().__init__(
            {
                "start": In(1),
                "demand": In(1),
                "load_layer": In(c.layer_bits),
                "load_expert": In(lane_bits(c)),
                "latest_layer": In(c.layer_bits),
                "current_set": In(experts),
                "row_layer": Out(c.layer_bits),
                "row": In(data.ArrayLayout(LaneState, experts)),
                "score": In(data.ArrayLayout(signed(c.score_bits), experts)),
                "use": In(data.ArrayLayout(unsigned(USE_BITS), experts)),
                "over": In(c.num_layers),
                "any_ready": In(c.num_layers),
                "busy": Out(1),
                "done": Out(1),
                "found": Out(1),
                "admitted": Out(1),
                "layer": Out(c.layer_bits),
                "expert": Out(lane_bits(c)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layers, experts = c.num_layers, c.num_experts
        m.submodules.lowest = lowest = _LowestValue(c)

        # Highest set bit below latest_layer, else the highest of all: the walk's first match.
        below = Signal(layers)
        m.d.comb += below.eq(Cat(self.latest_layer > layer for layer in range(layers - 1)))

        def first_of_walk(name, bits):
            index = Signal(c.layer_bits, name=f"{name}_index")
            chosen = Signal(layers, name=f"{name}_chosen")
            m.d.comb += chosen.eq(Mux((bits & below).any(), bits & below, bits))
            for layer in range(layers):
                with m.If(chosen[layer]):
                    m.d.comb += index.eq(layer)
            return index

        over_quota = Signal(layers)
        m.d.comb += over_quota.eq(self.over & self.any_ready)
        walk_index = first_of_walk("walk", over_quota)
        rest = Signal(layers)
        rest_index = first_of_walk("rest", rest)

        layer = Signal(c.layer_bits)
        excluding = Signal()
        everywhere = Signal()
        value = Array(Signal(signed(c.value_bits), name=f"lane_value_{e}") for e in range(experts))
        mask = Signal(experts)
        candidate = Signal(signed(c.value_bits))
        count = Signal(range(max(2, lowest.levels + 2)))
        best_found = Signal()
        best_value = Signal(signed(c.value_bits))
        best_layer = Signal(c.layer_bits)
        best_lane = Signal(lane_bits(c))
        tried_own = Signal()

        m.d.comb += [
            self.row_layer.eq(layer),
            lowest.mask.eq(mask),
            *(lowest.values[e].eq(value[e]) for e in range(experts)),
            self.found.eq(best_found),
            self.admitted.eq(best_found & (self.demand | (candidate > best_value))),
            self.layer.eq(best_layer),
            self.expert.eq(best_lane),
        ]
        done = Signal()
        m.d.comb += self.done.eq(done)
        excluded = Signal(experts)
        m.d.comb += excluded.eq(Mux(excluding & (layer == self.latest_layer), self.current_set, 0))

        with m.FSM() as fsm:
            m.d.comb += self.busy.eq(~fsm.ongoing("IDLE"))
            with m.State("IDLE"):
                with m.If(self.start):
                    m.d.sync += [
                        done.eq(0),
                        best_found.eq(0),
                        tried_own.eq(0),
                        everywhere.eq(0),
                        excluding.eq(1),
                    ]
                    with m.If(self.demand):
                        m.d.sync += layer.eq(walk_index)
                        with m.If(over_quota.any()):
                            m.next = "READ"
                        with m.Else():
                            m.next = "OWN"
                    with m.Else():
                        m.d.sync += layer.eq(self.load_layer)
                        m.next = "CANDIDATE-READ"
            with m.State("CANDIDATE-READ"):
                m.next = "CANDIDATE"
            with m.State("CANDIDATE"):
                # The row of the layer to be loaded is here; the walk begins with the next one.
                m.d.sync += [
                    candidate.eq(
                        Array(self.score[e] for e in range(experts))[self.load_expert]
                        + (
                            Array(self.use[e] for e in range(experts))[self.load_expert]
                            << c.use_shift
                        )
                    ),
                    layer.eq(walk_index),
                ]
                with m.If(over_quota.any()):
                    m.next = "READ"
                with m.Else():
                    m.next = "OWN"
            with m.State("OWN"):
                m.d.sync += [layer.eq(self.load_layer), tried_own.eq(1)]
                m.next = "READ"
            with m.State("READ"):
                m.next = "ROW"
            with m.State("ROW"):
                for e in range(experts):
                    evictable = (self.row[e] == LaneState.READY) | (
                        self.row[e] == LaneState.READY_UNUSED
                    )
                    m.d.sync += [
                        mask[e].eq(evictable & ~excluded[e]),
                        value[e].eq(self.score[e] + (self.use[e] << c.use_shift)),
                    ]
                m.d.sync += count.eq(0)
                m.next = "COMPARE"
            with m.State("COMPARE"):
                m.d.sync += count.eq(count + 1)
                with m.If(count == lowest.levels):
                    with m.If(
                        lowest.found & (~everywhere | ~best_found | (lowest.value < best_value))
                    ):
                        m.d.sync += [
                            best_found.eq(1),
                            best_value.eq(lowest.value),
                            best_layer.eq(layer),
                            best_lane.eq(lowest.lane),
                        ]
                    with m.If(everywhere):
                        m.next = "NEXT"
                    with m.Elif(lowest.found):
                        m.d.sync += done.eq(1)
                        m.next = "IDLE"
                    with m.Elif(~tried_own & (self.load_layer != layer)):
                        m.next = "OWN"
                    with m.Elif(self.demand):
                        m.d.sync += [everywhere.eq(1), excluding.eq(0), rest.eq(self.any_ready)]
                        m.next = "NEXT"
                    with m.Else():
                        m.d.sync += done.eq(1)
                        m.next = "IDLE"
            with m.State("NEXT"):
                m.d.sync += [layer.eq(rest_index), rest.eq(rest & ~(1 << rest_index))]
                with m.If(rest.any()):
                    m.next = "READ"
                with m.Else():
                    m.d.sync += done.eq(1)
                    m.next = "IDLE"
        return m
