# SPDX-License-Identifier: Apache-2.0
"""The register map: its rules, and the documents that are printed from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simulation import ROOT
from stmoe.register_map import (
    COUNTER_INDEX,
    COUNTERS,
    Access,
    Dimension,
    Field,
    Register,
    addr_width,
    c_header,
    main,
    markdown,
    quota_bits,
    registers,
)
from stmoe_golden.config import PRESETS, EngineConfig, preset

CONFIGS = {
    **PRESETS,
    "least": EngineConfig(num_layers=1, num_experts=1, top_k=1, quota=1, axi_addr_width=32),
    "most": EngineConfig(
        num_layers=256,
        num_experts=256,
        top_k=16,
        quota=15,
        axi_addr_width=48,
        expert_bytes=1 << 26,
        num_transfers=64,
        weight_bits=12,
    ),
    "behind_axi": preset("tiny").replace(buffer="axi"),
    "behind_axi_32": preset("tiny").replace(buffer="axi", axi_addr_width=32),
}

OFFSETS = {
    "IDENTITY": 0x000,
    "VERSION": 0x004,
    "CAPABILITY0": 0x008,
    "CAPABILITY1": 0x00C,
    "CAPABILITY2": 0x010,
    "CAPABILITY3": 0x014,
    "CAPABILITY4": 0x018,
    "CAPABILITY5": 0x01C,
    "SCRATCH": 0x020,
    "CONTROL": 0x024,
    "THRESHOLD": 0x028,
    "COMMIT": 0x02C,
    "STATUS": 0x030,
    "IRQ_STATUS": 0x034,
    "IRQ_ENABLE": 0x038,
    "PREDICTORS": 0x03C,
    "CYCLE_LOW": 0x040,
    "CYCLE_HIGH": 0x044,
    "TABLE_INDEX": 0x048,
    "TABLE_VALUE": 0x04C,
    "COUNTER": 0x100,
    "QUOTA": 0x400,
    "SEGMENT_BASE_LOW": 0x4000,
    "SEGMENT_BASE_HIGH": 0x4004,
    "SEGMENT_STRIDE": 0x4008,
    "SEGMENT_BEATS": 0x400C,
}
"""Software is built against these: a change here needs a new major version."""

PLACE_OFFSETS = {"BUFFER_BASE_LOW": 0x060, "BUFFER_BASE_HIGH": 0x064, "SLOT_STRIDE": 0x068}
"""Those that only a buffer behind AXI has."""


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return CONFIGS[request.param]


def test_offsets_are_the_same_in_every_configuration(config: EngineConfig) -> None:
    place = PLACE_OFFSETS if config.buffer == "axi" else {}
    assert {r.name: r.offset for r in registers(config)} == OFFSETS | place
    built = next(r for r in registers(config) if r.name == "CAPABILITY3")
    assert built.reset >> built.field("buffer_axi").lsb == bool(place)


def test_no_two_registers_share_an_address(config: EngineConfig) -> None:
    """Nor an address that an array has room for: the RTL decodes by these patterns."""
    width = addr_width(config)
    owner: dict[int, str] = {}
    table = registers(config)
    patterns = {r.name: re.compile(r.pattern(width - 2).replace("-", ".")) for r in table}
    for r in table:
        for index in r.elements():
            address = r.at(*index)
            assert address % 4 == 0 and address < 1 << width
            assert address not in owner
            owner[address] = r.name
    for address, name in owner.items():
        text = f"{address >> 2:0{width - 2}b}"
        assert [n for n, p in patterns.items() if p.fullmatch(text)] == [name]


def test_arrays_have_an_element_per_layer_segment_and_counter(config: EngineConfig) -> None:
    counts = {r.name: len(list(r.elements())) for r in registers(config)}
    assert counts["QUOTA"] == config.num_layers
    assert counts["SEGMENT_BEATS"] == 4 * config.num_layers
    assert counts["COUNTER"] == len(COUNTERS) == 30
    assert counts["STATUS"] == 1
    table = {r.name: r for r in registers(config)}
    last = config.num_layers - 1
    assert table["SEGMENT_STRIDE"].at(last, 3) == 0x4008 + 64 * last + 48
    assert table["QUOTA"].at(last) == 0x400 + 4 * last


def test_access_of_a_register_agrees_with_its_fields(config: EngineConfig) -> None:
    for r in registers(config):
        writable = any(f.access is not Access.RO for f in r.fields)
        assert r.writable == (writable or r.name.endswith("_BASE_HIGH")), r.name
        if not r.readable:
            assert all(f.access is Access.WO for f in r.fields)


def test_reset_values_come_from_the_configuration(config: EngineConfig) -> None:
    reset = {r.name: r.reset for r in registers(config)}
    assert reset["IDENTITY"].to_bytes(4, "big") == b"STMO"
    assert reset["CAPABILITY0"] == config.num_layers | config.num_experts << 16
    assert reset["CONTROL"] == 7 | config.adaptive << 3
    assert reset["QUOTA"] == config.quota < 1 << quota_bits(config)
    assert reset["THRESHOLD"] == 4 * config.threshold % (1 << 32)
    assert config.floors == tuple(4 * t for t in config.thresholds)


def test_counters_are_in_the_documented_order() -> None:
    names = (
        "tokens, sequences, routes, illegal, hits, lates, misses, selected, prefetch_loads, "
        "demand_loads, evictions, useful, useless, cancelled, dropped, replaced, filled, drained, "
        "grants, error_grants, releases, demand_bursts, prefetch_bursts, last_beats, beats, "
        "discarded_beats, retries, errors, timeouts, score_commits"
    )
    assert ", ".join(c.name for c in COUNTERS) == names
    assert [COUNTER_INDEX[c.name] for c in COUNTERS] == list(range(30))
    assert all(c.doc for c in COUNTERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": (Field("a", 30, 3, Access.RW, ""),)}, "X.a does not fit"),
        (
            {"fields": (Field("a", 0, 3, Access.RW, ""), Field("b", 2, 1, Access.RW, ""))},
            "X.b does not fit, or overlaps",
        ),
        ({"reset": 2}, "reset 0x2 sets bits that no field owns"),
        ({"offset": 2}, "offset 0x2 is not a multiple of 4"),
        ({"dims": (Dimension("i", 9, 4, 8),)}, "9 is, room for 8"),
        ({"offset": 8, "dims": (Dimension("i", 2, 4, 4),)}, "index i is not a slice"),
        (
            {"dims": (Dimension("i", 2, 4, 4), Dimension("j", 2, 8, 2))},
            "index j is not a slice",
        ),
    ],
)
def test_a_register_that_cannot_be_decoded_is_refused(arguments: dict, message: str) -> None:
    good = {
        "name": "X",
        "offset": 0,
        "access": Access.RW,
        "reset": 0,
        "doc": "",
        "fields": (Field("a", 0, 1, Access.RW, ""),),
    }
    Register(**good)
    with pytest.raises(ValueError, match=re.escape(message)):
        Register(**(good | arguments))


def test_an_index_outside_the_array_is_refused() -> None:
    quota = next(r for r in registers(preset("tiny")) if r.name == "QUOTA")
    with pytest.raises(ValueError, match="layer must be 0 to 3, not 4"):
        quota.at(4)
    with pytest.raises(ValueError, match="QUOTA has 1 indices, not 0"):
        quota.at()


# Documents ------------------------------------------------------------------------------------


def test_docs_are_what_the_table_prints() -> None:
    written = (ROOT / "docs" / "registers.md").read_text()
    assert written == markdown(preset("gpt_oss_20b")), (
        "docs/registers.md is old: python -m stmoe.register_map --markdown > docs/registers.md"
    )


def test_markdown_lists_every_register_field_and_counter(config: EngineConfig) -> None:
    text = markdown(config)
    for r in registers(config):
        assert f"\n## {r.name}\n" in text
        for f in r.fields:
            assert f" | {f.name} | {f.access.value} | " in text
    for i, c in enumerate(COUNTERS):
        assert f"| {0x100 + 4 * i:#06x} | {c.name} | {c.doc} |" in text
    for line in text.splitlines():
        assert not re.search(r"\|.*[^`]\|\|", line), "an empty cell is written with spaces"


def test_command_prints_the_documents() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "stmoe.register_map", *arguments]
        paths = os.pathsep.join([str(ROOT / "hw"), str(ROOT / "golden")])
        env = dict(os.environ, PYTHONPATH=paths)
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    assert run("--markdown") == markdown(preset("gpt_oss_20b"))
    assert run("--c-header", "--preset", "tiny") == c_header(preset("tiny"))


def test_command_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--markdown", "--preset", "nothing"], ["--markdown", "--c-header"], []):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 2
    assert "unknown preset 'nothing'; presets are tiny" in capsys.readouterr().err


def test_c_header_compiles_and_agrees(config: EngineConfig, tmp_path: Path) -> None:
    """A C program prints every offset, mask and counter; also as C++ and included twice."""
    (tmp_path / "stmoe_registers.h").write_text(c_header(config))
    lines, expected = [], []

    def show(expression: str, value: int) -> None:
        lines.append(f'    printf("%lu\\n", (unsigned long)({expression}));')
        expected.append(value)

    for r in registers(config):
        macro = f"STMOE_{r.name}"
        last = [d.count - 1 for d in r.dims]
        show(f"{macro}_OFFSET" + (f"({', '.join(map(str, last))})" if last else ""), r.at(*last))
        for d in r.dims:
            show(f"{macro}_{d.name.upper()}S", d.count)
        if r.readable:
            show(f"{macro}_RESET", r.reset)
        for f in r.fields:
            show(
                f"{macro}_{f.name.upper()}_MASK >> {macro}_{f.name.upper()}_SHIFT",
                (1 << f.width) - 1,
            )
            show(f"{macro}_{f.name.upper()}_SHIFT", f.lsb)
    for i, c in enumerate(COUNTERS):
        show(f"STMOE_COUNTER_{c.name.upper()}", i)
    show("STMOE_NUM_COUNTERS", len(COUNTERS))
    show("STMOE_COUNTER_OFFSET(STMOE_COUNTER_BEATS)", 0x100 + 4 * COUNTER_INDEX["beats"])
    show("STMOE_ADDR_WIDTH", addr_width(config))
    source = tmp_path / "test.c"
    source.write_text(
        '#include <stdio.h>\n#include "stmoe_registers.h"\n#include "stmoe_registers.h"\n'
        "int main(void)\n{\n" + "\n".join(lines) + "\n    return 0;\n}\n"
    )
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    program = tmp_path / "test"
    subprocess.run(["gcc", "-std=c99", *flags, str(source), "-o", str(program)], check=True)
    subprocess.run(["g++", *flags, "-x", "c++", "-fsyntax-only", str(source)], check=True)
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in output.split()] == expected
