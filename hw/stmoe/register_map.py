# SPDX-License-Identifier: Apache-2.0
"""The register map: one table that RTL, ``docs/registers.md``, C header and SystemRDL come from.

The offset of a register never depends on the configuration; only the lengths of the arrays,
the capabilities and the reset values do. So one driver serves every engine.

``python -m stmoe.register_map --markdown`` (``--c-header``, ``--systemrdl``) prints the documents.
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import Iterator
from dataclasses import dataclass

from stmoe_golden.config import (
    NUM_SEGMENTS,
    PAGE_BYTES,
    PRESETS,
    ConfigError,
    EngineConfig,
    preset,
)

__all__ = [
    "COUNTERS",
    "COUNTER_INDEX",
    "FARTHER_THRESHOLDS",
    "IDENTITY",
    "TABLE_PATIENCE",
    "VERSION",
    "Access",
    "Counter",
    "Dimension",
    "Field",
    "Register",
    "addr_width",
    "c_header",
    "markdown",
    "quota_bits",
    "registers",
]

IDENTITY = int.from_bytes(b"STMO", "big")
"""What IDENTITY reads: ASCII 'STMO', 'S' in the most significant byte."""

VERSION = (1, 1, 0)
"""Version of the register map: major (incompatible), minor (additions), patch."""

WORD_BYTES = 4
MAX_LAYERS = 256
"""Layers that every array of layers has room for (the most that ``num_layers`` allows)."""

TABLE_PATIENCE = 4095
"""Cycles that a read of TABLE_VALUE waits for a pause between events."""

MAX_COUNTERS = 64
"""Counters that the array of counters has room for."""


class Access(enum.Enum):
    """What software may do with a field or a register."""

    RO = "RO"
    """Read only; writing a register without any writable field answers SLVERR."""
    RW = "RW"
    """Reads what was last written."""
    WO = "WO"
    """Write only; reading answers SLVERR."""
    W1C = "W1C"
    """Sticky; writing 1 clears it. An event in the same cycle wins over the clear."""
    W1 = "W1"
    """Writing 1 triggers an action; reads 0."""


@dataclass(frozen=True)
class Field:
    """Bits ``lsb`` to ``lsb + width - 1`` of a register."""

    name: str
    lsb: int
    width: int
    access: Access
    doc: str

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return ((1 << self.width) - 1) << self.lsb


@dataclass(frozen=True)
class Dimension:
    """One index of an array of registers; all are powers of two but ``count``.

    ``room`` is the number of elements that addresses are kept for, so that an index is a slice
    of the address whatever ``count`` is.
    """

    name: str
    count: int
    stride: int
    room: int


@dataclass(frozen=True)
class Register:
    """A 32-bit register, or an array of them.

    ``offset`` is the byte offset of the first element. Bits that no field owns read 0 and ignore
    what is written. ``reset`` is what is read after reset.
    """

    name: str
    offset: int
    access: Access
    reset: int
    fields: tuple[Field, ...]
    doc: str
    dims: tuple[Dimension, ...] = ()

    def __post_init__(self) -> None:
        used = 0
        for field in self.fields:
            if field.width < 1 or field.lsb + field.width > 32 or used & field.mask:
                raise ValueError(f"{self.name}.{field.name} does not fit, or overlaps another")
            used |= field.mask
        if not 0 <= self.reset < 1 << 32 or self.reset & ~used:
            raise ValueError(f"{self.name}: reset {self.reset:#x} sets bits that no field owns")
        if self.offset % WORD_BYTES:
            raise ValueError(f"{self.name}: offset {self.offset:#x} is not a multiple of 4")
        index_bits = 0
        for dim in self.dims:
            if not 1 <= dim.count <= dim.room or dim.room & (dim.room - 1):
                raise ValueError(f"{self.name}: {dim.count} {dim.name}s, room for {dim.room}")
            bits = (dim.room - 1) * dim.stride
            if dim.stride & (dim.stride - 1) or index_bits & bits or self.offset & bits:
                raise ValueError(f"{self.name}: index {dim.name} is not a slice of the address")
            index_bits |= bits

    @property
    def writable(self) -> bool:
        """Whether a write is taken (else it answers SLVERR)."""
        return self.access is not Access.RO

    @property
    def readable(self) -> bool:
        """Whether a read is answered (else it answers SLVERR)."""
        return self.access is not Access.WO

    def mask(self, *kinds: Access) -> int:
        """Bits of the fields that have one of these accesses."""
        return sum(field.mask for field in self.fields if field.access in kinds)

    def field(self, name: str) -> Field:
        """The field of that name."""
        return next(field for field in self.fields if field.name == name)

    def at(self, *index: int) -> int:
        """Byte offset of one element; ``index`` has one number per dimension."""
        if len(index) != len(self.dims):
            raise ValueError(f"{self.name} has {len(self.dims)} indices, not {len(index)}")
        for i, dim in zip(index, self.dims, strict=True):
            if not 0 <= i < dim.count:
                raise ValueError(f"{self.name}: {dim.name} must be 0 to {dim.count - 1}, not {i}")
        return self.offset + sum(i * d.stride for i, d in zip(index, self.dims, strict=True))

    def elements(self) -> Iterator[tuple[int, ...]]:
        """Every index, in order; one empty index when this is no array."""

        def walk(dims: tuple[Dimension, ...]) -> Iterator[tuple[int, ...]]:
            if not dims:
                yield ()
                return
            for i in range(dims[0].count):
                for rest in walk(dims[1:]):
                    yield (i, *rest)

        return walk(self.dims)

    def pattern(self, width: int) -> str:
        """The word addresses (``width`` bits) of all room of the array, with ``-`` for any."""
        free = sum((dim.room - 1) * dim.stride for dim in self.dims)
        bits = range(width + 1, 1, -1)
        return "".join("-" if free >> b & 1 else str(self.offset >> b & 1) for b in bits)


@dataclass(frozen=True)
class Counter:
    """One event counter."""

    name: str
    doc: str


COUNTERS: tuple[Counter, ...] = (
    Counter("tokens", "tokens taken"),
    Counter("sequences", "tokens taken that began a new sequence"),
    Counter("routes", "legal routing events taken"),
    Counter("illegal", "illegal tokens, routing events and releases dropped"),
    Counter("hits", "demanded experts found resident"),
    Counter("lates", "demanded experts found loading as a prefetch (which is promoted)"),
    Counter("misses", "demanded experts neither resident nor loading"),
    Counter("selected", "picks that entered the prefetch queue"),
    Counter("prefetch_loads", "loads started as a prefetch"),
    Counter("demand_loads", "loads started as a demand"),
    Counter("evictions", "resident experts replaced by a load"),
    Counter("useful", "prefetched experts demanded for the first time while resident"),
    Counter("useless", "prefetched experts evicted before any demand"),
    Counter("cancelled", "loads cancelled"),
    Counter("dropped", "prefetches refused by admission"),
    Counter(
        "replaced",
        "queued prefetches removed unstarted by routing, a newer selection or a new sequence",
    ),
    Counter("filled", "loads that completed with every beat in the slot"),
    Counter("drained", "cancelled loads of which no beat is owed any more"),
    Counter("grants", "grants without error"),
    Counter("error_grants", "grants with the error flag"),
    Counter("releases", "legal releases taken"),
    Counter("demand_bursts", "AXI AR handshakes of demands"),
    Counter("prefetch_bursts", "AXI AR handshakes of prefetches"),
    Counter("last_beats", "AXI R handshakes with last"),
    Counter("beats", "AXI R handshakes"),
    Counter("discarded_beats", "AXI R handshakes of cancelled loads, thrown away"),
    Counter("retries", "loads started again after a read error"),
    Counter("errors", "loads given up after the last retry"),
    Counter("timeouts", "loads given up by the watchdog"),
    Counter("score_commits", "score commits, one per token and per routing event"),
)
"""The counters, in the order of the COUNTER array and of ``Registers.increment``."""

COUNTER_INDEX: dict[str, int] = {counter.name: i for i, counter in enumerate(COUNTERS)}
"""Index of a counter in the COUNTER array and bit in ``Registers.increment``."""


def quota_bits(config: EngineConfig) -> int:
    """Bits of an active quota: 0 to num_experts."""
    return config.num_experts.bit_length()


FARTHER_THRESHOLDS = ("THRESHOLD_2", "THRESHOLD_3", "THRESHOLD_4")
"""Registers of the thresholds of the layers two, three and four ahead."""


def registers(config: EngineConfig) -> tuple[Register, ...]:
    """Every register of an engine, in the order of their offsets."""
    ro, rw, wo, w1c, w1 = Access.RO, Access.RW, Access.WO, Access.W1C, Access.W1

    def constant(
        name: str, offset: int, doc: str, *parts: tuple[str, int, int, int, str]
    ) -> Register:
        """A register of constants; parts are (name, lsb, width, value, doc)."""
        reset = 0
        for part, lsb, width, value, _ in parts:
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name}.{part} = {value} does not fit in {width} bits")
            reset |= value << lsb
        fields = tuple(Field(n, lsb, width, ro, text) for n, lsb, width, _, text in parts)
        return Register(name, offset, ro, reset, fields, doc)

    layers = Dimension("layer", config.num_layers, WORD_BYTES, MAX_LAYERS)
    layers_and_segments = (
        Dimension("layer", config.num_layers, NUM_SEGMENTS * 16, MAX_LAYERS),
        Dimension("segment", NUM_SEGMENTS, 16, NUM_SEGMENTS),
    )
    causes = (
        ("error", "a load was given up after the last retry"),
        ("watchdog", "a load was given up by the watchdog"),
        ("illegal", "an illegal token, routing event or release was dropped"),
        ("counter_wrap", "a counter has reached 2^31: read it before it wraps"),
        ("commit_refused", "a commit was refused"),
    )
    return (
        constant(
            "IDENTITY",
            0x000,
            "Says that this is an ST-MoE prefetch engine.",
            ("identity", 0, 32, IDENTITY, "ASCII 'STMO', 'S' in the most significant byte"),
        ),
        constant(
            "VERSION",
            0x004,
            "Version of this register map.",
            ("patch", 0, 8, VERSION[2], "no change of the interface"),
            ("minor", 8, 8, VERSION[1], "additions that old software does not notice"),
            ("major", 16, 16, VERSION[0], "incompatible changes"),
        ),
        constant(
            "CAPABILITY0",
            0x008,
            "Shape of the model.",
            ("num_layers", 0, 16, config.num_layers, "MoE layers, L"),
            ("num_experts", 16, 16, config.num_experts, "experts per layer, E"),
        ),
        constant(
            "CAPABILITY1",
            0x00C,
            "Shape of the predictor.",
            ("top_k", 0, 8, config.top_k, "experts per routing event, K"),
            ("spatial_depth", 8, 8, config.depth, "spatial tables built, D"),
            ("lookahead", 16, 8, config.look, "layers selected ahead"),
            ("num_contexts", 24, 8, config.num_contexts, "sequences decoded at once"),
        ),
        constant(
            "CAPABILITY2",
            0x010,
            "Size of the buffer and of the tables.",
            ("num_slots", 0, 16, config.num_slots, "slots of the expert buffer"),
            ("num_transfers", 16, 8, config.transfers, "loads in flight at once"),
            ("weight_bits", 24, 8, config.weight_bits, "bits of a correlation weight"),
        ),
        constant(
            "CAPABILITY3",
            0x014,
            "The ports.",
            ("axi_data_width", 0, 16, config.axi_data_width, "AXI read data width in bits"),
            ("axi_addr_width", 16, 8, config.axi_addr_width, "AXI address width in bits"),
            ("event_port", 24, 1, int(config.event_port), "the event port is built"),
            (
                "buffer_axi",
                25,
                1,
                int(config.buffer == "axi"),
                "the buffer is behind AXI: BUFFER_BASE_LOW, BUFFER_BASE_HIGH and SLOT_STRIDE exist",
            ),
        ),
        constant(
            "CAPABILITY4",
            0x018,
            "Sizes of this map.",
            ("score_bits", 0, 8, config.score_bits, "signed bits of a score and a threshold"),
            ("num_counters", 8, 8, len(COUNTERS), "counters"),
            ("num_segments", 16, 8, NUM_SEGMENTS, "address segments per layer"),
        ),
        constant(
            "CAPABILITY5",
            0x01C,
            "The slot.",
            ("slot_bytes", 0, 32, config.expert_bytes, "largest expert, and the slot stride"),
        ),
        Register(
            "SCRATCH",
            0x020,
            rw,
            0,
            (Field("value", 0, 32, rw, "free for software; the engine ignores it"),),
            "Reads what was written, to test the bus.",
        ),
        Register(
            "CONTROL",
            0x024,
            rw,
            0b111 | int(config.adaptive) << 3,
            (
                Field("prefetch_enable", 0, 1, rw, "experts are selected for prefetch"),
                Field("learning_enable", 1, 1, rw, "correlation tables learn"),
                Field("ordered", 2, 1, rw, "experts of a routing event come in rank order"),
                Field(
                    "adaptive",
                    3,
                    1,
                    rw,
                    "each layer's threshold moves upward from THRESHOLD by what becomes of its "
                    "prefetches; else it is THRESHOLD",
                ),
            ),
            "Switches (shadow: takes effect at a commit).",
        ),
        Register(
            "THRESHOLD",
            0x028,
            rw,
            config.floors[0] & 0xFFFF_FFFF,
            (
                Field(
                    "threshold",
                    0,
                    32,
                    rw,
                    "signed, whole units and 2 fraction bits (quarter units); a score passes "
                    "the confidence gate when it is at least this. A commit is refused when it "
                    f"does not fit in CAPABILITY4.score_bits ({config.score_bits}) bits",
                ),
            ),
            "Confidence threshold, where it is adaptive the lowest (shadow: takes effect at a "
            "commit).",
        ),
        Register(
            "COMMIT",
            0x02C,
            w1,
            0,
            (
                Field(
                    "commit",
                    0,
                    1,
                    w1,
                    "check the shadow registers, and have the engine take them over all at once",
                ),
            ),
            "Makes the shadow registers (CONTROL, THRESHOLD, PREDICTORS, QUOTA and SEGMENT_*) take "
            "effect, or refuses all of them: sum of QUOTA + top_k must be at most num_slots, no "
            "QUOTA more than num_experts, THRESHOLD in range, and segments as SEGMENT_BASE_LOW "
            "says. The write is answered when the check is done, so STATUS read next says whether "
            "the set was refused. While a commit is pending, writes to these registers and to "
            "COMMIT wait on the bus until it has taken effect, and a COMMIT of other segments "
            "until STATUS.old_segments is 0; all other accesses go on, unless they are queued "
            "behind such a write.",
        ),
        Register(
            "STATUS",
            0x030,
            w1c,
            0,
            (
                Field("commit_pending", 0, 1, ro, "a legal commit waits for the engine"),
                Field("commit_refused", 1, 1, w1c, "a commit was refused since last cleared"),
                Field("initialised", 2, 1, ro, "the tables have been cleared after reset"),
                Field("busy", 3, 1, ro, "the engine has work in progress"),
                Field(
                    "old_segments",
                    4,
                    1,
                    ro,
                    "a load under way still reads where the segments said that the last commit "
                    "replaced: leave that memory as it is",
                ),
            ),
            "State of the engine.",
        ),
        Register(
            "IRQ_STATUS",
            0x034,
            w1c,
            0,
            tuple(Field(name, i, 1, w1c, doc) for i, (name, doc) in enumerate(causes)),
            "Causes of the interrupt, since last cleared.",
        ),
        Register(
            "IRQ_ENABLE",
            0x038,
            rw,
            0,
            tuple(
                Field(name, i, 1, rw, f"IRQ_STATUS.{name} raises the interrupt")
                for i, (name, _) in enumerate(causes)
            ),
            "Causes that raise `irq`, a level: high while any enabled cause is set.",
        ),
        Register(
            "PREDICTORS",
            0x03C,
            rw,
            (1 << (config.depth + 2)) - 1,
            (
                Field("bias", 0, 1, rw, "each expert's own frequency: table 0"),
                Field("temporal", 1, 1, rw, "the layer's token before: table 1"),
                *(
                    Field(f"spatial_{d}", 1 + d, 1, rw, f"the layer {d} before: table {1 + d}")
                    for d in range(1, config.depth + 1)
                ),
            ),
            "Kinds of predictor that are enabled, one bit for each table of TABLE_INDEX (shadow: "
            "takes effect at a commit, from the next token or routing event on). A disabled kind "
            "adds nothing to scores and does not learn: its weights stay until it is enabled "
            "again. What scores already hold stays in them until they start anew, at their "
            "layer's next routing event.",
        ),
        Register(
            "CYCLE_LOW",
            0x040,
            ro,
            0,
            (Field("cycle", 0, 32, ro, "low 32 bits"),),
            "Clock cycles since reset, the time base of the event port. Reading it also "
            "samples CYCLE_HIGH.",
        ),
        Register(
            "CYCLE_HIGH",
            0x044,
            ro,
            0,
            (Field("cycle", 0, 8, ro, "bits 32 to 39 at the last read of CYCLE_LOW"),),
            "Upper part of the cycle count that CYCLE_LOW last read.",
        ),
        Register(
            "TABLE_INDEX",
            0x048,
            rw,
            0,
            (
                Field("lane", 0, 8, rw, "expert whose score the weight adds to"),
                Field("expert", 8, 8, rw, "expert whose use it is: the row. 0 for table 0"),
                Field("layer", 16, 8, rw, "layer whose score it is"),
                Field(
                    "table",
                    24,
                    4,
                    rw,
                    "0: bias. 1: temporal, `expert` of this layer's token before. 1 + d: "
                    f"spatial, `expert` of d layers before, d = 1 to {config.depth}",
                ),
            ),
            "Which weight of the predictor TABLE_VALUE reads.",
        ),
        Register(
            "TABLE_VALUE",
            0x04C,
            ro,
            0,
            (Field("weight", 0, 32, ro, "signed, whole units"),),
            "A weight of the correlation tables, read between two events: it holds all that was "
            "learnt from the events before and nothing of later ones. Reading it moves "
            "TABLE_INDEX.lane on by one, after the last lane to 0, so a row takes one write and "
            "num_experts reads. Answers SLVERR, and moves nothing, when TABLE_INDEX names a "
            f"weight that does not exist, or when no pause came in {TABLE_PATIENCE} cycles "
            "(an event waits for the accelerator, say): read again then.",
        ),
        *(
            Register(
                name,
                0x050 + 4 * n,
                rw,
                config.floors[1 + n] & 0xFFFF_FFFF,
                (
                    Field(
                        "threshold",
                        0,
                        32,
                        rw,
                        f"as THRESHOLD.threshold, for the layer that is {2 + n} ahead",
                    ),
                ),
                "Confidence threshold of a farther layer (shadow: takes effect at a commit); only "
                f"where the lookahead is {2 + n} or more.",
            )
            for n, name in enumerate(FARTHER_THRESHOLDS[: config.num_farther])
        ),
        *(_place_registers(config) if config.buffer == "axi" else ()),
        Register(
            "COUNTER",
            0x100,
            ro,
            0,
            (Field("count", 0, 32, ro, "events since reset, modulo 2^32"),),
            "Event counters, read live: the value holds every event before the read came to the "
            "port (ARVALID), and maybe some until its answer, which takes up to one round of the "
            "counters more than other reads.",
            (Dimension("counter", len(COUNTERS), WORD_BYTES, MAX_COUNTERS),),
        ),
        Register(
            "QUOTA",
            0x400,
            rw,
            config.quota,
            (
                Field(
                    "quota",
                    0,
                    32,
                    rw,
                    "slots that stay resident for the layer. A larger value than num_experts "
                    f"is kept as num_experts + 1 ({config.num_experts + 1}), which no commit "
                    "accepts",
                ),
            ),
            "Slots that each layer keeps (shadow: takes effect at a commit).",
            (layers,),
        ),
        Register(
            "SEGMENT_BASE_LOW",
            0x4000,
            wo,
            0,
            (
                Field(
                    "base",
                    0,
                    32,
                    wo,
                    f"byte address of expert 0, low bits: a multiple of {config.beat_bytes}, the "
                    "bytes of an AXI beat",
                ),
            ),
            "Where a part of a layer's experts lies: expert e at base + e * stride, which is for "
            "software to keep within the address space (shadow: takes effect at a commit). All "
            "words are 0 after reset, and a part of 0 beats is unused; a commit is refused when "
            "any word of any part is out of range, or when a layer has no beats at all, unless "
            "no SEGMENT register was written since the last that was not. A load under way keeps "
            "to the segments that were active when it began.",
            layers_and_segments,
        ),
        Register(
            "SEGMENT_BASE_HIGH",
            0x4004,
            wo,
            0,
            (
                Field(
                    "base",
                    0,
                    32,
                    wo,
                    f"byte address of expert 0, high bits: below {1 << config.axi_addr_width - 32}",
                ),
            ),
            "See SEGMENT_BASE_LOW.",
            layers_and_segments,
        ),
        Register(
            "SEGMENT_STRIDE",
            0x4008,
            wo,
            0,
            (
                Field(
                    "stride",
                    0,
                    32,
                    wo,
                    "bytes from one expert to the next: a multiple of "
                    f"{config.beat_bytes}, the bytes of an AXI beat",
                ),
            ),
            "See SEGMENT_BASE_LOW.",
            layers_and_segments,
        ),
        Register(
            "SEGMENT_BEATS",
            0x400C,
            wo,
            0,
            (
                Field(
                    "beats",
                    0,
                    32,
                    wo,
                    f"AXI beats of {config.beat_bytes} bytes in this part, its bytes rounded up; "
                    "0: the part is unused. Those of a layer's parts together are 1 to the beats "
                    f"of a slot ({config.slot_beats})",
                ),
            ),
            "See SEGMENT_BASE_LOW.",
            layers_and_segments,
        ),
    )


def _place_registers(config: EngineConfig) -> tuple[Register, ...]:
    """Where a buffer behind AXI lies. All of it begins on pages of 4 KiB."""
    rw, page = Access.RW, (PAGE_BYTES - 1).bit_length()
    high_bits = config.axi_addr_width - 32
    base = "byte address of slot 0, a multiple of 4096"
    what = (
        "(shadow: takes effect at a commit). A commit that changes where slots lie waits until no "
        "load is under way and every grant has been released, holding routes and prefetches back, "
        "and empties the buffer: no expert is resident after it. It is refused where SLOT_STRIDE "
        f"is less than a slot ({config.least_stride} bytes), or where the last slot "
        f"would end beyond {config.axi_addr_width} address bits."
    )
    return (
        Register(
            "BUFFER_BASE_LOW",
            0x060,
            rw,
            0,
            (Field("base", page, 32 - page, rw, f"{base}, low bits, in place"),),
            f"Where the expert buffer lies {what}",
        ),
        Register(
            "BUFFER_BASE_HIGH",
            0x064,
            rw,
            0,
            (Field("base", 0, high_bits, rw, f"{base}, high bits"),) if high_bits else (),
            "Upper part of BUFFER_BASE_LOW.",
        ),
        Register(
            "SLOT_STRIDE",
            0x068,
            rw,
            config.least_stride,
            (
                Field(
                    "stride",
                    page,
                    32 - page,
                    rw,
                    "bytes from one slot to the next, a multiple of 4096, in place",
                ),
            ),
            f"How far apart slots lie {what}",
        ),
    )


def addr_width(config: EngineConfig) -> int:
    """Bits of a byte address that reach every register."""
    last = max(r.at(*(dim.count - 1 for dim in r.dims)) for r in registers(config))
    return (last + WORD_BYTES - 1).bit_length()


# Documents ----------------------------------------------------------------------------------


def _preset_of(config: EngineConfig) -> str | None:
    return next((name for name, value in PRESETS.items() if value == config), None)


def _offset_text(register: Register) -> str:
    terms = [f"{register.offset:#06x}"] + [f"{d.stride:#x}*{d.name}" for d in register.dims]
    return " + ".join(terms)


def _reset_text(register: Register) -> str:
    return f"{register.reset:#010x}" if register.readable else ""


def _bits_text(field: Field) -> str:
    top = field.lsb + field.width - 1
    return str(top) if field.width == 1 else f"{top}:{field.lsb}"


def markdown(config: EngineConfig) -> str:
    """The register map of one engine, as a document."""
    name = _preset_of(config)
    table = registers(config)
    command = "python -m stmoe.register_map --markdown" + (f" --preset {name}" if name else "")
    origin = f"preset `{name}`" if name else "a configuration that is no preset"
    lines = [
        "# Registers",
        "",
        f"Printed by `{command}`; not written by hand. The RTL (`hw/stmoe/registers.py`), this "
        "file, the C header (`--c-header`) and the SystemRDL (`--systemrdl`; `--html FOLDER` for "
        "PeakRDL's pages of it) come from the same table, `hw/stmoe/register_map.py`.",
        "",
        f"This is the map for {origin}: {config.num_layers} layers of {config.num_experts} "
        f"experts, top-{config.top_k}, {config.num_slots} slots. In other configurations every "
        "register has the same offset; what differs is how many elements the arrays of layers "
        "have, the capabilities, the kinds in PREDICTORS, and the reset values of CONTROL, "
        "THRESHOLD and QUOTA. With a lookahead of 2 to 4 there are also THRESHOLD_2 (0x050) to "
        "THRESHOLD_4 (0x058), as many as it needs, which belong to the same commit. Addresses "
        f"have {addr_width(config)} bits.",
        "",
        "The port is AXI4-Lite, 32 bits wide. The two lowest address bits are ignored. "
        "Unknown addresses, writes to registers that are RO and reads of registers that are WO "
        "answer SLVERR and change nothing. Byte strobes are honoured: a byte that is not strobed "
        "keeps its value, and clears or triggers nothing. Bits that are not listed read 0 and "
        "ignore what is written. The answer to a write comes after its effect (COMMIT: its check).",
        "",
        "| access | meaning |",
        "|---|---|",
        "| RO | read only |",
        "| RW | reads what was last written |",
        "| WO | write only |",
        "| W1C | sticky; writing 1 clears it, an event in the same cycle wins |",
        "| W1 | writing 1 triggers an action; reads 0 |",
        "",
        "To configure: write CONTROL, THRESHOLD (and those of farther layers, where there are "
        "any), PREDICTORS, QUOTA and SEGMENT_*, as far as they change, write 1 to COMMIT, read "
        "STATUS. commit_refused: the set was illegal and nothing has changed. Else "
        "commit_pending falls when the engine has taken over all of it, in one cycle. Segments "
        "are committed before the first token.",
        "",
        *(
            ()
            if config.buffer == "axi"
            else (
                "Where the buffer is behind AXI (`buffer = axi`) there are also BUFFER_BASE_LOW "
                "(0x060), BUFFER_BASE_HIGH (0x064) and SLOT_STRIDE (0x068), which belong to the "
                "same commit; `python -m stmoe.register_map --markdown --config FILE.toml` prints "
                "that map.",
                "",
            )
        ),
        "## Map",
        "",
        "| offset | register | access | reset | elements |",
        "|---|---|---|---|---|",
    ]
    for r in table:
        count = " x ".join(f"{d.count} {d.name}s" for d in r.dims)
        lines.append(
            f"| `{_offset_text(r)}` | {r.name} | {r.access.value} | {_reset_text(r)} | {count} |"
        )
    for r in table:
        lines += ["", f"## {r.name}", "", f"`{_offset_text(r)}`, {r.access.value}. {r.doc}"]
        if r.fields:
            lines += ["", "| bits | field | access | reset | meaning |", "|---|---|---|---|---|"]
        for f in r.fields:
            value = (r.reset & f.mask) >> f.lsb
            reset = (f"{value:#x}" if value > 9 else str(value)) if r.readable else ""
            lines.append(f"| {_bits_text(f)} | {f.name} | {f.access.value} | {reset} | {f.doc} |")
        if r.name == "COUNTER":
            lines += ["", "| offset | counter | counts |", "|---|---|---|"]
            for i, c in enumerate(COUNTERS):
                lines.append(f"| {r.at(i):#06x} | {c.name} | {c.doc} |")
    return "\n".join(lines) + "\n"


def c_header(config: EngineConfig) -> str:
    """A C header with the offsets, the fields, and the shape of one engine."""
    name = _preset_of(config)
    lines = [
        "/* SPDX-License-Identifier: Apache-2.0",
        " *",
        " * Registers of the ST-MoE prefetch engine. Printed by stmoe.register_map from the",
        " * table that the RTL is made of; not written by hand. Offsets are in bytes and the",
        " * same in every configuration. The constants below that say what this one has are of",
        f" * {f'preset {name}' if name else 'a configuration that is no preset'}; "
        "the CAPABILITY registers have them too.",
        " */",
        "#ifndef STMOE_REGISTERS_H",
        "#define STMOE_REGISTERS_H",
        "",
    ]

    def define(macro: str, value: str, doc: str = "") -> None:
        lines.append(f"#define {macro} {value}" + (f" /* {doc} */" if doc else ""))

    define("STMOE_ADDR_WIDTH", f"{addr_width(config)}u", "bits of a byte address")
    for r in registers(config):
        macro = f"STMOE_{r.name}"
        lines += ["", f"/* {r.access.value}: {r.doc} */"]
        if r.dims:
            names = ", ".join(d.name for d in r.dims)
            terms = " + ".join(f"{d.stride:#x}u * (unsigned)({d.name})" for d in r.dims)
            define(f"{macro}_OFFSET({names})", f"({r.offset:#06x}u + {terms})")
            for d in r.dims:
                define(f"{macro}_{d.name.upper()}S", f"{d.count}u")
        else:
            define(f"{macro}_OFFSET", f"{r.offset:#06x}u")
        if r.readable:
            define(f"{macro}_RESET", f"{r.reset:#010x}u")
        for f in r.fields:
            define(f"{macro}_{f.name.upper()}_SHIFT", f"{f.lsb}u", f.doc)
            define(f"{macro}_{f.name.upper()}_MASK", f"{f.mask:#010x}u")
    lines += ["", "/* Index of each counter. */", "enum stmoe_counter {"]
    for i, c in enumerate(COUNTERS):
        lines.append(f"    STMOE_COUNTER_{c.name.upper()} = {i}, /* {c.doc} */")
    lines += [
        f"    STMOE_NUM_COUNTERS = {len(COUNTERS)}",
        "};",
        "",
        "#endif /* STMOE_REGISTERS_H */",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Print one of the documents."""
    parser = argparse.ArgumentParser(prog="python -m stmoe.register_map", description=main.__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--markdown", action="store_true", help="the document docs/registers.md")
    kind.add_argument("--c-header", action="store_true", help="a C header")
    kind.add_argument("--systemrdl", action="store_true", help="SystemRDL 2.0")
    kind.add_argument("--html", metavar="FOLDER", help="PeakRDL's pages, written into FOLDER")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--preset", metavar="NAME", help=f"{', '.join(PRESETS)}; gpt_oss_20b if none is named"
    )
    source.add_argument("--config", metavar="FILE.toml", help="as `stmoe config` writes it")
    parser.add_argument(
        "-o", dest="output", metavar="FILE", help="write it there (not with --html)"
    )
    options = parser.parse_args(arguments)
    if options.html is not None and options.output is not None:
        parser.error("argument -o: not allowed with argument --html")
    # SystemRDL is for those who ask for it; it is built on this module.
    from .register_rdl import RdlError, systemrdl, write_html

    try:
        if options.config is not None:
            config = EngineConfig.load(options.config)
        else:
            config = preset("gpt_oss_20b" if options.preset is None else options.preset)
        if options.html is not None:
            write_html(config, options.html)
            return
        if options.markdown:
            text = markdown(config)
        else:
            text = systemrdl(config) if options.systemrdl else c_header(config)
        if options.output is None:
            print(text, end="")
            return
        from stmoe_golden.traces import replacing

        with replacing(options.output) as file:
            file.write(text.encode())
    except (ConfigError, RdlError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{options.output or options.html}: {error.strerror or error}")


if __name__ == "__main__":
    main()
