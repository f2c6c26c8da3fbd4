# SPDX-License-Identifier: Apache-2.0
"""The examples: every command of examples/README.md works as written and prints what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lint_verilog import WAIVED
from simulation import ROOT
from stmoe import cli

EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()
COMMANDS = re.findall(r"```\n(make -sC examples \S+)\n```\n```\n(.*?)```", README, re.DOTALL)
NAMES = ["amaranth", "systemverilog", "driver", "fusesoc", "clock-crossing"]


def shell(command: str, **options) -> subprocess.CompletedProcess[str]:
    # Not as a part of the make that runs these tests.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, **options
    )


def test_readme_has_a_command_for_every_example() -> None:
    assert [command.split()[-1] for command, _ in COMMANDS] == NAMES
    folders = {p.name for p in EXAMPLES.iterdir() if p.is_dir() and p.name != "__pycache__"}
    linked = set(re.findall(r"\]\((\w+)\)", README))
    assert folders == linked
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (EXAMPLES / target).exists(), target


@pytest.mark.parametrize(("command", "printed"), COMMANDS, ids=NAMES)
def test_command_prints_what_the_readme_says(command: str, printed: str) -> None:
    run = shell(command, timeout=540)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line for line in lines if line in printed.splitlines()] == printed.splitlines()


def test_testbench_notices_a_wrong_word() -> None:
    """After the run above: the same program with a memory that answers wrongly."""
    program = ROOT / "build/examples/systemverilog/obj/Vstmoe_axi_tb"
    if not program.exists():
        assert shell("make -sC examples systemverilog", timeout=540).returncode == 0
    run = subprocess.run([str(program), "+corrupt"], capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert re.search(r"slot \d+ does not hold layer 0's expert \d+", run.stdout + run.stderr)
    assert "PASS" not in run.stdout


def test_waivers_of_the_engine_are_those_of_the_projects_lint() -> None:
    text = (EXAMPLES / "systemverilog" / "engine.vlt").read_text()
    rules = re.findall(r'^lint_off -rule (\w+) -file "\*/stmoe_engine\.v"$', text, re.MULTILINE)
    more = {
        "CASEOVERLAP",  # said of the same statements once CASEINCOMPLETE is not off everywhere
        "SYNCASYNCNET",  # only with --memory-clock
    }
    assert set(rules) == set(WAIVED) | more


def test_driver_is_the_same_object_for_every_configuration(tmp_path: Path) -> None:
    """It may take nothing from the header but what all configurations share."""
    objects = []
    for preset in ("tiny", "gpt_oss_20b", "qwen3_30b_a3b"):
        header = tmp_path / preset / "stmoe_registers.h"
        header.parent.mkdir()
        assert cli.main(["registers", "--c-header", "--preset", preset, "-o", str(header)]) == 0
        output = header.with_name("stmoe.o")
        strict = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-ffreestanding"]
        subprocess.run(
            ["gcc", *strict, "-O2", f"-I{header.parent}", "-c", "stmoe.c", "-o", str(output)],
            cwd=EXAMPLES / "driver",
            check=True,
        )
        objects.append(output.read_bytes())
    assert objects[0] == objects[1] == objects[2]


def test_driver_needs_nothing_but_the_two_accesses(tmp_path: Path) -> None:
    """No library, no allocation, no data of its own: fit for bare metal."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    header = tmp_path / "stmoe_registers.h"
    assert cli.main(["registers", "--c-header", "--preset", "tiny", "-o", str(header)]) == 0
    output = tmp_path / "stmoe.o"
    subprocess.run(
        ["gcc", "-std=c11", "-O2", "-ffreestanding", "-fno-stack-protector", f"-I{tmp_path}"]
        + ["-c", str(EXAMPLES / "driver" / "stmoe.c"), "-o", str(output)],
        check=True,
    )
    run = subprocess.run(["nm", str(output)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-2:] for line in run.stdout.splitlines()]
    outside = {name for kind, name in symbols if kind == "U"} - {"_GLOBAL_OFFSET_TABLE_"}
    assert outside == {"stmoe_read32", "stmoe_write32"}
    assert [name for kind, name in symbols if kind.lower() in "bdc"] == []


def test_fusesoc_generator_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    script = EXAMPLES / "fusesoc" / "generate_engine.py"
    for parameters, message in (
        ({"preset": "huge"}, "stmoe: unknown preset 'huge'"),
        ({"presets": "tiny"}, "stmoe: no such parameter: presets"),
        ({"preset": "tiny", "settings": ["top_k=0"]}, "stmoe: top_k must be 1 to 16, not 0"),
    ):
        request = {"vlnv": "a:b:c:1", "files_root": str(tmp_path), "parameters": parameters}
        (tmp_path / "request.yml").write_text(yaml.safe_dump(request))
        run = subprocess.run(
            [sys.executable, str(script), "request.yml"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2
        (line,) = run.stderr.splitlines()
        assert line.startswith(message)
        assert [p.name for p in tmp_path.iterdir()] == ["request.yml"]


def test_another_core_gets_the_engine_it_asks_for(tmp_path: Path) -> None:
    """With what examples/README.md says of such a core."""
    (yaml_block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    core = yaml.safe_load(yaml_block)
    core["name"] = "somebody:chip:accelerator:1.0"
    core["generate"]["engine"]["parameters"]["preset"] = "tiny"  # sooner made
    core["targets"] = {"default": {"filesets": ["rtl"], "generate": ["engine"]}}
    core["targets"]["lint"] = {
        **core["targets"]["default"],
        "toplevel": "stmoe_engine",
        "flow": "lint",
        "flow_options": {"tool": "verilator"},
    }
    (tmp_path / "accelerator.core").write_text("CAPI=2:\n" + yaml.safe_dump(core))
    fusesoc = [sys.executable, "-m", "fusesoc.main", "--cores-root", str(EXAMPLES / "fusesoc")]
    fusesoc += ["--cores-root", str(tmp_path), "run", "--build-root", str(tmp_path / "build")]
    run = subprocess.run(
        [*fusesoc, "--target", "lint", "--setup", core["name"]],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (verilog,) = tmp_path.glob("build/**/src/**/stmoe_engine.v")
    assert "m_axis_event" not in verilog.read_text()
    (package,) = tmp_path.glob("build/**/src/**/stmoe_engine_pkg.sv")
    assert "event_t" not in package.read_text()


def test_amaranth_example_is_30_lines() -> None:
    text = (EXAMPLES / "amaranth_design" / "moe_node.py").read_text()
    body = text[text.index("m = Module()") : text.index("return m")]
    code = [x for x in body.splitlines() if x.strip() and not x.strip().startswith("#")]
    assert len(code) <= 30
