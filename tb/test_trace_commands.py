# SPDX-License-Identifier: Apache-2.0
"""`stmoe trace info, slice, resample, validate`, and `capture` where its extra is missing."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command import ended, refused
from simulation import IN_REPO
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.trace_statistics import LAGS, trace_statistics
from stmoe_golden.traces import Trace, TraceError, load_trace, save_trace
from test_trace_import import a_trace, same
from trace_faults import good_arrays, write

SHARED = Path(__file__).parents[2] / "shared" / "traces" / "gpt_oss_20b_decode.npz"


@pytest.fixture
def call(capsys):
    return functools.partial(ended, capsys, "trace")


# Version 2 ----------------------------------------------------------------------------------


def changed(path: Path, **arrays) -> Path:
    write(path, **(good_arrays() | arrays))
    return path


def test_what_version_2_brought_is_checked(tmp_path):
    def said(**arrays) -> str:
        path = changed(tmp_path / "t.npz", **arrays)
        with pytest.raises(TraceError) as caught:
            load_trace(path, missing=True)
        return str(caught.value).removeprefix(f"{path}: ")

    present = np.ones((12, 3), np.bool_)
    present[5, 1] = False
    info = {"num_layers": 3, "num_experts": 8, "top_k": 2}
    assert said(version=np.array(3)) == "version is 3, but this stmoe reads 1 to 2"
    assert said(version=np.array([2])) == "version must be one integer, not int64 of shape [1]"
    assert said(phase=np.full(12, 2, np.uint8)) == (
        "phase: token 0 has 2, but a phase is 0 (prefill) or 1 (decode)"
    )
    assert said(phase=np.zeros(12, int)) == "phase must be uint8, not int64"
    assert said(phase=np.zeros(11, np.uint8)) == "phase must have shape [12], not [11]"
    assert said(present=present[:, :2]) == "present must have shape [12, 3], not [12, 2]"
    assert said(present=present).startswith("experts: token 5, layer 1 is not present, so its ")
    for sizes, message in (
        (7, "info expert_bytes must be a list of 3 integers, one per layer, not 7"),
        ([1, 2], "info expert_bytes must be a list of 3 integers, one per layer, not one of 2"),
        ([1, 2, 0], "info expert_bytes of layer 2 must be an integer, 1 or more, not 0"),
    ):
        assert said(info=np.array(json.dumps(info | {"expert_bytes": sizes}))) == message


def test_a_trace_with_missing_cells_is_kept_whole_but_never_replayed(tmp_path, call):
    trace, path = a_trace(), tmp_path / "t.npz"
    save_trace(trace, path)
    same(load_trace(path, missing=True), trace)
    why = (
        "4 of 40 tokens lack the routing of some layer (first: token 0, layer 2); a replay needs "
        "all: `stmoe trace slice --complete` keeps the tokens that have them"
    )
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value) == f"{path}: {why}"
    status, out, _ = call("validate", path)
    assert status == 0 and out.endswith(f"legal, but cannot be replayed: {why}\n")
    assert call("slice", path, "--complete", "-o", tmp_path / "c.npz")[0] == 0
    assert load_trace(tmp_path / "c.npz").num_tokens == 36
    assert call("validate", tmp_path / "c.npz")[1].endswith("legal, and can be replayed\n")


def test_validate_refuses_weights_that_rise(tmp_path, call):
    trace = a_trace()
    trace.weights[9, 1] = [0.25, 0.5]
    save_trace(trace, tmp_path / "t.npz")
    assert refused(call("validate", tmp_path / "t.npz")) == (
        f"{tmp_path}/t.npz: weights: token 9, layer 1 has 0.5 after 0.25, but sets are heaviest "
        "first unless info says ordered: false"
    )
    save_trace(replace(trace, info=trace.info | {"ordered": False}), tmp_path / "t.npz")
    assert call("validate", tmp_path / "t.npz")[0] == 0


# Slices -------------------------------------------------------------------------------------


def test_slices_are_those_parts(tmp_path, call):
    trace, path, out = a_trace(), tmp_path / "t.npz", tmp_path / "o.npz"
    save_trace(trace, path)

    def cut(*arguments: object) -> Trace:
        status, _, err = call("slice", path, "-o", out, *arguments)
        assert (status, err) == (0, "")
        return load_trace(out, missing=True)

    same(cut(), trace)
    same(cut("--tokens", "5:9"), replace(trace.take(slice(5, 9)), present=None))
    same(cut("--sequences", "1"), replace(trace.take(trace.sequence == 1), present=None))
    decode = cut("--phase", "decode", "--tokens", ":3")
    assert decode.token_id.tolist() == trace.token_id[trace.phase == 1][:3].tolist()
    last = cut("--layers", "1:")
    np.testing.assert_array_equal(last.experts, trace.experts[:, 1:])
    np.testing.assert_array_equal(last.present, trace.present[:, 1:])
    assert last.info["model_layers"] == [1, 2] and last.expert_bytes == [4096, 2048]
    assert last.num_layers == 2


def test_a_resampled_trace_has_the_shape_that_was_asked_for(tmp_path, call):
    out = tmp_path / "o.npz"

    def made(*arguments):
        assert call("resample", IN_REPO, "-o", out, "--tokens", "30", *arguments)[0] == 0
        trace = load_trace(out)
        assert trace.num_tokens == 30
        return trace

    for arguments, shape in (
        (["--preset", "gpt_oss_20b"], (24, 32, 4)),
        (["--preset", "tiny", "--top-k", "3"], (4, 8, 3)),
        (["--experts", "64"], (8, 64, 4)),
    ):
        trace = made(*arguments)
        assert (trace.num_layers, trace.num_experts, trace.top_k) == shape
        assert trace.info["source"].startswith("resampled(")
    same = made("--experts", "64", "--seed", "1")
    assert (same.experts == trace.experts).all()
    assert (made("--experts", "64", "--seed", "2").experts != trace.experts).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a shape is needed: --preset, or --layers, --experts and --top-k"),
        (["--preset", "huge"], "unknown preset 'huge'; presets are tiny, "),
        (["--experts", "300"], "num_experts must be 1 to 256, not 300"),
        (["--experts", "3"], "top_k must be at most num_experts (3), not 4"),
        (["--preset", "tiny", "--seed", "-1"], "argument --seed: must be 0 or more, not -1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(arguments, message, tmp_path, call):
    text = refused(call("resample", IN_REPO, "-o", tmp_path / "o.npz", *arguments))
    assert message in text and not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "5:5"], "argument --tokens: must be A:B with 0 <= A < B (either may be left "
         "out), or one number, not '5:5'"),
        (["--tokens", "9:41"], "{path}: --tokens must be within 0:40, not 9:41"),
        (["--layers", "3:"], "{path}: --layers must be within 0:3, not 3:"),
        (["--sequences", "2"], "{path}: --sequences must be within 0:2, not 2:3"),
        (["--phase", "all"], "argument --phase: invalid choice: 'all' (choose from prefill, "
         "decode)"),
    ],
)  # fmt: skip
def test_a_slice_that_is_not_there_is_refused(arguments, message, tmp_path, call):
    path = tmp_path / "t.npz"
    save_trace(a_trace(), path)
    text = refused(call("slice", path, "-o", tmp_path / "o.npz", *arguments))
    assert text.replace("'", "") == message.format(path=path).replace("'", "")
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_phases_that_are_not_known_are_said_so(tmp_path, call):
    trace = replace(markov_trace(num_tokens=20), info=markov_trace(num_tokens=20).info)
    save_trace(trace, tmp_path / "t.npz")
    assert call("slice", tmp_path / "t.npz", "-o", tmp_path / "o.npz", "--phase", "decode")[0] == 0
    assert refused(
        call("slice", tmp_path / "t.npz", "-o", tmp_path / "o.npz", "--phase", "prefill")
    ) == (f"{tmp_path}/t.npz: --phase prefill: the tokens' phases are not in it; all are decode")


# Statistics ---------------------------------------------------------------------------------


def naive_repeat(trace: Trace, lag: int) -> float:
    kept = pairs = 0
    for token in range(lag, trace.num_tokens):
        if trace.sequence[token] != trace.sequence[token - lag]:
            continue
        for layer in range(trace.num_layers):
            if trace.present is not None and not (
                trace.present[token, layer] and trace.present[token - lag, layer]
            ):
                continue
            pairs += trace.top_k
            kept += len(
                set(trace.experts[token, layer].tolist())
                & set(trace.experts[token - lag, layer].tolist())
            )
    return kept / pairs


def naive_recall(trace: Trace, kind: str) -> float:
    """The same predictors with dictionaries, asked before they are told."""
    counts, seen = {}, {}
    hits = needed = 0
    here = np.ones((trace.num_tokens, trace.num_layers), bool)
    here = here if trace.present is None else trace.present
    for t in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            now = trace.experts[t, layer].tolist()
            if not here[t, layer]:
                continue
            if kind == "popularity":
                before = [0]
            elif kind == "previous_layer":
                before = (
                    trace.experts[t, layer - 1].tolist() if layer and here[t, layer - 1] else []
                )
            else:
                same_sequence = t and trace.sequence[t] == trace.sequence[t - 1]
                good = same_sequence and here[t - 1, layer]
                before = trace.experts[t - 1, layer].tolist() if good else []
            if not before:
                continue
            if t >= trace.num_tokens // 2:
                scores = np.zeros(trace.num_experts, np.float32)
                for i in before:
                    n = np.float32(seen.get((layer, i), 0))
                    for e in range(trace.num_experts):
                        if n:
                            count = np.float32(counts.get((layer, i, e), 0))
                            scores[e] += count * (1 if kind == "popularity" else 1 / n)
                best = np.argsort(-scores, kind="stable")[: trace.top_k]
                hits += len(set(best.tolist()) & set(now))
                needed += trace.top_k
            for i in before:
                seen[layer, i] = seen.get((layer, i), 0) + 1
                for e in now:
                    counts[layer, i, e] = counts.get((layer, i, e), 0) + 1
    return hits / needed


@pytest.mark.parametrize("missing", [False, True])
def test_the_statistics_are_those_of_a_naive_count(missing):
    trace = a_trace(tokens=160, missing=missing, num_experts=16, top_k=3)
    found = trace_statistics(trace)
    for lag in LAGS:
        key = str(lag)
        assert found["repeat_rate"]["by_lag"][key]["mean"] == pytest.approx(
            naive_repeat(trace, lag)
        )
    recall = found["first_order_recall"]
    for kind in ("previous_layer", "previous_token"):
        assert recall[kind]["mean"] == pytest.approx(naive_recall(trace, kind), abs=0.01)
    assert recall["chance"]["popularity"]["mean"] == pytest.approx(
        naive_recall(trace, "popularity"), abs=1e-9
    )
    assert found["missing_cells"] == (4 if missing else 0)
    assert found["phase_tokens"] == {"prefill": 12, "decode": 148}


def test_routing_at_random_shows_nothing_beyond_chance():
    trace = markov_trace(
        num_tokens=3000, num_experts=16, top_k=4, spatial=0, temporal=0, skew=0, seed=2
    )
    found = trace_statistics(trace)
    repeat, recall, load = found["repeat_rate"], found["first_order_recall"], found["load"]
    assert repeat["chance"] == {"uniform": 0.25, "load": pytest.approx(0.25, abs=0.005)}
    for rate in repeat["by_lag"].values():
        assert rate["mean"] == pytest.approx(0.25, abs=0.01)
    for kind in ("previous_layer", "previous_token"):
        assert recall[kind]["mean"] == pytest.approx(0.25, abs=0.02)
    assert load["busiest"]["mean"] == pytest.approx(load["busiest_by_chance"], abs=0.03)
    assert load["effective_experts"]["mean"] > 15.9
    skewed = trace_statistics(markov_trace(num_tokens=500, num_experts=16, top_k=4, skew=3))
    assert skewed["load"]["busiest"]["mean"] > 2 and skewed["load"]["top_quarter"]["mean"] > 0.5
    assert skewed["repeat_rate"]["chance"]["load"] > 0.4


def test_info_prints_json_and_a_page(tmp_path, call):
    save_trace(a_trace(), tmp_path / "t.npz")
    status, out, err = call("info", tmp_path / "t.npz", "--json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    found = json.loads(out)
    assert found["tokens"] == 40 and found["expert_bytes"] == [4096, 4096, 2048]
    status, out, err = call("info", tmp_path / "t.npz")
    assert (status, err) == (0, "") and "12 prefill, 28 decode" in out
    assert "2,048 to 4,096" in out and "40 tokens of 2 sequences (20 to 20, median 20)" in out
    save_trace(markov_trace(num_tokens=1, num_sequences=1), tmp_path / "one.npz")
    assert call("info", tmp_path / "one.npz")[0] == call("info", tmp_path / "one.npz", "--json")[0]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/traces is not here")
def test_info_of_70756_tokens_agrees_with_what_is_known_of_them(call):
    status, out, _ = call("info", SHARED, "--json")
    found = json.loads(out)
    assert (status, found["tokens"], found["sequences"]) == (0, 70756, 234)
    # From the file's own description.
    assert found["repeat_rate"]["by_lag"]["1"]["mean"] == pytest.approx(0.437, abs=0.001)
    assert found["repeat_rate"]["chance"]["uniform"] == 0.125


# Capture without its extra ------------------------------------------------------------------


def test_capture_without_torch_says_what_to_install(tmp_path):
    """In a process whose torch cannot be imported, whether it is installed or not."""
    code = (
        "import sys; sys.modules['torch'] = None; from stmoe import cli; "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "trace", "capture", "m", "--prompts", "p", "-o",
         str(tmp_path / "o.npz")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(
        "stmoe: trace capture needs torch and transformers: pip install 'stmoe[capture]'"
    )
    assert list(tmp_path.iterdir()) == []
