"""A model beside its AR parent: what both write after the same beginnings, greedily, and in how many forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROMPT_TOKENS, NEW_TOKENS, NUM_TEXTS = 16, 32, 8


class Written(NamedTuple):
    """What a model wrote. text: after the first beginning. tokens_per_forward: of all, new tokens over forwards."""

    text: str
    tokens_per_forward: float


def beginnings(documents: Sequence[Tensor], mask_token_id: int | None = None, number: int = NUM_TEXTS) -> Tensor:
    """The first tokens of the first documents that are long enough, (rows, length) int64; no rows if none is.

    documents: (tokens,) int64 each. length: `PROMPT_TOKENS`, less if no document is longer than that. A beginning with
    the mask token in it, as the text of a reused one may have, is left out.
    """
    length = min(PROMPT_TOKENS, max((len(ids) for ids in documents), default=0) - 1)
    if length < 1:
        return torch.zeros(0, 0, dtype=torch.long)
    found = [ids[:length] for ids in documents if len(ids) > length and mask_token_id not in ids[:length].tolist()]
    return torch.stack(found[:number]) if found else torch.zeros(0, length, dtype=torch.long)


def write(lm: Any, prompts: Tensor, mode: str | None = None) -> Written:
    """What `lm`, a `DiffusionLM`, makes of beginnings, at least one; mode: by default its best."""
    out = lm.generate(prompts, mode=mode, max_new_tokens=NEW_TOKENS)
    return Written(out.texts[0], int(out.num_new_tokens.sum()) / max(1, int(out.num_forwards.sum())))


def check_same_vocabulary(other: Any, tokenizer: Any, named: str, of: str) -> None:
    """Raise ValueError unless the tokenizer `other` has the tokens of `tokenizer`, but for the mask token of either.

    named: the other model as it was given, such as "teacher='x'". of: whose vocabulary it should be.
    """
    known, masks = other.get_vocab(), (other.mask_token, tokenizer.mask_token)
    if any(known.get(token) != i for token, i in tokenizer.get_vocab().items() if token not in masks):
        raise ValueError(f"{named} has another vocabulary: give a model with that of {of}")
