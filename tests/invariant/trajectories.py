"""Losses of short trainings and tokens of every decoder, in float64: what a change of form must leave as it is.

    python tests/invariant/trajectories.py          rewrites trajectories.json, on purpose

Everything is asked through the public interface (`unmask.adapt`, `generate`, `infill`), so that the code behind
it may be moved freely. A commit that changes a number here says which and why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import unmask
from unmask.sampling import Confidence, EntropyBound, Factor, Random, Threshold

RECORD = Path(__file__).with_name("trajectories.json")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!\n0123456789:-"
SPECIAL = ["<s>", "</s>"]
SIZES: dict[str, Any] = {"vocab_size": len(LETTERS) + len(SPECIAL), "bos_token_id": 0, "eos_token_id": 1}
LLAMA: dict[str, Any] = SIZES | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.15, "pad_token_id": None,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: tf.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.15),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **LLAMA, head_dim=8, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
}
"""Rotary positions and grouped heads; learned positions; sliding windows beside full attention."""

STORIES = [
    f"{name} had a {colour} {thing}. {name} {verb} it all day, and then it was {colour} no more."
    for name in ("Ann", "Bob", "Cleo")
    for colour in ("red", "blue")
    for thing in ("kite", "old hat", "boat")
    for verb in ("wore", "took")
]
QUESTIONS = [{"prompt": f"{a}-{b}: ", "completion": f"{a + b}."} for a in range(2, 8) for b in range(3, 9)]
PROMPTS = ["Ann had", "Bob took a very old", "C", "It was a blue kite. ", "3-5: "]

TRAININGS: dict[str, dict[str, Any]] = {
    "ar": {"recipe": "ar"},
    "efficient-dlm": {"recipe": "efficient-dlm"},
    "efficient-dlm, half life": {"recipe": "efficient-dlm", "half_life": 0.3},
    "efficient-dlm, two draws": {"recipe": "efficient-dlm", "num_masks": 2},
    "efficient-dlm, growing blocks": {"recipe": "efficient-dlm", "first_block_size": 2},
    "efficient-dlm, complementary": {"recipe": "efficient-dlm", "complementary": True},
    "efficient-dlm, padding": {"recipe": "efficient-dlm", "predict_padding": True, "max_length": 92},
    "efficient-dlm, supervised": {"recipe": "efficient-dlm", "data": "questions"},
    "efficient-dlm, noisy context": {"recipe": "efficient-dlm", "attention": "block_causal", "clean_attention": None},
    "fast-dllm-v2": {"recipe": "fast-dllm-v2"},
    "bd3lm": {"recipe": "bd3lm"},
    "diffullama": {"recipe": "diffullama", "anneal_steps": 10},
    "diffullama, parity": {"recipe": "diffullama", "anneal_steps": 10, "anneal_redraw": True, "micro_batch_size": 2,
                           "loss_normaliser": "masked"},
    "tri-mode": {"recipe": "tri-mode-published"},
    "tri-mode, teacher": {"recipe": "tri-mode-published", "teacher": "parent", "alpha": 0.05, "shift": True,
                          "noisy_attention": "causal"},
    "tri-mode, distances": {"recipe": "tri-mode-published", "teacher": "parent", "distance": "kl", "teacher_top_k": 5},
    "drafter": {"recipe": "drafter", "drafter_rank": 4},
    "drafter, one mask": {"recipe": "drafter", "drafter_rank": 4, "mask_per_place": False, "shift": True,
                          "noisy_attention": "causal", "distance": "tv"},
    "lora": {"recipe": "efficient-dlm", "lora_rank": 3},
}  # fmt: skip
"""Every recipe but the published presets, which are `diffullama` with other numbers."""

SAMPLE = {"temperature": 1.0, "seed": 3}
TWO = {"mode": "speculative", "cycle": "two"}
DECODINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ar": {"greedy": {}, "sampled": SAMPLE | {"top_k": 9}},
    "efficient-dlm": {
        "greedy": {}, "threshold": {"select": Threshold(0.1)}, "confidence": {"select": Confidence()},
        "factor": {"select": Factor(5.0)}, "entropy": {"select": EntropyBound(3.0)},
        "random": {"select": Random(), "seed": 3}, "steps": {"max_denoising_steps": 2}, "sampled": SAMPLE,
        "truncated": SAMPLE | {"top_p": 0.8, "select": Threshold(0.1)}, "queue": {"batch_size": 2},
        "guided": {"guidance_scale": 1.7}, "window": {"window": 2}, "blocks of 2": {"block_size": 2},
        "ar": {"mode": "ar"},
    },
    "fast-dllm-v2": {"greedy": {"select": Threshold(0.1)}, "sampled": SAMPLE | {"batch_size": 2}},
    "efficient-dlm, noisy context": {"greedy": {}},
    "diffullama": {
        "greedy": {}, "confidence": {"select": Confidence()}, "sampled": SAMPLE | {"max_denoising_steps": 6},
        "guided": {"guidance_scale": 1.7},
    },
    "tri-mode": {
        "greedy": TWO, "sampled": TWO | SAMPLE,
        "diffusion": {"mode": "diffusion"}, "queue": TWO | {"batch_size": 2},
    },
    "tri-mode, teacher": {"greedy": TWO, "queue": TWO | {"batch_size": 2}},
    "drafter": {
        "greedy": TWO, "sampled": TWO | SAMPLE,
        "adaptive": {"mode": "speculative", "draft_length": "auto"},
    },
    "drafter, one mask": {"greedy": {"mode": "speculative", "draft_length": 3}},
}  # fmt: skip
INFILLINGS: dict[str, dict[str, dict[str, Any]]] = {
    "efficient-dlm": {"span": {}, "sampled": SAMPLE, "lengths": {"num_tokens": [3, 6], "seed": 3}},
    "diffullama": {"span": {}, "sampled": SAMPLE, "lengths": {"num_tokens": [3, 6], "seed": 3}},
}


def parent(family: str) -> unmask.DiffusionLM:
    """A random model in float64 with a tokenizer of one token a letter."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    return unmask.DiffusionLM(AutoModelForCausalLM.from_config(FAMILIES[family]()).double().eval(), tokenizer)


def convert(family: str, training: str, folder: Path, **changes: Any) -> unmask.DiffusionLM:
    """The parent after a training in `folder`."""
    folder.mkdir()
    settings = dict(TRAININGS[training])
    data = folder / ("questions.jsonl" if settings.pop("data", None) else "stories.txt")
    if data.suffix == ".txt":
        data.write_text("<|endoftext|>".join(STORIES))
    else:
        data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    held_out = folder / "held-out.txt"
    held_out.write_text("<|endoftext|>".join(STORIES[::9]))
    small = {"block_size": 4, "max_length": 32, "batch_size": 4, "max_tokens": 20 * 4 * 32, "learning_rate": 1e-2,
             "log_every": 1, "eval_every": 10, "save_every": 10**6, "eval_data": str(held_out)}  # fmt: skip
    settings = small | settings | changes
    return unmask.adapt(parent(family), data, output_dir=folder / "run", show_progress=False, **settings)


def measure(family: str, training: str, folder: Path) -> dict[str, Any]:
    """Losses of 20 steps, the held-out figures beside them, and what the converted model decodes."""
    convert(family, training, folder / "trained")
    rows = [json.loads(line) for line in (folder / "trained" / "run" / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "loss": [row["loss"] for row in rows if "loss" in row],
        "held_out": [row["nelbo"] if "nelbo" in row else row["nll"] for row in rows if "nelbo" in row or "nll" in row],
    }
    if training not in DECODINGS:
        return result
    # Random weights write more different texts than 20 steps of training leave: after those, all is spaces.
    lm = convert(family, training, folder / "random", learning_rate=1e-9, max_tokens=128)
    for name, options in DECODINGS[training].items():
        out = lm.generate(PROMPTS, max_new_tokens=11, **options)
        result[f"generate, {name}"] = {"text": out.texts, "forwards": out.num_forwards.tolist()}
    for name, options in INFILLINGS.get(training, {}).items():
        out = lm.infill("Ann had a ", " kite. It was blue.", **({"num_tokens": 6} | options))
        result[f"infill, {name}"] = {"text": out.texts, "forwards": out.num_forwards.tolist()}
    return result


def measure_all() -> dict[str, dict[str, Any]]:
    """Every training of every family."""
    record: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        for training in TRAININGS:
            with tempfile.TemporaryDirectory() as folder:
                record[f"{family}: {training}"] = measure(family, training, Path(folder))
            print(f"{family}: {training}", file=sys.stderr)
    return record


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in measure_all().items()]
    RECORD.write_text("{\n" + ",\n".join(cases) + "\n}\n")
