# SPDX-License-Identifier: Apache-2.0
"""Reads the board's stream (records and answers) and writes the host's (commands)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from stmoe.harness.board_protocol import (
    CYCLE_BYTES,
    RAW,
    Command,
    Delta,
    Message,
    Piece,
    piece_bytes,
    record_pieces,
)
from stmoe.harness.record_packer import record_widths
from stmoe.harness.run_log import Event
from stmoe_golden.config import EngineConfig
from stmoe_golden.records import Kind

__all__ = [
    "Answer",
    "MessageReader",
    "StreamError",
    "read_command",
    "trace_commands",
    "write_command",
]

FIELDS = ("layer", "expert", "slot", "flag", "data")
CYCLE_SIZES = {Delta.SAME: 0, Delta.BYTE: 1, Delta.WORD: 2, Delta.ABSOLUTE: CYCLE_BYTES}


class StreamError(Exception):
    """The board's stream makes no sense: it is no board of this configuration."""


class Answer(NamedTuple):
    """What a register access came to; ``data`` is None for a write."""

    response: int
    data: int | None


class MessageReader:
    """Takes the board's stream apart.

    Parameters
    ----------
    config : EngineConfig
    address_bits : int
        See :func:`stmoe.harness.board_protocol.record_pieces`.

    Attributes
    ----------
    events : list of Event
        Records whose ``delivered`` is known: no cycle in which they can still have been in the
        event port is later.
    answers : deque of Answer
    records : int
        Records that have come, those whose stamp has not come included.
    """

    def __init__(self, config: EngineConfig, address_bits: int) -> None:
        self.events: list[Event] = []
        self.answers: deque[Answer] = deque()
        self.records = 0
        self._buffer = b""
        self._cycle = 0
        self._unstamped: list[tuple[int, ...]] = []
        pieces, raw = record_pieces(config, address_bits, record_widths(config))
        self._raw = self._plan(raw)
        self._plans = {int(kind): self._plan(parts) for kind, parts in pieces.items()}
        self._kinds = {int(kind) for kind in Kind}

    @staticmethod
    def _plan(pieces: Iterable[Piece]) -> tuple[int, list[tuple[int, int, int, int]]]:
        """Bytes, and (shift, mask, index of the field, position in it) of every piece."""
        pieces, steps, shift = tuple(pieces), [], 0
        names = ("context", *FIELDS)
        for piece in pieces:
            mask = (1 << piece.width) - 1
            steps.append((shift, mask, names.index(piece.field), piece.lsb))
            shift += piece.width
        return piece_bytes(pieces), steps

    def feed(self, data: bytes) -> None:
        """More of the stream.

        Raises
        ------
        StreamError
        """
        buffer = self._buffer + data
        at, end = 0, len(buffer)
        while at < end:
            first = buffer[at]
            kind = first & 31
            if kind >= Message.READ_ANSWER:
                size = 5 if kind == Message.READ_ANSWER else 1
                if end - at < size:
                    break
                value = int.from_bytes(buffer[at + 1 : at + 5], "little") if size == 5 else None
                self.answers.append(Answer(first >> 5 & 3, value))
                at += size
                continue
            cycle_size = CYCLE_SIZES[Delta(first >> 5 & 3)]
            if kind == Message.STAMP:
                if end - at < 1 + CYCLE_BYTES:
                    break
                at += 1 + CYCLE_BYTES
                self.stamp(int.from_bytes(buffer[at - CYCLE_BYTES : at], "little"))
                continue
            plan = self._raw if first & RAW else self._plans.get(kind)
            if plan is None:
                raise StreamError(f"a record of kind {kind} cannot be packed")
            size, steps = plan
            body = at + 1 + cycle_size
            if end < body + size:
                break
            cycle = int.from_bytes(buffer[at + 1 : body], "little")
            if cycle_size != CYCLE_BYTES:
                cycle += self._cycle
            self._cycle = cycle
            value = int.from_bytes(buffer[body : body + size], "little")
            fields = [0, 0, 0, 0, 0, 0]
            for shift, mask, field, lsb in steps:
                fields[field] |= (value >> shift & mask) << lsb
            self._unstamped.append((cycle, kind, *fields))
            self.records += 1
            at = body + size
        self._buffer = buffer[at:]

    def stamp(self, cycle: int) -> None:
        """The records so far have left the event port before this cycle."""
        self.events += [Event._make((*fields, cycle)) for fields in self._unstamped]
        self._unstamped.clear()


def read_command(address: int) -> bytes:
    """Reads a register."""
    return bytes([Command.READ]) + address.to_bytes(2, "little")


def write_command(address: int, value: int) -> bytes:
    """Writes a register."""
    value &= 0xFFFF_FFFF
    return bytes([Command.WRITE]) + address.to_bytes(2, "little") + value.to_bytes(4, "little")


def trace_commands(experts: np.ndarray, new: np.ndarray, token_id: np.ndarray) -> bytes:
    """The whole of a trace: for each token its token command, then a route command per layer."""
    tokens, layers, top_k = experts.shape
    token = np.zeros((tokens, 6), np.uint8)
    token[:, 0] = Command.TOKEN
    token[:, 1] = new
    token[:, 2:] = token_id.astype("<u4").reshape(tokens, 1).view(np.uint8)
    route = np.zeros((tokens, layers, 2 + top_k), np.uint8)
    route[:, :, 0] = Command.ROUTE
    route[:, :, 1] = np.arange(layers)
    route[:, :, 2:] = experts
    return np.concatenate([token, route.reshape(tokens, -1)], axis=1).tobytes()
