# SPDX-License-Identifier: Apache-2.0
"""Order in which demands put their bursts on the bus."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["DemandOrder"]


class DemandOrder(wiring.Component):
    """A queue of transfer indices out of which any one can be removed.

    A cancelled demand must leave at once, wherever it stands: its index may be given to another
    load before its turn would have come. So this is a row of registers that closes up behind
    whatever leaves it. An index is in it at most once.

    Parameters
    ----------
    depth : :class:`int`
        Number of transfers; with each at most once in the queue it is never full.
    index_bits : :class:`int`
        Width of a transfer index.

    Members
    -------
    push, push_index : :py:`In(1)`, :py:`In(index_bits)`
        Append this index.
    pop : :py:`In(1)`
        Remove the head. Not in the same cycle as ``remove``.
    remove, remove_index : :py:`In(1)`, :py:`In(index_bits)`
        Remove this index if it is there.
    clear : :py:`In(1)`
        Remove all; wins over the others.
    valid, head : :py:`Out(1)`, :py:`Out(index_bits)`
        The oldest index; registers' outputs, changed one cycle after the requests.
    """

    def __init__(self, *, depth: int, index_bits: int):
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be a positive integer, not {depth!r}")
        self._depth = depth
        super().__init__(
            {
                "push": In(1),
                "push_index": In(index_bits),
                "pop": In(1),
                "remove": In(1),
                "remove_index": In(index_bits),
                "clear": In(1),
                "valid": Out(1),
                "head": Out(index_bits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        depth = self._depth
        used = Signal(depth)  # a thermometer: entry 0 is the head
        entries = [Signal.like(self.head, name=f"entry_{i}") for i in range(depth)]

        leaves = Signal(depth)
        closes = Signal(depth)  # entries from the one that leaves on
        kept = Signal(depth)
        m.d.comb += [
            leaves.eq(
                Cat(
                    used[i] & self.remove & (entry == self.remove_index)
                    for i, entry in enumerate(entries)
                )
                | self.pop
            ),
            closes.eq(Cat(leaves[: i + 1].any() for i in range(depth))),
            kept.eq(Mux(leaves.any(), used[1:], used)),
        ]
        for i, entry in enumerate(entries):
            # Entries that are not in use follow `push_index`, pushed or not.
            after = entries[i + 1] if i + 1 < depth else self.push_index
            with m.If(closes[i] | ~kept[i]):
                m.d.sync += entry.eq(Mux(kept[i], after, self.push_index))
        m.d.sync += used.eq(Mux(self.push, Cat(1, kept), kept))
        with m.If(self.clear):
            m.d.sync += used.eq(0)

        m.d.comb += [self.valid.eq(used[0]), self.head.eq(entries[0])]
        return m
