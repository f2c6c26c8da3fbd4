# SPDX-License-Identifier: Apache-2.0
"""The host's side of a board: talks to ``stmoe.harness.board_top`` over a serial port."""
