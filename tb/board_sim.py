# SPDX-License-Identifier: Apache-2.0
"""A board in Verilator, whose serial port is a pseudo-terminal (``tb/board_sim.cpp``).

``python tb/board_sim.py [--preset NAME | --like TRACE]`` builds one, prints its port, and runs it
until Ctrl-C, to be used with ``stmoe board replay --port``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_objects import keeps, shared_objects
from simulation import BUILD, OBJECTS, ROOT, SOUND, find_verilator
from stmoe.harness.board_protocol import DEFAULT_BAUD
from stmoe.harness.board_top import BoardTop
from stmoe.toolchain import ToolError
from stmoe.verilog_writer import convert
from stmoe_golden.config import ConfigError, EngineConfig, preset
from stmoe_golden.traces import TraceError, config_for, load_trace

__all__ = ["CLOCK_HZ", "BoardSim", "Faults", "build_board", "running_board"]

CLOCK_HZ = 4 * DEFAULT_BAUD
"""4 clocks to a bit, the least: the line is as fast as it can be, seen from the engine."""

TOP = "board_top"
SOURCE = ROOT / "tb" / "board_sim.cpp"
VERILATOR_ARGS = (
    *("--cc", "--exe", "--build", "-Wno-fatal", "-Wno-WIDTHTRUNC", "-Wno-CASEINCOMPLETE"),
    *("-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-assert", "--top-module", TOP),
)


@dataclass(frozen=True)
class Faults:
    """What the line does to bytes: so many of a million, each way, are dropped, spoiled, repeated
    or held back."""

    seed: int = 1
    to_board: int = 0
    to_host: int = 0


@dataclass
class BoardSim:
    """A board that runs. ``report`` is what it said at its end: clocks, seconds and faults."""

    port: str
    process: subprocess.Popen[str]
    report: dict[str, float] | None = None


def build_board(
    config: EngineConfig,
    *,
    clock_hz: int = CLOCK_HZ,
    baud: int = DEFAULT_BAUD,
    engine_factory: Callable | None = None,
    optimise: Sequence[str] = ("-O2", *SOUND),
) -> Path:
    """Build the model; returns the program. An unchanged design is not built again."""
    top = BoardTop(config, clock_hz=clock_hz, baud=baud, engine_factory=engine_factory)
    text = convert(top, name=TOP, emit_src=False)
    args = [*VERILATOR_ARGS, "-CFLAGS", " ".join(optimise)]
    key = hashlib.sha256((text + SOURCE.read_text() + repr(args)).encode()).hexdigest()[:12]
    folder = BUILD / "board" / key
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "model" / "board_sim"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "built").exists():
            return program
        (folder / f"{TOP}.v").write_text(text)
        command = [str(find_verilator() / "verilator"), *args, "-j", str(os.cpu_count() or 2)]
        # One file: the precompiled headers of many take longer than the design.
        make = [*keeps(f"V{TOP}"), *(["VM_PARALLEL_BUILDS=0"] if "-O2" not in optimise else [])]
        command += ["-MAKEFLAGS", " ".join(make)]
        command += ["--Mdir", "model", "-o", program.name, f"{TOP}.v", str(SOURCE)]
        environment = dict(os.environ)
        if shutil.which("ccache"):
            environment.setdefault("OBJCACHE", "ccache")
        with shared_objects(folder / "model", find_verilator(), OBJECTS, args):
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
            (folder / "build.log").write_text(done.stdout + done.stderr)
            if done.returncode:
                raise ToolError(f"{folder / 'build.log'}: {(done.stdout + done.stderr)[-3000:]}")
        (folder / "built").touch()
    return program


@contextlib.contextmanager
def running_board(
    program: Path,
    *,
    clock_hz: int = CLOCK_HZ,
    baud: int = DEFAULT_BAUD,
    faults: Faults | None = None,
) -> Iterator[BoardSim]:
    """Run a model; it ends with the context, and then its ``report`` is there."""
    command = [str(program), str(clock_hz), str(baud)]
    if faults is not None:
        command += [str(n) for n in (faults.seed, faults.to_board, faults.to_host)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    board = BoardSim(process.stdout.readline().strip(), process)
    try:
        if not board.port:
            raise ToolError(process.stderr.read().strip() or "the model does not run")
        yield board
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said = process.stderr.read()
        pairs = re.findall(r"(\w+) ([\d.]+)", said)
        board.report = {name: float(value) for name, value in pairs}
        process.stdout.close()
        process.stderr.close()


def main(argv: list[str] | None = None) -> int:
    """Run a board until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="board_sim", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", default="tiny")
    which.add_argument("--like", metavar="TRACE", help="the configuration of a trace's shape")
    options = parser.parse_args(argv)
    try:
        config = config_for(load_trace(options.like)) if options.like else preset(options.preset)
        print("board_sim: building the model ...", flush=True)
        with running_board(build_board(config)) as board:
            print(board.port, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                board.process.wait()
    except (ConfigError, TraceError, ToolError) as error:
        print(f"board_sim: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
