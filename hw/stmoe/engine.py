# SPDX-License-Identifier: Apache-2.0
"""The prefetch engine: predictor, slot manager, DMA scheduler, registers and event port."""

from __future__ import annotations

from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from stmoe_golden.config import EngineConfig

from .buffer_writer import BufferWriter
from .dma_scheduler import DmaScheduler
from .event_port import EventPort
from .payloads import (
    EventKind,
    axi4_lite_signature,
    axi4_read_signature,
    axi4_write_signature,
    event_layout,
    fill_layout,
    grant_layout,
    release_layout,
    route_layout,
    token_layout,
)
from .predictor import Predictor
from .register_map import COUNTER_INDEX, addr_width
from .registers import Registers
from .slot_manager import SlotManager

__all__ = ["Engine"]


class Engine(wiring.Component):
    """Watches routing, predicts the next experts and has their weights on chip in time.

    It never changes a routing decision. Clock domain ``sync``; after reset the tables are cleared
    for ``num_layers * num_experts * folds`` cycles, during which no token is taken.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Everything: shape of the model, sizes of the buffer and of the AXI port.

    Members
    -------
    token : :py:`In(stream.Signature(token_layout(config)))`
        A token begins; each token of a sequence has one beat, before its first route.
    route : :py:`In(stream.Signature(route_layout(config)))`
        The router's decision for the token in one layer, layers in order.
    grant : :py:`Out(stream.Signature(grant_layout(config)))`
        One for each expert of each route, in the order in which they become ready.
    release : :py:`In(stream.Signature(release_layout(config)))`
        One for each grant without error, when its expert has been used.
    axi : :py:`Out(axi4_read_signature(config))`
        Reads the experts.
    fill : :py:`Out(stream.Signature(fill_layout(config)))`
        Writes them into the buffer, where ``config.buffer`` is banks.
    buffer : :py:`Out(axi4_write_signature(config))`
        Writes them into the buffer, where ``config.buffer`` is axi.
    axil : :py:`In(axi4_lite_signature(addr_width(config)))`
        Registers, see docs/registers.md.
    events : :py:`Out(stream.Signature(event_layout(config)))`
        What the engine did and when; present when ``config.event_port``.
    irq : :py:`Out(1)`
        Level: error, watchdog, illegal event, counter about to wrap, commit refused.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = c = config
        members = {
            "token": In(stream.Signature(token_layout(c))),
            "route": In(stream.Signature(route_layout(c))),
            "grant": Out(stream.Signature(grant_layout(c))),
            "release": In(stream.Signature(release_layout(c))),
            "axi": Out(axi4_read_signature(c)),
            **(
                {"buffer": Out(axi4_write_signature(c))}
                if c.buffer == "axi"
                else {"fill": Out(stream.Signature(fill_layout(c)))}
            ),
            "axil": In(axi4_lite_signature(addr_width(c))),
            "irq": Out(1),
        }
        if c.event_port:
            members["events"] = Out(stream.Signature(event_layout(c)))
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        c = self.config
        m.submodules.registers = registers = Registers(c)
        m.submodules.predictor = predictor = Predictor(c)
        m.submodules.manager = manager = SlotManager(c)
        m.submodules.dma = dma = DmaScheduler(c)

        for name in ("token", "route", "release", "grant"):
            connect(m, getattr(manager, name), flipped(getattr(self, name)))
        connect(m, dma.axi, flipped(self.axi))
        if c.buffer == "axi":
            m.submodules.writer = writer = BufferWriter(c)
            connect(m, dma.fill, writer.fill)
            connect(m, writer.axi, flipped(self.buffer))
            m.d.comb += [
                writer.fill_transfer.eq(dma.fill_transfer),
                writer.fill_last.eq(dma.fill_last),
                writer.drop.eq(dma.discard),
                writer.abort.eq(dma.expired),
                writer.place.eq(registers.place),
                dma.writes_owed.eq(writer.owed),
                dma.write_failed.eq(writer.failed),
                dma.write_moved.eq(writer.moved),
                manager.relocates.eq(registers.relocates),
                manager.writer_idle.eq(writer.idle),
            ]
        else:
            connect(m, dma.fill, flipped(self.fill))
        connect(m, registers.axil, flipped(self.axil))
        connect(m, registers.segment_write, dma.segment_write)
        m.d.comb += [
            dma.bank.eq(registers.segment_bank),
            registers.old_segments.eq(dma.old_segments),
        ]

        connect(m, manager.predictor_token, predictor.token)
        connect(m, manager.predictor_route, predictor.route)
        connect(m, predictor.selected, manager.selected)
        m.d.comb += [
            manager.commit_request.eq(predictor.commit_request),
            manager.select_layer.eq(predictor.select_layer),
            predictor.commit_grant.eq(manager.commit_grant),
            manager.commit_done.eq(predictor.commit_done),
            predictor.absent.eq(manager.absent),
            predictor.victim_layer.eq(manager.victim_layer),
            manager.victim_score.eq(predictor.victim_score),
            manager.victim_use.eq(predictor.victim_use),
            predictor.threshold.eq(manager.select_threshold),
            predictor.learning.eq(registers.learning),
            predictor.ordered.eq(registers.ordered),
            predictor.kinds.eq(registers.kinds),
            predictor.prefetching.eq(registers.prefetching),
            predictor.read_index.eq(registers.read_index),
            predictor.read_request.eq(registers.read_request),
            registers.read_valid.eq(predictor.read_valid),
            registers.read_value.eq(predictor.read_value),
        ]
        if c.look > 1:
            m.d.comb += [
                manager.farther.eq(registers.farther),
                predictor.farther_absent.eq(manager.farther_absent),
                predictor.farther_threshold.eq(manager.farther_threshold),
            ]
        if c.folds > 1:
            m.d.comb += [
                predictor.victim_fold.eq(manager.victim_fold),
                manager.victim_wait.eq(predictor.victim_wait),
            ]

        connect(m, manager.start, dma.start)
        connect(m, dma.completion, manager.completion)
        m.d.comb += [
            manager.start_transfer.eq(dma.start_transfer),
            dma.promote.eq(manager.promote),
            dma.promote_transfer.eq(manager.promote_transfer),
            dma.cancel.eq(manager.cancel),
            dma.cancel_transfer.eq(manager.cancel_transfer),
            manager.cancel_late.eq(dma.cancel_late),
            manager.prefetch_ready.eq(dma.prefetch_ready),
        ]

        m.d.comb += [
            manager.register_request.eq(registers.commit_request),
            registers.commit_grant.eq(manager.register_grant),
            manager.threshold_changed.eq(registers.threshold_changed),
            manager.threshold.eq(registers.threshold),
            manager.adaptive.eq(registers.adaptive),
            manager.quota.eq(registers.quota),
            registers.initialised.eq(predictor.clear_done & manager.initialised),
            registers.busy.eq(
                manager.busy | dma.busy | ~predictor.route.ready | predictor.commit_request
            ),
            self.irq.eq(registers.irq),
        ]

        # Counters: the manager's, and those of the AXI port.
        burst, last, retry = dma.record_burst, dma.record_last, dma.record_retry
        counting = {
            "demand_bursts": burst.valid & ~burst.prefetch,
            "prefetch_bursts": burst.valid & burst.prefetch,
            "last_beats": last.valid,
            "beats": self.axi.r.valid & self.axi.r.ready,
            "discarded_beats": dma.discard,
            "retries": retry.valid,
        }
        # A cycle late: it is far from the blocks to the counters.
        m.d.sync += registers.increment.eq(manager.increment)
        for name, pulse in counting.items():
            m.d.sync += registers.increment[COUNTER_INDEX[name]].eq(pulse)
        for name, counter in (
            ("error", "errors"),
            ("watchdog", "timeouts"),
            ("illegal", "illegal"),
        ):
            m.d.sync += getattr(registers, name).eq(manager.increment[COUNTER_INDEX[counter]])

        if c.event_port:
            m.submodules.event_port = port = EventPort(c)
            connect(m, port.events, flipped(self.events))
            m.d.comb += [
                port.cycle.eq(registers.cycle),
                port.operation.eq(manager.record),
                port.selection.eq(manager.selection_record),
                port.grant.eq(manager.grant_record),
                port.burst.valid.eq(burst.valid),
                port.burst.kind.eq(EventKind.BURST),
                port.burst.expert.eq(burst.transfer),
                port.burst.flag.eq(burst.prefetch),
                port.burst.data.eq(burst.addr),
                port.last_beat.valid.eq(last.valid),
                port.last_beat.kind.eq(EventKind.LAST_BEAT),
                port.last_beat.expert.eq(last.transfer),
                port.last_beat.flag.eq(last.resp),
                port.retry.valid.eq(retry.valid),
                port.retry.kind.eq(EventKind.RETRY),
                port.retry.expert.eq(retry.transfer),
                manager.hold.eq(port.hold),
                dma.hold.eq(port.hold),
            ]
        return m
