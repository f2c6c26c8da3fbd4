# SPDX-License-Identifier: Apache-2.0
"""Reports: what a page holds, what a timeline must be, and how both look to a real browser."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from command import ended, refused
from stmoe_golden.compare import compare
from stmoe_golden.machine import machine_for_harness
from stmoe_golden.reporting import report as report_module
from stmoe_golden.reporting.figures import figures_of
from stmoe_golden.reporting.pareto import pareto_front
from stmoe_golden.reporting.report import make_report
from stmoe_golden.reporting.study import study_of_compare, study_of_sim
from stmoe_golden.reporting.svg_chart import number, ticks
from stmoe_golden.reporting.trace_events import trace_events
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.traces import config_for, load_trace, save_trace

POLICIES = ("ours", "lru", "on_demand", "paper", "oracle")
SIM_FIGURES = {"time", "latency", "stall", "accuracy", "coverage", "bytes", "energy", "pareto",
               "occupancy", "experts"}  # fmt: skip


def sim_result(folder: Path, tokens: int, **changes) -> Path:
    """A report of make sim, as tb/sim.py writes it, of a synthetic trace."""
    trace = markov_trace(num_tokens=max(tokens, 2), num_layers=6, num_experts=16, top_k=4)
    save_trace(trace, folder / "trace.npz")
    config = config_for(trace)
    path = folder / "report.json"
    result = {
        "match": True, "trace": str(folder / "trace.npz"), "preset": None, "tokens": tokens,
        "events": 1234, "mismatches": 0, "cycles": 500 * tokens, "wall_s": 1.0, "load_ratio": 1.0,
        "seed": 1, "config": dataclasses.asdict(config), "counters": {"tokens": [tokens, tokens]},
        "machine": {"attention_cycles": 256, "expert_cycles": 64, "latency": 32},
        "prediction": None, "latency": {"cycles": list(range(3000, 3000 + tokens))},
    } | changes  # fmt: skip
    path.write_text(json.dumps(result))
    return path


def compare_result(folder: Path, **options) -> Path:
    """What stmoe compare --json prints."""
    trace = markov_trace(num_tokens=200, num_layers=6, num_experts=16, top_k=4)
    save_trace(trace, folder / "trace.npz")
    trace = load_trace(folder / "trace.npz")
    found = compare(trace, config_for(trace), policies=POLICIES, **options)
    path = folder / "compare.json"
    path.write_text(found.to_json())
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a simulation: (report, page's text)."""
    folder = tmp_path_factory.mktemp("report")
    done = make_report(sim_result(folder, 400), folder / "out", policies=POLICIES)
    return done, done.page.read_text()


# The page ------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_fetches_nothing(made):
    done, text = made
    assert done.page.stat().st_size < 5e6
    links = re.findall(r'(?:src|href|url|@import)\s*[=(]\s*["\']?([^"\')> ]*)', text)
    assert all(link.startswith("data:") for link in links), links
    assert "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text


def test_every_figure_has_a_title_with_units_a_sentence_and_a_table(made):
    done, text = made
    sections = re.findall(r'<section class="card" id="([a-z-]+)">(.*?)</section>', text, re.S)
    assert {key for key, _ in sections} == SIM_FIGURES and done.figures == len(SIM_FIGURES)
    for key, body in sections:
        title = re.search(r"<h2>(.*?)</h2>", body).group(1)
        assert re.search(r"\(.+\)", title), (key, title)
        assert re.search(r'<p class="said">[A-Z].+\.</p>', body), key
        assert "<svg " in body and body.count("<tr>") > 2, key
        assert not re.search(r"\b(nan|inf)\b", body, re.I), key


def test_figures_are_what_the_timing_model_says(tmp_path):
    path = sim_result(tmp_path, 300)
    trace = load_trace(tmp_path / "trace.npz")
    config = config_for(trace)
    machine = machine_for_harness(config, attention_cycles=256, expert_cycles=64, latency=32)
    study = study_of_sim(path, policies=POLICIES)
    rows = {row["policy"]: row for row in study.rows}
    found = compare(trace, config, machine=machine, policies=POLICIES)
    figures = {figure.key: figure for figure in figures_of(study)}
    for row in found.rows:
        want = row.as_dict()
        assert rows[row.policy]["time"] == want["time"]
        time = next(r for r in figures["time"].table if r[0] == row.policy)
        assert time[1] == want["time"] and time[2] + time[3] == pytest.approx(want["time"])
        energy = next(r for r in figures["energy"].table if r[0] == row.policy)
        assert energy[1] == pytest.approx(sum(energy[2:]))
        late = next(r for r in figures["latency"].table if r[0] == row.policy)
        assert (late[2], late[4]) == pytest.approx((want["p50"], want["p99"]))
    # The RTL's own latencies, of the measured half, in units of a token's compute.
    rtl = next(r for r in figures["latency"].table if r[0] == "RTL")
    assert rtl[5] == pytest.approx(3299 / (6 * (256 + 4 * 64)))
    heat = figures["experts"].table
    counts = np.bincount(trace.experts[:, 0].ravel(), minlength=16)
    assert heat[0][1] == counts.argmax() and heat[0][2] == pytest.approx(counts.max() / (300 / 4))


def test_the_buffer_that_was_compared_is_timed_again(tmp_path):
    trace = markov_trace(num_tokens=200, num_layers=6, num_experts=16, top_k=4)
    save_trace(trace, tmp_path / "trace.npz")
    trace = load_trace(tmp_path / "trace.npz")
    config = config_for(trace).replace(quota=3, staging=17)
    path = tmp_path / "compare.json"
    path.write_text(compare(trace, config, policies=("ours", "lru")).to_json())
    assert not [note for note in study_of_compare(path).notes if "timed again" in note]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_run_of_very_few_tokens_has_a_report(tmp_path, tokens):
    done = make_report(sim_result(tmp_path, tokens), tmp_path / "out", policies=("ours", "lru"))
    assert done.figures == len(SIM_FIGURES)


def test_a_run_that_failed_has_a_report_that_says_so(tmp_path):
    path = sim_result(
        tmp_path, 40, match=False, failure="<first> mismatch\nmore", counters={}, latency=None
    )
    done = make_report(path, tmp_path / "out", policies=("ours", "lru"))
    text = done.page.read_text()
    assert "did NOT agree with the golden model: &lt;first&gt; mismatch</p>" in text
    assert done.figures == len(SIM_FIGURES)


def test_a_comparison_is_timed_again_and_held_to_its_file(tmp_path):
    path = compare_result(tmp_path, load_ratio=2.0)
    study = study_of_compare(path)
    assert set(study.details) == {"ours", "lru"}
    assert not [note for note in study.notes if "timed again" in note]
    assert {figure.key for figure in figures_of(study)} == SIM_FIGURES
    changed = json.loads(path.read_text())
    changed["rows"][0]["time"] += 0.125
    path.write_text(json.dumps(changed))
    (note,) = [n for n in study_of_compare(path).notes if "timed again" in n]
    assert note.startswith("ours, timed again: ")


def test_without_its_trace_a_comparison_still_has_what_its_file_holds(tmp_path):
    path = compare_result(tmp_path, system="pcie4_x16")
    (tmp_path / "trace.npz").unlink()
    done = make_report(path, tmp_path / "out")
    assert done.timeline is None and not (tmp_path / "out" / "timeline.json").exists()
    assert done.notes[0].startswith("Figures that need the trace are left out: ")
    assert done.figures == 4  # time, bytes, energy, Pareto


# Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: "),
        ("[1]", "must hold a JSON object, not list"),
        ("{}", "not a result that a report can be made of; results are those of make sim"),
        ('{"rows": [], "guardrails": [], "trace": "x", "tokens": 1}', "rows must not be empty"),
        ('{"rows": [{"policy": "ours"}], "guardrails": [], "trace": "x", "tokens": 1}',
         "rows[0]: time must be int or float, not None"),
        ('{"match": true, "counters": {}, "trace": "no.npz", "tokens": 5}',
         "no.npz: No such file or directory"),
        ('{"sweep": "x", "points": []}', "points must be a list of at least one point"),
        ('{"sweep": "x", "points": [{}]}', "points[0] is not a point of a sweep: "),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "result.json"
    path.write_text(text)
    assert message in refused(ended(capsys, "report", path, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "ours,best"], "argument --policies: must be of ours, "),
        (["--policies", "lru,lru"], "argument --policies: lru is given twice"),
        (["--spans", "many"], "argument --spans: must be 0 to 2000000, not 'many'"),
        (["/no/such.json"], "/no/such.json: No such file or directory"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(tmp_path, capsys, arguments, message):
    assert message in refused(ended(capsys, "report", *arguments, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_report_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    path = sim_result(tmp_path, 20)
    make_report(path, tmp_path / "out", policies=("ours", "lru"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module, "study_page", broken)
    with pytest.raises(KeyboardInterrupt):
        make_report(path, tmp_path / "out", policies=("ours", "lru"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


# The timeline --------------------------------------------------------------------------------


def check_trace_events(found: dict) -> dict[tuple[int, int], list[tuple[float, float, str]]]:
    """Hold a file to the trace-event format; the spans of each lane."""
    assert isinstance(found["traceEvents"], list) and found["displayTimeUnit"] in ("ms", "ns")
    lanes: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    names: dict[tuple[int, int], str] = {}
    for event in found["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(event), event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        lane = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event["name"] in (
                "process_name", "process_sort_index", "thread_name", "thread_sort_index",
            )  # fmt: skip
            if event["name"] == "thread_name":
                assert lane not in names
                names[lane] = event["args"]["name"]
            continue
        assert event["ph"] == "X", event
        assert event["ts"] >= 0 and event["dur"] >= 0, event
        spans = lanes.setdefault(lane, [])
        if spans:
            assert event["ts"] >= spans[-1][0], "ts falls"
            assert event["ts"] >= spans[-1][1], f"{event} overlaps {spans[-1]}"
        spans.append((event["ts"], event["ts"] + event["dur"], event["name"]))
    assert set(lanes) <= set(names), "a lane without a name"
    assert len(set(names.values())) == len(names)
    return {names[lane]: spans for lane, spans in lanes.items()} | {
        name: [] for lane, name in names.items() if lane not in lanes
    }


def test_the_timeline_holds_to_the_format_and_has_every_lane(made):
    done, _ = made
    lanes = check_trace_events(json.loads(done.timeline.read_text()))
    assert {"compute", "link", *(f"slot {i}" for i in range(6 * 4 + 8))} <= set(lanes)
    assert len(lanes["compute"]) > 1000 and len(lanes["link"]) > 100
    kinds = {name.split()[0] for spans in lanes.values() for _, _, name in spans}
    assert {"attention", "expert", "stall", "demand", "prefetch"} <= kinds


def test_an_expert_runs_only_once_its_slot_is_loaded(made):
    done, _ = made
    lanes = check_trace_events(json.loads(done.timeline.read_text()))
    seen = 0
    for name, spans in lanes.items():
        if not name.startswith("slot"):
            continue
        holds = None
        for _, _, text in spans:
            kind, *expert = text.split()
            if kind == "expert":
                # What was loaded before the first span recorded is not known.
                assert holds in (None, expert), (name, text)
                seen += holds == expert
            holds = None if kind == "cancelled" else expert
    assert seen > 500


def test_an_overlap_or_a_negative_length_is_found(made):
    found = json.loads(made[0].timeline.read_text())
    spans = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    spans[3]["dur"] += 1e6
    with pytest.raises(AssertionError, match="overlaps"):
        check_trace_events(found)
    spans[3]["dur"] = -1
    with pytest.raises(AssertionError):
        check_trace_events(found)


def test_times_are_in_microseconds_where_the_system_is_real(tmp_path):
    study = study_of_compare(compare_result(tmp_path, system="pcie4_x16"), spans=500)
    result = study.details["ours"]
    cycles, real = (
        [e for e in trace_events(result, microseconds_per_cycle=scale)["traceEvents"]
         if e["ph"] == "X"]
        for scale in (1.0, 1e-3)
    )  # fmt: skip
    assert len(real) == len(cycles) > 100
    assert [e["dur"] for e in real] == pytest.approx([e["dur"] / 1000 for e in cycles], abs=1e-6)


def test_the_far_tier_has_a_lane_and_its_energy_a_colour(tmp_path):
    path = compare_result(tmp_path, system="pcie4_x16+nvme:20")
    study = study_of_compare(path, spans=2000)
    assert not [note for note in study.notes if "timed again" in note]  # of the same machine
    assert "holds 20 experts; the others: Samsung 990 PRO" in dict(study.facts)["system"]
    found = trace_events(study.details["ours"])
    check_trace_events(found)
    names = {
        e["args"]["name"]: e["pid"] for e in found["traceEvents"] if e["name"] == "process_name"
    }
    reads = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == names["far tier"]]
    assert len(reads) > 10 and all(e["name"].startswith("far L") for e in reads)
    energy = next(figure for figure in figures_of(study) if figure.key == "energy")
    assert "loads from nvme" in str(energy.legend)
    alone = study_of_compare(compare_result(tmp_path, system="pcie4_x16"), spans=50)
    assert "far tier" not in json.dumps(trace_events(alone.details["ours"]))


# Pieces --------------------------------------------------------------------------------------


def test_a_front_is_what_nothing_beats():
    points = [(3, 1), (1, 3), (2, 2), (2, 3), (3, 3), (1, 3), (4, 1)]
    assert pareto_front(points) == [1, 2, 0]
    rng = np.random.default_rng(1)
    many = [tuple(p) for p in rng.integers(0, 12, (80, 2)).tolist()]
    front = {many[i] for i in pareto_front(many)}
    for p in many:
        beaten = any(a <= p[0] and b <= p[1] and (a, b) != p for a, b in many)
        assert (p in front) != beaten


def test_ticks_are_round_and_within():
    for low, high in ((0, 1), (0.93, 1.71), (-3, 4e6), (5, 5)):
        found = ticks(low, high)
        assert found and all(low - 1e-9 <= t <= high * (1 + 1e-9) + 1e-9 for t in found)
    assert [number(v) for v in (0, 1.0, 0.25, 1234567, 12345, 1e-5)] == [
        "0", "1", "0.25", "1.23e+06", "12,345", "1e-05",
    ]  # fmt: skip


# A real browser ------------------------------------------------------------------------------

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

LOOK = """() => {
  const box = (e) => { const r = e.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom]; };
  return [...document.querySelectorAll("section[id]")].map((section) => {
    const svg = section.querySelector("svg");
    return {
      key: section.id, svg: box(svg),
      marks: [...svg.querySelectorAll("path.line,path.area,path.heat,rect.fill,circle.dot")]
        .map(box),
      labels: [...svg.querySelectorAll("text.label")].map((t) => t.textContent),
      texts: [...svg.querySelectorAll("text")].map((t) => [t.textContent, ...box(t)]),
    };
  });
}"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: `make browser` installs it and a browser"
    )
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on PATH: `make browser` (or apt install chromium) installs one")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, and the page is ours.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_every_figure_without_complaint(browser, made, theme, tmp_path):
    done, _ = made
    said: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=theme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url)
            if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
    page.goto(done.page.resolve().as_uri())
    figures = page.evaluate(LOOK)
    assert {figure["key"] for figure in figures} == SIM_FIGURES
    for figure in figures:
        left, top, right, bottom = figure["svg"]
        assert right - left > 300 and bottom - top > 100, figure["key"]
        drawn = [b for b in figure["marks"] if b[2] - b[0] > 1 or b[3] - b[1] > 1]
        assert drawn, figure["key"]
        assert figure["labels"] and all(figure["labels"]), figure["key"]
        texts = figure["texts"]
        for i, (text, *a) in enumerate(texts):
            assert a[2] > a[0] and a[3] > a[1], (figure["key"], text)
            inside = a[0] >= left - 1 and a[2] <= right + 1 and a[3] <= bottom + 1
            assert inside, (figure["key"], text, a, figure["svg"])
            for other, *b in texts[:i]:
                apart = a[0] >= b[2] - 1 or b[0] >= a[2] - 1 or a[1] >= b[3] - 4 or b[1] >= a[3] - 4
                assert apart, f"{figure['key']}: {text!r} is over {other!r}"
    back, ink = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; }"
    )
    dark = [sum(map(int, re.findall(r"\d+", c)[:3])) / 3 < 128 for c in (back, ink)]
    assert dark == [theme == "dark", theme == "light"]
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    heat = page.locator("#experts svg")
    heat.scroll_into_view_if_needed()
    box = heat.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    assert re.match(r"layer \d+, expert \d+: [\d.]+ x", page.inner_text("#experts .readout"))
    page.screenshot(path=tmp_path / f"{theme}.png", full_page=True)
    assert not said, said
    page.close()
