# SPDX-License-Identifier: Apache-2.0
"""Radiona ULX3S with an ECP5-85F: 25 MHz oscillator, FT231X to USB."""

from amaranth_boards.ulx3s import ULX3S_85F_Platform

from fpga.board import Board, Capacity

BOARDS = (
    Board(
        name="ulx3s",
        title="ULX3S 85F",
        platform=ULX3S_85F_Platform,
        capacity=Capacity(
            luts=83_640, registers=83_640, block_rams=208, block_ram_bits=18_432, multipliers=156
        ),
        default_preset="mixtral_8x7b",
        slow_presets=("gpt_oss_20b", "olmoe_1b_7b"),
        clock_hz=37_500_000,
    ),
)
