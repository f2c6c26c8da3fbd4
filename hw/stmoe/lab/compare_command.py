# SPDX-License-Identifier: Apache-2.0
"""``stmoe compare``: times every policy on a routing trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from stmoe.command_line import CommandError, within
from stmoe_golden.config import EngineConfig, preset
from stmoe_golden.traces import Trace, TraceError, config_for, load_trace

__all__ = ["add_compare_arguments", "compare_command", "policy_names"]


TWO_TIERS = """\
NAME+BEHIND:N, as in pcie4_x16+nvme:384: the memory behind the link of NAME holds N experts of all
layers, and the others are read from BEHIND first.
"""


def add_compare_arguments(
    parser: argparse.ArgumentParser,
    *,
    count: Callable[[str], int],
    number: Callable[[str], float],
    presets: str,
    settings: Callable[[argparse.ArgumentParser], None],
) -> None:
    """The command's arguments; ``count`` and ``number`` parse texts as for other commands."""
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="an .npz routing trace")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument(
        "--policies", metavar="A,B,...", help="rows, in this order (default: all there are)"
    )
    parser.add_argument(
        "--policy-file",
        metavar="FILE.py",
        action="append",
        default=[],
        help="a row of your own: a file with one subclass of Policy (docs/compare.md)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quota", metavar="Q", help="slots that each layer keeps, 0 to E")
    size.add_argument(
        "--slots", metavar="N", help="slots in all: an equal quota for each layer and the staging"
    )
    link = parser.add_mutually_exclusive_group()
    link.add_argument(
        "--load-ratio",
        type=number,
        metavar="R",
        help="time to load K experts over the compute time of a layer (default 1)",
    )
    link.add_argument(
        "--system",
        metavar="NAME",
        help="a real link and accelerator instead; NAME+BEHIND:N where it holds only N experts",
    )
    parser.add_argument(
        "--list-systems", action="store_true", help="print the systems with their sources"
    )
    parser.add_argument(
        "--dtype",
        default="int8",
        metavar="TYPE",
        help="of the experts, where their size is known: fp16, int8 (default) or int4",
    )
    parser.add_argument(
        "--energy",
        metavar="NAME=PJ",
        action="append",
        default=[],
        help="picojoules per bit of a tier or of the tables (may be repeated)",
    )
    parser.add_argument("--tokens", type=count, metavar="N", help="use at most the first N tokens")
    parser.add_argument("--preset", metavar="NAME", help=f"{presets}; by default the trace's shape")
    settings(parser)


def policy_names(text: str) -> list[str]:
    """The policies of ``--policies``, in order.

    Raises
    ------
    CommandError
        A name that is not a policy's, or one that is given twice.
    """
    from stmoe_golden.policies.registry import POLICIES

    names = text.split(",")
    for i, name in enumerate(names):
        if name not in POLICIES:
            raise CommandError(
                f"argument --policies: must be of {', '.join(POLICIES)}, not {name!r}"
            )
        if name in names[:i]:
            raise CommandError(f"argument --policies: {name} is given twice")
    return names


def _size(text: str, name: str, low: int, high: int) -> int:
    """An integer whose range depends on the trace."""
    try:
        return within(low, high)(text)
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"argument {name}: {error}") from None


def _sized(config: EngineConfig, options: argparse.Namespace) -> EngineConfig:
    """The configuration with the buffer that ``--quota`` or ``--slots`` asks for."""
    if options.quota is not None:
        quota = _size(options.quota, "--quota", 0, config.num_experts)
        return config.replace(quota=quota)
    if options.slots is not None:
        layers, top_k = config.num_layers, config.top_k
        # The model's buffer is at most all experts and a staging: more would never be used.
        slots = _size(options.slots, "--slots", top_k, 4096)
        quota = min(config.num_experts, max(0, (slots - 2 * top_k) // layers))
        staging = slots - quota * layers
        return config.replace(quota=quota, staging=min(staging, 1024))
    return config


def _energies(texts: list[str]) -> dict[str, float]:
    changes = {}
    for text in texts:
        name, separator, value = text.partition("=")
        try:
            if not separator:
                raise ValueError
            changes[name] = float(value)
        except ValueError:
            raise CommandError(
                f"argument --energy: must have the form NAME=PJ, not {text!r}"
            ) from None
    return changes


def _load(options: argparse.Namespace) -> tuple[Trace, EngineConfig]:
    if options.preset is not None:
        preset(options.preset)  # a wrong name is said before a long file is read
    trace = load_trace(options.trace)
    config = _sized(config_for(trace, options.preset, options.settings), options)
    if options.tokens is not None:
        trace = trace.head(options.tokens)
    return trace, config


def compare_command(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    """Run the command.

    Raises
    ------
    CommandError, ConfigError
        Bad input, in one line.
    """
    from stmoe_golden.machine import TimingError
    from stmoe_golden.policies.registry import POLICIES, PolicyError, load_policy_file
    from stmoe_golden.systems import system_named, systems_table

    if options.list_systems:
        write(systems_table() + "\n\n" + TWO_TIERS)
        return
    if options.trace is None:
        raise CommandError("the following arguments are required: TRACE")
    if options.system is not None:
        try:
            system_named(options.system)
        except TimingError as error:
            raise CommandError(f"argument --system: {error}") from None
    if options.load_ratio is not None and not 0.01 <= options.load_ratio <= 100:
        raise CommandError(
            f"argument --load-ratio: must be 0.01 to 100, not {options.load_ratio:g}"
        )
    names = list(POLICIES) if options.policies is None else policy_names(options.policies)
    from stmoe_golden.compare import available_cores, compare
    from stmoe_golden.energy import EnergyError

    try:
        own = [load_policy_file(path) for path in options.policy_file]
        trace, config = _load(options)
        comparison = compare(
            trace,
            config,
            load_ratio=1.0 if options.load_ratio is None else options.load_ratio,
            system=options.system,
            policies=[*names, *own],
            dtype=options.dtype,
            energy=_energies(options.energy),
            progress=_progress if sys.stderr.isatty() else None,
            threads=available_cores(),
        )
    except (TraceError, PolicyError, EnergyError, TimingError) as error:
        raise CommandError(str(error)) from None
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
    write(comparison.to_json() + "\n" if options.json else comparison.table())


def _progress(policy: str) -> None:
    sys.stderr.write(f"\r\033[Kcompare: {policy}")
    sys.stderr.flush()
