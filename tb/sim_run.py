# SPDX-License-Identifier: Apache-2.0
"""Runs the engine in its harness over a trace, and reads what the monitors have seen."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from simulation import BENCHES, BUILD, ROOT, SOUND, build_model
from stmoe.harness.buffer_memory import BufferPlace
from stmoe.harness.content_checker import AddressMap
from stmoe.harness.harness import MEMORY_INPUTS
from stmoe.harness.run_log import (
    Burst,
    Event,
    Filled,
    Finished,
    Grant,
    Irq,
    LastBeat,
    Release,
    Route,
    RunLog,
    Token,
    Violation,
    Write,
)
from stmoe.toolchain import ToolError
from stmoe.verilog_writer import convert
from stmoe_golden.checker import Settings
from stmoe_golden.config import FRACTION_BITS, EngineConfig

__all__ = [
    "LEAST",
    "QUICK",
    "SimulationError",
    "build_simulation",
    "read_log",
    "run_simulation",
]

TOP = "sim_top"

VERILATOR_ARGS = (
    "-Wno-fatal",
    "-Wno-WIDTHTRUNC",
    "-Wno-CASEINCOMPLETE",
    "-O3",
    "--x-assign",
    "fast",
    "--x-initial",
    "fast",
    "--no-assert",
    "-CFLAGS",
    " ".join(("-O2", *SOUND)),
)

QUICK = ("-CFLAGS", "-Og")
LEAST = ("-CFLAGS", "-O0")
"""``build_args`` for short runs, and for large designs in shorter ones: g++ takes a third or a
quarter of its time with -O2, and the model twice or seven times as long. These flags come after
those above, while OPT_FAST and the like of make would come before; and all of the design is one
file, as the precompiled headers of many take longer than the rest."""

OUTPUTS = (
    "cycle",
    "tokens_finished",
    "fill_beats",
    "r_beats",
    "link_cycles",
    "wait_cycles",
    "violations",
    "irq",
)
"""Outputs of the harness that are read at the end of a run."""


LINES: dict[str, tuple[str, type]] = {
    "E": ("events", Event),
    "T": ("tokens", Token),
    "R": ("routes", Route),
    "G": ("grants", Grant),
    "L": ("releases", Release),
    "A": ("ar", Burst),
    "D": ("last_beats", LastBeat),
    "F": ("filled", Filled),
    "P": ("write_addresses", Burst),
    "Q": ("write_answers", LastBeat),
    "K": ("finished", Finished),
    "I": ("irq", Irq),
    "W": ("writes", Write),
    "X": ("violations", Violation),
}
"""Letter of a line to the field of :class:`RunLog` and its rows."""


class SimulationError(AssertionError):
    """A run that failed; ``log`` is what was seen until then."""

    def __init__(self, message: str, log: RunLog):
        super().__init__(message)
        self.log = log


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _sources(engine_factory: Callable | None) -> bytes:
    """Everything that the Verilog comes from, so that an unchanged design is not even elaborated
    again (elaboration takes longer than a short run)."""
    files = sorted((ROOT / "hw" / "stmoe").rglob("*.py"))
    files += (ROOT / "golden" / "stmoe_golden" / name for name in ("config.py", "records.py"))
    if engine_factory is not None:
        files.append(Path(inspect.getsourcefile(inspect.unwrap(engine_factory))))
    parts = [file.read_bytes() for file in files]
    if engine_factory is not None:
        parts.append(engine_factory.__qualname__.encode())
    return b"\0".join(parts)


def build_simulation(
    config: EngineConfig,
    *,
    engine_factory: Callable | None = None,
    stride: int | None = None,
    waves: bool = False,
    build_args: Sequence[str] = (),
) -> Path:
    """Build ``SimTop``; returns its folder. Nothing is done when the design has not changed.

    ``engine_factory`` must be a function or a class, found by its name in its file; what it
    closes over is not part of the name.
    """
    from stmoe.harness.sim_top import SimTop

    args = [*VERILATOR_ARGS, *build_args]
    if waves:
        # --trace, which cocotb gives, and --trace-fst: the format is FST.
        args.append("--trace-fst")
    index = BUILD / "sim" / "index"
    index.mkdir(parents=True, exist_ok=True)
    known = index / _digest(repr((config, stride, args)).encode() + _sources(engine_factory))
    if known.exists():
        return BUILD / "sim" / known.read_text()
    top = SimTop(config, engine_factory=engine_factory, stride=stride)
    text = convert(top, name=TOP, emit_src=False)
    folder = BUILD / "sim" / _digest((text + repr(args)).encode())
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            flags = os.environ.get("MAKEFLAGS", f"-j{os.cpu_count() or 2}")
            if tuple(build_args) in (QUICK, LEAST):
                flags += " VM_PARALLEL_BUILDS=0"
            try:
                with mock.patch.dict(os.environ, MAKEFLAGS=flags):
                    build_model(folder, TOP, text, top.public_names, args=args, waves=waves)
            except RuntimeError as error:
                said = (folder / "build.log").read_text()
                if waves and ("lz4.h" in said or "zlib.h" in said):
                    raise ToolError(
                        "waves need the headers of zlib and lz4: apt-get install zlib1g-dev "
                        "liblz4-dev"
                    ) from None
                raise ToolError(f"{folder / 'build.log'}: {error}\n{said[-3000:]}") from None
            (folder / "built").touch()
    known.write_text(folder.name)
    return folder


def _rows(lines: list[bytes], row: type, letter: str) -> list:
    """The rows of all lines of one letter; all have the same number of fields."""
    width = len(row._fields)
    fields = b" ".join(lines).split()
    if len(fields) != width * len(lines):
        raise ValueError(f"a line @{letter} has not {width} fields")
    numbers = [int(text, 16) for text in fields]
    return list(map(row._make, zip(*[iter(numbers)] * width, strict=True)))


def read_log(path: str | Path, config: EngineConfig) -> RunLog:
    """Parse the log of a run (see ``stmoe.harness.monitor.LogPrinter``)."""
    log = RunLog(config)
    sorted_lines: dict[bytes, list[bytes]] = {letter.encode(): [] for letter in LINES}
    with open(path, "rb") as file:
        for line in file:
            if line[:1] == b"@":
                sorted_lines[line[1:2]].append(line[3:])
    for letter, (name, row) in LINES.items():
        setattr(log, name, _rows(sorted_lines[letter.encode()], row, letter))
    bits, top_k = config.expert_bits, config.top_k
    mask = (1 << bits) - 1
    shifts = range(0, bits * top_k, bits)
    log.routes = [
        Route(cycle, layer, tuple([packed >> shift & mask for shift in shifts]))
        for cycle, layer, packed in log.routes
    ]
    # AXI counts a burst's beats from 0.
    log.ar = [Burst(cycle, id, address, length + 1) for cycle, id, address, length in log.ar]
    log.write_addresses = [burst._replace(length=burst.length + 1) for burst in log.write_addresses]
    return log


def _trace(config: EngineConfig, arrays: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """The first tokens of a trace as the harness plays them; errors name what is wrong."""
    experts = np.asarray(arrays["experts"])
    shape = (config.num_layers, config.top_k)
    if experts.ndim != 3 or experts.shape[1:] != shape:
        raise ValueError(
            f"experts must have the shape [tokens, {shape[0]}, {shape[1]}], not {experts.shape}"
        )
    count = len(experts) if tokens is None else tokens
    if not 0 < count <= len(experts):
        raise ValueError(f"tokens must be 1 to {len(experts)}, not {count}")
    experts = experts[:count]
    if experts.min() < 0 or experts.max() >= 1 << config.expert_bits:
        raise ValueError(f"experts must be 0 to {config.num_experts - 1}")
    new = np.zeros(count, np.uint8)
    new[0] = 1
    if "sequence" in arrays:
        sequence = np.asarray(arrays["sequence"])[:count]
        new[1:] = sequence[1:] != sequence[:-1]
    token_id = np.asarray(arrays["token_id"])[:count] if "token_id" in arrays else new * 0
    return {"experts": experts, "new": new, "token_id": token_id.astype(np.int64)}


def run_simulation(
    config: EngineConfig,
    trace_arrays: dict[str, Any],
    *,
    tokens: int | None = None,
    attention_cycles: int = 64,
    expert_cycles: int = 32,
    latency: int = 32,
    bandwidth: tuple[int, int] = (1, 1),
    seed: int = 0,
    waves: bool = False,
    out_dir: str | Path | None = None,
    engine_factory: Callable | None = None,
    registers: dict[str, Any] | None = None,
    reconfigure: Sequence[tuple[int, dict[str, Any]]] = (),
    memory: dict[str, int] | None = None,
    stride: int | None = None,
    log: str = "all",
    stall_limit: int | None = None,
    quiet_cycles: int | None = None,
    progress: bool = False,
    strict: bool = True,
    build_args: Sequence[str] = (),
) -> RunLog:
    """Replay a trace on the RTL in its harness.

    Parameters
    ----------
    config : :class:`EngineConfig`
    trace_arrays : mapping
        ``experts`` [tokens, layers, K] in rank order; optional ``sequence`` [tokens] (a change
        begins a new sequence) and ``token_id`` [tokens].
    tokens : int or None
        How many tokens of the trace; None for all.
    attention_cycles, expert_cycles : int
        The accelerator's times, see :class:`stmoe.harness.accelerator.Accelerator`.
    latency : int
        Cycles from a burst's address to its first beat.
    bandwidth : (int, int)
        Beats in so many cycles.
    seed : int
        Of random stalls on grants, releases, fills and events; 0 for none.
    waves : bool
        Write ``dump.fst`` in ``out_dir``.
    out_dir : path or None
        Where ``sim.log`` and the rest go; by default under ``build/runs``.
    engine_factory : callable or None
        Makes another engine than ``stmoe.engine.Engine``.
    registers : dict or None
        Written before the first token: ``control``, ``predictors``, ``threshold`` (quarter units),
        ``quotas`` (a list, or a number for all layers), ``irq_enable``. What is left out keeps its
        reset value.
    reconfigure : sequence of (int, dict)
        Registers to write and commit when so many tokens have finished (soon after: at the next
        time that Python is awake).
    memory : dict or None
        Other inputs of :class:`stmoe.harness.memory_model.MemoryModel`, such as error injection.
    stride : int or None
        Of the :class:`AddressMap`.
    log : str
        ``all``, ``handshakes`` (no event records) or ``none`` (violations only, fastest).
    stall_limit : int or None
        Cycles without progress after which the run fails.
    quiet_cycles : int or None
        Cycles of silence after the last token that count as rest.
    progress : bool
        Show tokens and speed on standard error, once a second.
    strict : bool
        Raise also when a check of the harness failed (``violations``).

    Raises
    ------
    SimulationError
        No progress, a failed register access, a violation: everything but a finished run.
    """
    if log not in ("all", "handshakes", "none"):
        raise ValueError(f"log must be all, handshakes or none, not {log!r}")
    unknown = set(memory or {}) - set(MEMORY_INPUTS)
    if unknown:
        raise ValueError(f"memory has no {sorted(unknown)}; it has {', '.join(MEMORY_INPUTS)}")
    beats, per_cycles = bandwidth
    trace = _trace(config, trace_arrays, tokens)
    count = len(trace["experts"])
    addresses = AddressMap(config, stride)
    folder = build_simulation(
        config, engine_factory=engine_factory, stride=stride, waves=waves, build_args=build_args
    )
    if out_dir is None:
        out_dir = BUILD / "runs" / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
    out_dir = Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    config.save(out_dir / "config.toml")
    np.savez(out_dir / "trace.npz", **trace)

    # The longest that anything may take when all goes well, with room to spare.
    load = latency + addresses.beats * -(-per_cycles // beats)
    layer = attention_cycles + config.top_k * expert_cycles
    if quiet_cycles is None:
        quiet_cycles = 512 + 4 * latency + 4 * -(-per_cycles // beats)
    if stall_limit is None:
        stall_limit = 20_000 + 8 * (layer + (config.top_k + 2) * load) + quiet_cycles
    inputs = {
        "attention_cycles": attention_cycles,
        "expert_cycles": expert_cycles,
        "jitter": seed & 0xFFFF_FFFF,
        "stall_limit": stall_limit,
        "quiet_cycles": quiet_cycles,
        "wake_cycles": 20_000,
        "log_handshakes": int(log != "none"),
        "log_events": int(log == "all"),
        **{f"memory_{name}": 0 for name in MEMORY_INPUTS},
        "memory_latency": latency,
        "memory_beats_numerator": beats,
        "memory_beats_denominator": per_cycles,
        **{f"memory_{name}": value for name, value in (memory or {}).items()},
    }
    result_path = out_dir / "result.json"
    result_path.unlink(missing_ok=True)
    settings = {
        "config": str(out_dir / "config.toml"),
        "trace": str(out_dir / "trace.npz"),
        "tokens": count,
        "stride": stride,
        "inputs": inputs,
        "outputs": OUTPUTS,
        "registers": registers or {},
        "reconfigure": [list(change) for change in reconfigure],
        "result": str(result_path),
        "cocotb_log": str(out_dir / "cocotb.log"),
        # The simulator inherits no descriptors but 0 to 2, and those go to its log.
        "progress": f"/proc/{os.getpid()}/fd/2" if progress else None,
    }
    passed = _simulate(folder, out_dir, settings, waves)

    run = read_log(out_dir / "sim.log", config)
    run.out_dir = out_dir
    run.settings = _commits(config, [registers or {}, *(made for _, made in sorted(reconfigure))])
    if not result_path.exists():
        run.error = "the simulation died, see sim.log"
    else:
        result = json.loads(result_path.read_text())
        run.error = result.pop("error")
        run.counters = result.pop("counters")
        run.wall_seconds = result.pop("wall_seconds", 0.0)
        run.cpu_seconds = result.pop("cpu_seconds", 0.0)
        run.totals = result
    run.cycles = run.finished[-1].cycle if run.finished else run.totals.get("done_cycle", 0)
    if not run.error and not passed:
        run.error = "the simulation failed, see cocotb.log and sim.log"
    said = [run.error] if run.error else []
    if run.violations and (run.error or strict):
        first = "; ".join(map(str, run.violations[:3]))
        said.append(f"{run.totals.get('violations', 0)} violations, the first: {first}")
    if said:
        raise SimulationError(f"{'; '.join(said)} (in {out_dir})", run)
    return run


def _commits(config: EngineConfig, changes: Sequence[dict[str, Any]]) -> list[Settings]:
    """What each commit makes active, the first after reset."""
    made = []
    now = Settings(config.threshold << FRACTION_BITS, [config.quota] * config.num_layers)
    if config.buffer == "axi":
        place = BufferPlace(config)
        now = dataclasses.replace(now, buffer_base=place.base, slot_stride=place.stride)
    for change in changes:
        fields: dict[str, Any] = {n: change[n] for n in ("threshold", "predictors") if n in change}
        if "quotas" in change:
            quotas = change["quotas"]
            fields["quota"] = [quotas] * config.num_layers if isinstance(quotas, int) else quotas
        if "control" in change:
            switches = ("prefetching", "learning", "ordered", "adaptive")
            fields |= {n: bool(change["control"] >> i & 1) for i, n in enumerate(switches)}
        now = dataclasses.replace(now, **fields)
        made.append(now)
    return made


@contextlib.contextmanager
def _shown(path: Path, wanted: bool) -> Iterator[None]:
    """Copy the lines that the simulation appends to ``path`` to standard error as they come."""
    path.unlink(missing_ok=True)
    path.touch()
    over = threading.Event()

    def copy() -> None:
        with open(path) as file:
            while True:
                last = over.is_set()
                sys.stderr.write(file.read())
                sys.stderr.flush()
                if last:
                    return
                over.wait(0.3)

    thread = threading.Thread(target=copy, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if wanted:
            thread.join()


def _simulate(folder: Path, out_dir: Path, settings: dict[str, Any], waves: bool) -> bool:
    """Run the built model; what happened is in the files that ``settings`` name. Returns whether
    cocotb says that it passed."""
    from cocotb_tools.check_results import get_results
    from cocotb_tools.runner import get_runner

    paths = [ROOT / "tb", ROOT / "hw", ROOT / "golden"]
    extra = {
        "STMOE_SIM": json.dumps(settings),
        "COCOTB_LOG_LEVEL": "WARNING",
        "COCOTB_REWRITE_ASSERTION_FILES": BENCHES,
        "PYTHONPATH": os.pathsep.join([str(path) for path in paths] + [p for p in sys.path if p]),
    }
    results = out_dir / "results.xml"
    try:
        get_runner("verilator").test(
            hdl_toplevel=TOP,
            hdl_toplevel_lang="verilog",
            test_module="harness_sim",
            testcase="replay",
            build_dir=folder,
            test_dir=out_dir,
            results_xml=str(results),
            extra_env=extra,
            waves=waves,
            log_file=out_dir / "sim.log",
        )
    except SystemExit:
        # How the runner reports a failure under pytest.
        return False
    try:
        count, failed = get_results(results)
    except RuntimeError:
        return False
    return count == 1 and not failed
