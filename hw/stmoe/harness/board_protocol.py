# SPDX-License-Identifier: Apache-2.0
"""What a board and its host agree on: frames, commands, registers and packed records.

Both sides take every number from here, so they cannot differ; docs/board.md is the same in prose.
Nothing here needs Amaranth, or takes time to import.
"""

from __future__ import annotations

import dataclasses
import enum
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from stmoe_golden.config import EngineConfig
from stmoe_golden.records import Kind

__all__ = [
    "CYCLE_BYTES",
    "DEFAULT_BAUD",
    "FRAME_HEADER",
    "FRAME_PAYLOAD",
    "PROTOCOL_VERSION",
    "SIGNED_BUSES",
    "Command",
    "Delta",
    "Flag",
    "FrameKind",
    "HarnessRegister",
    "Message",
    "Piece",
    "Status",
    "config_hash",
    "record_pieces",
    "signature_of",
    "signature_step",
]

PROTOCOL_VERSION = 1
"""Changes whenever a host and a board of different versions could misunderstand each other."""

DEFAULT_BAUD = 1_000_000
"""What boards use unless told otherwise: every USB adapter and every clock here can do it."""

# Frames -------------------------------------------------------------------------------------

FLAG = 0x7E
"""Begins and ends every frame (RFC 1662)."""

ESCAPE = 0x7D
"""Before a byte of a frame that is :data:`FLAG` or ESCAPE; that byte has bit 5 inverted."""

ESCAPE_XOR = 0x20

FRAME_HEADER = 6
"""Bytes: kind, session, offset (2), acknowledge (2), least significant byte first."""

FRAME_CRC = 4
"""Bytes of CRC-32 (the one of Ethernet and zlib), least significant first, at the end."""

FRAME_PAYLOAD = 240
"""Most bytes of a stream in one frame."""

OFFSET_BITS = 16
"""Offsets in the two streams count bytes modulo ``2**OFFSET_BITS``."""


class FrameKind(enum.IntEnum):
    """First byte of a frame, without the flag :data:`REWIND`."""

    DATA = 0
    """Bytes of the sender's stream from ``offset`` on; none is a mere acknowledgement."""
    OPEN = 1
    """Host only: begin the session whose number the frame carries, from reset. Nothing happens
    when it is the session that is open."""
    STATUS = 2
    """Host: asks for it, in any session. Board: the answer to every frame, :class:`Status`."""


REWIND = 0x80
"""Host only, in the first byte: send again from ``acknowledge``."""


class Flag(enum.IntFlag):
    """``Status.flags``."""

    DONE = 1
    """All tokens have finished."""
    STUCK = 2
    """The engine makes no progress."""
    QUIET = 4
    """Done, and nothing moves any more."""
    IRQ = 8
    """The engine's interrupt."""
    VIOLATION = 16
    """A check in the harness has failed."""


class Status(NamedTuple):
    """Payload of a STATUS frame, in order, with the bytes of each field in :data:`STATUS_BYTES`."""

    version: int
    """:data:`PROTOCOL_VERSION`."""
    rings: int
    """log2 of the bytes of the board's receive ring (bits 0 to 3) and transmit ring (4 to 7)."""
    config: int
    """:func:`config_hash` of the engine."""
    flags: int
    consumed: int
    """Bytes of the host's stream that have left the receive ring (as an offset)."""
    tokens: int
    """Tokens finished."""
    bad: int
    """Frames refused for their CRC, their length or a broken byte, modulo 2**16."""


STATUS_BYTES = Status(version=1, rings=1, config=4, flags=1, consumed=2, tokens=4, bad=2)


# The host's stream: commands ----------------------------------------------------------------


class Command(enum.IntEnum):
    """First byte of a command; what follows it is least significant byte first."""

    READ = 1
    """Address (2 bytes): read a register. Answered by READ_ANSWER."""
    WRITE = 2
    """Address (2), data (4): write a register. Answered by WRITE_ANSWER."""
    TOKEN = 3
    """new_sequence (1), token_id (4): the next token of the trace."""
    ROUTE = 4
    """Layer (1), experts (1 each, K of them in rank order): the next route of the trace."""


HARNESS_SPACE = 0x8000
"""Set in addresses of :class:`HarnessRegister`; others are the engine's AXI4-Lite."""

SIGNED_BUSES = ("token", "route", "grant", "release", "ar", "last_beat")
"""Buses that have a signature, in the order of the registers."""


class HarnessRegister(enum.IntEnum):
    """Word index of a register of the harness; byte address ``HARNESS_SPACE + 4 * index``."""

    # Written:
    TOKENS = 0
    ATTENTION_CYCLES = 1
    EXPERT_CYCLES = 2
    JITTER = 3
    STALL_LIMIT = 4
    QUIET_CYCLES = 5
    MEMORY_LATENCY = 6
    MEMORY_BEATS_NUMERATOR = 7
    MEMORY_BEATS_DENOMINATOR = 8
    # Read:
    CLOCK_HZ = 16
    BAUD = 17
    RECORDS = 18
    """Records taken from the event port."""
    VIOLATIONS = 19
    FAULTS = 20
    """Which checks have failed, one bit each."""
    CYCLE = 22
    """40 bits, as the next three: low word, then high word."""
    FILL_BEATS = 24
    R_BEATS = 26
    LINK_CYCLES = 28
    WAIT_CYCLES = 30
    SIGNATURES = 32
    """For each of :data:`SIGNED_BUSES` four words: signature (low, high), handshakes, 0."""

    @property
    def address(self) -> int:
        """Byte address."""
        return HARNESS_SPACE + 4 * self


# The board's stream: messages ---------------------------------------------------------------


class Message(enum.IntEnum):
    """Low 5 bits of the first byte of a message. Numbers below 24 are records of that kind."""

    STAMP = 29
    """No record: the records before it were taken from the event port before this cycle."""
    READ_ANSWER = 30
    """AXI response in bits 5 and 6; then the data (4 bytes)."""
    WRITE_ANSWER = 31
    """AXI response in bits 5 and 6."""


class Delta(enum.IntEnum):
    """Bits 5 and 6 of a record's first byte: how its cycle follows."""

    SAME = 0
    """Not at all: it is that of the record before."""
    BYTE = 1
    """1 byte more than it."""
    WORD = 2
    """2 bytes more than it."""
    ABSOLUTE = 3
    """All of it, 5 bytes."""


RAW = 0x80
"""In a record's first byte: all fields follow, not only the pieces that its kind uses."""

CYCLE_BYTES = 5
STAMP_RECORDS = 32
"""At most so many records come between two stamps."""


@dataclass(frozen=True)
class Piece:
    """Bits ``lsb`` to ``lsb + width - 1`` of a field of a record."""

    field: str
    lsb: int
    width: int


def _index_bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def record_pieces(
    config: EngineConfig, address_bits: int, widths: dict[str, int]
) -> tuple[dict[Kind, tuple[Piece, ...]], tuple[Piece, ...]]:
    """What of a record is sent, by kind, and what of one that does not fit that.

    A record is sent as the pieces of its kind, the first in the lowest bits, in as few bytes as
    hold them. Should any other bit of it be set, or its kind not be here, all of it is sent.

    Parameters
    ----------
    config : EngineConfig
    address_bits : int
        Bits of the addresses that the harness keeps experts at.
    widths : dict
        Width of each field of a record.
    """
    layer = Piece("layer", 0, config.layer_bits)
    expert = Piece("expert", 0, min(_index_bits(config.num_experts), widths["expert"]))
    slot = Piece("slot", 0, config.slot_bits)
    transfer = Piece("expert", 0, config.transfer_bits)
    beat_bits = (config.beat_bytes - 1).bit_length()
    load = (layer, expert, slot, Piece("flag", 0, 1), Piece("data", 0, config.transfer_bits))
    pieces: dict[Kind, tuple[Piece, ...]] = {
        # Ids are not negative in a trace.
        Kind.TOKEN: (Piece("flag", 0, 1), Piece("data", 0, 31)),
        Kind.ROUTE: (
            layer,
            *(
                Piece("data", rank * config.expert_bits, expert.width)
                for rank in range(config.top_k)
            ),
        ),
        Kind.SCORE_COMMIT: (layer,),
        Kind.SELECT: (layer, expert, Piece("data", 0, config.score_bits)),
        Kind.LOAD_START: (
            layer,
            expert,
            slot,
            Piece("flag", 0, 2),
            Piece("data", 0, expert.width),
            Piece("data", 8, config.layer_bits),
            Piece("data", 16, config.transfer_bits),
        ),
        Kind.BURST: (
            transfer,
            Piece("flag", 0, 1),
            Piece("data", beat_bits, max(1, address_bits - beat_bits)),
        ),
        Kind.LAST_BEAT: (transfer, Piece("flag", 0, 2)),
        Kind.FILL_DONE: load,
        Kind.GRANT: load,
        Kind.CANCEL: load,
        Kind.DRAINED: load,
        Kind.PROMOTE: load,
        Kind.DROP: load,
        Kind.RELEASE: (slot,),
    }
    # All fields: in the order of a load where it can be, because it costs least so.
    raw = list(load)
    for name in ("context", "layer", "expert", "slot", "flag", "data"):
        sent = sum(piece.width for piece in load if piece.field == name)
        if sent < widths[name]:
            raw.append(Piece(name, sent, widths[name] - sent))
    return pieces, tuple(raw)


def piece_bytes(pieces: Iterable[Piece]) -> int:
    """Bytes that hold the pieces."""
    return -(-sum(piece.width for piece in pieces) // 8)


# Signatures ---------------------------------------------------------------------------------

SIGNATURE_BITS = 64
SIGNATURE_TAPS = (0, 1, 3, 4)
"""The polynomial is x^64 + x^4 + x^3 + x + 1 (that of ISO 3309's CRC-64), which is primitive."""
SIGNATURE_SHIFT = 8


def signature_step(state: int, word: int) -> int:
    """The signature of a bus after one more handshake: ``state * x**8 + word`` modulo the
    polynomial, where ``word``, if wider than the state, is folded by exclusive or."""
    mask = (1 << SIGNATURE_BITS) - 1
    top = state >> (SIGNATURE_BITS - SIGNATURE_SHIFT)
    state = state << SIGNATURE_SHIFT & mask
    for tap in SIGNATURE_TAPS:
        state ^= top << tap
    while word:
        state ^= word & mask
        word >>= SIGNATURE_BITS
    return state


def signature_of(words: Iterable[int]) -> int:
    """The signature of a bus that had these handshakes."""
    state = 0
    for word in words:
        state = signature_step(state, word)
    return state


# The configuration --------------------------------------------------------------------------


def config_hash(config: EngineConfig) -> int:
    """Tells configurations apart: CRC-32 of every field as ``name=value`` lines."""
    text = "".join(f"{f.name}={getattr(config, f.name)}\n" for f in dataclasses.fields(config))
    return zlib.crc32(text.encode())
