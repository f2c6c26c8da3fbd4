# SPDX-License-Identifier: Apache-2.0
"""Checks that what the engine grants is what the memory holds."""

from __future__ import annotations

from collections.abc import Callable

from amaranth.hdl import Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe.payloads import fill_layout, grant_layout, release_layout
from stmoe_golden.config import EngineConfig

__all__ = ["AddressMap", "ContentChecker", "Fault", "observed"]


def observed(layout) -> wiring.Signature:
    """A stream that is only looked at: ``valid``, ``ready`` and ``payload``, all outputs of the
    signature, so that ``In(observed(layout))`` is the observer's port."""
    return wiring.Signature({"valid": Out(1), "ready": Out(1), "payload": Out(layout)})


class AddressMap:
    """Where the harness keeps the experts.

    Expert e of layer l lies at ``(l * num_experts + e) * stride``, in one piece.

    Parameters
    ----------
    config : :class:`EngineConfig`
    stride : int or None
        Bytes from one expert to the next, a multiple of a beat, at least ``expert_bytes``. By
        default ``expert_bytes`` rounded up to a power of two.
    """

    def __init__(self, config: EngineConfig, stride: int | None = None):
        if stride is None:
            stride = 1 << (config.slot_beats * config.beat_bytes - 1).bit_length()
        if stride < config.expert_bytes or stride % config.beat_bytes:
            raise ValueError(
                f"stride must be at least expert_bytes ({config.expert_bytes}) and a multiple of "
                f"a beat ({config.beat_bytes} bytes), not {stride}"
            )
        size = config.num_layers * config.num_experts * stride
        if size > 1 << config.axi_addr_width:
            raise ValueError(
                f"{size} bytes of experts do not fit in {config.axi_addr_width} address bits"
            )
        if config.axi_data_width == 32 and size > 1 << 34:
            raise ValueError(
                f"{size} bytes of experts do not fit in 16 GiB, where beats of 32 bits differ"
            )
        self.config = config
        self.stride = stride

    @property
    def beats(self) -> int:
        """AXI beats of one expert."""
        return self.config.slot_beats

    def base(self, layer: int) -> int:
        """Byte address of expert 0 of a layer."""
        return layer * self.config.num_experts * self.stride

    def address(self, layer: ValueLike, expert: ValueLike) -> Value:
        """Byte address of an expert, in hardware."""
        return (Value.cast(layer) * self.config.num_experts + expert) * self.stride


HELD_MAX = 64
"""Most grants of one slot that the engine can have outstanding (4 K, K at most 16)."""


class Fault:
    """Codes of what the harness's checkers have seen (field ``what`` of a log line ``@X``)."""

    CONTENT = 1
    """A granted slot does not hold the expert. a: slot, b: beats seen in order, c: address that
    the slot's content starts at."""
    FILL_WHILE_HELD = 2
    """A beat was written to a slot that is granted and not released. a: slot, b: offset."""
    UNASKED_GRANT = 3
    """A grant of another layer, of an expert that was not asked for, or the second one of the
    same. a: slot, b: layer, c: expert."""
    UNHELD_RELEASE = 4
    """A release of a slot that is not granted (the harness itself is wrong). a: slot."""
    UNSTABLE = 5
    """A stream dropped its valid or changed its payload before it was taken. a: the stream, see
    :class:`Stream`."""
    BAD_BURST = 6
    """An AR burst that crosses 4 KiB, is longer than max_burst or is not aligned to a beat.
    a: id, b: len, c: address."""
    ORPHAN_BEAT = 7
    """An R beat of an id that has no burst outstanding, or too few. a: id."""
    BAD_WRITE = 8
    """An AW burst that crosses 4 KiB, is longer than max_burst, is not aligned to a beat, or is
    outside the buffer. a: id, b: len, c: address."""


class ContentChecker(wiring.Component):
    """Follows every beat that is filled, and checks every grant.

    What the memory holds at an address tells the address, so a slot's content is known by where
    its beat of offset 0 came from and by how many beats have followed in order, each from the
    address after the one before. A beat of offset 0 begins anew. A beat that is out of order or
    wrong ends the count: what matters is what the slot holds when it is granted.

    At a grant without error the slot must hold all beats of that expert, in order. While it is
    granted and not released no beat may be written to it. In the first ``num_slots`` cycles after
    reset no grant may come.

    Parameters
    ----------
    config : :class:`EngineConfig`
    addresses : :class:`AddressMap`
    content : callable
        Value of a byte address (of a beat) to the value of the beat there.
    address_of : callable
        The inverse of it.

    Members
    -------
    fill, grant, release : :py:`In(observed(...))`
        The fill of an expert's last beat comes at least one cycle before the grant.
    content_fault : :py:`Out(1)`
        One cycle after the grant: the slot did not hold the expert.
    content_slot, content_beats, content_address : :py:`Out`
        With ``content_fault``: the slot, how many beats were in order, where they came from.
    held_fault : :py:`Out(1)`
        In the cycle of the fill: the slot is granted.
    unheld_fault : :py:`Out(1)`
        In the cycle of the release: the slot is not granted.
    """

    def __init__(
        self,
        config: EngineConfig,
        addresses: AddressMap,
        *,
        content: Callable[[Value], ValueLike],
        address_of: Callable[[Value], ValueLike],
    ):
        self._config = config
        self._addresses = addresses
        self._content = content
        self._address_of = address_of
        super().__init__(
            {
                "fill": In(observed(fill_layout(config))),
                "grant": In(observed(grant_layout(config))),
                "release": In(observed(release_layout(config))),
                "content_fault": Out(1),
                "content_slot": Out(config.slot_bits),
                "content_beats": Out(config.offset_bits),
                "content_address": Out(config.axi_addr_width),
                "held_fault": Out(1),
                "unheld_fault": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        beat_shift = (config.beat_bytes - 1).bit_length()

        entry_layout = data.StructLayout(
            {"start": config.axi_addr_width, "beats": config.offset_bits}
        )
        m.submodules.slots = slots = Memory(shape=entry_layout, depth=config.num_slots, init=[])
        write = slots.write_port()
        # Beats of one slot may follow each other without a gap, and a grant may follow the last.
        fill_read = slots.read_port(transparent_for=(write,))
        grant_read = slots.read_port(transparent_for=(write,))

        # One cycle after a beat: its slot's entry is there.
        filled = Signal()
        beat = Signal(fill_layout(config))
        begun = Signal(config.axi_addr_width)
        """Where the beat says that it comes from."""
        wanted = Signal(config.axi_addr_width)
        """Where it should come from."""
        m.d.sync += [
            filled.eq(self.fill.valid & self.fill.ready),
            beat.eq(self.fill.payload),
        ]
        first = beat.offset == 0
        m.d.comb += [
            fill_read.addr.eq(self.fill.payload.slot),
            begun.eq(self._address_of(beat.data)),
            wanted.eq(Mux(first, begun, fill_read.data.start + (beat.offset << beat_shift))),
            write.addr.eq(beat.slot),
            write.en.eq(filled),
            write.data.start.eq(Mux(first, begun, fill_read.data.start)),
        ]
        in_order = first | (fill_read.data.beats == beat.offset)
        with m.If(in_order & (beat.data == self._content(wanted))):
            m.d.comb += write.data.beats.eq(beat.offset + 1)
        with m.Else():
            m.d.comb += write.data.beats.eq(0)

        # One cycle after a grant.
        granted = Signal()
        asked = Signal(grant_layout(config))
        m.d.sync += [
            granted.eq(self.grant.valid & self.grant.ready & ~self.grant.payload.error),
            asked.eq(self.grant.payload),
        ]
        m.d.comb += [
            grant_read.addr.eq(self.grant.payload.slot),
            self.content_slot.eq(asked.slot),
            self.content_beats.eq(grant_read.data.beats),
            self.content_address.eq(grant_read.data.start),
            self.content_fault.eq(
                granted
                & (
                    (grant_read.data.beats != self._addresses.beats)
                    | (grant_read.data.start != self._addresses.address(asked.layer, asked.expert))
                )
            ),
        ]

        # How often each slot has been granted and released, modulo more than can be outstanding.
        # Two small memories rather than registers: with many slots these would be most of the
        # harness. They are cleared after reset, long before the engine can grant anything.
        took, released = Signal(), Signal()
        clearing = Signal(init=1)
        clear_slot = Signal(config.slot_bits)
        with m.If(clearing):
            m.d.sync += clear_slot.eq(clear_slot + 1)
            with m.If(clear_slot == config.num_slots - 1):
                m.d.sync += clearing.eq(0)

        def times(name: str, happens: Value, slot: Value) -> tuple[Value, Value]:
            """How often something has happened to the slot of the fill and of the release."""
            m.submodules[name] = counts = Memory(
                shape=range(2 * HELD_MAX), depth=config.num_slots, init=[]
            )
            ports = [counts.read_port(domain="comb") for _ in range(3)]
            at = (slot, self.fill.payload.slot, self.release.payload.slot)
            m.d.comb += [port.addr.eq(address) for port, address in zip(ports, at, strict=True)]
            count = counts.write_port()
            m.d.comb += [
                count.en.eq(clearing | happens),
                count.addr.eq(Mux(clearing, clear_slot, slot)),
                count.data.eq(Mux(clearing, 0, ports[0].data + 1)),
            ]
            return ports[1].data, ports[2].data

        fill_takes, release_takes = times("takes", took, self.grant.payload.slot)
        fill_releases, release_releases = times(
            "releases", released & ~self.unheld_fault, self.release.payload.slot
        )
        m.d.comb += [
            took.eq(self.grant.valid & self.grant.ready & ~self.grant.payload.error),
            released.eq(self.release.valid & self.release.ready),
            self.unheld_fault.eq(released & (release_takes == release_releases)),
            self.held_fault.eq(self.fill.valid & self.fill.ready & (fill_takes != fill_releases)),
        ]
        return m
