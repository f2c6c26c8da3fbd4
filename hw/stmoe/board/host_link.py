# SPDX-License-Identifier: Apache-2.0
"""The host's end of the line to a board: two streams of bytes that lose and repeat nothing.

The other end is ``stmoe.harness.board_link``; docs/board.md tells the rules.
"""

from __future__ import annotations

import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from stmoe.harness.board_protocol import (
    ESCAPE,
    ESCAPE_XOR,
    FLAG,
    FRAME_CRC,
    FRAME_HEADER,
    FRAME_PAYLOAD,
    OFFSET_BITS,
    PROTOCOL_VERSION,
    REWIND,
    STATUS_BYTES,
    FrameKind,
    Status,
)

__all__ = ["BoardError", "HostLink", "Port", "deframe", "enframe"]

OFFSET_MASK = (1 << OFFSET_BITS) - 1
FLAG_BYTE = bytes([FLAG])
ESCAPED_FLAG = bytes([ESCAPE, FLAG ^ ESCAPE_XOR])
ESCAPE_BYTE = bytes([ESCAPE])
ESCAPED_ESCAPE = bytes([ESCAPE, ESCAPE ^ ESCAPE_XOR])


class BoardError(Exception):
    """The board cannot be used, or not for this; the text is one line that says why."""


class Port(Protocol):
    """What is needed of a serial port (that of pyserial has it)."""

    timeout: float | None

    def read(self, size: int = 1, /) -> bytes:
        """At least 1 byte, or none when ``timeout`` seconds pass."""

    def write(self, data: bytes, /) -> int | None:
        """Send."""

    @property
    def in_waiting(self) -> int:
        """Bytes that can be read without waiting."""


def enframe(content: bytes) -> bytes:
    """A frame with its CRC, as it goes over the line."""
    content += zlib.crc32(content).to_bytes(FRAME_CRC, "little")
    escaped = content.replace(ESCAPE_BYTE, ESCAPED_ESCAPE).replace(FLAG_BYTE, ESCAPED_FLAG)
    return FLAG_BYTE + escaped + FLAG_BYTE


def deframe(escaped: bytes) -> bytes | None:
    """The content of what stood between two flags; None when its CRC is wrong."""
    content = escaped.replace(ESCAPED_FLAG, FLAG_BYTE).replace(ESCAPED_ESCAPE, ESCAPE_BYTE)
    body, crc = content[:-FRAME_CRC], content[-FRAME_CRC:]
    if len(body) < FRAME_HEADER or zlib.crc32(body).to_bytes(FRAME_CRC, "little") != crc:
        return None
    return body


class HostLink:
    """Reliable streams to and from a board.

    Both ends send the bytes of a stream again from the last that the other has acknowledged. All
    waiting is done here: when nothing comes for ``retry`` seconds, what may have been lost is sent
    and asked for again; after ``timeout`` seconds the board is given up.

    Parameters
    ----------
    port : :class:`Port`
    name : str
        What messages call it.
    timeout : float
        Seconds without any sign of the board that end the session.
    retry : float
        Seconds without progress after which something is taken for lost.

    Attributes
    ----------
    status : Status or None
        The board's latest.
    retries : int
        Times that bytes were sent again, or asked for again.
    spoiled : int
        Frames from the board with a wrong CRC.
    """

    def __init__(self, port: Port, name: str, *, timeout: float = 5.0, retry: float = 0.25) -> None:
        self.port = port
        self.name = name
        self.timeout = timeout
        self.retry = retry
        self.status: Status | None = None
        self.retries = 0
        self.spoiled = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self._session: int | None = None
        self._line = bytearray()
        self._outgoing = bytearray()
        """The host's stream from the last acknowledged byte on."""
        self._base = 0
        """Offset of the first byte of ``_outgoing``; not reduced to 16 bits."""
        self._sent = 0
        self._consumed = 0
        self._ring = self._window = 0
        """Bytes of the board's two rings."""
        self._expected = 0
        """Offset of the next byte of the board's stream."""
        self._acknowledged = 0
        self._arrived = bytearray()
        self._bad_seen: int | None = None
        now = time.monotonic()
        self._heard = self._moved = self._asked = self._spoke = now
        """When a good frame came; when either stream moved on; when a rewind was asked for; when
        a frame was sent."""
        self._rewinding = False
        self._gap = False

    # Frames -----------------------------------------------------------------------------------

    def _put(self, kind: int, payload: bytes = b"", *, offset: int | None = None) -> None:
        header = bytes([kind, (self._session or 0) & 0xFF])
        for number in (self._sent if offset is None else offset, self._expected):
            header += (number & OFFSET_MASK).to_bytes(2, "little")
        frame = enframe(header + payload)
        self.bytes_sent += len(frame)
        self._spoke = time.monotonic()
        self._acknowledged = self._expected
        self.port.write(frame)

    def _frames(self, wait: float) -> Iterator[bytes]:
        """The good frames that have come; waits for something at most ``wait`` seconds."""
        if self.port.timeout != wait:
            self.port.timeout = wait
        got = self.port.read(max(1, self.port.in_waiting))
        self.bytes_received += len(got)
        self._line += got
        if FLAG not in got:
            return
        *whole, rest = self._line.split(FLAG_BYTE)
        self._line = bytearray(rest)
        for escaped in whole:
            if escaped:
                content = deframe(bytes(escaped))
                if content is None:
                    self.spoiled += 1
                    self._gap = True
                else:
                    self._heard = time.monotonic()
                    yield content

    @staticmethod
    def _parse_status(content: bytes) -> Status | None:
        at, values = FRAME_HEADER, []
        if len(content) != FRAME_HEADER + sum(STATUS_BYTES):
            return None
        for size in STATUS_BYTES:
            values.append(int.from_bytes(content[at : at + size], "little"))
            at += size
        return Status(*values)

    # Sessions ---------------------------------------------------------------------------------

    def identify(self, patience: float | None = None) -> Status:
        """Ask the board what it is.

        Raises
        ------
        BoardError
            Nothing answers within ``patience`` seconds (by default ``timeout``), or nothing that
            makes sense, or a board of another version.
        """
        return self._identify(patience)[1]

    def _identify(self, patience: float | None = None) -> tuple[int, Status]:
        session, status = self._ask(lambda: self._put(FrameKind.STATUS), lambda _: True)
        if status.version != PROTOCOL_VERSION:
            raise BoardError(
                f"{self.name}: the board speaks version {status.version} of the protocol, this "
                f"host version {PROTOCOL_VERSION}: build the bitstream anew"
            )
        return session, status

    def open(self) -> Status:
        """Begin a session: everything on the board but its link is reset."""
        old, _ = self._identify()
        new = (old + 1 + secrets.randbelow(255)) & 0xFF
        self._session = new
        self._outgoing.clear()
        self._arrived.clear()
        self._base = self._sent = self._consumed = self._expected = self._acknowledged = 0
        _, status = self._ask(lambda: self._put(FrameKind.OPEN), lambda session: session == new)
        self._ring = 1 << (status.rings & 15)
        self._window = 1 << (status.rings >> 4)
        self._bad_seen = status.bad
        self._take_status(status)
        self._moved = time.monotonic()
        return status

    def _ask(self, put: Callable[[], None], fits: Callable[[int], bool]) -> tuple[int, Status]:
        """Send something until a status of a fitting session comes; the session and the status."""
        end = time.monotonic() + self.timeout
        before = self.bytes_received
        while time.monotonic() < end:
            put()
            again = min(end, time.monotonic() + self.retry)
            while time.monotonic() < again:
                for content in self._frames(0.02):
                    status = self._parse_status(content)
                    if content[0] == FrameKind.STATUS and status and fits(content[1]):
                        return content[1], status
        if self.bytes_received > before:
            raise BoardError(
                f"{self.name}: something answers, but not in frames: is this the speed of the "
                "board (--baud)?"
            )
        raise BoardError(
            f"{self.name}: nothing answers within {self.timeout:g} s: is the bitstream loaded, and "
            "are this its port and its speed (--baud)?"
        )

    # Streams ----------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Add to the host's stream."""
        self._outgoing += data

    @property
    def unsent(self) -> int:
        """Bytes of the host's stream that the board has not acknowledged."""
        return len(self._outgoing)

    def receive(self) -> bytes:
        """What has come of the board's stream since the last call."""
        got = bytes(self._arrived)
        self._arrived.clear()
        return got

    def turn(self, wait: float = 0.01) -> None:
        """Take what has come (for at most ``wait`` seconds nothing may come) and send what is due.

        Raises
        ------
        BoardError
            There has been no sign of the board for ``timeout`` seconds.
        """
        before = self.bytes_received
        for content in self._frames(wait):
            if content[1] != self._session:
                continue
            offset = int.from_bytes(content[2:4], "little")
            acknowledged = int.from_bytes(content[4:6], "little")
            self._take_acknowledge(acknowledged)
            if content[0] == FrameKind.STATUS:
                status = self._parse_status(content)
                if status is not None:
                    self._take_status(status)
            elif content[0] == FrameKind.DATA:
                self._take_data(offset, content[FRAME_HEADER:])
        now = time.monotonic()
        if now - self._heard > self.timeout:
            raise BoardError(f"{self.name}: the board has been silent for {self.timeout:g} s")
        self._transmit(now, idle=self.bytes_received == before)

    def _take_acknowledge(self, acknowledged: int) -> None:
        newly = (acknowledged - self._base) & OFFSET_MASK
        if 0 < newly <= len(self._outgoing):
            del self._outgoing[:newly]
            self._base += newly
            self._sent = max(self._sent, self._base)
            self._moved = time.monotonic()

    def _take_status(self, status: Status) -> None:
        # The ring holds less than half of all offsets, so this is how far `consumed` is behind.
        behind = (self._base - status.consumed) & OFFSET_MASK
        if behind <= self._ring:
            self._consumed = max(self._consumed, self._base - behind)
        if self._bad_seen is not None and status.bad != self._bad_seen and self._sent > self._base:
            self._sent = self._base
            self.retries += 1
        self._bad_seen = status.bad
        self.status = status

    def _take_data(self, offset: int, payload: bytes) -> None:
        ahead = (offset - self._expected) & OFFSET_MASK
        if ahead == 0:
            self._arrived += payload
            self._expected += len(payload)
            self._moved = time.monotonic()
            self._rewinding = self._gap = False
        elif ahead < 1 << (OFFSET_BITS - 1):
            self._gap = True

    def _transmit(self, now: float, *, idle: bool) -> None:
        if self._gap and not self._rewinding:
            self._rewind(now)
        overdue = now - max(self._moved, self._asked) > self.retry
        if overdue and (self._sent > self._base or self._gap or idle):
            # Either direction may have lost something; asking twice does no harm.
            if self._sent > self._base:
                self._sent = self._base
                self.retries += 1
            self._rewind(now)
        limit = self._consumed + self._ring - FRAME_CRC
        end = min(limit, self._base + len(self._outgoing))
        while self._sent < end:
            size = min(FRAME_PAYLOAD, end - self._sent)
            if size < FRAME_PAYLOAD // 2 and end == limit:
                break  # a larger frame will fit soon
            first = self._sent - self._base
            self._put(FrameKind.DATA, bytes(self._outgoing[first : first + size]))
            self._sent += size
        pending = self._expected - self._acknowledged
        if pending >= self._window // 4 or (pending and idle) or now - self._spoke > 0.05:
            self._put(FrameKind.DATA)

    def _rewind(self, now: float) -> None:
        if self._gap:
            self.retries += 1
        self._rewinding, self._gap, self._asked = True, False, now
        self._put(FrameKind.DATA | REWIND)
