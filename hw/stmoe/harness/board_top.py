# SPDX-License-Identifier: Apache-2.0
"""The top of a board: the harness, fed and read by a host over a UART."""

from __future__ import annotations

from collections.abc import Callable

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect

from stmoe.harness.board_commands import BoardCommands
from stmoe.harness.board_link import BoardLink
from stmoe.harness.board_protocol import HarnessRegister, config_hash
from stmoe.harness.harness import Harness
from stmoe.harness.record_packer import RecordPacker
from stmoe.harness.uart import UartReceiver, UartTransmitter
from stmoe_golden.config import ConfigError, EngineConfig

__all__ = ["SETTINGS", "BoardTop"]

SETTINGS = {
    HarnessRegister.TOKENS: "tokens",
    HarnessRegister.ATTENTION_CYCLES: "attention_cycles",
    HarnessRegister.EXPERT_CYCLES: "expert_cycles",
    HarnessRegister.JITTER: "jitter",
    HarnessRegister.STALL_LIMIT: "stall_limit",
    HarnessRegister.QUIET_CYCLES: "quiet_cycles",
    HarnessRegister.MEMORY_LATENCY: "memory_latency",
    HarnessRegister.MEMORY_BEATS_NUMERATOR: "memory_beats_numerator",
    HarnessRegister.MEMORY_BEATS_DENOMINATOR: "memory_beats_denominator",
}
"""Registers that set an input of :class:`Harness`."""

TOTALS = {
    HarnessRegister.VIOLATIONS: "violations",
    HarnessRegister.FAULTS: "faults",
    HarnessRegister.CYCLE: "cycle",
    HarnessRegister.FILL_BEATS: "fill_beats",
    HarnessRegister.R_BEATS: "r_beats",
    HarnessRegister.LINK_CYCLES: "link_cycles",
    HarnessRegister.WAIT_CYCLES: "wait_cycles",
}
"""Registers that read an output of :class:`Harness`; those of more than 32 bits take two words."""

LED_BITS = 22
"""A LED stays on for 2**LED_BITS cycles after a byte."""


class BoardTop(wiring.Component):
    """The engine in its harness, on a board (docs/board.md).

    The host opens a session, which resets everything but the link; writes the engine's registers
    and the harness's settings; sends the trace; and reads records, counters, totals and
    signatures. While the host is slow the event port holds the engine, so nothing is lost.

    Clock domain ``sync``. The pins need no registers of the board's own: ``rx`` is synchronised
    here and ``tx`` comes from a register.

    Parameters
    ----------
    config : :class:`EngineConfig`
        ``event_port`` must be true.
    clock_hz, baud : int
        Frequency of ``sync`` and speed of the UART, 4 to 65536 clocks to a bit.
    engine_factory : callable
        Makes the engine from the configuration; by default ``stmoe.engine.Engine``.
    receive_bytes, transmit_bytes : int
        Of :class:`BoardLink`.

    Members
    -------
    rx : :py:`In(1)`
        UART, from the host.
    tx : :py:`Out(1)`
        UART, to the host.
    leds : :py:`Out(4)`
        0: a session is open; 1: the whole trace has run; 2: a check has failed, or the engine is
        stuck; 3: bytes come from the host.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock_hz: int,
        baud: int,
        engine_factory: Callable | None = None,
        receive_bytes: int = 2048,
        transmit_bytes: int = 4096,
    ):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        if not config.event_port:
            raise ConfigError("event_port must be true for a board, not false")
        if config.buffer != "banks":
            raise ConfigError(f"buffer must be banks for a board, not {config.buffer}")
        self._config = config
        self._clock_hz, self._baud = clock_hz, baud
        self._receiver = UartReceiver(clock_hz=clock_hz, baud=baud)
        self._transmitter = UartTransmitter(clock_hz=clock_hz, baud=baud)
        self._link = BoardLink(
            config_hash(config), receive_bytes=receive_bytes, transmit_bytes=transmit_bytes
        )
        self._harness = Harness(config, engine_factory=engine_factory, log=False, readback=True)
        super().__init__({"rx": In(1, init=1), "tx": Out(1, init=1), "leds": Out(4)})

    def elaborate(self, platform):
        m = Module()
        harness, link = self._harness, self._link
        restart = link.restart
        m.submodules.receiver = receiver = self._receiver
        m.submodules.transmitter = transmitter = self._transmitter
        m.submodules.link = link
        m.submodules.harness = ResetInserter(restart)(harness)
        packer = RecordPacker(self._config, address_bits=harness.address_bits)
        m.submodules.packer = ResetInserter(restart)(packer)

        m.d.comb += [
            receiver.rx.eq(self.rx),
            self.tx.eq(transmitter.tx),
            link.data.eq(receiver.data),
            link.valid.eq(receiver.valid),
            link.error.eq(receiver.error),
            link.tokens.eq(harness.tokens_finished),
            link.flags.eq(
                Cat(
                    harness.done,
                    harness.stuck,
                    harness.quiet,
                    harness.irq,
                    harness.violations != 0,
                )
            ),
            packer.cycle.eq(harness.cycle),
        ]
        connect(m, link.line, transmitter.i)
        connect(m, harness.events, packer.i)

        read: dict[int, Value] = {
            HarnessRegister.CLOCK_HZ: Const(self._clock_hz, 32),
            HarnessRegister.BAUD: Const(self._baud, 32),
            HarnessRegister.RECORDS: packer.records,
        }
        for register, name in TOTALS.items():
            value = getattr(harness, name)
            read[register] = value[:32]
            if len(value) > 32:
                read[register + 1] = value[32:]
        for i, (signature, count) in enumerate(
            zip(harness.signatures, harness.handshakes, strict=True)
        ):
            first = HarnessRegister.SIGNATURES + 4 * i
            read |= {first: signature[:32], first + 1: signature[32:], first + 2: count}
        written = {
            register: len(Value.cast(getattr(harness, name))) for register, name in SETTINGS.items()
        }
        commands = BoardCommands(self._config, written=written, read=read)
        m.submodules.commands = ResetInserter(restart)(commands)
        connect(m, link.received, commands.i)
        connect(m, commands.trace, harness.i)
        connect(m, commands.axil, harness.axil)
        m.d.comb += [
            getattr(harness, name).eq(getattr(commands, f"setting_{register.name.lower()}"))
            for register, name in SETTINGS.items()
        ]

        # Messages of the two sources share the board's stream, each in one piece.
        answering = Signal()
        within = Signal()
        """A message has begun and not ended; else ``answering`` is chosen anew."""
        chosen = Signal()
        m.d.comb += [
            chosen.eq(Mux(within, answering, commands.o.valid)),
            link.sent.valid.eq(Mux(chosen, commands.o.valid, packer.o.valid)),
            link.sent.payload.eq(Mux(chosen, commands.o.payload, packer.o.payload)),
            commands.o.ready.eq(chosen & link.sent.ready),
            packer.o.ready.eq(~chosen & link.sent.ready),
        ]
        m.d.sync += answering.eq(chosen)
        with m.If(restart):
            m.d.sync += within.eq(0)
        with m.Elif(link.sent.valid & link.sent.ready):
            m.d.sync += within.eq(~Mux(chosen, commands.last, packer.last))

        alight = Signal(LED_BITS)
        with m.If(receiver.valid):
            m.d.sync += alight.eq(~0)
        with m.Elif(alight != 0):
            m.d.sync += alight.eq(alight - 1)
        m.d.comb += self.leds.eq(
            Cat(
                link.opened,
                harness.done,
                harness.stuck | (harness.violations != 0),
                alight != 0,
            )
        )
        return m
