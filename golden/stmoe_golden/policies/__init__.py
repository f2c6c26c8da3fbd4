# SPDX-License-Identifier: Apache-2.0
"""Prefetch policies, one class a file; see :mod:`stmoe_golden.policies.base` for the hooks."""
