# SPDX-License-Identifier: Apache-2.0
"""The harness itself: its parts alone, and as a whole round an engine that is simple enough to
know what must happen, and that does wrong on request."""

from __future__ import annotations

import numpy as np
import pytest
from amaranth.hdl import Array, Module, Signal
from amaranth.lib import enum, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from sim_run import SimulationError, run_simulation
from stmoe.harness.accelerator import Accelerator
from stmoe.harness.content_checker import AddressMap, ContentChecker, Fault
from stmoe.harness.memory_model import address_of, content, word_at
from stmoe.harness.monitor import Watched
from stmoe.payloads import (
    EventKind,
    axi4_lite_signature,
    axi4_read_signature,
    event_layout,
    fill_layout,
    grant_layout,
    release_layout,
    route_layout,
    token_layout,
)
from stmoe.register_map import addr_width, registers
from stmoe_golden.config import EngineConfig, preset

TINY = preset("tiny")


# A stand-in for the engine ------------------------------------------------------------------


class Misdeed(enum.Enum, shape=3):
    """What the stand-in does wrong, as written to its CONTROL register."""

    NONE = 0
    WRONG_BEAT = 1
    """The last beat of every load has one bit inverted."""
    WRONG_EXPERT = 2
    """It grants an expert that was not asked for."""
    UNSTABLE_GRANT = 3
    """A grant changes while it waits to be taken."""
    HANG = 4
    """It never grants anything."""
    EARLY_GRANT = 5
    """It grants before the last beat has been filled."""


class StandIn(wiring.Component):
    """Loads the experts of a route one after the other, each into the slot of its rank."""

    def __init__(self, config: EngineConfig):
        self._config = config
        super().__init__(
            {
                "token": In(stream.Signature(token_layout(config))),
                "route": In(stream.Signature(route_layout(config))),
                "grant": Out(stream.Signature(grant_layout(config))),
                "release": In(stream.Signature(release_layout(config))),
                "fill": Out(stream.Signature(fill_layout(config))),
                "axi": Out(axi4_read_signature(config)),
                "axil": In(axi4_lite_signature(addr_width(config))),
                "events": Out(stream.Signature(event_layout(config))),
                "irq": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        addresses = AddressMap(config)
        misdeed = Signal(Misdeed)

        # Registers: CONTROL is the misdeed; everything reads as "initialised".
        table = {register.name: register for register in registers(config)}
        axil = self.axil
        write = axil.aw.valid & axil.w.valid & (~axil.b.valid | axil.b.ready)
        m.d.comb += [
            axil.aw.ready.eq(write),
            axil.w.ready.eq(write),
            axil.ar.ready.eq(~axil.r.valid | axil.r.ready),
            axil.r.payload.data.eq(table["STATUS"].field("initialised").mask),
        ]
        with m.If(axil.b.ready):
            m.d.sync += axil.b.valid.eq(0)
        with m.If(write):
            m.d.sync += axil.b.valid.eq(1)
            with m.If(axil.aw.payload == table["CONTROL"].offset):
                m.d.sync += misdeed.eq(axil.w.payload.data)
        with m.If(axil.ar.ready):
            m.d.sync += axil.r.valid.eq(axil.ar.valid)

        route = Signal(route_layout(config))
        rank = Signal(range(config.top_k))
        asked = Signal(config.offset_bits)
        filled = Signal(config.offset_bits)
        held = Signal(config.top_k)
        experts = Array(route.experts[i] for i in range(config.top_k))
        start = addresses.address(route.layer, experts[rank])
        ar, r, fill, grant = self.axi.ar, self.axi.r, self.fill, self.grant
        m.d.comb += [
            ar.payload.id.eq(rank),
            ar.payload.addr.eq(start + asked * config.beat_bytes),
            ar.payload.len.eq(config.max_burst - 1),
            fill.payload.slot.eq(rank),
            fill.payload.offset.eq(filled),
            fill.payload.data.eq(
                r.payload.data ^ ((misdeed == Misdeed.WRONG_BEAT) & (filled == addresses.beats - 1))
            ),
            fill.valid.eq(r.valid),
            r.ready.eq(fill.ready),
            grant.payload.layer.eq(route.layer),
            grant.payload.expert.eq(experts[rank] + (misdeed == Misdeed.WRONG_EXPERT)),
            grant.payload.slot.eq(rank),
            self.release.ready.eq(1),
        ]
        with m.If(self.release.valid):
            m.d.sync += held.bit_select(self.release.payload.slot, 1).eq(0)
        with m.If(r.valid & r.ready):
            m.d.sync += filled.eq(filled + 1)

        with m.FSM():
            with m.State("IDLE"):
                # The one record it knows how to write.
                m.d.comb += [
                    self.events.payload.kind.eq(EventKind.TOKEN),
                    self.events.payload.data.eq(self.token.payload.token_id),
                    self.events.valid.eq(self.token.valid),
                    self.token.ready.eq(self.events.ready),
                    self.route.ready.eq(1),
                ]
                with m.If(self.route.valid):
                    m.d.sync += [route.eq(self.route.payload), rank.eq(0)]
                    m.next = "FREE"
            with m.State("FREE"):
                m.d.sync += [asked.eq(0), filled.eq(0)]
                with m.If(~held.bit_select(rank, 1)):
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += ar.valid.eq(1)
                with m.If(ar.ready):
                    m.d.sync += asked.eq(asked + config.max_burst)
                    with m.If(asked + config.max_burst >= addresses.beats):
                        m.next = "FILL"
            with m.State("FILL"):
                early = (misdeed == Misdeed.EARLY_GRANT) & (filled == addresses.beats // 2)
                with m.If((filled == addresses.beats) | early):
                    m.next = "GRANT"
            with m.State("GRANT"):
                m.d.comb += grant.valid.eq(misdeed != Misdeed.HANG)
                waited = Signal()
                m.d.sync += waited.eq(grant.valid & ~grant.ready)
                with m.If((misdeed == Misdeed.UNSTABLE_GRANT) & waited):
                    m.d.comb += grant.payload.slot.eq(rank + config.top_k)
                with m.If(grant.valid & grant.ready):
                    m.d.sync += held.bit_select(rank, 1).eq(1)
                    m.d.sync += rank.eq(rank + 1)
                    m.next = "FREE"
                    with m.If(rank == config.top_k - 1):
                        m.next = "IDLE"
        return m


def random_trace(config: EngineConfig, tokens: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Any legal trace: no two experts of a set alike; a new sequence every 7 tokens."""
    rng = np.random.default_rng(seed)
    keys = rng.random((tokens, config.num_layers, config.num_experts))
    return {
        "experts": np.argsort(keys, axis=2)[:, :, : config.top_k].astype(np.uint8),
        "sequence": np.arange(tokens) // 7,
        "token_id": rng.integers(0, 1 << 31, tokens),
    }


# Parts alone ----------------------------------------------------------------------------------


def simulate(component, *benches, cycles: int) -> None:
    """Run coroutines on a component until all are over; more than ``cycles`` is a failure."""
    simulator = Simulator(component)
    simulator.add_clock(1e-6)
    for bench in benches:
        simulator.add_testbench(bench)

    async def watchdog(ctx):
        for _ in range(cycles):
            await ctx.tick()
        raise AssertionError(f"not over after {cycles} cycles")

    simulator.add_testbench(watchdog, background=True)
    simulator.run()


class TestAccelerator:
    """Grants at chosen cycles, and in which cycles everything else happens."""

    ATTENTION = 5
    EXPERT = 10

    def run(self, grants, *, attention=ATTENTION, expert=EXPERT, jitter=0, release_every=1):
        """One token of two layers. ``grants``: (cycles after the route, slot, error), for each
        layer alike. Returns the cycles of (what, detail) in order."""
        config = EngineConfig(num_layers=2, num_experts=8, top_k=4, expert_bytes=64)
        dut = Accelerator(config)
        seen = []
        releases = 2 * sum(not error for _, _, error in grants)

        async def trace(ctx):
            ctx.set(dut.i_token.valid, 1)
            ctx.set(dut.i_route.valid, 1)
            ctx.set(dut.attention_cycles, attention)
            ctx.set(dut.expert_cycles, expert)
            ctx.set(dut.jitter, jitter)
            ctx.set(dut.token.ready, 1)
            ctx.set(dut.route.ready, 1)
            cycle = released = finished = 0
            routes = []
            given = 0
            while not finished or released < releases:
                ctx.set(dut.release.ready, cycle % release_every == 0)
                due = routes and given < len(grants) and cycle > routes[-1] + grants[given][0]
                ctx.set(dut.grant.valid, bool(due))
                if due:
                    ctx.set(dut.grant.payload.slot, grants[given][1])
                    ctx.set(dut.grant.payload.error, grants[given][2])
                if ctx.get(dut.token.valid):
                    seen.append((cycle, "token", 0))
                    ctx.set(dut.i_token.valid, 0)
                    # The change above is seen by the design only after the clock edge.
                    ctx.set(dut.i_token.valid, 1)
                if ctx.get(dut.route.valid):
                    seen.append((cycle, "route", 0))
                    routes.append(cycle)
                    given = 0
                if ctx.get(dut.grant.valid) and ctx.get(dut.grant.ready):
                    seen.append((cycle, "grant", grants[given][1]))
                    given += 1
                if ctx.get(dut.release.valid) and ctx.get(dut.release.ready):
                    seen.append((cycle, "release", ctx.get(dut.release.payload.slot)))
                    released += 1
                if ctx.get(dut.finished):
                    seen.append((cycle, "finished", 0))
                    finished += 1
                await ctx.tick()
                cycle += 1
                if finished:
                    ctx.set(dut.i_token.valid, 0)

        simulate(dut, trace, cycles=4000)
        return seen

    @staticmethod
    def cycles(seen, what):
        return [cycle for cycle, name, _ in seen if name == what]

    def test_experts_run_one_at_a_time_in_grant_order(self):
        seen = self.run([(0, 7, 0), (1, 3, 0), (2, 5, 0), (60, 1, 0)])
        order = [slot for _, name, slot in seen if name == "release"]
        assert order == [7, 3, 5, 1] * 2
        (token,) = self.cycles(seen, "token")
        first, second = self.cycles(seen, "route")
        assert first == token + 1 + self.ATTENTION
        grants = self.cycles(seen, "grant")[:4]
        # The second and the third wait for the one before, the fourth for its grant.
        ends = [grants[0] + 10, grants[0] + 20, grants[0] + 30, grants[3] + 10]
        assert self.cycles(seen, "release")[:4] == [end + 1 for end in ends]
        assert second == ends[-1] + 1 + self.ATTENTION
        assert self.cycles(seen, "finished") == [self.cycles(seen, "release")[-1] - 1]

    def test_a_grant_is_taken_while_an_expert_runs(self):
        seen = self.run([(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)])
        grants = self.cycles(seen, "grant")[:4]
        assert grants == list(range(grants[0], grants[0] + 4))

    def test_an_error_counts_as_run_and_is_not_released(self):
        seen = self.run([(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 3, 1)])
        assert [slot for _, name, slot in seen if name == "release"] == [0, 2] * 2
        first, second = self.cycles(seen, "route")
        grant = self.cycles(seen, "grant")[0]
        assert second == grant + 10 + 1 + 10 + 1 + 1 + self.ATTENTION

    def test_no_time_at_all(self):
        seen = self.run([(0, i, 0) for i in range(4)], attention=0, expert=0)
        (token,) = self.cycles(seen, "token")
        first, second = self.cycles(seen, "route")
        assert first == token + 1
        assert second == self.cycles(seen, "grant")[3] + 2

    def test_slow_releases_hold_the_accelerator_and_lose_nothing(self):
        seen = self.run([(0, i, 0) for i in range(4)], expert=1, release_every=97)
        assert [slot for _, name, slot in seen if name == "release"] == [0, 1, 2, 3] * 2

    def test_jitter_delays_and_changes_no_order(self):
        plain = self.run([(0, i, 0) for i in range(4)])
        jitter = self.run([(0, i, 0) for i in range(4)], jitter=5)
        again = self.run([(0, i, 0) for i in range(4)], jitter=5)
        other = self.run([(0, i, 0) for i in range(4)], jitter=6)
        assert jitter == again
        assert jitter not in (plain, other)
        assert [slot for _, name, slot in jitter if name == "release"] == [0, 1, 2, 3] * 2


class TestContentChecker:
    CONFIG = EngineConfig(num_layers=2, num_experts=4, expert_bytes=128, axi_data_width=128)
    SLOT = 3

    def run(self, beats, *, layer=1, expert=2, release=False, gap=False):
        """Fill a slot with ``beats`` of (offset, address, bit to invert or None) and grant it;
        returns the names of the faults. ``release``: it was granted before the beats."""
        config = self.CONFIG
        addresses = AddressMap(config)
        dut = ContentChecker(
            config,
            addresses,
            content=lambda address: content(address, data_width=config.axi_data_width),
            address_of=address_of,
        )
        faults = set()

        async def bench(ctx):
            async def step():
                for name in ("content_fault", "held_fault", "unheld_fault"):
                    if ctx.get(getattr(dut, name)):
                        faults.add(name)
                await ctx.tick()

            for _ in range(config.num_slots):
                await ctx.tick()
            for port in (dut.fill, dut.grant, dut.release):
                ctx.set(port.ready, 1)
            ctx.set(dut.fill.payload.slot, self.SLOT)
            ctx.set(dut.grant.payload.slot, self.SLOT)
            ctx.set(dut.grant.payload.layer, layer)
            ctx.set(dut.grant.payload.expert, expert)
            for offset, address, bit in beats:
                word = word_at(address) | word_at(address + 8) << 64
                ctx.set(dut.fill.payload.offset, offset)
                ctx.set(dut.fill.payload.data, word ^ (0 if bit is None else 1 << bit))
                ctx.set(dut.fill.valid, 1)
                await step()
                if gap:
                    ctx.set(dut.fill.valid, 0)
                    await step()
            ctx.set(dut.fill.valid, 0)
            ctx.set(dut.grant.valid, 1)
            await step()
            ctx.set(dut.grant.valid, 0)
            if release:
                ctx.set(dut.release.payload.slot, self.SLOT)
                ctx.set(dut.release.valid, 1)
                await step()
                ctx.set(dut.release.valid, 0)
            ctx.set(dut.fill.valid, 1)
            ctx.set(dut.fill.payload.offset, 0)
            await step()
            ctx.set(dut.fill.valid, 0)
            await step()

        simulate(dut, bench, cycles=200)
        return faults

    def good(self, layer=1, expert=2):
        start = (layer * 4 + expert) * 128
        return [(n, start + 16 * n, None) for n in range(8)]

    @pytest.mark.parametrize("gap", [False, True])
    def test_the_right_beats_pass(self, gap):
        assert self.run(self.good(), release=True, gap=gap) == set()

    def test_a_load_that_starts_again_passes(self):
        wrong = [(0, 16 * 99, None), (1, 0, 5)]
        assert self.run(wrong + self.good()[:5] + self.good(), release=True) == set()

    def test_a_beat_while_granted_is_a_fault(self):
        assert self.run(self.good()) == {"held_fault"}

    @pytest.mark.parametrize("bit", [0, 63, 64, 127])
    @pytest.mark.parametrize("beat", [0, 4, 7])
    def test_one_wrong_bit_is_a_fault(self, beat, bit):
        beats = self.good()
        beats[beat] = (*beats[beat][:2], bit)
        assert self.run(beats, release=True) == {"content_fault"}

    def test_another_expert_is_a_fault(self):
        assert self.run(self.good(expert=1), release=True) == {"content_fault"}
        assert self.run(self.good(layer=0), release=True) == {"content_fault"}

    def test_missing_swapped_or_repeated_beats_are_a_fault(self):
        good = self.good()
        for beats in (
            good[:-1],
            good[:3] + good[4:],
            [good[1], good[0], *good[2:]],
            [*good[:4], good[3], *good[4:]],
            good[1:],
        ):
            assert self.run(beats, release=True) == {"content_fault"}

    def test_an_unknown_slot_released_is_a_fault(self):
        config = self.CONFIG
        dut = ContentChecker(
            config,
            AddressMap(config),
            content=lambda a: content(a, data_width=128),
            address_of=address_of,
        )

        async def bench(ctx):
            ctx.set(dut.release.valid, 1)
            ctx.set(dut.release.ready, 1)
            assert ctx.get(dut.unheld_fault)

        simulate(dut, bench, cycles=10)


def test_address_map_says_what_is_wrong():
    with pytest.raises(ValueError, match="stride must be at least expert_bytes"):
        AddressMap(TINY, 1024)
    with pytest.raises(ValueError, match="do not fit in 32 address bits"):
        AddressMap(TINY.replace(axi_addr_width=32), 1 << 30)
    assert AddressMap(TINY.replace(expert_bytes=3072)).stride == 4096


# The whole harness round the stand-in ---------------------------------------------------------

FAST = {"attention_cycles": 40, "expert_cycles": 25, "latency": 20}


def played(tmp_path, trace, misdeed=Misdeed.NONE, **settings):
    return run_simulation(
        TINY,
        trace,
        engine_factory=StandIn,
        out_dir=tmp_path,
        registers={"control": misdeed.value},
        **{**FAST, **settings},
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_the_whole_trace_is_played_in_order(tmp_path, seed):
    # More words than both banks hold, so both are refilled.
    trace = random_trace(TINY, 500)
    log = played(tmp_path, trace, seed=seed)
    assert [token.token_id for token in log.tokens] == trace["token_id"].tolist()
    assert [token.new_sequence for token in log.tokens] == [int(i % 7 == 0) for i in range(500)]
    experts = trace["experts"].reshape(-1, TINY.top_k).tolist()
    assert [list(route.experts) for route in log.routes] == experts
    assert [route.layer for route in log.routes] == list(range(4)) * 500
    assert [(g.layer, g.expert) for g in log.grants] == [
        (route.layer, expert) for route in log.routes for expert in route.experts
    ]
    assert [r.slot for r in log.releases] == [g.slot for g in log.grants]
    assert [finish.token for finish in log.finished] == list(range(500))
    assert [event.data for event in log.events] == trace["token_id"].tolist()
    beats = TINY.expert_bytes // TINY.beat_bytes
    assert sum(burst.length for burst in log.ar) == beats * len(log.grants)
    assert log.totals["r_beats"] == beats * len(log.grants)
    assert len(log.last_beats) == len(log.ar)
    assert not log.violations and not log.error


def test_times_are_those_of_the_accelerator_model(tmp_path):
    log = played(tmp_path, random_trace(TINY, 20))
    attention, expert = FAST["attention_cycles"], FAST["expert_cycles"]
    end = None
    finished = []
    grants, releases, tokens = iter(log.grants), iter(log.releases), iter(log.tokens)
    for route in log.routes:
        if route.layer == 0:
            end = next(tokens).cycle
        assert route.cycle == end + 1 + attention
        end = route.cycle
        for _ in range(TINY.top_k):
            end = max(end, next(grants).cycle) + expert
            assert next(releases).cycle == end + 1
        if route.layer == TINY.num_layers - 1:
            finished.append(end)
    assert [finish.cycle for finish in log.finished] == finished


def test_bandwidth_and_latency_are_those_asked_for(tmp_path):
    fast = played(tmp_path / "fast", random_trace(TINY, 10))
    slow = played(tmp_path / "slow", random_trace(TINY, 10), bandwidth=(1, 3), latency=200)
    beats = TINY.expert_bytes // TINY.beat_bytes
    assert slow.last_beats[0].cycle - slow.ar[0].cycle >= 200
    loads = len(slow.grants)
    assert slow.totals["wait_cycles"] >= loads * (3 * (beats - 5) + 200)
    assert fast.totals["wait_cycles"] < loads * (beats + 40)


@pytest.mark.parametrize(
    ("misdeed", "fault"),
    [
        (Misdeed.WRONG_BEAT, Fault.CONTENT),
        (Misdeed.WRONG_EXPERT, Fault.UNASKED_GRANT),
        (Misdeed.UNSTABLE_GRANT, Fault.UNSTABLE),
        (Misdeed.EARLY_GRANT, Fault.CONTENT),
    ],
)
def test_a_misdeed_is_seen(tmp_path, misdeed, fault):
    with pytest.raises(SimulationError, match="violations, the first") as caught:
        played(tmp_path, random_trace(TINY, 20), misdeed, seed=9)
    log = caught.value.log
    assert fault in {violation.what for violation in log.violations}
    if fault == Fault.UNSTABLE:
        streams = {violation.a for violation in log.violations if violation.what == fault}
        assert streams == {Watched.GRANT}
    assert log.totals["violations"] == len({violation.cycle for violation in log.violations})


def test_no_progress_is_a_failure(tmp_path):
    with pytest.raises(SimulationError, match="no progress for 5000 cycles, after 0 of 5 tokens"):
        played(tmp_path, random_trace(TINY, 5), Misdeed.HANG, stall_limit=5000)


def test_a_silent_memory_is_a_failure(tmp_path):
    with pytest.raises(SimulationError, match="no progress"):
        played(tmp_path, random_trace(TINY, 5), memory={"stuck": 1}, stall_limit=5000)


def test_bad_arguments_are_named():
    trace = random_trace(TINY, 3)
    with pytest.raises(ValueError, match="tokens must be 1 to 3, not 4"):
        run_simulation(TINY, trace, tokens=4, engine_factory=StandIn)
    with pytest.raises(ValueError, match=r"shape \[tokens, 24, 4\]"):
        run_simulation(preset("gpt_oss_20b"), trace, engine_factory=StandIn)
    with pytest.raises(ValueError, match=r"memory has no \['speed'\]"):
        run_simulation(TINY, trace, memory={"speed": 1}, engine_factory=StandIn)
    with pytest.raises(ValueError, match="log must be"):
        run_simulation(TINY, trace, log="some", engine_factory=StandIn)


# Round the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 11])
def test_the_engine_grants_what_was_asked_and_records_what_the_monitors_see(tmp_path, seed):
    settings = {"reorder": 1, "interleave": 1} if seed else {}
    log = run_simulation(
        TINY, random_trace(TINY, 60), out_dir=tmp_path, seed=seed, memory=settings, **FAST
    )
    demanded = [(r.layer, sorted(r.experts)) for r in log.routes]
    k = TINY.top_k
    granted = [
        (log.grants[i].layer, sorted(g.expert for g in log.grants[i : i + k]))
        for i in range(0, len(log.grants), k)
    ]
    assert granted == demanded

    def records(kind, *fields):
        return [tuple(getattr(e, f) for f in fields) for e in log.events if e.kind == kind]

    # The engine's own account, its cycles included, is that of the harness.
    seen = {
        (EventKind.TOKEN, "cycle", "flag", "data"): log.tokens,
        (EventKind.GRANT, "cycle", "layer", "expert", "slot", "flag"): log.grants,
        (EventKind.RELEASE, "cycle", "slot"): log.releases,
        (EventKind.LAST_BEAT, "cycle", "expert", "flag"): log.last_beats,
        (EventKind.BURST, "cycle", "expert", "data"): [burst[:3] for burst in log.ar],
        (EventKind.ROUTE, "cycle", "layer"): [route[:2] for route in log.routes],
    }
    for key, rows in seen.items():
        assert records(*key) == [tuple(row) for row in rows]
    assert log.counters["grants"] == len(log.grants)
    assert log.counters["beats"] == log.totals["r_beats"]
    assert log.counters["last_beats"] == len(log.last_beats)
