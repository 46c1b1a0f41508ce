"""Distances between two next-token distributions, for drafters and teachers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from unmask.core.transfer import to_device

DISTANCES = ("ce", "kl", "tv", "kl+tv", "lk")
OF_BLOCKS = ("reach", "first-error")
"""Distances that weigh the tokens of a block together, see `objectives.distill_loss`."""


def draft_distance(
    p_logits: Tensor, q_logits: Tensor, target: Tensor, distance: str, top_k: int | None = None
) -> Tensor:
    """Distance of a draft distribution q from its verifier's p, (n,) from logits (n, vocab); gradients reach q alone.

    "ce": -log q(target), target the token of the text. "kl": KL(p || q). "tv": 1/2 sum |p - q| = 1 - the acceptance
    rate of rejection sampling. "kl+tv": 0.01 KL + TV (Uno 2609.04010). "lk": lam KL + (1 - lam) TV - log q(argmax p),
    lam = exp(-acceptance / 2) detached (Nemotron-Labs 2607.05722, section 2.7, over the whole vocabulary at
    temperature 1). Those of `OF_BLOCKS` are no distances of single tokens.
    top_k: compare the distributions on p's k likeliest tokens and one bucket for all others: a lower bound on KL and
    TV, 0 if q = p, and the distance itself if k is the size of the vocabulary.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r} is unknown: use one of {', '.join(DISTANCES)}")
    if distance == "ce":
        return cross_entropy(q_logits, to_device(target, q_logits.device), reduction="none")
    distances: Tensor = _Distance.apply(q_logits, p_logits.detach(), distance, top_k)
    return distances


_AT_ONCE, _AT_ONCE_CPU = 2**26, 2**18
"""Logits at a time: enough to keep a GPU busy, and small against all logits; as many as fit a CPU's cache."""


class _Distance(torch.autograd.Function):
    """A distance other than "ce", (n,) from logits (n, vocab); the gradient of q's logits is computed with the value.

    Runs over some rows at a time, so that no tensor of the logits' size is made except that gradient.
    """

    @staticmethod
    def forward(ctx: Any, q_logits: Tensor, p_logits: Tensor, distance: str, top_k: int | None) -> Tensor:
        vocabulary = q_logits.shape[-1]
        k = None if top_k is None or top_k >= vocabulary else top_k
        gradient = torch.empty_like(q_logits) if ctx.needs_input_grad[0] else None
        total = q_logits.new_empty(len(q_logits))
        rows = max(1, (_AT_ONCE_CPU if q_logits.device.type == "cpu" else _AT_ONCE) // vocabulary)
        for start in range(0, len(q_logits), rows):
            part = slice(start, start + rows)
            out = None if gradient is None else gradient[part]
            if distance == "tv" and k is None:
                total[part] = _excess(q_logits[part], p_logits[part], out)
            else:
                total[part] = _by_buckets(q_logits[part], p_logits[part], distance, k, out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place, since it is large; autograd raises an error if saved tensors are read a second time.
        return gradient.mul_(grad[:, None]), None, None, None


def _excess(q_logits: Tensor, p_logits: Tensor, gradient: Tensor | None) -> Tensor:
    """TV as sum relu(q - p), (n,), since q exceeds p by as much as p exceeds q elsewhere.

    gradient: (n, vocab), filled with q * (a - sum(q a)), a = [q > p].
    """
    q, excess = q_logits.softmax(-1), p_logits.softmax(-1)
    total = torch.sub(q, excess, out=excess).relu_().sum(-1)
    if gradient is not None:
        qa = excess.sign_().mul_(q)
        torch.addcmul(qa, q, qa.sum(-1, keepdim=True), value=-1, out=gradient)
    return total


def _by_buckets(q_logits: Tensor, p_logits: Tensor, distance: str, k: int | None, gradient: Tensor | None) -> Tensor:
    """A distance (n,) on buckets: p's k likeliest tokens and all others together; k None: every token is a bucket.

    gradient: (n, vocab), filled. With a_s = df / dlog q_s of a bucket s, the gradient of a token i in s is
    q(i | s) * (a_s - q_s * sum(a)). Buckets are compared in float64: if the others have little mass, q - p of the
    likeliest token is as small, below what float32 resolves.
    """
    top = rest = None
    if k is None:
        log_p, log_q, best = p_logits.log_softmax(-1), q_logits.log_softmax(-1), p_logits.argmax(-1, keepdim=True)
    else:
        top = p_logits.topk(k).indices
        best = torch.zeros_like(top[:, :1])  # never the bucket of the others, which is no token
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
    kl_weight, tv_weight = shares[distance]
    total: Tensor = tv if distance == "tv" else kl_weight * kl + tv_weight * tv  # KL may be infinite
    if distance == "lk":
        total = total - log_q.gather(-1, best)[:, 0]
    if gradient is None:
        return total
    if distance == "lk":
        kl_weight, tv_weight = lam[:, None], 1 - lam[:, None]
    a = (0.5 * tv_weight) * q * (q - p).sign() - kl_weight * p
    if distance == "lk":
        a = a.scatter_add(-1, best, -torch.ones_like(a[:, :1]))
    a = a - q * a.sum(-1, keepdim=True)
    if top is None or rest is None:
        gradient.copy_(a)
    else:
        a = a.to(gradient.dtype)
        torch.mul(rest, a[:, -1:], out=gradient).scatter_(-1, top, a[:, :-1])
    return total


def _with_rest(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens `top` (n, k) and, last, of all others together, (n, k + 1) float64.

    Also the distribution of a token given that it is one of the others, (n, vocab), 0 on `top`, and all 0 if the others
    have no mass.
    """
    others = logits.scatter(-1, top, -torch.inf)
    mass = others.logsumexp(-1, keepdim=True)
    parts = torch.cat([logits.gather(-1, top), mass], dim=-1).double()
    return parts.log_softmax(-1), others.sub_(mass.clamp_min(torch.finfo(mass.dtype).min)).exp_()
