# SPDX-License-Identifier: Apache-2.0
"""AXI4-Lite registers: configuration with a checked commit, counters, interrupt."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, enum, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import NUM_SEGMENTS, EngineConfig

from .payloads import (
    CYCLE_BITS,
    axi4_lite_signature,
    buffer_place_layout,
    segment_write_layout,
)
from .register_map import (
    COUNTERS,
    FARTHER_THRESHOLDS,
    TABLE_PATIENCE,
    Access,
    addr_width,
    quota_bits,
    registers,
)
from .table_reader import table_index_layout

__all__ = ["CounterBank", "Registers"]

OKAY, SLVERR = 0, 2
"""AXI responses that are given."""

SHADOW = ("CONTROL", "THRESHOLD", "PREDICTORS", "QUOTA", "SEGMENT", "COMMIT")
"""Registers that a pending commit keeps as they are; SEGMENT is all of SEGMENT_*."""

SEGMENT_WORDS = 4
"""Registers of one segment: BASE_LOW, BASE_HIGH, STRIDE, BEATS."""

LAYER_WORDS = SEGMENT_WORDS * NUM_SEGMENTS
"""Of all segments of a layer; one address follows the other."""

PLACE = ("BUFFER_BASE_LOW", "BUFFER_BASE_HIGH", "SLOT_STRIDE")
"""Those of a buffer behind AXI, which a pending commit keeps as well."""


def _small_counter(bits: int) -> tuple[list[int], tuple[int, ...]]:
    """States of a shift register that counts, from 0 on, and the taps whose XNOR it shifts in.

    Its next state is one LUT a bit, without a carry. All ones follows itself and is no count.
    """
    taps = {3: (2, 1), 4: (3, 2), 5: (4, 2), 6: (5, 4), 7: (6, 5)}[bits]
    states = [0]
    while True:
        last = states[-1]
        bit = ~sum(last >> tap for tap in taps) & 1
        state = (last << 1 | bit) & ((1 << bits) - 1)
        if state == 0:
            return states, taps
        states.append(state)


def _bits(count: int) -> int:
    """Bits of an index below ``count``, a power of two."""
    return (count - 1).bit_length()


class CounterBank(wiring.Component):
    """Event counters whose sums lie in one memory, so that each costs few LUTs.

    Every counter has a small register that counts at once (a shift register with feedback, the
    count in an order of its own); a walker visits one counter a cycle, in order, empties that
    register and adds it to the counter's sum. A round takes ``count`` cycles, which the small
    register is wide enough for, so no event is ever lost.

    A visit empties the register in one cycle (events of that very cycle belong to the next
    visit) and puts the sum on ``value`` three cycles after it.

    Parameters
    ----------
    count : int
        Counters, 4 to 126: a sum is written before it is read again.
    width : int
        Bits of a sum; sums wrap.

    Members
    -------
    increment : :py:`In(count)`
        Bit i high: counter i counts one event, in every cycle.
    index : :py:`In(range(count))`
        The counter that is read.
    valid : :py:`Out(1)`
        ``value`` is counter ``index``. High one cycle in ``count``, from the fourth cycle after
        reset on; a register's output, which belongs to ``index`` as it was in the cycle before.
    value : :py:`Out(width)`
        Holds every event up to four cycles before. A register's output.
    wrap : :py:`Out(1)`
        One cycle: a sum has just reached half of its range (its top bit rose).
    """

    def __init__(self, *, count: int, width: int = 32) -> None:
        if not isinstance(count, int) or not 4 <= count <= 126:
            raise ValueError(f"count must be 4 to 126, not {count!r}")
        self.count = count
        # A visit leaves the events of its own cycle, and count - 1 cycles follow: 0 to count.
        self.part_bits = (count + 1).bit_length()
        if not isinstance(width, int) or width <= self.part_bits:
            raise ValueError(f"width must be more than {self.part_bits}, not {width!r}")
        self.width = width
        super().__init__(
            {
                "increment": In(count),
                "index": In(range(count)),
                "valid": Out(1),
                "value": Out(width),
                "wrap": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count, part_bits = self.count, self.part_bits
        m.submodules.sums = sums = memory.Memory(shape=unsigned(self.width), depth=count, init=[])
        read, write = sums.read_port(domain="comb"), sums.write_port()

        # First stage: the part of the counter that is visited is taken.
        states, taps = _small_counter(part_bits)
        here = Signal(count, init=1)
        visit = Signal(range(count))
        m.d.sync += [here.eq(here.rotate_left(1)), visit.eq(visit + 1)]
        with m.If(here[-1]):
            m.d.sync += visit.eq(0)
        taken = Signal(part_bits)
        parts = []
        for i in range(count):
            part = Signal(part_bits, name=f"part{i}")
            shifted = Cat(~(part[taps[0]] ^ part[taps[1]]), part[:-1])
            with m.If(here[i]):
                m.d.sync += part.eq(Mux(self.increment[i], states[1], states[0]))
            with m.Elif(self.increment[i]):
                m.d.sync += part.eq(shifted)
            parts.append(part & here[i].replicate(part_bits))
        m.d.sync += taken.eq(reduce(or_, parts))

        # Second stage: its count, and its sum. A reset does not clear a memory, so the first round
        # after it takes every sum as 0.
        cleared = Signal()
        with m.If(here[-1]):
            m.d.sync += cleared.eq(1)
        taken_of = Signal.like(visit)
        taken_first = Signal(init=1)
        taken_valid = Signal()
        m.d.sync += [taken_of.eq(visit), taken_first.eq(~cleared), taken_valid.eq(1)]
        part = Signal(part_bits)
        decoded = Signal(part_bits)
        with m.Switch(taken):
            for number, state in enumerate(states):
                with m.Case(state):
                    m.d.comb += decoded.eq(number)
        old = Signal(self.width)
        added = Signal.like(visit)
        active = Signal()
        m.d.comb += read.addr.eq(taken_of)
        m.d.sync += [
            part.eq(decoded),
            old.eq(read.data),
            added.eq(taken_of),
            active.eq(taken_valid),
        ]
        with m.If(taken_first):
            m.d.sync += old.eq(0)

        # Third stage: they are added.
        new = Signal(self.width)
        m.d.comb += [
            new.eq(old + part),
            write.addr.eq(added),
            write.data.eq(new),
            write.en.eq(active),
        ]
        m.d.sync += [
            self.value.eq(new),
            self.valid.eq(active & (added == self.index)),
            self.wrap.eq(active & new[-1] & ~old[-1]),
        ]
        return m


class _State(enum.Enum, shape=3):
    """What the one access in progress is doing."""

    RESET = 0
    """After reset: the shadow quotas and segments are set, a word a cycle."""
    IDLE = 1
    """An access is chosen."""
    DECODE = 2
    """Its register is found."""
    FETCH = 3
    """Its register is read; a counter may take a round of the bank."""
    MERGE = 4
    """A write: the bytes that are not strobed are kept."""
    FINISH = 5
    """The address (and data) channel is taken, a write takes effect, the answer is given."""
    CHECK = 6
    """A commit: quotas and segments are walked through, a word every second cycle."""


class Registers(wiring.Component):
    """The engine's registers: an AXI4-Lite subordinate for what ``register_map`` lists.

    One access at a time, reads and writes in turn when both wait; from its address to its answer
    a read takes 4 cycles, a write 5, a counter's read up to ``len(COUNTERS)`` more, a weight's as
    long as the predictor takes (``TABLE_PATIENCE`` at most), a COMMIT ``32 * num_layers + 4`` more;
    the first after reset waits ``16 * num_layers`` cycles. AW and W are taken together, when the
    write takes effect. Both wait while a commit is pending if the write is to a shadow register or
    to COMMIT; reads and other writes go on.

    **Commit.** ``commit_request`` rises only after the check of the shadow registers and stays
    until ``commit_grant``. In the cycle of the grant ``committed`` is high; from the next cycle
    on all active values are the shadow values. The shadow quotas lie in LUT RAM; the check, which
    reads them all, lays them beside the active ones, so that these change in one cycle. The shadow
    segments lie in block RAM, and the check writes them to the set that is not active, which the
    grant makes active. Without a write to SEGMENT_* since the last grant they are not looked at and
    the sets do not change; with one, a COMMIT waits as long as ``old_segments`` is high.

    Parameters
    ----------
    config : :class:`EngineConfig`
    counter_bits : int
        Bits of a counter; fewer than 32 only to reach the wrap in a test.

    Members
    -------
    axil : :py:`In(axi4_lite_signature(addr_width(config)))`
        The bus.
    prefetching, learning, ordered, adaptive : :py:`Out(1)`
        Active switches.
    kinds : :py:`Out(depth + 2)`
        Active kinds of predictor, as PREDICTORS.
    threshold : :py:`Out(signed(score_bits))`
        Active threshold, quarter units.
    farther : :py:`Out(ArrayLayout(signed(score_bits), look - 1))`
        Only where ``lookahead`` is more than 1: those of the layers two and more ahead.
    quota : :py:`Out(ArrayLayout(unsigned(quota_bits(config)), num_layers))`
        Active quotas, each at most num_experts; their sum + K is at most num_slots.
    commit_request : :py:`Out(1)`
        A legal set waits for ``commit_grant``.
    commit_grant : :py:`In(1)`
        One cycle, while ``commit_request`` is high: take it over.
    committed : :py:`Out(1)`
        High in the cycle of the grant, combinationally.
    threshold_changed : :py:`Out(1)`
        With ``committed``: the threshold will be another from the next cycle on.
    segment_write : :py:`Out(stream.Signature(segment_write_layout(config)))`
        Every segment, layer by layer, for the set that ``segment_bank`` does not name: all of them
        have been handed over when ``commit_request`` rises.
    segment_bank : :py:`Out(1)`
        The active set of segments.
    old_segments : :py:`In(1)`
        The other set is still in use. May be wrong in the first cycle after ``segment_bank``
        changed, when STATUS says so in any case.
    read_index, read_request : Out
        The weight that TABLE_VALUE wants; stable until ``read_valid``, or until it gives up.
    read_valid, read_value : In
        The weight. ``read_valid`` is low in the cycle in which ``read_request`` rises.
    increment : :py:`In(len(COUNTERS))`
        Bit i high: counter i (:data:`COUNTERS`) counts one event, in every cycle.
    initialised, busy : :py:`In(1)`
        Levels that STATUS shows.
    error, watchdog, illegal : :py:`In(1)`
        One cycle each: sets the bit in IRQ_STATUS.
    irq : :py:`Out(1)`
        Level: an enabled bit of IRQ_STATUS is set.
    cycle : :py:`Out(CYCLE_BITS)`
        Clock cycles since reset (0 in the first): the engine's common time.
    place : :py:`Out(buffer_place_layout(config))`
        With a buffer behind AXI: where it lies, active.
    relocates : :py:`Out(1)`
        With a buffer behind AXI, while ``commit_request`` is high: the set has another ``place``.
    """

    def __init__(self, config: EngineConfig, *, counter_bits: int = 32) -> None:
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = config
        self.map = {register.name: register for register in registers(config)}
        if not isinstance(counter_bits, int) or not len(COUNTERS).bit_length() < counter_bits <= 32:
            raise ValueError(
                f"counter_bits must be {len(COUNTERS).bit_length() + 1} to 32, not {counter_bits!r}"
            )
        self.counter_bits = counter_bits
        self.addr_width = addr_width(config)
        score = signed(config.score_bits)
        farther = {
            "farther": Out(
                data.ArrayLayout(score, config.num_farther), init=config.floors[1 : config.look]
            )
        }
        self.behind_axi = config.buffer == "axi"
        place = {
            "place": Out(
                buffer_place_layout(config), init={"base": 0, "stride": config.slot_pages}
            ),
            "relocates": Out(1),
        }
        super().__init__(
            {
                "axil": In(axi4_lite_signature(self.addr_width)),
                "prefetching": Out(1, init=1),
                "learning": Out(1, init=1),
                "ordered": Out(1, init=1),
                "adaptive": Out(1, init=int(config.adaptive)),
                "kinds": Out(config.depth + 2, init=self.map["PREDICTORS"].reset),
                "threshold": Out(score, init=config.floors[0]),
                **(farther if config.look > 1 else {}),
                "quota": Out(
                    data.ArrayLayout(unsigned(quota_bits(config)), config.num_layers),
                    init=[config.quota] * config.num_layers,
                ),
                "commit_request": Out(1),
                "commit_grant": In(1),
                "committed": Out(1),
                "threshold_changed": Out(1),
                "segment_write": Out(stream.Signature(segment_write_layout(config))),
                "segment_bank": Out(1),
                "old_segments": In(1),
                "read_index": Out(table_index_layout(config)),
                "read_request": Out(1),
                "read_valid": In(1),
                "read_value": In(signed(config.bias_bits)),
                "increment": In(len(COUNTERS)),
                "initialised": In(1),
                "busy": In(1),
                "error": In(1),
                "watchdog": In(1),
                "illegal": In(1),
                "irq": Out(1),
                "cycle": Out(CYCLE_BITS),
                **(place if self.behind_axi else {}),
            }
        )

    def elaborate(self, platform: object) -> Module:
        config, axil, table = self.config, self.axil, self.map
        m = Module()
        m.d.sync += self.cycle.eq(self.cycle + 1)

        m.submodules.counters = counters = CounterBank(count=len(COUNTERS), width=self.counter_bits)
        m.d.comb += counters.increment.eq(self.increment)

        # The access in progress --------------------------------------------------------------

        state = Signal(_State, init=_State.RESET)
        writing = Signal()
        address = Signal(self.addr_width - 2)  # of words
        word = Signal(32)  # what FETCH has read, then what a write makes of it
        data_in, strobes = axil.w.payload.data, axil.w.payload.strb

        hit: dict[str, Signal] = {}  # it is to this register, and to an element that exists
        index: dict[str, list[Value]] = {}
        write: dict[str, Signal] = {}  # a legal write to it is in FINISH
        legal = Signal()
        # The registers of a segment are decoded as one array of words.
        decoded = {n: r for n, r in table.items() if not n.startswith("SEGMENT_")}
        decoded["SEGMENT"] = table["SEGMENT_BASE_LOW"]
        for name, register in decoded.items():
            index[name] = [
                address[(d.stride // 4).bit_length() - 1 :][: (d.room - 1).bit_length()]
                for d in register.dims
            ]
            pattern = register.pattern(len(address))
            if name == "SEGMENT":
                pattern = pattern[: -_bits(SEGMENT_WORDS)] + "-" * _bits(SEGMENT_WORDS)
            exists = address.matches(pattern)
            for d, i in zip(register.dims, index[name], strict=True):
                if d.count < d.room:
                    exists &= i < d.count
            hit[name] = Signal(name=f"hit_{name.lower()}")
            write[name] = Signal(name=f"write_{name.lower()}")
            m.d.sync += [
                hit[name].eq(exists),
                write[name].eq((state == _State.MERGE) & hit[name] & legal),
            ]

        def any_hit(names: Iterable[str]) -> Value:
            return reduce(or_, (hit[name] for name in names))

        def store(value: Value, lsb: int, enable: Value) -> None:
            """Take the strobed bytes of a write into ``value``, which begins at bit ``lsb``."""
            for byte in range(4):
                low, high = max(lsb, 8 * byte), min(lsb + len(value), 8 * byte + 8)
                if low < high:
                    with m.If(enable & strobes[byte]):
                        m.d.sync += value[low - lsb : high - lsb].eq(data_in[low:high])

        # Registers that are no array, as the table says ---------------------------------------

        moved = Signal()  # the sets of segments have just changed places
        threshold_bad = Signal()
        refused = Signal()
        cycle_high = Signal(CYCLE_BITS - 32)
        live = {  # what an RO field shows that is not a constant
            ("STATUS", "commit_pending"): self.commit_request,
            ("STATUS", "initialised"): self.initialised,
            ("STATUS", "busy"): self.busy,
            ("STATUS", "old_segments"): self.old_segments | moved,
            ("CYCLE_LOW", "cycle"): self.cycle[:32],
            ("CYCLE_HIGH", "cycle"): cycle_high,
            ("TABLE_VALUE", "weight"): self.read_value,
        }
        events = {  # what sets a W1C field
            ("STATUS", "commit_refused"): refused,
            ("IRQ_STATUS", "error"): self.error,
            ("IRQ_STATUS", "watchdog"): self.watchdog,
            ("IRQ_STATUS", "illegal"): self.illegal,
            ("IRQ_STATUS", "counter_wrap"): counters.wrap,
            ("IRQ_STATUS", "commit_refused"): refused,
        }
        shown: dict[str, Signal] = {}  # what a read returns
        kept_fields: dict[tuple[str, str], Value] = {}  # registers behind RW fields
        constants: dict[str, int] = {}  # of the registers that always read the same
        for name, register in table.items():
            if register.dims:
                continue
            if register.access is Access.RO and not any(name == of for of, _ in live):
                constants[name] = register.reset
                continue
            shown[name] = Signal(32, name=f"shown_{name.lower()}")
            for field in register.fields:
                bits = slice(field.lsb, field.lsb + field.width)
                reset = (register.reset & field.mask) >> field.lsb
                value: Value = Const(0, field.width)
                if field.access is Access.RO:
                    value = live[name, field.name]
                elif field.access in (Access.RW, Access.W1C):
                    value = Signal(
                        field.width, init=reset, name=f"{name.lower()}_{field.name.lower()}"
                    )
                    if field.access is Access.RW:
                        kept_fields[name, field.name] = value
                        store(value, field.lsb, write[name])
                    else:
                        cleared = write[name] & strobes[field.lsb // 8] & data_in[field.lsb]
                        m.d.sync += value.eq((value & ~cleared) | events[name, field.name])
                m.d.comb += shown[name][bits].eq(value)
        # They lie side by side, so the low bits of the address tell them apart.
        constant = Signal(32)
        place_bits = (len(constants) - 1).bit_length()
        with m.Switch(address[:place_bits]):
            for name, number in constants.items():
                with m.Case(table[name].offset // 4 % (1 << place_bits)):
                    m.d.comb += constant.eq(number)

        # Arrays --------------------------------------------------------------------------------

        # A quota that no commit accepts is kept as one more than the largest, to save bits.
        no_quota = config.num_experts + 1
        m.submodules.shadow_quota = shadow_quota = memory.Memory(
            shape=range(no_quota + 1), depth=config.num_layers, init=[]
        )
        quota_write, quota_read = shadow_quota.write_port(), shadow_quota.read_port(domain="comb")
        # The word of a layer's segments that an access means, or a walk through all of them; the
        # upper bits are the layer.
        place = Signal(range(LAYER_WORDS * (config.num_layers + 1)))
        scan = place[_bits(LAYER_WORDS) :]
        m.d.comb += [
            quota_read.addr.eq(scan),
            quota_write.addr.eq(scan),
            quota_write.data.eq(
                Mux(
                    state == _State.RESET,
                    config.quota,
                    Mux(word > config.num_experts, no_quota, word),
                )
            ),
            quota_write.en.eq((state == _State.RESET) | write["QUOTA"]),
        ]

        m.submodules.shadow_segments = shadow_segments = memory.Memory(
            shape=unsigned(32), depth=LAYER_WORDS * config.num_layers, init=[]
        )
        segments_write = shadow_segments.write_port(granularity=8)
        segments_read = shadow_segments.read_port()
        segments_changed = Signal()  # since the last commit that took effect
        walks = Signal()  # a word of the walk is read
        fetched_word = Signal()  # and is in a register of its own: block RAM is slow
        m.d.comb += [
            segments_write.addr.eq(place),
            segments_write.data.eq(word),  # 0 after reset
            segments_write.en.eq(
                (state == _State.RESET).replicate(4) | (strobes & write["SEGMENT"].replicate(4))
            ),
            segments_read.addr.eq(place),
            segments_read.en.eq(walks),
        ]
        with m.If(write["SEGMENT"] & strobes.any()):
            m.d.sync += segments_changed.eq(1)

        m.d.comb += counters.index.eq(index["COUNTER"][0])
        shown["COUNTER"] = counters.value
        shown["QUOTA"] = quota_read.data

        # The tables ----------------------------------------------------------------------------

        wanted = {f.name: kept_fields["TABLE_INDEX", f.name] for f in table["TABLE_INDEX"].fields}
        limits = {
            "table": config.depth + 2,
            "layer": config.num_layers,
            "expert": Mux(wanted["table"] == 0, 1, config.num_experts),
            "lane": config.num_experts,
        }
        weight_exists = Signal()
        m.d.sync += weight_exists.eq(Cat(wanted[n] < limit for n, limit in limits.items()).all())
        m.d.comb += [self.read_index[name].eq(wanted[name]) for name in limits]
        patience = Signal(range(TABLE_PATIENCE + 1))
        reading = hit["TABLE_VALUE"] & ~writing & weight_exists & (state == _State.FETCH)
        m.d.comb += self.read_request.eq(reading)
        m.d.sync += patience.eq(Mux(reading, patience + 1, 0))
        table_answer = ~hit["TABLE_VALUE"] | ~weight_exists | self.read_valid
        table_answer |= patience == TABLE_PATIENCE

        # The bus -------------------------------------------------------------------------------

        held = Signal()
        farther = FARTHER_THRESHOLDS[: config.num_farther]
        shadow = (*SHADOW, *farther, *(PLACE if self.behind_axi else ()))
        m.d.comb += held.eq(
            writing
            & (
                (any_hit(shadow) & self.commit_request)
                | (hit["COMMIT"] & segments_changed & self.old_segments)
            )
        )
        # K and the quotas so far; cannot overflow, as no shadow quota exceeds no_quota.
        most = config.top_k + config.num_layers * no_quota
        total = Signal(range(max(most, config.num_slots + 1) + 1))
        addend = Signal(range(no_quota + 1))
        quota_bad, segment_bad = Signal(), Signal()
        stage = self.segment_write
        next_quota = Signal.like(self.quota)
        answer_write, answer_read = Signal(), Signal()
        want_write = axil.aw.valid & axil.w.valid & ~axil.b.valid
        want_read = axil.ar.valid & ~axil.r.valid
        # A counter's value may lack the events of up to four cycles, so it is not the first that
        # is taken in FETCH.
        fetched = Signal()
        m.d.sync += fetched.eq(state == _State.FETCH)
        illegal = (
            quota_bad
            | threshold_bad
            | (total > config.num_slots)
            | (segment_bad & segments_changed)
        )
        if self.behind_axi:
            place_bad = Signal()
            illegal |= place_bad
        with m.Switch(state):
            with m.Case(_State.RESET):
                m.d.sync += place.eq(place + 1)
                with m.If(place == LAYER_WORDS * config.num_layers - 1):
                    m.d.sync += state.eq(_State.IDLE)
            with m.Case(_State.IDLE):
                # In turn when both wait; a write that is held has had its turn.
                turn = want_write & (~want_read | ~writing)
                m.d.sync += [
                    writing.eq(turn),
                    address.eq(Mux(turn, axil.aw.payload, axil.ar.payload)[2:]),
                ]
                with m.If(want_write | want_read):
                    m.d.sync += state.eq(_State.DECODE)
            with m.Case(_State.DECODE):
                # Segments have the upper half of the addresses to themselves.
                layer = Mux(address[-1], index["SEGMENT"][0], index["QUOTA"][0])
                m.d.sync += [
                    place.eq(Cat(address[: _bits(LAYER_WORDS)], layer)),
                    state.eq(_State.FETCH),
                ]
            with m.Case(_State.FETCH):
                constant_hit = any_hit(constants)
                m.d.sync += [
                    word.eq(
                        reduce(or_, (Mux(hit[name], value, 0) for name, value in shown.items()))
                        | Mux(constant_hit, constant, 0)
                    ),
                    legal.eq(
                        Mux(
                            writing,
                            any_hit(n for n in decoded if decoded[n].writable),
                            any_hit(
                                n for n in decoded if decoded[n].readable and n != "TABLE_VALUE"
                            )
                            | (hit["TABLE_VALUE"] & weight_exists & self.read_valid),
                        )
                    ),
                ]
                with m.If(held):
                    m.d.sync += state.eq(_State.IDLE)
                with m.Elif(writing):
                    m.d.sync += state.eq(_State.MERGE)
                with m.Elif((~hit["COUNTER"] | (counters.valid & fetched)) & table_answer):
                    m.d.sync += state.eq(_State.FINISH)
                with m.If(~writing & hit["CYCLE_LOW"]):
                    m.d.sync += cycle_high.eq(self.cycle[32:])
            with m.Case(_State.MERGE):
                store(word, 0, Const(1))
                m.d.sync += state.eq(_State.FINISH)
            with m.Case(_State.FINISH):
                m.d.sync += state.eq(_State.IDLE)
                m.d.comb += [
                    axil.aw.ready.eq(writing),
                    axil.w.ready.eq(writing),
                    axil.ar.ready.eq(~writing),
                    answer_write.eq(writing),
                    answer_read.eq(~writing),
                ]
                with m.If(write["COMMIT"] & strobes[0] & data_in[0]):
                    m.d.comb += answer_write.eq(0)
                    m.d.sync += state.eq(_State.CHECK)
                m.d.sync += [
                    place.eq(0),
                    total.eq(config.top_k),
                    quota_bad.eq(0),
                    segment_bad.eq(0),
                    fetched_word.eq(0),
                ]
                with m.If(~writing & hit["TABLE_VALUE"] & legal):
                    m.d.sync += wanted["lane"].eq(
                        Mux(wanted["lane"] == config.num_experts - 1, 0, wanted["lane"] + 1)
                    )
            with m.Case(_State.CHECK):
                m.d.comb += walks.eq(fetched_word & (~stage.valid | stage.ready))
                m.d.sync += fetched_word.eq(~walks)
                with m.If(walks):
                    m.d.sync += place.eq(place + 1)
                    with m.If(~place[: _bits(LAYER_WORDS)].any()):
                        m.d.sync += addend.eq(quota_read.data)
                        with m.If(scan != config.num_layers):
                            # The first layer's comes first, and is at the end when all have come.
                            m.d.sync += [
                                next_quota.as_value().eq(
                                    Cat(
                                        next_quota.as_value()[quota_bits(config) :],
                                        quota_read.data,
                                    )[: len(next_quota.as_value())]
                                )
                            ]
                    with m.If(place[: _bits(LAYER_WORDS)] == 1):
                        m.d.sync += total.eq(total + addend)
                        with m.If(addend == no_quota):
                            m.d.sync += quota_bad.eq(1)
                    with m.If(place == LAYER_WORDS * config.num_layers + 1):
                        m.d.comb += [
                            answer_write.eq(1),
                            refused.eq(illegal),
                        ]
                        m.d.sync += [state.eq(_State.IDLE), self.commit_request.eq(~refused)]

        with m.If(axil.b.ready):
            m.d.sync += axil.b.valid.eq(0)
        with m.If(answer_write):
            # A commit is answered OKAY also when it is refused.
            m.d.sync += [
                axil.b.valid.eq(1),
                axil.b.payload.eq(Mux(legal, OKAY, SLVERR)),
            ]
        with m.If(axil.r.ready):
            m.d.sync += axil.r.valid.eq(0)
        with m.If(answer_read):
            m.d.sync += [
                axil.r.valid.eq(1),
                axil.r.payload.data.eq(Mux(legal, word, 0)),
                axil.r.payload.resp.eq(Mux(legal, OKAY, SLVERR)),
            ]

        # The walk of a commit through the segments, a word every second cycle: it is here when the
        # next is read, `place` being that one. The last word of a segment sends it.
        found = Signal(32)
        m.d.sync += found.eq(segments_read.data)
        here = Signal()  # `found` is a word of this walk
        word_index = (place - 1)[: _bits(SEGMENT_WORDS)]
        ends_layer = ~place[: _bits(LAYER_WORDS)].any()
        row = stage.payload
        align = (config.beat_bytes - 1).bit_length()
        high_bits = config.axi_addr_width - 32
        beats = found[: config.offset_bits]
        # What a layer's beats leave of a slot, from all ones down: a carry says that they do not
        # fit.
        most_beats = (1 << config.offset_bits) - 1
        layer_beats = Signal(config.offset_bits)
        sum_beats = Signal(config.offset_bits + 1)
        layer_used = Signal()
        m.d.comb += sum_beats.eq(layer_beats + beats)
        with m.If(stage.ready):
            m.d.sync += stage.valid.eq(0)
        with m.If(walks):
            m.d.sync += here.eq(1)
        with m.If(state == _State.FINISH):
            m.d.sync += here.eq(0)
        with m.If(walks & here):
            with m.Switch(word_index):
                with m.Case(0):
                    m.d.sync += [
                        row.layer.eq(scan),
                        row.segment.eq(place[_bits(SEGMENT_WORDS) :]),
                        row.value.base[:32].eq(found),
                    ]
                    with m.If(found[:align].any()):
                        m.d.sync += segment_bad.eq(1)
                with m.Case(1):
                    m.d.sync += row.value.base[32:].eq(found)
                    with m.If(found[high_bits:].any()):
                        m.d.sync += segment_bad.eq(1)
                with m.Case(2):
                    m.d.sync += row.value.stride.eq(found)
                    with m.If(found[:align].any()):
                        m.d.sync += segment_bad.eq(1)
                with m.Case(3):
                    m.d.sync += [
                        row.value.beats.eq(found),
                        stage.valid.eq(segments_changed),
                        layer_beats.eq(sum_beats),
                        layer_used.eq(layer_used | beats.any()),
                    ]
                    with m.If(found[config.offset_bits :].any() | sum_beats[-1]):
                        m.d.sync += segment_bad.eq(1)
                    with m.If(ends_layer):
                        with m.If(~layer_used & ~beats.any()):
                            m.d.sync += segment_bad.eq(1)
        with m.If(walks & (place[: _bits(LAYER_WORDS)] == 1)):
            m.d.sync += [layer_beats.eq(most_beats - config.slot_beats), layer_used.eq(0)]

        # Configuration and interrupt -----------------------------------------------------------

        def fits(threshold):
            sign = threshold[config.score_bits - 1 :]
            return sign.all() | ~sign.any()

        thresholds = [shown[name] for name in ("THRESHOLD", *farther)]
        next_threshold, *next_farther = (t[: config.score_bits].as_signed() for t in thresholds)
        threshold_differs = Signal()
        m.d.sync += threshold_differs.eq(next_threshold != self.threshold)
        m.d.comb += [
            threshold_bad.eq(~Cat(fits(threshold) for threshold in thresholds).all()),
            self.committed.eq(self.commit_request & self.commit_grant),
            self.threshold_changed.eq(self.committed & threshold_differs),
            self.irq.eq((shown["IRQ_STATUS"] & shown["IRQ_ENABLE"]).any()),
        ]
        m.d.sync += moved.eq(self.committed & segments_changed)
        with m.If(self.committed):
            m.d.sync += [
                self.commit_request.eq(0),
                self.segment_bank.eq(self.segment_bank ^ segments_changed),
                segments_changed.eq(0),
                self.prefetching.eq(shown["CONTROL"][0]),
                self.learning.eq(shown["CONTROL"][1]),
                self.ordered.eq(shown["CONTROL"][2]),
                self.adaptive.eq(shown["CONTROL"][3]),
                self.kinds.eq(shown["PREDICTORS"]),
                self.threshold.eq(next_threshold),
                *(self.farther[n].eq(value) for n, value in enumerate(next_farther)),
                self.quota.eq(next_quota),
            ]
        if self.behind_axi:
            # Judged in three steps, long after the last write and long before the check is over.
            wanted_place = Signal.like(self.place)
            pages = len(self.place.base)
            page_bits = config.axi_addr_width - pages
            extent = Signal(len(self.place.stride) + config.num_slots.bit_length())
            end = Signal(max(len(extent), pages) + 1)
            m.d.comb += [
                wanted_place.base.eq(
                    (shown["BUFFER_BASE_LOW"] | shown["BUFFER_BASE_HIGH"] << 32) >> page_bits
                ),
                wanted_place.stride.eq(shown["SLOT_STRIDE"] >> page_bits),
            ]
            m.d.sync += [
                extent.eq(wanted_place.stride * config.num_slots),
                end.eq(extent + wanted_place.base),
                place_bad.eq((end > 1 << pages) | (wanted_place.stride < config.slot_pages)),
                self.relocates.eq(wanted_place != self.place),
            ]
            with m.If(self.committed):
                m.d.sync += self.place.eq(wanted_place)
        return m
