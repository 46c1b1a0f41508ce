"""Classifier-free guidance towards the prompt: two forwards a step, one of them with the prompt masked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.attention import Layout, Pattern
from unmask.core.network import GrowingCache, Network, SlotCacheState
from unmask.core.transfer import to_device
from unmask.limits import check_number

_LARGEST_SCALE = 1000.0
"""Logits of half precision still hold their difference times so much."""


def check_guidance(scale: float) -> None:
    """Raise ValueError for a guidance scale that is infinite, negative or too large, TypeError for no number."""
    check_number("guidance_scale", scale)
    if not 0 <= scale <= _LARGEST_SCALE:
        raise ValueError(f"guidance_scale {scale} must be finite and not negative, up to {_LARGEST_SCALE:g}: 1 is none")


def check_guided(decoder: Any, *, is_drafter: bool) -> None:
    """Raise ValueError for guidance of a drafter, whose base has no mask embedding."""
    scale = getattr(decoder, "guidance_scale", 1.0)
    if scale != 1 and is_drafter:
        raise ValueError(
            f"guidance_scale {scale} hides the prompt behind masks, for which a drafter's base has no embedding: leave "
            "it at 1, or convert the model whole"
        )


def guide(logits: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale * (logits - unconditional), of any shape (2207.12598, eq. 6, with scale = 1 + w).

    Scale 1 is no guidance, 0 ignores the prompt. A token of probability 0 in `logits` keeps it.
    """
    guided = unconditional + scale * (logits - unconditional)
    return torch.where(logits.isneginf(), logits, guided)


@dataclass
class _Caches:
    """The cached keys with the prompt, and those with the prompt masked."""

    conditional: Any
    unconditional: Any

    def keep_slots(self, keep: Tensor) -> None:
        self.conditional.keep_slots(keep)
        self.unconditional.keep_slots(keep)


class GuidedNetwork:
    """A network for cached decoding that runs each pass twice, with the prompt and with it masked.

    The first token is not masked, as it never is in training. prompt_lengths: (slots,) on the host, of the slots' rows.
    """

    def __init__(self, network: Network, mask_token_id: int, scale: float) -> None:
        self.network, self.mask_token_id, self.scale = network, mask_token_id, scale
        self.prompt_lengths = torch.zeros(0, dtype=torch.long)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def new_slots(self, slots: int, columns: int) -> _Caches:
        return _Caches(self.network.new_slots(slots, columns), self.network.new_slots(slots, columns))

    def new_cache(self) -> Any:
        return self.network.new_cache()

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: GrowingCache | SlotCacheState | None = None,
    ) -> Tensor:
        assert isinstance(past, SlotCacheState)
        lengths = self.prompt_lengths if past.rows is None else self.prompt_lengths[list(past.rows)]
        hidden = layout.real & (layout.position > 0) & (layout.position < lengths[:, None])
        hidden_ids = input_ids.masked_fill(to_device(hidden, input_ids.device), self.mask_token_id)
        logits, unconditional = (
            self.network(ids, layout, pattern, rows=rows, past=replace(past, cache=cache))
            for ids, cache in ((input_ids, past.cache.conditional), (hidden_ids, past.cache.unconditional))
        )
        return guide(logits, unconditional, self.scale)
