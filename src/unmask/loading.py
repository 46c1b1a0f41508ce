"""`load`: from a folder or a hub id to a `DiffusionLM`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unmask import hf
from unmask.core.finite import check_weights
from unmask.hf import lora
from unmask.model import DiffusionLM


def _check_chain(name: str | Path) -> None:
    """Adapters may stand on adapters, but not in a circle."""
    seen, at = {Path(name).resolve()}, lora.adapter_base(name)
    while at is not None:
        if Path(at).resolve() in seen:
            raise ValueError(f"adapter {str(name)!r} ends at no model: its bases go round in a circle by {at!r}")
        seen.add(Path(at).resolve())
        at = lora.adapter_base(at)


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> DiffusionLM:
    """Load a folder, hub id or .gguf file, converted or not; refuse a model whose attention cannot be controlled.

    An adapter's folder is its base with the adapter merged into it; a drafter's is its base with the drafter on it;
    base: where that model is, if not where the folder says. A .gguf file (extra `[gguf]`) is dequantised.
    trust_remote_code: run Python code that the folder brings; without it such a folder is refused. Raises ValueError
    with the file or the weights that are not what they should be.
    """
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
        "trust_remote_code": trust_remote_code,
    }
    adapted_base = lora.adapter_base(name)
    if adapted_base is not None:
        _check_chain(name)
        lm = load(base or adapted_base, **options)
        lora.load_adapter(lm.model, name)
        check_weights(lm.model, f"model {str(name)!r}")
        tokenizer = hf.load_tokenizer(name, trust_remote_code=trust_remote_code)
        hf.check_tokenizer(name, lm.model, tokenizer)
        return DiffusionLM(lm.model, tokenizer, hf.read_diffusion(lm.model)).known_finite()
    drafted = hf.read_base(name)
    if drafted is not None:
        if base is not None:
            drafted = replace(drafted, name=str(base))
        model, tokenizer, diffusion, drafter = hf.load_drafter(name, drafted, **options)
        hf.probe(model)
        hf.check_tokenizer(name, model, tokenizer)
        return DiffusionLM(model, tokenizer, diffusion, drafter=drafter, base=drafted).known_finite()
    if base is not None:
        raise ValueError(f"base={str(base)!r} is for a drafter's or an adapter's folder, and {str(name)!r} is neither")
    model, tokenizer = hf.load_pretrained(name, **options)
    hf.probe(model)
    hf.check_tokenizer(name, model, tokenizer)
    return DiffusionLM(model, tokenizer, hf.read_diffusion(model)).known_finite()
