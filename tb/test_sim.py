# SPDX-License-Identifier: Apache-2.0
"""`make sim` as a whole: it agrees with golden on odd shapes, it fails when the RTL is broken, and
it says in one line what is wrong with bad input."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sim import latency_of
from sim_run import QUICK, SimulationError, run_simulation
from simulation import GPT_OSS, ROOT, seeds
from stmoe.harness.content_checker import Fault
from stmoe.harness.run_log import RunLog, check_run, times_of
from stmoe_golden.checker import Checker, Kind, Mismatch, Record, Segment, Settings, burst_plan
from stmoe_golden.config import EngineConfig, preset
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import save_trace

SIM = [sys.executable, str(ROOT / "tb" / "sim.py")]


def trace_of(config: EngineConfig, tokens: int, seed: int = 1):
    """A synthetic trace of a configuration's shape."""
    return markov_trace(
        num_tokens=tokens,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        seed=seed,
    )


def run(config: EngineConfig, tokens: int, *, load_ratio: float = 1.0, seed: int = 0, **options):
    """A run of the harness over a synthetic trace."""
    attention, expert = times_of(config, load_ratio)
    trace = trace_of(config, tokens, seed + 1)
    return run_simulation(
        config,
        {"experts": trace.experts, "sequence": trace.sequence},
        attention_cycles=attention,
        expert_cycles=expert,
        seed=seed,
        **options,
    )


def assert_matches(config: EngineConfig, log) -> int:
    """Every event and every counter equals golden's; returns how many events there were."""
    records, counters = check_run(log, config)
    assert {n: rtl for n, (rtl, _) in counters.items()} == {n: g for n, (_, g) in counters.items()}
    assert records == len(log.events) > 0
    assert not log.violations
    return records


@pytest.mark.parametrize("seed", seeds(10))
def test_tiny_preset_agrees_with_golden(seed):
    config = preset("tiny")
    ratio = (0.25, 0.5, 1.0, 2.0, 4.0)[seed % 5]
    print(f"seed {seed}, load ratio {ratio}")
    log = run(config, 200, load_ratio=ratio, seed=seed, latency=(1, 7, 32, 100)[seed % 4])
    assert_matches(config, log)
    assert len(log.finished) == 200


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(num_layers=5, num_experts=6, top_k=3, quota=0, staging=3, expert_bytes=512),
        EngineConfig(num_layers=1, num_experts=5, top_k=2, quota=1, expert_bytes=256),
        EngineConfig(
            num_layers=3,
            num_experts=7,
            top_k=2,
            quota=1,
            spatial_depth=1,
            weight_bits=4,
            margin_low=12,
            margin_step=2,
            margin_high=8,
            axi_data_width=128,
            max_burst=16,
            prefetch_outstanding=1,
        ),
        # Wide enough for tables of several memories, and states looked up rank by rank.
        EngineConfig(num_layers=4, num_experts=40, top_k=7, quota=4, expert_bytes=256),
    ],
    ids=["least_slots", "one_layer", "saturating_weights", "wide_rows"],
)
def test_odd_shapes_agree_with_golden(config):
    for seed in (0, 3):
        print(f"seed {seed}")
        log = run(config, 150, load_ratio=1.5, seed=seed, build_args=QUICK)
        assert_matches(config, log)


BEHIND_AXI = preset("tiny").replace(
    # A slot is one beat longer than a page, so that its writes are cut.
    buffer="axi",
    axi_data_width=512,
    expert_bytes=4160,
    max_burst=24,
)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_buffer_behind_axi_agrees_with_golden(seed):
    # Read data interleaved by beat with a seed: then most writes are of one beat.
    memory = {"reorder": 1, "interleave": 1} if seed else {}
    log = run(BEHIND_AXI, 80, load_ratio=1.5, seed=seed, memory=memory, build_args=QUICK)
    assert_matches(BEHIND_AXI, log)
    written = sum(burst.length for burst in log.write_addresses)
    assert written == log.totals["fill_beats"] > 0
    assert len(log.write_answers) == len(log.write_addresses)
    if not seed:
        # A read burst is one write burst, or two where the slot's page ends in it; those of
        # cancelled loads are none.
        loads = sum(event.kind == Kind.LOAD_START for event in log.events)
        assert len(log.write_addresses) <= len(log.ar) + loads


@pytest.mark.skipif(not GPT_OSS.exists(), reason="../shared/traces is not here")
def test_real_20b_routing_resampled_to_tiny_agrees_with_golden():
    # Real locality in a small shape: the first 4 layers, experts folded to 8, duplicates dropped.
    import numpy as np

    config = preset("tiny")
    with np.load(GPT_OSS) as file:
        experts = file["experts"][:2000, : config.num_layers]
        sequence = file["sequence"][:2000]
    sets = [[list(dict.fromkeys(int(e) % 8 for e in row)) for row in token] for token in experts]
    keep = [i for i, token in enumerate(sets) if all(len(row) >= 2 for row in token)][:300]
    arrays = {
        "experts": np.array([[row[:2] for row in sets[i]] for i in keep]),
        "sequence": sequence[keep],
    }
    attention, expert = times_of(config, 1.0)
    log = run_simulation(config, arrays, attention_cycles=attention, expert_cycles=expert)
    assert_matches(config, log)


# A broken engine is found -------------------------------------------------------------------


def broken_engine(config: EngineConfig, module: str, old: str, new: str):
    """The engine with one line of one block changed."""
    source = Path(importlib.import_module(f"stmoe.{module}").__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is not exactly once in {module}.py"
    changed = types.ModuleType(f"stmoe.{module}")
    changed.__file__ = f"<{module} with {new!r}>"
    changed.__package__ = "stmoe"
    exec(compile(source.replace(old, new), changed.__file__, "exec"), changed.__dict__)
    # Every block is imported anew, so that all of them see the changed one.
    shared = {"stmoe.payloads", "stmoe.register_map"}
    kept = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.startswith("stmoe.") and not name.startswith("stmoe.harness")
        if name not in shared
    }
    try:
        sys.modules[f"stmoe.{module}"] = changed
        return importlib.import_module("stmoe.engine").Engine(config)
    finally:
        for name in [name for name in sys.modules if name.startswith("stmoe.")]:
            if name not in shared and not name.startswith("stmoe.harness"):
                del sys.modules[name]
        sys.modules.update(kept)
        for name, old_module in kept.items():
            setattr(sys.modules["stmoe"], name.rpartition(".")[2], old_module)


def check_finds(factory, *kinds: Kind, config: EngineConfig | None = None) -> RunLog:
    """A run of the broken engine is refused, at a record of one of these kinds."""
    config = config or preset("tiny")
    try:
        log = run(config, 150, engine_factory=factory, strict=False, build_args=QUICK)
    except SimulationError as error:
        log = error.log
    with pytest.raises(Mismatch) as found:
        check_run(log, config)
    text = str(found.value)
    assert "look at cycle" in text and "golden" in text and "last records" in text
    assert any(f": {kind.name} " in text.splitlines()[0] for kind in kinds), text
    return log


def engine_that_does_not_wait_for_writes(config):
    return broken_engine(
        config,
        "dma_scheduler",
        "all_here = nothing_owed & ~self.writes_owed",
        "all_here = nothing_owed",
    )


def engine_with_broken_learner(config):
    return broken_engine(
        config, "learner", "self.i[e] + self.delta[e]", "self.i[e] + (self.delta[e] >> 1)"
    )


def engine_with_broken_victim(config):
    of_lane = "self.score[e] {} (self.use[e]".format
    return broken_engine(config, "victim_chooser", of_lane("+"), of_lane("-"))


def engine_with_broken_scheduler(config):
    return broken_engine(
        config,
        "slot_manager",
        "(row_taken[e] == LaneState.LOADING_PREFETCH) & ~event_set[e]",
        "(row_taken[e] == LaneState.LOADING_PREFETCH) & ~event_set[e] & 0",
    )


def test_broken_learner_is_found():
    check_finds(engine_with_broken_learner, Kind.SELECT, Kind.LOAD_START, Kind.DROP)


def test_broken_victim_choice_is_found():
    check_finds(engine_with_broken_victim, Kind.LOAD_START)


def test_broken_cancel_is_found():
    check_finds(engine_with_broken_scheduler, Kind.BURST, Kind.FILL_DONE, Kind.LAST_BEAT)


def test_a_grant_before_the_last_write_is_answered_is_found():
    log = check_finds(
        engine_that_does_not_wait_for_writes, Kind.FILL_DONE, Kind.DRAINED, config=BEHIND_AXI
    )
    # The content checker sees it by itself: what was granted was not in the buffer.
    assert Fault.CONTENT in {violation.what for violation in log.violations}


# The checker itself ---------------------------------------------------------------------------


def checker_for(config: EngineConfig, **inputs) -> Checker:
    """A checker with one segment per layer."""
    segments = [[Segment(0, 4096, 8)]] * config.num_layers
    settings = [Settings(config.threshold << 2, [config.quota] * config.num_layers)]
    return Checker(config, segments=segments, settings=settings, **inputs)


def test_an_empty_log_is_a_mismatch():
    with pytest.raises(Mismatch, match="event log is empty"):
        checker_for(preset("tiny")).run([])


def test_a_handshake_without_record_is_a_mismatch():
    token = Record(5, Kind.TOKEN, 0, 0, 0, 0, 1, 9)
    commit = Record(6, Kind.SCORE_COMMIT, 0, 0, 0, 0, 0, 0)
    config = preset("tiny").replace(lookahead=0)
    checker = checker_for(config, tokens=[(5, 1, 9)], releases=[(7, 3)])
    with pytest.raises(Mismatch, match="a release handshake has no record"):
        checker.run([token, commit])


def test_a_token_that_is_not_committed_is_a_mismatch():
    checker = checker_for(preset("tiny"), tokens=[(5, 1, 9)])
    with pytest.raises(Mismatch, match="no SCORE_COMMIT"):
        checker.run([Record(5, Kind.TOKEN, 0, 0, 0, 0, 1, 9)])


def test_bursts_never_cross_4_kib():
    plan = burst_plan([Segment(4096 - 24, 100 * 8, 70), Segment(8192, 0, 3)], 0, 8, 64)
    assert plan == [(4072, 3), (4096, 64), (4608, 3), (8192, 3)]


# Bad input ------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    """Standard error of a run that must be refused: one line, status 2, nothing on stdout."""
    done = subprocess.run([*SIM, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "no/such.npz"], "no/such.npz"),
        (["--preset", "gpt5"], "unknown preset 'gpt5'; presets are tiny, gpt_oss_20b"),
        (["--preset", "gpt_oss_20b"], "num_layers is 8 in the trace, but 24"),
        (["--tokens", "0"], "must be an integer of 1 or more"),
        (["--tokens", "99999999"], "tokens must be 1 to"),
        (["--seed", "-1"], "must be an integer of 0 or more"),
        (["--set", "quotas=3"], "unknown field 'quotas'"),
        (["--set", "staging=3"], "staging must be at least top_k * num_contexts"),
        (["--set", "event_port=false"], "event_port must be true"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said, tmp_path):
    out = tmp_path / "out"
    assert said in refused(*arguments, "--out", str(out))
    assert not (out / "report.json").exists()


def test_an_old_verilator_and_a_missing_compiler_are_named(tmp_path):
    for name, text in (("verilator", "#!/bin/sh\necho Verilator 5.006 2023\n"),):
        tool = tmp_path / name
        tool.write_text(text)
        tool.chmod(0o755)
    done = subprocess.run(
        [*SIM, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 2
    assert "g++ not found" in done.stderr and len(done.stderr.splitlines()) == 1


# The contract for other programs --------------------------------------------------------------


def test_report_has_what_other_programs_read(tmp_path):
    config = preset("tiny")
    path = tmp_path / "t.npz"
    save_trace(trace_of(config, 60), path)
    done = subprocess.run(
        [*SIM, "--trace", str(path), "--preset", "tiny", "--tokens", "50", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "MATCH" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["match"] is True and report["mismatches"] == 0
    assert report["tokens"] == 50 and report["preset"] == "tiny"
    assert report["events"] > 500 and report["cycles"] > 1000 and report["wall_s"] > 0
    assert 0.9 < report["load_ratio"] < 1.1
    assert all(rtl == golden for rtl, golden in report["counters"].values())
    assert report["counters"]["tokens"] == [50, 50]
    assert set(report["latency"]) == {"mean", "p50", "p99", "cycles"}
    assert set(report["prediction"]["recall"]) == {"1K", "1.5K", "2K", "3K"}
    assert latency_of is not None
