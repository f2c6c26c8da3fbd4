#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small OLMoE language model on Python's own text and record how it routes.

The stages run one after the other, and an interrupted run goes on at its last checkpoint:

1. *corpus*: three domains that every Python installation carries. ``prose`` is the language
   reference in :mod:`pydoc_data.topics`, ``manual`` the docstrings of the standard library,
   ``code`` its source with those docstrings cut out, so that no text is in two domains.
   Whole topics and whole files are held out.
2. *train*: a byte-level BPE vocabulary, then ``OlmoeForCausalLM`` from random weights.
3. *decode*: prompts from the held-out text, sampled continuations with a KV cache. A forward
   hook on each router keeps its logits; the prompt's pass (prefill) is thrown away.
4. *write*: the trace, the loss curve and the statistics, each to a temporary file first.

``--stats TRACE`` prints the statistics of any trace in this format; it needs NumPy alone.

Trace arrays: ``experts`` and ``weights`` uint8 [tokens, layers, top_k], in descending order
of gate weight, a weight being the softmax over the chosen experts times 255, rounded;
``sequence`` int32 [tokens]; ``token_id`` int32 [tokens], the token fed in at that step;
``info``, JSON text.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

NAME = "olmoe_stdlib_8x32"
DOMAINS = ("prose", "manual", "code")
# Share of training windows. Prose is the smallest domain: more of it would only be memorised.
MIXTURE = (0.20, 0.35, 0.45)
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
LAYERS, EXPERTS, TOP_K = 8, 32, 4
HIDDEN, EXPERT_WIDTH, HEADS = 128, 64, 4
WINDOW = 256
# Tests are repetitive, tables are not language, pydoc_data is the prose domain, and
# lib-dynload, config-* and _sysconfigdata* belong to one machine.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
CODE_FILE_CAP = 40_000  # characters of one file, so that no file dominates
CODE_CAP = 4_000_000  # characters of the domain
HELD_OUT_EVERY = 12  # each 12th topic, and each 12th file, is held out


class CaptureError(Exception):
    """A request that cannot be carried out; its text is the whole message."""


@dataclass(frozen=True)
class Corpus:
    """Documents by domain, split into those to train on and those held out."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    def digest(self) -> str:
        """SHA-256 over all documents in order: the same corpus gives the same digest."""
        state = hashlib.sha256()
        for part in (self.train, self.held_out):
            for domain in DOMAINS:
                for document in part[domain]:
                    state.update(document.encode("utf-8", "replace") + b"\0")
        return state.hexdigest()


# --------------------------------------------------------------------------------------------
# Corpus


def stdlib_files() -> list[Path]:
    """Source files of the standard library in sorted order, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any(
            part.startswith(SKIPPED_PREFIXES) for part in parts
        ):
            chosen.append(path)
    return chosen


def split_source(source: str) -> tuple[list[str], str]:
    """Docstrings of a module, each under its name, and its source without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    docstrings: list[str] = []
    cut: set[int] = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, kinds):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        docstrings.append(f"{getattr(node, 'name', 'module')}: {text}")
        first = node.body[0]
        if len(node.body) > 1:  # a body of nothing but its docstring must stay a body
            cut.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = source.splitlines()
    code = "\n".join(line for number, line in enumerate(lines, 1) if number not in cut)
    return docstrings, code


def read_corpus() -> Corpus:
    """Text of the three domains, the same for the same Python release."""
    from pydoc_data.topics import topics

    corpus = Corpus({d: [] for d in DOMAINS}, {d: [] for d in DOMAINS})
    for number, name in enumerate(sorted(topics)):
        part = corpus.held_out if number % HELD_OUT_EVERY == 0 else corpus.train
        part["prose"].append(topics[name].strip())
    # Python's larger packages come in blocks, so files are dealt out rather than cut off.
    files = stdlib_files()
    characters = 0
    for number, path in enumerate(files[0::2] + files[1::2]):
        try:
            docstrings, code = split_source(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        part = corpus.held_out if number % HELD_OUT_EVERY == 0 else corpus.train
        if docstrings:
            part["manual"].append("\n\n".join(docstrings))
        if code.strip() and characters < CODE_CAP:
            part["code"].append(code[:CODE_FILE_CAP])
            characters += len(part["code"][-1])
    return corpus


def train_tokenizer(corpus: Corpus, path: Path) -> Tokenizer:
    """Byte-level BPE of :data:`VOCABULARY` tokens; id 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = [text for domain in DOMAINS for text in corpus.train[domain]]
    tokenizer.train_from_iterator(documents, trainer)
    write_whole(path, lambda temporary: tokenizer.save(str(temporary)))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one stream of ids, each followed by the end-of-text token (0)."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.extend(encoding.ids)
        ids.append(0)
    return np.asarray(ids, dtype=np.int64)


# --------------------------------------------------------------------------------------------
# Training


def build_model() -> Any:
    """``OlmoeForCausalLM`` with random weights (seeded by the caller), in float32."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=WINDOW,
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
        experts_implementation="grouped_mm",
    )
    return OlmoeForCausalLM(config)


def batch_of(streams: dict[str, np.ndarray], batch: int, seed: tuple[int, ...]) -> torch.Tensor:
    """Random windows of the mixture; a function of the seed alone, so resuming repeats it."""
    import torch

    rng = np.random.default_rng(seed)
    rows = []
    for domain in rng.choice(len(DOMAINS), size=batch, p=MIXTURE):
        stream = streams[DOMAINS[domain]]
        start = int(rng.integers(len(stream) - WINDOW))
        rows.append(stream[start : start + WINDOW])
    return torch.from_numpy(np.stack(rows))


def held_out_loss(model: Any, streams: dict[str, np.ndarray], windows: int) -> dict[str, float]:
    """Cross-entropy in nats a token, by domain, over evenly spaced held-out windows."""
    import torch

    model.eval()
    losses = {}
    with torch.no_grad():
        for domain in DOMAINS:
            stream = streams[domain]
            starts = np.linspace(0, len(stream) - WINDOW, windows).astype(int)
            ids = torch.from_numpy(np.stack([stream[s : s + WINDOW] for s in starts]))
            logits = model(input_ids=ids).logits[:, :-1].reshape(-1, VOCABULARY)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
            losses[domain] = float(loss)
    model.train()
    return losses


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Linear warm-up over 40 steps, then a cosine of `progress` (0..1) down to 2 % of the peak."""
    cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / 40) * cosine


CURVE_FIELDS = ("step", "seconds", "learning_rate", "loss", "aux_loss", "held_out_loss")


def train(
    args: argparse.Namespace,
    fingerprint: dict[str, Any],
    streams: dict[str, np.ndarray],
    held_out: dict[str, np.ndarray],
) -> tuple[Any, list[dict[str, float | int | str]]]:
    """Train to the last step, from the checkpoint where there is one.

    The cosine follows whichever is further along, steps or wall clock, so that a slow machine
    ends with a finished schedule at ``--minutes`` instead of a cut one.
    """
    import torch

    torch.manual_seed(args.seed)
    model = build_model()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    checkpoint = args.work_dir / "checkpoint.pt"
    step, before, curve = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise CaptureError("the checkpoint in --work-dir is of another run; name a new one")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before, curve = state["step"], state["seconds"], state["curve"]
        print(f"resumed at step {step}", flush=True)
    limit = args.minutes * 60
    began = time.monotonic()

    def save(seconds: float) -> None:
        state = {
            "fingerprint": fingerprint,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "curve": curve,
        }
        write_whole(checkpoint, lambda temporary: torch.save(state, temporary))

    while True:
        seconds = before + time.monotonic() - began
        progress = max(step / args.steps, seconds / limit)
        if progress >= 1:
            break
        rate = learning_rate(progress, step, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batch_of(streams, args.batch, (args.seed, step))
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        # The model's loss includes the weighted auxiliary loss; the curve has them apart.
        aux = output.aux_loss.item()
        row: dict[str, float | int | str] = {
            "step": step,
            "seconds": round(before + time.monotonic() - began, 1),
            "learning_rate": float(f"{rate:.3g}"),
            "loss": round(output.loss.item() - model.config.router_aux_loss_coef * aux, 4),
            "aux_loss": round(aux, 4),
            "held_out_loss": "",
        }
        if step % 100 == 0:
            mean = float(np.mean(list(held_out_loss(model, held_out, 8).values())))
            row["held_out_loss"] = round(mean, 4)
        curve.append(row)
        if step % 10 == 0 or step < 4:
            print(" ".join(f"{key}={row[key]}" for key in CURVE_FIELDS), flush=True)
        if step % 100 == 0:
            save(before + time.monotonic() - began)
    save(before + time.monotonic() - began)
    model.eval()
    return model, curve


# --------------------------------------------------------------------------------------------
# Decoding


def choose_prompts(
    held_out: dict[str, np.ndarray], sequences: int, length: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Prompts of `length` held-out tokens within one document; the domains take turns."""
    rng = np.random.default_rng((seed, 1))
    prompts, domains = [], []
    taken: set[tuple[str, int]] = set()
    for number in range(sequences):
        domain = DOMAINS[number % len(DOMAINS)]
        stream = held_out[domain]
        while True:
            start = int(rng.integers(len(stream) - length))
            prompt = stream[start : start + length]
            if (domain, start) not in taken and 0 not in prompt:
                break
        taken.add((domain, start))
        prompts.append(prompt)
        domains.append(domain)
    return np.stack(prompts), domains


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """One token a row: temperature, then the smallest set of probability `top_p`.

    The end-of-text token is left out, so that a sequence is as long as was drawn for it.
    """
    import torch

    logits = logits.clone()
    logits[:, 0] = -math.inf
    ordered, order = torch.sort(torch.softmax(logits / temperature, -1), -1, descending=True)
    ordered[torch.cumsum(ordered, -1) - ordered >= top_p] = 0
    return order.gather(-1, torch.multinomial(ordered, 1, generator=generator))


def decode(
    model: Any, prompts: np.ndarray, lengths: np.ndarray, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Generate all sequences side by side; return the trace's arrays, sequence by sequence.

    A row is one forward pass of one sampled token through the cache. Its token is the one fed
    in, whose routing the row holds, not the one that the pass then predicts.
    """
    import torch

    routed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _, chosen = output
        chosen_logits = logits.float().gather(-1, chosen)
        order = torch.argsort(chosen_logits, dim=-1, descending=True, stable=True)
        weights = torch.softmax(chosen_logits.gather(-1, order), -1)
        routed.append((chosen.gather(-1, order), weights))

    hooks = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]
    generator = torch.Generator().manual_seed(args.seed)
    experts, weights, tokens = [], [], []
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(prompts), use_cache=True)
        for _ in range(int(lengths.max())):
            token = sample(output.logits[:, -1], args.temperature, args.top_p, generator)
            routed.clear()  # drops the prefill the first time
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            if len(routed) != LAYERS:
                raise CaptureError(f"{len(routed)} routers answered, {LAYERS} expected")
            experts.append(torch.stack([chosen for chosen, _ in routed], 1).numpy())
            weights.append(torch.stack([weight for _, weight in routed], 1).numpy())
            tokens.append(token[:, 0].numpy())
    for hook in hooks:
        hook.remove()

    used = np.arange(len(tokens))[None, :] < lengths[:, None]  # [sequences, steps]
    return {
        "experts": np.stack(experts, 1)[used].astype(np.uint8),
        "weights": np.rint(np.stack(weights, 1)[used] * 255).astype(np.uint8),
        "sequence": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        "token_id": np.stack(tokens, 1)[used].astype(np.int32),
    }


# --------------------------------------------------------------------------------------------
# Statistics


def online_recall(
    experts: np.ndarray,
    sequence: np.ndarray,
    num_experts: int,
    *,
    distance: int,
    temporal: bool,
    margin: int = 64,
    limit: int = 127,
) -> np.ndarray:
    """Recall@K by layer of a table that learns as it predicts, second half measured.

    The score of an expert of layer l is a bias, plus one row for each expert of the layers
    l-1 .. l-distance, plus, with `temporal`, one row for each expert that the previous token
    used at layer l. Layers wrap into the previous token of the same sequence. Rows begin at
    zero; where an expert's score is on the wrong side of the margin, every row that had
    contributed moves by one (a perceptron with a margin), within -limit..limit.
    """
    tokens, layers, top_k = experts.shape
    sources = [*range(1, distance + 1), *([layers] if temporal else [])]
    tables = np.zeros((len(sources), layers, num_experts, num_experts), dtype=np.int32)
    bias = np.zeros((layers, num_experts), dtype=np.int32)
    flat = experts.reshape(-1, top_k).astype(np.int64)
    hits = np.zeros(layers)
    begin = 0  # position in `flat` at which the sequence began
    for position in range(len(flat)):
        token, layer = divmod(position, layers)
        if layer == 0 and (token == 0 or sequence[token] != sequence[token - 1]):
            begin = position
        used = flat[position]
        rows = [
            (table, flat[position - back])
            for table, back in zip(tables, sources, strict=True)
            if position - back >= begin
        ]
        score = bias[layer].copy()
        for table, active in rows:
            score += table[layer, active].sum(0)
        needed = np.zeros(num_experts, dtype=bool)
        needed[used] = True
        if token >= tokens // 2:
            best = np.argsort(-score, kind="stable")[:top_k]
            hits[layer] += np.count_nonzero(needed[best])
        delta = np.where(needed, score < margin, -(score > -margin).astype(np.int32))
        bias[layer] = np.clip(bias[layer] + delta, -8 * limit, 8 * limit)
        for table, active in rows:
            table[layer, active] = np.clip(table[layer, active] + delta, -limit, limit)
    return hits / ((tokens - tokens // 2) * top_k)


def statistics(trace: dict[str, np.ndarray], info: dict[str, Any]) -> dict[str, Any]:
    """What a trace says about itself; fractions of 1, rounded to four places."""
    num_experts = info["num_experts"]
    experts, sequence = trace["experts"], trace["sequence"]
    tokens, layers, top_k = experts.shape
    same = sequence[1:] == sequence[:-1]
    now, before = experts[1:][same], experts[:-1][same]
    repeated = (now[:, :, :, None] == before[:, :, None, :]).any(-1)  # [tokens, layers, top_k]
    load = np.stack(
        [np.bincount(experts[:, layer].ravel(), minlength=num_experts) for layer in range(layers)]
    ) / (tokens * top_k)
    entropy = -(load * np.log(np.maximum(load, 1e-12))).sum(1) / math.log(num_experts)

    domain_of = [entry.get("domain", "") for entry in info["sequences"]]
    domain = np.array(domain_of)[sequence[1:][same]]

    def by_layer(values: np.ndarray) -> dict[str, Any]:
        return {
            "mean": round(float(values.mean()), 4),
            "by_layer": [round(float(value), 4) for value in values],
        }

    predictors = {
        "bias_only": (0, False),
        "temporal": (0, True),
        "spatial_1": (1, False),
        "spatial_2_temporal": (2, True),
    }
    return {
        "tokens": tokens,
        "sequences": len(np.unique(sequence)),
        "layers": layers,
        "experts": num_experts,
        "top_k": top_k,
        "distinct_token_ids": len(np.unique(trace["token_id"])),
        "repeat_rate": by_layer(repeated.mean((0, 2))),
        "repeat_rate_by_domain": {
            name: round(float(repeated[domain == name].mean()), 4)
            for name in dict.fromkeys(domain_of)
        },
        "repeat_rate_by_chance": round(top_k / num_experts, 4),
        # By chance is for uniform use; this is for independent tokens with the load as it is.
        "repeat_rate_by_load": round(float((load**2).sum(1).mean() * top_k), 4),
        "load_entropy": by_layer(entropy),
        "busiest_expert_share": by_layer(load.max(1)),
        "idle_experts": int((load == 0).sum()),
        "mean_weight_by_rank": [
            round(float(weight), 4) for weight in trace["weights"].mean((0, 1)) / 255
        ],
        "recall_at_k": {
            name: by_layer(
                online_recall(experts, sequence, num_experts, distance=back, temporal=temporal)
            )
            for name, (back, temporal) in predictors.items()
        },
    }


def check_trace(trace: dict[str, np.ndarray], num_experts: int) -> None:
    """Raise :class:`CaptureError` where a trace breaks the format."""
    experts, weights = trace["experts"], trace["weights"].astype(int)
    ordered = np.sort(experts, -1)
    faults = {
        "an expert is out of range": (experts >= num_experts).any(),
        "a set names an expert twice": (ordered[..., 1:] == ordered[..., :-1]).any(),
        "weights are not in descending order": (np.diff(weights, axis=-1) > 0).any(),
        "weights do not sum to 255": (abs(weights.sum(-1) - 255) > weights.shape[-1] // 2).any(),
        "sequence numbers go down": (np.diff(trace["sequence"]) < 0).any(),
    }
    for fault, found in faults.items():
        if found:
            raise CaptureError(f"trace: {fault}")


# --------------------------------------------------------------------------------------------
# Files


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix: savez adds one
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_curve(path: Path, curve: list[dict[str, Any]]) -> None:
    """The loss curve as CSV; `held_out_loss` is filled at every 100th step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def draw_curve(path: Path, curve: list[dict[str, Any]]) -> None:
    """The loss curve as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in curve], [r["loss"] for r in curve], lw=0.7, label="training")
    held_out = [row for row in curve if row["held_out_loss"] != ""]
    axes.plot(
        [row["step"] for row in held_out],
        [row["held_out_loss"] for row in held_out],
        marker=".",
        label="held out, mean of the domains",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})


def load_trace(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and info of a trace file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            trace = {name: file[name] for name in file.files}
        return trace, json.loads(str(trace.pop("info")))
    except (OSError, ValueError, KeyError) as error:
        raise CaptureError(f"{path}: not a routing trace ({type(error).__name__})") from error


# --------------------------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argument type: a number of `kind` in low..high."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} in {low}..{high}")
        return value

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = OneLineParser(
        description="Train a small OLMoE model on Python's own text and record its routing.",
    )
    add = parser.add_argument
    add("--stats", type=Path, metavar="TRACE", help="print the statistics of a trace, then stop")
    add("--work-dir", type=Path, help="checkpoint and vocabulary (outside the repository)")
    add("--out-dir", type=Path, default=Path(__file__).parent, help="default: beside this script")
    add("--steps", type=number(int, 1, 10**6), default=1050, help="default: %(default)s")
    add(
        "--minutes",
        type=number(float, 0.01, 10**4),
        default=25.0,
        help="training ends by then at the latest; default: %(default)s",
    )
    add("--batch", type=number(int, 1, 1024), default=16, help="default: %(default)s")
    add("--lr", type=number(float, 1e-6, 1.0), default=3e-3, help="default: %(default)s")
    add("--seed", type=number(int, 0, 2**31 - 1), default=2026, help="default: %(default)s")
    add("--threads", type=number(int, 1, 256), default=2, help="default: %(default)s")
    add("--sequences", type=number(int, 1, 1000), default=48, help="default: %(default)s")
    add("--prompt", type=number(int, 1, 128), default=40, help="tokens; default: %(default)s")
    add(
        "--tokens",
        type=number(int, 2, WINDOW - 1),
        nargs=2,
        default=(120, 200),
        metavar=("LOW", "HIGH"),
        help="range of a sequence's decoded tokens; default: 120 200",
    )
    add("--temperature", type=number(float, 0.05, 5.0), default=0.9, help="default: %(default)s")
    add("--top-p", type=number(float, 0.01, 1.0), default=0.95, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.stats is None and args.work_dir is None:
        parser.error("--work-dir is needed to train")
    if args.tokens[0] > args.tokens[1]:
        parser.error("--tokens: LOW is more than HIGH")
    if args.prompt + args.tokens[1] > WINDOW:
        parser.error(f"--prompt and --tokens: together at most {WINDOW} tokens")
    return args


def capture(args: argparse.Namespace) -> None:
    """All the stages."""
    import tokenizers
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    digest = corpus.digest()
    tokenizer = train_tokenizer(corpus, args.work_dir / f"tokenizer-{digest[:12]}.json")
    streams = {domain: encode(tokenizer, corpus.train[domain]) for domain in DOMAINS}
    held_out = {domain: encode(tokenizer, corpus.held_out[domain]) for domain in DOMAINS}
    sizes = {d: [len(streams[d]), len(held_out[d])] for d in DOMAINS}
    print(f"corpus {digest[:12]}, tokens to train on and held out: {sizes}", flush=True)

    fingerprint = {
        "corpus_sha256": digest,
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "seed": args.seed,
    }
    model, curve = train(args, fingerprint, streams, held_out)
    losses = {d: round(v, 4) for d, v in held_out_loss(model, held_out, 32).items()}

    prompts, domains = choose_prompts(held_out, args.sequences, args.prompt, args.seed)
    lengths = np.random.default_rng((args.seed, 2)).integers(
        args.tokens[0], args.tokens[1] + 1, args.sequences
    )
    trace = decode(model, prompts, lengths, args)
    check_trace(trace, EXPERTS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last = [row["loss"] for row in curve[-50:]]
    info = {
        "model": f"OLMoE architecture, {parameters / 1e6:.1f} M parameters, trained by the script",
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "phase": "decode",
        "source": f"sim_traces/{Path(__file__).name}",
        "licence": "Apache-2.0",
        "sequences": [
            {"domain": domain, "tokens": int(length)}
            for domain, length in zip(domains, lengths, strict=True)
        ],
        "seed": args.seed,
        "domains": list(DOMAINS),
        "prompt_tokens": args.prompt,
        "sampling": {"temperature": args.temperature, "top_p": args.top_p},
        "corpus": f"standard library and language reference of Python {platform.python_version()}",
        "corpus_tokens": {
            d: dict(zip(("train", "held_out"), sizes[d], strict=True)) for d in sizes
        },
        **fingerprint,
        "steps_done": len(curve),
        "train_loss_last_50": round(float(np.mean(last)), 4),
        "held_out_loss": losses,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }

    out = args.out_dir / NAME
    write_whole(
        out.with_suffix(".npz"),
        lambda path: np.savez_compressed(path, **trace, info=np.array(json.dumps(info))),
    )
    write_whole(out.with_suffix(".loss.csv"), lambda path: write_curve(path, curve))
    write_whole(out.with_suffix(".loss.png"), lambda path: draw_curve(path, curve))
    report = {"trace": f"{NAME}.npz", **statistics(trace, info)}
    report |= {key: info[key] for key in ("steps_done", "train_loss_last_50", "held_out_loss")}
    write_whole(
        out.with_suffix(".stats.json"),
        lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"),
    )
    for index in range(min(len(DOMAINS), args.sequences)):
        text = tokenizer.decode(trace["token_id"][trace["sequence"] == index].tolist())
        prompt = tokenizer.decode(prompts[index].tolist())
        print(f"--- {domains[index]}: {prompt!r} -> {text!r}")
    print(json.dumps(report, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line that says what is wrong."""
    args = parse_arguments(argv)
    try:
        if args.stats is not None:
            trace, info = load_trace(args.stats)
            check_trace(trace, info["num_experts"])
            print(json.dumps(statistics(trace, info), indent=1))
        else:
            capture(args)
    except (CaptureError, ImportError, OSError) as error:
        text = " ".join(str(error).split())
        print(f"{Path(__file__).name}: error: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
