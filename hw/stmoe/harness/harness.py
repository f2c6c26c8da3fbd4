# SPDX-License-Identifier: Apache-2.0
"""The engine with everything around it: trace, accelerator, memory, checkers, monitors."""

from __future__ import annotations

from collections.abc import Callable

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe.harness.accelerator import TIME_BITS, Accelerator
from stmoe.harness.board_protocol import SIGNATURE_BITS, SIGNED_BUSES
from stmoe.harness.buffer_memory import BufferMemory
from stmoe.harness.bus_signature import BusSignature
from stmoe.harness.content_checker import AddressMap, ContentChecker
from stmoe.harness.memory_model import MemoryModel, address_of, content
from stmoe.harness.monitor import LogPrinter, Monitor, Watched
from stmoe.harness.random_stall import RandomStall
from stmoe.harness.trace_player import TracePlayer, word_layout
from stmoe.payloads import axi4_lite_signature, event_layout
from stmoe.register_map import addr_width
from stmoe_golden.config import EngineConfig

__all__ = ["Harness"]

MONITORED = (
    "cycle",
    "tokens_finished",
    "fill_beats",
    "r_beats",
    "link_cycles",
    "wait_cycles",
    "violations",
)
"""Outputs of :class:`Monitor` that are passed on."""

MEMORY_INPUTS = (
    "latency",
    "beats_numerator",
    "beats_denominator",
    "reorder",
    "interleave",
    "error_address",
    "error_count",
    "stuck",
    "stuck_address",
)
"""Inputs of :class:`MemoryModel` that are passed in as ``memory_*``."""


def _engine(config: EngineConfig):
    # Imported late, so that the harness can be built round another engine.
    from stmoe.engine import Engine

    return Engine(config)


class Harness(wiring.Component):
    """An engine at work: it is fed a trace, grants experts to an accelerator and loads them from
    a memory, and everything is checked and counted. Synthesizable without ``log``.

    Parameters
    ----------
    config : :class:`EngineConfig`
    engine_factory : callable
        Makes the engine from the configuration; by default ``stmoe.engine.Engine``.
    stride : int or None
        Of the :class:`AddressMap`; software must program the same into the engine's segments.
    log : bool
        Print a line for each handshake (:class:`LogPrinter`); simulation only.
    readback : bool
        Hand the records of the event port out, and keep a signature of every bus, instead of
        having a simulator write them down. What reads the records may be slow, and what feeds the
        trace too: neither counts as being stuck. Fills are never stalled.

    Attributes
    ----------
    address_bits : int
        Bits of the byte addresses that experts lie at.
    fault_names : list of str
        What the bits of ``faults`` are.

    Members
    -------
    i : :py:`In(stream.Signature(word_layout(config)))`
        The trace.
    axil : :py:`In(axi4_lite_signature(...))`
        The engine's registers.
    tokens : :py:`In(32)`
        Tokens in the whole trace.
    attention_cycles, expert_cycles : :py:`In(32)`
        See :class:`Accelerator`.
    jitter : :py:`In(32)`
        Seed of random stalls of grants, releases, fills and events; 0 for none.
    stall_limit, quiet_cycles : :py:`In(32)`
        For ``stuck`` and ``quiet``.
    log_handshakes, log_events : :py:`In(1)`
        Which lines are printed, see :class:`LogPrinter`.
    memory_* : In
        The inputs of :class:`MemoryModel`.
    cycle, tokens_finished, r_beats, link_cycles, wait_cycles, violations : Out
        See :class:`Monitor`.
    done : :py:`Out(1)`
        All tokens have finished.
    stuck : :py:`Out(1)`
        Sticky: no progress for ``stall_limit`` cycles before ``done``.
    quiet : :py:`Out(1)`
        ``done``, and no bus has moved for ``quiet_cycles``.
    irq : :py:`Out(1)`
    events : :py:`Out(stream.Signature(event_layout(config)))`
        With ``readback``: the records.
    signatures, handshakes : :py:`Out(data.ArrayLayout(64 or 32, len(SIGNED_BUSES)))`
        With ``readback``: :class:`BusSignature` of each of ``SIGNED_BUSES``.
    faults : :py:`Out(len(fault_names))`
        With ``readback``, sticky: which checks have failed.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        engine_factory: Callable | None = None,
        stride: int | None = None,
        log: bool = True,
        readback: bool = False,
    ):
        self._config = config
        self._log = log
        self._readback = readback
        if readback and config.buffer == "axi":
            raise ValueError("readback is for a buffer in banks, not behind AXI")
        self._engine = (engine_factory or _engine)(config)
        self._addresses = AddressMap(config, stride)
        self._memory = MemoryModel(config)
        self._monitor = Monitor(config)
        monitored = self._monitor.signature.members
        memory = self._memory.signature.members
        last = self._addresses.base(config.num_layers) - 1
        self.address_bits = last.bit_length()
        self.fault_names = list(self._monitor.faults)
        reading = {
            "events": Out(stream.Signature(event_layout(config))),
            "signatures": Out(data.ArrayLayout(SIGNATURE_BITS, len(SIGNED_BUSES))),
            "handshakes": Out(data.ArrayLayout(32, len(SIGNED_BUSES))),
            "faults": Out(len(self.fault_names)),
        }
        super().__init__(
            {
                "i": In(stream.Signature(word_layout(config))),
                "axil": In(axi4_lite_signature(addr_width(config))),
                "tokens": In(32),
                "attention_cycles": In(TIME_BITS),
                "expert_cycles": In(TIME_BITS),
                "jitter": In(32),
                "stall_limit": In(32),
                "quiet_cycles": In(32),
                "log_handshakes": In(1),
                "log_events": In(1),
                **{f"memory_{name}": memory[name] for name in MEMORY_INPUTS},
                **{name: monitored[name] for name in MONITORED},
                "done": Out(1),
                "stuck": Out(1),
                "quiet": Out(1),
                "irq": Out(1),
                **(reading if readback else {}),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.engine = engine = self._engine
        m.submodules.memory = memory = self._memory
        m.submodules.player = player = TracePlayer(config)
        m.submodules.accelerator = accelerator = Accelerator(config)
        m.submodules.checker = checker = ContentChecker(
            config,
            self._addresses,
            content=lambda address: content(address, data_width=config.axi_data_width),
            address_of=address_of,
        )
        m.submodules.monitor = monitor = self._monitor

        wiring.connect(m, wiring.flipped(self.i), player.i)
        wiring.connect(m, wiring.flipped(self.axil), engine.axil)
        wiring.connect(m, player.token, accelerator.i_token)
        wiring.connect(m, player.route, accelerator.i_route)
        wiring.connect(m, accelerator.token, engine.token)
        wiring.connect(m, accelerator.route, engine.route)
        wiring.connect(m, engine.grant, accelerator.grant)
        wiring.connect(m, accelerator.release, engine.release)
        wiring.connect(m, engine.axi, memory.axi)
        m.d.comb += [
            accelerator.attention_cycles.eq(self.attention_cycles),
            accelerator.expert_cycles.eq(self.expert_cycles),
            accelerator.jitter.eq(self.jitter),
            self.irq.eq(engine.irq),
        ]
        m.d.comb += [getattr(memory, n).eq(getattr(self, f"memory_{n}")) for n in MEMORY_INPUTS]

        # The buffer: what is in it is what the engine fills, or has written over AXI.
        if config.buffer == "axi":
            m.submodules.buffer = buffer = BufferMemory(config)
            wiring.connect(m, engine.buffer, buffer.axi)
            filled = buffer.written
            m.d.comb += [
                buffer.jitter.eq(self.jitter),
                buffer.latency.eq(self.memory_latency),
                monitor.outside.eq(buffer.outside),
            ]
        else:
            filled = engine.fill

        # What takes fills and events has nothing else to do; jitter stalls it, so that the
        # engine's back-pressure is exercised.
        if self._readback:
            m.d.comb += engine.fill.ready.eq(1)
            wiring.connect(m, engine.events, wiring.flipped(self.events))
        else:
            if config.buffer == "banks":
                m.submodules.fill_stall = fill_stall = RandomStall(3)
                m.d.comb += [
                    fill_stall.seed.eq(self.jitter),
                    engine.fill.ready.eq(~fill_stall.stall),
                ]
        if config.event_port and not self._readback:
            m.submodules.event_stall = event_stall = RandomStall(4, length_bits=5)
            m.d.comb += [
                event_stall.seed.eq(self.jitter),
                engine.events.ready.eq(~event_stall.stall),
            ]

        def watch(port, bus):
            m.d.comb += [
                port.valid.eq(bus.valid),
                port.ready.eq(bus.ready),
                port.payload.eq(bus.payload),
            ]

        for name in ("token", "route", "grant", "release"):
            watch(getattr(monitor, name), getattr(engine, name))
        watch(monitor.fill, filled)
        if config.buffer == "axi":
            for name in ("aw", "w", "b"):
                watch(getattr(monitor, name), getattr(engine.buffer, name))
        watch(monitor.ar, engine.axi.ar)
        watch(monitor.r, engine.axi.r)
        if config.event_port:
            watch(monitor.event, engine.events)
        watch(checker.fill, filled)
        for name in ("grant", "release"):
            watch(getattr(checker, name), getattr(engine, name))
        watch(monitor.axil_aw, engine.axil.aw)
        watch(monitor.axil_w, engine.axil.w)
        m.d.comb += [
            monitor.irq.eq(engine.irq),
            monitor.finished.eq(accelerator.finished),
            monitor.waiting.eq(accelerator.waiting),
            monitor.content_fault.eq(checker.content_fault),
            monitor.content_slot.eq(checker.content_slot),
            monitor.content_beats.eq(checker.content_beats),
            monitor.content_address.eq(checker.content_address),
            monitor.held_fault.eq(checker.held_fault),
            monitor.unheld_fault.eq(checker.unheld_fault),
        ]
        m.d.comb += [getattr(self, name).eq(getattr(monitor, name)) for name in MONITORED]

        if self._log:
            m.submodules.printer = printer = LogPrinter(config, monitor)
            m.d.comb += [
                printer.handshakes.eq(self.log_handshakes),
                printer.events.eq(self.log_events),
            ]

        excused = Signal()
        """Something outside keeps the engine from progress."""
        waits = Signal()
        """A record waits to be read."""
        if self._readback:
            self._sum_up(m, engine)
            starved = ~player.token.valid & ~player.route.valid & ~accelerator.waiting
            m.d.comb += [
                waits.eq(engine.events.valid),
                excused.eq((engine.events.valid & ~engine.events.ready) | starved),
            ]
        m.d.comb += [
            self.done.eq((self.tokens != 0) & (self.tokens_finished >= self.tokens)),
            self.quiet.eq(self.done & (monitor.since_activity >= self.quiet_cycles) & ~waits),
        ]
        # Before the first token is presented the host may take its time to configure the engine.
        begun = Signal()
        since_progress = Signal(32)
        with m.If(monitor.token.valid):
            m.d.sync += begun.eq(1)
        with m.If(~begun | self.done | monitor.progress | excused):
            m.d.sync += since_progress.eq(0)
        with m.Elif(since_progress >= self.stall_limit):
            m.d.sync += self.stuck.eq(1)
        with m.Else():
            m.d.sync += since_progress.eq(since_progress + 1)
        return m

    def _sum_up(self, m: Module, engine) -> None:
        """The signatures of the buses, and which checks have failed."""
        monitor = self._monitor
        token, route, grant = engine.token.payload, engine.route.payload, engine.grant.payload
        ar, r, took = engine.axi.ar.payload, engine.axi.r.payload, monitor.handshake
        words: dict[str, tuple[Signal | Value, tuple]] = {
            "token": (took[Watched.TOKEN], (token.new_sequence, token.token_id)),
            "route": (took[Watched.ROUTE], (route.layer, route.experts)),
            "grant": (
                took[Watched.GRANT],
                (grant.layer, grant.expert, grant.slot, grant.error),
            ),
            "release": (took[Watched.RELEASE], (engine.release.payload.slot,)),
            "ar": (took[Watched.AR], (ar.id, ar.addr, ar.len)),
            "last_beat": (took[Watched.R] & r.last, (r.id, monitor.burst_resp)),
        }
        for i, name in enumerate(SIGNED_BUSES):
            strobe, fields = words[name]
            payload = Cat(Value.cast(field) for field in fields)
            signature = BusSignature(len(payload))
            m.submodules[f"{name}_signature"] = signature
            m.d.comb += [
                signature.cycle.eq(monitor.cycle),
                signature.payload.eq(payload),
                signature.took.eq(strobe),
                self.signatures[i].eq(signature.value),
                self.handshakes[i].eq(signature.count),
            ]
        seen = Cat(monitor.faults[name][0] for name in self.fault_names)
        m.d.sync += self.faults.eq(self.faults | seen)
