"""From logits to tokens: temperature, top-p, and Gumbel noise fixed by (seed, row, position)."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.noise import gumbel


def token_noise(vocabulary: int, seed: int, rows: Tensor, positions: Tensor, purpose: str = "token") -> Tensor:
    """Gumbel noise (*positions.shape, vocabulary) float64 for `rows` (batch,) and `positions` (batch, n).

    Column j of row i is a function of (seed, rows[i], positions[i, j]) alone, so AR and diffusion sampling
    meet the same noise at the same place and batch-mates do not matter. Another purpose, other noise.
    """
    batch, n = positions.shape
    noise = torch.empty(batch, n, vocabulary, dtype=torch.float64)
    for i, row in enumerate(rows.tolist()):
        for j, position in enumerate(positions[i].tolist()):
            noise[i, j] = gumbel(vocabulary, seed, row, position, purpose)
    return noise


def choose_tokens(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, noise: Tensor | None = None) -> Tensor:
    """Tokens (n,) of logits (n, vocabulary): the most likely one, or argmax(log p + Gumbel) in float64.

    p = softmax(logits / temperature), cut to the smallest set of tokens that holds `top_p` of it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert noise is not None
    scores = truncate(logits, temperature, top_p)
    return (scores + noise.to(scores.device)).argmax(-1)


def truncate(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """float64 logits of the law that is sampled: divided by the temperature, -inf outside the top-p set."""
    scores = logits.double() / temperature
    if top_p < 1:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        scores = scores.masked_fill(torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p),
                                    -torch.inf)  # fmt: skip
    return scores


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError for a temperature or top_p out of range."""
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in (0, 1]")
