# SPDX-License-Identifier: Apache-2.0
"""Runs a Hugging Face MoE model with its experts in a memory-mapped file.

The same prompts are continued three times: by the plain model, with experts loaded on demand, and
with experts prefetched. The tokens and the logits must be the same, bit for bit; what differs is
how often the main thread had to wait.

    python examples/offload/run.py --model FOLDER --share 0.5 --link-mb-s 200
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def small_model(folder: Path) -> None:
    """An OLMoE of a few million parameters, trained for half a minute on this project's text.

    Only so that its routing has some structure, where no model is given.
    """
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(1)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=256, hidden_size=192, intermediate_size=256, num_hidden_layers=8,
            num_attention_heads=4, num_experts=32, num_experts_per_tok=4,
            max_position_embeddings=512, pad_token_id=None, bos_token_id=None, eos_token_id=None,
            router_aux_loss_coef=0.01,
        )
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    began, step = time.monotonic(), 0
    while time.monotonic() - began < 30 and step < 80:
        at = torch.randint(len(data) - 128, (4,))
        ids = torch.stack([data[i : i + 128] for i in at])
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    print(f"offload: trained a small OLMoE for {step} steps, loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The model with its eager experts, whose order of sums is the one that is reproduced."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, experts_implementation="eager", dtype="auto"
    ).eval()


def generate(
    model: Any, prompts: list[list[int]], tokens: int, begin: Any = None
) -> tuple[list[Any], list[Any], float]:
    """Sampled continuations, the logits of every step, and the seconds it took.

    The seed is the prompt's, so the same logits give the same tokens.
    """
    import torch

    ids, logits, began = [], [], time.perf_counter()
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            torch.manual_seed(number)
            if begin is not None:
                begin()
            output = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens,
                do_sample=True,
                top_k=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            ids.append(output.sequences[0])
            logits.append(torch.cat(output.logits))
    return ids, logits, time.perf_counter() - began


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="A Hugging Face MoE with experts in a file.")
    parser.add_argument("--model", type=Path, help="a local folder; by default a small one is made")
    parser.add_argument(
        "--share", type=float, default=0.3, help="of the experts that fit in memory (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="to generate (%(default)s)")
    parser.add_argument(
        "--link-mb-s",
        type=float,
        help="make loads as slow as such a link; by default as fast as the file is",
    )
    parser.add_argument("--work-dir", type=Path, help="where the small model is kept")
    options = parser.parse_args(given)
    if not 0 < options.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, not {options.share:g}")
    if options.tokens < 2:
        parser.error(f"--tokens must be 2 or more, not {options.tokens}")
    if options.link_mb_s is not None and not options.link_mb_s > 0:
        parser.error(f"--link-mb-s must be above 0, not {options.link_mb_s:g}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model {options.model}: no such folder")
    return options


def main(given: list[str] | None = None) -> int:
    """Exit status 0 when all outputs are equal, 1 when not, 2 on bad input."""
    options = arguments(given)
    try:
        import torch
        import transformers
    except ImportError:
        print("offload: needs torch and transformers: pip install -e '.[capture]'", file=sys.stderr)
        return 2
    from expert_store import OffloadedModel

    from stmoe_golden.offload import compile_decisions

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the other core is the loader's
    compile_decisions()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folder = options.model or work / "model"
        if options.model is None and not (folder / "config.json").exists():
            small_model(folder)
        model = load(folder)
        text = b"The engine grants those experts that are ready, and loads the rest first. "
        vocabulary = model.get_input_embeddings().num_embeddings
        prompts = [[b % vocabulary for b in text[n : n + 24]] for n in (0, 20, 45)]
        steps = len(prompts) * (options.tokens - 1)
        ids, logits, seconds = generate(model, prompts, options.tokens)
        print(
            f"plain      {1e3 * seconds / steps:7.2f} ms/token, all experts in memory", flush=True
        )

        equal = True
        link = options.link_mb_s and options.link_mb_s * 1e6
        for name, prefetch in (("on demand", False), ("prefetch", True)):
            model = load(folder)
            experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
            most = sum(next(m.parameters()).shape[0] for m in experts)
            del experts
            slots = max(round(options.share * most), 2 * model.config.num_experts_per_tok)
            run = OffloadedModel(
                model, Path(temporary) / "experts.bin", slots,
                prefetch=prefetch, link_bytes_per_s=link,
            )  # fmt: skip
            gc.collect()
            if not prefetch:
                mib = run.file.expert_bytes / (1 << 20)
                print(
                    f"offload: {run.cache.num_slots} of {most} experts of {mib:.2f} MiB in memory, "
                    f"{run.file.total_bytes / (1 << 20):.0f} MiB in the file",
                    flush=True,
                )
            found, scores, seconds = generate(model, prompts, options.tokens, run.new_sequence)
            same = all(torch.equal(a, b) for a, b in zip(ids, found, strict=True)) and all(
                torch.equal(a, b) for a, b in zip(logits, scores, strict=True)
            )
            equal &= same
            count = run.cache.counters
            print(
                f"{name:<10} {1e3 * seconds / steps:7.2f} ms/token, waited "
                f"{1e3 * run.waited_s / steps:.2f} ms; hit rate {run.cache.hit_rate:.3f}, "
                f"{count['missing']} loaded on demand, {count['prefetches']} prefetched "
                f"({count['useful']} of use); output "
                f"{'equal, bit for bit' if same else 'DIFFERS'}",
                flush=True,
            )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
