# SPDX-License-Identifier: Apache-2.0
"""The SystemRDL of the register map, read back by a third party's compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from systemrdl import RDLCompiler
from systemrdl.messages import MessagePrinter, Severity
from systemrdl.node import AddressableNode, FieldNode, RegNode
from systemrdl.rdltypes import AccessType, OnWriteType, PrecedenceType

from simulation import ROOT
from stmoe import cli
from stmoe.register_map import COUNTERS, Access, Field, Register, main, registers
from stmoe.register_rdl import RdlError, systemrdl, write_html
from stmoe_golden.config import EngineConfig, preset
from test_register_map import CONFIGS


class Strict(MessagePrinter):
    """A warning is a failure as well: it says that a reader may take the map otherwise."""

    def print_message(self, severity: Severity, text: str, src_ref: object) -> None:
        raise AssertionError(f"{severity.name}: {text}")


def compiled(config: EngineConfig, folder: Path) -> AddressableNode:
    source = folder / "stmoe.rdl"
    source.write_text(systemrdl(config))
    compiler = RDLCompiler(message_printer=Strict())
    compiler.compile_file(str(source))
    return compiler.elaborate().top


def access_of(field: FieldNode) -> Access:
    """What software may do with a field, from the properties that tools read."""
    sw = field.get_property("sw")
    if field.get_property("onwrite") is not None:
        assert (sw, field.get_property("onwrite")) == (AccessType.rw, OnWriteType.woclr)
        assert field.get_property("hwset")
        assert field.get_property("precedence") is PrecedenceType.hw
        return Access.W1C
    if field.get_property("singlepulse"):
        assert sw is AccessType.rw
        return Access.W1
    return {AccessType.r: Access.RO, AccessType.rw: Access.RW, AccessType.w: Access.WO}[sw]


def of_table(config: EngineConfig) -> dict[int, tuple[str, dict[str, tuple]]]:
    """Every element of the map that has a field: address, name, and what each field is."""

    def fields(r: Register) -> dict[str, tuple]:
        def reset(f: Field) -> int | None:
            return (r.reset & f.mask) >> f.lsb if r.readable else None

        return {f.name: (f.lsb, f.width, f.access, reset(f), f.doc) for f in r.fields}

    return {
        r.at(*index): (r.name, fields(r))
        for r in registers(config)
        for index in r.elements()
        if r.fields
    }


def of_rdl(top: AddressableNode) -> dict[int, tuple[str, dict[str, tuple]]]:
    """The same, as the compiler has understood it."""
    result = {}
    for node in top.descendants(unroll=True):
        if not isinstance(node, RegNode):
            continue
        assert node.get_property("regwidth") == node.get_property("accesswidth") == 32
        path = node.get_path(array_suffix="", empty_array_suffix="")
        name = path.removeprefix("stmoe.").replace(".", "_")
        fields = {
            f.inst_name: (
                f.lsb,
                f.width,
                access_of(f),
                f.get_property("reset"),
                f.get_property("desc"),
            )
            for f in node.fields()
        }
        assert node.absolute_address not in result
        result[node.absolute_address] = (name, fields)
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_compiler_reads_what_the_table_says(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    top = compiled(config, tmp_path)
    assert of_rdl(top) == of_table(config)
    assert top.inst_name == "stmoe"


def test_the_comparison_sees_a_wrong_offset_field_access_and_reset(tmp_path: Path) -> None:
    """What this file would miss, it would not check."""
    config = preset("tiny")
    text, expected = systemrdl(config), of_table(config)
    changes = [
        ("SCRATCH @ 0x0020", "SCRATCH @ 0x0060"),
        ("busy[3:3]", "busy[5:5]"),
        ("sw = w; hw = r;", "sw = rw; hw = r;"),
        ("reset = 0x53544d4f", "reset = 0x53544d4e"),
        ("SEGMENT[4][4] @ 0x4000 += 0x10", "SEGMENT[4][4] @ 0x4000 += 0x20"),
        ("tables have been cleared", "tables were cleared"),
    ]
    for old, new in changes:
        assert old in text
        (tmp_path / "wrong.rdl").write_text(text.replace(old, new, 1))
        compiler = RDLCompiler(message_printer=Strict())
        compiler.compile_file(str(tmp_path / "wrong.rdl"))
        assert of_rdl(compiler.elaborate().top) != expected, old


def test_command_prints_it_for_presets_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = preset("tiny").replace(num_layers=7)
    config.save(tmp_path / "own.toml")
    for arguments, wanted in (
        (["--preset", "tiny"], preset("tiny")),
        (["--config", str(tmp_path / "own.toml")], config),
        ([], preset("gpt_oss_20b")),
    ):
        main(["--systemrdl", *arguments])
        assert capsys.readouterr().out == systemrdl(wanted)


def test_command_writes_files_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "stmoe.rdl"
    words = ["registers", "--systemrdl", "-o", str(output)]
    assert cli.main([*words, "--preset", "huge"]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err
    assert not output.exists()
    assert cli.main([*words, "--preset", "tiny"]) == 0
    assert output.read_text() == systemrdl(preset("tiny"))
    assert cli.main([*words[:-1], str(tmp_path / "none" / "stmoe.rdl")]) == 2
    assert (
        capsys.readouterr().err == f"stmoe: {tmp_path}/none/stmoe.rdl: No such file or directory\n"
    )
    assert cli.main(["registers", "--html", str(tmp_path / "pages"), "-o", str(output)]) == 2
    assert "argument -o: not allowed with argument --html" in capsys.readouterr().err


def test_pages_show_every_register_and_counter(tmp_path: Path) -> None:
    """PeakRDL writes a page per register and keeps its data beside them."""
    folder = tmp_path / "pages"
    write_html(preset("tiny"), folder)
    assert (folder / "index.html").stat().st_size > 0
    text = "".join(p.read_text() for p in sorted(folder.rglob("*.html")))
    text += "".join(p.read_text() for p in sorted(folder.rglob("*.js*")))
    for name in ("IDENTITY", "CONTROL", "IRQ_ENABLE", "SEGMENT", "BASE_LOW"):
        assert name in text
    for counter in COUNTERS:
        assert counter.name in text
    write_html(preset("gpt_oss_20b"), folder)  # in place of those before


def test_pages_never_go_where_something_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    with pytest.raises(RdlError, match="own: must be empty or hold pages written before"):
        write_html(preset("tiny"), tmp_path / "own")
    assert cli.main(["registers", "--html", str(tmp_path / "own" / "thesis.txt")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"stmoe: {tmp_path}/own/thesis.txt: not a folder\n"
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["thesis.txt"]


def test_make_registers_writes_all_documents(tmp_path: Path) -> None:
    run = subprocess.run(
        ["make", "registers", "PRESET=tiny", f"OUT={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "stmoe.rdl").read_text() == systemrdl(preset("tiny"))
    assert "STMOE_REGISTERS_H" in (tmp_path / "stmoe_registers.h").read_text()
    assert (tmp_path / "registers.md").read_text().startswith("# Registers")
    assert (tmp_path / "html" / "index.html").exists()
    assert str(tmp_path) in run.stdout
