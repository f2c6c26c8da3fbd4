# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and the one line with which it refuses bad input."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest

from command import ended, refused
from stmoe_golden.config import PRESETS, EngineConfig, preset
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import save_trace
from trace_faults import FAULTS

COMMAND = [sys.executable, "-m", "stmoe.cli"]


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(markov_trace(num_tokens=300), path)
    return path


@pytest.fixture
def call(capsys):
    """The command in this process: (status, standard output, standard error)."""

    return functools.partial(ended, capsys)


# Replay -------------------------------------------------------------------------------------


def test_replay_prints_the_metrics_as_json(trace):
    done = run("replay", trace, "--json", "--issue-rate", "1.5", "--set", "margin_low=64")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert {
        "tokens", "tokens_per_s", "recall", "coverage", "issue_rate", "precision", "per_layer"
    } <= set(result)  # fmt: skip
    assert list(result["recall"]) == ["1K", "1.5K", "2K", "3K"]
    assert set(result["per_layer"]) == {"recall", "coverage", "issue_rate", "precision"}
    assert len(result["per_layer"]["coverage"]) == 4
    assert (result["tokens"], result["predictor"], result["trace"]) == (300, "learned", str(trace))


def test_replay_prints_a_table(trace, call):
    status, out, err = call("replay", trace, "--preset", "tiny", "--predictor", "paper")
    assert (status, err) == (0, "")
    assert "300 tokens of 4 sequences, the last 150 measured" in out
    assert "predictor paper, threshold 2" in out
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["layer", "all", *"0123"]
    assert "best static threshold in hindsight" in call("replay", trace, "--issue-rate", "1")[1]


def test_options_change_what_is_replayed(trace, call):
    def result(*options):
        status, out, _ = call("replay", trace, "--json", *options)
        assert status == 0
        return json.loads(out)

    assert result("--tokens", "100")["tokens"] == 100
    assert result("--tokens", "1000")["tokens"] == 300
    assert result("--threshold", "-7.25")["threshold"] == -7.25
    assert result("--set", "threshold=-8")["threshold"] == -8
    assert result("--preset", "tiny")["preset"] == "tiny"
    assert result()["preset"] is None
    shallow = result("--set", "spatial_depth=0", "--set", "threshold=-8")
    assert shallow["recall"] != result()["recall"] and shallow["threshold"] == -8
    few, many = (result("--predictor", "paper", "--paper-candidates", m) for m in (1, 8))
    assert few["coverage"] != many["coverage"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_replay_refuses_a_file_that_is_no_trace(fault, tmp_path):
    path = tmp_path / "bad.npz"
    fault.make(path)
    done = run("replay", path, "--json")
    message = refused((done.returncode, done.stdout, done.stderr))
    assert message.startswith(f"{path}: ")
    assert fault.message.fullmatch(message.removeprefix(f"{path}: "))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "gpt"], f"unknown preset 'gpt'; presets are {', '.join(PRESETS)}"),
        (
            ["--preset", "mixtral_8x7b"],
            "{trace}: num_layers is 4 in the trace, but 32 in preset mixtral_8x7b",
        ),
        (["--set", "top_k=3"], "{trace}: top_k is 2 in the trace, but 3 in the settings"),
        (["--set", "weight_bits=99"], "weight_bits must be 4 to 12, not 99"),
        (["--set", "weight_bits"], "setting 'weight_bits' must have the form field=value"),
        (["--set"], "argument --set: expected one argument"),
        (["--tokens", "0"], "argument --tokens: must be an integer, 1 or more, not '0'"),
        (["--tokens", "many"], "argument --tokens: must be an integer, 1 or more, not 'many'"),
        (["--threshold", "inf"], "argument --threshold: must be a number, not 'inf'"),
        (["--threshold", "high"], "argument --threshold: must be a number, not 'high'"),
        (["--threshold", "9000"], "threshold must be -8192 to 8191, not 9000"),
        (["--threshold", "0.1"], "threshold must be a multiple of 0.25, not 0.1"),
        (
            ["--issue-rate", "-1"],
            "issue_rate must be above 0 and at most 4 (num_experts / top_k), not -1",
        ),
        (
            ["--issue-rate", "1", "--threshold", "1"],
            "argument --threshold: not allowed with argument --issue-rate",
        ),
        (
            ["--paper-candidates", "4"],
            "argument --paper-candidates: only with --predictor paper",
        ),
        (["--jso"], "unrecognized arguments: --jso"),
    ],
)
def test_replay_refuses_options_that_are_not_allowed(options, message, trace, call):
    assert refused(call("replay", trace, *options)) == message.format(trace=trace)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "a command is needed: replay, compare, report, sweep, trace, generate, config, board, "
            "params or registers (see stmoe --help)",
        ),
        (
            ["trace"],
            "a command is needed: info, convert, slice, resample, validate or capture "
            "(see stmoe trace --help)",
        ),
        (["replay"], "the following arguments are required: TRACE"),
        (["replay", "/no/such"], "/no/such: No such file or directory"),
        (["replay", "/dev"], "/dev: is a directory; a trace is an .npz file"),
        (["replay", "/dev/zero"], "/dev/zero: is not a regular file; a trace is an .npz file"),
        (["params", "x"], "unrecognized arguments: x"),
        (["config"], "the following arguments are required: --preset"),
        (["generate", "--preset", "tiny"], "the following arguments are required: -o"),
        (["generate", "-o", "x.v"], "one of the arguments --preset --config is required"),
        (
            ["generate", "--preset", "tiny", "--config", "x", "-o", "x.v"],
            "argument --config: not allowed with argument --preset",
        ),
        (["generate", "--config", "/no/such", "-o", "x.v"], "/no/such: No such file or directory"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_usage_errors_are_one_line_too(arguments, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(call(*arguments)) == message
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_named_with_those_there_are(call):
    message = refused(call("reply"))
    assert "reply" in message
    for name in ("replay", "generate", "config", "params", "registers"):
        assert name in message


def test_a_name_with_a_line_break_stays_on_one_line(call):
    assert refused(call("replay", "/no\nsuch")) == "/no such: No such file or directory"


# Other commands -----------------------------------------------------------------------------


def test_version_and_help(call):
    status, out, _ = call("--version")
    assert status == 0 and out.startswith("stmoe ") and out[6].isdigit()
    status, out, _ = call("replay", "--help")
    assert status == 0 and "--issue-rate" in out


def test_params_prints_the_table(call):
    assert call("params") == (0, EngineConfig.table() + "\n", "")


@pytest.mark.parametrize("name", PRESETS)
def test_config_prints_and_saves_what_loads_equal(name, call, tmp_path):
    path = tmp_path / "c.toml"
    assert call("config", "--preset", name, "-o", path) == (0, "", "")
    assert EngineConfig.load(path) == preset(name)
    status, out, err = call("config", "--preset", name)
    assert (status, out, err) == (0, path.read_text(), "")
    assert list(tmp_path.iterdir()) == [path]


def test_registers_hands_over_to_the_register_map(call, monkeypatch):
    def main(arguments):
        if "--bad" in arguments:
            sys.stderr.write("usage: x\nx: error: no such thing\n")
            raise SystemExit(2)
        print(*arguments)

    module = types.ModuleType("stmoe.register_map")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stmoe.register_map", module)
    monkeypatch.setattr("stmoe.register_map", module, raising=False)
    assert call("registers", "--markdown", "-x") == (0, "--markdown -x\n", "")
    assert refused(call("registers", "--bad")) == "no such thing"


@pytest.fixture
def top(monkeypatch):
    """A stand-in for the generator, which has its own tests; it returns what `text` says."""
    module = types.ModuleType("stmoe.top")
    module.text = lambda config: f"module stmoe; // {config.threshold}\n"  # type: ignore[attr-defined]
    module.generate = lambda config, **_: module.text(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stmoe.top", module)
    return module


def test_generate_writes_the_verilog_of_a_preset_or_a_file(top, call, tmp_path):
    out, config = tmp_path / "x.v", tmp_path / "c.toml"
    assert call("generate", "--preset", "tiny", "--set", "threshold=-9", "-o", out) == (0, "", "")
    assert out.read_text() == "module stmoe; // -9\n"
    preset("tiny").replace(threshold=5).save(config)
    assert call("generate", "--config", config, "-o", out) == (0, "", "")
    assert out.read_text() == "module stmoe; // 5\n"
    assert sorted(tmp_path.iterdir()) == [config, out]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("lanes must be 1"), 2, "lanes must be 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            MemoryError(),
            2,
            "out of memory: the trace or the configuration is too large",
        ),
    ],
)
def test_a_generation_that_fails_leaves_the_old_file(top, call, tmp_path, error, status, message):
    def fail(config):
        raise error

    top.text = fail
    out = tmp_path / "x.v"
    out.write_text("old")
    assert call("generate", "--preset", "tiny", "-o", out) == (status, "", f"stmoe: {message}\n")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_an_output_that_cannot_be_written_is_named_before_any_work(top, call, tmp_path):
    top.text = None  # calling it would be a TypeError
    for out, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "x.v", "No such file or directory"),
    ):
        assert refused(call("generate", "--preset", "tiny", "-o", out)) == f"{out}: {reason}"
    assert refused(call("config", "--preset", "tiny", "-o", tmp_path)) == (
        f"{tmp_path}: Is a directory"
    )
    assert list(tmp_path.iterdir()) == []


# The process --------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "params"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "stmoe: standard output: No space left on device\n",
    )
    done = run("config", "--preset", "tiny", "-o", "/dev/full")
    assert (done.returncode, done.stderr) == (2, "stmoe: No space left on device\n")


def test_a_reader_that_goes_away_is_no_error_message():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "params"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_output_is_one_line():
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "params"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "stmoe: standard output is closed\n")


def test_ctrl_c_ends_a_replay_with_one_line(tmp_path):
    path = tmp_path / "long.npz"
    trace = markov_trace(num_tokens=2000, num_layers=8, num_experts=64, top_k=8)
    save_trace(
        replace(
            trace,
            experts=np.tile(trace.experts, (240, 1, 1)),
            sequence=np.zeros(480000, np.int32),
        ),
        path,
    )
    process = subprocess.Popen(
        [*COMMAND, "replay", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(4.0)
    assert process.poll() is None, "the replay was over before it could be interrupted"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "stmoe: interrupted\n")
