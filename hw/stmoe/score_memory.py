# SPDX-License-Identifier: Apache-2.0
"""Scores and use counts: what the predictor writes and everything else reads."""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .learner import use_layout

__all__ = ["ScoreMemory", "score_layout"]


def score_layout(config: EngineConfig) -> data.ArrayLayout:
    """One score for each lane, quarter units."""
    return data.ArrayLayout(signed(config.score_bits), config.num_experts)


class ScoreMemory(wiring.Component):
    """A row of scores and a row of use counts for each layer.

    One read port, which answers one cycle later: the predictor's in the cycles with ``own``, the
    victim choice's in all others (they never need it at once, see docs/architecture.md 4.1). One
    write port for each kind. A write is seen by reads presented from the next cycle on. After
    reset all rows are cleared, one layer a cycle: until ``clear_done`` nothing may be written, and
    the row inputs must be 0 (they come from registers that have not been loaded yet, which saves
    a multiplexer of a whole row).

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    own : In
        ``layer`` is read in this cycle, else ``victim_layer``.
    layer, victim_layer : In
    blank : In
        Scores that are read in this cycle are given as 0.
    score, use : Out
        The rows that were read one cycle before. Not reset.
    write_score, write_use : In
        Write ``score_row``, ``use_row`` to the layer given one cycle before.
    score_layer, use_layer : In
        Layer of a write in the next cycle.
    clear_done : Out
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        layer, score, use = config.layer_bits, score_layout(config), use_layout(config)
        super().__init__(
            {
                "own": In(1),
                "layer": In(layer),
                "victim_layer": In(layer),
                "blank": In(1),
                "score": Out(score),
                "use": Out(use),
                "write_score": In(1),
                "score_layer": In(layer),
                "score_row": In(score),
                "write_use": In(1),
                "use_layer": In(layer),
                "use_row": In(use),
                "clear_done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        layers = self.config.num_layers
        read_layer = Signal(self.config.layer_bits)
        m.d.comb += read_layer.eq(Mux(self.own, self.layer, self.victim_layer))

        def kind(name, blank, row_read, enable, layer, row_write):
            shape = row_read.shape()
            m.submodules[name] = ram = memory.Memory(
                shape=shape,
                depth=max(2, layers),
                init=[],
            )
            # The register of the port is written out, as it can be blanked.
            read, write = ram.read_port(domain="comb"), ram.write_port()
            data_read = Signal(shape, name=f"{name}_read", reset_less=True)
            write_layer = Signal(self.config.layer_bits, name=f"{name}_write_layer")
            m.d.comb += [
                read.addr.eq(read_layer),
                row_read.eq(data_read),
                write.en.eq(enable | ~self.clear_done),
                write.addr.eq(write_layer),
                write.data.eq(row_write),
            ]
            # Straight from a register: it goes to hundreds of LUT RAMs.
            with m.If(self.clear_done):
                m.d.sync += write_layer.eq(layer)
            with m.Else():
                m.d.sync += write_layer.eq(write_layer + 1)
                with m.If(write_layer == layers - 1):
                    m.d.sync += self.clear_done.eq(1)
            with m.If(blank):
                m.d.sync += data_read.as_value().eq(0)
            with m.Else():
                m.d.sync += data_read.eq(read.data)

        kind(
            "score_rows",
            self.blank,
            self.score,
            self.write_score,
            self.score_layer,
            self.score_row,
        )
        kind("use_rows", Const(0), self.use, self.write_use, self.use_layer, self.use_row)
        return m
