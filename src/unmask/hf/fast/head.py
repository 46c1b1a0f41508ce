"""The head of a stock model on the rows that are read, or as the weighted sum of their losses.

Each is a hook for the time of one pass. Slow twin: the plain pass, with `FastPaths()`; compared in
tests/test_fast_paths.py (`test_loss_and_gradients_match_the_plain_pass`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from unmask.core.head_loss import RowLoss, weighted_sum


def is_linear(head: Any) -> bool:
    """Whether logits are a product with the head's matrix and no more; it may be sharded over ranks."""
    kind = type(head)
    plain = kind is torch.nn.Linear or kind.__bases__ == (FSDPModule, torch.nn.Linear)
    return plain and not hasattr(head, "_hf_hook")


def gather(model: Any, head: Any) -> None:
    """Let a sharded head have its matrix after a pass too, until the next one ends; all ranks do so together."""
    unit = head if isinstance(head, FSDPModule) else model  # older Accelerate has one unit for both
    if isinstance(unit, FSDPModule):
        unit.unshard()


@contextmanager
def head_rows(head: torch.nn.Module, rows: Tensor | slice | None, read: list[Tensor] | None = None) -> Iterator[None]:
    """Within the context `head` runs on `rows` only, flat indices into (batch * length); None for all.

    read: gets the input of all rows, (batch * length, hidden), for those that are read later.
    """
    if rows is None:
        yield
        return

    def pick(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0].flatten(0, 1)
        if read is not None:
            read.append(hidden)
        return (hidden[rows],)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_sum(
    head: Any, rows: Tensor | slice | None, row_loss: RowLoss, weight: Tensor, mask_token_id: int | None
) -> Iterator[None]:
    """Within the context the output of `head` is the weighted sum of its rows' losses instead of logits."""

    def forward(hidden: Tensor) -> Tensor:
        picked = hidden.flatten(0, 1) if rows is None else hidden.flatten(0, 1)[rows]
        return weighted_sum(picked, head, row_loss, weight, mask_token_id)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@contextmanager
def head_input(head: torch.nn.Module, read: list[Tensor], rows: Tensor | slice | None = None) -> Iterator[None]:
    """Within the context the input of `head` is appended to `read`, and `head` runs on one row only.

    rows: flat indices into (batch * length), of which alone the input is read; None for the input as it is.
    """

    def take(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        read.append(args[0] if rows is None else args[0].flatten(0, 1)[rows])
        return (args[0][:1, :1],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()
