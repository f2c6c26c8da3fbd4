# SPDX-License-Identifier: Apache-2.0
"""Learns from each routing event, scores the layers ahead and selects what to prefetch."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import FRACTION_BITS, EngineConfig

from .ahead_rows import AheadRows
from .correlation_table import CorrelationTable
from .expert_map import lane_bits
from .folded_lanes import fold_and_lane
from .history import History
from .learner import Learner, use_layout
from .payloads import selection_layout
from .score_memory import ScoreMemory, score_layout
from .selector import Selector
from .synthesis import GROUPS, group_copies, group_enables, group_of, group_registers
from .table_reader import TableReader, table_index_layout

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

    With several folds one sum follows the other at once, and there is no ``clear``:

    restart : In
        With the first ``load`` of a fold: the partial sum starts with this row, and the total in
        the cycle after.
    done, done_fold : In
        The total is that of this fold: at the earliest in the cycle after its last ``add``, at the
        latest in the cycle after the next ``restart``.
    fold : In
        ``total`` is what was ``done`` for this fold before this cycle.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        self.weights = data.ArrayLayout(signed(c.weight_bits), c.num_lanes)
        # Sums reach -2**(weight_bits-1) times the number of rows, or the sum of their gains.
        lowest = 1 << (c.weight_bits - 1)
        gain = max(sum(c.gains), c.top_k << FRACTION_BITS)
        self.partial_bits = (c.top_k * lowest - 1).bit_length() + 1
        self.total_bits = (gain * lowest - 1).bit_length() + 1
        if c.folds == 1:
            # The same for every group of lanes.
            members = {"clear": In(GROUPS), "load": In(GROUPS), "add": In(GROUPS)}
        else:
            members = {
                "load": In(1),
                "add": In(1),
                "restart": In(1),
                "done": In(1),
                "done_fold": In(c.fold_bits),
                "fold": In(c.fold_bits),
            }
        super().__init__(
            {
                **members,
                "row": In(self.weights),
                "total": Out(data.ArrayLayout(signed(self.total_bits), c.num_lanes)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        if self.config.folds > 1:
            self._folded(m)
            return m
        for e in range(self.config.num_lanes):
            partial = Signal(signed(self.partial_bits), name=f"partial_{e}")
            total = self.total[e]
            group = group_of(e, self.config.num_lanes)
            with m.If(self.clear[group]):
                m.d.sync += [partial.eq(0), total.eq(0)]
            with m.Else():
                with m.If(self.load[group]):
                    m.d.sync += partial.eq(partial + self.row[e])
                with m.If(self.add[group]):
                    m.d.sync += total.eq(total + partial)
        return m

    def _folded(self, m: Module) -> None:
        c = self.config
        m.submodules.totals = totals = memory.Memory(
            shape=unsigned(len(self.total.as_value())), depth=c.folds, init=[]
        )
        write, read = totals.write_port(), totals.read_port(domain="comb")
        total = Signal(self.total.shape())
        restarted = Signal()
        m.d.sync += restarted.eq(self.restart)
        m.d.comb += [
            write.en.eq(self.done),
            write.addr.eq(self.done_fold),
            write.data.eq(total),
            read.addr.eq(self.fold),
            self.total.as_value().eq(read.data),
        ]
        for e in range(c.num_lanes):
            partial = Signal(signed(self.partial_bits), name=f"partial_{e}")
            with m.If(self.load):
                m.d.sync += partial.eq(Mux(self.restart, 0, partial) + self.row[e])
            with m.If(self.add | restarted):
                m.d.sync += total[e].eq(Mux(restarted, 0, total[e]) + Mux(self.add, partial, 0))


class Predictor(wiring.Component):
    """Works on one token or routing event at a time; docs/architecture.md 4.1 is its contract.

    A route looks ahead (one pass through the K rows of its set in all tables at once, or a few
    steps more so that the rank gains cost no multiplier) and asks for the commit; the rows behind
    its score are corrected meanwhile, in a second pass. The temporal table is looked up for the
    layer that has just been graded, so what the set of this token and that of the token before
    share is corrected while it is looked up, and the second pass leaves it out. Until the commit
    only table rows have changed, which nothing outside can see. The commit adds the sums of the
    pass to the score rows, one layer a cycle, nearest first; the first of them is selected from
    while the others are written.

    With T steps of the gain schedule (K + 2 when ordered, K + 3 when not, for K of 4 or more) and A
    = max(D, lookahead), a route asks for the commit T + 4 cycles after it was taken (T + 6 - A
    where A < 2 or D = 0), a token in the cycle after. ``commit_done`` comes A + 3 cycles after the
    grant of a route, L + 4 after that of a new sequence and 2 + max(1, lookahead) after that of
    another token. The first pick is offered 5 + ceil(log2(E)) cycles after the grant of a route or
    token, two later after that of a new sequence, but not before the cycle after ``commit_done`` or
    before the rows are corrected (which is later only where K > 5 + ceil(log2(E))); the others
    follow every second cycle. With a lookahead of several layers their rows are kept as the commit
    writes them, and go through the selector one layer after the other: the first pick of the next
    comes 4 + ceil(log2(E)) cycles after the last of the one before.

    Where ``config.folds`` is more than one, F, everything is as wide as a fold and each pass goes
    over the folds one after the other. What is kept between: deltas and sums of all folds, in
    LUT RAM. The scores of a route's layer are graded first, a fold a cycle, in the F cycles from
    the one in which it was taken on, and two cycles later than otherwise the pass begins. A route
    asks for the commit F * T + 2 + max(1, 4 - F, 6 - (A + 1) * F) cycles after it was taken
    (without ``4 - F`` where D = 0). The commit takes n * F + 4 cycles, n being A + 1 for a route, L
    for a new sequence and max(1, lookahead) for another token. The selector has its first fold 5
    cycles after the grant; how long it takes depends on the scores.

    ``learning``, ``ordered`` and ``kinds`` are sampled when a route or token is taken;
    ``threshold``, ``prefetching`` and ``absent`` three cycles after ``commit_grant`` (five for a
    new sequence). With several folds ``absent`` is looked at until ``commit_done``, the others five
    cycles after the grant. ``token`` goes first when both streams are valid at once. Layers must
    come strictly in order, from layer 0 after each token; ``route.layer`` is not looked at.

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
    farther_absent, farther_threshold : In
        Only where ``lookahead`` is more than 1: ``absent`` and ``threshold`` of the layers after
        the next, nearest first. Looked at from ``commit_done`` to ``selection_over``.
    victim_layer, victim_score, victim_use : In, Out, Out
        Read port of the score memory, two cycles of latency. It is the predictor's own in the
        cycle in which a route or token is taken, and from ``commit_grant`` until ``commit_done``:
        ``victim_layer`` is not read then.
    victim_fold, victim_wait : In, Out
        Only where there are several folds: which of ``victim_layer`` is read; the port is the
        predictor's own in this cycle (the F - 1 cycles after a route was taken), too.
    threshold : In
        Lowest score that is picked, quarter units.
    learning, ordered, prefetching : In
        Rows learn; sets are in rank order; picks are made.
    kinds : In
        Kinds of predictor that are enabled, by the number of their table in
        :func:`.table_index_layout`. One that is not adds nothing to scores, and its rows stay.
    read_index, read_request : In
        A weight that is wanted, stable until ``read_valid`` (:class:`.TableReader`).
    read_valid, read_value : Out
        The weight, as of all routes before and none after: it is read between two events. Comes
        at least six cycles after the request, and not while an event is in progress.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = c = config
        score = signed(c.score_bits)
        farther = {
            "farther_absent": In(data.ArrayLayout(unsigned(c.num_experts), c.num_farther)),
            "farther_threshold": In(data.ArrayLayout(score, c.num_farther)),
        }
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
                "threshold": In(score),
                "learning": In(1),
                "ordered": In(1),
                "prefetching": In(1),
                "kinds": In(c.depth + 2),
                "read_index": In(table_index_layout(c)),
                "read_request": In(1),
                "read_valid": Out(1),
                "read_value": Out(signed(c.bias_bits)),
                **({"victim_fold": In(c.fold_bits), "victim_wait": Out(1)} if c.folds > 1 else {}),
                **(farther if c.look > 1 else {}),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layers, lanes, top_k, depth = c.num_layers, c.num_lanes, c.top_k, c.depth
        eb = lane_bits(c)
        folded, fb = c.folds > 1, c.fold_bits if c.folds > 1 else 0
        rank_bits = max(1, (top_k - 1).bit_length())
        # Score rows that a route writes before its own layer's.
        ahead = max(depth, c.look)

        m.submodules.history = history = History(c)
        m.submodules.learner = learner = Learner(c)
        m.submodules.scores = scores = ScoreMemory(c)
        m.submodules.bias = bias = CorrelationTable(
            rows=layers << fb, lanes=lanes, width=c.bias_bits
        )
        # Tables 1..D are spatial, table 0 is temporal: it is what layer l says of itself.
        tables, sums = [], []
        for d in range(depth + 1):
            name = f"spatial_{d}" if d else "temporal"
            table = CorrelationTable(rows=layers << eb + fb, lanes=lanes, width=c.weight_bits)
            m.submodules[name] = table
            m.submodules[f"{name}_sum"] = row_sum = _RowSum(c)
            tables.append(table)
            sums.append(row_sum)
        banks = [bias, *tables]

        def following(layer):
            return Mux(layer == layers - 1, 0, layer + 1)[: c.layer_bits]

        def delayed(signal, cycles, name):
            """``signal`` as it was ``n`` cycles before is element ``n`` of the result."""
            line = [signal]
            for n in range(1, cycles + 1):
                line.append(Signal.like(signal, name=f"{name}_{n}"))
                m.d.sync += line[n].eq(line[n - 1])
            return line

        clear_done = Signal()

        # The event under way ---------------------------------------------------------------------
        is_route, sequence = Signal(), Signal()
        set_ = Signal(data.ArrayLayout(unsigned(eb), top_k))
        used = Signal(lanes)
        learning, ordered = Signal(), Signal()
        kinds = Signal(depth + 2)
        # Where there are several folds: of the score row that is asked for next, and of the last.
        fold_next, fetch_fold = Signal(c.fold_bits), Signal(c.fold_bits)
        last_fold = fetch_fold == c.folds - 1
        if folded:
            fetched_fold = delayed(fetch_fold, 2, "fetched_fold")
            where = [fold_and_lane(c, lane) for lane in set_]
            m.d.sync += used.eq(
                Cat(
                    Cat((f == fetch_fold) & (lane == e) for f, lane in where).any()
                    for e in range(lanes)
                )
            )
        else:
            m.d.sync += used.eq(Cat(Cat(lane == e for lane in set_).any() for e in range(lanes)))

        # target[d] is layer l+d. They stand before the route comes: layers keep their order.
        target = [Signal(c.layer_bits, name=f"target_{d}", init=d) for d in range(ahead + 1)]
        layer = target[0]

        # Passes through the tables ---------------------------------------------------------------
        # What belongs to a step: the rows are presented in the cycle after it.
        # That the FSM is in IDLE, from a register of its own: much hangs on it, also elsewhere.
        idle = Signal(init=1)
        taken, fresh = Signal(), Signal()
        rank = Signal(rank_bits)
        learn_pass, look_pass = Signal(), Signal()
        steps = [_gain_steps((1 << FRACTION_BITS,) * top_k), _gain_steps(c.gains)]
        step = Signal(range(max(len(s) for s in steps)))
        look_rank = Signal(rank_bits)
        first, add, last_step = Signal(), Signal(), Signal()
        for order, schedule in enumerate(steps):
            with m.If(ordered == order):
                with m.Switch(step):
                    for n, (r, is_first, is_add) in enumerate(schedule):
                        with m.Case(n):
                            m.d.comb += [look_rank.eq(r), first.eq(is_first), add.eq(is_add)]
                m.d.comb += last_step.eq(step == len(schedule) - 1)
        begins = taken & ~self.token.valid
        next_fold, last_pass = [], Const(1)
        if folded:
            # Each pass goes over all folds. `fresh` is too: a fold's scores are graded in a cycle,
            # and what comes of it is where the pass finds it two cycles later than otherwise.
            pass_fold, row_fold = Signal(c.fold_bits), Signal(c.fold_bits)
            last_pass = pass_fold == c.folds - 1
            next_fold = [pass_fold.eq(Mux(last_pass, 0, pass_fold + 1)), step.eq(0), rank.eq(0)]
            m.d.sync += fresh.eq(begins | (fresh & ~last_fold))
            begins = delayed(begins, 2, "begins")[2]
        else:
            m.d.sync += fresh.eq(begins)
        with m.If(begins):
            m.d.sync += look_pass.eq(1)
        with m.If(look_pass):
            m.d.sync += step.eq(step + 1)
            with m.If(last_step):
                m.d.sync += next_fold
                with m.If(last_pass):
                    m.d.sync += [look_pass.eq(0), learn_pass.eq(1)]
        with m.If(learn_pass):
            m.d.sync += rank.eq(rank + 1)
            with m.If(rank == top_k - 1):
                m.d.sync += next_fold
                with m.If(last_pass):
                    m.d.sync += learn_pass.eq(0)

        freshly = delayed(fresh, 2, "fresh")
        learns = delayed(learn_pass, 2, "learn_pass")
        looks = delayed(look_pass, 1, "look_pass")
        loads = delayed(look_pass & first, 5, "load")
        adds = delayed(look_pass & add, 6, "add")
        # A row that has just learned can be presented again five cycles later. The last one can
        # be so by the time that the next event, or a read of the tables, may come.
        correcting, lately = Signal(), Signal()
        m.d.sync += lately.eq(Cat(learns[:3]).any())
        m.d.comb += correcting.eq(look_pass | learn_pass | lately)

        look_lane = Signal(eb)
        m.d.comb += look_lane.eq(Array(set_[r] for r in range(top_k))[look_rank])
        delta = learner.delta
        if folded:
            read_fold, _ = fold_and_lane(c, self.read_index.lane)
            m.d.sync += row_fold.eq(Mux(learn_pass | look_pass, pass_fold, read_fold))
            # The learner's deltas of all folds; read when the row is presented, for a cycle later.
            m.submodules.deltas = deltas = memory.Memory(
                shape=unsigned(len(delta.as_value())), depth=c.folds, init=[]
            )
            delta_write, delta_read = deltas.write_port(), deltas.read_port()
            m.d.comb += [
                delta_write.en.eq(freshly[2]),
                delta_write.addr.eq(fetched_fold[2]),
                delta_write.data.eq(delta),
                delta_read.addr.eq(row_fold),
            ]
            delta = delta_read.data
            restarts = delayed(look_pass & (step == 0), 5, "restart")
            dones = delayed(look_pass & last_step, 7, "done")
            done_folds = delayed(pass_fold, 7, "done_fold")
        others = [history.previous, *(history.recent[d] for d in range(depth))]
        known = [history.previous_known, *history.recent_known]
        for d, (table, row_sum) in enumerate(zip(tables, sums, strict=True)):
            learn_lane = Signal(eb, name=f"learn_lane_{d}")
            # The same for each of the table's memories.
            row_lanes = group_registers(eb, len(table.memories), f"lane_{d}")
            row_layers = group_registers(c.layer_bits, len(table.memories), f"row_layer_{d}")
            lane = row_lanes[0]
            fold = [row_fold] if folded else []
            m.d.comb += [
                learn_lane.eq(Array(others[d][r] for r in range(top_k))[rank]),
                table.row.eq(
                    Cat(Cat(*fold, *parts) for parts in zip(row_lanes, row_layers, strict=True))
                ),
                table.delta.eq(delta),
            ]
            if folded:
                delay = 3 if d else 5
                m.d.comb += [
                    row_sum.restart.eq(restarts[delay]),
                    row_sum.done.eq(dones[delay + 2]),
                    row_sum.done_fold.eq(done_folds[delay + 2]),
                    row_sum.fold.eq(fetch_fold),
                ]
            else:
                # Straight from registers to the lanes of the sum; that of a disabled kind stays 0.
                m.d.comb += [
                    row_sum.clear.eq(Cat(group_copies(m, taken | ~kinds[1 + d], f"clear_sum_{d}"))),
                    row_sum.load.eq(Cat(group_copies(m, loads[2 if d else 4], f"load_sum_{d}"))),
                    row_sum.add.eq(Cat(group_copies(m, adds[3 if d else 5], f"add_sum_{d}"))),
                ]
            for row_lane, row_layer in zip(row_lanes, row_layers, strict=True):
                m.d.sync += [
                    # Between events it is the row that software reads.
                    row_lane.eq(
                        Mux(
                            learn_pass,
                            learn_lane,
                            Mux(look_pass, look_lane, self.read_index.expert),
                        )
                    ),
                    row_layer.eq(
                        Mux(learn_pass, layer, Mux(look_pass, target[d], self.read_index.layer))
                    ),
                ]
            corrected = Signal(name=f"corrected_{d}")
            if folded:
                # The sum of a disabled kind stays 0 because nothing is added.
                m.d.comb += [
                    row_sum.load.eq(loads[3 if d else 5]),
                    row_sum.add.eq(adds[4 if d else 6] & kinds[1 + d]),
                ]
            if d:
                m.d.comb += [corrected.eq(learns[1]), row_sum.row.eq(table.weights)]
            else:
                # Rows of this set are corrected as they are looked up, the others afterwards.
                both = Cat(
                    lane == Mux(looks[1], history.previous[r], set_[r]) for r in range(top_k)
                ).any()
                m.d.comb += [
                    corrected.eq(Mux(both, loads[1], learns[1])),
                    row_sum.row.eq(table.learnt),
                ]
            m.d.sync += table.learn.eq(corrected & known[d] & learning & kinds[1 + d])
        bias_learns = Signal()
        m.d.sync += bias_learns.eq(freshly[1] & learning & kinds[0])
        m.d.comb += [
            bias.learn.eq(bias_learns),
            bias.delta.eq(learner.delta),
            learner.score.eq(scores.score),
            learner.use.eq(scores.use),
            learner.used.eq(used),
        ]

        m.submodules.reader = reader = TableReader(c)
        m.d.comb += [
            reader.bias.eq(bias.weights),
            *(reader.weights[d].eq(table.weights) for d, table in enumerate(tables)),
            reader.index.eq(self.read_index),
            reader.request.eq(self.read_request),
            reader.pause.eq(idle & ~taken),
            reader.clear_done.eq(clear_done),
            bias.blank.eq(reader.blank_bias),
            *(table.blank.eq(reader.blank) for table in tables),
            # The bias, whose weights go into the score as they are, is 0 for an event when it is
            # disabled; not between events, when software reads it.
            reader.mute_bias.eq(~idle & ~kinds[0]),
            self.read_valid.eq(reader.valid),
            self.read_value.eq(reader.value),
        ]

        # Score rows, one a cycle: read, added to, written ---------------------------------------
        fetch_layer = Signal(c.layer_bits)
        # The same for each of the bias table's memories.
        bias_layers = group_registers(c.layer_bits, len(bias.memories), "bias_layer")
        bias_fold = Signal(c.fold_bits)
        # Where the FSM is, from registers of their own: in REQUEST; in one of BIAS; in COMMIT.
        requesting, in_bias, fetching = Signal(), Signal(), Signal()
        # The predictor reads a score row; the next one in a commit. Both a cycle ahead.
        reads, row_next = Signal(), Signal.like(fetch_layer)
        # The layer after that one, as long as layers come in order: known in time.
        fetch_after = Signal.like(fetch_layer)
        rows_left = Signal(range(max(2, layers, ahead + 1)))
        # A route's rows: the layers ahead, then its own. The bit of the row whose turn it is is 0.
        # What resets the registers of the others is the same in a register for each group of lanes.
        others_turn, others_next = Signal(ahead + 1, init=-1), Signal(ahead + 1)
        # The lane's own layer starts again from its bias, and so does a new sequence (which has no
        # row in the cycle after it was taken).
        own_next = ~others_next[ahead] | sequence
        advances = fetching & last_fold if folded else fetching
        m.d.comb += others_next.eq(
            Mux(
                requesting,
                Cat(~is_route, Const(1).replicate(ahead)),
                Mux(advances, Cat(1, others_turn), others_turn),
            )
        )
        m.d.sync += others_turn.eq(others_next)
        turns = group_copies(m, others_next, "others_turn")
        owns = group_copies(m, own_next, "own")
        valid = delayed(fetching, 3, "row_valid")
        # Not before the score memory is cleared: until then it writes these rows, which are 0.
        adds_row = group_enables(m, fetching, "adds_row")
        last_row = fetching & (rows_left == 0)
        last = delayed(last_row & last_fold if folded else last_row, 2, "row_last")
        fetched_layer = Signal.like(fetch_layer)
        m.d.sync += fetched_layer.eq(fetch_layer)
        row = Signal(score_layout(c))
        for e in range(lanes):
            group = group_of(e, lanes)
            # A table's sums are 0 but when it is their turn. All sums are 0 for a token.
            parts = []
            for d in range(1, depth + 1):
                part = Signal(signed(sums[d].total_bits), name=f"part_{d}_{e}", reset_less=True)
                with m.If(turns[group][d - 1]):
                    m.d.sync += part.eq(0)
                with m.Else():
                    m.d.sync += part.eq(sums[d].total[e])
                parts.append(part)
            start = Signal(signed(c.score_bits), name=f"start_{e}", reset_less=True)
            with m.If(owns[group]):
                again = sums[0].total[e]
                if folded:
                    again = Mux(is_route, again, 0)
                m.d.sync += start.eq((bias.weights[e] << FRACTION_BITS) + again)
            with m.Else():
                m.d.sync += start.eq(0)
            part = start
            for other in parts:
                part = part | other
            with m.If(adds_row[group]):
                m.d.sync += row[e].eq(scores.score[e] + part)

        finish, selecting = Signal(), Signal()
        moves_on = Signal()
        m.d.comb += [
            finish.eq(last[2]),
            # Asked for a cycle ahead: the score memory has a register of its own for the address.
            scores.own.eq(reads),
            scores.layer.eq(Mux(advances, row_next, Mux(idle | fresh, layer, fetch_layer))),
            scores.victim_layer.eq(self.victim_layer),
            scores.blank.eq(reads & own_next),
            scores.score_layer.eq(fetched_layer),
            scores.score_row.eq(row),
            scores.write_score.eq(valid[1]),
            scores.use_layer.eq(layer),
            scores.use_row.eq(learner.use_next),
            history.layer.eq(layer),
            history.write.eq(moves_on),
            history.row.eq(set_),
            history.forget.eq(finish & sequence),
            self.commit_done.eq(finish),
            self.victim_score.eq(scores.score),
            self.victim_use.eq(scores.use),
        ]
        if folded:
            # Use counts are written with the scores of their fold, as they need no place then.
            uses = delayed(fetching & ~others_turn[ahead], 2, "row_use")
            m.d.comb += [
                learner.enable.eq(group_enables(m, freshly[0] | valid[0], "grades")),
                scores.fold.eq(fold_next),
                scores.victim_fold.eq(self.victim_fold),
                scores.score_fold.eq(fetched_fold[1]),
                scores.use_fold.eq(fetched_fold[1]),
                scores.write_use.eq(uses[1]),
                self.victim_wait.eq(fresh & ~last_fold),
                bias.row.eq(Cat(Cat(bias_fold, b) for b in bias_layers)),
            ]
        else:
            m.d.comb += [
                learner.enable.eq(group_enables(m, freshly[0], "grades")),
                scores.write_use.eq(last[1] & is_route),
                bias.row.eq(Cat(bias_layers)),
            ]
        # The second pass needs the sets and the layer of this event. Where it may outlast the
        # commit (which ends A + 7 cycles after the first pass at the earliest, 9 if A < 2), they
        # change when the event is over, else with the commit.
        over = Signal()
        late = folded or top_k > 6 + max(2, ahead)
        m.d.comb += moves_on.eq((over if late else finish) & is_route)
        with m.If(moves_on):
            # The route that comes next.
            m.d.sync += [
                *(target[d].eq(target[d + 1]) for d in range(ahead)),
                target[ahead].eq(following(target[ahead])),
            ]

        # Selection -------------------------------------------------------------------------------
        selection_over, delivering = Signal(), Signal()
        in_select = Signal()  # the FSM is in SELECT
        m.d.comb += delivering.eq(in_select & ~correcting)
        # The selection goes on with the next layer: its row is taken out of those kept.
        more, restart, again_fold = Signal(), Signal(), Signal(c.fold_bits)
        if c.look:
            m.submodules.selector = selector = Selector(c)
            start_selection = Signal()
            absent, threshold = self.absent, self.threshold
            offered, offered_fold = row, fetched_fold[2] if folded else Const(0)
            if c.look > 1:
                distance = Signal(range(c.look))
                m.submodules.ahead_rows = ahead_rows = AheadRows(c)
                m.d.comb += [
                    ahead_rows.clear.eq(idle),
                    ahead_rows.write.eq(valid[2]),
                    ahead_rows.fold.eq(offered_fold),
                    ahead_rows.row.eq(row),
                    ahead_rows.distance.eq(distance),
                    ahead_rows.read_fold.eq(again_fold),
                    more.eq(selecting & (distance != c.look - 1)),
                ]
                absent = Array([absent, *self.farther_absent])[distance]
                threshold = Array([threshold, *self.farther_threshold])[distance]
                offered = Mux(restart, ahead_rows.kept.as_value(), row.as_value())
                offered_fold = Mux(restart, again_fold, offered_fold)
            if folded:
                # The first layer's folds.
                nearest = Signal()
                offers = delayed(fetching & nearest, 2, "row_offered")
                with m.If(~fetching):
                    m.d.sync += nearest.eq(1)
                with m.Elif(last_fold):
                    m.d.sync += nearest.eq(0)
                chosen = Mux(start_selection, self.prefetching, selecting)
                m.d.comb += [
                    start_selection.eq(offers[2] & (fetched_fold[2] == 0)),
                    selector.start.eq((offers[2] & chosen) | restart),
                    selector.fold.eq(offered_fold),
                ]
                absent = Array(absent[n * lanes : (n + 1) * lanes] for n in range(c.folds))[
                    offered_fold
                ]
            else:
                m.d.comb += [
                    start_selection.eq(valid[2] & ~valid[3]),
                    selector.start.eq((start_selection & self.prefetching) | restart),
                    selector.load.eq(
                        Cat(group_copies(m, valid[1] & ~valid[2], "offers"))
                        | restart.replicate(GROUPS)
                    ),
                ]
            m.d.comb += [
                selector.score.eq(offered),
                selector.candidates.eq(absent),
                selector.threshold.eq(threshold),
                selector.layer.eq(self.select_layer),
                selector.hold.eq(~delivering),
                selection_over.eq(delivering & (selector.over | ~selecting)),
            ]
            with m.If(start_selection):
                m.d.sync += selecting.eq(self.prefetching)
            wiring.connect(m, selector.o, wiring.flipped(self.selected))
        else:
            m.d.comb += selection_over.eq(delivering)

        # Sequence --------------------------------------------------------------------------------
        m.d.sync += clear_done.eq(Cat(bank.clear_done for bank in banks).all() & scores.clear_done)
        m.d.comb += [
            self.clear_done.eq(clear_done),
            self.token.ready.eq(idle & clear_done),
            self.route.ready.eq(idle & clear_done & ~self.token.valid),
        ]
        m.d.comb += [
            self.commit_request.eq(requesting),
            reads.eq(taken | self.commit_grant | in_bias | fetching),
            row_next.eq(fetch_after),
        ]
        if ahead:
            with m.If(~others_turn[ahead - 1]):
                m.d.comb += row_next.eq(layer)
        m.d.sync += [bit.eq(0) for bit in (requesting, in_bias, fetching)]

        def request():
            m.d.sync += requesting.eq(1)
            m.next = "REQUEST"

        def commit():
            m.d.sync += fetching.eq(1)
            m.next = "COMMIT"

        # Cycles from the last step of the pass until the sums are there when they are needed.
        settle = max(4 if depth else 0, 6 - ahead)
        if folded:
            settle = max(1, 4 - c.folds if depth else 0, 6 - (ahead + 1) * c.folds)
            m.d.sync += fetch_fold.eq(fold_next)
            following_fold = Mux(last_fold, 0, fetch_fold + 1)

        def next_row():
            m.d.sync += [
                fetch_layer.eq(row_next),
                fetch_after.eq(following(fetch_after)),
                rows_left.eq(rows_left - 1),
            ]
            with m.If(rows_left == 0):
                m.d.sync += fetching.eq(0)
                m.next = "WRITE"

        def next_bias():
            """Folds go round, two ahead of the scores'; a new sequence needs that of all layers."""
            last_bias = bias_fold == c.folds - 1
            m.d.sync += [
                bias_fold.eq(Mux(last_bias, 0, bias_fold + 1)),
                *(b.eq(b + (sequence & last_bias)) for b in bias_layers),
            ]

        with m.FSM():
            with m.State("IDLE"):
                route = self.route.payload
                idle_layer = Mux(taken, layer, self.read_index.layer)
                m.d.comb += taken.eq(clear_done & (self.token.valid | self.route.valid))
                m.d.sync += [
                    *(set_[r].eq(route.experts[r]) for r in range(top_k)),
                    learning.eq(self.learning),
                    ordered.eq(self.ordered),
                    kinds.eq(self.kinds),
                    rank.eq(0),
                    step.eq(0),
                    rows_left.eq(ahead),
                    fetch_layer.eq(layer),
                    *(b.eq(idle_layer) for b in bias_layers),
                    *([bias_fold.eq(Mux(taken, 0, read_fold))] if folded else []),
                    self.select_layer.eq(target[1] if ahead else following(layer)),
                    *([distance.eq(0)] if c.look > 1 else []),
                ]
                with m.If(self.token.valid):
                    # It is taken, now or when the tables are clear.
                    m.d.sync += [
                        *(target[d].eq(d) for d in range(ahead + 1)),
                        fetch_layer.eq(0),
                        fetch_after.eq(1 if layers > 1 else 0),
                        self.select_layer.eq(0),
                        rows_left.eq(
                            Mux(self.token.payload.new_sequence, layers - 1, max(1, c.look) - 1)
                        ),
                    ]
                with m.If(taken):
                    m.d.sync += [
                        idle.eq(0),
                        is_route.eq(~self.token.valid),
                        sequence.eq(self.token.valid & self.token.payload.new_sequence),
                    ]
                    with m.If(self.token.valid):
                        m.d.sync += [b.eq(0) for b in bias_layers]
                        request()
                    with m.Else():
                        m.next = "LOOK"
            with m.State("LOOK"):
                m.d.sync += [
                    fetch_layer.eq(target[1] if ahead else layer),
                    fetch_after.eq(target[2] if ahead > 1 else following(target[ahead])),
                ]
                passed = last_step & look_pass
                if folded:
                    passed &= last_pass
                    m.d.sync += bias_fold.eq(fetch_fold)
                    with m.If(fresh & ~last_fold):
                        m.d.comb += [reads.eq(1), fold_next.eq(fetch_fold + 1)]
                with m.If(passed):
                    if settle > 1:
                        m.next = "SETTLE-1"
                    else:
                        request()
            for n in range(1, settle):
                with m.State(f"SETTLE-{n}"):
                    if n + 1 < settle:
                        m.next = f"SETTLE-{n + 1}"
                    else:
                        request()
            with m.State("REQUEST"):
                m.d.sync += requesting.eq(~self.commit_grant)
                with m.If(self.commit_grant):
                    with m.If(Const(1) if folded else sequence):
                        m.d.sync += in_bias.eq(1)
                        m.next = "BIAS-1"
                    with m.Else():
                        commit()
            # The bias of a layer is there two cycles after it was asked for.
            for n in (1, 2):
                with m.State(f"BIAS-{n}"):
                    if folded:
                        next_bias()
                    else:
                        m.d.sync += [b.eq(b + 1) for b in bias_layers]
                    if n == 1:
                        m.d.sync += in_bias.eq(1)
                        m.next = "BIAS-2"
                    else:
                        commit()
            with m.State("COMMIT"):
                m.d.sync += fetching.eq(1)
                if folded:
                    m.d.comb += fold_next.eq(following_fold)
                    next_bias()
                    with m.If(last_fold):
                        next_row()
                else:
                    m.d.sync += [b.eq(Mux(sequence, b + 1, b)) for b in bias_layers]
                    next_row()
            with m.State("WRITE"):
                with m.If(finish):
                    m.d.sync += in_select.eq(1)
                    m.next = "SELECT"
            with m.State("SELECT"):
                m.d.sync += in_select.eq(~selection_over)
                with m.If(selection_over & ~more):
                    m.d.comb += self.selection_over.eq(1)
                    m.d.sync += [idle.eq(1), sequence.eq(0)]
                    if late:
                        m.d.comb += over.eq(1)
                    m.next = "IDLE"
                if c.look > 1:
                    with m.Elif(selection_over):
                        m.d.sync += [
                            distance.eq(distance + 1),
                            self.select_layer.eq(following(self.select_layer)),
                            again_fold.eq(0),
                        ]
                        m.next = "RESTART"
            if c.look > 1:
                with m.State("RESTART"):
                    m.d.comb += restart.eq(1)
                    m.d.sync += again_fold.eq(again_fold + 1)
                    with m.If(again_fold == c.folds - 1):
                        m.d.sync += in_select.eq(1)
                        m.next = "SELECT"

        return m
