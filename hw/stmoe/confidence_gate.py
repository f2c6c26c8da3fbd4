# SPDX-License-Identifier: Apache-2.0
"""Moves each layer's threshold by what becomes of its prefetches."""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import FRACTION_BITS, EngineConfig

__all__ = ["ConfidenceGate"]


def _row_layout(config: EngineConfig) -> data.StructLayout:
    counted = (2 * config.gate_window - 1).bit_length()
    events = config.gate_patience.bit_length()
    return data.StructLayout(
        {
            "level": config.gate_levels.bit_length(),
            "good": counted,
            "bad": counted,
            "events": events,
            "idle": events,
        }
    )


def _times(value: Value, factor: int) -> Value:
    """A product with a small constant, by additions: synthesis would take a multiplier block."""
    return sum((value << bit for bit in range(4) if factor >> bit & 1), Const(0, 1))


class ConfidenceGate(wiring.Component):
    """Threshold of the confidence gate, one for each layer.

    Rows of a level and four counts lie in LUT RAM. An event or a bad prefetch reads its row in
    the next cycle and writes it in the one after; ``changed`` is there in the third. So two of them
    are at least three cycles apart.

    Source: architecture section 2, *Confidence gate*; the rule is
    :mod:`stmoe_golden.confidence`'s.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    event, event_layer, good, idle : In
        One cycle: a routing event of this layer found ``good`` prefetches resident for the first
        time or on their way; ``idle``: no load was in flight.
    bad, bad_layer : In
        One cycle, never with ``event``: a prefetch of this layer was evicted unused or cancelled.
    adaptive : In
        Thresholds move. While low they are ``floor``, and an event clears its layer's row.
    floor : In
        Threshold of level 0, quarter units.
    layer : In
    threshold : Out
        Of the ``layer`` of two cycles before. A register's output.
    busy : Out
        An event or a bad prefetch is being counted.
    changed, changed_threshold : Out
        What the last event has made of its layer's threshold, if it moved; from ``busy``'s end to
        the next event, while ``floor`` stays.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = c = config
        score = signed(c.score_bits)
        super().__init__(
            {
                "event": In(1),
                "event_layer": In(c.layer_bits),
                "good": In(range(c.top_k + 1)),
                "idle": In(1),
                "bad": In(1),
                "bad_layer": In(c.layer_bits),
                "adaptive": In(1),
                "floor": In(score),
                "layer": In(c.layer_bits),
                "threshold": Out(score),
                "busy": Out(1),
                "changed": Out(1),
                "changed_threshold": Out(score),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layout = _row_layout(c)
        m.submodules.rows = rows = memory.Memory(
            # One number: see correlation_table.py.
            shape=unsigned(layout.size),
            depth=max(2, c.num_layers),
            init=[],
        )
        read, write = rows.read_port(domain="comb"), rows.write_port()
        look = rows.read_port(domain="comb")

        # A reset does not clear a memory: all rows are written first.
        clearing = Signal(init=1)
        walk = Signal(c.layer_bits)
        with m.If(clearing):
            m.d.sync += walk.eq(walk + 1)
            with m.If(walk == c.num_layers - 1):
                m.d.sync += clearing.eq(0)

        # First cycle: what was asked for. Second: its row, with what is new counted.
        asked, asked_event, asked_idle = Signal(), Signal(), Signal()
        asked_layer = Signal(c.layer_bits)
        asked_good = Signal.like(self.good)
        m.d.sync += [
            asked.eq(self.event | self.bad),
            asked_event.eq(self.event),
            asked_layer.eq(Mux(self.event, self.event_layer, self.bad_layer)),
            asked_good.eq(Mux(self.event, self.good, 0)),
            asked_idle.eq(self.event & self.idle),
        ]
        most = 2 * c.gate_window - 1

        def counted(count, more):
            """``count + more``, at most ``most``."""
            total = Signal(len(count) + 1)
            m.d.comb += total.eq(count + more)
            return Mux(total[-1], most, total[:-1])

        m.d.comb += read.addr.eq(asked_layer)
        old = data.View(layout, read.data)
        row = Signal(layout)
        ready, ready_event = Signal(), Signal()
        row_layer = Signal(c.layer_bits)
        m.d.sync += [
            ready.eq(asked),
            ready_event.eq(asked_event),
            row_layer.eq(asked_layer),
            row.level.eq(old.level),
            row.good.eq(counted(old.good, asked_good)),
            row.bad.eq(counted(old.bad, asked & ~asked_event)),
            row.events.eq(old.events + asked_event),
            row.idle.eq(old.idle + asked_idle),
        ]

        # Third: judged and written.
        new = Signal(layout)
        total = Signal(range(2 * most + 1))
        ends, late, poor, rises, falls = Signal(), Signal(), Signal(), Signal(), Signal()
        needed = (c.gate_strict, c.gate_lenient)
        # 8 * good < part * (good + bad)
        strict, lenient = (_times(row.good, 8 - part) < _times(row.bad, part) for part in needed)
        m.d.comb += [
            total.eq(row.good + row.bad),
            ends.eq(total >= c.gate_window),
            late.eq(row.events >= c.gate_patience),
            poor.eq(Mux(row.idle << 1 > row.events, lenient, strict)),
            rises.eq(ends & poor & (row.level != c.gate_levels)),
            falls.eq(Mux(ends, ~poor, late) & (row.level != 0)),
            new.eq(row),
        ]
        with m.If(ready_event):
            m.d.comb += new.level.eq(row.level + rises - falls)
            with m.If(~self.adaptive):
                m.d.comb += new.level.eq(0)
            with m.If(ends | late | ~self.adaptive):
                m.d.comb += [new.good.eq(0), new.bad.eq(0), new.events.eq(0), new.idle.eq(0)]
        m.d.comb += [
            write.en.eq(ready | clearing),
            write.addr.eq(Mux(clearing, walk, row_layer)),
            write.data.eq(Mux(clearing, 0, new)),
            self.busy.eq(asked | ready),
        ]

        highest = (1 << (c.score_bits - 1)) - 1

        def above_floor(level):
            """Threshold of a level."""
            shift = level * (c.gate_step << FRACTION_BITS)
            value = Signal(signed(max(c.score_bits, len(shift) + 1) + 1))
            m.d.comb += value.eq(self.floor + shift)
            return Mux(value > highest, highest, value)

        level_changed = Signal.like(new.level)
        with m.If(self.event):
            m.d.sync += self.changed.eq(0)
        with m.If(ready_event):
            m.d.sync += [
                self.changed.eq(self.adaptive & (rises | falls)),
                level_changed.eq(new.level),
            ]
        level = Signal.like(new.level)
        m.d.comb += [
            look.addr.eq(self.layer),
            self.changed_threshold.eq(above_floor(level_changed)),
        ]
        m.d.sync += [
            level.eq(Mux(self.adaptive, data.View(layout, look.data).level, 0)),
            self.threshold.eq(above_floor(level)),
        ]
        return m
