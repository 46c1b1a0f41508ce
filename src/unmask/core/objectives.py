"""Training objectives, as sums and counts.

Every loss is returned as (sum, count), so that the mean over micro-batches and ranks is one division of two totals, the
same for every split. Knows a network only through `network` and `scoring`.

Notation: x0 clean tokens and xt corrupted ones, (batch, length) int64; `masked` and weight w of a corruption,
(batch, length); `wanted` (batch, length) bool, the tokens that are predicted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unmask.core.attention import Layout, Pattern
from unmask.core.batch import Batch
from unmask.core.corruption import Corruption, segments
from unmask.core.distances import OF_BLOCKS, draft_distance
from unmask.core.head_loss import GroupLoss, RowLoss
from unmask.core.network import DiffusionConfig, GrowingCache, LogitsOf, Network, run_lazily, run_rows, run_sum
from unmask.core.scoring import ar_pass, distilled_pass, joint_pass, noisy_pass, scoring_pass
from unmask.core.transfer import to_device


@dataclass(frozen=True)
class LossOutput:
    """sum: scalar, nats. count: scalar int64, the tokens that the sum is divided by for a mean."""

    sum: Tensor
    count: Tensor


def predictable(layout: Layout, loss_mask: Tensor | None = None) -> Tensor:
    """Tokens that can be in a loss, bool like the layout: neither padding nor the first token of a document.

    loss_mask: bool like the layout, False on further tokens that are not learnt (prompts); None learns all.
    """
    tokens = layout.real & (layout.position > 0)
    return tokens if loss_mask is None else tokens & loss_mask


def row_nll(target: Tensor) -> RowLoss:
    """-log p(target) of each row; target (rows,)."""
    return lambda logits, part: cross_entropy(logits, to_device(target[part], logits.device), reduction="none")


def token_nll(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    pattern: Pattern | None = None,
) -> Tensor:
    """-log p(x0_i | xt) of the masked positions, nats, (masked.sum(),) in row-major order, without a graph."""
    masked = corruption.masked
    xt = corruption.apply(x0, config.mask_token_id)
    return run_rows(network, scoring_pass(config, xt, x0, layout, masked, pattern), row_nll(x0[masked]))


def diffusion_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    pattern: Pattern | None = None,
    loss_mask: Tensor | None = None,
) -> LossOutput:
    """sum_i w_i * -log p(x0_i | xt, clean context) over masked i (Efficient-DLM 2512.14067, eq. 1).

    The count is that of all predictable tokens, masked or not: with uniform masks the expectation of sum / count is
    the NELBO in nats per token. pattern: of an annealed mask; None is the config's.
    """
    masked = corruption.masked
    passed = scoring_pass(config, corruption.apply(x0, config.mask_token_id), x0, layout, masked, pattern)
    total = run_sum(network, passed, row_nll(x0[masked]), corruption.weight[masked])
    return LossOutput(total, predictable(layout, loss_mask).sum())


def ar_loss(network: Network, x0: Tensor, layout: Layout, loss_mask: Tensor | None = None) -> LossOutput:
    """sum_i -log p(x_i | x_<i) over the predictable tokens; documents of a row do not see each other."""
    wanted = predictable(layout, loss_mask)
    target = x0[wanted]
    total = run_sum(network, ar_pass(x0, layout, wanted), row_nll(target), torch.ones_like(target, dtype=torch.float32))
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

    Both terms are means over the predictable tokens (the weights of a mask average 1 over them), so they share one
    count, and alpha weighs nats per token against nats per token at every noise level. Equals `ar_loss` + alpha *
    `diffusion_loss` of two passes.
    teacher: a frozen AR model; L_AR is then the KL of the clean rows from its distribution, with gradient 0 where the
    AR model is unchanged. distance: other than "ce", the noisy rows follow the AR distribution of their tokens instead
    of the text, the teacher's or without one that of the clean rows (OPDLM 2606.06712).
    """
    wanted, masked = predictable(layout, loss_mask), corruption.masked
    xt = corruption.apply(x0, config.mask_token_id)
    passed, num_masked = joint_pass(config, xt, x0, layout, masked, wanted)
    weight = torch.ones(len(passed.rows), device=x0.device, dtype=torch.float64)
    weight[:num_masked] = alpha * corruption.weight[masked].double()
    if teacher is None and distance == "ce":
        return LossOutput(run_sum(network, passed, row_nll(torch.cat([x0[masked], x0[wanted]])), weight), wanted.sum())
    masked_of_wanted = masked[wanted].nonzero()[:, 0]
    row_loss: RowLoss
    if teacher is None:
        order, row_loss = _from_own_ar(masked_of_wanted, x0[wanted], distance, top_k)
        passed, weight = passed._replace(rows=passed.rows[order]), weight[order]
    else:
        p = run_lazily(teacher, ar_pass(x0, layout, wanted))
        row_loss = _from_teacher(p, masked_of_wanted, x0[masked], distance, top_k)
    return LossOutput(run_sum(network, passed, row_loss, weight), wanted.sum())


def _from_own_ar(
    masked_of_wanted: Tensor, target: Tensor, distance: str, top_k: int | None
) -> tuple[Tensor, GroupLoss]:
    """An order of noisy rows and the AR rows behind them, and the losses of rows in that order.

    Each noisy row comes just before the AR row of its token, in one group with it: its loss is the distance from that
    row's distribution, which learns from the text alone. masked_of_wanted: (noisy rows,), the AR row of the same token;
    target: (AR rows,).
    """
    token = torch.cat([masked_of_wanted, torch.arange(len(target), device=target.device)])
    is_noisy = torch.arange(len(token), device=target.device) < len(masked_of_wanted)
    order = (2 * token + ~is_noisy).argsort()
    token, is_noisy = token[order], is_noisy[order]

    def row_loss(logits: Tensor, part: slice) -> Tensor:
        kind, text, device = is_noisy[part], to_device(target[token[part]], logits.device), logits.device
        noisy, ar = (to_device(which.nonzero()[:, 0], device) for which in (kind, ~kind))
        nll = cross_entropy(logits[ar], text[ar], reduction="none")
        distances = draft_distance(logits.detach()[noisy + 1], logits[noisy], text[noisy], distance, top_k)
        return torch.empty_like(logits[:, 0]).index_copy(0, ar, nll).index_copy(0, noisy, distances)

    return order, GroupLoss(row_loss, token)


def _from_teacher(p: LogitsOf, masked_of_wanted: Tensor, target: Tensor, distance: str, top_k: int | None) -> RowLoss:
    """The distances of noisy rows, and behind them KL of AR rows, from a teacher's logits p of the AR rows.

    masked_of_wanted: (noisy rows,), the AR row of the same token; target: (noisy rows,).
    """
    noisy = len(masked_of_wanted)

    def row_loss(logits: Tensor, part: slice) -> Tensor:
        start = part.start or 0
        n = max(0, min(noisy - start, len(logits)))
        first, last = slice(start, start + n), slice(start + n - noisy, start + len(logits) - noisy)
        values = [logits[:0].sum(-1)]  # of no row, for a pass without any
        if n:
            reference = to_device(p(masked_of_wanted[first]), logits.device)
            values.append(draft_distance(reference, logits[:n], target[first], distance, top_k))
        if n < len(logits):
            values.append(draft_distance(to_device(p(last), logits.device), logits[n:], target, "kl", top_k))
        return torch.cat(values)

    return row_loss


def shared_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruptions: Sequence[Corruption],
    alpha: float | None = None,
    loss_mask: Tensor | None = None,
) -> LossOutput:
    """The mean over masks of `diffusion_loss`, or with alpha of `joint_loss`, from one pass over the clean tokens.

    The clean tokens fill a cache that keeps the autograd graph, and the noisy tokens of each mask run on top of it: n
    masks cost 1 + n streams instead of 2n. Needs two streams, and no shift, which reads clean rows for each mask.
    Raises ValueError without them.
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
        total = run_sum(network, ar_pass(x0, layout, wanted), row_nll(target), ones, past)
    past.layout = layout
    share = (1.0 if alpha is None else alpha) / len(corruptions)
    for corruption in corruptions:
        masked = corruption.masked
        passed = noisy_pass(config, corruption.apply(x0, config.mask_token_id), layout, masked)
        total = total + share * run_sum(network, passed, row_nll(x0[masked]), corruption.weight[masked], past)
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
    """sum_i w_i * distance(p_i, q_i): p_i the AR distribution of token i on the clean stream, q_i the draft's.

    With the shift the first position of a block is scored by the AR row itself: it counts, with distance 0. The
    distances of `OF_BLOCKS` leave it out as well, since the anchor row of a draft forward decides it. "reach" is
    `draft_failure` + 0.1 KL (ours). "first-error" is Uno's KL and TV times (1 + n e_i) / 2: e_i is the probability,
    without gradient, that draft i is the first of the n in its block to be refused, where a cycle ends (ours, after
    2606.11552).
    """
    wanted = corruption.masked
    if config.shift or distance in OF_BLOCKS:
        wanted = wanted & (layout.position % (config.block_size or 1) > 0)
    xt = corruption.apply(x0, config.mask_token_id)
    target, weight = x0[wanted], corruption.weight[wanted]
    p, passed, past = distilled_pass(network, config, xt, x0, layout, wanted)

    def distances(logits: Tensor, part: slice) -> Tensor:
        return draft_distance(p(part), logits, target[part], distance, top_k)

    row_loss: RowLoss = distances
    if distance in OF_BLOCKS:
        block = blocks_of(layout, config.block_size)[wanted]
        row_loss = _of_blocks(p, target, block, config.block_size or 1, distance, top_k)
    return LossOutput(run_sum(network, passed, row_loss, weight, past), predictable(layout, loss_mask).sum())


def _of_blocks(
    p: LogitsOf, target: Tensor, block: Tensor, block_size: int, distance: str, top_k: int | None
) -> GroupLoss:
    """The distance "reach" or "first-error" of rows from a base's logits p; target, block: (rows,), see `blocks_of`."""

    def row_loss(q: Tensor, part: slice) -> Tensor:
        of = functools.partial(draft_distance, p(part), q, target[part], top_k=top_k)
        if distance == "reach":
            return 0.1 * of("kl") + draft_failure(1 - of("tv"), block[part])
        with torch.no_grad():
            accepted = (1 - of("tv")).clamp_min(_NEVER)
            first = (1 - draft_failure(accepted, block[part])) / accepted * (1 - accepted)
        return (1 + (block_size - 1) * first) / 2 * of("kl+tv")

    return GroupLoss(row_loss, block)


def blocks_of(layout: Layout, block_size: int | None) -> Tensor:
    """Number of each token's block, (batch, length) int64: as `segments`, but each row has numbers of its own."""
    batch, length = layout.position.shape
    return segments(layout, block_size) + length * torch.arange(batch, device=layout.position.device)[:, None]


_NEVER = 1e-6
"""Least acceptance, whose logarithm is finite."""


def draft_failure(acceptance: Tensor, block: Tensor) -> Tensor:
    """1 - prod_{i <= j} a_i over the block of each draft j: the probability that it is rejected.

    acceptance: a (drafts,) in [0, 1]. block: (drafts,) int64, the same number for the drafts of a block, which are
    neighbours. The sum over a block is its length less the expected number of accepted drafts, so the gradient weighs
    each draft by how often a cycle reaches it and by the drafts after it.
    """
    _, number, lengths = block.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(block), device=block.device) - (lengths.cumsum(0) - lengths)[number]
    at = to_device(number, acceptance.device), to_device(place, acceptance.device)
    grid = acceptance.new_ones(len(lengths), max(lengths.tolist(), default=0))
    return 1 - grid.index_put(at, acceptance).clamp_min(_NEVER).log().cumsum(-1).exp()[at]


# --- the objective of a run


class Objective(Protocol):
    """The loss of a batch, the mean over its masks.

    config: how the network is read, None for an AR model. corruptions: masks of the whole batch, at least one, none for
    an AR model. pattern: of an annealed mask; None is the config's.
    """

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        batch: Batch,
        corruptions: Sequence[Corruption],
        pattern: Pattern | None = None,
    ) -> LossOutput: ...


@dataclass(frozen=True)
class NextToken:
    """L_AR = sum_i -log p(x_i | x_<i), see `ar_loss`."""

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        batch: Batch,
        corruptions: Sequence[Corruption],
        pattern: Pattern | None = None,
    ) -> LossOutput:
        del config, corruptions, pattern
        return ar_loss(network, batch.x0, batch.layout, batch.loss_mask)


@dataclass(frozen=True)
class Diffusion:
    """L_diffusion = sum_i w_i * -log p(x_i | xt), see `diffusion_loss`.

    per_masked: L = count / masked tokens of the batch * sum_i w_i * -log p(x_i | xt), so that dividing by the count of
    a step gives the mean over its batches of the loss of DiffuLLaMA's released code. share_clean: several masks may
    share one clean pass.
    """

    per_masked: bool = False
    share_clean: bool = True

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        batch: Batch,
        corruptions: Sequence[Corruption],
        pattern: Pattern | None = None,
    ) -> LossOutput:
        assert config is not None
        shared = self.share_clean and pattern is None and not self.per_masked
        if shared and can_share_clean_pass(config, corruptions):
            return shared_loss(network, config, batch.x0, batch.layout, corruptions, None, batch.loss_mask)
        losses = []
        for corruption in corruptions:
            loss = diffusion_loss(network, config, batch.x0, batch.layout, corruption, pattern, batch.loss_mask)
            if self.per_masked:
                loss = LossOutput(loss.sum * loss.count / corruption.masked.sum().clamp_min(1), loss.count)
            losses.append(loss)
        return _mean(losses)


@dataclass(frozen=True)
class Joint:
    """L_AR + alpha * L_diffusion, see `joint_loss`; neither term predicts the mask token itself."""

    alpha: float
    teacher: Network | None = None
    distance: str = "ce"
    top_k: int | None = None
    share_clean: bool = True

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        batch: Batch,
        corruptions: Sequence[Corruption],
        pattern: Pattern | None = None,
    ) -> LossOutput:
        del pattern
        assert config is not None
        learnt = batch.x0 != config.mask_token_id
        if batch.loss_mask is not None:
            learnt = learnt & batch.loss_mask
        plain = self.teacher is None and self.distance == "ce"
        if self.share_clean and plain and can_share_clean_pass(config, corruptions):
            return shared_loss(network, config, batch.x0, batch.layout, corruptions, self.alpha, learnt)
        return _mean([
            joint_loss(network, config, batch.x0, batch.layout, corruption, self.alpha, learnt, teacher=self.teacher,
                       distance=self.distance, top_k=self.top_k)
            for corruption in corruptions
        ])  # fmt: skip


@dataclass(frozen=True)
class Distill:
    """sum_i w_i * distance(p_i, q_i) between a frozen base and its drafter, see `distill_loss`."""

    distance: str
    top_k: int | None = None

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        batch: Batch,
        corruptions: Sequence[Corruption],
        pattern: Pattern | None = None,
    ) -> LossOutput:
        del pattern
        assert config is not None
        return _mean([
            distill_loss(network, config, batch.x0, batch.layout, corruption, self.distance, batch.loss_mask,
                         top_k=self.top_k)
            for corruption in corruptions
        ])  # fmt: skip


def can_share_clean_pass(config: DiffusionConfig, corruptions: Sequence[Corruption]) -> bool:
    """Whether there are several masks that `shared_loss` can run on one clean pass: two streams without shift."""
    return len(corruptions) > 1 and config.attention == "two_stream" and not config.shift


def _mean(losses: Sequence[LossOutput]) -> LossOutput:
    """The mean of the sums. The count is the same for every mask of the same rows."""
    total = losses[0].sum
    for loss in losses[1:]:
        total = total + loss.sum
    return LossOutput(total / len(losses), losses[0].count)
