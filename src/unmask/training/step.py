"""Noise, attention pattern, loss and learning rate of an optimiser step, as functions of (seed, step, global row).

So the split of a batch into micro-batches, threads and processes changes nothing, and a resumed run continues exactly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from unmask.core.attention import Layout, Pattern, annealed
from unmask.core.batch import Batch
from unmask.core.corruption import (
    Corruption,
    mask_bernoulli,
    mask_complementary,
    mask_exact,
    noise_levels,
    position_noise,
    random_tokens,
    segments,
)
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import Key, bernoulli, uniforms
from unmask.core.objectives import Diffusion, Distill, Joint, LossOutput, NextToken, Objective, predictable
from unmask.resolve import Resolved


def objective_of(settings: Resolved, teacher: Network | None = None, *, sharded: bool = False) -> Objective:
    """The objective of a run that trains a diffusion model or a drafter; teacher: of the joint objective.

    sharded: the model's parameters are spread over ranks (FSDP2).
    """
    # A shared clean pass needs the autograd graph of its cache, which compiled layers do not keep. Its last layer gives
    # keys and values alone, and FSDP2 gathers parameters for the backward pass of outputs.
    share_clean = not settings.compile_layers and not sharded
    if settings.objective == "joint":
        return Joint(settings.alpha, teacher, settings.distance, settings.teacher_top_k, share_clean)
    if settings.objective == "distill":
        return Distill(settings.distance, settings.teacher_top_k)
    return Diffusion(settings.loss_normaliser == "masked", share_clean)


def step_loss(
    network: Network,
    settings: Resolved,
    config: DiffusionConfig | None,
    batch: Batch,
    step: int,
    rows: Tensor,
    teacher: Network | None = None,
    *,
    sharded: bool = False,
) -> LossOutput:
    """Loss (sum, count) of some rows of the global batch, the mean over the masks of the step.

    rows: (batch,) int64, their numbers in the global batch. config: None trains the AR model.
    sharded: of `objective_of`.
    """
    if config is None:
        return NextToken()(network, None, batch, ())
    if config.block_size is not None:
        config = config.with_block_size(settings.block_size)  # smaller while first_block_size grows
    if settings.random_offset:
        batch = offset_blocks(batch, settings, step, rows)
    # A mask token that the text itself contains is seen as a mask: never predicted, or with predict_mask always.
    is_mask = batch.x0 == config.mask_token_id
    drawn = corruptions(settings, batch.layout, step, rows, batch.loss_mask, is_mask if settings.predict_mask else None)
    if not settings.predict_mask:
        drawn = [corruption.excluding(is_mask) for corruption in drawn]
    if config.adapt_anchor:  # the first token of a block is the one that is verified already
        anchor = batch.layout.position % settings.block_size == 0
        drawn = [corruption.excluding(anchor) for corruption in drawn]
    if config.noise_tokens:
        size, length = config.noise_tokens, batch.x0.shape[1]
        noise = [random_tokens(settings.seed, step, rows, length, size, n) for n in range(len(drawn))]
        drawn = [replace(corruption, noise=tokens) for corruption, tokens in zip(drawn, noise, strict=True)]
    pattern = annealing(settings, step, rows, network.device)
    return objective_of(settings, teacher, sharded=sharded)(network, config, batch, drawn, pattern)


def corruptions(
    settings: Resolved,
    layout: Layout,
    step: int,
    rows: Tensor,
    loss_mask: Tensor | None = None,
    always: Tensor | None = None,
) -> list[Corruption]:
    """The masks of some rows of the global batch at an optimiser step: `num_masks`, or as many complementary pairs.

    rows: (batch,) int64, their numbers in the global batch. loss_mask: bool like the layout, None learns all tokens.
    always: bool like the layout, tokens that Bernoulli masks mask whatever is drawn.
    """
    drawn = []
    for number in range(settings.num_masks):
        drawn += _draw_mask(settings, layout, step, rows, loss_mask, always, number)
    return drawn


def _draw_mask(
    settings: Resolved,
    layout: Layout,
    step: int,
    rows: Tensor,
    loss_mask: Tensor | None,
    always: Tensor | None,
    number: int,
) -> list[Corruption]:
    """Mask `number` of the rows at a step, with `complementary` and its complement."""
    by_block = settings.noise_level == "block"
    device, length = layout.position.device, layout.position.shape[1]
    segment = segments(layout, settings.block_size) if by_block else torch.zeros_like(layout.position)
    # Noise levels are stratified over the batch, so those of a micro-batch are alike: a loss that is divided by the
    # masked tokens of each micro-batch would be biased by that.
    strata = settings.batch_size if settings.loss_normaliser == "tokens" else 1
    t = noise_levels(settings.seed, step, rows, strata, length, number).to(device)
    t = settings.min_noise_level + (1 - settings.min_noise_level) * t
    noise = position_noise(settings.seed, step, rows, length, number).to(device)
    maskable = predictable(layout, loss_mask)
    if settings.masking == "all":
        return [Corruption(maskable, maskable.float())]
    if settings.masking == "bernoulli":
        noise = noise if always is None else noise.masked_fill(always, 0.0)  # below every level
        return [mask_bernoulli(t, noise, segment, maskable)]
    size = settings.block_size if by_block else length
    place = (layout.position % size + 1) / size
    if settings.complementary:
        return list(mask_complementary(t, noise, segment, maskable, place=place, half_life=settings.half_life))
    return [mask_exact(t, noise, segment, maskable, place=place, half_life=settings.half_life)]


def offset_blocks(batch: Batch, settings: Resolved, step: int, rows: Tensor) -> Batch:
    """The batch with the positions of each document moved by a random offset below block_size.

    Rotary attention sees differences of positions alone, so only the block boundaries change. A document's first
    token stays out of the loss, at whatever position.
    """
    position, document, noisy = batch.layout
    drawn = uniforms([("offset", settings.seed, step, row) for row in rows.tolist()], position.shape[1])
    offset = (drawn.to(document.device).gather(-1, document.clamp_min(0)) * settings.block_size).long()
    return Batch(batch.x0, Layout(position + offset, document, noisy), predictable(batch.layout, batch.loss_mask))


@functools.lru_cache(maxsize=1)
def _open_entries(length: int, ratio: float, key: Key, device: torch.device) -> Tensor:
    """(length, length) bool, True with probability `ratio`; kept, since the micro-batches of a step share it."""
    return bernoulli(length, length, probability=ratio, key=key, device=device)


def annealing(settings: Resolved, step: int, rows: Tensor, device: torch.device) -> Pattern | None:
    """The attention pattern of an optimiser step while attention opens; None once it is fully bidirectional.

    Every entry above the diagonal is open with probability r = min(1, (step + 1) / anneal_steps) (DiffuLLaMA
    2410.17891, section 3.3). One max_length x max_length matrix a step, on positions inside documents; with
    `anneal_redraw` one for each micro-batch, keyed by its first row.
    """
    ratio = (step + 1) / settings.anneal_steps
    if ratio >= 1:
        return None
    key: Key = ("anneal", settings.seed, step)
    if settings.anneal_redraw:
        key += (int(rows[0]),)
    return annealed(_open_entries(settings.max_length, ratio, key, device))


def learning_rate_at(settings: Resolved, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from learning_rate to learning_rate * min_learning_rate_ratio."""
    warmup = max(1, round(settings.warmup_ratio * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
