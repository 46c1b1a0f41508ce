"""Multiple choice by likelihood: each choice is scored given its context, and the lowest score is picked.

The scores are those of `likelihood` on the documents made here, in which the context is given: `nll` in AR
mode, `nelbo` (the bound of the choice's tokens, exact=True for blocks of up to 4) in diffusion mode. Beside
them stands the estimator of DiffuLLaMA's evaluation, for parity; it favours short choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unmask.core.corruption import mask_bernoulli, segments
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import uniforms
from unmask.core.objectives import predictable, token_nll
from unmask.data.plain_text import open_ids
from unmask.data.supervised import continue_ids
from unmask.evaluation.likelihood import Document, batches, check_finite, row_sums


def choice_document(tokenizer: Any, context: str, choice: str, context_length: int | None = None) -> Document:
    """The context, which is not scored, and the choice, whose bytes are all counted at its last token.

    A document longer than `context_length` loses the beginning of its context.
    """
    if not choice.strip():
        raise ValueError(f"choice {choice!r} is empty: there is nothing to score")
    prompt = open_ids(tokenizer, context)
    scored = continue_ids(tokenizer, prompt, context, choice)
    if not prompt:
        raise ValueError(f"context {context!r} makes no tokens, so the first token of the choice could not be scored")
    if context_length is not None:
        if len(scored) >= context_length:
            raise ValueError(f"choice {choice[:40]!r} of {len(scored)} tokens exceeds the context of {context_length}")
        prompt = prompt[max(0, len(prompt) + len(scored) - context_length) :]
    ids = torch.tensor(prompt + scored)
    num_bytes = torch.zeros_like(ids)
    num_bytes[-1] = len(choice.encode())
    return Document(ids, num_bytes, torch.arange(len(ids)) >= len(prompt))


@torch.inference_mode()
def mean_over_levels(
    network: Network,
    config: DiffusionConfig,
    documents: Sequence[Document],
    *,
    levels: int = 32,
    seed: int = 0,
    context_length: int | None = None,
    batch_tokens: int = 8192,
) -> list[float]:
    """(1/T) sum_{i=1..T} u(i/T), u(t) the mean of -log p over the masked tokens of one Bernoulli(t) draw, or 0.

    The estimator of DiffuLLaMA's evaluation code (2410.17891), in nats per token. A draw
    that masks nothing counts as 0, so the score of n tokens is too small by `shrinkage(n)`: no bound.
    """
    if levels < 1:
        raise ValueError(f"levels {levels} must be at least 1")
    totals = [0.0] * len(documents)
    for windows, x0, layout, loss_mask in batches(documents, context_length, batch_tokens, network.device):
        maskable, segment = predictable(layout, loss_mask), segments(layout, None)
        for level in range(1, levels + 1):
            noise = uniforms([("choice", seed, *w, level) for w in windows], x0.shape[1])
            t = torch.full(x0.shape, level / levels, dtype=torch.float64, device=x0.device)
            drawn = mask_bernoulli(t, noise.to(x0.device), segment, maskable)
            sums = row_sums(token_nll(network, config, x0, layout, drawn), drawn.masked)
            for (owner, _), total, count in zip(windows, sums, drawn.masked.sum(-1).tolist(), strict=True):
                totals[owner] += total / max(1, count) / levels
    check_finite(totals)
    return totals


def shrinkage(num_tokens: int, levels: int = 32) -> float:
    """What `mean_over_levels` makes of a constant loss of 1: 1 - (1/T) sum_i (1 - i/T)^n, about n / (n + 1)."""
    return 1 - sum((1 - i / levels) ** num_tokens for i in range(1, levels + 1)) / levels
