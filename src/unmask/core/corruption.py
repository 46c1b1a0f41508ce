"""Forward process of masked diffusion: noise levels, corrupted tokens, and their loss weights.

Knows layouts and noise. Knows no model and no vocabulary.

Notation: t in (0, 1] is the noise level (0 = clean), alpha(t) the probability that a token is still clean,
`masked` is True on corrupted tokens. A *segment* is a set of tokens that share one t: a block, a document
or a row; n is its number of maskable tokens, k the number masked.

Distributions (both make the expected weighted loss the NELBO, in nats, of the segment):
  exact count   k = ceil(t n) positions, weight n / k;  t uniform makes k uniform on 1..n
  Bernoulli     each position with probability 1 - alpha(t), weight -alpha'(t) / (1 - alpha(t))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from unmask.core.attention import Layout
from unmask.core.noise import integers, uniform, uniforms


class Schedule(Protocol):
    """alpha(t), and the weight -alpha'(t) / (1 - alpha(t)) of a masked token's cross-entropy."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def weight(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t, weight 1 / t (DiffuLLaMA 2410.17891, eq. 6; Efficient-DLM 2512.14067, eq. 1)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


@dataclass(frozen=True)
class Corruption:
    """masked (batch, length) bool and weight (batch, length) float32, 0 where nothing is masked.

    noise: (batch, length) int64, random tokens that stand where masks would; None where there are masks.
    """

    masked: Tensor
    weight: Tensor
    noise: Tensor | None = None

    def apply(self, x0: Tensor, mask_token_id: int) -> Tensor:
        """xt: x0 with the mask token, or random tokens, at the corrupted positions."""
        if self.noise is not None:
            return torch.where(self.masked, self.noise, x0)
        return x0.masked_fill(self.masked, mask_token_id)

    def excluding(self, tokens: Tensor) -> Corruption:
        """The same without the positions where `tokens` (batch, length) is True, which leave the loss."""
        return replace(self, masked=self.masked & ~tokens, weight=self.weight * ~tokens)


def segments(layout: Layout, block_size: int | None) -> Tensor:
    """Number of the block (of the document, if `block_size` is None) inside its row, (batch, length) int64.

    Blocks lie on positions [k*B, (k+1)*B) of each document, so a document starts a new one.
    """
    block = layout.position // block_size if block_size else torch.zeros_like(layout.position)
    new = (layout.document[:, 1:] != layout.document[:, :-1]) | (block[:, 1:] != block[:, :-1])
    return torch.nn.functional.pad(new.long().cumsum(-1), (1, 0))


def noise_levels(seed: int, step: int, rows: Tensor, global_rows: int, length: int, draw: int = 0) -> Tensor:
    """t in (0, 1] for every (row, segment number), (len(rows), length) float64.

    Stratified over the global batch: for each segment number the `global_rows` rows fall into as many equal
    strata, one each, under a random rotation. `rows` are numbers in the global batch, so that the levels do
    not depend on how the batch is split. draw: number of the mask, where the same rows get several.
    """
    rotation = uniform(length, key=("rotation", seed, step, draw)) * global_rows
    within = uniforms([("level", seed, step, row, draw) for row in rows.tolist()], length)
    stratum = (rows[:, None] + rotation.long()) % global_rows
    return (stratum + 1 - within) / global_rows


def position_noise(seed: int, step: int, rows: Tensor, length: int, draw: int = 0) -> Tensor:
    """Uniforms (len(rows), length) float64 that decide which positions are masked."""
    return uniforms([("mask", seed, step, row, draw) for row in rows.tolist()], length)


def random_tokens(seed: int, step: int, rows: Tensor, length: int, vocabulary: int, draw: int = 0) -> Tensor:
    """Tokens (len(rows), length) int64 below `vocabulary`, which stand where masks would."""
    return integers([("noise token", seed, step, row, draw) for row in rows.tolist()], length, vocabulary)


def mask_bernoulli(
    t: Tensor, noise: Tensor, segment: Tensor, maskable: Tensor, schedule: Schedule | None = None
) -> Corruption:
    """Mask each maskable token independently with probability 1 - alpha(t) (DiffuLLaMA, section 3.1).

    t: (batch, segments). noise: (batch, length) uniforms. Returns weights of the schedule (linear: 1/t).
    """
    schedule = schedule or Linear()
    level = t.gather(-1, segment)
    masked = maskable & (noise < 1 - schedule.alpha(level))
    return Corruption(masked, (schedule.weight(level) * masked).float())


def mask_exact(
    t: Tensor,
    noise: Tensor,
    segment: Tensor,
    maskable: Tensor,
    *,
    place: Tensor | None = None,
    half_life: float = math.inf,
) -> Corruption:
    """Mask exactly k = ceil(t n) of a segment's n maskable tokens, weight n / k.

    Which ones: Gumbel-top-k with log-weight (1 - t) ln2 / half_life * place, where `place` (batch, length)
    is the position inside the block divided by the block size (Efficient-DLM 2512.14067, eq. 2:
    w_i(t) = exp(beta (1-t) i), half_life = ln2 / (beta L')). half_life=inf is uniform; towards 0 the last k.
    With a finite half_life the loss is no bound: `half_life` must stay infinite when scoring.
    """
    n = _count(maskable, segment)
    k = (t.gather(-1, segment) * n).ceil()
    masked = _top(k, _scores(t, noise, segment, place, half_life), segment, maskable)
    return Corruption(masked, torch.where(masked, n / k, 0.0).float())


def mask_complementary(
    t: Tensor,
    noise: Tensor,
    segment: Tensor,
    maskable: Tensor,
    *,
    place: Tensor | None = None,
    half_life: float = math.inf,
) -> tuple[Corruption, Corruption]:
    """A mask and its complement: k uniform on 0..n, weights (n + 1) / k and (n + 1) / (n - k).

    Every maskable token is predicted in exactly one of the two; each alone has the NELBO as its expectation
    under uniform masks, an empty mask adding 0 (Fast-dLLM v2 2509.26328, with the weights made exact).
    """
    n = _count(maskable, segment)
    k = (t.gather(-1, segment) * (n + 1)).ceil() - 1
    masked = _top(k, _scores(t, noise, segment, place, half_life), segment, maskable)
    rest = maskable & ~masked
    return (
        Corruption(masked, torch.where(masked, (n + 1) / k, 0.0).float()),
        Corruption(rest, torch.where(rest, (n + 1) / (n - k), 0.0).float()),
    )


def _scores(t: Tensor, noise: Tensor, segment: Tensor, place: Tensor | None, half_life: float) -> Tensor:
    if math.isinf(half_life):
        return noise  # the order of uniforms is that of their Gumbel transforms
    if half_life <= 0 or place is None:
        raise ValueError(f"half_life {half_life} must be positive and needs the places of the tokens")
    bias = (1 - t.gather(-1, segment)) * (math.log(2) / half_life) * place
    return bias - (-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()


def _count(maskable: Tensor, segment: Tensor) -> Tensor:
    """Maskable tokens of each token's segment, float64."""
    counts = torch.zeros(segment.shape, dtype=torch.float64, device=segment.device)
    return counts.scatter_add_(-1, segment, maskable.double()).gather(-1, segment)


def _top(k: Tensor, score: Tensor, segment: Tensor, maskable: Tensor) -> Tensor:
    """True on the k maskable tokens of highest score in each segment.

    Segments are contiguous and numbered in order, so sorting by score and then, stably, by segment leaves
    every segment in its own columns, and a token's rank is its column minus the segment's first.
    """
    score = score.masked_fill(~maskable, -math.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, segment.gather(-1, order).argsort(dim=-1, stable=True))
    column = torch.arange(segment.shape[-1], device=segment.device).expand_as(segment)
    first = torch.full_like(segment, segment.shape[-1]).scatter_reduce(-1, segment, column, "amin")
    rank = torch.empty_like(segment).scatter_(-1, order, column - first.gather(-1, segment))
    return maskable & (rank < k)
