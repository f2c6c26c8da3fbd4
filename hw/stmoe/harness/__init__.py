# SPDX-License-Identifier: Apache-2.0
"""What surrounds the engine in simulation and on a board: trace, accelerator, memory, monitors."""
