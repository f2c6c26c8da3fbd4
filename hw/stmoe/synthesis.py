# SPDX-License-Identifier: Apache-2.0
"""What tells synthesis something and changes nothing else."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, Value

__all__ = [
    "ANY_ON_COLLISION",
    "BLOCK_RAM_FROM",
    "GROUPS",
    "IN_BLOCK_RAM",
    "group_copies",
    "group_enables",
    "group_of",
    "group_register",
    "group_registers",
]

ANY_ON_COLLISION = {"no_rw_check": 1}
"""Attributes of a memory of which nothing is used that was read in the cycle of a write to the same
word: Yosys need not add registers, comparators and multiplexers to make that the old word.
``tb/test_collisions.py`` has such reads give rubbish."""

IN_BLOCK_RAM = {"ram_style": "block"}
"""Attributes of a memory that Yosys and Vivado put in block RAM, however small it is."""

BLOCK_RAM_FROM = 256
"""Words from which Yosys puts a memory of some bits a word in ECP5's block RAM by itself."""

GROUPS = 4
"""Groups of lanes that have a :func:`group_register` each; there are no more kinds of them."""


def group_of(lane: int, lanes: int) -> int:
    """The group that a lane is in: neighbours, as equal in number as may be."""
    return lane * GROUPS // lanes


def group_register(width: int, group: int, name: str) -> Signal:
    """A register for one of :data:`GROUPS` groups of lanes, all of which hold the same.

    Synthesis merges equal flip-flops into one, so these differ, bit by bit, in how they start and
    whether they are reset. (It merges one of them with a register outside that is as this one.)
    """
    return Signal(width, name=name, init=-(group & 1) % (1 << width), reset_less=group & 2 != 0)


def group_registers(width: int, count: int, name: str) -> list[Signal]:
    """A :func:`group_register` for each of ``count`` groups, which is to be given the same."""
    return [group_register(width, n, f"{name}_{n}" if n else name) for n in range(count)]


def group_copies(m: Module, signal: Value, name: str) -> list[Signal]:
    """``signal`` as it was in the cycle before, in a :func:`group_register` for each group."""
    copies = [group_register(len(signal), n, f"{name}_{n}") for n in range(GROUPS)]
    m.d.sync += [copy.eq(signal) for copy in copies]
    return copies


def group_enables(m: Module, signal: Value, name: str) -> Value:
    """``signal`` (one bit) as it was in the cycle before, for each of :data:`GROUPS` groups.

    Where a :func:`group_register` will not do, as some of those are 1 after reset: these are all 0
    from reset on. Two registers that are not merged as one of them holds the complement.
    """
    plain, complement = Signal(name=name), Signal(init=1, name=f"{name}_complement")
    m.d.sync += [plain.eq(signal), complement.eq(~signal)]
    return Cat(plain, ~complement).replicate(GROUPS // 2)
