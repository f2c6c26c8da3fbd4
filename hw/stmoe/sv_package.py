# SPDX-License-Identifier: Apache-2.0
"""A SystemVerilog package with the payloads of an engine's streams as packed structs."""

from __future__ import annotations

import re

from amaranth.lib import data

from stmoe_golden.config import EngineConfig

from .payloads import EventKind
from .register_map import addr_width
from .top import padded, stream_layouts

__all__ = ["sv_name", "sv_package"]

RESERVED = {"context"}
"""Words of SystemVerilog that are fields of payloads; the test compiles every field there is."""


def sv_name(field: str) -> str:
    """Name of a payload's field in the package: its own, or with ``_`` after a reserved word."""
    return f"{field}_" if field in RESERVED else field


def _type(field: data.Field) -> str:
    shape = field.shape
    if isinstance(shape, data.ArrayLayout):
        return f"logic [{shape.length - 1}:0][{field.width // shape.length - 1}:0]"
    if shape is EventKind:
        return "event_kind_e"
    sign = " signed" if getattr(shape, "signed", False) else ""
    return f"logic{sign} [{field.width - 1}:0]" if field.width > 1 else f"logic{sign}"


def _struct(port: str, name: str, layout: data.StructLayout) -> list[str]:
    """The payload of one port. SystemVerilog names the most significant field first."""
    lines = [f"  // Payload of {port}.", "  typedef struct packed {"]
    padding = padded(layout.size) - layout.size
    if padding:
        lines.append(
            f"    logic [{padding - 1}:0] padding;" if padding > 1 else "    logic padding;"
        )
    lines += [f"    {_type(field)} {sv_name(key)};" for key, field in reversed(list(layout))]
    return [*lines, f"  }} {name}_t;", ""]


def sv_package(config: EngineConfig, *, name: str = "stmoe_engine_pkg") -> str:
    """SystemVerilog package ``name`` for the Verilog that :func:`stmoe.top.generate` writes.

    It holds, made from the very layouts that the engine is made of:

    - the shape of the engine and the widths of its buses as ``localparam int unsigned``;
    - ``event_kind_e``, the kinds of record on the event port;
    - for each AXI4-Stream port a packed struct as wide as its TDATA (``token_t``, ``route_t``,
      ``grant_t``, ``release_t``, ``fill_t`` where the buffer is in banks, and ``event_t`` where
      there is an event port), so
      that ``assign s_axis_route_tdata = route;`` is all that is needed. Bits that TDATA has
      beyond the payload are a field ``padding``: inputs ignore it, outputs have 0 there.

    A field whose name is a word of SystemVerilog gets a ``_``: ``context_``. ``experts`` of a
    route is an array of which element 0 is rank 0.

    Raises
    ------
    ValueError
        ``name`` is not an identifier.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"name must be an identifier, not {name!r}")
    c = config
    constants = {
        "NumLayers": c.num_layers,
        "NumExperts": c.num_experts,
        "TopK": c.top_k,
        "NumSlots": c.num_slots,
        "SlotBytes": c.expert_bytes,
        "LayerBits": c.layer_bits,
        "ExpertBits": c.expert_bits,
        "SlotBits": c.slot_bits,
        "AxilAddrWidth": addr_width(c),
        "AxiIdWidth": c.transfer_bits,
        "AxiAddrWidth": c.axi_addr_width,
        "AxiDataWidth": c.axi_data_width,
    }
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "// Written by `stmoe generate --sv-package` with the engine's Verilog; not by hand.",
        f"package {name};",
        "",
        *(f"  localparam int unsigned {key} = {value};" for key, value in constants.items()),
        "",
        "  typedef enum logic [4:0] {",
        ",\n".join(f"    EVENT_{kind.name} = 5'd{kind.value}" for kind in EventKind),
        "  } event_kind_e;",
        "",
    ]
    for port, (stream, layout) in stream_layouts(c).items():
        lines += _struct(port, "event" if stream == "events" else stream, layout)
    return "\n".join([*lines, f"endpackage : {name}", ""])
