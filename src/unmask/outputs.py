"""What `generate` and `infill` return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.sampling import SampledTokens


@dataclass(frozen=True, repr=False)
class SampleOutput:
    """What `generate` and `infill` return, one entry a row.

    sequences: (batch, length) int64, prompt included, padded on the right. texts: the new text, without end
    token and stop string. num_new_tokens: (batch,) up to and with the end token or the token that completed a
    stop string. num_forwards: (batch,) passes after the prefill that the row needed. num_prefill_forwards:
    (batch,). Speculative mode only: cycle_gains, (batch, n), cycles of the row that gained j tokens each; num_inputs,
    (batch,), tokens and masks that the forwards were made over, which is 1 a forward in AR decoding. With a constraint
    only: num_forced, (batch,) new tokens that needed no forward, since no other was allowed. Infilling only: fills, the
    text of each gap, of which `texts` is all; filled, the whole text with its gaps filled.
    """

    sequences: Tensor
    texts: list[str]
    num_new_tokens: Tensor
    num_forwards: Tensor
    num_prefill_forwards: Tensor
    cycle_gains: Tensor | None = None
    num_inputs: Tensor | None = None
    num_forced: Tensor | None = None
    fills: list[list[str]] | None = None
    filled: list[str] | None = None

    @property
    def tokens_per_cycle(self) -> Tensor | None:
        """(batch,) float: num_new_tokens per cycle of drafts and their verification; None outside speculative mode."""
        if self.cycle_gains is None:
            return None
        return self.num_new_tokens / self.cycle_gains.sum(-1).clamp_min(1)

    @property
    def tokens_per_forward(self) -> Tensor:
        """(batch,) float: num_new_tokens / num_forwards."""
        return self.num_new_tokens / self.num_forwards.clamp_min(1)

    def __repr__(self) -> str:
        rows = [
            f"{text!r} ({new} new tokens in {forwards} forwards)"
            for text, new, forwards in zip(
                self.texts, self.num_new_tokens.tolist(), self.num_forwards.tolist(), strict=True
            )
        ]
        return f"SampleOutput({', '.join(rows)})"


def sample_output(
    sequences: Sequence[Sequence[int]], sampled: SampledTokens, texts: list[str], pad: int, **infilled: Any
) -> SampleOutput:
    """Rows of tokens, filled up with `pad`, and what sampling counted; infilled: the fields of infilling."""
    width = max(map(len, sequences))
    return SampleOutput(
        sequences=torch.tensor([[*row, *[pad] * (width - len(row))] for row in sequences]),
        texts=texts,
        num_new_tokens=torch.tensor([len(new) for new in sampled.new_tokens]),
        num_forwards=sampled.num_forwards,
        num_prefill_forwards=sampled.num_prefill_forwards,
        cycle_gains=sampled.cycle_gains,
        num_inputs=sampled.num_inputs,
        num_forced=sampled.num_forced,
        **infilled,
    )
