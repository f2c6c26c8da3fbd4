# SPDX-License-Identifier: Apache-2.0
"""The ST-MoE prefetch engine: an RTL generator in Amaranth."""
