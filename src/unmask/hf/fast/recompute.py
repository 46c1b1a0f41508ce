"""Results that the backward pass computes again instead of keeping them.

A product and an activation keep their operands for their own gradients, and the operation that reads the result keeps
the result as well: a gated MLP keeps four tensors of its width where two suffice, a norm three where one does. Within
`recomputing` such a result is dropped, and computed again from the operands when the gradient of its reader is taken:
the same operation on the same numbers, so the same bits. Knows the graph of torch and no model.

Slow twin (in memory): the pass without `recomputing`; compared in tests/test_recompute.py
(`test_gradients_are_those_of_kept_results`).
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
"""The result of each cheap operation from the operands that its node keeps, by the node's name in the graph."""
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


@dataclass(frozen=True)
class _Kept:
    """A kept tensor and its version, so that a later change in place is noticed."""

    value: Tensor
    version: int


@dataclass(frozen=True)
class _Made:
    """A dropped result: the node that computes it again, and its shape, since a view of it may have been kept."""

    node: Any
    shape: torch.Size


def recomputing() -> AbstractContextManager[None]:
    """Within the context the graph keeps no result of a cheap operation whose operands it keeps."""
    return saved_tensors_hooks(_pack, _unpack)


def _pack(result: Tensor) -> _Kept | _Made:
    node: Any = result.grad_fn
    if node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    # A product keeps both operands only if both have gradients; a result that was changed in place is another tensor.
    if (
        node is not None
        and node.name() in _MADE
        and all(operand is not None for operand, _ in node.next_functions)
        and result.is_contiguous()
        and not result._version
    ):
        return _Made(node, result.shape)
    return _Kept(result.detach(), result._version)  # detached: a node that keeps its own result would hold itself


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
