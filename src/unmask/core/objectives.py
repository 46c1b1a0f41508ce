"""Training objectives, as sums and counts.

Every loss comes back as (sum, count) so that a mean over micro-batches, accumulation steps and ranks is
one division of two totals, the same for every split. Knows a network only through `network` and `scoring`.
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
from unmask.core.distances import draft_distance
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
    teacher: a frozen AR model; L_AR is then the clean rows' KL from its distribution, whose gradient is 0 where
    the AR model is unchanged. distance: other than "ce", the noisy rows follow the AR distribution of their tokens,
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
    reference = ar_logits.detach()
    if teacher is None:
        ar = cross_entropy(ar_logits, to_device(x0[wanted], logits.device), reduction="sum")
    else:
        with torch.no_grad():
            reference = score_ar(teacher, x0, layout, wanted)
        ar = draft_distance(reference, ar_logits, x0[wanted], "kl", top_k).sum()
    drafted, weight = (to_device(x, logits.device) for x in (masked[wanted].nonzero()[:, 0], corruption.weight[masked]))
    values = draft_distance(reference[drafted], logits, x0[masked], distance, top_k)
    return LossOutput(ar + alpha * (weight * values).sum(), wanted.sum())


def shared_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruptions: Sequence[Corruption],
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
    """sum_i w_i * distance(p_i, q_i): p_i the AR distribution of token i on the clean stream, q_i the draft's.

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


# --- the objective of a run


class Objective(Protocol):
    """The loss of a batch under some masks: (network, config, batch, corruptions, pattern) -> LossOutput.

    config: what the network is read as, None for an AR model. corruptions: of the batch's rows, one or more; the loss
    is their mean. pattern: an annealed mask, else the config's.
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

    by_masked: the sum is that of DiffuLLaMA's released code, sum (1/t) CE / masked tokens of the batch, times the
    count, so that dividing by a step's count gives the mean over its batches. shares: masks may share one clean pass.
    """

    by_masked: bool = False
    shares: bool = True

    def __call__(
        self,
        network: Network,
        config: DiffusionConfig | None,
        batch: Batch,
        corruptions: Sequence[Corruption],
        pattern: Pattern | None = None,
    ) -> LossOutput:
        assert config is not None
        if self.shares and pattern is None and not self.by_masked and shares_clean_pass(config, corruptions):
            return shared_loss(network, config, batch.x0, batch.layout, corruptions, None, batch.loss_mask)
        losses = []
        for corruption in corruptions:
            loss = diffusion_loss(network, config, batch.x0, batch.layout, corruption, pattern, batch.loss_mask)
            if self.by_masked:
                loss = LossOutput(loss.sum * loss.count / corruption.masked.sum().clamp_min(1), loss.count)
            losses.append(loss)
        return _mean(losses)


@dataclass(frozen=True)
class Joint:
    """L_AR + alpha * L_diffusion, see `joint_loss`; the mask token itself is predicted by neither."""

    alpha: float
    teacher: Network | None = None
    distance: str = "ce"
    top_k: int | None = None
    shares: bool = True

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
        if self.shares and plain and shares_clean_pass(config, corruptions):
            return shared_loss(network, config, batch.x0, batch.layout, corruptions, self.alpha, learnt)
        return _mean([
            joint_loss(network, config, batch.x0, batch.layout, corruption, self.alpha, learnt, teacher=self.teacher,
                       distance=self.distance, top_k=self.top_k)
            for corruption in corruptions
        ])  # fmt: skip


@dataclass(frozen=True)
class Distill:
    """sum_i w_i * distance(p_i, q_i) of a drafter on a frozen base, see `distill_loss`."""

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


def shares_clean_pass(config: DiffusionConfig, corruptions: Sequence[Corruption]) -> bool:
    """Whether several masks run on one pass over the clean tokens: two streams without shift, see `shared_loss`."""
    return len(corruptions) > 1 and config.attention == "two_stream" and not config.shift


def _mean(losses: Sequence[LossOutput]) -> LossOutput:
    """The mean of the sums; every mask of the same rows has the same count."""
    total = losses[0].sum
    for loss in losses[1:]:
        total = total + loss.sum
    return LossOutput(total / len(losses), losses[0].count)
