"""Texts and supervised examples to documents of token ids, and a corpus of them in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unmask.core.noise import seed_for
from unmask.data.pieces import LONG, long_ids
from unmask.data.plain_text import SpecialTextError, encode, num_added_after
from unmask.data.readers import Faults, Place, Read, Records, file_name, read
from unmask.data.supervised import Conversation, Example, InvalidRecordError, encode_example

# --- texts -> token ids


def tokenize(tokenizer: Any, texts: Sequence[str], end_token_id: int | None = None) -> list[np.ndarray]:
    """Token ids of each text, exactly `tokenizer(text)`, followed by the end token unless it is None.

    The end token takes the place of one that the tokenizer itself puts after every text.
    """
    short = [text for text in texts if len(text) <= LONG]
    encoded = iter(encode(tokenizer, short)["input_ids"] if short else [])
    rows = (np.asarray(next(encoded) if len(t) <= LONG else long_ids(tokenizer, t), dtype=np.int32) for t in texts)
    if end_token_id is None:
        return list(rows)
    added, tail = num_added_after(tokenizer), np.asarray([end_token_id], dtype=np.int32)
    return [np.concatenate([ids[: len(ids) - added], tail]) for ids in rows]


class Document(NamedTuple):
    """Token ids (length,), and bool like ids, True on tokens that are learnt; None learns all (a text)."""

    ids: np.ndarray
    loss_mask: np.ndarray | None = None

    def after(self, offset: int) -> Document:
        """The document from token `offset` on."""
        return Document(self.ids[offset:], None if self.loss_mask is None else self.loss_mask[offset:])


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents in memory: document i is tokens[offsets[i] : offsets[i + 1]], tokens int32, offsets int64.

    fingerprint: a digest of the content.
    loss_mask: bool like tokens, False on tokens that are never in a loss (prompts); None where all are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str
    loss_mask: np.ndarray | None = None

    @classmethod
    def of(cls, documents: Sequence[Document], fingerprint: str) -> Corpus:
        """The documents in one array."""
        loss_mask = None
        if any(document.loss_mask is not None for document in documents):
            loss_mask = np.concatenate([np.ones(len(ids), bool) if mask is None else mask for ids, mask in documents])
        offsets = np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64)
        return cls(np.concatenate([document.ids for document in documents]), offsets, fingerprint, loss_mask)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def document(self, index: int) -> Document:
        """Document i; one whose tokens are all learnt is a text, without a mask."""
        if self.loss_mask is None:
            return Document(self[index])
        loss_mask = self.loss_mask[self.offsets[index] : self.offsets[index + 1]]
        return Document(self[index], None if loss_mask.all() else loss_mask)

    def split(self, held_out: int) -> tuple[Corpus, Corpus]:
        """All but the last `held_out` documents, and the last `held_out`."""
        cut = len(self) - held_out
        end = int(self.offsets[cut])
        first, last = (None, None) if self.loss_mask is None else (self.loss_mask[:end], self.loss_mask[end:])
        return (
            Corpus(self.tokens[:end], self.offsets[: cut + 1], self.fingerprint, first),
            Corpus(self.tokens[end:], self.offsets[cut:] - end, self.fingerprint, last),
        )

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[list[Document]]:
        """The documents of an epoch, each alone, in a random order of its own, from number `start` in that order."""
        # numpy reads a list as 32-bit words, so [2^32, 0] would equal [0, 1], and accepts no negative number.
        key = [seed, epoch] if 0 <= seed < 2**32 else seed_for(("documents", seed, epoch))
        order = np.random.default_rng(key).permutation(len(self))
        for index in order[start:]:
            yield [self.document(index)]

    def tokens_per_row(self, max_length: int) -> float:
        """Mean number of tokens in a packed row, below `max_length` where a supervised example did not fit its rest."""
        if self.loss_mask is None:
            return max_length
        rows = column = 0
        for index in range(len(self)):
            ids, loss_mask = self.document(index)
            if loss_mask is not None and 0 < max_length - column < len(ids):
                rows, column = rows + 1, 0
            more, column = divmod(column + len(ids), max_length)
            rows += more
        return self.num_tokens / (rows + (column > 0))

    def filled_up(self, max_length: int, token: int) -> Corpus:
        """Every document lengthened to `max_length` with `token`, which is learnt, as in DiffuLLaMA's released code."""
        documents = [self.document(index) for index in range(len(self))]
        tokens = np.full((len(self), max_length), token, dtype=self.tokens.dtype)
        learnt = np.ones((len(self), max_length), dtype=bool)
        for row, (ids, loss_mask) in enumerate(documents):
            tokens[row, : len(ids)] = ids
            if loss_mask is not None:
                learnt[row, : len(ids)] = loss_mask
        offsets = np.arange(len(self) + 1, dtype=np.int64) * max_length
        return Corpus(tokens.reshape(-1), offsets, self.fingerprint, learnt.reshape(-1))


@dataclass(frozen=True)
class Encoder:
    """Turns what is read into documents.

    end_token_id: closes every document, unless None. faults: what becomes of an example that makes none: one that
    spells a special token which the tokenizer cannot split, or a supervised one of more than `max_length` tokens.
    """

    tokenizer: Any
    end_token_id: int | None
    faults: Faults
    max_length: int | None = None

    def __call__(self, batch: Sequence[Read]) -> list[list[Document]]:
        """The documents of each example: one, none if it is left out, several for some conversations."""
        texts = iter(self._texts([(place, example) for place, example in batch if isinstance(example, str)]))
        return [
            next(texts) if isinstance(example, str) else self._supervised(place, example) for place, example in batch
        ]

    def _texts(self, texts: list[tuple[Place, str]]) -> list[list[Document]]:
        """The document of each text; if there is a text that makes none, halves of the texts by themselves."""
        try:
            return [[Document(ids)] for ids in tokenize(self.tokenizer, [t for _, t in texts], self.end_token_id)]
        except SpecialTextError as error:
            if len(texts) == 1:
                self.faults(texts[0][0], str(error))
                return [[]]
        half = len(texts) // 2
        return self._texts(texts[:half]) + self._texts(texts[half:])

    def _supervised(self, place: Place, example: Any) -> list[Document]:
        try:
            encoded = encode_example(self.tokenizer, example, self.end_token_id)
            for ids, loss_mask in encoded:
                if self.max_length is not None and len(ids) > self.max_length:
                    raise InvalidRecordError(f"makes {len(ids)} tokens: raise max_length={self.max_length}")
                if not any(loss_mask):
                    raise InvalidRecordError("has a completion without tokens")
        except (InvalidRecordError, SpecialTextError) as error:
            self.faults(place, f"the example {_shortened(repr(example))} {error}")
            return []
        return [Document(np.asarray(ids, dtype=np.int32), np.asarray(mask)) for ids, mask in encoded]


def _shortened(text: str, width: int = 70) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def load_corpus(
    sources: Sequence[Path | Records],
    tokenizer: Any,
    *,
    end_token_id: int | None = None,
    text_column: str = "text",
    skip_invalid: bool = False,
    max_length: int | None = None,
    max_documents: int | None = None,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Corpus:
    """Read and tokenise files or records, in batches of documents, `max_documents` at most.

    progress: called with the bytes of text of each batch. note: called with lines about what is left out. Raises
    ValueError for a file without documents and, unless `skip_invalid` leaves them out, for invalid records and
    supervised examples longer than `max_length`.
    """
    faults, digest = Faults(skip_invalid, note), hashlib.sha256()
    encoder = Encoder(tokenizer, end_token_id, faults, max_length)
    documents: list[Document] = []
    for source in sources:
        before = len(documents)
        examples = read(source, text_column, faults)
        while batch := _batch(examples, None if max_documents is None else max_documents - len(documents)):
            num_bytes = 0
            for _, example in batch:
                content = _content(example)
                digest.update(len(content).to_bytes(8, "little") + content)
                num_bytes += len(content)
            documents += [document for made in encoder(batch) for document in made]
            if progress is not None:
                progress(num_bytes)
        if len(documents) == before and (max_documents is None or before < max_documents):
            named = file_name(source) if isinstance(source, Path) else str(source)
            raise ValueError(f"{named} holds no documents")
    return Corpus.of(documents, digest.hexdigest()[:16])


BATCH, _BATCH_CHARACTERS = 256, 1 << 22
"""Examples that are tokenised at a time at most, and the characters after which there come no more."""


def _batch(examples: Iterator[Read], limit: int | None) -> list[Read]:
    """The next examples, `limit` at most; none at the end."""
    batch: list[Read] = []
    size = 0
    limit = BATCH if limit is None else min(BATCH, limit)
    while len(batch) < limit and size < _BATCH_CHARACTERS and (found := next(examples, None)) is not None:
        batch.append(found)
        size += len(found.example) if isinstance(found.example, str) else 0
    return batch


def _content(example: Example) -> bytes:
    """What the fingerprint of a corpus is made of."""
    if isinstance(example, str):
        return example.encode()
    given = f", given={example.given}" if isinstance(example, Conversation) and example.given else ""
    return (repr(example) + given).encode()
