# SPDX-License-Identifier: Apache-2.0
"""Hands a routing trace, word by word, to the accelerator model."""

from __future__ import annotations

from amaranth.hdl import Module, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe.payloads import route_layout, token_layout
from stmoe_golden.config import EngineConfig

__all__ = ["TracePlayer", "word_layout"]

FIFO_WORDS = 4
"""Hides the latency of the trace memory, so that it adds no cycle between two words."""


def word_layout(config: EngineConfig) -> data.StructLayout:
    """One word of a trace: a token (``is_token``: ``new_sequence``, ``token_id``) or the routing
    of one layer (``layer``, ``experts`` in rank order)."""
    token = token_layout(config)
    return data.StructLayout(
        {
            "is_token": 1,
            "new_sequence": 1,
            "token_id": token["token_id"].shape,
            "layer": config.layer_bits,
            "experts": data.ArrayLayout(unsigned(config.expert_bits), config.top_k),
        }
    )


class TracePlayer(wiring.Component):
    """Splits a trace into its tokens and its routes, in order.

    Only the head of the trace is offered, on the stream that it belongs to, so a route is never
    seen before the token that it belongs to has been taken. All is context 0.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    i : :py:`In(stream.Signature(word_layout(config)))`
        For each token of the trace: one token word, then the ``num_layers`` route words.
    token : :py:`Out(stream.Signature(token_layout(config)))`
    route : :py:`Out(stream.Signature(route_layout(config)))`
        A word is offered from the cycle after it was taken, when it is the head.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "i": In(stream.Signature(word_layout(config))),
                "token": Out(stream.Signature(token_layout(config))),
                "route": Out(stream.Signature(route_layout(config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        layout = word_layout(self._config)
        m.submodules.words = words = fifo.SyncFIFO(width=layout.size, depth=FIFO_WORDS)
        head = data.View(layout, words.r_data)
        m.d.comb += [
            words.w_data.eq(self.i.payload.as_value()),
            words.w_en.eq(self.i.valid),
            self.i.ready.eq(words.w_rdy),
            self.token.payload.token_id.eq(head.token_id),
            self.token.payload.new_sequence.eq(head.new_sequence),
            self.token.valid.eq(words.r_rdy & head.is_token),
            self.route.payload.layer.eq(head.layer),
            self.route.payload.experts.eq(head.experts),
            self.route.valid.eq(words.r_rdy & ~head.is_token),
            words.r_en.eq(
                (self.token.valid & self.token.ready) | (self.route.valid & self.route.ready)
            ),
        ]
        return m
