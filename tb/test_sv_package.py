# SPDX-License-Identifier: Apache-2.0
"""The SystemVerilog package: as a simulator sees it, every field lies where the engine has it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from amaranth.lib import data

from simulation import find_verilator
from stmoe import cli
from stmoe.payloads import EventKind
from stmoe.register_map import addr_width
from stmoe.sv_package import sv_name, sv_package
from stmoe.top import padded, stream_layouts
from stmoe_golden.config import PRESETS, EngineConfig, preset

CONFIGS = {
    **PRESETS,
    # One slot, layer and expert: no field is left out, and none is wider than a bit or two.
    "least": EngineConfig(
        num_layers=1, num_experts=1, top_k=1, quota=0, staging=1, event_port=False
    ),
}


def struct_name(stream: str) -> str:
    return "event_t" if stream == "events" else f"{stream}_t"


def lines_of(layout: data.StructLayout) -> dict[str, int]:
    """Every field, and every element of an array, with the bits it has in TDATA."""
    masks = {}
    for key, field in layout:
        ones = ((1 << field.width) - 1) << field.offset
        masks[sv_name(key)] = ones
        if isinstance(field.shape, data.ArrayLayout):
            width = field.width // field.shape.length
            for i in range(field.shape.length):
                masks[f"{sv_name(key)}[{i}]"] = ((1 << width) - 1) << field.offset + width * i
    return masks


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a program that uses the packages of all configurations prints, by its keys."""
    folder = tmp_path_factory.mktemp("package")
    packages, body = [], []
    for name, config in CONFIGS.items():
        package = f"{name}_pkg"
        packages.append(sv_package(config, name=package))
        for stream, layout in stream_layouts(config).values():
            struct = f"{package}::{struct_name(stream)}"
            body.append(f'    $display("{struct} bits %0d", $bits({struct}));')
            for field in [*lines_of(layout), *(["padding"] if layout.size % 8 else [])]:
                ones = "event_kind_e'('1)" if field == "kind" else "'1"
                ones = f"{package}::{ones}" if field == "kind" else ones
                body += [
                    "    begin",
                    f"      {struct} value;",
                    "      value = '0;",
                    f"      value.{field} = {ones};",
                    f'      $display("{struct}.{field} %0h", value);',
                    "    end",
                ]
        for constant in ("AxilAddrWidth", "AxiIdWidth", "NumSlots", "SlotBytes", "TopK"):
            body.append(f'    $display("{package}.{constant} %0d", {package}::{constant});')
        for kind in EventKind:
            value = f"{package}::EVENT_{kind.name}"
            body.append(f'    $display("{value} %0d", {value});')
    source = folder / "show.sv"
    source.write_text(
        "\n".join([*packages, "module show;", "  initial begin", *body, "  end", "endmodule", ""])
    )
    verilator = [str(find_verilator() / "verilator"), "--binary", "-Wall", "-O0"]
    waived = ["-Wno-DECLFILENAME", "-Wno-UNUSEDPARAM"]  # one file; nobody uses them all
    subprocess.run(
        [*verilator, *waived, "-CFLAGS", "-O0", "--Mdir", "obj", "--top-module", "show", "show.sv"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    run = subprocess.run(
        [str(folder / "obj" / "Vshow")], capture_output=True, text=True, check=True
    )
    pairs = (line.rsplit(" ", 1) for line in run.stdout.splitlines() if " " in line)
    return dict(pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_lies_where_the_engine_has_it(name: str, printed: dict[str, str]) -> None:
    config = CONFIGS[name]
    for stream, layout in stream_layouts(config).values():
        struct = f"{name}_pkg::{struct_name(stream)}"
        assert int(printed[f"{struct} bits"]) == padded(layout.size)
        masks = lines_of(layout)
        if layout.size % 8:
            masks["padding"] = (1 << padded(layout.size)) - (1 << layout.size)
        for field, mask in masks.items():
            assert int(printed[f"{struct}.{field}"], 16) == mask, f"{struct}.{field}"
    assert (f"{name}_pkg::event_t bits" in printed) == config.event_port


@pytest.mark.parametrize("name", CONFIGS)
def test_constants_are_the_engines(name: str, printed: dict[str, str]) -> None:
    config = CONFIGS[name]
    wanted = {
        "AxilAddrWidth": addr_width(config),
        "AxiIdWidth": config.transfer_bits,
        "NumSlots": config.num_slots,
        "SlotBytes": config.expert_bytes,
        "TopK": config.top_k,
    }
    for constant, value in wanted.items():
        assert int(printed[f"{name}_pkg.{constant}"]) == value
    for kind in EventKind:
        assert int(printed[f"{name}_pkg::EVENT_{kind.name}"]) == kind.value


def test_a_name_that_is_no_identifier_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be an identifier, not '2nd'"):
        sv_package(preset("tiny"), name="2nd")


def test_generate_writes_verilog_and_package_or_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verilog, package = tmp_path / "engine.v", tmp_path / "engine_pkg.sv"
    words = ["generate", "--preset", "tiny", "--set", "num_layers=3", "-o", str(verilog)]
    assert cli.main([*words, "--sv-package", str(tmp_path / "none" / "x.sv")]) == 2
    assert capsys.readouterr().err == f"stmoe: {tmp_path}/none/x.sv: No such file or directory\n"
    assert cli.main([*words, "--sv-package", str(verilog)]) == 2
    assert "--sv-package: must be another file than -o" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*words, "--sv-package", str(package)]) == 0
    assert package.read_text() == sv_package(preset("tiny").replace(num_layers=3))
    assert "module stmoe_engine" in verilog.read_text()
