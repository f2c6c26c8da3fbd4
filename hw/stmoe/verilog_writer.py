# SPDX-License-Identifier: Apache-2.0
"""Amaranth's Verilog, without minutes for the initial values of large memories."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["LARGE", "convert"]

LARGE = 1 << 20
"""Bits of a memory above which its zeros are written as a loop: ``gpt_oss_20b``'s tables have
196,608 each, ``qwen3_30b_a3b``'s 6,291,456."""

_DECLARATION = re.compile(r"^  reg \[(\d+):0\] (\\\S+ |[\w$]+) ?\[(\d+):0\];\n", re.MULTILINE)


def _bits(rows: Any, width: int) -> str:
    """RTLIL constant of a memory's initial value: the last row first."""
    mask = (1 << width) - 1
    return f"{width * len(rows)}'" + "".join(f"{row & mask:0{width}b}" for row in reversed(rows))


@contextmanager
def _whole_rows() -> Iterator[Counter[tuple[int, int]]]:
    """Meanwhile Amaranth's back end writes initial values a row at a time, and of large memories
    that hold zeros none at all; gives how many those are, by (rows, width).

    Its own way makes an object of each bit, 25 million for ``qwen3_30b_a3b``, and has Yosys
    carry them. What is replaced is one function of the version pinned in ``pyproject.toml``.
    """
    from amaranth.back.rtlil import ModuleEmitter

    original = ModuleEmitter.emit_memory
    left_out: Counter[tuple[int, int]] = Counter()

    def emit_memory(self: Any, cell_idx: int, cell: Any) -> None:
        if not cell.width or not cell.depth:
            original(self, cell_idx, cell)
            return
        if cell.width * cell.depth > LARGE and not any(cell.init):
            left_out[cell.depth, cell.width] += 1
            return
        self.builder.cell(
            "$meminit_v2",
            ports={
                "ADDR": self.sigspec(),
                "DATA": _bits(cell.init, cell.width),
                "EN": f"{cell.width}'{'1' * cell.width}",
            },
            parameters={
                "MEMID": self.memories[cell_idx].memid,
                "ABITS": 0,
                "WIDTH": cell.width,
                "WORDS": cell.depth,
                "PRIORITY": 0,
            },
            src_loc=cell.src_loc,
        )

    ModuleEmitter.emit_memory = emit_memory
    try:
        yield left_out
    finally:
        ModuleEmitter.emit_memory = original


def _with_zeros(text: str, left_out: Counter[tuple[int, int]]) -> str:
    """The Verilog with the zeros of what :func:`_whole_rows` has left out, as loops."""
    found: Counter[tuple[int, int]] = Counter()

    def declared(match: re.Match[str]) -> str:
        width, name, rows = int(match[1]) + 1, match[2], int(match[3]) + 1
        if (rows, width) not in left_out or text.startswith("  initial begin", match.end()):
            return match[0]
        found[rows, width] += 1
        # Amaranth's own names have no dots: these are in nobody's way.
        label = f"\\{name.strip().removeprefix(chr(92))}.zeros"
        row = f"{label}.row "
        return (
            f"{match[0]}  initial begin : {label} \n"
            f"    integer {row};\n"
            f"    for ({row}= 0; {row}< {rows}; {row}= {row}+ 1) {name}[{row}] = {width}'h0;\n"
            f"  end\n"
        )

    text = _DECLARATION.sub(declared, text)
    if found != left_out:
        raise RuntimeError(f"memories (rows, width) {left_out} expected, {found} found in Verilog")
    return text


def convert(elaboratable: Any, **options: Any) -> str:
    """As :func:`amaranth.back.verilog.convert`, and but for :data:`LARGE` memories the same text.

    Of those that hold zeros it has one loop that writes them, in place of a line for each row.
    """
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    from amaranth.back import verilog

    with _whole_rows() as left_out:
        text = verilog.convert(elaboratable, **options)
    return _with_zeros(text, left_out) if left_out else text
