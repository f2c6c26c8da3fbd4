# SPDX-License-Identifier: Apache-2.0
"""What the benches stand on: packed layouts, and models that share what they can."""

from __future__ import annotations

import random

import pytest
from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from simulation import build, pack, unpack
from stmoe.payloads import (
    fill_layout,
    grant_layout,
    load_layout,
    route_layout,
    segment_write_layout,
    selection_layout,
)
from stmoe_golden.config import EngineConfig

CONFIG = EngineConfig(num_layers=3, num_experts=7, top_k=3, expert_bytes=256)


class Inverters(wiring.Component):
    """So many of them, to be different designs."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__({"i": In(1), "o": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.o.eq(self.i ^ self.count % 2)
        return m


def test_verilators_own_library_is_compiled_for_the_first_model_only() -> None:
    build(Inverters(1), "inverters_1")
    log = (build(Inverters(2), "inverters_2") / "build.log").read_text()
    assert "verilator.cpp" in log  # of cocotb: it takes the model in
    assert "verilated.cpp" not in log


def any_fields(layout: data.Layout, rng: random.Random) -> dict:
    fields = {}
    for name, field in layout:
        if isinstance(field.shape, data.StructLayout):
            fields[name] = any_fields(field.shape, rng)
        elif isinstance(field.shape, data.ArrayLayout):
            width = field.width // field.shape.length
            fields[name] = [rng.getrandbits(width) for _ in range(field.shape.length)]
        else:
            low = 1 << field.width - 1 if getattr(field.shape, "signed", False) else 0
            fields[name] = rng.getrandbits(field.width) - low
    return fields


@pytest.mark.parametrize(
    "layout",
    [
        fill_layout(CONFIG),
        grant_layout(CONFIG),
        load_layout(CONFIG),
        route_layout(CONFIG),
        segment_write_layout(CONFIG),
        selection_layout(CONFIG),
    ],
)
def test_fields_are_packed_as_amaranth_does(layout: data.StructLayout) -> None:
    rng = random.Random(1)
    for _ in range(20):
        fields = any_fields(layout, rng)
        packed = pack(layout, fields)
        assert packed == layout.const(fields).as_value().value & (1 << layout.size) - 1
        if not any(isinstance(value, dict) for value in fields.values()):
            assert unpack(layout, packed) == fields
