# SPDX-License-Identifier: Apache-2.0
"""What a design takes of a device, from the reports of each tool."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from fpga.board import Board

__all__ = [
    "Clock",
    "Use",
    "clocks_of_nextpnr",
    "clocks_of_vivado",
    "of_nextpnr",
    "of_vivado",
    "of_yosys",
    "slacks_of_vivado",
]

ECP5_LUTS = {
    # A carry cell is two LUTs. A distributed RAM of 16 x 4 is four, and its write port takes the
    # place of two more.
    "LUT4": 1,
    "CCU2C": 2,
    "TRELLIS_DPR16X4": 6,
}

SERIES7_LUTS = {
    **{f"LUT{inputs}": 1 for inputs in range(1, 7)},
    # Left over for the packer, which may yet absorb them.
    "INV": 1,
    "SRL16E": 1,
    "SRLC32E": 1,
    "RAM32X1S": 1,
    "RAM64X1S": 1,
    "RAM32X1D": 2,
    "RAM64X1D": 2,
    "RAM128X1D": 4,
    "RAM32M": 4,
    "RAM64M": 4,
}

SERIES7_REGISTERS = ("FDRE", "FDSE", "FDCE", "FDPE", "LDCE", "LDPE")


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a design takes, in the units of :class:`Capacity`.

    ``block_rams`` is in halves on 7 series, where a RAMB18 is half a RAMB36.
    """

    luts: int
    registers: int
    block_rams: float
    multipliers: int

    def rows(self, board: Board) -> list[tuple[str, float, int]]:
        """Name, used and available of each resource."""
        have = board.capacity
        ecp5 = board.family == "ecp5"
        return [
            ("LUT4" if ecp5 else "LUT6", self.luts, have.luts),
            ("registers", self.registers, have.registers),
            ("DP16KD (18 kbit)" if ecp5 else "RAMB36", self.block_rams, have.block_rams),
            ("MULT18X18D" if ecp5 else "DSP48E1", self.multipliers, have.multipliers),
        ]

    def table(self, board: Board) -> str:
        """The rows, with shares, to print."""
        return "\n".join(
            f"  {name:<17} {used:>8,g} of {available:>7,} {used / available:>6.1%}"
            for name, used, available in self.rows(board)
        )

    def excess(self, board: Board) -> str:
        """What is over the device's capacity and by how much; empty if the design fits."""
        return ", ".join(
            f"{used:,g} {name} of {available:,} ({used / available - 1:.0%} too many)"
            for name, used, available in self.rows(board)
            if used > available
        )

    def as_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Clock:
    """A clock after place and route, in MHz."""

    name: str
    achieved: float
    constraint: float

    @property
    def met(self) -> bool:
        """Timing is met."""
        return self.achieved >= self.constraint


def of_yosys(stat: Path, board: Board) -> Use:
    """From ``stat -json`` after synthesis for the board's family."""
    text = stat.read_text()
    design = json.loads(text[text.index("{") :])["design"]
    cells: dict[str, int] = {
        kind: count["count"] if isinstance(count, dict) else count
        for kind, count in design["num_cells_by_type"].items()
    }

    def total(weights: dict[str, int]) -> int:
        return sum(cells.get(kind, 0) * weight for kind, weight in weights.items())

    if board.family == "ecp5":
        return Use(
            luts=total(ECP5_LUTS),
            registers=cells.get("TRELLIS_FF", 0),
            block_rams=cells.get("DP16KD", 0) + cells.get("PDPW16KD", 0),
            multipliers=cells.get("MULT18X18D", 0),
        )
    return Use(
        luts=total(SERIES7_LUTS),
        registers=sum(cells.get(kind, 0) for kind in SERIES7_REGISTERS),
        block_rams=cells.get("RAMB36E1", 0) + cells.get("RAMB18E1", 0) / 2,
        multipliers=cells.get("DSP48E1", 0),
    )


def of_nextpnr(report: Path) -> Use:
    """From nextpnr-ecp5's ``--report``."""
    used = json.loads(report.read_text())["utilization"]
    return Use(
        luts=used["TRELLIS_COMB"]["used"],
        registers=used["TRELLIS_FF"]["used"],
        block_rams=used["DP16KD"]["used"],
        multipliers=used["MULT18X18D"]["used"],
    )


def clocks_of_nextpnr(report: Path) -> list[Clock]:
    """Clocks in nextpnr's ``--report``, which is of the routed design."""
    return [
        Clock(name.removeprefix("$glbnet$"), clock["achieved"], clock["constraint"])
        for name, clock in sorted(json.loads(report.read_text())["fmax"].items())
    ]


def of_vivado(report: Path) -> Use:
    """From Vivado's ``report_utilization``.

    Raises
    ------
    ValueError
        A row is missing.
    """
    text = report.read_text()

    def used(name: str) -> float:
        match = re.search(rf"^\|\s*{name}\*?\s*\|\s*([\d.,]+)\s*\|", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"{report}: no row for {name}")
        return float(match[1])

    return Use(
        luts=int(used("Slice LUTs")),
        registers=int(used("Slice Registers")),
        block_rams=used("Block RAM Tile"),
        multipliers=int(used("DSPs")),
    )


def _section(report: Path, title: str) -> list[list[str]]:
    """Cells of each line of a section of Vivado's ``report_timing_summary``."""
    text = report.read_text()
    _, found, rest = text.partition(f"| {title}\n")
    if not found:
        raise ValueError(f"{report}: no section {title}")
    body = re.split(r"^\| ", rest, maxsplit=2, flags=re.MULTILINE)
    # The title is underlined by a line of its own that begins with a bar.
    lines = (body[1] if len(body) > 1 else rest).splitlines()[1:]
    return [line.split() for line in lines if line.strip() and not line.startswith("---")]


def slacks_of_vivado(report: Path) -> dict[str, float]:
    """Worst setup, hold and pulse width slack in ns, by Vivado's names: WNS, WHS, WPWS.

    Raises
    ------
    ValueError
        The report has no such summary.
    """
    for row in _section(report, "Design Timing Summary"):
        if len(row) == 12 and re.fullmatch(r"-?[\d.]+", row[0]):
            return {name: float(row[i]) for name, i in (("WNS", 0), ("WHS", 4), ("WPWS", 8))}
    raise ValueError(f"{report}: no row in Design Timing Summary")


def clocks_of_vivado(report: Path) -> list[Clock]:
    """Clocks with paths in Vivado's ``report_timing_summary``: Fmax is what is left of the period
    when the clock's worst setup slack is taken off it."""
    periods = {}
    for row in _section(report, "Clock Summary"):
        match = re.fullmatch(r"(\S+) \{[^}]*\} ([\d.]+) ([\d.]+)", " ".join(row))
        if match:
            periods[match[1]] = float(match[2])
    return [
        Clock(row[0], 1e3 / (periods[row[0]] - float(row[1])), 1e3 / periods[row[0]])
        for row in _section(report, "Intra Clock Table")
        if row[0] in periods and len(row) > 1 and re.fullmatch(r"-?[\d.]+", row[1])
    ]
