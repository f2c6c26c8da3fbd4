# SPDX-License-Identifier: Apache-2.0
"""Payloads of the engine's streams, and the two AXI interfaces as one stream per channel."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Value, ValueLike, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import NUM_SEGMENTS, PAGE_BYTES, EngineConfig
from stmoe_golden.records import Kind

__all__ = [
    "CYCLE_BITS",
    "ERROR_RESPONSE_BIT",
    "CompletionStatus",
    "EventKind",
    "axi4_read_signature",
    "axi4_write_signature",
    "axi4_lite_signature",
    "buffer_place_layout",
    "completion_layout",
    "event_data_bits",
    "event_layout",
    "fill_layout",
    "grant_layout",
    "load_layout",
    "packed",
    "release_layout",
    "route_layout",
    "segment_layout",
    "segment_write_layout",
    "selection_layout",
    "token_layout",
]

CONTEXT_BITS = 1
TOKEN_ID_BITS = 32
ERROR_RESPONSE_BIT = 1
"""Set in the AXI responses SLVERR and DECERR."""

CYCLE_BITS = 40


def packed(layout: data.StructLayout, **fields: ValueLike) -> Value:
    """All bits of a payload: the fields given, and 0 for the others.

    For payloads with fields that are always 0. A bit that is assigned to a constant apart from its
    neighbours becomes an `always @*` without inputs, which no Verilog simulator ever runs.
    """
    unknown = set(fields) - set(layout.members)
    if unknown:
        raise ValueError(f"no such fields: {sorted(unknown)}")
    parts = []
    for name, field in layout:
        value = Cat(fields.get(name, Const(0, 1)))[: field.width]
        parts += [value, Const(0, field.width - len(value))]
    return Cat(*parts)


class EventKind(enum.IntEnum, shape=max(Kind).bit_length()):
    """Kinds of record on the event port: the golden model's, with a shape."""

    locals().update({kind.name: kind.value for kind in Kind})


class CompletionStatus(enum.Enum, shape=2):
    """How a transfer ended."""

    DONE = 0
    """Every beat has come, without error."""
    DRAINED = 1
    """It was cancelled and no beat is owed any more."""
    ERROR = 2
    """Every beat has come, and a read error remained after the last retry."""
    TIMEOUT = 3
    """The watchdog gave it up; its AXI ID and its slot are never used again before reset."""


def token_layout(config: EngineConfig) -> data.StructLayout:
    """``token``: a token begins."""
    return data.StructLayout(
        {"context": CONTEXT_BITS, "token_id": TOKEN_ID_BITS, "new_sequence": 1}
    )


def route_layout(config: EngineConfig) -> data.StructLayout:
    """``route``: the router's decision for one token in one layer, experts in rank order."""
    return data.StructLayout(
        {
            "context": CONTEXT_BITS,
            "layer": config.layer_bits,
            "experts": data.ArrayLayout(unsigned(config.expert_bits), config.top_k),
        }
    )


def grant_layout(config: EngineConfig) -> data.StructLayout:
    """``grant``: an expert is ready in a slot (or, with ``error``, could not be loaded)."""
    return data.StructLayout(
        {
            "context": CONTEXT_BITS,
            "layer": config.layer_bits,
            "expert": config.expert_bits,
            "slot": config.slot_bits,
            "error": 1,
        }
    )


def release_layout(config: EngineConfig) -> data.StructLayout:
    """``release``: the accelerator has used one grant."""
    return data.StructLayout({"slot": config.slot_bits})


def fill_layout(config: EngineConfig) -> data.StructLayout:
    """``fill``: one beat of expert data for the buffer; ``offset`` counts beats in the slot."""
    return data.StructLayout(
        {
            "slot": config.slot_bits,
            "offset": config.offset_bits,
            "data": config.axi_data_width,
        }
    )


def selection_layout(config: EngineConfig) -> data.StructLayout:
    """One expert chosen for prefetch; ``score`` is signed, in quarter units."""
    return data.StructLayout(
        {
            "layer": config.layer_bits,
            "expert": config.expert_bits,
            "score": signed(config.score_bits),
        }
    )


def load_layout(config: EngineConfig) -> data.StructLayout:
    """One load that has a slot."""
    return data.StructLayout(
        {
            "prefetch": 1,
            "layer": config.layer_bits,
            "expert": config.expert_bits,
            "slot": config.slot_bits,
        }
    )


def completion_layout(config: EngineConfig) -> data.StructLayout:
    """One load that has ended."""
    return data.StructLayout({"transfer": config.transfer_bits, "status": CompletionStatus})


def segment_layout(config: EngineConfig) -> data.StructLayout:
    """Where one part of a layer's experts lies: byte address of expert ``e`` is
    ``base + e * stride``; ``beats`` AXI beats belong to this part (0: the part is unused)."""
    return data.StructLayout(
        {
            "base": config.axi_addr_width,
            "stride": 32,
            "beats": config.offset_bits,
        }
    )


def segment_write_layout(config: EngineConfig) -> data.StructLayout:
    """``segment_write``: a new value for one address segment of one layer."""
    return data.StructLayout(
        {
            "layer": config.layer_bits,
            "segment": (NUM_SEGMENTS - 1).bit_length(),
            "value": segment_layout(config),
        }
    )


def event_data_bits(config: EngineConfig) -> int:
    """Width of an event's ``data``: an address, a score or K experts."""
    return max(config.axi_addr_width, 32, config.top_k * config.expert_bits)


def event_layout(config: EngineConfig) -> data.StructLayout:
    """One record of the event port; docs/architecture.md says which field means what."""
    return data.StructLayout(
        {
            "kind": EventKind,
            "cycle": CYCLE_BITS,
            "context": CONTEXT_BITS,
            "layer": config.layer_bits,
            "expert": max(config.expert_bits, config.transfer_bits),
            "slot": config.slot_bits,
            "flag": 3,
            "data": event_data_bits(config),
        }
    )


def axi4_read_signature(config: EngineConfig) -> wiring.Signature:
    """AXI4 read channels, seen from the manager: ``ar`` out, ``r`` in.

    Bursts are INCR, of full-width beats, and never cross 4 KiB.
    """
    ar = data.StructLayout({"id": config.transfer_bits, "addr": config.axi_addr_width, "len": 8})
    r = data.StructLayout(
        {"id": config.transfer_bits, "data": config.axi_data_width, "resp": 2, "last": 1}
    )
    return wiring.Signature({"ar": Out(stream.Signature(ar)), "r": In(stream.Signature(r))})


def axi4_write_signature(config: EngineConfig) -> wiring.Signature:
    """AXI4 write channels, seen from the manager: ``aw`` and ``w`` out, ``b`` in.

    Bursts are INCR, of full-width beats with all bytes strobed, and never cross 4 KiB. The data of
    bursts come in the order of their addresses.
    """
    aw = data.StructLayout({"id": config.transfer_bits, "addr": config.axi_addr_width, "len": 8})
    w = data.StructLayout({"data": config.axi_data_width, "last": 1})
    b = data.StructLayout({"id": config.transfer_bits, "resp": 2})
    return wiring.Signature(
        {
            "aw": Out(stream.Signature(aw)),
            "w": Out(stream.Signature(w)),
            "b": In(stream.Signature(b)),
        }
    )


def buffer_place_layout(config: EngineConfig) -> data.StructLayout:
    """Where a buffer behind AXI lies, in pages of 4 KiB: slot ``s`` begins at page
    ``base + s * stride``."""
    page_shift = (PAGE_BYTES - 1).bit_length()
    return data.StructLayout(
        {"base": config.axi_addr_width - page_shift, "stride": 32 - page_shift}
    )


def axi4_lite_signature(addr_width: int) -> wiring.Signature:
    """AXI4-Lite, 32 bit, seen from the manager: one stream per channel."""
    w = data.StructLayout({"data": 32, "strb": 4})
    r = data.StructLayout({"data": 32, "resp": 2})
    return wiring.Signature(
        {
            "aw": Out(stream.Signature(unsigned(addr_width))),
            "w": Out(stream.Signature(w)),
            "b": In(stream.Signature(unsigned(2))),
            "ar": Out(stream.Signature(unsigned(addr_width))),
            "r": In(stream.Signature(r)),
        }
    )
