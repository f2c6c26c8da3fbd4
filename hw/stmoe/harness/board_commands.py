# SPDX-License-Identifier: Apache-2.0
"""Carries out the host's commands: registers of the engine and of the harness, the trace."""

from __future__ import annotations

from collections.abc import Mapping

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import enum, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe.harness.board_protocol import (
    HARNESS_SPACE,
    Command,
    HarnessRegister,
    Message,
)
from stmoe.harness.trace_player import word_layout
from stmoe.payloads import axi4_lite_signature
from stmoe.register_map import addr_width
from stmoe_golden.config import EngineConfig

__all__ = ["BoardCommands"]

DECODE_ERROR = 3
"""AXI response for an address of the harness that is no register."""


class BoardCommands(wiring.Component):
    """Takes commands from the host's stream, one after the other, and answers in order.

    A word of the trace waits until the harness takes it, and with it everything after it: the
    host sees how much has been consumed in the link's status.

    Parameters
    ----------
    config : :class:`EngineConfig`
    written : mapping of :class:`HarnessRegister` to int
        Registers of the harness that can be written, and their widths.
    read : mapping of int to Value
        What is read at each word index of the harness's registers. Others answer
        :data:`DECODE_ERROR`, as do writes to what is not in ``written``.

    Members
    -------
    i : :py:`In(stream.Signature(8))`
        Commands.
    o : :py:`Out(stream.Signature(8))`
        Answers.
    last : :py:`Out(1)`
        With the last byte of an answer.
    trace : :py:`Out(stream.Signature(word_layout(config)))`
    axil : :py:`Out(axi4_lite_signature(...))`
        To the engine's registers.
    setting_* : Out
        The value last written to a register of ``written``, by its name in lower case.
    """

    class State(enum.Enum, shape=3):
        COMMAND = 0
        ARGUMENTS = 1
        START = 2
        WORD = 3
        WRITE = 4
        READ = 5
        ANSWER = 6

    def __init__(
        self,
        config: EngineConfig,
        *,
        written: Mapping[HarnessRegister, int],
        read: Mapping[int, Value],
    ):
        self._config = config
        self._written = dict(written)
        self._read = dict(read)
        super().__init__(
            {
                "i": In(stream.Signature(8)),
                "o": Out(stream.Signature(8)),
                "last": Out(1),
                "trace": Out(stream.Signature(word_layout(config))),
                "axil": Out(axi4_lite_signature(addr_width(config))),
                **{
                    f"setting_{register.name.lower()}": Out(width)
                    for register, width in self._written.items()
                },
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        state = Signal(self.State)
        command = Signal(8)
        argument_bytes = {
            Command.READ: 2,
            Command.WRITE: 6,
            Command.TOKEN: 5,
            Command.ROUTE: 1 + config.top_k,
        }
        longest = max(argument_bytes.values())
        arguments = Signal(8 * longest)
        """Shifted in from the top; those of a shorter command lie in the upper part."""
        left = Signal(range(longest + 1))

        def argument(of: Command, byte: int, count: int) -> Value:
            first = longest - argument_bytes[of] + byte
            return arguments[8 * first : 8 * (first + count)]

        # Answers: one or five bytes.
        answer = Signal(8 * 5)
        answer_left = Signal(range(6))
        m.d.comb += [
            self.o.payload.eq(answer[:8]),
            self.o.valid.eq(state == self.State.ANSWER),
            self.last.eq(answer_left == 1),
        ]

        def give(message: Message, response: Value, *values: Value):
            m.d.sync += [
                answer.eq(Cat(Const(int(message), 5), response, Const(0, 1), *values)),
                answer_left.eq(5 if values else 1),
                state.eq(self.State.ANSWER),
            ]

        address = Signal(16)
        harness_index = address[2:15]
        in_harness = Signal()
        known = Signal()
        hit = Signal(len(self._read))
        """Which register of the harness is read, one bit each."""
        write_data = argument(Command.WRITE, 2, 4)
        m.d.comb += [
            address.eq(
                Mux(
                    command == Command.WRITE,
                    argument(Command.WRITE, 0, 2),
                    argument(Command.READ, 0, 2),
                )
            ),
            in_harness.eq(address[HARNESS_SPACE.bit_length() - 1]),
            known.eq(hit.any()),
        ]
        # And-or of one-hot selects: a `Switch` over so many words takes three times the gates.
        read_word = Signal(32)
        m.d.sync += hit.eq(Cat(harness_index == int(index) for index in self._read))
        for bit in range(32):
            bits = [
                (Value.cast(word)[bit], hit[i])
                for i, word in enumerate(self._read.values())
                if bit < len(Value.cast(word))
            ]
            m.d.comb += read_word[bit].eq(Cat(b & chosen for b, chosen in bits).any())

        axil = self.axil
        address_bits = addr_width(config)
        beyond = Signal()
        """An address that the engine's port cannot even express."""
        m.d.comb += [
            beyond.eq(address[address_bits:15].any()),
            axil.aw.payload.eq(address[:address_bits]),
            axil.ar.payload.eq(address[:address_bits]),
            axil.w.payload.data.eq(write_data),
            axil.w.payload.strb.eq(0b1111),
        ]
        address_due, data_due = Signal(), Signal()
        m.d.comb += [
            axil.aw.valid.eq((state == self.State.WRITE) & address_due),
            axil.w.valid.eq((state == self.State.WRITE) & data_due),
            axil.ar.valid.eq((state == self.State.READ) & address_due),
            axil.b.ready.eq((state == self.State.WRITE) & ~address_due & ~data_due),
            axil.r.ready.eq((state == self.State.READ) & ~address_due),
        ]

        # A byte names every expert of a model; the port may have one bit more.
        routed = [
            Cat(argument(Command.ROUTE, 1 + rank, 1), Const(0, 1))[: config.expert_bits]
            for rank in range(config.top_k)
        ]
        trace = self.trace.payload
        m.d.comb += [
            self.trace.valid.eq(state == self.State.WORD),
            trace.is_token.eq(command == Command.TOKEN),
            trace.new_sequence.eq(argument(Command.TOKEN, 0, 1)[0]),
            trace.token_id.eq(argument(Command.TOKEN, 1, 4)),
            trace.layer.eq(argument(Command.ROUTE, 0, 1)),
            trace.experts.as_value().eq(Cat(*routed)),
        ]

        with m.Switch(state):
            with m.Case(self.State.COMMAND):
                m.d.comb += self.i.ready.eq(1)
                m.d.sync += command.eq(self.i.payload)
                with m.If(self.i.valid):
                    with m.Switch(self.i.payload):
                        for kind, count in argument_bytes.items():
                            with m.Case(int(kind)):
                                m.d.sync += [left.eq(count), state.eq(self.State.ARGUMENTS)]
            with m.Case(self.State.ARGUMENTS):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += [
                        arguments.eq(Cat(arguments[8:], self.i.payload)),
                        left.eq(left - 1),
                    ]
                    with m.If(left == 1):
                        m.d.sync += state.eq(self.State.START)
            with m.Case(self.State.START):
                m.d.sync += [address_due.eq(1), data_due.eq(1)]
                with m.Switch(command):
                    with m.Case(int(Command.READ)):
                        m.d.sync += state.eq(self.State.READ)
                    with m.Case(int(Command.WRITE)):
                        m.d.sync += state.eq(self.State.WRITE)
                    with m.Default():
                        m.d.sync += state.eq(self.State.WORD)
                with m.If(in_harness | beyond):
                    m.d.sync += [address_due.eq(0), data_due.eq(0)]
            with m.Case(self.State.WORD):
                with m.If(self.trace.ready):
                    m.d.sync += state.eq(self.State.COMMAND)
            with m.Case(self.State.WRITE):
                with m.If(axil.aw.ready):
                    m.d.sync += address_due.eq(0)
                with m.If(axil.w.ready):
                    m.d.sync += data_due.eq(0)
                with m.If(in_harness | beyond):
                    writable = Signal()
                    with m.Switch(harness_index):
                        for register in self._written:
                            target = getattr(self, f"setting_{register.name.lower()}")
                            with m.Case(int(register)):
                                m.d.comb += writable.eq(in_harness)
                                with m.If(in_harness):
                                    m.d.sync += target.eq(write_data)
                    give(Message.WRITE_ANSWER, Mux(writable, 0, Const(DECODE_ERROR, 2)))
                with m.Elif(axil.b.valid & axil.b.ready):
                    give(Message.WRITE_ANSWER, axil.b.payload)
            with m.Case(self.State.READ):
                with m.If(axil.ar.ready):
                    m.d.sync += address_due.eq(0)
                with m.If(in_harness | beyond):
                    give(
                        Message.READ_ANSWER,
                        Mux(in_harness & known, 0, Const(DECODE_ERROR, 2)),
                        read_word,
                    )
                with m.Elif(axil.r.valid & axil.r.ready):
                    give(Message.READ_ANSWER, axil.r.payload.resp, axil.r.payload.data)
            with m.Case(self.State.ANSWER):
                with m.If(self.o.ready):
                    m.d.sync += [answer.eq(answer[8:]), answer_left.eq(answer_left - 1)]
                    with m.If(self.last):
                        m.d.sync += state.eq(self.State.COMMAND)
        return m
