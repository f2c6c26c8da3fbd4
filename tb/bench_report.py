# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=report`: time and size of the report of a run of 10,000 tokens."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from simulation import GPT_OSS
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import Trace, load_trace, save_trace

__all__ = ["figures"]

COMMAND = "make bench BENCH_ARGS=report"
TOKENS = 10_000


def figures() -> Iterator[tuple[str, str, str, bool | None, str]]:
    """(name, measured, floor, passed, command) of each figure.

    The whole command is timed, from its start to its end, the best of two: what it times again
    and both replays are part of it. Numba's cache is filled first, as any earlier run would.
    """
    name = "gpt_oss_20b"
    trace: Trace
    if GPT_OSS.exists():
        trace = load_trace(GPT_OSS).head(TOKENS)
    else:
        name = "a synthetic 24 x 32 model"
        trace = markov_trace(num_tokens=TOKENS, num_layers=24, num_experts=32, top_k=4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_trace(trace, folder / "trace.npz")
        result = folder / "compare.json"
        stmoe = [sys.executable, "-m", "stmoe.cli"]
        with result.open("w") as file:
            subprocess.run([*stmoe, "compare", folder / "trace.npz", "--json"], stdout=file,
                           check=True)  # fmt: skip
        seconds, busy = [], []
        for _ in range(2):
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [*stmoe, "report", result, "-o", folder / "out"], capture_output=True, check=True
            )
            seconds.append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            busy.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        size = os.path.getsize(folder / "out" / "index.html")
        timeline = os.path.getsize(folder / "out" / "timeline.json")
    yield (
        f"report of a 10,000-token run, {name}",
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
