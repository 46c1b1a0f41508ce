"""Training objectives, as sums and counts.

Every loss comes back as (sum, count) so that a mean over micro-batches, accumulation steps and ranks is
one division of two totals, the same for every split. Knows a network only through `network` and `scoring`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from unmask.core.attention import Layout, Pattern
from unmask.core.corruption import Corruption, segments
from unmask.core.head_loss import RowLoss
from unmask.core.network import DiffusionConfig, GrowingCache, Network, run, run_sum
from unmask.core.scoring import ar_pass, distilled_pass, joint_pass, noisy_pass, score, score_ar, scoring_pass
from unmask.core.transfer import to_device


@dataclass(frozen=True)
class LossOutput:
    """sum: scalar, nats. count: scalar int64, the predicted tokens that the sum speaks for."""

    sum: Tensor
    count: Tensor


def predictable(layout: Layout, loss_mask: Tensor | None = None) -> Tensor:
    """Tokens that can be in a loss: neither padding nor the given first token of a document.

    loss_mask: bool like the layout, False on what is given besides (prompts); None gives nothing more.
    """
    tokens = layout.real & (layout.position > 0)
    return tokens if loss_mask is None else tokens & loss_mask


def _nll(target: Tensor) -> RowLoss:
    return lambda logits, part: cross_entropy(logits, to_device(target[part], logits.device), reduction="none")


def token_nll(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    pattern: Pattern | None = None,
) -> Tensor:
    """-log p(x0_i | xt) on the masked positions, (masked.sum(),) in row-major order."""
    masked = corruption.masked
    xt = corruption.apply(x0, config.mask_token_id)
    return _nll(x0[masked])(score(network, config, xt, x0, layout, masked, pattern), slice(None))


def diffusion_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    pattern: Pattern | None = None,
    loss_mask: Tensor | None = None,
) -> LossOutput:
    """sum_i w_i * -log p(x0_i | xt, clean context), over masked i (Efficient-DLM 2512.14067, eq. 1).

    The count is that of all predictable tokens, masked or not, so that sum / count is, in expectation, the
    NELBO in nats per predicted token when masks are uniform. `pattern`: an annealed mask, else the config's.
    """
    masked = corruption.masked
    passed = scoring_pass(config, corruption.apply(x0, config.mask_token_id), x0, layout, masked, pattern)
    total = run_sum(network, passed, _nll(x0[masked]), corruption.weight[masked])
    return LossOutput(total, predictable(layout, loss_mask).sum())


def ar_loss(network: Network, x0: Tensor, layout: Layout, loss_mask: Tensor | None = None) -> LossOutput:
    """Next-token cross-entropy over the predictable tokens, each document on its own."""
    wanted = predictable(layout, loss_mask)
    target = x0[wanted]
    total = run_sum(network, ar_pass(x0, layout, wanted), _nll(target), torch.ones_like(target, dtype=torch.float32))
    return LossOutput(total, wanted.sum())


def joint_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    alpha: float,
    loss_mask: Tensor | None = None,
    *,
    teacher: Network | None = None,
    distance: str = "ce",
    top_k: int | None = None,
) -> LossOutput:
    """L_AR + alpha * L_diffusion from one two-stream pass (Nemotron-Labs 2607.05722, section 2.1).

    Both terms are means over the predictable tokens (a mask's weights average 1 over them), so they share one
    count, and alpha weighs nats per token against nats per token whatever the noise level. Equals
    `ar_loss` + alpha * `diffusion_loss` of two passes.
    teacher: a frozen AR model; L_AR is then the clean rows' KL from its law, which pulls at nothing where the
    AR model is still what it was. distance: other than "ce", the noisy rows follow the AR law of their tokens,
    the teacher's or else the clean rows' own, instead of the text (OPDLM 2606.06712).
    """
    wanted, masked = predictable(layout, loss_mask), corruption.masked
    xt = corruption.apply(x0, config.mask_token_id)
    passed, count = joint_pass(config, xt, x0, layout, masked, wanted)
    if teacher is None and distance == "ce":
        weight = torch.ones(len(passed.rows), device=x0.device, dtype=torch.float64)
        weight[:count] = alpha * corruption.weight[masked].double()
        return LossOutput(run_sum(network, passed, _nll(torch.cat([x0[masked], x0[wanted]])), weight), wanted.sum())
    logits = run(network, passed)
    logits, ar_logits = logits[:count], logits[count:]
    law = ar_logits.detach()
    if teacher is None:
        ar = cross_entropy(ar_logits, to_device(x0[wanted], logits.device), reduction="sum")
    else:
        with torch.no_grad():
            law = score_ar(teacher, x0, layout, wanted)
        ar = draft_distance(law, ar_logits, x0[wanted], "kl", top_k).sum()
    drafted, weight = (to_device(x, logits.device) for x in (masked[wanted].nonzero()[:, 0], corruption.weight[masked]))
    values = draft_distance(law[drafted], logits, x0[masked], distance, top_k)
    return LossOutput(ar + alpha * (weight * values).sum(), wanted.sum())


def shared_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruptions: list[Corruption],
    alpha: float | None = None,
    loss_mask: Tensor | None = None,
) -> LossOutput:
    """The mean of `diffusion_loss` over masks, or of `joint_loss` with alpha, the clean stream computed once.

    The clean tokens fill a cache, graph included, and the noisy ones of each mask run on top of it: n masks
    cost 1 + n streams instead of 2n. Needs two streams and no shift, which reads clean rows for each mask.
    """
    if config.attention != "two_stream" or config.shift:
        raise ValueError(
            f"attention {config.attention!r} with shift={config.shift} has no clean stream to share between masks: "
            "use one mask at a time"
        )
    wanted = predictable(layout, loss_mask)
    past = GrowingCache(network.new_cache(), layout.subset(..., slice(0, 0)))
    if alpha is None:
        total = torch.zeros((), device=network.device)
        network(x0, layout, config.pattern, rows=torch.zeros(0, dtype=torch.long, device=x0.device), past=past)
    else:
        target = x0[wanted]
        ones = torch.ones_like(target, dtype=torch.float32)
        total = run_sum(network, ar_pass(x0, layout, wanted), _nll(target), ones, past)
    past.layout = layout
    share = (1.0 if alpha is None else alpha) / len(corruptions)
    for corruption in corruptions:
        masked = corruption.masked
        passed = noisy_pass(config, corruption.apply(x0, config.mask_token_id), layout, masked)
        total = total + share * run_sum(network, passed, _nll(x0[masked]), corruption.weight[masked], past)
        past.cache.crop(-x0.shape[1])
    return LossOutput(total, wanted.sum())


def distill_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    distance: str,
    loss_mask: Tensor | None = None,
    *,
    top_k: int | None = None,
) -> LossOutput:
    """sum_i w_i * distance(p_i, q_i): p_i the AR law of token i on the clean stream, q_i the draft's.

    With the shift, a block's first position is the AR row itself: it counts, with a distance of 0. The
    distance "reach" is `draft_failure` + 0.1 KL (ours), and it leaves a block's first position out as well:
    the anchor row of the draft forward stands for it.
    """
    wanted, reach = corruption.masked, distance == "reach"
    if config.shift or reach:
        wanted = wanted & (layout.position % (config.block_size or 1) > 0)
    xt = corruption.apply(x0, config.mask_token_id)
    target, weight = x0[wanted], corruption.weight[wanted]
    p, passed, past = distilled_pass(network, config, xt, x0, layout, wanted)
    if reach:
        q = run(network, passed, past)
        values = 0.1 * draft_distance(p, q, target, "kl", top_k)
        acceptance = 1 - draft_distance(p, q, target, "tv", top_k)
        place = to_device(wanted.flatten().nonzero()[:, 0], q.device)
        grid = q.new_ones(wanted.numel()).index_copy(0, place, acceptance).view(wanted.shape)
        values = values + draft_failure(grid, layout, config.block_size or 1).flatten()[place]
        total = (to_device(weight, q.device) * values).sum()
    else:

        def row_loss(logits: Tensor, part: slice) -> Tensor:
            return draft_distance(p[part], logits, target[part], distance, top_k)

        total = run_sum(network, passed, row_loss, weight, past)
    return LossOutput(total, predictable(layout, loss_mask).sum())


def draft_failure(acceptance: Tensor, layout: Layout, block_size: int) -> Tensor:
    """1 - prod_{i <= j} a_i over the block of each token j: the chance that its draft is not taken over.

    acceptance a (batch, length) in [0, 1]. Its sum over a block is the block's length less the expected number
    of accepted drafts, so its gradient weighs each place by how often a cycle gets there and what follows.
    """
    total = torch.nn.functional.pad(acceptance.clamp_min(1e-6).log().cumsum(-1), (1, 0))
    segment = segments(layout, block_size)
    column = torch.arange(segment.shape[-1], device=segment.device).expand_as(segment)
    start = torch.full_like(segment, segment.shape[-1]).scatter_reduce(-1, segment, column, "amin")
    first = to_device(start.gather(-1, segment), total.device)
    return 1 - (total[..., 1:] - total.gather(-1, first)).exp()


DISTANCES = ("ce", "kl", "tv", "kl+tv", "lk", "reach")


def draft_distance(
    p_logits: Tensor, q_logits: Tensor, target: Tensor, distance: str, top_k: int | None = None
) -> Tensor:
    """How far a draft law q is from its verifier's p, (n,) from logits (n, vocab); gradients reach q alone.

    "ce": -log q(target), the text's own token. "kl": KL(p || q). "tv": 1/2 sum |p - q| = 1 - the acceptance
    rate of rejection sampling. "kl+tv": 0.01 KL + TV (Uno 2609.04010). "lk": lam KL + (1 - lam) TV
    - log q(argmax p), lam = exp(-acceptance / 2) detached (Nemotron-Labs 2607.05722, section 2.7, over the
    whole vocabulary at temperature 1).
    top_k: compare the laws on p's k likeliest tokens and one bucket for the rest of both: a lower bound on KL
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
    """A distance (n,) of laws on p's k likeliest tokens and one bucket for the rest; k None: on every token.

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

    Also the law of the others among themselves, (n, vocab), 0 on `top` (and everywhere if the others have no mass).
    """
    others = logits.scatter(-1, top, -torch.inf)
    mass = others.logsumexp(-1, keepdim=True)
    parts = torch.cat([logits.gather(-1, top), mass], dim=-1).double()
    return parts.log_softmax(-1), others.sub_(mass.clamp_min(torch.finfo(mass.dtype).min)).exp_()
