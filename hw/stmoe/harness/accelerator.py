# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts accelerator as the engine sees it: timing without arithmetic."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, enum, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe.harness.random_stall import RandomStall
from stmoe.payloads import grant_layout, release_layout, route_layout, token_layout
from stmoe_golden.config import EngineConfig

__all__ = ["Accelerator", "TIME_BITS"]

TIME_BITS = 32
"""Width of the times that the accelerator is told."""


class State(enum.Enum, shape=2):
    TOKEN = 0
    """The next token is presented."""
    ATTENTION = 1
    """Attention of the layer is computed."""
    ROUTE = 2
    """The layer's routing is presented."""
    EXPERTS = 3
    """Experts run, or are waited for."""


class Accelerator(wiring.Component):
    """Runs a trace at the pace of an accelerator (architecture section 5).

    A token is presented; for each layer attention takes ``attention_cycles``, the routing is
    presented, and K grants are waited for. Experts run in the order of their grants, one at a
    time, each from when it is granted or when the one before has ended. Each is released as soon
    as it has run. A layer ends when its last expert has run.

    Timing: a token taken in cycle t, or a layer whose last expert ran up to and including cycle
    t, has its routing presented from cycle t + 1 + ``attention_cycles`` on. An expert granted in
    cycle t, with none running then, runs in cycles t + 1 to t + ``expert_cycles``, and its
    release is presented from the next cycle on; the next expert, if granted, runs from that same
    cycle. The token after is presented one cycle after ``finished``.

    A grant with ``error`` has no slot: it counts as run after one cycle, with no release.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    i_token : :py:`In(stream.Signature(token_layout(config)))`
    i_route : :py:`In(stream.Signature(route_layout(config)))`
        The trace; taken in the cycle in which the engine takes it.
    token : :py:`Out(stream.Signature(token_layout(config)))`
    route : :py:`Out(stream.Signature(route_layout(config)))`
    grant : :py:`In(stream.Signature(grant_layout(config)))`
        Always taken at once, but for jitter.
    release : :py:`Out(stream.Signature(release_layout(config)))`
    attention_cycles : :py:`In(32)`
        Cycles of attention in each layer; 0 is allowed.
    expert_cycles : :py:`In(32)`
        Cycles that one expert runs; 0 counts as 1.
    jitter : :py:`In(32)`
        Seed of random stalls of ``grant`` and delays of ``release``; 0 for none.
    finished : :py:`Out(1)`
        The last expert of a token is in its last cycle.
    waiting : :py:`Out(1)`
        Experts are needed and none runs: the accelerator is stalled.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "i_token": In(stream.Signature(token_layout(config))),
                "i_route": In(stream.Signature(route_layout(config))),
                "token": Out(stream.Signature(token_layout(config))),
                "route": Out(stream.Signature(route_layout(config))),
                "grant": In(stream.Signature(grant_layout(config))),
                "release": Out(stream.Signature(release_layout(config))),
                "attention_cycles": In(TIME_BITS),
                "expert_cycles": In(TIME_BITS),
                "jitter": In(32),
                "finished": Out(1),
                "waiting": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        state = Signal(State)
        layer = Signal(range(config.num_layers))
        ran = Signal(range(config.top_k))
        spent = Signal(TIME_BITS, init=1)
        """Cycles of the current attention or expert, this one included."""

        # Grants wait here until they have run: the head is the expert that runs.
        entry_layout = data.StructLayout({"slot": config.slot_bits, "error": 1})
        m.submodules.granted = granted = fifo.SyncFIFO(width=entry_layout.size, depth=config.top_k)
        # A layer's releases may wait for jitter while the next layer already runs.
        m.submodules.done = done = fifo.SyncFIFO(width=config.slot_bits, depth=2 * config.top_k)
        m.submodules.grant_stall = grant_stall = RandomStall(1)
        m.submodules.release_stall = release_stall = RandomStall(2, length_bits=6)
        m.d.comb += [grant_stall.seed.eq(self.jitter), release_stall.seed.eq(self.jitter)]

        head = data.View(entry_layout, granted.r_data)
        m.d.comb += [
            granted.w_data.eq(Cat(self.grant.payload.slot, self.grant.payload.error)),
            granted.w_en.eq(self.grant.valid & self.grant.ready),
            self.grant.ready.eq(granted.w_rdy & ~grant_stall.stall),
        ]

        presented = Signal()
        """A release was presented and not taken: it must stay."""
        m.d.comb += [
            self.release.payload.slot.eq(done.r_data),
            self.release.valid.eq(done.r_rdy & (presented | ~release_stall.stall)),
            done.r_en.eq(self.release.valid & self.release.ready),
        ]
        m.d.sync += presented.eq(self.release.valid & ~self.release.ready)

        m.d.comb += [
            self.token.payload.eq(self.i_token.payload),
            self.token.valid.eq(self.i_token.valid & (state == State.TOKEN)),
            self.i_token.ready.eq(self.token.ready & (state == State.TOKEN)),
            self.route.payload.eq(self.i_route.payload),
            self.route.valid.eq(self.i_route.valid & (state == State.ROUTE)),
            self.i_route.ready.eq(self.route.ready & (state == State.ROUTE)),
        ]

        def begin_layer():
            m.d.sync += spent.eq(1)
            with m.If(self.attention_cycles == 0):
                m.d.sync += state.eq(State.ROUTE)
            with m.Else():
                m.d.sync += state.eq(State.ATTENTION)

        with m.Switch(state):
            with m.Case(State.TOKEN):
                with m.If(self.token.valid & self.token.ready):
                    m.d.sync += layer.eq(0)
                    begin_layer()
            with m.Case(State.ATTENTION):
                m.d.sync += spent.eq(spent + 1)
                with m.If(spent >= self.attention_cycles):
                    m.d.sync += state.eq(State.ROUTE)
            with m.Case(State.ROUTE):
                with m.If(self.route.valid & self.route.ready):
                    m.d.sync += [state.eq(State.EXPERTS), ran.eq(0), spent.eq(1)]
            with m.Case(State.EXPERTS):
                m.d.comb += self.waiting.eq(~granted.r_rdy)
                last = head.error | (spent >= self.expert_cycles)
                with m.If(granted.r_rdy & ~last):
                    m.d.sync += spent.eq(spent + 1)
                with m.If(granted.r_rdy & last & (done.w_rdy | head.error)):
                    m.d.comb += [
                        granted.r_en.eq(1),
                        done.w_data.eq(head.slot),
                        done.w_en.eq(~head.error),
                    ]
                    m.d.sync += [spent.eq(1), ran.eq(ran + 1)]
                    with m.If(ran == config.top_k - 1):
                        with m.If(layer == config.num_layers - 1):
                            m.d.comb += self.finished.eq(1)
                            m.d.sync += state.eq(State.TOKEN)
                        with m.Else():
                            m.d.sync += layer.eq(layer + 1)
                            begin_layer()
        return m
