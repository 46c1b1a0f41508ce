"""Rows of tokens, as training steps and objectives see them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unmask.core.attention import Layout


@dataclass(frozen=True)
class Batch:
    """Packed rows: x0 (batch, length) int64, its layout, and which tokens are learnt, bool like x0 (None: all)."""

    x0: Tensor
    layout: Layout
    loss_mask: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.layout.real.sum())

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start .. stop - 1."""
        loss_mask = None if self.loss_mask is None else self.loss_mask[start:stop]
        return Batch(self.x0[start:stop], self.layout.subset(slice(start, stop)), loss_mask)
