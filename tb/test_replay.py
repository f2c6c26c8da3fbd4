# SPDX-License-Identifier: Apache-2.0
"""Whole-trace replay: its numbers against slow counting, causality, and a real trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stmoe_golden.config import EngineConfig
from stmoe_golden.predictor import Predictor
from stmoe_golden.replay import (
    BUDGETS,
    ReplayError,
    new_paper_state,
    paper_scores,
    paper_update,
    pick_threshold,
    replay_trace,
)
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import Trace, TraceError, config_for, load_trace

GPT_OSS = Path(__file__).resolve().parents[2] / "shared/traces/gpt_oss_20b_decode.npz"

needs_gpt_oss = pytest.mark.skipif(
    not GPT_OSS.exists(), reason=f"{GPT_OSS} is missing: the real trace is not part of the project"
)


def scores_of(trace: Trace, predictor: str = "learned", **config) -> np.ndarray:
    """int64 [T, L, E]: scores just before each routing event, quarter units, event by event."""
    settings = config_for(trace).replace(**config)
    shape = (trace.num_tokens, trace.num_layers, trace.num_experts)
    found = np.zeros(shape, np.int64)
    model = Predictor(settings, ordered=trace.ordered)
    paper = new_paper_state(settings, 2 * settings.top_k)
    row = np.zeros(trace.num_experts, np.int64)
    for token, fresh in enumerate(trace.starts()):
        model.token(bool(fresh))
        if fresh:
            paper.history[:] = -1
        for layer in range(trace.num_layers):
            used = trace.experts[token, layer].astype(np.int64)
            if predictor == "learned":
                found[token, layer] = model.state.score[layer]
                model.route(layer, used)
            else:
                paper_scores(paper, layer, row)
                found[token, layer] = 4 * row
                paper_update(paper, layer, used, row, 2)
    return found


def count(trace: Trace, scores: np.ndarray, threshold: float) -> dict:
    """The metrics of section 8 over the second half, by sorting and sets."""
    half = trace.num_tokens // 2
    unit = (trace.num_tokens - half) * trace.top_k
    layers = range(trace.num_layers)
    recall = {name: [0.0] * len(layers) for name in BUDGETS}
    covered, issued = [0] * len(layers), [0] * len(layers)
    for token in range(half, trace.num_tokens):
        for layer in layers:
            row = scores[token, layer].tolist()
            needed = set(trace.experts[token, layer].tolist())
            order = sorted(range(len(row)), key=lambda e: (-row[e], e))
            for name, share in (("1K", 1), ("1.5K", 1.5), ("2K", 2), ("3K", 3)):
                best = set(order[: int(share * trace.top_k)])
                recall[name][layer] += len(best & needed) / unit
            gated = {e for e, score in enumerate(row) if score >= 4 * threshold}
            covered[layer] += len(gated & needed)
            issued[layer] += len(gated)
    return {
        "recall": recall,
        "coverage": [c / unit for c in covered],
        "issue_rate": [i / unit for i in issued],
        "precision": [c / i if i else None for c, i in zip(covered, issued, strict=True)],
    }


SMALL = {
    "odd": markov_trace(num_tokens=301, num_layers=3, num_experts=8, top_k=3, num_sequences=5),
    "one layer": markov_trace(num_tokens=120, num_layers=1, num_experts=6, top_k=2),
    "all experts": markov_trace(num_tokens=60, num_layers=2, num_experts=3, top_k=3),
    "one token": markov_trace(num_tokens=1, num_sequences=1),
    "one expert": markov_trace(num_tokens=40, num_layers=5, num_experts=1, top_k=1),
    "unordered": markov_trace(num_tokens=200, num_experts=12, top_k=4),
}
SMALL["unordered"].info["ordered"] = False


@pytest.mark.parametrize("predictor", ["learned", "paper"])
@pytest.mark.parametrize("name", SMALL)
def test_the_metrics_are_those_of_slow_counting(name, predictor):
    trace = SMALL[name]
    scores = scores_of(trace, predictor)
    threshold = {"learned": -2.25, "paper": 2}[predictor]
    result = replay_trace(trace, config_for(trace), predictor=predictor, threshold=threshold)
    expected = count(trace, scores, threshold)
    for key in ("coverage", "issue_rate"):
        np.testing.assert_allclose(result.per_layer[key], expected[key], rtol=1e-12)
        assert getattr(result, key) == pytest.approx(np.mean(expected[key]))
    for budget in BUDGETS:
        np.testing.assert_allclose(
            result.per_layer["recall"][budget], expected["recall"][budget], rtol=1e-9
        )
        assert result.recall[budget] == pytest.approx(np.mean(expected["recall"][budget]))
    assert result.per_layer["precision"] == pytest.approx(expected["precision"])
    if result.issue_rate:
        assert result.precision == pytest.approx(result.coverage / result.issue_rate)
    assert result.tokens_measured == trace.num_tokens - trace.num_tokens // 2


def test_ties_go_to_the_lowest_index():
    """Nothing is known of the one token that is measured: all scores are equal."""
    experts = np.array([[[5, 0, 3]]], np.uint8)
    info = {"num_layers": 1, "num_experts": 12, "top_k": 3}
    trace = Trace(experts=experts, sequence=np.zeros(1, np.int32), info=info)
    result = replay_trace(trace, config_for(trace))
    # The best 3, 4 (4.5 rounded down), 6 and 9 are the lowest indices.
    assert result.recall == pytest.approx({"1K": 1 / 3, "1.5K": 2 / 3, "2K": 1, "3K": 1})


def test_more_budget_never_recalls_less_and_all_experts_recall_all():
    trace = markov_trace(num_tokens=300, num_experts=8, top_k=3)
    recall = list(replay_trace(trace, config_for(trace)).recall.values())
    assert recall == sorted(recall) and recall[-1] == 1.0


def test_locality_is_learned_and_noise_is_not():
    local = markov_trace(num_tokens=3000, num_experts=16, top_k=2, num_sequences=6)
    flat = markov_trace(
        num_tokens=3000, num_experts=16, top_k=2, num_sequences=6, spatial=0, temporal=0, skew=0
    )
    learned = {n: replay_trace(t, config_for(t)) for n, t in (("local", local), ("flat", flat))}
    paper = replay_trace(local, config_for(local), predictor="paper", issue_rate=2)
    assert learned["local"].recall["1K"] > 0.6
    assert abs(learned["flat"].recall["1K"] - 2 / 16) < 0.02
    ours = replay_trace(local, config_for(local), issue_rate=paper.issue_rate)
    assert ours.issue_rate <= paper.issue_rate + 0.1 and ours.coverage > paper.coverage


@pytest.mark.parametrize("predictor", ["learned", "paper"])
def test_the_future_does_not_change_what_was_predicted(predictor):
    trace = markov_trace(num_tokens=240, num_layers=4, num_experts=8, top_k=2)
    rng = np.random.default_rng(5)
    changed = trace.experts.copy()
    token, layer = 170, 2
    for t, m in [(token, m) for m in range(layer, 4)] + [
        (t, m) for t in range(token + 1, 240) for m in range(4)
    ]:
        changed[t, m] = rng.permutation(8)[:2]
    other = replace(trace, experts=changed)
    before, after = scores_of(trace, predictor), scores_of(other, predictor)
    np.testing.assert_array_equal(before[:token], after[:token])
    np.testing.assert_array_equal(before[token, : layer + 1], after[token, : layer + 1])
    assert (before != after).any()


@pytest.mark.parametrize("predictor", ["learned", "paper"])
def test_what_is_issued_for_an_event_does_not_depend_on_the_event(predictor):
    """Only the very last set differs, so every gated set is the same, and all other counts."""
    trace = markov_trace(num_tokens=200, num_layers=3, num_experts=8, top_k=2)
    changed = trace.experts.copy()
    changed[-1, -1] = [e for e in range(8) if e not in changed[-1, -1]][:2]
    other = replace(trace, experts=changed)
    config = config_for(trace)
    one = replay_trace(trace, config, predictor=predictor, threshold=2)
    two = replay_trace(other, config, predictor=predictor, threshold=2)
    assert one.per_layer["issue_rate"] == two.per_layer["issue_rate"]
    assert one.per_layer["coverage"][:-1] == two.per_layer["coverage"][:-1]
    for name in BUDGETS:
        assert one.per_layer["recall"][name][:-1] == two.per_layer["recall"][name][:-1]


def test_a_new_sequence_starts_without_history():
    """Two sequences and one of the same tokens differ from where the second begins, not before."""
    trace = replace(markov_trace(num_tokens=100), sequence=np.zeros(100, np.int32))
    split = replace(trace, sequence=(np.arange(100) >= 60).astype(np.int32))
    whole, parts = scores_of(trace), scores_of(split)
    np.testing.assert_array_equal(whole[:60], parts[:60])
    assert (whole[60] != parts[60]).any()
    np.testing.assert_array_equal(parts[60, 0] % 4, 0)  # the bias alone, in whole units


# Thresholds ---------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.floats(0, 60),
    st.integers(-20, 20),
)
@settings(deadline=None)
def test_the_picked_threshold_is_the_lowest_that_keeps_the_limit(histogram, limit, low):
    picked = pick_threshold(np.array(histogram), limit, low)

    def passing(threshold):
        return sum(n for b, n in enumerate(histogram) if low + b >= threshold)

    assert low <= picked <= low + len(histogram)
    assert passing(picked) <= limit
    assert picked == low or passing(picked - 1) > limit


@pytest.mark.parametrize("predictor", ["learned", "paper"])
def test_the_threshold_is_picked_on_the_settled_warm_up_alone(predictor):
    trace = markov_trace(num_tokens=403, num_layers=3, num_experts=16, top_k=4, num_sequences=3)
    half = 201
    scores = scores_of(trace, predictor)
    seen = scores[half // 2 : half]
    limit = 1.25 * 4 * 3 * len(seen)
    steps = 1 if predictor == "learned" else 4
    lowest = min(
        t
        for t in range(-9000, 9000, steps)
        if (seen >= t).sum() <= limit and (t >= seen.min() or t == -9000)
    )
    result = replay_trace(trace, config_for(trace), predictor=predictor, issue_rate=1.25)
    assert result.threshold == lowest / 4
    expected = count(trace, scores, lowest / 4)
    assert result.issue_rate == pytest.approx(np.mean(expected["issue_rate"]))
    assert result.coverage == pytest.approx(np.mean(expected["coverage"]))
    # What is measured has no say in it, but the hindsight figure is all about it.
    changed = trace.experts.copy()
    changed[half:] = changed[half:][::-1]
    other = replay_trace(
        replace(trace, experts=changed), config_for(trace), predictor=predictor, issue_rate=1.25
    )
    assert other.threshold == result.threshold
    best = result.hindsight
    assert best is not None and best["issue_rate"] <= 1.25
    assert (best["coverage"] >= result.coverage) == (best["threshold"] <= result.threshold)


def test_the_threshold_of_the_configuration_is_the_default():
    trace = markov_trace(num_tokens=200)
    config = config_for(trace, None, ["threshold=-7"])
    by_config, by_argument = (
        replay_trace(trace, config),
        replay_trace(trace, config_for(trace), threshold=-7),
    )
    assert by_config.threshold == by_argument.threshold == -7
    assert by_config.coverage == by_argument.coverage
    assert by_config.hindsight is None
    assert replay_trace(trace, config, predictor="paper").threshold == 2


@pytest.mark.parametrize("predictor", ["learned", "paper"])
def test_every_point_of_a_curve_is_what_its_threshold_gives(predictor):
    trace = markov_trace(num_tokens=300, seed=3)
    config = config_for(trace)
    # The paper's tables learn with the threshold they predict with: 2, unless another is judged.
    curve = replay_trace(trace, config, predictor=predictor, issue_rate=1.5, curve=True).curve
    assert (curve["coverage"][0], curve["issue_rate"][0]) == (0, 0)
    assert (curve["coverage"][-1], curve["issue_rate"][-1]) == (1, config.num_experts / 2)
    assert sorted(curve["coverage"]) == curve["coverage"]
    points = list(
        zip(*(curve[key] for key in ("threshold", "issue_rate", "coverage")), strict=True)
    )
    points = points[::20] if predictor == "learned" else [p for p in points if p[0] == 2]
    assert points
    for threshold, issue_rate, coverage in points:
        one = replay_trace(trace, config, predictor=predictor, threshold=threshold)
        assert (one.issue_rate, one.coverage) == (issue_rate, coverage)


def test_a_threshold_beyond_every_score_issues_nothing_or_all():
    trace = markov_trace(num_tokens=200)
    nothing = replay_trace(trace, config_for(trace), threshold=8191)
    assert (nothing.coverage, nothing.issue_rate, nothing.precision) == (0, 0, None)
    assert nothing.per_layer["precision"] == [None] * 4
    everything = replay_trace(trace, config_for(trace), threshold=-8192)
    assert (everything.coverage, everything.issue_rate) == (1, 4)
    assert json.loads(nothing.to_json())["precision"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "lru"}, "predictor must be learned or paper, not 'lru'"),
        ({"threshold": float("nan")}, "threshold must be -8192 to 8191, not nan"),
        ({"threshold": 8192}, "threshold must be -8192 to 8191, not 8192"),
        ({"threshold": 0.3}, "threshold must be a multiple of 0.25, not 0.3"),
        (
            {"issue_rate": 0},
            "issue_rate must be above 0 and at most 4 (num_experts / top_k), not 0",
        ),
        (
            {"issue_rate": 4.5},
            "issue_rate must be above 0 and at most 4 (num_experts / top_k), not 4.5",
        ),
        (
            {"issue_rate": float("nan")},
            "issue_rate must be above 0 and at most 4 (num_experts / top_k), not nan",
        ),
        ({"threshold": 1, "issue_rate": 1}, "threshold and issue_rate cannot both be given"),
        ({"paper_candidates": 0}, "paper_candidates must be 1 to 256, not 0"),
    ],
)
def test_an_option_that_is_not_allowed_is_named(options, message):
    trace = markov_trace(num_tokens=10)
    with pytest.raises(ReplayError) as caught:
        replay_trace(trace, config_for(trace), **options)
    assert str(caught.value) == message


def test_a_trace_that_does_not_fit_is_refused():
    trace = markov_trace(num_tokens=10)
    with pytest.raises(TraceError, match=r"^trace: num_layers is 4 in the trace, but 5 in the con"):
        replay_trace(trace, EngineConfig(num_layers=5))
    with pytest.raises(TraceError, match=r"^trace: has 1 token; picking a threshold needs 2"):
        replay_trace(trace.head(1), config_for(trace), issue_rate=1)
    assert replay_trace(trace.head(2), config_for(trace), issue_rate=1).tokens == 2


def test_the_result_is_plain_json():
    trace = markov_trace(num_tokens=50)
    result = json.loads(replay_trace(trace, config_for(trace), issue_rate=1).to_json())
    assert {"tokens", "tokens_per_s", "recall", "coverage", "issue_rate", "precision"} < set(result)
    assert list(result["recall"]) == ["1K", "1.5K", "2K", "3K"]
    assert list(result["per_layer"]) == ["recall", "coverage", "issue_rate", "precision"]
    assert len(result["per_layer"]["recall"]["2K"]) == len(result["per_layer"]["precision"]) == 4


# The real trace -----------------------------------------------------------------------------


@needs_gpt_oss
def test_the_first_tokens_of_gpt_oss_are_predicted_as_well_as_they_were():
    trace = load_trace(GPT_OSS).head(5000)
    result = replay_trace(trace, config_for(trace, "gpt_oss_20b"), issue_rate=1.5)
    assert result.recall["1K"] == pytest.approx(0.765, abs=0.005)
    assert result.recall["2K"] == pytest.approx(0.919, abs=0.005)
    assert result.coverage == pytest.approx(0.877, abs=0.005)
    assert result.issue_rate <= 1.5


@needs_gpt_oss
def test_the_figures_of_the_architecture_are_reproduced():
    """Section 10, to the last digit given there, over the whole trace."""
    trace = load_trace(GPT_OSS)
    config = config_for(trace, "gpt_oss_20b")
    result = replay_trace(trace, config, issue_rate=1.5)
    assert [round(v, 3) for v in result.recall.values()] == [0.789, 0.893, 0.933, 0.966]
    assert round(result.per_layer["recall"]["1K"][0], 2) == 0.57
    assert result.hindsight is not None
    assert round(result.hindsight["coverage"] or 0, 3) == 0.903
    assert result.coverage > 0.9 and result.issue_rate <= 1.5
    # The paper's figures there leave out layer 0, and its tables learn with the threshold.
    for candidates, threshold, coverage, issue in (
        (4, 2, 0.802, 1.69),
        (4, 4, 0.652, 1.05),
        (8, 2, 0.829, 1.86),
        (8, 4, 0.717, 1.30),
    ):
        paper = replay_trace(
            trace, config, predictor="paper", threshold=threshold, paper_candidates=candidates
        )
        assert round(float(np.mean(paper.per_layer["coverage"][1:])), 3) == coverage
        assert round(float(np.mean(paper.per_layer["issue_rate"][1:])), 2) == issue
