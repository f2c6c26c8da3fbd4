# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=report`: time and size of the reports of 10,000 tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from simulation import GPT_OSS
from stmoe.harness.run_log import times_of
from stmoe_golden.config import EngineConfig, preset
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import Trace, config_for, load_trace, save_trace

__all__ = ["figures"]

COMMAND = "make bench BENCH_ARGS=report"
TOKENS = 10_000
STMOE = [sys.executable, "-m", "stmoe.cli"]


def write_compare(trace: Path, result: Path) -> None:
    """What ``stmoe compare --json`` prints of the trace."""
    with result.open("w") as file:
        subprocess.run([*STMOE, "compare", trace, "--json"], stdout=file, check=True)


def write_sim(trace: Path, config: EngineConfig, result: Path) -> None:
    """A report of ``make sim`` without what the RTL would have had to run for, minutes for so many
    tokens: the counters, which are one table, and the RTL's own line among the latencies."""
    attention, expert = times_of(config, 1.0)
    found = {
        "match": True, "trace": str(trace), "preset": None, "tokens": TOKENS, "events": 0,
        "mismatches": 0, "cycles": 0, "load_ratio": 1.0, "seed": 1,
        "config": dataclasses.asdict(config), "counters": {}, "latency": None,
        "machine": {"attention_cycles": attention, "expert_cycles": expert, "latency": 32},
    }  # fmt: skip
    result.write_text(json.dumps(found))


def figures() -> Iterator[tuple[str, str, str, bool | None, str]]:
    """(name, measured, floor, passed, command) of each figure.

    The whole command is timed, from its start to its end, the best of two: what it times again
    and both replays are part of it. Numba's cache is filled first, as any earlier run would.
    """
    name = "gpt_oss_20b"
    trace: Trace
    if GPT_OSS.exists():
        trace = load_trace(GPT_OSS).head(TOKENS)
        config = preset("gpt_oss_20b")
    else:
        name = "a synthetic 24 x 32 model"
        trace = markov_trace(num_tokens=TOKENS, num_layers=24, num_experts=32, top_k=4)
        config = config_for(trace)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_trace(trace, folder / "trace.npz")
        write_compare(folder / "trace.npz", folder / "comparison.json")
        write_sim(folder / "trace.npz", config, folder / "sim.json")
        for kind, result in (("comparison", "comparison.json"), ("`make sim`", "sim.json")):
            yield from report_figures(f"{kind} of 10,000 tokens, {name}", folder / result)


def report_figures(name: str, result: Path) -> Iterator[tuple[str, str, str, bool | None, str]]:
    """Time and size of one result's report."""
    out = result.parent / "out"
    seconds, busy = [], []
    for _ in range(2):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*STMOE, "report", result, "-o", out], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    size = os.path.getsize(out / "index.html")
    timeline = os.path.getsize(out / "timeline.json")
    yield (
        f"report of a {name}",
        f"{min(seconds):.1f} s ({min(busy):.1f} s of CPU time)",
        "5 s",
        min(seconds) < 5,
        COMMAND,
    )
    yield (
        "its size",
        f"{size / 1e6:.2f} MB (timeline.json beside it {timeline / 1e6:.2f} MB)",
        "5 MB",
        size < 5e6 and timeline < 5e6,
        COMMAND,
    )
