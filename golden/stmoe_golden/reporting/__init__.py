# SPDX-License-Identifier: Apache-2.0
"""Reports: one HTML file that opens offline, and a timeline for Perfetto (docs/report.md)."""
