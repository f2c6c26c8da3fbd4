# SPDX-License-Identifier: Apache-2.0
"""The configuration: its errors, its files, its presets."""

from __future__ import annotations

import dataclasses

import pytest

from stmoe_golden.config import PRESETS, ConfigError, EngineConfig, preset, rank_gain

NAMES = sorted(f.name for f in dataclasses.fields(EngineConfig))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be 1 to 256, not 0"),
        ({"num_experts": 257}, "num_experts must be 1 to 256, not 257"),
        ({"num_contexts": 2}, "num_contexts must be 1 to 1, not 2"),
        ({"weight_bits": 3}, "weight_bits must be 4 to 12, not 3"),
        ({"weight_bits": 8.0}, "weight_bits must be an integer, not 8.0"),
        ({"weight_bits": "8"}, "weight_bits must be an integer, not '8'"),
        ({"top_k": True}, "top_k must be an integer, not True"),
        ({"threshold": -8193}, "threshold must be -8192 to 8191, not -8193"),
        # No score reaches it; where nothing is selected so far ahead it does not matter.
        (
            {"threshold_2": 8000, "lookahead": 2},
            "threshold_2 must be -4096 to 4095 units where a score has 15 bits, not 8000",
        ),
        ({"threshold_2": 8000, "lookahead": 1}, None),
        ({"event_port": 1}, "event_port must be true or false, not 1"),
        ({"top_k": 9}, "top_k must be at most num_experts (8), not 9"),
        ({"axi_data_width": 96}, "axi_data_width must be 32, 64, 128, 256 or 512, not 96"),
        ({"expert_bytes": 100, "max_burst": 48}, None),
        (
            {"max_burst": 256, "axi_data_width": 128, "expert_bytes": 4096},
            None,
        ),
        ({"event_depth": 100}, "event_depth must be a power of two, not 100"),
        (
            {"prefetch_outstanding": 9},
            "prefetch_outstanding must be at most max_outstanding (8), not 9",
        ),
        ({"quota": 9}, "quota must be at most num_experts (8), not 9"),
        (
            {"staging": 1},
            "staging must be at least top_k * num_contexts (2), so that slots >= sum of quotas "
            "+ K; not 1",
        ),
        (
            {"num_layers": 256, "num_experts": 64, "quota": 16},
            "quota * num_layers + staging must be at most 4096 slots, not 4100",
        ),
        ({"num_transfers": 1}, "num_transfers must be 0 or at least top_k (2), not 1"),
        ({"buffer": "ram"}, "buffer must be banks or axi, not ram"),
        ({"buffer": True}, "buffer must be banks or axi, not True"),
        ({"expert_bytes": 1 << 26, "axi_addr_width": 32, "quota": 8, "staging": 40}, None),
        (
            {
                "expert_bytes": 1 << 26,
                "axi_addr_width": 32,
                "quota": 8,
                "staging": 40,
                "buffer": "axi",
            },
            "num_slots * expert_bytes must fit in 32 address bits where buffer is axi, "
            "not 72 * 67108864",
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_named(changes, message):
    if message is None:
        EngineConfig(**changes)
        return
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=lambda f: f.name)
def test_every_field_refuses_values_just_outside_its_range(field):
    if field.name == "event_port":
        return
    for value in (field.metadata["low"] - 1, field.metadata["high"] + 1):
        with pytest.raises(ConfigError, match=rf"^{field.name} must be .*, not {value}$"):
            EngineConfig(**{field.name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["threshold"], "setting 'threshold' must have the form field=value"),
        (["threshold=low"], "threshold must be an integer, not 'low'"),
        (["threshold="], "threshold must be an integer, not ''"),
        (["tresh=1"], f"unknown field 'tresh'; fields are {', '.join(NAMES)}"),
        (["top_k=true"], "top_k must be an integer, not True"),
        (["event_port=1"], "event_port must be true or false, not 1"),
        (["buffer=1"], "buffer must be banks or axi, not 1"),
        (["buffer=true"], "buffer must be banks or axi, not True"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(settings, message):
    with pytest.raises(ConfigError) as caught:
        EngineConfig().with_settings(settings)
    assert str(caught.value) == message


def test_settings_apply_in_order_and_leave_the_original_alone():
    base = EngineConfig()
    changed = base.with_settings(["threshold=-0x10", "event_port=false", "threshold=-7"])
    assert (changed.threshold, changed.event_port) == (-7, False)
    assert base.with_settings(["buffer=axi"]).buffer == "axi"
    assert base == EngineConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_configuration_loads_equal(name, tmp_path):
    config = preset(name).with_settings(["event_port=false", "threshold=-33", "buffer=axi"])
    config.save(tmp_path / "config.toml")
    assert EngineConfig.load(tmp_path / "config.toml") == config


def test_missing_fields_of_a_file_take_their_defaults(tmp_path):
    (tmp_path / "config.toml").write_text("num_layers = 5\n")
    assert EngineConfig.load(tmp_path / "config.toml") == EngineConfig(num_layers=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layers = 0", "num_layers must be 1 to 256, not 0"),
        ("layers = 3", f"unknown field 'layers'; fields are {', '.join(NAMES)}"),
        ("num_layers = 1.5", "num_layers must be an integer, not 1.5"),
        ("num_layers = [1]", "num_layers must be an integer, not [1]"),
        ("num_layers =", "not TOML: Invalid value (at end of document)"),
    ],
)
def test_a_bad_file_is_named(text, message, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        EngineConfig.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "x", "No such file or dir")):
        with pytest.raises(ConfigError, match=reason) as caught:
            EngineConfig.load(path)
        assert str(caught.value).startswith(f"{path}: ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        EngineConfig.load(tmp_path / "binary")


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(ConfigError) as caught:
        preset("gpt")
    assert str(caught.value) == (
        "unknown preset 'gpt'; presets are tiny, gpt_oss_20b, olmoe_1b_7b, deepseek_v2_lite, "
        "qwen3_30b_a3b, mixtral_8x7b"
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt_oss_20b", (24, 32, 4)),
        ("olmoe_1b_7b", (16, 64, 8)),
        ("deepseek_v2_lite", (26, 64, 6)),
        ("qwen3_30b_a3b", (48, 128, 8)),
        ("mixtral_8x7b", (32, 8, 2)),
    ],
)
def test_a_preset_has_the_shape_of_its_model(name, shape):
    config = preset(name)
    assert (config.num_layers, config.num_experts, config.top_k) == shape
    assert config.num_slots >= config.quota * config.num_layers + config.top_k


def test_table_bits_are_those_of_the_architecture():
    assert preset("gpt_oss_20b").table_bits == 786_432
    assert preset("deepseek_v2_lite").table_bits == 3_407_872


def test_depth_and_lookahead_are_clamped_to_the_other_layers():
    assert [EngineConfig(num_layers=n).depth for n in (1, 2, 3, 4, 5)] == [0, 1, 2, 3, 3]
    assert [EngineConfig(num_layers=n).look for n in (1, 2, 3)] == [0, 1, 1]


def test_lanes_divide_the_experts():
    shapes = [EngineConfig(num_experts=12, lanes=n) for n in (0, 12, 6, 4, 1)]
    assert [(c.num_lanes, c.folds) for c in shapes] == [(12, 1), (12, 1), (6, 2), (4, 3), (1, 12)]
    with pytest.raises(ConfigError) as caught:
        EngineConfig(num_experts=12, lanes=5)
    assert str(caught.value) == (
        "lanes must be 0 or divide num_experts (12): 1, 2, 3, 4, 6, 12; not 5"
    )


def test_rank_gain_falls_from_six_to_three_quarters():
    assert [rank_gain(rank, 4) for rank in range(4)] == [6, 5, 4, 3]
    assert [rank_gain(rank, 8) for rank in range(8)] == [6, 6, 5, 5, 4, 4, 3, 3]
    assert rank_gain(0, 1) == 6


@pytest.mark.parametrize("name", PRESETS)
def test_the_score_holds_every_sum_of_one_legal_token(name):
    config = preset(name)
    weight, bias = 1 << (config.weight_bits - 1), 1 << (config.bias_bits - 1)
    worst = 4 * bias + max(sum(config.gains), 4 * config.top_k) * weight * (1 + config.depth)
    assert worst <= 1 << (config.score_bits - 1)


def test_the_table_has_a_row_for_every_field():
    rows = EngineConfig.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f.name for f in dataclasses.fields(EngineConfig)]
    assert "| `weight_bits` | 8 | bits | 4 to 12 | width of a correlation weight |" in rows


def test_slots_and_bursts_are_whole_beats_within_a_page():
    sizes = [
        EngineConfig(axi_data_width=width, expert_bytes=1001, max_burst=256)
        for width in (32, 64, 128, 256, 512)
    ]
    assert [c.slot_beats for c in sizes] == [251, 126, 63, 32, 16]
    assert [c.burst_beats for c in sizes] == [256, 256, 256, 128, 64]
