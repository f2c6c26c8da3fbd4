# SPDX-License-Identifier: Apache-2.0
"""The project itself: licence headers, wheel, Makefile, and the commands that the README names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["setup", "sim", "report", "browser", "test", "lint", "bench", "generate", "presets"]
TARGETS += ["registers", "boards", "bitstream", "regress", "ppa", "clean"]
PACKAGES = {"stmoe": ROOT / "hw" / "stmoe", "stmoe_golden": ROOT / "golden" / "stmoe_golden"}
SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCES = {".py", ".toml", ".sh", ".v", ".sv", ".c", ".h", ".cpp", ".mk", ".yml"}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that a commit would hold: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        pytest.skip("git is not installed")
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in sorted(set(run.stdout.split("\0"))) if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_source_file_names_its_licence(files: list[Path]) -> None:
    sources = [f for f in files if f.suffix in SOURCES or f.name in ("Makefile", "run")]
    assert len(sources) > 10
    lacking = [
        str(f.relative_to(ROOT))
        for f in sources
        if SPDX not in "".join(f.read_text().splitlines()[:3])
    ]
    assert not lacking


def test_licence_is_the_whole_apache_2(project: dict) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_no_file_is_over_2_mb_or_built(files: list[Path]) -> None:
    wrong = [
        str(f.relative_to(ROOT))
        for f in files
        if f.stat().st_size > 2 << 20 or {".venv", "build", "__pycache__"} & set(f.parts)
    ]
    assert not wrong


def test_dependencies_are_pinned_with_a_reason(project: dict) -> None:
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for requirement in (r for group in groups for r in group):
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+", requirement)
        found = [x for x in lines if x.strip().startswith(f'"{requirement}"')]
        assert found
        for line in found:  # one for each extra that has it
            assert re.search(r",  # \w", line), f"{requirement} has no reason beside it"


def test_wheel_holds_both_packages_and_the_command(tmp_path: Path) -> None:
    # A copy, because setuptools builds inside the source tree and keeps old files there.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("hw", "golden"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run = subprocess.run(
        [*pip, "--no-index", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("stmoe-*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    modules = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assert {n for n in names if ".dist-info/" not in n} >= modules
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == set(PACKAGES)
    info = next(unpacked.glob("*.dist-info"))
    assert "stmoe = stmoe.cli:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").exists()
    code = "import stmoe.cli, stmoe_golden; print(stmoe.__file__, stmoe_golden.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.count(str(unpacked)) == 2, shown.stderr


def make(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    # Not as a part of the make that runs these tests.
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *words], cwd=cwd, env=inherited | env, capture_output=True, text=True
    )


@pytest.mark.parametrize("words", [(), ("help",)])
def test_help_lists_the_targets(words: tuple[str, ...]) -> None:
    run = make(*words)
    assert re.findall(r"^ +make (\w+) +\S", run.stdout, re.MULTILINE) == TARGETS, run.stderr


@pytest.mark.parametrize("tool", ["g++", "perl", "python3"])
def test_missing_tool_is_one_line_and_status_2(tool: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {"sh", "make", "g++", "perl", "python3", "mkdir", "cat"} - {tool}:
        target = sys.executable if name == "python3" else shutil.which(name)
        assert target is not None, f"{name} is not on PATH"
        (tools / name).symlink_to(target)
    run = make("sim", cwd=tmp_path, PATH=str(tools))
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert f"{tool} not found" in line
    assert not (tmp_path / ".venv").exists()


def test_old_python_is_one_line_and_status_2(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.9.2\nexit 1\n")
    old.chmod(0o755)
    run = make("test", f"PYTHON={old}", cwd=tmp_path)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "Python 3.9.2 is too old: 3.11 or newer is needed" in line


def test_commands_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    parts = re.findall(r"```.*?\n(.*?)```|`([^`\n]+)`", readme, re.DOTALL)
    code = "\n".join(block or span for block, span in parts)
    named = re.findall(r"(?:^|[;&|] |\$ )make (\w+)", code, re.MULTILINE)
    assert {"sim", "test"} <= set(named) <= {*TARGETS, "help"}
    scripts = re.findall(r"python (\S+\.py)", code)
    assert [s for s in scripts if not (ROOT / s).exists()] == []


def test_ci_runs_lint_and_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make (\w+)", script.read_text(), re.MULTILINE) == ["lint", "test"]


def test_generator_and_simulations_do_not_load_numba() -> None:
    # It takes seconds of CPU, in every one of some hundred simulations of `make test`.
    code = "import harness_sim, stmoe.top, stmoe.cli, sys; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tb").returncode == 0
