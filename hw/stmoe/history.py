# SPDX-License-Identifier: Apache-2.0
"""The latest set of each layer."""

from __future__ import annotations

from amaranth.hdl import Array, Module, Signal, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .expert_map import lane_bits

__all__ = ["History"]


class History(wiring.Component):
    """Holds the experts that each layer used last, in rank order.

    A read takes one cycle; ``row`` and ``known`` then hold until the next read. A write or a
    ``forget`` is seen by reads of the following cycles. After reset no layer has a set.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    read, read_layer : In
        ``row`` is the set of ``read_layer`` from the next cycle on.
    row : Out
        K experts, rank 0 first; meaningless unless ``known``.
    known : Out
        The layer has a set in this sequence.
    write, write_layer, write_row : In
        The set becomes the layer's latest.
    forget : In
        One cycle: a new sequence, no layer has a set. Not together with ``write``.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        row = data.ArrayLayout(unsigned(lane_bits(config)), config.top_k)
        super().__init__(
            {
                "read": In(1),
                "read_layer": In(config.layer_bits),
                "row": Out(row),
                "known": Out(1),
                "write": In(1),
                "write_layer": In(config.layer_bits),
                "write_row": In(row),
                "forget": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        layers = self.config.num_layers
        m.submodules.sets = sets = memory.Memory(
            shape=self.row.shape(), depth=max(2, layers), init=[]
        )
        read, write = sets.read_port(), sets.write_port()
        # Flags outside the memory, so that a new sequence forgets all sets in one cycle.
        known = Array(Signal(name=f"known_{layer}") for layer in range(layers))
        m.d.comb += [
            read.en.eq(self.read),
            read.addr.eq(self.read_layer),
            self.row.eq(read.data),
            write.en.eq(self.write),
            write.addr.eq(self.write_layer),
            write.data.eq(self.write_row),
        ]
        with m.If(self.read):
            m.d.sync += self.known.eq(known[self.read_layer])
        with m.If(self.write):
            m.d.sync += known[self.write_layer].eq(1)
        with m.If(self.forget):
            m.d.sync += [flag.eq(0) for flag in known]
        return m
