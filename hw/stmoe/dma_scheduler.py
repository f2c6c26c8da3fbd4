# SPDX-License-Identifier: Apache-2.0
"""Loads experts over AXI: order of bursts, retry, cancel and drain, watchdog."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .burst_splitter import BurstSplitter
from .head_queue import HeadQueue
from .payloads import (
    ERROR_RESPONSE_BIT,
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


def _lowest(mask: Value) -> Value:
    """The lowest set bit of ``mask`` alone."""
    return Cat(mask[i] & ~mask[:i].any() for i in range(len(mask)))


def _index(mask: Value) -> Value:
    """Index of the lowest set bit of ``mask``; any when none is set."""
    lowest = _lowest(mask)
    bits = (len(mask) - 1).bit_length()
    return Cat(Cat(lowest[i] for i in range(len(mask)) if i >> b & 1).any() for b in range(bits))


class DmaScheduler(wiring.Component):
    """Carries loads from the tiers to the expert buffer as AXI read bursts.

    Every load in flight is a *transfer*; its index is the AXI ID of its bursts, so its beats come
    in order, and those of different transfers may come in any order. Bursts of demands go before
    those of prefetches, demands in the order in which they became demands. The choice is made
    anew for every burst: a prefetch address that follows a demand is on the bus one cycle after
    the demand was taken, at the latest.

    **Start.** What a load brings with it is taken while its transfer is the next one free, so only
    the handshake itself comes from ``start.valid``; and the segment table is read for the layer on
    ``start`` before the load is taken: that layer should stand there one cycle before.

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

    **Buffer behind AXI.** With ``config.buffer`` = axi a transfer also has its end only when no
    write is owed to it (``writes_owed``), its cancel is late only from then on, a failed write
    counts as a read error, and the watchdog counts what is owed by the buffer, handshakes on its
    bus, and beats only in the cycle in which they are taken: a buffer that has gone silent is
    found as a memory is.

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
        ``promote`` or just before a load starts again, and (a prefetch) while another prefetch has
        bursts left to issue. The beats of its layer's segments together fit in the slot.
        ``start.payload.layer`` must have been the same in the cycle before ``start.valid`` rises.
        Taken in cycle c, with nothing else that wants the bus: ``axi.ar.valid`` in cycle c+3 if
        the layer was the same in cycle c-2 already, else in c+4.
    start_transfer : :py:`Out(transfer_bits)`
        Index that the load gets if it is taken in this cycle; a register's output.
    promote, promote_transfer : :py:`In(1)`, :py:`In(transfer_bits)`
        One cycle: this transfer is a demand from the next cycle on. Its bursts on their way count
        as demand's. Without effect on one that is cancelled or has ended.
    cancel, cancel_transfer : :py:`In(1)`, :py:`In(transfer_bits)`
        One cycle: see above. Ignored when ``cancel_late`` is high, so ``cancel`` need not wait
        for it: better it does not, for ``cancel`` holds back the next address in any case.
    cancel_late : :py:`Out(1)`
        Combinational from ``cancel_transfer`` and ``fill.ready``.
    completion : :py:`Out(stream.Signature(completion_layout(config)))`
        Registers' outputs. The index is free again when this is taken; after TIMEOUT only if
        ``dead``, and that of a demand cancelled before it had issued all only when those before it
        have.
    prefetch_ready : :py:`Out(1)`
        A prefetch may start: no prefetch has bursts left to issue or waits for a retry, a
        transfer is free, and fewer than ``prefetch_outstanding`` prefetch bursts are on their way.
        A register's output, which rises up to two cycles late and falls in time.
    hold : :py:`In(1)`
        Present no new address from the next cycle on.
    segment_write, bank : :py:`In(stream.Signature(segment_write_layout(config)))`, :py:`In(1)`
        See :class:`BurstSplitter`: a load keeps to the set of segments of the cycle before it is
        taken; the other set may be written while ``old_segments`` is low.
    old_segments : :py:`Out(1)`
        A load that has not ended keeps to the set that ``bank`` does not name. A register's
        output, which follows two cycles later.
    axi : :py:`Out(axi4_read_signature(config))`
        ``ar`` and ``r.ready`` are registers' outputs. A burst counts as on its way up to two
        cycles longer than it is.
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
    fill_transfer, fill_last, expired : Out
        With a buffer behind AXI, for :class:`BufferWriter`: transfer of the beat on ``fill`` or
        discarded, whether it is the last of its burst; the watchdog gives loads up.
    writes_owed, write_failed, write_moved : In
        With a buffer behind AXI, from :class:`BufferWriter`: its ``owed``, ``failed``, ``moved``.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        transfer = config.transfer_bits
        writer = {
            "fill_transfer": Out(transfer),
            "fill_last": Out(1),
            "expired": Out(1),
            "writes_owed": In(config.transfers),
            "write_failed": In(config.transfers),
            "write_moved": In(1),
        }
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
                "bank": In(1),
                "old_segments": Out(1),
                "axi": Out(axi4_read_signature(config)),
                "fill": Out(stream.Signature(fill_layout(config))),
                "record_burst": Out(burst_record_layout(config)),
                "record_last": Out(last_record_layout(config)),
                "record_retry": Out(retry_record_layout(config)),
                "discard": Out(1),
                "busy": Out(1),
                "dead": Out(1),
                **(writer if config.buffer == "axi" else {}),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        count = config.transfers
        index_bits = config.transfer_bits
        behind_axi = config.buffer == "axi"

        def here(index: Value, condition: Value) -> Value:
            """Bit ``index`` of ``count`` bits, when ``condition``."""
            return Cat((index == i) & condition for i in range(count))

        def all_of(condition: Value) -> Value:
            return condition.replicate(count)

        # One bit for each transfer ---
        used = Signal(count)  # from `start` until its completion is taken
        live = Signal(count)  # from `start` until its completion is queued
        unissued = Signal(count)  # has bursts that have not been presented
        demand = Signal(count)
        cancelled = Signal(count)
        failed = Signal(count)  # a beat of this pass had an error
        may_retry = Signal(count)
        given_up = Signal(count)  # by the watchdog
        lost = Signal(count)  # its ID has beats owed that may never come
        unfilled = Signal(count)  # no beat of this pass has come
        bank = Signal(count)  # set of segments that it keeps to

        # Bursts on their way: presented, and last beat not yet taken.
        owed = [Signal(range(config.max_outstanding + 1), name=f"owed_{t}") for t in range(count)]
        nothing_owed = Signal(count, init=-1)
        fills = Signal(count)  # its beats go to `fill`: owed, and neither cancelled nor lost
        last_owed = Signal(count)
        outstanding = Signal(range(config.max_outstanding + 1))
        prefetch_outstanding = Signal(range(config.max_outstanding + 1))
        m.d.comb += last_owed.eq(Cat(n == 1 for n in owed))

        expire = Signal()
        disturbed = Signal()  # in the cycle before came a cancel, a promotion or the watchdog
        m.d.sync += disturbed.eq(self.cancel | self.promote | expire)
        m.submodules.splitter = splitter = BurstSplitter(config)
        wiring.connect(m, splitter.segment_write, wiring.flipped(self.segment_write))
        wiring.connect(m, splitter.ar, wiring.flipped(self.axi.ar))
        m.d.comb += splitter.bank.eq(self.bank)

        # Demands in the order in which they became demands. One that has no bursts left, because
        # they are issued, it was cancelled or given up, leaves when it is the first; so long its
        # index is not used again, so that each index is in it at most once.
        m.submodules.order = order = HeadQueue(unsigned(index_bits), depth=count)
        ordered = Signal(count)  # transfers that are in it
        first = order.o.payload
        first_valid = order.o.valid
        # It has bursts left. When they end, this is known one cycle late: the splitter cannot
        # present any in that cycle, since it has finished or `disturbed` keeps it from it.
        first_issues = Signal()
        join = Signal()
        joining = Signal(index_bits)
        joined_here = Signal(count)
        leave = Signal()
        m.d.comb += [
            leave.eq(first_valid & ~first_issues),
            order.o.ready.eq(leave),
            order.i.valid.eq(join),
            order.i.payload.eq(joining),
        ]
        with m.If(expire):
            m.d.sync += first_issues.eq(0)
        with m.Elif(first_valid & first_issues):
            m.d.sync += first_issues.eq(unissued.bit_select(first, 1))
        with m.Elif(order.second_valid):
            m.d.sync += first_issues.eq(unissued.bit_select(order.second, 1))
        with m.Else():
            # One that joins has bursts; if none does, nobody asks.
            m.d.sync += first_issues.eq(1)
        # A prefetch has bursts left to issue; that it has none any more is known as late.
        prefetch_valid = Signal()
        prefetch = Signal(index_bits)
        prefetch_issues = Signal()
        m.d.comb += prefetch_issues.eq(prefetch_valid & unissued.bit_select(prefetch, 1))

        # Start ---
        # `start_transfer` is looked for in the cycle before. What a load brings with it is taken
        # in every cycle in which its transfer is the one that would start, so that it does not
        # wait for the handshake.
        free = Signal(count)
        free_valid = Signal()
        next_here = Signal(count)  # bit `start_transfer`, if `free_valid`
        retry = Signal(index_bits)  # starts again, if `retry_found`
        retry_found = Signal()
        may_start = Signal()  # but for what comes for one cycle only
        started = Signal()
        start_issues = Signal()
        load = self.start.payload
        m.d.comb += [
            free.eq(~used & ~ordered & (~lost | all_of(self.dead)) & ~next_here),
            may_start.eq(free_valid & ~(load.prefetch & prefetch_valid)),
            self.start.ready.eq(may_start & ~expire & ~retry_found & ~self.promote),
            started.eq(self.start.valid & self.start.ready),
            start_issues.eq(started & ~splitter.start_empty & ~self.dead),
        ]
        with m.If(started | ~free_valid):
            m.d.sync += [
                free_valid.eq(free.any()),
                next_here.eq(_lowest(free)),
                self.start_transfer.eq(_index(free)),
            ]
        m.d.comb += [
            splitter.start.eq(started),
            splitter.start_offered.eq(self.start.valid),
            splitter.start_transfer.eq(self.start_transfer),
            splitter.start_layer.eq(load.layer),
            splitter.start_expert.eq(load.expert),
            splitter.start_next.eq(may_start & ~splitter.start_empty & ~self.dead & ~first_valid),
        ]

        # Beats ---
        # What is decided by goes through registers, the data through two words of LUT RAM.
        bus = self.axi.r
        m.submodules.beats = beats = SkidBuffer(
            data.StructLayout({"id": index_bits, "here": count, "error": 1, "last": 1})
        )
        beat = beats.o.payload
        m.submodules.words = words = Memory(
            shape=config.axi_data_width, depth=2, init=[], attrs={"ram_style": "distributed"}
        )
        words_write = words.write_port()
        words_read = words.read_port(domain="comb")
        taken = Signal()
        offered = Signal()  # `fill` has not taken it yet, so it must stay
        opened = Signal()
        last_taken = Signal()
        m.d.comb += [
            beats.i.valid.eq(bus.valid),
            bus.ready.eq(beats.i.ready),
            beats.i.payload.id.eq(bus.payload.id),
            beats.i.payload.here.eq(here(bus.payload.id, Const(1))),
            beats.i.payload.error.eq(bus.payload.resp[ERROR_RESPONSE_BIT]),
            beats.i.payload.last.eq(bus.payload.last),
            words_write.data.eq(bus.payload.data),
            words_write.en.eq(bus.ready),
            opened.eq((beat.here & fills).any() | offered),
            self.fill.valid.eq(beats.o.valid & opened),
            taken.eq(beats.o.valid & (self.fill.ready | ~opened)),
            beats.o.ready.eq(taken),
            self.discard.eq(beats.o.valid & ~opened),
            last_taken.eq(taken & beat.last),
        ]
        m.d.sync += offered.eq(self.fill.valid & ~self.fill.ready)
        with m.If(bus.valid & bus.ready):
            m.d.sync += words_write.addr.eq(~words_write.addr)
        with m.If(taken):
            m.d.sync += words_read.addr.eq(~words_read.addr)
        beat_here = Signal(count)
        error_here = Signal(count)
        m.d.comb += beat_here.eq(beat.here & ~nothing_owed & all_of(taken))
        wrong_here = beat_here & all_of(beat.error)
        if behind_axi:
            wrong_here |= self.write_failed
        m.d.comb += error_here.eq(wrong_here)

        first_beat = Signal()
        m.d.comb += first_beat.eq((unfilled & beat.here).any())
        m.submodules.slots = slots = Memory(shape=config.slot_bits, depth=count, init=[])
        slots_write = slots.write_port()
        slots_read = slots.read_port(domain="comb")
        m.submodules.offsets = offsets = Memory(shape=config.offset_bits, depth=count, init=[])
        offsets_write = offsets.write_port()
        offsets_read = offsets.read_port(domain="comb")
        m.d.comb += [
            slots_write.addr.eq(self.start_transfer),
            slots_write.data.eq(load.slot),
            slots_write.en.eq(free_valid),
            slots_read.addr.eq(beat.id),
            offsets_read.addr.eq(beat.id),
            offsets_write.addr.eq(beat.id),
            offsets_write.data.eq(Mux(first_beat, 1, offsets_read.data + 1)),
            offsets_write.en.eq(taken),
            self.fill.payload.slot.eq(slots_read.data),
            self.fill.payload.offset.eq(Mux(first_beat, 0, offsets_read.data)),
            self.fill.payload.data.eq(words_read.data),
        ]

        # End ---
        # At its end a transfer either completes or starts again. One of each is looked for in
        # one cycle and dealt with in the next. The one that completes cannot change any more.
        at_end = Signal(count)
        wants_retry = Signal(count)
        completes = Signal(count)
        going = Signal(count)
        ends_here = Signal(count)
        ends = Signal()
        ending = Signal(index_bits)
        all_here = nothing_owed
        if behind_axi:
            all_here = nothing_owed & ~self.writes_owed
        m.d.comb += [
            at_end.eq(live & ~unissued & (all_here | lost)),
            wants_retry.eq(failed & may_retry & ~cancelled),
            completes.eq(at_end & ~wants_retry),
            going.eq(live & ~completes),
        ]
        to_end = Signal(count)
        m.d.comb += to_end.eq(completes & ~ends_here)
        m.d.sync += [
            ends.eq(to_end.any()),
            ends_here.eq(_lowest(to_end)),
            ending.eq(_index(to_end)),
        ]

        m.submodules.completions = completions = HeadQueue(completion_layout(config), depth=count)
        m.d.comb += [
            completions.i.valid.eq(ends),
            completions.i.payload.transfer.eq(ending),
        ]
        with m.If((ends_here & given_up).any()):
            m.d.comb += completions.i.payload.status.eq(CompletionStatus.TIMEOUT)
        with m.Elif((ends_here & cancelled).any()):
            m.d.comb += completions.i.payload.status.eq(CompletionStatus.DRAINED)
        with m.Elif((ends_here & failed).any()):
            m.d.comb += completions.i.payload.status.eq(CompletionStatus.ERROR)
        with m.Else():
            m.d.comb += completions.i.payload.status.eq(CompletionStatus.DONE)
        wiring.connect(m, completions.o, wiring.flipped(self.completion))
        freed_here = here(
            self.completion.payload.transfer, self.completion.valid & self.completion.ready
        )

        # Cancel and promote ---
        # The beat that `fill` takes in this cycle may be what a transfer waits for to complete.
        completing = Signal(count)
        last_filled = Signal()
        promote_here = Signal(count)
        promote_issues = Signal()
        m.d.comb += [
            # Behind AXI no beat is the end: its answer is.
            last_filled.eq(0 if behind_axi else beats.o.valid & self.fill.ready & beat.last),
            completing.eq(
                beat.here
                & last_owed
                & ~unissued
                & ~cancelled
                & ~((failed | all_of(beat.error)) & may_retry)
            ),
            self.cancel_late.eq(
                ~going.bit_select(self.cancel_transfer, 1)
                | (last_filled & completing.any() & (beat.id == self.cancel_transfer))
                | expire
            ),
        ]
        promotes = self.promote & ~expire
        promotes &= ~(self.cancel & (self.cancel_transfer == self.promote_transfer))
        m.d.comb += [
            promote_here.eq(
                here(self.promote_transfer, promotes) & live & ~lost & ~cancelled & ~demand
            ),
            promote_issues.eq(promotes & prefetch_issues & (self.promote_transfer == prefetch)),
        ]
        cancel_here = here(self.cancel_transfer, self.cancel)
        # Only `cancelled` looks whether it is late: what is late has no bursts left in any case.
        cancelled_here = Signal(count)
        m.d.comb += cancelled_here.eq(
            cancel_here & going & ~(completing & all_of(last_filled)) & all_of(~expire)
        )

        # Issue ---
        # What is on its way may be counted too high for a cycle or two, never too low.
        room = Signal()
        prefetch_room = Signal()
        issued_here = here(splitter.issued_transfer, splitter.issued)
        finish_here = Signal(count)
        m.d.comb += [
            splitter.wanted_valid.eq(Mux(first_valid, first_issues, prefetch_valid)),
            splitter.wanted.eq(Mux(first_valid, first, prefetch)),
            splitter.room.eq(room & (first_valid | prefetch_room)),
            splitter.pause.eq(self.hold | self.cancel | disturbed | expire),
            finish_here.eq(here(splitter.issued_transfer, splitter.issued & splitter.issued_last)),
        ]

        # Retry ---
        # One is found in one cycle, looked at in the next and starts again in a third. It is
        # found anew when anything came between that may have changed it.
        retry_limit = config.retry_limit
        found_here = Signal(count)
        found_index = Signal(index_bits)
        found = Signal()
        retry_here = Signal(count)
        retry_demand = Signal()
        retry_number = Signal(range(retry_limit + 1))
        retrying = Signal()
        retries_here = Signal(count)
        m.d.comb += retries_here.eq(retry_here & all_of(retrying))
        if retry_limit:
            to_retry = Signal(count)
            m.submodules.retries = retries = Memory(
                shape=range(retry_limit + 1), depth=count, init=[]
            )
            retries_write = retries.write_port()
            retries_read = retries.read_port(domain="comb")
            changes = self.promote | self.cancel | expire | disturbed
            m.d.comb += [
                to_retry.eq(
                    at_end
                    & wants_retry
                    & ~found_here
                    & ~retry_here
                    & (demand | all_of(~prefetch_valid))
                ),
                retrying.eq(retry_found & ~changes & (retry_demand | ~prefetch_valid)),
                retries_read.addr.eq(found_index),
                retries_write.addr.eq(Mux(retry_found, retry, self.start_transfer)),
                retries_write.data.eq(Mux(retry_found, retry_number, 0)),
                retries_write.en.eq(Mux(retry_found, retrying, free_valid)),
            ]
            m.d.sync += [
                found.eq(to_retry.any()),
                found_here.eq(_lowest(to_retry)),
                found_index.eq(_index(to_retry)),
                retry_found.eq(found & ~changes),
                retry_here.eq(found_here),
                retry.eq(found_index),
                retry_demand.eq((found_here & demand).any()),
                retry_number.eq(retries_read.data + 1),
            ]

        # Who issues next ---
        m.d.comb += [
            splitter.begin.eq(next_here | retries_here),
            join.eq((start_issues & ~load.prefetch) | promote_issues | (retrying & retry_demand)),
            joined_here.eq(
                (next_here & all_of(start_issues & ~load.prefetch))
                | here(self.promote_transfer, promote_issues)
                | (retry_here & all_of(retrying & retry_demand))
            ),
            joining.eq(
                Mux(
                    self.promote,
                    self.promote_transfer,
                    Mux(retry_found, retry, self.start_transfer),
                )
            ),
        ]
        with m.If(start_issues & load.prefetch):
            m.d.sync += prefetch_valid.eq(1)
        with m.Elif(retrying & ~retry_demand):
            m.d.sync += prefetch_valid.eq(1)
        with m.Elif(promote_issues | expire):
            m.d.sync += prefetch_valid.eq(0)
        with m.Else():
            m.d.sync += prefetch_valid.eq(prefetch_issues)
        with m.If(~prefetch_valid):
            m.d.sync += prefetch.eq(Mux(retry_found, retry, self.start_transfer))

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
            expired_here.eq(going & all_of(expire)),
        ]
        if behind_axi:
            m.d.comb += [
                self.fill_transfer.eq(beat.id),
                self.fill_last.eq(beat.last),
                self.expired.eq(expire),
                waiting.eq(
                    (used & (~nothing_owed | self.writes_owed) & ~lost).any()
                    | (self.axi.ar.valid & ~self.dead)
                ),
                active.eq(
                    ~waiting
                    | expire
                    | (self.axi.ar.valid & self.axi.ar.ready)
                    | (self.axi.r.valid & self.axi.r.ready)
                    | taken
                    | self.write_moved
                ),
            ]
        m.d.sync += [
            silence.eq(Mux(active, 0, silence + 1)),
            expire.eq(~active & (silence == config.watchdog_cycles - 1)),
        ]
        with m.If(expire & (self.axi.ar.valid | (outstanding == config.max_outstanding))):
            m.d.sync += self.dead.eq(1)
        with m.If(lost.all()):
            m.d.sync += self.dead.eq(1)

        # Next state of every transfer ---
        lost_next, cancelled_next = Signal(count), Signal(count)
        nothing_owed_next = Signal(count)
        m.d.comb += [
            lost_next.eq(lost | expired_here),
            cancelled_next.eq(~next_here & (cancelled | cancelled_here)),
        ]
        m.d.sync += [
            used.eq((used & ~freed_here) | (next_here & all_of(started))),
            live.eq((live & ~ends_here) | (next_here & all_of(started))),
            given_up.eq(~next_here & (given_up | expired_here)),
            lost.eq(lost_next),
            cancelled.eq(cancelled_next),
            nothing_owed.eq(nothing_owed_next),
            fills.eq(~(nothing_owed_next | cancelled_next | lost_next)),
            unfilled.eq(next_here | retries_here | (unfilled & ~beat_here)),
            ordered.eq((ordered & ~here(first, leave)) | joined_here),
        ]
        issues = ~splitter.start_empty & ~self.dead
        for t in range(count):
            with m.If(next_here[t]):
                m.d.sync += [
                    unissued[t].eq(issues),
                    bank[t].eq(splitter.start_bank),
                    demand[t].eq(~load.prefetch),
                    failed[t].eq(self.dead),
                    may_retry[t].eq(~self.dead if retry_limit else 0),
                ]
            with m.Else():
                m.d.sync += [
                    unissued[t].eq(
                        (unissued[t] | retries_here[t])
                        & ~(finish_here[t] | cancel_here[t] | expire)
                    ),
                    demand[t].eq(demand[t] | promote_here[t]),
                    failed[t].eq((failed[t] & ~retries_here[t]) | error_here[t]),
                    may_retry[t].eq(
                        may_retry[t] & ~(retries_here[t] & (retry_number == retry_limit)) & ~expire
                    ),
                ]
        promoted = Signal(count)  # in the cycle before: its bursts still count as prefetch's
        m.d.sync += promoted.eq(promote_here)
        promoted_bursts = Signal(range(config.max_outstanding + 1))
        # Whether a beat is taken is known late: what follows from it either way stands there.
        ends_burst = beat.here & ~nothing_owed & all_of(beat.last)
        for t in range(count):
            fewer, otherwise = Signal.like(owed[t]), Signal.like(owed[t])
            m.d.comb += [
                otherwise.eq(owed[t] + issued_here[t]),
                fewer.eq(Mux(issued_here[t], owed[t], owed[t] - 1)),
            ]
            m.d.sync += owed[t].eq(Mux(taken & ends_burst[t], fewer, otherwise))
            m.d.comb += nothing_owed_next[t].eq(
                ~issued_here[t] & (nothing_owed[t] | (taken & ends_burst[t] & last_owed[t]))
            )
            with m.If(promoted[t]):
                m.d.comb += promoted_bursts.eq(owed[t])

        # Fewer are counted a cycle late.
        issued_prefetch = Signal()
        ended_burst = Signal()
        fewer_prefetch = Signal(range(config.max_outstanding + 1))
        m.d.comb += issued_prefetch.eq(
            splitter.issued & ~demand.bit_select(splitter.issued_transfer, 1)
        )
        m.d.sync += [
            ended_burst.eq(last_taken & (beat.here & ~nothing_owed).any()),
            fewer_prefetch.eq(
                promoted_bursts + (last_taken & (beat.here & ~nothing_owed & ~demand).any())
            ),
            outstanding.eq(outstanding + splitter.issued - ended_burst),
            room.eq(outstanding + splitter.issued < config.max_outstanding),
            prefetch_outstanding.eq(prefetch_outstanding + issued_prefetch - fewer_prefetch),
            prefetch_room.eq(prefetch_outstanding + issued_prefetch < config.prefetch_outstanding),
            self.prefetch_ready.eq(
                ~prefetch_valid
                & ~self.dead
                & ~expire
                & free_valid
                & ~started
                & ~retry_found
                & ~(at_end & wants_retry & ~demand).any()
                & (prefetch_outstanding < config.prefetch_outstanding)
            ),
        ]
        m.d.comb += self.busy.eq(used.any())
        m.d.sync += self.old_segments.eq((used & (bank ^ all_of(self.bank))).any())

        # Records ---
        bus_last = self.axi.r.payload.last
        bus_resp = self.axi.r.payload.resp
        bus_beat = self.axi.r.valid & self.axi.r.ready
        worst = [Signal(2, name=f"worst_{t}") for t in range(count)]
        before = Signal(2)
        worst_now = Signal(2)
        for t in range(count):
            with m.If(beats.i.payload.here[t]):
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
            self.record_retry.transfer.eq(retry),
        ]
        return m
