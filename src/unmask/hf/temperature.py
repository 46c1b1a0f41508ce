"""Queries that grow with the position of their token (2501.19399), where a stock layer takes its index in the pass.

Llama 4's layers without rotary positions do: index and position differ in [noisy | clean], packed documents and slots.
Slow twin: a stock forward over one document; compared in tests/test_architectures.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unmask.hf.layers import layers_of


def layers_with_temperature(model: Any) -> list[tuple[Any, Any]]:
    """The layers of the model whose attention scales queries by their index, each with that attention."""
    return [
        (layer, module)
        for layer in layers_of(model)
        for module in layer.modules()
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)
    ]


@contextmanager
def scaling_queries(layers: Sequence[tuple[Any, Any]], position: Tensor, end: int) -> Iterator[None]:
    """Within the context these layers scale queries by `position`, (batch, length) on their device.

    end: tokens before and in the pass; below the first step of the scale, indices do no harm and nothing is changed.
    Raises ValueError for a longer pass where layers run without this context: compiled ones, and those that the
    backward pass computes again.
    """
    attentions = [attention for _, attention in layers]
    if not layers or end < attentions[0].floor_scale:
        yield
        return
    first, layer = attentions[0], layers[0][0]
    if layer._compiled_call_impl is not None or (layer.training and getattr(layer, "gradient_checkpointing", False)):
        raise ValueError(
            f"a pass of {end} tokens reaches position {first.floor_scale}, from where this model scales queries by "
            "their position: leave compile_layers and gradient_checkpointing off, or use a shorter max_length"
        )
    factor = torch.log1p(torch.floor((position.float() + 1.0) / first.floor_scale)) * first.attn_scale + 1.0

    def scale(_module: torch.nn.Module, _args: Any, out: Tensor) -> Tensor:
        return (out * factor[..., None]).to(out.dtype)

    before = [layer.attn_temperature_tuning for layer in attentions]
    hooks = [attention.q_proj.register_forward_hook(scale) for attention in attentions]
    for attention in attentions:
        attention.attn_temperature_tuning = False
    try:
        yield
    finally:
        for attention, setting, hook in zip(attentions, before, hooks, strict=True):
            attention.attn_temperature_tuning = setting
            hook.remove()
