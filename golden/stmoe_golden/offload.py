# SPDX-License-Identifier: Apache-2.0
"""The engine's decisions as a library, for a runtime that keeps experts outside fast memory.

:class:`ExpertOffload` is told which experts each token uses, and answers what to load into which
slot, what that evicts, and what to load ahead. It moves no data itself. The decisions are those of
:mod:`stmoe_golden.predictor`, :mod:`stmoe_golden.buffer` and :mod:`stmoe_golden.confidence`, the
specification of the hardware::

    cache = ExpertOffload(num_layers=16, num_experts=64, top_k=8, slots=272)
    for token in tokens:                        # decoding, one sequence
        cache.token(new_sequence=token.first)
        for layer in range(16):
            plan = cache.route(layer, router(layer, token))     # experts, heaviest first
            for load in plan.loads:                             # missing: load now
                read_expert(load.layer, load.expert, into=load.slot)
                cache.loaded(load)
            for load in cache.prefetch():                       # the next layer's, if it pays
                start_reading(load)                             # then, once: cache.loaded(load)
            compute(layer, [cache.slot(layer, e) for e in plan.experts])

examples/offload drives a Hugging Face model with it, from a memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .buffer import BufferState, Lane, admits, new_buffer, victim
from .confidence import gate_params, new_gate, note_bad, note_event, note_good, threshold_of
from .config import FRACTION_BITS, EngineConfig
from .predictor import Predictor

__all__ = ["ExpertOffload", "Load", "OffloadError", "Plan", "compile_decisions"]


class OffloadError(ValueError):
    """A call that breaks the contract; the message says what is allowed."""


@dataclass(frozen=True)
class Load:
    """Bring an expert into a slot; what was in it is gone from when the load is given out."""

    layer: int
    expert: int
    slot: int
    evicts: tuple[int, int] | None = None
    """Layer and expert that were in the slot, where it was not free."""
    prefetch: bool = False


@dataclass(frozen=True)
class Plan:
    """What one routing decision needs; each expert of it is in exactly one of the three lists."""

    experts: list[int]
    """As they were given."""
    ready: list[int]
    """Already in their slots."""
    coming: list[Load]
    """Prefetched, but not there yet: wait for :meth:`ExpertOffload.loaded` of these."""
    loads: list[Load]
    """Missing: load these now, before any prefetch."""
    stale: list[Load] = field(default_factory=list)
    """Prefetches for this layer that turned out wrong and are still not there. One whose reading
    has not begun can be dropped: then tell :meth:`ExpertOffload.dropped`."""


class ExpertOffload:
    """Decides what to load and what to evict, for one sequence at a time.

    Parameters
    ----------
    num_layers, num_experts, top_k : int
        Of the model: its MoE layers, the experts of each, and how many a token uses.
    slots : int
        Experts that fast memory holds, at least ``2 * top_k``. Each layer keeps an equal share
        of what is beyond ``2 * top_k`` (at most ``num_experts``), and the rest is shared.
    config : EngineConfig, optional
        Instead of all of the above: thresholds, margins, depth and so on are then its own.

    The order of calls is: :meth:`token`; then for each layer :meth:`route`, then
    :meth:`prefetch` if there is bandwidth for it. :meth:`loaded` whenever something has arrived,
    and for everything in ``plan.loads`` and ``plan.coming`` before the next :meth:`route`. The
    experts of a plan stay where they are until the next :meth:`route` of any layer.

    Not thread-safe: call it from one thread, and let others only move the data.
    """

    def __init__(
        self,
        num_layers: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        slots: int | None = None,
        *,
        config: EngineConfig | None = None,
        ordered: bool = True,
    ) -> None:
        if config is None:
            if None in (num_layers, num_experts, top_k, slots):
                raise OffloadError(
                    "num_layers, num_experts, top_k and slots must be given, or a config"
                )
            assert num_layers and num_experts and top_k and slots
            if not 2 * top_k <= slots <= 4096:
                raise OffloadError(f"slots must be {2 * top_k} (2 * top_k) to 4096, not {slots}")
            quota = min(num_experts, (slots - 2 * top_k) // num_layers)
            config = EngineConfig(
                num_layers=num_layers,
                num_experts=num_experts,
                top_k=top_k,
                quota=quota,
                staging=min(1024, slots - quota * num_layers),
            )
        self.config = config
        self.num_slots = config.num_slots
        """Slots in use: what was asked for, but for a remainder that no rule can use."""
        self._predictor = Predictor(config, ordered=ordered)
        self._buffer: BufferState = new_buffer(config)
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._owner: list[tuple[int, int] | None] = [None] * self.num_slots
        self._loading: dict[tuple[int, int], Load] = {}
        self._pinned: list[tuple[int, int]] = []
        self._gate_params = gate_params(config)
        self._gate = new_gate(config.num_layers)
        self._latest = 0
        self._set = np.zeros(config.num_experts, np.bool_)
        self.counters = {
            "needed": 0, "ready": 0, "coming": 0, "missing": 0, "prefetches": 0, "useful": 0,
            "useless": 0, "dropped": 0,
        }  # fmt: skip
        """Experts needed, and of them ready, coming and missing; prefetches given out, and of
        them those whose expert was needed, those evicted unused, and those dropped."""

    # What it is told ------------------------------------------------------------------------

    def token(self, new_sequence: bool = False) -> None:
        """A token begins; the first of a sequence has no history."""
        self._predictor.token(new_sequence)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Learn from a set that needs nothing loaded: a token of the prompt, after the fact."""
        self._predictor.route(layer, self._checked(layer, experts, exact=True))

    def route(self, layer: int, experts: Sequence[int], *, learn: bool = True) -> Plan:
        """The router has decided: ``experts`` of ``layer``, heaviest first.

        With ``learn`` false there may be fewer than K, and only the buffer is looked at: for a
        prompt, whose tokens use more experts of a layer than fast memory holds, in groups.
        """
        chosen = self._checked(layer, experts, exact=learn)
        lacking = [key for key in self._pinned if key in self._loading]
        if lacking:
            raise OffloadError(
                f"layer {lacking[0][0]}, expert {lacking[0][1]} has not arrived: every load of a "
                "plan must be loaded() before the next route()"
            )
        lane = self._buffer.lane
        for key in self._pinned:
            lane[key] = int(Lane.READY)
        self._pinned = [(layer, int(expert)) for expert in chosen]
        self._latest = layer
        self._set[:] = False
        self._set[chosen] = True
        idle = not self._loading

        plan = Plan([int(e) for e in chosen], [], [], [])
        missing = []
        for key in self._pinned:
            state = lane[key]
            if state in (Lane.READY, Lane.READY_UNUSED):
                if state == Lane.READY_UNUSED:
                    self.counters["useful"] += 1
                    note_good(self._gate_params, self._gate, layer, False)
                plan.ready.append(key[1])
                lane[key] = int(Lane.PINNED)
            elif key in self._loading:
                self.counters["useful"] += 1
                note_good(self._gate_params, self._gate, layer, True)
                plan.coming.append(self._loading[key])
                lane[key] = int(Lane.LOADING_DEMAND)
            else:
                missing.append(key)
        for key in missing:
            load = self._place(key, demand=True)
            assert load is not None
            plan.loads.append(load)
        plan.stale.extend(
            load for key, load in self._loading.items()
            if key[0] == layer and load.prefetch and not self._set[key[1]]
        )  # fmt: skip
        for name, count in (
            ("needed", len(chosen)),
            ("ready", len(plan.ready)),
            ("coming", len(plan.coming)),
            ("missing", len(plan.loads)),
        ):
            self.counters[name] += count
        if learn:
            note_event(self._gate_params, self._gate, layer, idle)
            self._predictor.route(layer, chosen)
        return plan

    def loaded(self, load: Load) -> None:
        """The expert is in its slot."""
        key = (load.layer, load.expert)
        if self._loading.get(key) != load:
            raise OffloadError(f"layer {load.layer}, expert {load.expert} is not being loaded")
        del self._loading[key]
        state = self._buffer.lane[key]
        if key in self._pinned:
            self._buffer.lane[key] = int(Lane.PINNED)
        else:
            unused = state == Lane.LOADING_PREFETCH
            self._buffer.lane[key] = int(Lane.READY_UNUSED if unused else Lane.READY)

    def dropped(self, load: Load) -> None:
        """A prefetch has been given up before its reading began; its slot is free again."""
        key = (load.layer, load.expert)
        if self._loading.get(key) != load or key in self._pinned:
            raise OffloadError(
                f"layer {load.layer}, expert {load.expert} is no prefetch that can be dropped"
            )
        del self._loading[key]
        self._remove(key)
        note_bad(self._gate_params, self._gate, load.layer)
        self.counters["dropped"] += 1

    # What it answers ------------------------------------------------------------------------

    def prefetch(self) -> list[Load]:
        """Experts worth loading ahead, best first; each is given out once and holds its slot.

        They are those of the next layers whose score passes the threshold and is worth more than
        what they would evict. Nothing of the latest plan is ever evicted for one. Where the
        configuration is ``adaptive`` each layer's threshold rises while its prefetches turn out
        wrong.
        """
        config, gate = self.config, self._gate
        loads = []
        for distance in range(1, config.look + 1):
            layer = (self._latest + distance) % config.num_layers
            allowed = self._buffer.lane[layer] == int(Lane.NONE)
            threshold = threshold_of(self._gate_params, gate, layer, distance)
            picks = self._predictor.select(layer, allowed, threshold)
            for expert in picks:
                if len(self._loading) >= config.prefetch_slots:
                    break
                load = self._place((layer, int(expert)), demand=False)
                if load is None:
                    break
                loads.append(load)
                self.counters["prefetches"] += 1
        return loads

    def slot(self, layer: int, expert: int) -> int | None:
        """Where an expert is, or is being loaded to; None when it is neither."""
        slot = int(self._buffer.slot[layer, expert])
        return slot if slot >= 0 else None

    def resident(self) -> list[tuple[int, int] | None]:
        """Layer and expert of each slot, or None."""
        return list(self._owner)

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were ready when they were needed."""
        return self.counters["ready"] / max(1, self.counters["needed"])

    # Inside ---------------------------------------------------------------------------------

    def _checked(self, layer: int, experts: Sequence[int], *, exact: bool) -> np.ndarray:
        config = self.config
        if not 0 <= layer < config.num_layers:
            raise OffloadError(f"layer must be 0 to {config.num_layers - 1}, not {layer}")
        chosen = np.asarray(experts, np.int64)
        if chosen.ndim != 1 or (
            len(chosen) != config.top_k if exact else not 1 <= len(chosen) <= config.top_k
        ):
            allowed = config.top_k if exact else f"1 to {config.top_k}"
            raise OffloadError(f"experts must be a list of {allowed}, not {chosen.shape}")
        if chosen.min() < 0 or chosen.max() >= config.num_experts:
            raise OffloadError(
                f"experts must be 0 to {config.num_experts - 1}, not {chosen.tolist()}"
            )
        if len(np.unique(chosen)) != len(chosen):
            raise OffloadError(f"experts must differ, not {chosen.tolist()}")
        return chosen

    def _place(self, key: tuple[int, int], *, demand: bool) -> Load | None:
        """A slot for an expert: a free one, else a victim's; None where a prefetch gets none."""
        state, shift = self._predictor.state, self.config.use_shift
        bonus = self.config.admission_bonus << FRACTION_BITS
        evicts = None
        if not self._free:
            layer, expert = victim(
                self._buffer, state.score, state.use, shift, key[0], self._latest, self._set, demand
            )
            if expert < 0:
                if demand:
                    raise OffloadError("no slot can be freed: too many loads have not arrived")
                return None
            if not demand and not admits(
                state.score, state.use, shift, bonus, key[0], key[1], layer, expert
            ):
                return None
            evicts = (int(layer), int(expert))
            if self._buffer.lane[evicts] == Lane.READY_UNUSED:
                self.counters["useless"] += 1
                note_bad(self._gate_params, self._gate, evicts[0])
            self._remove(evicts)
        slot = self._free.pop()
        self._owner[slot] = key
        self._buffer.slot[key] = slot
        self._buffer.held[key[0]] += 1
        self._buffer.lane[key] = int(Lane.LOADING_DEMAND if demand else Lane.LOADING_PREFETCH)
        load = Load(key[0], key[1], slot, evicts, prefetch=not demand)
        self._loading[key] = load
        return load

    def _remove(self, key: tuple[int, int]) -> None:
        slot = int(self._buffer.slot[key])
        self._buffer.lane[key] = int(Lane.NONE)
        self._buffer.slot[key] = -1
        self._buffer.held[key[0]] -= 1
        self._owner[slot] = None
        self._free.append(slot)


def compile_decisions() -> None:
    """Have Numba compile every decision, so that the first tokens are not the slow ones.

    Seconds on a machine that has never done it, a moment on others: Numba keeps what it compiles.
    """
    cache = ExpertOffload(2, 4, 1, slots=2)
    for step in range(8):
        if step % 2 == 0:
            cache.token(new_sequence=step == 0)
        plan = cache.route(step % 2, [step % 4])
        for load in [*plan.loads, *plan.coming]:
            cache.loaded(load)
        for load in cache.prefetch():
            cache.loaded(load)
