# SPDX-License-Identifier: Apache-2.0
"""The register map in SystemRDL 2.0, and the pages that PeakRDL makes of it.

Both come from the table in :mod:`stmoe.register_map`, like the RTL, so none can drift from it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from stmoe_golden.config import EngineConfig

from .register_map import (
    COUNTERS,
    VERSION,
    WORD_BYTES,
    Access,
    Dimension,
    Field,
    Register,
    registers,
)

__all__ = ["RdlError", "systemrdl", "write_html"]

PROPERTIES: dict[Access, tuple[str, ...]] = {
    Access.RO: ("sw = r", "hw = w"),
    Access.RW: ("sw = rw", "hw = r"),
    Access.WO: ("sw = w", "hw = r"),
    # An event in the cycle of the clear wins.
    Access.W1C: ("sw = rw", "hw = na", "onwrite = woclr", "hwset", "precedence = hw"),
    # High for one cycle, so it reads 0.
    Access.W1: ("sw = rw", "hw = r", "singlepulse"),
}
"""What each access is in SystemRDL."""


class RdlError(RuntimeError):
    """PeakRDL is not installed, or the folder for its pages cannot be used."""


def _text(text: str) -> str:
    """A string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _field(field: Field, register: Register) -> str:
    """One field; its reset value where software can read it."""
    properties = [*PROPERTIES[field.access], f"desc = {_text(field.doc)}"]
    if register.readable:
        properties.append(f"reset = {(register.reset & field.mask) >> field.lsb:#x}")
    top = field.lsb + field.width - 1
    return f"field {{ {'; '.join(properties)}; }} {field.name}[{top}:{field.lsb}];"


def _register(register: Register, name: str, offset: int, dims: str) -> Iterator[str]:
    """One register, or an array of them, at ``offset`` within what holds it."""
    if not register.fields:
        # SystemRDL has no register without a field.
        yield f"// {register.name} at {register.offset:#06x} has no field in this configuration."
        return
    doc = register.doc
    if register.name == "COUNTER":
        # [br] is SystemRDL's line break.
        doc += "".join(f"[br]{i} {c.name}: {c.doc}" for i, c in enumerate(COUNTERS))
    yield "reg {"
    yield f"    desc = {_text(doc)};"
    for field in register.fields:
        yield f"    {_field(field, register)}"
    yield f"}} {name}{dims};"


def _dims(dims: tuple[Dimension, ...]) -> str:
    """``[layers][segments]``; elements of the inner indices must leave no gap."""
    for outer, inner in zip(dims, dims[1:], strict=False):
        if outer.stride != inner.count * inner.stride:
            raise ValueError(f"{inner.count} {inner.name}s leave a gap in each {outer.name}")
    return "".join(f"[{dim.count}]" for dim in dims)


def _items(table: tuple[Register, ...]) -> Iterator[str]:
    """Every register; those whose arrays are woven into one another are one register file."""
    for dims, run in groupby(table, key=lambda r: r.dims):
        group = list(run)
        place = f" += {dims[-1].stride:#x}" if dims else ""
        if not dims or len(group) == 1:
            for r in group:
                yield from _register(r, r.name, r.offset, f"{_dims(dims)} @ {r.offset:#06x}{place}")
            continue
        prefix = os.path.commonprefix([r.name for r in group]).rpartition("_")[0]
        base = group[0].offset
        if not prefix or group[-1].offset + WORD_BYTES > base + dims[-1].stride:
            raise ValueError(f"{group[0].name} and those after it are no register file")
        yield "regfile {"
        yield f"    desc = {_text(group[0].doc)};"
        for r in group:
            name, offset = r.name.removeprefix(f"{prefix}_"), r.offset - base
            for line in _register(r, name, offset, f" @ {offset:#x}"):
                yield f"    {line}"
        yield f"}} {prefix}{_dims(dims)} @ {base:#06x}{place};"


def systemrdl(config: EngineConfig) -> str:
    """The register map of one engine, as SystemRDL 2.0: an address map ``stmoe``.

    Names, offsets, accesses and reset values are those of the table. Where the arrays of several
    registers are woven into one another (SEGMENT_BASE_LOW and its like), those are one register
    file: ``SEGMENT[layer][segment].BASE_LOW``. What a register's fields all are, SystemRDL says of
    the fields alone. A register without any field in this configuration is left out.
    """
    version = ".".join(map(str, VERSION))
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "// Printed by `stmoe registers --systemrdl` from the table that the RTL is made of;",
        "// not written by hand.",
        "",
        "addrmap stmoe {",
        '    name = "ST-MoE prefetch engine";',
        f"    desc = {_text(f'Register map {version}, {_shape(config)}.')};",
        "    default regwidth = 32;",
        "    default accesswidth = 32;",
        "",
    ]
    lines += [f"    {line}" for line in _items(registers(config))]
    return "\n".join([*lines, "};", ""])


def _shape(config: EngineConfig) -> str:
    return (
        f"{config.num_layers} layers of {config.num_experts} experts, top-{config.top_k}, "
        f"{config.num_slots} slots"
    )


def write_html(config: EngineConfig, folder: str | Path) -> None:
    """Write PeakRDL's pages about the register map into ``folder``: open ``index.html``.

    Raises
    ------
    RdlError
        ``peakrdl-html`` is not installed, or ``folder`` is a file or holds something else.
    """
    try:
        from peakrdl_html import HTMLExporter
        from systemrdl import RDLCompiler
    except ImportError:
        raise RdlError(
            "HTML needs peakrdl-html, which is not installed (pip install 'stmoe[dev]')"
        ) from None
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise RdlError(f"{folder}: not a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "index.html").exists():
        raise RdlError(f"{folder}: must be empty or hold pages written before")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "stmoe.rdl"
        source.write_text(systemrdl(config))
        compiler = RDLCompiler()
        compiler.compile_file(str(source))
        # The folder gets the pages once all of them have been made.
        pages = Path(scratch) / "pages"
        HTMLExporter().export(compiler.elaborate(), str(pages))
        shutil.copytree(pages, target, dirs_exist_ok=True)
