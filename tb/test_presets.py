# SPDX-License-Identifier: Apache-2.0
"""Presets: their document, and the routing that they are simulated with."""

from __future__ import annotations

import numpy as np
import pytest

import presets
from stmoe_golden.config import PRESETS, preset
from stmoe_golden.resample import resampled
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import load_trace


def test_document_is_up_to_date() -> None:
    assert presets.DOCUMENT.read_text() == presets.markdown(), (
        "python tb/presets.py --markdown > docs/presets.md"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_legal_trace_with_two_sequences(name: str, monkeypatch) -> None:
    monkeypatch.setattr(presets, "REAL", {})
    config = preset(name)
    trace, source = presets.trace_for(name, 100)
    assert source == "resampled from olmoe_stdlib_8x32.npz"
    assert trace.experts.shape == (100, config.num_layers, config.top_k)
    assert trace.experts.max() < config.num_experts
    ordered = np.sort(trace.experts, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    assert list(np.nonzero(np.diff(trace.sequence))[0]) == [49]


def test_resampling_to_as_many_experts_only_renames_them() -> None:
    source = load_trace(presets.IN_REPO).head(300)
    config = preset("tiny").replace(num_layers=8, num_experts=32, top_k=4)
    made = resampled(source, config)
    for layer in range(8):
        pairs = set(zip(source.experts[:, layer].flat, made.experts[:, layer].flat, strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert (resampled(source, config, seed=2).experts != made.experts).any()


def test_resampled_sets_repeat_from_token_to_token_as_the_source_does() -> None:
    def repeats(experts: np.ndarray) -> float:
        kept = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(axis=3)
        return float(kept.mean())

    source = markov_trace(num_tokens=400, num_layers=4, num_experts=16, top_k=4, temporal=3.0)
    config = preset("tiny").replace(num_layers=6, num_experts=32, top_k=6)
    assert abs(repeats(resampled(source, config).experts) - repeats(source.experts)) < 0.1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "unknown preset 'nothing'; presets are tiny"),
        (["tiny", "--tokens", "0"], "tokens"),
        (["tiny", "--tokens", "9999"], "olmoe_stdlib_8x32.npz: tokens must be 1 to 7658, not 9999"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, capsys, monkeypatch) -> None:
    monkeypatch.setattr(presets, "REAL", {})
    try:
        status = presets.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    assert status == 2 and says in out.err and out.err.count("\n") == 1
