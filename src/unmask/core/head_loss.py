"""A weighted sum of row losses straight from hidden rows: logits exist for some rows at a time, and once.

Gradients are taken where the logits are, in the forward pass, so that nothing of the size rows x vocabulary
waits for the backward pass. That is possible because the weights of a loss are known before it. Knows tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from unmask.core.transfer import to_device

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits (n, vocabulary) of some of the rows, which of them) -> their losses (n,)."""


@dataclass(frozen=True)
class GroupLoss:
    """A `RowLoss` that compares rows of a group, which it is always given together.

    group: (rows,) int64, on the host; neighbours of the same number are a group.
    """

    row_loss: RowLoss
    group: Tensor

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        return self.row_loss(logits, part)


_AT_ONCE, _AT_ONCE_CPU = 2**28, 2**21
"""Logits at a time: what a GPU needs to be busy, what a CPU's cache holds."""
_ROWS = 256
"""Rows at a time at least: each group adds to the whole gradient of the head."""


def whole_sum(logits: Tensor, row_loss: RowLoss, weight: Tensor) -> Tensor:
    """sum_i weight_i * row_loss(logits_i), a scalar, from logits that exist whole; weight (rows,)."""
    return (to_device(weight, logits.device) * row_loss(logits, slice(None))).sum()


def weighted_sum(
    hidden: Tensor,
    head: torch.nn.Linear,
    row_loss: RowLoss,
    weight: Tensor,
    mask_token_id: int | None,
) -> Tensor:
    """sum_i weight_i * row_loss(head(hidden_i)), a scalar; hidden (rows, width), weight (rows,) without gradient.

    Equal to the sum over whole logits, and so are its gradients, which reach `hidden` and the head alone: what
    `row_loss` closes over is constant. The mask token's logit is -inf. It can be differentiated once.
    """
    learning, weight = torch.is_grad_enabled(), to_device(weight, hidden.device)
    total: Tensor = _WeightedSum.apply(hidden, head.weight, head.bias, row_loss, weight, mask_token_id, learning)
    return total


def _parts(rows: int, size: int, row_loss: RowLoss) -> Iterator[slice]:
    """All rows in order, up to `size` at a time and whole groups: one that is larger comes alone."""
    ends: Sequence[int] = range(1, rows + 1)
    if isinstance(row_loss, GroupLoss) and rows:
        group = row_loss.group
        ends = [*((group[1:] != group[:-1]).nonzero()[:, 0] + 1).tolist(), rows]
    start = 0
    while start < rows:
        fitting, next_end = bisect_right(ends, start + size) - 1, bisect_right(ends, start)
        stop = ends[max(fitting, next_end)]
        yield slice(start, stop)
        start = stop


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        row_loss: RowLoss,
        weight: Tensor,
        mask_token_id: int | None,
        learning: bool,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        learning = learning and any(needed)
        grads = [torch.zeros_like(x) if learning and x is not None and need else None
                 for x, need in zip((hidden, matrix, bias), needed, strict=True)]  # fmt: skip
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        size = max(_ROWS, (_AT_ONCE_CPU if hidden.device.type == "cpu" else _AT_ONCE) // len(matrix))
        for part in _parts(len(hidden), size, row_loss):
            raw = linear(hidden[part], matrix, bias)  # under autocast in its precision, as the head itself
            logits = raw.detach().to(total.dtype)
            if mask_token_id is not None and mask_token_id < logits.shape[-1]:
                logits[:, mask_token_id] = -torch.inf
            with torch.set_grad_enabled(learning):
                loss = (weight[part] * row_loss(logits.requires_grad_(learning), part)).sum()
            total += loss.detach()
            if learning:
                (grad,) = torch.autograd.grad(loss, logits)
                _add(grads, grad.to(raw.dtype), hidden, matrix, part)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a head's gradient is large; saved tensors know if they are asked for twice.
        return *(None if g is None else g.mul_(grad) for g in ctx.saved_tensors), None, None, None, None


def _add(grads: list[Tensor | None], grad: Tensor, hidden: Tensor, matrix: Tensor, part: slice) -> None:
    """Add one group's share: grad (n, vocabulary) is the gradient of its logits."""
    grad_hidden, grad_matrix, grad_bias = grads
    if grad_hidden is not None:
        grad_hidden[part] = grad @ matrix.to(grad.dtype)
    if grad_matrix is not None:
        if grad.dtype == grad_matrix.dtype == hidden.dtype:
            grad_matrix.addmm_(grad.T, hidden[part])
        else:
            grad_matrix += grad.T @ hidden[part].to(grad.dtype)
    if grad_bias is not None:
        grad_bias += grad.sum(0)
