# SPDX-License-Identifier: Apache-2.0
"""What a prefetch policy is: a few hooks, called with the routing as it happens.

A policy sees routing, token by token and layer by layer, never the time: so it can be asked ahead
of the timing model, and every policy is timed by the very same compiled loop. It answers two
questions, each with a row of E integers: how likely each expert of the next layer is needed
(:meth:`Policy.guess`), and how much each expert of the layer just run is worth keeping
(:meth:`Policy.worth`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import numpy as np

from ..confidence import GateParams
from ..config import EngineConfig
from ..traces import Trace

__all__ = ["LARGEST", "Plan", "Policy", "Retention"]

LARGEST = 1 << 29
"""What guesses and worths have to stay below."""


class Retention(IntEnum):
    """Where a load looks for the slot that it takes when none is free."""

    WALK = 0
    """The engine's walk over the layers that are over their quota (architecture section 2)."""
    LAYER = 1
    """Each layer has an equal share of all slots, and a load takes one of its own layer's."""
    GLOBAL = 2
    """The resident expert that is worth least, of any layer."""


@dataclass
class Plan:
    """What a policy answers for some consecutive tokens; an array left None is not used.

    Row n of ``guess`` and ``worth`` belongs to routing event n: token ``n // L``, layer ``n % L``.
    """

    guess: np.ndarray | None = None
    """int32 [T*L, E]: after event n, the score of each expert of the layer that comes next."""
    first: np.ndarray | None = None
    """int32 [T, E]: as each token begins, the score of each expert of layer 0."""
    worth: np.ndarray | None = None
    """int32 [T*L, E]: after event n, what each expert of its layer is worth."""
    used: np.ndarray | None = None
    """int32 [T*L]: how many experts of the event's set are used at all, at most K."""


class Policy:
    """Base of all policies: override the hooks that the policy needs.

    The hooks are called in this order, for each token: :meth:`begin`, then :meth:`guess` for layer
    0; then for each layer :meth:`route` (the layer has been routed), :meth:`worth` of that layer,
    and :meth:`guess` of the layer that comes next (after the last, layer 0 of the token to come).

    A policy that can answer faster for many tokens at once overrides :meth:`plan` instead.
    """

    name: ClassVar[str] = ""
    """What ``--policies`` calls it."""
    prefetches: ClassVar[bool] = False
    """It guesses: :meth:`guess` is asked."""
    values: ClassVar[bool] = False
    """It judges what is worth keeping: :meth:`worth` is asked. Else the latest used is."""
    retention: ClassVar[Retention] = Retention.WALK
    keeps: ClassVar[bool] = True
    """Experts stay resident after use; without it every slot is given up as its expert has run."""
    learned: ClassVar[bool] = False
    """The engine's own predictor judges what is worth keeping, and guesses too unless the policy
    :attr:`prefetches` by its own guesses."""
    compares: ClassVar[bool] = False
    """A prefetch is admitted only if it is worth more than its victim; else always."""
    threshold: int = 1
    """Lowest guess that is prefetched."""
    bonus: int = 0
    """What a prefetch counts for more than its victim, where it :attr:`compares`."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.limit = config.num_select
        """Most experts that are prefetched for one layer."""
        self.look = 1
        """Layers that are prefetched for after each event; more only with the engine's own
        predictor."""

    def prepare(self, trace: Trace) -> None:
        """Called once with the whole trace: only for what no real policy can know."""

    def gate(self) -> GateParams:
        """Which guesses are prefetched: by default those of at least :attr:`threshold`."""
        return GateParams(
            floors=(self.threshold,) * 4,
            step=0,
            levels=0,
            window=1,
            strict=0,
            lenient=0,
            late=0,
            patience=1,
            score_max=LARGEST,
        )

    def note(self, trace: Trace) -> str | None:
        """What a reader of the policy's row has to know."""
        return None

    def begin(self, new_sequence: bool, token_id: int) -> None:
        """A token begins; ``token_id`` is -1 where the trace has none."""

    def guess(self, layer: int) -> np.ndarray:
        """int [E]: score of each expert of ``layer``, which is routed next."""
        raise NotImplementedError("prefetches, but has no guess()")

    def route(self, layer: int, experts: np.ndarray) -> None:
        """The experts that the token uses in ``layer``, heaviest first."""

    def worth(self, layer: int) -> np.ndarray:
        """int [E]: what each expert of ``layer`` is worth keeping, until the layer is next run."""
        raise NotImplementedError("values, but has no worth()")

    def _row(self, hook: str, layer: int, row: object) -> np.ndarray:
        """A hook's answer, checked."""
        array = np.asarray(row)
        lanes = self.config.num_experts
        if (
            array.shape != (lanes,)
            or array.dtype.kind not in "iub"
            or np.abs(array.astype(np.int64)).max(initial=0) >= LARGEST
        ):
            raise ValueError(
                f"{hook}({layer}) must be {lanes} integers below {LARGEST}, not {row!r:.60}"
            )
        return array

    def plan(
        self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool
    ) -> Plan | None:
        """Answers for tokens ``first`` to ``last``; calls are in order. ``measured`` is false for
        the warm-up. By default the hooks are asked, one after the other."""
        if not (self.prefetches or self.values):
            return None
        layers, experts = self.config.num_layers, self.config.num_experts
        tokens = last - first
        plan = Plan()
        if self.prefetches:
            plan.guess = np.zeros((tokens * layers, experts), np.int32)
            plan.first = np.zeros((tokens, experts), np.int32)
        if self.values:
            plan.worth = np.zeros((tokens * layers, experts), np.int32)
        ids = trace.token_id
        n = 0
        for token in range(first, last):
            self.begin(bool(starts[token]), -1 if ids is None else int(ids[token]))
            if plan.first is not None:
                plan.first[token - first] = self._row("guess", 0, self.guess(0))
            for layer in range(layers):
                self.route(layer, trace.experts[token, layer].astype(np.int64))
                if plan.worth is not None:
                    plan.worth[n] = self._row("worth", layer, self.worth(layer))
                if plan.guess is not None:
                    following = (layer + 1) % layers
                    plan.guess[n] = self._row("guess", following, self.guess(following))
                n += 1
        return plan
