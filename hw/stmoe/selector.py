# SPDX-License-Identifier: Apache-2.0
"""Best candidates of a layer, in order, as far as they pass the confidence gate."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .folded_lanes import expert_of
from .payloads import selection_layout
from .score_memory import score_layout
from .synthesis import GROUPS, group_of

__all__ = ["Selector"]


class _Node:
    """One register of the tournament: the best candidate left in its subtree.

    ``ready``: it has been filled, with a candidate if ``valid``, else nothing is left below.
    ``take`` is set combinationally by the node above in the cycle in which it takes what is here;
    a node then fills itself again. (That one of two exhausted children is taken does no harm.)
    ``passes``, of the root where it is asked for: it is ``valid`` and not below the threshold.
    """

    def __init__(self, name, score, lane, valid, ready, passes=None):
        self.score, self.lane, self.valid, self.ready = score, lane, valid, ready
        self.passes = passes
        self.take = Signal(name=f"{name}_take")


class Selector(wiring.Component):
    """Delivers the best lanes of a row of scores, highest first, ties to the lowest lane.

    A tournament tree with a register at every node. A node is refilled from its two children as
    soon as both hold their best candidate or are exhausted, so every level works on a different
    candidate: the first pick is at ``o`` 2 + ceil(log2(E)) cycles after ``start``, the others
    follow every second cycle. It ends after ``num_select`` picks, when no candidate is left, or at
    the first score below the threshold (the rest cannot be higher).

    Where ``config.folds`` is more than one, F, the tree has ``num_lanes`` leaves and the folds go
    through it one after the other. What it gives is put in its place in a list of the best so far,
    behind what is not lower (an earlier fold's experts come first), until a score is below the
    threshold or too low for a full list; then the next fold begins. A fold with p candidates put
    in the list takes 2 + ceil(log2(num_lanes)) + 2p cycles (2 + p where ``num_lanes`` is 1). After
    the last one the list is the selection: its first pick is at ``o`` in the cycle after, one
    cycle and those of all folds after the first ``start``, the others follow every cycle.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses ``num_experts``, ``num_lanes``, ``num_select`` and the widths.

    Members
    -------
    start : In
        One cycle, not before ``over`` of the last selection: take ``score``, ``candidates``,
        ``threshold`` and ``layer``. With several folds F cycles, the folds in their order,
        one a cycle: only ``score`` and ``candidates`` are taken with those after the first.
    load : In
        Only where there is one fold, and the same for every group of lanes: high with ``start``,
        and otherwise not before ``over`` of the last selection. The lanes take ``score`` and
        ``candidates`` with this, as there are hundreds of registers; nothing comes of it alone.
    fold : In
        Only where there are several.
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
        folds = {"fold": In(config.fold_bits)} if config.folds > 1 else {"load": In(GROUPS)}
        super().__init__(
            {
                "start": In(1),
                **folds,
                "score": In(score_layout(config)),
                "candidates": In(config.num_lanes),
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

        if c.folds > 1:
            self._folded(m, threshold, layer)
            return m
        root = self._tree(m, self.load, self.score, self.candidates, threshold)

        count = Signal(range(c.num_select + 1))
        full = Signal()
        m.d.comb += full.eq(count == c.num_select)
        passes = Signal()
        ended = Signal()
        waiting = Signal()  # the output register holds a pick
        payload = Signal(self.o.payload.shape())
        m.d.comb += [
            passes.eq(root.passes & ~full),
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

    def _tree(self, m, load, row, candidates, threshold=None) -> _Node:
        """The root of a tournament that begins anew with ``load``, of each group of lanes. It has
        ``passes`` if there is a threshold, which stands from the cycle after ``load`` on."""
        c = self.config
        nodes = []
        for e in range(c.num_lanes):
            score = Signal(signed(c.score_bits), name=f"leaf_{e}_score", reset_less=True)
            valid = Signal(name=f"leaf_{e}_valid")
            alone = c.num_lanes == 1 and threshold is not None
            passes = valid & (score >= threshold) if alone else None
            leaf = _Node(f"leaf_{e}", score, e, valid, Const(1), passes)
            with m.If(leaf.take):
                m.d.sync += valid.eq(0)
            with m.If(load[group_of(e, c.num_lanes)]):
                m.d.sync += [score.eq(row[e]), valid.eq(candidates[e])]
            nodes.append(leaf)
        level = 0
        while len(nodes) > 1:
            above = []
            for i in range(0, len(nodes), 2):
                pair = nodes[i : i + 2]
                if len(pair) == 1:
                    above.append(pair[0])
                    continue
                limit = threshold if len(nodes) == 2 else None
                above.append(self._join(m, f"node_{level}_{i // 2}", load[0], *pair, limit))
            nodes, level = above, level + 1
        (root,) = nodes
        return root

    def _folded(self, m, threshold, layer) -> None:
        """All that is around the tree where several folds go through it."""
        c = self.config
        row_bits = len(self.score.as_value())
        # Rows wait here for the folds before them.
        m.submodules.rows = rows = memory.Memory(
            shape=unsigned(row_bits + c.num_lanes), depth=c.folds, init=[]
        )
        write, read = rows.write_port(), rows.read_port(domain="comb")
        fold = Signal(c.fold_bits)
        loading, comparing = Signal(), Signal()
        first = Signal()
        m.d.comb += [
            write.en.eq(self.start),
            write.addr.eq(self.fold),
            write.data.eq(Cat(self.score, self.candidates)),
            read.addr.eq(fold),
            first.eq(self.start & (self.fold == 0)),
        ]
        row = Signal(score_layout(c))
        m.d.comb += row.as_value().eq(read.data)
        root = self._tree(m, loading.replicate(GROUPS), row, read.data[row_bits:])

        # The best so far, in order.
        expert_bits = (c.num_experts - 1).bit_length()
        best = [
            (
                Signal(signed(c.score_bits), name=f"best_{n}_score"),
                Signal(expert_bits, name=f"best_{n}_expert"),
                Signal(name=f"best_{n}_valid"),
            )
            for n in range(c.num_select)
        ]
        expert = Signal(expert_bits)
        stays = [valid & (score >= root.score) for score, _, valid in best]
        passes, last = Signal(), Signal()
        delivering = Signal()
        m.d.comb += [
            expert.eq(expert_of(c, fold, Value.cast(root.lane))),
            last.eq(fold == c.folds - 1),
            # Where the last one stays the list is full of what is not lower.
            passes.eq(root.valid & (root.score >= threshold) & ~stays[-1]),
            root.take.eq(comparing & root.ready & passes),
            self.o.payload.layer.eq(layer),
            self.o.payload.expert.eq(best[0][1]),
            self.o.payload.score.eq(best[0][0]),
            self.o.valid.eq(delivering & best[0][2] & ~self.hold),
            self.over.eq(delivering & ~best[0][2] & ~self.hold),
        ]
        with m.If(loading):
            m.d.sync += [loading.eq(0), comparing.eq(1)]
        with m.If(comparing & root.ready & ~passes):
            m.d.sync += [
                comparing.eq(0),
                fold.eq(fold + 1),
                loading.eq(~last),
                delivering.eq(last),
            ]
        with m.If(self.over):
            m.d.sync += delivering.eq(0)
        for n, (score, lane, valid) in enumerate(best):
            with m.If(root.take & ~stays[n]):
                new = stays[n - 1] if n else Const(1)
                before = best[max(0, n - 1)]
                m.d.sync += [
                    score.eq(Mux(new, root.score, before[0])),
                    lane.eq(Mux(new, expert, before[1])),
                    valid.eq(Mux(new, 1, before[2])),
                ]
            with m.If(self.o.valid & self.o.ready):
                after = best[n + 1] if n + 1 < c.num_select else (Const(0), Const(0), Const(0))
                m.d.sync += [score.eq(after[0]), lane.eq(after[1]), valid.eq(after[2])]
            with m.If(first):
                m.d.sync += valid.eq(0)
        with m.If(first):
            m.d.sync += [
                loading.eq(1),
                fold.eq(0),
                threshold.eq(self.threshold),
                layer.eq(self.layer),
            ]

    def _join(self, m, name, load, first, second, threshold):
        """A node above ``first`` and ``second``, whose lanes are all lower than ``second``'s."""
        score = Signal(signed(self.config.score_bits), name=f"{name}_score", reset_less=True)
        lane = Signal(range(max(2, self.config.num_lanes)), name=f"{name}_lane", reset_less=True)
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
        if threshold is not None:
            # Compared before the better child is known, as much hangs on it in the cycle after.
            node.passes = Signal(name=f"{name}_passes")
            first_passes, second_passes = (
                n.valid & (n.score >= threshold) for n in (first, second)
            )
            with m.If(refill):
                m.d.sync += node.passes.eq(Mux(higher, second_passes, first_passes))
        with m.If(load):
            m.d.sync += ready.eq(0)
        with m.Else():
            m.d.sync += ready.eq((ready | (first.ready & second.ready)) & ~node.take)
        return node
