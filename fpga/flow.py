# SPDX-License-Identifier: Apache-2.0
"""What the flows share: the job, its folders, the project's files and its report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amaranth.build.run import BuildPlan

from fpga.board import Board
from fpga.on_board import OnBoard
from fpga.tools import Tool, version
from fpga.use import Clock, Use
from stmoe_golden.config import EngineConfig

__all__ = [
    "ABC9_SCRIPT",
    "BARE_READS",
    "ECP5_OPTIONS",
    "HIDE_FIELDS",
    "NAME",
    "DoesNotFit",
    "Job",
    "NoBitstream",
    "TimingFailed",
    "first_error",
]

NAME = "stmoe"
"""Of the design: its module, and the stem of every file in the project."""

HIDE_FIELDS = "rename -hide w:*[[]*"
"""Yosys command. Amaranth names a field of an array ``foo[3]``; abc9 takes that for bit 3 of
``foo`` when it puts the mapped logic back, and stops with an assertion of Yosys's."""

BARE_READS = "memory_nordff"
"""Yosys command, for RTLIL. There a read port has its register in it, and Yosys keeps what a read
finds that meets a write, whatever the attribute ``no_rw_check`` says: for a block RAM with two
registers and a multiplexer for each bit. With the register beside the port, as in Verilog, it looks
at the attribute."""

ABC9_SCRIPT = (
    'scratchpad -set abc9.script "+&scorr; &sweep; &dc2; &st; &sopb -R 20 -C 6; &st; &if -g -K 6; '
    "&dch -C 1000; &if {W} {D} {R}; &save; &st; &if -g -K 4; &dch -f; &if {W} {D} {R}; &save; "
    '&st; &if -g -K 4; &dch -f; &if {W} {D} {R}; &save; &load; &mfs"'
)
"""Yosys command, for ECP5: what abc9 does to the logic. It balances all of it before it maps:
abc9's own scripts keep to the longest paths alone, which they take to be those behind block RAM, as
they know of LUTs but little of wires, and leave ten LUTs in a row elsewhere."""

ECP5_OPTIONS = "-cmp2softlogic -nowidelut"
"""Of ``synth_ecp5``. Without multiplexers behind the LUTs the engine takes half of them (10,457
instead of 17,383 for gpt_oss_20b) and routes in minutes instead of hours; comparisons with
constants are faster without carry chains."""


class DoesNotFit(RuntimeError):
    """The design is larger than the device; the message says by how much."""


class TimingFailed(RuntimeError):
    """The routed design is too slow; the message says by how much."""


class NoBitstream(RuntimeError):
    """The project is complete but a tool that makes the bitstream is not here."""


def _board_top(config: EngineConfig, *, clock_hz: int, baud: int) -> Any:
    # Imported late: it takes the whole generator, and `make boards` needs none of it.
    from stmoe.harness.board_top import BoardTop

    return BoardTop(config, clock_hz=clock_hz, baud=baud)


@dataclass
class Job:
    """One bitstream to make.

    Parameters
    ----------
    board : :class:`Board`
    preset : str
        Its name.
    config : :class:`EngineConfig`
    clock_hz : int
        Of the design.
    seed : int
        Of place and route.
    folder : Path
        Holds the bitstream, ``report.json`` and ``build.log``; the project in ``project/``.
    top : callable
        Makes the board top from the configuration, ``clock_hz`` and ``baud``.
    """

    board: Board
    preset: str
    config: EngineConfig
    clock_hz: int
    seed: int
    folder: Path
    top: Callable[..., Any] = _board_top
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def project(self) -> Path:
        """Everything that the tools read and write."""
        return self.folder / "project"

    @property
    def log(self) -> Path:
        """What the tools print."""
        return self.folder / "build.log"

    @property
    def bitstream(self) -> Path:
        """There only when timing is met."""
        return self.folder / f"{self.board.name}.bit"

    def begin(self) -> None:
        """Empty the folder: nothing in it is ever of an earlier build."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.project.mkdir(parents=True)
        self.report = {
            "board": self.board.name,
            "part": self.board.part,
            "preset": self.preset,
            "clock_mhz": self.clock_hz / 1e6,
            "seed": self.seed,
            "tools": {},
            "seconds": {},
            "capacity": vars(self.board.capacity),
            "bitstream": None,
        }

    def plan(self, platform: Any, **overrides: str) -> BuildPlan:
        """The project's files, by Amaranth, written to ``project``."""
        top = self.top(self.config, clock_hz=self.clock_hz, baud=self.board.baud)
        design = OnBoard(self.board, top, clock_hz=self.clock_hz)
        plan = platform.prepare(design, NAME, emit_src=False, **overrides)
        plan.extract(str(self.project))
        return plan

    def uses(self, tool: Tool) -> None:
        """Note a tool and its version, and say so."""
        text = version(tool)
        self.report["tools"][tool.name] = text
        print(f"bitstream: {tool.name} is {text} ({tool.origin})", flush=True)

    def used(self, use: Use, stage: str) -> None:
        """Print and note what the design takes after a stage; raise if that is too much."""
        self.report["use"] = use.as_dict() | {"after": stage}
        print(f"bitstream: use of {self.board.part} after {stage}", flush=True)
        print(use.table(self.board), flush=True)
        excess = use.excess(self.board)
        if excess:
            raise DoesNotFit(f"preset {self.preset} does not fit {self.board.name}: {excess}")

    def timed(self, clocks: list[Clock]) -> None:
        """Print and note the clocks of the routed design; raise if one is too slow, or if none
        is held to ``clock_hz``."""
        self.report["clocks"] = [vars(clock) | {"met": clock.met} for clock in clocks]
        print("bitstream: Fmax after place and route", flush=True)
        for clock in clocks:
            print(
                f"  {clock.name:<17} {clock.achieved:>8.2f} MHz of {clock.constraint:.2f} MHz: "
                f"{'met' if clock.met else 'NOT met'}",
                flush=True,
            )
        slow = [c for c in clocks if not c.met]
        if slow:
            worst = min(slow, key=lambda clock: clock.achieved / clock.constraint)
            raise TimingFailed(
                f"timing is not met: {worst.name} reaches {worst.achieved:.2f} MHz of "
                f"{worst.constraint:.2f} MHz; no bitstream was kept (CLOCK= or SEED= may help)"
            )
        if not any(abs(c.constraint * 1e6 / self.clock_hz - 1) < 1e-3 for c in clocks):
            raise TimingFailed(
                f"no clock was held to {self.clock_hz / 1e6:g} MHz: the PLL's constraint is lost"
            )

    def keep(self, made: Path) -> None:
        """Move a bitstream that meets timing into place."""
        made.replace(self.bitstream)
        self.report["bitstream"] = self.bitstream.name

    def write_report(self) -> None:
        """``report.json``, whatever came of it."""
        if self.folder.is_dir():
            text = json.dumps(self.report, indent=2) + "\n"
            (self.folder / "report.json").write_text(text)


def first_error(*logs: Path) -> str:
    """The first error in a tool's logs, in one line."""
    for log in logs:
        if log.is_file():
            match = re.search(r"^ERROR:.*$", log.read_text(errors="replace"), re.MULTILINE)
            if match:
                return match[0]
    return "it printed no error"
