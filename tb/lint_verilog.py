# SPDX-License-Identifier: Apache-2.0
"""Lints the generated Verilog of every preset with ``verilator --lint-only -Wall``.

``python tb/lint_verilog.py [PRESET ...]``; without names, every preset. Status 1 if one has a
finding, 2 if a preset or a tool is missing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from stmoe.toolchain import ToolError, verilator_folder
from stmoe.top import generate
from stmoe_golden.config import PRESETS, ConfigError, preset

WAIVED = {
    "CASEINCOMPLETE": "every signal has its default before the case statement",
    "CMPCONST": "an index is compared with the last layer, expert or slot, which a preset's width "
    "may not exceed",
    "DECLFILENAME": "one file holds all modules of the engine",
    "PROCASSINIT": "a register's reset value is its power-up value too",
    "UNUSEDSIGNAL": "every field of a payload has a named wire, so that waves can be read",
    "WIDTHEXPAND": "Amaranth's operators extend the narrower operand",
    "WIDTHTRUNC": "Amaranth's assignments truncate, and `!x` tests a whole vector",
}
"""Warnings that are off, each with its reason."""


def lint(name: str) -> str:
    """Findings of one preset's Verilog, as Verilator prints them; empty if there are none."""
    return lint_text(generate(preset(name)), name)


def lint_text(text: str, name: str) -> str:
    """Findings of some Verilog; empty if there are none."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{name}.v"
        source.write_text(text)
        run = subprocess.run(
            [
                str(verilator_folder() / "verilator"),
                *("--lint-only", "-Wall"),
                *(f"-Wno-{warning}" for warning in WAIVED),
                source.name,
            ],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    return (run.stdout + run.stderr).strip() if run.returncode or run.stderr else ""


def main(names: list[str]) -> int:
    """Lint the presets of these names, or all."""
    bad = 0
    try:
        for name in names or list(PRESETS):
            findings = lint(name)
            print(f"verilator lint {name}: {'failed' if findings else 'clean'}", flush=True)
            if findings:
                print(findings, file=sys.stderr)
                bad += 1
    except (ConfigError, ToolError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
