"""What a constraint allows: new text that obeys a grammar, in AR and speculative decoding.

A mask applies to AR logits before temperature, top-k and top-p, so the text is that of AR decoding under the
constraint, token for token. A token that is the only one allowed is forced: it is taken without a forward, and is read
by the row's next one. Drafts are drawn from what is allowed behind the drafts before them; only the AR rows decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.core.transfer import to_device


class ConstraintState(Protocol):
    """How far the new text of a row has come in its constraint."""

    @property
    def ended(self) -> bool:
        """Whether an end token was accepted."""

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the host: the tokens that may come next, at least one unless it has ended."""

    def accept(self, token: int) -> None:
        """Add an allowed token to the text."""

    def undo(self, count: int) -> None:
        """Take the last `count` tokens back."""


class Constraint(Protocol):
    """A rule for the new text of a row; it does not change, and any number of rows may have it."""

    def begin(self) -> ConstraintState:
        """The state of a row without new tokens."""


Constraints = Constraint | Sequence[Constraint | None]
"""Of every row of a batch, or one for each row, None for a row without."""


def constraint_of(constraints: Constraints | None, row: int) -> Constraint | None:
    """That of a row."""
    return constraints[row] if isinstance(constraints, Sequence) else constraints


def forced_token(state: ConstraintState) -> int | None:
    """The only token that may come next, None if there are several or the text has ended."""
    if state.ended:
        return None
    allowed = state.allowed()
    return int(allowed.long().argmax()) if int(allowed.sum()) == 1 else None


def restrict(logits: Tensor, allowed: Sequence[Tensor | None]) -> Tensor:
    """Logits (n, vocabulary) with -inf for what is not allowed; allowed: of each row (vocabulary,), None for all."""
    if all(mask is None for mask in allowed):
        return logits
    every = torch.ones(logits.shape[-1], dtype=torch.bool)
    keep = torch.stack([every if mask is None else pad(mask, (0, len(every) - len(mask))) for mask in allowed])
    return logits.masked_fill(~to_device(keep, logits.device), -torch.inf)


def check_unconstrained(constraint: object) -> None:
    """Raise ValueError for a constraint where tokens are committed in any order."""
    if constraint is not None:
        raise ValueError(
            f"constraint {constraint!r} is held where tokens come from left to right, and mode 'diffusion' commits "
            "them in any order: use mode 'ar', or 'speculative' for a checkpoint that has it"
        )
