"""What `generate` and `infill` return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.sampling import SampledTokens


@dataclass(frozen=True, repr=False)
class SampleOutput:
    """What `generate` returns, one entry a row.

    sequences: (batch, length) int64, prompt included, padded on the right. texts: the new text, without end
    token and stop string. num_new_tokens: (batch,) up to and with the end token or the token that completed a
    stop string. num_forwards: (batch,) passes after the prefill that the row needed. num_prefill_forwards:
    (batch,). Speculative mode only: cycle_gains, (batch, n), cycles of the row that gained j tokens each; num_inputs,
    (batch,), tokens and masks that the forwards were made over, which is 1 a forward in AR decoding.
    """

    sequences: Tensor
    texts: list[str]
    num_new_tokens: Tensor
    num_forwards: Tensor
    num_prefill_forwards: Tensor
    cycle_gains: Tensor | None = None
    num_inputs: Tensor | None = None

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
    prompts: Sequence[Tensor], sampled: SampledTokens, texts: list[str], pad: int, suffixes: Sequence[Tensor] | None
) -> SampleOutput:
    """Rows of prompt, new tokens and suffix, filled up with `pad`, and what sampling counted."""
    rows = [[*p.tolist(), *new] for p, new in zip(prompts, sampled.new_tokens, strict=True)]
    if suffixes is not None:
        rows = [[*row, *suffix.tolist()] for row, suffix in zip(rows, suffixes, strict=True)]
    width = max(len(row) for row in rows)
    return SampleOutput(
        sequences=torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        texts=texts,
        num_new_tokens=torch.tensor([len(new) for new in sampled.new_tokens]),
        num_forwards=sampled.num_forwards,
        num_prefill_forwards=sampled.num_prefill_forwards,
        cycle_gains=sampled.cycle_gains,
        num_inputs=sampled.num_inputs,
    )
