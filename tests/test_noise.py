"""Noise as a function of keys: the published generator, the same bits by both ways, and no two streams alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from unmask.core.attention import Layout
from unmask.core.noise import Key, _signed, _words, bernoulli, bits, gumbels, integer, philox, uniform, uniforms
from unmask.settings import Settings
from unmask.training.step import corruptions

KEYS: list[Key] = [("token", 0, 0, 0, 0), ("token", -5, 3, 7, 1), ("level", 2**70, 1, 2), ("a", 1), ("a", -1)]


def torch_bits(keys: list[Key], size: int, device: torch.device | None = None) -> torch.Tensor:
    """The same numbers by integer arithmetic of torch, as on a device that numpy does not reach."""
    words = torch.tensor([[_signed(word) for word in _words(key)] for key in keys])
    return philox(words if device is None else words.to(device), size)


@pytest.mark.parametrize(("counter", "key", "expected"), [
    # Random123's known answers for philox4x64-10.
    ((0,) * 4, (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    ((2**64 - 1,) * 4, (2**64 - 1,) * 2,
     (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
])  # fmt: skip
def test_numpys_generator_is_the_published_one(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    before = (sum(word << 64 * i for i, word in enumerate(counter)) - 1) % 2**256  # it counts up before it draws
    found = np.random.Philox(counter=before, key=key[0] | key[1] << 64).random_raw(4)
    assert tuple(int(word) for word in found) == expected


@pytest.mark.parametrize("size", [1, 4, 13, 1000])
def test_torch_and_numpy_draw_the_same_bits(size: int) -> None:
    assert torch.equal(torch_bits(KEYS, size), bits(KEYS, size))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_bits_and_nearly_the_same_floats() -> None:
    device = torch.device("cuda")
    assert torch.equal(bits(KEYS, 4099, device).cpu(), bits(KEYS, 4099))
    torch.testing.assert_close(gumbels(KEYS, 4099, device).cpu(), gumbels(KEYS, 4099), rtol=1e-15, atol=1e-15)


def test_uniforms_are_uniform_and_neighbours_are_independent() -> None:
    neighbours: list[Key] = [("mask", seed, step, row, 0) for seed in (0, 1) for step in (0, 1) for row in (0, 1)]
    drawn = uniforms(neighbours, 20_000)
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    for row in drawn:
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-4
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)
    assert stats.kstest(gumbels([("token", 0, 0, 0, 0)], 20_000)[0].numpy(), "gumbel_r").pvalue > 1e-4


def test_a_million_keys_share_no_stream() -> None:
    assert (
        len({_words(("token", seed, row, at, 0)) for seed in range(10) for row in range(100) for at in range(1000)})
        == 10**6
    )


def test_gumbel_noise_is_finite_at_both_ends() -> None:
    ends = torch.tensor([0, (1 << 52) - 1]).double().add(0.5).mul(2.0**-52)
    assert bool((-(-ends.log()).log()).isfinite().all())


def test_integers_and_coins_have_their_frequencies() -> None:
    counts = np.bincount([integer(5, ("n", i)) for i in range(5000)], minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-4
    for probability in (0.0, 0.1, 0.5, 1 - 2**-20):
        share = float(bernoulli(300, 301, probability=probability, key=("coin",)).double().mean())
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / 90_300) + 1e-5


def test_the_second_draw_of_a_seed_is_no_other_seeds_first() -> None:
    layout = Layout.of(torch.arange(32).expand(2, 32))
    options = {"block_size": 4, "batch_size": 2, "max_length": 32}
    first = corruptions(Settings("test", seed=1_000_003, **options), layout, 0, torch.arange(2))
    both = corruptions(Settings("test", seed=0, num_masks=2, **options), layout, 0, torch.arange(2))
    assert not torch.equal(both[1].masked, first[0].masked)
    assert not torch.equal(both[1].masked, both[0].masked)


def test_shapes_share_a_stream() -> None:
    assert torch.equal(uniform(3, 4, key=("x",)).flatten(), uniform(12, key=("x",)))
