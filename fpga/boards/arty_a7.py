# SPDX-License-Identifier: Apache-2.0
"""Digilent Arty A7 with a 35T or a 100T: 100 MHz oscillator, FT2232H to USB, reset button."""

from amaranth_boards.arty_a7 import ArtyA7_35Platform, ArtyA7_100Platform

from fpga.board import Board, Capacity

# The default presets are the largest that fit by Yosys's count: `python -m fpga.build measure`.
BOARDS = (
    Board(
        name="arty_a7",
        title="Arty A7-35T",
        platform=ArtyA7_35Platform,
        capacity=Capacity(
            luts=20_800, registers=41_600, block_rams=50, block_ram_bits=36_864, multipliers=90
        ),
        default_preset="gpt_oss_20b",
        clock_hz=50_000_000,
        reset="rst",
    ),
    Board(
        name="arty_a7_100t",
        title="Arty A7-100T",
        platform=ArtyA7_100Platform,
        capacity=Capacity(
            luts=63_400, registers=126_800, block_rams=135, block_ram_bits=36_864, multipliers=240
        ),
        default_preset="olmoe_1b_7b",
        clock_hz=50_000_000,
        reset="rst",
    ),
)
