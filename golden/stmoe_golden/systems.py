# SPDX-License-Identifier: Apache-2.0
"""Real links and real expert sizes, each with its source, made into a :class:`Machine`.

A system is named ``NAME``, or ``NAME+BEHIND:N``: then the memory behind the link of ``NAME`` holds
``N`` experts, and all others are read from ``BEHIND`` first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import PRESETS, EngineConfig
from .machine import IDEAL, Machine, TimingError, outstanding_for
from .traces import Trace

__all__ = [
    "BITS",
    "EXPERT_SHAPES",
    "SYSTEMS",
    "System",
    "Tiers",
    "expert_bytes_of",
    "load_ratio_of",
    "machine_for_system",
    "system_named",
    "systems_table",
]

HZ = 10**9
"""Cycles of a system's machine in a second: times are in nanoseconds."""

MAX_BURSTS = 64
"""Most bursts that one load is split into in the model."""


@dataclass(frozen=True)
class System:
    """Where experts are loaded from, and what runs them."""

    link: float
    """Bytes per second that arrive, overheads taken off."""
    latency: float
    """Seconds from a request to its first byte."""
    burst: int
    """Bytes of one request: prefetch gives way to demand between two."""
    tier: str
    """What a load costs: a key of :data:`stmoe_golden.energy.ENERGY`."""
    compute: float
    """Bytes of expert weights per second that the accelerator works through: at one token at a
    time an expert takes as long as its weights take to be read from the accelerator's memory."""
    source: str


SYSTEMS: dict[str, System] = {
    "pcie4_x16": System(
        link=0.85 * 31.5e9,
        latency=2e-6,
        burst=256 << 10,
        tier="pcie",
        compute=1008e9,
        source="PCI Express Base Specification 4.0: 16 GT/s, 16 lanes, 128b/130b; 85 % payload "
        "(256-byte packets and flow control; an estimate). Run by an RTX 4090's memory: NVIDIA "
        "Ada GPU architecture white paper, 1,008 GB/s",
    ),
    "pcie5_x16": System(
        link=0.85 * 63.0e9,
        latency=2e-6,
        burst=256 << 10,
        tier="pcie",
        compute=1792e9,
        source="PCI Express Base Specification 5.0: 32 GT/s, 16 lanes, 128b/130b; 85 % payload, as "
        "above. Run by an RTX 5090's memory: NVIDIA Blackwell RTX white paper, 1,792 GB/s",
    ),
    "lpddr5": System(
        link=0.8 * 51.2e9,
        latency=150e-9,
        burst=4 << 10,
        tier="lpddr5",
        compute=64e9,
        source="JEDEC JESD209-5: 6,400 MT/s on 64 bits; 80 % of it reached (an estimate). Run by "
        "an edge accelerator that reads 64 bytes of on-chip weights a cycle at 1 GHz (assumed)",
    ),
    "nvme": System(
        link=7.45e9,
        latency=50e-6,
        burst=128 << 10,
        tier="nvme",
        compute=0.8 * 51.2e9,
        source="Samsung 990 PRO data sheet: 7,450 MB/s of sequential reads; 50 us to the first "
        "byte of a large read (an estimate). Run from LPDDR5, as above",
    ),
    "arty_a7": System(
        link=0.8 * 1.333e9,
        latency=300e-9,
        burst=1 << 10,
        tier="ddr3",
        compute=1.6e9,
        source="Digilent Arty A7 reference manual: DDR3L at 667 MT/s on 16 bits; 80 % of it "
        "reached (an estimate). Run by 128 bits a cycle at 100 MHz (assumed)",
    ),
}


@dataclass(frozen=True)
class Tiers:
    """Where experts come from, by :func:`system_named`."""

    near: System
    far: System | None = None
    """What is behind the near tier, if that does not hold all experts."""
    held: int = 0
    """Experts that the near tier then holds."""

    @property
    def kinds(self) -> tuple[str, str | None]:
        """What a load costs in the near and in the far tier: keys of
        :data:`stmoe_golden.energy.ENERGY`."""
        return self.near.tier, self.far.tier if self.far is not None else None

    @property
    def source(self) -> str:
        """Of both."""
        if self.far is None:
            return self.near.source
        return (
            f"{self.near.source}. The memory behind it holds {self.held:,} experts; the others: "
            f"{self.far.source}"
        )


def system_named(text: str) -> Tiers:
    """The tiers of ``NAME`` or ``NAME+BEHIND:N``.

    Raises
    ------
    TimingError
        No such system.
    """
    name, plus, rest = text.partition("+")
    behind, colon, number = rest.partition(":")
    known = name in SYSTEMS and (not plus or behind in SYSTEMS)
    if not known or (plus and not (colon and number.isascii() and number.isdigit())):
        raise TimingError(
            f"must be one of {', '.join(SYSTEMS)}, or two of them as NAME+BEHIND:N, where NAME "
            f"holds N experts and BEHIND the others, not {text!r:.60}"
        )
    if not plus:
        return Tiers(SYSTEMS[name])
    if len(number) > 6 or number.startswith("0"):
        raise TimingError(
            f"must name 1 to 999999 experts after the colon, without leading zeros, not "
            f"{text!r:.60}"
        )
    return Tiers(SYSTEMS[name], SYSTEMS[behind], int(number))


EXPERT_SHAPES: dict[str, tuple[int, int]] = {
    "gpt_oss_20b": (2880, 2880),
    "olmoe_1b_7b": (2048, 1024),
    "deepseek_v2_lite": (2048, 1408),
    "qwen3_30b_a3b": (2048, 768),
    "mixtral_8x7b": (4096, 14336),
}
"""Hidden and intermediate size of an expert, from each model's ``config.json``
(``hidden_size`` and ``moe_intermediate_size`` or ``intermediate_size``) on Hugging Face."""

BITS = {"fp16": 16, "int8": 8, "int4": 4}


def expert_bytes_of(trace: Trace, dtype: str = "int8") -> np.ndarray:
    """float64 [L]: bytes of an expert in each layer.

    The trace's ``info`` says so (``expert_bytes``, a number or one for each layer), or it has the
    shape of a preset whose expert size is known, times ``dtype``'s bits (architecture section 6:
    3 * hidden * intermediate * bits / 8). Else the configuration's own 2,048 bytes: only ratios
    mean something then.
    """
    if dtype not in BITS:
        raise TimingError(f"expert type must be {', '.join(BITS)}, not {dtype!r}")
    layers = trace.num_layers
    stated = trace.info.get("expert_bytes")
    if isinstance(stated, int | float) and not isinstance(stated, bool) and stated > 0:
        return np.full(layers, float(stated))
    if isinstance(stated, list) and len(stated) == layers and all(b > 0 for b in stated):
        return np.array(stated, np.float64)
    for name, (hidden, intermediate) in EXPERT_SHAPES.items():
        p = PRESETS[name]
        if (p.num_layers, p.num_experts, p.top_k) == (layers, trace.num_experts, trace.top_k):
            return np.full(layers, 3 * hidden * intermediate * BITS[dtype] / 8)
    return np.full(layers, float(EngineConfig().expert_bytes))


def machine_for_system(config: EngineConfig, name: str, expert_bytes: np.ndarray) -> Machine:
    """A machine in nanoseconds. An expert takes as long as its weights take to be read, and
    attention as long as the K experts (architecture section 10).

    Raises
    ------
    TimingError
        No such system (see :func:`system_named`).
    """
    try:
        tiers = system_named(name)
    except TimingError as error:
        raise TimingError(f"system {error}") from None
    system = tiers.near
    layers = config.num_layers

    def cycles(seconds: np.ndarray) -> np.ndarray:
        return np.maximum(1, np.rint(seconds * HZ)).astype(np.int64)

    expert = cycles(expert_bytes / system.compute)
    burst = max(float(system.burst), float(expert_bytes.max()) / MAX_BURSTS)
    burst_seconds = burst / system.link
    enough = outstanding_for(system.latency, burst_seconds)
    machine = Machine(
        attention=config.top_k * expert,
        expert=expert,
        load=cycles(expert_bytes / system.link),
        latency=np.full(layers, round(system.latency * HZ), np.int64),
        burst=max(1, round(burst_seconds * HZ)),
        max_outstanding=max(config.max_outstanding, enough),
        prefetch_outstanding=max(config.prefetch_outstanding, enough),
        slots=config.num_slots,
        quota=np.full(layers, config.quota, np.int32),
        prefetch_loads=config.prefetch_loads,
        engine=IDEAL,
    )
    if tiers.far is None:
        return machine
    far_load = cycles(expert_bytes / tiers.far.link)
    if float(machine.load.max()) * float(far_load.max()) > 1 << 62:
        raise TimingError(
            f"system {name}: experts of {expert_bytes.max():.3g} bytes take too long on two tiers"
        )
    return machine._replace(
        near=tiers.held,
        far_load=far_load,
        far_latency=np.full(layers, round(tiers.far.latency * HZ), np.int64),
    )


def load_ratio_of(machine: Machine, top_k: int) -> float:
    """r: the time to load K experts over the compute time of a layer, the mean of all layers."""
    return float(top_k * machine.load.sum() / (machine.attention + top_k * machine.expert).sum())


def systems_table() -> str:
    """The named systems, in Markdown."""
    lines = [
        "| system | link GB/s | latency us | compute GB/s | r | tier | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in SYSTEMS.items():
        lines.append(
            f"| `{name}` | {s.link / 1e9:.2f} | {s.latency * 1e6:g} | {s.compute / 1e9:g} | "
            f"{s.compute / s.link / 2:.2f} | {s.tier} | {s.source} |"
        )
    return "\n".join(lines)
