# SPDX-License-Identifier: Apache-2.0
"""Command lines of the laboratory; the work itself is done in :mod:`stmoe_golden`."""
