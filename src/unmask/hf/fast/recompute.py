"""Results that the backward pass makes again instead of keeping them.

A product and an activation keep their operands for their own gradients, and whoever reads the result keeps that
as well: a gated MLP holds four tensors of its width where two suffice, a norm three where one does. Within
`rebuilding` such a result is dropped and made again from the operands when its reader's gradient is taken: the
same operation on the same numbers, so the same bits. Knows the graph of torch and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import gelu, silu

_MADE: dict[str, Callable[[Any], Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: silu(node._saved_self),
    "GeluBackward0": lambda node: gelu(node._saved_self, approximate=node._saved_approximate),
}
"""By the node that a cheap operation leaves in the graph: its result, from what the node keeps anyway."""
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


@dataclass(frozen=True)
class _Kept:
    """A tensor as it was at some version of it: whoever changes it in place afterwards is told."""

    value: Tensor
    version: int


@dataclass(frozen=True)
class _Made:
    """What stands for a result: how to make it, and its shape, where a view of it was to be kept."""

    node: Any
    shape: torch.Size


def rebuilding() -> AbstractContextManager[None]:
    """Within the context the graph keeps no result of a cheap operation whose operands it keeps."""
    return saved_tensors_hooks(_pack, _unpack)


def _pack(result: Tensor) -> _Kept | _Made:
    node: Any = result.grad_fn
    if node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    # A product keeps both operands only where both have gradients. What was changed in place is no such result.
    if (
        node is not None
        and node.name() in _MADE
        and all(operand is not None for operand, _ in node.next_functions)
        and result.is_contiguous()
        and not result._version
    ):
        return _Made(node, result.shape)
    return _Kept(result.detach(), result._version)  # with its graph, a node that keeps its own result would hold itself


def _unpack(packed: _Kept | _Made) -> Tensor:
    if isinstance(packed, _Made):
        with torch.no_grad():
            return _MADE[packed.node.name()](packed.node).view(packed.shape)
    if packed.value._version != packed.version:
        raise RuntimeError(
            f"a tensor of shape {tuple(packed.value.shape)} that the backward pass needs was modified by an inplace "
            f"operation: it is at version {packed.value._version}, not {packed.version}"
        )
    return packed.value
