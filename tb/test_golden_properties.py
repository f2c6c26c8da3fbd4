# SPDX-License-Identifier: Apache-2.0
"""The golden buffer and checker hold their invariants after any sequence of events.

:class:`AnyEngine` is an engine that does whatever the design allows, in an order that Hypothesis
picks: tokens, routes, beats, errors, completions, cancels, grants, releases and register commits.
It keeps its slots in dictionaries and takes its decisions from the architecture's text, with the
scores of the slow restatement in ``test_golden_predictor``; it shares no code with golden. The
golden checker must accept all that it does and hold the same state after each record, and must
refuse its log when any field of any record is changed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from stmoe_golden.buffer import Lane
from stmoe_golden.checker import Checker, Kind, Mismatch, Record, Segment, Settings
from stmoe_golden.config import EngineConfig
from test_golden_predictor import Restatement

GENTLE = settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
PAGE = 4096


class AnyEngine:
    """What an engine may do next, and what follows. ``records`` and ``buses`` are its log."""

    def __init__(self, config: EngineConfig, segments: list[list[Segment]], rng: random.Random):
        self.c, self.segments, self.rng = config, segments, rng
        self.first_segments = segments
        self.threshold = config.threshold * 4
        self.quota = [config.quota] * config.num_layers
        self.scores = Restatement(config, learning=True, ordered=True)
        self.records: list[Record] = []
        self.buses: dict[str, list[tuple]] = {
            name: []
            for name in ("tokens", "routes", "releases", "grants", "addresses", "last_beats")
        }
        self.commits = [Settings(self.threshold, list(self.quota))]
        self.kinds = self.taken_kinds = -1
        self.happened: Counter[str] = Counter()
        self.cycle = 0
        self.free = list(range(config.num_slots))
        self.resident: dict[tuple[int, int], dict] = {}
        self.loads: dict[int, dict] = {}
        self.demands: list[dict] = []  # in the order in which they became demands
        self.prefetches: list[dict] = []  # in the order of their starts
        self.over: list[dict] = []  # in the order of their ends
        self.queue: list[int] = []
        self.picks: list[int] = []
        self.of_queue = 0
        self.missing: list[int] = []
        self.promoting: list[int] = []
        self.disproved: set[int] = set()
        self.due_grants: list[tuple[int, int, int, int]] = []
        self.granted: list[int] = []
        self.commit_due: tuple[str, object] | None = None
        self.latest, self.used = config.num_layers - 1, set[int]()
        self.next_layer: int | None = None

    # Decisions, from the text ---

    def value(self, layer: int, expert: int) -> int:
        return self.scores.score(layer, expert) + (
            self.scores.uses[layer, expert] << self.c.use_shift
        )

    def held(self, layer: int) -> int:
        loading = sum(load["layer"] == layer for load in self.loads.values())
        return loading + sum(place[0] == layer for place in self.resident)

    def victim(self, layer: int, demand: bool) -> tuple[int, int] | None:
        walk = [(self.latest - step) % self.c.num_layers for step in range(1, self.c.num_layers)]
        walk.append(self.latest)

        def least(layers: list[int], keep: bool) -> tuple[int, int] | None:
            worth = [
                (self.value(m, e), walk.index(m), e)
                for (m, e), at in self.resident.items()
                if m in layers
                and not at["pins"]
                and not (keep and m == self.latest and e in self.used)
            ]
            if not worth:
                return None
            _, place, e = min(worth)
            return walk[place], e

        for m in walk:
            if self.held(m) > self.quota[m] and least([m], True):
                return least([m], True)
        return least([layer], True) or (least(walk, False) if demand else None)

    def may_prefetch(self) -> bool:
        ours = [load for load in self.loads.values() if load["prefetch"]]
        return (
            not self.missing
            and not any(load["plan"] and not load["cancelled"] for load in ours)
            and sum(load["owed"] for load in ours) < self.c.prefetch_outstanding
            and len(ours) < min(self.c.num_slots, self.c.transfers) - self.c.top_k
        )

    def plan(self, layer: int, expert: int) -> list[list[int]]:
        bursts: list[list[int]] = []
        for segment in self.segments[layer]:
            for i in range(segment.beats):
                address = segment.base + expert * segment.stride + i * self.c.beat_bytes
                if i == 0 or address % PAGE == 0 or bursts[-1][1] == self.c.max_burst:
                    bursts.append([address, 0])
                bursts[-1][1] += 1
        return bursts

    # Deeds ---

    def say(self, kind: Kind, **fields: int) -> None:
        names = ("layer", "expert", "slot", "flag", "data")
        self.records.append(
            Record(self.cycle, kind, 0, *(int(fields.get(name, 0)) for name in names))
        )
        self.happened[kind.name] += 1

    def end(self, load: dict) -> None:
        if load["owed"] or load["over"]:
            return
        if load["cancelled"]:
            load["over"] = Kind.DRAINED
        elif load["plan"]:
            return
        elif not load["failed"]:
            load["over"] = Kind.FILL_DONE
        else:
            again = load["retries"] < self.c.retry_limit
            load["over"] = Kind.RETRY if again else Kind.ERROR
        self.over.append(load)

    def token(self) -> None:
        new = self.next_layer is not None or not self.records or self.rng.random() < 0.3
        self.buses["tokens"].append((self.cycle, int(new), 7))
        self.say(Kind.TOKEN, flag=new, data=7)
        self.taken_kinds = self.kinds
        self.next_layer = 0
        self.commit_due = ("token", new)
        if new:
            self.queue = []

    def route(self) -> None:
        layer, c = self.next_layer, self.c
        experts = self.rng.sample(range(c.num_experts), c.top_k)
        if self.rng.random() < 0.5:  # what was used before, so that rows and hits grow
            experts = sorted(experts)
        self.buses["routes"].append((self.cycle, layer, experts))
        packed = sum(e << c.expert_bits * rank for rank, e in enumerate(experts))
        self.say(Kind.ROUTE, layer=layer, data=packed)
        self.taken_kinds = self.kinds
        self.queue = []
        self.latest, self.used = layer, set(experts)
        self.next_layer = layer + 1 if layer + 1 < c.num_layers else None
        self.commit_due = ("route", experts)
        ours = {
            x["expert"]: x for x in self.loads.values() if self.holds(x) and x["layer"] == layer
        }
        self.disproved = {e for e, x in ours.items() if x["prefetch"] and e not in self.used}
        for e in experts:
            at = self.resident.get((layer, e))
            if at:
                at["pins"] += 1
                at["used"] = True
                self.due_grants.append((layer, e, at["slot"], 0))
            elif e in ours:
                ours[e]["promised"] += 1
                if ours[e]["prefetch"]:
                    self.promoting.append(e)
            else:
                self.missing.append(e)

    def holds(self, load: dict) -> bool:
        return not load["cancelled"]

    def load_of(self, expert: int) -> dict:
        (load,) = (
            x
            for x in self.loads.values()
            if self.holds(x) and (x["layer"], x["expert"]) == (self.latest, expert)
        )
        return load

    def promote(self) -> None:
        load = self.load_of(self.promoting.pop(0))
        load["prefetch"] = False
        self.prefetches.remove(load)
        self.demands.append(load)
        self.about(Kind.PROMOTE, load)

    def about(self, kind: Kind, load: dict, flag: int = 0) -> None:
        names = ("layer", "expert", "slot")
        self.say(kind, flag=flag, data=load["index"], **{name: load[name] for name in names})

    def score_commit(self) -> None:
        what, detail = self.commit_due
        self.commit_due = None
        self.scores.kinds = self.taken_kinds
        layer = 0
        if what == "route":
            self.scores.route(self.latest, detail)
            layer = (self.latest + 1) % self.c.num_layers
        elif detail:
            self.scores.new_sequence()
        self.say(Kind.SCORE_COMMIT, layer=layer)
        self.queue, self.of_queue = [], layer
        if self.c.look:
            here = {e for m, e in self.resident if m == layer}
            here |= {
                x["expert"] for x in self.loads.values() if self.holds(x) and x["layer"] == layer
            }
            worth = [(-self.scores.score(layer, e), e) for e in range(self.c.num_experts)]
            passing = [(s, e) for s, e in sorted(worth) if -s >= self.threshold and e not in here]
            self.picks = [e for _, e in passing][: self.c.num_select]

    def select(self) -> None:
        expert = self.picks.pop(0)
        score = self.scores.score(self.of_queue, expert) % (1 << self.c.score_bits)
        self.say(Kind.SELECT, layer=self.of_queue, expert=expert, data=score)
        self.queue.append(expert)

    def load(self, demand: bool) -> None:
        layer = self.latest if demand else self.of_queue
        expert = (self.missing if demand else self.queue)[0]
        victim = None if self.free else self.victim(layer, demand)
        worth = self.value(layer, expert) + 4 * self.c.admission_bonus
        if not self.free and not demand and self.value(*victim) >= worth:
            self.queue.pop(0)
            self.say(Kind.DROP, layer=layer, expert=expert)
            return
        (self.missing if demand else self.queue).pop(0)
        index = min(set(range(self.c.transfers)) - set(self.loads))
        data, flag = index << 16, int(not demand)
        if victim:
            slot = self.resident.pop(victim)["slot"]
            data, flag = data | victim[0] << 8 | victim[1], flag | 2
        else:
            slot = self.free.pop(0)
        self.say(Kind.LOAD_START, layer=layer, expert=expert, slot=slot, flag=flag, data=data)
        load = {
            "index": index,
            "layer": layer,
            "expert": expert,
            "slot": slot,
            "prefetch": not demand,
            "plan": self.plan(layer, expert),
            "whole": self.plan(layer, expert),
            "owed": 0,
            "promised": int(demand),
            "cancelled": False,
            "failed": False,
            "retries": 0,
            "over": None,
        }
        self.loads[index] = load
        (self.demands if demand else self.prefetches).append(load)

    def burst(self, load: dict) -> None:
        address, beats = load["plan"].pop(0)
        load["owed"] += 1
        self.buses["addresses"].append((self.cycle, load["index"], address, beats))
        self.say(Kind.BURST, expert=load["index"], flag=load["prefetch"], data=address)

    def last_beat(self, load: dict) -> None:
        resp = self.rng.choice((0, 0, 0, 0, 1, 2, 3))
        load["owed"] -= 1
        load["failed"] |= resp > 1
        self.buses["last_beats"].append((self.cycle, load["index"], resp))
        self.say(Kind.LAST_BEAT, expert=load["index"], flag=resp)
        self.end(load)

    def retry(self, load: dict) -> None:
        self.over.remove(load)
        load.update(over=None, failed=False, retries=load["retries"] + 1)
        load["plan"] = list(load["whole"])
        if load in self.demands:
            self.demands.remove(load)
            self.demands.append(load)
        self.say(Kind.RETRY, expert=load["index"])

    def complete(self, load: dict) -> None:
        self.over.remove(load)
        del self.loads[load["index"]]
        for among in (self.demands, self.prefetches):
            if load in among:
                among.remove(load)
        place = load["layer"], load["expert"]
        if load["over"] == Kind.DRAINED:
            self.say(Kind.DRAINED, slot=load["slot"], data=load["index"])
        else:
            self.about(load["over"], load)
            if load["layer"] == self.latest:
                self.disproved.discard(load["expert"])
        if load["over"] == Kind.FILL_DONE:
            self.resident[place] = {
                "slot": load["slot"],
                "pins": load["promised"],
                "used": not load["prefetch"],
            }
            self.due_grants += [(*place, load["slot"], 0)] * load["promised"]
        else:
            self.free.append(load["slot"])
            self.due_grants += [(*place, 0, 1)] * load["promised"]

    def cancel(self, load: dict, for_room: int) -> None:
        self.about(Kind.CANCEL, load, flag=for_room)
        load["cancelled"] = True
        self.prefetches.remove(load)
        self.disproved.discard(load["expert"])
        self.end(load)

    def grant(self) -> None:
        layer, expert, slot, error = given = self.due_grants.pop(0)
        self.buses["grants"].append((self.cycle, *given))
        self.say(Kind.GRANT, layer=layer, expert=expert, slot=slot, flag=error)
        if not error:
            self.granted.append(slot)

    def release(self) -> None:
        slot = self.granted.pop(self.rng.randrange(len(self.granted)))
        (at,) = (at for at in self.resident.values() if at["slot"] == slot)
        at["pins"] -= 1
        self.buses["releases"].append((self.cycle, slot))
        self.say(Kind.RELEASE, slot=slot)

    def register_commit(self) -> None:
        c, left = self.c, self.c.num_slots - self.c.top_k
        self.quota = [0] * c.num_layers
        for layer in self.rng.sample(range(c.num_layers), c.num_layers):
            self.quota[layer] = self.rng.randint(0, min(left, c.num_experts))
            left -= self.quota[layer]
        before, self.threshold = self.threshold, self.rng.choice((self.threshold, 0, -40, 25))
        settings = Settings(self.threshold, list(self.quota))
        if self.rng.random() < 0.5:
            self.kinds = settings.predictors = self.rng.choice((63, self.rng.randrange(64)))
        else:
            self.kinds = -1
        if self.rng.random() < 0.5:
            self.segments = list(self.segments)
            self.segments[self.rng.randrange(c.num_layers)] = some_segments(self.rng)
            settings.segments = self.segments
        self.commits.append(settings)
        self.say(Kind.REGISTER_COMMIT)
        if self.threshold != before:
            self.cycle += 1
            self.say(Kind.THRESHOLD, data=self.threshold % (1 << self.c.score_bits))

    # What comes next ---

    def moves(self, *, ending: bool = False) -> list[Callable[[], None]]:
        """All that may happen now; ``ending``: without what begins something new."""
        if self.promoting:
            return [self.promote]
        moves: list[Callable[[], None]] = []
        settled = not self.commit_due and not self.picks and not self.missing
        doomed = sorted(e for e in self.disproved if not self.load_of(e)["over"])
        if settled and not doomed and not ending and len(self.due_grants) < 3 * self.c.top_k:
            moves.append(self.token if self.next_layer is None else self.route)
            if self.rng.random() < 0.1:
                moves += [self.token, self.register_commit]
        if self.commit_due:
            moves.append(self.score_commit)
        if self.picks:
            moves.append(self.select)
        room = len(self.loads) < self.c.transfers
        victim = self.missing and self.victim(self.latest, True)
        if self.missing and room and (self.free or victim):
            moves.append(lambda: self.load(True))
        if self.queue and room and self.may_prefetch():
            if self.free or self.victim(self.of_queue, False):
                moves.append(lambda: self.load(False))
        if doomed:
            moves.append(lambda: self.cancel(self.load_of(doomed[0]), 0))
        draining = any(load["cancelled"] for load in self.loads.values())
        if self.missing and not (self.free or victim or draining or self.disproved):
            if self.prefetches and not self.prefetches[-1]["over"]:
                moves.append(lambda: self.cancel(self.prefetches[-1], 1))
        on_way = sum(load["owed"] for load in self.loads.values())
        ahead = sum(load["owed"] for load in self.loads.values() if load["prefetch"])
        issuing = [load for load in self.demands if load["plan"]]
        if not issuing and ahead < self.c.prefetch_outstanding:
            issuing = [load for load in self.prefetches if load["plan"]]
        if issuing and on_way < self.c.max_outstanding:
            moves.append(lambda: self.burst(issuing[0]))
        owed = [load for load in self.loads.values() if load["owed"]]
        if owed:
            moves.append(lambda: self.last_beat(self.rng.choice(owed)))
        again = [load for load in self.over if load["over"] == Kind.RETRY]
        ended = [load for load in self.over if load["over"] != Kind.RETRY]
        unissued = any(load["plan"] for load in self.prefetches if not load["over"])
        if again and not (again[0]["prefetch"] and unissued):
            moves.append(lambda: self.retry(again[0]))
        if ended:
            moves.append(lambda: self.complete(ended[0]))
        if self.due_grants:
            moves.append(self.grant)
        if self.granted:
            moves.append(self.release)
        return moves

    def lane(self, layer: int, expert: int) -> Lane:
        """The state that the expert must have."""
        at = self.resident.get((layer, expert))
        if at:
            return Lane.PINNED if at["pins"] else Lane.READY if at["used"] else Lane.READY_UNUSED
        for load in self.loads.values():
            if self.holds(load) and (load["layer"], load["expert"]) == (layer, expert):
                demand = not load["prefetch"] or expert in self.promoting and layer == self.latest
                return Lane.LOADING_DEMAND if demand else Lane.LOADING_PREFETCH
        return Lane.NONE


def checker_of(engine: AnyEngine) -> Checker:
    return Checker(
        engine.c, segments=engine.first_segments, settings=engine.commits, **engine.buses
    )


def agree(engine: AnyEngine, checker: Checker) -> None:
    """The invariants of slots and map, and golden's state is the engine's."""
    c, buffer = engine.c, checker.buffer
    owners: Counter[int] = Counter(checker.free)
    owners.update(t.slot for t in checker.transfers.values())
    resident = np.argwhere(np.isin(buffer.lane, (Lane.READY, Lane.READY_UNUSED, Lane.PINNED)))
    owners.update(int(buffer.slot[m, e]) for m, e in resident)
    assert owners == Counter(range(c.num_slots)), "a slot has no owner or two"
    assert ((buffer.slot >= 0) == (buffer.lane != Lane.NONE)).all()
    inside = buffer.slot[buffer.slot >= 0]
    assert len(set(inside.tolist())) == len(inside), "two experts in one slot"
    for m in range(c.num_layers):
        assert buffer.held[m] == engine.held(m)
        for e in range(c.num_experts):
            assert buffer.lane[m, e] == engine.lane(m, e), (m, e)
    for (m, e), at in engine.resident.items():
        assert buffer.slot[m, e] == at["slot"] and checker.pins[at["slot"]] == at["pins"]
    assert len(checker.transfers) <= c.transfers
    assert checker.prefetch_held() <= max(0, c.prefetch_slots)
    assert sum(at["pins"] for at in engine.resident.values()) == len(engine.granted) + sum(
        not error for *_, error in engine.due_grants
    )


def some_segments(rng: random.Random) -> list[Segment]:
    """Of one layer, 12 beats in all at most."""
    left, row = 12, []
    for _ in range(rng.randint(1, 4)):
        beats = rng.randint(0 if row else 1, min(left, 6))
        left -= beats
        base = rng.randrange(1 << 27) * PAGE + rng.choice((0, PAGE - 16, PAGE - 8))
        row.append(Segment(base, rng.choice((96, 4096, 1 << 20)), beats))
    return row


@st.composite
def engines(draw) -> AnyEngine:
    """A small configuration with segments of all kinds, at a random place."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, experts)))
    layers = draw(st.integers(1, 4))
    quota = draw(st.integers(0, min(2, experts)))
    rng = random.Random(draw(st.integers(1 << 20, 1 << 40)))
    config = EngineConfig(
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        quota=quota,
        staging=top_k + draw(st.sampled_from((2, 1, 0, 4))),
        num_transfers=top_k + draw(st.integers(0, 3)),
        max_burst=draw(st.sampled_from((1, 2, 4, 8))),
        max_outstanding=draw(st.integers(2, 4)),
        prefetch_outstanding=draw(st.integers(1, 2)),
        retry_limit=draw(st.integers(0, 2)),
        expert_bytes=96,
        threshold=draw(st.sampled_from((-100, 0))),
        admission_bonus=draw(st.sampled_from((0, 8))),
        margin_low=draw(st.integers(0, 24)),
        margin_step=4,
        margin_high=8,
    )
    return AnyEngine(config, [some_segments(rng) for _ in range(layers)], rng)


def live(engine: AnyEngine, steps: int, check: Callable[[], None] = lambda: None) -> None:
    """So many moves, then until nothing is left to do."""
    for step in range(steps + 2000):
        ending = step >= steps
        moves = engine.moves(ending=ending)
        if not moves:
            assert ending, "the engine is stuck"
            break
        engine.cycle += 1
        engine.rng.choice(moves)()
        check()
    else:
        raise AssertionError("the engine never comes to rest")
    assert not engine.missing and not engine.loads and not engine.granted


@given(engines(), st.sampled_from((60, 250, 300, 350, 400)))
@GENTLE
def test_slots_and_map_hold_their_invariants_after_any_sequence_of_events(engine, steps):
    checker = checker_of(engine)
    checked = 0

    def check():
        nonlocal checked
        if engine.records[checked].kind == Kind.REGISTER_COMMIT:
            checker.settings.append(engine.commits[-1])
        for record in engine.records[checked:]:
            checker.recent.append(record)
            checker.check(record)
        checked = len(engine.records)
        agree(engine, checker)

    live(engine, steps, check)
    checker.finish(engine.cycle)


@given(engines(), st.sampled_from((40, 200, 250)), st.data())
@GENTLE
def test_no_field_of_a_record_can_be_changed_unseen(engine, steps, data):
    live(engine, steps)
    assume(engine.records)
    assert checker_of(engine).run(engine.records) == len(engine.records)
    at = data.draw(st.integers(0, len(engine.records) - 1))
    name = data.draw(
        st.sampled_from(("kind", "context", "layer", "expert", "slot", "flag", "data"))
    )
    record = engine.records[at]
    value = data.draw(st.integers(0, 40).filter(lambda x: x != getattr(record, name)))
    changed = list(engine.records)
    changed[at] = record._replace(**{name: value})
    with pytest.raises(Mismatch):
        checker_of(engine).run(changed)


def test_any_engine_does_everything():
    """The random walks above reach every kind of record that needs no illegal input."""
    happened: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        config = EngineConfig(
            num_layers=3, num_experts=5, quota=rng.randint(0, 2), staging=4, num_transfers=5,
            admission_bonus=0, retry_limit=1, expert_bytes=96, max_burst=4, margin_low=8,
        )  # fmt: skip
        segments = [[Segment(m << 20, 96, 12)] for m in range(3)]
        engine = AnyEngine(config, segments, rng)
        live(engine, 250)
        checker_of(engine).run(engine.records)
        happened += engine.happened
        happened["CANCEL for room"] += sum(r.kind == Kind.CANCEL and r.flag for r in engine.records)
    never = {kind.name for kind in Kind} - {"ILLEGAL", "WATCHDOG"} - set(happened)
    assert not never and happened["CANCEL for room"]
