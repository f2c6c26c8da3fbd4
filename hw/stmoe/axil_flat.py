# SPDX-License-Identifier: Apache-2.0
"""The conventional flat names of an AXI4-Lite subordinate port, for a Verilog top."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module
from amaranth.lib.wiring import In, Member, Out

__all__ = ["connect_axil", "flat_axil_ports"]


def flat_axil_ports(addr_width: int, *, prefix: str = "s_axil") -> dict[str, Member]:
    """Members of a component that is an AXI4-Lite subordinate: ``s_axil_awaddr`` and so on.

    Parameters
    ----------
    addr_width : int
        Bits of a byte address.
    prefix : str
        What the names begin with.
    """
    if isinstance(addr_width, bool) or not isinstance(addr_width, int):
        raise TypeError(f"addr_width must be an integer, not {addr_width!r}")
    if not 2 < addr_width <= 64:
        raise ValueError(f"addr_width must be 3 to 64, not {addr_width}")
    ports = {
        "awaddr": In(addr_width),
        "awprot": In(3),
        "awvalid": In(1),
        "awready": Out(1),
        "wdata": In(32),
        "wstrb": In(4),
        "wvalid": In(1),
        "wready": Out(1),
        "bresp": Out(2),
        "bvalid": Out(1),
        "bready": In(1),
        "araddr": In(addr_width),
        "arprot": In(3),
        "arvalid": In(1),
        "arready": Out(1),
        "rdata": Out(32),
        "rresp": Out(2),
        "rvalid": Out(1),
        "rready": In(1),
    }
    return {f"{prefix}_{name}": member for name, member in ports.items()}


def connect_axil(m: Module, flat: Any, native: Any, *, prefix: str = "s_axil") -> None:
    """Connect the flat members of ``flat`` to ``native``.

    Parameters
    ----------
    m : :class:`Module`
        Gets the (combinational) connections.
    flat : component
        Has the members of :func:`flat_axil_ports`; seen from inside.
    native : interface
        The ``axil`` member of a subordinate, of signature ``In(axi4_lite_signature(...))``.

    AxPROT is ignored: every access is allowed.
    """

    def port(name: str) -> Any:
        return getattr(flat, f"{prefix}_{name}")

    m.d.comb += [
        native.aw.payload.eq(port("awaddr")),
        native.aw.valid.eq(port("awvalid")),
        port("awready").eq(native.aw.ready),
        native.w.payload.data.eq(port("wdata")),
        native.w.payload.strb.eq(port("wstrb")),
        native.w.valid.eq(port("wvalid")),
        port("wready").eq(native.w.ready),
        port("bresp").eq(native.b.payload),
        port("bvalid").eq(native.b.valid),
        native.b.ready.eq(port("bready")),
        native.ar.payload.eq(port("araddr")),
        native.ar.valid.eq(port("arvalid")),
        port("arready").eq(native.ar.ready),
        port("rdata").eq(native.r.payload.data),
        port("rresp").eq(native.r.payload.resp),
        port("rvalid").eq(native.r.valid),
        native.r.ready.eq(port("rready")),
    ]
