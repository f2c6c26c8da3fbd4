# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration shared by the RTL generator, the golden model and the benches."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PRESETS", "ConfigError", "EngineConfig", "preset", "rank_gain"]

FRACTION_BITS = 2
"""Scores, thresholds and values carry two fraction bits (quarter units)."""

USE_BITS = 10
"""Width of the decaying use count (architecture section 2)."""

PAGE_BYTES = 4096
"""No AXI burst crosses a multiple of this."""

NUM_SEGMENTS = 4
"""Address segments per layer (gate, up, down and scales may lie apart)."""

MAX_PINS = 15
"""Most grants of one slot that may be outstanding at once."""


class ConfigError(ValueError):
    """A configuration field, file or preset that is not allowed; the message names it."""


def rank_gain(rank: int, top_k: int) -> int:
    """Gain in quarter units of the expert at ``rank`` (0 is the heaviest) of ``top_k``."""
    return 6 - (4 * rank) // top_k


def _param(default: Any, unit: str, low: int, high: int, doc: str) -> Any:
    return field(default=default, metadata={"unit": unit, "low": low, "high": high, "doc": doc})


def _choice(default: str, choices: tuple[str, ...], doc: str) -> Any:
    return field(
        default=default, metadata={"unit": "", "low": 0, "high": 0, "choices": choices, "doc": doc}
    )


def _flag(default: bool, doc: str) -> Any:
    return field(default=default, metadata={"unit": "", "low": 0, "high": 1, "doc": doc})


THRESHOLDS = ("threshold", "threshold_2", "threshold_3", "threshold_4")
"""Fields of the static thresholds, one for each distance that lookahead reaches at most."""


@dataclass(frozen=True)
class EngineConfig:
    """Shape and sizing of one prefetch engine.

    Every field has a default, a unit and a range, printed by :meth:`table`. A value outside its
    range, or a set of values that cannot work together, raises :class:`ConfigError` with a message
    that names the field, the value and what is allowed.
    """

    num_layers: int = _param(4, "layers", 1, 256, "MoE layers of the model, L")
    num_experts: int = _param(8, "experts", 1, 256, "experts in each layer, E")
    top_k: int = _param(2, "experts", 1, 16, "experts that one token uses in one layer, K")
    num_contexts: int = _param(1, "contexts", 1, 1, "sequences decoded at once")
    spatial_depth: int = _param(3, "layers", 0, 4, "spatial tables, D; clamped to L-1")
    lookahead: int = _param(1, "layers", 0, 4, "layers selected ahead; clamped to L-1")
    lanes: int = _param(
        0, "lanes", 0, 256, "experts worked on at once, a divisor of E; 0 means all of them"
    )
    weight_bits: int = _param(8, "bits", 4, 12, "width of a correlation weight")
    margin_low: int = _param(192, "units", 0, 2047, "m1: margin below which a used expert learns")
    margin_step: int = _param(32, "units", 0, 2047, "m2: margin of the second step")
    margin_high: int = _param(128, "units", 0, 2047, "m3: margin of the third step")
    threshold: int = _param(-87, "units", -8192, 8191, "static confidence threshold after reset")
    threshold_2: int = _param(-60, "units", -8192, 8191, "the same, for the layer after the next")
    threshold_3: int = _param(0, "units", -8192, 8191, "the same, three layers ahead")
    threshold_4: int = _param(30, "units", -8192, 8191, "the same, four layers ahead")
    adaptive: bool = _flag(True, "each layer's threshold moves by what becomes of its prefetches")
    gate_levels: int = _param(32, "levels", 1, 255, "steps that a threshold may rise")
    gate_step: int = _param(8, "units", 1, 256, "what a threshold rises by with each level")
    gate_window: int = _param(32, "loads", 4, 256, "prefetches judged together, a power of two")
    gate_strict: int = _param(5, "eighths", 0, 8, "good prefetches asked for on a busy link")
    gate_lenient: int = _param(4, "eighths", 0, 8, "good prefetches asked for on an idle link")
    gate_late: int = _param(
        1, "eighths", 0, 8, "late ones of the good prefetches that ask for farther layers"
    )
    gate_patience: int = _param(
        512, "events", 2, 4096, "events of a layer without a judgement that lower its threshold"
    )
    admission_bonus: int = _param(
        256, "units", 0, 2047, "what a prefetch counts for more than what it would replace"
    )
    use_shift: int = _param(1, "bits", 0, 6, "weight of the use count in a resident's value")
    select_max: int = _param(0, "experts", 0, 64, "most experts selected per layer; 0 means 2*K")
    quota: int = _param(2, "slots", 0, 256, "slots that each layer keeps, after reset")
    staging: int = _param(0, "slots", 0, 1024, "slots shared by all layers; 0 means 2*K")
    axi_data_width: int = _param(64, "bits", 32, 512, "AXI read data width, a power of two")
    axi_addr_width: int = _param(40, "bits", 32, 48, "AXI address width")
    max_burst: int = _param(64, "beats", 1, 256, "longest AXI burst; none crosses 4 KiB")
    max_outstanding: int = _param(8, "bursts", 1, 64, "AXI bursts on their way at once")
    prefetch_outstanding: int = _param(
        2, "bursts", 1, 64, "bursts of prefetch that may be ahead of a demand"
    )
    num_transfers: int = _param(0, "loads", 0, 64, "loads in flight; 0 means K + 4")
    expert_bytes: int = _param(
        2048,
        "bytes",
        16,
        1 << 26,
        "largest expert, and the slot stride, which is rounded up to beats",
    )
    buffer: str = _choice(
        "banks", ("banks", "axi"), "on-chip banks behind `fill`, or memory behind AXI4 writes"
    )
    retry_limit: int = _param(3, "retries", 0, 15, "reloads after a read error")
    watchdog_cycles: int = _param(
        1 << 20, "cycles", 1 << 8, (1 << 31) - 1, "AXI silence after which a load is given up"
    )
    event_port: bool = _flag(True, "build the event port")
    event_depth: int = _param(256, "entries", 64, 4096, "event FIFO, a power of two")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{f.name} must be true or false, not {value!r}")
                continue
            if "choices" in f.metadata:
                if value not in f.metadata["choices"]:
                    allowed = " or ".join(f.metadata["choices"])
                    raise ConfigError(f"{f.name} must be {allowed}, not {value}")
                continue
            low, high = f.metadata["low"], f.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{f.name} must be an integer, not {value!r}")
            if not low <= value <= high:
                raise ConfigError(f"{f.name} must be {low} to {high}, not {value}")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"top_k must be at most num_experts ({self.num_experts}), not {self.top_k}"
            )
        if self.lanes and self.num_experts % self.lanes:
            divisors = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ConfigError(
                f"lanes must be 0 or divide num_experts ({self.num_experts}): "
                f"{', '.join(map(str, divisors))}; not {self.lanes}"
            )
        if self.axi_data_width & (self.axi_data_width - 1):
            raise ConfigError(
                f"axi_data_width must be 32, 64, 128, 256 or 512, not {self.axi_data_width}"
            )
        if self.gate_window & (self.gate_window - 1) or self.gate_window < self.top_k:
            raise ConfigError(
                f"gate_window must be a power of two and at least top_k ({self.top_k}), "
                f"not {self.gate_window}"
            )
        if self.event_depth & (self.event_depth - 1):
            raise ConfigError(f"event_depth must be a power of two, not {self.event_depth}")
        limit = 1 << (self.score_bits - 1 - FRACTION_BITS)
        used = self.thresholds[: max(1, self.lookahead)]
        for name, threshold in zip(THRESHOLDS, used, strict=False):
            if not -limit <= threshold < limit:
                raise ConfigError(
                    f"{name} must be {-limit} to {limit - 1} units where a score has "
                    f"{self.score_bits} bits, not {threshold}"
                )
        if self.event_depth < 2 * self.event_margin:
            raise ConfigError(
                f"event_depth must be at least {2 * self.event_margin} (2 * (max_outstanding + "
                f"2 * top_k + 16)), not {self.event_depth}"
            )
        if self.prefetch_outstanding > self.max_outstanding:
            raise ConfigError(
                f"prefetch_outstanding must be at most max_outstanding ({self.max_outstanding}), "
                f"not {self.prefetch_outstanding}"
            )
        if self.quota > self.num_experts:
            raise ConfigError(
                f"quota must be at most num_experts ({self.num_experts}), not {self.quota}"
            )
        if self.num_staging < self.top_k * self.num_contexts:
            raise ConfigError(
                f"staging must be at least top_k * num_contexts "
                f"({self.top_k * self.num_contexts}), so that slots >= sum of quotas + K; "
                f"not {self.staging}"
            )
        if self.num_slots > 4096:
            raise ConfigError(
                f"quota * num_layers + staging must be at most 4096 slots, not {self.num_slots}"
            )
        space = 1 << self.axi_addr_width
        if self.buffer == "axi" and self.num_slots * self.least_stride > space:
            raise ConfigError(
                f"num_slots * expert_bytes must fit in {self.axi_addr_width} address bits where "
                f"buffer is axi, not {self.num_slots} * {self.expert_bytes}"
            )
        if self.transfers < self.top_k:
            raise ConfigError(
                f"num_transfers must be 0 or at least top_k ({self.top_k}), "
                f"not {self.num_transfers}"
            )

    # Derived sizes --------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Spatial tables built: D clamped to L-1."""
        return min(self.spatial_depth, self.num_layers - 1)

    @property
    def look(self) -> int:
        """Layers selected ahead: lookahead clamped to L-1."""
        return min(self.lookahead, self.num_layers - 1)

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Static thresholds after reset, by distance: that of the next layer first."""
        return tuple(getattr(self, name) for name in THRESHOLDS)

    @property
    def floors(self) -> tuple[int, ...]:
        """The same in quarter units."""
        return tuple(threshold << FRACTION_BITS for threshold in self.thresholds)

    @property
    def num_farther(self) -> int:
        """Layers that are selected for after the next one."""
        return max(0, self.look - 1)

    @property
    def num_lanes(self) -> int:
        """Experts of a layer that the predictor's datapath works on at once."""
        return self.lanes or self.num_experts

    @property
    def folds(self) -> int:
        """Passes through the datapath for one layer, F: ``num_experts / num_lanes``. Fold f has
        the experts from ``f * num_lanes`` on."""
        return self.num_experts // self.num_lanes

    @property
    def num_select(self) -> int:
        """Most experts selected for one layer."""
        return min(self.select_max or 2 * self.top_k, self.num_experts)

    @property
    def num_staging(self) -> int:
        """Slots shared by all layers."""
        return self.staging or 2 * self.top_k

    @property
    def num_slots(self) -> int:
        """Slots of the expert buffer: ``quota * num_layers + num_staging``."""
        return self.quota * self.num_layers + self.num_staging

    @property
    def transfers(self) -> int:
        """Loads that may be in flight at once."""
        return self.num_transfers or self.top_k + 4

    @property
    def beat_bytes(self) -> int:
        """Bytes of one AXI data beat."""
        return self.axi_data_width // 8

    @property
    def slot_beats(self) -> int:
        """Beats of a slot: ``expert_bytes``, rounded up."""
        return -(-self.expert_bytes // self.beat_bytes)

    @property
    def slot_pages(self) -> int:
        """Pages of 4 KiB that hold a slot, where the buffer is behind AXI."""
        return -(-self.slot_beats * self.beat_bytes // PAGE_BYTES)

    @property
    def least_stride(self) -> int:
        """Least bytes from one slot to the next in a buffer behind AXI; those at reset."""
        return self.slot_pages * PAGE_BYTES

    @property
    def burst_beats(self) -> int:
        """Most beats of a burst: ``max_burst``, but no more than a page of 4 KiB holds."""
        return min(self.max_burst, PAGE_BYTES // self.beat_bytes)

    @property
    def bias_bits(self) -> int:
        """Width of a bias row's lane: 8 times a weight's range."""
        return self.weight_bits + 3

    @property
    def gains(self) -> tuple[int, ...]:
        """Rank gains in quarter units, heaviest expert first."""
        return tuple(rank_gain(rank, self.top_k) for rank in range(self.top_k))

    @property
    def score_bits(self) -> int:
        """Signed width that holds every sum of one legal token, in quarter units."""
        gain = max(sum(self.gains), 4 * self.top_k)
        rows = (1 << (self.weight_bits - 1)) * gain * (1 + self.depth)
        bias = (1 << (self.bias_bits - 1)) << FRACTION_BITS
        # Margins and the threshold are compared at full precision, so they must fit as well.
        return (rows + bias).bit_length() + 1

    @property
    def value_bits(self) -> int:
        """Signed width of score + (use << use_shift)."""
        return max(self.score_bits, USE_BITS + self.use_shift + 1) + 1

    @property
    def layer_bits(self) -> int:
        """Bits of a layer index."""
        return max(1, (self.num_layers - 1).bit_length())

    @property
    def fold_bits(self) -> int:
        """Bits of a fold's index."""
        return max(1, (self.folds - 1).bit_length())

    @property
    def expert_bits(self) -> int:
        """Bits of an expert index on the ports: one more than needed, so that an index
        outside the model can be seen and refused instead of wrapping."""
        return self.num_experts.bit_length()

    @property
    def slot_bits(self) -> int:
        """Bits of a slot index."""
        return max(1, (self.num_slots - 1).bit_length())

    @property
    def transfer_bits(self) -> int:
        """Bits of a transfer index, and of an AXI ID."""
        return max(1, (self.transfers - 1).bit_length())

    @property
    def offset_bits(self) -> int:
        """Bits of a beat offset within a slot."""
        return self.slot_beats.bit_length()

    @property
    def event_margin(self) -> int:
        """Cycles with records that may still follow once the event port holds the engine.

        Each burst on its way may end, one grant and one address may be presented, and the
        operation under way may promote K experts and cancel or start one load.
        """
        return self.max_outstanding + 2 * self.top_k + 16

    @property
    def table_bits(self) -> int:
        """Bits of the spatial and temporal tables: (D+1) * L * E * E * weight_bits."""
        return (self.depth + 1) * self.num_layers * self.num_experts**2 * self.weight_bits

    @property
    def prefetch_slots(self) -> int:
        """Most slots that prefetches may hold (loading or draining) at once."""
        return self.num_slots - self.top_k * self.num_contexts

    @property
    def prefetch_loads(self) -> int:
        """Most prefetches that hold a slot (loading or draining) at once, so that every demand of
        an event finds both a slot and a transfer."""
        return min(self.prefetch_slots, self.transfers - self.top_k)

    # Files ----------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed; unknown names raise :class:`ConfigError`."""
        names = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in names:
                raise ConfigError(f"unknown field {name!r}; fields are {', '.join(sorted(names))}")
        return dataclasses.replace(self, **changes)

    def with_settings(self, settings: list[str]) -> EngineConfig:
        """Apply ``field=value`` texts, as given on a command line."""
        changes: dict[str, Any] = {}
        for text in settings:
            name, separator, value = text.partition("=")
            if not separator:
                raise ConfigError(f"setting {text!r} must have the form field=value")
            if value in ("true", "false"):
                changes[name] = value == "true"
                continue
            if isinstance(getattr(self, name, None), str):
                changes[name] = value
                continue
            try:
                changes[name] = int(value, 0)
            except ValueError:
                raise ConfigError(f"{name} must be an integer, not {value!r}") from None
        return self.replace(**changes)

    @classmethod
    def load(cls, path: str | Path) -> EngineConfig:
        """Read a TOML file as :meth:`save` writes it; missing fields take their defaults."""
        try:
            with open(path, "rb") as file:
                data = tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        names = {f.name for f in dataclasses.fields(cls)}
        for name in data:
            if name not in names:
                raise ConfigError(
                    f"{path}: unknown field {name!r}; fields are {', '.join(sorted(names))}"
                )
        try:
            return cls(**data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write every field as TOML, with its unit and meaning as a comment."""
        lines = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            text = str(value).lower() if isinstance(value, bool) else str(value)
            text = f'"{value}"' if isinstance(value, str) else text
            unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
            lines.append(f"{f.name} = {text}  # {f.metadata['doc']}{unit}")
        Path(path).write_text("\n".join(lines) + "\n")

    @classmethod
    def table(cls) -> str:
        """The parameter table of the README, in Markdown."""
        lines = ["| field | default | unit | range | meaning |", "|---|---|---|---|---|"]
        for f in dataclasses.fields(cls):
            m = f.metadata
            allowed = "true, false" if isinstance(f.default, bool) else f"{m['low']} to {m['high']}"
            allowed = ", ".join(m.get("choices", ())) or allowed
            default = str(f.default).lower() if isinstance(f.default, bool) else f.default
            lines.append(f"| `{f.name}` | {default} | {m['unit']} | {allowed} | {m['doc']} |")
        return "\n".join(lines)


PRESETS: dict[str, EngineConfig] = {
    "tiny": EngineConfig(),
    "gpt_oss_20b": EngineConfig(
        num_layers=24, num_experts=32, top_k=4, quota=8, axi_data_width=128
    ),
    "olmoe_1b_7b": EngineConfig(
        num_layers=16, num_experts=64, top_k=8, quota=8, axi_data_width=128
    ),
    "deepseek_v2_lite": EngineConfig(
        num_layers=26, num_experts=64, top_k=6, quota=8, axi_data_width=128
    ),
    "qwen3_30b_a3b": EngineConfig(
        num_layers=48, num_experts=128, top_k=8, lanes=32, quota=16, axi_data_width=128
    ),
    "mixtral_8x7b": EngineConfig(
        num_layers=32, num_experts=8, top_k=2, quota=2, axi_data_width=128
    ),
}
"""Named configurations (architecture section 6)."""


def preset(name: str) -> EngineConfig:
    """The preset of that name, or :class:`ConfigError` listing the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]
