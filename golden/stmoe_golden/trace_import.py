# SPDX-License-Identifier: Apache-2.0
"""Reads routing that other programs have written into a :class:`Trace`.

==================  =============================================================================
``trace``           this project's own .npz (:mod:`stmoe_golden.traces`), and its elder siblings
``route-csv``       ``route_trace v1`` text, as BigMoeOnEdge writes it
``vllm``            vLLM's returned routed experts: .npy or .npz of [tokens, layers, top_k], or
                    the JSON of responses, one or one a line
``router-logits``   what Hugging Face models give for ``output_router_logits``: .npz or .pt
``jsonl``           a JSON object a line with layer, token and ids
==================  =============================================================================

Text is read in blocks and arrays in chunks, so the memory needed is that of the trace. Anything
that is wrong raises a :class:`TraceError` of one line that names the file, the line where there
are lines, the field, and what is allowed. docs/traces.md describes each format.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .trace_builder import STEP_BITS, CellError, TraceBuilder
from .traces import DECODE, PREFILL, Archive, Trace, TraceError, load_trace, read_rows, reason

__all__ = ["FORMATS", "ImportOptions", "detect_format", "import_traces"]

FORMATS = ("trace", "route-csv", "vllm", "router-logits", "jsonl")
BLOCK = 1 << 22
"""Bytes of text, and about the bytes of arrays, that are looked at together."""

LONGEST_LINE = 1 << 28
"""Bytes; a response with routed experts is one line."""

MAX_NUMBER = (1 << 31) - 1
MAX_WEIGHT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ImportOptions:
    """What a file may not say of itself; None is what it says, or not known."""

    num_experts: int | None = None
    top_k: int | None = None
    prompt_tokens: int | None = None
    """Of each sequence, where the phases are not in the file."""
    model: str | None = None


class _LineError(Exception):
    """A malformed line; its file and number are put before the text."""


# Text in blocks -----------------------------------------------------------------------------


def _blocks(file: IO[bytes], name: str) -> Iterator[tuple[int, list[bytes]]]:
    """Whole lines without their ends, in blocks, each with the number of its first line."""
    number, rest = 1, b""
    while data := file.read(BLOCK):
        head, newline, tail = data.rpartition(b"\n")
        if not newline:
            rest += data
            if len(rest) > LONGEST_LINE:
                raise TraceError(
                    f"{name}: line {number}: longer than {LONGEST_LINE} bytes; not a text of lines"
                )
            continue
        lines = (rest + head).split(b"\n")
        rest = tail
        yield number, lines
        number += len(lines)
    if rest:
        yield number, [rest]


def _text(line: bytes) -> str:
    try:
        return line.rstrip(b"\r").decode()
    except UnicodeDecodeError:
        raise _LineError("is not UTF-8 text") from None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return (text if len(text) <= 40 else text[:37] + "...") or "nothing"


def _whole(field: str, text: str, low: int, high: int) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or value != int(value):
        raise _LineError(f"{field}: must be an integer {low} to {high}, not {_shown(text)}")
    return int(value)


# route_trace v1 -----------------------------------------------------------------------------

COLUMNS = [
    *("turn", "phase", "step", "layer", "slot", "expert"),
    *("weight", "residency", "expert_bytes"),
]
ROUTE_MAGIC = "# route_trace v1"


def _header_fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", line))


class _RouteCsv:
    """One file of ``route_trace v1``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, str] = {}
        self.sizes: dict[int, int] = {}
        self.layers = self.experts = self.top_k = 0

    def header(self, number: int, line: bytes) -> bool:
        """A line before the rows; true for the last one, which names the columns."""
        text = _text(line)
        if number == 1:
            if text.strip() != ROUTE_MAGIC:
                raise _LineError(f"must be {ROUTE_MAGIC!r}, not {_shown(text)!r}")
        elif text.startswith("#"):
            fields = _header_fields(text)
            if "layer" in fields:
                layer = _whole("layer", fields["layer"], 0, 65535)
                if "expert_bytes" in fields:
                    self.sizes[layer] = _whole(
                        "expert_bytes", fields["expert_bytes"], 1, (1 << 53) - 1
                    )
            else:
                self.fields |= fields
        elif text.split(",") != COLUMNS:
            raise _LineError(f"columns: must be {','.join(COLUMNS)}, not {_shown(text)}")
        else:
            for key in ("n_layer", "n_expert", "n_expert_used"):
                if key not in self.fields:
                    raise _LineError(f"the header before it has no {key}=N")
            self.layers = _whole("n_layer", self.fields["n_layer"], 1, 65536)
            self.experts = _whole("n_expert", self.fields["n_expert"], 1, 65536)
            self.top_k = _whole("n_expert_used", self.fields["n_expert_used"], 1, self.experts)
            return True
        return False

    def limits(self) -> list[tuple[int, int]]:
        """Lowest and highest value of each integer column up to ``expert``."""
        return [
            (0, MAX_NUMBER),
            (0, 1),
            (0, MAX_NUMBER),
            (0, self.layers - 1),
            (0, self.top_k - 1),
            (0, self.experts - 1),
        ]

    def row(self, line: bytes) -> list[float]:
        """A row, read with care; whatever is wrong with it is said."""
        texts = _text(line).split(",")
        if len(texts) != len(COLUMNS):
            raise _LineError(
                f"must have {len(COLUMNS)} fields ({','.join(COLUMNS)}), not {len(texts)}"
            )
        values: list[float] = [
            _whole(field, text, low, high)
            for field, text, (low, high) in zip(COLUMNS, texts, self.limits(), strict=False)
        ]
        try:
            weight = float(texts[6])
        except ValueError:
            weight = math.nan
        if not 0 <= weight <= MAX_WEIGHT:
            raise _LineError(f"weight: must be a number, 0 or more, not {_shown(texts[6])}")
        return [
            *values,
            weight,
            _whole("residency", texts[7], 0, 1),
            _whole("expert_bytes", texts[8], 0, (1 << 53) - 1),
        ]

    def fast(self, lines: list[bytes]) -> np.ndarray | None:
        """All rows at once, or None where one of them wants a closer look."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = np.loadtxt(lines, np.float64, delimiter=",", comments=None, ndmin=2)
        except ValueError:
            return None
        if rows.shape != (len(lines), len(COLUMNS)):
            return None
        whole = np.delete(rows, 6, axis=1)
        if not (np.isfinite(rows).all() and (rows >= 0).all() and (whole == whole // 1).all()):
            return None
        high = [limit for _, limit in self.limits()]
        if (rows[:, :6] > high).any() or (rows[:, 6:8] > [MAX_WEIGHT, 1]).any():
            return None
        return rows


def _read_route_csv(
    file: IO[bytes], name: str, builder: TraceBuilder, base: int, info: dict[str, Any]
) -> int:
    """Add a file's rows; returns the sequences that it may have used."""
    source = _RouteCsv(name)
    last = 0

    def take(rows: np.ndarray, number: int) -> None:
        nonlocal last
        turn, phase, step, layer, slot, expert = (rows[:, c].astype(np.int64) for c in range(6))
        last = max(last, int(turn.max()))
        if last + base > MAX_NUMBER:
            raise TraceError(
                f"{name}: line {number + int(turn.argmax())}: turn: must be an integer 0 to "
                f"{MAX_NUMBER - base} after the files before it, not {last}"
            )
        try:
            slots = builder.tokens(turn + base, (phase << STEP_BITS) + step)
            builder.note(slots, phase=phase)
            builder.put(slots, layer, expert, rows[:, 6].astype(np.float32), slot)
        except CellError as error:
            raise TraceError(
                f"{name}: line {number + error.at}: {error.field}: {error.text}"
            ) from None

    in_rows = False
    for number, lines in _blocks(file, name):
        while lines and not in_rows:
            with _at(name, number):
                in_rows = source.header(number, lines[0])
            number, lines = number + 1, lines[1:]
            if in_rows:
                for key, value in (
                    ("num_layers", source.layers),
                    ("num_experts", source.experts),
                    ("top_k", source.top_k),
                ):
                    known = getattr(builder, key)
                    if known not in (None, value):
                        raise TraceError(f"{name}: {key} is {value}, but {known} before")
                    setattr(builder, key, value)
        if not lines:
            continue
        rows = source.fast(lines)
        if rows is None:
            found = []
            for offset, line in enumerate(lines):
                with _at(name, number + offset):
                    found.append(source.row(line))
            rows = np.array(found)
        take(rows, number)
    if not in_rows:
        raise TraceError(f"{name}: ends before its line of columns; not {ROUTE_MAGIC!r} text")
    info.setdefault("model", os.path.basename(source.fields.get("model", "")) or None)
    if source.sizes:
        lacking = [layer for layer in range(source.layers) if layer not in source.sizes]
        if lacking:
            raise TraceError(f"{name}: its header has no expert_bytes of layer {lacking[0]}")
        info.setdefault("expert_bytes", [source.sizes[layer] for layer in range(source.layers)])
    return last + 1


@contextlib.contextmanager
def _at(name: str, number: int) -> Iterator[None]:
    try:
        yield
    except _LineError as error:
        raise TraceError(f"{name}: line {number}: {error}") from None
    except CellError as error:
        raise TraceError(f"{name}: line {number}: {error.field}: {error.text}") from None


# Generic JSON lines -------------------------------------------------------------------------

ALIASES = {
    "ids": ("ids", "experts", "topk_ids"),
    "weights": ("weights", "topk_weights"),
    "token": ("token", "token_idx"),
    "sequence": ("sequence",),
    "layer": ("layer",),
    "phase": ("phase",),
    "token_id": ("token_id",),
}
PHASES = {"prefill": PREFILL, "decode": DECODE, 0: PREFILL, 1: DECODE}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_text(line))
    except (ValueError, RecursionError) as error:
        raise _LineError(f"is not JSON: {reason(error)}") from None
    if not isinstance(value, dict):
        raise _LineError(f"must be a JSON object, not {type(value).__name__}")
    return value


def _field(entry: dict[str, Any], field: str) -> Any:
    for name in ALIASES[field]:
        if name in entry:
            return entry[name]
    return None


def _index(entry: dict[str, Any], field: str, high: int, default: int | None = None) -> int:
    value = _field(entry, field)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        found = "missing" if value is None else _shown(value)
        raise _LineError(f"{field}: must be an integer 0 to {high}, not {found}")
    return value


def _jsonl_sets(ids: Any, weights: Any, top_k: int | None, high: int) -> None:
    """Look closely at one cell's ids and weights; whatever is wrong with them is said."""
    if (
        not isinstance(ids, list)
        or not ids
        or (top_k is not None and len(ids) != top_k)
        or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= high for i in ids)
        or len(set(ids)) != len(ids)
    ):
        found = "missing" if ids is None else _shown(ids)
        many = "" if top_k is None else f"{top_k} "
        raise _LineError(
            f"ids: must be a list of {many}different integers 0 to {high}, not {found}"
        )
    if weights is not None and (
        not isinstance(weights, list)
        or len(weights) != len(ids)
        or not all(
            isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w <= MAX_WEIGHT
            for w in weights
        )
    ):
        raise _LineError(
            f"weights: must be a list of {len(ids)} numbers, 0 or more, not {_shown(weights)}"
        )


def _jsonl_fast(
    cells: list[tuple[int, int, Any, Any]], high: int
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Ids and weights of many cells, or None where one of them wants a closer look."""
    try:
        ids = np.array([cell[2] for cell in cells])
        values = None if cells[0][3] is None else np.array([cell[3] for cell in cells])
    except (ValueError, OverflowError):  # of different lengths, or beyond any integer
        return None
    if ids.dtype.kind != "i" or ids.ndim != 2 or ids.min() < 0 or ids.max() > high:
        return None
    ranked = np.sort(ids, axis=1)
    if (ranked[:, 1:] == ranked[:, :-1]).any():
        return None
    if values is None:
        return ids, None
    if values.dtype.kind not in "if" or values.shape != ids.shape:
        return None
    if not ((values >= 0) & (values <= MAX_WEIGHT)).all():
        return None
    return ids, values.astype(np.float32)


def _jsonl_cell(
    entry: dict[str, Any], builder: TraceBuilder, base: int
) -> tuple[int, int, Any, Any]:
    """Token, layer, ids and weights; the last two are not looked at yet."""
    layer = _index(entry, "layer", (builder.num_layers or 65536) - 1)
    token = _index(entry, "token", (1 << STEP_BITS) - 1)
    sequence = _index(entry, "sequence", MAX_NUMBER - base, 0)
    slot = builder.token(sequence + base, token)
    phase = _field(entry, "phase")
    if phase is not None:
        if isinstance(phase, bool) or not isinstance(phase, str | int) or phase not in PHASES:
            raise _LineError(f"phase: must be prefill, decode, 0 or 1, not {_shown(phase)}")
        builder.note(slot, phase=PHASES[phase])
    if _field(entry, "token_id") is not None:
        builder.note(slot, token_id=_index(entry, "token_id", MAX_NUMBER))
    return slot, layer, _field(entry, "ids"), _field(entry, "weights")


def _jsonl_header(entry: dict[str, Any], builder: TraceBuilder, info: dict[str, Any]) -> None:
    for key in ("num_layers", "num_experts", "top_k"):
        value = entry.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
            raise _LineError(f"{key}: must be an integer 1 to 65536, not {_shown(value)}")
        known = getattr(builder, key)
        if known not in (None, value):
            raise _LineError(f"{key}: is {value}, but {known} before")
        setattr(builder, key, value)
    if "expert_bytes" in entry:
        sizes = entry["expert_bytes"]
        if builder.num_layers is None:
            raise _LineError("expert_bytes: needs num_layers beside it")
        if (
            not isinstance(sizes, list)
            or len(sizes) != builder.num_layers
            or not all(
                isinstance(n, int) and not isinstance(n, bool) and 1 <= n < 1 << 63 for n in sizes
            )
        ):
            raise _LineError(
                f"expert_bytes: must be a list of {builder.num_layers} integers, 1 or more, "
                f"not {_shown(sizes)}"
            )
    if not isinstance(entry.get("ordered", True), bool):
        raise _LineError(f"ordered: must be true or false, not {_shown(entry['ordered'])}")
    for key in entry:
        if key not in ("num_layers", "num_experts", "top_k"):
            info.setdefault(key, entry[key])


BATCH = 8192


def _read_jsonl(
    file: IO[bytes], name: str, builder: TraceBuilder, base: int, info: dict[str, Any]
) -> int:
    batch: list[tuple[int, int, Any, Any]] = []
    numbers: list[int] = []
    last, fresh = 0, True

    def flush() -> None:
        if not batch:
            return
        high = (builder.num_experts or 65536) - 1
        fast = _jsonl_fast(batch, high)
        if fast is None:
            for number, (_, _, ids, gate) in zip(numbers, batch, strict=True):
                with _at(name, number):
                    _jsonl_sets(ids, gate, builder.top_k, high)
                    if (gate is None) != (batch[0][3] is None):
                        raise _LineError("weights: all cells must have them, or none")
            weights = [cell[3] for cell in batch]
            fast = (
                np.array([cell[2] for cell in batch], np.int64),
                None if weights[0] is None else np.array(weights, np.float32),
            )
        slots, layers = (np.array([cell[i] for cell in batch], np.int64) for i in (0, 1))
        try:
            builder.put(slots, layers, *fast)
        except CellError as error:
            raise TraceError(
                f"{name}: line {numbers[error.at]}: {error.field}: {error.text}"
            ) from None
        batch.clear()
        numbers.clear()

    for first, lines in _blocks(file, name):
        for number, line in enumerate(lines, first):
            if not line.strip():
                continue
            with _at(name, number):
                entry = _object(line)
                if fresh and "layer" not in entry and "token" not in entry:
                    fresh = False
                    _jsonl_header(entry, builder, info)
                    continue
                fresh = False
                cell = _jsonl_cell(entry, builder, base)
                if builder.top_k is None or b"true" in line or b"false" in line:
                    high = (builder.num_experts or 65536) - 1
                    _jsonl_sets(cell[2], cell[3], builder.top_k, high)
                    builder.top_k = len(cell[2])
            last = max(last, entry.get("sequence") or 0)
            batch.append(cell)
            numbers.append(number)
            if len(batch) == BATCH:
                flush()
    flush()
    return last + 1


# vLLM ---------------------------------------------------------------------------------------


def _put_routed(
    part: np.ndarray, first: int, sequence: int, builder: TraceBuilder, what: str
) -> None:
    """Tokens ``first``... of a sequence, [tokens, layers, top_k].

    vLLM keeps a row for every layer of the model: one without experts stays 0 (or -1 where
    routing is unknown), so a set of equal numbers is no routing.
    """
    tokens, layers, top_k = part.shape
    ids = part.astype(np.int64)
    routed = ids.min(axis=2) >= 0
    if top_k > 1:
        routed &= ids.min(axis=2) != ids.max(axis=2)
    slots = builder.tokens(
        np.full(tokens, sequence, np.int64), np.arange(first, first + tokens, dtype=np.int64)
    )
    at, layer = np.nonzero(routed)
    ranked = np.sort(ids[at, layer], axis=1)
    twice = (ranked[:, 1:] == ranked[:, :-1]).any(axis=1)
    if twice.any():
        n = int(np.argmax(twice))
        raise TraceError(
            f"{what}: token {first + at[n]}, layer {layer[n]} names an expert more than once"
        )
    try:
        builder.put(slots[at], layer, ids[at, layer], None)
    except CellError as error:
        raise TraceError(
            f"{what}: token {first + at[error.at]}, layer {layer[error.at]}: {error}"
        ) from None


def _check_routed(what: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if dtype.kind not in "iu" or len(shape) != 3 or 0 in shape:
        raise TraceError(
            f"{what} must be integers of shape [tokens, layers, top_k], not {dtype} of shape "
            f"{list(shape)}"
        )


def _note_request(
    builder: TraceBuilder,
    sequence: int,
    tokens: int,
    prompt: int | None,
    ids: np.ndarray | None,
) -> None:
    slots = builder.tokens(np.full(tokens, sequence, np.int64), np.arange(tokens, dtype=np.int64))
    if prompt is not None:
        builder.note(slots, phase=(np.arange(tokens) >= prompt).astype(np.int8))
    if ids is not None and len(ids) >= tokens:
        builder.note(slots, token_id=ids[:tokens].astype(np.int32))


def _rows(shape: tuple[int, ...], itemsize: int = 8) -> int:
    return max(1, BLOCK // max(1, math.prod(shape[1:]) * itemsize))


def _read_vllm_npy(
    file: IO[bytes], name: str, builder: TraceBuilder, base: int, options: ImportOptions
) -> int:
    try:
        np.lib.format.read_magic(file)
        file.seek(0)
        first = 0
        for part in read_rows(file, 1024, os.fstat(file.fileno()).st_size):
            if not first:
                _check_routed(f"{name}: the array", part.dtype, part.shape)
            _put_routed(part, first, base, builder, name)
            first += len(part)
    except TraceError:
        raise
    except (ValueError, EOFError) as error:
        raise TraceError(f"{name}: cannot be read: {reason(error)}") from None
    if not first:
        raise TraceError(f"{name}: the array has no tokens; at least 1 is needed")
    _note_request(builder, base, first, options.prompt_tokens, None)
    return 1


def _read_vllm_npz(
    archive: Archive, name: str, builder: TraceBuilder, base: int, options: ImportOptions
) -> int:
    first, prompt = 0, options.prompt_tokens
    for key in ("prompt_routed_experts", "routed_experts"):
        if key not in archive.members:
            continue
        dtype, shape = archive.header(key)
        _check_routed(f"{name}: {key}", dtype, shape)
        for part in archive.chunks(key, _rows(shape)):
            _put_routed(part, first, base, builder, f"{name}: {key}")
            first += len(part)
        if key == "prompt_routed_experts":
            prompt = first
    ids = [
        archive.array(key).ravel()
        for key in ("prompt_token_ids", "token_ids")
        if key in archive.members
    ]
    if prompt is None and "prompt_token_ids" in archive.members:
        prompt = len(ids[0])
    _note_request(builder, base, first, prompt, np.concatenate(ids) if len(ids) == 2 else None)
    return 1


def _routed_array(value: Any, field: str) -> np.ndarray:
    """Base64 of an .npy file, or nested lists."""
    try:
        if isinstance(value, str):
            data = base64.b64decode(value, validate=True)
            parts = list(read_rows(io.BytesIO(data), MAX_NUMBER, len(data)))
            array = parts[0] if parts else np.zeros((0, 0, 0), np.uint8)
        else:
            array = np.array(value)
    except (ValueError, EOFError, binascii.Error, OSError) as error:
        raise _LineError(f"{field}: is no base64 .npy file and no array: {reason(error)}") from None
    if array.dtype.kind not in "iu" or array.ndim != 3 or 0 in array.shape:
        raise _LineError(
            f"{field}: must be integers of shape [tokens, layers, top_k], not {array.dtype} of "
            f"shape {list(array.shape)}"
        )
    return array


def _ids(value: Any, field: str) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_NUMBER for i in value
    ):
        raise _LineError(f"{field}: must be a list of integers 0 to {MAX_NUMBER}")
    return value


def _vllm_response(
    entry: dict[str, Any], name: str, builder: TraceBuilder, base: int, options: ImportOptions
) -> int:
    choices = entry.get("choices", [entry])
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise _LineError(f"choices: must be a list of objects, not {_shown(choices)}")
    for n, choice in enumerate(choices):
        if choice.get("routed_experts") is None:
            raise _LineError(
                "routed_experts: is missing; start vLLM with --enable-return-routed-experts"
            )
        parts = [_routed_array(choice["routed_experts"], "routed_experts")]
        prompt_ids = _ids(
            choice.get("prompt_token_ids", entry.get("prompt_token_ids")), "prompt_token_ids"
        )
        prompt = options.prompt_tokens
        usage = entry.get("usage")
        if (
            prompt is None
            and isinstance(usage, dict)
            and isinstance(usage.get("prompt_tokens"), int)
        ):
            prompt = usage["prompt_tokens"]
        if prompt is None and prompt_ids is not None:
            prompt = len(prompt_ids)
        if entry.get("prompt_routed_experts") is not None:
            parts.insert(0, _routed_array(entry["prompt_routed_experts"], "prompt_routed_experts"))
            prompt = len(parts[0])
        first = 0
        for part in parts:
            _put_routed(part, first, base + n, builder, name)
            first += len(part)
        ids = _ids(choice.get("token_ids"), "token_ids")
        known = None if ids is None or prompt_ids is None else np.array(prompt_ids + ids)
        _note_request(builder, base + n, first, prompt, known)
    return len(choices)


def _read_vllm_json(
    file: IO[bytes], name: str, builder: TraceBuilder, base: int, options: ImportOptions
) -> int:
    count = 0
    if file.readline(LONGEST_LINE).strip() == b"{":  # one response, written over several lines
        file.seek(0)
        with _at(name, 1):
            return _vllm_response(_object(file.read(LONGEST_LINE)), name, builder, base, options)
    file.seek(0)
    for first, lines in _blocks(file, name):
        for number, line in enumerate(lines, first):
            if not line.strip():
                continue
            with _at(name, number):
                try:
                    count += _vllm_response(_object(line), name, builder, base + count, options)
                except TraceError as error:
                    text = str(error).removeprefix(f"{name}: ")
                    raise _LineError(f"routed_experts: {text}") from None
    return count


# Router logits ------------------------------------------------------------------------------

LOGIT_KEY = re.compile(r"(?:router_logits|layer|arr)_(\d+)")


def _put_logits(
    logits: np.ndarray,
    layer: int,
    first: int,
    token_slots: np.ndarray,
    builder: TraceBuilder,
    what: str,
) -> None:
    """Tokens ``first``... of a layer, [tokens, E]; a slot of -1 is padding."""
    slots = token_slots[first : first + len(logits)]
    logits, slots = logits[slots >= 0].astype(np.float32), slots[slots >= 0]
    if not len(slots):
        return
    wrong = ~np.isfinite(logits).all(axis=1)
    if wrong.any():
        raise TraceError(
            f"{what}: row {first + int(np.argmax(wrong))} has a logit that is not finite"
        )
    assert builder.top_k is not None
    order = np.argsort(-logits, axis=1, kind="stable")[:, : builder.top_k]
    best = np.take_along_axis(logits, order, axis=1)
    weights = np.exp(best - best[:, :1])
    weights /= weights.sum(axis=1, keepdims=True)
    builder.put(slots, np.full(len(slots), layer, np.int64), order, weights)


@dataclass(frozen=True)
class _Logits:
    """Logits of all layers, from whatever file: ``layers`` gives, for each, its chunks."""

    shapes: list[tuple[int, ...]]
    chunks: Callable[[int], Iterator[np.ndarray]]
    names: list[str]
    mask: np.ndarray | None
    ids: np.ndarray | None


def _read_logits(
    logits: _Logits, name: str, builder: TraceBuilder, base: int, options: ImportOptions
) -> int:
    if options.top_k is None:
        raise TraceError(
            f"{name}: router logits do not say how many experts are used: give --top-k"
        )
    for what, shape in zip(logits.names, logits.shapes, strict=True):
        if len(shape) not in (2, 3) or 0 in shape or shape != logits.shapes[0]:
            raise TraceError(
                f"{name}: {what} must have shape [tokens, experts] or [batch, tokens, experts], "
                f"that of the other layers, not {list(shape)}"
            )
    shape = logits.shapes[0]
    experts, tokens = shape[-1], math.prod(shape[:-1])
    if options.top_k > experts:
        raise TraceError(f"{name}: --top-k must be 1 to {experts}, not {options.top_k}")
    if builder.num_experts not in (None, experts):
        raise TraceError(f"{name}: has {experts} experts, but {builder.num_experts} were stated")
    builder.num_experts, builder.top_k = experts, options.top_k
    grid = shape[:-1] if len(shape) == 3 else (1, tokens)
    for key, array in (("attention_mask", logits.mask), ("input_ids", logits.ids)):
        if array is not None:
            if array.ndim != 2 or array.size != tokens:
                raise TraceError(
                    f"{name}: {key} must have shape [batch, length] for {tokens} tokens, "
                    f"not {list(array.shape)}"
                )
            grid = array.shape
    keep = np.ones(grid, np.bool_) if logits.mask is None else logits.mask != 0
    if not keep.any():
        raise TraceError(f"{name}: attention_mask leaves no token")
    slots = np.full(tokens, -1, np.int64)
    row, column = np.nonzero(keep)
    position = (np.cumsum(keep, axis=1) - 1)[row, column]
    slots[row * grid[1] + column] = found = builder.tokens(row + base, position)
    if options.prompt_tokens is not None:
        builder.note(found, phase=(position >= options.prompt_tokens).astype(np.int8))
    if logits.ids is not None:
        builder.note(found, token_id=logits.ids[row, column].astype(np.int32))
    for layer, what in enumerate(logits.names):
        first = 0
        for part in logits.chunks(layer):
            part = part.reshape(-1, experts)
            _put_logits(part, layer, first, slots, builder, f"{name}: {what}")
            first += len(part)
    return grid[0]


def _npz_logits(archive: Archive, name: str) -> _Logits:
    keys = {
        int(match[1]): key
        for key in archive.members
        if (match := LOGIT_KEY.fullmatch(key)) is not None
    }
    extra = {
        key: archive.array(key) if key in archive.members else None
        for key in ("attention_mask", "input_ids")
    }
    if "router_logits" in archive.members:
        dtype, shape = archive.header("router_logits")
        if dtype.kind != "f" or len(shape) not in (3, 4):
            raise TraceError(
                f"{name}: router_logits must be floats of shape [layers, tokens, experts], "
                f"not {dtype} of shape {list(shape)}"
            )
        # One pass over the array gives the layers one after the other.
        rows = archive.chunks("router_logits", 1)
        return _Logits(
            shapes=[shape[1:]] * shape[0],
            chunks=lambda layer: iter([next(rows)[0]]),
            names=[f"router_logits of layer {n}" for n in range(shape[0])],
            mask=extra["attention_mask"],
            ids=extra["input_ids"],
        )
    numbers = sorted(keys)
    if not numbers or numbers != list(range(len(numbers))):
        raise TraceError(
            f"{name}: must hold router_logits, or an array per layer named router_logits_0, "
            f"router_logits_1, ... (arr_0, arr_1, ... do too), not {', '.join(archive.members)}"
        )
    headers = [archive.header(keys[n]) for n in numbers]
    for n, (dtype, _) in zip(numbers, headers, strict=True):
        if dtype.kind != "f":
            raise TraceError(f"{name}: {keys[n]} must be floats, not {dtype}")
    return _Logits(
        shapes=[shape for _, shape in headers],
        chunks=lambda layer: archive.chunks(keys[layer], _rows(headers[layer][1])),
        names=[keys[n] for n in numbers],
        mask=extra["attention_mask"],
        ids=extra["input_ids"],
    )


def _pt_logits(path: Path, name: str) -> _Logits:
    try:
        import torch
    except ImportError:
        raise TraceError(
            f"{name}: reading .pt files needs torch: pip install 'stmoe[capture]', or save the "
            "logits with numpy.savez"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail in many ways
        raise TraceError(f"{name}: is no file that torch loads safely: {reason(error)}") from None
    extra = {"attention_mask": None, "input_ids": None}
    if isinstance(found, dict):
        extra |= {key: found[key].numpy() for key in extra if torch.is_tensor(found.get(key))}
        found = found.get("router_logits")
    if not isinstance(found, list | tuple) or not all(
        torch.is_tensor(layer) and layer.is_floating_point() for layer in found
    ):
        raise TraceError(
            f"{name}: must hold a tuple of float tensors, one per layer, or a dict with one as "
            "router_logits"
        )
    if not found:
        raise TraceError(f"{name}: router_logits is empty; at least one layer is needed")

    def chunks(layer: int) -> Iterator[np.ndarray]:
        flat = found[layer].reshape(-1, found[layer].shape[-1])
        rows = _rows(tuple(flat.shape), 4)
        for start in range(0, len(flat), rows):
            yield flat[start : start + rows].float().numpy()

    return _Logits(
        shapes=[tuple(layer.shape) for layer in found],
        chunks=chunks,
        names=[f"router_logits of layer {n}" for n in range(len(found))],
        mask=extra["attention_mask"],
        ids=extra["input_ids"],
    )


# All of them --------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    name = str(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise TraceError(f"{name}: is a directory; give the files in it")
        if not stat.S_ISREG(mode):
            raise TraceError(f"{name}: is not a regular file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[Archive]:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory can fail in many ways
        raise TraceError(f"{path}: not an .npz file, or a cut one: {reason(error)}") from None
    with archive:
        yield Archive(str(path), archive)


def detect_format(path: Path) -> str:
    """One of :data:`FORMATS`, from what the file begins with or holds."""
    with _open(path) as file:
        start = file.read(1 << 16)
    if start.startswith(b"PK"):
        with _archive(path) as archive:
            names = archive.members
            if "experts" in names:
                return "trace"
            if "routed_experts" in names:
                return "vllm"
            if any(n.endswith("data.pkl") for n in archive.archive.namelist()):
                return "router-logits"
            if "router_logits" in names or any(LOGIT_KEY.fullmatch(n) for n in names):
                return "router-logits"
            raise TraceError(
                f"{path}: none of its arrays is known ({', '.join(names) or 'it has none'}); a "
                "trace has experts, vLLM's output routed_experts, router logits router_logits_0 "
                "and so on"
            )
    if start.startswith(b"\x93NUMPY"):
        return "vllm"
    if start.startswith(b"#"):
        return "route-csv"
    if start.lstrip()[:1] == b"{":
        line = start.lstrip().split(b"\n", 1)[0]
        if len(line) < 3:  # an object over several lines is no JSON line
            line = start
        return "vllm" if b'"routed_experts"' in line or b'"choices"' in line else "jsonl"
    raise TraceError(
        f"{path}: its format is not known by its content; --from takes {', '.join(FORMATS)}"
    )


def _read(
    path: Path,
    kind: str,
    builder: TraceBuilder,
    base: int,
    options: ImportOptions,
    info: dict[str, Any],
) -> int:
    name = str(path)
    if kind == "router-logits":
        with _open(path):
            pass
        try:
            with _archive(path) as archive:
                if not any(n.endswith("data.pkl") for n in archive.archive.namelist()):
                    return _read_logits(_npz_logits(archive, name), name, builder, base, options)
        except TraceError:
            if path.suffix not in (".pt", ".pth", ".bin"):
                raise
        return _read_logits(_pt_logits(path, name), name, builder, base, options)
    with _open(path) as file:
        start = file.read(8)
        file.seek(0)
        if kind == "route-csv":
            return _read_route_csv(file, name, builder, base, info)
        if kind == "jsonl":
            return _read_jsonl(file, name, builder, base, info)
        if start.startswith(b"PK"):
            with _archive(path) as archive:
                if "routed_experts" not in archive.members:
                    raise TraceError(f"{name}: has no array routed_experts")
                return _read_vllm_npz(archive, name, builder, base, options)
        if start.startswith(b"\x93NUMPY"):
            return _read_vllm_npy(file, name, builder, base, options)
        return _read_vllm_json(file, name, builder, base, options)


def import_traces(
    paths: Sequence[str | Path], kind: str | None = None, options: ImportOptions | None = None
) -> Trace:
    """Read files of one format into one trace, their sequences one after the other.

    Parameters
    ----------
    paths : list of str or Path
        A trace of this project's own format must be alone.
    kind : str, optional
        One of :data:`FORMATS`; by default what the first file looks like.
    options : ImportOptions, optional

    Raises
    ------
    TraceError
        A file cannot be read or is malformed; see the module.
    """
    options = options or ImportOptions()
    files = [Path(path) for path in paths]
    if kind is None:
        kind = detect_format(files[0])
    if kind == "trace":
        if len(files) > 1:
            raise TraceError(f"{files[1]}: a trace is converted alone, not together with others")
        return load_trace(files[0], missing=True)
    builder = TraceBuilder(str(files[0]), num_experts=options.num_experts, top_k=options.top_k)
    info: dict[str, Any] = {}
    if options.model is not None:
        info["model"] = options.model
    base = 0
    for path in files:
        builder.name = str(path)
        try:
            base += _read(path, kind, builder, base, options, info)
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror or error}") from None
    if info.get("model") is None:
        info.pop("model", None)
    info.setdefault("source", f"{kind}: {', '.join(path.name for path in files)}")
    return builder.finish(info)
