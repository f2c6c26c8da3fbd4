# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the order of their files on several cores, and one warning less.

A file is one worker's, whole. Those that take longest begin first, so that none of them is what a
single core still works on when all else is done.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from amaranth.hdl import UnusedElaboratable

LONGEST_FIRST = (
    "test_sim",
    "test_engine",
    "test_board",
    "test_examples",
    "test_predictor",
    "test_fpga",
    "test_slot_manager",
    "test_dma_scheduler",
    "test_ppa",
    "test_collisions",
    "test_directed",
    "test_registers",
    "test_buffer_writer",
    "test_axi_cdc",
    "test_verilog_writer",
)


def pytest_configure() -> None:
    """No warning of a component that is only read for its ports, or whose constructor refused.

    The garbage collector finds it in the middle of another test or after the last: a filter of the
    test alone would miss it.
    """
    warnings.filterwarnings("ignore", category=UnusedElaboratable)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others as they were."""
    place = {name: n for n, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, len(place)))
