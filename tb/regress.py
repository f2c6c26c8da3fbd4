# SPDX-License-Identifier: Apache-2.0
"""`make regress`: random configurations of the engine, each held to the golden model.

Each configuration is drawn from a seed (shapes that are no powers of two, D from 0 to 4, all widths
of the AXI bus, bursts of any length, quotas from 0, as few slots as there may be, one layer, one
expert, any number of lanes that divides the experts), elaborated, built with Verilator in the
harness, and run on synthetic routing with random stalls, latency, bandwidth and answers out of
order, once for each of ``--seeds``. Every event and every counter must be golden's. A failure names
its configuration and its run, so that ``--first N --configs 1`` repeats it, and leaves the
configuration as TOML in ``build/regress``. Status 0 when all agree, 1 when one does not, 2 on bad
input.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from sim import Parser, positive
from simulation import BUILD
from stmoe_golden.config import ConfigError, EngineConfig
from stmoe_golden.synthetic import markov_trace

FOLDER = BUILD / "regress"
TOKENS = 24


def random_config(seed: int) -> EngineConfig:
    """A legal configuration; the same for the same seed."""
    rng = random.Random(f"config {seed}")
    while True:
        layers = rng.choice((1, 2, 3, 4, 5, 6, 7))
        experts = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16))
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        top_k = rng.randint(1, min(experts, 5))
        width = rng.choice((32, 64, 64, 128, 256, 512))
        quota = rng.choice((0, 0, 1, 2, experts // 2, experts))
        least = rng.random() < 0.3
        ahead = random.Random(f"ahead {seed}")
        try:
            return EngineConfig(
                num_layers=layers,
                num_experts=experts,
                top_k=top_k,
                spatial_depth=rng.randint(0, 4),
                lookahead=ahead.choice((0, 1, 1, 2, 3, 4)),
                threshold_2=ahead.choice((-200, -60, 0)),
                threshold_3=ahead.choice((-200, 0, 10)),
                gate_late=ahead.choice((0, 1, 4)),
                lanes=random.Random(f"lanes {seed}").choice(divisors),
                weight_bits=rng.choice((4, 5, 6, 8, 8, 10)),
                margin_low=rng.choice((8, 96, 192, 400)),
                margin_step=rng.choice((0, 4, 32)),
                margin_high=rng.choice((8, 64, 128)),
                threshold=rng.choice((-200, -100, -20, 0, 10)),
                adaptive=rng.random() < 0.7,
                gate_window=rng.choice((8, 16, 32)),
                gate_step=rng.choice((1, 8, 50)),
                gate_patience=rng.choice((4, 64, 512)),
                admission_bonus=rng.choice((0, 0, 16, 256, 2047)),
                use_shift=rng.randint(0, 4),
                select_max=rng.choice((0, 0, 1, 3)),
                quota=quota,
                staging=top_k if least else rng.randint(top_k, 3 * top_k + 2),
                axi_data_width=width,
                axi_addr_width=rng.choice((32, 40, 48)),
                max_burst=rng.choice((1, 2, 5, 8, 16, 33, 64, 100, 256)),
                max_outstanding=(outstanding := rng.choice((1, 2, 4, 8))),
                prefetch_outstanding=rng.randint(1, outstanding),
                num_transfers=rng.choice((0, 0, top_k, top_k + 1)),
                expert_bytes=width // 8 * rng.choice((1, 3, 8, 21, 40)),
                retry_limit=rng.choice((1, 2, 3)),
                buffer=rng.choice(("banks", "banks", "axi")),
            )
        except ConfigError:
            continue


def shape(config: EngineConfig) -> str:
    """A configuration in few words."""
    return (
        f"{config.num_layers}x{config.num_experts} top-{config.top_k}, D {config.depth}, "
        f"lookahead {config.look}, "
        f"{config.num_slots} slots, {config.axi_data_width} bits"
    )


def run_one(number: int, runs: int, tokens: int) -> tuple[int, int, list[str]]:
    """Build configuration ``number`` and run it; returns (number, records checked, failures)."""
    from sim_run import QUICK, SimulationError, run_simulation
    from stmoe.harness.run_log import check_run
    from stmoe.toolchain import ToolError
    from stmoe_golden.checker import Mismatch

    config = random_config(number)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"config-{number}.toml"
    config.save(path)
    failures, records = [], 0
    for run in range(1, runs + 1):
        rng = random.Random(f"run {number} {run}")
        trace = markov_trace(
            num_tokens=tokens,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
            seed=rng.randrange(1 << 30),
            noise=rng.choice((0.2, 1.0, 3.0)),
        )
        where = f"configuration {number} ({path}), run {run}"
        memory = {"reorder": rng.randrange(2)}
        memory["interleave"] = memory["reorder"] & rng.randrange(2)
        try:
            log = run_simulation(
                config,
                {"experts": trace.experts, "sequence": trace.sequence},
                attention_cycles=rng.choice((0, 40, 200)),
                expert_cycles=rng.choice((1, 20, 100)),
                latency=rng.choice((1, 5, 30, 100)),
                bandwidth=rng.choice(((1, 1), (1, 2), (3, 7))),
                seed=0 if run == 1 else rng.randrange(1, 1 << 30),
                memory=memory,
                out_dir=FOLDER / f"run-{number}-{run}",
                build_args=QUICK,
            )
            checked, counters = check_run(log, config)
            records += checked
            wrong = {name: pair for name, pair in counters.items() if pair[0] != pair[1]}
            if wrong:
                failures.append(f"{where}: counters [rtl, golden] {wrong}")
            if len(log.finished) != tokens:
                failures.append(f"{where}: {len(log.finished)} of {tokens} tokens finished")
        except (Mismatch, SimulationError, ToolError, KeyError) as error:
            failures.append(f"{where}: {type(error).__name__}: {error}")
    return number, records, failures


def cpu_seconds() -> float:
    """CPU time of this process and of all that it has waited for: what a loaded machine hides."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(argv: Sequence[str] | None = None) -> int:
    """Run them all; returns the exit status."""
    parser = Parser(prog="regress", description="Random configurations against golden.")
    parser.add_argument("--configs", type=positive, default=50, help="how many (CONFIGS=)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each (SEEDS=)")
    parser.add_argument("--first", type=positive, default=1, help="number of the first (FIRST=)")
    parser.add_argument("--tokens", type=positive, default=TOKENS, help="of each run")
    options = parser.parse_args(argv)
    if shutil.which("ccache"):
        # Verilator's own files are the same for all: compiled once.
        os.environ.setdefault("OBJCACHE", "ccache")
    began = time.perf_counter()
    numbers = range(options.first, options.first + options.configs)
    failed, records, done = 0, 0, 0
    with ProcessPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        jobs = [pool.submit(run_one, n, options.seeds, options.tokens) for n in numbers]
        for job in as_completed(jobs):
            number, checked, failures = job.result()
            done += 1
            records += checked
            failed += bool(failures)
            for failure in failures:
                print(f"regress: FAIL {failure}", flush=True)
            seconds = time.perf_counter() - began
            print(
                f"regress: {done} of {len(jobs)}, configuration {number} "
                f"({shape(random_config(number))}) {'FAILED' if failures else 'agrees'}, "
                f"{checked:,} events, {seconds:.0f} s",
                flush=True,
            )
    print(
        f"regress: {len(jobs)} configurations x {options.seeds} seeds, {records:,} events checked, "
        f"{failed} configurations with mismatches, {time.perf_counter() - began:.0f} s, "
        f"{cpu_seconds():.0f} s of CPU"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
