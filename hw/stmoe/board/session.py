# SPDX-License-Identifier: Apache-2.0
"""A board in use: its registers, its settings, and a trace that is replayed on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stmoe.board.host_link import BoardError, HostLink
from stmoe.board.messages import (
    Answer,
    MessageReader,
    StreamError,
    read_command,
    trace_commands,
    write_command,
)
from stmoe.harness.board_protocol import (
    SIGNED_BUSES,
    Flag,
    HarnessRegister,
    config_hash,
    signature_of,
)
from stmoe.harness.content_checker import AddressMap
from stmoe.harness.monitor import Monitor
from stmoe.harness.run_log import Burst, Grant, LastBeat, Release, Route, RunLog, Token
from stmoe.payloads import CYCLE_BITS, EventKind, axi4_read_signature, grant_layout
from stmoe.register_map import COUNTERS, registers
from stmoe_golden.checker import Segment, Settings, burst_plan
from stmoe_golden.config import FRACTION_BITS, NUM_SEGMENTS, EngineConfig
from stmoe_golden.traces import Trace

__all__ = ["Board", "BusSum", "Run", "Times"]

WIDE = ("CYCLE", "FILL_BEATS", "R_BEATS", "LINK_CYCLES", "WAIT_CYCLES")
"""Totals of 40 bits."""


@dataclass(frozen=True)
class Times:
    """How fast everything around the engine is, in cycles."""

    attention: int
    expert: int
    latency: int
    bandwidth: tuple[int, int] = (1, 1)
    """Beats in so many cycles."""
    seed: int = 0
    """Of random stalls of grants and releases; 0 for none."""


@dataclass(frozen=True)
class BusSum:
    """What a bus had: how many handshakes, and their signature."""

    handshakes: int
    signature: int

    def __str__(self) -> str:
        return f"{self.handshakes:,} handshakes with signature {self.signature:016x}"


@dataclass
class Run:
    """A replay that has come to its end, good or bad.

    ``log`` is what the events say; ``buses`` what the harness's monitors saw, by name; ``error``
    says why the run did not come to rest.
    """

    log: RunLog
    buses: dict[str, BusSum]
    faults: list[str]
    error: str | None = None


class Board:
    """A board whose configuration is known.

    Parameters
    ----------
    link : :class:`HostLink`
    config : EngineConfig
        What the board must have been built for.
    """

    def __init__(self, link: HostLink, config: EngineConfig) -> None:
        self.link = link
        self.config = config
        self.addresses = AddressMap(config)
        last = self.addresses.base(config.num_layers) - 1
        self.reader = MessageReader(config, last.bit_length())
        self.map = {register.name: register for register in registers(config)}

    def open(self) -> None:
        """Begin a session; :class:`BoardError` when the board is another."""
        status = self.link.open()
        if status.config != config_hash(self.config):
            raise BoardError(
                f"{self.link.name}: the board has another configuration "
                f"({status.config:#010x}, not {config_hash(self.config):#010x})"
            )

    # Registers --------------------------------------------------------------------------------

    def _turn(self, wait: float = 0.01) -> None:
        self.link.turn(wait)
        try:
            self.reader.feed(self.link.receive())
        except StreamError as error:
            raise BoardError(f"{self.link.name}: {error}") from None

    def _answers(self, what: list[str], commands: Iterable[bytes]) -> list[Answer]:
        """Send commands and wait for the answers to all of them."""
        self.link.send(b"".join(commands))
        moved, seen = time.monotonic(), 0
        while len(self.reader.answers) < len(what):
            self._turn()
            if len(self.reader.answers) != seen or self.link.unsent:
                moved, seen = time.monotonic(), len(self.reader.answers)
            elif time.monotonic() - moved > self.link.timeout:
                raise BoardError(f"{self.link.name}: no answer to {what[seen]}")
        got = [self.reader.answers.popleft() for _ in what]
        for name, answer in zip(what, got, strict=True):
            if answer.response:
                raise BoardError(f"{self.link.name}: {name} answers {answer.response}")
        return got

    def write(self, *writes: tuple[str, int, int]) -> None:
        """Write registers, in order: (name for messages, address, value)."""
        self._answers(
            [f"a write of {name}" for name, _, _ in writes],
            (write_command(address, value) for _, address, value in writes),
        )

    def read(self, *addresses: tuple[str, int]) -> list[int]:
        """Read registers, in order: (name for messages, address)."""
        answers = self._answers(
            [f"a read of {name}" for name, _ in addresses],
            (read_command(address) for _, address in addresses),
        )
        return [answer.data or 0 for answer in answers]

    def _engine(self, name: str, value: int, *index: int) -> tuple[str, int, int]:
        return name, self.map[name].at(*index), value

    def status_bit(self, name: str) -> bool:
        """A bit of the engine's STATUS."""
        (value,) = self.read(("STATUS", self.map["STATUS"].at()))
        return bool(value & self.map["STATUS"].field(name).mask)

    def program(self, *, threshold: int | None = None, quota: int | None = None) -> list[Settings]:
        """Tell the engine where experts lie and what settings are given, in one commit.

        Parameters
        ----------
        threshold : int or None
            Quarter units.
        quota : int or None
            Of every layer.

        Returns
        -------
        list of Settings
            One for each commit.
        """
        config, addresses = self.config, self.addresses
        writes = []
        for layer in range(config.num_layers):
            base = addresses.base(layer)
            writes += [
                self._engine("SEGMENT_BASE_LOW", base, layer, 0),
                self._engine("SEGMENT_BASE_HIGH", base >> 32, layer, 0),
                self._engine("SEGMENT_STRIDE", addresses.stride, layer, 0),
                self._engine("SEGMENT_BEATS", addresses.beats, layer, 0),
            ]
            for segment in range(1, NUM_SEGMENTS):
                writes.append(self._engine("SEGMENT_BEATS", 0, layer, segment))
        self.write(*writes)
        self._wait("the tables to be cleared", lambda: self.status_bit("initialised"))
        writes = []
        if threshold is not None:
            writes.append(self._engine("THRESHOLD", threshold))
        if quota is not None:
            writes += [self._engine("QUOTA", quota, i) for i in range(config.num_layers)]
        self.write(*writes, self._engine("COMMIT", 1))
        if self.status_bit("commit_refused"):
            low, high = -1 << (config.score_bits - 1), (1 << (config.score_bits - 1)) - 1
            most = min(config.num_experts, (config.num_slots - config.top_k) // config.num_layers)
            raise BoardError(
                f"{self.link.name}: the engine refuses the settings: a quota may be 0 to {most}, "
                f"not {config.quota if quota is None else quota}, and a threshold "
                f"{low >> FRACTION_BITS} to {high >> FRACTION_BITS}"
            )
        self._wait("the settings to be taken", lambda: not self.status_bit("commit_pending"))
        if threshold is None:
            threshold = config.threshold << FRACTION_BITS
        quotas = [config.quota if quota is None else quota] * config.num_layers
        return [Settings(threshold, quotas)]

    def _wait(self, what: str, over: Callable[[], bool]) -> None:
        end = time.monotonic() + self.link.timeout
        while not over():
            if time.monotonic() > end:
                raise BoardError(f"{self.link.name}: gave up waiting for {what}")

    # Replay -----------------------------------------------------------------------------------

    def replay(
        self,
        trace: Trace,
        times: Times,
        *,
        settings: list[Settings],
        progress: Callable[[int, int], Any] = lambda tokens, records: None,
    ) -> Run:
        """Replay a trace and read everything back.

        ``progress`` is called now and then with the tokens that have finished and the records
        that have come.
        """
        config, link, reader = self.config, self.link, self.reader
        load = times.latency + self.addresses.beats * -(-times.bandwidth[1] // times.bandwidth[0])
        layer = times.attention + config.top_k * times.expert
        quiet = 512 + 4 * times.latency + 4 * -(-times.bandwidth[1] // times.bandwidth[0])
        stall = 20_000 + 8 * (layer + (config.top_k + 2) * load) + quiet
        values = {
            HarnessRegister.ATTENTION_CYCLES: times.attention,
            HarnessRegister.EXPERT_CYCLES: times.expert,
            HarnessRegister.JITTER: times.seed,
            HarnessRegister.STALL_LIMIT: stall,
            HarnessRegister.QUIET_CYCLES: quiet,
            HarnessRegister.MEMORY_LATENCY: times.latency,
            HarnessRegister.MEMORY_BEATS_NUMERATOR: times.bandwidth[0],
            HarnessRegister.MEMORY_BEATS_DENOMINATOR: times.bandwidth[1],
            HarnessRegister.TOKENS: trace.num_tokens,
        }
        self.write(*((r.name, r.address, value) for r, value in values.items()))
        new = trace.starts().astype(np.uint8)
        token_id = np.zeros(trace.num_tokens, np.int32)
        if trace.token_id is not None:
            token_id = trace.token_id
        link.send(trace_commands(trace.experts, new, token_id))
        error = None
        while True:
            self._turn()
            status = link.status
            assert status is not None
            progress(status.tokens, reader.records)
            if status.flags & Flag.STUCK:
                error = (
                    f"the engine made no progress for {stall:,} cycles, after {status.tokens:,} of "
                    f"{trace.num_tokens:,} tokens"
                )
                break
            if status.flags & Flag.QUIET and not link.unsent:
                break
        log = RunLog(config, filled=None, settings=settings)
        run = Run(log, {}, [], error)
        if error is None:
            self._read_back(run)
        else:
            # The trace stands in the way of more commands; but what was recorded can be judged.
            self._drain()
        reader.stamp(1 << CYCLE_BITS)
        self._fill_in(log, trace, new, token_id)
        return run

    def _drain(self) -> None:
        end = time.monotonic() + self.link.timeout / 2
        while time.monotonic() < end:
            before = self.reader.records
            self._turn()
            if self.reader.records != before:
                end = time.monotonic() + self.link.timeout / 2

    def _read_back(self, run: Run) -> None:
        """Counters, totals and signatures, and the records that are still on their way."""
        counter = self.map["COUNTER"]
        wanted = [(f"counter {c.name}", counter.at(i)) for i, c in enumerate(COUNTERS)]
        run.log.counters = {
            c.name: value for c, value in zip(COUNTERS, self.read(*wanted), strict=True)
        }

        def at(index: int, name: str) -> tuple[str, int]:
            return name, HarnessRegister.TOKENS.address + 4 * index

        wanted = []
        for name in WIDE:
            first = int(HarnessRegister[name])
            # The high word before and after, in case the low one turns over between.
            wanted += [at(first + 1, name), at(first, name), at(first + 1, name)]
        words = self.read(*wanted)
        for i, name in enumerate(WIDE):
            before, low, after = words[3 * i : 3 * i + 3]
            high = after if low < 1 << 31 else before
            run.log.totals[name.lower()] = high << 32 | low
        violations, faults, records = self.read(
            at(HarnessRegister.VIOLATIONS, "VIOLATIONS"),
            at(HarnessRegister.FAULTS, "FAULTS"),
            at(HarnessRegister.RECORDS, "RECORDS"),
        )
        run.log.totals["violations"] = violations
        names = list(Monitor(self.config).faults)
        run.faults = [name for i, name in enumerate(names) if faults >> i & 1]
        wanted = []
        for i, name in enumerate(SIGNED_BUSES):
            first = HarnessRegister.SIGNATURES + 4 * i
            wanted += [at(first + part, f"signature of {name}") for part in range(3)]
        words = self.read(*wanted)
        for i, name in enumerate(SIGNED_BUSES):
            low, high, count = words[3 * i : 3 * i + 3]
            run.buses[name] = BusSum(count, high << 32 | low)
        end = time.monotonic() + self.link.timeout
        while self.reader.records < records:
            before = self.reader.records
            self._turn()
            if self.reader.records != before:
                end = time.monotonic() + self.link.timeout
            elif time.monotonic() > end:
                raise BoardError(
                    f"{self.link.name}: {records - self.reader.records} of {records} records have "
                    "never come"
                )
        if self.reader.records != records:
            raise BoardError(
                f"{self.link.name}: {self.reader.records} records have come of {records}"
            )

    def _fill_in(self, log: RunLog, trace: Trace, new: np.ndarray, token_id: np.ndarray) -> None:
        """What the monitors of a simulation would have seen: tokens and routes are the trace's,
        lengths of bursts golden's, cycles and the rest what the records say."""
        config, addresses = self.config, self.addresses
        lengths = {
            address: beats
            for layer in range(config.num_layers)
            for expert in range(config.num_experts)
            for address, beats in burst_plan(
                [Segment(addresses.base(layer), addresses.stride, addresses.beats)],
                expert,
                config.beat_bytes,
                config.max_burst,
            )
        }
        tokens = zip(new.tolist(), token_id.tolist(), strict=True)
        routes = (
            (layer, tuple(experts))
            for sets in trace.experts.tolist()
            for layer, experts in enumerate(sets)
        )
        log.events = self.reader.events
        for e in log.events:
            if e.kind == EventKind.TOKEN:
                first, name = next(tokens, (0, 0))
                log.tokens.append(Token(e.cycle, first, name))
            elif e.kind == EventKind.ROUTE:
                layer, experts = next(routes, (0, (0,) * config.top_k))
                log.routes.append(Route(e.cycle, layer, experts))
            elif e.kind == EventKind.GRANT:
                log.grants.append(Grant(e.cycle, e.layer, e.expert, e.slot, e.flag & 1))
            elif e.kind == EventKind.RELEASE:
                log.releases.append(Release(e.cycle, e.slot))
            elif e.kind == EventKind.BURST:
                length = lengths.get(e.data, 0)
                log.ar.append(Burst(e.cycle, e.expert, e.data, length))
            elif e.kind == EventKind.LAST_BEAT:
                log.last_beats.append(LastBeat(e.cycle, e.expert, e.flag))
        if log.releases:
            log.cycles = log.releases[-1].cycle


def expected_sums(log: RunLog) -> dict[str, BusSum]:
    """What the harness's monitors must have seen for the events to be the whole truth."""
    config = log.config
    grant = grant_layout(config)
    ar = axi4_read_signature(config).members["ar"].signature.members["payload"].shape
    eb = config.expert_bits

    def words(name: str) -> Iterator[int]:
        if name == "token":
            for t in log.tokens:
                yield t.cycle | (t.new_sequence | (t.token_id & 0xFFFF_FFFF) << 1) << CYCLE_BITS
        elif name == "route":
            for r in log.routes:
                packed = sum(e << eb * rank for rank, e in enumerate(r.experts))
                yield r.cycle | (r.layer | packed << config.layer_bits) << CYCLE_BITS
        elif name == "grant":
            layer, expert, slot = (grant[n].width for n in ("layer", "expert", "slot"))
            for g in log.grants:
                rest = (g.slot | g.error << slot) << expert
                yield g.cycle | (g.layer | (g.expert | rest) << layer) << CYCLE_BITS
        elif name == "release":
            for x in log.releases:
                yield x.cycle | x.slot << CYCLE_BITS
        elif name == "ar":
            id_bits, address_bits = ar["id"].width, ar["addr"].width
            for a in log.ar:
                # AXI counts a burst's beats from 0.
                rest = a.address | (a.length - 1 & 0xFF) << address_bits
                yield a.cycle | (a.id | rest << id_bits) << CYCLE_BITS
        else:
            for b in log.last_beats:
                yield b.cycle | (b.id | b.resp << ar["id"].width) << CYCLE_BITS

    result = {}
    for name in SIGNED_BUSES:
        listed = list(words(name))
        result[name] = BusSum(len(listed), signature_of(listed))
    return result
