"""Training objectives, as sums and counts.

Every loss is returned as (sum, count), so that the mean over micro-batches and ranks is one division of two totals, the
same for every split. Knows a network only through `network` and `scoring`.

Notation: x0 clean tokens and xt corrupted ones, (batch, length) int64; `masked` and weight w of a corruption,
(batch, length); `wanted` (batch, length) bool, the tokens that are predicted.
"""

from __future__ import annotations

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
from unmask.core.head_loss import RowLoss
from unmask.core.network import DiffusionConfig, GrowingCache, LogitsOf, Network, run, run_lazily, run_sum
from unmask.core.scoring import ar_pass, distilled_pass, joint_pass, noisy_pass, score, scoring_pass
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


def _nll(target: Tensor) -> RowLoss:
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
    """-log p(x0_i | xt) of the masked positions, nats, (masked.sum(),) in row-major order."""
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
    """sum_i w_i * -log p(x0_i | xt, clean context) over masked i (Efficient-DLM 2512.14067, eq. 1).

    The count is that of all predictable tokens, masked or not: with uniform masks the expectation of sum / count is
    the NELBO in nats per token. pattern: of an annealed mask; None is the config's.
    """
    masked = corruption.masked
    passed = scoring_pass(config, corruption.apply(x0, config.mask_token_id), x0, layout, masked, pattern)
    total = run_sum(network, passed, _nll(x0[masked]), corruption.weight[masked])
    return LossOutput(total, predictable(layout, loss_mask).sum())


def ar_loss(network: Network, x0: Tensor, layout: Layout, loss_mask: Tensor | None = None) -> LossOutput:
    """sum_i -log p(x_i | x_<i) over the predictable tokens; documents of a row do not see each other."""
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
    if teacher is None and distance == "ce":
        weight = torch.ones(len(passed.rows), device=x0.device, dtype=torch.float64)
        weight[:num_masked] = alpha * corruption.weight[masked].double()
        return LossOutput(run_sum(network, passed, _nll(torch.cat([x0[masked], x0[wanted]])), weight), wanted.sum())
    masked_of_wanted = masked[wanted].nonzero()[:, 0]
    if teacher is None:
        logits = run(network, passed)
        noisy_logits, ar_logits = logits[:num_masked], logits[num_masked:]
        ar = cross_entropy(ar_logits, to_device(x0[wanted], logits.device), reduction="sum")
        reference = ar_logits.detach()[to_device(masked_of_wanted, logits.device)]
        values = draft_distance(reference, noisy_logits, x0[masked], distance, top_k)
        weight = to_device(corruption.weight[masked], logits.device)
        return LossOutput(ar + alpha * (weight * values).sum(), wanted.sum())
    p = run_lazily(teacher, ar_pass(x0, layout, wanted))
    weight = torch.ones(len(passed.rows), device=x0.device, dtype=torch.float64)
    weight[:num_masked] = alpha * corruption.weight[masked].double()
    row_loss = _from_teacher(p, masked_of_wanted, x0[masked], distance, top_k)
    return LossOutput(run_sum(network, passed, row_loss, weight), wanted.sum())


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
    if distance in OF_BLOCKS:
        q, of_block = run(network, passed, past), _reach if distance == "reach" else _first_error
        values = of_block(p(slice(None)), q, target, wanted, layout, config.block_size or 1, top_k)
        total = (to_device(weight, values.device) * values).sum()
    else:

        def row_loss(logits: Tensor, part: slice) -> Tensor:
            return draft_distance(p(part), logits, target[part], distance, top_k)

        total = run_sum(network, passed, row_loss, weight, past)
    return LossOutput(total, predictable(layout, loss_mask).sum())


def _reach(
    p: Tensor, q: Tensor, target: Tensor, wanted: Tensor, layout: Layout, block_size: int, top_k: int | None
) -> Tensor:
    """The distance "reach" of the wanted tokens, (n,) from logits p and q (n, vocab)."""
    values = 0.1 * draft_distance(p, q, target, "kl", top_k)
    acceptance = 1 - draft_distance(p, q, target, "tv", top_k)
    return values + _failure_of(acceptance, wanted, layout, block_size)


def _first_error(
    p: Tensor, q: Tensor, target: Tensor, wanted: Tensor, layout: Layout, block_size: int, top_k: int | None
) -> Tensor:
    """The distance "first-error" of the wanted tokens, (n,) from logits p and q (n, vocab)."""
    with torch.no_grad():
        accepted = (1 - draft_distance(p, q, target, "tv", top_k)).clamp_min(_NEVER)
        failed = _failure_of(accepted, wanted, layout, block_size)
        first = (1 - failed) / accepted * (1 - accepted)
    return (1 + (block_size - 1) * first) / 2 * draft_distance(p, q, target, "kl+tv", top_k)


def _failure_of(acceptance: Tensor, wanted: Tensor, layout: Layout, block_size: int) -> Tensor:
    """`draft_failure` of the wanted tokens, (n,) from their acceptance (n,); the others are accepted."""
    index = to_device(wanted.flatten().nonzero()[:, 0], acceptance.device)
    grid = acceptance.new_ones(wanted.numel()).index_copy(0, index, acceptance).view(wanted.shape)
    return draft_failure(grid, layout, block_size).flatten()[index]


_NEVER = 1e-6
"""Least acceptance, whose logarithm is finite."""


def draft_failure(acceptance: Tensor, layout: Layout, block_size: int) -> Tensor:
    """1 - prod_{i <= j} a_i over the block of each token j: the probability that its draft is rejected.

    acceptance: a (batch, length) in [0, 1]. The sum over a block is its length less the expected number of accepted
    drafts, so the gradient weighs each position by how often a cycle reaches it and by the drafts after it.
    """
    total = torch.nn.functional.pad(acceptance.clamp_min(_NEVER).log().cumsum(-1), (1, 0))
    segment = segments(layout, block_size)
    column = torch.arange(segment.shape[-1], device=segment.device).expand_as(segment)
    start = torch.full_like(segment, segment.shape[-1]).scatter_reduce(-1, segment, column, "amin")
    first = to_device(start.gather(-1, segment), total.device)
    return 1 - (total[..., 1:] - total.gather(-1, first)).exp()


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
