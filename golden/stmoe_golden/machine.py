# SPDX-License-Identifier: Apache-2.0
"""What the timing model times: accelerator, link, buffer and the engine's own cycles."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .config import EngineConfig

__all__ = [
    "IDEAL",
    "EngineCycles",
    "Machine",
    "TimingError",
    "engine_cycles",
    "machine_for_harness",
    "machine_for_ratio",
    "outstanding_for",
]


class TimingError(ValueError):
    """A setting of the timing model that is not allowed; the message names it."""


class EngineCycles(NamedTuple):
    """Cycles that the engine itself takes; all 0 is an ideal engine (:data:`IDEAL`)."""

    token: int = 0
    """From the end of a token's last expert to the next token being taken."""
    route: int = 0
    """From the end of attention to the route being taken."""
    grant: int = 0
    """From the route being taken to the first resident expert running."""
    grant_next: int = 0
    """From one resident expert's grant to the next one's."""
    load: int = 0
    """From the route being taken to the first address of a missing expert, a slot being free."""
    search: int = 0
    """More, when a victim has to be found."""
    load_next: int = 0
    """From one demand having its slot to the next one's address."""
    fill: int = 0
    """From a load's last beat to its expert running."""
    commit: int = 0
    """From the route being taken to the score commit."""
    pick: int = 0
    """From the score commit to the first pick in the prefetch queue."""
    pick_next: int = 0
    """From one pick to the next."""
    ready: int = 0
    """From the last address of a prefetch, or the end of a burst, to the next prefetch."""
    start: int = 0
    """From a prefetch being looked at to its first address, a slot being free."""
    address: int = 0
    """From one address to the next."""


IDEAL = EngineCycles()


def engine_cycles(config: EngineConfig) -> EngineCycles:
    """What the RTL takes, without random stalls: the latencies that ``docs/architecture.md`` and
    the blocks state (slot manager, victim chooser, predictor, DMA scheduler, accelerator model).
    """
    folds, levels = config.folds, (config.num_lanes - 1).bit_length()
    gains = [*config.gains, 0]
    steps = sum(max(1, gains[r] - gains[r + 1]) for r in range(config.top_k))
    search, commit, pick, pick_next = 7 + levels, steps + 6, 6 + levels, 2
    if folds > 1:
        ahead = max(config.depth, config.look)
        settle = max(1, 4 - folds if config.depth else 0, 6 - (ahead + 1) * folds)
        search, commit = 8 + folds + levels, folds * steps + 4 + settle
        # How many candidates the selector puts in its list depends on the scores: taken as K.
        pick, pick_next = 7 + folds * (2 + levels) + 2 * config.top_k, 1
    return EngineCycles(
        token=2,
        route=2,
        grant=4,
        grant_next=1,
        load=4,
        search=search,
        load_next=3,
        fill=10,
        commit=commit,
        pick=pick,
        pick_next=pick_next,
        ready=3,
        start=6,
        address=1,
    )


class Machine(NamedTuple):
    """Accelerator, link and buffer, in cycles; each layer has its own times."""

    attention: np.ndarray
    """int64 [L]: cycles of attention."""
    expert: np.ndarray
    """int64 [L]: cycles of one expert."""
    load: np.ndarray
    """int64 [L]: cycles that the link is busy with one expert of the layer."""
    latency: np.ndarray
    """int64 [L]: cycles from an address to its first data, in the layer's tier."""
    burst: int
    """Cycles of the longest burst: prefetch gives way to demand between bursts."""
    max_outstanding: int
    """Bursts on their way at once."""
    prefetch_outstanding: int
    """Bursts of prefetch on their way at once."""
    slots: int
    quota: np.ndarray
    """int32 [L]: slots that each layer keeps."""
    prefetch_loads: int
    """Most prefetches that hold a slot (loading or draining) at once."""
    engine: EngineCycles
    near: int = 0
    """Experts that the memory behind the link holds, those loaded last; all, where there is no far
    tier."""
    far_load: np.ndarray = np.zeros(0, np.int64)
    """int64 [L]: cycles that the tier behind that memory is busy with one expert; empty: there is
    none."""
    far_latency: np.ndarray = np.zeros(0, np.int64)
    """int64 [L]: cycles from asking that tier to its first data."""

    @property
    def tiered(self) -> bool:
        """There is a far tier."""
        return len(self.far_load) > 0


def outstanding_for(latency: float, burst: float) -> int:
    """Bursts that have to be on their way for the link to be busy all the time."""
    return 1 + math.ceil(latency / burst)


def machine_for_ratio(
    config: EngineConfig,
    load_ratio: float,
    *,
    load_cycles: int = 1024,
    bursts: int = 64,
    latency: int = 0,
    engine: EngineCycles = IDEAL,
) -> Machine:
    """A machine on which loading K experts takes ``load_ratio`` times the compute of a layer, half
    of which is attention (architecture section 10).

    Parameters
    ----------
    config : EngineConfig
        Its quota, staging, ``prefetch_outstanding`` and ``transfers`` are used.
    load_ratio : float
        r.
    load_cycles : int
        Cycles of one load at least: the unit of time is so fine that rounding does not matter.
    bursts : int
        Bursts of a load: prefetch gives way to demand between two of them.
    latency : int
        Cycles from an address to its first data. Where it is longer than a burst, more bursts
        may be on their way than the configuration says, so that the link can be kept busy.
    """
    if not 0.01 <= load_ratio <= 100:
        raise TimingError(f"load_ratio must be 0.01 to 100, not {load_ratio:g}")
    # An expert's compute is a whole number of cycles, at least 256 of them.
    expert = max(256, round(load_cycles / (2 * load_ratio)))
    load = max(1, round(2 * load_ratio * expert))
    layers = config.num_layers
    burst = -(-load // bursts)
    enough = outstanding_for(latency, burst)
    return Machine(
        attention=np.full(layers, config.top_k * expert, np.int64),
        expert=np.full(layers, expert, np.int64),
        load=np.full(layers, load, np.int64),
        latency=np.full(layers, latency, np.int64),
        burst=burst,
        max_outstanding=max(config.max_outstanding, enough),
        prefetch_outstanding=max(config.prefetch_outstanding, enough),
        slots=config.num_slots,
        quota=np.full(layers, config.quota, np.int32),
        prefetch_loads=config.prefetch_loads,
        engine=engine,
    )


def machine_for_harness(
    config: EngineConfig,
    *,
    attention_cycles: int,
    expert_cycles: int,
    latency: int = 32,
    bandwidth: tuple[int, int] = (1, 1),
    quota: int | None = None,
) -> Machine:
    """The machine that the RTL's simulation harness is, with the same settings (``tb/sim_run.py``).

    Parameters
    ----------
    attention_cycles, expert_cycles : int
        Of the accelerator model.
    latency : int
        Cycles from a burst's address to its first beat.
    bandwidth : (int, int)
        Beats in so many cycles.
    quota : int, optional
        Slots that each layer keeps, where it is not the configuration's.
    """
    layers = config.num_layers
    beats, cycles = bandwidth

    def spread(n: int) -> int:
        return max(n, -(-n * cycles // beats))

    return Machine(
        attention=np.full(layers, attention_cycles, np.int64),
        expert=np.full(layers, max(1, expert_cycles), np.int64),
        load=np.full(layers, spread(config.slot_beats), np.int64),
        latency=np.full(layers, max(1, latency), np.int64),
        burst=spread(config.burst_beats),
        max_outstanding=config.max_outstanding,
        prefetch_outstanding=config.prefetch_outstanding,
        slots=config.num_slots,
        quota=np.full(layers, config.quota if quota is None else quota, np.int32),
        prefetch_loads=config.prefetch_loads,
        engine=engine_cycles(config),
    )
