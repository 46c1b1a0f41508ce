"""From logits to tokens: temperature, top-p, top-k, and Gumbel noise fixed by (seed, row, position)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.core.noise import gumbels
from unmask.limits import check_number, check_whole

SMALLEST_TEMPERATURE = 1e-100
"""Logits divided by less may overflow float64."""

Seed = int | Sequence[int | tuple[int, int]]
"""Of a batch, or of each row of one: a row with a seed of its own draws what it would draw alone.

A pair (seed, number) draws what row `number` of a batch with this seed would.
"""


class Sampling(NamedTuple):
    """How the tokens of a row are drawn, see `truncate`; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None


def row_key(seed: Seed, row: int) -> tuple[int, int]:
    """(seed, row) as the keys of a row's random numbers have them."""
    if not isinstance(seed, Sequence):
        return seed, row
    of_row = seed[row]
    return of_row if isinstance(of_row, tuple) else (of_row, 0)


def token_noise(
    vocabulary: int,
    seed: Seed,
    rows: Tensor,
    positions: Tensor,
    purpose: str = "token",
    device: torch.device | None = None,
) -> Tensor:
    """Gumbel noise (*positions.shape, vocabulary) float64 for `rows` (batch,) and `positions` (batch, n), on `device`.

    That of a token is a function of (purpose, seed, row, position) alone: AR and diffusion sampling draw a token with
    the same noise, in any batch.
    """
    keys = [(purpose, *row_key(seed, row), p, 0) for row, of_row in zip(rows.tolist(), positions.tolist(), strict=True)
            for p in of_row]  # fmt: skip
    return gumbels(keys, vocabulary, device).view(*positions.shape, vocabulary)


def logit_index(masked: Tensor) -> Tensor:
    """Which row of the logits of the masked positions, in their order, each of them has; bool -> int64, on the host."""
    return masked.flatten().cumsum(0).view_as(masked) - 1


def choose_tokens(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    noise: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Tokens (n,) of logits (n, vocabulary): the most likely one, or argmax(log p + Gumbel) in float64.

    p = softmax(logits / temperature), cut to the `top_k` most likely tokens (ties with the k-th stay in) and,
    of those, to the smallest set that holds `top_p` of their mass.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert noise is not None
    scores = truncate(logits, temperature, top_p, top_k)
    return (scores + noise.to(scores.device)).argmax(-1)


def choose_by_row(logits: Tensor, how: Sequence[Sampling], noise: Tensor | None = None) -> Tensor:
    """`choose_tokens` where each row of logits has its own sampling; noise: None if all are greedy."""
    kinds = set(how)
    if len(kinds) == 1:
        (kind,) = kinds
        return choose_tokens(logits, kind.temperature, kind.top_p, noise, kind.top_k)
    tokens = logits.new_zeros(len(logits), dtype=torch.long)
    for kind in kinds:
        rows = _rows_of(kind, how, logits.device)
        drawn = None if noise is None or not kind.temperature else noise[rows.to(noise.device)]
        tokens[rows] = choose_tokens(logits[rows], kind.temperature, kind.top_p, drawn, kind.top_k)
    return tokens


def truncate_by_row(logits: Tensor, how: Sequence[Sampling]) -> Tensor:
    """`truncate` where each row of logits has its own sampling: that of a greedy one is its likeliest token alone."""
    kinds = set(how)
    if len(kinds) == 1 and next(iter(kinds)).temperature:
        (kind,) = kinds
        return truncate(logits, *kind)
    scores = torch.full(logits.shape, -torch.inf, dtype=torch.float64, device=logits.device)
    for kind in kinds:
        rows = _rows_of(kind, how, logits.device)
        if kind.temperature:
            scores[rows] = truncate(logits[rows], *kind)
        else:
            scores[rows, logits[rows].argmax(-1)] = 0.0
    return scores


def _rows_of(kind: Sampling, how: Sequence[Sampling], device: torch.device) -> Tensor:
    return torch.tensor([row for row, of_row in enumerate(how) if of_row == kind], device=device)


def truncate(logits: Tensor, temperature: float, top_p: float, top_k: int | None = None) -> Tensor:
    """float64 logits of the sampled distribution: divided by the temperature, -inf outside the top-k and top-p sets."""
    scores = logits.double() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        scores = scores.masked_fill(torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p),
                                    -torch.inf)  # fmt: skip
    return scores


def check_sampling(temperature: float, top_p: float, top_k: int | None = None) -> None:
    """Raise ValueError for a temperature, top_p or top_k out of range, TypeError for one that is no number."""
    check_number("temperature", temperature)
    if temperature != 0 and not SMALLEST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature {temperature} must be 0 (greedy) or positive and finite, from {SMALLEST_TEMPERATURE} on"
        )
    check_number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in (0, 1]")
    check_whole("top_k", top_k, why=": it is how many tokens are left to choose from")
