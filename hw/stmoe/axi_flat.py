# SPDX-License-Identifier: Apache-2.0
"""The conventional flat names of AXI4 managers, for Verilog and for third-party models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amaranth.hdl import Module
from amaranth.lib.wiring import In, Member, Out

from stmoe_golden.config import EngineConfig

__all__ = [
    "connect_axi4_read",
    "connect_axi4_write",
    "flat_axi4_read_ports",
    "flat_axi4_write_ports",
]

BURST_INCR = 0b01
CACHE_NORMAL_BUFFERABLE = 0b0011
PROT_UNPRIVILEGED_SECURE_DATA = 0b000


def _address_ports(config: EngineConfig, channel: str) -> dict[str, Member]:
    """Members of the ``ar`` or ``aw`` channel, without the prefix."""
    ports = {
        "id": Out(config.transfer_bits),
        "addr": Out(config.axi_addr_width),
        "len": Out(8),
        "size": Out(3),
        "burst": Out(2),
        "lock": Out(1),
        "cache": Out(4),
        "prot": Out(3),
        "qos": Out(4),
        "valid": Out(1),
        "ready": In(1),
    }
    return {f"{channel}{name}": member for name, member in ports.items()}


def _address_channel(
    config: EngineConfig, channel: str, native: Any, port: Callable[[str], Any]
) -> list[Any]:
    """Connections of the ``ar`` or ``aw`` channel; ``port`` gives a member by its name."""
    return [
        port(f"{channel}id").eq(native.payload.id),
        port(f"{channel}addr").eq(native.payload.addr),
        port(f"{channel}len").eq(native.payload.len),
        port(f"{channel}size").eq((config.beat_bytes - 1).bit_length()),
        port(f"{channel}burst").eq(BURST_INCR),
        port(f"{channel}lock").eq(0),
        port(f"{channel}cache").eq(CACHE_NORMAL_BUFFERABLE),
        port(f"{channel}prot").eq(PROT_UNPRIVILEGED_SECURE_DATA),
        port(f"{channel}qos").eq(0),
        port(f"{channel}valid").eq(native.valid),
        native.ready.eq(port(f"{channel}ready")),
    ]


def flat_axi4_read_ports(config: EngineConfig, *, prefix: str = "m_axi") -> dict[str, Member]:
    """Members of a component that is an AXI4 read manager: ``m_axi_araddr`` and so on.

    Parameters
    ----------
    config : :class:`EngineConfig`
    prefix : str
        What the names begin with.
    """
    ports = {
        **_address_ports(config, "ar"),
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
        *_address_channel(config, "ar", native.ar, port),
        native.r.payload.id.eq(port("rid")),
        native.r.payload.data.eq(port("rdata")),
        native.r.payload.resp.eq(port("rresp")),
        native.r.payload.last.eq(port("rlast")),
        native.r.valid.eq(port("rvalid")),
        port("rready").eq(native.r.ready),
    ]


def flat_axi4_write_ports(config: EngineConfig, *, prefix: str = "m_axi_buf") -> dict[str, Member]:
    """Members of a component that is an AXI4 write manager: ``m_axi_buf_awaddr`` and so on.

    Parameters
    ----------
    config : :class:`EngineConfig`
    prefix : str
        What the names begin with.
    """
    ports = {
        **_address_ports(config, "aw"),
        "wdata": Out(config.axi_data_width),
        "wstrb": Out(config.beat_bytes),
        "wlast": Out(1),
        "wvalid": Out(1),
        "wready": In(1),
        "bid": In(config.transfer_bits),
        "bresp": In(2),
        "bvalid": In(1),
        "bready": Out(1),
    }
    return {f"{prefix}_{name}": member for name, member in ports.items()}


def connect_axi4_write(
    m: Module, config: EngineConfig, flat: Any, native: Any, *, prefix: str = "m_axi_buf"
) -> None:
    """Connect the flat members of ``flat`` to ``native``.

    Bursts are INCR, of full-width beats with every byte strobed, normal, bufferable and not
    exclusive, of the lowest quality of service.

    Parameters
    ----------
    m : :class:`Module`
        Gets the (combinational) connections.
    config : :class:`EngineConfig`
    flat : component
        Has the members of :func:`flat_axi4_write_ports`; seen from inside.
    native : interface
        The ``buffer`` member of a manager, of signature ``Out(axi4_write_signature(config))``.
    """

    def port(name: str) -> Any:
        return getattr(flat, f"{prefix}_{name}")

    m.d.comb += [
        *_address_channel(config, "aw", native.aw, port),
        port("wdata").eq(native.w.payload.data),
        port("wstrb").eq((1 << config.beat_bytes) - 1),
        port("wlast").eq(native.w.payload.last),
        port("wvalid").eq(native.w.valid),
        native.w.ready.eq(port("wready")),
        native.b.payload.id.eq(port("bid")),
        native.b.payload.resp.eq(port("bresp")),
        native.b.valid.eq(port("bvalid")),
        port("bready").eq(native.b.ready),
    ]
