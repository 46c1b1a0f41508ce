"""What a sampler returns, and where a row ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Stop = Callable[[int, list[int]], int | None]
"""(row, its new tokens so far, from the first) -> how many of them to keep if the row ends there, else None."""

Callback = Callable[[int, list[int], list[int]], None]
"""(row, absolute positions, tokens) at each commit."""


@dataclass(frozen=True)
class SampledTokens:
    """New tokens per row, up to and with the one that ended it, and the forwards each row needed alone.

    num_forwards counts every pass after the prefill: denoising, and cache writes that no denoising pass
    carried along. num_prefill_forwards is 0 or 1. cycle_gains: speculation only, (rows, longest + 1), how
    many cycles of the row gained j tokens: its new tokens are sum_j j * cycle_gains[:, j].
    """

    new_tokens: list[list[int]]
    num_forwards: Tensor
    num_prefill_forwards: Tensor
    cycle_gains: Tensor | None = None


def first_end(tokens: Sequence[int], end_token_ids: Sequence[int]) -> int | None:
    """Length up to and with the first end token, or None."""
    return next((i + 1 for i, token in enumerate(tokens) if token in end_token_ids), None)
