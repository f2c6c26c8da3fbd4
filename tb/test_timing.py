# SPDX-License-Identifier: Apache-2.0
"""The timing model: held to the RTL, to closed forms, and to caches written the plain way."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from numba import njit
from numba.core.errors import NumbaError

from simulation import ROOT
from stmoe_golden import timing
from stmoe_golden.compilation import NO_ARRAY_MADE
from stmoe_golden.config import EngineConfig, preset
from stmoe_golden.machine import TimingError, machine_for_harness, machine_for_ratio
from stmoe_golden.policies.belady import Belady
from stmoe_golden.policies.lru import LRU_FORMS, LruGlobal
from stmoe_golden.policies.on_demand import OnDemand
from stmoe_golden.policies.oracle import Oracle
from stmoe_golden.policies.ours import Ours
from stmoe_golden.policies.pregated import Pregated
from stmoe_golden.policies.registry import POLICIES
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.timing import TIMELINE_KINDS, simulate
from stmoe_golden.traces import load_trace

GPT_OSS = ROOT.parent / "shared" / "traces" / "gpt_oss_20b_decode.npz"
SMALL = EngineConfig(num_layers=4, num_experts=16, top_k=2, quota=3)


def small_trace(tokens: int = 400, **options):
    return markov_trace(num_tokens=tokens, num_layers=4, num_experts=16, top_k=2, **options)


# Against the RTL ------------------------------------------------------------------------------


def test_cycles_agree_with_the_rtl_within_two_percent():
    """The same trace and settings on Verilator and in the model; one build serves all, as quotas,
    latency and the accelerator's times are set at run time."""
    from sim_run import run_simulation
    from stmoe.harness.run_log import times_of

    config = preset("tiny")
    for ratio, quota, latency, tokens in (
        (0.5, 2, 32, 60),
        (2, 0, 32, 150),
        (4, 2, 32, 150),
        (1, 2, 1000, 100),
        (2, 1, 1, 150),
        (4, 0, 300, 150),
    ):
        # Long enough that one choice made otherwise does not decide.
        trace = markov_trace(num_tokens=tokens, seed=3)
        arrays = {"experts": trace.experts, "sequence": trace.sequence}
        attention, expert = times_of(config, ratio)
        run = run_simulation(
            config,
            arrays,
            attention_cycles=attention,
            expert_cycles=expert,
            latency=latency,
            registers={"quotas": quota},
            log="handshakes",
        )
        machine = machine_for_harness(
            config,
            attention_cycles=attention,
            expert_cycles=expert,
            latency=latency,
            quota=quota,
        )
        result = simulate(trace, config, machine, Ours(config), warm_up=0)
        cycles = run.finished[-1].cycle - run.tokens[0].cycle
        setting = (ratio, quota, latency, cycles, result.cycles)
        assert result.cycles == pytest.approx(cycles, rel=0.02), setting
        # Not by chance: the same happened.
        counters = run.counters
        hits, loads = counters["hits"], counters["prefetch_loads"] + counters["demand_loads"]
        assert result.total("hits") == pytest.approx(hits, rel=0.03), setting
        model = result.total("prefetch_loads") + result.total("demand_loads")
        assert model == pytest.approx(loads, rel=0.06), setting


# Against closed forms and plain caches ---------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 1, 4])
@pytest.mark.parametrize("latency", [0, 700])
def test_on_demand_waits_for_every_load_and_the_last_expert(ratio, latency):
    machine = machine_for_ratio(SMALL, ratio, latency=latency)
    result = simulate(small_trace(), SMALL, machine, OnDemand(SMALL))
    k = SMALL.top_k
    # Experts run while the rest is loaded: the slower of the two decides.
    load, expert = int(machine.load[0]), int(machine.expert[0])
    layer = int(machine.attention[0]) + latency + load + (k - 1) * max(load, expert) + expert
    assert result.cycles == result.tokens_measured * SMALL.num_layers * layer
    assert result.loads == result.needed and result.total("hits") == 0


@pytest.mark.parametrize("ratio", [0.5, 1, 2, 4])
def test_ideal_pre_gating_takes_the_longer_of_load_and_compute(ratio):
    machine = machine_for_ratio(SMALL, ratio)
    result = simulate(small_trace(), SMALL, machine, Pregated(SMALL))
    assert result.time == pytest.approx(max(1, ratio), rel=0.02)


def test_nothing_waits_when_everything_is_resident():
    config = SMALL.replace(quota=16)
    trace = small_trace(2000)
    result = simulate(trace, config, machine_for_ratio(config, 2.0), LRU_FORMS[0](config))
    assert result.time == 1.0 and result.total("hits") == result.needed


def test_demand_waits_for_at_most_the_prefetch_bursts_ahead():
    """A burst as long as a load makes demand wait for whole wrong prefetches; short ones do not."""
    trace = small_trace(1000, spatial=0, temporal=0)
    eager = SMALL.replace(threshold=-1000, adaptive=False)
    fine = machine_for_ratio(eager, 1.5, bursts=64)
    coarse = machine_for_ratio(eager, 1.5, bursts=1)
    times = [simulate(trace, eager, m, Ours(eager)).time for m in (fine, coarse)]
    assert times[1] > 1.01 * times[0], times


def uses(trace):
    for token in trace.experts:
        for layer, experts in enumerate(token):
            yield [(layer, int(e)) for e in experts]


def test_global_lru_misses_what_a_plain_lru_misses():
    trace = small_trace(1500)
    resident: OrderedDict[tuple[int, int], None] = OrderedDict()
    missed = 0
    for wanted in uses(trace):
        for key in wanted:
            if key in resident:
                continue
            missed += 1
            if len(resident) == SMALL.num_slots:
                del resident[next(key for key in resident if key not in wanted)]
            resident[key] = None
        for key in sorted(wanted, key=lambda key: key[1]):
            resident.move_to_end(key)
    result = simulate(trace, SMALL, machine_for_ratio(SMALL, 1.0), LruGlobal(SMALL), warm_up=0)
    assert result.total("misses") == pytest.approx(missed, rel=0.01)


def test_belady_misses_what_a_plain_belady_misses():
    trace = small_trace(1500)
    future: dict[tuple[int, int], list[int]] = {}
    for n, wanted in enumerate(uses(trace)):
        for key in wanted:
            future.setdefault(key, []).append(n)
    for times in future.values():
        times.reverse()
    resident: set[tuple[int, int]] = set()
    missed = 0
    for wanted in uses(trace):
        for key in wanted:
            if key not in resident:
                missed += 1
                if len(resident) == SMALL.num_slots:
                    others = resident - set(wanted)
                    resident.remove(
                        max(others, key=lambda key: future[key][-1] if future[key] else 1 << 30)
                    )
                resident.add(key)
        for key in wanted:
            future[key].pop()
    result = simulate(trace, SMALL, machine_for_ratio(SMALL, 1.0), Belady(SMALL), warm_up=0)
    assert result.total("misses") == missed


@pytest.mark.skipif(not GPT_OSS.exists(), reason="../shared/traces is not here")
@pytest.mark.parametrize(
    ("quota", "ratio", "lru", "oracle"), [(0, 2, 2.591, 1.98), (4, 1, 1.214, 1.001)]
)
def test_times_are_those_of_the_prototype(quota, ratio, lru, oracle):
    """Architecture section 10: LRU in the victim walk to the last digit, the oracle at most."""
    config = preset("gpt_oss_20b").replace(quota=quota)
    trace = load_trace(GPT_OSS).head(16_000)
    machine = machine_for_ratio(config, ratio)
    assert simulate(trace, config, machine, LRU_FORMS[0](config)).time == pytest.approx(
        lru, abs=0.001
    )
    assert simulate(trace, config, machine, Oracle(config)).time <= oracle


# What a result holds ---------------------------------------------------------------------------


def test_result_does_not_depend_on_how_the_trace_is_cut(monkeypatch):
    trace = small_trace(300)
    machine = machine_for_ratio(SMALL, 1.5)
    whole = simulate(trace, SMALL, machine, Ours(SMALL))
    monkeypatch.setattr(timing, "CHUNK", 7)
    cut = simulate(trace, SMALL, machine, Ours(SMALL))
    assert whole.cycles == cut.cycles
    assert all((whole.per_layer[name] == cut.per_layer[name]).all() for name in whole.per_layer)
    assert whole.latency.sum() == whole.cycles


@pytest.mark.parametrize("name", POLICIES)
def test_arrays_that_are_passed_are_neither_kept_nor_freed(name):
    """The compiled loop counts no references."""
    trace, missed = small_trace(300), np.ones((300, 4), np.uint16)
    passed = [trace.experts, trace.sequence, missed]
    held = [sys.getrefcount(array) for array in passed]
    for _ in range(3):
        policy = POLICIES[name](SMALL)
        found = simulate(
            trace, SMALL, machine_for_ratio(SMALL, 1.5), policy,
            lru_misses=missed, occupancy=True, timeline=50,
        )  # fmt: skip
        del policy
        assert [sys.getrefcount(array) for array in passed] == held
        # Nothing holds a result's arrays but the result itself (and the argument of the call).
        of_result = [sys.getrefcount(found.misses), sys.getrefcount(found.latency.base)]
        assert max(of_result) <= 2


def test_no_reference_is_counted_where_no_array_is_made():
    """``_nrt`` is Numba's own option, which another version may no longer know."""

    def kernel(array, whole):
        part = array if whole else array[:1]
        for i in range(len(part)):
            array[i] += part[i]

    def counts(**options) -> int:
        compiled = njit(**options)(kernel)
        compiled(np.zeros(3), True)
        return sum(text.count("NRT_incref") for text in compiled.inspect_asm().values())

    assert counts() > 0
    assert counts(**NO_ARRAY_MADE | {"cache": False}) == 0
    with pytest.raises(NumbaError):
        njit(**NO_ARRAY_MADE | {"cache": False})(lambda n: np.zeros(n).sum())(3)


def test_every_prefetch_and_every_need_is_accounted_for():
    trace = small_trace(2000)
    for policy in (Ours(SMALL), Oracle(SMALL), *(form(SMALL) for form in LRU_FORMS)):
        r = simulate(trace, SMALL, machine_for_ratio(SMALL, 2.0), policy, warm_up=0)
        assert r.total("hits") + r.total("late") + r.total("misses") == r.needed
        assert r.total("demand_loads") == r.total("misses")
        ended = sum(r.total(name) for name in ("useful", "late", "useless", "cancelled"))
        left = r.total("prefetch_loads") - ended  # resident unused, or on their way at the end
        assert 0 <= left <= SMALL.num_slots
        stalled = r.cycles - r.compute_cycles
        assert r.total("stall_cycles") == stalled


def test_timeline_and_occupancy_show_one_accelerator_one_link_and_the_slots():
    trace = small_trace(200)
    result = simulate(
        trace,
        SMALL,
        machine_for_ratio(SMALL, 1.5),
        Ours(SMALL),
        occupancy=True,
        timeline=100_000,
    )
    spans = result.timeline
    kinds = {kind: spans[spans[:, 0] == i] for i, kind in enumerate(TIMELINE_KINDS)}
    assert all(len(kinds[kind]) for kind in ("attention", "expert", "demand", "prefetch", "stall"))
    compute = np.concatenate([kinds[kind] for kind in ("attention", "expert", "stall")])
    compute = compute[np.argsort(compute[:, 1], kind="stable")]
    assert (compute[1:, 1] == compute[:-1, 2]).all()  # it computes or waits, always one of them
    assert compute[-1, 2] - compute[0, 1] == result.cycles
    loads = np.concatenate([kinds["demand"], kinds["prefetch"]])
    assert (loads[:, 5] >= 0).all() and (loads[:, 5] < SMALL.num_slots).all()
    assert (loads[:, 2] > loads[:, 1]).all()
    assert result.occupancy.shape == (result.tokens_measured, 3)
    assert (result.occupancy >= 0).all()
    assert (result.occupancy.sum(axis=1) <= SMALL.num_slots).all()


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(TimingError, match="load_ratio must be 0.01 to 100, not 0"):
        machine_for_ratio(SMALL, 0)
    machine = machine_for_ratio(SMALL, 1.0)._replace(slots=1)
    with pytest.raises(TimingError, match=r"slots must be at least top_k \(2\), not 1"):
        simulate(small_trace(10), SMALL, machine, OnDemand(SMALL))
    nothing_near = tiered(machine_for_ratio(SMALL, 1.0), 0, 100, 100)
    with pytest.raises(TimingError, match="near must be at least 1 where there is a far tier"):
        simulate(small_trace(10), SMALL, nothing_near, OnDemand(SMALL))
    with pytest.raises(TimingError, match="warm_up must be 0 to 9, not 10"):
        simulate(small_trace(10), SMALL, machine_for_ratio(SMALL, 1.0), OnDemand(SMALL), warm_up=10)


# Two tiers -------------------------------------------------------------------------------------


def tiered(machine, near, load, latency):
    layers = SMALL.num_layers
    return machine._replace(
        near=near,
        far_load=np.full(layers, load, np.int64),
        far_latency=np.full(layers, latency, np.int64),
    )


@pytest.mark.parametrize("slower", [1, 3, 10])
def test_on_demand_waits_for_the_slower_tier(slower):
    """Every expert is read from the far tier, one after the other, each burst sent on as it is
    there; experts run while the rest is read."""
    plain = machine_for_ratio(SMALL, 0.5, latency=10)
    load, expert = int(plain.load[0]), int(plain.expert[0])
    machine = tiered(plain, 1, slower * load, 700)
    result = simulate(small_trace(), SMALL, machine, OnDemand(SMALL))
    ran = 0
    for k in range(SMALL.top_k):
        come = 700 + (k + 1) * slower * load + 10 + plain.burst
        ran = max(ran, come) + expert
    layer = int(machine.attention[0]) + ran
    assert result.cycles == result.tokens_measured * SMALL.num_layers * layer
    assert result.total("far_loads") == result.needed
    assert result.total("far_cycles") == result.needed * slower * load


@pytest.mark.parametrize("policy", [Ours, LruGlobal, Oracle])
@pytest.mark.parametrize("near", [1, 12, 40, 64])
def test_far_reads_are_the_misses_of_a_plain_lru_behind_the_buffer(policy, near):
    """The near tier keeps what was loaded last, and what a cancelled prefetch has begun."""
    machine = tiered(machine_for_ratio(SMALL, 1.5), near, 3000, 500)
    result = simulate(small_trace(300), SMALL, machine, policy(SMALL), warm_up=0, timeline=200_000)
    begun = {}
    for kind, begin, _, layer, expert, _ in result.timeline.tolist():
        if TIMELINE_KINDS[kind] in ("demand", "prefetch", "cancelled"):
            begun.setdefault((begin, layer, expert), None)
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    missed = []
    for _, *key in sorted(begun, key=lambda load: load[0]):
        expert = tuple(key)
        if expert not in held:
            missed.append(expert)
            if len(held) == near:
                held.popitem(last=False)
        held[expert] = None
        held.move_to_end(expert)
    far = result.timeline[result.timeline[:, 0] == TIMELINE_KINDS.index("far")]
    found = [tuple(span) for span in far[:, 3:5].tolist()]
    # A prefetch that the run's end has cut has no span of its own.
    assert missed and found[: len(missed)] == missed and len(found) - len(missed) <= 1
    assert (far[1:, 1] >= far[:-1, 2]).all()  # one after the other
    assert len(found) == result.total("far_loads")


@pytest.mark.parametrize("policy", [Ours, Oracle, Pregated])
@pytest.mark.parametrize(("near", "load", "latency"), [(12, 3000, 500), (40, 1200, 9000)])
def test_no_load_ends_before_its_data_have_come_from_afar(policy, near, load, latency):
    """Demand, prefetch, prefetch that became a demand, and one of an expert that the far tier is
    still reading for a prefetch that was cancelled. The last burst goes on when all is there; on
    an idle link, at once."""
    machine = tiered(machine_for_ratio(SMALL, 1.5, latency=30), near, load, latency)
    result = simulate(small_trace(600), SMALL, machine, policy(SMALL), timeline=200_000)
    spans = [(TIMELINE_KINDS[kind], *rest) for kind, *rest in result.timeline.tolist()]
    cancelled = {(begin, m, e) for kind, begin, _, m, e, _ in spans if kind == "cancelled"}
    reads = [(begin, end, m, e) for kind, begin, end, m, e, _ in spans if kind == "far"]
    last = int(machine.load[0]) - (-(-int(machine.load[0]) // machine.burst) - 1) * machine.burst
    loads = [
        (kind, begin, end, m, e)
        for kind, begin, end, m, e, _ in spans
        if kind in ("demand", "prefetch") and (begin, m, e) not in cancelled
    ]

    def read_of(kind, begin, end, m, e):
        """The far tier's read that brings the data of a load."""
        mine = [read for read in reads if read[2:] == (m, e) and read[0] < end]
        return mine[-1] if mine and mine[-1][1] > begin else None

    from_afar = {load for load in loads if read_of(*load)}
    of_others, alone = 0, {"demand": 0, "prefetch": 0}
    for kind, begin, end, m, e in from_afar:
        read = read_of(kind, begin, end, m, e)
        come = read[1] + 30 + last
        assert end >= come, (kind, begin, end, m, e)
        if read[0] < begin + latency:  # the read was asked for before
            of_others += 1
            continue
        # The far tier's own loads come one after the other, and it is slower than the link.
        if not any(o[1] < end and o[2] > begin and o not in from_afar for o in loads):
            assert end == come, (kind, begin, end, m, e)
            alone[kind] += 1
    assert alone["prefetch"] >= 3, alone
    if policy is Ours and latency > load:
        assert of_others >= 3 and alone["demand"] >= 5


@pytest.mark.parametrize("policy", [Ours, LruGlobal, Oracle])
def test_a_far_tier_that_takes_no_time_changes_nothing(policy):
    trace, machine = small_trace(600), machine_for_ratio(SMALL, 1.5, latency=20)
    plain = simulate(trace, SMALL, machine, policy(SMALL))
    tiers = simulate(trace, SMALL, tiered(machine, 5, 0, 0), policy(SMALL))
    assert tiers.total("far_loads") > 0 and plain.total("far_loads") == 0
    assert tiers.hidden is None and plain.hidden is not None
    assert tiers.cycles == plain.cycles and (tiers.latency == plain.latency).all()
    for name in set(plain.per_layer) - {"far_loads"}:
        assert (tiers.per_layer[name] == plain.per_layer[name]).all(), name


def test_a_near_tier_that_holds_all_is_read_through_once():
    machine = tiered(machine_for_ratio(SMALL, 1.5), 64, 3000, 500)
    result = simulate(small_trace(2000), SMALL, machine, Ours(SMALL), warm_up=0, timeline=200_000)
    loaded = {tuple(load) for load in result.timeline[:, 3:5].tolist() if load[1] >= 0}
    assert result.total("far_loads") == len(loaded) > 40
    result = simulate(small_trace(2000), SMALL, machine, Ours(SMALL))
    assert result.total("far_loads") == 0


# The confidence gate ---------------------------------------------------------------------------


def test_gate_saves_loads_where_routing_cannot_be_predicted():
    rng = np.random.default_rng(5)
    trace = small_trace(3000)
    random = np.argsort(rng.random((3000, 4, 16)), axis=2)[:, :, :2].astype(np.uint8)
    trace = replace(trace, experts=random)
    machine = machine_for_ratio(SMALL, 2.0)
    eager = SMALL.replace(threshold=-200)
    static, adaptive = (
        simulate(trace, config, machine, Ours(config))
        for config in (eager.replace(adaptive=False), eager)
    )
    assert adaptive.total("prefetch_loads") < 0.7 * static.total("prefetch_loads")
    assert adaptive.loads < static.loads
