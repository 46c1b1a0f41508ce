"""Text to token ids, where text that spells a special token is ordinary text: chat templates alone make special tokens.

Every tokenizer call of the library is one of these two, in turns: a tokenizer keeps between calls how it reads
special tokens, so that two threads would change it under each other.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

_TURN = threading.Lock()
_FIRST = 0x100000
"""Characters from here on, of a plane for private use, stand for special tokens' texts inside a rendered template."""


def encode(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """`tokenizer(texts, **options)` with special tokens' texts split as other text is; its own begin token stays."""
    with _TURN:
        return tokenizer(texts, split_special_tokens=True, return_attention_mask=False, verbose=False, **options)


def ids_of(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The token ids of one text: see `encode`."""
    return list(encode(tokenizer, text, **options)["input_ids"])


def special_texts(tokenizer: Any) -> list[str]:
    """The texts of the tokenizer's special tokens, longer ones first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


def hide_special(tokenizer: Any, text: str) -> str:
    """The text with a private character in place of each special token's text, for a chat template to carry."""
    for i, special in enumerate(special_texts(tokenizer)):
        text = text.replace(special, chr(_FIRST + i))
    return text


def rendered_ids(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of what a chat template wrote: its special tokens are special, those that were hidden are text."""
    hidden = {chr(_FIRST + i): special for i, special in enumerate(special_texts(tokenizer))}
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"([{chr(_FIRST)}-{chr(_FIRST + len(hidden))}])", text)):
        if piece in hidden:
            ids += ids_of(tokenizer, hidden[piece], add_special_tokens=False)
        elif piece or i == 0:
            with _TURN:
                ids += tokenizer(piece, add_special_tokens=add_special_tokens and i == 0, split_special_tokens=False,
                                 verbose=False)["input_ids"]  # fmt: skip
    return ids
