"""Prompts to tokens, and new tokens to text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.data.plain_text import open_ids, rendered_ids
from unmask.data.supervised import InvalidRecordError, apply_template
from unmask.progress import warn
from unmask.sampling.request import Request

Ids = Sequence[int] | Tensor
"""Token ids of one prompt: a list or (length,)."""

Chat = Sequence[dict[str, str]]
Prompts = str | Ids | Chat | Sequence[str | Ids | Chat] | Tensor


def prompt_rows(tokenizer: Any, prompts: Prompts, attention_mask: Tensor | None, num_tokens: int) -> list[Tensor]:
    """The tokens of each prompt, (length,) int64, length possibly 0.

    prompts: a text, ids (a list or (length,)) or the messages of a chat; several of them in a list; or ids
    (rows, length) with their attention mask. num_tokens: size of the vocabulary. Raises ValueError for ids outside it,
    without prompts, and for what is none.
    """
    given = torch.as_tensor(prompts) if isinstance(prompts, np.ndarray) and prompts.dtype.kind in "iufb" else prompts
    if isinstance(given, Tensor):
        rows = _rows(given, attention_mask)
    elif attention_mask is not None:
        raise ValueError("attention_mask is for ids in a tensor (rows, length): leave it out for other prompts")
    else:
        rows = [_row(tokenizer, item) for item in _items(given)]
    if not rows:
        raise ValueError("prompts is empty: give at least one")
    for row in rows:
        odd = row[(row < 0) | (row >= num_tokens)]
        if len(odd):
            raise ValueError(f"prompt token id {int(odd[0])} is outside the model's vocabulary of {num_tokens} tokens")
    return rows


def _rows(ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The rows of a tensor of ids, (length,) or (rows, length), without what the mask hides."""
    if ids.ndim not in (1, 2):
        raise ValueError(f"prompt ids have shape {tuple(ids.shape)}: give (length,) or (rows, length)")
    batch = ids[None] if ids.ndim == 1 else ids
    if attention_mask is None:
        return [_whole(row) for row in batch]
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit prompts of {tuple(ids.shape)}"
        )
    real = attention_mask.view(batch.shape).to(batch.device).bool()
    return [_whole(row[keep]) for row, keep in zip(batch, real, strict=True)]


def _whole(ids: Any) -> Tensor:
    """Ids as (length,) int64 on the CPU; ValueError for numbers that are none."""
    try:
        row = torch.as_tensor(ids).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of mixed types, or beyond 64 bits
        row = torch.empty(0, 0)
    if row.ndim != 1 or (len(row) and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)):
        raise ValueError(f"prompt ids {_short(ids)} must be whole numbers in a row, each of a token")
    return row.to(torch.long)


def _is_id(item: Any) -> bool:
    return isinstance(item, Integral) or (isinstance(item, Tensor) and item.ndim == 0)


def _items(prompts: Any) -> list[Any]:
    """The prompts one by one."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts {_short(prompts)} must be {_KINDS}, or a list of them")
    items = list(prompts)
    return [items] if items and (isinstance(items[0], Mapping) or _is_id(items[0])) else items


_KINDS = "text, token ids (a list or tensor), or a list of messages"


def _row(tokenizer: Any, prompt: Any) -> Tensor:
    if isinstance(prompt, Tensor | np.ndarray) or (isinstance(prompt, list | tuple) and prompt and _is_id(prompt[0])):
        return _whole(prompt)
    if not isinstance(prompt, str) and not (
        isinstance(prompt, list | tuple) and all(isinstance(message, Mapping) for message in prompt)
    ):
        raise ValueError(f"prompt {_short(prompt)} must be {_KINDS}")
    return torch.tensor(_encode(tokenizer, prompt), dtype=torch.long)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return open_ids(tokenizer, prompt)
    return rendered_ids(tokenizer, chat_text(tokenizer, prompt))


def chat_text(tokenizer: Any, messages: Any, *, add_generation_prompt: bool = True) -> str:
    """`apply_template` on a prompt of messages; without a generation prompt the last message goes on."""
    try:
        return apply_template(
            tokenizer, messages, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
    except InvalidRecordError as error:
        raise ValueError(f"the prompt {error}: change the messages, or the tokenizer's chat template") from error


def new_text(tokenizer: Any, prompt: Tensor, new: Sequence[int]) -> str:
    """The text that `new` tokens add to that of the prompt.

    Both are decoded together, since the text of a token may depend on the token before it.
    """
    before = tokenizer.decode(prompt.tolist(), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt.tolist(), *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


class StopStrings:
    """The `stop` of a `Request` that ends a row at the first token whose text completes one of `strings`.

    text_of: (row, its new tokens) -> their text.
    """

    def __init__(self, text_of: Callable[[int, list[int]], str], strings: str | Sequence[str] | None) -> None:
        self.text_of = text_of
        self.strings = [strings] if isinstance(strings, str) else list(strings or ())
        if any(not string for string in self.strings):
            raise ValueError("stop string '' is empty: it would end every row before it begins")

    def __call__(self, row: int, new: list[int]) -> int | None:
        def stopped(n: int) -> bool:
            text = self.text_of(row, new[:n])
            return any(string in text for string in self.strings)

        if not self.strings or not stopped(len(new)):
            return None
        return next(n for n in range(1, len(new) + 1) if stopped(n))

    def cut(self, text: str) -> str:
        """The text before its first stop string."""
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]


def check_room(prompts: Sequence[Tensor], context_length: int | None) -> None:
    """Raise ValueError for a prompt that fills the model's context."""
    for ids in prompts:
        if context_length is not None and len(ids) >= context_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens leaves no room in the model's context of {context_length}: shorten it"
            )


def warn_of_cuts(prompts: Sequence[Tensor], sequences: Tensor, num_new: Sequence[int], request: Request) -> None:
    """Warn of a row that ended where the model's context does, before what was asked for.

    sequences: (rows, length), prompts included. num_new: new tokens of each row.
    """
    for row, (ids, number) in enumerate(zip(prompts, num_new, strict=True)):
        room = request.limit(len(ids))
        if number < room or room == request.max_new_tokens:
            continue
        if request.kept(row, sequences[row, len(ids) : len(ids) + number].tolist()) is None:
            warn(
                f"max_new_tokens={request.max_new_tokens} does not fit: the model's context of "
                f"{request.context_length} has room for {room} behind a prompt of {len(ids)}, and the text is cut there"
            )
            return
