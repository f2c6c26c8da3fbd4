# SPDX-License-Identifier: Apache-2.0
"""The engine's single order: every change of the expert buffer is one operation here."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, enum, fifo, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import USE_BITS, EngineConfig

from .confidence_gate import ConfidenceGate
from .expert_map import ExpertMap, LaneState, lane_bits, pin_bits, slot_info_layout
from .payloads import (
    CompletionStatus,
    EventKind,
    completion_layout,
    event_data_bits,
    grant_layout,
    load_layout,
    packed,
    release_layout,
    route_layout,
    selection_layout,
    token_layout,
)
from .prefetch_queue import PrefetchQueue
from .register_map import COUNTERS
from .victim_chooser import VictimChooser

__all__ = ["SlotManager", "look_up_passes", "record_layout"]


def record_layout(config: EngineConfig) -> data.StructLayout:
    """One architectural event, before the event port adds its cycle."""
    return data.StructLayout(
        {
            "valid": 1,
            "kind": EventKind,
            "layer": config.layer_bits,
            "expert": max(config.expert_bits, config.transfer_bits),
            "slot": config.slot_bits,
            "flag": 3,
            "data": event_data_bits(config),
        }
    )


def transfer_layout(config: EngineConfig) -> data.StructLayout:
    """What stays the same of a load in flight."""
    return data.StructLayout(
        {
            "layer": config.layer_bits,
            "expert": lane_bits(config),
            "slot": config.slot_bits,
        }
    )


class Operation(enum.Enum, shape=4):
    """What the manager does next, in the order of precedence."""

    COMPLETION = 0
    """A transfer has ended."""
    DEMAND = 1
    """A demanded expert is given a slot."""
    SETTLE = 2
    """Nothing yet: which prefetch routing has disproved is being found."""
    DISPROVED = 3
    """A prefetch that routing has disproved is cancelled."""
    RELEASE = 4
    SCORE_COMMIT = 5
    REGISTER_COMMIT = 6
    TOKEN = 7
    ROUTE = 8
    PREFETCH = 9
    """A selected expert is given a slot."""


LOOK_UP = 128
"""Pairs of a rank and an expert up to which the states of a route's experts are looked up all at
once. Each pair is wires in one small place: with 192 of them in a row of 26 layers nextpnr did not
route the placement that was tried on an ECP5, see docs/results.md."""


def look_up_passes(config: EngineConfig) -> int:
    """Cycles in which the states of a route's experts are looked up: one, or one for each."""
    return 1 if config.top_k * config.num_experts <= LOOK_UP else config.top_k


def _plus_one(value: Value) -> Value:
    """``value + 1`` without a carry chain, which takes longer for so few bits."""
    return Cat(~value[0], *(value[i] ^ value[:i].all() for i in range(1, len(value))))


class SlotManager(wiring.Component):
    """Serialises demand, prefetch, fill, release, cancel and commit.

    One operation at a time; each samples its inputs and commits before the next begins. When idle
    the first :class:`Operation` that is possible is chosen in one cycle and begun in the next; a
    victim search belongs to the operation that began it. A route is taken :func:`look_up_passes`
    cycles after it was begun.

    Latency, in cycles from the one in which ``route`` is taken: a resident expert's grant is valid
    4 later; the load of the first missing expert is handed to the DMA scheduler 1 later when a
    slot is free, 8 + ceil(log2(E)) later when a victim is to be chosen (with F folds, more than
    one, 7 + 2F + ceil(log2(num_lanes))).

    **Relocation.** With ``config.buffer`` = axi a register commit may change where slots lie. It is
    begun only when no load is under way, every grant has been released and no write is owed; until
    then no route is judged and no prefetch started (unless a watchdog has given loads up: then
    others go on, as a buffer that is silent would hold them for ever). It empties the buffer: all
    resident experts leave the map, their slots become free in ascending order, behind those that
    were free. Nothing is counted as evicted. It takes max(num_layers, num_slots) + 3 cycles.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    token, route, release, grant
        The engine's streams (architecture section 4).
    predictor_token, predictor_route, commit_request, commit_grant, commit_done, absent,
    select_layer, selected, selection_over, victim_score, victim_use, victim_layer, victim_fold,
    victim_wait
        The predictor's side of :class:`stmoe.predictor.Predictor`.
    start, start_transfer, promote, promote_transfer, cancel, cancel_transfer, cancel_late,
    completion, prefetch_ready
        The DMA scheduler's side of :class:`stmoe.dma_scheduler.DmaScheduler`.
    register_request, register_grant, threshold_changed, threshold, quota, adaptive
        From and to the registers; ``threshold`` is the static one.
    farther, farther_absent, farther_threshold : In, Out, Out
        Only where ``lookahead`` is more than 1, of the layers after ``select_layer``, nearest
        first: static thresholds, from the registers; lanes that may be selected, and thresholds, as
        they were at the latest commit, for the predictor.
    relocates, writer_idle : In
        With a buffer behind AXI: the waiting commit changes where slots lie; no write is owed.
    select_threshold : Out
        Threshold of the ``select_layer`` of two cycles before, for the predictor.
    hold : In
        Begin no new operation (the event port is nearly full).
    record, selection_record, grant_record : Out
        Architectural events of this cycle.
    increment : Out
        Counters to be incremented, as in ``register_map.COUNTERS``.
    initialised : Out
        The map is cleared and the free list is filled.
    busy : Out
        Something is queued or under way.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        experts = c.num_experts
        self.behind_axi = c.buffer == "axi"
        writer = {"relocates": In(1), "writer_idle": In(1)}
        folds = {"victim_fold": Out(c.fold_bits), "victim_wait": In(1)} if c.folds > 1 else {}
        score = signed(c.score_bits)
        farther = {
            "farther": In(data.ArrayLayout(score, c.num_farther)),
            "farther_absent": Out(data.ArrayLayout(unsigned(experts), c.num_farther)),
            "farther_threshold": Out(data.ArrayLayout(score, c.num_farther)),
        }
        super().__init__(
            {
                "token": In(stream.Signature(token_layout(c))),
                "route": In(stream.Signature(route_layout(c))),
                "release": In(stream.Signature(release_layout(c))),
                "grant": Out(stream.Signature(grant_layout(c))),
                "predictor_token": Out(stream.Signature(data.StructLayout({"new_sequence": 1}))),
                "predictor_route": Out(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "layer": c.layer_bits,
                                "experts": data.ArrayLayout(unsigned(c.expert_bits), c.top_k),
                            }
                        )
                    )
                ),
                "commit_request": In(1),
                "commit_grant": Out(1),
                "commit_done": In(1),
                "absent": Out(experts),
                "select_layer": In(c.layer_bits),
                "selected": In(stream.Signature(selection_layout(c))),
                "victim_layer": Out(c.layer_bits),
                **folds,
                "victim_score": In(data.ArrayLayout(signed(c.score_bits), c.num_lanes)),
                "victim_use": In(data.ArrayLayout(unsigned(USE_BITS), c.num_lanes)),
                "start": Out(stream.Signature(load_layout(c))),
                "start_transfer": In(c.transfer_bits),
                "promote": Out(1),
                "promote_transfer": Out(c.transfer_bits),
                "cancel": Out(1),
                "cancel_transfer": Out(c.transfer_bits),
                "cancel_late": In(1),
                "completion": In(stream.Signature(completion_layout(c))),
                "prefetch_ready": In(1),
                "register_request": In(1),
                "register_grant": Out(1),
                "threshold_changed": In(1),
                "threshold": In(score),
                "quota": In(data.ArrayLayout(unsigned(experts.bit_length()), c.num_layers)),
                "adaptive": In(1),
                "select_threshold": Out(score),
                "hold": In(1),
                "record": Out(record_layout(c)),
                "selection_record": Out(record_layout(c)),
                "grant_record": Out(record_layout(c)),
                "increment": Out(len(COUNTERS)),
                "initialised": Out(1),
                "busy": Out(1),
                **(writer if self.behind_axi else {}),
                **(farther if c.look > 1 else {}),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layers, experts, top_k = c.num_layers, c.num_experts, c.top_k
        eb = lane_bits(c)
        rank_bits = max(1, (top_k - 1).bit_length())

        m.submodules.map = table = ExpertMap(c)
        m.submodules.chooser = chooser = VictimChooser(c)
        m.submodules.queue = queue = PrefetchQueue(c)
        m.submodules.gate = gate = ConfidenceGate(c)
        # One more than there are: the FIFO takes a write in every cycle only with room to spare.
        free_depth = c.num_slots + 1
        m.submodules.free = free = fifo.SyncFIFOBuffered(width=c.slot_bits, depth=free_depth)
        freed, freed_slot = Signal(), Signal(c.slot_bits)
        m.d.sync += freed.eq(0)
        # The next slot stands in a register, as block RAM is slow, which is filled again two cycles
        # after it was emptied: sooner than a slot can be asked for again.
        has_free, free_slot = Signal(), Signal(c.slot_bits)
        take_free = Signal()
        m.d.comb += [
            free.w_en.eq(freed),
            free.w_data.eq(freed_slot),
            free.r_en.eq(~has_free),
        ]
        with m.If(~has_free):
            m.d.sync += [has_free.eq(free.r_rdy), free_slot.eq(free.r_data)]
        with m.Elif(take_free):
            m.d.sync += has_free.eq(0)
        # Nor is a slot on its way to that register. Late only just after the last one was taken,
        # which is never in the cycle before this is asked.
        none_free = Signal()
        m.d.sync += none_free.eq((free.level == 0) & ~has_free & ~freed)
        m.submodules.grants = grants = fifo.SyncFIFO(width=grant_layout(c).size, depth=4 * top_k)
        counter = {item.name: Signal(name=f"count_{item.name}") for item in COUNTERS}
        m.d.comb += self.increment.eq(Cat(*counter.values()))

        record = self.record

        def emit(kind, **fields):
            return [
                record.valid.eq(1),
                record.kind.eq(kind),
                *(record[name].eq(value) for name, value in fields.items()),
            ]

        # The latest routing event, and what it still owes ---------------------------------------
        event_layer = Signal(c.layer_bits, init=layers - 1)
        event_experts = Signal(data.ArrayLayout(unsigned(eb), top_k))
        event_set = Signal(experts)
        pending = Signal(top_k)
        missed, hits, promotes = Signal(top_k), Signal(top_k), Signal(top_k)
        disproved = Signal(experts)
        expected_layer = Signal(c.layer_bits)
        at_boundary = Signal(init=1)
        """Before a token: layer 0 is expected, and no token has been taken for it."""
        # Grants that are owed or not yet released, and whether those of another route may join
        # them: a cycle later, which is before a route that has been taken is over, and one cycle
        # more for a route that waits for nothing else.
        outstanding, has_room = Signal(range(4 * top_k + 1)), Signal()
        outstanding_add = Signal(range(top_k + 1))
        outstanding_sub = Signal()
        # Counted a cycle later, as nothing that may not begin then does: it is far from what is
        # decided to the counter. The same below for `draining`.
        outstanding_change = Signal(signed(len(outstanding_add) + 1))
        m.d.sync += [
            outstanding_change.eq(outstanding_add - outstanding_sub),
            outstanding.eq(outstanding + outstanding_change),
            has_room.eq(outstanding <= 3 * top_k),
        ]

        # Loads in flight: what stays the same in LUT RAM, what changes in registers.
        m.submodules.loads = loads = Memory(shape=transfer_layout(c), depth=c.transfers, init=[])
        loads_write, loads_read = loads.write_port(), loads.read_port(domain="comb")
        loading, prefetching = Signal(c.transfers), Signal(c.transfers)
        cancelled = Signal(c.transfers)
        # Ranks the prefetches by their start: 0 is the latest.
        order = Array(Signal(c.transfer_bits, name=f"order_{t}") for t in range(c.transfers))
        prefetch_held = Signal(range(c.transfers + 1))
        held_add, held_sub = Signal(), Signal()
        m.d.sync += prefetch_held.eq(prefetch_held + held_add - held_sub)

        draining = Signal(range(c.transfers + 1))
        draining_add, draining_sub = Signal(), Signal()
        draining_change = Signal(signed(2))
        drains = Signal()
        m.d.sync += [
            draining_change.eq(draining_add - draining_sub),
            draining.eq(draining + draining_change),
        ]
        m.d.comb += drains.eq((draining != 0) | (draining_change != 0))
        ended_index = Signal(c.transfer_bits)
        leaving = Signal(c.transfer_bits)
        """Transfer that is to be cancelled."""
        cancelling, cancel_flag = Signal(), Signal()
        cancel = Signal()
        m.d.sync += cancel.eq(0)
        m.d.comb += [
            self.cancel.eq(cancel),
            self.cancel_transfer.eq(leaving),
        ]

        demand_blocked, prefetch_blocked = Signal(), Signal()
        searching = Signal()
        """A victim search has begun together with a routing event."""
        demanding = Signal()
        """A demand has no slot yet: a load that starts is its."""

        def first_rank(bits):
            index = Signal(rank_bits, name=f"{bits.name}_rank")
            for rank in reversed(range(top_k)):
                with m.If(bits[rank]):
                    m.d.comb += index.eq(rank)
            return index

        pending_rank = first_rank(pending)
        later_pending = pending & (pending - 1)
        missed_rank = first_rank(missed)
        hit_rank = first_rank(hits)
        promote_rank = first_rank(promotes)
        # Which expert is cancelled next, and whether any is: a cycle behind `disproved`, so nothing
        # else is begun in the cycle after that has changed.
        disproved_lane = Signal(eb)
        of_event = Signal()  # what has ended is of the latest event's layer
        any_disproved, disproved_changes, disproved_changed = Signal(), Signal(), Signal()
        m.d.sync += [
            any_disproved.eq(disproved.any()),
            disproved_changed.eq(disproved_changes),
        ]
        for e in reversed(range(experts)):
            with m.If(disproved[e]):
                m.d.sync += disproved_lane.eq(e)

        # What an operation writes to, known a cycle ahead: in registers, as the map is far away.
        op_layer = Signal(c.layer_bits)
        op_expert = Signal(eb)
        op_lane = Signal(experts)
        m.d.comb += [
            op_lane.eq(1 << op_expert),
            table.row_write_layer.eq(op_layer),
            table.row_write_lanes.eq(op_lane),
            table.held_layer.eq(op_layer),
            table.ready_layer.eq(op_layer),
        ]

        # Legality of a waiting route ------------------------------------------------------------
        route = self.route.payload
        route_set = Signal(experts)
        for rank in range(top_k):
            with m.If(route.experts[rank] < experts):
                m.d.comb += route_set.bit_select(route.experts[rank][:eb], 1).eq(1)
        duplicates = [route.experts[i] == route.experts[j] for j in range(top_k) for i in range(j)]
        legal, is_last = Signal(), Signal()
        event_next = Signal(experts)
        event_lanes = Signal(data.ArrayLayout(unsigned(eb), top_k))
        passes = look_up_passes(c)
        ranks = top_k // passes
        event_hot = [
            Signal(experts, name=f"event_hot_{rank}", reset_less=True) for rank in range(ranks)
        ]
        # Whatever is on the port is judged in every cycle: looked at in ROUTE alone.
        m.d.sync += [
            legal.eq(
                (route.context == 0)
                & (route.layer == expected_layer)
                & Cat(x < experts for x in route.experts).all()
                & ~Cat(*duplicates, Const(0, 1)).any()
            ),
            is_last.eq(route.layer == layers - 1),
            event_next.eq(route_set),
            *(event_lanes[rank].eq(route.experts[rank]) for rank in range(top_k)),
            *(event_hot[rank].eq(1 << route.experts[rank][:eb]) for rank in range(ranks)),
        ]

        # The row port serves one reader at a time. Its address is known a cycle ahead: from a
        # register, as it goes to every lane.
        row_layer = Signal(c.layer_bits)
        m.d.comb += [
            table.row_layer.eq(row_layer),
            self.victim_layer.eq(chooser.score_layer),
            chooser.row.eq(table.row),
            chooser.score.eq(self.victim_score),
            chooser.use.eq(self.victim_use),
            chooser.over.eq(table.over),
            chooser.any_ready.eq(table.any_ready),
            chooser.latest_layer.eq(event_layer),
            chooser.current_set.eq(event_set),
            table.quota.eq(self.quota),
        ]
        if c.folds > 1:
            m.d.comb += [
                self.victim_fold.eq(chooser.score_fold),
                chooser.wait.eq(self.victim_wait),
            ]

        entry = queue.o.payload
        load_layer = Signal(c.layer_bits)
        load_expert = Signal(eb)
        load_slot = Signal(c.slot_bits)
        evicting = Signal()
        m.d.comb += [
            load_layer.eq(Mux(demanding, event_layer, entry.layer)),
            load_expert.eq(Mux(demanding, event_experts[pending_rank], entry.expert[:eb])),
            chooser.demand.eq(demanding),
            chooser.load_layer.eq(op_layer),
            chooser.load_expert.eq(op_expert),
        ]

        walk_length = max(layers, c.num_slots)
        walk = Signal(range(walk_length + 1))
        """A layer and a slot, to be cleared after reset."""

        # Starting a load: the same few lines for both kinds -------------------------------------
        taking = Signal()
        """This cycle the DMA scheduler takes the load described by ``start_*``."""
        start_expert = Signal(eb)
        start_slot = Signal(c.slot_bits)
        start_prefetch = Signal()
        """The load that a slot is sought for, or that starts, is a prefetch's."""
        start_evicts = Signal()
        # Where the FSM is, from registers of their own where the longest paths begin: a state has
        # one bit, which is 1 in the same cycles. Others: in BEGIN to seek a slot, in BEGIN to grant
        # a score commit, in PIN or JUDGE, in a state in which the queue is emptied.
        in_clear = Signal(init=1)
        in_start, in_evict, in_pin, in_route = Signal(), Signal(), Signal(), Signal()
        in_released, in_release = Signal(), Signal()
        in_ended, in_complete, in_cancel_read = Signal(), Signal(), Signal()
        in_disproved = Signal()
        seeking, granting = Signal(), Signal()
        judging, flushing = Signal(), Signal()
        bit_of = {
            "START": in_start,
            "EVICT": in_evict,
            "PIN": in_pin,
            "ROUTE": in_route,
            "RELEASED": in_released,
            "RELEASE": in_release,
            "ENDED": in_ended,
            "COMPLETE": in_complete,
            "CANCEL-READ": in_cancel_read,
            "DISPROVED": in_disproved,
        }
        # Where the states of a route's experts are looked up in several cycles, the last in ROUTE.
        for n in range(passes - 1):
            bit_of[f"LOOK-UP-{n}"] = Signal(name=f"in_look_up_{n}")
        m.d.sync += [bit.eq(0) for bit in (*bit_of.values(), seeking, granting, judging, flushing)]

        def enter(state):
            """The next state is this one, which has a bit of its own."""
            m.next = state
            m.d.sync += bit_of[state].eq(1)

        m.d.comb += [
            queue.flush.eq(flushing),
            take_free.eq(seeking | (in_pin & taking)),
        ]
        first_missing = event_experts[pending_rank]
        m.d.comb += [
            self.start.valid.eq(in_start | (in_pin & demanding & has_free & ~self.hold)),
            start_evicts.eq(in_start & evicting),
            start_expert.eq(Mux(in_pin, first_missing, op_expert)),
            start_slot.eq(Mux(in_pin, free_slot, load_slot)),
            self.start.payload.prefetch.eq(start_prefetch),
            self.start.payload.layer.eq(op_layer),
            self.start.payload.expert.eq(start_expert),
            self.start.payload.slot.eq(start_slot),
            taking.eq(self.start.valid & self.start.ready),
        ]
        # What is written of a slot stands there, written or not; while all is cleared, the walk's.
        m.d.comb += table.info_write_slot.eq(walk)
        with m.If(in_start | in_pin):
            m.d.comb += [
                table.info_write_slot.eq(start_slot),
                table.info_write_data.resident.eq(0),
                table.info_write_data.pins.eq(~start_prefetch),
                table.info_write_data.layer.eq(op_layer),
                table.info_write_data.expert.eq(start_expert),
            ]
        m.d.comb += [
            table.place_write_address.eq(Cat(start_expert, op_layer)),
            table.place_write_data.slot.eq(start_slot),
            table.place_write_data.transfer.eq(self.start_transfer),
        ]
        m.d.comb += [
            loads_write.en.eq(taking),
            loads_write.addr.eq(self.start_transfer),
            loads_write.data.layer.eq(op_layer),
            loads_write.data.expert.eq(start_expert),
            loads_write.data.slot.eq(start_slot),
        ]
        with m.If(taking):
            m.d.comb += [
                table.place_write.eq(1),
                table.info_write.eq(1),
                table.held_add.eq(1),
                held_add.eq(start_prefetch),
                counter["prefetch_loads"].eq(start_prefetch),
                counter["demand_loads"].eq(~start_prefetch),
                *emit(
                    EventKind.LOAD_START,
                    layer=op_layer,
                    expert=start_expert,
                    slot=start_slot,
                    flag=Cat(start_prefetch, start_evicts),
                    data=Cat(
                        Mux(start_evicts, chooser.expert, 0)[:eb],
                        Const(0, 8 - eb),
                        Mux(start_evicts, chooser.layer, 0)[: c.layer_bits],
                        Const(0, 8 - c.layer_bits),
                        self.start_transfer,
                    ),
                ),
            ]
            for t in range(c.transfers):
                with m.If(self.start_transfer == t):
                    m.d.sync += [
                        loading[t].eq(1),
                        prefetching[t].eq(start_prefetch),
                        cancelled[t].eq(0),
                        order[t].eq(0),
                    ]
                with m.Elif(start_prefetch & ~order[t].all()):
                    m.d.sync += order[t].eq(order[t] + 1)

        # The confidence gate counts what becomes of prefetches -----------------------------------
        idle_link = Signal()
        m.d.sync += idle_link.eq(~loading.any() & ~drains)
        m.d.comb += [
            gate.adaptive.eq(self.adaptive),
            gate.floor.eq(self.threshold),
            gate.layer.eq(self.select_layer),
            gate.event_layer.eq(event_layer),
            gate.bad_layer.eq(op_layer),
            gate.bad.eq(cancelling | counter["useless"]),
            self.select_threshold.eq(gate.threshold),
        ]

        # Grants ---------------------------------------------------------------------------------
        grant_layer = Signal(c.layer_bits)
        grant_expert = Signal(eb)
        grant_slot = Signal(c.slot_bits)
        grant_error, grant_push = Signal(), Signal()
        m.d.comb += [
            grants.w_data.eq(
                packed(
                    grant_layout(c),
                    layer=grant_layer,
                    expert=grant_expert,
                    slot=grant_slot,
                    error=grant_error,
                )
            ),
            grants.w_en.eq(grant_push),
        ]
        out_valid = Signal()
        out = Signal(grant_layout(c))
        m.d.comb += [self.grant.valid.eq(out_valid), self.grant.payload.eq(out)]
        with m.If(~out_valid | self.grant.ready):
            m.d.comb += grants.r_en.eq(~self.hold)
            m.d.sync += [out_valid.eq(grants.r_rdy & ~self.hold), out.eq(grants.r_data)]
        granted = out_valid & self.grant.ready
        m.d.comb += [
            self.grant_record.as_value().eq(
                packed(
                    record_layout(c),
                    valid=granted,
                    kind=Const(EventKind.GRANT, 5),
                    layer=out.layer,
                    expert=out.expert,
                    slot=out.slot,
                    flag=out.error,
                )
            ),
            counter["grants"].eq(granted & ~out.error),
            counter["error_grants"].eq(granted & out.error),
        ]

        # Selections flow into the queue beside everything else, but not while what they replace is
        # still being removed from it.
        accept = Signal()
        m.d.comb += [
            accept.eq(~self.hold & ~queue.flush),
            queue.i.payload.eq(self.selected.payload),
            queue.i.valid.eq(self.selected.valid & accept),
            self.selected.ready.eq(queue.i.ready & accept),
            counter["replaced"].eq(queue.removed),
        ]
        queued = queue.i.valid & queue.i.ready
        m.d.comb += [
            self.selection_record.as_value().eq(
                packed(
                    record_layout(c),
                    valid=queued,
                    kind=Const(EventKind.SELECT, 5),
                    layer=self.selected.payload.layer,
                    expert=self.selected.payload.expert,
                    data=self.selected.payload.score.as_unsigned(),
                )
            ),
            counter["selected"].eq(queued),
        ]

        # The experts of a routing event, one a cycle: residents first, then those on their way.
        # Stage 0 reads the slot, stage 1 grants and reads the pins, stage 2 promotes, stage 3 adds
        # one to the pins.
        # A bit for each that is still to be looked at.
        todo, todo_rank = Signal(top_k), Signal(rank_bits)
        m.d.comb += todo_rank.eq(
            Mux(hits.any(), hit_rank, Mux(promotes.any(), promote_rank, missed_rank))
        )
        stage1 = Signal()
        stage1_hit, stage1_promote = Signal(), Signal()
        stage1_unused, stage1_prefetch = Signal(), Signal()
        stage1_expert = Signal(eb)
        stage2, stage2_promote = Signal(), Signal()
        stage2_slot = Signal(c.slot_bits)
        stage2_expert = Signal(eb)
        stage2_transfer = Signal(c.transfer_bits)
        stage3, stage3_slot = Signal(), Signal(c.slot_bits)
        stage3_info = Signal(slot_info_layout(c), reset_less=True)
        rank_state = [Signal(LaneState, name=f"rank_state_{rank}") for rank in range(top_k)]
        todo_state = Array(rank_state)[todo_rank]
        judged_all = Signal()
        m.d.comb += judged_all.eq(~todo[0])
        m.d.sync += [
            stage1.eq(judging & ~judged_all),
            stage1_hit.eq(hits.any()),
            stage1_promote.eq(~hits.any() & promotes.any()),
            stage1_expert.eq(event_experts[todo_rank]),
            stage1_unused.eq(todo_state == LaneState.READY_UNUSED),
            stage1_prefetch.eq(todo_state == LaneState.LOADING_PREFETCH),
            stage2.eq(stage1 & (stage1_hit | stage1_promote)),
            stage2_promote.eq(stage1 & stage1_promote & stage1_prefetch),
            stage2_slot.eq(table.place.slot),
            stage2_expert.eq(stage1_expert),
            stage2_transfer.eq(table.place.transfer),
        ]
        with m.If(judging):
            m.d.sync += todo.eq(todo[1:])
            with m.If(hits.any()):
                m.d.sync += hits.eq(hits & (hits - 1))
            with m.Elif(promotes.any()):
                m.d.sync += promotes.eq(promotes & (promotes - 1))
            with m.Else():
                m.d.sync += missed.eq(missed & (missed - 1))
        with m.If(stage1):
            m.d.comb += [
                counter["hits"].eq(stage1_hit),
                counter["useful"].eq(stage1_hit & stage1_unused),
                counter["misses"].eq(~stage1_hit & ~stage1_promote),
            ]
            with m.If(stage1_hit):
                m.d.comb += [
                    grant_layer.eq(event_layer),
                    grant_expert.eq(stage1_expert),
                    grant_slot.eq(table.place.slot),
                    grant_push.eq(1),
                ]
            with m.Elif(stage1_promote):
                m.d.comb += counter["lates"].eq(1)
        m.d.sync += [stage3.eq(stage2), stage3_slot.eq(stage2_slot), stage3_info.eq(table.info)]
        with m.If(stage3):
            m.d.comb += [
                table.info_write.eq(1),
                table.info_write_slot.eq(stage3_slot),
                table.info_write_data.eq(stage3_info),
                table.info_write_data.pins.eq(_plus_one(stage3_info.pins)),
            ]
        with m.If(stage2_promote):
            m.d.comb += [
                self.promote.eq(1),
                self.promote_transfer.eq(stage2_transfer),
                held_sub.eq(1),
                *emit(
                    EventKind.PROMOTE,
                    layer=event_layer,
                    expert=stage2_expert,
                    slot=stage2_slot,
                    data=stage2_transfer,
                ),
            ]
            m.d.sync += prefetching.bit_select(stage2_transfer, 1).eq(0)

        # Completions ----------------------------------------------------------------------------
        ended_slot = Signal(c.slot_bits)
        ended_prefetch, ended_cancelled = Signal(), Signal()
        status = Signal(CompletionStatus)
        promised = Signal(pin_bits(c))

        # A score commit reads the row of the layer to be selected.
        absent = Signal(experts)
        absent_now = Signal(experts)
        m.d.comb += [
            absent_now.eq(Cat(table.row[e] == LaneState.NONE for e in range(experts))),
            self.absent.eq(absent),
        ]
        # With a lookahead of several layers, all that is selected by is as it was at the commit:
        # while that goes on, the layers' rows and thresholds are read one after the other.
        committing = Signal()
        if c.look > 1:
            ahead_layer = Signal(c.layer_bits)
            samples = Signal(range(c.look + 2))
            floors = Array([self.threshold, *self.farther])
            nearest = Signal.like(self.threshold)
            thresholds = [nearest, *self.farther_threshold]
            before = Mux(committing, ahead_layer, self.select_layer)
            m.d.comb += [
                self.select_threshold.eq(nearest),
                gate.layer.eq(before),
                gate.floor.eq(floors[Mux(committing, samples, 0)]),
            ]
            ahead_next = Mux(before == layers - 1, 0, before + 1)
            m.d.sync += ahead_layer.eq(ahead_next)
            with m.If(~committing):
                m.d.sync += samples.eq(0)
            with m.Elif(samples != c.look + 1):
                m.d.sync += samples.eq(samples + 1)
            for n in range(c.look):
                if n:
                    with m.If(committing & (samples == n)):
                        m.d.sync += self.farther_absent[n - 1].eq(absent_now)
                with m.If(committing & (samples == n + 1)):
                    m.d.sync += thresholds[n].eq(gate.threshold)
                    if n:
                        with m.If(gate.near):
                            m.d.sync += self.farther_absent[n - 1].eq(0)

        # What the predictor takes goes to it from registers: a token in the cycle after, a route in
        # the cycle in which it is taken here.
        token_begins, token_is_new = Signal(), Signal()
        route_judged = Signal()
        m.d.sync += [
            token_begins.eq(0),
            token_is_new.eq(self.token.payload.new_sequence),
            route_judged.eq(0),
        ]
        m.d.comb += [
            self.predictor_token.valid.eq(token_begins),
            self.predictor_token.payload.new_sequence.eq(token_is_new),
            self.predictor_route.valid.eq(route_judged & legal),
            self.predictor_route.payload.layer.eq(expected_layer),
            *(
                self.predictor_route.payload.experts[rank].eq(event_lanes[rank])
                for rank in range(top_k)
            ),
        ]

        # Which input may be taken ---------------------------------------------------------------
        token = self.token.payload
        take_token, judge_route = Signal(), Signal()
        predictor_idle = Signal()
        m.d.comb += [
            # Idle is idle: `predictor_route.ready` may depend on `predictor_token.valid`.
            predictor_idle.eq(self.predictor_token.ready & ~token_begins),
            take_token.eq(
                self.token.valid
                & predictor_idle
                & ~demanding
                & (at_boundary | ((token.new_sequence | (token.context != 0)) & ~self.route.valid))
            ),
            judge_route.eq(
                self.route.valid & predictor_idle & ~demanding & ~at_boundary & has_room
            ),
        ]

        def has_state(view, *states):
            result = Const(0, 1)
            for state in states:
                result = result | (view == state)
            return result

        resident_states = (LaneState.READY, LaneState.READY_UNUSED, LaneState.PINNED)
        loading_states = (LaneState.LOADING_PREFETCH, LaneState.LOADING_DEMAND)
        row_taken = Signal(data.ArrayLayout(LaneState, experts), reset_less=True)
        resident_taken = [has_state(row_taken[e], *resident_states) for e in range(experts)]
        # Of the lanes that are written in this cycle; in PIN of those that are not resident. Known
        # a cycle ahead, as it goes to every lane.
        written_state = Signal(LaneState)
        m.d.sync += written_state.eq(LaneState.NONE)
        state_of_load = Mux(start_prefetch, LaneState.LOADING_PREFETCH, LaneState.LOADING_DEMAND)
        # Block RAM is slow: what it says of the slot is looked at in the next cycle, in RELEASE.
        released, releasable_slot = Signal(slot_info_layout(c)), Signal()
        releasable, last_pin = Signal(), Signal()
        m.d.comb += [
            releasable.eq(releasable_slot & (released.pins != 0)),
            last_pin.eq(released.pins == 1),
        ]
        pin_seeks, may_seek = Signal(), Signal()
        m.d.comb += may_seek.eq(none_free & ~has_free & ~table.settling)
        operation = Signal(Operation)
        threshold_next = Signal()
        demand_begun = Signal()
        leaving_found, leaving_slot = Signal(), Signal(c.slot_bits)
        newest_order = Signal(c.transfer_bits)
        scan = Signal(c.transfer_bits)

        # A commit that moves the slots waits for rest, and lets nothing begin that ends it.
        may_commit: Value = self.register_request
        if self.behind_axi:
            at_rest, timed_out, relocated = Signal(), Signal(), Signal()
            sweep, swept_slot = Signal(range(walk_length + 2)), Signal(c.slot_bits)
            m.d.comb += at_rest.eq(
                self.writer_idle & ~loading.any() & ~drains & ~demanding & (outstanding == 0)
            )
            may_commit = self.register_request & (~self.relocates | at_rest)
            may_load = ~(self.register_request & self.relocates) | timed_out

        # Of the ranks that are looked up in this cycle; of all, in ROUTE.
        looked_up = [Signal(LaneState, name=f"route_state_{rank}") for rank in range(ranks)]
        route_states = [
            *(Signal(LaneState, name=f"looked_up_{rank}") for rank in range(top_k - ranks)),
            *looked_up,
        ]

        with m.FSM(init="CLEAR") as fsm:
            # What is read is told by as little as possible, not by which operation comes next: in
            # BEGIN whatever may be wanted then, during a search and START the victim's.
            of_victim = Signal()
            m.d.sync += row_layer.eq(
                Mux(
                    chooser.busy,
                    chooser.score_layer,
                    Mux(
                        of_victim,
                        chooser.layer,
                        Mux(self.commit_request, self.select_layer, route.layer),
                    ),
                )
            )
            m.d.comb += [
                table.place_read.eq(
                    Mux(
                        judging & ~judged_all,
                        Cat(event_experts[todo_rank], event_layer),
                        Mux(
                            of_victim,
                            Cat(chooser.expert_ahead, chooser.layer_ahead),
                            Cat(disproved_lane, event_layer),
                        ),
                    )
                ),
                table.info_read.eq(
                    Mux(
                        stage1,
                        table.place.slot,
                        Mux(in_ended, loads_read.data.slot, self.release.payload.slot),
                    )
                ),
            ]
            m.d.comb += [
                self.initialised.eq(~in_clear),
                self.busy.eq(
                    ~fsm.ongoing("IDLE")
                    | demanding
                    | any_disproved
                    | queue.o.valid
                    | grants.r_rdy
                    | out_valid
                    | self.completion.valid
                    | self.release.valid
                    | self.commit_request
                    | token_begins
                ),
            ]
            with m.State("CLEAR"):
                m.d.sync += [
                    walk.eq(walk + 1),
                    freed.eq(walk < c.num_slots),
                    freed_slot.eq(walk),
                ]
                with m.If(walk == walk_length):
                    m.d.sync += in_clear.eq(0)
                    m.next = "IDLE"

            with m.State("IDLE"):
                # The first operation that is possible is chosen now and begun in the next cycle.
                # What makes it possible stays so until then, but for one case of a token.
                m.d.sync += [op_layer.eq(load_layer), op_expert.eq(load_expert)]
                possible = {
                    Operation.COMPLETION: self.completion.valid,
                    Operation.DEMAND: demanding & ~demand_blocked & self.start.ready,
                    Operation.SETTLE: disproved_changed,
                    Operation.DISPROVED: any_disproved,
                    Operation.RELEASE: self.release.valid,
                    Operation.SCORE_COMMIT: self.commit_request,
                    Operation.REGISTER_COMMIT: may_commit,
                    Operation.TOKEN: take_token,
                    Operation.ROUTE: judge_route,
                    Operation.PREFETCH: queue.o.valid
                    & self.prefetch_ready
                    & self.start.ready
                    & ~prefetch_blocked
                    & ~demanding
                    & (prefetch_held < c.prefetch_loads),
                }
                if self.behind_axi:
                    for kind in (Operation.ROUTE, Operation.PREFETCH):
                        possible[kind] &= may_load
                seeks, grants_commit = Signal(), Signal()
                for kind, condition in reversed(possible.items()):
                    with m.If(condition):
                        m.d.sync += operation.eq(kind)
                        m.d.comb += [
                            seeks.eq(kind in (Operation.DEMAND, Operation.PREFETCH)),
                            grants_commit.eq(kind == Operation.SCORE_COMMIT),
                        ]
                with m.If(Cat(possible.values()).any() & ~self.hold):
                    m.d.sync += [seeking.eq(seeks), granting.eq(grants_commit)]
                    m.next = "BEGIN"

            with m.State("BEGIN"):
                m.next = "IDLE"
                with m.Switch(operation):
                    with m.Case(Operation.COMPLETION):
                        m.d.comb += self.completion.ready.eq(1)
                        m.d.sync += [
                            ended_index.eq(self.completion.payload.transfer),
                            status.eq(self.completion.payload.status),
                            demand_blocked.eq(0),
                            prefetch_blocked.eq(0),
                        ]
                        enter("ENDED")
                    with m.Case(Operation.DEMAND, Operation.PREFETCH):
                        # A free slot is taken at once, else a victim is looked for; but not while
                        # a slot that has just become free is on its way through the FIFO, nor
                        # while the map's counts change.
                        with m.If(has_free):
                            m.d.sync += [
                                load_slot.eq(free_slot),
                                evicting.eq(0),
                                start_prefetch.eq(~demanding),
                                written_state.eq(
                                    Mux(
                                        demanding,
                                        LaneState.LOADING_DEMAND,
                                        LaneState.LOADING_PREFETCH,
                                    )
                                ),
                            ]
                            enter("START")
                        with m.Elif(may_seek):
                            m.d.sync += [of_victim.eq(1), start_prefetch.eq(~demanding)]
                            m.next = "SEARCH"
                    with m.Case(Operation.DISPROVED):
                        enter("DISPROVED")
                    with m.Case(Operation.RELEASE):
                        enter("RELEASED")
                    with m.Case(Operation.SCORE_COMMIT):
                        m.d.comb += [
                            counter["score_commits"].eq(1),
                            *emit(EventKind.SCORE_COMMIT, layer=self.select_layer),
                        ]
                        m.d.sync += [prefetch_blocked.eq(0), flushing.eq(1)]
                        if c.look > 1:
                            m.d.sync += row_layer.eq(ahead_next)
                        m.next = "COMMIT-ROW"
                    with m.Case(Operation.REGISTER_COMMIT):
                        m.d.comb += [self.register_grant.eq(1), *emit(EventKind.REGISTER_COMMIT)]
                        m.d.sync += [
                            threshold_next.eq(self.threshold_changed),
                            demand_blocked.eq(0),
                            prefetch_blocked.eq(0),
                        ]
                        if self.behind_axi:
                            m.d.comb += record.flag.eq(self.relocates)
                            m.d.sync += [relocated.eq(self.relocates), sweep.eq(0)]
                        m.next = "REGISTERS"
                    with m.Case(Operation.TOKEN):
                        # Unless a route has come meanwhile, which goes before it within a token.
                        with m.If(at_boundary | ~self.route.valid):
                            m.d.comb += self.token.ready.eq(1)
                            with m.If(token.context != 0):
                                m.d.comb += [
                                    counter["illegal"].eq(1),
                                    *emit(EventKind.ILLEGAL, flag=2),
                                ]
                            with m.Else():
                                m.d.sync += token_begins.eq(1)
                                m.d.comb += [
                                    counter["tokens"].eq(1),
                                    counter["sequences"].eq(token.new_sequence),
                                    *emit(
                                        EventKind.TOKEN,
                                        flag=token.new_sequence,
                                        data=token.token_id,
                                    ),
                                ]
                                m.d.sync += [at_boundary.eq(0), expected_layer.eq(0)]
                                with m.If(token.new_sequence):
                                    m.d.sync += flushing.eq(1)
                                    m.next = "FLUSH"
                    with m.Case(Operation.ROUTE):
                        m.d.sync += [
                            # A legal one is of this layer: the DMA scheduler reads its segments.
                            op_layer.eq(expected_layer),
                            route_judged.eq(passes == 1),
                        ]
                        enter("LOOK-UP-0" if passes > 1 else "ROUTE")

            with m.State("SEARCH"):
                # The victim's slot: read for what the chooser is about to answer.
                m.d.sync += load_slot.eq(table.place.slot)
                with m.If(chooser.done & ~self.hold):
                    m.d.sync += evicting.eq(1)
                    m.next = "IDLE"
                    with m.If(~chooser.admitted):
                        m.d.sync += [start_prefetch.eq(0), of_victim.eq(0)]
                    with m.If(chooser.admitted):
                        m.d.sync += written_state.eq(state_of_load)
                        enter("START")
                    with m.Elif(demanding):
                        m.d.sync += [scan.eq(0), leaving_found.eq(0)]
                        m.next = "MAKE-ROOM"
                    with m.Elif(chooser.found):
                        m.d.comb += [
                            queue.o.ready.eq(1),
                            counter["dropped"].eq(1),
                            *emit(EventKind.DROP, layer=entry.layer, expert=entry.expert),
                        ]
                    with m.Else():
                        m.d.sync += prefetch_blocked.eq(1)

            victim_hot = Signal(experts, reset_less=True)
            m.d.sync += victim_hot.eq(1 << chooser.expert)
            with m.State("START"):
                m.d.sync += in_start.eq(~self.start.ready)
                with m.If(~self.start.ready):
                    m.d.sync += written_state.eq(state_of_load)
                with m.If(self.start.ready):
                    m.d.comb += queue.o.ready.eq(start_prefetch)
                    m.d.sync += [start_prefetch.eq(0), of_victim.eq(0)]
                    m.d.sync += in_evict.eq(evicting)
                    with m.If(evicting):
                        m.next = "EVICT"
                    with m.Else():
                        m.next = "IDLE"

            with m.State("EVICT"):
                m.next = "IDLE"

            with m.State("MAKE-ROOM"):
                # No slot and no victim: the last started prefetch gives its slot up, unless one
                # is on its way to being free already.
                m.d.sync += scan.eq(scan + 1)
                with m.If(
                    (loading & prefetching).bit_select(scan, 1)
                    & (~leaving_found | (order[scan] < newest_order))
                ):
                    m.d.sync += [
                        leaving_found.eq(1),
                        leaving.eq(scan),
                        newest_order.eq(order[scan]),
                    ]
                with m.If(drains | any_disproved):
                    m.d.sync += demand_blocked.eq(1)
                    m.next = "IDLE"
                with m.Elif(scan == c.transfers - 1):
                    m.d.sync += [demand_blocked.eq(1), cancel_flag.eq(1)]
                    enter("CANCEL-READ")
            with m.State("DISPROVED"):
                m.d.comb += disproved_changes.eq(1)
                m.d.sync += [
                    leaving.eq(table.place.transfer),
                    leaving_found.eq(1),
                    cancel_flag.eq(0),
                ]
                enter("CANCEL-READ")
            with m.State("CANCEL-READ"):
                m.d.sync += [cancel.eq(leaving_found), leaving_slot.eq(loads_read.data.slot)]
                m.next = "CANCEL"
            with m.State("CANCEL"):
                # The DMA scheduler ignores a cancel that is late, so it need not wait for that.
                # Whether it was is known at the end of the cycle, so the map learns it in the next.
                m.d.sync += cancelling.eq(cancel & ~self.cancel_late)
                m.next = "CANCELLED"
            with m.State("CANCELLED"):
                m.d.sync += cancelling.eq(0)
                m.next = "IDLE"

            with m.State("ENDED"):
                m.d.sync += [
                    ended_slot.eq(loads_read.data.slot),
                    freed.eq(
                        (status == CompletionStatus.DRAINED) | (status == CompletionStatus.ERROR)
                    ),
                    freed_slot.eq(loads_read.data.slot),
                    ended_prefetch.eq(prefetching.bit_select(ended_index, 1)),
                    ended_cancelled.eq(cancelled.bit_select(ended_index, 1)),
                    loading.bit_select(ended_index, 1).eq(0),
                ]
                with m.If(status == CompletionStatus.DONE):
                    m.d.sync += written_state.eq(
                        Mux(
                            prefetching.bit_select(ended_index, 1),
                            LaneState.READY_UNUSED,
                            LaneState.PINNED,
                        )
                    )
                enter("COMPLETE")
            with m.State("COMPLETE"):
                m.d.comb += [
                    disproved_changes.eq(any_disproved),
                    held_sub.eq(ended_prefetch),
                    draining_sub.eq(ended_cancelled),
                ]
                fields = {
                    "layer": op_layer,
                    "expert": op_expert,
                    "slot": ended_slot,
                    "data": ended_index,
                }
                m.d.sync += promised.eq(table.info.pins)
                m.next = "IDLE"
                with m.Switch(status):
                    with m.Case(CompletionStatus.DONE):
                        m.d.comb += [
                            counter["filled"].eq(1),
                            *emit(EventKind.FILL_DONE, **fields),
                        ]
                        with m.If(~ended_prefetch):
                            m.next = "PROMISED"
                    with m.Case(CompletionStatus.DRAINED):
                        m.d.comb += [
                            counter["drained"].eq(1),
                            *emit(EventKind.DRAINED, slot=ended_slot, data=ended_index),
                        ]
                    with m.Default():
                        # ERROR or TIMEOUT; after the latter the slot is never used again.
                        if self.behind_axi:
                            with m.If(status == CompletionStatus.TIMEOUT):
                                m.d.sync += timed_out.eq(1)
                        m.d.comb += [
                            counter["errors"].eq(status == CompletionStatus.ERROR),
                            counter["timeouts"].eq(status == CompletionStatus.TIMEOUT),
                            *emit(
                                Mux(
                                    status == CompletionStatus.ERROR,
                                    EventKind.ERROR,
                                    EventKind.WATCHDOG,
                                ),
                                **fields,
                            ),
                        ]
                        with m.If(~ended_prefetch):
                            m.next = "PROMISED"
            with m.State("PROMISED"):
                # One grant for each event that waits; normally one.
                failed = Signal()
                m.d.comb += [
                    failed.eq(status != CompletionStatus.DONE),
                    grant_layer.eq(op_layer),
                    grant_expert.eq(op_expert),
                    grant_slot.eq(Mux(failed, 0, ended_slot)),
                    grant_error.eq(failed),
                    grant_push.eq(1),
                    outstanding_sub.eq(failed),
                ]
                m.d.sync += promised.eq(promised - 1)
                with m.If(promised == 1):
                    m.next = "IDLE"

            with m.State("RELEASED"):
                m.d.sync += [
                    released.eq(table.info),
                    releasable_slot.eq(
                        table.info.resident & (self.release.payload.slot < c.num_slots)
                    ),
                    written_state.eq(LaneState.READY),
                ]
                enter("RELEASE")
            with m.State("RELEASE"):
                slot = self.release.payload.slot
                m.next = "IDLE"
                with m.If(releasable):
                    m.d.comb += [
                        outstanding_sub.eq(1),
                        counter["releases"].eq(1),
                        *emit(EventKind.RELEASE, slot=slot),
                    ]
                    with m.If(last_pin):
                        m.d.sync += [demand_blocked.eq(0), prefetch_blocked.eq(0)]
                with m.Else():
                    m.d.comb += [
                        counter["illegal"].eq(1),
                        *emit(EventKind.ILLEGAL, flag=1, slot=slot),
                    ]

            with m.State("COMMIT-ROW"):
                m.d.comb += [committing.eq(1), self.absent.eq(absent_now)]
                m.d.sync += [absent.eq(absent_now), flushing.eq(1)]
                if c.look > 1:
                    m.d.sync += row_layer.eq(ahead_next)
                m.next = "COMMIT"
                with m.If(self.commit_done):
                    m.next = "FLUSH"
            with m.State("COMMIT"):
                m.d.comb += committing.eq(1)
                m.d.sync += flushing.eq(1)
                if c.look > 1:
                    m.d.sync += row_layer.eq(ahead_next)
                with m.If(self.commit_done):
                    m.next = "FLUSH"
            with m.State("FLUSH"):
                m.d.sync += flushing.eq(queue.removed)
                with m.If(~queue.removed):
                    m.next = "IDLE"

            with m.State("REGISTERS"):
                with m.If(threshold_next):
                    m.d.comb += emit(EventKind.THRESHOLD, data=self.threshold.as_unsigned())
                m.next = "IDLE"
                if self.behind_axi:
                    with m.If(relocated):
                        m.next = "EMPTY"
            if self.behind_axi:
                with m.State("EMPTY"):
                    # Every row, and every slot: read in one cycle, given up in the next.
                    m.d.comb += [
                        table.row_write.eq(sweep < layers),
                        table.row_write_layer.eq(sweep),
                        table.row_write_lanes.eq(~0),
                        table.info_read.eq(sweep),
                        table.info_write_slot.eq(swept_slot),
                        table.held_layer.eq(table.info.layer),
                        table.ready_layer.eq(table.info.layer),
                    ]
                    m.d.sync += [
                        sweep.eq(sweep + 1),
                        swept_slot.eq(sweep),
                        freed_slot.eq(swept_slot),
                    ]
                    with m.If((sweep != 0) & (sweep <= c.num_slots) & table.info.resident):
                        m.d.comb += [
                            table.info_write.eq(1),
                            table.held_sub.eq(1),
                            table.ready_sub.eq(1),
                        ]
                        m.d.sync += freed.eq(1)
                    with m.If(sweep == walk_length + 1):
                        m.next = "IDLE"

            for n in range(passes - 1):
                # The row is here, and stays: nothing else wants one before ROUTE.
                with m.State(f"LOOK-UP-{n}"):
                    m.d.sync += [
                        event_hot[0].eq(1 << route.experts[n + 1][:eb]),
                        route_states[n].eq(looked_up[0]),
                    ]
                    if n + 2 < passes:
                        enter(f"LOOK-UP-{n + 1}")
                    else:
                        m.d.sync += route_judged.eq(1)
                        enter("ROUTE")

            with m.State("ROUTE"):
                # The row is here and the route is judged: taken now, one way or the other.
                m.next = "IDLE"
                with m.If(legal):
                    m.next = "PIN"  # its bit is set where all is done that a legal route does

            with m.State("PIN"):
                m.next = "JUDGE"
            with m.State("JUDGE"):
                judged = judged_all & ~stage1 & ~stage2 & ~queue.removed & ~gate.busy
                m.d.sync += [judging.eq(~judged), flushing.eq(~judged)]
                with m.If(judged & gate.changed):
                    m.d.comb += emit(
                        EventKind.THRESHOLD,
                        layer=event_layer,
                        flag=1,
                        data=gate.changed_threshold.as_unsigned(),
                    )
                with m.If(judged):
                    with m.If(searching):
                        m.next = "SEARCH"
                    with m.Else():
                        m.next = "IDLE"

        # What is done in states that have a bit of their own --------------------------------------
        m.d.comb += [
            self.commit_grant.eq(granting),
            loads_read.addr.eq(Mux(in_cancel_read, leaving, ended_index)),
            # Never both: nothing starts without a free slot.
            pin_seeks.eq(in_pin & demanding & self.start.ready & none_free),
            chooser.start.eq((seeking & may_seek) | pin_seeks),
        ]
        with m.If(in_clear):
            m.d.comb += [
                table.row_write.eq(walk < layers),
                table.row_write_layer.eq(walk),
                table.row_write_lanes.eq(~0),
                table.info_write.eq(walk < c.num_slots),
            ]
        with m.If(demand_begun):
            # In the cycle before: its lane is `op_lane`.
            m.d.comb += table.row_write.eq(1)
        m.d.sync += demand_begun.eq(0)
        with m.If(in_pin):
            # Residents are pinned and loading ones become demands, the whole row at once; the
            # first missing expert takes a free slot, or the search for a victim begins.
            if c.look > 1:
                m.d.comb += gate.late.eq(
                    sum(state == LaneState.LOADING_PREFETCH for state in rank_state)
                )
            m.d.comb += [
                gate.event.eq(1),
                gate.idle.eq(idle_link),
                gate.good.eq(
                    sum(
                        has_state(
                            rank_state[rank],
                            LaneState.READY_UNUSED,
                            LaneState.LOADING_PREFETCH,
                        )
                        for rank in range(top_k)
                    )
                ),
                disproved_changes.eq(1),
                table.row_write.eq(1),
                table.ready_sub.eq(
                    sum(
                        has_state(rank_state[rank], LaneState.READY, LaneState.READY_UNUSED)
                        for rank in range(top_k)
                    )
                ),
            ]
            for e in range(experts):
                on_its_way = has_state(row_taken[e], *loading_states)
                m.d.comb += table.row_write_lanes[e].eq(
                    event_set[e] & (resident_taken[e] | on_its_way)
                )
            m.d.sync += [
                op_expert.eq(first_missing),
                demand_begun.eq(taking),
                judging.eq(1),
                flushing.eq(1),
                written_state.eq(LaneState.LOADING_DEMAND),
            ]
            with m.If(pin_seeks):
                m.d.sync += [searching.eq(1), of_victim.eq(1)]
        with m.If(in_start & self.start.ready):
            m.d.comb += table.row_write.eq(1)
            # The victim leaves the map next, if there is one.
            m.d.sync += [op_layer.eq(chooser.layer), op_expert.eq(chooser.expert)]
        with m.If(taking):
            m.d.sync += [pending.eq(later_pending), demanding.eq(later_pending != 0)]
        with m.If(in_evict):
            # The slot has changed hands.
            m.d.comb += [
                table.row_write.eq(1),
                table.held_sub.eq(1),
                table.ready_sub.eq(1),
                counter["evictions"].eq(1),
                counter["useless"].eq(
                    Cat(
                        victim_hot[e] & (table.row[e] == LaneState.READY_UNUSED)
                        for e in range(experts)
                    ).any()
                ),
            ]
        with m.If(in_cancel_read | in_ended):
            m.d.sync += [
                op_layer.eq(loads_read.data.layer),
                op_expert.eq(loads_read.data.expert),
            ]
        done = status == CompletionStatus.DONE
        with m.If(in_complete):
            m.d.comb += [
                table.held_sub.eq(freed),
                table.ready_add.eq(done & ended_prefetch),
                table.row_write.eq(
                    done | ((status != CompletionStatus.DRAINED) & ~ended_cancelled)
                ),
                table.info_write.eq(status != CompletionStatus.DRAINED),
                table.info_write_slot.eq(ended_slot),
                table.info_write_data.resident.eq(done),
                table.info_write_data.pins.eq(Mux(done, table.info.pins, 0)),
                table.info_write_data.layer.eq(op_layer),
                table.info_write_data.expert.eq(op_expert),
            ]
        with m.If(in_release):
            m.d.comb += [
                self.release.ready.eq(1),
                table.row_write.eq(releasable & last_pin),
                table.ready_add.eq(releasable & last_pin),
                table.info_write.eq(releasable),
                table.info_write_slot.eq(self.release.payload.slot),
                table.info_write_data.eq(released),
                table.info_write_data.pins.eq(released.pins - 1),
            ]
        for e in range(experts):
            m.d.comb += table.row_write_data[e].eq(
                Mux(in_pin & resident_taken[e], LaneState.PINNED, written_state)
            )
        # What ROUTE and RELEASED do, as above the handshake: straight from a register.
        with m.If(in_route):
            m.d.comb += self.route.ready.eq(1)
            m.d.sync += searching.eq(0)
        with m.If(in_route & ~legal):
            m.d.comb += [
                counter["illegal"].eq(1),
                *emit(EventKind.ILLEGAL, flag=0, layer=route.layer),
            ]
        with m.If(in_route & legal):
            m.d.comb += [
                outstanding_add.eq(top_k),
                counter["routes"].eq(1),
                *emit(EventKind.ROUTE, layer=route.layer, data=route.experts.as_value()),
            ]
            m.d.sync += [
                event_layer.eq(route.layer),
                event_set.eq(event_next),
                at_boundary.eq(is_last),
                expected_layer.eq(Mux(is_last, 0, route.layer + 1)),
                demand_blocked.eq(0),
                prefetch_blocked.eq(0),
                in_pin.eq(1),
                judging.eq(1),
                todo.eq(-1),
                flushing.eq(1),
                written_state.eq(LaneState.LOADING_DEMAND),
            ]
            # The same as that any rank's state is NONE, and less deep.
            m.d.sync += demanding.eq((event_next & absent_now).any())
        m.d.sync += row_taken.eq(table.row)
        for rank, state in enumerate(looked_up):
            # The lane's bit is known a cycle ahead: less deep than a multiplexer.
            m.d.comb += Value.cast(state).eq(
                Cat(
                    Cat(
                        event_hot[rank][e] & Value.cast(table.row[e])[bit] for e in range(experts)
                    ).any()
                    for bit in range(len(Value.cast(state)))
                )
            )
        for rank, state in enumerate(route_states):
            with m.If(in_route & legal):
                m.d.sync += [
                    event_experts[rank].eq(event_lanes[rank]),
                    rank_state[rank].eq(state),
                    pending[rank].eq(state == LaneState.NONE),
                    missed[rank].eq(state == LaneState.NONE),
                    promotes[rank].eq(has_state(state, *loading_states)),
                    hits[rank].eq(has_state(state, *resident_states)),
                ]
        with m.If(in_released):
            m.d.sync += [op_layer.eq(table.info.layer), op_expert.eq(table.info.expert)]

        # An expert that is cancelled, has arrived or failed, is no longer to be cancelled.
        for e in range(experts):
            m.d.sync += disproved[e].eq(
                Mux(
                    in_pin,
                    (row_taken[e] == LaneState.LOADING_PREFETCH) & ~event_set[e],
                    disproved[e]
                    & ~(in_disproved & (disproved_lane == e))
                    & ~(in_complete & of_event & op_lane[e]),
                )
            )
        m.d.sync += of_event.eq(
            (loads_read.data.layer == event_layer) & ~cancelled.bit_select(ended_index, 1)
        )

        with m.If(cancelling):
            m.d.comb += [
                table.row_write.eq(1),
                draining_add.eq(1),
                counter["cancelled"].eq(1),
                *emit(
                    EventKind.CANCEL,
                    layer=op_layer,
                    expert=op_expert,
                    slot=leaving_slot,
                    flag=cancel_flag,
                    data=self.cancel_transfer,
                ),
            ]
            m.d.sync += [
                loading.bit_select(leaving, 1).eq(0),
                cancelled.bit_select(leaving, 1).eq(1),
            ]
        return m
