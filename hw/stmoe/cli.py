# SPDX-License-Identifier: Apache-2.0
"""The command ``stmoe``.

Bad input of any kind ends with status 2 and exactly one line on standard error, ``stmoe: ...``,
that names what is wrong and what is allowed; no output file is left half written. Ctrl-C ends
with 130, a reader that goes away with 141.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import math
import os
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from stmoe.board.arguments import add_board_commands
from stmoe.command_line import CommandError
from stmoe.lab.compare_command import add_compare_arguments, compare_command
from stmoe.lab.report_command import add_report_arguments, report_command
from stmoe.lab.sweep_command import add_sweep_arguments, sweep_command
from stmoe_golden.config import PRESETS, ConfigError, EngineConfig, preset
from stmoe_golden.trace_commands import add_trace_commands, run_trace_command

if TYPE_CHECKING:
    from stmoe_golden.replay import ReplayResult

__all__ = ["main"]

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """Reports a usage error like every other error."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer, 1 or more, not {text!r}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
    return value


def _version() -> str:
    try:
        return importlib.metadata.version("stmoe")
    except importlib.metadata.PackageNotFoundError:
        pass
    # Run from a checkout that is on the path but not installed.
    try:
        with open(Path(__file__).resolve().parents[2] / "pyproject.toml", "rb") as file:
            return str(tomllib.load(file)["project"]["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "of unknown version"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stmoe",
        description="ST-MoE prefetch engine: RTL generator and trace replay.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"stmoe {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    presets = ", ".join(PRESETS)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    def settings(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--set",
            dest="settings",
            metavar="FIELD=VALUE",
            action="append",
            default=[],
            help="change a field of the configuration (may be repeated; see `stmoe params`)",
        )

    replay = command("replay", "Measure a predictor on a routing trace.")
    replay.add_argument("trace", metavar="TRACE", help="an .npz routing trace")
    replay.add_argument("--json", action="store_true", help="print one line of JSON")
    replay.add_argument("--preset", metavar="NAME", help=f"{presets}; by default the trace's shape")
    replay.add_argument(
        "--predictor",
        choices=("learned", "paper"),
        default="learned",
        help="the engine's (default), or the published tables",
    )
    settings(replay)
    replay.add_argument("--tokens", type=_count, metavar="N", help="use at most the first N tokens")
    gate = replay.add_mutually_exclusive_group()
    gate.add_argument(
        "--issue-rate",
        type=_number,
        metavar="X",
        help="pick the threshold that issues at most X*K, on the warm-up half only",
    )
    gate.add_argument(
        "--threshold", type=_number, metavar="T", help="static threshold, in units (steps of 0.25)"
    )
    replay.add_argument(
        "--paper-candidates",
        type=_count,
        metavar="M",
        help="candidates per expert of the paper's table, 2*K by default",
    )

    generate = command("generate", "Write the engine as Verilog.")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", metavar="NAME", help=presets)
    source.add_argument("--config", metavar="FILE.toml", help="as `stmoe config` writes it")
    settings(generate)
    generate.add_argument("-o", dest="output", metavar="FILE.v", required=True)
    generate.add_argument(
        "--memory-clock",
        action="store_true",
        help="give the AXI read manager a clock of its own, m_axi_aclk",
    )
    generate.add_argument(
        "--sv-package",
        metavar="FILE.sv",
        help="also write a SystemVerilog package with the streams' payloads as packed structs",
    )

    config = command("config", "Print or save a configuration as TOML.")
    config.add_argument("--preset", metavar="NAME", required=True, help=presets)
    settings(config)
    config.add_argument("-o", dest="output", metavar="FILE")

    add_compare_arguments(
        command("compare", "Time prefetch policies on a routing trace (docs/compare.md)."),
        count=_count,
        number=_number,
        presets=presets,
        settings=settings,
    )

    trace = command("trace", "Look into, convert, cut and capture routing traces (docs/traces.md).")
    add_trace_commands(trace.add_subparsers(dest="trace_command", metavar="COMMAND"), _count)
    add_report_arguments(command("report", "One HTML page of a result (docs/report.md)."))
    add_sweep_arguments(command("sweep", "Time many settings (docs/sweep.md)."))

    board = command("board", "Talk to a board over its serial port (docs/board.md).")
    add_board_commands(
        board.add_subparsers(dest="board_command", metavar="COMMAND"), _count, presets, settings
    )

    command("params", "Print the table of parameters, in Markdown.")
    # Its arguments are register_map's own: see _registers().
    commands.add_parser("registers", help="Print the register map (see `stmoe registers --help`).")
    return parser


# Output -------------------------------------------------------------------------------------


def _print(text: str) -> None:
    """Write to standard output, where a failure is reported like any other."""
    if sys.stdout is None:
        raise CommandError("standard output is closed")
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence()
        raise CommandError(f"standard output: {error.strerror or error}") from None


def _silence() -> None:
    """Keep Python from failing again when it flushes what could not be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _complain(message: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"stmoe: {' '.join(message.split())}\n")
        sys.stderr.flush()
    return status


def _toml(config: EngineConfig) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        config.save(path)
        return path.read_text()


def _cell(value: float | None) -> str:
    return "    -" if value is None else f"{value:.4f}"


def _table(result: ReplayResult) -> str:
    """Totals, then a row per layer."""
    names = list(result.recall)
    head = [f"@{name}" for name in names] + ["coverage", "issue", "precision"]
    layers = result.per_layer
    rows = [
        ("all", [*result.recall.values(), result.coverage, result.issue_rate, result.precision])
    ]
    for layer in range(len(layers["coverage"])):
        recall = [layers["recall"][name][layer] for name in names]
        gated = [layers[key][layer] for key in ("coverage", "issue_rate", "precision")]
        rows.append((str(layer), recall + gated))
    lines = [
        f"{result.trace}: {result.tokens} tokens of {result.sequences} sequences, "
        f"the last {result.tokens_measured} measured",
        f"predictor {result.predictor}, threshold {result.threshold:g}, "
        f"{result.tokens_per_s:.0f} tokens/s",
        "",
        "layer  " + "  ".join(f"{name:>9}" for name in head),
    ]
    lines += [f"{name:>5}  " + "  ".join(f"{_cell(v):>9}" for v in row) for name, row in rows]
    if result.hindsight is not None:
        best = result.hindsight
        lines += [
            "",
            f"best static threshold in hindsight: {best['threshold']:g}, coverage "
            f"{_cell(best['coverage'])} at issue {_cell(best['issue_rate'])}",
        ]
    return "\n".join(lines) + "\n"


# Commands -----------------------------------------------------------------------------------


def _replay(options: argparse.Namespace) -> None:
    from stmoe_golden.traces import TraceError, config_for, load_trace

    if options.paper_candidates is not None and options.predictor != "paper":
        raise CommandError("argument --paper-candidates: only with --predictor paper")
    if options.preset is not None:
        preset(options.preset)  # a wrong name is said before a long file is read
    try:
        trace = load_trace(options.trace)
        config = config_for(trace, options.preset, options.settings)
        if options.tokens is not None:
            trace = trace.head(options.tokens)
        # Numba takes half a second to load: only for a trace that can be replayed.
        from stmoe_golden.replay import ReplayError, replay_trace

        try:
            result = replay_trace(
                trace,
                config,
                predictor=options.predictor,
                threshold=options.threshold,
                issue_rate=options.issue_rate,
                paper_candidates=options.paper_candidates,
            )
        except ReplayError as error:
            raise CommandError(str(error)) from None
    except TraceError as error:
        raise CommandError(str(error)) from None
    result = replace(result, preset=options.preset)
    _print(result.to_json() + "\n" if options.json else _table(result))


def _generate(options: argparse.Namespace) -> None:
    from stmoe_golden.traces import replacing

    config = preset(options.preset) if options.preset else EngineConfig.load(options.config)
    config = config.with_settings(options.settings)
    try:
        generate = importlib.import_module("stmoe.top").generate
    except ImportError as error:
        raise CommandError(f"generate cannot be loaded: {error}") from None
    if options.sv_package is not None and _same_file(options.sv_package, options.output):
        raise CommandError("argument --sv-package: must be another file than -o")
    # Both or neither: each is put in place only once both have been written.
    with contextlib.ExitStack() as files:
        output = files.enter_context(replacing(options.output))
        package = options.sv_package and files.enter_context(replacing(options.sv_package))
        try:
            output.write(generate(config, memory_clock=options.memory_clock).encode())
        except ValueError as error:
            raise CommandError(str(error)) from None
        if package:
            from stmoe.sv_package import sv_package

            package.write(sv_package(config).encode())


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _config(options: argparse.Namespace) -> None:
    text = _toml(preset(options.preset).with_settings(options.settings))
    if options.output is None:
        _print(text)
        return
    from stmoe_golden.traces import replacing

    with replacing(options.output) as file:
        file.write(text.encode())


def _registers(arguments: list[str]) -> None:
    """Hand over to register_map, which has a parser of its own."""
    try:
        from stmoe import register_map
    except ImportError as error:
        raise CommandError(f"registers cannot be loaded: {error}") from None
    output, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(complaint):
            register_map.main(arguments)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            lines = complaint.getvalue().strip().splitlines() or [str(stop.code)]
            raise CommandError(lines[-1].partition("error: ")[2] or lines[-1]) from None
    _print(output.getvalue().replace("python -m stmoe.register_map", "stmoe registers"))


def _board(options: argparse.Namespace) -> int:
    from stmoe.board.host_link import BoardError
    from stmoe.board.replay import info, replay
    from stmoe_golden.traces import TraceError

    commands = {"replay": replay, "info": info}
    if options.board_command not in commands:
        raise CommandError("a command is needed: replay or info (see stmoe board --help)")
    try:
        return commands[options.board_command](options, _print)
    except (BoardError, TraceError) as error:
        raise CommandError(str(error)) from None


def _trace(options: argparse.Namespace) -> None:
    from stmoe_golden.traces import TraceError

    try:
        run_trace_command(options, _print)
    except TraceError as error:
        raise CommandError(str(error)) from None


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["registers"]:
        _registers(arguments[1:])
        return 0
    help_text = io.StringIO()
    try:
        with contextlib.redirect_stdout(help_text):
            options = _parser().parse_args(arguments)
    except SystemExit:  # --help and --version; errors raise CommandError
        _print(help_text.getvalue())
        return 0
    if options.command == "replay":
        _replay(options)
    elif options.command == "compare":
        compare_command(options, _print)
    elif options.command == "report":
        report_command(options, _print)
    elif options.command == "sweep":
        return sweep_command(options, _print)
    elif options.command == "generate":
        _generate(options)
    elif options.command == "config":
        _config(options)
    elif options.command == "params":
        _print(EngineConfig.table() + "\n")
    elif options.command == "trace":
        _trace(options)
    elif options.command == "board":
        return _board(options)
    else:
        raise CommandError(
            "a command is needed: replay, compare, report, sweep, trace, generate, config, board, "
            "params or registers (see stmoe --help)"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except (CommandError, ConfigError) as error:
        return _complain(str(error), BAD_INPUT)
    except BrokenPipeError:
        _silence()
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", BAD_INPUT)
    except MemoryError:
        return _complain("out of memory: the trace or the configuration is too large", BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
