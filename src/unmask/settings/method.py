"""What is learnt: attention, objective, drafter, masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unmask.settings.field import DIFFUSION, SET, above, setting

DISTANCES = ("ce", "kl", "tv", "kl+tv", "lk", "reach", "first-error")

# fmt: off


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What a token sees, and which row predicts it."""

    attention: str = setting(
        "two_stream", "two_stream: noisy blocks after clean tokens; block_causal: after noisy tokens; bidirectional: "
        "the whole row is one canvas; ar: next-token training",
        one_of=("two_stream", "block_causal", "bidirectional", "ar"))
    clean_attention: str | None = setting(
        None, "attention among clean tokens", one_of=("causal", "block_causal"), attention="two_stream")
    noisy_attention: str = setting(
        "bidirectional", "attention inside a noisy block", one_of=("bidirectional", "causal"), attention="two_stream")
    shift: bool = setting(
        False, "row i - 1 predicts token i, as in an AR model, instead of row i", attention=DIFFUSION)
    block_size: int | None = setting(
        None, "tokens of a block, of which max_length is a multiple", above=0, of_size=True)
    anneal_steps: int = setting(
        1, "steps over which causal attention opens to bidirectional; 1 opens it at once", above=0,
        attention="bidirectional")
    anneal_redraw: bool = setting(
        False, "draw which entries are open for each micro-batch instead of each step", attention="bidirectional",
        anneal_steps=above(1))


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The loss, and whose predictions it follows."""

    objective: str = setting(
        "diffusion", "diffusion; joint: next-token loss + alpha x diffusion; distill: a drafter on the frozen model, "
        "which is its teacher", one_of=("diffusion", "joint", "distill"))
    alpha: float = setting(0.3, "weight of the diffusion term", least=0, objective="joint")
    distance: str = setting(
        "ce", "what noisy rows minimise: ce, the text's cross-entropy, or a distance from the teacher's distribution; "
        "reach and first-error are for drafters", one_of=DISTANCES, objective=("joint", "distill"))
    teacher: str | None = setting(
        None, 'frozen AR model whose distribution the clean rows keep to: "parent" or a folder', objective="joint")
    teacher_top_k: int | None = setting(
        None, "likeliest tokens that a distance compares, the rest in one bucket: 64 for vocabularies above 65,536, "
        "else all", above=0, of_size=True, objective=("joint", "distill"),
        either=({"teacher": SET}, {"distance": DISTANCES[1:]}))
    loss_normaliser: str = setting(
        "tokens", "divide the loss by all predictable tokens (unbiased), or the masked ones of a micro-batch, as "
        "DiffuLLaMA's code does", one_of=("tokens", "masked"), attention=DIFFUSION,
        objective="diffusion")


@dataclass(frozen=True, kw_only=True)
class DrafterSettings:
    """The drafter: gated low-rank adapters that act on noisy rows alone."""

    drafter_rank: int = setting(32, "rank of the adapters", above=0, objective="distill")
    drafter_scale: float = setting(64.0, "the adapters' output is scaled by this / rank", above=0, objective="distill")
    drafter_targets: str = setting(
        "all", "linear maps with an adapter: all, or endings of their names with commas between", objective="distill")
    noise: str = setting(
        "mask", "what draft rows read: mask, an embedding that learns; uniform, random tokens of the vocabulary, as "
        "Uno's do and as engines serve them", one_of=("mask", "uniform"), objective="distill")
    mask_per_place: bool = setting(
        False, "give each place of a block a mask embedding of its own", objective="distill", noise="mask")
    adapt_anchor: bool = setting(
        False, "adapt the row before the drafts too, as engines without a gate for rows need it", objective="distill")


@dataclass(frozen=True, kw_only=True)
class CorruptionSettings:
    """Which tokens are masked in a step, and by what."""

    masking: str = setting(
        "exact", "exact: ceil(t n) of n tokens; bernoulli: each with probability t; all: every token",
        one_of=("exact", "bernoulli", "all"), attention=DIFFUSION)
    noise_level: str = setting(
        "block", "what shares one noise level t: each block, or the whole sequence", one_of=("block", "sequence"),
        attention=DIFFUSION, masking=("exact", "bernoulli"))
    min_noise_level: float = setting(
        0.0, "t is drawn from (this, 1]; exact masks take 0 alone, since their weights need every t", least=0, below=1,
        attention=DIFFUSION, masking="bernoulli")
    half_life: float | None = setting(
        math.inf, "masks prefer the end of a block, the more so the smaller this is; inf is uniform", above=0,
        infinite=True, of_size=True, attention=DIFFUSION, masking="exact")
    complementary: bool = setting(
        False, "draw masks in pairs, a mask and its complement", attention=DIFFUSION, masking="exact")
    num_masks: int = setting(
        1, "masks (or pairs) of the same rows in a step; two streams without shift run over the clean tokens once for "
        "all of them", above=0, most=64, attention=DIFFUSION, masking=("exact", "bernoulli"))
    first_block_size: int | None = setting(
        None, "blocks double from this size to block_size over the run", above=0,
        either=({"attention": ("two_stream", "block_causal")}, {"attention": "bidirectional", "noise_level": "block"}))
    random_offset: bool = setting(
        False, "begin the block grid of each document at a random place, as drafts do; needs rotary positions",
        attention="two_stream", clean_attention="causal")
    mask_token: str | None = setting(
        None, "text of the mask token; one that the vocabulary has is reused; unset adds one", attention=DIFFUSION)
    mask_init: str | None = setting(
        None, "token whose embedding the mask token begins with; unset: the mean of all", attention=DIFFUSION,
        objective=("diffusion", "joint"))
    mask_init_noise: bool = setting(
        False, "add normal noise of variance 1 / width to what the mask token begins with, as for DiffuGPT-M",
        attention=DIFFUSION, objective=("diffusion", "joint"))
    predict_mask: bool = setting(
        False, "the loss counts the mask token among the tokens that may be predicted, and predicts it wherever the "
        "text has it, as DiffuLLaMA's code does; sampling and evaluation never do", attention=DIFFUSION,
        objective="diffusion", masking="bernoulli")
