# SPDX-License-Identifier: Apache-2.0
"""Area and speed of the engine alone, for ``docs/ppa.json``: ``make ppa``, ``python -m fpga.ppa``.

Each row is one preset with one number of spatial tables (``D``) on one part, without event port
and out of context: no pins, no harness. On ECP5 the figures of area are Yosys's and ``fmax_mhz``
is the median over the seeds of place and route, of which one that is not routed counts as the
slowest; there is no place and route on PyPI for 7 series, so ``fmax_mhz`` is null there.

``luts`` counts every LUT that the cells take, carry chains and LUT RAM included (as ``make
bitstream`` does), ``bram_bits`` the whole of every block RAM that is used. A row with a ``note``
does not fit the part, or most of its seeds are not routed: where the tables alone are larger than
the part's block RAM, ``bram_bits`` is their size, and nothing was synthesised.

What was measured for the same Verilog by the same tools is kept under ``build/ppa`` and not
measured again, so an interrupted run goes on where it stopped. ``--table`` prints the rows as
docs/results.md has them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpga.board import Board, board_named
from fpga.flow import ABC9_SCRIPT, ECP5_OPTIONS, HIDE_FIELDS, NAME, first_error
from fpga.tools import Tool, ToolFailed, find, version
from fpga.use import clocks_of_nextpnr, of_yosys
from stmoe_golden.config import PRESETS, ConfigError, EngineConfig, preset

__all__ = ["KEYS", "compare", "main", "measure"]

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "ppa.json"
FOLDER = ROOT / "build" / "ppa"

KEYS = ("preset", "D", "part", "luts", "registers", "bram_bits", "fmax_mhz")
"""Of a row; one that does not fit has ``note`` too."""

BOARDS = ("ulx3s", "arty_a7_100t")
"""Boards whose parts are measured: ECP5-85F of speed grade 6, and Artix-7 100T."""

DEPTHS = (1, 2, 3)
SEEDS = (1, 2, 3, 4, 5)
TARGET_MHZ = 100
AIMS_MHZ = (102, 100, 97, 94, 91, 88)
"""What place and route aims at, one after the other until it ends. With ``--tmg-ripup`` nextpnr
routes anew what is too slow: it ends at the aim or a little below it, and never where that is out
of reach. Where none ends, there is a last try without that. A seed begins one aim above that at
which the seed before it ended, or with that last try if it ended so: it may end lower than it
could, and seeds are measured in order."""

TURNS = 80
"""Iterations of the router until an aim counts as out of reach; those that end take up to 60."""

REACH = 1.3
"""A seed has no aim, but the last try alone, if the first is over so many times what the placer
estimates, which is known before routing. Seeds that ended at an aim reached up to 1.27 times, and
with 60,000 cells every aim that is not reached takes a quarter of an hour."""

CROWDED = (9, 3_300)
"""Iterations of the router, and the wires used twice after them above which a seed counts as not
routed. Those that were routed had up to 3,023 left then; one with 3,593 still had 1,070 after 65
minutes, when a further iteration took three minutes and mended a sixtieth of them."""

NOT_ROUTED = "does not fit: nextpnr routes fewer than"
"""Begin of the note of a row most of whose seeds are not routed, which area alone cannot tell."""

TOLERANCE = 0.1
"""A fresh synthesis may differ from the committed figure by so much."""

SYNTHESIS = {
    "ecp5": f"{ABC9_SCRIPT}; synth_ecp5 {ECP5_OPTIONS} -top {NAME} -json {NAME}.json",
    "series7": f"synth_xilinx -flatten -abc9 -arch xc7 -top {NAME}",
}
PLACE = ("--85k", "--package", "CABGA381", "--speed", "6", "--out-of-context")

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class BadInput(ValueError):
    """An option that cannot be used; the message is the line to print."""


def _tool(name: str) -> Tool:
    tool = find(name)
    if tool is None:
        raise ToolFailed(f"{name} not found: `make ppa` installs it from PyPI")
    return tool


MAX_FREQUENCY = re.compile(r"Max frequency for .*: ([\d.]+) MHz")
USED_TWICE = re.compile(r"iter=(\d+) .*overused=(\d+)")


class _Watch:
    """Reads what place and route prints, until its aim is out of reach."""

    def __init__(self) -> None:
        self.turns = 0
        self.reach = math.inf

    def out_of_reach(self, line: str) -> bool:
        self.turns += "tmgfail=" in line
        # The first is the placer's estimate, another comes when all is routed.
        if math.isinf(self.reach) and (found := MAX_FREQUENCY.search(line)):
            self.reach = REACH * float(found[1])
        return self.turns > TURNS or self.reach < AIMS_MHZ[0]


class _CrowdWatch:
    """Reads what the router prints, until too much is used twice."""

    def __init__(self) -> None:
        self.said = ""

    def out_of_reach(self, line: str) -> bool:
        found = USED_TWICE.search(line)
        if found and int(found[1]) >= CROWDED[0] and int(found[2]) > CROWDED[1]:
            self.said = f"{int(found[2]):,} wires are used twice after {found[1]} turns"
        return bool(self.said)


def _run(
    tool: Tool,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    watch: _Watch | _CrowdWatch | None = None,
) -> bool:
    """Run a tool; false if it was stopped because its aim was seen to be out of reach."""
    with (
        open(log, "w") as file,
        subprocess.Popen(
            [tool.path, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if watch and watch.out_of_reach(line):
                    return False
            process.wait()
        finally:
            process.kill()  # nothing where it has ended
    if process.returncode:
        raise ToolFailed(f"{tool.name} failed in {folder}: {first_error(log)}")
    return True


def _say(message: str) -> None:
    print(f"ppa: {message}", file=sys.stderr, flush=True)


def _config(name: str, depth: int) -> EngineConfig:
    return preset(name).replace(spatial_depth=depth, event_port=False)


def _synthesise(config: EngineConfig, board: Board, label: str) -> Path:
    """The folder of a synthesis: made now, or by a run before from the same Verilog."""
    from stmoe.top import EngineTop
    from stmoe.verilog_writer import convert

    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    text = convert(EngineTop(config), name=NAME, emit_src=False)
    yosys = _tool("yosys")
    script = f"read_verilog {NAME}.v; {HIDE_FIELDS}; {SYNTHESIS[board.family]}; "
    script += f"tee -q -o {NAME}.new.json stat -json"
    key = hashlib.sha256("\0".join((text, script, version(yosys))).encode()).hexdigest()[:16]
    folder = FOLDER / f"{board.family}-{key}"
    stat = folder / f"{NAME}.stat.json"
    if not stat.is_file():
        _say(f"{label}: synthesis")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.v").write_text(text)
        _run(yosys, ["-q", "-p", script], folder, folder / "yosys.log")
        (folder / f"{NAME}.new.json").replace(stat)
    return folder


def _route(
    nextpnr: Tool, folder: Path, seed: int, first: int, made: str, label: str
) -> tuple[Path | None, int]:
    """The report of a design that is placed with a seed, and routed for what it reaches, or None
    if it is not routed; at which of the aims, from the one numbered ``first`` on."""

    def report(aim: int | None) -> Path:
        return folder / f"{made}-{seed}-for-{aim or 'any'}.report.json"

    for index, aim in enumerate((*AIMS_MHZ, None)):
        if report(aim).is_file():
            return report(aim), index
    crowded = folder / f"{made}-{seed}.not-routed"
    if crowded.exists():
        return None, len(AIMS_MHZ)
    _say(f"{label}: place and route with seed {seed}")
    new, log = folder / f"{made}-{seed}.new.json", folder / f"nextpnr-{seed}.log"
    arguments = [*PLACE, "--json", f"{NAME}.json", "--timing-allow-fail", "--report", new.name]
    arguments += ["--seed", str(seed), "--router", "router2"]
    for index, aim in enumerate(AIMS_MHZ[first:], first):
        failed = folder / f"{made}-{seed}.not-at-{aim}"
        if failed.exists():
            continue
        watch = _Watch()
        tries = [*arguments, "--freq", str(aim), "--tmg-ripup"]
        if _run(nextpnr, tries, folder, log, watch):
            new.replace(report(aim))
            return report(aim), index
        if watch.turns:
            _say(f"{label}: seed {seed} is not at {aim} MHz after {TURNS} turns of the router")
            failed.touch()
            continue
        _say(f"{label}: seed {seed} as it is placed does not reach {AIMS_MHZ[0]} MHz")
        for other in AIMS_MHZ:
            (folder / f"{made}-{seed}.not-at-{other}").touch()
        break
    crowd = _CrowdWatch()
    if not _run(nextpnr, [*arguments, "--freq", str(TARGET_MHZ)], folder, log, crowd):
        _say(f"{label}: seed {seed} is not routed: {crowd.said} of the router")
        crowded.touch()
        return None, len(AIMS_MHZ)
    new.replace(report(None))
    return report(None), len(AIMS_MHZ)


def _fmax(folder: Path, seeds: Sequence[int], label: str) -> float:
    """Median over the seeds, in MHz; one that is not routed counts as 0."""
    nextpnr = _tool("nextpnr-ecp5")
    tries = f"{version(nextpnr)} {PLACE} {AIMS_MHZ} {TURNS} {REACH} {CROWDED} {TARGET_MHZ}"
    made = hashlib.sha256(tries.encode()).hexdigest()[:8]
    found, first = [], 0
    for seed in seeds:
        report, reached = _route(nextpnr, folder, seed, first, made, label)
        if report is None:
            found.append(0.0)
            _say(f"{label}: seed {seed} counts as 0 MHz")
        else:
            found.append(min(clock.achieved for clock in clocks_of_nextpnr(report)))
            _say(f"{label}: seed {seed} reaches {found[-1]:.1f} MHz")
        first = reached if reached == len(AIMS_MHZ) else max(reached - 1, 0)
    # Half of what one of two seeds reaches is not a speed.
    return round(statistics.median(found) if all(found) else statistics.median_low(found), 1)


def measure(name: str, depth: int, board: Board, seeds: Sequence[int]) -> dict[str, Any]:
    """One row of :data:`KEYS`; no place and route without seeds."""
    config = _config(name, depth)
    label = f"{name}, D = {depth}, {board.part}"
    have = board.capacity.block_rams * board.capacity.block_ram_bits
    row: dict[str, Any] = dict.fromkeys(KEYS)
    row.update(preset=name, D=depth, part=board.part)
    if config.table_bits > have:
        row["bram_bits"] = config.table_bits
        row["note"] = (
            f"does not fit: its tables alone are {config.table_bits:,} bits, "
            f"{config.table_bits / have:.1f} times the {have:,} of block RAM"
        )
        return row
    folder = _synthesise(config, board, label)
    use = of_yosys(folder / f"{NAME}.stat.json", board)
    row.update(
        luts=use.luts,
        registers=use.registers,
        bram_bits=round(use.block_rams * board.capacity.block_ram_bits),
    )
    if use.excess(board):
        row["note"] = f"does not fit: {use.excess(board)}"
    elif board.family == "ecp5" and seeds:
        fmax = _fmax(folder, seeds, label)
        if fmax:
            row["fmax_mhz"] = fmax
        else:
            most = len(seeds) // 2 + 1
            row["note"] = f"{NOT_ROUTED} {most} of {len(seeds)} seeds"
    return row


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["preset"], row["D"], row["part"]


def _committed(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    new = path.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    new.replace(path)


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/results.md: a line for each preset and D, the parts side by side."""

    def cells(row: dict[str, Any], *names: str) -> list[str]:
        found = []
        for name in names:
            value = row.get(name)
            found.append("" if value is None else f"{value:,}")
            if name == "luts" and value is None:
                found[-1] = "tables alone are too large"
            elif name == "bram_bits" and row.get("luts") is not None and "note" in row:
                found[-1] += " (does not fit)"
        return found

    parts = [board_named(name).part for name in BOARDS]
    area = ("luts", "registers", "bram_bits")
    by_key = {_key(row): row for row in rows}
    lines = [
        "| preset | D | ECP5-85F-6: LUTs | registers | block RAM bits | Fmax, MHz "
        "| XC7A100T: LUTs | registers | block RAM bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PRESETS:
        for depth in DEPTHS:
            ecp5, artix = (by_key.get((name, depth, part)) for part in parts)
            line = [name, str(depth)]
            line += cells(ecp5, *area, "fmax_mhz") if ecp5 else ["not measured", "", "", ""]
            line += cells(artix, *area) if artix else ["not measured", "", ""]
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def compare(fresh: dict[str, Any], committed: Sequence[dict[str, Any]]) -> list[str]:
    """How a fresh row without Fmax differs from the committed one by more than the tolerance."""
    label = f"{fresh['preset']}, D = {fresh['D']}, {fresh['part']}"
    found = [row for row in committed if _key(row) == _key(fresh)]
    if not found:
        return [f"{label}: no figure in docs/ppa.json; `make ppa` measures it"]
    wrong = []
    was_too_large = not found[0].get("note", NOT_ROUTED).startswith(NOT_ROUTED)
    for name in ("luts", "registers", "bram_bits"):
        was, now = found[0][name], fresh[name]
        if was != now and (not was or now is None or abs(now - was) > TOLERANCE * was):
            wrong.append(f"{label}: {name} {now} is not within 10 % of the {was} in docs/ppa.json")
    if was_too_large != ("note" in fresh):
        wrong.append(f"{label}: fits the part or not, other than docs/ppa.json says")
    return wrong


def _parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(message)

    parser = Parser(prog="python -m fpga.ppa", description="Area and speed of the engine.")
    parser.add_argument("--preset", action="append", help=f"of {', '.join(PRESETS)}; all of them")
    parser.add_argument("--depth", action="append", type=int, help="D, of 1, 2, 3; all of them")
    parser.add_argument("--board", action="append", help=f"of {', '.join(BOARDS)}; all of them")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of place and route: 0 to 5")
    parser.add_argument("--out", type=Path, default=FIGURES, help="the rows (docs/ppa.json)")
    parser.add_argument("--table", action="store_true", help="print the rows, and measure nothing")
    parser.add_argument("--check", metavar="PRESET", help="compare its area with the file, D = 1")
    return parser


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    names = options.preset or ([options.check] if options.check else list(PRESETS))
    for name in (*names, *([options.check] if options.check else [])):
        preset(name)
    depths = options.depth or DEPTHS
    for depth in depths:
        if depth not in DEPTHS:
            raise BadInput(f"--depth must be 1, 2 or 3, not {depth}")
    if not 0 <= options.seeds <= len(SEEDS):
        raise BadInput(f"--seeds must be 0 to {len(SEEDS)}, not {options.seeds}")
    if 0 < options.seeds < len(SEEDS) and options.out.resolve() == FIGURES:
        raise BadInput(
            f"--seeds {options.seeds} needs --out FILE: docs/{FIGURES.name} holds medians of "
            f"{len(SEEDS)} (0 measures area alone)"
        )
    for name in options.board or ():
        if name not in BOARDS:
            raise BadInput(f"--board must be one of {', '.join(BOARDS)}, not {name!r}")
    boards = [board_named(name) for name in BOARDS if name in (options.board or BOARDS)]
    if options.check:
        rows = _committed(options.out)
        wrong = []
        for board in boards:
            wrong += compare(measure(options.check, 1, board, ()), rows)
        for line in wrong:
            _say(line)
        if not wrong:
            print(f"ppa: {options.check} is within 10 % of {options.out.name}")
        return FAILED if wrong else 0

    if options.table:
        print(_markdown(_committed(options.out)))
        return 0

    order = [(n, d, board_named(b).part) for n in PRESETS for d in DEPTHS for b in BOARDS]
    for name in names:
        for depth in depths:
            for board in boards:
                row = measure(name, depth, board, SEEDS[: options.seeds])
                kept = [r for r in _committed(options.out) if _key(r) != _key(row)]
                rows = sorted([*kept, row], key=lambda r: order.index(_key(r)))
                _write(options.out, rows)
    print(_markdown(_committed(options.out)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except (BadInput, ConfigError) as error:
        _say(str(error))
        return BAD_INPUT
    except ToolFailed as error:
        _say(str(error))
        return FAILED
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return FAILED
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
