# SPDX-License-Identifier: Apache-2.0
"""What a report shows of one run: read from a result file, and measured where the file lacks it.

``make sim``'s report holds the RTL's counters and cycles, ``stmoe compare --json`` one row a
policy. Neither holds distributions, the buffer over time or a timeline: those are timed again here
on the same trace with the same settings, and where that does not give what the file says (the
trace or the code has changed since) the study says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..compare import available_cores, compare
from ..config import ConfigError, EngineConfig, preset
from ..policies.registry import POLICIES
from ..replay import ReplayResult, replay_trace
from ..systems import Tiers, expert_bytes_of, machine_for_system, system_named
from ..timing import Machine, TimedResult, TimingError, machine_for_harness, machine_for_ratio
from ..timing import simulate as time_policy
from ..traces import Trace, TraceError, config_for, load_trace

__all__ = [
    "DEFAULT_POLICIES",
    "ReportError",
    "Study",
    "read_result",
    "result_kind",
    "study_of_compare",
    "study_of_sim",
]

DEFAULT_POLICIES = ("ours", "lru", "on_demand", "paper", "oracle")
"""Timed for a report of ``make sim``, which has timed none itself."""

DETAILED = ("ours", "lru")
"""Timed again for a report of ``stmoe compare``, for what its JSON does not hold."""

ISSUE_RATE = 1.5
"""Experts issued, in units of K, at which predictors are put side by side (section 10)."""


class ReportError(ValueError):
    """A result that no report can be made of; one line that names the file and what is wrong."""


@dataclass(frozen=True)
class Study:
    """Everything that the report of one run shows."""

    kind: str
    """``sim`` or ``compare``."""
    trace: Trace | None
    """None where the file's trace cannot be read; what needs it is then left out."""
    rows: list[dict[str, Any]]
    """As :meth:`stmoe_golden.compare.Row.as_dict` gives them."""
    facts: list[tuple[str, str]]
    """Settings, by name."""
    details: dict[str, TimedResult] = field(default_factory=dict)
    predictions: dict[str, ReplayResult] = field(default_factory=dict)
    """``learned`` and ``paper``, with the threshold that issues :data:`ISSUE_RATE` where the trace
    is long enough to pick one."""
    guardrails: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the reader has to know about this report itself."""
    rtl: dict[str, Any] | None = None
    """The report of ``make sim``."""
    expert_bytes: float | None = None
    cycle_seconds: float | None = None
    """With a named system: a cycle of the machine in seconds."""

    def row(self, policy: str) -> dict[str, Any] | None:
        """The row of a policy, if there is one."""
        return next((row for row in self.rows if row["policy"] == policy), None)


# Files ---------------------------------------------------------------------------------------


def read_result(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    ReportError
        There is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path}: not JSON: not UTF-8 text") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ReportError(f"{path}: must hold a JSON object, not {type(found).__name__}")
    return found


def result_kind(path: str | Path, result: Mapping[str, Any]) -> str:
    """``sim``, ``compare`` or ``sweep``: what wrote the result."""
    if {"match", "counters", "trace", "tokens"} <= set(result):
        return "sim"
    if {"rows", "guardrails", "trace", "tokens"} <= set(result):
        return "compare"
    if {"sweep", "points"} <= set(result):
        return "sweep"
    raise ReportError(
        f"{path}: not a result that a report can be made of; results are those of make sim "
        f"(report.json), stmoe compare --json and stmoe sweep"
    )


def _field(path: str | Path, result: Mapping[str, Any], key: str, kinds: tuple[type, ...]) -> Any:
    value = result.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ReportError(f"{path}: {key} must be {names}, not {value!r:.40}")
    return value


def _trace_of(path: str | Path, result: Mapping[str, Any], notes: list[str]) -> Trace | None:
    """The trace that the result names, as many tokens of it as were run."""
    name = _field(path, result, "trace", (str,))
    tokens = _field(path, result, "tokens", (int,))
    try:
        trace = load_trace(name).head(tokens)
    except TraceError as error:
        notes.append(f"Figures that need the trace are left out: {error}.")
        return None
    if trace.num_tokens != tokens:
        notes.append(
            f"Figures that need the trace are left out: {name} has {trace.num_tokens} tokens, "
            f"but the result is of {tokens}."
        )
        return None
    return trace


def _config_of(
    path: str | Path, result: Mapping[str, Any], trace: Trace, notes: list[str]
) -> EngineConfig:
    """The configuration that was run; guessed from the trace where the file does not say."""
    stated = result.get("config")
    try:
        if stated is None:
            notes.append(
                "The file does not say which configuration was run: that of the trace's shape "
                "is assumed."
            )
            named = result.get("preset")
            return preset(named) if isinstance(named, str) else config_for(trace)
        if not isinstance(stated, dict):
            raise ReportError(f"{path}: config must be an object, not {type(stated).__name__}")
        return EngineConfig().replace(**stated)
    except ConfigError as error:
        raise ReportError(f"{path}: config: {error}") from None


# Measuring -----------------------------------------------------------------------------------


def _predictions(trace: Trace, config: EngineConfig) -> dict[str, ReplayResult]:
    """Both predictors, with the curve of coverage against issue rate."""
    rate = min(ISSUE_RATE, config.num_experts / config.top_k)
    return {
        predictor: replay_trace(
            trace,
            config,
            predictor=predictor,
            issue_rate=rate if trace.num_tokens > 1 else None,
            curve=True,
        )
        for predictor in ("learned", "paper")
    }


def _facts(trace: Trace | None, config: EngineConfig | None) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if trace is not None:
        facts += [
            ("trace", trace.name),
            ("tokens", f"{trace.num_tokens:,} of {trace.num_sequences:,} sequences"),
            ("model", f"{trace.num_layers} layers x {trace.num_experts} experts, "
             f"top-{trace.top_k}"),
        ]  # fmt: skip
    if config is not None:
        facts += [
            ("buffer", f"{config.num_slots:,} slots: quota {config.quota} a layer, staging "
             f"{config.num_staging}"),
            ("tables", f"{config.table_bits / 1000:,.0f} kbit: D = {config.depth}, "
             f"{config.weight_bits}-bit weights"),
        ]  # fmt: skip
    return facts


def study_of_sim(
    path: str | Path,
    *,
    policies: Sequence[str] = DEFAULT_POLICIES,
    spans: int = 0,
) -> Study:
    """The study of a report of ``make sim``: the RTL's run, and the timing model on its machine.

    Parameters
    ----------
    path
        ``build/sim/report.json``.
    policies : sequence of str
        Timed on the same machine.
    spans : int
        Spans of the timeline to record, of the engine's own policy.

    Raises
    ------
    ReportError, TraceError, TimingError
        Bad input, in one line.
    """
    result = read_result(path)
    notes: list[str] = []
    trace = _trace_of(path, result, notes)
    if trace is None:
        raise ReportError(f"{path}: {notes[0].partition(': ')[2].removesuffix('.')}")
    config = _config_of(path, result, trace, notes)
    stated = result.get("machine")
    machine: Machine | None = None
    ratio = float(_field(path, result, "load_ratio", (int, float)))
    if isinstance(stated, dict):
        try:
            machine = machine_for_harness(
                config,
                attention_cycles=int(stated["attention_cycles"]),
                expert_cycles=int(stated["expert_cycles"]),
                latency=int(stated["latency"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{path}: machine: {error!r}") from None
    else:
        notes.append("The file does not describe the harness: its load ratio alone is modelled.")
    found = compare(
        trace,
        config,
        load_ratio=ratio,
        machine=machine,
        policies=policies,
        occupancy=True,
        timeline=spans,
        threads=available_cores(),
    )
    facts = _facts(trace, config) + [("load ratio r", f"{ratio:.3g}")]
    if machine is not None:
        facts.append(
            ("machine", f"the RTL's harness: attention {machine.attention[0]} cycles, an expert "
             f"{machine.expert[0]}, a load {machine.load[0]}, memory latency "
             f"{machine.latency[0]}")
        )  # fmt: skip
    facts.append(("measured", f"the last {found.tokens_measured:,} tokens, but RTL counters: all"))
    return Study(
        kind="sim",
        trace=trace,
        rows=[row.as_dict() for row in found.rows],
        facts=facts,
        details={row.policy: row.result for row in found.rows},
        predictions=_predictions(trace, config),
        guardrails=list(found.guardrails),
        notes=notes,
        rtl=result,
        expert_bytes=found.expert_bytes,
    )


ROW_NUMBERS = ("time", "hit_rate", "bytes", "p50", "p99", "energy_j", "useful", "late", "useless",
               "cancelled", "pollution", "quota", "load_ratio")  # fmt: skip


def _rows(path: str | Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = _field(path, result, "rows", (list,))
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("policy"), str):
            raise ReportError(f"{path}: rows[{i}] must be an object with a policy")
        for key in ROW_NUMBERS:
            _field(f"{path}: rows[{i}]", row, key, (int, float))
    if not rows:
        raise ReportError(f"{path}: rows must not be empty")
    return rows


def study_of_compare(path: str | Path, *, spans: int = 0) -> Study:
    """The study of a ``stmoe compare --json``; arguments and errors as :func:`study_of_sim`."""
    result = read_result(path)
    rows = _rows(path, result)
    notes: list[str] = []
    ratio = float(_field(path, result, "load_ratio", (int, float)))
    system = result.get("system")
    tiers: Tiers | None = None
    if system is not None:
        try:
            tiers = system_named(str(system))
        except TimingError as error:
            raise ReportError(f"{path}: system, where it is not null, {error}") from None
    trace = _trace_of(path, result, notes)
    said = _field(path, result, "guardrails", (list,))
    facts: list[tuple[str, str]] = [("trace", str(result["trace"]))]
    details: dict[str, TimedResult] = {}
    predictions: dict[str, ReplayResult] = {}
    if trace is not None:
        config = _config_of(path, result, trace, notes)
        if result.get("config") is None:
            config = _resized(path, config, int(rows[0]["quota"]), result.get("slots"))
        sizes = expert_bytes_of(trace, str(result.get("dtype", "int8")))
        if system is not None:
            machine = machine_for_system(config, system, sizes)
        else:
            machine = machine_for_ratio(config, ratio)
        details = _details(trace, config, machine, rows, spans, notes)
        predictions = _predictions(trace, config)
        facts = _facts(trace, config)
    facts.append(("load ratio r", f"{ratio:.3g}"))
    if tiers is not None:
        facts.append(("system", f"{system}: {tiers.source}"))
    size = result.get("expert_bytes")
    if isinstance(size, int | float):
        facts.append(("an expert", f"{size / 1e6:,.3g} MB"))
    measured = result.get("tokens_measured")
    if isinstance(measured, int):
        facts.append(("measured", f"the last {measured:,} tokens"))
    return Study(
        kind="compare",
        trace=trace,
        rows=rows,
        facts=facts,
        details=details,
        predictions=predictions,
        guardrails=[str(text) for text in said],
        notes=notes,
        expert_bytes=float(size) if isinstance(size, int | float) else None,
        cycle_seconds=1e-9 if system is not None else None,
    )


def _resized(path: str | Path, config: EngineConfig, quota: int, slots: Any) -> EngineConfig:
    """The configuration with the buffer that the file speaks of."""
    try:
        config = config.replace(quota=quota)
        if isinstance(slots, int) and slots != config.num_slots:
            config = config.replace(staging=slots - quota * config.num_layers)
    except ConfigError as error:
        raise ReportError(f"{path}: {error}") from None
    return config


def _details(
    trace: Trace,
    config: EngineConfig,
    machine: Machine,
    rows: list[dict[str, Any]],
    spans: int,
    notes: list[str],
) -> dict[str, TimedResult]:
    """Some of the rows timed again, held to what the file says of them."""
    details = {}
    for row in rows:
        name = row["policy"]
        if name not in DETAILED:
            continue
        try:
            found = time_policy(
                trace,
                config,
                machine,
                _policy(name, row)(config),
                occupancy=True,
                timeline=spans if name == "ours" else 0,
            )
        except TimingError as error:
            notes.append(f"{name} could not be timed again: {error}.")
            continue
        if abs(found.time - row["time"]) > 1e-9 * row["time"]:
            notes.append(
                f"{name}, timed again: {found.time:.4f}, but the file says {row['time']:.4f}; the "
                f"trace, the settings or the code are not those of then. Figures of distributions "
                f"and over time are of now."
            )
        details[name] = found
    return details


def _policy(name: str, row: Mapping[str, Any]) -> Any:
    """The policy's class; of LRU the form that the row is of."""
    if name == "lru":
        from ..policies.lru import LRU_FORMS

        for form in LRU_FORMS:
            if f"of three forms, {form.name} " in str(row.get("note")):
                return form
    return POLICIES[name]


def rtl_latency(report: Mapping[str, Any]) -> np.ndarray | None:
    """Cycles of each token of the RTL's run, if ``make sim`` has kept them."""
    latency = report.get("latency")
    cycles = latency.get("cycles") if isinstance(latency, dict) else None
    if not isinstance(cycles, list) or not cycles:
        return None
    return np.array(cycles, np.int64)
