"""Layers that the backward pass runs again instead of keeping what happens inside them (activation checkpointing,
1604.06174).

transformers' own way takes the cache away from such layers, and runs them again when the hooks of the pass are gone. So
here a layer runs again within the contexts of its pass, on the cache as it was: passes that stand on cached tokens, and
adapters that act on some rows alone, work too. What a layer writes to the cache keeps its graph.

Slow twin (in memory): the pass that keeps everything; compared in tests/test_again.py
(`test_gradients_are_those_of_kept_layers`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint

from unmask.hf.layers import layers_of, runs_again

Contexts = Callable[[], AbstractContextManager[None]]
"""Makes a context of a pass, each time anew."""


@contextmanager
def layers_again(model: Any, cache: Any, *contexts: Contexts) -> Iterator[None]:
    """Within the context layers that are to run again keep nothing but their inputs for the backward pass.

    cache: what the layers of the pass write to, a `DynamicCache`, None for none. contexts: those of the pass, which
    are entered anew whenever a layer runs again.
    """
    layers = layers_of(model) if runs_again(model) else []
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer.forward, cache, contexts)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:  # of a hook
                layer.forward = forward


def _checkpointed(
    forward: Callable[..., Any], written: Any, contexts: Sequence[Contexts], /, *args: Any, **kwargs: Any
) -> Any:
    before, ran = _state_of(written), False

    def run(*args: Any) -> Any:
        nonlocal ran
        if not ran:
            ran = True
            return forward(*args, **kwargs)
        now = _state_of(written)
        _put_back(written, before)
        with ExitStack() as stack:
            stack.callback(_put_back, written, now)
            for context in contexts:
                stack.enter_context(context())
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)  # there is no dropout


def _state_of(cache: Any) -> list[tuple[Any, dict[str, Any]]]:
    """What each layer of a cache holds; writing to it makes new tensors."""
    return [] if cache is None else [(layer, dict(vars(layer))) for layer in cache.layers]


def _put_back(cache: Any, state: list[tuple[Any, dict[str, Any]]]) -> None:
    if cache is None:
        return
    cache.layers[:] = [layer for layer, _ in state]
    for layer, held in state:
        vars(layer).clear()
        vars(layer).update(held)
