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
            **({"late": counted, "near": 1} if config.look > 1 else {}),
        }
    )


def _times(value: Value, factor: int) -> Value:
    """A product with a small constant, by additions: synthesis would take a multiplier block."""
    return sum((value << bit for bit in range(4) if factor >> bit & 1), Const(0, 1))


class ConfidenceGate(wiring.Component):
    """Threshold of the confidence gate, one for each layer.

    Rows of a level and some counts lie in LUT RAM. An event or a bad prefetch reads its row in the
    next cycle, it is judged in the one after and written in the third; ``changed`` is there in the
    fourth. So two of them are at least three cycles apart.

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
    late : In
        Only where ``lookahead`` is more than 1: how many of the ``good`` ones were on their way.
    bad, bad_layer : In
        One cycle, never with ``event``: a prefetch of this layer was evicted unused or cancelled.
    adaptive : In
        Thresholds move. While low they are ``floor``, and an event clears its layer's row.
    floor : In
        Threshold of level 0, quarter units.
    layer : In
    threshold : Out
        Of the ``layer`` of two cycles before. A register's output.
    near : Out
        Only where ``lookahead`` is more than 1, likewise: the layer is not to be selected for
        before it is the next one.
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
        farther = {"late": In(range(c.top_k + 1)), "near": Out(1)} if c.look > 1 else {}
        super().__init__(
            {
                "event": In(1),
                "event_layer": In(c.layer_bits),
                "good": In(range(c.top_k + 1)),
                "idle": In(1),
                **farther,
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

        # First cycle: what was asked for. Second: its row, with what is new counted. Third: what
        # comes of it. Fourth: written.
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
        if c.look > 1:
            asked_late = Signal.like(self.late)
            m.d.sync += [
                asked_late.eq(Mux(self.event, self.late, 0)),
                row.late.eq(counted(old.late, asked_late)),
                row.near.eq(old.near),
            ]

        total = Signal(range(2 * most + 1))
        ends, overdue, poor, rises, falls = Signal(), Signal(), Signal(), Signal(), Signal()
        judged, judged_event = Signal(), Signal()
        counts = Signal(layout)
        judged_layer = Signal(c.layer_bits)
        m.d.comb += total.eq(row.good + row.bad)
        needed = (c.gate_strict, c.gate_lenient)
        # 8 * good < part * (good + bad)
        strict, lenient = (_times(row.good, 8 - part) < _times(row.bad, part) for part in needed)
        m.d.sync += [
            judged.eq(ready),
            judged_event.eq(ready_event),
            judged_layer.eq(row_layer),
            counts.eq(row),
            ends.eq(total >= c.gate_window),
            overdue.eq(row.events >= c.gate_patience),
            poor.eq(Mux(row.idle << 1 > row.events, lenient, strict)),
        ]
        if c.look > 1:
            seldom_late = Signal()
            m.d.sync += seldom_late.eq(row.late << 3 < _times(row.good, c.gate_late))
        new = Signal(layout)
        m.d.comb += [
            rises.eq(ends & poor & (counts.level != c.gate_levels)),
            falls.eq(Mux(ends, ~poor, overdue) & (counts.level != 0)),
            new.eq(counts),
        ]
        with m.If(judged_event):
            m.d.comb += new.level.eq(counts.level + rises - falls)
            with m.If(ends | overdue | ~self.adaptive):
                m.d.comb += [new.good.eq(0), new.bad.eq(0), new.events.eq(0), new.idle.eq(0)]
                if c.look > 1:
                    m.d.comb += new.late.eq(0)
            if c.look > 1:
                with m.If(ends):
                    m.d.comb += new.near.eq(seldom_late)
            with m.If(~self.adaptive):
                m.d.comb += new.level.eq(0)
                if c.look > 1:
                    m.d.comb += new.near.eq(0)
        m.d.comb += [
            write.en.eq(judged | clearing),
            write.addr.eq(Mux(clearing, walk, judged_layer)),
            write.data.eq(Mux(clearing, 0, new)),
            self.busy.eq(asked | ready | judged),
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
        with m.If(judged_event):
            m.d.sync += [
                self.changed.eq(self.adaptive & (rises | falls)),
                level_changed.eq(new.level),
            ]
        level = Signal.like(new.level)
        looked = data.View(layout, look.data)
        m.d.comb += [
            look.addr.eq(self.layer),
            self.changed_threshold.eq(above_floor(level_changed)),
        ]
        m.d.sync += [
            level.eq(Mux(self.adaptive, looked.level, 0)),
            self.threshold.eq(above_floor(level)),
        ]
        if c.look > 1:
            near = Signal()
            m.d.sync += [near.eq(self.adaptive & looked.near), self.near.eq(near)]
        return m
