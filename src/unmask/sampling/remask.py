"""True remasking: generated tokens may be taken back (ReMDM 2503.00307), for whole-canvas sampling.

The reverse process keeps its marginals (all variants but "confidence"), so a masked diffusion model needs no training
for it. It helps when there are at least as many steps as tokens; with fewer it costs quality.

Notation: alpha is the share of clean tokens, 0 at the start and 1 at the end; a step goes from alpha_t to
alpha_s > alpha_t (or equal to it, while the loop variant holds still).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.limits import check_number
from unmask.plain_numbers import plain_fields

_HELD, _LOOP_BEGINS, _LOOP_ENDS = 0.9, 0.55, 0.05
"""Of the loop variant: the share of clean tokens that it holds, and the times (1 to 0) between which it does."""


@dataclass(frozen=True)
class Remask:
    """How likely a generated token is masked again in a step: sigma, at most min(1, (1 - alpha_s) / alpha_t).

    variant "cap": min(eta, that limit). "rescale": eta times the limit. "confidence": the limit, shared out over the
    generated tokens by softmax(-probability of the token when it was revealed); eta is not used. This masks `limit`
    tokens of a row again on average and reveals no faster, so that in between fewer tokens are clean than alpha says,
    and the last step fills them in. "loop": no remasking until 0.9 of the tokens are clean, then that share is held
    with sigma = min(eta, limit), then no remasking to the end.
    """

    variant: str = "cap"
    eta: float = 0.008

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.variant not in ("cap", "rescale", "confidence", "loop"):
            raise ValueError(f"variant {self.variant!r} is unknown: use cap, rescale, confidence or loop")
        check_number("eta", self.eta)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} must lie in [0, 1]")

    def alpha(self, progress: float) -> float:
        """Share of clean tokens once `progress` in [0, 1] of the steps is done; linear, but for the loop."""
        if self.variant != "loop":
            return progress
        begins, ends = 1 - _LOOP_BEGINS, 1 - _LOOP_ENDS
        if progress <= begins:
            return _HELD * progress / begins
        if progress < ends:
            return _HELD
        return _HELD + (1 - _HELD) * (progress - ends) / (1 - ends)

    def rates(self, progress: float, after: float, revealed: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        """(reveal, remask): the probability of each, (batch, length) float64, in the step `progress` -> `after`.

        reveal is that of a masked token, (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); remask that of a
        generated one, sigma. revealed: bool, generated tokens. confidence: what each had when revealed.
        """
        alpha_t, alpha_s = self.alpha(progress), self.alpha(after)
        limit = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        if self.variant == "confidence":
            share = (-confidence).masked_fill(~revealed, -math.inf).softmax(-1).nan_to_num(0.0)
            sigma, masked_sigma = share * limit, 0.0
        else:
            holding = self.variant != "loop" or alpha_s == alpha_t
            rate = limit * self.eta if self.variant == "rescale" else min(self.eta, limit)
            masked_sigma = rate if holding else 0.0
            sigma = torch.full_like(confidence, masked_sigma)
        reveal = (alpha_s - (1 - masked_sigma) * alpha_t) / (1 - alpha_t)
        return torch.full_like(confidence, reveal), sigma
