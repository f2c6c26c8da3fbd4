# SPDX-License-Identifier: Apache-2.0
"""Scores and use counts: what the predictor writes and everything else reads."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed
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

    Two read ports, the predictor's and the victim choice's, answer one cycle later; one write
    port for each kind. A write is seen by reads presented from the next cycle on. After reset all
    rows are cleared, one layer a cycle: until ``clear_done`` nothing may be written, and the row
    inputs must be 0 (they come from registers that have not been loaded yet, which saves a
    multiplexer of a whole row).

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    layer, score, use : In, Out, Out
        The predictor's port.
    victim_layer, victim_score, victim_use : In, Out, Out
        The victim choice's port.
    write_score, write_use : In
        Write ``score_row`` to ``score_layer``, ``use_row`` to ``use_layer``.
    clear_done : Out
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        layer, score, use = config.layer_bits, score_layout(config), use_layout(config)
        super().__init__(
            {
                "layer": In(layer),
                "score": Out(score),
                "use": Out(use),
                "victim_layer": In(layer),
                "victim_score": Out(score),
                "victim_use": Out(use),
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
        clear_layer = Signal(self.config.layer_bits)
        with m.If(~self.clear_done):
            m.d.sync += clear_layer.eq(clear_layer + 1)
            with m.If(clear_layer == layers - 1):
                m.d.sync += self.clear_done.eq(1)

        def kind(name, shape, victim, own, enable, layer, row):
            m.submodules[name] = ram = memory.Memory(shape=shape, depth=max(2, layers), init=[])
            read, victim_read, write = ram.read_port(), ram.read_port(), ram.write_port()
            m.d.comb += [
                read.addr.eq(self.layer),
                victim_read.addr.eq(self.victim_layer),
                own.eq(read.data),
                victim.eq(victim_read.data),
                write.en.eq(enable | ~self.clear_done),
                write.addr.eq(Mux(self.clear_done, layer, clear_layer)),
                write.data.eq(row),
            ]

        kind(
            "score_rows",
            self.score.shape(),
            self.victim_score,
            self.score,
            self.write_score,
            self.score_layer,
            self.score_row,
        )
        kind(
            "use_rows",
            self.use.shape(),
            self.victim_use,
            self.use,
            self.write_use,
            self.use_layer,
            self.use_row,
        )
        return m
