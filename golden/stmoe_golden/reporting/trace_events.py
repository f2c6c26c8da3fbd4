# SPDX-License-Identifier: Apache-2.0
"""A timed run as Chrome trace events, for Perfetto (ui.perfetto.dev) or ``chrome://tracing``.

One JSON object with ``traceEvents``: complete events (``ph`` X: name, ``ts``, ``dur``) on lanes
that metadata events (``ph`` M) name. Lanes are compute (attention, experts, stalls), the link, the
far tier where there is one, and every slot of the expert buffer (the load that fills it, then the
expert's runs). Spans of one lane never overlap, and are in the order of their beginnings.

``ts`` and ``dur`` are in microseconds, as the format says; where the machine has no clock rate one
microsecond stands for one cycle. The format: Google, Trace Event Format, "Complete Events" and
"Metadata Events".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from ..timing import TIMELINE_KINDS, TimedResult

__all__ = ["trace_events", "trace_events_json"]

ACCELERATOR, LINK, BUFFER, FAR_TIER = 1, 2, 3, 4
PROCESSES = {
    ACCELERATOR: "accelerator",
    LINK: "link",
    BUFFER: "expert buffer",
    FAR_TIER: "far tier",
}

COMPUTE_KINDS = ("attention", "expert", "stall")
LOAD_KINDS = ("demand", "prefetch", "cancelled")
COLOURS = {
    "attention": "grey",
    "expert": "good",
    "stall": "terrible",
    "demand": "bad",
    "prefetch": "rail_load",
    "cancelled": "black",
    "far": "yellow",
}
"""Reserved colour names of Chrome's viewer; Perfetto picks its own."""


def trace_events(result: TimedResult, *, microseconds_per_cycle: float = 1.0) -> dict[str, Any]:
    """The recorded timeline of a run.

    Parameters
    ----------
    result : TimedResult
        With a timeline.
    microseconds_per_cycle : float
        Length of a cycle of the machine.

    Raises
    ------
    ValueError
        The run has recorded no timeline.
    """
    if result.timeline is None:
        raise ValueError("the run has recorded no timeline")
    spans = _one_span_a_load(result.timeline.tolist())
    origin = spans[0][1] if spans else 0
    events: list[dict[str, Any]] = []
    link_ends: list[tuple[int, int]] = []

    def add(process: int, lane: int, kind: str, span: list[int]) -> None:
        _, begin, end, layer, expert, _ = span
        event: dict[str, Any] = {
            "name": kind if expert < 0 else f"{kind} L{layer} E{expert}",
            "cat": kind,
            "ph": "X",
            "ts": _clean((begin - origin) * microseconds_per_cycle),
            "dur": _clean((end - begin) * microseconds_per_cycle),
            "pid": process,
            "tid": lane,
            "cname": COLOURS[kind],
            "args": {"layer": layer} if expert < 0 else {"layer": layer, "expert": expert},
        }
        events.append(event)

    for span in spans:
        kind, slot = TIMELINE_KINDS[span[0]], span[5]
        if kind in COMPUTE_KINDS:
            add(ACCELERATOR, 0, kind, span)
        elif kind in LOAD_KINDS:
            add(LINK, _lane_for(link_ends, span[1], span[2]), kind, span)
        elif kind == "far":
            add(FAR_TIER, 0, kind, span)
            continue
        if slot >= 0 and kind != "stall":
            add(BUFFER, slot, kind, span)
    lanes = [(ACCELERATOR, 0, "compute")]
    lanes += [
        (LINK, lane, "link" if lane == 0 else f"link (load {lane + 1} at once)")
        for lane in range(max(1, len(link_ends)))
    ]
    lanes += [(BUFFER, slot, f"slot {slot}") for slot in range(result.machine.slots)]
    if result.machine.tiered:
        lanes.append((FAR_TIER, 0, "reads"))
    events.sort(key=itemgetter("ts", "pid", "tid"))
    return {
        "traceEvents": _names(lanes) + events,
        "displayTimeUnit": "ns",
        "otherData": {
            "policy": result.policy,
            "microseconds_per_cycle": microseconds_per_cycle,
            "spans": len(spans),
        },
    }


def _one_span_a_load(spans: list[list[int]]) -> list[list[int]]:
    """In the order of their beginnings. A prefetch that is cancelled when all of it has been asked
    for has two spans, one until the cancel and one until its last data: it holds slot and link for
    both, so it becomes one, cancelled."""
    cancelled = {
        tuple(span[3:]) + (span[1],): span
        for span in spans
        if TIMELINE_KINDS[span[0]] == "cancelled"
    }
    kept = []
    for span in spans:
        other = cancelled.get(tuple(span[3:]) + (span[1],))
        if other is not None and other is not span:
            other[2] = max(other[2], span[2])
        else:
            kept.append(span)
    kept = [s for s in kept if s[2] >= s[1] or TIMELINE_KINDS[s[0]] != "cancelled"]
    return sorted(kept, key=lambda span: (span[1], span[2]))


def _clean(value: float) -> int | float:
    """Whole numbers without a point."""
    rounded = round(value, 6)
    return int(rounded) if rounded == int(rounded) else rounded


def _lane_for(ends: list[tuple[int, int]], begin: int, end: int) -> int:
    """The lowest lane that is free at ``begin``; ``ends`` holds (lane, end) of each."""
    for index, (lane, until) in enumerate(ends):
        if until <= begin:
            ends[index] = (lane, end)
            return lane
    ends.append((len(ends), end))
    return len(ends) - 1


def _names(lanes: Sequence[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """Metadata events: names of processes and lanes, in the order in which they are shown."""
    events: list[dict[str, Any]] = []
    used = {process for process, _, _ in lanes}
    for process, name in PROCESSES.items():
        if process not in used:
            continue
        for what, args in (
            ("process_name", {"name": name}),
            ("process_sort_index", {"sort_index": process}),
        ):
            events.append({"name": what, "ph": "M", "pid": process, "tid": 0, "args": args})
    for process, lane, name in lanes:
        for what, args in (
            ("thread_name", {"name": name}),
            ("thread_sort_index", {"sort_index": lane}),
        ):
            events.append({"name": what, "ph": "M", "pid": process, "tid": lane, "args": args})
    return events


def trace_events_json(events: dict[str, Any]) -> str:
    """The file's text."""
    return json.dumps(events, allow_nan=False, separators=(",", ":")) + "\n"
