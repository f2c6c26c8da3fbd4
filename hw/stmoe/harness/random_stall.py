# SPDX-License-Identifier: Apache-2.0
"""Seeded random stalls, made on chip so that no bench has to drive them."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["RandomStall"]


class RandomStall(wiring.Component):
    """Says when a handshake is to be held back.

    While ``seed`` is 0 there is never a stall. Any other seed gives its own repeatable sequence
    from the cycle in which it is set: in one of 16 cycles outside a stall a stall begins, of 0 to
    ``2**length_bits - 1`` cycles. The generator is Marsaglia's xorshift32 (shifts 13, 17, 5).

    Parameters
    ----------
    salt : int
        Keeps generators that share a seed apart; 0 to 2**31 - 1.
    length_bits : int
        Bits of a stall's length, 1 to 16.

    Members
    -------
    seed : :py:`In(32)`
    stall : :py:`Out(1)`
        From a register.
    """

    def __init__(self, salt: int, *, length_bits: int = 4):
        if not isinstance(salt, int) or not 0 <= salt < 1 << 31:
            raise ValueError(f"salt must be 0 to 2**31 - 1, not {salt!r}")
        if not isinstance(length_bits, int) or not 1 <= length_bits <= 16:
            raise ValueError(f"length_bits must be 1 to 16, not {length_bits!r}")
        self._salt = salt * 0x9E3779B1 & 0xFFFF_FFFF
        self._length_bits = length_bits
        super().__init__({"seed": In(32), "stall": Out(1)})

    def elaborate(self, platform):
        m = Module()
        state = Signal(32)
        first, second, stepped = Signal(32), Signal(32), Signal(32)
        m.d.comb += [
            first.eq(state ^ (state << 13)),
            second.eq(first ^ (first >> 17)),
            stepped.eq(second ^ (second << 5)),
        ]
        last_seed = Signal(32)
        m.d.sync += last_seed.eq(self.seed)
        with m.If(last_seed != self.seed):
            # The top bit keeps the state from being 0, where xorshift would stay for ever.
            m.d.sync += state.eq(Cat((self.seed ^ self._salt)[:31], 1))
        with m.Else():
            m.d.sync += state.eq(stepped)

        left = Signal(self._length_bits)
        with m.If(self.seed == 0):
            m.d.sync += left.eq(0)
        with m.Elif(left != 0):
            m.d.sync += left.eq(left - 1)
        with m.Elif(state[:4] == 0):
            m.d.sync += left.eq(state[8:])
        m.d.comb += self.stall.eq(left != 0)
        return m
