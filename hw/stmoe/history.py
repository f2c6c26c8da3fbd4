# SPDX-License-Identifier: Apache-2.0
"""The sets of the events before: of the last layers, and of the token before."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .expert_map import lane_bits

__all__ = ["History"]


class History(wiring.Component):
    """Holds the sets that the latest event's correction needs.

    Layers come strictly in order, so the sets of the layers before this one are those of the last
    events, and a layer has a set of the token before just when this is not the first token of its
    sequence. Only that set needs a memory.

    ``previous`` follows ``layer`` by one cycle, and a write by two. After reset no layer has a set.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    layer : In
        Layer of the event under way.
    previous, previous_known : Out
        The set that this layer used for the token before, rank 0 first; meaningless unless known.
    recent, recent_known : Out
        ``recent[d-1]`` is the set of layer ``layer`` - d, d = 1..D; meaningless unless known.
    write, row : In
        One cycle, the last of the event: this was the layer's set.
    forget : In
        One cycle: a new sequence, no layer has a set. Not together with ``write``. The next
        event's layer is 0.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        row = data.ArrayLayout(unsigned(lane_bits(config)), config.top_k)
        super().__init__(
            {
                "layer": In(config.layer_bits),
                "previous": Out(row),
                "previous_known": Out(1),
                "recent": Out(data.ArrayLayout(row, config.depth)),
                "recent_known": Out(config.depth),
                "write": In(1),
                "row": In(row),
                "forget": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        m.submodules.sets = sets = memory.Memory(
            shape=self.row.shape(), depth=max(2, c.num_layers), init=[]
        )
        read, write = sets.read_port(), sets.write_port()
        m.d.comb += [
            read.addr.eq(self.layer),
            self.previous.eq(read.data),
            write.en.eq(self.write),
            write.addr.eq(self.layer),
            write.data.eq(self.row),
        ]
        with m.If(self.write):
            with m.If(self.layer == c.num_layers - 1):
                m.d.sync += self.previous_known.eq(1)
            if c.depth:
                m.d.sync += [
                    self.recent.as_value().eq(Cat(self.row, self.recent)),
                    self.recent_known.eq(Cat(1, self.recent_known)),
                ]
        with m.If(self.forget):
            m.d.sync += [self.previous_known.eq(0), self.recent_known.eq(0)]
        return m
