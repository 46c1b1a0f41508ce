"""Distances between a draft distribution and its verifier's, for drafters and teachers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from unmask.core.transfer import to_device

DISTANCES = ("ce", "kl", "tv", "kl+tv", "lk", "reach")


def draft_distance(
    p_logits: Tensor, q_logits: Tensor, target: Tensor, distance: str, top_k: int | None = None
) -> Tensor:
    """How far a draft distribution q is from its verifier's p, (n,) from logits (n, vocab); gradients reach q alone.

    "ce": -log q(target), the text's own token. "kl": KL(p || q). "tv": 1/2 sum |p - q| = 1 - the acceptance
    rate of rejection sampling. "kl+tv": 0.01 KL + TV (Uno 2609.04010). "lk": lam KL + (1 - lam) TV
    - log q(argmax p), lam = exp(-acceptance / 2) detached (Nemotron-Labs 2607.05722, section 2.7, over the
    whole vocabulary at temperature 1).
    top_k: compare the distributions on p's k likeliest tokens and one bucket for the rest of both: a lower bound on KL
    and TV, 0 where q = p, and the distance itself where k is the vocabulary.
    """
    if distance not in DISTANCES[:-1]:
        raise ValueError(f"distance {distance!r} is unknown: use one of {', '.join(DISTANCES[:-1])}")
    if distance == "ce":
        return cross_entropy(q_logits, to_device(target, q_logits.device), reduction="none")
    distances: Tensor = _Distance.apply(q_logits, p_logits.detach(), distance, top_k)
    return distances


_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Logits at a time: what a CPU's cache holds, what keeps a GPU busy and is small beside the logits themselves."""


class _Distance(torch.autograd.Function):
    """A distance other than "ce", (n,) from logits (n, vocab), with the closed gradient of q's, taken with the value.

    Some rows at a time, so that nothing else of the logits' size is made, but for the gradient where it is wanted.
    """

    @staticmethod
    def forward(ctx: Any, q_logits: Tensor, p_logits: Tensor, distance: str, top_k: int | None) -> Tensor:
        vocabulary = q_logits.shape[-1]
        k = None if top_k is None or top_k >= vocabulary else top_k
        slope = torch.empty_like(q_logits) if ctx.needs_input_grad[0] else None
        total = q_logits.new_empty(len(q_logits))
        rows = max(1, _AT_ONCE.get(q_logits.device.type, 2**18) // vocabulary)
        for start in range(0, len(q_logits), rows):
            part = slice(start, start + rows)
            out = None if slope is None else slope[part]
            if distance == "tv" and k is None:
                total[part] = _excess(q_logits[part], p_logits[part], out)
            else:
                total[part] = _by_buckets(q_logits[part], p_logits[part], distance, k, out)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad[:, None]), None, None, None  # in place: saved tensors know if they are asked for twice


def _excess(q_logits: Tensor, p_logits: Tensor, slope: Tensor | None) -> Tensor:
    """sum relu(q - p), (n,): what q has above p is as much as it has below. Writes the gradient into `slope`.

    The gradient is q * (a - sum(q a)) with a = [q > p].
    """
    q, above = q_logits.softmax(-1), p_logits.softmax(-1)
    total = torch.sub(q, above, out=above).relu_().sum(-1)
    if slope is not None:
        own = above.sign_().mul_(q)
        torch.addcmul(own, q, own.sum(-1, keepdim=True), value=-1, out=slope)
    return total


def _by_buckets(q_logits: Tensor, p_logits: Tensor, distance: str, k: int | None, slope: Tensor | None) -> Tensor:
    """A distance (n,) of distributions on p's k likeliest tokens and one bucket for the rest; k None: on every token.

    Writes the gradient into `slope`. With a_s = df / dlog q_s of a bucket s, that of a token i in s is
    q(i | s) * (a_s - q_s * sum(a)). Buckets are compared in float64: where the rest is small, q - p of the
    likeliest token is as small, and float32 has no digits left for it.
    """
    top = rest = None
    if k is None:
        log_p, log_q, best = p_logits.log_softmax(-1), q_logits.log_softmax(-1), p_logits.argmax(-1, keepdim=True)
    else:
        top = p_logits.topk(k).indices
        best = torch.zeros_like(top[:, :1])  # among the tokens: the rest, however likely, is no token
        (log_p, _), (log_q, rest) = (_with_rest(logits, top) for logits in (p_logits, q_logits))
    p, q = log_p.exp(), log_q.exp()
    tv = 0.5 * (p - q).abs().sum(-1)
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    lam = (-0.5 * (1 - tv)).exp()
    shares: dict[str, tuple[Any, Any]] = {
        "kl": (1.0, 0.0),
        "tv": (0.0, 1.0),
        "kl+tv": (0.01, 1.0),
        "lk": (lam, 1 - lam),
    }
    of_kl, of_tv = shares[distance]
    total: Tensor = tv if distance == "tv" else of_kl * kl + of_tv * tv  # KL may be infinite
    if distance == "lk":
        total = total - log_q.gather(-1, best)[:, 0]
    if slope is None:
        return total
    if distance == "lk":
        of_kl, of_tv = lam[:, None], 1 - lam[:, None]
    a = (0.5 * of_tv) * q * (q - p).sign() - of_kl * p
    if distance == "lk":
        a = a.scatter_add(-1, best, -torch.ones_like(a[:, :1]))
    a = a - q * a.sum(-1, keepdim=True)
    if top is None or rest is None:
        slope.copy_(a)
    else:
        a = a.to(slope.dtype)
        torch.mul(rest, a[:, -1:], out=slope).scatter_(-1, top, a[:, :-1])
    return total


def _with_rest(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens `top` (n, k), and of all the others together: (n, k + 1) float64.

    Also the distribution of the others among themselves, (n, vocab), 0 on `top`, and everywhere if they have no mass.
    """
    others = logits.scatter(-1, top, -torch.inf)
    mass = others.logsumexp(-1, keepdim=True)
    parts = torch.cat([logits.gather(-1, top), mass], dim=-1).double()
    return parts.log_softmax(-1), others.sub_(mass.clamp_min(torch.finfo(mass.dtype).min)).exp_()
