# SPDX-License-Identifier: Apache-2.0
"""A board in Verilator, used by ``stmoe board`` through its UART pins, end to end."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from amaranth.back import verilog

from board_sim import CLOCK_HZ, Faults, build_board, running_board
from lint_verilog import lint_text
from simulation import IN_REPO, seeds
from stmoe.board.host_link import BoardError, HostLink
from stmoe.board.replay import SerialPort, judge
from stmoe.board.session import Board, Times
from stmoe.harness.board_protocol import DEFAULT_BAUD, HarnessRegister
from stmoe.harness.board_top import BoardTop
from stmoe_golden.config import ConfigError, EngineConfig, preset
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import config_for, load_trace, save_trace
from test_sim import broken_engine

COMMAND = [sys.executable, "-m", "stmoe.cli", "board"]
TINY = preset("tiny")
QUICK = ("-O1",)
"""g++'s time counts as much as the model's speed."""


def replay(port: str, trace: Path, *arguments: object, timeout: float = 300):
    """``stmoe board replay --json``: (status, report, standard error)."""
    done = subprocess.run(
        [*COMMAND, "replay", "--port", port, "--json", "--timeout", "30", str(trace)]
        + [str(a) for a in arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    report = json.loads(done.stdout) if done.stdout else {}
    return done.returncode, report, done.stderr


def assert_matches(outcome, tokens: int) -> dict:
    """The run agrees with golden in everything; its report."""
    status, report, complaint = outcome
    assert (status, complaint) == (0, ""), complaint
    assert report["match"] is True and report["mismatches"] == 0
    assert report["tokens"] == report["counters"]["tokens"][0] == tokens
    assert report["events"] > 20 * tokens and report["totals"]["violations"] == 0
    assert len(report["counters"]) == 30 and len(report["buses"]) == 6
    for bus in report["buses"].values():
        (seen, said), (signature, expected) = bus["handshakes"], bus["signature"]
        assert seen == said > 0 and signature == expected
    return report


@pytest.fixture(scope="module")
def tiny_board():
    return build_board(TINY, optimise=QUICK)


@pytest.fixture(scope="module")
def tiny_trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "tiny.npz"
    save_trace(markov_trace(num_tokens=120, num_layers=4, num_experts=8, top_k=2, seed=5), path)
    return path


# It agrees with golden ------------------------------------------------------------------------


@pytest.mark.slow
def test_200_tokens_of_the_real_trace_through_the_uart_equal_golden_in_3_minutes():
    program = build_board(config_for(load_trace(IN_REPO)))
    with running_board(program) as board:
        began = time.monotonic()
        report = assert_matches(replay(board.port, IN_REPO, "--tokens", 200), 200)
        assert time.monotonic() - began < 180
    assert report["events"] > 30_000
    assert report["board"].startswith("a configuration that is no preset")
    # 8 bytes of line or less for each event: it is the line that sets the pace.
    assert report["line"]["bytes_received"] < 8 * report["events"]


def test_sessions_follow_each_other_from_reset(tiny_board, tiny_trace):
    with running_board(tiny_board) as board:
        first = assert_matches(replay(board.port, tiny_trace, "--tokens", 30), 30)
        # A host that dies in the middle leaves the engine at work, and half a frame on the line.
        host = subprocess.Popen(
            [*COMMAND, "replay", "--port", board.port, str(tiny_trace)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert host.stdout is not None
        while "events read" not in host.stdout.readline():
            assert host.poll() is None
        host.send_signal(signal.SIGKILL)
        host.wait()
        with open(board.port, "wb", buffering=0) as port:
            port.write(b"~\x00\x17half a frame")
        again = assert_matches(replay(board.port, tiny_trace, "--tokens", 30), 30)
    # What does not depend on when the host reads.
    for name in ("tokens", "sequences", "routes", "grants", "releases", "score_commits"):
        assert again["counters"][name] == first["counters"][name]


def test_settings_reach_the_engine_and_the_harness(tiny_board, tiny_trace):
    with running_board(tiny_board) as board:
        plain = assert_matches(replay(board.port, tiny_trace, "--tokens", 40), 40)
        other = assert_matches(
            replay(
                *(board.port, tiny_trace, "--tokens", 40, "--preset", "tiny", "--seed", 7),
                *("--latency", 100, "--load-ratio", 2, "--threshold", 20.25, "--quota", 1),
            ),
            40,
        )
    assert plain["load_ratio"] == 1.0 and other["load_ratio"] == 2.0
    # Golden was told the same settings; that they matter shows in what is left of prefetching.
    loads = [report["counters"]["prefetch_loads"][0] for report in (plain, other)]
    assert loads[0] > 10 * max(1, loads[1])


@pytest.mark.parametrize("seed", seeds(3))
def test_a_bad_line_costs_retries_and_nothing_else(tiny_board, tiny_trace, seed):
    print(f"seed {seed}")
    faults = Faults(seed, to_board=3000, to_host=1000)
    with running_board(tiny_board, faults=faults) as board:
        report = assert_matches(replay(board.port, tiny_trace, "--tokens", 60), 60)
    assert board.report is not None
    assert board.report["faults_in"] > 5 and board.report["faults_out"] > 5
    line = report["line"]
    assert line["retries"] > 5 and line["spoiled_by_board"] + line["spoiled_by_host"] > 5


def test_info_says_what_the_board_is(tiny_board):
    with running_board(tiny_board) as board:
        for _ in range(2):
            done = subprocess.run(
                [*COMMAND, "info", "--port", board.port, "--json"], capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, "")
            said = json.loads(done.stdout)
            assert said["board"] == "preset tiny" and said["protocol"] == 1
            assert (said["clock_hz"], said["baud"]) == (CLOCK_HZ, DEFAULT_BAUD)
            for name in ("num_layers", "num_experts", "top_k", "num_slots", "axi_data_width"):
                assert said[name] == getattr(TINY, name)
            assert said["slot_bytes"] == TINY.expert_bytes
        text = subprocess.run(
            [*COMMAND, "info", "--port", board.port], capture_output=True, text=True
        ).stdout
    assert "preset tiny" in text and "clock 4 MHz, 1,000,000 baud" in text


# It finds what is wrong -----------------------------------------------------------------------


def engine_with_inverted_learning(config: EngineConfig):
    return broken_engine(
        config, "learner", "self.i[e] + self.delta[e]", "self.i[e] - self.delta[e]"
    )


def engine_with_a_lying_event_port(config: EngineConfig):
    """Its records agree with each other and with golden, but not with what the buses had."""
    return broken_engine(
        config,
        "event_port",
        "m.d.sync += incoming.cycle.eq(self.cycle)",
        "m.d.sync += incoming.cycle.eq(self.cycle + 1)",
    )


def test_an_engine_that_learns_the_wrong_way_is_found(tiny_trace):
    program = build_board(TINY, engine_factory=engine_with_inverted_learning, optimise=QUICK)
    with running_board(program) as board:
        status, report, complaint = replay(board.port, tiny_trace, "--tokens", 25)
    assert status == 1 and report["match"] is False and report["mismatches"] > 0
    assert complaint.startswith("MISMATCH at cycle") and "golden" in complaint
    assert report["failure"] == complaint.rstrip("\n")


def test_events_that_are_not_what_the_buses_had_are_found(tiny_trace):
    program = build_board(TINY, engine_factory=engine_with_a_lying_event_port, optimise=QUICK)
    with running_board(program) as board:
        status, report, complaint = replay(board.port, tiny_trace, "--tokens", 20)
    assert status == 1 and report["match"] is False
    # Golden finds nothing in the events themselves; the signature of every bus differs.
    assert "MISMATCH" not in complaint
    lines = complaint.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"bus {name}" for name in report["buses"]]


class WithoutMemory(Board):
    """A board whose memory never sends anything."""

    def write(self, *writes):
        dead = HarnessRegister.MEMORY_BEATS_NUMERATOR
        super().write(*((n, a, 0 if a == dead.address else v) for n, a, v in writes))


def test_an_engine_that_stands_still_is_found(tiny_board, tiny_trace):
    trace = load_trace(tiny_trace).head(5)
    with running_board(tiny_board) as sim:
        port = SerialPort(sim.port, DEFAULT_BAUD)
        board = WithoutMemory(HostLink(port, sim.port, timeout=6), TINY)
        board.open()
        settings = board.program()
        run = board.replay(trace, Times(attention=64, expert=32, latency=8), settings=settings)
        port.close()
    assert run.error is not None and "made no progress" in run.error
    assert "after 0 of 5 tokens" in run.error
    report: dict = {"mismatches": 0, "events": 0, "counters": {}, "buses": {}}
    failure = judge(run, TINY, trace, report)
    assert failure is not None and failure.startswith(run.error)
    # What was recorded has been read and judged too: loads that never ended.
    assert report["events"] > 5 and "MISMATCH at cycle" in failure


# Bad input is one line and status 2 -------------------------------------------------------------


def refused(*arguments: object) -> str:
    """What a command that must be refused says."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("stmoe: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("stmoe: ").rstrip("\n")


def test_another_board_is_refused(tiny_board, tiny_trace, tmp_path):
    with running_board(tiny_board) as board:
        gpt = tmp_path / "gpt.npz"
        config = preset("gpt_oss_20b")
        shape = {n: getattr(config, n) for n in ("num_layers", "num_experts", "top_k")}
        save_trace(markov_trace(num_tokens=5, **shape), gpt)
        use = ("replay", "--port", board.port)
        said = refused(*use, gpt, "--preset", "gpt_oss_20b")
        assert said == (
            f"{board.port}: the board was built for preset tiny, not for preset gpt_oss_20b"
        )
        said = refused(*use, gpt)
        assert said == (f"{gpt}: num_layers is 24 in the trace, but 4 in the board, preset tiny")
        said = refused(*use, tiny_trace, "--preset", "tiny", "--set", "quota=3")
        assert said.endswith("was built for preset tiny, not for preset tiny with --set quota=3")
        said = refused(*use, tiny_trace, "--quota", "8")
        assert "the engine refuses the settings: a quota may be 0 to 2, not 8" in said


def test_a_port_at_the_wrong_speed_is_named(tiny_board, tiny_trace):
    with running_board(tiny_board) as board:
        for baud in (2_000_000, 115_200):
            said = refused(
                *("replay", "--port", board.port, tiny_trace, "--baud", baud, "--timeout", 1)
            )
            assert said.startswith(f"{board.port}: ") and "--baud" in said
        # And then it still works.
        assert_matches(replay(board.port, tiny_trace, "--tokens", 10), 10)


@pytest.fixture
def terminal():
    """A pseudo-terminal; both of its ends."""
    master, slave = pty.openpty()
    yield master, os.ttyname(slave)
    os.close(master)
    os.close(slave)


def test_a_silent_port_is_named(terminal, tiny_trace):
    said = refused("replay", "--port", terminal[1], tiny_trace, "--timeout", 1)
    assert said.startswith(f"{terminal[1]}: nothing answers within 1 s")
    said = refused("info", "--port", terminal[1], "--timeout", 1)
    assert said.startswith(f"{terminal[1]}: nothing answers within 1 s")


def test_a_port_that_chatters_is_named(terminal, tiny_trace):
    over = threading.Event()

    def chatter():
        while not over.wait(0.02):
            os.write(terminal[0], b"U-Boot 2026.01 ~ press any key\r\n")

    thread = threading.Thread(target=chatter)
    thread.start()
    try:
        said = refused("replay", "--port", terminal[1], tiny_trace, "--timeout", 1)
    finally:
        over.set()
        thread.join()
    assert said.startswith(f"{terminal[1]}: something answers, but not in frames")


def test_a_board_that_falls_silent_is_named(tiny_board, tiny_trace):
    with running_board(tiny_board) as sim:
        port = SerialPort(sim.port, DEFAULT_BAUD)
        board = Board(HostLink(port, sim.port, timeout=1.5), TINY)
        board.open()
        sim.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(BoardError, match=f"{sim.port}: the board has been silent for 1.5"):
                board.program()
        finally:
            sim.process.send_signal(signal.SIGCONT)
        port.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "/dev/no_such_tty"], "/dev/no_such_tty: No such file or directory"),
        (["--port", "/dev/null"], "/dev/null: is no serial port"),
        (["--port", "/dev/null", "--preset", "gpt5"], "unknown preset 'gpt5'; presets are tiny,"),
        (["--port", "/dev/null", "--preset", "gpt_oss_20b"], "num_layers is 4 in the trace, but"),
        (["--port", "/dev/null", "--tokens", "121"], "tokens must be 1 to 120, not 121"),
        (["--port", "/dev/null", "--baud", "7"], "argument --baud: must be 300 to 12000000, not"),
        (["--port", "/dev/null", "--load-ratio", "x"], "must be 0.01 to 100, not 'x'"),
        (["--port", "/dev/null", "--threshold", "0.1"], "in steps of 0.25, not '0.1'"),
        (["--port", "/dev/null", "--quota", "-1"], "argument --quota: must be 0 to 256, not '-1'"),
        (["--port", "/dev/null", "--seed", "-1"], "argument --seed: must be 0 to 4294967295"),
        (["--port", "/dev/null", "--latency", "0"], "argument --latency: must be 1 to 16777215"),
        (["--port", "/dev/null", "--timeout", "0"], "must be 0.1 to 3600 seconds, not '0'"),
        (["--port", "/dev/null", "--config", "none.toml"], "none.toml: No such file"),
        ([], "the following arguments are required: --port"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said, tiny_trace):
    assert said in refused("replay", tiny_trace, *arguments)


def test_a_missing_trace_and_a_missing_command_are_named():
    assert "no/such.npz" in refused("replay", "--port", "/dev/null", "no/such.npz")
    assert "a command is needed: replay or info" in refused()


def test_missing_pyserial_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "serial", None)
    with pytest.raises(
        BoardError, match=r"pyserial is not installed: .*pip install 'stmoe\[board\]'"
    ):
        SerialPort("/dev/null", DEFAULT_BAUD)


def test_verilog_of_the_board_is_clean():
    top = BoardTop(TINY, clock_hz=50_000_000, baud=3_000_000)
    assert lint_text(verilog.convert(top, name="board_top", emit_src=False), "board_top") == ""


def test_a_board_needs_the_event_port_and_banks():
    with pytest.raises(ConfigError, match="buffer must be banks for a board, not axi"):
        BoardTop(TINY.replace(buffer="axi"), clock_hz=CLOCK_HZ, baud=DEFAULT_BAUD)
    with pytest.raises(ConfigError, match="event_port must be true for a board, not false"):
        BoardTop(TINY.replace(event_port=False), clock_hz=CLOCK_HZ, baud=DEFAULT_BAUD)
    with pytest.raises(TypeError, match="config must be an EngineConfig, not 'tiny'"):
        BoardTop("tiny", clock_hz=CLOCK_HZ, baud=DEFAULT_BAUD)
