"""The speed of light of a checkpoint: how few forwards could write what it writes one token at a time.

An offline diagnostic (Nemotron-Labs-Diffusion 2607.05722, speed-of-light analysis): its tokens per forward less a
sampler's is what better commit rules could still gain, and what stands above it needs a better model. The
oracle knows the serial text in advance. It is greedy and searches by bisection: what it finds can be done, and a
little more might be.

Notation: a *canvas* is one block (or whole bidirectional canvas) as xt (length,) and masked (length,) bool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.core.attention import Layout
from unmask.core.decoding import begin, denoise
from unmask.core.network import DiffusionConfig, Network
from unmask.core.scoring import score
from unmask.sampling.commit import token_confidence
from unmask.sampling.request import first_end

Propose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(xt, masked) -> the likeliest token and its confidence at every position (length,), used where masked."""

Kept = Callable[[Tensor, Tensor], list[int] | None]
"""(xt, masked) -> the new tokens that a finished canvas keeps, None while it is not finished."""


@dataclass(frozen=True)
class Compacted:
    """tokens: the serial text. num_serial_forwards: one a commit. num_forwards: the oracle's, for the same text.

    num_checks: forwards spent on finding out.
    """

    tokens: list[int]
    num_serial_forwards: int
    num_forwards: int
    num_checks: int

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / max(1, self.num_forwards)


def compact(propose: Propose, xt: Tensor, masked: Tensor, kept: Kept, *, max_checks: int = 5000) -> Compacted:
    """Commit in each forward as many positions as still lead to the text of serial greedy denoising.

    Serial denoising commits the most confident position of each forward. The oracle commits, of the positions whose
    likeliest token is that of the serial text, the longest prefix by confidence from which serial denoising still
    ends in the same text: all of them if that works, else what a bisection finds; one position, the
    serial step itself, always does. Once max_checks forwards are spent it goes on one by one.
    """
    known: dict[tuple[tuple[int, ...], tuple[bool, ...]], tuple[Tensor, Tensor]] = {}

    def proposal(xt: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        state = tuple(xt.tolist()), tuple(masked.tolist())
        if state not in known:
            known[state] = propose(xt, masked)
        return known[state]

    def serial(xt: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, int]:
        forwards = 0
        while kept(xt, masked) is None:
            tokens, confidence = proposal(xt, masked)
            best = int(torch.where(masked, confidence, -torch.inf).argmax())
            xt, masked = _commit(xt, masked, tokens, [best])
            forwards += 1
        return xt, masked, forwards

    final, left, num_serial = serial(xt, masked)
    wanted = kept(final, left)
    assert wanted is not None
    num_forwards = 0
    while kept(xt, masked) is None:
        tokens, confidence = proposal(xt, masked)
        num_forwards += 1
        matching = masked & (tokens == final)
        order = torch.where(matching, confidence, -torch.inf).argsort(descending=True, stable=True)
        ranked = order[: int(matching.sum())].tolist()
        good, trial, too_many = 1, len(ranked), len(ranked) + 1
        while good < trial and len(known) < max_checks:
            text, left, _ = serial(*_commit(xt, masked, tokens, ranked[:trial]))
            if kept(text, left) == wanted:
                good, final = trial, text
            else:
                too_many = trial
            trial = (good + too_many) // 2
        xt, masked = _commit(xt, masked, tokens, ranked[:good])
    return Compacted(wanted, num_serial, num_forwards, len(known))


def _commit(xt: Tensor, masked: Tensor, tokens: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    xt, masked = xt.clone(), masked.clone()
    xt[list(positions)], masked[list(positions)] = tokens[list(positions)], False
    return xt, masked


def _kept(xt: Tensor, masked: Tensor, open_: Tensor, end_token_ids: Sequence[int]) -> list[int] | None:
    """`Kept` of a canvas whose positions `open_` were to be filled in."""
    waiting = masked[open_].nonzero()[:, 0]
    new = xt[open_[: int(waiting[0])] if len(waiting) else open_].tolist()
    ended = first_end(new, end_token_ids)
    return new[:ended] if ended is not None or not len(waiting) else None


@torch.inference_mode()
def speed_of_light(
    network: Network,
    config: DiffusionConfig,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    context_length: int | None = None,
    end_token_ids: Sequence[int] = (),
    max_checks: int = 5000,
) -> Compacted:
    """`compact` for the continuation of one prompt (length,), block by block or as one bidirectional canvas."""
    if max_checks < 1:
        raise ValueError(f"max_checks {max_checks} must be at least 1: the serial text itself takes forwards")
    prompt, given = prompt.cpu(), len(prompt)  # all but the passes on the host, where each decision is made
    end = given + max_new_tokens
    end = end if context_length is None else min(end, context_length)
    blocks = config.attention != "bidirectional"
    width = config.block_size if blocks and config.block_size is not None else end
    start = given // width * width if blocks else 0
    past = begin(network, config.pattern, [prompt[:start]], columns=end + width, keep_logits=config.shift)
    finished: tuple[list[int], Tensor] | None = None
    total = Compacted([], 0, 0, 0)
    while start < end:
        size = width if context_length is None else min(width, context_length - start)
        layout = Layout.of(start + torch.arange(size)[None])
        past.set_columns(start + size)
        position = layout.position[0]
        masked = (position >= given) & (position < end)
        xt = torch.full((size,), config.mask_token_id)
        tail = prompt[start : start + size]
        xt[: len(tail)] = tail

        def propose(xt: Tensor, masked: Tensor, layout: Layout = layout) -> tuple[Tensor, Tensor]:
            nonlocal finished
            if blocks:
                logits = denoise(network, config, past, xt[None], layout, masked[None], finished)
                finished = None
            else:
                logits = score(network, config, xt[None], xt[None], layout, masked[None])
            logits = logits.cpu()
            return xt.masked_scatter(masked, logits.argmax(-1)), token_confidence(logits, masked[None])[0]

        kept = functools.partial(_kept, open_=masked.nonzero()[:, 0], end_token_ids=end_token_ids)
        found = compact(propose, xt, masked, kept, max_checks=max(1, max_checks - total.num_checks))
        total = Compacted(
            total.tokens + found.tokens,
            total.num_serial_forwards + found.num_serial_forwards,
            total.num_forwards + found.num_forwards,
            total.num_checks + found.num_checks,
        )
        if first_end(found.tokens, end_token_ids) is not None:
            break
        finished = [0], xt.masked_scatter(masked, torch.tensor(found.tokens))[None]
        start += width
    return total
