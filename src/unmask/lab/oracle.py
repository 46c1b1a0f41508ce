"""The speed of light of a checkpoint: how few forwards could write what it writes one token at a time.

An offline diagnostic (Nemotron-Labs-Diffusion 2607.05722, speed-of-light analysis): its tokens per forward less a
sampler's is what better commit rules could still gain, and what stands above it needs a better model. The
oracle knows the serial text in advance. It is greedy and searches by bisection: what it finds can be done, and a
little more might be.

Notation: a *canvas* is one block (or whole bidirectional canvas) as xt (length,) and masked (length,) bool.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.core.attention import Layout
from unmask.core.decoding import begin, denoise
from unmask.core.network import DiffusionConfig, Network, SlotCacheState
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

    def concat(self, after: Compacted) -> Compacted:
        """This text and the one that follows it."""
        return Compacted(
            self.tokens + after.tokens,
            self.num_serial_forwards + after.num_serial_forwards,
            self.num_forwards + after.num_forwards,
            self.num_checks + after.num_checks,
        )


def compact(propose: Propose, xt: Tensor, masked: Tensor, kept: Kept, *, max_checks: int = 5000) -> Compacted:
    """Commit in each forward as many positions as still lead to the text of serial greedy denoising.

    Serial denoising commits the most confident position of each forward. The oracle commits, of the positions whose
    likeliest token is that of the serial text, the longest prefix by confidence from which serial denoising still
    ends in the same text: all of them if that works, else what a bisection finds; one position, the
    serial step itself, always does. Once max_checks forwards are spent it goes on one by one.
    """
    proposals = _Remembered(propose)
    final, still_masked, num_serial = _serial(proposals, xt, masked, kept)
    tokens_of_text = kept(final, still_masked)
    assert tokens_of_text is not None
    num_forwards = 0
    while kept(xt, masked) is None:
        tokens, confidence = proposals(xt, masked)
        num_forwards += 1
        matching = masked & (tokens == final)
        order = torch.where(matching, confidence, -torch.inf).argsort(descending=True, stable=True)
        ranked = order[: int(matching.sum())].tolist()
        good, trial, too_many = 1, len(ranked), len(ranked) + 1
        while good < trial and len(proposals.known) < max_checks:
            text, still_masked, _ = _serial(proposals, *_commit(xt, masked, tokens, ranked[:trial]), kept)
            if kept(text, still_masked) == tokens_of_text:
                good, final = trial, text
            else:
                too_many = trial
            trial = (good + too_many) // 2
        xt, masked = _commit(xt, masked, tokens, ranked[:good])
    return Compacted(tokens_of_text, num_serial, num_forwards, len(proposals.known))


class _Remembered:
    """`Propose` that runs the network once for each state of the canvas."""

    def __init__(self, propose: Propose) -> None:
        self.propose = propose
        self.known: dict[tuple[tuple[int, ...], tuple[bool, ...]], tuple[Tensor, Tensor]] = {}

    def __call__(self, xt: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        state = tuple(xt.tolist()), tuple(masked.tolist())
        if state not in self.known:
            self.known[state] = self.propose(xt, masked)
        return self.known[state]


def _serial(propose: Propose, xt: Tensor, masked: Tensor, kept: Kept) -> tuple[Tensor, Tensor, int]:
    """The canvas that serial denoising finishes, what is masked in it still, and the forwards that it took."""
    forwards = 0
    while kept(xt, masked) is None:
        tokens, confidence = propose(xt, masked)
        best = int(torch.where(masked, confidence, -torch.inf).argmax())
        xt, masked = _commit(xt, masked, tokens, [best])
        forwards += 1
    return xt, masked, forwards


def _commit(xt: Tensor, masked: Tensor, tokens: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    xt, masked = xt.clone(), masked.clone()
    xt[list(positions)], masked[list(positions)] = tokens[list(positions)], False
    return xt, masked


# --- canvases of a checkpoint


@dataclass
class _Proposals:
    """`Propose` of the canvas at `layout`: a cached pass for a block, a whole one for a bidirectional canvas.

    finished: the block before, which enters the cache with the first pass of this one.
    """

    network: Network
    config: DiffusionConfig
    past: SlotCacheState
    layout: Layout
    finished: tuple[list[int], Tensor] | None

    def __call__(self, xt: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        network, config, layout = self.network, self.config, self.layout
        if config.attention == "bidirectional":
            logits = score(network, config, xt[None], xt[None], layout, masked[None])
        else:
            logits = denoise(network, config, self.past, xt[None], layout, masked[None], self.finished)
            self.finished = None
        logits = logits.cpu()
        return xt.masked_scatter(masked, logits.argmax(-1)), token_confidence(logits, masked[None])[0]


def _canvas(config: DiffusionConfig, prompt: Tensor, position: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """xt and masked (length,) of the canvas at `position`, of which the prompt and what follows `end` stay."""
    masked = (position >= len(prompt)) & (position < end)
    xt = torch.full_like(position, config.mask_token_id)
    tail = prompt[int(position[0]) : int(position[-1]) + 1]
    xt[: len(tail)] = tail
    return xt, masked


def _kept(xt: Tensor, masked: Tensor, new_positions: Tensor, end_token_ids: Sequence[int]) -> list[int] | None:
    """`Kept` of a canvas whose new tokens stand at `new_positions`."""
    still_masked = masked[new_positions].nonzero()[:, 0]
    new = xt[new_positions[: int(still_masked[0])] if len(still_masked) else new_positions].tolist()
    ended = first_end(new, end_token_ids)
    return new[:ended] if ended is not None or not len(still_masked) else None


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
    prompt = prompt.cpu()  # all but the passes on the host, where each decision is made
    end = min(len(prompt) + max_new_tokens, context_length or sys.maxsize)
    width, start = end, 0
    if config.attention != "bidirectional" and config.block_size is not None:
        width, start = config.block_size, len(prompt) // config.block_size * config.block_size
    past = begin(network, config.pattern, [prompt[:start]], columns=end + width, keep_logits=config.shift)
    finished: tuple[list[int], Tensor] | None = None
    total = Compacted([], 0, 0, 0)
    while start < end:
        position = torch.arange(start, min(start + width, context_length or sys.maxsize))
        past.set_columns(start + len(position))
        xt, masked = _canvas(config, prompt, position, end)
        propose = _Proposals(network, config, past, Layout.of(position[None]), finished)
        kept = functools.partial(_kept, new_positions=masked.nonzero()[:, 0], end_token_ids=end_token_ids)
        found = compact(propose, xt, masked, kept, max_checks=max(1, max_checks - total.num_checks))
        total = total.concat(found)
        if first_end(found.tokens, end_token_ids) is not None:
            break
        finished = [0], xt.masked_scatter(masked, torch.tensor(found.tokens))[None]
        start += width
    return total
