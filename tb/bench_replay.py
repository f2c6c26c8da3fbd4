# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and coverage of whole-trace replay: ``python tb/bench_replay.py``.

Prints JSON: for each trace that is there, the learned predictor and the paper's tables, both with
a threshold picked on the warm-up half to issue at most 1.5 K.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from stmoe_golden.replay import PREDICTORS, replay_trace
from stmoe_golden.traces import config_for, load_trace

ROOT = Path(__file__).resolve().parents[1]
GPT_OSS = ROOT.parent / "shared/traces/gpt_oss_20b_decode.npz"
ISSUE_RATE = 1.5


def measure() -> dict[str, Any]:
    """Figures by trace and predictor, traces that are missing, and this process's peak RSS."""
    found: dict[str, Any] = {}
    missing = [] if GPT_OSS.exists() else [str(GPT_OSS)]
    own = sorted((ROOT / "sim_traces").glob("*.npz"))
    if not own:
        missing.append(str(ROOT / "sim_traces" / "*.npz"))
    for path in ([GPT_OSS] if GPT_OSS.exists() else []) + own:
        trace = load_trace(path)
        config = config_for(trace)
        figures: dict[str, Any] = {"tokens": trace.num_tokens}
        for predictor in PREDICTORS:
            result = replay_trace(trace, config, predictor=predictor, issue_rate=ISSUE_RATE)
            figures[predictor] = {
                "tokens_per_s": result.tokens_per_s,
                "recall": {name: round(value, 4) for name, value in result.recall.items()},
                "coverage": round(result.coverage, 4),
                "issue_rate": round(result.issue_rate, 4),
                "threshold": result.threshold,
                "hindsight": result.hindsight,
            }
        # The paper's own gate issues more: a sum of 2.
        paper = replay_trace(trace, config, predictor="paper")
        figures["paper_own_gate"] = {
            "coverage": round(paper.coverage, 4),
            "issue_rate": round(paper.issue_rate, 4),
        }
        found[path.stem] = figures
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    return {
        "issue_rate_limit": ISSUE_RATE,
        "traces": found,
        "missing": missing,
        "peak_rss_mib": round(peak, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
