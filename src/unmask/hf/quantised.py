"""Quantised models: their weights are packed and stay frozen; adapters beside them learn (QLoRA, 2305.14314).

Knows what transformers' quantisers leave on a model. bitsandbytes and torchao are imported by transformers alone.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from transformers import BitsAndBytesConfig

from unmask.progress import warn

NAMED = ("nf4", "int8")
"""Quantisations that a name stands for; both are bitsandbytes'."""


def named_quantisation(name: Any) -> Any:
    """The quantization_config of transformers that a name stands for; a config itself comes back unchanged.

    "nf4": 4 bits, doubly quantised (2305.14314, section 3). "int8": 8 bits in every column, since LLM.int8's outlier
    columns (2208.07339) depend on all rows of a pass, so that drafts would change clean rows.
    """
    if not isinstance(name, str):
        return name
    if name not in NAMED:
        raise ValueError(
            f"quantization_config={name!r} is unknown: use one of {', '.join(NAMED)}, or a config of transformers"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantisation {name!r} needs bitsandbytes, which is not installed: pip install 'unmask[quant]'"
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def quantisation_of(model: Any) -> str | None:
    """What a model's weights are quantised with, as "nf4" or the name of the method; None if they are not."""
    if not getattr(model, "is_quantized", False):
        return None
    config = model.config.quantization_config
    raw = config if isinstance(config, dict) else config.to_dict()
    method = raw.get("quant_method")
    if raw.get("load_in_4bit"):
        return str(raw.get("bnb_4bit_quant_type") or "fp4")
    return "int8" if raw.get("load_in_8bit") else str(getattr(method, "value", method))


def has_adapters(model: Any) -> bool:
    """Whether adapters lie beside the weights."""
    return any("lora_" in name for name, _ in model.named_parameters())


def check_bare(model: Any) -> None:
    """Raise ValueError for a model that has adapters, which only a quantised one keeps apart from its weights."""
    if has_adapters(model):
        raise ValueError(
            "this quantised model has an adapter already, which cannot be merged into packed weights: load the "
            "adapter's folder unquantised, save it whole, and go on from there"
        )


def settle(model: Any) -> None:
    """Make a quantised model compute the same whatever else is in a pass, and whether gradients are wanted.

    bitsandbytes repacks 4-bit weights at their first pass without gradients on some CPUs, for products in bfloat16,
    and fails on widths that are no multiple of 32: here they stay as they were loaded.
    """
    # At every 8-bit product it says that inputs are rounded to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module, "state", None), "threshold", 0) > 0:
            warn(
                f"llm_int8_threshold={module.state.threshold} makes a row depend on all others of its pass, so that "
                "speculative text may differ from the AR text: quantization_config='int8' has no threshold"
            )
            break
