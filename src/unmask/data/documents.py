"""Texts and supervised examples to documents of token ids, and to a corpus of them, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unmask.data.corpus import Corpus, Document, Writer
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
    added = 0 if end_token_id is None else num_added_after(tokenizer)
    tail = [] if end_token_id is None else [end_token_id]

    def ids_of(text: str) -> np.ndarray:
        if len(text) > LONG:
            return long_ids(tokenizer, text, end_token_id)
        ids = next(encoded)
        return np.asarray([*ids[: len(ids) - added], *tail], dtype=np.int32)

    return [ids_of(text) for text in texts]


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
    """Read and tokenise files or records into memory, in batches of documents, `max_documents` at most.

    progress: called with the bytes of text of each batch. note: called with lines about what is left out. Raises
    ValueError for a file without documents and, unless `skip_invalid` leaves them out, for invalid records and
    supervised examples longer than `max_length`.
    """
    encoder = Encoder(tokenizer, end_token_id, Faults(skip_invalid, note), max_length)
    writer = Writer.in_memory()
    found = encode_sources(sources, encoder, text_column, writer, max_documents=max_documents, progress=progress)
    return writer.corpus(found.fingerprint)


class Encoded(NamedTuple):
    """What was read: a digest of its content, its bytes of text; tokens and place of the longest supervised example."""

    fingerprint: str
    num_bytes: int
    longest_example: tuple[int, str] | None


def in_this_process(
    encoder: Encoder, batches: Iterator[list[Read]]
) -> Iterator[tuple[list[Read], list[list[Document]]]]:
    """Batches of examples, each with the documents of each example."""
    for batch in batches:
        yield batch, encoder(batch)


def encode_sources(
    sources: Sequence[Path | Records],
    encoder: Encoder,
    text_column: str,
    writer: Writer,
    *,
    max_documents: int | None = None,
    progress: Callable[[int], None] | None = None,
    encode: Callable[
        [Encoder, Iterator[list[Read]]], Iterator[tuple[list[Read], list[list[Document]]]]
    ] = in_this_process,
) -> Encoded:
    """Read and tokenise sources into a writer, see `load_corpus`. encode: who tokenises, see `workers`."""
    digest, whole, longest = hashlib.sha256(), 0, None
    for source in sources:
        before = writer.num_documents
        limit = None if max_documents is None else lambda: max_documents - writer.num_documents
        batches = _batches(read(source, text_column, encoder.faults), limit)
        for batch, made in encode(encoder, batches):
            num_bytes = 0
            for (place, example), documents in zip(batch, made, strict=True):
                size = sum(map(len, _content(example)))
                digest.update(size.to_bytes(8, "little"))
                for piece in _content(example):
                    digest.update(piece)
                num_bytes += size
                writer.add(documents)
                length = max((len(document.ids) for document in documents), default=0)
                if not isinstance(example, str) and length > (longest[0] if longest else 0):
                    longest = (length, str(place))
            whole += num_bytes
            if progress is not None:
                progress(num_bytes)
        if writer.num_documents == before and (max_documents is None or before < max_documents):
            named = file_name(source) if isinstance(source, Path) else str(source)
            raise ValueError(f"{named} holds no documents")
    return Encoded(digest.hexdigest()[:16], whole, longest)


BATCH, _BATCH_CHARACTERS = 256, 1 << 22
"""Examples that are tokenised at a time at most, and the characters after which there come no more."""


def _batches(examples: Iterator[Read], limit: Callable[[], int] | None) -> Iterator[list[Read]]:
    """The examples in batches. limit: how many documents are still wanted, asked before each batch."""
    while True:
        most = BATCH if limit is None else min(BATCH, limit())
        batch: list[Read] = []
        size = 0
        while len(batch) < most and size < _BATCH_CHARACTERS and (found := next(examples, None)) is not None:
            batch.append(found)
            size += len(found.example) if isinstance(found.example, str) else 0
        if not batch:
            return
        yield batch


def _content(example: Example) -> Iterator[bytes]:
    """What the fingerprint of a corpus is made of, in pieces: a text may be long."""
    if not isinstance(example, str):
        given = f", given={example.given}" if isinstance(example, Conversation) and example.given else ""
        example = repr(example) + given
    for start in range(0, len(example), _BATCH_CHARACTERS):
        yield example[start : start + _BATCH_CHARACTERS].encode()
