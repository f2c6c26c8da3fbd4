# SPDX-License-Identifier: Apache-2.0
"""What the build needs to know of a board, and the boards there are."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from amaranth.build import Platform
from amaranth.vendor import LatticePlatform, XilinxPlatform

from fpga import boards as board_files
from fpga.pll import Ecp5Pll, Series7Pll
from stmoe_golden.config import PRESETS, EngineConfig

__all__ = ["Board", "BoardError", "Capacity", "all_boards", "board_named"]


class BoardError(ValueError):
    """A board, preset or setting that cannot be used; the message is the line to print."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a device holds.

    Attributes
    ----------
    luts : int
        LUT4 on ECP5, LUT6 on 7 series.
    registers : int
    block_rams : int
        Blocks: DP16KD of 18 kbit on ECP5, RAMB36 of 36 kbit on 7 series.
    block_ram_bits : int
        Of one block, parity bits included.
    multipliers : int
        MULT18X18D on ECP5, DSP48E1 on 7 series.
    """

    luts: int
    registers: int
    block_rams: int
    block_ram_bits: int
    multipliers: int


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board that the board top can be built for.

    Parameters
    ----------
    name : str
        What ``BOARD=`` says; the folder under ``build/fpga`` too.
    title : str
        Its name in full.
    platform : type
        From ``amaranth_boards``: pins, part, the clock that comes in.
    capacity : :class:`Capacity`
        Of the device, from its data sheet.
    default_preset : str
        The largest preset of which the board top fits (``fpga/measured.json``), but for
        ``slow_presets``.
    clock_hz : int
        Frequency of the design. A PLL makes it from the platform's default clock, so the ratio
        must be one that it can make exactly.
    baud : int
        Speed of the UART.
    uart : str
        Resource of the UART to the host; ``rx`` is the pin that the device reads.
    reset : str or None
        Resource of a reset button.
    slow_presets : tuple of str
        Presets that fit by count, but that have not been placed and routed within ten minutes.
    """

    name: str
    title: str
    platform: type[Platform]
    capacity: Capacity
    default_preset: str
    clock_hz: int
    baud: int = 1_000_000
    uart: str = "uart"
    reset: str | None = None
    slow_presets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.default_preset not in PRESETS:
            raise BoardError(
                f"{self.name}: default_preset must be one of {', '.join(PRESETS)}, "
                f"not {self.default_preset!r}"
            )
        unknown = set(self.slow_presets) - set(PRESETS)
        if unknown or self.default_preset in self.slow_presets:
            raise BoardError(
                f"{self.name}: slow_presets must be of {', '.join(PRESETS)} but the default, "
                f"not {', '.join(self.slow_presets)}"
            )
        if not issubclass(self.platform, (LatticePlatform, XilinxPlatform)):
            raise BoardError(
                f"{self.name}: platform must be one of an ECP5 or a 7 series device, "
                f"not {self.platform.__name__}"
            )
        self.check_clock(self.clock_hz)

    @property
    def family(self) -> str:
        """``ecp5`` or ``series7``: decides the flow."""
        return "ecp5" if issubclass(self.platform, LatticePlatform) else "series7"

    @property
    def part(self) -> str:
        """Device, package and speed grade."""
        platform = self.platform
        if self.family == "ecp5":
            return f"{platform.device}-{platform.speed}{platform.package}{platform.grade}"
        return f"{platform.device}{platform.package}-{platform.speed}"

    @property
    def input_hz(self) -> int:
        """Frequency of the platform's default clock."""
        return round(self.platform().default_clk_frequency)

    @property
    def _pll(self) -> type[Ecp5Pll] | type[Series7Pll]:
        return Ecp5Pll if self.family == "ecp5" else Series7Pll

    def pll(self, clock_hz: int) -> Ecp5Pll | Series7Pll:
        """A PLL that makes ``clock_hz`` on this board."""
        return self._pll(self.input_hz, clock_hz)

    def check_clock(self, clock_hz: int) -> None:
        """Raise :class:`BoardError` if the board's PLL cannot make this frequency."""
        try:
            self._pll.solve(self.input_hz, clock_hz)
        except ValueError as error:
            raise BoardError(f"{self.name}: {error}") from None

    def check_tables(self, preset: str, config: EngineConfig) -> None:
        """Raise :class:`BoardError` if the tables alone are more than the device's block RAM.

        What is left is known only after synthesis, which takes minutes.
        """
        have = self.capacity.block_rams * self.capacity.block_ram_bits
        if config.table_bits > have:
            raise BoardError(
                f"preset {preset} does not fit {self.name}: its tables are {config.table_bits:,} "
                f"bits, {config.table_bits / have:.1f} times the {have:,} of block RAM in a "
                f"{self.part}"
            )


def all_boards() -> dict[str, Board]:
    """Every board of ``fpga/boards``, by name, in the order of their files."""
    found: dict[str, Board] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(board_files.__path__)):
        for board in importlib.import_module(f"{board_files.__name__}.{module}").BOARDS:
            if board.name in found:
                raise BoardError(f"two boards have the name {board.name}")
            found[board.name] = board
    return found


def board_named(name: str) -> Board:
    """The board of that name, or :class:`BoardError` listing the names there are."""
    boards = all_boards()
    if not name:
        raise BoardError(f"no board is named (BOARD=); boards are {', '.join(boards)}")
    if name not in boards:
        raise BoardError(f"unknown board {name!r}; boards are {', '.join(boards)}")
    return boards[name]
