# SPDX-License-Identifier: Apache-2.0
"""Loads experts over AXI: order of bursts, retry, cancel and drain, watchdog."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .burst_splitter import BurstSplitter
from .payloads import (
    CompletionStatus,
    axi4_read_signature,
    completion_layout,
    fill_layout,
    load_layout,
    segment_write_layout,
)
from .skid_buffer import SkidBuffer

__all__ = [
    "DmaScheduler",
    "burst_record_layout",
    "last_record_layout",
    "retry_record_layout",
]

ERROR_RESPONSE_BIT = 1
"""Set in the AXI responses SLVERR and DECERR."""


def burst_record_layout(config: EngineConfig) -> data.StructLayout:
    """An AR handshake; ``len`` is AXI's, one less than the beats."""
    return data.StructLayout(
        {
            "valid": 1,
            "transfer": config.transfer_bits,
            "prefetch": 1,
            "addr": config.axi_addr_width,
            "len": 8,
        }
    )


def last_record_layout(config: EngineConfig) -> data.StructLayout:
    """An R handshake with ``last``; ``resp`` is the worst response of the burst."""
    return data.StructLayout({"valid": 1, "transfer": config.transfer_bits, "resp": 2})


def retry_record_layout(config: EngineConfig) -> data.StructLayout:
    """A load starts again."""
    return data.StructLayout({"valid": 1, "transfer": config.transfer_bits})


def _one_hot(index: Value, count: int) -> Value:
    """Bit ``index`` of ``count`` bits; none when ``index`` is not less than ``count``."""
    return Cat(index == i for i in range(count))


class DmaScheduler(wiring.Component):
    """Carries loads from the tiers to the expert buffer as AXI read bursts.

    Every load in flight is a *transfer*; its index is the AXI ID of its bursts, so its beats come
    in order, and those of different transfers may come in any order. Bursts of demands go before
    those of prefetches, demands in the order in which they became demands. The choice is made
    anew for every burst: a prefetch address that follows a demand is on the bus one cycle after
    the demand was taken, at the latest.

    **End.** A transfer ends when it has no burst left to issue and no beat owed; its completion
    stands on ``completion`` three cycles later if none is before it. Transfers that end within a
    few cycles of each other may change places. A load of a layer without beats is DONE at once.

    **Cancel.** Nothing more is presented and beats owed are discarded, from the cycle after
    ``cancel`` on; only a beat that already stands on ``fill`` stays there until it is taken.
    DRAINED follows when nothing is owed. ``cancel_late`` is judged where beats are taken to
    ``fill``: the cycle in which the last one is taken is late, the one before is not. A transfer
    that has ended, been given up or is free is late too; one whose last beat only leads to a
    retry is not.

    **Retry.** After a beat with SLVERR or DECERR the transfer goes on to its end, then starts
    again as a whole, up to ``retry_limit`` times; a demand joins the demand order at the end, a
    prefetch waits until no other has bursts left to issue. All beats go to ``fill`` each time.

    **Watchdog.** When something is owed to a transfer, or an address is presented, and for
    ``watchdog_cycles`` cycles no address is taken, no beat is offered on ``axi.r`` and none waits
    for ``fill`` (a slow buffer is no fault of the memory), all transfers that have not ended are
    given up: TIMEOUT. Their AXI IDs are not used again, their late beats are discarded, and their
    bursts count as outstanding until their last beat comes. The others go on.

    **Dead.** When a watchdog finds an address still presented, or all transfers or all
    outstanding bursts lost, ``dead`` is high until reset. Nothing is presented any more (an
    address that was stays), ``prefetch_ready`` is low, and every ``start`` is taken and completes
    with ERROR. Such a load has an index as any other, now also one of those that were lost: no
    burst carries it.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses the AXI sizes, ``transfers``, ``max_burst``, ``max_outstanding``,
        ``prefetch_outstanding``, ``retry_limit`` and ``watchdog_cycles``.

    Members
    -------
    start : :py:`In(stream.Signature(load_layout(config)))`
        A load that has a slot. Not taken while all transfers are in use, in a cycle with
        ``promote``, and (a prefetch) while another prefetch has bursts left to issue. The beats
        of its layer's segments together fit in the slot.
        In cycle c, with nothing else that wants the bus: ``axi.ar.valid`` in cycle c+3.
    start_transfer : :py:`Out(transfer_bits)`
        Index that the load gets if it is taken in this cycle.
    promote, promote_transfer : :py:`In(1)`, :py:`In(transfer_bits)`
        One cycle: this transfer is a demand from the next cycle on. Its bursts on their way count
        as demand's. Without effect on one that is cancelled or has ended.
    cancel, cancel_transfer : :py:`In(1)`, :py:`In(transfer_bits)`
        One cycle: see above. Ignored when ``cancel_late`` is high.
    cancel_late : :py:`Out(1)`
        Combinational from ``cancel_transfer`` and ``fill.ready``.
    completion : :py:`Out(stream.Signature(completion_layout(config)))`
        The index is free again when this is taken; after TIMEOUT only if ``dead``, and that of a
        demand cancelled before it had issued all only when those before it have.
    prefetch_ready : :py:`Out(1)`
        A prefetch may start: no prefetch has bursts left to issue or waits for a retry, a
        transfer is free, and fewer than ``prefetch_outstanding`` prefetch bursts are on their way.
    hold : :py:`In(1)`
        Present no new address from the next cycle on.
    segment_write : :py:`In(stream.Signature(segment_write_layout(config)))`
        See :class:`BurstSplitter`.
    axi : :py:`Out(axi4_read_signature(config))`
        ``ar`` and ``r.ready`` are registers' outputs.
    fill : :py:`Out(stream.Signature(fill_layout(config)))`
        Every beat that is not discarded, one cycle after it was on the bus at the earliest.
        ``fill.valid`` and the payload are combinational from registers and LUT RAM.
    record_burst, record_last, record_retry : :py:`Out`
        For the event port, see the layouts. A promotion shows in the records of the next cycle.
    discard : :py:`Out(1)`
        This cycle a beat is thrown away.
    busy : :py:`Out(1)`
        There is a transfer whose completion has not been taken.
    dead : :py:`Out(1)`
        See above.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        transfer = config.transfer_bits
        super().__init__(
            {
                "start": In(stream.Signature(load_layout(config))),
                "start_transfer": Out(transfer),
                "promote": In(1),
                "promote_transfer": In(transfer),
                "cancel": In(1),
                "cancel_transfer": In(transfer),
                "cancel_late": Out(1),
                "completion": Out(stream.Signature(completion_layout(config))),
                "prefetch_ready": Out(1),
                "hold": In(1),
                "segment_write": In(stream.Signature(segment_write_layout(config))),
                "axi": Out(axi4_read_signature(config)),
                "fill": Out(stream.Signature(fill_layout(config))),
                "record_burst": Out(burst_record_layout(config)),
                "record_last": Out(last_record_layout(config)),
                "record_retry": Out(retry_record_layout(config)),
                "discard": Out(1),
                "busy": Out(1),
                "dead": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        count = config.transfers
        index_bits = config.transfer_bits

        # One bit for each transfer ---
        used = Signal(count)  # from `start` until its completion is taken
        ended = Signal(count)  # its completion is queued
        unissued = Signal(count)  # has bursts that have not been presented
        demand = Signal(count)
        cancelled = Signal(count)
        failed = Signal(count)  # a beat of this pass had an error
        may_retry = Signal(count)
        given_up = Signal(count)  # TIMEOUT is still to be reported
        lost = Signal(count)  # its ID has beats owed that may never come
        unfilled = Signal(count)  # no beat of this pass has come

        # Bursts on their way: presented, and last beat not yet taken.
        owed = [Signal(range(config.max_outstanding + 1), name=f"owed_{t}") for t in range(count)]
        nothing_owed = Signal(count)
        last_owed = Signal(count)
        outstanding = Signal(range(config.max_outstanding + 1))
        prefetch_outstanding = Signal(range(config.max_outstanding + 1))
        m.d.comb += [
            nothing_owed.eq(Cat(n == 0 for n in owed)),
            last_owed.eq(Cat(n == 1 for n in owed)),
        ]

        expire = Signal()
        m.submodules.splitter = splitter = BurstSplitter(config)
        wiring.connect(m, splitter.segment_write, wiring.flipped(self.segment_write))
        wiring.connect(m, splitter.ar, wiring.flipped(self.axi.ar))
        # Demands in the order in which they became demands. One that has no bursts left, because
        # they are issued, it was cancelled or given up, leaves when it is the first; so long its
        # index is not used again, so that each index is in it at most once.
        m.submodules.order = order = SyncFIFO(width=index_bits, depth=count)
        ordered = Signal(count)  # transfers that are in it
        join = Signal()
        joining = Signal(index_bits)
        leave = Signal()
        first = Signal(index_bits)  # a register before the queue
        first_valid = Signal()
        first_issues = Signal()
        m.d.comb += [
            first_issues.eq(unissued.bit_select(first, 1)),
            leave.eq(first_valid & ~first_issues),
            order.r_en.eq(leave),
            order.w_data.eq(joining),
            order.w_en.eq(join & first_valid & ~(leave & ~order.r_rdy)),
        ]
        with m.If(leave | ~first_valid):
            m.d.sync += [
                first_valid.eq(join | order.r_rdy),
                first.eq(Mux(order.r_rdy, order.r_data, joining)),
            ]
        prefetch_valid = Signal()  # a prefetch has bursts left to issue
        prefetch = Signal(index_bits)

        # Start ---
        free = Signal(count)
        free_valid = Signal()  # `start_transfer` is free; found in the cycle before
        start_here = Signal(count)
        started = Signal()
        start_issues = Signal()
        m.d.comb += [
            free.eq(~used & ~ordered & (~lost | self.dead.replicate(count)) & ~start_here),
            self.start.ready.eq(
                free_valid
                & ~expire
                & ~self.promote
                & ~(self.start.valid & self.start.payload.prefetch & prefetch_valid)
            ),
            started.eq(self.start.valid & self.start.ready),
            start_here.eq(_one_hot(self.start_transfer, count) & started.replicate(count)),
            start_issues.eq(started & ~splitter.start_empty & ~self.dead),
        ]
        m.d.sync += free_valid.eq(free.any())
        for t in reversed(range(count)):
            with m.If(free[t]):
                m.d.sync += self.start_transfer.eq(t)
        m.d.comb += [
            splitter.start.eq(started),
            splitter.start_transfer.eq(self.start_transfer),
            splitter.start_layer.eq(self.start.payload.layer),
            splitter.start_expert.eq(self.start.payload.expert),
            splitter.start_next.eq(
                start_issues & ~first_valid & ~(self.start.payload.prefetch & prefetch_valid)
            ),
        ]

        # Beats ---
        m.submodules.beats = beats = SkidBuffer(self.axi.r.payload.shape())
        wiring.connect(m, beats.i, wiring.flipped(self.axi.r))
        beat = beats.o.payload
        beat_here = Signal(count)
        taken = Signal()
        offered = Signal()  # `fill` has not taken it yet, so it must stay
        last_here = Signal(count)
        error_here = Signal(count)
        m.d.comb += [
            beat_here.eq(_one_hot(beat.id, count) & ~nothing_owed),
            self.fill.valid.eq(beats.o.valid & ((beat_here & ~cancelled & ~lost).any() | offered)),
            taken.eq(beats.o.valid & (self.fill.ready | ~self.fill.valid)),
            beats.o.ready.eq(taken),
            self.discard.eq(taken & ~self.fill.valid),
            last_here.eq(beat_here & (taken & beat.last).replicate(count)),
            error_here.eq(beat_here & (taken & beat.resp[ERROR_RESPONSE_BIT]).replicate(count)),
        ]
        m.d.sync += offered.eq(self.fill.valid & ~self.fill.ready)

        m.submodules.slots = slots = Memory(shape=config.slot_bits, depth=count, init=[])
        slots_write = slots.write_port()
        slots_read = slots.read_port(domain="comb")
        m.submodules.offsets = offsets = Memory(shape=config.offset_bits, depth=count, init=[])
        offsets_write = offsets.write_port()
        offsets_read = offsets.read_port(domain="comb")
        m.d.comb += [
            slots_write.addr.eq(self.start_transfer),
            slots_write.data.eq(self.start.payload.slot),
            slots_write.en.eq(started),
            slots_read.addr.eq(beat.id),
            offsets_read.addr.eq(beat.id),
            offsets_write.addr.eq(beat.id),
            offsets_write.data.eq(self.fill.payload.offset + 1),
            offsets_write.en.eq(taken),
            self.fill.payload.slot.eq(slots_read.data),
            self.fill.payload.offset.eq(Mux((unfilled & beat_here).any(), 0, offsets_read.data)),
            self.fill.payload.data.eq(beat.data),
        ]

        # Cancel and promote ---
        late = Signal(count)
        cancel_here = Signal(count)
        promote_here = Signal(count)
        promote_issues = Signal()
        issued_here = Signal(count)
        finish_here = Signal(count)
        ending = Signal(count)
        m.d.comb += [
            ending.eq(~unissued & (nothing_owed | (last_owed & last_here) | lost)),
            late.eq(
                ~used
                | ended
                | given_up
                | (ending & ~cancelled & ~((failed | error_here) & may_retry))
                | expire.replicate(count)
            ),
            self.cancel_late.eq(late.bit_select(self.cancel_transfer, 1)),
            # Only `cancelled` looks at `late`: what is late has no bursts left in any case.
            cancel_here.eq(_one_hot(self.cancel_transfer, count) & self.cancel.replicate(count)),
            promote_here.eq(
                _one_hot(self.promote_transfer, count)
                & used
                & ~ended
                & ~given_up
                & ~cancelled
                & ~demand
                & ~cancel_here
                & (self.promote & ~expire).replicate(count)
            ),
            promote_issues.eq(prefetch_valid & (promote_here & _one_hot(prefetch, count)).any()),
        ]

        # Issue ---
        m.d.comb += [
            splitter.wanted_valid.eq(Mux(first_valid, first_issues, prefetch_valid)),
            splitter.wanted.eq(Mux(first_valid, first, prefetch)),
            splitter.allow.eq(
                (outstanding != config.max_outstanding)
                & (first_valid | (prefetch_outstanding < config.prefetch_outstanding))
                & ~self.hold
                & ~self.cancel
                & ~expire
            ),
            issued_here.eq(
                _one_hot(splitter.issued_transfer, count) & splitter.issued.replicate(count)
            ),
            finish_here.eq(issued_here & splitter.issued_last.replicate(count)),
        ]

        # End ---
        at_end = Signal(count)
        wants_retry = Signal(count)
        chosen = Signal(index_bits)
        chosen_here = Signal(count)
        retries_here = Signal(count)
        ends_here = Signal(count)
        chosen_prefetch = Signal()
        retry_blocked = Signal()
        retrying = Signal()
        m.d.comb += [
            at_end.eq(used & ~ended & (given_up | (~unissued & (nothing_owed | lost)))),
            wants_retry.eq(failed & may_retry & ~cancelled & ~given_up),
        ]
        # One is looked for in one cycle and dealt with in the next, if that is possible then.
        candidates = Signal(count)
        found = Signal()
        m.d.comb += candidates.eq(
            at_end & ~chosen_here & ~(wants_retry & ~demand & prefetch_valid.replicate(count))
        )
        m.d.sync += found.eq(candidates.any())
        for t in reversed(range(count)):
            with m.If(candidates[t]):
                m.d.sync += chosen.eq(t)
        chosen_retries = (chosen_here & wants_retry).any()
        m.d.comb += [
            chosen_here.eq(_one_hot(chosen, count) & found.replicate(count)),
            chosen_prefetch.eq(~(chosen_here & demand).any()),
            # One push into the demand order, one write of the retry count in a cycle.
            retry_blocked.eq(
                started | self.promote | self.cancel | expire | (chosen_prefetch & prefetch_valid)
            ),
            retrying.eq(chosen_retries & ~retry_blocked),
            retries_here.eq(chosen_here & retrying.replicate(count)),
            ends_here.eq(chosen_here & ~wants_retry),
        ]

        m.submodules.completions = completions = SyncFIFO(
            width=completion_layout(config).size, depth=count
        )
        completed = Signal(completion_layout(config))
        m.d.comb += [
            completed.transfer.eq(chosen),
            completions.w_data.eq(completed),
            completions.w_en.eq(ends_here.any()),
            self.completion.valid.eq(completions.r_rdy),
            self.completion.payload.eq(completions.r_data),
            completions.r_en.eq(self.completion.ready),
        ]
        with m.If((chosen_here & given_up).any()):
            m.d.comb += completed.status.eq(CompletionStatus.TIMEOUT)
        with m.Elif((chosen_here & cancelled).any()):
            m.d.comb += completed.status.eq(CompletionStatus.DRAINED)
        with m.Elif((chosen_here & failed).any()):
            m.d.comb += completed.status.eq(CompletionStatus.ERROR)
        with m.Else():
            m.d.comb += completed.status.eq(CompletionStatus.DONE)
        freed_here = Signal(count)
        m.d.comb += freed_here.eq(
            _one_hot(self.completion.payload.transfer, count)
            & (self.completion.valid & self.completion.ready).replicate(count)
        )

        retry_limit = config.retry_limit
        last_retry = Signal()
        if retry_limit:
            m.submodules.retries = retries = Memory(
                shape=range(retry_limit + 1), depth=count, init=[]
            )
            retries_write = retries.write_port()
            retries_read = retries.read_port(domain="comb")
            m.d.comb += [
                retries_read.addr.eq(chosen),
                retries_write.addr.eq(Mux(started, self.start_transfer, chosen)),
                retries_write.data.eq(Mux(started, 0, retries_read.data + 1)),
                retries_write.en.eq(started | retrying),
                last_retry.eq(retries_read.data == retry_limit - 1),
            ]
        m.d.comb += [
            splitter.restart.eq(retrying),
            splitter.restart_transfer.eq(chosen),
        ]

        # Who issues next ---
        m.d.comb += [
            join.eq(
                (start_issues & ~self.start.payload.prefetch)
                | promote_issues
                | (retrying & ~chosen_prefetch)
            ),
            joining.eq(
                Mux(
                    started,
                    self.start_transfer,
                    Mux(self.promote, self.promote_transfer, chosen),
                )
            ),
        ]
        with m.If(start_issues & self.start.payload.prefetch):
            m.d.sync += [prefetch_valid.eq(1), prefetch.eq(self.start_transfer)]
        with m.Elif(retrying & chosen_prefetch):
            m.d.sync += [prefetch_valid.eq(1), prefetch.eq(chosen)]
        with m.Elif(
            ((finish_here | cancel_here | promote_here) & _one_hot(prefetch, count)).any() | expire
        ):
            m.d.sync += prefetch_valid.eq(0)

        # Watchdog ---
        silence = Signal(range(config.watchdog_cycles))
        waiting = Signal()
        active = Signal()
        expired_here = Signal(count)
        m.d.comb += [
            waiting.eq((used & ~nothing_owed & ~lost).any() | (self.axi.ar.valid & ~self.dead)),
            active.eq(
                ~waiting
                | expire
                | (self.axi.ar.valid & self.axi.ar.ready)
                | self.axi.r.valid
                | beats.o.valid
            ),
            expired_here.eq(used & ~ended & ~(at_end & ~wants_retry) & expire.replicate(count)),
        ]
        m.d.sync += [
            silence.eq(Mux(active, 0, silence + 1)),
            expire.eq(~active & (silence == config.watchdog_cycles - 1)),
        ]
        with m.If(expire):
            with m.If(
                self.axi.ar.valid
                | (lost | expired_here).all()
                | (outstanding == config.max_outstanding)
            ):
                m.d.sync += self.dead.eq(1)

        # Next state of every transfer ---
        def update(flags, *, clear=0, set=0):
            return flags.eq((flags & ~clear) | set)

        all_dead = self.dead.replicate(count)
        begins_here = start_here | retries_here
        issues_here = start_here & start_issues.replicate(count)
        retry_allowed = Signal(count)
        m.d.comb += retry_allowed.eq(start_here & ~all_dead if retry_limit else 0)
        m.d.sync += [
            update(used, clear=freed_here, set=start_here),
            update(ended, clear=freed_here, set=ends_here),
            update(
                unissued,
                clear=finish_here | cancel_here | expired_here,
                set=issues_here | retries_here,
            ),
            update(
                demand,
                clear=start_here,
                set=promote_here | (start_here & ~self.start.payload.prefetch.replicate(count)),
            ),
            update(cancelled, clear=start_here, set=cancel_here & ~late),
            update(failed, clear=begins_here, set=error_here | (start_here & all_dead)),
            update(
                may_retry,
                clear=start_here | (retries_here & last_retry.replicate(count)),
                set=retry_allowed,
            ),
            update(
                ordered,
                clear=_one_hot(first, count) & leave.replicate(count),
                set=_one_hot(joining, count) & join.replicate(count),
            ),
            update(given_up, clear=ends_here, set=expired_here),
            update(lost, set=expired_here),
            update(
                unfilled,
                clear=beat_here & taken.replicate(count),
                set=begins_here,
            ),
        ]
        promoted = Signal(count)  # in the cycle before: its bursts still count as prefetch's
        m.d.sync += promoted.eq(promote_here)
        promoted_bursts = Signal(range(config.max_outstanding + 1))
        for t in range(count):
            m.d.sync += owed[t].eq(owed[t] + issued_here[t] - last_here[t])
            with m.If(promoted[t]):
                m.d.comb += promoted_bursts.eq(owed[t])
        m.d.sync += [
            outstanding.eq(outstanding + splitter.issued - last_here.any()),
            prefetch_outstanding.eq(
                prefetch_outstanding
                + (issued_here & ~demand).any()
                - (last_here & ~demand).any()
                - promoted_bursts
            ),
        ]
        m.d.comb += [
            self.busy.eq(used.any()),
            self.prefetch_ready.eq(
                ~prefetch_valid
                & ~self.dead
                & free_valid
                & ~(at_end & wants_retry & ~demand).any()
                & (prefetch_outstanding < config.prefetch_outstanding)
            ),
        ]

        # Records ---
        bus_last = self.axi.r.payload.last
        bus_resp = self.axi.r.payload.resp
        bus_beat = self.axi.r.valid & self.axi.r.ready
        bus_here = _one_hot(self.axi.r.payload.id, count)
        worst = [Signal(2, name=f"worst_{t}") for t in range(count)]
        before = Signal(2)
        worst_now = Signal(2)
        for t in range(count):
            with m.If(bus_here[t]):
                m.d.comb += before.eq(worst[t])
                with m.If(bus_beat):
                    m.d.sync += worst[t].eq(Mux(bus_last, 0, worst_now))
        ar = self.axi.ar
        m.d.comb += [
            worst_now.eq(Mux(bus_resp > before, bus_resp, before)),
            self.record_last.valid.eq(bus_beat & bus_last),
            self.record_last.transfer.eq(self.axi.r.payload.id),
            self.record_last.resp.eq(worst_now),
            self.record_burst.valid.eq(ar.valid & ar.ready),
            self.record_burst.transfer.eq(ar.payload.id),
            self.record_burst.prefetch.eq(~demand.bit_select(ar.payload.id, 1)),
            self.record_burst.addr.eq(ar.payload.addr),
            self.record_burst.len.eq(ar.payload.len),
            self.record_retry.valid.eq(retrying),
            self.record_retry.transfer.eq(chosen),
        ]
        return m
