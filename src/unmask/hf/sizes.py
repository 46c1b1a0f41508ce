"""How large a model is, from its configuration alone: no weights are read, and none are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unmask.core.drafter import is_linear_map, linear_maps, shape_of
from unmask.hf.layers import layers_of


class Sizes(NamedTuple):
    """num_parameters: of all weights. active: of those that one token meets, which is fewer where experts are routed.

    per_token: numbers that a layer keeps of a token for the backward pass, the mean over layers. hidden: the width of
    what layers hand on. largest_layer: parameters. maps: (out, in) of each linear map. context: longest text.
    """

    num_parameters: int
    active: int
    num_layers: int
    hidden: int
    per_token: float
    largest_layer: int
    maps: tuple[tuple[int, int], ...]
    vocabulary: int
    context: int | None


def sizes_of(place: Path | str, *, trust_remote_code: bool = False) -> Sizes:
    """The sizes of the model in a folder, behind a hub id or in a .gguf file. ValueError where none is."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    name = place
    if isinstance(place, Path) and place.suffix == ".gguf":
        name, options["gguf_file"] = place.parent, place.name
    try:
        config = AutoConfig.from_pretrained(name, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {str(place)!r} has no configuration of a causal language model: {error}") from error
    return sizes_of_model(model)


def sizes_of_model(model: Any) -> Sizes:
    """The sizes of a model, which may have no weights."""
    config, layers = model.config.get_text_config(), list(layers_of(model))
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    number = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or number) / number
    hidden = model.get_input_embeddings().weight.shape[1]
    widths = [_kept_of(layer, hidden, share) for layer in layers]
    maps = tuple(shape_of(module) for _, module in linear_maps(model))
    return Sizes(
        total, round(total - (1 - share) * experts), len(layers), hidden, sum(widths) / max(1, len(widths)),
        max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0), maps,
        model.get_input_embeddings().weight.shape[0], getattr(config, "max_position_embeddings", None),
    )  # fmt: skip


def _kept_of(layer: Any, hidden: int, share: float) -> float:
    """What a layer keeps of a token: the input of each linear map, twice its output (as it is, and normed, rotated or
    activated), and what goes around the maps."""
    number = 4.0 * hidden
    for name, module in layer.named_modules():
        if is_linear_map(module):
            part = share if ".experts." in name else 1.0
            number += part * 2 * shape_of(module)[0]
    return number
