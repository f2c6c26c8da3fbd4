# SPDX-License-Identifier: Apache-2.0
"""Runs a Hugging Face mixture-of-experts model and records its routing as it generates.

Routers are found by what they do, not by what they are called: in one short forward pass every
module is watched, and a module whose output holds K expert indices and K weights for each token
is a router (architectures whose router gives only logits are caught at their experts, which are
handed the same two tensors). Generation is the library's own ``generate`` with its KV cache, one
prompt at a time; the first pass of each is prefill, every further one is decode.

Each prompt's routing is a small trace of its own in ``OUT.parts`` until all are there, so that an
interrupted capture loses the prompt it was on and no more. Sampling is seeded by prompt, so a
capture that was resumed gives the same trace as one that was not.

Needs the extra ``capture``; torch and transformers are imported when they are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .traces import DECODE, PREFILL, Trace, TraceError, load_trace, reason, replacing, save_trace

__all__ = [
    "CaptureOptions",
    "Router",
    "RouterWatch",
    "capture_prompt",
    "capture_trace",
    "find_routers",
    "read_prompts",
]

NEEDS = "needs torch and transformers: pip install 'stmoe[capture]'"
PROBE_TOKENS = 3
LIMITS = {"temperature": (0.0, 100.0), "top_p": (0.001, 1.0), "seed": (0, (1 << 31) - 1)}


@dataclass(frozen=True)
class CaptureOptions:
    """How a capture generates; ``temperature`` 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    chat: bool = False
    offline: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        for key, (low, high) in LIMITS.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise TraceError(f"{key} must be {low:g} to {high:g}, not {value:g}")
        if self.max_new_tokens < 1:
            raise TraceError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise TraceError(f"trace capture {NEEDS} ({reason(error)})") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


# Prompts ------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str | list[int]]:
    """Prompts of a file: a text line each, or JSON with ``prompt`` or ``input_ids`` in ``.jsonl``.

    Empty lines are no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: is not UTF-8 text") from None
    prompts: list[str | list[int]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(
            _json_prompt(path, number, line) if path.suffix in (".jsonl", ".json") else line
        )
    if not prompts:
        raise TraceError(f"{path}: holds no prompt; a prompt is a line that is not empty")
    return prompts


def _json_prompt(path: Path, number: int, line: str) -> str | list[int]:
    where = f"{path}: line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: is not JSON: {reason(error)}") from None
    if isinstance(entry, dict):
        ids, prompt = entry.get("input_ids"), entry.get("prompt")
        if isinstance(prompt, str) and prompt and ids is None:
            return prompt
        if (
            isinstance(ids, list)
            and ids
            and prompt is None
            and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        ):
            return ids
    raise TraceError(
        f"{where}: must be an object with prompt, a text that is not empty, or input_ids, a list "
        "of integers, 0 or more"
    )


# Routers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Router:
    """A module whose calls are routing decisions."""

    name: str
    module: Any
    side: str
    """``output``, or ``input`` for experts that are handed the decision, or ``scores`` for a
    router that gives a score per expert which is 0 for those not chosen."""
    num_experts: int
    top_k: int

    @property
    def layer(self) -> int | None:
        """The model's layer it stands in, by the first number in its name."""
        match = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(match[1]) if match else None


def _tensors(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif hasattr(values, "dtype") and hasattr(values, "shape"):
        yield values


def _is_index(tensor: Any) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype.itemsize > 1


def _decision(values: Any, tokens: int) -> tuple[Any, Any] | None:
    """Indices and weights [tokens, K] among some tensors."""
    found = [t for t in _tensors(values) if len(t.shape) >= 2]
    for index in found:
        if not _is_index(index) or index.numel() != tokens * index.shape[-1]:
            continue
        for weights in found:
            if weights.is_floating_point() and weights.shape == index.shape:
                return index.reshape(tokens, -1), weights.reshape(tokens, -1)
    return None


def _scores(values: Any, tokens: int) -> Any | None:
    """Scores [tokens, E] of a router that zeroes all but the chosen, beside its logits."""
    found = [t for t in _tensors(values) if t.is_floating_point() and len(t.shape) == 2]
    if len(found) != 2 or found[0].shape != found[1].shape or len(found[0]) != tokens:
        return None
    for scores in found:
        chosen = (scores != 0).sum(dim=-1)
        if 0 < int(chosen[0]) < scores.shape[-1] and bool((chosen == chosen[0]).all()):
            return scores
    return None


def _experts_of(module: Any, values: Any, tokens: int, top_k: int, config: Any) -> int | None:
    """E: the width of the logits beside the decision, else what module or configuration says."""
    for tensor in _tensors(values):
        if tensor.is_floating_point() and len(tensor.shape) == 2 and len(tensor) == tokens:
            if tensor.shape[-1] > top_k and tensor.shape[-1] <= 4096:
                hidden = getattr(config, "hidden_size", None)
                if tensor.shape[-1] != hidden:
                    return int(tensor.shape[-1])
    for holder in (module, config):
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            value = getattr(holder, key, None)
            if isinstance(value, int) and value >= top_k:
                return value
    return None


def _forward(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, use_cache=False)


def find_routers(model: Any) -> list[Router]:
    """The model's routers in the order in which they decide.

    Raises
    ------
    TraceError
        None is found, one decides twice in a pass, or they differ in E or K.
    """
    import torch

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    outputs: dict[str, Router] = {}
    inputs: dict[str, Router] = {}
    calls: dict[str, int] = {}
    modules = dict(model.named_modules())

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            for side, values, store in (
                ("output", output, outputs),
                ("input", (args, kwargs), inputs),
            ):
                decision = _decision(values, PROBE_TOKENS)
                top_k = None if decision is None else int(decision[0].shape[-1])
                if decision is None and side == "output":
                    scores = _scores(values, PROBE_TOKENS)
                    if scores is not None:
                        top_k, side = int((scores[0] != 0).sum()), "scores"
                if top_k is None:
                    continue
                experts = _experts_of(module, values, PROBE_TOKENS, top_k, text)
                if experts is not None:
                    calls[name] = calls.get(name, 0) + (side != "input")
                    store.setdefault(name, Router(name, module, side, experts, top_k))

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in modules.items()
        if name
    ]
    vocabulary = getattr(text, "vocab_size", PROBE_TOKENS + 1)
    ids = torch.arange(1, PROBE_TOKENS + 1).remainder(vocabulary).unsqueeze(0)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            _forward(model, ids.to(device))
    finally:
        for handle in handles:
            handle.remove()

    # The innermost module that gives a decision has made it.
    routers = {
        name: router
        for name, router in outputs.items()
        if not any(other.startswith(f"{name}.") for other in outputs)
    }
    blocks = {name.rpartition(".")[0] for name in routers}
    for name, router in inputs.items():
        block = name.rpartition(".")[0]
        inside = any(b == block or b.startswith(f"{block}.") for b in blocks)
        under = any(name.startswith(f"{other}.") for other in [*inputs, *outputs])
        if not inside and not under:
            routers[name] = router
    kind = type(model).__name__
    if not routers:
        raise TraceError(
            f"{kind}: no router found: none of its modules gives expert indices and weights for "
            "each token; is it a mixture of experts?"
        )
    first = next(iter(routers.values()))
    for router in routers.values():
        if calls.get(router.name, 0) > 1:
            raise TraceError(
                f"{kind}: router {router.name} decides {calls[router.name]} times a "
                "pass; a trace has one decision a layer"
            )
        if (router.num_experts, router.top_k) != (first.num_experts, first.top_k):
            raise TraceError(
                f"{kind}: {router.name} picks {router.top_k} of {router.num_experts} experts, but "
                f"{first.name} {first.top_k} of {first.num_experts}; a trace has one shape"
            )
    return list(routers.values())


@dataclass
class RouterWatch:
    """Context in which every forward pass of the model is recorded.

    ``passes`` gets, for each pass, the token ids [N], experts [N, L, K] and weights [N, L, K],
    heaviest first. One sequence at a time.
    """

    model: Any
    routers: list[Router]
    passes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    on_pass: Callable[[], None] | None = None

    def __enter__(self) -> RouterWatch:
        self._made: dict[str, tuple[Any, Any]] = {}
        self._ids: Any = None
        self._handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
        ]
        for router in self.routers:
            hook = self._hook(router)
            self._handles.append(router.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, _module: Any, args: Any, kwargs: Any) -> None:
        self._ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if self._ids.shape[0] != 1:
            raise TraceError("one sequence at a time can be captured, not a batch")
        self._made.clear()

    def _hook(self, router: Router) -> Callable[..., None]:
        import torch

        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tokens = self._ids.shape[-1]
            if router.side == "scores":
                scores = _scores(output, tokens)
                decision: tuple[Any, Any] | None = None
                if scores is not None:
                    best = torch.topk(scores, router.top_k, dim=-1)
                    decision = best.indices, best.values
            else:
                values = (args, kwargs) if router.side == "input" else output
                decision = _decision(values, tokens)
            if decision is None:
                raise TraceError(f"router {router.name} gave no decision for {tokens} tokens")
            index, weights = decision
            weights = weights.detach().float()
            order = torch.argsort(weights, dim=-1, descending=True, stable=True)
            self._made[router.name] = (index.gather(-1, order), weights.gather(-1, order))

        return hook

    def _end(self, *_: Any) -> None:
        lacking = [router.name for router in self.routers if router.name not in self._made]
        if lacking:
            raise TraceError(f"router {lacking[0]} did not decide in this pass")
        import torch

        made = [self._made[router.name] for router in self.routers]
        self.passes.append(
            (
                self._ids[0].cpu().numpy().astype(np.int32),
                torch.stack([index for index, _ in made], 1).cpu().numpy(),
                torch.stack([weights for _, weights in made], 1).cpu().numpy(),
            )
        )
        if self.on_pass is not None:
            self.on_pass()


# Capture ------------------------------------------------------------------------------------


def capture_prompt(
    model: Any,
    routers: list[Router],
    ids: list[int],
    options: CaptureOptions,
    index: int = 0,
    on_pass: Callable[[], None] | None = None,
) -> Trace:
    """Let the model continue one prompt; the routing of every token it was fed, prompt included.

    The last token that it generates is not fed, so it has no routing.
    """
    import torch

    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": 0,
        }
    torch.manual_seed(options.seed + index)
    watch = RouterWatch(model, routers, on_pass=on_pass)
    with torch.no_grad(), watch:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.max_new_tokens,
            use_cache=True,
            disable_compile=True,
            **sampling,
        )
    token_id, experts, weights = (
        np.concatenate([one[part] for one in watch.passes]) for part in range(3)
    )
    if token_id[: len(ids)].tolist() != ids:
        raise TraceError("the model was not fed the prompt as it is; its cache cannot be followed")
    first = routers[0]
    small = first.num_experts <= 256
    layers = [router.layer for router in routers]
    info: dict[str, Any] = {
        "num_layers": len(routers),
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "router": type(first.module).__name__,
    }
    if None not in layers:
        info["model_layers"] = layers
    return Trace(
        experts=experts.astype(np.uint8 if small else np.uint16),
        sequence=np.full(len(token_id), index, np.int32),
        weights=weights.astype(np.float32),
        token_id=token_id,
        phase=np.where(np.arange(len(token_id)) < len(ids), PREFILL, DECODE).astype(np.uint8),
        info=info,
    )


def expert_bytes_of(model: Any, routers: list[Router]) -> list[int] | None:
    """Bytes of one routed expert by layer, from the stacked parameters beside each router."""
    modules = dict(model.named_modules())
    sizes = []
    for router in routers:
        block = modules.get(router.name.rpartition(".")[0])
        experts = router.module if router.side == "input" else getattr(block, "experts", None)
        if experts is None:
            return None
        parameters = list(experts.parameters())
        total = sum(p.numel() * p.element_size() for p in parameters)
        if not total or total % router.num_experts:
            return None
        sizes.append(total // router.num_experts)
    return sizes


def _load(name: str, options: CaptureOptions) -> Any:
    torch, transformers = _libraries()
    if options.device != "cpu":
        try:
            torch.empty(1, device=options.device)
        except Exception as error:  # each back end has its own
            raise TraceError(f"device {options.device}: {reason(error)}") from None
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, local_files_only=options.offline or Path(name).exists()
        )
        return model.to(options.device).eval()
    except Exception as error:  # the library has many
        raise TraceError(f"{name}: cannot be loaded as a causal LM: {reason(error)}") from None


def _encode(
    name: str, path: Path, prompts: list[str | list[int]], model: Any, options: CaptureOptions
) -> list[list[int]]:
    tokenizer = None
    if any(isinstance(prompt, str) for prompt in prompts):
        _, transformers = _libraries()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, local_files_only=options.offline or Path(name).exists()
            )
        except Exception as error:
            raise TraceError(
                f"{name}: has no tokenizer that can be loaded, and {path} holds text (input_ids "
                f"in a .jsonl file need none): {reason(error)}"
            ) from None
    vocabulary = model.get_input_embeddings().num_embeddings
    encoded = []
    for number, prompt in enumerate(prompts):
        ids = prompt
        if isinstance(prompt, str):
            assert tokenizer is not None
            try:
                if options.chat:
                    ids = tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}],
                        add_generation_prompt=True,
                        return_dict=True,
                    )["input_ids"]
                else:
                    ids = tokenizer(prompt)["input_ids"]
            except Exception as error:
                raise TraceError(
                    f"{path}: prompt {number} cannot be encoded: {reason(error)}"
                ) from None
        encoded.append([int(i) for i in ids])
        if not encoded[-1]:
            raise TraceError(
                f"{path}: prompt {number} encodes to no token: does {name} have its tokenizer? "
                "(input_ids in a .jsonl file need none)"
            )
        if max(encoded[-1]) >= vocabulary:
            raise TraceError(
                f"{path}: prompt {number}: token ids must be 0 to {vocabulary - 1}, "
                f"not {max(encoded[-1])}"
            )
    return encoded


def _fingerprint(
    name: str, model: Any, routers: list[Router], prompts: list[list[int]], options: CaptureOptions
) -> dict[str, Any]:
    """What must be the same for a capture to go on: JSON values."""
    checksum = 0
    for router in routers:
        for parameter in router.module.parameters():
            data = parameter.detach().float().cpu().numpy().tobytes()
            checksum = zlib.crc32(data, checksum)
    kept = {k: v for k, v in asdict(options).items() if k not in ("restart", "offline")}
    return {
        "model": name,
        "routers": checksum,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        **kept,
    }


def _open_parts(folder: Path, fingerprint: dict[str, Any], restart: bool) -> None:
    """Begin or go on: the folder is of this very capture afterwards."""
    manifest = folder / "capture.json"
    if folder.exists() and not manifest.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TraceError(
            f"{folder}: is in the way, and no capture has made it; name another -o or move it"
        )
    if restart and manifest.exists():
        shutil.rmtree(folder)
    if manifest.exists():
        try:
            before = json.loads(manifest.read_text())
        except (OSError, ValueError):
            before = {}
        for key, value in fingerprint.items():
            if not isinstance(before, dict) or before.get(key) != value:
                raise TraceError(
                    f"{folder}: holds an interrupted capture with another {key}; give --restart "
                    "to begin anew, or another -o"
                )
        return
    folder.mkdir(exist_ok=True)
    with replacing(manifest) as file:
        file.write(json.dumps(fingerprint, indent=1).encode())


def _part(path: Path) -> Trace | None:
    """A prompt that has been captured; None where it must be done (again)."""
    if not path.exists():
        return None
    with contextlib.suppress(TraceError):
        return load_trace(path)
    return None


def capture_trace(name: str, prompts: Path, output: Path, options: CaptureOptions) -> Trace:
    """Capture every prompt of a file and write the trace.

    Parameters
    ----------
    name : str
        A folder with a model, or a name on the Hugging Face Hub.
    prompts : Path
        See :func:`read_prompts`.
    output : Path
        The trace; until it is whole, ``output`` with ``.parts`` after it is a folder of parts.
    options : CaptureOptions

    Raises
    ------
    TraceError
        Bad input, a model that cannot be loaded or has no routers, or a missing extra.
    """
    _, transformers = _libraries()
    texts = read_prompts(prompts)
    if output.is_dir():
        raise TraceError(f"{output}: is a directory; -o names a file")
    if not output.parent.is_dir():
        raise TraceError(f"{output.parent}: is no directory")
    model = _load(name, options)
    try:
        routers = find_routers(model)
    except TraceError as error:
        raise TraceError(f"{name}: {error}") from None
    encoded = _encode(name, prompts, texts, model, options)
    folder = output.with_name(output.name + ".parts")
    _open_parts(folder, _fingerprint(name, model, routers, encoded, options), options.restart)

    from tqdm import tqdm

    parts, tokens = [], 0
    with tqdm(total=len(encoded), desc="capture", unit="prompt", disable=None) as bar:

        def fed() -> None:
            nonlocal tokens
            tokens += 1
            bar.set_postfix(passes=tokens, refresh=False)
            bar.update(0)

        for index, ids in enumerate(encoded):
            path = folder / f"{index:06}.npz"
            part = _part(path)
            if part is None:
                try:
                    part = capture_prompt(model, routers, ids, options, index, fed)
                    save_trace(part, path)
                except (TraceError, RuntimeError, ValueError) as error:
                    raise TraceError(
                        f"{name}: prompt {index} of {prompts}: {reason(error)}"
                    ) from None
            parts.append(part)
            bar.update(1)

    info = parts[0].info | {
        "model": name,
        "architecture": type(model).__name__,
        "source": "stmoe trace capture",
        "phase": "prefill and decode",
        "prompts": len(parts),
        "generation": {
            key: getattr(options, key)
            for key in ("max_new_tokens", "temperature", "top_p", "seed", "dtype", "chat")
        },
        "versions": {"transformers": transformers.__version__},
    }
    sizes = expert_bytes_of(model, routers)
    if sizes is not None:
        info["expert_bytes"] = sizes
    keys = ("experts", "sequence", "weights", "token_id", "phase")
    arrays = {key: np.concatenate([getattr(part, key) for part in parts]) for key in keys}
    trace = Trace(info=info, path=output, **arrays)
    save_trace(trace, output)
    shutil.rmtree(folder)
    return trace
