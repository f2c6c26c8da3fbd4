# SPDX-License-Identifier: Apache-2.0
"""Sums up everything that passed on a bus in 64 bits."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from stmoe.harness.board_protocol import SIGNATURE_BITS, SIGNATURE_SHIFT, SIGNATURE_TAPS
from stmoe.payloads import CYCLE_BITS

__all__ = ["BusSignature"]


class BusSignature(wiring.Component):
    """Signature of all handshakes of a bus, each with its cycle
    (:func:`stmoe.harness.board_protocol.signature_of`).

    A multiple-input signature register, as built-in self-test has them: one gate for most bits,
    where a CRC-32 of so wide a word would take hundreds of gates. Two logs that differ have the
    same signature with a chance of 2**-64.

    Parameters
    ----------
    width : int
        Bits of the bus's payload.

    Members
    -------
    cycle : :py:`In(40)`
    payload : :py:`In(width)`
    took : :py:`In(1)`
        A handshake in this cycle. The word is the cycle in the lowest 40 bits, then the payload.
    value : :py:`Out(64)`
    count : :py:`Out(32)`
        Handshakes. Both two cycles later.
    """

    def __init__(self, width: int):
        super().__init__(
            {
                "cycle": In(CYCLE_BITS),
                "payload": In(width),
                "took": In(1),
                "value": Out(SIGNATURE_BITS),
                "count": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        word = Cat(self.cycle, self.payload)
        folded = Signal(SIGNATURE_BITS)
        took = Signal()
        state, top = self.value, self.value[-SIGNATURE_SHIFT:]
        parts = [word[i : i + SIGNATURE_BITS] for i in range(0, len(word), SIGNATURE_BITS)]
        m.d.sync += took.eq(self.took)
        folding = parts[0]
        for part in parts[1:]:
            folding = folding ^ part
        m.d.sync += folded.eq(folding)
        stepped = (state << SIGNATURE_SHIFT) ^ folded
        for tap in SIGNATURE_TAPS:
            stepped = stepped ^ (top << tap)
        with m.If(took):
            m.d.sync += [state.eq(stepped), self.count.eq(self.count + 1)]
        return m
