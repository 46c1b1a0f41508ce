"""Classifier-free guidance towards the prompt: two forwards a step, one of them with the prompt masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.attention import Layout, Pattern
from unmask.denoiser import Network, Past


def guide(logits: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale * (logits - unconditional): 1 is no guidance, 0 ignores the prompt (2207.12598, eq. 6,
    with scale = 1 + w). What has probability 0 in `logits` keeps it.
    """
    guided = unconditional + scale * (logits - unconditional)
    return torch.where(logits.isneginf(), logits, guided)


@dataclass
class _Caches:
    """The caches of both branches, and the prompt lengths (batch,) of the rows they hold."""

    given: Any
    bare: Any
    prompt_lengths: Tensor

    def crop(self, max_length: int) -> None:
        self.given.crop(max_length)
        self.bare.crop(max_length)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.given.batch_select_indices(indices)
        self.bare.batch_select_indices(indices)
        self.prompt_lengths = self.prompt_lengths[indices]


class GuidedNetwork:
    """A network for cached decoding that runs each pass twice, with the prompt and with it masked.

    The first token stays: it is never masked in training. prompt_lengths: (batch,).
    """

    def __init__(self, network: Network, prompt_lengths: Tensor, mask_token_id: int, scale: float) -> None:
        self.network, self.prompt_lengths, self.mask_token_id, self.scale = (
            network,
            prompt_lengths,
            mask_token_id,
            scale,
        )

    @property
    def device(self) -> torch.device:
        return self.network.device

    def new_cache(self) -> _Caches:
        return _Caches(self.network.new_cache(), self.network.new_cache(), self.prompt_lengths)

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        assert past is not None
        caches: _Caches = past.cache
        hidden = layout.real & (layout.position > 0) & (layout.position < caches.prompt_lengths[:, None])
        bare = input_ids.masked_fill(hidden, self.mask_token_id)
        logits, without = (
            self.network(ids, layout, pattern, rows=rows, past=Past(cache, past.layout))
            for ids, cache in ((input_ids, caches.given), (bare, caches.bare))
        )
        return guide(logits, without, self.scale)
