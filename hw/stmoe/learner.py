# SPDX-License-Identifier: Apache-2.0
"""How wrong a score was, the correction of a row, and the use count."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import FRACTION_BITS, USE_BITS, EngineConfig

from .synthesis import GROUPS, group_of

__all__ = ["DELTA_BITS", "Learner", "RowUpdate", "delta_layout", "use_layout"]

DELTA_BITS = 3
"""A delta is -3 to 3."""

USE_DECAY = 5
"""A use count loses 1 / 2**USE_DECAY of itself per event of its layer, and a use adds
2**USE_DECAY."""


def delta_layout(config: EngineConfig) -> data.ArrayLayout:
    """One delta for each lane."""
    return data.ArrayLayout(signed(DELTA_BITS), config.num_lanes)


def use_layout(config: EngineConfig) -> data.ArrayLayout:
    """One use count for each lane."""
    return data.ArrayLayout(unsigned(USE_BITS), config.num_lanes)


class RowUpdate(wiring.Component):
    """Adds one delta to each lane of a row, saturating; two cycles of latency, a row a cycle.

    The first register saturates towards the lowest value and the second towards the highest,
    each through the synchronous reset of its flip-flops: no multiplexer behind the adder.

    Parameters
    ----------
    lanes : int
    width : int
        Bits of a lane, two's complement.

    Members
    -------
    i : In
        The row.
    delta : In
    o : Out
        The row of two cycles before, after learning. Not reset.
    """

    def __init__(self, *, lanes: int, width: int):
        if not isinstance(lanes, int) or lanes < 1:
            raise ValueError(f"lanes must be 1 or more, not {lanes!r}")
        if not isinstance(width, int) or width < DELTA_BITS:
            raise ValueError(f"width must be {DELTA_BITS} or more, not {width!r}")
        self.lanes, self.width = lanes, width
        row = data.ArrayLayout(signed(width), lanes)
        super().__init__(
            {
                "i": In(row),
                "delta": In(data.ArrayLayout(signed(DELTA_BITS), lanes)),
                "o": Out(row),
            }
        )

    def elaborate(self, platform):
        m = Module()
        width = self.width
        highest = (1 << (width - 1)) - 1
        for e in range(self.lanes):
            total = Signal(signed(width + 1), name=f"total_{e}")
            # A reset of the domain would take the place of the saturating ones, and flip-flops
            # of an ECP5 start with the value to which they are reset.
            lowest = -highest - 1
            bounded = Signal(signed(width), name=f"bounded_{e}", init=lowest, reset_less=True)
            result = Signal(signed(width), name=f"result_{e}", init=highest, reset_less=True)
            too_high = Signal(name=f"too_high_{e}", reset_less=True)
            m.d.comb += [total.eq(self.i[e] + self.delta[e]), self.o[e].eq(result)]
            m.d.sync += too_high.eq(~total[width] & total[width - 1])
            with m.If(total[width] & ~total[width - 1]):
                m.d.sync += bounded.eq(lowest)
            with m.Else():
                m.d.sync += bounded.eq(total[:width])
            with m.If(too_high):
                m.d.sync += result.eq(highest)
            with m.Else():
                m.d.sync += result.eq(bounded)
        return m


class Learner(wiring.Component):
    """Grades the scores of a layer against the set that was used; counts uses.

    Both outputs belong to the inputs of the last cycle with ``enable``, from the cycle after it
    on, and are 0 after reset. ``use_next`` comes straight from registers, ``delta`` through one
    level of logic.

    Source: architecture section 2, *learn*.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses ``num_lanes`` and the margins, in whole units.

    Members
    -------
    enable : In
        Take the other inputs. The same for every group of lanes.
    score : In
        Scores of the layer before this event, quarter units.
    use : In
        Use counts of the layer before this event.
    used : In
        Lanes of the set.
    delta : Out
        What each lane of every row behind the score is corrected by, -3 to 3.
    use_next : Out
        Use counts after this event.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        super().__init__(
            {
                "enable": In(GROUPS),
                "score": In(data.ArrayLayout(signed(config.score_bits), config.num_lanes)),
                "use": In(use_layout(config)),
                "used": In(config.num_lanes),
                "delta": Out(delta_layout(config)),
                "use_next": Out(use_layout(config)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        # A used lane with score s learns a step for each limit that s is below. One that was not
        # used does for each limit that -s is below, and -s < limit just when ~s < limit - 1.
        limits = sorted((c.margin_low, c.margin_step, -c.margin_high), reverse=True)
        limits = [limit << FRACTION_BITS for limit in limits]
        for e in range(c.num_lanes):
            score, used = self.score[e], self.used[e]
            enable = self.enable[group_of(e, c.num_lanes)]
            graded = Signal(c.score_bits, name=f"graded_{e}")
            m.d.comb += graded.eq(score ^ (~used).replicate(c.score_bits))
            # From the highest limit to the lowest: each is passed only if the one before is.
            low, mid, high = (Signal(name=f"below_{e}_{n}") for n in range(3))
            for below, limit in zip((low, mid, high), limits, strict=True):
                with m.If(enable):
                    m.d.sync += below.eq(self._below(graded, limit, used))
            unused = Signal(name=f"unused_{e}")
            with m.If(enable):
                m.d.sync += unused.eq(~used)
            m.d.comb += self.delta[e].eq(
                Cat(
                    (low & ~mid) | high,  # odd
                    Mux(unused, low & ~high, mid),
                    unused & low,
                ).as_signed()
            )

            count = self.use[e]
            share, rest = count[USE_DECAY:], count[:USE_DECAY]
            # count - (count >> 5), and - 992 (+ 32, modulo 1024) if used, with one
            # subtraction: the borrow below its lowest bit takes the 1 off a small count that is
            # not nothing, and the 1 that a used count of 1023 would become too much.
            borrow = Signal(name=f"borrow_{e}")
            total = Signal(USE_BITS + 1, name=f"use_total_{e}")
            m.d.comb += [
                borrow.eq(Mux(share.any(), used & count.all(), rest.any())),
                total.eq(Cat(0, count) - Cat(borrow, share, used.replicate(USE_BITS - len(share)))),
            ]
            with m.If(enable):
                m.d.sync += self.use_next[e].eq(total[1:])
        return m

    def _below(self, graded, limit: int, used):
        """``graded < limit`` in two's complement when ``used``, else ``graded < limit - 1``.

        Limits end in zeros: only the bits above are compared, and whether all bits below are ones
        (the score's are all zeros then) tells limit - 1 itself.
        """
        bits = len(graded)
        lowest = -1 << (bits - 1)
        if limit <= lowest:
            return Const(0, 1)
        if limit - 1 > ~lowest:
            return Const(1, 1)
        if limit - 1 == ~lowest:
            return used | ~(~graded[-1] & graded[:-1].all())
        zeros = min((limit & -limit).bit_length() - 1 if limit else bits - 1, bits - 1)
        upper = graded[zeros:]
        last = (limit >> zeros) - 1  # as the upper bits of limit - 1
        ones = ~used & graded[:zeros].all()
        # Bit by bit from the lowest, as logic: a carry chain for each would be larger.
        below = ~ones
        for n, bit in enumerate(upper):
            flip = n == len(upper) - 1  # the sign counts the other way round
            below = (~bit ^ flip) | below if (last >> n & 1) ^ flip else (~bit ^ flip) & below
        return below
