"""Tokenised documents and the order in which they are read: a corpus, in memory or mapped from disk.

What a pass over a corpus holds does not grow with it: documents are slices of arrays, their order is a function of
(seed, epoch), and pages of a mapped file that were read are given back.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from unmask.core.noise import seed_for


class Document(NamedTuple):
    """Token ids (length,), and bool like ids, True on tokens that are learnt; None learns all (a text)."""

    ids: np.ndarray
    loss_mask: np.ndarray | None = None

    def after(self, offset: int) -> Document:
        """The document from token `offset` on."""
        return Document(self.ids[offset:], None if self.loss_mask is None else self.loss_mask[offset:])


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents: document i is tokens[offsets[i] : offsets[i + 1]], tokens int32, offsets int64.

    fingerprint: a digest of the content. loss_mask: bool like tokens, False on tokens that are never in a loss
    (prompts); None where all are. filled: (length, token): every document is lengthened to `length` with `token`. maps:
    the files that the arrays are mapped from, none in memory.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str
    loss_mask: np.ndarray | None = None
    filled: tuple[int, int] | None = None
    maps: tuple[mmap.mmap, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, documents: Sequence[Document], fingerprint: str) -> Corpus:
        """The documents in one array."""
        writer = Writer.in_memory()
        writer.add(documents)
        return writer.corpus(fingerprint)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) if self.filled is None else len(self) * self.filled[0]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def document(self, index: int) -> Document:
        """Document i; one whose tokens are all learnt is a text, without a mask, unless it is filled up."""
        ids, loss_mask = self[index], None
        if self.loss_mask is not None:
            loss_mask = self.loss_mask[self.offsets[index] : self.offsets[index + 1]]
        if self.filled is not None:
            ids, loss_mask = _filled_up(ids, loss_mask, *self.filled)
        return Document(ids, None if loss_mask is None or loss_mask.all() else loss_mask)

    def split(self, held_out: int) -> tuple[Corpus, Corpus]:
        """All but the last `held_out` documents, and the last `held_out`."""
        cut = len(self) - held_out
        end = int(self.offsets[cut])
        first, last = (None, None) if self.loss_mask is None else (self.loss_mask[:end], self.loss_mask[end:])
        return (
            replace(self, tokens=self.tokens[:end], offsets=self.offsets[: cut + 1], loss_mask=first),
            replace(self, tokens=self.tokens[end:], offsets=self.offsets[cut:] - end, loss_mask=last),
        )

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[list[Document]]:
        """The documents of an epoch, each alone, in a random order of its own, from number `start` in that order."""
        for index in order(len(self), seed, epoch, start):
            yield [self.document(index)]

    def forget(self) -> None:
        """Give back the pages of mapped files that were read; they are read again when they are needed."""
        for mapped in self.maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def tokens_per_row(self, max_length: int) -> float:
        """Mean number of tokens in a packed row, below `max_length` where a supervised example did not fit its rest.

        Of a large corpus, that of its first documents.
        """
        if self.loss_mask is None:
            return max_length
        rows = column = seen = 0
        for index in range(min(len(self), _COUNTED)):
            ids, loss_mask = self.document(index)
            seen += len(ids)
            if loss_mask is not None and 0 < max_length - column < len(ids):
                rows, column = rows + 1, 0
            more, column = divmod(column + len(ids), max_length)
            rows += more
            if index % 1024 == 0:
                self.forget()
        return seen / (rows + (column > 0))

    def longest(self) -> int:
        """Tokens of the longest document."""
        if self.filled is not None:
            return self.filled[0]
        starts = range(0, len(self), _COUNTED)
        return max(int(np.diff(self.offsets[start : start + _COUNTED + 1]).max()) for start in starts)

    def filled_up(self, max_length: int, token: int) -> Corpus:
        """Every document lengthened to `max_length` with `token`, which is learnt, as in DiffuLLaMA's released code."""
        return replace(self, filled=(max_length, token))


_COUNTED = 1 << 17
"""Documents of a corpus whose lengths are looked at, at a time or at all."""


def _filled_up(
    ids: np.ndarray, loss_mask: np.ndarray | None, length: int, token: int
) -> tuple[np.ndarray, np.ndarray | None]:
    rest = length - len(ids)
    mask = None if loss_mask is None else np.concatenate([loss_mask, np.ones(rest, dtype=bool)])
    return np.concatenate([ids, np.full(rest, token, dtype=ids.dtype)]), mask


# --- the order of an epoch


_SHUFFLED, _CHUNK = 1 << 22, 1 << 12
"""Documents up to which an epoch's order is an array; places of a longer order that are computed at a time."""


def order(size: int, seed: int, epoch: int, start: int = 0) -> Iterator[int]:
    """The numbers 0 to size - 1 in a random order, a function of (seed, epoch), from number `start` in it on."""
    if size > _SHUFFLED:
        place = shuffled(size, ("documents", seed, epoch))
        for first in range(start, size, _CHUNK):
            yield from place(np.arange(first, min(first + _CHUNK, size))).tolist()
        return
    # numpy reads a list as 32-bit words, so [2^32, 0] would equal [0, 1], and accepts no negative number.
    key = [seed, epoch] if 0 <= seed < 2**32 else seed_for(("documents", seed, epoch))
    indices = np.arange(size, dtype=np.uint32)
    np.random.default_rng(key).shuffle(indices)
    for at in range(start, size):
        yield int(indices[at])


def shuffled(size: int, key: tuple[Any, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """A random order of 0 to size - 1 that is computed for any of its places, int64 to int64, without an array of all.

    A Feistel network of four rounds permutes the smallest power of 4 that holds the numbers; where it leaves them it is
    applied again (cycle walking: Black and Rogaway 2002, Ciphers with arbitrary finite domains).
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(seed_for((*key, turn)) & 0xFFFFFFFFFFFFFFFF) for turn in range(4)]

    def once(numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> half, numbers & low
        for turn in keys:
            left, right = right, left ^ (_mixed(right ^ turn) & low)
        return (left << half) | right

    def place(numbers: np.ndarray) -> np.ndarray:
        found = once(numbers.astype(np.uint64))
        while (outside := found >= size).any():
            found[outside] = once(found[outside])
        return found.astype(np.int64)

    return place


def _mixed(x: np.ndarray) -> np.ndarray:
    """The bits of 64-bit numbers, mixed (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- writing


class Writer:
    """Writes documents, as they come, into files of plain numbers; nothing of them is kept.

    files: for tokens (int32), offsets (int64) and loss marks (bool), which stay empty until a token is not learnt.
    """

    def __init__(self, tokens: BinaryIO, offsets: BinaryIO, marks: BinaryIO) -> None:
        self.tokens, self.offsets, self.marks = tokens, offsets, marks
        self.num_documents = self.num_tokens = 0
        self.has_marks = False
        offsets.write(np.zeros(1, dtype=np.int64).tobytes())

    @classmethod
    def in_memory(cls) -> Writer:
        """One whose files are in memory."""
        return cls(BytesIO(), BytesIO(), BytesIO())

    def add(self, documents: Sequence[Document]) -> None:
        """Append documents."""
        if not documents:
            return
        lengths = [len(document.ids) for document in documents]
        ends = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
        self.offsets.write(ends.tobytes())
        for ids, loss_mask in documents:
            if loss_mask is not None and not self.has_marks:
                self._mark_all_before()
            self.tokens.write(np.ascontiguousarray(ids, dtype=np.int32).data)
            if self.has_marks:
                self.marks.write((b"\1" * len(ids)) if loss_mask is None else loss_mask.astype(bool).tobytes())
            self.num_tokens += len(ids)
        self.num_documents += len(documents)

    def _mark_all_before(self) -> None:
        """The tokens up to here are learnt."""
        self.has_marks, left = True, self.num_tokens
        while left:
            self.marks.write(b"\1" * min(left, 1 << 20))
            left -= min(left, 1 << 20)

    def corpus(self, fingerprint: str) -> Corpus:
        """What was written, from files in memory."""
        assert isinstance(self.tokens, BytesIO)
        assert isinstance(self.offsets, BytesIO)
        assert isinstance(self.marks, BytesIO)
        marks = np.frombuffer(self.marks.getbuffer(), dtype=bool) if self.has_marks else None
        tokens = np.frombuffer(self.tokens.getbuffer(), dtype=np.int32)
        return Corpus(tokens, np.frombuffer(self.offsets.getbuffer(), dtype=np.int64), fingerprint, marks)
