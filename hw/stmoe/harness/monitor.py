# SPDX-License-Identifier: Apache-2.0
"""Watches the harness's own buses: totals, protocol checks, and the log that golden replays."""

from __future__ import annotations

import enum

from amaranth.hdl import (
    Array,
    Cat,
    Elaboratable,
    Format,
    Module,
    Mux,
    Print,
    Signal,
    Value,
    unsigned,
)
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from stmoe.harness.content_checker import Fault, observed
from stmoe.payloads import (
    CYCLE_BITS,
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
from stmoe.register_map import addr_width
from stmoe_golden.config import PAGE_BYTES, EngineConfig

__all__ = ["LogPrinter", "Monitor", "Watched"]

COUNT_BITS = 32


class Watched(enum.IntEnum):
    """The streams that are watched (field ``a`` of a log line ``@X`` of an unstable stream)."""

    TOKEN = 0
    ROUTE = 1
    GRANT = 2
    RELEASE = 3
    FILL = 4
    AR = 5
    R = 6
    EVENT = 7
    AW = 8
    W = 9
    B = 10


class Monitor(wiring.Component):
    """Counts what passes on the buses and checks their protocol. Drives none of them.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    token, route, grant, release, fill, ar, r, event : :py:`In(observed(...))`
        The engine's streams; ``event`` only with ``config.event_port``. Where the buffer is behind
        AXI, ``fill`` is what has been written, and ``aw``, ``w`` and ``b`` are its bus.
    axil_aw, axil_w : :py:`In(observed(...))`
        The write channels of the engine's registers.
    outside : :py:`In(1)`
        Where the buffer is behind AXI: the address taken on ``aw`` is not in it.
    irq, finished, waiting : :py:`In(1)`
        The engine's interrupt; the accelerator's strobes.
    content_fault, content_slot, content_beats, content_address, held_fault, unheld_fault
        From :class:`ContentChecker`.
    cycle : :py:`Out(40)`
        Cycles since reset; equals the engine's own count.
    tokens_finished : :py:`Out(32)`
    fill_beats : :py:`Out(40)`
        Beats that the engine has put into the buffer.
    r_beats : :py:`Out(40)`
        R handshakes.
    link_cycles : :py:`Out(40)`
        Cycles with a burst outstanding.
    wait_cycles : :py:`Out(40)`
        Cycles in which the accelerator stood still for want of an expert.
    since_activity : :py:`Out(32)`
        Cycles since the last handshake on any watched stream (saturating).
    progress : :py:`Out(1)`
        A handshake of token, route or grant, or a finished token.
    violations : :py:`Out(16)`
        Faults seen (saturating); what they were is in the log.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        axi = axi4_read_signature(config)
        address_bits = addr_width(config)
        axil = axi4_lite_signature(address_bits)
        self._layouts = {
            Watched.TOKEN: token_layout(config),
            Watched.ROUTE: route_layout(config),
            Watched.GRANT: grant_layout(config),
            Watched.RELEASE: release_layout(config),
            Watched.FILL: fill_layout(config),
            Watched.AR: axi.members["ar"].signature.members["payload"].shape,
            Watched.R: axi.members["r"].signature.members["payload"].shape,
        }
        if config.event_port:
            self._layouts[Watched.EVENT] = event_layout(config)
        self._behind_axi = config.buffer == "axi"
        if self._behind_axi:
            buffer = axi4_write_signature(config).members
            for kind in (Watched.AW, Watched.W, Watched.B):
                channel = buffer[kind.name.lower()].signature
                self._layouts[kind] = channel.members["payload"].shape
        members = {
            kind.name.lower(): In(observed(layout)) for kind, layout in self._layouts.items()
        }
        super().__init__(
            {
                **members,
                "axil_aw": In(observed(unsigned(address_bits))),
                "axil_w": In(observed(axil.members["w"].signature.members["payload"].shape)),
                "irq": In(1),
                "finished": In(1),
                "waiting": In(1),
                **({"outside": In(1)} if self._behind_axi else {}),
                "content_fault": In(1),
                "content_slot": In(config.slot_bits),
                "content_beats": In(config.offset_bits),
                "content_address": In(config.axi_addr_width),
                "held_fault": In(1),
                "unheld_fault": In(1),
                "cycle": Out(CYCLE_BITS),
                "tokens_finished": Out(COUNT_BITS),
                "fill_beats": Out(CYCLE_BITS),
                "r_beats": Out(CYCLE_BITS),
                "link_cycles": Out(CYCLE_BITS),
                "wait_cycles": Out(CYCLE_BITS),
                "since_activity": Out(COUNT_BITS),
                "progress": Out(1),
                "violations": Out(16),
            }
        )
        # For the log.
        self.register_write = Signal()
        self.register_address = Signal(address_bits)
        self.register_data = Signal(32)
        self.register_strobes = Signal(4)
        self.handshake = {kind: Signal(name=f"took_{kind.name.lower()}") for kind in self._layouts}
        self.irq_edge = Signal()
        self.burst_resp = Signal(2)
        """With the last beat: the worst response of its burst."""
        self.faults: dict[str, tuple[Signal, int, tuple]] = {}
        """What was seen in this cycle: (seen, code, fields) by name."""

        def fault(name: str, code: int, *fields):
            self.faults[name] = (Signal(name=f"fault_{name}"), code, fields)

        grant, ar = self.grant.payload, self.ar.payload
        for kind in self._layouts:
            fault(f"unstable_{kind.name.lower()}", Fault.UNSTABLE, int(kind))
        fault("bad_burst", Fault.BAD_BURST, ar.id, ar.len, ar.addr)
        fault("orphan_beat", Fault.ORPHAN_BEAT, self.r.payload.id)
        if self._behind_axi:
            aw = self.aw.payload
            fault("bad_write", Fault.BAD_WRITE, aw.id, aw.len, aw.addr)
        fault("unasked_grant", Fault.UNASKED_GRANT, grant.slot, grant.layer, grant.expert)
        fault("content", Fault.CONTENT, self.content_slot, self.content_beats, self.content_address)
        fault("held", Fault.FILL_WHILE_HELD, self.fill.payload.slot, self.fill.payload.offset)
        fault("unheld", Fault.UNHELD_RELEASE, self.release.payload.slot)

    def elaborate(self, platform):
        m = Module()
        config = self._config
        watched = {kind: getattr(self, kind.name.lower()) for kind in self._layouts}
        took = self.handshake
        for kind, bus in watched.items():
            m.d.comb += took[kind].eq(bus.valid & bus.ready)

        def fault(name: str, condition):
            m.d.comb += self.faults[name][0].eq(condition)

        # Totals.
        m.d.sync += [
            self.cycle.eq(self.cycle + 1),
            self.tokens_finished.eq(self.tokens_finished + self.finished),
            self.fill_beats.eq(self.fill_beats + took[Watched.FILL]),
            self.r_beats.eq(self.r_beats + took[Watched.R]),
            self.wait_cycles.eq(self.wait_cycles + self.waiting),
        ]
        m.d.comb += self.progress.eq(
            took[Watched.TOKEN] | took[Watched.ROUTE] | took[Watched.GRANT] | self.finished
        )
        with m.If(Cat(*took.values(), self.finished).any()):
            m.d.sync += self.since_activity.eq(0)
        with m.Elif(~self.since_activity.all()):
            m.d.sync += self.since_activity.eq(self.since_activity + 1)

        last_irq = Signal()
        m.d.sync += last_irq.eq(self.irq)
        m.d.comb += self.irq_edge.eq(self.irq != last_irq)

        # A register write, once its address and its data have been taken (in either order).
        have_address, have_data = Signal(), Signal()
        last_address = Signal.like(self.register_address)
        last_data = Signal.like(self.axil_w.payload.as_value())
        took_address = self.axil_aw.valid & self.axil_aw.ready
        took_data = self.axil_w.valid & self.axil_w.ready
        data_now = Signal.like(self.axil_w.payload)
        m.d.comb += [
            self.register_write.eq((took_address | have_address) & (took_data | have_data)),
            self.register_address.eq(Mux(have_address, last_address, self.axil_aw.payload)),
            data_now.eq(Mux(have_data, last_data, self.axil_w.payload.as_value())),
            self.register_data.eq(data_now.data),
            self.register_strobes.eq(data_now.strb),
        ]
        m.d.sync += [
            have_address.eq((took_address | have_address) & ~self.register_write),
            have_data.eq((took_data | have_data) & ~self.register_write),
            last_address.eq(self.register_address),
            last_data.eq(data_now),
        ]

        # Every stream: an offer stands until it is taken.
        for kind, bus in watched.items():
            payload = bus.payload.as_value()
            offered = Signal(name=f"{kind.name.lower()}_offered")
            last = Signal(len(payload), name=f"{kind.name.lower()}_last")
            m.d.sync += [offered.eq(bus.valid & ~bus.ready), last.eq(payload)]
            fault(f"unstable_{kind.name.lower()}", offered & (~bus.valid | (payload != last)))

        # AXI.
        ar, r = self.ar.payload, self.r.payload
        beat_bits = (config.beat_bytes - 1).bit_length()
        page_beats = PAGE_BYTES // config.beat_bytes
        last_beat = ar.addr[beat_bits:12] + ar.len
        fault(
            "bad_burst",
            took[Watched.AR]
            & (
                (last_beat >= page_beats)
                | (ar.len >= config.burst_beats)
                | (ar.addr[:beat_bits] != 0)
            ),
        )
        if self._behind_axi:
            aw = self.aw.payload
            fault(
                "bad_write",
                took[Watched.AW]
                & (
                    (aw.addr[beat_bits:12] + aw.len >= page_beats)
                    | (aw.len >= config.burst_beats)
                    | (aw.addr[:beat_bits] != 0)
                    | self.outside
                ),
            )
        bursts = range(config.max_outstanding + 2)
        owed = Array(Signal(bursts, name=f"owed_{i}") for i in range(config.transfers))
        worst = Array(Signal(2, name=f"worst_{i}") for i in range(config.transfers))
        outstanding = Signal(bursts)
        ended = Signal()
        m.d.comb += [
            ended.eq(took[Watched.R] & r.last),
            self.burst_resp.eq(Mux(r.resp > worst[r.id], r.resp, worst[r.id])),
        ]
        m.d.sync += [
            outstanding.eq(outstanding + took[Watched.AR] - ended),
            self.link_cycles.eq(self.link_cycles + (outstanding != 0)),
        ]
        for i in range(config.transfers):
            begins = took[Watched.AR] & (ar.id == i)
            ends = ended & (r.id == i)
            m.d.sync += owed[i].eq(owed[i] + begins - ends)
        with m.If(took[Watched.R]):
            m.d.sync += worst[r.id].eq(Mux(r.last, 0, self.burst_resp))
        fault("orphan_beat", took[Watched.R] & (owed[r.id] == 0))

        # Grants: each expert of the latest route once.
        route = Signal(self._layouts[Watched.ROUTE])
        pending = Signal(config.top_k)
        grant = self.grant.payload
        match = Signal(config.top_k)
        for i in range(config.top_k):
            m.d.comb += match[i].eq(pending[i] & (route.experts[i] == grant.expert))
        with m.If(took[Watched.ROUTE]):
            m.d.sync += [route.eq(self.route.payload), pending.eq(~0)]
        with m.Elif(took[Watched.GRANT]):
            m.d.sync += pending.eq(pending & ~match)
        fault(
            "unasked_grant",
            took[Watched.GRANT] & ((route.layer != grant.layer) | ~match.any()),
        )

        fault("content", self.content_fault)
        fault("held", self.held_fault)
        fault("unheld", self.unheld_fault)

        any_fault = Signal()
        m.d.comb += any_fault.eq(Cat(*(seen for seen, _, _ in self.faults.values())).any())
        with m.If(any_fault & ~self.violations.all()):
            m.d.sync += self.violations.eq(self.violations + 1)
        return m


class LogPrinter(Elaboratable):
    """Writes one line per handshake to the simulator's output. Simulation only.

    Every number is hexadecimal; the first is the cycle. A record's own cycle (``@E``) is the
    engine's.

    ========  =======================================  =====================================
    line      fields                                   when
    ========  =======================================  =====================================
    ``@T``    new_sequence token_id                    handshake of ``token``
    ``@R``    layer experts (packed, rank 0 lowest)    handshake of ``route``
    ``@G``    layer expert slot error                  handshake of ``grant``
    ``@L``    slot                                     handshake of ``release``
    ``@A``    id addr len                              handshake of AR
    ``@D``    id resp (the worst of the burst)         handshake of R with ``last``
    ``@F``    slot                                     handshake of ``fill``, a slot's last beat
    ``@P``    id addr len                              handshake of the buffer's AW
    ``@Q``    id resp                                  handshake of the buffer's B
    ``@K``    index                                    a token's last expert has run
    ``@W``    address data strobes                     a register is written (address and data)
    ``@I``    level                                    ``irq`` is new
    ``@X``    what a b c (:class:`Fault`)              a check failed
    ``@E``    kind context layer expert slot flag data handshake of ``event``, whose cycle is the
                                                       last field
    ========  =======================================  =====================================

    Parameters
    ----------
    config : :class:`EngineConfig`
    monitor : :class:`Monitor`
        Its inputs and strobes are what is printed.

    Attributes
    ----------
    handshakes, events : :py:`Signal(1)`
        Inputs: which lines are wanted (``@E``; all others but ``@X``, which is always written).
    """

    def __init__(self, config: EngineConfig, monitor: Monitor):
        self._config = config
        self._monitor = monitor
        self.handshakes = Signal()
        self.events = Signal()

    def elaborate(self, platform):
        m = Module()
        config, monitor = self._config, self._monitor
        cycle, took = monitor.cycle, monitor.handshake

        def line(condition, letter: str, *fields):
            text = f"@{letter} {{:x}}" + " {:x}" * len(fields)
            with m.If(condition):
                m.d.sync += Print(Format(text, cycle, *fields))

        token, route, grant = monitor.token.payload, monitor.route.payload, monitor.grant.payload
        ar, r, fill = monitor.ar.payload, monitor.r.payload, monitor.fill.payload
        last_offset = config.slot_beats - 1
        with m.If(self.handshakes):
            line(took[Watched.TOKEN], "T", token.new_sequence, token.token_id)
            line(took[Watched.ROUTE], "R", route.layer, route.experts.as_value())
            line(took[Watched.GRANT], "G", grant.layer, grant.expert, grant.slot, grant.error)
            line(took[Watched.RELEASE], "L", monitor.release.payload.slot)
            line(took[Watched.AR], "A", ar.id, ar.addr, ar.len)
            line(took[Watched.R] & r.last, "D", r.id, monitor.burst_resp)
            line(took[Watched.FILL] & (fill.offset == last_offset), "F", fill.slot)
            if config.buffer == "axi":
                aw, b = monitor.aw.payload, monitor.b.payload
                line(took[Watched.AW], "P", aw.id, aw.addr, aw.len)
                line(took[Watched.B], "Q", b.id, b.resp)
            line(monitor.finished, "K", monitor.tokens_finished)
            line(monitor.irq_edge, "I", monitor.irq)
            line(
                monitor.register_write,
                "W",
                monitor.register_address,
                monitor.register_data,
                monitor.register_strobes,
            )
        for seen, code, fields in monitor.faults.values():
            line(seen, "X", *((code, *fields, 0, 0, 0)[:4]))
        if config.event_port:
            event = monitor.event.payload
            with m.If(self.events & took[Watched.EVENT]):
                m.d.sync += Print(
                    Format(
                        "@E {:x} {:x} {:x} {:x} {:x} {:x} {:x} {:x} {:x}",
                        event.cycle,
                        Value.cast(event.kind),
                        event.context,
                        event.layer,
                        event.expert,
                        event.slot,
                        event.flag,
                        event.data,
                        cycle,
                    )
                )
        return m
