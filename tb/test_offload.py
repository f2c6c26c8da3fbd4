# SPDX-License-Identifier: Apache-2.0
"""The engine as a library: what it answers can be carried out, whatever the order of arrivals, and
the example's model gives the plain model's output, bit for bit."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stmoe_golden.config import EngineConfig
from stmoe_golden.offload import ExpertOffload, OffloadError
from stmoe_golden.synthetic import markov_trace

ROOT = Path(__file__).parents[1]
SHAPE = {"num_layers": 4, "num_experts": 16, "top_k": 3}


class Runtime:
    """Carries out what the library says, and checks that it can be: what a real one would do.

    Loads arrive late and in any order; a slot is written to only while nothing reads it.
    """

    def __init__(self, cache: ExpertOffload, seed: int, late: float) -> None:
        self.cache, self.late = cache, late
        self.rng = random.Random(seed)
        self.slots: list[tuple[int, int] | None] = [None] * cache.num_slots
        self.flying: list = []
        self.in_use: set[int] = set()

    def start(self, load) -> None:
        assert load.slot not in self.in_use, "a slot that is being read is written to"
        assert all(load.slot != other.slot for other in self.flying), "two loads into one slot"
        assert (load.layer, load.expert) not in self.slots, "an expert is in two slots"
        assert self.slots[load.slot] == load.evicts, "what is evicted is not what is there"
        self.slots[load.slot] = None
        self.flying.append(load)

    def arrive(self, load) -> None:
        self.flying.remove(load)
        self.slots[load.slot] = (load.layer, load.expert)
        self.cache.loaded(load)

    def step(self, layer: int, experts: list[int], prefetch: bool) -> None:
        self.in_use = set()
        plan = self.cache.route(layer, experts)
        listed = plan.ready + [load.expert for load in plan.coming + plan.loads]
        assert sorted(listed) == sorted(experts)
        assert all(load in self.flying for load in plan.coming)
        self.in_use = {self.cache.slot(layer, e) for e in plan.ready}
        for load in plan.loads:
            self.start(load)
        self.in_use = {self.cache.slot(layer, e) for e in experts}
        assert len(self.in_use) == len(experts)
        for load in plan.stale:
            assert load in self.flying and load.prefetch and load.expert not in experts
            if self.rng.random() < 0.5:
                self.flying.remove(load)
                self.cache.dropped(load)
        if prefetch:
            for load in self.cache.prefetch():
                assert load.prefetch and load.layer == (layer + 1) % self.cache.config.num_layers
                self.start(load)
        for load in plan.loads + plan.coming:
            self.arrive(load)
        for expert in experts:
            assert self.slots[self.cache.slot(layer, expert)] == (layer, expert)
        for load in list(self.flying):
            if self.rng.random() > self.late:
                self.arrive(load)
        assert self.cache.resident().count(None) == sum(
            slot is None for n, slot in enumerate(self.slots)
            if all(n != load.slot for load in self.flying)
        )  # fmt: skip


@pytest.mark.parametrize("slots", [6, 11, 30, 70, 500])
@pytest.mark.parametrize("late", [0.0, 0.7])
def test_every_answer_can_be_carried_out(slots, late):
    trace = markov_trace(num_tokens=200, **SHAPE, temporal=0.5, skew=0.3, seed=slots)
    runtime = Runtime(ExpertOffload(**SHAPE, slots=slots), slots, late)
    cache = runtime.cache
    assert cache.num_slots <= slots
    for token, first in enumerate(trace.starts()):
        cache.token(new_sequence=bool(first))
        for layer in range(4):
            runtime.step(layer, trace.experts[token, layer].tolist(), prefetch=True)
    count = cache.counters
    assert count["needed"] == 200 * 4 * 3 == count["ready"] + count["coming"] + count["missing"]
    assert count["missing"] < 2000 and count["useful"] > (10 if slots < 70 else 0)
    assert count["useful"] + count["useless"] + count["dropped"] <= count["prefetches"]
    assert (count["dropped"] > 0) == (late > 0) or slots >= 70


def test_prefetching_hits_more_than_its_own_buffer_alone():
    trace = markov_trace(num_tokens=800, **SHAPE, temporal=0.5, skew=0.3, seed=3)
    rates = {}
    for prefetch in (False, True):
        runtime = Runtime(ExpertOffload(**SHAPE, slots=22), 1, late=0.0)
        for token, first in enumerate(trace.starts()):
            runtime.cache.token(new_sequence=bool(first))
            for layer in range(4):
                runtime.step(layer, trace.experts[token, layer].tolist(), prefetch)
        rates[prefetch] = runtime.cache.hit_rate
    assert 1 - rates[True] < 0.8 * (1 - rates[False]), rates


def ran(trace, config, late=0.0):
    """A cache that has seen a trace."""
    runtime = Runtime(ExpertOffload(config=config), 1, late)
    for token, first in enumerate(trace.starts()):
        runtime.cache.token(new_sequence=bool(first))
        for layer in range(4):
            runtime.step(layer, trace.experts[token, layer].tolist(), prefetch=True)
    return runtime.cache


@pytest.mark.parametrize("late", [0.0, 0.7])
def test_a_layer_whose_prefetches_turn_out_wrong_asks_for_a_higher_score(late):
    """The confidence gate, as in the engine: it does away with much where routing cannot be
    predicted, and with little where it can."""
    config = EngineConfig(**SHAPE, quota=3, threshold=-200)
    static = config.replace(adaptive=False)
    trace = markov_trace(num_tokens=800, **SHAPE, temporal=0.5, skew=0.3, seed=3)
    draws = np.random.default_rng(1).random((800, 4, 16))
    chance = replace(trace, experts=np.argsort(draws, axis=2)[:, :, :3].astype(np.uint8))
    often = {
        name: ran(of, gate, late).counters["prefetches"]
        for name, of, gate in (
            ("chance", chance, config),
            ("chance, static", chance, static),
            ("real", trace, config.replace(threshold=-87)),
            ("real, static", trace, static.replace(threshold=-87)),
        )
    }
    assert often["chance"] < 0.6 * often["chance, static"], often
    assert 0.9 * often["real, static"] < often["real"] <= often["real, static"], often


def test_a_prompt_is_run_in_groups_and_learnt_after():
    trace = markov_trace(num_tokens=300, **SHAPE, num_sequences=1, seed=3)
    told, cold = (ExpertOffload(**SHAPE, slots=22) for _ in range(2))
    for token in range(290):
        told.token(new_sequence=token == 0)
        for layer in range(4):
            told.observe(layer, trace.experts[token, layer].tolist())
    assert told.counters["needed"] == 0 and told.resident() == [None] * told.num_slots
    for cache in (told, cold):
        runtime = Runtime(cache, 1, late=0.0)
        for start in range(0, 16, 3):
            group = list(range(16))[start : start + 3]
            for load in cache.route(0, group, learn=False).loads:
                runtime.start(load)
                runtime.arrive(load)
            assert all(cache.slot(0, e) is not None for e in group)
        cache.counters["ready"] = cache.counters["needed"] = 0
        for token in range(290, 300):
            cache.token(new_sequence=cache is cold and token == 290)
            for layer in range(4):
                runtime.step(layer, trace.experts[token, layer].tolist(), prefetch=True)
    assert told.hit_rate > cold.hit_rate


def test_a_broken_contract_is_said_so():
    def said(call) -> str:
        with pytest.raises(OffloadError) as caught:
            call()
        return str(caught.value)

    assert said(lambda: ExpertOffload(**SHAPE, slots=5)) == (
        "slots must be 6 (2 * top_k) to 4096, not 5"
    )
    assert said(lambda: ExpertOffload(4, 16, 3)) == (
        "num_layers, num_experts, top_k and slots must be given, or a config"
    )
    cache = ExpertOffload(config=EngineConfig(num_layers=4, num_experts=16, top_k=3))
    cache.token(new_sequence=True)
    assert said(lambda: cache.route(4, [1, 2, 3])) == "layer must be 0 to 3, not 4"
    assert said(lambda: cache.route(0, [1, 2])) == "experts must be a list of 3, not (2,)"
    assert said(lambda: cache.route(0, [1, 2, 16])) == "experts must be 0 to 15, not [1, 2, 16]"
    assert said(lambda: cache.route(0, [1, 2, 1])) == "experts must differ, not [1, 2, 1]"
    plan = cache.route(0, np.array([1, 2, 3]))
    assert said(lambda: cache.dropped(plan.loads[0])) == (
        "layer 0, expert 1 is no prefetch that can be dropped"
    )
    cache.loaded(plan.loads[0])
    assert said(lambda: cache.loaded(plan.loads[0])) == "layer 0, expert 1 is not being loaded"
    assert said(lambda: cache.route(1, [1, 2, 3])) == (
        "layer 0, expert 2 has not arrived: every load of a plan must be loaded() before the next "
        "route()"
    )


def test_the_example_gives_the_plain_models_output(tmp_path):
    """On architectures whose experts differ: with biases, and in groups with shared ones."""
    pytest.importorskip("torch", reason="torch is not here (pip install -e '.[capture]')")
    from test_trace_capture import build

    for name in ("GptOss", "Qwen2Moe"):
        build(name, vocab_size=256).save_pretrained(tmp_path / name)
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / "offload" / "run.py", "--model", tmp_path / name,
             "--tokens", "12", "--share", "0.4", "--link-mb-s", "100"],
            capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "golden")},
        )  # fmt: skip
        assert done.returncode == 0, done
        assert done.stdout.count("equal, bit for bit") == 2 and "DIFFERS" not in done.stdout
