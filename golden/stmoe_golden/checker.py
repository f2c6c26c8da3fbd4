# SPDX-License-Identifier: Apache-2.0
"""Holds the RTL to the golden model, event by event and counter by counter.

The checker is given what monitors saw on the harness's own buses (tokens, routes, releases, grants
and AXI handshakes, each with its cycle) and the records of the engine's event port. It runs the
golden decisions on the monitors' inputs. A record says *when* the engine did something; *what* it
must have been is decided here, and every field has to agree. What the engine ought to have done
and did not is found too: after a quiet spell, and at the end, nothing may be left that the design
says it would do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .buffer import Lane, admits, new_buffer, victim
from .confidence import (
    gate_params,
    new_gate,
    note_bad,
    note_event,
    note_good,
    threshold_of,
)
from .config import FRACTION_BITS, NUM_SEGMENTS, PAGE_BYTES, THRESHOLDS, EngineConfig
from .predictor import Predictor, params_of
from .records import Kind

__all__ = ["Checker", "Kind", "Mismatch", "Record", "Segment", "Settings", "burst_plan"]


BESIDE = {Kind.SELECT, Kind.BURST, Kind.LAST_BEAT, Kind.GRANT, Kind.RETRY}
"""Kinds that happen beside the slot manager's operations."""


class Record(NamedTuple):
    """One record of the event port; ``delivered`` is the cycle in which it left the port, which
    tells when the port was full and held the engine (0: it never is)."""

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
        try:
            name = Kind(self.kind).name
        except ValueError:
            name = f"kind {self.kind}"
        return (
            f"{name} cycle={self.cycle} layer={self.layer} expert={self.expert} "
            f"slot={self.slot} flag={self.flag} data={self.data:#x}"
        )


@dataclass(frozen=True)
class Segment:
    """Where one part of a layer's experts lies: ``base + expert * stride``, ``beats`` long."""

    base: int
    stride: int
    beats: int


@dataclass
class Settings:
    """What the registers hold; a register commit makes the next of these active."""

    threshold: int
    """Quarter units."""
    quota: list[int]
    prefetching: bool = True
    learning: bool = True
    ordered: bool = True
    adaptive: bool | None = None
    """Thresholds move; None: as the configuration has it."""
    predictors: int | None = None
    """Kinds of predictor that are enabled, as in the register PREDICTORS; None: all."""
    segments: list[list[Segment]] | None = None
    """Parts of each layer's experts; None: as before. A load keeps to those of its start."""

    buffer_base: int = 0
    """Byte address of slot 0, where the buffer is behind AXI."""
    slot_stride: int | None = None
    """Bytes from one slot to the next there; None: the slot in whole pages, as after reset."""
    farther: tuple[int, ...] | None = None
    """Thresholds of the layers two, three and four ahead, quarter units, as many as the engine
    looks ahead or more; None: as the configuration has them."""

    def floors(self, config: EngineConfig) -> tuple[int, ...]:
        """The static thresholds, by distance."""
        farther = self.farther or ()
        return (self.threshold, *farther, *config.floors[1 + len(farther) :])

    def refusal(self, config: EngineConfig) -> str | None:
        """Why the engine refuses to commit these; None when it takes them."""
        limit = 1 << (config.score_bits - 1)
        used = self.floors(config)[: max(1, config.look)]
        for name, threshold in zip(THRESHOLDS, used, strict=False):
            if not -limit <= threshold < limit:
                return f"{name} must be {-limit} to {limit - 1} quarters, not {threshold}"
        if len(self.quota) != config.num_layers:
            return f"quota must have {config.num_layers} numbers, not {len(self.quota)}"
        for layer, quota in enumerate(self.quota):
            if not 0 <= quota <= config.num_experts:
                return f"quota of layer {layer} must be 0 to {config.num_experts}, not {quota}"
        room = config.num_slots - config.top_k
        if sum(self.quota) > room:
            return f"sum of quotas must be at most {room}, not {sum(self.quota)}"
        if config.buffer == "axi":
            least, stride = config.least_stride, self.slot_stride
            if stride is not None and stride < least:
                return f"slot_stride must be at least {least}, not {stride}"
            end = self.buffer_base + config.num_slots * (stride or least)
            if end > 1 << config.axi_addr_width:
                return f"the last slot must end below 2^{config.axi_addr_width}, not at {end:#x}"
        if self.segments is None:
            return None
        if len(self.segments) != config.num_layers:
            return f"segments must be of {config.num_layers} layers, not {len(self.segments)}"
        for layer, segments in enumerate(self.segments):
            if len(segments) > NUM_SEGMENTS:
                return f"segments of layer {layer} must be at most {NUM_SEGMENTS}"
            for number, segment in enumerate(segments):
                which = f"of segment {number} of layer {layer}"
                for name, value, bits in (
                    ("base", segment.base, config.axi_addr_width),
                    ("stride", segment.stride, 32),
                ):
                    if not 0 <= value < 1 << bits or value % config.beat_bytes:
                        return (
                            f"{name} {which} must be a multiple of {config.beat_bytes} below "
                            f"2^{bits}, not {value:#x}"
                        )
            beats = [segment.beats for segment in segments]
            if min(beats, default=0) < 0 or not 1 <= sum(beats) <= config.slot_beats:
                return (
                    f"beats of layer {layer}'s segments must be 1 to {config.slot_beats} together, "
                    f"not {beats}"
                )
        return None


@dataclass
class Transfer:
    """A load in flight."""

    index: int
    layer: int
    expert: int
    slot: int
    prefetch: bool
    since: int
    plan: list[tuple[int, int]]
    """(address, beats) of every burst."""
    issued: int = 0
    owed: deque[int] = field(default_factory=deque)
    """Beats of the bursts that are on their way, and whether they are the prefetch kind."""
    promised: int = 0
    cancelled: bool = False
    failed: bool = False
    retries: int = 0
    ended: Kind | None = None
    last_cycle: int = -1
    promoted: int = -1
    demanded: int = -1
    """Cycle from which it has been a demand."""
    addressed: int = 0
    """Buffer behind AXI: beats of this pass whose write address was sent."""
    written: int = 0
    """Those of them whose write was answered."""
    writes: deque[int] = field(default_factory=deque)
    """Beats of the write bursts that are not answered yet."""

    @property
    def beats(self) -> int:
        """Beats of the whole load."""
        return sum(beats for _, beats in self.plan)


class Mismatch(Exception):
    """The RTL and the golden model disagree; the text says where and how."""


def burst_plan(
    segments: Iterable[Segment], expert: int, beat_bytes: int, max_burst: int
) -> list[tuple[int, int]]:
    """(address, beats) of every burst of an expert: INCR, never across 4 KiB."""
    plan = []
    for segment in segments:
        address, left = segment.base + expert * segment.stride, segment.beats
        while left:
            beats = min(left, max_burst, (PAGE_BYTES - address % PAGE_BYTES) // beat_bytes)
            plan.append((address, beats))
            address += beats * beat_bytes
            left -= beats
    return plan


class Checker:
    """Golden model in lockstep with the engine's records.

    Parameters
    ----------
    config : EngineConfig
    segments : list [L] of list of :class:`Segment`
        As programmed into the engine, until a commit brings others.
    settings : list of :class:`Settings`
        Those of reset first, then one for each register commit, in order.
    tokens, routes, releases, grants, addresses, last_beats : iterables
        The monitors' handshakes: ``(cycle, new_sequence, token_id)``, ``(cycle, layer, experts)``,
        ``(cycle, slot)``, ``(cycle, layer, expert, slot, error)``, ``(cycle, id, address, beats)``,
        ``(cycle, id, resp)``.
    fills : iterable, optional
        ``(cycle, slot)`` of every handshake of ``fill`` that carried a slot's last beat. With it,
        a cancel and a fill that meet are judged to the cycle; without, only the order of records.
    write_addresses, write_answers : iterables, optional
        Where the buffer is behind AXI: handshakes of its AW and B, ``(cycle, id, address, beats)``
        and ``(cycle, id, resp)``. A load is over only when all its writes are answered, so ends
        and cancels are judged to the cycle, without ``fills``.
    counters : iterable of str
        Names that the counters start from at 0.
    """

    HISTORY = 24
    """Records that a mismatch report shows."""
    DEMAND_LEAD = 6
    """Cycles that a demand's first address may take to be ready; until then a prefetch may still
    be presented."""
    END_LAG = 4
    """Cycles from a transfer's last beat on the bus to its end inside the engine, without stalls
    of ``fill``; twice that is how far apart ends may be that change places."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        segments: list[list[Segment]],
        settings: list[Settings],
        tokens: Iterable[tuple[int, int, int]] = (),
        routes: Iterable[tuple[int, int, Sequence[int]]] = (),
        releases: Iterable[tuple[int, int]] = (),
        grants: Iterable[tuple[int, int, int, int, int]] = (),
        addresses: Iterable[tuple[int, int, int, int]] = (),
        last_beats: Iterable[tuple[int, int, int]] = (),
        fills: Iterable[tuple[int, int]] | None = None,
        write_addresses: Iterable[tuple[int, int, int, int]] = (),
        write_answers: Iterable[tuple[int, int, int]] = (),
        counters: Iterable[str] = (),
    ):
        self.config = config
        self.segments = segments
        self.settings = deque(settings)
        self.active = self.settings.popleft()
        self.inputs: dict[str, Iterator[Any]] = {
            "token": iter(tokens),
            "route": iter(routes),
            "release": iter(releases),
            "grant": iter(grants),
            "AR": iter(addresses),
            "R": iter(last_beats),
        }
        self.fills: dict[int, list[int]] | None = None
        if fills is not None:
            self.fills = {slot: [] for slot in range(config.num_slots)}
            for cycle, slot in fills:
                self.fills[slot].append(cycle)
        self.behind_axi = config.buffer == "axi"
        self.write_addresses = deque(write_addresses)
        self.write_answers = deque(write_answers)
        self.lost: dict[int, Transfer] = {}
        """Given up by the watchdog: what was on its way to the buffer may still be written."""
        self.emptied_until = 0
        self.predictor = Predictor(config)
        self.buffer = new_buffer(config)
        self.buffer.quota[:] = self.active.quota
        self.gate = new_gate(config.num_layers)
        self.gate_params = self.params_of_gate()
        self.bonus = config.admission_bonus << FRACTION_BITS
        self.free = deque(range(config.num_slots))
        self.pins = [0] * config.num_slots
        self.occupant: list[tuple[int, int] | None] = [None] * config.num_slots
        self.quarantined: set[int] = set()
        self.transfers: dict[int, Transfer] = {}
        self.started: list[Transfer] = []
        self.demand_order: list[Transfer] = []
        self.ended: deque[Transfer] = deque()
        self.queue: deque[tuple[int, int]] = deque()
        """Layer and expert of what is to be loaded ahead, those of the nearest layer first."""
        self.picks: deque[tuple[int, int]] = deque()
        """The same of what is still to be handed over by the predictor."""
        self.grants: deque[tuple[int, int, int, int]] = deque()
        self.work: deque[tuple[int, bool | None, np.ndarray | None]] = deque()
        self.pending: deque[int] = deque()
        self.promotes: deque[int] = deque()
        self.disproved: set[int] = set()
        self.latest = config.num_layers - 1
        self.current_set = np.zeros(config.num_experts, np.bool_)
        self.expected_layer = 0
        self.token_taken = False
        self.threshold_due = False
        self.gate_due = False
        self.prefetch_retried = False
        """Since the last operation a prefetch has started again."""
        self.routed_at = -1
        self.counters = dict.fromkeys(counters, 0)
        self.recent: deque[Record] = deque(maxlen=self.HISTORY)
        self.port: deque[tuple[int, int]] = deque()
        self.last_operation = 0
        self.last_burst = 0
        self.last_link = 0
        self.startable_since: int | None = None
        self.checked = 0
        self.quiet_limit = 96 + 16 * config.num_layers + 2 * config.num_experts
        # Between two operations one selection follows the other.
        self.quiet_limit += 4 * config.num_select * config.num_farther
        self.mirror = np.zeros_like(self.buffer.lane)
        self.handlers = {kind: getattr(self, f"_{kind.name.lower()}") for kind in Kind}

    # Driving --------------------------------------------------------------------------------

    def run(self, records: Iterable[tuple[int, ...]]) -> int:
        """Check every record, then that nothing is left; returns how many were checked.

        Raises
        ------
        Mismatch
            At the first disagreement.
        """
        cycle = 0
        for fields in records:
            record = Record(*fields)
            self.recent.append(record)
            if record.cycle < cycle:
                self.fail(record, f"its cycle is before the one of the record before it, {cycle}")
            cycle = record.cycle
            self.check(record)
            self.checked += 1
        self.finish(cycle)
        return self.checked

    def check(self, record: Record) -> None:
        """Check one record and apply what the golden model decides."""
        if record.kind not in self.handlers:
            self.fail(record, "no such kind of record")
        handler = self.handlers[Kind(record.kind)]
        if record.kind not in BESIDE:
            if self.promotes and record.kind not in (Kind.PROMOTE, Kind.LOAD_START):
                self.fail(record, f"PROMOTE of expert {self.promotes[0]} must come first")
            first = Kind.PROMOTE, Kind.THRESHOLD
            at_once = record.kind == Kind.LOAD_START and record.cycle == self.routed_at + 1
            if self.gate_due and record.kind not in first and not at_once:
                self.fail(record, f"THRESHOLD of layer {self.latest} must come first")
            if self.threshold_due and record.kind != Kind.THRESHOLD:
                self.fail(record, "THRESHOLD must follow its REGISTER_COMMIT")
        # The engine starts nothing while it is held, neither operations nor bursts.
        held = self.held_until(record)
        self.last_operation = max(self.last_operation, held)
        self.last_link = max(self.last_link, held)
        self.must_have_acted(record, record.cycle - self.quiet_limit)
        self.follow_writes(record, record.cycle)
        handler(record)
        if record.kind not in BESIDE:
            self.last_operation = max(record.cycle, self.emptied_until)
            self.prefetch_retried = False
        if record.kind in (Kind.BURST, Kind.LAST_BEAT):
            self.last_link = record.cycle
        if not (self.queue and self.prefetch_may_start()):
            self.startable_since = None
        elif self.startable_since is None:
            self.startable_since = record.cycle

    def held_until(self, record: Record) -> int:
        """The cycle until which the event port, too full, held the engine; 0 if it did not.

        Records of one cycle share an entry of its FIFO, and a few entries may be on their way.
        """
        if self.port and self.port[-1][0] == record.cycle:
            self.port.pop()
        self.port.append((record.cycle, record.delivered))
        while self.port[0][1] < record.cycle and len(self.port) > 1:
            self.port.popleft()
        over = len(self.port) - (self.config.event_depth - self.config.event_margin - 10)
        return self.port[over][1] if over >= 0 else 0

    def finish(self, cycle: int) -> None:
        """Everything the monitors saw was accounted for, and nothing is left to do."""
        last = self.recent[-1] if self.recent else Record(cycle, 0, 0, 0, 0, 0, 0, 0)
        if not self.recent:
            self.fail(last, "the event log is empty")
        self.follow_writes(last, 1 << 62)
        self.must_have_acted(last, 1 << 62)
        for name, items in self.inputs.items():
            left = next(items, None)
            if left is not None:
                self.fail(last, f"a {name} handshake has no record: {left}")
        for what, left in (
            ("selection", self.picks),
            ("grant", self.grants),
            ("score commit", self.work),
            ("promotion", self.promotes),
            ("demand without a slot", self.pending),
            ("completion", self.ended),
            ("transfer", self.transfers),
            ("threshold change", self.gate_due),
        ):
            if left:
                self.fail(last, f"the run ended with a {what} outstanding: {left}")

    def must_have_acted(self, record: Record, before: int) -> None:
        """Is there anything that the engine ought to have done since before cycle ``before``?"""
        if self.last_link < before:
            idle = not any(t.owed for t in self.transfers.values())
            unissued = [t for t in self.transfers.values() if self.has_bursts(t)]
            if idle and unissued and unissued[0].since < before:
                self.fail(record, f"no BURST although the link is idle: {unissued[0]}")
        if self.last_operation >= before:
            return
        since = f"since cycle {self.last_operation}"
        # How much of a cancelled load is still to be written to a slow buffer is not known.
        late = [
            t for t in self.ended if t.last_cycle < before and not (self.behind_axi and t.cancelled)
        ]
        if late:
            self.fail(record, f"{since} no {late[0].ended} of {late[0]}")
        if self.work:
            self.fail(record, f"{since} no SCORE_COMMIT for {self.work[0]}")
        waiting = [e for e in self.disproved if not self.transfer_of(self.latest, e).ended]
        if waiting:
            self.fail(record, f"{since} disproved experts {sorted(waiting)} were not cancelled")
        room = len(self.transfers) < self.config.transfers
        if self.pending and room and (self.free or self.find_victim(self.latest, True)[0] >= 0):
            self.fail(record, f"{since} no LOAD_START for demanded expert {self.pending[0]}")
        startable = self.startable_since is not None and self.startable_since < before
        # Prefetches are held back while a commit that moves the slots waits.
        startable &= not (self.settings and self.place(self.settings[0]) != self.place())
        if startable and self.queue and room and self.prefetch_may_start():
            wanted_layer, wanted = self.queue[0]
            layer, expert = self.find_victim(wanted_layer, False)
            if self.free or layer >= 0:
                self.fail(
                    record,
                    f"{since} no LOAD_START or DROP for selected expert {wanted} of layer "
                    f"{wanted_layer} (victim would be {expert} of layer {layer})",
                )

    def fail(self, record: Record, why: str) -> None:
        """Raise :class:`Mismatch` with both sides' state of the record's layer."""
        b, s = self.buffer, self.predictor.state
        layer = record.layer if record.layer < self.config.num_layers else 0
        if record.kind in (Kind.BURST, Kind.LAST_BEAT, Kind.RETRY):
            transfer = self.transfers.get(record.expert)
            layer = transfer.layer if transfer else layer
        names = {state: state.name.lower() for state in Lane}
        lines = [
            f"MISMATCH at cycle {record.cycle}, record {self.checked}: {record}",
            f"  golden: {why}",
            f"  look at cycle {record.cycle} in the wave; layer {layer} is:",
            "  expert  golden            RTL (its events)  slot  score (quarters)  use",
        ]
        for e in range(self.config.num_experts):
            golden, rtl = Lane(b.lane[layer, e]), Lane(self.mirror[layer, e])
            if golden or rtl or s.score[layer, e] >= min(self.gate_params.floors):
                lines.append(
                    f"  {e:6}  {names[golden]:16}  {names[rtl]:16}  {b.slot[layer, e]:4}  "
                    f"{s.score[layer, e]:16}  {s.use[layer, e]}"
                )
        lines += [
            f"  quota {b.quota[layer]}, held {b.held[layer]}, free slots {len(self.free)}, latest "
            f"layer {self.latest}, current set {np.flatnonzero(self.current_set).tolist()}",
            f"  pending {list(self.pending)}, queue (layer, expert) {list(self.queue)}, "
            f"disproved {sorted(self.disproved)}",
            "  last records:",
            *(f"    {r}" for r in self.recent),
        ]
        raise Mismatch("\n".join(lines))

    def expect(self, record: Record, **fields: int) -> None:
        """Every field of the record must be as given, those not given 0."""
        wanted = Record(
            record.cycle,
            record.kind,
            0,
            *(fields.get(name, 0) for name in ("layer", "expert", "slot", "flag", "data")),
        )
        if record[:8] != wanted[:8]:
            self.fail(record, f"expected {wanted}")

    def handshake(self, record: Record, name: str) -> tuple[Any, ...]:
        """The monitor's next handshake on a bus, which must be in the record's cycle."""
        item = next(self.inputs[name], None)
        if item is None:
            self.fail(record, f"the monitor saw no such {name} handshake")
        assert item is not None
        if item[0] != record.cycle:
            self.fail(record, f"the monitor's next {name} handshake is in cycle {item[0]}: {item}")
        return item

    def count(self, name: str, amount: int = 1) -> None:
        """Golden counter."""
        self.counters[name] = self.counters.get(name, 0) + amount

    def params_of_gate(self) -> Any:
        """The confidence gate as the active registers have it."""
        return gate_params(self.config, adaptive=self.active.adaptive)._replace(
            floors=self.active.floors(self.config)
        )

    # What the golden model decides ------------------------------------------------------------

    def transfer_of(self, layer: int, expert: int) -> Transfer:
        """The transfer that loads an expert."""
        for t in self.transfers.values():
            if (t.layer, t.expert, t.cancelled) == (layer, expert, False):
                return t
        raise KeyError((layer, expert))

    def find_victim(self, load_layer: int, demand: bool) -> tuple[int, int]:
        """Golden victim choice in the present state."""
        s = self.predictor.state
        return victim(
            self.buffer,
            s.score,
            s.use,
            self.config.use_shift,
            load_layer,
            self.latest,
            self.current_set,
            demand,
        )

    def admitted(self, layer: int, expert: int, victim_layer: int, victim_expert: int) -> bool:
        """Golden admission of a prefetch in the present state."""
        s, shift = self.predictor.state, self.config.use_shift
        place = layer, expert, victim_layer, victim_expert
        return bool(admits(s.score, s.use, shift, self.bonus, *place))

    def has_bursts(self, t: Transfer) -> bool:
        """The transfer still has addresses to send."""
        return not t.cancelled and t.issued < len(t.plan)

    def prefetch_owed(self) -> int:
        """Prefetch bursts on their way."""
        return sum(len(t.owed) for t in self.transfers.values() if t.prefetch)

    def prefetch_held(self) -> int:
        """Slots that prefetches hold, loading or draining."""
        return sum(t.prefetch for t in self.transfers.values())

    def prefetch_may_start(self, presented: int = 0, *, chosen: bool = False) -> bool:
        """The rules of the DMA scheduler and the buffer for one more prefetch.

        ``presented``: 1 where the last address of the prefetch before may stand on the bus, which
        has not taken it yet. ``chosen``: it may have been chosen before another prefetch started
        again, and waited until that had issued its bursts.
        """
        c = self.config
        unissued = sum(
            len(t.plan) - t.issued
            for t in self.transfers.values()
            if t.prefetch and self.has_bursts(t)
        )
        return (
            not self.pending
            and unissued <= presented
            and (chosen or self.prefetch_owed() < c.prefetch_outstanding)
            and self.prefetch_held() < c.prefetch_loads
        )

    def drop_queue(self) -> None:
        """The unstarted prefetches are replaced."""
        self.count("replaced", len(self.queue))
        self.queue.clear()

    def free_slot(self, t: Transfer) -> None:
        """A load gave its slot up."""
        self.free.append(t.slot)
        self.buffer.held[t.layer] -= 1
        self.occupant[t.slot] = None
        self.pins[t.slot] = 0

    def forget(self, t: Transfer) -> None:
        """A transfer is over."""
        del self.transfers[t.index]
        if t in self.started:
            self.started.remove(t)
        if t in self.demand_order:
            self.demand_order.remove(t)

    def settle(self, t: Transfer, cycle: int) -> None:
        """After a beat, a cancel or a restart: has the transfer ended?"""
        if t.owed or t.ended or t.writes:
            return
        if self.behind_axi and not t.cancelled and t.written < t.beats:
            return
        if t.cancelled:
            t.ended = Kind.DRAINED
        elif t.issued == len(t.plan):
            if not t.failed:
                t.ended = Kind.FILL_DONE
            elif t.retries < self.config.retry_limit:
                t.ended = Kind.RETRY
            else:
                t.ended = Kind.ERROR
        else:
            return
        t.last_cycle = cycle
        self.ended.append(t)

    def next_ended(self, record: Record, index: int) -> Transfer:
        """The transfer that ended first, which the record must be about."""
        waiting = [t for t in self.ended if t.ended != Kind.RETRY]
        if self.behind_axi:
            # That of a cancelled load is not known, see `must_have_acted`.
            ends = [t.last_cycle for t in waiting if not t.cancelled]
            latest = min(ends, default=1 << 62) + 2 * self.END_LAG
            waiting = [t for t in waiting if t.cancelled or t.last_cycle <= latest]
        for t in waiting:
            # Transfers that end within a few cycles of each other may change places.
            ordered = self.fills is None and not self.behind_axi
            if ordered and t.last_cycle > waiting[0].last_cycle + 2 * self.END_LAG:
                break
            if t.index == index and t.ended == record.kind:
                # A stalled `fill` delays ends by any time; one that has filled long ago goes first.
                for other in waiting if self.fills is not None else ():
                    early = t.last_cycle - 2 * self.END_LAG
                    if other.ended == Kind.FILL_DONE and self.filled(other, early):
                        self.fail(record, f"the next transfer to end is {other}")
                self.ended.remove(t)
                return t
        self.fail(record, f"the next transfer to end is {waiting[0] if waiting else None}")
        raise AssertionError

    # Writes to a buffer behind AXI ------------------------------------------------------------

    def place(self, settings: Settings | None = None) -> tuple[int, int]:
        """(base, stride) of the slots, in bytes; of the active settings unless others are given."""
        s = self.active if settings is None else settings
        stride = s.slot_stride
        return s.buffer_base, self.config.least_stride if stride is None else stride

    def follow_writes(self, record: Record, before: int) -> None:
        """Take in what passed on the buffer's bus in all cycles before this one."""
        addresses, answers = self.write_addresses, self.write_answers
        while True:
            address = addresses[0][0] if addresses else before
            answer = answers[0][0] if answers else before
            if min(address, answer) >= before:
                return
            if address <= answer:
                self.write_address(record, *addresses.popleft())
            else:
                self.write_answer(record, *answers.popleft())

    def writing(self, record: Record, what: str, index: int) -> Transfer:
        """The transfer that an AXI ID on the buffer's bus belongs to."""
        t = self.lost.get(index) or self.transfers.get(index)
        if t is None:
            self.fail(record, f"before it, {what}: transfer {index} is not in flight")
        assert t is not None
        return t

    def write_address(
        self, record: Record, cycle: int, index: int, address: int, beats: int
    ) -> None:
        """AW: the next beats of that load, at their place in its slot."""
        c = self.config
        what = f"the write of {beats} beats to {address:#x} in cycle {cycle}"
        t = self.writing(record, what, index)
        base, stride = self.place()
        wanted = base + t.slot * stride + t.addressed * c.beat_bytes
        if address != wanted:
            self.fail(record, f"before it, {what} ought to be to {wanted:#x}: {t}")
        if not 1 <= beats <= c.burst_beats or t.addressed + beats > t.beats:
            self.fail(record, f"before it, {what} is too long: {t}")
        if address % PAGE_BYTES + beats * c.beat_bytes > PAGE_BYTES:
            self.fail(record, f"before it, {what} crosses 4 KiB")
        t.addressed += beats
        t.writes.append(beats)
        if t.ended:
            # Cancelled, and no more was known to be on its way.
            self.ended.remove(t)
            t.ended = None
        owed = sum(len(x.writes) for x in (*self.transfers.values(), *self.lost.values()))
        if owed > c.max_outstanding:
            self.fail(record, f"before it, {what} is one of {owed} on their way")

    def write_answer(self, record: Record, cycle: int, index: int, resp: int) -> None:
        """B: the oldest burst of that load is in the buffer, or could not be written."""
        what = f"the answer {resp} in cycle {cycle}"
        t = self.writing(record, what, index)
        if not t.writes:
            self.fail(record, f"before it, {what} is to no write: {t}")
        t.written += t.writes.popleft()
        t.failed |= resp >= 2
        if self.transfers.get(index) is t:
            self.settle(t, cycle)

    # Records ----------------------------------------------------------------------------------

    def _token(self, record: Record) -> None:
        _, new_sequence, token_id = self.handshake(record, "token")
        self.expect(record, flag=new_sequence, data=token_id)
        if self.work or self.picks or self.pending:
            self.fail(record, "the event before it is not over")
        if self.token_taken and not new_sequence:
            self.fail(record, f"layer {self.expected_layer} of the token before it is to come")
        self.token_taken, self.expected_layer = True, 0
        self.work.append((0, bool(new_sequence), None))
        self.sample_predictor()
        self.count("tokens")
        if new_sequence:
            self.count("sequences")
            self.drop_queue()

    def _illegal(self, record: Record) -> None:
        name = {0: "route", 1: "release", 2: "token"}.get(record.flag, "route")
        item = self.handshake(record, name)
        self.count("illegal")
        if name == "route":
            if self.legal(item[1], item[2]):
                self.fail(record, f"the route is legal: {item}")
            self.expect(record, flag=0, layer=item[1])
        elif name == "release":
            if self.releasable(item[1]):
                self.fail(record, f"the release is legal: {item}")
            self.expect(record, flag=1, slot=item[1])
        else:
            self.expect(record, flag=2)

    def legal(self, layer: int, experts: Sequence[int]) -> bool:
        """A route in order, of K different experts of the model."""
        return (
            self.token_taken
            and layer == self.expected_layer
            and max(experts) < self.config.num_experts
            and len(set(experts)) == len(experts)
        )

    def _route(self, record: Record) -> None:
        c, b = self.config, self.buffer
        _, layer, routed = self.handshake(record, "route")
        experts = [int(e) for e in routed]
        packed = sum(e << (c.expert_bits * rank) for rank, e in enumerate(experts))
        self.expect(record, layer=layer, data=packed)
        if not self.legal(layer, experts):
            self.fail(record, "the route is illegal")
        if self.work or self.picks or self.pending:
            self.fail(record, "the event before it is not over")
        self.count("routes")
        self.routed_at = record.cycle
        self.drop_queue()
        self.latest = layer
        self.current_set[:] = False
        self.current_set[experts] = True
        self.token_taken = layer != c.num_layers - 1
        self.expected_layer = (layer + 1) % c.num_layers
        self.disproved = {
            int(e)
            for e in np.flatnonzero(b.lane[layer] == Lane.LOADING_PREFETCH)
            if not self.current_set[e]
        }
        gate = self.gate_params, self.gate, layer
        idle = not self.transfers
        for e in experts:
            state = b.lane[layer, e]
            if state in (Lane.LOADING_PREFETCH, Lane.READY_UNUSED):
                note_good(*gate, state == Lane.LOADING_PREFETCH)
            if state == Lane.NONE:
                self.pending.append(e)
                self.count("misses")
            elif state in (Lane.LOADING_PREFETCH, Lane.LOADING_DEMAND):
                self.count("lates")
                self.transfer_of(layer, e).promised += 1
                if state == Lane.LOADING_PREFETCH:
                    self.promotes.append(e)
                b.lane[layer, e] = Lane.LOADING_DEMAND
            else:
                self.count("hits")
                if state == Lane.READY_UNUSED:
                    self.count("useful")
                slot = int(b.slot[layer, e])
                self.pins[slot] += 1
                b.lane[layer, e] = Lane.PINNED
                self.mirror[layer, e] = Lane.PINNED
                self.grants.append((layer, e, slot, 0))
        self.gate_due = bool(note_event(*gate, idle)) and c.look > 0
        self.work.append(((layer + 1) % c.num_layers, None, np.array(experts)))
        self.sample_predictor()

    def sample_predictor(self) -> None:
        """A token or route has been taken: the predictor's switches are what they are now."""
        self.predictor.params = params_of(
            self.config,
            learning=self.active.learning,
            ordered=self.active.ordered,
            predictors=self.active.predictors,
        )

    def _score_commit(self, record: Record) -> None:
        if not self.work:
            self.fail(record, "no event waits for a score commit")
        layer, new_sequence, experts = self.work.popleft()
        self.expect(record, layer=layer)
        if self.picks:
            self.fail(
                record, f"{list(self.picks)} (layer, expert) of the last selection are missing"
            )
        if experts is None:
            self.predictor.token(bool(new_sequence))
        else:
            self.predictor.route(self.latest, experts)
        self.count("score_commits")
        self.drop_queue()
        for distance in range(1, self.config.look + 1 if self.active.prefetching else 1):
            allowed = self.buffer.lane[layer] == Lane.NONE
            threshold = int(threshold_of(self.gate_params, self.gate, layer, distance))
            picks = self.predictor.select(layer, allowed, threshold)
            self.picks.extend((layer, int(e)) for e in picks)
            layer = (layer + 1) % self.config.num_layers

    def _select(self, record: Record) -> None:
        if not self.picks:
            self.fail(record, "nothing more is to be selected")
        layer, expert = self.picks.popleft()
        score = int(self.predictor.state.score[layer, expert])
        mask = (1 << self.config.score_bits) - 1
        self.expect(record, layer=layer, expert=expert, data=score & mask)
        self.queue.append((layer, expert))
        self.count("selected")

    def _load_start(self, record: Record) -> None:
        b = self.buffer
        demand = bool(self.pending)
        if not demand:
            if not self.queue:
                self.fail(record, "nothing is demanded or selected")
            if not self.prefetch_may_start(1, chosen=self.prefetch_retried):
                self.fail(record, "a prefetch may not start now")
        layer, expert = (self.latest, self.pending.popleft()) if demand else self.queue.popleft()
        flag, evicted = int(not demand), 0
        if self.free:
            slot = self.free.popleft()
        else:
            victim_layer, victim_expert = self.find_victim(layer, demand)
            if victim_layer < 0:
                self.fail(record, f"there is no slot for expert {expert} of layer {layer}")
            if not demand and not self.admitted(layer, expert, victim_layer, victim_expert):
                self.fail(
                    record,
                    f"expert {expert} of layer {layer} is not worth more than its victim, expert "
                    f"{victim_expert} of layer {victim_layer}",
                )
            flag |= 2
            evicted = victim_layer << 8 | victim_expert
            slot = int(b.slot[victim_layer, victim_expert])
            if b.lane[victim_layer, victim_expert] == Lane.READY_UNUSED:
                self.count("useless")
                note_bad(self.gate_params, self.gate, victim_layer)
            self.count("evictions")
            b.lane[victim_layer, victim_expert] = Lane.NONE
            b.slot[victim_layer, victim_expert] = -1
            b.held[victim_layer] -= 1
        index = record.data >> 16
        data = evicted | index << 16
        self.expect(record, layer=layer, expert=expert, slot=slot, flag=flag, data=data)
        if record.flag & 2:
            self.mirror[record.data >> 8 & 255, record.data & 255] = Lane.NONE
        state = Lane.LOADING_DEMAND if demand else Lane.LOADING_PREFETCH
        self.mirror[record.layer, record.expert] = state
        if index in self.transfers:
            self.fail(record, f"transfer {index} is in use")
        b.lane[layer, expert] = state
        b.slot[layer, expert] = slot
        b.held[layer] += 1
        self.occupant[slot] = (layer, expert)
        self.pins[slot] = 0
        t = Transfer(index, layer, expert, slot, not demand, record.cycle, self.plan(layer, expert))
        t.promised, t.demanded = int(demand), record.cycle
        self.transfers[index] = t
        if demand:
            self.demand_order.append(t)
        else:
            self.started.append(t)
        self.count("demand_loads" if demand else "prefetch_loads")
        self.settle(t, record.cycle)

    def plan(self, layer: int, expert: int) -> list[tuple[int, int]]:
        """Bursts of one expert."""
        segments = self.segments[layer][:NUM_SEGMENTS]
        return burst_plan(segments, expert, self.config.beat_bytes, self.config.max_burst)

    def _drop(self, record: Record) -> None:
        if self.pending or not self.queue or not self.prefetch_may_start(1) or self.free:
            self.fail(record, "no prefetch is being judged")
        layer, expert = self.queue.popleft()
        self.expect(record, layer=layer, expert=expert)
        victim_layer, victim_expert = self.find_victim(layer, False)
        if victim_layer < 0 or self.admitted(layer, expert, victim_layer, victim_expert):
            self.fail(record, f"the prefetch is to be admitted ({victim_layer}, {victim_expert})")
        self.count("dropped")

    def _promote(self, record: Record) -> None:
        if not self.promotes:
            self.fail(record, "nothing is to be promoted")
        expert = self.promotes.popleft()
        t = self.transfer_of(self.latest, expert)
        self.expect(record, layer=self.latest, expert=expert, slot=t.slot, data=t.index)
        self.mirror[record.layer, record.expert] = Lane.LOADING_DEMAND
        t.prefetch = False
        t.demanded = t.promoted = record.cycle
        self.started.remove(t)
        self.demand_order.append(t)

    def filled(self, t: Transfer, cycle: int) -> bool:
        """By this cycle (included) the last beat of the load was put into the buffer."""
        if self.fills is None:
            return False
        return any(t.since <= c <= cycle for c in self.fills[t.slot])

    def _cancel(self, record: Record) -> None:
        t = self.transfers.get(record.data)
        if t is None or t.cancelled or not t.prefetch:
            self.fail(record, f"transfer {record.data} is not a prefetch under way")
        assert t is not None
        # The engine decides in the cycle before the record, and sees an answer a cycle after it.
        if not t.failed and self.filled(t, record.cycle - 1):
            self.fail(record, "its last beat is in the buffer: the fill wins")
        over = t.ended not in (None, Kind.RETRY) and t.last_cycle < record.cycle - 1
        if self.behind_axi and over:
            self.fail(record, "its last write was answered: the fill wins")
        if record.flag:
            if self.free or not self.pending:
                self.fail(record, "no demand lacks a slot")
            if any(x.cancelled for x in self.transfers.values()) or self.disproved:
                self.fail(record, "another slot is about to be free")
            if self.find_victim(self.latest, True)[0] >= 0:
                self.fail(record, "there is a victim")
            if t is not self.started[-1]:
                self.fail(record, f"the latest started prefetch is {self.started[-1]}")
        else:
            due = sorted(
                e
                for e in self.disproved
                if not self.transfer_of(self.latest, e).ended
                or self.transfer_of(self.latest, e) is t
            )
            if t.layer != self.latest or not due or t.expert != due[0]:
                self.fail(record, f"the disproved prefetches are experts {due}")
            self.disproved.discard(t.expert)
        self.expect(
            record, layer=t.layer, expert=t.expert, slot=t.slot, flag=record.flag & 1, data=t.index
        )
        self.mirror[record.layer, record.expert] = Lane.NONE
        if t.ended:
            # Its last beat was on the bus, but had not reached the buffer.
            self.ended.remove(t)
            t.ended = None
        t.cancelled = True
        self.started.remove(t)
        self.buffer.lane[t.layer, t.expert] = Lane.NONE
        self.buffer.slot[t.layer, t.expert] = -1
        self.count("cancelled")
        note_bad(self.gate_params, self.gate, t.layer)
        self.settle(t, record.cycle)

    def _burst(self, record: Record) -> None:
        _, index, address, beats = self.handshake(record, "AR")
        t = self.transfers.get(index)
        if t is None:
            self.fail(record, f"transfer {index} is not in flight")
        assert t is not None
        if t.issued >= len(t.plan):
            self.fail(record, f"every burst of transfer {index} was sent")
        if (address, beats) != t.plan[t.issued]:
            self.fail(
                record,
                f"expected address {t.plan[t.issued][0]:#x} and {t.plan[t.issued][1]} beats, the "
                f"bus had {address:#x} and {beats}",
            )
        # A promotion counts from the cycle after it.
        prefetch = t.prefetch or t.promoted == record.cycle
        self.expect(record, expert=index, flag=int(prefetch), data=address)
        # Demands go first, in the order in which they became demands. An address may stand on the
        # bus since the handshake before it, and a new demand takes a few cycles to get there.
        for first in self.demand_order:
            if first is t:
                break
            if self.has_bursts(first) and first.demanded + self.DEMAND_LEAD < self.last_burst:
                self.fail(record, f"the bursts of this demand come first: {first}")
        self.last_burst = record.cycle
        t.issued += 1
        t.owed.append(beats)
        if t.cancelled and t.ended:
            self.ended.remove(t)
            t.ended = None
        owed = sum(len(x.owed) for x in self.transfers.values())
        if owed > self.config.max_outstanding:
            self.fail(record, f"{owed} bursts are on their way")
        if t.prefetch and self.prefetch_owed() > self.config.prefetch_outstanding:
            self.fail(record, f"{self.prefetch_owed()} prefetch bursts are on their way")
        self.count("prefetch_bursts" if prefetch else "demand_bursts")

    def _last_beat(self, record: Record) -> None:
        _, index, resp = self.handshake(record, "R")
        self.expect(record, expert=index, flag=resp)
        t = self.transfers.get(index)
        if t is None or not t.owed:
            self.fail(record, f"transfer {index} is owed nothing")
        assert t is not None
        beats = t.owed.popleft()
        self.count("last_beats")
        self.count("beats", beats)
        t.failed |= resp >= 2
        self.settle(t, record.cycle)

    def _retry(self, record: Record) -> None:
        t = self.transfers.get(record.expert)
        if t is None or t.ended != Kind.RETRY:
            self.fail(record, "this transfer has no reason to start again")
        assert t is not None
        self.expect(record, expert=t.index)
        self.ended.remove(t)
        t.ended, t.failed, t.issued = None, False, 0
        t.addressed = t.written = 0
        t.retries += 1
        t.since = t.demanded = record.cycle
        self.prefetch_retried |= t.prefetch
        if not t.prefetch:
            self.demand_order.remove(t)
            self.demand_order.append(t)
        self.count("retries")

    def _fill_done(self, record: Record) -> None:
        t = self.next_ended(record, record.data)
        self.expect(record, layer=t.layer, expert=t.expert, slot=t.slot, data=t.index)
        if self.fills is not None and t.plan and not self.filled(t, record.cycle):
            self.fail(record, "its last beat has not been put into the buffer")
        state = Lane.READY_UNUSED if t.prefetch else Lane.PINNED
        self.buffer.lane[t.layer, t.expert] = state
        self.mirror[record.layer, record.expert] = state
        self.pins[t.slot] = t.promised
        self.grants.extend([(t.layer, t.expert, t.slot, 0)] * t.promised)
        if t.layer == self.latest:
            self.disproved.discard(t.expert)
        self.count("filled")
        self.forget(t)

    def _drained(self, record: Record) -> None:
        t = self.next_ended(record, record.data)
        self.expect(record, slot=t.slot, data=t.index)
        self.free_slot(t)
        self.count("drained")
        self.forget(t)

    def _error(self, record: Record) -> None:
        t = self.next_ended(record, record.data)
        self.fail_load(record, t)
        self.free_slot(t)
        self.count("errors")

    def _watchdog(self, record: Record) -> None:
        t = self.transfers.get(record.data)
        if t is None:
            self.fail(record, f"transfer {record.data} is not in flight")
        assert t is not None
        self.fail_load(record, t)
        self.quarantined.add(t.slot)
        if self.behind_axi:
            self.lost[t.index] = t
        self.count("timeouts")

    def fail_load(self, record: Record, t: Transfer) -> None:
        """A load was given up: its demands get grants with the error flag."""
        self.expect(record, layer=t.layer, expert=t.expert, slot=t.slot, data=t.index)
        if not t.cancelled:
            self.buffer.lane[t.layer, t.expert] = Lane.NONE
            self.buffer.slot[t.layer, t.expert] = -1
            self.mirror[t.layer, t.expert] = Lane.NONE
            if t.layer == self.latest:
                self.disproved.discard(t.expert)
        self.grants.extend([(t.layer, t.expert, 0, 1)] * t.promised)
        self.forget(t)

    def _grant(self, record: Record) -> None:
        _, layer, expert, slot, error = self.handshake(record, "grant")
        if not self.grants:
            self.fail(record, "nothing is to be granted")
        wanted = self.grants.popleft()
        if wanted != (layer, expert, slot, error):
            self.fail(record, f"expected the grant (layer, expert, slot, error) {wanted}")
        self.expect(record, layer=layer, expert=expert, slot=slot, flag=error)
        self.count("error_grants" if error else "grants")

    def releasable(self, slot: int) -> bool:
        """The slot holds a resident expert with pins."""
        place = self.occupant[slot] if slot < self.config.num_slots else None
        if place is None:
            return False
        layer, expert = place
        return (
            self.buffer.slot[layer, expert] == slot
            and self.buffer.lane[layer, expert] == Lane.PINNED
            and self.pins[slot] > 0
        )

    def _release(self, record: Record) -> None:
        _, slot = self.handshake(record, "release")
        self.expect(record, slot=slot)
        if not self.releasable(slot):
            self.fail(record, "the release is illegal")
        self.pins[slot] -= 1
        self.count("releases")
        place = self.occupant[slot]
        if self.pins[slot] == 0 and place is not None:
            layer, expert = place
            self.buffer.lane[layer, expert] = Lane.READY
            self.mirror[layer, expert] = Lane.READY

    def _register_commit(self, record: Record) -> None:
        if not self.settings:
            self.fail(record, "no register commit was requested")
        before, self.active = self.active, self.settings.popleft()
        moved = self.place() != self.place(before)
        self.expect(record, flag=int(moved))
        if moved:
            self.empty(record)
        self.buffer.quota[:] = self.active.quota
        if self.active.segments is not None:
            self.segments = self.active.segments
        self.gate_params = self.params_of_gate()
        self.threshold_due = self.active.threshold != before.threshold

    def empty(self, record: Record) -> None:
        """The slots lie elsewhere from now on: what they held is no longer resident."""
        c, b = self.config, self.buffer
        if self.transfers or self.pending:
            self.fail(record, "the slots were moved under a load")
        if any(self.pins) or any(not grant[3] for grant in self.grants):
            self.fail(record, "the slots were moved while an expert was granted")
        for slot, place in enumerate(self.occupant):
            if place is None or b.slot[place] != slot:
                continue
            b.lane[place], b.slot[place] = Lane.NONE, -1
            self.mirror[place] = Lane.NONE
            b.held[place[0]] -= 1
            self.occupant[slot] = None
            self.free.append(slot)
        self.emptied_until = record.cycle + max(c.num_layers, c.num_slots) + 4

    def _threshold(self, record: Record) -> None:
        mask = (1 << self.config.score_bits) - 1
        if self.gate_due:
            self.gate_due = False
            threshold = int(threshold_of(self.gate_params, self.gate, self.latest, 1))
            self.expect(record, layer=self.latest, flag=1, data=threshold & mask)
            return
        if not self.threshold_due:
            self.fail(record, "the threshold has not changed")
        self.threshold_due = False
        self.expect(record, data=self.active.threshold & mask)
