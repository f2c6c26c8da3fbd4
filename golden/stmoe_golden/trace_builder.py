# SPDX-License-Identifier: Apache-2.0
"""Puts a trace together from routing that arrives in any order, in little more than its arrays.

An importer hands over cells (one token in one layer) as it reads them. The arrays grow in place,
by an eighth at a time; tokens are put in order only where they did not come in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .traces import Trace, TraceError

__all__ = ["CellError", "TraceBuilder"]

FIRST = 1024
MAX_EXPERTS = 65536
MAX_LAYERS = 65536


class CellError(ValueError):
    """A cell that cannot be taken; ``field`` is what is wrong with it, ``at`` its index."""

    def __init__(self, field: str, text: str, at: int = 0) -> None:
        super().__init__(f"{field} {text}")
        self.field = field
        self.text = text
        self.at = at


class TraceBuilder:
    """Collects the cells of one or several sequences.

    Parameters
    ----------
    name : str
        The file that messages name.
    num_experts, top_k : int, optional
        Where they are known beforehand; else ``top_k`` is the first cell's, and ``num_experts``
        one more than the largest index seen.
    num_layers : int, optional
        Most layers; layers without any cell are dropped at the end either way.
    """

    def __init__(
        self,
        name: str,
        *,
        num_layers: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
    ) -> None:
        self.name = name
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.top_k = top_k
        self.count = 0
        """Tokens."""
        self._slots: dict[int, dict[int, int]] = {}
        self._sequence = np.zeros(0, np.int32)
        self._position = np.zeros(0, np.int64)
        self._phase = np.zeros(0, np.int8)
        self._token_id = np.zeros(0, np.int32)
        self._experts = np.zeros((0, 0, 0), np.uint8)
        self._seen = np.zeros((0, 0, 0), np.bool_)
        self._weights: np.ndarray | None = None
        self._no_weights = 0
        self._highest = -1

    # Growing --------------------------------------------------------------------------------

    def _reserve(self, tokens: int) -> None:
        have = len(self._sequence)
        if tokens <= have:
            return
        room = max(FIRST, tokens, have + have // 8)
        for key in ("_sequence", "_position", "_phase", "_token_id", "_experts", "_seen"):
            array = getattr(self, key)
            array.resize((room, *array.shape[1:]), refcheck=False)
        self._phase[have:] = -1
        self._token_id[have:] = -1
        if self._weights is not None:
            self._weights.resize((room, *self._weights.shape[1:]), refcheck=False)

    def _shape(self, layers: int, top_k: int) -> None:
        have = self._experts.shape[1]
        if self.top_k is None:
            self.top_k = top_k
        if layers <= have:
            return
        room = self.num_layers or max(layers, 2 * have)
        for key in ("_experts", "_seen", "_weights"):
            array = getattr(self, key)
            if array is not None:
                wider = np.zeros((len(self._sequence), room, self.top_k), array.dtype)
                wider[:, :have] = array[:, :have] if have else 0
                setattr(self, key, wider)

    # Taking cells ---------------------------------------------------------------------------

    def token(self, sequence: int, position: int) -> int:
        """The index of a token for :meth:`put`; its place in the sequence is its ``position``."""
        slots = self._slots.setdefault(sequence, {})
        slot = slots.get(position)
        if slot is None:
            slot = slots[position] = self.count
            self._reserve(slot + 1)
            self._sequence[slot], self._position[slot] = sequence, position
            self.count += 1
        return slot

    def tokens(self, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The same for arrays; neighbours that are equal cost nothing."""
        change = np.ones(len(sequence), np.bool_)
        change[1:] = (sequence[1:] != sequence[:-1]) | (position[1:] != position[:-1])
        first = np.flatnonzero(change)
        pairs = zip(sequence[first].tolist(), position[first].tolist(), strict=True)
        found = np.array([self.token(s, p) for s, p in pairs], np.int64)
        return found[np.cumsum(change) - 1]

    def note(self, slots: Any, *, phase: Any = None, token_id: Any = None) -> None:
        """Phase and token id; each must be the same for all cells of a token."""
        for key, array, value in (
            ("phase", self._phase, phase),
            ("token_id", self._token_id, token_id),
        ):
            if value is None:
                continue
            known = array[slots]
            wrong = (known >= 0) & (known != value)
            if np.any(wrong):
                at = int(np.argmax(wrong))
                raise CellError(
                    key,
                    f"is {np.atleast_1d(value)[at if np.ndim(value) else 0]}, but the same token "
                    f"had {np.atleast_1d(known)[at]} before",
                    at,
                )
            array[slots] = value

    def put(
        self,
        slots: np.ndarray,
        layers: np.ndarray,
        experts: np.ndarray,
        weights: np.ndarray | None,
        ranks: np.ndarray | None = None,
    ) -> None:
        """Cells: ``experts`` [n, K], or single experts [n] with their ``ranks``.

        Raises
        ------
        CellError
            A layer or an expert is out of range, a cell came before, or K differs. Nothing of the
            call has been taken then.
        """
        if not len(slots):
            return
        if ranks is None and self.top_k not in (None, experts.shape[1]):
            raise CellError("experts", f"must be {self.top_k}, not {experts.shape[1]}")
        most = self.num_layers or MAX_LAYERS
        wrong = (layers < 0) | (layers >= most)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise CellError("layer", f"must be 0 to {most - 1}, not {layers[at]}", at)
        limit = self.num_experts or MAX_EXPERTS
        bad = (experts < 0) | (experts >= limit)
        if bad.any():
            first = np.argwhere(bad)[0]
            at = int(first[0])
            raise CellError("expert", f"must be 0 to {limit - 1}, not {experts[tuple(first)]}", at)
        self._shape(int(layers.max()) + 1, self.top_k or experts.shape[1])
        index = (slots, layers) if ranks is None else (slots, layers, ranks)
        before = self._seen[index]
        if ranks is None:
            before = before.any(axis=1)
        keys = slots * self._seen.shape[1] + layers
        if ranks is not None:
            keys = keys * self._seen.shape[2] + ranks
        if before.any() or len(np.unique(keys)) < len(keys):
            again = before.copy()
            _, kept = np.unique(keys, return_index=True)
            twice = np.ones(len(keys), np.bool_)
            twice[kept] = False
            at = int(np.argmax(again | twice))
            what = "layer" if ranks is None else "slot"
            value = layers[at] if ranks is None else f"{ranks[at]} of layer {layers[at]}"
            raise CellError(what, f"{value} came before for the same token", at)
        highest = int(experts.max())
        if highest > 255 and self._experts.dtype == np.uint8:
            self._experts = self._experts.astype(np.uint16)
        self._highest = max(self._highest, highest)
        self._experts[index] = experts
        self._seen[index] = True
        if weights is None:
            self._no_weights += 1
        else:
            if self._weights is None:
                self._weights = np.zeros(self._experts.shape, np.float32)
            self._weights[index] = weights

    # Done -----------------------------------------------------------------------------------

    def finish(self, info: dict[str, Any]) -> Trace:
        """The trace. ``info`` gets the shape, and ``model_layers`` where layers were dropped."""
        count, name = self.count, self.name
        self._slots = {}
        if self._highest < 0:
            raise TraceError(f"{name}: holds no routing; at least one cell is needed")
        for key in ("_sequence", "_position", "_phase", "_token_id", "_experts", "_seen"):
            getattr(self, key).resize((count, *getattr(self, key).shape[1:]), refcheck=False)
        if self._weights is not None:
            self._weights.resize((count, *self._weights.shape[1:]), refcheck=False)
        present = np.asarray(self._seen.all(axis=2))
        some = np.asarray(self._seen.any(axis=2))
        if (some != present).any():
            token, layer = np.argwhere(some != present)[0]
            raise TraceError(
                f"{name}: sequence {self._sequence[token]}, token {_step(self._position[token])}, "
                f"layer {layer} has {self._seen[token, layer].sum()} experts, but top_k is "
                f"{self.top_k}"
            )
        del some
        self._seen = np.zeros((0, 0, 0), np.bool_)
        arrays: dict[str, Any] = {
            "experts": self._experts,
            "sequence": self._sequence,
            "present": present,
        }
        if self._weights is not None:
            if self._no_weights:
                raise TraceError(f"{name}: some cells have weights, others none; all or none must")
            arrays["weights"] = self._weights
        for key, array in (("phase", self._phase), ("token_id", self._token_id)):
            if (array >= 0).all():
                arrays[key] = array.astype(np.uint8) if key == "phase" else array
            elif (array >= 0).any():
                token = int(np.argmax(array < 0))
                raise TraceError(
                    f"{name}: sequence {self._sequence[token]}, token "
                    f"{_step(self._position[token])} has no {key}, but others do; all or none must"
                )
        # Layers in which no token was ever routed are dense layers of the model.
        layers = np.flatnonzero(present.any(axis=0))
        if len(layers) < present.shape[1]:
            for key in ("experts", "present", "weights"):
                if key in arrays:
                    arrays[key] = arrays[key][:, layers]
        order = np.lexsort((self._position, self._sequence))
        if (order[1:] < order[:-1]).any():
            for key in arrays:
                arrays[key] = arrays[key][order]
        if arrays["present"].all():
            del arrays["present"]
        shape = {
            "num_layers": len(layers),
            "num_experts": self.num_experts or self._highest + 1,
            "top_k": self.top_k,
        }
        full = dict(info) | shape
        if self.num_experts is None:
            full["num_experts_inferred"] = True
        if layers[-1] != len(layers) - 1:
            full["model_layers"] = layers.tolist()
        sizes = full.get("expert_bytes")
        if sizes is not None:
            full["expert_bytes"] = [sizes[layer] for layer in layers]
        return Trace(info=full, **arrays)


STEP_BITS = 40
"""Of a position, below the phase: importers whose tokens are counted by phase put it above."""


def _step(position: int) -> int:
    return int(position) & ((1 << STEP_BITS) - 1)
