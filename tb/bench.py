# SPDX-License-Identifier: Apache-2.0
"""`make bench`: every figure of docs/results.md, measured, with the floor it has to pass.

Prints a Markdown table and writes ``build/bench/results.json``. ``python tb/bench.py NAME ...``
runs only the parts of those names. Status 1 when a figure misses its floor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simulation import BUILD, GPT_OSS, IN_REPO
from stmoe_golden.config import EngineConfig, preset
from stmoe_golden.traces import Trace, config_for, load_trace


class Figure(NamedTuple):
    """One measured figure; ``floor`` is a text, ``ok`` None when nothing was asked."""

    name: str
    value: str
    floor: str
    ok: bool | None
    command: str


def arrays_of(trace: Trace, tokens: int) -> dict[str, np.ndarray]:
    """The first tokens of a trace, as the harness takes them."""
    head = trace.head(tokens)
    arrays = {"experts": head.experts, "sequence": head.sequence}
    if head.token_id is not None:
        arrays["token_id"] = head.token_id
    return arrays


def simulate(config: EngineConfig, trace: Trace, tokens: int, **options: Any) -> Any:
    """A run of the harness over the first tokens of a trace."""
    from sim_run import run_simulation

    return run_simulation(config, arrays_of(trace, tokens), progress=True, **options)


def checked(config: EngineConfig, run: Any) -> tuple[int, int]:
    """(records checked, mismatches) of a run against the golden model."""
    from stmoe.harness.run_log import check_run
    from stmoe_golden.checker import Mismatch

    try:
        records, counters = check_run(run, config)
    except Mismatch as error:
        print(error, file=sys.stderr)
        return len(run.events), 1
    return records, sum(rtl != golden for rtl, golden in counters.values())


# Latencies -----------------------------------------------------------------------------------


class Latencies(NamedTuple):
    """Cycles from the one in which a route is taken, over all events of a run."""

    resident_grant: list[int]
    missing_free: list[int]
    missing_victim: list[int]
    prefetch_free: list[int]
    prefetch_victim: list[int]
    event_gap: list[int]


def latencies(run: Any, config: EngineConfig) -> Latencies:
    """Read the latencies off the event port's records, whose cycles the checker holds to the
    monitors' of the harness."""
    from stmoe.payloads import EventKind as Kind

    out = Latencies([], [], [], [], [], [])
    owed = 0
    kind_of: dict[int, bool] = {}
    evicts: dict[int, bool] = {}
    route: Any = None
    granted = missing = prefetched = True
    idle = False
    gates: set[int] = set()
    for e in run.events:
        if e.kind == Kind.ROUTE:
            if route is not None:
                out.event_gap.append(e.cycle - route.cycle)
            route = e
            granted = missing = prefetched = False
            # Whether something else may have kept the engine or the link busy.
            idle = owed == 0
            gates = set()
        elif e.kind in (Kind.FILL_DONE, Kind.DRAINED, Kind.RELEASE, Kind.CANCEL, Kind.PROMOTE):
            gates.add(int(e.kind))
        elif e.kind == Kind.LOAD_START:
            index = e.data >> 16
            kind_of[index], evicts[index] = bool(e.flag & 1), bool(e.flag & 2)
        elif e.kind == Kind.BURST:
            owed += 1
            if route is None:
                continue
            if not kind_of[e.expert] and not missing and idle:
                missing = True
                target = out.missing_victim if evicts[e.expert] else out.missing_free
                target.append(e.cycle - route.cycle)
            elif kind_of[e.expert] and not prefetched:
                prefetched = True
                # Comparable only where nothing was demanded from the link before it.
                if idle and not missing and not gates:
                    target = out.prefetch_victim if evicts[e.expert] else out.prefetch_free
                    target.append(e.cycle - route.cycle)
            if kind_of[e.expert]:
                prefetched = True
        elif e.kind == Kind.LAST_BEAT:
            owed -= 1
        elif e.kind == Kind.GRANT and route is not None and not granted:
            granted = True
            if not gates & {int(Kind.FILL_DONE)}:
                out.resident_grant.append(e.cycle - route.cycle)
    return out


def bound(values: list[int]) -> str:
    """Worst and best, with how many there were."""
    return f"{max(values)} (least {min(values)}, {len(values):,} events)" if values else "none seen"


# Parts ---------------------------------------------------------------------------------------


def part_sim() -> Iterator[Figure]:
    """The model's build, the default run, and 2,000 tokens against golden."""
    from sim_run import build_simulation
    from stmoe.harness.run_log import times_of

    trace = load_trace(IN_REPO)
    config = config_for(trace)
    began = time.perf_counter()
    folder = build_simulation(config, build_args=[f"-DBENCH={time.time_ns()}"])
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    command = "make bench BENCH_ARGS=sim"
    yield Figure(
        "build of the model, in-repo trace's shape",
        f"{seconds:.0f} s",
        "120 s",
        seconds < 120,
        command,
    )
    attention, expert = times_of(config, 1.0)
    build_simulation(config)
    began = time.perf_counter()
    run = simulate(
        config, trace, 500, attention_cycles=attention, expert_cycles=expert, seed=1, log="all"
    )
    records, wrong = checked(config, run)
    seconds = time.perf_counter() - began
    yield Figure(
        "`make sim` default, 500 tokens, run and check",
        f"{seconds:.0f} s",
        "90 s",
        seconds < 90,
        command,
    )
    run = simulate(config, trace, 2000, attention_cycles=attention, expert_cycles=expert, seed=2)
    records, wrong = checked(config, run)
    yield Figure(
        "mismatches, in-repo trace, 2,000 tokens",
        f"{wrong} of {records:,} events",
        "0",
        wrong == 0,
        command,
    )


def part_gpt_oss() -> Iterator[Figure]:
    """500 tokens of a 20 B model's routing against golden, with its preset."""
    from stmoe.harness.run_log import times_of

    if not GPT_OSS.exists():
        return
    trace, config = load_trace(GPT_OSS), preset("gpt_oss_20b")
    attention, expert = times_of(config, 1.0)
    run = simulate(config, trace, 500, attention_cycles=attention, expert_cycles=expert, seed=1)
    records, wrong = checked(config, run)
    yield Figure(
        "mismatches, gpt_oss_20b trace and preset, 500 tokens",
        f"{wrong} of {records:,} events",
        "0",
        wrong == 0,
        "make bench BENCH_ARGS=gpt_oss",
    )


def part_latency() -> Iterator[Figure]:
    """Latencies without random stalls, gpt_oss_20b preset."""
    config = preset("gpt_oss_20b")
    trace = load_trace(GPT_OSS) if GPT_OSS.exists() else None
    if trace is None:
        trace = load_trace(IN_REPO)
        config = config_for(trace)
    from stmoe.harness.run_log import times_of

    command = "make bench BENCH_ARGS=latency"
    # A slow accelerator: the link is idle when the next event comes.
    attention, expert = times_of(config, 0.25)
    run = simulate(config, trace, 60, attention_cycles=attention, expert_cycles=expert)
    seen = latencies(run, config)
    limit = 3 * config.top_k + 30
    for name, values, most in (
        ("routing event to grant of a resident expert", seen.resident_grant, 6),
        ("routing event to first ARVALID, free slot", seen.missing_free, 6),
        ("routing event to first ARVALID, victim chosen", seen.missing_victim, 16),
        ("routing event to first prefetch ARVALID, free slot", seen.prefetch_free, limit),
        ("routing event to first prefetch ARVALID, victim chosen", seen.prefetch_victim, limit),
    ):
        ok = max(values) <= most if values else None
        yield Figure(name, f"{bound(values)} cycles", f"{most} cycles", ok, command)
    # Everything resident and an accelerator without compute time: events as fast as they go.
    roomy = config.replace(quota=config.num_experts, staging=2 * config.top_k)
    run = simulate(roomy, trace, 150, attention_cycles=1, expert_cycles=1)
    gaps = latencies(run, roomy).event_gap[-1000:]
    rate = float(np.mean(gaps))
    yield Figure(
        "sustained routing events, gpt_oss_20b preset, all resident",
        f"one per {rate:.1f} cycles (worst {max(gaps)})",
        "64 cycles",
        rate <= 64,
        command,
    )


def part_speed() -> Iterator[Figure]:
    """Simulated cycles in a second of wall time."""
    from stmoe.harness.run_log import times_of
    from stmoe_golden.synthetic import markov_trace

    config = preset("tiny")
    trace = markov_trace(
        num_tokens=4000,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        seed=1,
    )
    attention, expert = times_of(config, 1.0)
    run = simulate(config, trace, 4000, attention_cycles=attention, expert_cycles=expert)
    speed = run.cycles_per_second
    yield Figure(
        "harness under cocotb, tiny preset",
        f"{speed:,.0f} cycles/s",
        "100,000 cycles/s",
        speed >= 100_000,
        "make bench BENCH_ARGS=speed",
    )


def part_replay() -> Iterator[Figure]:
    """Prediction replay: speed, memory, coverage."""
    from stmoe_golden.replay import replay_trace

    command = "make bench BENCH_ARGS=replay"
    for label, path in (("gpt_oss_20b", GPT_OSS), ("in-repo", IN_REPO)):
        if not path.exists():
            continue
        trace = load_trace(path)
        config = config_for(trace)
        required = label == "gpt_oss_20b"
        result = replay_trace(trace, config, issue_rate=1.5)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if required:
            speed = result.tokens_per_s
            yield Figure(
                "golden replay, gpt_oss_20b, one core",
                f"{speed:,.0f} tokens/s",
                "10,000 tokens/s",
                speed >= 10_000,
                command,
            )
            yield Figure("its peak memory", f"{peak:.0f} MB", "1,000 MB", peak < 1000, command)
        good = result.coverage >= 0.895 and result.issue_rate < 1.53
        yield Figure(
            f"coverage, {label} trace, threshold from the warm-up half",
            f"{result.coverage:.4f} at issue rate {result.issue_rate:.3f}",
            ".895 at less than 1.53" if required else "",
            good if required else None,
            command,
        )
        r = result.recall
        yield Figure(
            f"recall@K, 1.5K, 2K, 3K, {label} trace",
            " ".join(f"{r[key]:.4f}" for key in ("1K", "1.5K", "2K", "3K")),
            "",
            None,
            command,
        )
        paper = replay_trace(trace, config, predictor="paper", issue_rate=1.5)
        yield Figure(
            f"the paper's tables, {label} trace, M = 2K",
            f"{paper.coverage:.4f} at issue rate {paper.issue_rate:.3f}",
            "",
            None,
            command,
        )


def part_dma() -> Iterator[Figure]:
    """Use of the AXI read channel."""
    from bench_dma import measure_utilisation

    for latency, floor in ((1, 0.995), (100, 0.95)):
        use = measure_utilisation(latency)
        yield Figure(
            f"AXI read channel, 64 experts of 4 KiB, latency {latency}",
            f"{use:.2%} of beats",
            f"{floor:.1%}",
            use >= floor,
            "make bench BENCH_ARGS=dma",
        )


def figures_of(module: str) -> Callable[[], Iterator[Figure]]:
    """A part that has a file of its own, whose ``figures()`` gives them as plain tuples."""

    def part() -> Iterator[Figure]:
        for figure in importlib.import_module(module).figures():
            yield Figure(*figure)

    return part


PARTS: dict[str, Callable[[], Iterator[Figure]]] = {
    "replay": part_replay,
    "compare": figures_of("bench_compare"),
    "holdout": figures_of("bench_holdout"),
    "report": figures_of("bench_report"),
    "adaptive": figures_of("bench_adaptive"),
    "recovery": figures_of("bench_recovery"),
    "lookahead": figures_of("bench_lookahead"),
    "latency": part_latency,
    "speed": part_speed,
    "dma": part_dma,
    "sim": part_sim,
    "gpt_oss": part_gpt_oss,
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print their figures."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        print(f"bench: unknown part {unknown[0]!r}; parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    figures: list[Figure] = []
    print("| figure | measured | floor | | command |\n|---|---|---|---|---|")
    for name in options.parts or PARTS:
        for figure in PARTS[name]():
            figures.append(figure)
            mark = {True: "pass", False: "MISSED", None: ""}[figure.ok]
            print(
                f"| {figure.name} | {figure.value} | {figure.floor} | {mark} | "
                f"`{figure.command}` |",
                flush=True,
            )
    folder = Path(BUILD) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps([f._asdict() for f in figures], indent=1))
    return int(any(figure.ok is False for figure in figures))


if __name__ == "__main__":
    raise SystemExit(main())
