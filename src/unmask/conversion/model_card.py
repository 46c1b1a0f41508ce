"""README.md of a trained model: its parent, its training, and how to load it."""

from __future__ import annotations

from typing import Any

from unmask.model import DiffusionLM
from unmask.resolve import Resolved

_TAGS = "tags:\n- diffusion-language-model\n- block-diffusion\n- unmask\n"


def model_card(
    parent: str, lm: DiffusionLM, settings: Resolved, tokens: int, figures: dict[str, float], samples: str = ""
) -> str:
    """The text of the card.

    parent: its name. tokens: of training. figures: nats per token of held-out text. samples: text of both models.
    """
    rows: list[tuple[str, Any]] = [
        ("parent", parent),
        *_conversion(lm),
        ("recipe", settings.recipe),
        ("training tokens", f"{tokens:,}"),
        ("learning rate", settings.learning_rate),
        ("rows per step x length", f"{settings.batch_size} x {settings.max_length}"),
        *((f"held-out text, nats per token: {name}", f"{value:.4f}") for name, value in figures.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    shown = f"After the beginning of a held-out text, greedily:\n\n```\n{samples}\n```\n\n" if samples else ""
    tags = "" if lm.diffusion is None else _TAGS
    # A pipeline decodes from left to right: a drafter cannot, and others lost that unless their clean half is causal.
    writes = lm.drafter is None and (lm.diffusion is None or lm.diffusion.serves_ar)
    task = "pipeline_tag: text-generation\n" if writes else ""
    return (
        f"---\nlibrary_name: transformers\n{task}base_model: {parent}\n{tags}---\n\n"
        f"{_summary(lm)}\n\n| | |\n|---|---|\n{table}\n\n{shown}"
        '```python\nimport unmask\n\nlm = unmask.load("this folder")\nprint(lm.generate("...").texts[0])\n```\n'
    )


def _summary(lm: DiffusionLM) -> str:
    if lm.diffusion is None:
        return "Next-token training of an autoregressive language model."
    if lm.drafter is not None:
        loading = "It holds the drafter alone; the `unmask` library loads it together with its base."
    else:
        loading = (
            "`AutoModelForCausalLM` loads the weights; the `unmask` library decodes it as a diffusion model, or "
            "transformers does, with the folder that `unmask export --format hf` writes."
        )
    return f"A masked diffusion language model made from an autoregressive one. {loading}"


def _conversion(lm: DiffusionLM) -> list[tuple[str, Any]]:
    """Rows of the table that describe the conversion; none for an AR model."""
    config = lm.diffusion
    if config is None:
        return []
    clean = f", clean half {config.clean_attention}" if config.clean_attention else ""
    return [
        ("attention", config.attention + clean),
        ("block size", config.block_size or "whole canvas"),
        ("token shift", "yes" if config.shift else "no"),
        ("mask token", f"`{lm.tokenizer.mask_token}` (id {config.mask_token_id})"),
    ]
