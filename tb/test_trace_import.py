# SPDX-License-Identifier: Apache-2.0
"""Importers: what they read is what was written, in whatever order it came; what they refuse, and
how; and that they need little more memory than the trace that comes out."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command import ended, refused
from stmoe import cli
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.trace_import import BLOCK, ImportOptions, detect_format, import_traces
from stmoe_golden.traces import DECODE, PREFILL, Trace, TraceError, load_trace, save_trace

SHARED = Path(__file__).parents[2] / "shared" / "traces"


def a_trace(tokens=40, missing=True, **shape) -> Trace:
    """Two sequences with everything a trace can have, and the last layer missing at first."""
    trace = markov_trace(num_tokens=tokens, num_layers=3, num_sequences=2, **shape)
    rng = np.random.default_rng(5)
    weights = -np.sort(-rng.random(trace.experts.shape, np.float32), axis=2)
    at = np.arange(tokens) - np.flatnonzero(trace.starts())[trace.sequence]
    present = np.ones((tokens, 3), np.bool_)
    experts = trace.experts.copy()
    if missing:
        present[:4, 2] = False
        experts[~present] = 0
        weights[~present] = 0
    return replace(
        trace,
        experts=experts,
        weights=weights,
        token_id=rng.integers(0, 1000, tokens).astype(np.int32),
        phase=np.where(at < 6, PREFILL, DECODE).astype(np.uint8),
        present=present if missing else None,
        info=dict(trace.info, expert_bytes=[4096, 4096, 2048]),
    )


def same(one: Trace, other: Trace, *without: str) -> None:
    for key in {"experts", "sequence", "weights", "token_id", "phase", "present"} - set(without):
        a, b = getattr(one, key), getattr(other, key)
        assert (a is None) == (b is None), key
        if a is not None:
            np.testing.assert_array_equal(a, b, key)
    for key in ("num_layers", "num_experts", "top_k"):
        assert one.info[key] == other.info[key]


def step_of(trace: Trace, token: int) -> int:
    return token - int(np.flatnonzero(trace.starts())[trace.sequence[token]])


def cells(trace: Trace):
    for token in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            if trace.present is None or trace.present[token, layer]:
                yield token, layer


def route_csv(trace: Trace, order=None) -> list[str]:
    info = trace.info
    lines = [
        "# route_trace v1",
        f"# model=/data/m.gguf arch=x n_layer={info['num_layers']} "
        f"n_expert={info['num_experts']} n_expert_used={info['top_k']}",
        *(
            f"# layer={n} expert_bytes={size} dense_bytes=7"
            for n, size in enumerate(trace.expert_bytes)
        ),
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
    ]
    rows = [
        f"{trace.sequence[t]},{trace.phase[t]},{step_of(trace, t)},{layer},{k},"
        f"{trace.experts[t, layer, k]},{float(trace.weights[t, layer, k])},0,4096"
        for t, layer in cells(trace)
        for k in range(trace.top_k)
    ]
    return lines + (rows if order is None else [rows[n] for n in order(len(rows))])


def jsonl(trace: Trace) -> list[str]:
    return [
        json.dumps({"num_experts": trace.num_experts, "model": "m"}),
        *(
            json.dumps(
                {
                    "sequence": int(trace.sequence[t]),
                    "token": step_of(trace, t),
                    "layer": layer,
                    "ids": trace.experts[t, layer].tolist(),
                    "weights": [float(w) for w in trace.weights[t, layer]],
                    "phase": ["prefill", "decode"][trace.phase[t]],
                    "token_id": int(trace.token_id[t]),
                }
            )
            for t, layer in cells(trace)
        ),
    ]


def write(path: Path, lines: list[str], end="\n") -> Path:
    path.write_text(end.join(lines) + end, newline="")
    return path


# What is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["as run", "shuffled"])
def test_route_csv_reads_what_was_routed(order, tmp_path):
    trace = a_trace()
    shuffle = None if order == "as run" else np.random.default_rng(1).permutation
    path = write(tmp_path / "t.csv", route_csv(trace, shuffle), "\r\n")
    found = import_traces([path])
    same(found, trace, "token_id")
    assert found.info["model"] == "m.gguf" and found.expert_bytes == [4096, 4096, 2048]


def test_jsonl_reads_what_was_routed_in_any_order(tmp_path):
    trace = a_trace(num_experts=300, top_k=3)
    lines = jsonl(trace)
    same(import_traces([write(tmp_path / "a.jsonl", lines)]), trace)
    body = [lines[1 + n] for n in np.random.default_rng(2).permutation(len(lines) - 1)]
    same(import_traces([write(tmp_path / "b.jsonl", [lines[0], "", *body])]), trace)


def test_jsonl_takes_the_names_of_other_loggers_and_infers_the_shape(tmp_path):
    lines = [
        '{"layer": 1, "token_idx": 0, "topk_ids": [3, 1], "topk_weights": [1, 0.5]}',
        '{"layer": 4, "token_idx": 0, "topk_ids": [2, 0], "topk_weights": [1, 0.5]}',
    ]
    trace = import_traces([write(tmp_path / "a.jsonl", lines)])
    assert trace.experts.tolist() == [[[3, 1], [2, 0]]] and trace.present is None
    assert trace.info["model_layers"] == [1, 4]  # the others have no experts
    assert (trace.num_experts, trace.info["num_experts_inferred"]) == (4, True)
    stated = import_traces([tmp_path / "a.jsonl"], None, ImportOptions(num_experts=64))
    assert stated.num_experts == 64 and "num_experts_inferred" not in stated.info


def routed(trace: Trace, sequence: int) -> np.ndarray:
    """As vLLM keeps it: a row for every layer of the model, zero in its dense first layer."""
    part = trace.experts[trace.sequence == sequence].astype(np.int16)
    return np.concatenate([np.zeros_like(part[:, :1]), part], axis=1)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("form", ["npy", "npz", "split npz", "base64", "lists", "one object"])
def test_vllm_output_reads_what_was_routed(form, tmp_path):
    trace = a_trace()
    prompts = [6, 6]
    paths = []
    for n, prompt in enumerate(prompts):
        ids = trace.token_id[trace.sequence == n].tolist()
        array, path = routed(trace, n), tmp_path / f"{n}"
        if form == "npy":
            path.write_bytes(npy(array))
        elif form == "npz":
            with path.open("wb") as file:
                np.savez(
                    file, routed_experts=array, prompt_token_ids=ids[:prompt],
                    token_ids=[*ids[prompt:], 1],
                )  # fmt: skip
        elif form == "split npz":
            with path.open("wb") as file:
                np.savez(file, routed_experts=array[prompt:], prompt_routed_experts=array[:prompt])
        else:
            encoded = base64.b64encode(npy(array)).decode()
            choice = {"routed_experts": array.tolist() if form == "lists" else encoded}
            entry = {"choices": [choice], "usage": {"prompt_tokens": prompt}}
            if form == "one object":
                entry = choice | {"prompt_token_ids": ids[:prompt], "token_ids": ids[prompt:]}
            path.write_text(json.dumps(entry, indent=1 if form == "lists" else None))
        paths.append(path)
    assert detect_format(paths[0]) == "vllm"
    options = ImportOptions(num_experts=8, prompt_tokens=6 if form == "npy" else None)
    found = import_traces(paths, None, options)
    has_ids = form in ("npz", "one object")
    same(found, trace, "weights", *([] if has_ids else ["token_id"]))
    assert found.info["model_layers"] == [1, 2, 3] and found.weights is None


def logits_of(trace: Trace) -> np.ndarray:
    """[layers, tokens, experts] whose best K are the trace's sets, heaviest first."""
    tokens, layers, top_k = trace.experts.shape
    logits = np.full((layers, tokens, trace.num_experts), -9, np.float32)
    for rank in range(top_k):
        np.put_along_axis(
            logits, trace.experts[:, :, rank : rank + 1].transpose(1, 0, 2).astype(int),
            np.float32(top_k - rank), axis=2,
        )  # fmt: skip
    return logits


@pytest.mark.parametrize("form", ["arr", "one", "batch", "pt"])
def test_router_logits_read_as_their_best_experts(form, tmp_path):
    trace = a_trace(missing=False)
    logits, half = logits_of(trace), trace.num_tokens // 2
    path = tmp_path / "t"
    if form == "pt":
        torch = pytest.importorskip("torch", reason="torch is not here (extra `capture`)")
        torch.save({"router_logits": tuple(torch.from_numpy(x) for x in logits)}, path)
    elif form == "batch":  # padded on the left, as for generation
        mask = np.ones((2, half + 3), np.int64)
        mask[:, :3] = 0
        ids = np.zeros_like(mask)
        ids[:, 3:] = trace.token_id.reshape(2, half)
        padded = np.full((3, 2, half + 3, trace.num_experts), 5, np.float32)
        padded[:, :, 3:] = logits.reshape(3, 2, half, -1)
        layers = {f"router_logits_{n}": padded[n] for n in range(3)}
        with path.open("wb") as file:
            np.savez(file, attention_mask=mask, input_ids=ids, **layers)
    else:
        with path.open("wb") as file:
            np.savez(file, *logits) if form == "arr" else np.savez(file, router_logits=logits)
    assert detect_format(path) == "router-logits"
    found = import_traces([path], None, ImportOptions(top_k=2, prompt_tokens=6))
    if form == "batch":
        same(found, trace, "weights")
    else:
        np.testing.assert_array_equal(found.experts, trace.experts)
        assert found.num_sequences == 1
    heavy = 1 / (1 + np.exp(-1))  # softmax over the chosen two, whose logits are 2 and 1
    np.testing.assert_allclose(found.weights[..., 0], heavy, rtol=1e-6)


def test_a_trace_of_version_1_converts_to_itself(tmp_path):
    trace = a_trace()
    with (tmp_path / "old.npz").open("wb") as file:
        np.savez(file, info=np.array(json.dumps(trace.info)), **trace.arrays())
    assert cli.main(["trace", "convert", f"{tmp_path}/old.npz", "-o", f"{tmp_path}/n.npz"]) == 0
    same(load_trace(tmp_path / "n.npz", missing=True), trace)
    with np.load(tmp_path / "n.npz") as file:
        assert int(file["version"]) == 2


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/traces is not here")
@pytest.mark.parametrize(
    ("name", "shape", "missing"),
    [
        ("gemma", (157, 30, 128, 6), 0),
        ("gptoss", (149, 36, 128, 2), 84),
        ("qwen", (156, 48, 128, 6), 27),
    ],
)
def test_the_phones_traces_are_read_whole(name, shape, missing):
    path = SHARED / f"{name}.route.csv"
    trace = import_traces([path])
    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == shape
    absent = 0 if trace.present is None else int((~trace.present).sum())
    assert absent == missing and (trace.phase == DECODE).sum() == 128 - 64 * (name == "gptoss")
    # An independent reading of a few rows.
    rows = [line.split(",") for line in path.read_text().splitlines() if line[0].isdigit()]
    for row in rows[:: len(rows) // 50]:
        phase, step, layer, slot, expert = map(int, row[1:6])
        assert trace.experts[step, layer, slot] == expert and trace.phase[step] == phase
        assert trace.weights[step, layer, slot] == np.float32(row[6])


# What is refused ----------------------------------------------------------------------------


def convert(capsys, tmp_path, *arguments) -> str:
    """What a refused `stmoe trace convert` says; nothing may be left behind."""
    before = sorted(tmp_path.iterdir())
    message = refused(ended(capsys, "trace", "convert", *arguments, "-o", tmp_path / "o.npz"))
    assert sorted(tmp_path.iterdir()) == before
    return message


CSV_FAULTS = {
    "0,1,9,0,0,1,0.5,0": "must have 9 fields (turn,phase,step,layer,slot,expert,weight,"
    "residency,expert_bytes), not 8",
    "0,1,9,0,0,8,0.5,0,0": "expert: must be an integer 0 to 7, not 8",
    "0,1,9,3,0,1,0.5,0,0": "layer: must be an integer 0 to 2, not 3",
    "0,1,9,0,2,1,0.5,0,0": "slot: must be an integer 0 to 1, not 2",
    "0,2,9,0,0,1,0.5,0,0": "phase: must be an integer 0 to 1, not 2",
    "0,1,x,0,0,1,0.5,0,0": "step: must be an integer 0 to 2147483647, not x",
    "0,1,9,0,0,1.5,0.5,0,0": "expert: must be an integer 0 to 7, not 1.5",
    "0,1,9,0,0,1,nan,0,0": "weight: must be a number, 0 or more, not nan",
    "0,1,9,0,0,1,1e39,0,0": "weight: must be a number, 0 or more, not 1e39",
    "0,1,9,0,0,1,-1,0,0": "weight: must be a number, 0 or more, not -1",
    "0,1,9,0,0,1,0.5,2,0": "residency: must be an integer 0 to 1, not 2",
    "0,1,9,0,0,,0.5,0,0": "expert: must be an integer 0 to 7, not nothing",
    "\u00e9": "must have 9 fields (turn,phase,step,layer,slot,expert,weight,residency,"
    "expert_bytes), not 1",
    "0,0,0,0,1,1,0.5,0,0": "slot: 1 of layer 0 came before for the same token",
}


@pytest.mark.parametrize("line", CSV_FAULTS)
def test_a_malformed_row_is_named_by_file_line_and_field(line, tmp_path, capsys):
    lines = route_csv(a_trace())
    lines.insert(20, line)
    path = write(tmp_path / "t.csv", lines)
    assert convert(capsys, tmp_path, path) == f"{path}: line 21: {CSV_FAULTS[line]}"


def test_a_malformed_row_far_into_a_file_has_its_own_number(tmp_path, capsys):
    trace = a_trace(num_experts=64, top_k=8, tokens=12000, missing=False)
    lines = route_csv(trace)
    lines[-3] += "x"
    path = write(tmp_path / "t.csv", lines)
    assert path.stat().st_size > 2 * BLOCK
    assert convert(capsys, tmp_path, path) == (
        f"{path}: line {len(lines) - 2}: expert_bytes: must be an integer 0 to 9007199254740991, "
        "not 4096x"
    )


HEADER_FAULTS = [
    (0, "# route_trace v2", "line 1: must be '# route_trace v1', not '# route_trace v2'"),
    (1, "# model=x n_layer=3 n_expert=8", "line 6: the header before it has no n_expert_used=N"),
    (1, "# n_layer=3 n_expert=8 n_expert_used=9",
     "line 6: n_expert_used: must be an integer 1 to 8, not 9"),
    (2, "# layer=0 expert_bytes=big",
     "line 3: expert_bytes: must be an integer 1 to 9007199254740991, not big"),
    (3, "#", "its header has no expert_bytes of layer 1"),
    (5, "turn,step", "line 6: columns: must be turn,phase,step,layer,slot,expert,weight,residency,"
     "expert_bytes, not turn,step"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "line", "message"), HEADER_FAULTS)
def test_a_malformed_header_is_named(at, line, message, tmp_path, capsys):
    lines = route_csv(a_trace())
    lines[at] = line
    path = write(tmp_path / "t.csv", lines)
    assert convert(capsys, tmp_path, path) == f"{path}: {message}"


def test_a_cut_off_cell_is_named_by_token_and_layer(tmp_path, capsys):
    path = write(tmp_path / "t.csv", route_csv(a_trace())[:-1])
    assert convert(capsys, tmp_path, path) == (
        f"{path}: sequence 1, token 19, layer 2 has 1 experts, but top_k is 2"
    )


JSON_FAULTS = {
    '{"layer": 0, "token": 99}': "ids: must be a list of 2 different integers 0 to 7, not missing",
    '{"layer": 0, "token": 99, "ids": [1, 1]}': "ids: must be a list of 2 different integers 0 to "
    "7, not [1, 1]",
    '{"layer": 0, "token": 99, "ids": [1, 8]}': "ids: must be a list of 2 different integers 0 to "
    "7, not [1, 8]",
    '{"layer": 0, "token": 99, "ids": [1]}': "ids: must be a list of 2 different integers 0 to 7, "
    "not [1]",
    '{"layer": -1, "token": 99, "ids": [1, 2]}': "layer: must be an integer 0 to 65535, not -1",
    '{"layer": 0, "token": true, "ids": [1, 2]}': "token: must be an integer 0 to 1099511627775, "
    "not true",
    '{"layer": 0, "ids": [1, 2]}': "token: must be an integer 0 to 1099511627775, not missing",
    '{"token": 99, "ids": [1, 2]}': "layer: must be an integer 0 to 65535, not missing",
    '{"layer": 0, "token": 99, "ids": [1, 2], "weights": [1]}': "weights: must be a list of 2 "
    "numbers, 0 or more, not [1]",
    '{"layer": 0, "token": 99, "ids": [1, 2], "weights": [1, NaN]}': "weights: must be a list of "
    "2 numbers, 0 or more, not [1, NaN]",
    '{"layer": 0, "token": 99, "ids": [1, 2]}': "weights: all cells must have them, or none",
    '{"layer": 0, "token": 99, "ids": [1, 2], "weights": [1, 0], "phase": "x"}': "phase: must be "
    "prefill, decode, 0 or 1, not x",
    '{"layer": 0, "token": 0, "ids": [1, 2], "weights": [1, 0], "token_id": -4}': "token_id: must "
    "be an integer 0 to 2147483647, not -4",
    '{"layer": 0, "token": 0, "ids": [1, 2], "weights": [1, 0]}': "layer: 0 came before for the "
    "same token",
    '{"layer": 0, "token": 0, "ids": [1, 2], "weights": [1, 0], "phase": 1}': "phase: is 1, but "
    "the same token had 0 before",
    '{"layer": 0, "token": 99, "ids": [1, 2], "weights": [1, 1e39]}': "weights: must be a list of "
    "2 numbers, 0 or more, not [1, 1e+39]",
    '{"layer": 0,': "is not JSON: Expecting property name enclosed in double quotes: line 1 column "
    "13 (char 12)",
    "[1, 2]": "must be a JSON object, not list",
}  # fmt: skip


@pytest.mark.parametrize("line", JSON_FAULTS)
def test_a_malformed_object_is_named_by_file_line_and_field(line, tmp_path, capsys):
    lines = jsonl(a_trace())
    lines.insert(20, line)
    path = write(tmp_path / "t.jsonl", lines)
    assert convert(capsys, tmp_path, path) == f"{path}: line 21: {JSON_FAULTS[line]}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"num_experts": 0}', "num_experts: must be an integer 1 to 65536, not 0"),
        ('{"expert_bytes": [1]}', "expert_bytes: needs num_layers beside it"),
        ('{"num_layers": 3, "expert_bytes": 5}', "expert_bytes: must be a list of 3 integers, 1 "
         "or more, not 5"),
        ('{"ordered": "no"}', "ordered: must be true or false, not no"),
    ],
)  # fmt: skip
def test_a_malformed_head_of_json_lines_is_named(line, message, tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", ["", line, *jsonl(a_trace())[1:]])
    assert convert(capsys, tmp_path, path) == f"{path}: line 2: {message}"


@pytest.mark.parametrize("form", ["csv", "jsonl", "vllm", "npy", "logits"])
def test_damaged_files_are_read_or_refused_but_raise_nothing_else(form, tmp_path):
    """A byte or a stretch of each is changed, cut out or doubled, many times over."""
    trace = a_trace(tokens=12)
    encoded = base64.b64encode(npy(routed(trace, 0))).decode()
    path = tmp_path / "t"
    if form == "logits":
        with path.open("wb") as file:
            np.savez(file, *logits_of(trace))
    else:
        path.write_bytes(
            {
                "csv": lambda: "\n".join(route_csv(trace)).encode(),
                "jsonl": lambda: "\n".join(jsonl(trace)).encode(),
                "vllm": lambda: json.dumps({"choices": [{"routed_experts": encoded}]}).encode(),
                "npy": lambda: npy(routed(trace, 0)),
            }[form]()
        )
    whole = path.read_bytes()
    rng = np.random.default_rng(11)
    options = ImportOptions(top_k=2 if form == "logits" else None)
    read = 0
    for _ in range(300):
        data = bytearray(whole)
        at = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 200)))
        size = int(rng.integers(1, 12))
        change = rng.integers(4)
        if change == 0:
            data[at] = int(rng.choice(list(b'0-9,.e:"[]{}x\n\xff')))
        elif change == 1:
            del data[at : at + size]
        elif change == 2:
            data[at:at] = data[at : at + size]
        else:
            data = data[:at]
        path.write_bytes(data)
        try:
            save_trace(import_traces([path], None, options), tmp_path / "o.npz")
            read += 1
        except TraceError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{tmp_path}/")
    assert read < 300


def test_malformed_arrays_are_named(tmp_path, capsys):
    def said(name: str, *options, content=None, **arrays) -> str:
        path = tmp_path / name
        if content is None:
            with path.open("wb") as file:
                np.savez(file, **arrays)
        else:
            path.write_bytes(content)
        text = convert(capsys, tmp_path, path, *options)
        assert text.startswith(f"{path}: "), text
        return text.removeprefix(f"{path}: ")

    ids = np.array([[[1, 2], [3, 3]], [[4, 5], [6, 7]]])
    assert said("a", "--experts", 6, routed_experts=ids) == (
        "routed_experts: token 1, layer 1: expert must be 0 to 5, not 6"
    )
    wide = np.array([[[1, 2, 1]]])
    assert said("b", routed_experts=wide) == (
        "routed_experts: token 0, layer 0 names an expert more than once"
    )
    assert said("c", content=npy(np.zeros((2, 3)))) == (
        "the array must be integers of shape [tokens, layers, top_k], not float64 of shape [2, 3]"
    )
    assert said("d", content=npy(ids)[:-8]) == (
        "cannot be read: it is cut: 2 rows in its header, fewer in the file"
    )
    assert said("e", content=b'{"choices": [{"text": ""}]}') == (
        "line 1: routed_experts: is missing; start vLLM with --enable-return-routed-experts"
    )
    assert said("f", content=b'{"routed_experts": "!"}').startswith(
        "line 1: routed_experts: is no base64 .npy file and no array: "
    )
    logits = np.zeros((2, 3, 4), np.float32)
    assert said("g", router_logits=logits) == (
        "router logits do not say how many experts are used: give --top-k"
    )
    assert said("h", "--top-k", 5, router_logits=logits) == "--top-k must be 1 to 4, not 5"
    logits[1, 2, 0] = np.nan
    assert said("i", "--top-k", 2, router_logits=logits) == (
        "router_logits of layer 1: row 2 has a logit that is not finite"
    )
    assert said("j", "--top-k", 2, arr_0=logits[0], arr_1=logits[0][:2]) == (
        "arr_1 must have shape [tokens, experts] or [batch, tokens, experts], that of the other "
        "layers, not [2, 4]"
    )
    assert said("k", x=ids).startswith("none of its arrays is known (x); ")
    assert said("l", content=b"hello\n").startswith("its format is not known by its content; ")
    assert said("m", content=b"") == said("n", content=b"\0\0")
    assert convert(capsys, tmp_path, tmp_path / "no") == f"{tmp_path}/no: No such file or directory"
    assert "is a directory" in convert(capsys, tmp_path, tmp_path)


def test_a_conversion_that_fails_keeps_the_file_that_was_there(tmp_path, capsys):
    path = write(tmp_path / "t.csv", ["# route_trace v1", "x"])
    save_trace(a_trace(), tmp_path / "o.npz")
    before = (tmp_path / "o.npz").read_bytes()
    convert(capsys, tmp_path, path)
    assert (tmp_path / "o.npz").read_bytes() == before


# Memory -------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from stmoe import cli
import stmoe_golden.trace_commands, stmoe_golden.trace_import
def peak():  # VmHWM begins anew with a process; ru_maxrss is inherited
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
before = peak()
assert cli.main(["trace", "convert", *sys.argv[1:]]) == 0
print(peak() - before)
"""


def test_reading_takes_a_fraction_of_the_files_memory(tmp_path):
    """Two runs, 20 MB and 74 MB of JSON lines: what the process takes but for the trace's own
    arrays may not grow with the file. The difference leaves out what the machine's libraries
    take once; the whole process is measured, so that no allocation escapes."""
    layers, top_k = 48, 8
    rng = np.random.default_rng(1)
    sets = [json.dumps(rng.permutation(128)[:top_k].tolist()) for _ in range(997)]
    weights = json.dumps([0.125] * top_k)

    def measured(tokens: int) -> tuple[int, int]:
        """The file's bytes, and the peak of memory beyond the arrays."""
        path = tmp_path / f"{tokens}.jsonl"
        with path.open("w") as file:
            file.write('{"num_layers": 48, "num_experts": 128, "top_k": 8}\n')
            for token in range(tokens):
                file.writelines(
                    f'{{"token": {token}, "layer": {layer}, "ids": {sets[(token + layer) % 997]}, '
                    f'"weights": {weights}}}\n'
                    for layer in range(layers)
                )
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, path, "-o", tmp_path / "t.npz"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        trace = load_trace(tmp_path / "t.npz")
        assert trace.num_tokens == tokens
        arrays = sum(array.nbytes for array in trace.arrays().values())
        return path.stat().st_size, int(done.stdout.split()[-1]) - arrays

    (small, least), (large, most) = measured(3000), measured(11000)
    # 0.17 of it is measured; a file held whole, as bytes or as text, would add more than 1.
    grown = (most - least) / (large - small)
    assert small > 4 * BLOCK and grown < 0.5, (small, least, large, most)


def test_numbers_of_sequences_go_on_from_file_to_file(tmp_path):
    trace = a_trace()
    path = write(tmp_path / "t.csv", route_csv(trace))
    both = import_traces([path, path])
    assert both.num_sequences == 4 and both.num_tokens == 2 * trace.num_tokens
    np.testing.assert_array_equal(both.sequence[trace.num_tokens :], trace.sequence + 2)
    with pytest.raises(TraceError, match="a trace is converted alone"):
        save_trace(trace, tmp_path / "t.npz")
        import_traces([tmp_path / "t.npz", path])
