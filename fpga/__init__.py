# SPDX-License-Identifier: Apache-2.0
"""Boards and what turns the board top into a bitstream for them: `make boards`, `make bitstream`.

``board.py`` says what a board is, ``boards/`` holds one file for each, ``pll.py`` and
``on_board.py`` connect the board top to its pins and clock, ``flow_ecp5.py`` and
``flow_series7.py`` run the tools, ``build.py`` is the command.
"""
