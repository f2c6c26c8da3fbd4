# SPDX-License-Identifier: Apache-2.0
"""Capture: what it records of small models of many architectures is what their own router logits
say in a forward pass without a cache; and it resumes, and refuses in one line.

The models have random weights, but for the in-repo OLMoE, whose trained weights are not kept:
that one is trained for a few steps here. All of it needs the extra ``capture``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from command import ended, refused
from stmoe import cli
from stmoe_golden.traces import DECODE, PREFILL, Trace, load_trace

torch = pytest.importorskip("torch", reason="torch is not here (pip install -e '.[capture]')")
transformers = pytest.importorskip("transformers", reason="transformers is not here (.[capture])")

from stmoe_golden import trace_capture  # noqa: E402
from stmoe_golden.trace_capture import CaptureOptions, capture_prompt, find_routers  # noqa: E402

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # small products: more threads only wait for each other
VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
}
ARCHITECTURES = {
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48},
    "Qwen2Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "intermediate_size": 48,
    },
    "Qwen3Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "mlp_only_layers": [1],
        "head_dim": 8,
    },
    "DeepseekV2": LATENT
    | {"num_experts_per_tok": 3, "topk_method": "greedy", "n_group": None, "topk_group": None},
    "DeepseekV3": LATENT | {"num_experts_per_tok": 3, "n_group": 1, "topk_group": 1},
    "GptOss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "intermediate_size": 24,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
    },
    "GraniteMoe": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24},
    "Phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "Llama4Text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "intermediate_size_mlp": 24,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    "Dbrx": {},
}


def build(name: str, **changes):
    """A small model with random weights, spread so that routing differs from token to token."""
    torch.manual_seed(7)
    if name == "Dbrx":
        config = transformers.DbrxConfig(
            d_model=32, n_heads=4, n_layers=3, max_seq_len=128, vocab_size=VOCABULARY,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3,
                        "hidden_size": 32},
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    else:
        fields = SMALL | ARCHITECTURES[name] | changes
        config = getattr(transformers, f"{name}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for key, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "router" in key or "gate.weight" in key or "e_score_correction_bias" in key:
                parameter.normal_(0, 0.3)
            elif parameter.dim() > 1 and "norm" not in key:
                parameter.normal_(0, 0.15)
    return model


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [31]]


def prompt_file(path: Path) -> Path:
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in PROMPTS))
    return path


def expected(model, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From one pass over all tokens: K best experts, their weights, and the margin to the next.

    The rules are those of the papers, on the model's own logits.
    """
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            use_cache=False,
            output_router_logits=True,
        )
    config = model.config
    top_k = getattr(config, "num_experts_per_tok", None) or config.ffn_config.moe_top_k
    sets, weights, margins = [], [], []
    biases = [b for key, b in model.named_buffers() if "e_score_correction_bias" in key]
    for layer, logits in enumerate(output.router_logits):
        logits = logits.reshape(len(ids), -1).double()
        choice, gate = logits, logits.softmax(-1)
        if name == "Llama4Text":
            gate = logits.sigmoid()
        if name == "DeepseekV3":
            gate = logits.sigmoid()
            choice = gate + biases[layer].double()
        best = choice.topk(top_k + 1, dim=-1)
        index = best.indices[:, :top_k]
        chosen = gate.gather(-1, index)
        if name == "DeepseekV2":
            chosen = chosen * config.routed_scaling_factor
        elif name == "DeepseekV3":
            chosen = chosen / chosen.sum(-1, keepdim=True) * config.routed_scaling_factor
        elif name != "Llama4Text" and not (
            name in ("Olmoe", "Qwen2Moe", "Qwen3Moe") and not config.norm_topk_prob
        ):
            chosen = chosen / chosen.sum(-1, keepdim=True)
        order = chosen.argsort(dim=-1, descending=True)
        sets.append(index.gather(-1, order).numpy())
        weights.append(chosen.gather(-1, order).numpy())
        margins.append((best.values[:, :-1] - best.values[:, 1:]).min(-1).values.numpy())
    return np.stack(sets, 1), np.stack(weights, 1), np.stack(margins, 1)


def check(trace: Trace, model, name: str) -> None:
    for sequence, prompt in enumerate(PROMPTS):
        here = trace.sequence == sequence
        ids = trace.token_id[here]
        assert ids[: len(prompt)].tolist() == prompt
        assert trace.phase[here].tolist() == [PREFILL] * len(prompt) + [DECODE] * (
            len(ids) - len(prompt)
        )
        experts, weights, margin = expected(model, name, ids)
        clear = margin > 1e-4  # sums in another order differ by less
        assert clear.mean() > 0.95
        found = trace.experts[here][clear]
        if name == "Phimoe":  # its weights follow a rule of their own, and so does its order
            np.testing.assert_array_equal(np.sort(found), np.sort(experts[clear]))
        else:
            np.testing.assert_array_equal(found, experts[clear])
            np.testing.assert_allclose(trace.weights[here][clear], weights[clear], atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_captured_sets_are_those_of_the_models_own_logits(name, tmp_path, capsys):
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    prompts, out = prompt_file(tmp_path / "p.jsonl"), tmp_path / "t.npz"
    arguments = ["trace", "capture", str(tmp_path / "model"), "--prompts", str(prompts), "-o",
                 str(out), "--offline", "--max-new-tokens", "12"]  # fmt: skip
    assert cli.main(arguments) == 0, capsys.readouterr()
    assert "of 3 sequences" in capsys.readouterr().out
    trace = load_trace(out)
    assert trace.num_tokens == sum(len(p) + 11 for p in PROMPTS)
    dense = {"Qwen3Moe": [0, 2], "DeepseekV2": [1, 2], "DeepseekV3": [1, 2]}
    assert trace.info["model_layers"] == dense.get(name, [0, 1, 2])
    check(trace, model, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "p.jsonl", "t.npz"]
    experts = sum(
        p.numel() * p.element_size() for k, p in model.named_parameters() if ".experts." in k
    )
    assert sum(trace.expert_bytes) * trace.num_experts == experts


def olmoe_of_the_repository():
    """The script's own architecture, after a few steps on this project's own text."""
    path = ROOT / "sim_traces" / "capture_olmoe_stdlib.py"
    spec = importlib.util.spec_from_file_location("capture_olmoe_stdlib", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # its dataclasses look for it
    spec.loader.exec_module(script)
    torch.manual_seed(3)
    model = script.build_model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list((ROOT / "README.md").read_bytes()))
    losses = []
    for step in range(12):
        ids = torch.stack([text[200 * step + 64 * n :][:64] for n in range(4)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    return model.eval()


def test_the_repositorys_own_model_is_captured_and_replayed(tmp_path, capsys):
    """Trained for seconds, as its trained weights are not kept; the trace then runs in `replay`."""
    model = olmoe_of_the_repository()
    model.save_pretrained(tmp_path / "model")
    prompts, out = prompt_file(tmp_path / "p.jsonl"), tmp_path / "t.npz"
    assert cli.main(["trace", "capture", str(tmp_path / "model"), "--prompts", str(prompts), "-o",
                     str(out), "--max-new-tokens", "24", "--temperature", "1", "--seed", "4"]
                    ) == 0, capsys.readouterr()  # fmt: skip
    trace = load_trace(out)
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (8, 32, 4)
    check(trace, model, "Olmoe")
    assert cli.main(["replay", str(out)]) == 0


def test_prompts_of_text_go_through_the_models_tokenizer(tmp_path):
    import tokenizers

    build("Olmoe", vocab_size=300).save_pretrained(tmp_path / "model")
    plain = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {c: n for n, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("Was?\n\nJa, 12.\n")
    out = tmp_path / "t.npz"
    files = [tmp_path / "model", "--prompts", tmp_path / "p.txt", "-o", out]
    assert cli.main(["trace", "capture", *map(str, files), "--max-new-tokens", "3"]) == 0
    trace = load_trace(out)
    for sequence, text in enumerate(("Was?", "Ja, 12.")):
        ids = trace.token_id[(trace.sequence == sequence) & (trace.phase == PREFILL)]
        assert ids.tolist() == plain.encode(text).ids and len(ids) == len(text)


# Going on -----------------------------------------------------------------------------------


def arguments(folder: Path, *more: str) -> list[str]:
    files = [folder / "model", "--prompts", folder / "p.jsonl", "-o", folder / "t.npz"]
    settings = ["--max-new-tokens", "6", "--temperature", "0.9"]
    return ["trace", "capture", *map(str, files), *settings, *more]


def test_an_interrupted_capture_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    build("Olmoe").save_pretrained(tmp_path / "model")
    prompt_file(tmp_path / "p.jsonl")
    assert cli.main(arguments(tmp_path)) == 0
    whole = load_trace(tmp_path / "t.npz")
    (tmp_path / "t.npz").unlink()

    done = []

    def interrupted(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given[4])
        return capture_prompt(*given)

    monkeypatch.setattr(trace_capture, "capture_prompt", interrupted)
    assert cli.main(arguments(tmp_path)) == 130
    parts = tmp_path / "t.npz.parts"
    assert not (tmp_path / "t.npz").exists() and done == [0, 1]
    assert sorted(p.name for p in parts.iterdir()) == ["000000.npz", "000001.npz", "capture.json"]
    (parts / "000001.npz").write_bytes(b"cut")  # as a machine that went down might leave it

    capsys.readouterr()
    assert cli.main(arguments(tmp_path, "--seed", "1")) == 2
    assert capsys.readouterr().err == (
        f"stmoe: {parts}: holds an interrupted capture with another seed; give --restart to begin "
        "anew, or another -o\n"
    )
    done.clear()
    monkeypatch.setattr(
        trace_capture, "capture_prompt", lambda *a: done.append(a[4]) or capture_prompt(*a)
    )
    assert cli.main(arguments(tmp_path)) == 0
    assert done == [1, 2] and not parts.exists()
    again = load_trace(tmp_path / "t.npz")
    for key, array in whole.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[key])
    assert len(np.unique(whole.token_id)) > 20  # it did sample


# What is refused ----------------------------------------------------------------------------


def refused_capture(capsys, *arguments: object) -> str:
    return refused(ended(capsys, "trace", "capture", *arguments))


def test_what_cannot_be_captured_is_said_in_one_line(tmp_path, capsys):
    model, prompts, out = tmp_path / "model", prompt_file(tmp_path / "p.jsonl"), tmp_path / "t.npz"
    build("Olmoe").save_pretrained(model)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=48)
    ).save_pretrained(tmp_path / "dense")

    def said(*more: object, model=model, prompts=prompts) -> str:
        text = refused_capture(capsys, model, "--prompts", prompts, "-o", out, "--offline", *more)
        assert not out.exists() and not (tmp_path / "t.npz.parts").exists()
        return text

    assert said(model=tmp_path / "dense") == (
        f"{tmp_path}/dense: LlamaForCausalLM: no router found: none of its modules gives expert "
        "indices and weights for each token; is it a mixture of experts?"
    )
    assert said(model=tmp_path / "none").startswith(
        f"{tmp_path}/none: cannot be loaded as a causal LM: "
    )
    assert said("--temperature", "-1") == "temperature must be 0 to 100, not -1"
    assert said("--top-p", "2") == "top_p must be 0.001 to 1, not 2"
    assert said(prompts=tmp_path / "no") == f"{tmp_path}/no: No such file or directory"
    for text, message in (
        ("", "holds no prompt; a prompt is a line that is not empty"),
        ('{"input_ids": [1]}\n{"prompt": 3}\n', "line 2: must be an object with prompt, a text "
         "that is not empty, or input_ids, a list of integers, 0 or more"),
        ("\n{\n", "line 2: is not JSON: Expecting property name enclosed in double quotes: line 1 "
         "column 2 (char 1)"),
        ('{"input_ids": [96]}\n',
         "prompt 0: token ids must be 0 to 95, not 96"),
    ):  # fmt: skip
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        assert said(prompts=bad) == f"{bad}: {message}"
    (tmp_path / "t.txt").write_text("hello\n")
    assert said(prompts=tmp_path / "t.txt") == (
        f"{tmp_path}/t.txt: prompt 0 encodes to no token: does {model} have its tokenizer? "
        "(input_ids in a .jsonl file need none)"
    )
    (tmp_path / "t.npz.parts").mkdir()
    (tmp_path / "t.npz.parts" / "mine").write_text("")
    text = refused_capture(capsys, model, "--prompts", prompts, "-o", out, "--restart")
    assert text.startswith(f"{tmp_path}/t.npz.parts: is in the way, and no capture has made it")
    assert (tmp_path / "t.npz.parts" / "mine").exists()


def test_routers_of_two_shapes_are_refused():
    model = build("Olmoe")
    model.model.layers[1].mlp.gate.top_k = 2
    with pytest.raises(trace_capture.TraceError, match=r"gate picks 2 of 8 experts, but .* 3 of 8"):
        find_routers(model)
    assert CaptureOptions(temperature=0).seed == 0
