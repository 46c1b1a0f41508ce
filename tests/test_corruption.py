"""Distributions of the noise: calculus, counting and enumeration."""

import math

import pytest
import torch
from scipy import stats

from unmask.core.attention import PADDING, Layout
from unmask.core.corruption import (
    Linear,
    mask_bernoulli,
    mask_complementary,
    mask_exact,
    noise_levels,
    position_noise,
    segments,
)


def one_block(rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment numbers and maskable flags of `rows` rows of one block."""
    return torch.zeros(rows, n, dtype=torch.long), torch.ones(rows, n, dtype=torch.bool)


def draws(rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    t = 1 - torch.rand(rows, n, generator=generator, dtype=torch.float64)
    return t, torch.rand(rows, n, generator=generator, dtype=torch.float64)


def test_weight_equals_autograd_of_alpha() -> None:
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    alpha = Linear().alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(Linear().weight(t), -slope / (1 - alpha))


def test_segments_restart_with_documents() -> None:
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]])
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, PADDING, PADDING]])
    layout = Layout.of(position, document)
    assert segments(layout, 2).tolist() == [[0, 0, 1, 1, 2, 3, 3, 4, 5, 5]]
    assert segments(layout, None).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]]


def test_exact_count_is_uniform_and_weighted_n_over_k() -> None:
    n, rows = 5, 20_000
    segment, maskable = one_block(rows, n)
    t, noise = draws(rows, n)
    drawn = mask_exact(t, noise, segment, maskable)
    k = drawn.masked.sum(-1)
    assert k.min() == 1
    assert stats.chisquare(torch.bincount(k)[1:].numpy()).pvalue > 1e-3
    torch.testing.assert_close(drawn.weight[drawn.masked], (n / k)[:, None].expand(-1, n)[drawn.masked])
    assert (drawn.weight[~drawn.masked] == 0).all()
    assert stats.chisquare(drawn.masked.sum(0).numpy()).pvalue > 1e-3  # uniform over positions


def test_exact_count_skips_what_is_not_maskable_and_counts_ragged_blocks() -> None:
    position = torch.arange(7)[None]
    segment = segments(Layout.of(position), 4)  # blocks of 4 and 3
    maskable = position > 0  # the first token is given
    ones = torch.ones(1, 7, dtype=torch.float64)
    drawn = mask_exact(ones, torch.rand(1, 7, dtype=torch.float64), segment, maskable)
    assert drawn.masked.tolist() == [[False] + [True] * 6]  # t = 1 masks all of them
    assert drawn.weight.tolist() == [[0] + [1] * 6]
    tiny = torch.full((1, 7), 1e-9, dtype=torch.float64)
    drawn = mask_exact(tiny, torch.rand(1, 7, dtype=torch.float64), segment, maskable)
    assert drawn.masked[0, :4].sum() == drawn.masked[0, 4:].sum() == 1  # at least one a block, by the distribution


def test_bernoulli_rate_lies_in_its_binomial_interval() -> None:
    rows, n = 2000, 16
    segment, maskable = one_block(rows, n)
    for level in (0.1, 0.5, 0.9):
        t = torch.full((rows, n), level, dtype=torch.float64)
        drawn = mask_bernoulli(t, draws(rows, n)[1], segment, maskable)
        test = stats.binomtest(int(drawn.masked.sum()), rows * n, level)
        assert test.pvalue > 1e-4
        torch.testing.assert_close(drawn.weight[drawn.masked], torch.full((), 1 / level).expand(drawn.masked.sum()))


def test_complementary_pairs_partition_and_have_the_law() -> None:
    n, rows = 4, 20_000
    segment, maskable = one_block(rows, n)
    t, noise = draws(rows, n)
    first, second = mask_complementary(t, noise, segment, maskable)
    assert (first.masked ^ second.masked).all()
    k = first.masked.sum(-1)
    assert stats.chisquare(torch.bincount(k, minlength=n + 1).numpy()).pvalue > 1e-3
    for drawn in (first, second):
        # With cross-entropy 1 everywhere a bound is n; both halves have it as their expectation.
        values = drawn.weight.sum(-1).double()
        assert abs(values.mean() - n) < 4 * values.std() / math.sqrt(rows)


def enumerate_marginals(t: float, n: int, half_life: float) -> list[float]:
    """Marginal masking probabilities of Gumbel-top-k = successive draws without replacement."""
    k = math.ceil(t * n)
    weights = [math.exp(math.log(2) / half_life * (1 - t) * (i + 1) / n) for i in range(n)]
    marginal = [0.0] * n

    def draw(chosen: tuple[int, ...], probability: float) -> None:
        if len(chosen) == k:
            for i in chosen:
                marginal[i] += probability
            return
        rest = sum(w for i, w in enumerate(weights) if i not in chosen)
        for i, w in enumerate(weights):
            if i not in chosen:
                draw((*chosen, i), probability * w / rest)

    draw((), 1.0)
    return marginal


@pytest.mark.parametrize("half_life", [0.1, 0.5])
def test_position_dependent_rates_equal_enumeration(half_life: float) -> None:
    n, rows, level = 4, 20_000, 0.4
    segment, maskable = one_block(rows, n)
    t = torch.full((rows, n), level, dtype=torch.float64)
    place = (torch.arange(n) + 1.0).expand(rows, n) / n
    drawn = mask_exact(t, draws(rows, n)[1], segment, maskable, place=place, half_life=half_life)
    expected = enumerate_marginals(level, n, half_life)
    assert expected == sorted(expected)
    for count, p in zip(drawn.masked.sum(0).tolist(), expected, strict=True):
        assert stats.binomtest(count, rows, p).pvalue > 1e-4


def test_half_life_towards_zero_masks_the_last_k() -> None:
    n, rows = 8, 100
    segment, maskable = one_block(rows, n)
    t, noise = draws(rows, n)
    t = t.clamp_max(0.9)  # at t = 1 there is no bias, and nothing to choose either
    place = (torch.arange(n) + 1.0).expand(rows, n) / n
    drawn = mask_exact(t, noise, segment, maskable, place=place, half_life=1e-6)
    k = drawn.masked.sum(-1, keepdim=True)
    assert torch.equal(drawn.masked, torch.arange(n) >= n - k)


def test_noise_never_depends_on_the_split_of_the_batch() -> None:
    whole = noise_levels(7, 3, torch.arange(8), 8, 16), position_noise(7, 3, torch.arange(8), 16)
    for rows in (torch.arange(3), torch.tensor([5]), torch.arange(4, 8)):
        assert torch.equal(noise_levels(7, 3, rows, 8, 16), whole[0][rows])
        assert torch.equal(position_noise(7, 3, rows, 16), whole[1][rows])
    assert not torch.equal(noise_levels(7, 4, torch.arange(8), 8, 16), whole[0])
    assert not torch.equal(noise_levels(8, 3, torch.arange(8), 8, 16), whole[0])


def test_levels_are_stratified_over_the_global_batch_and_uniform() -> None:
    rows = 16
    t = torch.stack([noise_levels(0, step, torch.arange(rows), rows, 32) for step in range(100)])
    assert t.min() > 0
    assert t.max() <= 1
    strata = ((t * rows).ceil() - 1).long()
    assert torch.equal(strata.sort(dim=1).values, torch.arange(rows)[None, :, None].expand_as(strata))
    assert stats.kstest(t[:, 3].flatten().numpy(), "uniform").pvalue > 1e-3


def test_a_half_life_that_is_not_positive_is_refused() -> None:
    segment, maskable = one_block(1, 4)
    t, noise = draws(1, 4)
    with pytest.raises(ValueError, match=r"half_life -1 .*positive"):
        mask_exact(t, noise, segment, maskable, half_life=-1)
