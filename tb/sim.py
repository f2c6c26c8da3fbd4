# SPDX-License-Identifier: Apache-2.0
"""`make sim`: the engine in Verilator replays a real trace, held to the golden model.

Writes ``build/sim/report.json`` and prints a summary. Status 0 when every event and every counter
agrees, 1 on any mismatch, timeout or violation, 2 on bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from simulation import BUILD, ROOT
from stmoe.harness.run_log import RunLog, check_run, times_of
from stmoe.toolchain import ToolError, verilator_folder
from stmoe_golden.checker import Mismatch
from stmoe_golden.config import ConfigError, EngineConfig, preset
from stmoe_golden.traces import Trace, TraceError, config_for, load_trace

DEFAULT_TRACE = ROOT / "sim_traces" / "olmoe_stdlib_8x32.npz"
DEFAULT_TOKENS = 500
UNCHECKED = ("cycle_low", "status", "irq_status")
"""Registers that are no counters."""


class Parser(argparse.ArgumentParser):
    """Usage errors are one line and status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def positive(text: str) -> int:
    """A number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, not {text!r}")
    return value


def natural(text: str) -> int:
    """A number of 0 or more."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be an integer of 0 or more, not {text!r}")
    return value


def ratio(text: str) -> float:
    """A load ratio."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be 0.01 to 100, not {text!r}")
    return value


def latency_of(run: RunLog) -> dict[str, Any]:
    """Cycles per token, from the token's handshake to the end of its last expert."""
    begun = {i: token.cycle for i, token in enumerate(run.tokens)}
    spans = np.array([f.cycle - begun[f.token] for f in run.finished], dtype=float)
    return {
        "cycles": spans.astype(int).tolist(),
        "mean": float(spans.mean()),
        "p50": float(np.percentile(spans, 50)),
        "p99": float(np.percentile(spans, 99)),
    }


def simulate(options: argparse.Namespace, trace: Trace, config: EngineConfig) -> int:
    """Run, check and report; returns the exit status."""
    from sim_run import SimulationError, build_simulation, run_simulation
    from stmoe_golden.replay import replay_trace

    attention, expert = times_of(config, options.load_ratio)
    load = config.top_k * config.slot_beats
    load_ratio = load / (attention + config.top_k * expert)
    print(
        f"sim: {trace.num_tokens} tokens of {trace.name}\n"
        f"sim: {config.num_layers} layers x {config.num_experts} experts, top-{config.top_k}, "
        f"{config.num_slots} slots (quota {config.quota}, staging {config.num_staging}); load "
        f"ratio r = {load_ratio:.2f}",
        flush=True,
    )
    out = options.out
    report: dict[str, Any] = {
        "match": False,
        "trace": str(options.trace),
        "preset": options.preset,
        "tokens": trace.num_tokens,
        "events": 0,
        "mismatches": 0,
        "cycles": 0,
        "wall_s": 0.0,
        "load_ratio": load_ratio,
        "seed": options.seed,
        "config": dataclasses.asdict(config),
        "machine": {
            "attention_cycles": attention,
            "expert_cycles": expert,
            "latency": options.latency,
        },
        "counters": {},
        "prediction": None,
        "latency": None,
    }
    began = time.perf_counter()
    print("sim: building the model (Verilator, once per configuration) ...", flush=True)
    build_simulation(config, waves=options.waves)
    print(f"sim: built in {time.perf_counter() - began:.1f} s", flush=True)
    arrays = {"experts": trace.experts, "sequence": trace.sequence}
    if trace.token_id is not None:
        arrays["token_id"] = trace.token_id
    failure = None
    began = time.perf_counter()
    try:
        run = run_simulation(
            config,
            arrays,
            attention_cycles=attention,
            expert_cycles=expert,
            latency=options.latency,
            seed=options.seed,
            waves=options.waves,
            out_dir=out / "run",
            progress=True,
            strict=False,
        )
    except SimulationError as error:
        failure, run = str(error), error.log
    report["wall_s"] = round(time.perf_counter() - began, 3)
    report["cycles"] = run.cycles
    report["events"] = len(run.events)
    print("sim: checking every event and counter against the golden model ...", flush=True)
    try:
        # Also after a timeout: where the two part is where to look.
        report["events"], report["counters"] = check_run(run, config)
    except Mismatch as error:
        failure = str(error)
        report["mismatches"] += 1
    except KeyError:
        failure = failure or "the run left no counters"
    if failure is None or not report["mismatches"]:
        for name, (rtl, golden) in report["counters"].items():
            if rtl != golden:
                report["mismatches"] += 1
                text = f"counter {name}: RTL {rtl}, golden {golden}"
                failure = f"{failure}\n{text}" if failure else text
    if failure is None and run.violations:
        failure = f"the harness saw {len(run.violations)} violations, first {run.violations[0]}"
        report["mismatches"] += len(run.violations)
    if failure is None and len(run.finished) != trace.num_tokens:
        failure = f"{len(run.finished)} of {trace.num_tokens} tokens finished"
    if failure is None and not report["events"]:
        failure = "the event log is empty"
    if run.finished and len(run.tokens) >= len(run.finished):
        report["latency"] = latency_of(run)
    report["prediction"] = {
        key: value
        for key, value in replay_trace(trace, config).as_dict().items()
        if key
        in ("tokens", "tokens_per_s", "recall", "coverage", "issue_rate", "precision", "per_layer")
    }
    report["match"] = failure is None
    if failure is not None:
        report["failure"] = failure
    text = json.dumps(report, indent=1)
    temporary = out / ".report.json.part"
    temporary.write_text(text)
    os.replace(temporary, out / "report.json")
    if options.waves:
        print(f"sim: waves in {out / 'run' / 'dump.fst'}")
    if failure is not None:
        print(failure, file=sys.stderr)
        print(f"sim: FAILED, see {out / 'report.json'} and {out / 'run'}", file=sys.stderr)
        return 1
    summary(report, run)
    return 0


def summary(report: dict[str, Any], run: RunLog) -> None:
    """What a newcomer wants to see."""
    count = {name: pair[0] for name, pair in report["counters"].items()}
    needed = count["hits"] + count["lates"] + count["misses"]
    prediction, latency = report["prediction"], report["latency"]
    print(
        f"sim: {report['cycles']:,} cycles in {report['wall_s']:.1f} s "
        f"({run.cycles_per_second:,.0f} cycles/s), {report['events']:,} events checked\n"
        f"sim: of {needed:,} experts needed {count['hits'] / needed:.1%} were resident "
        f"({count['useful']:,} of them prefetched), {count['lates'] / needed:.1%} on their way, "
        f"{count['misses'] / needed:.1%} missing\n"
        f"sim: {count['prefetch_loads']:,} prefetches, {count['demand_loads']:,} demand loads, "
        f"{count['cancelled']:,} cancelled, {count['evictions']:,} evictions\n"
        f"sim: predictor recall@K {prediction['recall']['1K']:.3f}, token latency mean "
        f"{latency['mean']:,.0f}, p50 {latency['p50']:,.0f}, p99 {latency['p99']:,.0f} cycles\n"
        f"sim: MATCH: {report['events']:,} events and {len(count)} counters equal the golden "
        f"model's"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line of `make sim`."""
    parser = Parser(prog="sim", description=__doc__)
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--preset")
    parser.add_argument("--tokens", type=positive)
    parser.add_argument("--seed", type=natural, default=1)
    parser.add_argument("--load-ratio", type=ratio, default=1.0)
    parser.add_argument("--latency", type=positive, default=32, help="memory latency, cycles")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--waves", action="store_true")
    parser.add_argument("--out", type=Path, default=BUILD / "sim")
    options = parser.parse_args(argv)
    try:
        if options.preset:
            preset(options.preset)
        trace = load_trace(options.trace)
        config = config_for(trace, options.preset, options.set)
        if not config.event_port:
            raise ConfigError("event_port must be true for sim, not false")
        tokens = options.tokens or min(DEFAULT_TOKENS, trace.num_tokens)
        if tokens > trace.num_tokens:
            raise TraceError(f"{trace.name}: tokens must be 1 to {trace.num_tokens}, not {tokens}")
        verilator_folder()
        options.out = options.out.resolve()
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.json").unlink(missing_ok=True)
        return simulate(options, trace.head(tokens), config)
    except (ConfigError, TraceError, ToolError) as error:
        print(f"sim: {error}", file=sys.stderr)
    except OSError as error:
        print(f"sim: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
