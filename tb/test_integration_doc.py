# SPDX-License-Identifier: Apache-2.0
"""docs/integration.md says what the engine does: its diagrams and its ports."""

from __future__ import annotations

import re

from draw_timing import DOCUMENT, with_diagrams
from stmoe.top import EngineTop
from stmoe_golden.config import preset


def test_timing_diagrams_are_what_the_engine_does() -> None:
    text = DOCUMENT.read_text()
    assert text.count("<!-- timing: ") == 4
    assert with_diagrams(text) == text, "python tb/draw_timing.py draws them anew"


def test_every_port_is_described_with_its_width() -> None:
    text = DOCUMENT.read_text()
    top = EngineTop(preset("gpt_oss_20b"))
    described = [re.escape(name).replace(r"\*", ".*") for name in re.findall(r"`(\w+\*?)`", text)]
    for name, member in top.signature.members.items():
        assert any(re.fullmatch(pattern, name) for pattern in described), f"{name} is missing"
        if name.endswith("tdata"):
            (row,) = [x for x in text.splitlines() if x.startswith(f"| `{name[: -len('tdata')]}*`")]
            assert re.search(rf"\b{member.shape} bits", row), f"{name} has {member.shape} bits"
    widths = {"m_axi_araddr": "40-bit addr", "m_axi_rdata": "128-bit data", "m_axi_rid": "3-bit"}
    for name, words in {**widths, "s_axil_awaddr": "15-bit addr"}.items():
        assert words.split("-")[0] == str(top.signature.members[name].shape) and words in text
