# SPDX-License-Identifier: Apache-2.0
"""The engine where a word that is read as it is written is rubbish.

Memories with Yosys's attribute ``no_rw_check`` promise that nothing hangs on such a read, so that
synthesis need not define it. Verilog does define it: the old word comes. Here every bit of it is
wrong instead, and the engine must be golden's all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

import pytest
from amaranth.hdl import Elaboratable, MemoryInstance, Module, Mux, Shape, Signal, Value
from amaranth.lib.memory import Memory

from simulation import run_bench, seeds
from test_engine import CONFIGS, ObservedTop

CHANGED: list[Memory] = []
"""Memories of the design under test that give rubbish."""

_whole = Memory.elaborate


def _with_rubbish(memory: Memory, platform: Any) -> Elaboratable:
    """In place of ``Memory.elaborate``."""
    if not memory.attrs.get("no_rw_check"):
        return _whole(memory, platform)
    CHANGED.append(memory)
    m = Module()
    m.submodules.instance = instance = MemoryInstance(data=memory.data, attrs=memory.attrs)
    writes = memory.write_ports
    for port in writes:
        instance.write_port(domain=port.domain, addr=port.addr, data=port.data, en=port.en)
    for port in memory.read_ports:
        assert port.domain == "sync" and not port.transparent_for
        word = Signal(Shape.cast(memory.shape).width)
        instance.read_port(domain="sync", addr=port.addr, data=word, en=port.en, transparent_for=())
        collided = Signal()
        with m.If(port.en):
            m.d.sync += collided.eq(
                reduce(or_, (write.en.any() & (write.addr == port.addr) for write in writes))
            )
        m.d.comb += Value.cast(port.data).eq(Mux(collided, ~word, word))
    return m


@pytest.fixture
def rubbish(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memories with the attribute are changed in what is elaborated meanwhile."""
    CHANGED.clear()
    monkeypatch.setattr(Memory, "elaborate", _with_rubbish)
    yield
    assert CHANGED


@pytest.mark.parametrize("name", ["tiny", "behind_axi", "ahead", "thirds"])
def test_no_word_counts_that_is_read_as_it_is_written(rubbish: None, name: str) -> None:
    run_bench(
        ObservedTop(CONFIGS[name]),
        f"engine_{name}_rubbish",
        "test_engine",
        testcase="random_traffic",
        env={"CONFIG": name, "SEEDS": json.dumps(seeds(3))},
    )
