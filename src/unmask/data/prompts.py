"""Prompts to tokens, and new tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.data.plain_text import ids_of, rendered_ids
from unmask.data.supervised import apply_template

Prompts = str | Sequence[str] | Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]] | Tensor


def prompt_rows(tokenizer: Any, prompts: Prompts, attention_mask: Tensor | None, num_tokens: int) -> list[Tensor]:
    """The tokens of each prompt, (length,) int64, length possibly 0.

    prompts: a text, texts, the messages of a chat, several chats, or ids (rows, length) with their attention mask.
    num_tokens: size of the vocabulary. Raises ValueError for ids outside it, and without prompts.
    """
    if isinstance(prompts, Tensor):
        real = torch.ones_like(prompts) if attention_mask is None else attention_mask
        rows = [row[keep.bool()].to(torch.long) for row, keep in zip(prompts, real, strict=True)]
    else:
        items: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if items and isinstance(items[0], dict):
            items = [items]
        rows = [torch.tensor(_encode(tokenizer, item), dtype=torch.long) for item in items]
    if not rows:
        raise ValueError("prompts is empty: give at least one")
    for row in rows:
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < num_tokens:
            odd = next(int(i) for i in row if not 0 <= i < num_tokens)
            raise ValueError(f"prompt token id {odd} is outside the model's vocabulary of {num_tokens} tokens")
    return rows


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return ids_of(tokenizer, prompt)
    text = apply_template(tokenizer, prompt, tokenize=False, add_generation_prompt=True)
    return rendered_ids(tokenizer, text)


def new_text(tokenizer: Any, prompt: Tensor, new: Sequence[int]) -> str:
    """The text that `new` tokens add to that of the prompt.

    Both are decoded together, since the text of a token may depend on the token before it.
    """
    before = tokenizer.decode(prompt.tolist(), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt.tolist(), *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


class StopStrings:
    """The `stop` of a `Request` that ends a row at the first token whose text completes one of `strings`."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Tensor], strings: str | Sequence[str] | None) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.strings = [strings] if isinstance(strings, str) else list(strings or ())
        if any(not string for string in self.strings):
            raise ValueError("stop string '' is empty: it would end every row before it begins")

    def __call__(self, row: int, new: list[int]) -> int | None:
        def stopped(n: int) -> bool:
            text = new_text(self.tokenizer, self.prompts[row], new[:n])
            return any(string in text for string in self.strings)

        if not self.strings or not stopped(len(new)):
            return None
        return next(n for n in range(1, len(new) + 1) if stopped(n))

    def cut(self, text: str) -> str:
        """The text before its first stop string."""
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]
