# SPDX-License-Identifier: Apache-2.0
"""Files that are not routing traces, each with what must be said of it.

Used on :func:`stmoe_golden.traces.load_trace` by ``test_traces.py`` and on the command line by
``test_cli.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stmoe_golden.synthetic import markov_trace

INFO = {"num_layers": 3, "num_experts": 8, "top_k": 2}


@dataclass(frozen=True)
class Fault:
    """``make`` writes the file; ``message`` is all of the error but the path before it."""

    name: str
    make: Callable[[Path], None]
    message: re.Pattern[str]


def good_arrays() -> dict[str, Any]:
    """A legal trace of 12 tokens, with everything optional."""
    trace = markov_trace(num_tokens=12, num_layers=3, num_experts=8, top_k=2, num_sequences=2)
    return {
        "experts": trace.experts,
        "weights": np.full(trace.experts.shape, 127, np.uint8),
        "sequence": trace.sequence,
        "token_id": np.arange(12, dtype=np.int32),
        "info": np.array(json.dumps(INFO)),
    }


def write(path: Path, **arrays: Any) -> None:
    """An .npz file of any arrays, legal or not."""
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _changed(**changes: Any) -> Callable[[Path], None]:
    """The good trace with some arrays replaced, or without those that are None."""

    def make(path: Path) -> None:
        arrays = good_arrays() | changes
        write(path, **{key: value for key, value in arrays.items() if value is not None})

    return make


def _info(**changes: Any) -> Callable[[Path], None]:
    info = {key: value for key, value in (INFO | changes).items() if value is not None}
    return _changed(info=np.array(json.dumps(info)))


def _edited(key: str, index: Any, value: Any) -> Callable[[Path], None]:
    """The good trace with some elements of one array changed."""
    array = good_arrays()[key].copy()
    array[index] = value
    return _changed(**{key: array})


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, good_arrays()["experts"])


def _cut(path: Path) -> None:
    write(path, **good_arrays())
    path.write_bytes(path.read_bytes()[:-40])


def _flipped(path: Path) -> None:
    """One bit of the data of ``experts``, so that only the checksum can tell."""
    write(path, **good_arrays())
    data = bytearray(path.read_bytes())
    at = data.find(good_arrays()["experts"].tobytes())
    data[at] ^= 1
    path.write_bytes(data)


def _objects(key: str) -> Callable[[Path], None]:
    array = np.empty(12, object)
    array[:] = "x"
    return _changed(**{key: array})


def _fault(
    name: str, make: Callable[[Path], None], message: str, *, pattern: bool = False
) -> Fault:
    return Fault(name, make, re.compile(message if pattern else re.escape(message)))


_FLOAT = np.full((12, 3, 2), 0.5, np.float32)
_NAN = _FLOAT.copy()
_NAN[4, 1, 1] = np.nan

FAULTS = [
    _fault("empty", _bytes(b""), "not an .npz file, or a cut one: File is not a zip file"),
    _fault(
        "text",
        _bytes(b"# route_trace v1\n" * 9),
        "not an .npz file, or a cut one: File is not a zip file",
    ),
    _fault("one array", _npy, "not an .npz file, or a cut one: File is not a zip file"),
    _fault("cut", _cut, "not an .npz file, or a cut one: .+", pattern=True),
    _fault("flipped bit", _flipped, "experts cannot be read: Bad CRC-32 for file 'experts.npy'"),
    _fault(
        "no experts",
        _changed(experts=None),
        "has no array experts; a trace needs experts, info, sequence",
    ),
    _fault(
        "no sequence",
        _changed(sequence=None),
        "has no array sequence; a trace needs experts, info, sequence",
    ),
    _fault(
        "no info", _changed(info=None), "has no array info; a trace needs experts, info, sequence"
    ),
    _fault(
        "pickled experts",
        _objects("experts"),
        "experts holds pickled Python objects, which are never loaded",
    ),
    _fault(
        "pickled info",
        _objects("info"),
        "info holds pickled Python objects, which are never loaded",
    ),
    _fault(
        "pickled weights",
        _objects("weights"),
        "weights holds pickled Python objects, which are never loaded",
    ),
    _fault(
        "info is a number",
        _changed(info=np.array(3)),
        "info must be one JSON text, not int64 of shape []",
    ),
    _fault(
        "info is a list of texts",
        _changed(info=np.array(["{}", "{}"])),
        "info must be one JSON text, not <U2 of shape [2]",
    ),
    _fault(
        "info is not JSON",
        _changed(info=np.array("{num_layers: 3}")),
        "info is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    _fault(
        "info is nested too deeply",
        _changed(info=np.array("[" * 99999)),
        "info is not JSON: maximum recursion depth exceeded.*",
        pattern=True,
    ),
    _fault(
        "info is a JSON list",
        _changed(info=np.array("[1]")),
        "info must be a JSON object, not list",
    ),
    _fault(
        "info lacks num_experts",
        _info(num_experts=None),
        "info has no num_experts; it needs num_layers, num_experts, top_k",
    ),
    _fault("info has a text", _info(num_layers="3"), "info num_layers must be an integer, not '3'"),
    _fault("info has a fraction", _info(top_k=2.0), "info top_k must be an integer, not 2.0"),
    _fault(
        "info has a truth", _info(num_experts=True), "info num_experts must be an integer, not True"
    ),
    _fault("info has a zero", _info(num_layers=0), "info num_layers must be 1 to 65536, not 0"),
    _fault(
        "info is out of range",
        _info(num_experts=65537),
        "info num_experts must be 1 to 65536, not 65537",
    ),
    _fault(
        "info has more in a set than experts",
        _info(num_experts=1),
        "info top_k must be at most num_experts (1), not 2",
    ),
    _fault(
        "info has an odd order", _info(ordered="no"), "info ordered must be true or false, not 'no'"
    ),
    _fault(
        "other layers",
        _info(num_layers=4),
        "experts has shape [12, 3, 2], but info num_layers is 4",
    ),
    _fault("other top_k", _info(top_k=3), "experts has shape [12, 3, 2], but info top_k is 3"),
    _fault(
        "signed experts",
        _changed(experts=good_arrays()["experts"].astype(np.int64)),
        "experts must be uint8 or uint16, not int64",
    ),
    _fault(
        "float experts", _changed(experts=_FLOAT), "experts must be uint8 or uint16, not float32"
    ),
    _fault(
        "flat experts",
        _changed(experts=good_arrays()["experts"][:, 0]),
        "experts must have shape [tokens, layers, top_k], not [12, 2]",
    ),
    _fault(
        "no tokens",
        _changed(experts=np.empty((0, 3, 2), np.uint8)),
        "experts has no tokens; at least 1 is needed",
    ),
    _fault(
        "expert out of range",
        _edited("experts", (7, 2, 1), 8),
        "experts: token 7, layer 2 uses expert 8, but experts are 0 to 7",
    ),
    _fault(
        "expert twice",
        _edited("experts", (5, 1), 6),
        "experts: token 5, layer 1 uses expert 6 more than once; the experts of a set must differ",
    ),
    _fault(
        "wide sequence",
        _changed(sequence=np.zeros(12, np.int64)),
        "sequence must be int32, not int64",
    ),
    _fault(
        "short sequence",
        _changed(sequence=np.zeros(11, np.int32)),
        "sequence must have shape [12], one per token, not [11]",
    ),
    _fault(
        "square sequence",
        _changed(sequence=np.zeros((12, 1), np.int32)),
        "sequence must have shape [12], one per token, not [12, 1]",
    ),
    _fault(
        "sequence goes back",
        _edited("sequence", slice(9, None), -1),
        "sequence: token 9 has number -1 after 1; sequence numbers must not decrease",
    ),
    _fault(
        "float token_id",
        _changed(token_id=np.zeros(12, np.float32)),
        "token_id must be int32, not float32",
    ),
    _fault(
        "long token_id",
        _changed(token_id=np.zeros(13, np.int32)),
        "token_id must have shape [12], one per token, not [13]",
    ),
    _fault(
        "negative token_id",
        _edited("token_id", 3, -5),
        "token_id: token 3 has id -5, but ids are 0 or more",
    ),
    _fault(
        "wide weights",
        _changed(weights=np.zeros((12, 3, 2))),
        "weights must be uint8, uint16, float16 or float32, not float64",
    ),
    _fault(
        "flat weights",
        _changed(weights=np.zeros((12, 6), np.uint8)),
        "weights must have shape [12, 3, 2], that of experts, not [12, 6]",
    ),
    _fault(
        "weight is no number",
        _changed(weights=_NAN),
        "weights: token 4, layer 1 has weight nan, but weights are finite and not negative",
    ),
]
