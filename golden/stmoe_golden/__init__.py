# SPDX-License-Identifier: Apache-2.0
"""The golden model of the ST-MoE prefetch engine.

Names are loaded when they are first used: the RTL generator needs ``config`` alone, without
Numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PRESETS, ConfigError, EngineConfig, preset, rank_gain
    from .offload import ExpertOffload
    from .predictor import Predictor
    from .replay import ReplayError, ReplayResult, replay_trace
    from .synthetic import markov_trace
    from .trace_import import import_traces
    from .trace_statistics import trace_statistics
    from .traces import Trace, TraceError, config_for, load_trace, save_trace

__all__ = [
    "PRESETS",
    "ConfigError",
    "EngineConfig",
    "ExpertOffload",
    "Predictor",
    "ReplayError",
    "ReplayResult",
    "Trace",
    "TraceError",
    "config_for",
    "import_traces",
    "load_trace",
    "markov_trace",
    "preset",
    "rank_gain",
    "replay_trace",
    "save_trace",
    "trace_statistics",
]

_MODULES = {
    "config": ("PRESETS", "ConfigError", "EngineConfig", "preset", "rank_gain"),
    "offload": ("ExpertOffload",),
    "predictor": ("Predictor",),
    "replay": ("ReplayError", "ReplayResult", "replay_trace"),
    "synthetic": ("markov_trace",),
    "trace_import": ("import_traces",),
    "trace_statistics": ("trace_statistics",),
    "traces": ("Trace", "TraceError", "config_for", "load_trace", "save_trace"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
