# SPDX-License-Identifier: Apache-2.0
"""The golden predictor against slow restatements from the architecture's text.

The restatements keep no scores. They hold tables as dictionaries of Python integers, and when a
score is asked for they add up the rows that contribute to it, from the list of events so far.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stmoe_golden.config import EngineConfig
from stmoe_golden.predictor import Predictor, add_row, clip, params_of, pick, select
from stmoe_golden.replay import new_paper_state, paper_scores, paper_update

GENTLE = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def saturate(value: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, value))


class Restatement:
    """Sections 2.2 to 2.4 of the architecture, from first principles."""

    def __init__(self, config: EngineConfig, *, learning: bool, ordered: bool):
        self.c = config
        self.learning = learning
        self.gains = [
            (6 - 4 * rank // config.top_k) if ordered else 4 for rank in range(config.top_k)
        ]
        self.rows: dict[tuple, int] = defaultdict(int)  # (kind, ..., lane) -> weight
        self.uses: dict[tuple[int, int], int] = defaultdict(int)
        self.kinds = -1
        """Kinds that are enabled now, as in the register PREDICTORS."""
        self.kinds_of_sequence = -1
        self.events: list[tuple[int, list[int], int]] = []  # of the present sequence, with `kinds`

    def new_sequence(self):
        self.events, self.kinds_of_sequence = [], self.kinds

    @staticmethod
    def enabled(row: tuple, kinds: int) -> bool:
        """Whether the kind of a row is enabled."""
        bit = {"bias": 0, "temporal": 1}.get(row[0])
        return bool(kinds >> (1 + row[1] if bit is None else bit) & 1)

    def contributions(self, layer: int) -> list[tuple[tuple, int]]:
        """Rows behind ``score[layer]`` if their kinds are enabled, and the gain of each in quarter
        units, 0 where the kind was not when the score was made."""
        found: list[tuple[tuple, int]] = []
        start, first = self.kinds_of_sequence, [(("bias", layer), 4)]
        for age, (source, used, kinds) in enumerate(reversed(self.events)):
            gained = [g * (kinds >> 1 & 1) for g in self.gains]
            if source == layer:
                # The layer's own latest visit: what is older was spent on that visit.
                found += [(("temporal", layer, i), g) for i, g in zip(used, gained, strict=True)]
                start = kinds
                break
            # `age` events came since, so this one is (layer - source) mod L layers before.
            distance = (layer - source) % self.c.num_layers
            if distance <= min(self.c.spatial_depth, self.c.num_layers - 1):
                gained = [g * (kinds >> 1 + distance & 1) for g in self.gains]
                found += [
                    (("spatial", distance, layer, i), g) for i, g in zip(used, gained, strict=True)
                ]
            assert age < self.c.num_layers
        return found + [(row, g * (start & 1)) for row, g in first]

    def score(self, layer: int, expert: int) -> int:
        return sum(self.rows[row + (expert,)] * g for row, g in self.contributions(layer))

    def route(self, layer: int, used: list[int]):
        m1, m2, m3 = 4 * self.c.margin_low, 4 * self.c.margin_step, 4 * self.c.margin_high
        rows = [row for row, _ in self.contributions(layer) if self.enabled(row, self.kinds)]
        for e in range(self.c.num_experts):
            s = self.score(layer, e)
            if e in used:
                delta = (s < m1) + (s < m2) + (s < -m3)
            else:
                delta = -((s > -m1) + (s > -m2) + (s > m3))
            for row in rows if self.learning else ():
                bits = self.c.weight_bits + (3 if row[0] == "bias" else 0)
                self.rows[row + (e,)] = saturate(self.rows[row + (e,)] + delta, bits)
        for e in range(self.c.num_experts):
            count = self.uses[layer, e]
            if count:
                count -= max(1, count // 32)
            if e in used:
                count = min(1023, count + 32)
            self.uses[layer, e] = count
        self.events.append((layer, used, self.kinds))


@st.composite
def scripts(draw):
    """A small configuration and the tokens to feed it: (new sequence, one set per layer)."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(4, experts)))
    config = EngineConfig(
        num_layers=draw(st.integers(1, 6)),
        num_experts=experts,
        top_k=top_k,
        quota=0,
        spatial_depth=draw(st.integers(0, 4)),
        weight_bits=draw(st.sampled_from([4, 5, 8])),
        # Small margins, so that few tokens reach every step of the delta.
        margin_low=draw(st.integers(0, 24)),
        margin_step=draw(st.integers(0, 12)),
        margin_high=draw(st.integers(0, 16)),
    )
    # A few sets that recur, so that rows saturate.
    one_set = st.permutations(range(experts)).map(lambda p: p[:top_k])
    pool = draw(st.lists(one_set, min_size=1, max_size=3))
    token = st.tuples(
        st.booleans(),
        st.lists(st.sampled_from(pool), min_size=config.num_layers, max_size=config.num_layers),
    )
    tokens = draw(st.lists(token, min_size=1, max_size=25))
    return config, tokens


ANY_KINDS = st.lists(st.one_of(st.just(63), st.integers(0, 63)), min_size=1, max_size=5)
"""PREDICTORS of the events, in turn."""


@given(scripts(), st.booleans(), st.booleans(), ANY_KINDS)
@GENTLE
def test_every_score_is_the_sum_of_the_rows_behind_it(script, learning, ordered, any_kinds):
    config, tokens = script
    turn = itertools.cycle(any_kinds)
    model = Predictor(config, learning=learning, ordered=ordered)
    slow = Restatement(config, learning=learning, ordered=ordered)
    layers, lanes = range(config.num_layers), range(config.num_experts)

    def enable(kinds: int):
        slow.kinds = kinds
        model.params = params_of(config, learning=learning, ordered=ordered, predictors=kinds)

    def check():
        expected = [[slow.score(m, e) for e in lanes] for m in layers]
        assert model.state.score.tolist() == expected
        reach = 1 << (config.score_bits - 1)
        assert all(-reach <= s < reach for row in expected for s in row)
        assert model.state.use.tolist() == [[slow.uses[m, e] for e in lanes] for m in layers]

    for number, (fresh, sets) in enumerate(tokens):
        fresh = fresh or number == 0
        enable(next(turn))
        model.token(fresh)
        if fresh:
            slow.new_sequence()
        check()
        for layer in layers:
            enable(next(turn))
            model.route(layer, np.array(sets[layer]))
            slow.route(layer, sets[layer])
            check()


@pytest.mark.parametrize("used", [True, False])
def test_weights_and_bias_saturate_at_their_own_widths(used):
    """The same set for ever drives every row that it touches to the end of its range."""
    config = EngineConfig(
        num_layers=1, num_experts=2, top_k=1, quota=0, weight_bits=4, margin_low=2047
    )
    model = Predictor(config)
    model.token(True)
    for _ in range(400):
        model.route(0, np.array([0]))
    lane = 0 if used else 1
    assert model.state.temporal[0, 0, lane] == (7 if used else -8)
    assert model.state.bias[0, lane] == (63 if used else -64)
    assert model.state.score[0, lane] == (4 * 63 + 6 * 7 if used else -4 * 64 - 6 * 8)
    assert model.state.temporal[0, 1].tolist() == [0, 0]


def test_without_learning_only_the_use_count_moves():
    config = EngineConfig()
    model = Predictor(config, learning=False)
    model.token(True)
    for _ in range(5):
        for layer in range(config.num_layers):
            model.route(layer, np.array([1, 3]))
    state = model.state
    assert not state.bias.any() and not state.spatial.any() and not state.temporal.any()
    # 32, 32-1+32 = 63, 63-1+32 = 94, 94-2+32 = 124, 124-3+32 = 153
    assert state.use[0].tolist() == [0, 153, 0, 153, 0, 0, 0, 0]


@given(st.integers(-300, 300), st.integers(0, 200))
def test_clip_is_twos_complement(value, high):
    assert clip(value, high) == max(-high - 1, min(high, value))


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=12),
    st.integers(-6, 6),
    st.integers(0, 13),
)
@settings(deadline=None)
def test_selection_is_best_first_with_ties_to_the_lowest_index(lanes, threshold, limit):
    scores = np.array([score for score, _ in lanes], np.int32)
    allowed = np.array([free for _, free in lanes])
    picks = select(scores, allowed, threshold, limit)
    passing = [e for e, (score, free) in enumerate(lanes) if free and score >= threshold]
    assert picks.tolist() == sorted(passing, key=lambda e: (-lanes[e][0], e))[:limit]
    assert allowed.tolist() == [free for _, free in lanes]
    # What it is made of writes into the caller's arrays: no more than it says.
    into = np.full(limit, -7)
    count = pick(scores, allowed, threshold, into)
    assert into.tolist() == picks.tolist() + [-7] * (limit - count)
    left = {e for e, (_, free) in enumerate(lanes) if free} - set(picks.tolist())
    assert set(np.flatnonzero(allowed).tolist()) == left


@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1 << 32)), max_size=4),
    st.sampled_from([127, 300, 511]),
)
@settings(deadline=None)
def test_a_lane_saturates_with_every_row_that_is_added(lanes, rows, high):
    scores = np.array(lanes, np.int32)
    expected = list(lanes)
    for gain, seed in rows:
        weights = np.random.default_rng(seed).integers(-128, 128, len(lanes), np.int32)
        add_row(scores, gain, weights, high)
        expected = [
            max(-high - 1, min(high, score + gain * int(weight)))
            for score, weight in zip(expected, weights, strict=True)
        ]
    assert scores.tolist() == expected


# The paper's tables -------------------------------------------------------------------------


class PaperRestatement:
    """Section 9 of the architecture: rows are lists of [expert, confidence]."""

    def __init__(self, top_k: int, candidates: int, threshold: int):
        self.top_k, self.size, self.threshold = top_k, candidates, threshold
        self.rows: dict[tuple[int, int], list[list[int]]] = defaultdict(
            lambda: [[-1, 0] for _ in range(candidates)]
        )
        self.before: list[int] = []  # the set of the layer before
        self.latest: dict[int, list[int]] = {}

    def new_sequence(self):
        self.before, self.latest = [], {}

    def scores(self, layer: int, experts: int) -> list[int]:
        sums = [int(e in self.latest.get(layer, [])) for e in range(experts)]
        for i in self.before:
            for expert, confidence in self.rows[layer, i]:
                if expert >= 0:
                    sums[expert] += confidence
        return sums

    def route(self, layer: int, used: list[int], experts: int):
        sums = self.scores(layer, experts)
        missed = [e for e in used if sums[e] < self.threshold]
        for rank, i in enumerate(self.before):
            row = self.rows[layer, i]
            turn = used[rank:] + used[:rank]
            for entry in row:
                if entry[0] in used:
                    entry[1] = min(3, entry[1] + 1)
                    continue
                entry[1] = max(0, entry[1] - 1)
                inside = [expert for expert, _ in row]
                new = [e for e in turn if e in missed and e not in inside]
                if entry[1] == 0 and new:
                    entry[:] = [new[0], 2]
        self.before, self.latest[layer] = used, used


@given(scripts(), st.integers(1, 5), st.integers(1, 5))
@GENTLE
def test_the_papers_tables_do_what_section_9_says(script, candidates, threshold):
    config, tokens = script
    state = new_paper_state(config, candidates)
    slow = PaperRestatement(config.top_k, candidates, threshold)
    scores = np.zeros(config.num_experts, np.int64)
    for fresh, sets in tokens:
        if fresh:
            state.history[:] = -1
            slow.new_sequence()
        for layer, used in enumerate(sets):
            paper_scores(state, layer, scores)
            assert scores.tolist() == slow.scores(layer, config.num_experts)
            paper_update(state, layer, np.array(used, np.int64), scores, threshold)
            slow.route(layer, used, config.num_experts)
            for i in range(config.num_experts):
                row = zip(state.candidate[layer, i], state.confidence[layer, i], strict=True)
                assert [list(entry) for entry in row] == slow.rows[layer, i]


def test_a_papers_row_by_hand():
    """Two layers, M = 2: expert 0 of layer 0 is followed by {1}, {1}, {2}, {2}, {2}, {2}."""
    config = EngineConfig(num_layers=2, num_experts=4, top_k=1, quota=0)
    state = new_paper_state(config, 2)
    scores = np.zeros(4, np.int64)
    seen = []
    for follower in (1, 1, 2, 2, 2, 2):
        state.history[:] = -1
        for layer, expert in ((0, 0), (1, follower)):
            paper_scores(state, layer, scores)
            paper_update(state, layer, np.array([expert]), scores, 2)
        row = zip(state.candidate[1, 0].tolist(), state.confidence[1, 0].tolist(), strict=True)
        seen.append(list(row))
    assert seen == [
        [(1, 2), (-1, 0)],  # 1 was not predicted and takes the first place that is empty
        [(1, 3), (-1, 0)],  # confirmed
        [(1, 2), (2, 2)],  # 1 loses; 2 was not predicted and takes the empty place
        [(1, 1), (2, 3)],
        [(1, 0), (2, 3)],  # 1 is at 0, but all that was used was predicted: it stays
        [(1, 0), (2, 3)],
    ]
