"""Text to token ids. Text that spells a special token is ordinary text: only a chat template makes special tokens.

Every call of a tokenizer in the library is made in this module under one lock: a tokenizer keeps the way it reads
special tokens from call to call, so that two threads would change it for each other.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from typing import Any

_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):  # a lock that another thread holds would stay locked in the new process
    os.register_at_fork(after_in_child=lambda: globals().update(_LOCK=threading.Lock()))
_ESCAPE, _FIRST = chr(0x100000), 0x100001
"""Private-use characters: _FIRST + i replaces the text of special token i while a template is rendered, and _ESCAPE
precedes such a character that the message itself contains."""


class SpecialTextError(ValueError):
    """A text spells a special token, and the tokenizer reads nothing else in it; the message names the text."""


_SURROGATE = re.compile("[\ud800-\udfff]")


def surrogate_problem(text: str) -> str | None:
    """What is wrong with a text that holds half of a character, which UTF-8 cannot write; None for a sound text.

    JSON escapes make such texts, and so do bytes that are no UTF-8 on a command line or standard input.
    """
    found = _SURROGATE.search(text)
    if found is None:
        return None
    return (
        f"the lone surrogate {found[0]!r} at character {found.start() + 1} of {_shown(text)}, which is half of a "
        "character (or a byte that is no UTF-8): take it out"
    )


def check_characters(texts: Sequence[str]) -> None:
    """Raise ValueError for a text that `surrogate_problem` finds fault with."""
    for text in texts:
        problem = surrogate_problem(text)
        if problem is not None:
            raise ValueError(f"a text holds {problem}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 70 else text[:67] + "...")


def encode(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """`tokenizer(texts, **options)`, with the texts of special tokens split like other text; a begin token is kept.

    Raises SpecialTextError if the tokenizer cannot split one (a tokenizer of whole words, for example), and ValueError
    for a text with a lone surrogate.
    """
    check_characters([texts] if isinstance(texts, str) else texts)
    options |= {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    with _LOCK:
        encoded = tokenizer(texts, **options)
    rows = [encoded["input_ids"]] if isinstance(texts, str) else encoded["input_ids"]
    _check_split(tokenizer, [texts] if isinstance(texts, str) else texts, rows, options.get("add_special_tokens", True))
    return encoded


def _check_split(tokenizer: Any, texts: Sequence[str], rows: Sequence[list[int]], adds_own: bool) -> None:
    specials = {tokenizer.convert_tokens_to_ids(text): text for text in special_texts(tokenizer)}
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id):
        specials.pop(tokenizer.unk_token_id, None)  # any unknown word becomes this token
    own: list[int] | None = None
    for text, ids in zip(texts, rows, strict=True):
        for token in specials.keys() & set(ids):
            if specials[token] not in text:
                continue
            if own is None:  # tokens that the tokenizer itself adds around a text
                with _LOCK:
                    own = list(tokenizer("", add_special_tokens=adds_own, verbose=False)["input_ids"])
            if ids.count(token) > own.count(token):
                raise SpecialTextError(
                    f"the text {_shown(text)} spells the special token {specials[token]!r}, which this tokenizer "
                    "cannot read as ordinary text: take it out"
                )


def ids_of(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of one text, see `encode`."""
    return list(encode(tokenizer, text, **options)["input_ids"])


def open_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text that goes on: without the end token that some tokenizers put after every text."""
    ids = ids_of(tokenizer, text, **options)
    return ids[: len(ids) - num_added_after(tokenizer)] if options.get("add_special_tokens", True) else ids


def num_added_after(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts after every text, usually 0 and at times an end token."""
    with _LOCK:
        encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    return next((i for i, added in enumerate(reversed(encoded["special_tokens_mask"])) if not added), 0)


def special_texts(tokenizer: Any) -> list[str]:
    """Texts of the tokenizer's special tokens, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


def hide_special(tokenizer: Any, value: Any) -> Any:
    """A message, or a part of one, with each special token's text replaced by a private character."""
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
    """A regular expression that matches one of the private characters of `count` special tokens."""
    return f"[{_ESCAPE}-{chr(_FIRST + count - 1)}]"


def rendered_ids(tokenizer: Any, text: str, *, add_special_tokens: bool = False, follows: bool = False) -> list[int]:
    """Token ids of a rendered chat template: its special tokens are special, those that `hide_special` hid are text.

    follows: other text comes before it, so that no space is put in front.
    """
    check_characters([text])
    specials = special_texts(tokenizer)
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"({_ESCAPE}?{_private(len(specials))})", text)):
        if i % 2:  # a hidden special text, or a private character that the message contained
            shown = piece[1:] if len(piece) > 1 else specials[ord(piece) - _FIRST]
            ids += following_ids(tokenizer, shown)
        elif i > 0 or follows:
            ids += following_ids(tokenizer, piece, split_special_tokens=False)
        else:
            options = {"add_special_tokens": add_special_tokens, "split_special_tokens": False, "verbose": False}
            with _LOCK:
                first = list(tokenizer(piece, **options)["input_ids"])
            ids += first[: len(first) - num_added_after(tokenizer)] if add_special_tokens else first
    return ids


def following_ids(tokenizer: Any, text: str, *, split_special_tokens: bool = True) -> list[int]:
    """Token ids of a text that follows another one: without the space that some tokenizers put before a first word."""

    def read(text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
        with _LOCK:
            ids = list(tokenizer(text, **options)["input_ids"])
        if split_special_tokens:
            _check_split(tokenizer, [text], [ids], False)
        return ids

    check_characters([text])
    if not text:
        return []
    for before in ("\n", "a", "."):  # one that does not join the text's first token
        line, whole = read(before), read(before + text)
        if line and whole[: len(line)] == line:
            return whole[len(line) :]
    return read(text)
