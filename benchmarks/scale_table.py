"""What a conversion takes at 0.6B to 70B parameters, by `unmask.plan`, as the table of docs/scale.md.

    python benchmarks/scale_table.py

Sizes of the models are those of their published configurations; no weights are read.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from unmask.goals import short, tokens_needed
from unmask.hf.sizes import Sizes, sizes_of_model
from unmask.plan import estimates, fastest
from unmask.recipe import load_recipe
from unmask.resolve import resolve

QWEN: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
MODELS = {
    "Qwen3-0.6B": Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                              tie_word_embeddings=True, **QWEN),
    "Qwen3-4B": Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                            tie_word_embeddings=True, **QWEN),
    "Qwen3-8B": Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                            tie_word_embeddings=False, **QWEN),
    "Qwen3-32B": Qwen3Config(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
                             tie_word_embeddings=False, **QWEN),
    "Llama-3.1-70B": LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                 num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
}  # fmt: skip
GPUS, GPU_BYTES = (1, 8, 64), 80e9
RECIPES = ("drafter", "tri-mode", "efficient-dlm")


def sizes_of_config(config: Any) -> Sizes:
    """The sizes of a model that is made without memory."""
    with torch.device("meta"):
        return sizes_of_model(AutoModelForCausalLM.from_config(config))


def main() -> None:
    print("| parent | recipe | tokens | GPUs of 80 GB | layout | GB on each | hours |\n|---|---|---|---|---|---|---|")
    for name, config in MODELS.items():
        sizes = sizes_of_config(config)
        for recipe in RECIPES:
            settings = resolve(load_recipe(recipe, mixed_precision="bf16"), sizes.num_parameters, sizes.context)
            tokens = tokens_needed(recipe, sizes.num_parameters) or 0.0
            for gpus in GPUS:
                best = fastest(estimates(sizes, settings, gpus, GPU_BYTES, tokens))
                if best is not None:
                    print(f"| {name} | `{recipe}` | {short(tokens)} | {gpus} | {best.layout.name} | "
                          f"{best.total / 1e9:.0f} | {best.hours:,.1f} |")  # fmt: skip
                    break
            else:
                print(f"| {name} | `{recipe}` | {short(tokens)} | {GPUS[-1]} | none fits | - | - |")


if __name__ == "__main__":
    main()
