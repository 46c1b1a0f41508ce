"""Patterns as the attention masks that transformers' models take."""

from __future__ import annotations

from typing import Any

import torch

from unmask.core.attention import Layout, Pattern, block_mask, chunk, dense, window
from unmask.hf.fast.kv_cache import SLOTS
from unmask.hf.fast.last_layer import CHUNKED


class UnsupportedModelError(ValueError):
    """The model's attention cannot be controlled from outside; the message says which part and why."""


def make_mask(implementation: str, dtype: torch.dtype, pattern: Pattern, q: Layout, kv: Layout) -> Any:
    """The mask of a pattern in the form that transformers' attention `implementation` takes; dtype: the model's."""
    if implementation == "flex_attention":
        return block_mask(pattern, q, kv)
    allowed = dense(pattern, q, kv)[:, None]
    readable = allowed.device.type == "cpu" and not torch.compiler.is_compiling()
    if implementation == SLOTS and readable and bool(allowed.all()):
        return allowed.new_ones(1, 1, 1, 1)
    if implementation in ("sdpa", CHUNKED, SLOTS):
        return allowed
    if implementation == "eager":  # eager attention adds its mask: a bool one would be added as 0 and 1
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )
    raise UnsupportedModelError(
        f"attention implementation {implementation!r} takes no 4-D mask: "
        "load the model with attn_implementation='sdpa', 'eager' or 'flex_attention'"
    )


def local_attention(config: Any) -> dict[str, Pattern]:
    """What layers of each local type see at most, by the settings of a text model."""
    limits = {"sliding_attention": (window, "sliding_window"), "chunked_attention": (chunk, "attention_chunk_size")}
    return {kind: limit(getattr(config, name)) for kind, (limit, name) in limits.items() if getattr(config, name, None)}
