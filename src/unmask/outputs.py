"""What `generate` and `infill` return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
