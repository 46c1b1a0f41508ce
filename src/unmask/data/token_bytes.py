"""The UTF-8 bytes of a text that each of its tokens spells, for figures per byte.

A tokenizer's offsets say of a character that takes several tokens that each of them covers all of it, so bytes are
counted from what the tokens spell wherever that is the text, and offsets are asked only where it is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

Offsets = Sequence[tuple[int, int]]


def bytes_of_tokens(
    tokenizer: Any, texts: Sequence[str], rows: Sequence[Sequence[int]], offsets: Sequence[Offsets] | None
) -> list[list[int]]:
    """Bytes of each token of each text, in all those of the text; 0 for tokens that the tokenizer adds to it.

    rows: the ids of each text. offsets: the characters that each token covers; None from a tokenizer that has none.
    """
    spellings = _Spellings(tokenizer)
    return [
        spellings.count(text, ids, None if offsets is None else offsets[i])
        for i, (text, ids) in enumerate(zip(texts, rows, strict=True))
    ]


class _Spellings:
    """What tokens spell, in the two ways that tokenizers write it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}
        self.own = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self.known: dict[int, tuple[bytes | None, bytes]] = {}

    def count(self, text: str, ids: Sequence[int], offsets: Offsets | None) -> list[int]:
        """The bytes of each token, by the way of writing that gives the text; by offsets if none does."""
        pairs = [self._spelled(token) for token in ids]
        whole = text.encode()
        for spelled in ([pair[0] for pair in pairs], [pair[1] for pair in pairs]):
            known = [piece for piece in spelled if piece is not None]
            if len(known) < len(spelled):
                continue
            if b"".join(known) == whole:
                return [len(piece) for piece in known]
            if b"".join(known) == b" " + whole:  # a space that the tokenizer puts before every text
                first = next(i for i, piece in enumerate(known) if piece)
                return [len(piece) - (i == first) for i, piece in enumerate(known)]
        if offsets is None:
            return _cut(
                [len(self.tokenizer.decode([token], skip_special_tokens=True).encode()) for token in ids], whole
            )
        return _by_offsets(text, offsets, [[len(piece or b"") for piece in pair] for pair in pairs])

    def _spelled(self, token: int) -> tuple[bytes | None, bytes]:
        """The bytes of a token, written in the alphabet of bytes (None if it is not) and as text."""
        if token not in self.known:
            self.known[token] = self._read(token)
        return self.known[token]

    def _read(self, token: int) -> tuple[bytes | None, bytes]:
        if token in self.own:
            return b"", b""
        if token in self.added:
            return self.added[token].encode(), self.added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token) or ""
        one = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        as_text = bytes([int(one[1], 16)]) if one else piece.replace("▁", " ").encode()
        return (bytes(_ALPHABET[c] for c in piece) if all(c in _ALPHABET for c in piece) else None), as_text


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's): itself if it prints."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _alphabet()


def _by_offsets(text: str, offsets: Offsets, lengths: Sequence[Sequence[int]]) -> list[int]:
    """The bytes of the characters that each token covers; tokens that cover one together share it by what they spell.

    lengths: of each token, its bytes in both ways of writing. A character that no token covers is the next token's if
    it is white space, which some offsets leave out; otherwise that of the token before, which it was joined with.
    """
    covering = [i for i, (start, end) in enumerate(offsets) if end > start]
    counts = [0] * len(offsets)
    if not covering:
        return _cut(counts, text.encode())
    reached = list(accumulate((offsets[i][1] for i in covering), max))
    firsts = [0, *(n for n in range(1, len(covering)) if offsets[covering[n]][0] >= reached[n - 1])]
    bounds = [0]
    for n in firsts[1:]:
        gap = text[reached[n - 1] : offsets[covering[n]][0]]
        bounds.append(reached[n - 1] + len(re.match(r"\S*", gap)[0]))  # type: ignore[index]
    for (n, after), (start, end) in zip(
        pairwise([*firsts, len(covering)]), pairwise([*bounds, len(text)]), strict=True
    ):
        group = covering[n:after]
        whole = text[start:end].encode()
        ways = [[lengths[i][way] for i in group] for way in (0, 1)]
        best = next((way for way in ways if sum(way) == len(whole)), ways[1])
        for i, size in zip(group, _cut(best, whole), strict=True):
            counts[i] = size
    return counts


def _cut(lengths: list[int], whole: bytes) -> list[int]:
    """The lengths, made to sum to that of `whole`: none goes past its end, and the last takes what is left."""
    left = len(whole)
    cut = []
    for length in lengths[:-1]:
        cut.append(min(length, left))
        left -= cut[-1]
    return [*cut, left] if lengths else []
