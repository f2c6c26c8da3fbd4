# SPDX-License-Identifier: Apache-2.0
"""Times every policy on one trace, and puts what architecture section 8 asks for side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from .config import EngineConfig
from .energy import energy_of, energy_table
from .guardrails import guardrails
from .machine import Machine, TimingError, machine_for_ratio
from .policies.base import Policy
from .policies.lru import LRU_FORMS
from .policies.registry import POLICIES, PolicyError
from .systems import expert_bytes_of, load_ratio_of, machine_for_system, system_named
from .timing import TimedResult, simulate
from .traces import Trace

__all__ = ["Comparison", "Row", "available_cores", "compare"]

Timed = TypeVar("Timed")


@dataclass(frozen=True)
class Row:
    """One policy's figures; :meth:`as_dict` are those of ``stmoe compare --json``."""

    policy: str
    quota: int
    load_ratio: float
    result: TimedResult
    energy: dict[str, float]
    """Joules per token, by tier and ``table``."""
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts. ``time``, ``p50`` and ``p99`` are relative to pure compute;
        ``useful`` to ``pollution`` are numbers of prefetches, or of experts, in the measured half;
        ``bytes`` are loads per needed expert; ``energy_j`` is joules per token."""
        r = self.result
        compute = r.compute_cycles / r.tokens_measured
        p50, p99 = np.percentile(r.latency, (50, 99)) / compute
        missed = r.total("lru_misses")
        mean_cycles = r.cycles / r.tokens_measured
        row: dict[str, Any] = {
            "policy": self.policy,
            "quota": self.quota,
            "load_ratio": self.load_ratio,
            "time": r.time,
            "hit_rate": r.total("hits") / r.needed,
            "bytes": r.loads / r.needed,
            "p50": float(p50),
            "p99": float(p99),
            "energy_j": sum(self.energy.values()),
            "miss_recall": r.total("lru_misses_prefetched") / missed if missed else None,
        }
        for name in ("useful", "late", "useless", "cancelled", "pollution", "dropped", "far_loads"):
            row[name] = r.total(name)
        stall = r.total("stall_cycles")
        row |= {
            "prefetch_loads": r.total("prefetch_loads"),
            "demand_loads": r.total("demand_loads"),
            "needed": r.needed,
            "skipped": r.total("skipped"),
            "stall_share": stall / r.cycles,
            "hidden": r.hidden,
            "link_busy": r.link_cycles / r.cycles,
            "mean": mean_cycles / compute,
            "energy": dict(self.energy),
            "note": self.note,
        }
        return row


@dataclass(frozen=True)
class Comparison:
    """All rows, and what stands in the way of prefetching, if anything does."""

    trace: str
    tokens: int
    tokens_measured: int
    slots: int
    load_ratio: float
    system: str | None
    expert_bytes: float
    token_seconds: float | None
    """Pure compute of a token, with a named system."""
    dtype: str
    """Of the experts, where their size is a preset's."""
    config: dict[str, Any]
    """Every field of the configuration: a report times the same again."""
    rows: list[Row]
    guardrails: list[str]

    def row(self, policy: str) -> Row:
        """The row of a policy."""
        return next(row for row in self.rows if row.policy == policy)

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        fields = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("rows", "guardrails")
        }
        return fields | {
            "rows": [row.as_dict() for row in self.rows],
            "guardrails": list(self.guardrails),
        }

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def table(self) -> str:
        """For people."""
        where = f"system {self.system}, " if self.system else ""
        lines = [
            f"{self.trace}: {self.tokens} tokens, the last {self.tokens_measured} measured",
            f"{where}{self.slots} slots (quota {self.rows[0].quota}), load ratio r = "
            f"{self.load_ratio:.3g}; time and latencies relative to pure compute"
            + (f" ({self.token_seconds * 1e3:.3g} ms a token)" if self.token_seconds else ""),
            "",
        ]
        heads = "time p50 p99 hit bytes missrec useful late useless cancel pollut stall mJ/token"
        far = self.rows[0].result.machine.tiered
        heads += " far" if far else ""
        lines.append(f"{'policy':<16}" + "".join(f"{head:>9}" for head in heads.split()))
        for row in self.rows:
            d = row.as_dict()
            rate = d["miss_recall"]
            needed = d["needed"]
            cells = [
                *(f"{d[key]:.3f}" for key in ("time", "p50", "p99", "hit_rate", "bytes")),
                "-" if rate is None else f"{rate:.3f}",
                *(
                    f"{d[key] / needed:.3f}"
                    for key in ("useful", "late", "useless", "cancelled", "pollution")
                ),
                f"{d['stall_share']:.3f}",
                f"{d['energy_j'] * 1e3:.3g}",
                *([f"{d['far_loads'] / needed:.3f}"] if far else ()),
            ]
            lines.append(f"{d['policy']:<16}" + "".join(f"{cell:>9}" for cell in cells))
        lines.append("useful to pollution" + (" and far" if far else "") + ": per needed expert")
        lines += [f"{row.policy}: {row.note}" for row in self.rows if row.note]
        lines += ["", *self.guardrails] if self.guardrails else []
        return "\n".join(lines) + "\n"


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compare(
    trace: Trace,
    config: EngineConfig,
    *,
    load_ratio: float = 1.0,
    system: str | None = None,
    policies: Sequence[str | type[Policy]] = tuple(POLICIES),
    dtype: str = "int8",
    energy: Mapping[str, float] | None = None,
    machine: Machine | None = None,
    occupancy: bool = False,
    timeline: int = 0,
    progress: Callable[[str], None] | None = None,
    threads: int = 1,
) -> Comparison:
    """Time policies on a trace.

    Parameters
    ----------
    trace, config
        Of one shape; quota, staging, threshold and all else of the engine are the configuration's.
    load_ratio : float
        r: time to load K experts over the compute of a layer.
    system : str, optional
        One for :func:`stmoe_golden.systems.system_named`, which sets r and all times instead.
    policies : sequence of str or Policy class
        Rows, in this order.
    dtype : str
        Of the experts: ``fp16``, ``int8`` or ``int4``, where their size is a preset's.
    energy : mapping, optional
        Changed pJ/bit, see :data:`stmoe_golden.energy.ENERGY`.
    machine : Machine, optional
        Instead of what ``load_ratio`` or ``system`` would make.
    occupancy, timeline
        As in :func:`stmoe_golden.timing.simulate`.
    progress : callable, optional
        Told the name of each policy before it is timed, from any thread.
    threads : int
        So many of this library's policies are timed at once; a user's own are timed one by one.

    Raises
    ------
    PolicyError, TimingError, EnergyError, TraceError
        Something that is not allowed, in one line.
    """
    classes: list[type[Policy]] = []
    for wanted in policies:
        if not isinstance(wanted, str):
            classes.append(wanted)
        elif wanted in POLICIES:
            classes.append(POLICIES[wanted])
        else:
            raise PolicyError(f"unknown policy {wanted!r}; policies are {', '.join(POLICIES)}")
    picojoules = energy_table(energy)
    sizes = expert_bytes_of(trace, dtype)
    if machine is None:
        if system is not None:
            machine = machine_for_system(config, system, sizes)
        else:
            machine = machine_for_ratio(config, load_ratio)
    ratio = load_ratio_of(machine, config.top_k) if system is not None else load_ratio
    tier, far = system_named(system).kinds if system is not None else ("dram", None)
    tell = progress or (lambda name: None)

    def time_policy(
        policy: Policy, stop: threading.Event | None, misses: np.ndarray | None = None
    ) -> TimedResult:
        tell(policy.name)
        return simulate(
            trace,
            config,
            machine,
            policy,
            lru_misses=misses,
            occupancy=occupancy,
            timeline=timeline,
            stop=stop,
        )

    # The best LRU is every other policy's yardstick.
    forms = _at_once(lambda form, stop: time_policy(form(config), stop), LRU_FORMS, threads)
    best = min(forms, key=lambda result: result.cycles)

    def time_class(
        cls: type[Policy], stop: threading.Event | None = None
    ) -> tuple[TimedResult, str | None]:
        policy = cls(config)
        return time_policy(policy, stop, best.misses), policy.note(trace)

    others = [cls for name, cls in POLICIES.items() if name != "lru"]
    built_in = [cls for cls in dict.fromkeys(classes) if cls in others]
    timed = dict(zip(built_in, _at_once(time_class, built_in, threads), strict=True))
    rows = []
    for cls in classes:
        note: str | None
        if cls is POLICIES["lru"]:
            times = ", ".join(f"{result.policy} {result.time:.4f}" for result in forms)
            note = f"the best of three forms, {best.policy} ({times})"
            result = replace(best, per_layer=_own_misses(best))
        elif cls in timed:
            result, note = timed[cls]
        else:
            try:
                result, note = time_class(cls)
            except (TimingError, MemoryError):
                raise
            except Exception as error:
                # Whatever a user's own policy raises; its ValueErrors are about its answers.
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise PolicyError(f"policy {cls.name}: {kind}{error}") from None
        joules = energy_of(
            result,
            config,
            expert_bytes=float(sizes.mean()),
            tier=tier,
            far=far,
            picojoules=picojoules,
            tables=cls is POLICIES["ours"],
        )
        rows.append(Row(cls.name, config.quota, ratio, result, joules, note))
    seconds = None
    if system is not None:
        seconds = rows[0].result.compute_cycles / rows[0].result.tokens_measured / 1e9
    return Comparison(
        trace=trace.name,
        tokens=trace.num_tokens,
        tokens_measured=best.tokens_measured,
        slots=machine.slots,
        load_ratio=ratio,
        system=system,
        expert_bytes=float(sizes.mean()),
        token_seconds=seconds,
        dtype=dtype,
        config=dataclasses.asdict(config),
        rows=rows,
        guardrails=guardrails(trace, config, machine, best),
    )


def _at_once(
    call: Callable[[type[Policy], threading.Event | None], Timed],
    classes: Sequence[type[Policy]],
    threads: int,
) -> list[Timed]:
    """``call`` of each class, so many at once; an error or an interrupt stops all of them."""
    if threads <= 1 or len(classes) <= 1:
        return [call(cls, None) for cls in classes]
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(call, cls, stop) for cls in classes]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _own_misses(result: TimedResult) -> dict[str, np.ndarray]:
    """LRU has prefetched none of its own misses."""
    counts = dict(result.per_layer)
    counts["lru_misses"] = counts["misses"] + counts["late"]
    return counts
