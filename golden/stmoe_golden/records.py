# SPDX-License-Identifier: Apache-2.0
"""Kinds of record of the event port. Apart from the checker, which loads Numba: generating Verilog
and every simulation need the kinds alone, and would spend seconds of CPU on it."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Kind"]


class Kind(IntEnum):
    """Kinds of record. The RTL's ``EventKind`` is made of these."""

    TOKEN = 1
    ROUTE = 2
    SCORE_COMMIT = 3
    SELECT = 4
    LOAD_START = 5
    BURST = 6
    LAST_BEAT = 7
    FILL_DONE = 8
    GRANT = 9
    RELEASE = 10
    CANCEL = 11
    DRAINED = 12
    PROMOTE = 13
    DROP = 14
    RETRY = 15
    ERROR = 16
    WATCHDOG = 17
    REGISTER_COMMIT = 18
    THRESHOLD = 19
    ILLEGAL = 20
