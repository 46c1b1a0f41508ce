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
_ESCAPE, _FIRST = chr(0x100000), 0x100001
"""Characters of a plane for private use: from the second on they stand for special tokens' texts inside a rendered
template, and the first stands before one of them that a message itself holds."""


class SpecialTextError(ValueError):
    """A text spells a special token, and the tokenizer reads nothing else in it; the message names the text."""


def encode(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """`tokenizer(texts, **options)` with special tokens' texts split as other text is; its own begin token stays.

    A tokenizer that cannot split one (whole words, for example) is a SpecialTextError.
    """
    options |= {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    with _TURN:
        encoded = tokenizer(texts, **options)
    rows = [encoded["input_ids"]] if isinstance(texts, str) else encoded["input_ids"]
    _check_split(tokenizer, [texts] if isinstance(texts, str) else texts, rows, options.get("add_special_tokens", True))
    return encoded


def _check_split(tokenizer: Any, texts: Sequence[str], rows: Sequence[list[int]], adds_own: bool) -> None:
    specials = {tokenizer.convert_tokens_to_ids(text): text for text in special_texts(tokenizer)}
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id):
        specials.pop(tokenizer.unk_token_id, None)  # that stands for any word that is not known
    own: list[int] | None = None
    for text, ids in zip(texts, rows, strict=True):
        for token in specials.keys() & set(ids):
            if specials[token] not in text:
                continue
            if own is None:  # those that the tokenizer itself puts around a text
                with _TURN:
                    own = list(tokenizer("", add_special_tokens=adds_own, verbose=False)["input_ids"])
            if ids.count(token) > own.count(token):
                shown = text if len(text) <= 70 else text[:67] + "..."
                raise SpecialTextError(
                    f"the text {shown!r} spells the special token {specials[token]!r}, which this tokenizer cannot "
                    "read as ordinary text: take it out"
                )


def ids_of(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The token ids of one text: see `encode`."""
    return list(encode(tokenizer, text, **options)["input_ids"])


def special_texts(tokenizer: Any) -> list[str]:
    """The texts of the tokenizer's special tokens, longer ones first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


def hide_special(tokenizer: Any, value: Any) -> Any:
    """A message, or a part of one, with a private character for each special token's text, for a template to carry."""
    if isinstance(value, dict):
        return {key: hide_special(tokenizer, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hide_special(tokenizer, part) for part in value]
    if not isinstance(value, str):
        return value
    specials = special_texts(tokenizer)
    text = re.sub(_private(len(specials)), lambda found: _ESCAPE + found[0], value)
    for i, special in enumerate(specials):
        text = text.replace(special, chr(_FIRST + i))
    return text


def _private(count: int) -> str:
    """A regular expression for any of the private characters that `count` special tokens need."""
    return f"[{_ESCAPE}-{chr(_FIRST + count - 1)}]"


def rendered_ids(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of what a chat template wrote: its special tokens are special, those that were hidden are text."""
    specials = special_texts(tokenizer)
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"({_ESCAPE}?{_private(len(specials))})", text)):
        if i % 2:  # hidden, or a private character of the message's own
            shown = piece[1:] if len(piece) > 1 else specials[ord(piece) - _FIRST]
            ids += _within(tokenizer, shown, split_special_tokens=True)
        elif i == 0:
            options = {"add_special_tokens": add_special_tokens, "split_special_tokens": False, "verbose": False}
            with _TURN:
                ids += tokenizer(piece, **options)["input_ids"]
        elif piece:
            ids += _within(tokenizer, piece, split_special_tokens=False)
    return ids


def _within(tokenizer: Any, text: str, *, split_special_tokens: bool) -> list[int]:
    """Token ids of a text that goes on from another: some tokenizers put a space in front of a text's first word."""

    def read(text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
        with _TURN:
            ids = list(tokenizer(text, **options)["input_ids"])
        if split_special_tokens:
            _check_split(tokenizer, [text], [ids], False)
        return ids

    line, whole = read("\n"), read("\n" + text)
    return whole[len(line) :] if whole[: len(line)] == line else read(text)
