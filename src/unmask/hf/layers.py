"""The layers of a stock model: found, compiled, and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The layers of the text model: its first list of `num_hidden_layers` modules; empty if it has none.

    Towers for images or sound may have as many, so the search begins at the module whose configuration is the text's.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    of_text = (module for module in model.modules() if getattr(module, "config", None) is config)
    for module in next(of_text, model).modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def compile_layers(model: Any, *, on: bool = True) -> None:
    """Compile each layer of the model, or stop that; equal layers share what is compiled."""
    for layer in layers_of(model):
        if on:
            layer.compile()
        else:
            layer._compiled_call_impl = None  # as in a module that was never compiled


@contextmanager
def plain_layers(model: Any) -> Iterator[None]:
    """Within the context compiled layers run uncompiled: with a cache, each would have to be compiled again."""
    layers = layers_of(model)
    if not layers or layers[-1]._compiled_call_impl is None:  # one is enough to look at, in a decoding pass
        yield
        return
    compiled = [layer._compiled_call_impl for layer in layers]
    compile_layers(model, on=False)
    try:
        yield
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call


def takes_flex(model: Any) -> bool:
    """Whether a model that was loaded with SDPA could attend by FlexAttention, whose heads have at least 16 numbers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return bool(getattr(model, "_supports_flex_attn", False)) and config._attn_implementation == "sdpa" and width >= 16


@contextmanager
def attending_by(implementation: str | None, *models: Any) -> Iterator[None]:
    """Within the context models compute attention by this implementation; None: by the one that they have."""
    configs = [model.config.get_text_config() for model in models]
    before = [config._attn_implementation for config in configs]
    for config in configs if implementation is not None else ():
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


_AGAIN = "_layers_run_again"


def checkpoint_layers(model: Any, *, on: bool = True, compiled: bool = False) -> None:
    """Make the backward pass compute layers again instead of keeping their intermediate results, or stop that.

    compiled: layers that are compiled do so in the way of transformers, which takes their cache away; others in that
    of `fast.again`, in passes of an `HFNetwork`. Raises ValueError for a model whose layers are not found.
    """
    if on and not layers_of(model):
        raise ValueError(f"gradient_checkpointing=true: {type(model).__name__} has no list of layers: leave it out")
    if not compiled:
        setattr(model, _AGAIN, on)
        return
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # until 5.23
    if on:
        getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def take_checkpointing_over(model: Any) -> None:
    """Have layers that transformers was told to compute again do so in the way of `fast.again`."""
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers_of(model)):
        checkpoint_layers(model, on=False, compiled=True)
        checkpoint_layers(model)


def runs_again(model: Any) -> bool:
    """Whether a pass that begins now runs the layers of the model again in the backward pass: it learns, and is to."""
    return torch.is_grad_enabled() and bool(vars(model).get(_AGAIN))
