# SPDX-License-Identifier: Apache-2.0
"""The command line of ``stmoe trace``; imports nothing that takes time until it must."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import PRESETS, preset

if TYPE_CHECKING:
    import numpy as np

    from .traces import Trace

__all__ = ["add_trace_commands", "run_trace_command"]

COMMANDS = ("info", "convert", "slice", "resample", "validate", "capture")
FORMATS = ("trace", "route-csv", "vllm", "router-logits", "jsonl")
PHASES = {"prefill": 0, "decode": 1}


def _span(text: str) -> tuple[int, int | None]:
    """``A:B``, ``A:``, ``:B`` or ``A``."""
    low, colon, high = text.partition(":")
    try:
        first = int(low) if low or not colon else 0
        last = (int(high) if high else None) if colon else first + 1
    except ValueError:
        first, last = -1, None
    if first < 0 or (last is not None and last <= first):
        raise argparse.ArgumentTypeError(
            f"must be A:B with 0 <= A < B (either may be left out), or one number, not {text!r}"
        )
    return first, last


def add_trace_commands(commands: Any, count: Callable[[str], int]) -> None:
    """Add the subcommands; ``count`` is the argument type of an integer from 1 on."""

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    def output(to: argparse.ArgumentParser) -> None:
        to.add_argument("-o", dest="output", metavar="FILE.npz", required=True)

    info = command("info", "Statistics of a trace: locality, skew, recall, against chance.")
    info.add_argument("trace", metavar="FILE")
    info.add_argument("--json", action="store_true", help="print one line of JSON")

    convert = command("convert", "Read other programs' routing, or an older trace, into a trace.")
    convert.add_argument("files", metavar="FILE", nargs="+", help="several become one trace")
    output(convert)
    convert.add_argument(
        "--from", dest="kind", choices=FORMATS, help="by default what the file looks like"
    )
    convert.add_argument("--experts", type=count, metavar="N", help="experts of a layer")
    convert.add_argument("--top-k", type=count, metavar="N", help="experts that a token uses")
    convert.add_argument(
        "--prompt-tokens",
        type=count,
        metavar="N",
        help="the first N tokens of each sequence are prefill, where the file does not say",
    )
    convert.add_argument("--model", metavar="NAME", help="kept in the trace's info")

    cut = command("slice", "Write a part of a trace.")
    cut.add_argument("trace", metavar="FILE")
    output(cut)
    cut.add_argument("--tokens", type=_span, metavar="A:B", help="of those that the others leave")
    cut.add_argument("--sequences", type=_span, metavar="A:B", help="counted from 0, in order")
    cut.add_argument("--layers", type=_span, metavar="A:B")
    cut.add_argument("--phase", choices=tuple(PHASES))
    cut.add_argument(
        "--complete", action="store_true", help="only tokens with the routing of every layer"
    )

    shape = command("resample", "Make routing of one model's shape from another's, for tests.")
    shape.add_argument("trace", metavar="FILE")
    output(shape)
    shape.add_argument("--preset", metavar="NAME", help=f"shape of {', '.join(PRESETS)}")
    shape.add_argument("--layers", type=count, metavar="L", help="else the preset's or the trace's")
    shape.add_argument("--experts", type=count, metavar="E", help="the same")
    shape.add_argument("--top-k", type=count, metavar="K", help="the same")
    shape.add_argument("--tokens", type=count, metavar="N", help="only the first N")
    shape.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")

    validate = command("validate", "Check a trace, and say whether it can be replayed.")
    validate.add_argument("trace", metavar="FILE")

    capture = command("capture", "Run a Hugging Face MoE model and record its routing.")
    capture.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hub")
    capture.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="text, a prompt a line; or .jsonl with prompt or input_ids in each",
    )
    output(capture)
    capture.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="default: %(default)s"
    )
    capture.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy"
    )
    capture.add_argument("--top-p", type=float, default=1.0, metavar="X", help="default: 1")
    capture.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    capture.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    capture.add_argument("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    capture.add_argument(
        "--chat", action="store_true", help="put each prompt through the tokenizer's chat template"
    )
    capture.add_argument(
        "--offline", action="store_true", help="never ask the Hub: MODEL must be here"
    )
    capture.add_argument(
        "--restart", action="store_true", help="forget what an interrupted capture has done"
    )


def run_trace_command(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    """Run one; raises :class:`stmoe_golden.traces.TraceError` on bad input."""
    from .traces import TraceError

    commands = {
        "info": _info,
        "convert": _convert,
        "slice": _slice,
        "resample": _resample,
        "validate": _validate,
        "capture": _capture,
    }
    if options.trace_command not in commands:
        raise TraceError(
            f"a command is needed: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]} "
            "(see stmoe trace --help)"
        )
    commands[options.trace_command](options, write)


def _info(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    from .traces import load_trace

    trace = load_trace(options.trace, missing=True)
    # Numba takes half a second to load: only for a trace that is one.
    from .trace_statistics import statistics_text, trace_statistics

    found = trace_statistics(trace)
    write(json.dumps(found, allow_nan=False) + "\n" if options.json else statistics_text(found))


def _summary(trace: Trace, path: str) -> str:
    missing = 0 if trace.present is None else int((~trace.present).sum())
    text = (
        f"{path}: {trace.num_tokens:,} tokens of {trace.num_sequences:,} sequences, "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
    )
    if trace.info.get("num_experts_inferred"):
        text += " (experts: the largest index and 1; --experts says otherwise)"
    if missing:
        text += f"; {missing:,} cells are missing"
    return text + "\n"


def _save(trace: Trace, path: str, write: Callable[[str], None]) -> None:
    from .traces import save_trace

    save_trace(trace, path)
    write(_summary(trace, path))


def _convert(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    from .trace_import import ImportOptions, import_traces
    from .traces import TraceError

    trace = import_traces(
        options.files,
        options.kind,
        ImportOptions(
            num_experts=options.experts,
            top_k=options.top_k,
            prompt_tokens=options.prompt_tokens,
            model=options.model,
        ),
    )
    for key, value in (("num_experts", options.experts), ("top_k", options.top_k)):
        if value is not None and getattr(trace, key) != value:
            raise TraceError(
                f"{options.files[0]}: {key} is {getattr(trace, key)}, not {value} as stated"
            )
    _save(trace, options.output, write)


def slice_trace(
    trace: Trace,
    *,
    tokens: tuple[int, int | None] | None = None,
    sequences: tuple[int, int | None] | None = None,
    layers: tuple[int, int | None] | None = None,
    phase: str | None = None,
    complete: bool = False,
) -> Trace:
    """A part of a trace: sequences, then layers, then phase, then complete tokens, then tokens.

    Sequences keep their numbers, and ``info`` what it says, but for what is by layer. Where
    tokens are left out, those around them become neighbours.

    Raises
    ------
    TraceError
        Nothing would be left, a range ends beyond the trace, or the phases are not known.
    """
    import numpy as np

    from .traces import TraceError

    def within(what: str, span: tuple[int, int | None], size: int) -> slice:
        first, last = span
        if first >= size or (last is not None and last > size):
            asked = f"{first}:{'' if last is None else last}"
            raise TraceError(f"{trace.name}: {what} must be within 0:{size}, not {asked}")
        return slice(first, last)

    if sequences is not None:
        number = np.cumsum(trace.starts()) - 1
        span = within("--sequences", sequences, trace.num_sequences)
        keep = number >= span.start
        if span.stop is not None:
            keep &= number < span.stop
        trace = _kept(trace, keep, "--sequences")
    if layers is not None:
        trace = _layers(trace, within("--layers", layers, trace.num_layers))
    if phase is not None:
        if trace.phase is not None:
            trace = _kept(trace, np.asarray(trace.phase == PHASES[phase]), f"--phase {phase}")
        elif trace.info.get("phase") != phase:
            known = trace.info.get("phase")
            raise TraceError(
                f"{trace.name}: --phase {phase}: the tokens' phases are not in it"
                + (f"; all are {known}" if known else "")
            )
    if complete and trace.present is not None:
        trace = replace(
            _kept(trace, np.asarray(trace.present.all(axis=1)), "--complete"), present=None
        )
    if tokens is not None:
        trace = trace.take(within("--tokens", tokens, trace.num_tokens))
    if trace.present is not None and trace.present.all():
        trace = replace(trace, present=None)
    return trace


def _kept(trace: Trace, keep: np.ndarray, what: str) -> Trace:
    from .traces import TraceError

    if not keep.any():
        raise TraceError(f"{trace.name}: {what} leaves no token")
    return trace.take(keep)


def _layers(trace: Trace, span: slice) -> Trace:
    arrays = {
        key: getattr(trace, key)[:, span]
        for key in ("experts", "weights", "present")
        if getattr(trace, key) is not None
    }
    kept = range(trace.num_layers)[span]
    info = dict(trace.info, num_layers=len(kept))
    info["model_layers"] = list(trace.info.get("model_layers", range(trace.num_layers)))[span]
    if trace.expert_bytes is not None:
        info["expert_bytes"] = trace.expert_bytes[span]
    return replace(trace, info=info, **arrays)


def _slice(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    from .traces import load_trace

    trace = slice_trace(
        load_trace(options.trace, missing=True),
        tokens=options.tokens,
        sequences=options.sequences,
        layers=options.layers,
        phase=options.phase,
        complete=options.complete,
    )
    _save(trace, options.output, write)


def _resample(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    from .resample import resampled
    from .traces import TraceError, check_complete, config_for, load_trace

    if options.seed < 0:
        raise TraceError(f"argument --seed: must be 0 or more, not {options.seed}")
    wanted = {"num_layers": options.layers, "num_experts": options.experts, "top_k": options.top_k}
    changes = {name: value for name, value in wanted.items() if value is not None}
    if options.preset is None and not changes:
        raise TraceError("a shape is needed: --preset, or --layers, --experts and --top-k")
    named = None if options.preset is None else preset(options.preset)
    trace = load_trace(options.trace)
    check_complete(trace)
    config = (config_for(trace) if named is None else named).replace(**changes)
    if options.tokens is not None:
        trace = trace.head(options.tokens)
    _save(resampled(trace, config, seed=options.seed), options.output, write)


def _validate(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    from .traces import TraceError, check_complete, check_order, config_for, load_trace

    trace = load_trace(options.trace, missing=True)
    check_order(trace)
    try:
        check_complete(trace)
        config_for(trace)
        verdict = "legal, and can be replayed"
    except TraceError as error:
        verdict = f"legal, but cannot be replayed: {str(error).removeprefix(f'{trace.name}: ')}"
    write(_summary(trace, options.trace) + f"{verdict}\n")


def _capture(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    from .trace_capture import CaptureOptions, capture_trace

    trace = capture_trace(
        options.model,
        Path(options.prompts),
        Path(options.output),
        CaptureOptions(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            dtype=options.dtype,
            device=options.device,
            chat=options.chat,
            offline=options.offline,
            restart=options.restart,
        ),
    )
    write(_summary(trace, options.output))
