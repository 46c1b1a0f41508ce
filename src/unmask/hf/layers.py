"""The layers of a stock model: found, compiled, and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The model's layers: the first list as long as its configuration says, none if there is no such list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def compile_layers(model: Any, *, on: bool = True) -> None:
    """Let each layer of the model run compiled, or no longer; what is compiled for one of them serves all."""
    for layer in layers_of(model):
        if on:
            layer.compile()
        else:
            layer._compiled_call_impl = None  # what a module has that was never compiled


@contextmanager
def plain_layers(model: Any) -> Iterator[None]:
    """Within the context layers that are compiled run as they are: a cache makes each of them another function."""
    layers = layers_of(model)
    if not layers or layers[-1]._compiled_call_impl is None:  # a look at each would cost a decoding pass some time
        yield
        return
    compiled = [layer._compiled_call_impl for layer in layers]
    compile_layers(model, on=False)
    try:
        yield
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call


def checkpoint_layers(model: Any, *, on: bool = True) -> None:
    """Let the layers of a model be computed again in the backward pass instead of keeping what they computed."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # from and before 5.24
    if on:
        getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
