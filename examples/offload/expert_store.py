# SPDX-License-Identifier: Apache-2.0
"""Experts of a Hugging Face model in a memory-mapped file, and the modules that run from slots.

The file holds every expert of every MoE layer, each in one piece, so that loading one is one
read. Fast memory is a tensor of slots; a thread fills them. Which expert goes where is decided by
:class:`stmoe_golden.offload.ExpertOffload`: nothing here chooses anything.
"""

from __future__ import annotations

import copy
import heapq
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stmoe_golden.offload import ExpertOffload, Load
from stmoe_golden.trace_capture import Router, find_routers


class ExpertFile:
    """All experts of a model in one file, ``[layer][expert]``, memory-mapped."""

    def __init__(self, path: Path, model: Any, routers: list[Router]) -> None:
        modules = dict(model.named_modules())
        self.names = [router.name.rpartition(".")[0] + ".experts" for router in routers]
        self.modules = [modules[name] for name in self.names]
        first = self.modules[0]
        self.parameters = [
            (name, tuple(value.shape[1:]), value.dtype) for name, value in first.named_parameters()
        ]
        self.num_experts = routers[0].num_experts
        self.expert_bytes = sum(
            math.prod(shape) * dtype.itemsize for _, shape, dtype in self.parameters
        )
        with path.open("wb") as file:
            for module in self.modules:
                values = [value.detach() for _, value in module.named_parameters()]
                for expert in range(self.num_experts):
                    for value in values:
                        one = value[expert].contiguous().view(torch.uint8)
                        file.write(one.numpy().tobytes())
        self.total_bytes = path.stat().st_size
        self.descriptor = os.open(path, os.O_RDONLY)
        shape = (len(self.modules), self.num_experts, self.expert_bytes)
        self.map = np.memmap(path, np.uint8, "r", shape=shape)

    def read(self, layer: int, expert: int, into: np.ndarray) -> None:
        """Copy one expert; its pages are then given up, so that the next read is a real one."""
        into[:] = self.map[layer, expert]
        at = (layer * self.num_experts + expert) * self.expert_bytes
        os.posix_fadvise(self.descriptor, at, self.expert_bytes, os.POSIX_FADV_DONTNEED)


class Loader(threading.Thread):
    """Fills slots from the file: demand before prefetch, and each in the order it came."""

    def __init__(self, file: ExpertFile, slots: int, link_bytes_per_s: float | None) -> None:
        super().__init__(daemon=True)
        self.file = file
        self.slots = torch.empty((slots, file.expert_bytes), dtype=torch.uint8)
        self.bytes_per_s = link_bytes_per_s
        self.busy_s = 0.0
        self._queue: list[tuple[bool, int, Load]] = []
        self._count = 0  # no two entries have the same, so loads are never compared
        self._done: set[Load] = set()
        self._changed = threading.Condition()
        self.start()

    def submit(self, load: Load) -> None:
        """Queue a load."""
        with self._changed:
            self._count += 1
            heapq.heappush(self._queue, (load.prefetch, self._count, load))
            self._changed.notify_all()

    def promote(self, load: Load) -> None:
        """A prefetch is now needed: to the front, if it still waits."""
        with self._changed:
            self._queue = [
                (prefetch and waiting != load, count, waiting)
                for prefetch, count, waiting in self._queue
            ]
            heapq.heapify(self._queue)

    def drop(self, load: Load) -> bool:
        """Take a load out of the queue; false when its reading has begun."""
        with self._changed:
            before = len(self._queue)
            self._queue = [entry for entry in self._queue if entry[2] != load]
            heapq.heapify(self._queue)
            return len(self._queue) < before

    def take_done(self) -> set[Load]:
        """Loads that have arrived since the last call."""
        with self._changed:
            done, self._done = self._done, set()
            return done

    def wait(self, load: Load) -> None:
        """Until a load has arrived."""
        with self._changed:
            self._changed.wait_for(lambda: load in self._done)

    def run(self) -> None:
        """The thread."""
        slots = self.slots.numpy()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                _, _, load = heapq.heappop(self._queue)
            began = time.perf_counter()
            self.file.read(load.layer, load.expert, slots[load.slot])
            if self.bytes_per_s:
                rest = self.file.expert_bytes / self.bytes_per_s + began - time.perf_counter()
                if rest > 0:
                    time.sleep(rest)
            self.busy_s += time.perf_counter() - began
            with self._changed:
                self._done.add(load)
                self._changed.notify_all()


class OffloadedExperts(torch.nn.Module):
    """Takes the place of a layer's experts module, and computes exactly what that would.

    Experts run one at a time, in ascending order, by the original module's own code on the slot
    they are in: the same operations in the same order, so the same bits.
    """

    def __init__(self, runtime: OffloadedModel, layer: int, original: torch.nn.Module) -> None:
        super().__init__()
        self.runtime, self.layer = runtime, layer
        shell = copy.copy(original)
        shell.__dict__ = dict(original.__dict__)
        shell._parameters = {}
        shell.num_experts = 1
        self.__dict__["shell"] = shell  # not a submodule: it owns nothing

    def _run(self, expert: int, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slot = self.runtime.cache.slot(self.layer, expert)
        data, at = self.runtime.loader.slots[slot], 0
        for name, shape, dtype in self.runtime.file.parameters:
            size = math.prod(shape) * dtype.itemsize
            self.shell.__dict__[name] = data[at : at + size].view(dtype).view(1, *shape)
            at += size
        only = torch.zeros((len(hidden), 1), dtype=torch.long)
        return self.shell(hidden, only, weights)

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As the original: hidden [N, H], experts [N, K] and weights [N, K]."""
        output = torch.zeros_like(hidden)

        def run(expert: int) -> None:
            token, rank = torch.where(index == expert)
            # As the original finds them: by rank first, then by token.
            order = torch.argsort(rank * len(index) + token)
            token, rank = token[order], rank[order]
            part = self._run(expert, hidden[token], weights[token, rank, None])
            output.index_add_(0, token, part.to(output.dtype))

        heavy = index.gather(1, weights.argsort(dim=1, descending=True, stable=True))
        self.runtime.with_experts(self.layer, heavy, run)
        return output


class OffloadedModel:
    """A Hugging Face MoE model whose experts are in a file, and ``slots`` of them in memory.

    Parameters
    ----------
    model : PreTrainedModel
        With a router and stacked ``experts`` in each MoE layer, and its eager experts. It is
        changed in place: its experts are freed.
    path : Path
        The file to write.
    slots : int
        Experts that fit in memory.
    prefetch : bool
        Without it everything is loaded on demand, with the same rule of what to evict.
    link_bytes_per_s : float, optional
        A load takes at least as long as it would on such a link.
    """

    def __init__(
        self,
        model: Any,
        path: Path,
        slots: int,
        *,
        prefetch: bool = True,
        link_bytes_per_s: float | None = None,
    ) -> None:
        routers = find_routers(model)
        self.model, self.prefetch = model, prefetch
        self.file = ExpertFile(path, model, routers)
        self.cache = ExpertOffload(
            len(routers), routers[0].num_experts, routers[0].top_k, slots=slots
        )
        self.loader = Loader(self.file, self.cache.num_slots, link_bytes_per_s)
        self.waited_s = 0.0
        self._prompt: list[torch.Tensor] = []
        for layer, name in enumerate(self.file.names):
            parent, _, last = name.rpartition(".")
            setattr(
                model.get_submodule(parent), last,
                OffloadedExperts(self, layer, self.file.modules[layer]),
            )  # fmt: skip
        self.file.modules.clear()
        self._last = len(routers) - 1
        self._fresh = True

    def new_sequence(self) -> None:
        """The next forward pass begins another sequence."""
        self._fresh = True

    def _arrived(self) -> None:
        for load in self.loader.take_done():
            self.cache.loaded(load)

    def with_experts(self, layer: int, index: torch.Tensor, run: Callable[[int], None]) -> None:
        """Have the experts of some tokens [N, K] in slots, and run each, in ascending order."""
        if len(index) > 1:
            self._prefill(layer, index, run)
            return
        if layer == 0:
            self.cache.token(new_sequence=self._fresh)
            self._fresh = False
        self._arrived()
        plan = self.cache.route(layer, index[0].tolist())
        for load in plan.stale:
            if self.loader.drop(load):
                self.cache.dropped(load)
        for load in plan.coming:
            self.loader.promote(load)
        for load in plan.loads:
            self.loader.submit(load)
        if self.prefetch:
            for load in self.cache.prefetch():
                self.loader.submit(load)
        late = {load.expert: load for load in [*plan.loads, *plan.coming]}
        for expert in sorted(plan.experts):
            if expert in late:
                self._wait(late[expert])
            run(expert)
        self._arrived()

    def _wait(self, load: Load) -> None:
        began = time.perf_counter()
        self.loader.wait(load)
        self.waited_s += time.perf_counter() - began

    def _prefill(self, layer: int, index: torch.Tensor, run: Callable[[int], None]) -> None:
        """All tokens of a prompt at once: their experts in groups of K, then what they teach."""
        used, top_k = index.unique().tolist(), index.shape[1]
        for start in range(0, len(used), top_k):
            self._arrived()
            plan = self.cache.route(layer, used[start : start + top_k], learn=False)
            for load in plan.loads:
                self.loader.submit(load)
            for load in [*plan.loads, *plan.coming]:
                self._wait(load)
            for expert in plan.experts:
                run(expert)
            self._arrived()
        self._prompt.append(index)
        if layer == self._last:
            for token in range(len(index)):
                self.cache.token(new_sequence=self._fresh)
                self._fresh = False
                for m, sets in enumerate(self._prompt):
                    self.cache.observe(m, sets[token].tolist())
            self._prompt.clear()
