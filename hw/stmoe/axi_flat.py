# SPDX-License-Identifier: Apache-2.0
"""The conventional flat names of an AXI4 read manager, for Verilog and for third-party models."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module
from amaranth.lib.wiring import In, Member, Out

from stmoe_golden.config import EngineConfig

__all__ = ["connect_axi4_read", "flat_axi4_read_ports"]

BURST_INCR = 0b01
CACHE_NORMAL_BUFFERABLE = 0b0011
PROT_UNPRIVILEGED_SECURE_DATA = 0b000


def flat_axi4_read_ports(config: EngineConfig, *, prefix: str = "m_axi") -> dict[str, Member]:
    """Members of a component that is an AXI4 read manager: ``m_axi_araddr`` and so on.

    Parameters
    ----------
    config : :class:`EngineConfig`
    prefix : str
        What the names begin with.
    """
    ports = {
        "arid": Out(config.transfer_bits),
        "araddr": Out(config.axi_addr_width),
        "arlen": Out(8),
        "arsize": Out(3),
        "arburst": Out(2),
        "arlock": Out(1),
        "arcache": Out(4),
        "arprot": Out(3),
        "arqos": Out(4),
        "arvalid": Out(1),
        "arready": In(1),
        "rid": In(config.transfer_bits),
        "rdata": In(config.axi_data_width),
        "rresp": In(2),
        "rlast": In(1),
        "rvalid": In(1),
        "rready": Out(1),
    }
    return {f"{prefix}_{name}": member for name, member in ports.items()}


def connect_axi4_read(
    m: Module, config: EngineConfig, flat: Any, native: Any, *, prefix: str = "m_axi"
) -> None:
    """Connect the flat members of ``flat`` to ``native``.

    Bursts are INCR, of full-width beats, normal, bufferable and not exclusive, of the lowest
    quality of service.

    Parameters
    ----------
    m : :class:`Module`
        Gets the (combinational) connections.
    config : :class:`EngineConfig`
    flat : component
        Has the members of :func:`flat_axi4_read_ports`; seen from inside.
    native : interface
        The ``axi`` member of a manager, of signature ``Out(axi4_read_signature(config))``.
    """

    def port(name: str) -> Any:
        return getattr(flat, f"{prefix}_{name}")

    m.d.comb += [
        port("arid").eq(native.ar.payload.id),
        port("araddr").eq(native.ar.payload.addr),
        port("arlen").eq(native.ar.payload.len),
        port("arsize").eq((config.beat_bytes - 1).bit_length()),
        port("arburst").eq(BURST_INCR),
        port("arlock").eq(0),
        port("arcache").eq(CACHE_NORMAL_BUFFERABLE),
        port("arprot").eq(PROT_UNPRIVILEGED_SECURE_DATA),
        port("arqos").eq(0),
        port("arvalid").eq(native.ar.valid),
        native.ar.ready.eq(port("arready")),
        native.r.payload.id.eq(port("rid")),
        native.r.payload.data.eq(port("rdata")),
        native.r.payload.resp.eq(port("rresp")),
        native.r.payload.last.eq(port("rlast")),
        native.r.valid.eq(port("rvalid")),
        port("rready").eq(native.r.ready),
    ]
