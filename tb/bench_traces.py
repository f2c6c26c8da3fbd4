# SPDX-License-Identifier: Apache-2.0
"""How long `stmoe trace` takes, and how much memory, on large files; each in a process of its own.

``python tb/bench_traces.py [MB]`` writes JSON lines and a route_trace of about that size (1,000 by
default) to a temporary folder, converts both, and prints seconds, the peak of resident memory
beyond that of an idle process, and the size of the arrays; then the time of `stmoe trace info`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stmoe_golden.traces import Trace, load_trace, save_trace

LAYERS, EXPERTS, TOP_K = 48, 128, 8
GPT_OSS = Path(__file__).parents[2] / "shared" / "traces" / "gpt_oss_20b_decode.npz"
RUN = """
import re, sys
from stmoe import cli
import stmoe_golden.trace_import
def peak():  # VmHWM begins anew with a process; ru_maxrss is inherited
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
before = peak()
assert cli.main(sys.argv[1:]) == 0
print(peak() - before)
"""


def measured(*arguments: object) -> tuple[float, int]:
    """Seconds of a command, start-up included, and the bytes of memory it needed more."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - began, int(done.stdout.split()[-1])


def write_jsonl(path: Path, size: int) -> int:
    """JSON lines of at least ``size`` bytes; returns their tokens."""
    rng = np.random.default_rng(1)
    sets = [json.dumps(rng.permutation(EXPERTS)[:TOP_K].tolist()) for _ in range(997)]
    weights = json.dumps([1 / TOP_K] * TOP_K)
    with path.open("w") as file:
        head = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
        file.write(json.dumps(head) + "\n")
        token = 0
        while file.tell() < size:
            file.writelines(
                f'{{"token": {token}, "layer": {layer}, "ids": {sets[(token + layer) % 997]}, '
                f'"weights": {weights}}}\n'
                for layer in range(LAYERS)
            )
            token += 1
    return token


def write_route_csv(path: Path, size: int) -> int:
    """The same as route_trace v1."""
    rng = np.random.default_rng(1)
    sets = [rng.permutation(EXPERTS)[:TOP_K].tolist() for _ in range(997)]
    with path.open("w") as file:
        file.write(
            f"# route_trace v1\n# model=m n_layer={LAYERS} n_expert={EXPERTS} "
            f"n_expert_used={TOP_K}\nturn,phase,step,layer,slot,expert,weight,residency,"
            "expert_bytes\n"
        )
        token = 0
        while file.tell() < size:
            file.writelines(
                f"0,1,{token},{layer},{k},{expert},0.125,0,0\n"
                for layer in range(LAYERS)
                for k, expert in enumerate(sets[(token + layer) % 997])
            )
            token += 1
    return token


def main() -> None:
    """Print every figure."""
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1000) * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("jsonl", write_jsonl), ("route-csv", write_route_csv)):
            path = Path(folder) / name
            tokens = write(path, size)
            seconds, more = measured("trace", "convert", path, "-o", Path(folder) / "t.npz")
            arrays = sum(a.nbytes for a in load_trace(Path(folder) / "t.npz").arrays().values())
            print(
                f"convert {name}: {path.stat().st_size / 1e6:,.0f} MB, {tokens:,} tokens in "
                f"{seconds:.1f} s, {more / 1e6:,.0f} MB of memory for arrays of "
                f"{arrays / 1e6:,.0f} MB",
                flush=True,
            )
            path.unlink()
        path = GPT_OSS
        if not path.exists():
            rng = np.random.default_rng(1)
            experts = rng.permuted(np.tile(np.arange(32, dtype=np.uint8), (70756, 24, 1)), axis=2)
            path = Path(folder) / "random.npz"
            info = {"num_layers": 24, "num_experts": 32, "top_k": 4}
            sequence = np.arange(70756, dtype=np.int32) // 300
            save_trace(Trace(experts=experts[:, :, :4].copy(), sequence=sequence, info=info), path)
        measured("trace", "info", path)  # Numba compiles once
        seconds, _ = measured("trace", "info", path)
        print(f"info {path.name}: {load_trace(path).num_tokens:,} tokens in {seconds:.1f} s")


if __name__ == "__main__":
    main()
