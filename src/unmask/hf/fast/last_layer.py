"""A stock model's attention in tiles, and its last layer for the rows that are read.

Both are hooks for the time of one pass, which leave the model's code alone. Slow twin: the plain pass, with
`FastPaths()`; compared in tests/test_fast_paths.py (`test_loss_and_gradients_match_the_plain_pass`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

from unmask.hf.fast.chunked import chunked_attention, picked_attention

CHUNKED = "unmask_chunked"
"""Name of chunked attention among transformers' attention functions."""


def _chunked_forward(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Unread,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`chunked_attention` under the signature that transformers' models call."""
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported by chunked attention: set it to 0")
    if not isinstance(attention_mask, _Unread):
        return chunked_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    if attention_mask.keys is None:
        attention_mask.keys = key, value
        raise _KeysTaken
    out = picked_attention(query, *attention_mask.keys, attention_mask.allowed, attention_mask.rows, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CHUNKED, _chunked_forward)


# --- rows of the last layer


@dataclass
class _Unread:
    """In place of the last layer's mask while only `rows` are wanted, flat indices into (batch, queries).

    keys: the layer's keys and values, once its first call has computed them.
    """

    allowed: Tensor
    rows: Tensor
    keys: tuple[Tensor, Tensor] | None = None


class _KeysTaken(Exception):
    """The last layer has its keys and values: the rest of its first call is not needed."""


@contextmanager
def last_layer_rows(
    layer: torch.nn.Module, rows: Tensor, gate: Callable[[Tensor], AbstractContextManager[None]]
) -> Iterator[None]:
    """Within the context a model's last layer is computed for `rows` alone, flat indices into (batch * length).

    After the attention of the last layer no row reads another. So the layer is called twice: with all rows, up to its
    attention, which keeps the keys and values; and with the wanted rows, which attend to these. Row rows[i] becomes
    flat row i of the layer's output, (n, length, width) with the smallest n, as the model expects. gate: entered
    around the second call with `rows`.
    """
    plain: Any = layer.forward
    signature = inspect.signature(plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        hidden: Tensor = arguments["hidden_states"]
        unread = _Unread(arguments["attention_mask"], rows)
        with suppress(_KeysTaken):
            plain(**arguments | {"attention_mask": unread})
        if not len(rows):
            return hidden
        batch, length = hidden.shape[:2]
        picked = {name: _pick(value, rows, batch, length) for name, value in arguments.items()}
        with gate(rows):
            out = plain(**picked | {"attention_mask": unread})
        if isinstance(out, tuple):
            return (_packed(out[0], length), *out[1:])
        return _packed(out, length)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _pick(value: Any, rows: Tensor, batch: int, length: int) -> Any:
    """`rows` of an argument with one entry for each token; None for a cache, which has its keys already."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, tuple):
        return tuple(_pick(x, rows, batch, length) for x in value)
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == length and value.shape[0] in (1, batch):
        return value.expand(batch, *value.shape[1:]).flatten(0, 1).index_select(0, rows)[None]
    return value


def _packed(out: Tensor, length: int) -> Tensor:
    """(1, rows, width) as (n, length, width), padded with zeros."""
    return torch.nn.functional.pad(out[0], (0, 0, 0, -out.shape[1] % length)).unflatten(0, (-1, length))
