"""Distances between distributions against a slow, obvious reference in float64, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask.core.distances import draft_distance

DISTANCES = ("kl", "tv", "kl+tv", "lk")


def reference(p_logits: Tensor, q_logits: Tensor, distance: str, top_k: int | None) -> tuple[list[float], Tensor]:
    """Values and gradient, row by row, each bucket's probability a plain sum over its tokens, autograd in float64."""
    q_logits = q_logits.double().requires_grad_(True)
    values = []
    for p_row, q_row in zip(p_logits.double(), q_logits, strict=True):
        p, q = p_row.softmax(-1), q_row.softmax(-1)
        likeliest = int(p.argmax())
        order = p.argsort(descending=True, stable=True)
        own, rest = (order, order[:0]) if top_k is None else (order[:top_k], order[top_k:])
        p_parts, q_parts = ([x[i] for i in own] + ([x[rest].sum()] if len(rest) else []) for x in (p, q))
        tv = sum(0.5 * (a - b).abs() for a, b in zip(p_parts, q_parts, strict=True))
        kl = sum(a * (a / b).log() for a, b in zip(p_parts, q_parts, strict=True) if a > 0)
        lam = math.exp(-0.5 * (1 - float(torch.as_tensor(tv).detach())))
        values.append({"kl": kl, "tv": tv, "kl+tv": 0.01 * kl + tv,
                       "lk": lam * kl + (1 - lam) * tv - q[likeliest].log()}[distance])  # fmt: skip
    (gradient,) = torch.autograd.grad(torch.stack(values).sum(), q_logits)
    return torch.stack(values).tolist(), gradient


def distributions(case: str, n: int = 3, vocabulary: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(case))
    p, q = torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64)
    if case == "flat":  # the rest is likelier than any token
        p[:, 7] += 2
        q[:, 9] += 1
    if case == "sure":  # the rest has a mass of some 1e-7
        p[:, 7] += 20
        q[:, 7] += 19
    p[:, 5] = q[:, 5] = -math.inf  # the mask token
    return p, q


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["wide", "flat", "sure"])
@pytest.mark.parametrize("top_k", [1, 4, 299, None])
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance_is_its_definition(distance: str, top_k: int | None, case: str, dtype: torch.dtype) -> None:
    p, q = (logits.to(dtype) for logits in distributions(case))
    q.requires_grad_(True)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    got = draft_distance(p, q, torch.zeros(3, dtype=torch.long), distance, top_k)
    (gradient,) = torch.autograd.grad((weight * got).sum(), q)
    values, expected = reference(p, q.detach(), distance, top_k)
    expected = weight.double()[:, None] * expected
    assert gradient[:, 5].abs().max() == 0
    exact = dtype == torch.float64
    # Whole distributions in float32 are as exact as float32 softmaxes; with a bucket, relative to what little differs.
    scale = 1.0 if top_k is None else float(expected.abs().max())
    atol = 1e-10 * scale + 1e-14 if exact else 1e-5 * scale  # 1e-14: the reference's own rounding
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=atol)
    # "tv" of float32 rounds at 1.
    torch.testing.assert_close(got.double(), torch.tensor(values, dtype=torch.float64), rtol=1e-5,
                               atol=1e-12 if exact else 1e-6)  # fmt: skip


def test_the_likeliest_token_of_lk_is_a_token_where_the_rest_is_likelier() -> None:
    """A token of 5% among 100k: its gradient is that of -log q(token), not that of the rest."""
    logits = torch.zeros(1, 100_000)
    logits[:, 0] = math.log(0.05 / 0.95 * 99_999)
    q = logits.clone().requires_grad_(True)
    draft_distance(logits, q, torch.zeros(1, dtype=torch.long), "lk", 64).sum().backward()
    assert float(q.grad[0, 0]) == pytest.approx(0.05 - 1, abs=1e-4)


class Largest(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that are made."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, given = func(*args, **(kwargs or {})), {x.untyped_storage().data_ptr() for x in tree_leaves(args)
                                                     if isinstance(x, Tensor)}  # fmt: skip
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() >= self.size and x.untyped_storage().data_ptr() not in given:
                self.count += 1
        return out


@pytest.mark.parametrize("top_k", [None, 64])
@pytest.mark.parametrize("distance", DISTANCES)
def test_nothing_of_the_logits_size_is_made_but_their_gradient(distance: str, top_k: int | None) -> None:
    p, q = torch.randn(2, 40, 2**16)
    for learning in (False, True):
        q.requires_grad_(learning)
        with Largest(p.numel() // 2) as made:
            got = draft_distance(p, q, torch.zeros(40, dtype=torch.long), distance, top_k)
            if learning:
                got.backward(torch.ones(40))
        assert made.count == int(learning)
