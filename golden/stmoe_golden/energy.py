# SPDX-License-Identifier: Apache-2.0
"""Energy of loads and of the predictor's own tables, in picojoules per bit, each with its source.

These are figures of the literature for a class of memory, not of one part: they serve to compare
policies on one system. Every one can be changed (``--energy NAME=PJ``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import USE_BITS, EngineConfig
from .timing import TimedResult

__all__ = ["ENERGY", "Energy", "EnergyError", "energy_of", "energy_table", "table_bits"]


class EnergyError(ValueError):
    """An energy that is not allowed; the message names it."""


@dataclass(frozen=True)
class Energy:
    """One kind of transfer."""

    picojoules: float
    """Per bit."""
    source: str


ENERGY: dict[str, Energy] = {
    "dram": Energy(
        20.0,
        "off-chip DRAM, 1.3 to 2.6 nJ per 64 bits, the lower end: M. Horowitz, Computing's energy "
        "problem, ISSCC 2014",
    ),
    "ddr3": Energy(
        70.0,
        "DDR3 at full use: K. Malladi et al., Towards energy-proportional datacenter memory with "
        "mobile DRAM, ISCA 2012",
    ),
    "lpddr5": Energy(
        4.0, "LPDDR5 core and interface; an estimate from vendors' 20 % below LPDDR4X"
    ),
    "pcie": Energy(
        30.0,
        "dram above, and about 5 pJ/bit for the PHY at either end of a 16 or 32 GT/s link; the "
        "PHY is an estimate",
    ),
    "nvme": Energy(
        120.0,
        "about 7 W at 7.4 GB/s of sequential reads, an estimate for an SSD of the class of "
        "Samsung's 990 PRO",
    ),
    "table": Energy(
        0.31,
        "on-chip SRAM of 32 KB, 20 pJ per 64 bits at 45 nm: M. Horowitz, ISSCC 2014",
    ),
}
"""Tiers that experts are loaded from, and ``table``: the predictor's tables and score memory."""


def energy_table(changes: Mapping[str, float] | None = None) -> dict[str, float]:
    """Picojoules per bit of every kind, with some changed."""
    table = {name: energy.picojoules for name, energy in ENERGY.items()}
    for name, value in (changes or {}).items():
        if name not in table:
            raise EnergyError(f"unknown energy {name!r}; energies are {', '.join(table)}")
        if not 0 <= value <= 1e6:
            raise EnergyError(f"energy {name} must be 0 to 1000000 pJ/bit, not {value:g}")
        table[name] = value
    return table


def table_bits(config: EngineConfig) -> int:
    """Bits that the engine's predictor reads and writes for one routing event.

    Look ahead and reseed read K rows of E weights in each of the D spatial tables and the
    temporal one; learning reads and writes as many, and the bias row. The score memory's D + 1
    rows are read and written, and so are the use counts of the layer. A victim search and the
    selector read one row of scores and of use counts each.
    """
    lanes, rows = config.num_experts, config.top_k * (config.depth + 1)
    tables = 3 * rows * lanes * config.weight_bits + 3 * lanes * config.bias_bits
    scores = (2 * (config.depth + 1) + 2) * lanes * config.score_bits
    return tables + scores + 4 * lanes * USE_BITS


def energy_of(
    result: TimedResult,
    config: EngineConfig,
    *,
    expert_bytes: float,
    tier: str,
    picojoules: Mapping[str, float],
    tables: bool,
    far: str | None = None,
) -> dict[str, float]:
    """Joules per measured token: of the loads from ``tier``, of those that the ``far`` tier had to
    read first where there is one, and of the engine's tables.

    ``tables`` says whether the policy is the engine's, whose table accesses are known; no other
    policy is charged for what it would have to keep.
    """
    loads = 8 * expert_bytes * result.loads * picojoules[tier] * 1e-12
    events = result.tokens_measured * config.num_layers if tables else 0
    own = events * table_bits(config) * picojoules["table"] * 1e-12
    joules = {
        tier: loads / result.tokens_measured,
        "table": own / result.tokens_measured,
    }
    if far is not None:
        read = 8 * expert_bytes * result.total("far_loads") * picojoules[far] * 1e-12
        joules[far] = joules.get(far, 0.0) + read / result.tokens_measured
    return joules
