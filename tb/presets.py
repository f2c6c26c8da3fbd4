# SPDX-License-Identifier: Apache-2.0
"""`make presets`: every preset elaborated, linted and simulated against the golden model.

``python tb/presets.py [NAME ...]`` does it for the presets of these names, or all, with
``--tokens`` tokens each (100), random stalls, and routing that is real where there is a trace of
the shape, and else resampled to it (:func:`stmoe_golden.resample.resampled`). Status 0 when all
are clean and every event and counter is golden's, 1 when not, 2 on bad input. ``--markdown``
prints ``docs/presets.md``.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from lint_verilog import lint_text
from sim import Parser, positive
from simulation import BUILD, GPT_OSS, IN_REPO, ROOT, SHARED
from stmoe.toolchain import ToolError
from stmoe_golden.config import PRESETS, ConfigError, EngineConfig, preset
from stmoe_golden.resample import resampled
from stmoe_golden.systems import BITS, EXPERT_SHAPES
from stmoe_golden.trace_import import import_traces
from stmoe_golden.traces import Trace, TraceError

__all__ = ["DOCUMENT", "board_notes", "main", "markdown", "trace_for"]

DOCUMENT = ROOT / "docs" / "presets.md"
REAL = {
    "gpt_oss_20b": GPT_OSS,
    "qwen3_30b_a3b": SHARED / "qwen.route.csv",
}
"""Traces of a preset's model, where they are; the second lacks two experts of each set."""
TOKENS = 100
LARGE = 1 << 24
"""Table bits from which on g++ optimises less, as it takes longer than the run."""


# The document --------------------------------------------------------------------------------


def board_notes(name: str, config: EngineConfig) -> list[str]:
    """For each board whether the engine fits its device, as ``docs/ppa.json`` has it measured."""
    from fpga.board import all_boards

    boards = all_boards()
    measured = {
        (row["preset"], row["D"], board.family): row
        for row in json.loads((ROOT / "docs" / "ppa.json").read_text())
        for board in boards.values()
        if board.part == row["part"] and row["luts"]
    }
    notes = []
    for board in boards.values():
        have = board.capacity.block_rams * board.capacity.block_ram_bits
        rows = [
            row
            for (of, _, family), row in sorted(measured.items(), reverse=True)
            if (of, family) == (name, board.family)
        ]
        if config.table_bits > have:
            notes.append(f"no: tables are {config.table_bits / have:.1f} times its block RAM")
        elif not rows:
            notes.append("not measured")
        else:
            luts, ram = rows[0]["luts"], rows[0]["bram_bits"]
            fits = luts <= board.capacity.luts and ram <= have
            use = f"{luts / board.capacity.luts:.0%} of LUTs, {ram / have:.0%} of block RAM"
            depth = "" if rows[0]["D"] == config.depth else f" with D = {rows[0]['D']}"
            notes.append(f"{'yes' if fits else 'no'}{depth}: {use}")
    return notes


def _size(count: float) -> str:
    """Bytes in a unit that leaves three figures or so."""
    unit = 0
    while count >= 1000 and unit < 3:
        count, unit = count / 1000, unit + 1
    return f"{count:,.{0 if count >= 100 or not unit else 1}f} {('bytes', 'KB', 'MB', 'GB')[unit]}"


def markdown() -> str:
    """``docs/presets.md``."""
    from fpga.board import all_boards

    (limit,) = (f.metadata["high"] for f in fields(EngineConfig) if f.name == "expert_bytes")
    lines = [
        "# Presets",
        "",
        "Written by `python tb/presets.py --markdown > docs/presets.md`; a test holds it up to",
        "date. `make presets` lints and simulates each, see [results.md](results.md).",
        "",
        "## The engine",
        "",
        "*Table bits* are those of the spatial and temporal tables, (D+1) * L * E * E * weight",
        "bits; *slots* are L * quota + staging. What a slot holds is software's choice up to",
        "`expert_bytes`, which the presets leave at the 2,048 bytes of simulations: set it to the",
        "model's (`--set expert_bytes=...`). It changes counters' widths, not tables.",
        "",
        "| preset | L | E | K | D | table bits | quota | staging | slots |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in PRESETS.items():
        lines.append(
            f"| `{name}` | {c.num_layers} | {c.num_experts} | {c.top_k} | {c.depth} "
            f"| {c.table_bits:,} | {c.quota} | {c.num_staging} | {c.num_slots} |"
        )
    lines += [
        "",
        "## The model's experts, and the buffer that they need",
        "",
        "Bytes of an expert are 3 * hidden * intermediate * bits / 8: gate, up and down, without",
        "the scales that a quantised format adds. The buffer is slots times that. A smaller one is",
        "a smaller quota, down to 0 (staging alone), at any time by registers. What is marked * is",
        f"more than `expert_bytes` may be ({limit:,}): such an expert has to be divided among",
        "several engines.",
        "",
        "| preset | hidden x intermediate "
        + "".join(f"| expert, {dtype} " for dtype in BITS)
        + "".join(f"| buffer, {dtype} " for dtype in BITS)
        + "| staging alone, int4 |",
        "|---" * (3 + 2 * len(BITS)) + "|",
    ]
    for name, c in PRESETS.items():
        if name not in EXPERT_SHAPES:
            continue
        hidden, intermediate = EXPERT_SHAPES[name]
        expert = {dtype: 3 * hidden * intermediate * bits / 8 for dtype, bits in BITS.items()}
        lines.append(
            f"| `{name}` | {hidden:,} x {intermediate:,} "
            + "".join(f"| {_size(size)}{'*' if size > limit else ''} " for size in expert.values())
            + "".join(f"| {_size(c.num_slots * expert[dtype])} " for dtype in BITS)
            + f"| {_size(c.num_staging * expert['int4'])} |"
        )
    boards = all_boards()
    lines += [
        "",
        "## Boards",
        "",
        "The engine alone, without event port, against the whole device, from",
        "[ppa.json](ppa.json) (`make ppa`), which measures one device of each family.",
        "`make boards` lists the boards.",
        "",
        "| preset | " + " | ".join(f"`{board}`" for board in boards) + " |",
        "|---" * (1 + len(boards)) + "|",
        *(
            f"| `{name}` | " + " | ".join(board_notes(name, config)) + " |"
            for name, config in PRESETS.items()
        ),
    ]
    return "\n".join(lines) + "\n"


# The runs ------------------------------------------------------------------------------------


def trace_for(name: str, tokens: int) -> tuple[Trace, str]:
    """(``tokens`` tokens of a preset's shape, where they come from in words).

    Where the trace has several sequences, the first ends in the middle of them.
    """
    config = preset(name)
    path = REAL.get(name, IN_REPO)
    path = path if path.exists() else IN_REPO
    trace = import_traces([path])
    if not trace.complete:
        trace = trace.take(trace.present.all(axis=1))
    ends = np.nonzero(np.diff(trace.sequence))[0] + 1
    begin = max(0, int(ends[0]) - tokens // 2) if len(ends) else 0
    if begin + tokens > trace.num_tokens:
        raise TraceError(
            f"{trace.name}: tokens must be 1 to {trace.num_tokens - begin}, not {tokens}"
        )
    trace = trace.take(slice(begin, begin + tokens))
    shape = (config.num_layers, config.num_experts, config.top_k)
    if (trace.num_layers, trace.num_experts, trace.top_k) == shape:
        return trace, path.name
    return resampled(trace, config), f"resampled from {path.name}"


def run(name: str, tokens: int) -> bool:
    """Lint and simulate one preset, and print how it went."""
    from sim_run import LEAST, SimulationError, build_simulation, run_simulation
    from stmoe.harness.run_log import check_run, times_of
    from stmoe.top import generate
    from stmoe_golden.checker import Mismatch

    config = preset(name)
    trace, source = trace_for(name, tokens)
    began = time.process_time()
    text = generate(config)
    seconds = time.process_time() - began
    findings = lint_text(text, name)
    print(
        f"presets: {name}: {len(text):,} characters of Verilog, {seconds:.0f} s of CPU without "
        f"Yosys's, lint {'FAILED' if findings else 'clean'}",
        flush=True,
    )
    if findings:
        print(findings, file=sys.stderr)
        return False
    flags = LEAST if config.table_bits > LARGE else ("-CFLAGS", "-O1")
    attention, expert = times_of(config, 1.0)
    began = time.perf_counter()
    try:
        build_simulation(config, build_args=flags)
        built = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        log = run_simulation(
            config,
            {"experts": trace.experts, "sequence": trace.sequence},
            attention_cycles=attention,
            expert_cycles=expert,
            seed=1,
            out_dir=BUILD / "presets" / name,
            build_args=flags,
            progress=sys.stderr.isatty(),
        )
        records, counters = check_run(log, config)
    except (Mismatch, SimulationError, KeyError) as error:
        print(f"presets: {name}: FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    wrong = {key: pair for key, pair in counters.items() if pair[0] != pair[1]}
    done = len(log.finished)
    good = not wrong and done == tokens and records > 0
    print(
        f"presets: {name}: {done} of {tokens} tokens ({source}), {records:,} events, "
        f"{len(counters)} counters: "
        + (f"0 mismatches; build {built:.0f} s, {peak:.1f} GB; " if good else f"FAILED {wrong}; ")
        + f"{log.cycles:,} cycles at {log.cycles_per_second:,.0f} a second",
        flush=True,
    )
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `make presets`."""
    parser = Parser(prog="presets", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--tokens", type=positive, default=TOKENS)
    parser.add_argument("--markdown", action="store_true", help="print docs/presets.md")
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown(), end="")
        return 0
    if shutil.which("ccache"):
        os.environ.setdefault("OBJCACHE", "ccache")
    try:
        for name in options.names:
            preset(name)
        failed = [name for name in options.names or PRESETS if not run(name, options.tokens)]
    except (ConfigError, TraceError, ToolError) as error:
        print(f"presets: {error}", file=sys.stderr)
        return 2
    print(f"presets: {len(failed)} with mismatches or findings{': ' if failed else ''}", end="")
    print(", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # fpga/ is not installed
    raise SystemExit(main())
