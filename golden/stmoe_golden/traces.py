# SPDX-License-Identifier: Apache-2.0
"""Routing traces: one ``.npz`` file of which experts every token used in every layer.

=============  ==========================================  =======================================
array          type and shape                              what
=============  ==========================================  =======================================
``version``    integer []                                  of the format; 1 where it is left out
``experts``    uint8 or uint16 [tokens, layers, top_k]     experts used, heaviest first
``sequence``   int32 [tokens]                              sequence number, never decreasing
``info``       JSON text                                   ``num_layers``, ``num_experts``,
                                                           ``top_k``; anything else is kept
``weights``    uint8, uint16, float16 or float32, as       gate weights (optional)
               ``experts``
``token_id``   int32 [tokens]                              the token fed in (optional)
``phase``      uint8 [tokens]                              0 prefill, 1 decode (optional)
``present``    bool [tokens, layers]                       false where a layer has no routing for
                                                           a token, whose experts and weights are
                                                           then 0 (optional: all are there)
=============  ==========================================  =======================================

``"ordered": false`` in ``info`` says that the sets have no order, ``"expert_bytes"`` is a list of
the bytes of one expert, one per layer. Other arrays are ignored. Version 2 brought ``version``,
``phase``, ``present`` and the check of ``expert_bytes``. docs/traces.md is the whole account.
A file is judged by its headers before any array is read, so a file that lies about its size
costs no memory, and pickled objects are never loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from .config import EngineConfig, preset

__all__ = [
    "DECODE",
    "PREFILL",
    "VERSION",
    "Trace",
    "TraceError",
    "check_complete",
    "check_order",
    "check_shape",
    "config_for",
    "load_trace",
    "replacing",
    "save_trace",
]

EXPERT_TYPES = ("uint8", "uint16")
WEIGHT_TYPES = ("uint8", "uint16", "float16", "float32")
REQUIRED = ("info", "experts", "sequence")
OPTIONAL = ("token_id", "weights", "phase", "present")
VERSION = 2
"""Of the format, as written; older ones are read."""

PREFILL, DECODE = 0, 1
SHAPE_FIELDS = ("num_layers", "num_experts", "top_k")
MAX_SLOTS = 4096
"""Most slots that :class:`EngineConfig` allows; bounds the quota of :func:`config_for`."""

CHUNK = 8192
"""Tokens looked at together, so that checking a long trace needs little memory."""


class TraceError(ValueError):
    """A trace that is not what it should be; the message names the file and the array."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The routing of one model over some tokens.

    Attributes
    ----------
    experts : uint8 or uint16 [T, L, K]
        Experts used, in descending gate weight where :attr:`ordered`.
    sequence : int32 [T]
        Sequence number; a sequence's tokens are consecutive.
    info : dict
        At least ``num_layers``, ``num_experts`` and ``top_k``.
    weights : [T, L, K], optional
        Gate weights.
    token_id : int32 [T], optional
        The token fed in at each step.
    path : Path, optional
        The file it came from.
    phase : uint8 [T], optional
        :data:`PREFILL` or :data:`DECODE`.
    present : bool [T, L], optional
        Where there is routing at all. Only :func:`load_trace` with ``missing=True`` gives a trace
        with a False in it.
    """

    experts: np.ndarray
    sequence: np.ndarray
    info: dict[str, Any]
    weights: np.ndarray | None = None
    token_id: np.ndarray | None = None
    path: Path | None = None
    phase: np.ndarray | None = None
    present: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.info["num_layers"])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.info["num_experts"])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.info["top_k"])

    @property
    def ordered(self) -> bool:
        """Whether experts are in descending gate weight."""
        return bool(self.info.get("ordered", True))

    @property
    def expert_bytes(self) -> list[int] | None:
        """Bytes of one expert, one per layer, where they are known."""
        return self.info.get("expert_bytes")

    @property
    def complete(self) -> bool:
        """Whether every token has the routing of every layer."""
        return self.present is None or bool(self.present.all())

    @property
    def num_sequences(self) -> int:
        """Sequences of which there is at least one token."""
        return int(self.starts().sum())

    @property
    def name(self) -> str:
        """What messages call it: its path, or ``trace``."""
        return str(self.path) if self.path is not None else "trace"

    def starts(self) -> np.ndarray:
        """bool [T]: the token is its sequence's first."""
        first = np.ones(self.num_tokens, np.bool_)
        np.not_equal(self.sequence[1:], self.sequence[:-1], out=first[1:])
        return first

    def head(self, count: int) -> Trace:
        """The first ``count`` tokens, or all where there are fewer; ``info`` is kept as it is."""
        if count < 1:
            raise TraceError(f"{self.name}: tokens must be 1 or more, not {count}")
        return self.take(slice(count))

    def take(self, tokens: slice | np.ndarray) -> Trace:
        """Some tokens (a slice, a mask or ascending indices); ``info`` is kept as it is."""
        optional = {key: getattr(self, key) for key in OPTIONAL}
        return replace(
            self,
            experts=self.experts[tokens],
            sequence=self.sequence[tokens],
            **{key: array[tokens] for key, array in optional.items() if array is not None},
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array that it has, by its name in the file."""
        found = {key: getattr(self, key) for key in ("experts", "sequence", *OPTIONAL)}
        return {key: array for key, array in found.items() if array is not None}


# Checks -------------------------------------------------------------------------------------


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def _check_info(name: str, info: Any) -> None:
    if not isinstance(info, dict):
        raise TraceError(f"{name}: info must be a JSON object, not {type(info).__name__}")
    for key in SHAPE_FIELDS:
        if key not in info:
            raise TraceError(f"{name}: info has no {key}; it needs {', '.join(SHAPE_FIELDS)}")
        value = info[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TraceError(f"{name}: info {key} must be an integer, not {value!r:.40}")
        if not 1 <= value <= 65536:
            raise TraceError(f"{name}: info {key} must be 1 to 65536, not {value!r:.40}")
    if info["top_k"] > info["num_experts"]:
        raise TraceError(
            f"{name}: info top_k must be at most num_experts ({info['num_experts']}), "
            f"not {info['top_k']}"
        )
    if not isinstance(info.get("ordered", True), bool):
        raise TraceError(f"{name}: info ordered must be true or false, not {info['ordered']!r:.40}")
    sizes = info.get("expert_bytes")
    if sizes is None:
        return
    layers = info["num_layers"]
    if not isinstance(sizes, list) or len(sizes) != layers:
        found = f"one of {len(sizes)}" if isinstance(sizes, list) else f"{sizes!r:.40}"
        raise TraceError(
            f"{name}: info expert_bytes must be a list of {layers} integers, one per layer, "
            f"not {found}"
        )
    for layer, size in enumerate(sizes):
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 1 << 63:
            raise TraceError(
                f"{name}: info expert_bytes of layer {layer} must be an integer, 1 or more, "
                f"not {size!r:.40}"
            )


def _check_headers(
    name: str, headers: dict[str, tuple[np.dtype[Any], tuple[int, ...]]], info: dict[str, Any]
) -> None:
    """Types and shapes of all arrays but ``info``, whose values are known."""
    dtype, shape = headers["experts"]
    if dtype.name not in EXPERT_TYPES:
        raise TraceError(f"{name}: experts must be uint8 or uint16, not {dtype}")
    if len(shape) != 3:
        raise TraceError(
            f"{name}: experts must have shape [tokens, layers, top_k], not {_shape_text(shape)}"
        )
    if shape[0] == 0:
        raise TraceError(f"{name}: experts has no tokens; at least 1 is needed")
    for axis, key in ((1, "num_layers"), (2, "top_k")):
        if shape[axis] != info[key]:
            raise TraceError(
                f"{name}: experts has shape {_shape_text(shape)}, but info {key} is {info[key]}"
            )
    for key in ("sequence", "token_id"):
        if key in headers:
            dtype, found = headers[key]
            if dtype.name != "int32":
                raise TraceError(f"{name}: {key} must be int32, not {dtype}")
            if found != shape[:1]:
                raise TraceError(
                    f"{name}: {key} must have shape {_shape_text(shape[:1])}, one per token, "
                    f"not {_shape_text(found)}"
                )
    for key, kind, want in (("phase", "uint8", shape[:1]), ("present", "bool", shape[:2])):
        if key in headers:
            dtype, found = headers[key]
            if dtype.name != kind:
                raise TraceError(f"{name}: {key} must be {kind}, not {dtype}")
            if found != want:
                raise TraceError(
                    f"{name}: {key} must have shape {_shape_text(want)}, not {_shape_text(found)}"
                )
    if "weights" in headers:
        dtype, found = headers["weights"]
        if dtype.name not in WEIGHT_TYPES:
            raise TraceError(
                f"{name}: weights must be uint8, uint16, float16 or float32, not {dtype}"
            )
        if found != shape:
            raise TraceError(
                f"{name}: weights must have shape {_shape_text(shape)}, that of experts, "
                f"not {_shape_text(found)}"
            )


def _check_values(trace: Trace) -> None:
    name, experts, limit = trace.name, trace.experts, trace.num_experts
    for start in range(0, trace.num_tokens, CHUNK):
        part = experts[start : start + CHUNK]
        here = None if trace.present is None else trace.present[start : start + CHUNK]
        if part.max() >= limit:
            token, layer, rank = np.argwhere(part >= limit)[0]
            raise TraceError(
                f"{name}: experts: token {start + token}, layer {layer} uses expert "
                f"{part[token, layer, rank]}, but experts are 0 to {limit - 1}"
            )
        # Sorted neighbours are equal exactly where a set names an expert twice.
        ranked = np.sort(part, axis=2)
        same = ranked[:, :, 1:] == ranked[:, :, :-1]
        if here is not None:
            same &= here[:, :, None]
            for key in ("experts", "weights"):
                array = getattr(trace, key)
                if array is None:
                    continue
                wrong = (array[start : start + CHUNK] != 0).any(axis=2) & ~here
                if wrong.any():
                    token, layer = np.argwhere(wrong)[0]
                    raise TraceError(
                        f"{name}: {key}: token {start + token}, layer {layer} is not present, "
                        f"so its {key} must be 0"
                    )
        if same.any():
            token, layer, rank = np.argwhere(same)[0]
            raise TraceError(
                f"{name}: experts: token {start + token}, layer {layer} uses expert "
                f"{ranked[token, layer, rank]} more than once; the experts of a set must differ"
            )
        if trace.weights is not None and trace.weights.dtype.kind == "f":
            weights = trace.weights[start : start + CHUNK]
            bad = ~(np.isfinite(weights) & (weights >= 0))
            if bad.any():
                token, layer, rank = np.argwhere(bad)[0]
                raise TraceError(
                    f"{name}: weights: token {start + token}, layer {layer} has weight "
                    f"{weights[token, layer, rank]}, but weights are finite and not negative"
                )
    falls = np.flatnonzero(trace.sequence[1:] < trace.sequence[:-1])
    if len(falls):
        token = int(falls[0]) + 1
        raise TraceError(
            f"{name}: sequence: token {token} has number {trace.sequence[token]} after "
            f"{trace.sequence[token - 1]}; sequence numbers must not decrease"
        )
    if trace.token_id is not None and trace.token_id.min() < 0:
        token = int(np.argmax(trace.token_id < 0))
        raise TraceError(
            f"{name}: token_id: token {token} has id {trace.token_id[token]}, but ids are 0 or more"
        )
    if trace.phase is not None and trace.phase.max() > DECODE:
        token = int(np.argmax(trace.phase > DECODE))
        raise TraceError(
            f"{name}: phase: token {token} has {trace.phase[token]}, but a phase is {PREFILL} "
            f"(prefill) or {DECODE} (decode)"
        )


def check_order(trace: Trace) -> None:
    """Refuse a trace whose sets are said to be heaviest first, but whose weights rise."""
    if trace.weights is None or not trace.ordered:
        return
    for start in range(0, trace.num_tokens, CHUNK):
        part = trace.weights[start : start + CHUNK]
        rises = part[:, :, 1:] > part[:, :, :-1]
        if rises.any():
            token, layer, rank = np.argwhere(rises)[0]
            raise TraceError(
                f"{trace.name}: weights: token {start + token}, layer {layer} has "
                f"{part[token, layer, rank + 1]} after {part[token, layer, rank]}, but sets are "
                f"heaviest first unless info says ordered: false"
            )


def check_complete(trace: Trace) -> None:
    """Refuse a trace in which some token lacks the routing of some layer.

    The engine takes every layer of a token in order, so such a token cannot be replayed, and
    leaving it out changes what the next token's history is: that is for the user to decide.
    """
    if trace.complete:
        return
    assert trace.present is not None
    lacking = ~trace.present.all(axis=1)
    token = int(np.argmax(lacking))
    layer = int(np.argmin(trace.present[token]))
    raise TraceError(
        f"{trace.name}: {np.count_nonzero(lacking)} of {trace.num_tokens} tokens lack the routing "
        f"of some layer (first: token {token}, layer {layer}); a replay needs all: `stmoe trace "
        f"slice --complete` keeps the tokens that have them"
    )


# Files --------------------------------------------------------------------------------------


def _read_header(file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of a member, leaving ``file`` at its data."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"array format {version[0]}.{version[1]} is not 1.0 or 2.0")
    return dtype, shape


def read_rows(file: IO[bytes], rows: int, length: int | None = None) -> Iterator[np.ndarray]:
    """The rows of an ``.npy`` stream along its first axis, so many at a time.

    Where its ``length`` in bytes is known, a header that claims more is refused at once.
    Raises :class:`ValueError` where the stream is no C-ordered array of plain numbers or is cut.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version[0]}.{version[1]} is not 1.0 or 2.0")
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy evaluates it as Python, which can fail in many ways
        raise ValueError(f"its header is damaged: {reason(error)}") from None
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    if fortran and len(shape) > 1:
        raise ValueError("it is in Fortran order; save np.ascontiguousarray of it")
    if not shape:
        raise ValueError("it is a single value, not an array")
    size = dtype.itemsize
    for n in shape[1:]:
        size *= n
    if length is not None and length - file.tell() < size * shape[0]:
        raise ValueError(f"it is cut: {shape[0]} rows in its header, fewer in the file")
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        data = file.read(count * size)
        if len(data) != count * size:
            raise ValueError(f"it is cut: {shape[0]} rows in its header, fewer in the file")
        part = np.frombuffer(data, dtype).reshape(count, *shape[1:])
        yield np.asarray(part, part.dtype.newbyteorder("="))


def reason(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Archive:
    """The members of an ``.npz`` file; anything wrong with one is a :class:`TraceError`."""

    def __init__(self, name: str, archive: zipfile.ZipFile) -> None:
        self.name = name
        self.archive = archive
        self.members = {
            member.filename[:-4]: member
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[IO[bytes]]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self.archive.open(self.members[key]) as file:
                    yield file
        except (TraceError, MemoryError):
            raise
        except Exception as error:  # zipfile, zlib, lzma and NumPy each have their own
            raise TraceError(f"{self.name}: {key} cannot be read: {reason(error)}") from None

    def header(self, key: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape, checked against the size that the archive states."""
        with self._open(key) as file:
            dtype, shape = _read_header(file)
            if dtype.hasobject:
                raise TraceError(
                    f"{self.name}: {key} holds pickled Python objects, which are never loaded"
                )
            size = dtype.itemsize
            for n in shape:
                size *= n
            stated = self.members[key].file_size - file.tell()
            if size != stated:
                raise TraceError(
                    f"{self.name}: {key} cannot be read: {stated} bytes of data, but its header "
                    f"says {size}"
                )
        return dtype, shape

    def chunks(self, key: str, rows: int) -> Iterator[np.ndarray]:
        """The array's rows along its first axis, so many at a time, in native byte order."""
        self.header(key)
        with self._open(key) as file:
            yield from read_rows(file, rows)

    def array(self, key: str) -> np.ndarray:
        """The whole array in native byte order, C order."""
        with self._open(key) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # reaching the end is what checks the CRC
                raise ValueError("more data than its header says")
        return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def load_trace(path: str | Path, *, missing: bool = False) -> Trace:
    """Read and check a whole trace.

    Parameters
    ----------
    path : str or Path
    missing : bool
        Whether tokens may lack the routing of some layers (:attr:`Trace.present`). Without it
        such a file is refused, so that no replay can take what it does not know for routing.

    Raises
    ------
    TraceError
        The file cannot be read, is no trace, or holds something that cannot be routing. The
        message names the file, the array and the value, and says what is allowed.
    """
    name = str(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise TraceError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise TraceError(f"{name}: is a directory; a trace is an .npz file")
    if not stat.S_ISREG(mode):
        raise TraceError(f"{name}: is not a regular file; a trace is an .npz file")
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise TraceError(f"{name}: {error.strerror or error}") from None
    except Exception as error:  # a damaged directory can fail in many ways
        raise TraceError(f"{name}: not an .npz file, or a cut one: {reason(error)}") from None
    with archive:
        file = Archive(name, archive)
        for key in REQUIRED:
            if key not in file.members:
                raise TraceError(
                    f"{name}: has no array {key}; a trace needs {', '.join(sorted(REQUIRED))}"
                )
        keys: list[str] = ["experts", "sequence"]
        keys += [key for key in OPTIONAL if key in file.members]
        _check_version(file)
        dtype, shape = file.header("info")
        if dtype.kind != "U" or shape != ():
            raise TraceError(
                f"{name}: info must be one JSON text, not {dtype} of shape {_shape_text(shape)}"
            )
        headers = {key: file.header(key) for key in keys}
        text = str(file.array("info"))
        try:
            info = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{name}: info is not JSON: {reason(error)}") from None
        _check_info(name, info)
        _check_headers(name, headers, info)
        arrays = {key: file.array(key) for key in keys}
    if "present" in arrays:  # any byte but 0 is true, and from here on exactly 1
        arrays["present"] = arrays["present"].view(np.uint8) != 0
    trace = Trace(info=info, path=Path(path), **arrays)
    _check_values(trace)
    if not missing:
        check_complete(trace)
    return trace


def _check_version(file: Archive) -> None:
    if "version" not in file.members:
        return
    dtype, shape = file.header("version")
    if dtype.kind not in "iu" or shape != ():
        raise TraceError(
            f"{file.name}: version must be one integer, not {dtype} of shape {_shape_text(shape)}"
        )
    version = int(file.array("version"))
    if not 1 <= version <= VERSION:
        raise TraceError(f"{file.name}: version is {version}, but this stmoe reads 1 to {VERSION}")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` only once all of it is written.

    Where ``path`` is a device or a pipe it is written directly. An :class:`OSError` is raised
    before anything is produced where nothing could be written there.
    """
    target = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            with open(target, "wb") as file:
                yield file
            return
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", str(path))
    folder, base = os.path.split(target)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{base}.", suffix=".tmp", dir=folder)
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            yield file
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def save_trace(trace: Trace, path: str | Path) -> None:
    """Check and write a trace; nothing is left behind where that fails."""
    arrays = {key: np.asarray(array) for key, array in trace.arrays().items()}
    checked = Trace(info=trace.info, path=Path(path), **arrays)
    _check_info(checked.name, trace.info)
    headers = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    _check_headers(checked.name, headers, trace.info)
    _check_values(checked)
    with replacing(path) as file:
        members: dict[str, Any] = {"version": np.array(VERSION), **arrays}
        np.savez_compressed(file, info=np.array(json.dumps(trace.info)), **members)


# Configurations -----------------------------------------------------------------------------


def check_shape(trace: Trace, config: EngineConfig, what: str = "the configuration") -> None:
    """Refuse a trace whose L, E or K is not that of ``config``."""
    for key in SHAPE_FIELDS:
        have, want = getattr(trace, key), getattr(config, key)
        if have != want:
            raise TraceError(f"{trace.name}: {key} is {have} in the trace, but {want} in {what}")


def config_for(
    trace: Trace, preset_name: str | None = None, settings: Sequence[str] = ()
) -> EngineConfig:
    """The configuration to replay a trace with.

    Parameters
    ----------
    trace : Trace
    preset_name : str, optional
        Its configuration is taken, and the trace must have its shape. Without one, L, E and K
        are the trace's, a quarter of the experts stays resident and the AXI data is 128 wide.
    settings : list of str
        ``field=value`` texts that are applied on top.

    Raises
    ------
    TraceError
        The trace is of another shape than the preset or the settings, or too large.
    ConfigError
        An unknown preset, or a setting that is not allowed.
    """
    if preset_name is not None:
        config = preset(preset_name)
        check_shape(trace, config, f"preset {preset_name}")
    else:
        layers, experts, top_k = trace.num_layers, trace.num_experts, trace.top_k
        quota = min(max(1, experts // 4), (MAX_SLOTS - 2 * top_k) // layers)
        try:
            config = EngineConfig(
                num_layers=layers,
                num_experts=experts,
                top_k=top_k,
                quota=max(0, quota) if experts > 1 else 0,
                axi_data_width=128,
            )
        except ValueError as error:
            raise TraceError(f"{trace.name}: {error}") from None
    config = config.with_settings(list(settings))
    check_shape(trace, config, "the settings")
    return config
