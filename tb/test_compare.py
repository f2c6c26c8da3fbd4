# SPDX-License-Identifier: Apache-2.0
"""`stmoe compare`: its contract, its policies beside each other, its guardrails, its errors."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from bench_compare import shuffled
from command import ended
from simulation import IN_REPO, ROOT
from stmoe_golden.compare import compare
from stmoe_golden.config import PRESETS, EngineConfig
from stmoe_golden.energy import energy_table, table_bits
from stmoe_golden.policies.registry import POLICIES
from stmoe_golden.synthetic import markov_trace
from stmoe_golden.systems import EXPERT_SHAPES, SYSTEMS, expert_bytes_of
from stmoe_golden.timing import TimingError, TimingStopped, simulate
from stmoe_golden.traces import Trace, config_for, load_trace, save_trace

CONTRACT = [
    "policy",
    "quota",
    "load_ratio",
    "time",
    "hit_rate",
    "bytes",
    "p50",
    "p99",
    "energy_j",
    "miss_recall",
    "useful",
    "late",
    "useless",
    "cancelled",
    "pollution",
]
NAMES = [
    "ours",
    "on_demand",
    "lru",
    "lfu",
    "static",
    "previous",
    "paper",
    "pregated",
    "adaptive_gating",
    "oracle",
    "belady",
]


@pytest.fixture(scope="module")
def in_repo() -> Trace:
    return load_trace(IN_REPO)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(markov_trace(num_tokens=200), path)
    return path


@pytest.fixture
def call(capsys):
    return functools.partial(ended, capsys, "compare")


# The contract ---------------------------------------------------------------------------------


def test_json_has_a_row_for_each_policy_with_every_key(call):
    status, out, err = call(IN_REPO, "--json", "--quota", 4, "--load-ratio", 2, "--tokens", 1500)
    assert (status, err) == (0, "") and out.count("\n") == 1
    report = json.loads(out)
    assert [row["policy"] for row in report["rows"]] == NAMES == list(POLICIES)
    for row in report["rows"]:
        assert set(CONTRACT) <= set(row)
        assert (row["quota"], row["load_ratio"]) == (4, 2.0)
        assert 0 <= row["hit_rate"] <= 1 and row["bytes"] >= 0 and row["energy_j"] > 0
        assert row["p50"] <= row["p99"]
        for name in ("useful", "late", "useless", "cancelled", "pollution"):
            assert isinstance(row[name], int) and row[name] >= 0
        if row["policy"] != "adaptive_gating":  # which runs less than the model does
            assert row["time"] >= 1
    assert isinstance(report["guardrails"], list)


def test_rows_stand_to_each_other_as_they_must(in_repo):
    config = config_for(in_repo).replace(quota=6)
    rows = {row.policy: row.as_dict() for row in compare(in_repo, config, load_ratio=1.5).rows}
    time = {name: row["time"] for name, row in rows.items()}
    loads = {name: row["bytes"] for name, row in rows.items()}
    assert time["oracle"] < time["ours"] < time["paper"] < time["lru"] < time["on_demand"]
    assert all(loads["belady"] < loads[n] for n in ("lru", "lfu", "static", "ours", "previous"))
    assert loads["on_demand"] == 1 and loads["pregated"] == pytest.approx(1, abs=1e-4)
    assert rows["ours"]["miss_recall"] > 0.4 and rows["oracle"]["miss_recall"] > 0.8
    for name in ("on_demand", "lru", "lfu", "static", "belady", "adaptive_gating"):
        assert rows[name]["useful"] == rows[name]["useless"] == 0
        assert rows[name]["miss_recall"] == 0
    assert rows["adaptive_gating"]["skipped"] > 0
    assert "lru_per_layer" in rows["lru"]["note"] and "lru_global" in rows["lru"]["note"]


def test_adaptive_gating_skips_nothing_without_gate_weights(in_repo):
    bare = replace(in_repo.head(500), weights=None)
    row = compare(bare, config_for(bare), policies=["adaptive_gating"]).rows[0].as_dict()
    assert row["skipped"] == 0 and "no ordered gate weights" in row["note"]


# Never slower than LRU ------------------------------------------------------------------------


@pytest.mark.parametrize("quota", [0, 4, 16])
def test_ours_is_never_slower_than_the_best_lru(in_repo, quota):
    config = config_for(in_repo).replace(quota=quota)
    for ratio in (0.25, 1, 8):
        result = compare(in_repo, config, load_ratio=ratio, policies=["ours", "lru"])
        ours, lru = (row.result.time for row in result.rows)
        assert ours <= 1.005 * lru, (quota, ratio)


@pytest.mark.parametrize("how", ["uniform", "tokens", "layers"])
def test_ours_is_hardly_slower_on_shuffled_routing(in_repo, how):
    trace = shuffled(in_repo.head(5000), how)
    for quota in (0, 8, 16):
        config = config_for(trace).replace(quota=quota)
        for ratio in (1, 8):
            result = compare(trace, config, load_ratio=ratio, policies=["ours", "lru"])
            ours, lru = (row.result.time for row in result.rows)
            assert ours <= 1.02 * lru, (how, quota, ratio)


# Guardrails -----------------------------------------------------------------------------------


def test_guardrails_name_the_number_that_decides(in_repo):
    trace = in_repo.head(1000)
    config = config_for(trace).replace(quota=8)
    few = ["on_demand"]
    assert compare(trace, config, load_ratio=1, policies=few).guardrails == []
    (saturated,) = compare(trace, config, load_ratio=16, policies=few).guardrails
    assert re.search(r"link saturated.* [\d.]+ times the compute time", saturated)
    small = config.replace(quota=0, staging=6)
    (buffer,) = compare(trace, small, load_ratio=0.5, policies=few).guardrails
    assert "6 slots" in buffer and "8 are needed" in buffer
    random = shuffled(trace, "uniform")
    (locality,) = compare(random, config, load_ratio=1, policies=few).guardrails
    assert re.search(r"without locality: 0\.1\d\d .* chance it would be 0\.125", locality)
    (idle,) = compare(trace, config.replace(quota=28), load_ratio=0.2, policies=few).guardrails
    assert re.search(r"nothing to hide: .* waits 0\.\d\d% of the time", idle)


def test_guardrail_says_when_latency_decides(in_repo):
    trace = in_repo.head(300)  # experts of 2 KiB from a disk
    said = compare(trace, config_for(trace), system="nvme", policies=["on_demand"]).guardrails
    assert any(re.search(r"latency decides: .* 181\.8 times", text) for text in said), said


def test_guardrail_says_when_the_far_latency_decides(in_repo):
    trace = in_repo.head(300)  # experts of 2 KiB

    def said(near):
        found = compare(
            trace, config_for(trace), system=f"lpddr5+nvme:{near}", policies=["on_demand"]
        )
        return [text for text in found.guardrails if "far" in text]

    texts = said(20)
    assert any("holds 8% of the experts, and the first byte of another comes" in t for t in texts)
    assert any("after 181.8 times what reading it then takes" in t for t in texts), texts
    # Nothing that more memory could change: everything is read once.
    assert said(256) == said(999_999) == []


# Systems and energy ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_system_sets_the_load_ratio_from_real_figures(in_repo, name):
    trace = replace(in_repo.head(200), info={**in_repo.info, "expert_bytes": 12_441_600})
    result = compare(trace, config_for(trace), system=name, policies=["on_demand"])
    system = SYSTEMS[name]
    assert result.load_ratio == pytest.approx(system.compute / system.link / 2, rel=0.01)
    compute = 12_441_600 / system.compute
    assert result.token_seconds == pytest.approx(
        trace.num_layers * 2 * trace.top_k * compute, rel=0.01
    )


def test_two_tiers_are_named_as_one_system(in_repo):
    """The near one as alone; the far one's bandwidth, latency and energy for what that lacks."""
    trace = replace(in_repo.head(400), info={**in_repo.info, "expert_bytes": 12_441_600})
    config, few = config_for(trace), ["ours", "lru", "on_demand"]
    alone = compare(trace, config, system="pcie4_x16", policies=few)
    tiers = compare(trace, config, system="pcie4_x16+nvme:40", policies=few)
    machine = tiers.rows[0].result.machine
    assert machine.near == 40 and machine.far_latency.tolist() == [50_000] * 8
    assert machine.far_load.tolist() == [round(12_441_600 / 7.45)] * 8
    assert (machine.load == alone.rows[0].result.machine.load).all()
    assert tiers.load_ratio == alone.load_ratio and tiers.system == "pcie4_x16+nvme:40"
    for one, two in zip(alone.rows, tiers.rows, strict=True):
        reads = two.result.total("far_loads")
        assert 0 < reads <= two.result.total("demand_loads") + two.result.total("prefetch_loads")
        assert one.as_dict()["far_loads"] == 0 and two.as_dict()["far_loads"] == reads
        assert set(one.energy) == {"pcie", "table"}
        picojoules = 8 * 12_441_600 * reads * 120 / two.result.tokens_measured
        assert two.energy["nvme"] == pytest.approx(picojoules * 1e-12)
        assert two.result.time > one.result.time
    assert one.as_dict()["hidden"] is not None and two.as_dict()["hidden"] is None
    (said,) = [text for text in tiers.guardrails if "far" in text]
    lru = tiers.row("lru").result
    share = lru.total("far_loads") * 12_441_600 / 7.45 / lru.compute_cycles
    assert said.startswith("far tier saturated: the memory behind the link holds 16% of the exp")
    assert f"with LRU reading the others takes {share:.2f} times the compute time" in said
    assert not any("far" in text for text in alone.guardrails)
    heads, row = tiers.table().split("\n")[3:5]
    assert heads.endswith(" far") and len(heads.split()) == len(row.split())
    assert " far" not in alone.table().split("\n")[3]
    same = compare(trace, config, system="pcie4_x16+pcie4_x16:40", policies=["lru"]).rows[0]
    assert set(same.energy) == {"pcie", "table"} and same.energy["pcie"] > 0


def test_expert_sizes_are_those_of_the_models():
    assert set(EXPERT_SHAPES) < set(PRESETS)
    p = PRESETS["mixtral_8x7b"]
    trace = markov_trace(
        num_tokens=2, num_layers=p.num_layers, num_experts=p.num_experts, top_k=p.top_k
    )
    # Mixtral: 3 matrices of 4096 x 14336.
    assert expert_bytes_of(trace, "fp16").tolist() == [2 * 3 * 4096 * 14336] * 32
    assert expert_bytes_of(trace, "int4")[0] * 4 == expert_bytes_of(trace, "fp16")[0]
    sizes = [1000 + layer for layer in range(32)]
    stated = replace(trace, info={**trace.info, "expert_bytes": sizes})
    assert expert_bytes_of(stated).tolist() == sizes


def test_energy_is_bits_times_picojoules(in_repo):
    trace = in_repo.head(400)
    config = config_for(trace)

    def joules(**changes):
        result = compare(trace, config, policies=["ours"], energy=changes)
        return result.rows[0]

    plain, dear = joules(), joules(dram=40.0, table=0.0)
    loads = plain.result.loads / plain.result.tokens_measured
    assert plain.energy["dram"] == pytest.approx(loads * 2048 * 8 * energy_table()["dram"] * 1e-12)
    assert dear.energy == {"dram": pytest.approx(2 * plain.energy["dram"]), "table": 0}
    bits = plain.energy["table"] / (0.31e-12 * config.num_layers)
    assert bits == pytest.approx(table_bits(config))


def test_table_bits_are_those_of_the_rows_that_an_event_touches():
    config = EngineConfig(num_layers=4, num_experts=8, top_k=2)
    rows = 2 * 4 * 8 * 8  # K rows of E weights of 8 bits in D + 1 tables
    assert 3 * rows < table_bits(config) < 3 * rows + 12 * 8 * config.score_bits + 1000


# A policy of one's own --------------------------------------------------------------------------


def test_policy_of_the_documentation_runs(call, tmp_path, small):
    text = (ROOT / "docs" / "compare.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "markov.py"
    path.write_text(example)
    status, out, _ = call(small, "--policies", "lru", "--policy-file", path, "--json")
    assert status == 0
    rows = {row["policy"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["lru", "markov"]
    assert rows["markov"]["useful"] > 0


HOOKS = """
import numpy as np
from stmoe_golden.policies.base import Policy

class Known(Policy):
    name = "known"
    prefetches = True
    values = True
    def prepare(self, trace):
        self.trace = trace
        self.calls = []
    def begin(self, new_sequence, token_id):
        self.calls.append("begin")
        self.token = len([c for c in self.calls if c == "begin"]) - 1
    def guess(self, layer):
        token = self.token + (layer == 0 and self.calls[-1] != "begin")
        self.calls.append(f"guess {layer}")
        row = np.zeros(self.config.num_experts, np.int32)
        if token < self.trace.num_tokens:
            row[self.trace.experts[token, layer]] = 1
        return row
    def route(self, layer, experts):
        assert (experts == self.trace.experts[self.token, layer]).all()
        self.calls.append(f"route {layer}")
    def worth(self, layer):
        self.calls.append(f"worth {layer}")
        return np.zeros(self.config.num_experts, np.int32)
"""


def test_hooks_are_called_in_the_documented_order(tmp_path):
    from stmoe_golden.machine import machine_for_ratio
    from stmoe_golden.policies.registry import load_policy_file
    from stmoe_golden.timing import simulate

    path = tmp_path / "known.py"
    path.write_text(HOOKS)
    trace = markov_trace(num_tokens=30, num_layers=2)
    config = config_for(trace)
    policy = load_policy_file(path)(config)
    result = simulate(trace, config, machine_for_ratio(config, 0.5), policy)
    one = ["begin", "guess 0", "route 0", "worth 0", "guess 1", "route 1", "worth 1", "guess 0"]
    assert policy.calls == one * 30
    # It knows what comes: nothing is ever waited for at this ratio.
    assert result.time == 1.0


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quota", "9"], "argument --quota: must be 0 to 8, not '9'"),
        (["--quota", "x"], "argument --quota: must be 0 to 8, not 'x'"),
        (["--slots", "1"], "argument --slots: must be 2 to 4096, not '1'"),
        (["--load-ratio", "0"], "argument --load-ratio: must be 0.01 to 100, not 0"),
        (["--policies", "ours,foo"], "argument --policies: must be of ours, on_demand, lru, lfu"),
        (["--policies", "lru,lru"], "argument --policies: lru is given twice"),
        (["--system", "usb"], "argument --system: must be one of pcie4_x16, pcie5_x16, lpddr5, "),
        (["--system", "usb"], "or two of them as NAME+BEHIND:N, where NAME holds N experts"),
        (["--system", "lpddr5+usb:4"], "BEHIND the others, not 'lpddr5+usb:4'"),
        (["--system", "lpddr5+nvme"], "BEHIND the others, not 'lpddr5+nvme'"),
        (["--system", "lpddr5+nvme:1.5"], "BEHIND the others, not 'lpddr5+nvme:1.5'"),
        (["--system", "lpddr5+"], "BEHIND the others, not 'lpddr5+'"),
        (["--system", "lpddr5+nvme:0"], "must name 1 to 999999 experts after the colon, without"),
        (["--system", "lpddr5+nvme:04"], "without leading zeros, not 'lpddr5+nvme:04'"),
        (["--system", "lpddr5+nvme:1000000"], "must name 1 to 999999 experts"),
        (["--system", "nvme", "--load-ratio", "1"], "not allowed with argument"),
        (["--quota", "1", "--slots", "20"], "not allowed with argument"),
        (["--dtype", "fp8"], "expert type must be fp16, int8, int4, not 'fp8'"),
        (["--energy", "dram"], "argument --energy: must have the form NAME=PJ, not 'dram'"),
        (["--energy", "sun=1"], "unknown energy 'sun'; energies are dram, ddr3, lpddr5"),
        (["--energy", "dram=-1"], "energy dram must be 0 to 1000000 pJ/bit, not -1"),
        (["--tokens", "0"], "argument --tokens: must be an integer, 1 or more, not '0'"),
        (["--policy-file", "none.py"], "none.py: no such file; a policy file is a Python file"),
    ],
)
def test_bad_argument_is_one_line(call, small, arguments, message):
    status, out, err = call(small, *arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must define one subclass of Policy, not 0"),
        ("raise KeyError('oh')", "KeyError: 'oh'"),
        ("def (", "SyntaxError"),
        (
            "from stmoe_golden.policies.base import Policy\nclass A(Policy): name = 'lru'",
            "A.name must be new and not empty, not 'lru'",
        ),
        (
            "from stmoe_golden.policies.base import Policy\n"
            "class A(Policy):\n name = 'a'\n prefetches = True",
            "policy a: NotImplementedError: prefetches, but has no guess()",
        ),
        (
            "from stmoe_golden.policies.base import Policy\n"
            "class A(Policy):\n name = 'a'\n prefetches = True\n def guess(self, l): return [1]",
            "policy a: guess(0) must be 8 integers",
        ),
    ],
)
def test_bad_policy_file_is_one_line(call, small, tmp_path, text, message):
    path = tmp_path / "policy.py"
    path.write_text(text)
    status, out, err = call(small, "--policy-file", path)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_table_and_systems_are_for_people(call, small):
    status, out, _ = call(small, "--policies", "ours,lru")
    assert status == 0 and re.search(r"^ours +[\d.]+", out, re.M) and "best of three forms" in out
    status, out, _ = call("--list-systems")
    assert status == 0 and all(name in out for name in SYSTEMS)
    assert "\nNAME+BEHIND:N, as in pcie4_x16+nvme:384: " in out


def test_policies_timed_at_once_are_the_same(in_repo):
    config = config_for(in_repo)
    one = compare(in_repo, config, load_ratio=2, occupancy=True)
    two = compare(in_repo, config, load_ratio=2, occupancy=True, threads=4)
    assert one.to_json() == two.to_json()
    for a, b in zip(one.rows, two.rows, strict=True):
        assert np.array_equal(a.result.latency, b.result.latency), a.policy
        assert np.array_equal(a.result.occupancy, b.result.occupancy), a.policy


def test_a_failure_stops_what_is_timed_beside_it(in_repo, monkeypatch):
    stopped = []

    def endless(trace, config, machine, policy, **options):
        if policy.name.startswith("lru"):
            return simulate(trace, config, machine, policy, **options)
        if policy.name == "on_demand":
            raise TimingError("broken")
        try:
            while True:
                simulate(trace, config, machine, policy, **options)
        except TimingStopped:
            stopped.append(policy.name)
            raise

    monkeypatch.setattr("stmoe_golden.compare.simulate", endless)
    with pytest.raises(TimingError, match="broken"):
        compare(in_repo, config_for(in_repo), policies=["ours", "on_demand"], threads=2)
    assert stopped == ["ours"]
