# SPDX-License-Identifier: Apache-2.0
"""Scores and use counts: what the predictor writes and everything else reads."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import USE_BITS, EngineConfig

from .learner import use_layout
from .synthesis import ANY_ON_COLLISION, GROUPS, group_of, group_register

__all__ = ["ScoreMemory", "score_layout"]


def score_layout(config: EngineConfig) -> data.ArrayLayout:
    """One score for each lane, quarter units."""
    return data.ArrayLayout(signed(config.score_bits), config.num_lanes)


class ScoreMemory(wiring.Component):
    """A row of scores and a row of use counts for each layer.

    One read port, which answers two cycles later: the predictor's in the cycles with ``own``, the
    victim choice's in all others (they never need it at once, see docs/architecture.md 4.1). Its
    address is kept in several registers, each near the lanes that it serves: one for all would
    have a thousand loads. One
    write port for each kind. A write is seen by reads presented in its cycle and later. From the
    cycle after reset on all rows are cleared, one layer a cycle: until ``clear_done`` nothing may
    be written, and the row inputs must be 0 (they come from registers that have not been loaded
    yet, which saves a multiplexer of a whole row).

    Where ``config.folds`` is more than one, a layer has a row for each fold, clearing takes a cycle
    for each of them (of ``1 << fold_bits`` folds a layer), and each address has a fold beside its
    layer. The rows are so many that they are in block RAM: a write is seen by reads presented
    after its cycle, and what a read of that row in its cycle gives is undefined.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    own : In
        ``layer`` is read in this cycle, else ``victim_layer``.
    layer, victim_layer : In
    fold, victim_fold : In
        Only where there are several.
    blank : In
        Scores that are asked for in this cycle are given as 0.
    score, use : Out
        The rows that were asked for two cycles before. Not reset.
    write_score, write_use : In
        In the next cycle ``score_row``, ``use_row`` are written.
    score_layer, use_layer : In
        Layer of a write in the next cycle.
    score_fold, use_fold : In
        Its fold, where there are several.
    clear_done : Out
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        layer, score, use = config.layer_bits, score_layout(config), use_layout(config)
        folds = ("fold", "victim_fold", "score_fold", "use_fold") if config.folds > 1 else ()
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
                **{name: In(config.fold_bits) for name in folds},
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        rows, bits = c.num_layers, c.layer_bits
        addresses = [self.layer, self.victim_layer, self.score_layer, self.use_layer]
        if c.folds > 1:
            folds = [self.fold, self.victim_fold, self.score_fold, self.use_fold]
            rows, bits = rows << c.fold_bits, bits + c.fold_bits
            addresses = [Cat(*pair) for pair in zip(folds, addresses, strict=True)]
        own, victim, score_address, use_address = addresses
        read_layer = Signal(bits)
        m.d.comb += read_layer.eq(Mux(self.own, own, victim))

        def kind(name, width, blank, row_read, enable, layer, row_write):
            # Straight from registers: they go to hundreds of LUT RAMs.
            write_layer = Signal(bits, name=f"{name}_write_layer")
            writes = [group_register(1, n, f"{name}_write_{n}") for n in range(GROUPS)]
            clearing = Signal(name=f"{name}_clearing")
            with m.If(self.clear_done):
                m.d.sync += [write_layer.eq(layer), *(write.eq(enable) for write in writes)]
            with m.Else():
                m.d.sync += [clearing.eq(1), *(write.eq(1) for write in writes)]
                with m.If(clearing):
                    m.d.sync += write_layer.eq(write_layer + 1)
                with m.If(clearing & (write_layer == rows - 1)):
                    m.d.sync += [self.clear_done.eq(1), *(write.eq(0) for write in writes)]
            groups = [group_of(e, c.num_lanes) for e in range(c.num_lanes)]
            for group in sorted(set(groups)):
                first = groups.index(group)
                lanes = slice(width * first, width * (first + groups.count(group)))
                part = row_write.as_value()[lanes]
                m.submodules[f"{name}_{group}"] = ram = memory.Memory(
                    shape=unsigned(len(part)),
                    depth=max(2, rows),
                    init=[],
                    # No row of block RAM is needed that is read as it is written.
                    attrs=ANY_ON_COLLISION if c.folds > 1 else {},
                )
                write = ram.write_port()
                if c.folds > 1:
                    read = ram.read_port()
                    m.d.comb += read.addr.eq(read_layer)
                else:
                    # The registers of the port are written out: the address for its own sake, the
                    # data because they can be blanked.
                    read = ram.read_port(domain="comb")
                    address = group_register(bits, group, f"{name}_{group}_layer")
                    m.d.sync += address.eq(read_layer)
                    m.d.comb += read.addr.eq(address)
                data_read = Signal(len(part), name=f"{name}_{group}_read", reset_less=True)
                m.d.comb += [
                    row_read.as_value()[lanes].eq(data_read),
                    write.en.eq(writes[group]),
                    write.addr.eq(write_layer),
                    write.data.eq(part),
                ]
                m.d.sync += data_read.eq(read.data)
                if blank is not None:
                    # From a register, as it resets those of all lanes.
                    blanks = group_register(1, group, f"{name}_{group}_blank")
                    m.d.sync += blanks.eq(blank)
                    with m.If(blanks):
                        m.d.sync += data_read.eq(0)

        kind(
            "score_rows",
            c.score_bits,
            self.blank,
            self.score,
            self.write_score,
            score_address,
            self.score_row,
        )
        kind(
            "use_rows",
            USE_BITS,
            None,
            self.use,
            self.write_use,
            use_address,
            self.use_row,
        )
        return m
