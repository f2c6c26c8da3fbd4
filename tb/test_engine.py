# amaranth: UnusedElaboratable=no
# SPDX-License-Identifier: Apache-2.0
"""The whole engine under random and illegal traffic, every event held to the golden model."""

from __future__ import annotations

import json
import os
import random
from collections import Counter as Tally
from pathlib import Path

import cocotb
import pytest

from engine_bench import ObservedTop, RandomTraffic
from simulation import run_bench, seeds
from stmoe.register_map import COUNTERS
from stmoe_golden.checker import Kind, Segment
from stmoe_golden.config import PAGE_BYTES, EngineConfig, preset

CONFIGS = {
    "tiny": preset("tiny").replace(
        expert_bytes=256, event_depth=64, watchdog_cycles=1024, gate_window=4, gate_patience=16
    ),
    # As few slots as there may be: what one event needs.
    "least_slots": EngineConfig(
        num_layers=3, num_experts=5, quota=0, staging=2, expert_bytes=128, max_burst=4
    ),
    # No lookahead, so nothing is ever prefetched; and as few loads in flight as there may be.
    "one_layer": EngineConfig(
        num_layers=1, num_experts=4, num_transfers=2, expert_bytes=128, max_burst=8
    ),
    # Every expert in every event.
    "all_experts": EngineConfig(
        num_layers=2, num_experts=3, top_k=3, quota=1, staging=4, expert_bytes=128
    ),
    "wide": EngineConfig(
        axi_data_width=128,
        max_burst=16,
        expert_bytes=512,
        quota=1,
        staging=6,
        admission_bonus=0,
        adaptive=False,
        gate_window=8,
        gate_levels=3,
        gate_step=100,
    ),  # fmt: skip
    # The buffer behind AXI; slots that end behind a page, so that bursts are cut there.
    "behind_axi": preset("tiny").replace(
        buffer="axi",
        axi_data_width=512,
        expert_bytes=4160,
        max_burst=24,
        watchdog_cycles=1024,
        gate_window=4,
        gate_patience=16,
    ),
    # No prefetch ever starts, and two selections fill the queue.
    "full_queue": EngineConfig(
        num_layers=3,
        num_experts=5,
        lookahead=2,
        num_transfers=2,
        expert_bytes=128,
        gate_window=4,
        threshold_2=-87,
    ),
    # Selects three layers ahead, one of them without a spatial table; and all layers, by folds.
    "ahead": EngineConfig(
        num_layers=5,
        num_experts=8,
        lookahead=3,
        spatial_depth=2,
        num_transfers=8,
        expert_bytes=128,
        gate_window=4,
        threshold_2=-60,
        threshold_3=-30,
    ),
    "ahead_folds": EngineConfig(
        num_layers=4,
        num_experts=6,
        lanes=3,
        lookahead=4,
        quota=1,
        expert_bytes=96,
        max_burst=8,
        gate_window=4,
        select_max=3,
    ),
    # Fewer lanes than experts: two folds; three of three lanes, which is no power of two.
    "halves": EngineConfig(
        num_experts=8, lanes=4, expert_bytes=128, gate_window=4, admission_bonus=0
    ),
    "thirds": EngineConfig(
        num_layers=3, num_experts=9, lanes=3, top_k=3, quota=1, expert_bytes=128, max_burst=8
    ),
}


# pytest ---------------------------------------------------------------------------------------


def run(name: str, testcase: str, count: int) -> None:
    run_bench(
        ObservedTop(CONFIGS[name]),
        f"engine_{name}",
        Path(__file__).stem,
        testcase=testcase,
        env={"CONFIG": name, "SEEDS": json.dumps(seeds(count))},
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_random_traffic_matches_golden(name: str) -> None:
    """Legal and illegal events, commits at any time, stalls on every stream."""
    run(name, "random_traffic", 10)


def test_read_error_is_retried_then_granted() -> None:
    run("tiny", "read_errors_are_retried", 1)


def test_lasting_read_error_gives_error_grants_and_leaks_no_slot() -> None:
    run("tiny", "lasting_read_errors_leak_no_slot", 1)


def test_memory_that_never_answers_does_not_hang_the_engine() -> None:
    run("tiny", "dead_memory_never_hangs_the_engine", 2)


def test_write_errors_are_retried_then_given_up() -> None:
    run("behind_axi", "write_errors_count_as_read_errors", 1)


def test_buffer_that_never_answers_does_not_hang_the_engine() -> None:
    run("behind_axi", "silent_buffer_never_hangs_the_engine", 1)


def test_slots_move_only_when_nothing_is_held_or_under_way() -> None:
    run("behind_axi", "slots_move_at_rest", 1)


def test_full_event_port_loses_nothing() -> None:
    run("tiny", "full_event_port_loses_nothing", 1)


# cocotb ---------------------------------------------------------------------------------------

CONFIG = CONFIGS[os.environ.get("CONFIG", "tiny")]
SEEDS = json.loads(os.environ.get("SEEDS", "[1]"))

bench = cocotb.test(timeout_time=5, timeout_unit="ms")
"""Every bench ends in 500,000 cycles, or fails."""


@bench
async def random_traffic(dut) -> None:
    tb = RandomTraffic(dut, CONFIG)
    moved = 0
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        tb.routes_left = 80
        commits = cocotb.start_soon(tb.commits())
        await tb.drain()
        await commits
        await tb.drain()
        assert len(tb.log["grants"]) == CONFIG.top_k * tb.taken["route"]
        checker = tb.check()
        await tb.check_counters(checker)
        moved += tb.taken["relocation"]
        tb.let_flow(*tb.axil_channels)
        if seed == SEEDS[-1]:
            await tb.check_tables(checker)
        dut._log.warning("seed %d: %d cycles, %d records", seed, tb.cycle, checker.checked)
    assert bool(moved) == (CONFIG.buffer == "axi"), "slots that move"


@bench
async def read_errors_are_retried(dut) -> None:
    """Every burst may fail a few times: no grant has an error, every slot has the right bytes."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        faults, rng = Tally(), random.Random(seed)
        marked = {
            segments[-1].base + expert * segments[-1].stride
            for segments in tb.segments
            for expert in range(CONFIG.num_experts)
            if segments[-1].beats
        }

        def fails(address: int, faults=faults, rng=rng, marked=marked) -> bool:
            # One address of an expert, never more often than a load is retried.
            if address not in marked or faults[address] >= CONFIG.retry_limit:
                return False
            faults[address] += 1
            return rng.random() < 0.7

        tb.ram.fails = fails
        tb.routes_left = 60
        await tb.drain()
        checker = tb.check()
        assert checker.counters["retries"] > 5
        assert checker.counters["error_grants"] == checker.counters["errors"] == 0
        await tb.check_counters(checker)


@bench
async def lasting_read_errors_leak_no_slot(dut) -> None:
    """Experts that cannot be read get error grants and the interrupt; their slots serve others."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS:
        await tb.reset(seed, stalls=seed > 1)
        await tb.program_segments()
        await tb.put("IRQ_ENABLE", 1)
        broken = {
            s.base + expert * s.stride + (s.beats - 1) * CONFIG.beat_bytes
            for segments in tb.segments
            for s in segments
            for expert in range(0, CONFIG.num_experts, 2)
            if s.beats
        }
        tb.ram.fails = broken.__contains__
        tb.illegal = 0
        tb.routes_left = 60
        await tb.drain()
        assert dut.irq.value == 1
        errors = sum(grant[4] for grant in tb.log["grants"])
        assert errors > 10
        tb.ram.fails = lambda address: False
        tb.routes_left = 60
        await tb.drain()
        assert len(tb.log["grants"]) == CONFIG.top_k * tb.taken["route"]
        assert sum(grant[4] for grant in tb.log["grants"][-CONFIG.top_k * 40 :]) == 0
        checker = tb.check()
        assert not checker.quarantined
        assert len(checker.free) + (checker.buffer.slot >= 0).sum() == CONFIG.num_slots
        await tb.check_counters(checker)


@bench
async def dead_memory_never_hangs_the_engine(dut) -> None:
    """No beat ever comes: every grant is an error, the watchdog reports, tokens are still taken."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS[:2]:
        await tb.reset(seed, stalls=False)
        await tb.program_segments(
            [[Segment(layer << 20, 4096, tb.beats)] for layer in range(CONFIG.num_layers)]
        )
        await tb.put("IRQ_ENABLE", 2)
        tb.ram.silent = True
        tb.illegal = 0
        tb.event_rate = 0.2
        # One address waits at the memory, or all are taken.
        tb.ram.ar_channel.queue_occupancy_limit = (64, 1)[seed % 2]
        tb.routes_left = 40
        await tb.drain()
        tb.ram.ar_channel.queue_occupancy_limit = 64
        assert tb.taken["route"] == 40
        assert [g[4] for g in tb.log["grants"]] == [1] * (40 * CONFIG.top_k)
        kinds = Tally(Kind(r.kind).name for r in tb.log["events"])
        assert kinds["WATCHDOG"] >= 2 and kinds["ROUTE"] == 40
        assert dut.irq.value == 1 and await tb.get("IRQ_STATUS") & 2
        names = [counter.name for counter in COUNTERS]
        counters = {name: await tb.get("COUNTER", i) for i, name in enumerate(names)}
        assert counters["timeouts"] == kinds["WATCHDOG"]
        assert counters["error_grants"] == 40 * CONFIG.top_k and counters["grants"] == 0
        assert counters["routes"] == 40 and counters["filled"] == 0


@bench
async def full_event_port_loses_nothing(dut) -> None:
    """No record is taken for 2,000 cycles at a time: the engine waits, then goes on as golden."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        tb.event_rate = 0.3

        def stall(rng):
            while True:
                for _ in range(rng.randint(50, 800)):
                    yield False
                for _ in range(2000):
                    yield True

        tb.sinks["event"].pauses = stall(random.Random(seed))
        tb.routes_left = 60
        await tb.drain()
        tb.sinks["event"].pauses = iter(())
        await tb.drain()
        assert tb.event_waits > 4000
        checker = tb.check()
        await tb.check_counters(checker)


@bench
async def write_errors_count_as_read_errors(dut) -> None:
    """A burst fails now and then, one slot always: loads start again, or are given up in the end;
    what is granted is in the buffer."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS:
        await tb.reset(seed)
        await tb.program_segments()
        rng, stride = random.Random(seed), CONFIG.least_stride

        def fails(address: int, rng=rng, stride=stride) -> bool:
            return address // stride == 3 or rng.random() < 0.002

        tb.store.fails = fails
        tb.routes_left = 60
        await tb.drain()
        checker = tb.check()
        assert checker.counters["retries"] > 5 and checker.counters["errors"] > 0
        assert checker.counters["filled"] > 20
        tb.check_nothing_lost(checker)
        await tb.check_counters(checker)


@bench
async def silent_buffer_never_hangs_the_engine(dut) -> None:
    """No write is ever answered: every grant is an error, the watchdog reports, tokens go on."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS:
        await tb.reset(seed, stalls=False)
        await tb.program_segments(
            [[Segment(layer << 20, 8192, tb.beats)] for layer in range(CONFIG.num_layers)]
        )
        await tb.put("IRQ_ENABLE", 2)
        tb.store.silent = True
        tb.illegal = 0
        tb.event_rate = 0.2
        tb.routes_left = 20
        await tb.cycles(300)
        # A commit that waits for rest, which never comes, holds nothing back for ever.
        stride = CONFIG.least_stride
        await tb.commit(place=(1 << 32, stride), wait=False)
        await tb.drain()
        assert tb.taken["route"] == 20
        assert await tb.get("STATUS") & 1, "the slots were moved under writes"
        assert [g[4] for g in tb.log["grants"]] == [1] * (20 * CONFIG.top_k)
        kinds = Tally(Kind(r.kind).name for r in tb.log["events"])
        assert kinds["WATCHDOG"] >= 2 and not kinds["FILL_DONE"]
        assert dut.irq.value == 1 and await tb.get("IRQ_STATUS") & 2


@bench
async def slots_move_at_rest(dut) -> None:
    """A commit that moves the slots comes under load, with grants held for long: until they are
    released no route is taken and no prefetch starts; after it every expert is loaded anew."""
    tb = RandomTraffic(dut, CONFIG)
    for seed in SEEDS:
        await tb.reset(seed, stalls=False)
        tb.illegal, tb.event_rate, tb.delays = 0, 1, (400, 600)
        await tb.program_segments()
        stride = CONFIG.least_stride
        moves = []
        for part in range(1, 5):
            tb.routes_left = 8 * CONFIG.num_layers
            await tb.cycles(2500 + 37 * part)
            assert tb.held and tb.routes_left
            await tb.commit(place=(part << 32, stride + part * PAGE_BYTES), wait=False)
            asked = tb.cycle
            while await tb.get("STATUS") & 1:
                pass
            moves.append(asked)
            await tb.drain()
        commits = [e for e in tb.log["events"] if e.kind == Kind.REGISTER_COMMIT and e.flag]
        for asked, event in zip(moves, commits, strict=True):
            assert event.cycle > asked + 100
            # One operation may have been begun when the commit came.
            between = [e for e in tb.log["events"] if asked + 30 < e.cycle < event.cycle]
            assert any(e.kind == Kind.RELEASE for e in between)
            assert not any(e.kind == Kind.ROUTE for e in between)
            assert not any(e.kind == Kind.LOAD_START and e.flag & 1 for e in between)
        checker = tb.check()
        tb.check_nothing_lost(checker)
        await tb.check_counters(checker)
