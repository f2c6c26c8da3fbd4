# SPDX-License-Identifier: Apache-2.0
"""How wrong a score was, the correction of a row, and the use count."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import FRACTION_BITS, USE_BITS, EngineConfig

__all__ = ["DELTA_BITS", "Learner", "RowUpdate", "delta_layout", "use_layout"]

DELTA_BITS = 3
"""A delta is -3 to 3."""

USE_GAIN = 32
"""What a use adds to the use count."""

USE_DECAY = 5
"""A use count loses 1 / 2**USE_DECAY of itself per event of its layer."""


def delta_layout(config: EngineConfig) -> data.ArrayLayout:
    """One delta for each lane."""
    return data.ArrayLayout(signed(DELTA_BITS), config.num_experts)


def use_layout(config: EngineConfig) -> data.ArrayLayout:
    """One use count for each lane."""
    return data.ArrayLayout(unsigned(USE_BITS), config.num_experts)


class RowUpdate(wiring.Component):
    """Adds one delta to each lane of a row, saturating. Combinational.

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
        The row after learning.
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
        for e in range(self.lanes):
            total = Signal(signed(width + 1), name=f"total_{e}")
            sign, overflow = total[width], total[width] ^ total[width - 1]
            m.d.comb += [
                total.eq(self.i[e] + self.delta[e]),
                # 0111... or 1000... when the two top bits differ.
                self.o[e].eq(
                    Cat(
                        *(Mux(overflow, ~sign, total[b]) for b in range(width - 1)), sign
                    ).as_signed()
                ),
            ]
        return m


class Learner(wiring.Component):
    """Grades the scores of a layer against the set that was used; counts uses.

    Both outputs are registered: they belong to the inputs of the last cycle with ``enable``, and
    are 0 after reset.

    Source: architecture section 2, *learn*.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses the margins, in whole units.

    Members
    -------
    enable : In
        Take the other inputs.
    score : In
        Scores of the layer before this event, quarter units.
    use : In
        Use counts of the layer before this event.
    used : In
        Lanes of the set.
    learning : In
        When 0 every delta is 0; uses are counted all the same.
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
                "enable": In(1),
                "score": In(data.ArrayLayout(signed(config.score_bits), config.num_experts)),
                "use": In(use_layout(config)),
                "used": In(config.num_experts),
                "learning": In(1),
                "delta": Out(delta_layout(config)),
                "use_next": Out(use_layout(config)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        low = c.margin_low << FRACTION_BITS
        step = c.margin_step << FRACTION_BITS
        high = c.margin_high << FRACTION_BITS
        use_max = (1 << USE_BITS) - 1
        for e in range(c.num_experts):
            score, used = self.score[e], self.used[e]
            wrong = Signal(DELTA_BITS, name=f"wrong_{e}")
            m.d.comb += wrong.eq(
                Cat(
                    Mux(used, score < low, score > -low),
                    Mux(used, score < step, score > -step),
                    Mux(used, score < -high, score > high),
                )
            )
            steps = Signal(range(DELTA_BITS + 1), name=f"steps_{e}")
            m.d.comb += steps.eq(wrong[0] + wrong[1] + wrong[2])
            with m.If(self.enable):
                m.d.sync += self.delta[e].eq(Mux(self.learning, Mux(used, steps, -steps), 0))

            count = self.use[e]
            loss = Signal(USE_BITS - USE_DECAY, name=f"loss_{e}")
            left = Signal(USE_BITS, name=f"left_{e}")
            # max(1, count >> 5), and nothing of nothing.
            m.d.comb += [
                loss.eq(count >> USE_DECAY),
                left.eq(count - Mux((loss == 0) & (count != 0), 1, loss)),
            ]
            with m.If(self.enable):
                m.d.sync += self.use_next[e].eq(
                    Mux(used, Mux(left > use_max - USE_GAIN, use_max, left + USE_GAIN), left)
                )
        return m
