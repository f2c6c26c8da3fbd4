# SPDX-License-Identifier: Apache-2.0
"""Sweeps: every combination once, nothing lost when one is stopped, true Pareto fronts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command import ended, refused
from stmoe import cli
from stmoe_golden import sweep as sweep_module
from stmoe_golden.compare import compare
from stmoe_golden.replay import replay_trace
from stmoe_golden.reporting.report import make_report
from stmoe_golden.sweep import SweepError, load_sweep, run_piece, run_sweep, stored
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import config_for, load_trace, save_trace

BASIC = """
traces = "a.npz"
policies = ["ours", "lru"]
load_ratio = [1, 2]
[config]
quota = [1, 2]
spatial_depth = [1, 3]
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a trace."""
    save_trace(markov_trace(num_tokens=80), tmp_path / "a.npz")
    return tmp_path


def written(folder: Path, text: str = BASIC) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Points --------------------------------------------------------------------------------------


def test_switches_can_be_varied(folder):
    sweep = load_sweep(
        written(folder, 'traces = "a.npz"\n[config]\nadaptive = [true, false]\nevent_port = false')
    )
    assert [point.config.adaptive for point in sweep.points] == [True, False]
    assert not any(point.config.event_port for point in sweep.points)


def test_every_combination_is_a_point_and_gives_what_compare_and_replay_give(folder):
    sweep = load_sweep(written(folder))
    assert sweep.varied == ["load_ratio", "quota", "spatial_depth"]
    assert len(sweep.points) == 8
    # The predictor sees neither quota nor link: two of its kind serve all eight points.
    assert sorted(p.kind for p in sweep.pieces) == ["prediction"] * 2 + ["timing"] * 8
    result = run_sweep(sweep, folder / "r.jsonl")
    assert not result["errors"]
    trace = load_trace(folder / "a.npz")
    seen = set()
    for point in result["points"]:
        config = config_for(trace).replace(**point["config"])
        seen.add((point["load_ratio"], *point["config"].values()))
        want = compare(trace, config, load_ratio=point["load_ratio"], policies=("ours", "lru"))
        assert point["rows"] == want.as_dict()["rows"]
        predicted = replay_trace(trace, config, issue_rate=1.5)
        assert point["prediction"]["coverage"] == predicted.coverage
        assert (point["slots"], point["table_bits"]) == (config.num_slots, config.table_bits)
    assert len(seen) == 8


def test_two_tiers_are_a_link_as_any_other(folder):
    systems = ["lpddr5", "lpddr5+nvme:4", "lpddr5+nvme:16"]
    text = BASIC.replace("load_ratio = [1, 2]", f"system = {systems}")
    assert text != BASIC
    result = run_sweep(load_sweep(written(folder, text)), folder / "r.jsonl")
    assert not result["errors"] and {p["system"] for p in result["points"]} == set(systems)
    reads = {p["system"]: p["rows"][0]["far_loads"] for p in result["points"]}
    assert 0 == reads["lpddr5"] < reads["lpddr5+nvme:16"] < reads["lpddr5+nvme:4"]
    assert {front["link"] for front in result["fronts"]["slots"]} == set(systems)


def test_cases_set_fields_together(folder):
    text = (
        'traces = "a.npz"\n[[case]]\nweight_bits = 6\nmargin_low = 96\n[[case]]\nweight_bits = 8\n'
    )
    points = load_sweep(written(folder, text)).points
    assert [p.changes for p in points] == [{"weight_bits": 6, "margin_low": 96}, {"weight_bits": 8}]


def test_fronts_are_what_no_other_point_beats(folder):
    result = run_sweep(load_sweep(written(folder)), folder / "r.jsonl")
    points, fronts = result["points"], result["fronts"]
    for link in (1.0, 2.0):
        pairs = [(p["slots"], row["time"]) for p in points if p["load_ratio"] == link
                 for row in p["rows"]]  # fmt: skip
        front = {(f["slots"], f["time"]) for f in fronts["slots"] if f["link"] == link}
        best = {p for p in pairs
                if not any(a <= p[0] and b <= p[1] and (a, b) != p for a, b in pairs)}  # fmt: skip
        assert front == best
    pairs = [(p["table_bits"], p["prediction"]["coverage"]) for p in points]
    best = {p for p in pairs if not any(a <= p[0] and b >= p[1] and (a, b) != p for a, b in pairs)}
    assert {(f["table_bits"], f["coverage"]) for f in fronts["table_bits"]} == best


# Resuming ------------------------------------------------------------------------------------


def test_a_sweep_that_is_run_again_computes_nothing_and_says_the_same(folder, monkeypatch):
    sweep, output = load_sweep(written(folder)), folder / "r.jsonl"
    first = run_sweep(sweep, output)
    before = output.read_bytes()
    monkeypatch.setattr(sweep_module, "run_piece", lambda piece: pytest.fail("computed again"))
    assert run_sweep(load_sweep(sweep.path), output) == first
    assert output.read_bytes() == before


def test_a_stopped_sweep_loses_at_most_the_piece_it_was_on(folder, monkeypatch):
    sweep, output = load_sweep(written(folder)), folder / "r.jsonl"
    done: list[str] = []

    def stopping(piece):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(piece.key)
        return run_piece(piece)

    monkeypatch.setattr(sweep_module, "run_piece", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, output)
    assert list(stored(output)) == done and len(done) == 4
    again: list[str] = []
    monkeypatch.setattr(
        sweep_module, "run_piece", lambda piece: again.append(piece.key) or run_piece(piece)
    )
    assert not run_sweep(sweep, output)["errors"]
    assert sorted(done + again) == sorted(p.key for p in sweep.pieces)


def test_a_line_that_was_cut_is_computed_again_and_written_over(folder):
    sweep, output = load_sweep(written(folder)), folder / "r.jsonl"
    first = run_sweep(sweep, output)
    whole = output.read_bytes()
    output.write_bytes(whole[:-25])
    assert len(stored(output)) == len(sweep.pieces) - 1
    assert run_sweep(sweep, output) == first
    assert len(lines(output)) == 1 + len(sweep.pieces)


def test_other_code_or_another_trace_computes_anew(folder, monkeypatch):
    keys = {p.key for p in load_sweep(written(folder)).pieces}
    save_trace(markov_trace(num_tokens=80, seed=2), folder / "a.npz")
    assert not keys & {p.key for p in load_sweep(written(folder)).pieces}
    save_trace(markov_trace(num_tokens=80), folder / "a.npz")
    assert keys == {p.key for p in load_sweep(written(folder)).pieces}
    monkeypatch.setattr(sweep_module, "code_version", lambda: "other")
    assert not keys & {p.key for p in load_sweep(written(folder)).pieces}


def test_one_bad_point_does_not_lose_the_others_and_is_tried_again(folder, monkeypatch):
    sweep, output = load_sweep(written(folder)), folder / "r.jsonl"
    bad = next(p.key for p in sweep.pieces if p.kind == "timing")

    def run(trace, config, settings):
        if config.quota == 1 and config.spatial_depth == 1 and settings["load_ratio"] == 1:
            raise RuntimeError("a broken\npoint")
        return timing(trace, config, settings)

    timing = sweep_module._run_timing
    monkeypatch.setattr(sweep_module, "_run_timing", run)
    result = run_sweep(sweep, output)
    assert len(result["points"]) == 7
    (error,) = result["errors"]
    assert error["error"] == "RuntimeError: a broken" and error["config"]["quota"] == 1
    assert "error" in stored(output)[bad]
    monkeypatch.setattr(sweep_module, "_run_timing", timing)
    assert len(run_sweep(sweep, output)["points"]) == 8


def test_a_combination_that_the_engine_refuses_is_named_and_left_out(folder):
    sweep = load_sweep(written(folder, 'traces = "a.npz"\n[config]\nstaging = [1, 4]\n'))
    result = run_sweep(sweep, folder / "r.jsonl")
    assert len(result["points"]) == 1
    assert "staging must be at least top_k" in result["errors"][0]["error"]


def test_two_sweeps_do_not_write_one_file(folder):
    store = sweep_module._Store(folder / "r.jsonl")
    with pytest.raises(SweepError, match="another sweep is writing it"):
        run_sweep(load_sweep(written(folder)), folder / "r.jsonl")
    store.close()


# Elsewhere -----------------------------------------------------------------------------------

SLOW = """
import os, sys, time
from stmoe_golden import sweep
from stmoe_golden.sweep import load_sweep, run_sweep
folder, mode = sys.argv[1:]
if __name__ == "__main__":
    found = run_sweep(load_sweep(folder + "/sweep.toml"), folder + "/r.jsonl", workers=2)
    print(len(found["errors"]))
elif mode == "die":
    real = sweep._run_timing
    def run(trace, config, settings):
        if config.quota == 1 and config.spatial_depth == 1 and settings["load_ratio"] == 1:
            os._exit(9)
        return real(trace, config, settings)
    sweep._run_timing = run
"""


def test_a_worker_that_dies_fails_its_own_piece_alone(folder):
    written(folder)
    script = folder / "slow.py"
    script.write_text(SLOW)
    done = subprocess.run(
        [sys.executable, script, folder, "die"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    failed = [r for r in stored(folder / "r.jsonl").values() if "error" in r]
    assert failed == [{"error": "its process was killed: out of memory?"}]
    assert len(stored(folder / "r.jsonl")) == 10


def test_a_killed_sweep_keeps_what_it_had(folder):
    """SIGKILL of the command while its processes compute."""
    save_trace(markov_trace(num_tokens=3000, num_layers=8, num_experts=32, top_k=4),
               folder / "a.npz")  # fmt: skip
    path = written(folder, BASIC.replace("[1, 2]", "[1, 2, 3, 4]"))
    output = folder / "r.jsonl"
    command = [sys.executable, "-m", "stmoe.cli", "sweep", path, "-o", output, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if output.exists() and output.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = stored(output)
    assert len(kept) >= 3 and all("error" not in result for result in kept.values())
    with output.open("ab") as file:
        file.write(b'{"key": "half')
    sweep_module._Store(output).close()
    assert stored(output) == kept


def test_an_interrupt_is_one_line_and_the_command_goes_on_where_it_was(folder):
    save_trace(markov_trace(num_tokens=3000, num_layers=8, num_experts=32, top_k=4),
               folder / "a.npz")  # fmt: skip
    output = folder / "r.jsonl"
    command = [sys.executable, "-m", "stmoe.cli", "sweep", written(folder), "-o", output]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Whoever runs the tests may ignore it (nohup, or a shell's background), which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    # Two: a result can be read a moment before the command knows that it is on the disk.
    while time.monotonic() < deadline and process.poll() is None and len(stored(output)) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stmoe: interrupted\n")
    kept = stored(output)
    assert 2 <= len(kept) < 10
    assert run_sweep(load_sweep(folder / "sweep.toml"), output)["points"]
    assert all(stored(output)[key] == result for key, result in kept.items())


@pytest.mark.parametrize("sync", [1, 2], ids=["header", "first result"])
def test_an_interrupt_right_after_a_write_keeps_what_was_written(folder, monkeypatch, sync):
    output, fsync, calls = folder / "r.jsonl", os.fsync, []

    def interrupted(file):
        fsync(file)
        calls.append(file)
        if len(calls) == sync:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load_sweep(written(folder)), output)
    assert len(stored(output)) == sync - 1
    monkeypatch.undo()
    assert run_sweep(load_sweep(written(folder)), output)["points"]


def test_a_dask_cluster_gives_the_same(folder):
    distributed = pytest.importorskip(
        "distributed", reason="no dask.distributed: pip install 'stmoe[sweep]'"
    )
    sweep = load_sweep(written(folder))
    here = run_sweep(sweep, folder / "here.jsonl")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None,
        host="127.0.0.1",
        protocol="tcp://",
    ) as cluster:  # fmt: skip
        there = run_sweep(sweep, folder / "there.jsonl", scheduler=cluster.scheduler_address)
    assert there == here


def test_a_scheduler_that_is_not_there_is_named_and_nothing_is_written(folder, capsys, monkeypatch):
    distributed = pytest.importorskip(
        "distributed", reason="no dask.distributed: pip install 'stmoe[sweep]'"
    )

    def refused(*_, **__):
        raise OSError("timed out")

    monkeypatch.setattr(distributed, "Client", refused)
    monkeypatch.setattr("dask.distributed.Client", refused)
    output = folder / "r.jsonl"
    arguments = ["sweep", str(written(folder)), "-o", str(output), "--scheduler", "tcp://x:1"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "stmoe: --scheduler tcp://x:1: no Dask scheduler: timed out\n"
    assert not output.exists()


def test_a_worker_with_other_code_refuses(folder, monkeypatch):
    (piece, *_) = load_sweep(written(folder)).pieces
    monkeypatch.setattr(sweep_module, "code_version", lambda: "other")
    assert "this worker has another version of the code" in run_piece(piece)["error"]


# The command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json_and_its_results_make_a_report(folder, capsys):
    path, output = written(folder), folder / "out" / "r.jsonl"
    arguments = ["sweep", str(path), "-o", str(output), "--workers", "1"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert table.count(" ours ") == table.count(" lru ") == 8 and "* on the Pareto front" in table
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(output.with_suffix(".json").read_text())
    assert len(result["points"]) == 8
    for source in (output, output.with_suffix(".json")):
        done = make_report(source, folder / "report")
        text = done.page.read_text()
        assert done.figures == 4 and text.count("<svg ") == 4 and done.timeline is None
        assert "Pareto plot: coverage" in text and "against buffer (slots)" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traces = [", "not TOML: "),
        ("", "traces is missing: a path, or a list of them"),
        ("traces = []", "traces must not be an empty list"),
        ('traces = "no.npz"', "no.npz: No such file or directory"),
        ('traces = "a.npz"\nfoo = 1', "unknown key 'foo'; keys are traces, tokens, "),
        ('traces = "a.npz"\npolicies = "best"', "policies must be of ours, "),
        ('traces = "a.npz"\nload_ratio = [1, 0]', "load_ratio must be 0.01 to 100, not 0"),
        ('traces = "a.npz"\nload_ratio = 1\nsystem = "nvme"', "cannot both be given"),
        ('traces = "a.npz"\nsystem = "floppy"', "system must be one of pcie4_x16, "),
        ('traces = "a.npz"\nsystem = ["nvme", "lpddr5+nvme:0"]', "system must name 1 to 999999 "),
        ('traces = "a.npz"\ntokens = 0', "tokens must be 1 or more, not 0"),
        ('traces = "a.npz"\n[config]\nquotas = 1', "config: unknown field 'quotas'; fields are "),
        ('traces = "a.npz"\n[config]\nquota = [1, 999]', "config: quota must be 0 to 256, not 999"),
        ('traces = "a.npz"\n[config]\nquota = "x"', "config: quota must be an integer or a list"),
        ('traces = "a.npz"\n[config]\nadaptive = 1', "config: adaptive must not be 1"),
        ('traces = "a.npz"\n[config]\nquota = true', "config: quota must not be True"),
        ('traces = "a.npz"\n[config]\nquota = [1, 1]', "config: quota names a value twice"),
        ('traces = "a.npz"\n[energy]\ndram = -1', "energy dram must be 0 to 1000000 pJ/bit"),
        ('traces = "a.npz"\n[config]\nquota = 1\n[[case]]\nquota = 2', "quota is set both in"),
        ('traces = "a.npz"\npolicy_files = "no.py"', "no.py: No such file or directory"),
    ],
)
def test_a_sweep_file_that_is_wrong_is_refused_in_one_line(folder, capsys, text, message):
    path, output = written(folder, text), folder / "r.jsonl"
    assert message in refused(ended(capsys, "sweep", path, "-o", output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "argument --workers: must be 1 to 1024, not '0'"),
        (["-o", "x.json"], "argument -o: must not end in .json"),
        (["-o", "a.npz"], "not a results file of a sweep: "),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(folder, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    before = (folder / "a.npz").read_bytes()
    assert message in refused(ended(capsys, "sweep", written(folder), *arguments))
    assert (folder / "a.npz").read_bytes() == before
