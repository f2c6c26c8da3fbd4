# SPDX-License-Identifier: Apache-2.0
"""What a run of the harness leaves behind, in simulation or on a board, and its check."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stmoe.harness.content_checker import AddressMap
from stmoe.register_map import COUNTERS
from stmoe_golden.checker import Checker, Kind, Segment, Settings
from stmoe_golden.config import FRACTION_BITS, EngineConfig

__all__ = [
    "Burst",
    "Event",
    "Filled",
    "Finished",
    "Grant",
    "Irq",
    "LastBeat",
    "Release",
    "Route",
    "RunLog",
    "Token",
    "Violation",
    "Write",
    "check_run",
    "times_of",
]


class Event(NamedTuple):
    """A record of the engine's event port; ``delivered`` is the cycle of its handshake."""

    cycle: int
    kind: int
    context: int
    layer: int
    expert: int
    slot: int
    flag: int
    data: int
    delivered: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cycle} {Kind(self.kind).name} layer {self.layer} expert {self.expert} "
            f"slot {self.slot} flag {self.flag} data {self.data:#x}"
        )


class Token(NamedTuple):
    """Handshake of ``token``."""

    cycle: int
    new_sequence: int
    token_id: int


class Route(NamedTuple):
    """Handshake of ``route``; ``experts`` in rank order."""

    cycle: int
    layer: int
    experts: tuple[int, ...]


class Grant(NamedTuple):
    """Handshake of ``grant``."""

    cycle: int
    layer: int
    expert: int
    slot: int
    error: int


class Release(NamedTuple):
    """Handshake of ``release``."""

    cycle: int
    slot: int


class Burst(NamedTuple):
    """Handshake of AR; ``length`` in beats."""

    cycle: int
    id: int
    address: int
    length: int


class LastBeat(NamedTuple):
    """Handshake of R with ``last``; ``resp`` is the worst of the burst."""

    cycle: int
    id: int
    resp: int


class Filled(NamedTuple):
    """Handshake of ``fill`` with a slot's last beat."""

    cycle: int
    slot: int


class Finished(NamedTuple):
    """Last cycle of the last expert of a token."""

    cycle: int
    token: int


class Irq(NamedTuple):
    """First cycle of a new level of ``irq``."""

    cycle: int
    level: int


class Write(NamedTuple):
    """A register write: the cycle in which both address and data had been taken."""

    cycle: int
    address: int
    data: int
    strobes: int


class Violation(NamedTuple):
    """A failed check; ``what`` and the meaning of a, b and c: ``content_checker.Fault``."""

    cycle: int
    what: int
    a: int
    b: int
    c: int


@dataclass
class RunLog:
    """What the monitors have seen in a run, each list in the order of its cycles.

    ``filled`` is None where fills were not watched and were never stalled. ``write_addresses`` and
    ``write_answers`` are those of a buffer behind AXI. ``settings`` are those
    of each register commit, in order. ``counters`` are the engine's registers, read at the end;
    ``totals`` are the harness's own counts. ``cycles`` is the cycle in which the last token
    finished. ``wall_seconds`` and ``cpu_seconds`` are those of the run itself, without building and
    configuring.
    """

    config: EngineConfig
    events: list[Event] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    ar: list[Burst] = field(default_factory=list)
    last_beats: list[LastBeat] = field(default_factory=list)
    filled: list[Filled] | None = field(default_factory=list)
    write_addresses: list[Burst] = field(default_factory=list)
    write_answers: list[LastBeat] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    irq: list[Irq] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    cycles: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    error: str | None = None
    out_dir: Path | None = None

    @property
    def cycles_per_second(self) -> float:
        """Simulated cycles in a second of wall time, without building and configuring."""
        return self.totals.get("run_cycles", 0) / max(self.wall_seconds, 1e-9)


def times_of(config: EngineConfig, load_ratio: float) -> tuple[int, int]:
    """(attention, expert) cycles: a layer is half attention, half K experts, and the time to load
    K experts over the full link is ``load_ratio`` times the layer's."""
    load = config.top_k * config.slot_beats
    layer = load / load_ratio
    return max(1, round(layer / 2)), max(1, round(layer / 2 / config.top_k))


def check_run(run: RunLog, config: EngineConfig) -> tuple[int, dict[str, list[int]]]:
    """Golden model in lockstep with a run's log.

    Returns
    -------
    (int, dict)
        Records checked; every counter as [rtl, golden].

    Raises
    ------
    Mismatch
    KeyError
        The run has left no counters.
    """
    addresses = AddressMap(config, None)
    segments = [
        [Segment(addresses.base(layer), addresses.stride, addresses.beats)]
        for layer in range(config.num_layers)
    ]
    reset = Settings(config.threshold << FRACTION_BITS, [config.quota] * config.num_layers)
    checker = Checker(
        config,
        segments=segments,
        settings=[reset, *run.settings],
        tokens=run.tokens,
        routes=run.routes,
        releases=run.releases,
        grants=run.grants,
        addresses=run.ar,
        last_beats=run.last_beats,
        fills=run.filled if config.buffer == "banks" else None,
        write_addresses=run.write_addresses,
        write_answers=run.write_answers,
        counters=[counter.name for counter in COUNTERS],
    )
    checked = checker.run(run.events)
    checker.counters["discarded_beats"] = checker.counters["beats"] - run.totals["fill_beats"]
    counters = {
        counter.name: [run.counters[counter.name], checker.counters[counter.name]]
        for counter in COUNTERS
    }
    return checked, counters
