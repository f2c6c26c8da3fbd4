# SPDX-License-Identifier: Apache-2.0
"""Best candidates of a layer, in order, as far as they pass the confidence gate."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .payloads import selection_layout
from .score_memory import score_layout

__all__ = ["Selector"]


class _Node:
    """One register of the tournament: the best candidate left in its subtree.

    ``ready``: it has been filled, with a candidate if ``valid``, else nothing is left below.
    ``take`` is set combinationally by the node above in the cycle in which it takes what is here;
    a node then fills itself again. (That one of two exhausted children is taken does no harm.)
    """

    def __init__(self, name, score, lane, valid, ready):
        self.score, self.lane, self.valid, self.ready = score, lane, valid, ready
        self.take = Signal(name=f"{name}_take")


class Selector(wiring.Component):
    """Delivers the best lanes of a row of scores, highest first, ties to the lowest lane.

    A tournament tree with a register at every node. A node is refilled from its two children as
    soon as both hold their best candidate or are exhausted, so every level works on a different
    candidate: the first pick is at ``o`` 2 + ceil(log2(E)) cycles after ``start``, the others
    follow every second cycle. It ends after ``num_select`` picks, when no candidate is left, or at
    the first score below the threshold (the rest cannot be higher).

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses ``num_experts``, ``num_select`` and the widths.

    Members
    -------
    start : In
        One cycle, not before ``over`` of the last selection: take ``score``, ``candidates``,
        ``threshold`` and ``layer``.
    score : In
        Quarter units.
    candidates : In
        Lanes that may be picked.
    threshold : In
        Lowest score that is picked.
    layer : In
        Copied to the picks.
    hold : In
        Deliver nothing and do not end; only while no pick of this selection has been offered.
    o : Out
        The picks.
    over : Out
        One cycle: all picks have been delivered. The cycle after the last handshake at the
        earliest.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "score": In(score_layout(config)),
                "candidates": In(config.num_experts),
                "threshold": In(signed(config.score_bits)),
                "layer": In(config.layer_bits),
                "hold": In(1),
                "o": Out(stream.Signature(selection_layout(config))),
                "over": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        running = Signal()
        threshold = Signal.like(self.threshold)
        layer = Signal.like(self.layer)

        nodes = []
        for e in range(c.num_experts):
            score = Signal(signed(c.score_bits), name=f"leaf_{e}_score")
            valid = Signal(name=f"leaf_{e}_valid")
            leaf = _Node(f"leaf_{e}", score, e, valid, Const(1))
            with m.If(leaf.take):
                m.d.sync += valid.eq(0)
            with m.If(self.start):
                m.d.sync += [score.eq(self.score[e]), valid.eq(self.candidates[e])]
            nodes.append(leaf)
        level = 0
        while len(nodes) > 1:
            above = []
            for i in range(0, len(nodes), 2):
                pair = nodes[i : i + 2]
                if len(pair) == 1:
                    above.append(pair[0])
                    continue
                above.append(self._join(m, f"node_{level}_{i // 2}", level, *pair))
            nodes, level = above, level + 1
        (root,) = nodes

        count = Signal(range(c.num_select + 1))
        full = Signal()
        m.d.comb += full.eq(count == c.num_select)
        passes = Signal()
        ended = Signal()
        waiting = Signal()  # the output register holds a pick
        payload = Signal(self.o.payload.shape())
        m.d.comb += [
            passes.eq(root.valid & (root.score >= threshold) & ~full),
            # Only once the tree has settled on a best candidate or on none.
            ended.eq(full | (root.ready & ~passes)),
            root.take.eq(running & root.ready & passes & (~waiting | (self.o.ready & ~self.hold))),
            self.o.payload.eq(payload),
            self.o.valid.eq(waiting & ~self.hold),
            self.over.eq(running & ended & ~waiting & ~self.hold),
        ]
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += waiting.eq(0)
        with m.If(root.take):
            m.d.sync += [
                waiting.eq(1),
                count.eq(count + 1),
                payload.layer.eq(layer),
                payload.expert.eq(root.lane),
                payload.score.eq(root.score),
            ]
        with m.If(self.over):
            m.d.sync += running.eq(0)
        with m.If(self.start):
            m.d.sync += [
                running.eq(1),
                count.eq(0),
                threshold.eq(self.threshold),
                layer.eq(self.layer),
            ]
        return m

    def _join(self, m, name, level, first, second):
        """A node above ``first`` and ``second``, whose lanes are all lower than ``second``'s."""
        score = Signal(signed(self.config.score_bits), name=f"{name}_score")
        lane = Signal(range(max(2, self.config.num_experts)), name=f"{name}_lane")
        valid = Signal(name=f"{name}_valid")
        ready = Signal(name=f"{name}_ready")
        node = _Node(name, score, lane, valid, ready)
        higher = Signal(name=f"{name}_higher")
        refill = Signal(name=f"{name}_refill")
        # One unsigned comparison: an exhausted child is below all others, and signs, which count
        # the other way round, stand in each other's place. It is a "less than", the borrow of one
        # subtraction: Yosys makes an equality comparison as well for a "greater than".
        first_key = Cat(first.score[:-1], second.score[-1], first.valid)
        second_key = Cat(second.score[:-1], first.score[-1], second.valid)
        m.d.comb += [
            higher.eq(first_key < second_key),
            refill.eq(~ready & first.ready & second.ready),
            first.take.eq(refill & ~higher),
            second.take.eq(refill & higher),
        ]
        with m.If(refill):
            m.d.sync += [
                valid.eq(first.valid | second.valid),
                score.eq(Mux(higher, second.score, first.score)),
                lane.eq(Mux(higher, second.lane, first.lane)),
            ]
        with m.If(self.start):
            m.d.sync += ready.eq(0)
        with m.Else():
            m.d.sync += ready.eq((ready | (first.ready & second.ready)) & ~node.take)
        return node
