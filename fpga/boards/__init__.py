# SPDX-License-Identifier: Apache-2.0
"""One file for a board, or for the variants of one; each lists them in ``BOARDS``."""
