# SPDX-License-Identifier: Apache-2.0
"""Sweeps: every combination of some traces, links and parameters, timed and predicted.

A sweep file (docs/sweep.md) makes *points*; a point is made of two *pieces*, which are what is
computed and kept: a **timing** piece (all policies on one trace, configuration and link) and a
**prediction** piece (the engine's predictor on one trace, which depends on the predictor's fields
alone and so serves many points). A piece's key is a hash of all that decides its result: its
settings, the trace's content, and the code.

Results are a text file of one JSON object a line, each appended by a single write as its piece
ends. So a sweep that is stopped, however, loses at most the pieces that it was on; run again, it
computes only those that the file has not. A failed piece is written down with its reason, does not
stop the others, and is tried again the next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import signal
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError, EngineConfig, preset
from .reporting.pareto import pareto_front
from .traces import Trace, TraceError, check_complete, config_for, load_trace, replacing

__all__ = [
    "Piece",
    "Sweep",
    "SweepError",
    "assemble",
    "code_version",
    "is_results_file",
    "load_sweep",
    "read_results",
    "results_table",
    "run_piece",
    "run_sweep",
    "stored",
]

FORMAT = "stmoe-sweep-1"
MAX_POINTS = 100_000
KEYS = ("traces", "tokens", "policies", "policy_files", "load_ratio", "system", "dtype", "preset",
        "issue_rate", "config", "energy", "case")  # fmt: skip

PREDICTOR_FIELDS = ("num_layers", "num_experts", "top_k", "spatial_depth", "lookahead",
                    "weight_bits", "margin_low", "margin_step", "margin_high")  # fmt: skip
"""Fields that a prediction at a given issue rate depends on."""


class SweepError(ValueError):
    """A sweep file or a results file that cannot be used; one line."""


# The code's version --------------------------------------------------------------------------


@functools.cache
def code_version() -> str:
    """A hash of every source file that decides a figure: those of this package, but for reports
    and this one."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("reporting/") or name == "sweep.py":
            continue
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _content(trace: Trace) -> str:
    """A hash of what is replayed."""
    digest = hashlib.sha256(json.dumps(trace.info, sort_keys=True).encode())
    for array in (trace.experts, trace.sequence, trace.token_id, trace.phase):
        if array is not None:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digest.update(b"\0")
    return digest.hexdigest()[:24]


# Sweep files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What is computed in one go; plain data, so that it can be sent to another machine."""

    key: str
    kind: str
    """``timing`` or ``prediction``."""
    trace: str
    """Path."""
    tokens: int
    config: dict[str, Any]
    settings: dict[str, Any]
    """Of a timing: policies, policy_files, load_ratio, system, dtype, energy; of a prediction:
    issue_rate."""
    code: str

    def label(self) -> str:
        """For a message about it."""
        where = self.settings.get("system") or (
            f"r = {self.settings['load_ratio']:g}" if "load_ratio" in self.settings else "predict"
        )
        return f"{Path(self.trace).name}, {where}"


@dataclass(frozen=True)
class Point:
    """One combination, and its pieces."""

    trace: str
    tokens: int
    load_ratio: float | None
    system: str | None
    dtype: str
    changes: dict[str, Any]
    """The fields that the sweep file sets."""
    config: EngineConfig
    timing: str
    prediction: str
    """Keys."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file, with all its combinations."""

    path: Path
    points: list[Point]
    pieces: list[Piece]
    failed: list[tuple[dict[str, Any], str]]
    """Combinations that cannot be: what they set, and why."""
    varied: list[str]
    """What differs between points."""


def _bad(path: Path, text: str) -> SweepError:
    return SweepError(f"{path}: {text}")


def _list(path: Path, name: str, value: Any, kinds: tuple[type, ...], what: str) -> list[Any]:
    """One value or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise _bad(path, f"{name} must not be an empty list")
    for one in values:
        if not isinstance(one, kinds) or (isinstance(one, bool) and bool not in kinds):
            raise _bad(path, f"{name} must be {what} or a list of them, not {one!r:.60}")
    if any(one in values[:i] for i, one in enumerate(values)):
        raise _bad(path, f"{name} names a value twice")
    return values


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file and make its points.

    Raises
    ------
    SweepError
        The file, a name or a value is not allowed. A combination of allowed values that the engine
        refuses (fewer slots than a layer needs, say) is no error: it is in ``failed``.
    TraceError
        A trace that cannot be read.
    """
    from .policies.registry import POLICIES
    from .systems import BITS

    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise _bad(path, error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _bad(path, f"not TOML: {error}") from None
    for key in data:
        if key not in KEYS:
            raise _bad(path, f"unknown key {key!r}; keys are {', '.join(KEYS)}")
    if "traces" not in data:
        raise _bad(path, "traces is missing: a path, or a list of them")
    traces = _list(path, "traces", data["traces"], (str,), "a path")
    if "load_ratio" in data and "system" in data:
        raise _bad(path, "load_ratio and system cannot both be given")
    ratios = _list(path, "load_ratio", data.get("load_ratio", 1.0), (int, float), "a number")
    for ratio in ratios:
        if not 0.01 <= ratio <= 100:
            raise _bad(path, f"load_ratio must be 0.01 to 100, not {ratio:g}")
    systems = _systems(path, data["system"]) if "system" in data else []
    dtypes = _named(path, "dtype", data.get("dtype", "int8"), BITS)
    policies = _named(path, "policies", data.get("policies", ["ours", "lru"]), POLICIES)
    files = [
        str((path.parent / name).resolve())
        for name in _list(path, "policy_files", data["policy_files"], (str,), "a path")
    ] if "policy_files" in data else []  # fmt: skip
    counts = _list(path, "tokens", data.get("tokens", 0), (int,), "a number of tokens")
    for count in counts:
        if count < ("tokens" in data):
            raise _bad(path, f"tokens must be 1 or more, not {count}")
    rate = data.get("issue_rate", 1.5)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 256:
        raise _bad(path, f"issue_rate must be above 0 and at most 256, not {rate!r:.60}")
    preset_name = data.get("preset")
    if preset_name is not None:
        try:
            preset(str(preset_name))
        except ConfigError as error:
            raise _bad(path, f"preset: {error}") from None
    energy = _energy(path, data.get("energy", {}))
    fields = _fields(path, data.get("config", {}), "config")
    cases = data.get("case", [{}])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise _bad(path, "case must be tables, each headed [[case]]")
    coupled = []
    for case in cases:
        one = _fields(path, case, "case")
        for name, values in one.items():
            if name in fields:
                raise _bad(path, f"{name} is set both in config and in a case")
            if len(values) > 1:
                raise _bad(path, f"case: {name} must be one value; another case holds another")
        coupled.append({name: values[0] for name, values in one.items()})
    hashes = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest()[:24] for name in files}

    links: list[tuple[float | None, str | None]] = (
        [(None, name) for name in systems] if systems else [(float(r), None) for r in ratios]
    )
    number = (
        len(traces) * len(counts) * len(links) * len(dtypes) * len(coupled)
        * int(np.prod([len(v) for v in fields.values()] or [1]))
    )  # fmt: skip
    if number > MAX_POINTS:
        raise _bad(path, f"at most {MAX_POINTS:,} points, not {number:,}")
    points: list[Point] = []
    pieces: dict[str, Piece] = {}
    failed: list[tuple[dict[str, Any], str]] = []
    code = code_version()
    for name in traces:
        whole = load_trace((path.parent / name).resolve())
        check_complete(whole)
        try:
            base = config_for(whole, preset_name)
        except (ConfigError, TraceError) as error:
            raise _bad(path, str(error)) from None
        for count in counts:
            trace = whole.head(count) if count else whole
            content = _content(trace)
            for case, *values in itertools.product(coupled, *fields.values()):
                changes = dict(zip(fields, values, strict=True)) | case
                try:
                    config = base.replace(**changes)
                    if any(changes.get(k, getattr(base, k)) != getattr(base, k)
                           for k in ("num_layers", "num_experts", "top_k")):  # fmt: skip
                        raise ConfigError("num_layers, num_experts and top_k are the trace's")
                except ConfigError as error:
                    failed.append(({"trace": name} | changes, str(error)))
                    continue
                whole_config = dataclasses.asdict(config)
                predictor = {k: whole_config[k] for k in PREDICTOR_FIELDS}
                asked = {"issue_rate": min(float(rate), config.num_experts / config.top_k)}
                key = _hash(["prediction", content, predictor, asked, code])
                prediction = pieces.setdefault(
                    key,
                    Piece(key, "prediction", str(whole.path), trace.num_tokens, predictor, asked,
                          code),
                )  # fmt: skip
                for (ratio, system), dtype in itertools.product(links, dtypes):
                    wanted: dict[str, Any] = {
                        "policies": policies, "policy_files": files, "dtype": dtype,
                        "energy": energy,
                    }  # fmt: skip
                    wanted |= {"system": system} if system else {"load_ratio": ratio}
                    key = _hash(["timing", content, whole_config, wanted, hashes, code])
                    pieces.setdefault(
                        key,
                        Piece(key, "timing", str(whole.path), trace.num_tokens, whole_config,
                              wanted, code),
                    )  # fmt: skip
                    points.append(
                        Point(name, trace.num_tokens, ratio, system, dtype, changes, config, key,
                              prediction.key)
                    )  # fmt: skip
    varied = [
        n for n, v in (("trace", traces), ("tokens", counts), ("dtype", dtypes)) if len(v) > 1
    ]
    varied += ["system"] if systems else ["load_ratio"]
    varied += [n for n in dict.fromkeys(n for p in points for n in p.changes)
               if len({p.changes.get(n) for p in points}) > 1]  # fmt: skip
    return Sweep(path, points, list(pieces.values()), failed, varied)


def _named(path: Path, key: str, value: Any, known: Mapping[str, Any]) -> list[str]:
    """Names out of those there are."""
    names = _list(path, key, value, (str,), "a name")
    for name in names:
        if name not in known:
            raise _bad(path, f"{key} must be of {', '.join(known)}, not {name!r}")
    return names


def _systems(path: Path, value: Any) -> list[str]:
    from .machine import TimingError
    from .systems import system_named

    names = _list(path, "system", value, (str,), "a name")
    for name in names:
        try:
            system_named(name)
        except TimingError as error:
            raise _bad(path, f"system {error}") from None
    return names


def _energy(path: Path, value: Any) -> dict[str, float]:
    from .energy import EnergyError, energy_table

    if not isinstance(value, dict):
        raise _bad(path, "energy must be a table of pJ/bit")
    for name, one in value.items():
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise _bad(path, f"energy: {name} must be a number of pJ/bit, not {one!r:.60}")
    try:
        energy_table(value)
    except EnergyError as error:
        raise _bad(path, str(error)) from None
    return {name: float(one) for name, one in value.items()}


def _fields(path: Path, value: Any, where: str) -> dict[str, list[Any]]:
    """Fields of the configuration, each with a list of values in its range."""
    if not isinstance(value, dict):
        raise _bad(path, f"{where} must be a table of fields (see stmoe params)")
    known = {f.name: f for f in dataclasses.fields(EngineConfig)}
    out = {}
    for name, one in value.items():
        if name not in known:
            raise _bad(
                path, f"{where}: unknown field {name!r}; fields are {', '.join(sorted(known))}"
            )
        values = _list(path, f"{where}: {name}", one, (int, bool), "an integer")
        meta = known[name].metadata
        for v in values:
            if isinstance(v, bool) != isinstance(known[name].default, bool):
                raise _bad(path, f"{where}: {name} must not be {v!r}")
            if not meta["low"] <= v <= meta["high"]:
                raise _bad(
                    path, f"{where}: {name} must be {meta['low']} to {meta['high']}, not {v}"
                )
        out[name] = values
    return out


# Pieces --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _trace(path: str, tokens: int) -> Trace:
    return load_trace(path).head(tokens)


def run_piece(piece: Piece, trace: Trace | None = None) -> dict[str, Any]:
    """Compute a piece; what is computed, or ``{"error": text}``. Raises nothing.

    ``trace`` is given where its file may not be within reach, on another machine.
    """
    try:
        if piece.code != code_version():
            raise SweepError(
                f"this worker has another version of the code ({code_version()}) than the sweep "
                f"({piece.code}); install the same one"
            )
        found = _trace(piece.trace, piece.tokens) if trace is None else trace.head(piece.tokens)
        config = EngineConfig().replace(**piece.config)
        run = _run_timing if piece.kind == "timing" else _run_prediction
        return run(found, config, piece.settings)
    except Exception as error:  # one bad point must not lose the others
        lines = str(error).split("\n")
        return {"error": f"{type(error).__name__}: {lines[0]}" if lines[0] else repr(error)}


def _run_timing(trace: Trace, config: EngineConfig, settings: dict[str, Any]) -> dict[str, Any]:
    from .compare import compare
    from .policies.registry import load_policy_file

    own = [load_policy_file(name) for name in settings["policy_files"]]
    result = compare(
        trace,
        config,
        load_ratio=settings.get("load_ratio", 1.0),
        system=settings.get("system"),
        policies=[*settings["policies"], *own],
        dtype=settings["dtype"],
        energy=settings["energy"],
    ).as_dict()
    return {key: result[key] for key in ("slots", "load_ratio", "rows", "guardrails")}


def _run_prediction(trace: Trace, config: EngineConfig, settings: dict[str, Any]) -> dict[str, Any]:
    from .replay import replay_trace

    rate = settings["issue_rate"] if trace.num_tokens > 1 else None
    result = replay_trace(trace, config, issue_rate=rate)
    keys = ("coverage", "issue_rate", "precision", "threshold", "recall")
    return {key: getattr(result, key) for key in keys}


# The results file ----------------------------------------------------------------------------


def stored(path: str | Path) -> dict[str, dict[str, Any]]:
    """Results by key, the latest of each; a last line that was cut is left out.

    Raises
    ------
    SweepError
        The file is no results file.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _bad(path, error.strerror or str(error)) from None
    lines = text.split(b"\n")
    found: dict[str, dict[str, Any]] = {}
    for i, line in enumerate(lines):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if i == 0 and entry.get("format") != FORMAT:
                raise ValueError
            if i > 0:
                found[entry["key"]] = entry["result"]
        except (ValueError, KeyError, TypeError, AttributeError):
            if i == len(lines) - 1 and i > 0:
                break  # the write of the last line was cut short
            what = f"line 1 must say {FORMAT}" if i == 0 else f"line {i + 1} is not a result"
            raise _bad(path, f"not a results file of a sweep: {what}") from None
    return found


class _Store:
    """A results file open for appending, by one sweep at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = stored(path)
        self.empty = not path.exists()
        """The file has been made here, and holds no result."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.file)
            raise _bad(path, "another sweep is writing it") from None
        try:
            size = os.fstat(self.file).st_size
            if size == 0:
                self._write({"format": FORMAT})
            elif os.pread(self.file, 1, size - 1) != b"\n":
                kept = os.pread(self.file, size, 0).rfind(b"\n") + 1
                os.ftruncate(self.file, kept)  # the cut line of a sweep that was stopped
        except BaseException:
            self.close()
            raise

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if os.write(self.file, line) != len(line):
            raise OSError(28, "No space left on device", str(self.path))
        os.fsync(self.file)

    def add(self, piece: Piece, result: dict[str, Any]) -> None:
        """Append one result."""
        self._write({"key": piece.key, "kind": piece.kind, "code": piece.code, "result": result})
        self.found[piece.key] = result
        self.empty = False

    def close(self) -> None:
        """The file may be written by another; one without any result is not left behind."""
        # An interrupt may come between the write of the first result and what says so.
        if self.empty and self.path.read_bytes().count(b"\n") < 2:
            self.path.unlink()
        os.close(self.file)


# Running -------------------------------------------------------------------------------------

Results = Iterator[tuple[Piece, dict[str, Any]]]


def _in_turn(pieces: Sequence[Piece]) -> Results:
    for piece in pieces:
        yield piece, run_piece(piece)


def _on_cores(pieces: Sequence[Piece], workers: int) -> Results:
    """On local processes. One that dies (out of memory, say) fails its own piece alone."""
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(pieces))
    suspects: list[Piece] = []
    while waiting or suspects:
        # After a death what was under way is run one piece at a time, to find the one.
        alone = bool(suspects)
        pool = ProcessPoolExecutor(
            1 if alone else workers, mp_context=context, initializer=_leave_interrupts
        )
        running: dict[Any, Piece] = {}
        try:
            while waiting or suspects or running:
                if alone and not suspects and not running:
                    break
                source = suspects if alone else waiting
                while source and len(running) < (1 if alone else workers):
                    running[pool.submit(run_piece, source[-1])] = source[-1]
                    source.pop()  # only now: a broken pool takes none
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            lost = list(running.values())
            if alone:
                yield lost[0], {"error": "its process was killed: out of memory?"}
            else:
                suspects += lost
        finally:
            stop_children(pool)


def _leave_interrupts() -> None:
    """Ctrl-C reaches a worker too; stopping is its parent's to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_children(pool: Any) -> None:
    """End a pool's processes at once: what they are on is not waited for."""
    children = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for child in children:
        child.terminate()
    for child in children:
        child.join()


def _on_dask(pieces: Sequence[Piece], address: str) -> Results:
    """On a Dask cluster; traces are sent there, so it needs no file of ours."""
    try:
        from dask.distributed import Client, as_completed
    except ImportError:
        raise SweepError(
            "--scheduler needs dask.distributed: pip install 'stmoe[sweep]' here and on the workers"
        ) from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise SweepError(f"--scheduler {address}: no Dask scheduler: {error}") from None
    with client:
        sent = {
            path: client.scatter(load_trace(path), broadcast=True, hash=False)
            for path in dict.fromkeys(piece.trace for piece in pieces)
        }
        futures = {
            client.submit(run_piece, piece, sent[piece.trace], pure=False): piece
            for piece in pieces
        }
        try:
            # The class's own search for a client needs a default one.
            with client.as_current():
                ended = as_completed(list(futures))
            for future in ended:
                failure = future.exception()
                if failure is not None:
                    yield futures[future], {"error": f"its worker failed: {failure}"[:300]}
                else:
                    yield futures[future], future.result()
        finally:
            client.cancel(list(futures))


def run_sweep(
    sweep: Sweep,
    output: str | Path,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compute what the results file has not, and put all points together.

    Parameters
    ----------
    sweep : Sweep
    output
        The results file; made where there is none.
    workers : int
        Local processes; with 1 this process computes.
    scheduler : str, optional
        Address of a Dask scheduler that computes instead, ``tcp://host:8786``.
    progress : callable, optional
        Told (pieces done, pieces in all, failed ones) at the start and after each.

    Raises
    ------
    SweepError, OSError
        The results file or the cluster cannot be used.
    """
    store = _Store(Path(output))
    try:
        missing = [p for p in sweep.pieces if "error" in store.found.get(p.key, {"error": ""})]
        done, failures = len(sweep.pieces) - len(missing), 0
        tell = progress or (lambda done, total, failures: None)
        tell(done, len(sweep.pieces), failures)
        if scheduler is not None and missing:
            results = _on_dask(missing, scheduler)
        elif workers > 1 and len(missing) > 1:
            results = _on_cores(missing, min(workers, len(missing)))
        else:
            results = _in_turn(missing)
        with contextlib.closing(results):  # type: ignore[type-var]
            for piece, result in results:
                store.add(piece, result)
                done, failures = done + 1, failures + ("error" in result)
                tell(done, len(sweep.pieces), failures)
        return assemble(sweep, store.found)
    finally:
        store.close()


# All points together -------------------------------------------------------------------------


def assemble(sweep: Sweep, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """All points with their results, and the Pareto fronts, as ``--json`` prints them.

    Fronts: ``table_bits`` has, for each trace, the points of which no other has both fewer table
    bits and more coverage; ``slots`` has, for each trace, link and expert type, the pairs of a
    point and a policy of which no other has both fewer slots and less time.
    """
    points: list[dict[str, Any]] = []
    errors = [dict(changes, error=text) for changes, text in sweep.failed]
    for point in sweep.points:
        timing = found.get(point.timing, {"error": "not computed"})
        prediction = found.get(point.prediction, {"error": "not computed"})
        said = {
            "trace": point.trace, "tokens": point.tokens, "load_ratio": point.load_ratio,
            "system": point.system, "dtype": point.dtype, "config": point.changes,
        }  # fmt: skip
        wrong = timing.get("error") or prediction.get("error")
        if wrong:
            errors.append(said | {"error": wrong})
            continue
        points.append(
            said
            | {
                "load_ratio": timing["load_ratio"],
                "table_bits": point.config.table_bits,
                "slots": timing["slots"],
                "prediction": prediction,
                "rows": timing["rows"],
                "guardrails": timing["guardrails"],
            }
        )
    return {
        "sweep": str(sweep.path),
        "code": code_version(),
        "varied": sweep.varied,
        "points": points,
        "errors": errors,
        "fronts": _fronts(points),
    }


def _fronts(points: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    fronts: dict[str, list[dict[str, Any]]] = {"table_bits": [], "slots": []}
    by_trace: dict[Any, list[int]] = {}
    by_link: dict[Any, list[int]] = {}
    for i, p in enumerate(points):
        trace = (p["trace"], p["tokens"])
        by_trace.setdefault(trace, []).append(i)
        by_link.setdefault((*trace, p["system"] or p["load_ratio"], p["dtype"]), []).append(i)
    for (trace, tokens), members in by_trace.items():
        values = [(points[i]["table_bits"], -points[i]["prediction"]["coverage"]) for i in members]
        for n in pareto_front(values):
            fronts["table_bits"].append(
                {"trace": trace, "tokens": tokens, "point": members[n],
                 "table_bits": values[n][0], "coverage": -values[n][1]}
            )  # fmt: skip
    for (trace, tokens, link, dtype), members in by_link.items():
        pairs = [(i, row) for i in members for row in points[i]["rows"]]
        for n in pareto_front([(points[i]["slots"], row["time"]) for i, row in pairs]):
            i, row = pairs[n]
            fronts["slots"].append(
                {"trace": trace, "tokens": tokens, "link": link, "dtype": dtype, "point": i,
                 "policy": row["policy"], "slots": points[i]["slots"], "time": row["time"]}
            )  # fmt: skip
    return fronts


def results_table(result: Mapping[str, Any]) -> str:
    """For people: a row for each point and policy; ``*`` marks those on a front."""
    varied = result["varied"]
    slots = {(f["point"], f["policy"]) for f in result["fronts"]["slots"]}
    bits = {f["point"] for f in result["fronts"]["table_bits"]}
    heads = [*varied, "slots", "kbit", "coverage", "policy", "time", "p99", "hit", "bytes",
             "mJ/token"]  # fmt: skip
    rows = []
    for i, p in enumerate(result["points"]):
        for row in p["rows"]:
            rows.append(
                [
                    *(value_of(p, name) for name in varied),
                    str(p["slots"]),
                    f"{p['table_bits'] / 1000:.0f}",
                    f"{p['prediction']['coverage']:.4f}" + ("*" if i in bits else " "),
                    row["policy"],
                    f"{row['time']:.4f}" + ("*" if (i, row["policy"]) in slots else " "),
                    *(f"{row[key]:.3f}" for key in ("p99", "hit_rate", "bytes")),
                    f"{row['energy_j'] * 1e3:.3g}",
                ]
            )
    widths = [max(len(r[c]) for r in [heads, *rows]) for c in range(len(heads))]
    lines = ["  ".join(text.rjust(w) for text, w in zip(r, widths, strict=True))
             for r in [heads, *rows]]  # fmt: skip
    lines.append("* on the Pareto front: table bits against coverage, slots against time")
    for error in result["errors"]:
        where = {k: v for k, v in error.items() if k != "error" and v not in (None, {})}
        lines.append(f"failed: {json.dumps(where)}: {error['error']}")
    return "\n".join(lines) + "\n"


def value_of(point: Mapping[str, Any], name: str) -> str:
    """What a point has for something that is varied."""
    value = point[name] if name in point else point["config"].get(name)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else Path(value).name if name == "trace" else str(value)


# Results of a sweep, for a report ------------------------------------------------------------


def summary_path(output: str | Path) -> Path:
    """Where :func:`write_summary` puts what :func:`run_sweep` has returned."""
    return Path(output).with_suffix(".json")


def write_summary(result: Mapping[str, Any], output: str | Path) -> Path:
    """Write all points beside the results file, for a report."""
    path = summary_path(output)
    with replacing(path) as file:
        file.write(json.dumps(result, allow_nan=False).encode() + b"\n")
    return path


def is_results_file(path: str | Path) -> bool:
    """Whether the file begins as a results file does."""
    try:
        with open(path, "rb") as file:
            return FORMAT.encode() in file.readline(200)
    except OSError:
        return False


def read_results(path: str | Path) -> dict[str, Any]:
    """The summary that stands beside a results file."""
    beside = summary_path(path)
    try:
        found = json.loads(beside.read_text())
    except (OSError, ValueError):
        raise SweepError(
            f"{path}: {beside} is not there or not JSON; run the sweep again to have it made"
        ) from None
    if not isinstance(found, dict) or "points" not in found:
        raise SweepError(f"{beside}: not the summary of a sweep")
    return found
