# SPDX-License-Identifier: Apache-2.0
"""AXI4-Lite registers: configuration with a checked commit, counters, interrupt."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

from amaranth.hdl import Array, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, enum, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .payloads import CYCLE_BITS, axi4_lite_signature, segment_write_layout
from .register_map import (
    COUNTERS,
    Access,
    addr_width,
    quota_bits,
    registers,
    threshold_reset,
)

__all__ = ["CounterBank", "Registers"]

OKAY, SLVERR = 0, 2
"""AXI responses that are given."""

SHADOW = ("CONTROL", "THRESHOLD", "QUOTA", "COMMIT")
"""Registers that a pending commit keeps as they are."""


class CounterBank(wiring.Component):
    """Event counters whose sums lie in one memory, so that each costs few flip-flops.

    Every counter has a small register that counts at once; a walker visits one counter a cycle,
    in order, empties that register and adds it to the counter's sum. A round takes ``count``
    cycles, which the small register is wide enough for, so no event is ever lost.

    A visit empties the register in one cycle (events of that very cycle belong to the next
    visit) and puts the sum on ``value`` in the cycle after it.

    Parameters
    ----------
    count : int
        Counters, 2 or more.
    width : int
        Bits of a sum; sums wrap.

    Members
    -------
    increment : :py:`In(count)`
        Bit i high: counter i counts one event, in every cycle.
    index : :py:`In(range(count))`
        The counter that is read.
    valid : :py:`Out(1)`
        ``value`` is counter ``index``. High one cycle in ``count``, from the second cycle after
        reset on.
    value : :py:`Out(width)`
        Holds every event up to two cycles before.
    wrap : :py:`Out(1)`
        One cycle: a sum has just reached half of its range (its top bit rose).
    """

    def __init__(self, *, count: int, width: int = 32) -> None:
        if not isinstance(count, int) or count < 2:
            raise ValueError(f"count must be 2 or more, not {count!r}")
        self.count = count
        # A visit leaves the events of its own cycle, and count - 1 cycles follow.
        self.part_bits = count.bit_length()
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
        m.submodules.sums = sums = memory.Memory(
            shape=unsigned(self.width), depth=self.count, init=[]
        )
        read, write = sums.read_port(), sums.write_port()

        # First stage: the counter's sum is read and its part is taken.
        visit = Signal(range(self.count))
        first = Signal(init=1)
        last_visit = visit == self.count - 1
        m.d.sync += visit.eq(Mux(last_visit, 0, visit + 1))
        with m.If(last_visit):
            m.d.sync += first.eq(0)
        m.d.comb += [read.addr.eq(visit), read.en.eq(1)]
        parts = [Signal(self.part_bits, name=f"part{i}") for i in range(self.count)]
        for i, part in enumerate(parts):
            m.d.sync += part.eq(Mux(visit.matches(i), 0, part) + self.increment[i])

        # Second stage: they are added. A reset does not clear a memory, so the first round after
        # it takes every sum as 0.
        part = Signal(self.part_bits)
        added = Signal(range(self.count))
        clear, active = Signal(), Signal()
        m.d.sync += [
            part.eq(Array(parts)[visit]),
            added.eq(visit),
            clear.eq(first),
            active.eq(1),
        ]
        old = Mux(clear, 0, read.data)
        m.d.comb += [
            self.value.eq(old + part),
            self.valid.eq(active & (added == self.index)),
            self.wrap.eq(active & self.value[-1] & ~old[-1]),
            write.addr.eq(added),
            write.data.eq(self.value),
            write.en.eq(active),
        ]
        return m


class _State(enum.Enum, shape=2):
    """What the one access in progress is doing."""

    IDLE = 0
    """An access is chosen."""
    FETCH = 1
    """Its register is read; a counter may take a round of the bank."""
    FINISH = 2
    """The address (and data) channel is taken, a write takes effect, the answer is given."""
    CHECK = 3
    """A commit: the quotas are added up, one a cycle."""


class Registers(wiring.Component):
    """The engine's registers: an AXI4-Lite subordinate for what ``register_map`` lists.

    One access at a time, reads and writes in turn when both wait; an access takes 3 cycles, a
    counter's read up to ``len(COUNTERS)`` more, a COMMIT ``num_layers + 2`` more. AW and W are
    taken together, when the write takes effect. Both wait while a commit is pending if the write
    is to a shadow register or to COMMIT; reads and other writes go on.

    **Commit.** ``commit_request`` rises only after the check of the shadow registers and stays
    until ``commit_grant``. In the cycle of the grant ``committed`` is high; from the next cycle
    on all active values are the shadow values.

    Parameters
    ----------
    config : :class:`EngineConfig`
        ValueError when its threshold is outside the range of a score.
    counter_bits : int
        Bits of a counter; fewer than 32 only to reach the wrap in a test.

    Members
    -------
    axil : :py:`In(axi4_lite_signature(addr_width(config)))`
        The bus.
    prefetching, learning, ordered : :py:`Out(1)`
        Active switches.
    threshold : :py:`Out(signed(score_bits))`
        Active threshold, quarter units.
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
        New address segments.
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
        super().__init__(
            {
                "axil": In(axi4_lite_signature(self.addr_width)),
                "prefetching": Out(1, init=1),
                "learning": Out(1, init=1),
                "ordered": Out(1, init=1),
                "threshold": Out(score, init=threshold_reset(config)),
                "quota": Out(
                    data.ArrayLayout(unsigned(quota_bits(config)), config.num_layers),
                    init=[config.quota] * config.num_layers,
                ),
                "commit_request": Out(1),
                "commit_grant": In(1),
                "committed": Out(1),
                "threshold_changed": Out(1),
                "segment_write": Out(stream.Signature(segment_write_layout(config))),
                "increment": In(len(COUNTERS)),
                "initialised": In(1),
                "busy": In(1),
                "error": In(1),
                "watchdog": In(1),
                "illegal": In(1),
                "irq": Out(1),
                "cycle": Out(CYCLE_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        config, axil, table = self.config, self.axil, self.map
        m = Module()
        m.d.sync += self.cycle.eq(self.cycle + 1)

        m.submodules.counters = counters = CounterBank(count=len(COUNTERS), width=self.counter_bits)
        m.d.comb += counters.increment.eq(self.increment)

        # The access in progress --------------------------------------------------------------

        state = Signal(_State)
        writing = Signal()
        address = Signal(self.addr_width - 2)  # of words
        word = Signal(32)  # what FETCH has read; in CHECK, the next quota
        merged = Signal(32)  # what a write makes of it
        ones = Signal(32)  # bits that are strobed and 1
        for i in range(4):
            byte = slice(8 * i, 8 * i + 8)
            new, strobe = axil.w.payload.data[byte], axil.w.payload.strb[i]
            m.d.comb += [
                merged[byte].eq(Mux(strobe, new, word[byte])),
                ones[byte].eq(Mux(strobe, new, 0)),
            ]

        hit: dict[str, Signal] = {}  # it is to this register, and to an element that exists
        index: dict[str, list[Value]] = {}
        write: dict[str, Signal] = {}  # a write to it takes effect in this cycle
        for name, register in table.items():
            index[name] = [
                address[(d.stride // 4).bit_length() - 1 :][: (d.room - 1).bit_length()]
                for d in register.dims
            ]
            exists = address.matches(register.pattern(len(address)))
            for d, i in zip(register.dims, index[name], strict=True):
                if d.count < d.room:
                    exists &= i < d.count
            hit[name] = Signal(name=f"hit_{name.lower()}")
            write[name] = Signal(name=f"write_{name.lower()}")
            m.d.comb += hit[name].eq(exists)

        def any_hit(names: Iterable[str]) -> Value:
            return reduce(or_, (hit[name] for name in names))

        # Registers that are no array, as the table says ---------------------------------------

        threshold_bad = Signal()
        refused = Signal()
        cycle_high = Signal(CYCLE_BITS - 32)
        live = {  # what an RO field shows that is not a constant
            ("STATUS", "commit_pending"): self.commit_request,
            ("STATUS", "initialised"): self.initialised,
            ("STATUS", "busy"): self.busy,
            ("CYCLE_LOW", "cycle"): self.cycle[:32],
            ("CYCLE_HIGH", "cycle"): cycle_high,
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
        for name, register in table.items():
            shown[name] = Signal(32, name=f"shown_{name.lower()}")
            if register.dims:
                continue
            for field in register.fields:
                bits = slice(field.lsb, field.lsb + field.width)
                reset = (register.reset & field.mask) >> field.lsb
                value: Value = Const(0, field.width)
                if field.access is Access.RO:
                    value = live.get((name, field.name), Const(reset, field.width))
                elif field.access in (Access.RW, Access.W1C):
                    value = Signal(
                        field.width, init=reset, name=f"{name.lower()}_{field.name.lower()}"
                    )
                    with m.If(write[name]):
                        if field.access is Access.RW:
                            m.d.sync += value.eq(merged[bits])
                        else:
                            m.d.sync += value.eq(value & ~ones[bits])
                    if field.access is Access.W1C:
                        with m.If(events[name, field.name]):
                            m.d.sync += value.eq(1)
                m.d.comb += shown[name][bits].eq(value)

        # Arrays --------------------------------------------------------------------------------

        # A quota that no commit accepts is kept as one more than the largest, to save bits.
        no_quota = config.num_experts + 1
        shadow_quota = [
            Signal(range(no_quota + 1), init=config.quota, name=f"shadow_quota{layer}")
            for layer in range(config.num_layers)
        ]
        check_index = Signal(range(config.num_layers + 2))
        quota_index = Mux(state == _State.CHECK, check_index, index["QUOTA"][0])
        with m.If(write["QUOTA"]):
            m.d.sync += Array(shadow_quota)[index["QUOTA"][0][: config.layer_bits]].eq(
                Mux(merged > config.num_experts, no_quota, merged)
            )

        stage = self.segment_write.payload
        beats_bad = merged > config.expert_bytes // config.beat_bytes
        base_low = len(stage.value.base[:32])
        kept = {n: merged & table[n].mask(Access.WO) for n in table if n.startswith("SEGMENT_")}
        with m.If(write["SEGMENT_BASE_LOW"]):
            m.d.sync += stage.value.base[:base_low].eq(kept["SEGMENT_BASE_LOW"])
        with m.If(write["SEGMENT_BASE_HIGH"]):
            m.d.sync += stage.value.base[base_low:].eq(kept["SEGMENT_BASE_HIGH"])
        with m.If(write["SEGMENT_STRIDE"]):
            m.d.sync += stage.value.stride.eq(kept["SEGMENT_STRIDE"])
        with m.If(self.segment_write.ready):
            m.d.sync += self.segment_write.valid.eq(0)
        with m.If(write["SEGMENT_BEATS"] & axil.w.payload.strb.any()):
            layer, part = index["SEGMENT_BEATS"]
            m.d.sync += [
                stage.layer.eq(layer),
                stage.segment.eq(part),
                stage.value.beats.eq(merged),
                self.segment_write.valid.eq(1),
            ]

        m.d.comb += [
            counters.index.eq(index["COUNTER"][0]),
            shown["COUNTER"].eq(counters.value),
            shown["QUOTA"].eq(Array(shadow_quota)[quota_index]),
            shown["SEGMENT_BASE_LOW"].eq(stage.value.base[:base_low]),
            shown["SEGMENT_BASE_HIGH"].eq(stage.value.base[base_low:]),
            shown["SEGMENT_STRIDE"].eq(stage.value.stride),
            shown["SEGMENT_BEATS"].eq(stage.value.beats),
        ]

        # The bus -------------------------------------------------------------------------------

        legal = Signal()
        m.d.comb += legal.eq(
            Mux(
                writing,
                any_hit(n for n in table if table[n].writable)
                & ~(hit["SEGMENT_BEATS"] & beats_bad),
                any_hit(n for n in table if table[n].readable),
            )
        )
        held = Signal()
        m.d.comb += held.eq(
            writing
            & ((any_hit(SHADOW) & self.commit_request) | (any_hit(kept) & self.segment_write.valid))
        )
        # K and the quotas so far; cannot overflow, as no shadow quota exceeds no_quota.
        most = config.top_k + config.num_layers * no_quota
        total = Signal(range(max(most, config.num_slots + 1) + 1))
        quota_bad = Signal()
        answer_write, answer_read = Signal(), Signal()
        want_write = axil.aw.valid & axil.w.valid & ~axil.b.valid
        want_read = axil.ar.valid & ~axil.r.valid
        with m.Switch(state):
            with m.Case(_State.IDLE):
                # In turn when both wait; a write that is held has had its turn.
                turn = want_write & (~want_read | ~writing)
                m.d.sync += [
                    writing.eq(turn),
                    address.eq(Mux(turn, axil.aw.payload, axil.ar.payload)[2:]),
                ]
                with m.If(want_write | want_read):
                    m.d.sync += state.eq(_State.FETCH)
            with m.Case(_State.FETCH):
                m.d.sync += word.eq(reduce(or_, (Mux(hit[name], shown[name], 0) for name in table)))
                with m.If(held):
                    m.d.sync += state.eq(_State.IDLE)
                with m.Elif(writing | ~hit["COUNTER"] | counters.valid):
                    m.d.sync += state.eq(_State.FINISH)
                with m.If(~writing & hit["CYCLE_LOW"]):
                    m.d.sync += cycle_high.eq(self.cycle[32:])
            with m.Case(_State.FINISH):
                m.d.sync += state.eq(_State.IDLE)
                m.d.comb += [
                    axil.aw.ready.eq(writing),
                    axil.w.ready.eq(writing),
                    axil.ar.ready.eq(~writing),
                    answer_write.eq(writing),
                    answer_read.eq(~writing),
                ]
                for name in table:
                    m.d.comb += write[name].eq(writing & hit[name] & legal)
                with m.If(write["COMMIT"] & ones[0]):
                    m.d.comb += answer_write.eq(0)
                    m.d.sync += [
                        state.eq(_State.CHECK),
                        check_index.eq(0),
                        total.eq(config.top_k),
                        quota_bad.eq(0),
                    ]
            with m.Case(_State.CHECK):
                m.d.sync += [check_index.eq(check_index + 1), word.eq(shown["QUOTA"])]
                with m.If(check_index == config.num_layers + 1):
                    m.d.comb += [
                        answer_write.eq(1),
                        refused.eq(quota_bad | threshold_bad | (total > config.num_slots)),
                    ]
                    m.d.sync += [state.eq(_State.IDLE), self.commit_request.eq(~refused)]
                with m.Elif(check_index != 0):
                    addend = word[: len(shadow_quota[0])]
                    m.d.sync += total.eq(total + addend)
                    with m.If(addend == no_quota):
                        m.d.sync += quota_bad.eq(1)

        with m.If(axil.b.ready):
            m.d.sync += axil.b.valid.eq(0)
        with m.If(answer_write):
            # A commit is answered OKAY also when it is refused.
            checked = state == _State.CHECK
            m.d.sync += [
                axil.b.valid.eq(1),
                axil.b.payload.eq(Mux(legal | checked, OKAY, SLVERR)),
            ]
        with m.If(axil.r.ready):
            m.d.sync += axil.r.valid.eq(0)
        with m.If(answer_read):
            m.d.sync += [
                axil.r.valid.eq(1),
                axil.r.payload.data.eq(Mux(legal, word, 0)),
                axil.r.payload.resp.eq(Mux(legal, OKAY, SLVERR)),
            ]

        # Configuration and interrupt -----------------------------------------------------------

        threshold = shown["THRESHOLD"]
        sign = threshold[config.score_bits - 1 :]
        next_threshold = threshold[: config.score_bits].as_signed()
        m.d.comb += [
            threshold_bad.eq(~(sign.all() | ~sign.any())),
            self.committed.eq(self.commit_request & self.commit_grant),
            self.threshold_changed.eq(self.committed & (next_threshold != self.threshold)),
            self.irq.eq((shown["IRQ_STATUS"] & shown["IRQ_ENABLE"]).any()),
        ]
        with m.If(self.committed):
            m.d.sync += [
                self.commit_request.eq(0),
                self.prefetching.eq(shown["CONTROL"][0]),
                self.learning.eq(shown["CONTROL"][1]),
                self.ordered.eq(shown["CONTROL"][2]),
                self.threshold.eq(next_threshold),
            ]
            m.d.sync += [self.quota[layer].eq(shadow) for layer, shadow in enumerate(shadow_quota)]
        return m
