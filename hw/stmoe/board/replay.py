# SPDX-License-Identifier: Apache-2.0
"""``stmoe board``: replays a trace on a board and holds it to the golden model."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from stmoe.board.host_link import BoardError, HostLink
from stmoe.board.session import Board, Run, Times, expected_sums
from stmoe.harness.board_protocol import Flag, HarnessRegister, Status, config_hash
from stmoe.harness.run_log import check_run, times_of
from stmoe.register_map import registers
from stmoe_golden.checker import Mismatch
from stmoe_golden.config import FRACTION_BITS, PRESETS, EngineConfig, preset
from stmoe_golden.traces import Trace, TraceError, check_shape, config_for, load_trace

__all__ = ["info", "replay"]

MATCH, MISMATCH = 0, 1


class SerialPort:
    """A serial port whose every failure is a :class:`BoardError`."""

    def __init__(self, name: str, baud: int) -> None:
        try:
            import serial
        except ImportError:
            raise BoardError(
                "pyserial is not installed: a board needs it (pip install 'stmoe[board]')"
            ) from None
        self.name = name
        self._errors = (serial.SerialException, OSError)
        try:
            self._serial = serial.Serial(name, baud, timeout=0.01, exclusive=True)
        except (serial.SerialException, OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            if number is not None:
                why = os.strerror(number)
            elif isinstance(error, ValueError):
                why = f"{baud} baud cannot be had: {error}"
            else:
                why = "is no serial port"
            raise BoardError(f"{name}: {why}") from None
        # USB adapters otherwise hold what they receive back for 16 ms.
        with contextlib.suppress(*self._errors, AttributeError, NotImplementedError, ValueError):
            self._serial.set_low_latency_mode(True)
        with contextlib.suppress(*self._errors):
            self._serial.reset_input_buffer()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise BoardError(f"{self.name}: the port has failed: {error}") from None

    @property
    def timeout(self) -> float | None:
        """Seconds that a read may take."""
        timeout: float | None = self._serial.timeout
        return timeout

    @timeout.setter
    def timeout(self, value: float | None) -> None:
        self._serial.timeout = value

    @property
    def in_waiting(self) -> int:
        """Bytes that can be read at once."""
        with self._guarded():
            return int(self._serial.in_waiting)

    def read(self, size: int = 1, /) -> bytes:
        """At most ``size`` bytes."""
        with self._guarded():
            return bytes(self._serial.read(size))

    def write(self, data: bytes, /) -> int | None:
        """Send."""
        with self._guarded():
            sent: int | None = self._serial.write(data)
            return sent

    def close(self) -> None:
        """Give the port back."""
        with contextlib.suppress(*self._errors):
            self._serial.close()


@contextlib.contextmanager
def connected(options: argparse.Namespace) -> Iterator[HostLink]:
    """A link over the port that the options name."""
    port = SerialPort(options.port, options.baud)
    try:
        yield HostLink(port, options.port, timeout=options.timeout)
    finally:
        port.close()


# Which board it is --------------------------------------------------------------------------


def name_of(digest: int) -> str:
    """What a board of that configuration is called."""
    for name, config in PRESETS.items():
        if config_hash(config) == digest:
            return f"preset {name}"
    return f"a configuration that is no preset ({digest:#010x})"


def wanted_config(options: argparse.Namespace, trace: Trace) -> EngineConfig | None:
    """The configuration that the options name; None when they name none."""
    if options.config is not None:
        config = EngineConfig.load(options.config).with_settings(options.settings)
        check_shape(trace, config, options.config)
        return config
    if options.preset is not None or options.settings:
        return config_for(trace, options.preset, options.settings)
    return None


def config_of(options: argparse.Namespace, trace: Trace, status: Status) -> EngineConfig:
    """The board's configuration; :class:`BoardError` when it cannot be, or is not as asked."""
    wanted = wanted_config(options, trace)
    if wanted is not None:
        if config_hash(wanted) != status.config:
            called = f"preset {options.preset}" if options.preset else options.config or "the trace"
            given = " ".join(f"--set {setting}" for setting in options.settings)
            raise BoardError(
                f"{options.port}: the board was built for {name_of(status.config)}, not for "
                f"{called}{f' with {given}' if given else ''}"
            )
        return wanted
    # Without a name: what the trace's shape gives, as in `make sim`, or a preset.
    for config in (config_for(trace), *PRESETS.values()):
        if config_hash(config) == status.config:
            check_shape(trace, config, f"the board, {name_of(status.config)}")
            return config
    raise BoardError(
        f"{options.port}: the board was built for {name_of(status.config)}: --preset, --config or "
        "--set must say which"
    )


# Commands -----------------------------------------------------------------------------------


class Progress:
    """A line about every second."""

    def __init__(self, total: int, show: Callable[[str], None]) -> None:
        self.total = total
        self.show = show
        self.last = time.monotonic()

    def __call__(self, tokens: int, records: int) -> None:
        now = time.monotonic()
        if now - self.last >= 1:
            self.last = now
            self.show(f"{tokens:,} of {self.total:,} tokens, {records:,} events read")


def judge(run: Run, config: EngineConfig, trace: Trace, report: dict[str, Any]) -> str | None:
    """Hold a run to the golden model; what is wrong with it, or None."""
    log = run.log
    failure = run.error
    report["events"] = len(log.events)
    try:
        report["events"], report["counters"] = check_run(log, config)
    except Mismatch as error:
        # Also when the run got stuck: where the two part is where to look.
        report["mismatches"] += 1
        return f"{failure}\n{error}" if failure else str(error)
    except KeyError:
        return failure or "the run has left no counters"
    if failure is not None:
        return failure
    said = []
    for name, (board, golden) in report["counters"].items():
        if board != golden:
            said.append(f"counter {name}: board {board}, golden {golden}")
    sums = expected_sums(log)
    for name, expected in sums.items():
        seen = run.buses[name]
        report["buses"][name] = {
            "handshakes": [seen.handshakes, expected.handshakes],
            "signature": [f"{seen.signature:016x}", f"{expected.signature:016x}"],
        }
        if seen != expected:
            said.append(f"bus {name}: the board's monitor saw {seen}; by the events, {expected}")
    violations = log.totals["violations"]
    if violations:
        said.append(
            f"the board's checks saw {violations} violations: {', '.join(run.faults) or 'unknown'}"
        )
    if len(log.tokens) != trace.num_tokens:
        said.append(f"{len(log.tokens)} of {trace.num_tokens} tokens were taken")
    if not report["events"]:
        said.append("there are no events")
    report["mismatches"] += len(said)
    return "\n".join(said) or None


def replay(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Replay a trace; ``write`` takes what is for standard output. Returns the exit status."""

    def show(text: str) -> None:
        if not options.json:
            write(f"board: {text}\n")

    if options.preset is not None:
        preset(options.preset)  # a wrong name is said before a long file is read
    trace = load_trace(options.trace)
    wanted_config(options, trace)  # so is a trace that does not fit
    if options.tokens is not None:
        if options.tokens > trace.num_tokens:
            raise TraceError(
                f"{trace.name}: tokens must be 1 to {trace.num_tokens}, not {options.tokens}"
            )
        trace = trace.head(options.tokens)
    with connected(options) as link:
        config = config_of(options, trace, link.identify())
        attention, expert = times_of(config, options.load_ratio)
        times = Times(attention, expert, options.latency, (1, 1), options.seed)
        load = config.top_k * config.slot_beats
        load_ratio = load / (attention + config.top_k * expert)
        began = time.monotonic()
        board = Board(link, config)
        board.open()
        threshold = None
        if options.threshold is not None:
            threshold = round(options.threshold * (1 << FRACTION_BITS))
        settings = board.program(threshold=threshold, quota=options.quota)
        show(f"{trace.num_tokens:,} tokens of {trace.name} on {options.port}")
        show(
            f"{config.num_layers} layers x {config.num_experts} experts, top-{config.top_k}, "
            f"{config.num_slots} slots; load ratio r = {load_ratio:.2f}"
        )
        run = board.replay(
            trace, times, settings=settings, progress=Progress(trace.num_tokens, show)
        )
        wall = time.monotonic() - began
        report: dict[str, Any] = {
            "match": False,
            "trace": str(options.trace),
            "port": options.port,
            "board": name_of(config_hash(config)),
            "tokens": trace.num_tokens,
            "events": 0,
            "mismatches": 0,
            "cycles": run.log.cycles,
            "wall_s": round(wall, 3),
            "load_ratio": load_ratio,
            "seed": options.seed,
            "line": {
                "bytes_received": link.bytes_received,
                "bytes_sent": link.bytes_sent,
                "spoiled_by_board": link.spoiled,
                "spoiled_by_host": link.status.bad if link.status else 0,
                "retries": link.retries,
            },
            "totals": run.log.totals,
            "counters": {},
            "buses": {},
        }
    show(f"checking {len(run.log.events):,} events against the golden model ...")
    failure = judge(run, config, trace, report)
    report["match"] = failure is None
    if failure is not None:
        report["failure"] = failure
    if options.json:
        write(json.dumps(report) + "\n")
    if failure is not None:
        print(failure, file=sys.stderr)
        return MISMATCH
    summary(report, show)
    return MATCH


def summary(report: dict[str, Any], show: Callable[[str], None]) -> None:
    """What a newcomer wants to see."""
    count = {name: pair[0] for name, pair in report["counters"].items()}
    needed = count["hits"] + count["lates"] + count["misses"]
    line, seconds, cycles = report["line"], max(report["wall_s"], 1e-9), report["totals"]["cycle"]
    show(
        f"{report['tokens']:,} tokens and {report['events']:,} events in {seconds:.1f} s "
        f"({report['tokens'] / seconds:,.0f} tokens/s, {line['bytes_received'] / seconds:,.0f} "
        f"bytes/s); line: {line['spoiled_by_board'] + line['spoiled_by_host']} frames spoiled, "
        f"{line['retries']} retries"
    )
    show(
        f"of {needed:,} experts needed {count['hits'] / needed:.1%} were resident "
        f"({count['useful']:,} of them prefetched), {count['lates'] / needed:.1%} on their way, "
        f"{count['misses'] / needed:.1%} missing"
    )
    show(
        f"{cycles:,} cycles, of which the accelerator waited "
        f"{report['totals']['wait_cycles'] / cycles:.1%}; {report['totals']['r_beats']:,} beats, "
        "each checked on the board"
    )
    buses = report["buses"]
    handshakes = sum(bus["handshakes"][0] for bus in buses.values())
    show(
        f"MATCH: {report['events']:,} events, {len(count)} counters and the signatures of "
        f"{handshakes:,} handshakes on {len(buses)} buses equal the golden model's"
    )


def info(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Say what a board is. Begins a session, so whatever it did is over."""
    names = ("IDENTITY", "VERSION", *(f"CAPABILITY{i}" for i in range(6)))
    # These registers are the same in every engine.
    table = {register.name: register for register in registers(EngineConfig())}
    with connected(options) as link:
        before = link.identify()
        link.open()
        board = Board(link, EngineConfig())
        words = dict(zip(names, board.read(*((n, table[n].at()) for n in names)), strict=True))
        clock, baud = board.read(
            *((r.name, r.address) for r in (HarnessRegister.CLOCK_HZ, HarnessRegister.BAUD))
        )

    def part(register: str, field: str) -> int:
        f = table[register].field(field)
        return (words[register] & f.mask) >> f.lsb

    shape = {
        name: part(register, name)
        for register, fields in (
            ("CAPABILITY0", ("num_layers", "num_experts")),
            ("CAPABILITY1", ("top_k", "spatial_depth")),
            ("CAPABILITY2", ("num_slots", "weight_bits")),
            ("CAPABILITY3", ("axi_data_width",)),
            ("CAPABILITY5", ("slot_bytes",)),
        )
        for name in fields
    }
    found = {flag.name.lower(): bool(before.flags & flag) for flag in Flag if flag.name}
    result = {
        "board": name_of(before.config),
        "config_hash": f"{before.config:#010x}",
        "protocol": before.version,
        "registers": ".".join(str(part("VERSION", n)) for n in ("major", "minor", "patch")),
        "clock_hz": clock,
        "baud": baud,
        **shape,
        "found": found,
    }
    if options.json:
        write(json.dumps(result) + "\n")
        return MATCH
    was = [name for name, value in found.items() if value] or ["at rest"]
    write(
        f"{options.port}: {result['board']}\n"
        f"  {shape['num_layers']} layers x {shape['num_experts']} experts, "
        f"top-{shape['top_k']}, {shape['num_slots']} slots of {shape['slot_bytes']} bytes, "
        f"D = {shape['spatial_depth']}, AXI {shape['axi_data_width']} bits\n"
        f"  registers {result['registers']}, protocol {result['protocol']}, clock "
        f"{clock / 1e6:g} MHz, {baud:,} baud\n"
        f"  it was: {', '.join(was)}\n"
    )
    return MATCH
