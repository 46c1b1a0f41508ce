r"""Long texts to token ids in pieces, so that memory does not grow with a text's length, where that gives the same ids.

A tokenizer's own record of a text takes hundreds of bytes a token. Ids of pieces, one after another, are the ids of the
whole text if each cut lies between a letter and white space, and one of two things holds there:

- The pre-tokenizer splits at every such place. Its regular expressions are known ones: no match holds a letter before
  white space, so that a match ends there; none looks back, so that what follows is read as if the text began there; and
  none looks further ahead than behind white space, so that what precedes is read as if the text ended there. What
  splits single characters by kind (digits, punctuation) does not matter.
- There is no pre-tokenizer, and the model merges pairs (BPE over the whole text, as SentencePiece's). Then a token that
  reached over the cut would hold the letter before a space, and no token of the vocabulary does. Merges on the left do
  not matter to those on the right.

Normalisers must be none, NFC (white space composes with nothing), or write spaces as `▁`; one that also begins the text
with `▁` puts it in place of the space at which it was cut. All else is tokenised whole, and a warning says so.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from typing import Any

import numpy as np

from unmask.data.plain_text import encode, num_added_after
from unmask.data.token_bytes import bytes_of_tokens
from unmask.progress import warn

LONG, PIECE, _GROUP = 1 << 17, 1 << 16, 16
"""Characters of a text that is cut, and of a piece; pieces that are tokenised at a time."""

_LETTER = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01bf\u0400-\u0481\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
"""Letters of every version of Unicode, upper case, lower case or without case: what \\p{L} is must not change."""
_NEWLINE_TOO = " \\n"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_WORDS = [
    {r" ?\p{L}+"},
    {rf"{_BEFORE}\p{{L}}+"},
    {rf"{_BEFORE}+\p{{L}}+"},
    {rf"{_BEFORE}[\p{{L}}\p{{M}}]+"},
    {rf"{_BEFORE}{_UPPER}*{_LOWER}+", rf"{_BEFORE}{_UPPER}+{_LOWER}*"},
    {rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?", rf"{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"},
]
"""Alternatives of a pre-tokenizer, each set of which reads every letter, so that none lies between matches."""

_OTHERS = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTIONS, r"'(?i:[sdmt]|ll|ve|re)", r"(?i:'[sdmt]|'ll|'ve|'re)",
    r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}{1}", "[0-9][0-9][0-9]", "[0-9]",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", "[\r\n]", r"[\r\n]",
}  # fmt: skip
"""Further alternatives: none matches a letter before white space, looks back, or looks ahead but from white space."""


@dataclass(frozen=True)
class Cuts:
    """Where texts may be cut. place: the character before a cut and, unread, the one after it, and one more.

    drops_space: the next piece begins after the space, since the tokenizer begins every text with one.
    """

    place: re.Pattern[str]
    drops_space: bool

    def pieces(self, text: str) -> Iterator[str]:
        """The text in pieces of `PIECE` characters, or longer ones where no cut is possible."""
        start = 0
        while (found := self.place.search(text, start + PIECE)) is not None:
            yield text[start : found.end()]
            start = found.end() + self.drops_space
        yield text[start:]


def long_ids(tokenizer: Any, text: str, end_token_id: int | None = None) -> np.ndarray:
    """Token ids of a long text, exactly `tokenizer(text)`: int32 (length,).

    Unless it is None, the end token follows, in place of what the tokenizer puts after every text.
    """
    joined = BytesIO()  # grows without a copy
    for ids, _ in _read(tokenizer, text, spelled=False):
        joined.write(ids.data)
    if end_token_id is not None:
        joined.seek(-4 * num_added_after(tokenizer), SEEK_END)
        joined.write(np.asarray([end_token_id], dtype=np.int32).data)
        joined.truncate()
    return np.frombuffer(joined.getbuffer(), dtype=np.int32)


def long_ids_and_bytes(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a long text, and the UTF-8 bytes that each token spells: int32 (length,) both."""
    ids, num_bytes = zip(*_read(tokenizer, text, spelled=True), strict=True)
    return np.concatenate(ids), np.concatenate(num_bytes)


def _read(tokenizer: Any, text: str, *, spelled: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, bytes that each spells) of stretches of a text; no bytes unless `spelled`."""
    cuts = cuts_of(tokenizer)
    if isinstance(cuts, str):
        _warn(len(text), cuts)
        yield from _stretches(tokenizer, [text], spelled, add_special_tokens=True)
        return
    before, after = (np.asarray(ids, dtype=np.int32) for ids in _around(tokenizer))
    yield before, np.zeros_like(before)
    after_cut = False
    for group in _groups(cuts.pieces(text)):
        longest = max(map(len, group))
        if longest > 64 * PIECE:
            _warn(longest, "it has no end of a word at which it may be cut")
        for ids, num_bytes in _stretches(tokenizer, group, spelled, add_special_tokens=False):
            if spelled and cuts.drops_space and after_cut:  # the first token spells the space too
                num_bytes[0] += 1
            yield ids, num_bytes
            after_cut = True
    yield after, np.zeros_like(after)


def _stretches(
    tokenizer: Any, texts: list[str], spelled: bool, *, add_special_tokens: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, bytes) of each text."""
    has_offsets = spelled and tokenizer.is_fast
    encoded = encode(tokenizer, texts, add_special_tokens=add_special_tokens, return_offsets_mapping=has_offsets)
    rows = encoded["input_ids"]
    sizes: Any = bytes_of_tokens(tokenizer, texts, rows, encoded.get("offset_mapping")) if spelled else [[]] * len(rows)
    for ids, num_bytes in zip(rows, sizes, strict=True):
        yield np.asarray(ids, dtype=np.int32), np.asarray(num_bytes, dtype=np.int32)


def _warn(characters: int, reason: str) -> None:
    warn(
        f"a text of {characters} characters is tokenised in one piece, which takes some hundred bytes of memory a "
        f"character: {reason}"
    )


def _groups(pieces: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == _GROUP or len(piece) > 2 * PIECE:
            yield group
            group = []
    if group:
        yield group


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after those of every text."""
    whole, bare = encode(tokenizer, "a")["input_ids"], encode(tokenizer, "a", add_special_tokens=False)["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    raise AssertionError(f"{whole} does not hold {bare}")  # a template of tokens leaves those of the text as they are


_AROUND = (None, "ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing", "Sequence")
"""What puts tokens around those of a text, and nothing more."""

_KNOWN: weakref.WeakKeyDictionary[Any, tuple[int, Cuts | str]] = weakref.WeakKeyDictionary()
"""Cuts of tokenizers, with the size of the vocabulary for which they were found: tokens may be added."""


def cuts_of(tokenizer: Any) -> Cuts | str:
    """Where a tokenizer's texts may be cut, or why they may not be."""
    size, cuts = _KNOWN.get(tokenizer, (None, ""))
    if size != len(tokenizer):
        cuts = _find(tokenizer)
        _KNOWN[tokenizer] = len(tokenizer), cuts
    return cuts


def _find(tokenizer: Any) -> Cuts | str:
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return f"{type(tokenizer).__name__} is no tokenizer of the `tokenizers` library alone"
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = parts["model"], _steps(parts["pre_tokenizer"], "pretokenizers")
    normalizers = _steps(parts["normalizer"], "normalizers")
    if model.get("dropout"):
        return "it drops merges at random"
    if (parts["post_processor"] or {}).get("type") not in _AROUND:
        return f"what is done after it, {parts['post_processor']['type']}, is unknown"
    odd = [token["content"] for token in parts["added_tokens"] if _reaches_over(token)]
    if odd:
        return f"the added token {odd[0]!r} may reach over a cut"
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = {"type": "Prepend", "prepend": "▁"} in normalizers
    known = [[], [{"type": "NFC"}], [spaces], [{"type": "Prepend", "prepend": "▁"}, spaces]]
    if normalizers not in known:
        return f"its normaliser is unknown: {_types(normalizers)}"
    if prepends and any(not token["special"] for token in parts["added_tokens"]):
        return "it begins text after added tokens with a space"
    if normalizers in ([], [{"type": "NFC"}]) and any(map(_splits_words, steps)):
        unknown = [step for step in steps if not (_splits_words(step) or _splits_characters(step))]
        if unknown:
            return f"its pre-tokenizer is unknown: {_types(unknown)} {unknown[0].get('pattern', '')}"
        prefixed = any(step.get("add_prefix_space") or step["type"] == "Metaspace" for step in steps)
        return Cuts(re.compile(f"[{_LETTER}](?=[{' ' if prefixed else _NEWLINE_TOO}])"), False)
    return _cuts_of_merges(model, steps, bool(normalizers), prepends)


def _cuts_of_merges(model: dict[str, Any], steps: list[dict[str, Any]], spaces: bool, prepends: bool) -> Cuts | str:
    """Cuts where no token of a BPE model over the whole text can hold both sides."""
    whole = [{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}]
    metaspace = [step["type"] for step in steps] == ["Metaspace"] and steps[0]["replacement"] == "▁"
    if not ((spaces and steps in ([], whole)) or (metaspace and not spaces)):
        return f"its pre-tokenizer is unknown: {_types(steps)}"
    if model["type"] != "BPE" or model.get("ignore_merges") or model.get("continuing_subword_prefix"):
        return f"its model, {model['type']}, is no plain BPE"
    if model.get("end_of_word_suffix") or "▁" not in model["vocab"]:
        return "its vocabulary marks words in its own way"
    letters = {letter for letter in model["vocab"] if re.fullmatch(f"[{_LETTER}]", letter)}
    letters -= {pair[0] for token in model["vocab"] for pair in re.findall("(?=(.▁))", token, re.DOTALL)}
    if not letters:
        return "every letter has a token that holds it before a space"
    return Cuts(re.compile(f"[{''.join(sorted(letters))}](?= .)", re.DOTALL), prepends)


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, one after another."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for one in part[inner] for step in _steps(one, inner)]
    return [part]


def _types(steps: list[dict[str, Any]]) -> str:
    return ", ".join(step["type"] for step in steps) or "none"


def _reaches_over(token: dict[str, Any]) -> bool:
    """Whether an added token, which is found before all else, may hold a cut or look over it."""
    content = token["content"]
    inside = re.search(rf"[{_LETTER}][\s▁]", content) is not None
    return inside or (not token["special"] and (token["rstrip"] or token["single_word"]))


def _splits_words(step: dict[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer splits between every letter and the white space after it."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    if step["type"] == "Split":
        alternatives = _alternatives(step)
        return bool(alternatives) and any(words <= alternatives for words in _WORDS) and _splits_characters(step)
    return step["type"] in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")


def _splits_characters(step: dict[str, Any]) -> bool:
    """Whether what a step does left of a cut does not depend on what is right of it, and the other way round."""
    if step["type"] == "Split":
        alternatives = _alternatives(step)
        return bool(alternatives) and alternatives <= _OTHERS.union(*_WORDS)
    return step["type"] in ("ByteLevel", "Digits", "Punctuation")


def _alternatives(step: dict[str, Any]) -> set[str]:
    """The alternatives of a Split's regular expression; none for a Split of another kind."""
    pattern = step["pattern"].get("Regex")
    if pattern is None or step["invert"] or step["behavior"] != "Isolated":
        return set()
    found, depth, start, in_class = set(), 0, 0, False
    for at in re.finditer(r"\\.|[][()|]", pattern, re.DOTALL):
        mark = at[0]
        in_class = mark != "]" and (in_class or mark == "[")
        if not in_class and mark in "()":
            depth += 1 if mark == "(" else -1
        if mark == "|" and not in_class and depth == 0:
            found.add(pattern[start : at.start()])
            start = at.end()
    return found | {pattern[start:]}
