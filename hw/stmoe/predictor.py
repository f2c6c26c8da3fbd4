# SPDX-License-Identifier: Apache-2.0
"""Learns from each routing event, scores the layers ahead and selects what to prefetch."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import FRACTION_BITS, EngineConfig

from .correlation_table import CorrelationTable
from .expert_map import lane_bits
from .history import History
from .learner import Learner, use_layout
from .payloads import selection_layout
from .score_memory import ScoreMemory, score_layout
from .selector import Selector

__all__ = ["Predictor", "route_layout", "token_layout"]


def token_layout() -> data.StructLayout:
    """What the predictor needs to know of a token."""
    return data.StructLayout({"new_sequence": 1})


def route_layout(config: EngineConfig) -> data.StructLayout:
    """What the predictor needs to know of a route."""
    return data.StructLayout(
        {
            "layer": config.layer_bits,
            "experts": data.ArrayLayout(unsigned(config.expert_bits), config.top_k),
        }
    )


def _gain_steps(gains: tuple[int, ...]) -> list[tuple[int, bool, bool]]:
    """Schedule of a weighted sum with adders only: (rank, first, add) of each step.

    ``partial`` collects the rows in rank order (one at each ``first`` step), and
    ``total += partial`` at each step with ``add``. A row is in ``partial`` from its rank on, so
    it counts once for each later ``add``: rank r needs ``gains[r]`` of them, which works because
    gains never rise with the rank.
    """
    steps = []
    for rank, gain in enumerate(gains):
        following = gains[rank + 1] if rank + 1 < len(gains) else 0
        adds = gain - following
        assert adds >= 0
        for n in range(max(1, adds)):
            steps.append((rank, n == 0, n < adds))
    return steps


class _RowSum(wiring.Component):
    """Weighted sum of rows, two adders a lane; :func:`_gain_steps` is its schedule.

    Members
    -------
    clear : In
        Both sums start at 0.
    row : In
    load : In
        Add ``row`` to the partial sum.
    add : In
        Add the partial sum to the total.
    total : Out
        Quarter units.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        self.weights = data.ArrayLayout(signed(c.weight_bits), c.num_experts)
        # Sums reach -2**(weight_bits-1) times the number of rows, or the sum of their gains.
        lowest = 1 << (c.weight_bits - 1)
        gain = max(sum(c.gains), c.top_k << FRACTION_BITS)
        self.partial_bits = (c.top_k * lowest - 1).bit_length() + 1
        self.total_bits = (gain * lowest - 1).bit_length() + 1
        super().__init__(
            {
                "clear": In(1),
                "row": In(self.weights),
                "load": In(1),
                "add": In(1),
                "total": Out(data.ArrayLayout(signed(self.total_bits), c.num_experts)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        for e in range(self.config.num_experts):
            partial = Signal(signed(self.partial_bits), name=f"partial_{e}")
            total = self.total[e]
            with m.If(self.clear):
                m.d.sync += [partial.eq(0), total.eq(0)]
            with m.Else():
                with m.If(self.load):
                    m.d.sync += partial.eq(partial + self.row[e])
                with m.If(self.add):
                    m.d.sync += total.eq(total + partial)
        return m


class Predictor(wiring.Component):
    """Works on one token or routing event at a time; docs/architecture.md 4.1 is its contract.

    A route learns (one pass of K rows through all tables at once), then reseeds and looks ahead
    (one pass of K rows, or a few more so that the rank gains cost no multiplier), and asks for
    the commit. Until then only table rows have changed, which nothing outside can see. The
    commit adds the sums of the pass to the score rows, one layer a cycle, nearest first; the
    first of them is selected from while the others are written.

    With D spatial tables and T steps of the gain schedule (K + 2 when ordered, K + 3 when not,
    for K of 4 or more), a route asks for the commit D + K + T + 5 cycles after it was taken, a
    token 2 cycles after. ``commit_done`` comes max(D, lookahead) + 1 cycles after the grant of a
    route, L after that of a new sequence and 1 after that of another token. The first pick is
    offered 3 + ceil(log2(E)) cycles after the grant, but not before the cycle after
    ``commit_done``; the others follow every second cycle.

    ``learning`` and ``ordered`` are sampled when a route is taken; ``threshold``,
    ``prefetching`` and ``absent`` in the cycle after ``commit_grant``. ``token`` goes first when
    both streams are valid at once.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    token, route : In
        What the slot manager has taken. ``ready`` is high only when nothing is in progress.
    commit_request, commit_grant, commit_done : Out, In, Out
    select_layer, absent : Out, In
        The layer that is selected next, and its lanes that may be picked.
    selected : Out
        Picks of the last commit, best first.
    selection_over : Out
        One cycle: all have been delivered.
    clear_done : Out
        The tables have been cleared after reset.
    victim_layer, victim_score, victim_use : In, Out, Out
        Read port of the score memory, one cycle of latency.
    threshold : In
        Lowest score that is picked, quarter units.
    learning, ordered, prefetching : In
        Rows learn; sets are in rank order; picks are made.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = c = config
        super().__init__(
            {
                "token": In(stream.Signature(token_layout())),
                "route": In(stream.Signature(route_layout(c))),
                "commit_request": Out(1),
                "select_layer": Out(c.layer_bits),
                "commit_grant": In(1),
                "absent": In(c.num_experts),
                "commit_done": Out(1),
                "selected": Out(stream.Signature(selection_layout(c))),
                "selection_over": Out(1),
                "clear_done": Out(1),
                "victim_layer": In(c.layer_bits),
                "victim_score": Out(score_layout(c)),
                "victim_use": Out(use_layout(c)),
                "threshold": In(signed(c.score_bits)),
                "learning": In(1),
                "ordered": In(1),
                "prefetching": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layers, experts, top_k, depth = c.num_layers, c.num_experts, c.top_k, c.depth
        eb = lane_bits(c)
        rank_bits = max(1, (top_k - 1).bit_length())
        # Score rows that a route writes before its own layer's.
        ahead = max(depth, c.look)

        m.submodules.history = history = History(c)
        m.submodules.learner = learner = Learner(c)
        m.submodules.scores = scores = ScoreMemory(c)
        m.submodules.bias = bias = CorrelationTable(rows=layers, lanes=experts, width=c.bias_bits)
        # Tables 1..D are spatial, table 0 is temporal: it is what layer l says of itself.
        tables, sums = [], []
        for d in range(depth + 1):
            name = f"spatial_{d}" if d else "temporal"
            table = CorrelationTable(rows=layers << eb, lanes=experts, width=c.weight_bits)
            m.submodules[name] = table
            m.submodules[f"{name}_sum"] = row_sum = _RowSum(c)
            tables.append(table)
            sums.append(row_sum)
        banks = [bias, *tables]

        def following(layer):
            return Mux(layer == layers - 1, 0, layer + 1)[: c.layer_bits]

        def preceding(layer):
            return Mux(layer == 0, layers - 1, layer - 1)[: c.layer_bits]

        # The event under way ---------------------------------------------------------------------
        is_route, sequence = Signal(), Signal()
        layer = Signal(c.layer_bits)
        set_ = Signal(data.ArrayLayout(unsigned(eb), top_k))
        used = Signal(experts)
        learning, ordered = Signal(), Signal()
        m.d.comb += used.eq(Cat(Cat(lane == e for lane in set_).any() for e in range(experts)))

        # target[d] is layer l+d. They settle one after the other, long before they are needed.
        target = [layer]
        for d in range(1, depth + 1):
            target.append(Signal(c.layer_bits, name=f"target_{d}"))
            m.d.sync += target[d].eq(following(target[d - 1]))

        # The sets of layers l, l-1, .. l-D; the memory itself holds the last of them.
        earlier_layer = Signal(c.layer_bits)
        earlier = [Signal(history.row.shape(), name=f"earlier_{d}") for d in range(depth)]
        known = [Signal(name=f"known_{d}") for d in range(depth)]
        earlier.append(history.row)
        known.append(history.known)

        # Passes through the tables ---------------------------------------------------------------
        rank = Signal(rank_bits)
        learn_pass, look_pass = Signal(), Signal()
        steps = [_gain_steps((1 << FRACTION_BITS,) * top_k), _gain_steps(c.gains)]
        step = Signal(range(max(len(s) for s in steps)))
        look_rank = Signal(rank_bits)
        first, add, last_step = Signal(), Signal(), Signal()
        with m.If(ordered):
            with m.Switch(step):
                for n, (r, is_first, is_add) in enumerate(steps[1]):
                    with m.Case(n):
                        m.d.comb += [look_rank.eq(r), first.eq(is_first), add.eq(is_add)]
            m.d.comb += last_step.eq(step == len(steps[1]) - 1)
        with m.Else():
            with m.Switch(step):
                for n, (r, is_first, is_add) in enumerate(steps[0]):
                    with m.Case(n):
                        m.d.comb += [look_rank.eq(r), first.eq(is_first), add.eq(is_add)]
            m.d.comb += last_step.eq(step == len(steps[0]) - 1)
        load, add_next, add_now = Signal(), Signal(), Signal()
        m.d.sync += [
            load.eq(look_pass & first),
            add_next.eq(look_pass & add),
            add_now.eq(add_next),
        ]
        look_lane = Array(set_[r] for r in range(top_k))[look_rank]
        taken, fresh = Signal(), Signal()
        m.d.sync += fresh.eq(taken & ~self.token.valid)
        for d, (table, row_sum) in enumerate(zip(tables, sums, strict=True)):
            learn_lane = Array(earlier[d][r] for r in range(top_k))[rank]
            m.d.comb += [
                table.row.eq(Mux(learn_pass, Cat(learn_lane, layer), Cat(look_lane, target[d]))),
                table.learn.eq(learn_pass & known[d] & learning),
                table.delta.eq(learner.delta),
                row_sum.row.eq(table.weights),
                row_sum.clear.eq(taken),
                row_sum.load.eq(load),
                row_sum.add.eq(add_now),
            ]
        m.d.comb += [
            bias.learn.eq(learn_pass & (rank == 0) & learning),
            bias.delta.eq(learner.delta),
            learner.enable.eq(fresh),
            learner.score.eq(scores.score),
            learner.use.eq(scores.use),
            learner.used.eq(used),
            learner.learning.eq(learning),
        ]

        # Score rows, one a cycle: fetched, added to, written ------------------------------------
        fetch_layer = Signal(c.layer_bits)
        fetched_layer, row_layer = Signal.like(fetch_layer), Signal.like(fetch_layer)
        fetch_count, row_count = Signal(range(ahead + 2)), Signal(range(ahead + 2))
        fetch_next, row_next = Signal(), Signal()
        rows_left = Signal(range(max(2, layers, ahead + 1)))
        row = Signal(score_layout(c))
        own = Signal()
        m.d.comb += own.eq(is_route & (row_count == ahead))
        m.d.sync += fetched_layer.eq(fetch_layer)
        with m.If(fetch_next):
            m.d.sync += [
                fetch_layer.eq(
                    Mux(is_route & (fetch_count == ahead - 1), layer, following(fetch_layer))
                    if ahead
                    else following(fetch_layer)
                ),
                fetch_count.eq(fetch_count + 1),
            ]
        with m.If(row_next):
            m.d.sync += [row_layer.eq(fetched_layer), row_count.eq(row_count + 1)]
        parts = [sums[d].total for d in range(1, depth + 1)]
        for e in range(experts):
            base = Signal(signed(c.score_bits), name=f"base_{e}")
            part = Signal(signed(sums[0].total_bits), name=f"part_{e}")
            # The lane's own layer starts again from its bias, and so does a new sequence.
            m.d.comb += base.eq(
                Mux(own | sequence, bias.weights[e] << FRACTION_BITS, scores.score[e])
            )
            # All sums are 0 for a token.
            with m.Switch(row_count):
                for n, total in enumerate(parts):
                    with m.Case(n):
                        m.d.comb += part.eq(total[e])
                with m.Case(ahead):
                    m.d.comb += part.eq(sums[0].total[e])
            with m.If(row_next):
                m.d.sync += row[e].eq(base + part)

        commit_first, writing, finish = Signal(), Signal(), Signal()
        idle = Signal()
        m.d.sync += commit_first.eq(self.commit_request & self.commit_grant)
        m.d.comb += [
            scores.score_layer.eq(row_layer),
            scores.score_row.eq(row),
            scores.write_score.eq(writing),
            scores.use_layer.eq(layer),
            scores.use_row.eq(learner.use_next),
            scores.write_use.eq(finish & is_route),
            history.write.eq(finish & is_route),
            history.write_layer.eq(layer),
            history.write_row.eq(set_),
            history.forget.eq(finish & sequence),
            self.commit_done.eq(finish),
            scores.victim_layer.eq(self.victim_layer),
            self.victim_score.eq(scores.victim_score),
            self.victim_use.eq(scores.victim_use),
            scores.layer.eq(fetch_layer),
            bias.row.eq(Mux(sequence, fetch_layer, layer)),
        ]

        # Selection -------------------------------------------------------------------------------
        selection_over = Signal()
        if c.look:
            m.submodules.selector = selector = Selector(c)
            m.d.comb += [
                selector.start.eq(commit_first),
                selector.score.eq(row),
                selector.candidates.eq(Mux(self.prefetching, self.absent, 0)),
                selector.threshold.eq(self.threshold),
                selector.layer.eq(self.select_layer),
                selector.hold.eq(writing),
                selection_over.eq(selector.over),
            ]
            wiring.connect(m, selector.o, wiring.flipped(self.selected))
        else:
            m.d.comb += selection_over.eq(~writing)

        # Sequence --------------------------------------------------------------------------------
        clear_done = Signal()
        m.d.sync += clear_done.eq(Cat(bank.clear_done for bank in banks).all() & scores.clear_done)
        m.d.comb += [
            self.clear_done.eq(clear_done),
            self.token.ready.eq(idle & clear_done),
            self.route.ready.eq(idle & clear_done & ~self.token.valid),
        ]
        with m.FSM():
            with m.State("IDLE"):
                route = self.route.payload
                m.d.comb += [
                    idle.eq(1),
                    # Rows of a route are read while it is being taken.
                    scores.layer.eq(route.layer),
                    history.read.eq(1),
                    history.read_layer.eq(route.layer),
                    taken.eq(clear_done & (self.token.valid | self.route.valid)),
                ]
                m.d.sync += [
                    layer.eq(route.layer),
                    earlier_layer.eq(preceding(route.layer)),
                    *(set_[r].eq(route.experts[r]) for r in range(top_k)),
                    learning.eq(self.learning),
                    ordered.eq(self.ordered),
                    rank.eq(0),
                    step.eq(0),
                    fetch_count.eq(0),
                    row_count.eq(0),
                ]
                with m.If(taken):
                    m.d.sync += [
                        is_route.eq(~self.token.valid),
                        sequence.eq(self.token.valid & self.token.payload.new_sequence),
                    ]
                    with m.If(self.token.valid):
                        m.d.sync += [
                            fetch_layer.eq(0),
                            self.select_layer.eq(0),
                            rows_left.eq(Mux(self.token.payload.new_sequence, layers - 1, 0)),
                        ]
                        m.next = "FETCH"
                    with m.Else():
                        m.d.sync += rows_left.eq(ahead)
                        m.next = "EARLIER-0" if depth else "LEARN"

            for n in range(depth):
                with m.State(f"EARLIER-{n}"):
                    # The set of layer l-n is here, that of the layer before is read.
                    m.d.comb += [
                        history.read.eq(1),
                        history.read_layer.eq(earlier_layer),
                    ]
                    m.d.sync += [
                        earlier[n].eq(history.row),
                        known[n].eq(history.known),
                        earlier_layer.eq(preceding(earlier_layer)),
                    ]
                    m.next = f"EARLIER-{n + 1}" if n + 1 < depth else "LEARN"

            with m.State("LEARN"):
                m.d.comb += learn_pass.eq(1)
                m.d.sync += rank.eq(rank + 1)
                with m.If(rank == top_k - 1):
                    m.next = "LEARNT-0"
            # A row that has just learned can be read again three cycles later.
            with m.State("LEARNT-0"):
                m.next = "LEARNT-1"
            with m.State("LEARNT-1"):
                m.d.sync += [
                    fetch_layer.eq(following(layer) if ahead else layer),
                    self.select_layer.eq(following(layer)),
                ]
                m.next = "LOOK"
            with m.State("LOOK"):
                m.d.comb += look_pass.eq(1)
                m.d.sync += step.eq(step + 1)
                with m.If(last_step):
                    m.next = "SUM"
            with m.State("SUM"):
                m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += fetch_next.eq(1)
                m.next = "REQUEST"
            with m.State("REQUEST"):
                # The first row is added up now, whether the grant comes at once or not.
                m.d.comb += [self.commit_request.eq(1), row_next.eq(1)]
                with m.If(self.commit_grant):
                    m.d.comb += fetch_next.eq(1)
                    m.next = "WRITE"
                with m.Else():
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.comb += self.commit_request.eq(1)
                with m.If(self.commit_grant):
                    m.d.comb += fetch_next.eq(1)
                    m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += [
                    writing.eq(1),
                    row_next.eq(1),
                    fetch_next.eq(1),
                    finish.eq(rows_left == 0),
                ]
                m.d.sync += rows_left.eq(rows_left - 1)
                with m.If(finish):
                    m.next = "SELECT"
            with m.State("SELECT"):
                with m.If(selection_over):
                    m.d.comb += self.selection_over.eq(1)
                    m.next = "IDLE"

        return m
