"""Commit rules: which masked positions become final after a denoising forward.

A rule is called as `rule(candidates, at_least)` and returns commit (batch, block) bool, a subset of the
masked positions: the `count` best by the rule's own order, never fewer than `at_least` (batch,) if so many are masked.
`Ancestral` draws how many, and `ConfidenceAmongAll` counts how many stay. Of equals the lower position comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.limits import check_number, check_whole
from unmask.plain_numbers import plain_fields

_ROUNDING = 1e-9
"""Above the rounding error of N (1 - s / T), below its distance from the next whole number."""


@dataclass(frozen=True)
class Candidates:
    """What a denoising forward proposes for the masked positions of the active blocks.

    masked: (batch, block) bool. confidence: (batch, block) float64, the untruncated probability at
    temperature 1 of the proposed token, 0 where nothing is masked. logits: (masked.sum(), vocabulary).
    priority: (batch, block) float64 uniforms, fixed per (seed, row, position). progress: share of the step budget that
    is spent with this forward, in (0, 1], of all rows or (batch, 1) of each; None without a budget. ranked: (batch,
    block) bool, given to `ConfidenceAmongAll` alone: what was masked at first, whose confidence is then that of the
    tokens that this forward proposes, at the sampling temperature.
    """

    masked: Tensor
    confidence: Tensor
    logits: Tensor
    priority: Tensor
    progress: float | Tensor | None = None
    ranked: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats of each masked position's distribution, (batch, block) float64, 0 elsewhere."""
        log_p = self.logits.double().log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
        return torch.zeros_like(self.confidence).masked_scatter(self.masked, entropy)

    @property
    def margin(self) -> Tensor:
        """Probability of the likeliest token less that of the second, (batch, block) float64, 0 elsewhere."""
        best = self.logits.double().softmax(-1).topk(2, dim=-1).values
        return torch.zeros_like(self.confidence).masked_scatter(self.masked, best[:, 0] - best[:, 1])


def token_confidence(logits: Tensor, masked: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Untruncated probability at temperature 1 of each proposed token, scattered to masked's shape, float64.

    Of the likeliest token where `tokens` is None: exp(l_token - m) / sum_j exp(l_j - m), m the largest logit.
    The sum is float64 for logits of any dtype, so that probabilities close to 1 stay apart.
    """
    largest = logits.amax(-1, keepdim=True)
    total = (logits - largest).exp_().sum(-1, dtype=torch.float64)
    p = 1 / total
    if tokens is not None:
        p = p * (logits.gather(-1, tokens[:, None]) - largest)[:, 0].double().exp()
    return torch.zeros(masked.shape, dtype=torch.float64, device=masked.device).masked_scatter(masked, p)


Selector = Callable[[Candidates, Tensor], Tensor]
"""A commit rule: (candidates, at_least (batch,) int64) -> commit (batch, block) bool."""


def commit_best(score: Tensor, masked: Tensor, count: Tensor, at_least: Tensor) -> Tensor:
    """The max(count, at_least) masked positions of highest score in each row."""
    rank = _rank(score.masked_fill(~masked, -torch.inf))
    return masked & (rank < torch.maximum(count, at_least)[:, None])


def _rank(score: Tensor) -> Tensor:
    """Of each score in its row, how many come before it: higher ones, and equals at lower positions."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    return rank.scatter_(-1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order))


def _check_count(n: int) -> None:
    check_whole("n", n, why=": it is how many tokens a forward commits")


@dataclass(frozen=True)
class Confidence:
    """The n most confident positions per forward (low-confidence remasking of LLaDA, static SDAR)."""

    n: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_count(self.n)

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        count = torch.full_like(at_least, self.n)
        return commit_best(candidates.confidence, candidates.masked, count, at_least)


@dataclass(frozen=True)
class Threshold:
    """Every position of confidence strictly above a threshold, at least the best one (Fast-dLLM, SDAR).

    1 is one token per forward, 0 one forward per block.
    """

    confidence_threshold: float = 0.9

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("confidence_threshold", self.confidence_threshold)
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold {self.confidence_threshold} must lie in [0, 1]")

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        sure = candidates.masked & (candidates.confidence > self.confidence_threshold)
        count = sure.sum(-1).clamp_min(1)
        return commit_best(candidates.confidence, candidates.masked, count, at_least)


@dataclass(frozen=True)
class Factor:
    """The largest n with (n + 1)(1 - c_(n)) < factor, c_(n) the n-th confidence (Fast-dLLM 2505.22618)."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("factor", self.factor)
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor {self.factor} must be positive and finite")

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        ranked = candidates.confidence.masked_fill(~candidates.masked, 0.0).sort(-1, descending=True).values
        n = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
        count = ((n * ((n + 1) * (1 - ranked) < float(self.factor))).amax(-1)).clamp_min(1)
        return commit_best(candidates.confidence, candidates.masked, count, at_least)


@dataclass(frozen=True)
class EntropyBound:
    """By rising entropy, the largest k with sum_{i<=k} H_i - max_{i<=k} H_i <= bound (2505.24857).

    The left side bounds the error of drawing the k tokens independently. It is 0 for k = 1, so that the position of
    lowest entropy is always committed; the most confident one need not be, where another is sure of fewer tokens.
    """

    entropy_bound: float = 0.1

    def __post_init__(self) -> None:
        plain_fields(self)
        check_number("entropy_bound", self.entropy_bound)
        if not 0 <= self.entropy_bound < math.inf:
            raise ValueError(f"entropy_bound {self.entropy_bound} must be finite and not negative")

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        entropy = candidates.entropy
        ranked = entropy.masked_fill(~candidates.masked, torch.inf).sort(-1).values
        joint = ranked.cumsum(-1) - ranked  # sorted, so the last of the first k is their maximum
        count = (joint <= float(self.entropy_bound)).sum(-1).clamp_min(1)
        return commit_best(-entropy, candidates.masked, count, at_least)


@dataclass(frozen=True)
class Random:
    """n positions per forward in a uniformly random order that does not depend on the model."""

    n: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_count(self.n)

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        return commit_best(candidates.priority, candidates.masked, torch.full_like(at_least, self.n), at_least)


@dataclass(frozen=True)
class Entropy:
    """The n positions of lowest entropy per forward."""

    n: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_count(self.n)

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        return commit_best(-candidates.entropy, candidates.masked, torch.full_like(at_least, self.n), at_least)


@dataclass(frozen=True)
class Margin:
    """The n positions of largest margin between their two likeliest tokens (top-k margin, 2502.06768)."""

    n: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_count(self.n)

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        return commit_best(candidates.margin, candidates.masked, torch.full_like(at_least, self.n), at_least)


@dataclass(frozen=True)
class Ancestral:
    """The reverse process itself: each masked position is revealed with probability (t - s) / t, by chance alone.

    DiffuLLaMA 2410.17891, Algorithm 2. On a uniform grid of T steps that is 1/T, 1/(T-1), ..., 1, which makes
    a position's step uniform on 1..T: its priority says which. The number of commits is drawn, so this rule needs
    max_denoising_steps, ignores `at_least`, and may commit nothing.
    """

    def __call__(self, candidates: Candidates, _at_least: Tensor) -> Tensor:
        if candidates.progress is None:
            raise ValueError("Ancestral draws each position's step out of max_denoising_steps, which is None: set it")
        return candidates.masked & (candidates.priority < candidates.progress)


@dataclass(frozen=True)
class ConfidenceAmongAll:
    """All but the k least confident of a row's N open positions, committed ones included (DiffuLLaMA's code).

    k = floor(N (T - s) / T) after step s of T (2410.17891, `generate_samples` of its trainer). A committed token never
    changes, yet it keeps its place in the ranking, with the confidence of what this forward proposes for its position.
    Where that place is among the k, fewer than k stay masked: rows may be ahead of the pace of `Confidence`, and end
    early. Needs max_denoising_steps and a whole canvas; ignores `at_least`.
    """

    def __call__(self, candidates: Candidates, _at_least: Tensor) -> Tensor:
        ranked = candidates.ranked
        if ranked is None:
            raise ValueError("ConfidenceAmongAll ranks committed tokens too, which a whole canvas alone scores again: "
                             "use Confidence()")  # fmt: skip
        if candidates.progress is None:
            raise ValueError(
                "ConfidenceAmongAll shares its commits out over max_denoising_steps, which is None: set it"
            )
        number = ranked.sum(-1, keepdim=True)
        stay = (number.double() * (1 - candidates.progress) + _ROUNDING).floor()
        rank = _rank(candidates.confidence.masked_fill(~ranked, -torch.inf))
        return candidates.masked & (rank < number - stay)
