# SPDX-License-Identifier: Apache-2.0
"""Trace files: what is refused and how, and that anything else survives the round trip."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from stmoe_golden.config import ConfigError, EngineConfig, preset
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import Trace, TraceError, config_for, load_trace, replacing, save_trace
from trace_faults import FAULTS, good_arrays, write


def refused(path) -> str:
    """What :func:`load_trace` says of ``path``, without the path itself."""
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_file_that_is_no_trace_is_refused_with_what_is_wrong(fault, tmp_path):
    path = tmp_path / "bad.npz"
    fault.make(path)
    assert fault.message.fullmatch(refused(path)), refused(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    assert refused(tmp_path / "no.npz") == "No such file or directory"
    assert refused(tmp_path) == "is a directory; a trace is an .npz file"
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == "is not a regular file; a trace is an .npz file"


def test_every_cut_of_a_trace_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    write(path, **good_arrays())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path)


def test_a_damaged_byte_never_raises_anything_else(tmp_path):
    """Every byte in turn is flipped: the file is refused, or what it holds is a legal trace."""
    path = tmp_path / "t.npz"
    write(path, **good_arrays())
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        for mask in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            try:
                trace = load_trace(path)
            except TraceError as error:
                assert str(error).startswith(f"{path}: ")
            else:
                assert trace.experts.max() < trace.num_experts


def test_a_header_that_lies_about_its_size_costs_no_memory(tmp_path):
    path = tmp_path / "t.npz"
    write(path, **good_arrays())
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 3, 2)}
    )
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members["experts.npy"] = huge.getvalue() + b"\0" * 12
    with zipfile.ZipFile(path, "w") as new:
        for name, text in members.items():
            new.writestr(name, text)
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == (f"experts cannot be read: 12 bytes of data, but its header says {6 << 40}")
    assert peak < 1 << 20


@pytest.mark.parametrize("optional", [False, True])
def test_what_is_saved_loads_equal(optional, tmp_path):
    trace = markov_trace(num_tokens=50, num_experts=300 if optional else 8, top_k=3)
    if optional:
        weights = np.linspace(0, 1, trace.experts.size, dtype=np.float32)
        trace = replace(
            trace,
            weights=weights.reshape(trace.experts.shape),
            token_id=np.arange(50, dtype=np.int32),
        )
    save_trace(trace, tmp_path / "t.npz")
    loaded = load_trace(tmp_path / "t.npz")
    assert loaded.info == trace.info and loaded.path == tmp_path / "t.npz"
    for name in ("experts", "sequence", "weights", "token_id"):
        before, after = getattr(trace, name), getattr(loaded, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    assert (loaded.num_tokens, loaded.num_layers, loaded.top_k) == (50, 4, 3)
    assert loaded.num_sequences == 4


def test_other_byte_orders_and_array_orders_are_understood(tmp_path):
    arrays = good_arrays()
    write(
        tmp_path / "t.npz",
        **arrays
        | {
            "experts": np.asfortranarray(arrays["experts"]),
            "sequence": arrays["sequence"].astype(">i4"),
        },
    )
    trace = load_trace(tmp_path / "t.npz")
    np.testing.assert_array_equal(trace.experts, arrays["experts"])
    np.testing.assert_array_equal(trace.sequence, arrays["sequence"])
    assert trace.experts.flags.c_contiguous and trace.sequence.dtype == np.int32
    assert trace.sequence.dtype.isnative


def test_saving_refuses_what_loading_would_and_leaves_nothing(tmp_path):
    trace = markov_trace(num_tokens=4)
    trace.experts[2, 1] = 5
    with pytest.raises(TraceError, match=r"token 2, layer 1 uses expert 5 more than once"):
        save_trace(trace, tmp_path / "t.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link"
    link.symlink_to(path)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink() and path.read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_device_is_written_to_not_replaced():
    with replacing(os.devnull) as file:
        file.write(b"x")
    assert not os.path.isfile(os.devnull)


def test_head_takes_the_first_tokens_of_every_array():
    trace = replace(markov_trace(num_tokens=20), token_id=np.arange(20, dtype=np.int32))
    head = trace.head(7)
    assert head.num_tokens == len(head.sequence) == len(head.token_id) == 7
    np.testing.assert_array_equal(head.experts, trace.experts[:7])
    assert trace.head(1000).num_tokens == 20
    with pytest.raises(TraceError, match=r"^trace: tokens must be 1 or more, not 0$"):
        trace.head(0)


def test_starts_marks_the_first_token_of_each_sequence():
    trace = replace(markov_trace(num_tokens=6), sequence=np.array([3, 3, 4, 9, 9, 9], np.int32))
    assert trace.starts().tolist() == [True, False, True, True, False, False]
    assert trace.num_sequences == 3


def test_the_synthetic_trace_is_seeded_legal_and_local():
    trace = markov_trace(num_tokens=400, num_experts=16, top_k=4, seed=3)
    again = markov_trace(num_tokens=400, num_experts=16, top_k=4, seed=3)
    other = markov_trace(num_tokens=400, num_experts=16, top_k=4, seed=4)
    np.testing.assert_array_equal(trace.experts, again.experts)
    assert (trace.experts != other.experts).any()

    def repeats(t: Trace) -> float:
        same = t.experts[1:, :, :, None] == t.experts[:-1, :, None, :]
        return float(same.any(-1).mean())

    flat = markov_trace(
        num_tokens=400, num_experts=16, top_k=4, spatial=0, temporal=0, skew=0, seed=3
    )
    assert abs(repeats(flat) - 0.25) < 0.02
    assert repeats(trace) > 0.35


# Configurations -----------------------------------------------------------------------------


def shaped(num_layers=4, num_experts=8, top_k=2, **info) -> Trace:
    experts = np.tile(np.arange(top_k, dtype=np.uint16), (2, num_layers, 1))
    shape = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    return Trace(experts=experts, sequence=np.zeros(2, np.int32), info=shape | info)


def test_without_a_preset_the_shape_is_the_traces():
    assert config_for(shaped(24, 32, 4)) == EngineConfig(
        num_layers=24, num_experts=32, top_k=4, quota=8, axi_data_width=128
    )
    assert config_for(shaped(2, 3, 1)).quota == 1
    assert config_for(shaped(2, 1, 1)).quota == 0
    assert config_for(shaped(256, 256, 16)).quota == 15  # 4,096 slots at most
    assert config_for(shaped(), settings=["quota=0", "threshold=-9"]).threshold == -9


def test_a_preset_must_have_the_traces_shape():
    trace = shaped(24, 32, 4)
    assert config_for(trace, "gpt_oss_20b") == preset("gpt_oss_20b")
    for other, settings, message in (
        (trace, ["num_experts=64"], "num_experts is 32 in the trace, but 64 in the settings"),
        (shaped(24, 64, 4), [], "num_experts is 64 in the trace, but 32 in preset gpt_oss_20b"),
        (shaped(23, 32, 4), [], "num_layers is 23 in the trace, but 24 in preset gpt_oss_20b"),
        (shaped(24, 32, 2), [], "top_k is 2 in the trace, but 4 in preset gpt_oss_20b"),
    ):
        with pytest.raises(TraceError) as caught:
            config_for(other, "gpt_oss_20b", settings)
        assert str(caught.value) == f"trace: {message}"
    with pytest.raises(ConfigError, match=r"^unknown preset 'gpt'"):
        config_for(trace, "gpt")
    with pytest.raises(ConfigError, match=r"^weight_bits must be 4 to 12, not 3$"):
        config_for(trace, None, ["weight_bits=3"])


def test_a_trace_too_large_for_an_engine_is_refused_as_such():
    with pytest.raises(TraceError) as caught:
        config_for(shaped(4, 512, 8))
    assert str(caught.value) == "trace: num_experts must be 1 to 256, not 512"


def test_info_is_kept_whole(tmp_path):
    trace = shaped(ordered=False, sequences=[{"dataset": "ä", "tokens": 2}])
    save_trace(trace, tmp_path / "t.npz")
    loaded = load_trace(tmp_path / "t.npz")
    assert json.dumps(loaded.info) == json.dumps(trace.info)
    assert not loaded.ordered and shaped().ordered
