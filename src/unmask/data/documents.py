"""Text files and hub data sets to documents of token ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unmask.core.noise import seed_for
from unmask.data.plain_text import SpecialTextError, encode
from unmask.data.supervised import (
    COMPLETION,
    MESSAGES,
    PROMPT,
    Example,
    InvalidRecordError,
    encode_example,
    missing_column,
    read_record,
)

SEPARATOR = b"<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")


# --- files -> texts and examples


def read_documents(path: Path, *, text_column: str = "text", skip_invalid: bool = False) -> Iterator[str]:
    """The texts of a file; ValueError if it holds supervised examples."""
    for example in read_examples(path, text_column=text_column, skip_invalid=skip_invalid):
        if not isinstance(example, str):
            raise ValueError(
                f"data file {str(path)!r} holds supervised examples (prompt and completion, or messages) "
                "where plain text is needed: choose a column with text_column=NAME, or give another file"
            )
        yield example


def read_examples(path: Path, *, text_column: str = "text", skip_invalid: bool = False) -> Iterator[Example]:
    """Texts and supervised examples of one .txt, .jsonl or .parquet file; the columns of a record decide which it is.

    White space around a text is stripped, and empty texts are left out. Text that is not UTF-8, a broken JSON line or a
    missing column raises a ValueError that names file and line; with `skip_invalid` that document is left out instead.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for example in readers[path.suffix](path, text_column, skip_invalid):
        if isinstance(example, str):
            example = example.strip()
            if not example:
                continue
        yield example


def _read_txt(path: Path, _column: str, skip_invalid: bool) -> Iterator[str]:
    line = 1
    for raw in path.read_bytes().split(SEPARATOR):
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            if not skip_invalid:
                raise _invalid(
                    path, line + raw.count(b"\n", 0, error.start), f"is not UTF-8 ({error.reason})"
                ) from None
        line += raw.count(b"\n")


def _read_jsonl(path: Path, column: str, skip_invalid: bool) -> Iterator[Example]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            problem = ""
            try:
                record = json.loads(raw.decode())
                if isinstance(record, dict):
                    yield read_record(record, column)
                    continue
                problem = f"is no object with a text column {column!r}, found {type(record).__name__}"
            except InvalidRecordError as error:
                problem = str(error)
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8 ({error.reason})"
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg} at column {error.colno})"
            if not skip_invalid:
                raise _invalid(path, number, problem)


def _read_parquet(path: Path, column: str, skip_invalid: bool) -> Iterator[Example]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data file {str(path)!r} is not parquet: {str(error).splitlines()[0]}") from None
    names = file.schema_arrow.names
    columns = [name for name in (column, PROMPT, COMPLETION, MESSAGES) if name in names]
    if not columns:
        raise ValueError(f"data file {str(path)!r} {missing_column(column, names)}")
    number = 0
    for batch in file.iter_batches(columns=columns, batch_size=1024):
        for record in batch.to_pylist():
            number += 1
            try:
                yield read_record(record, column)
            except InvalidRecordError as error:
                if not skip_invalid:
                    raise _invalid(path, number, str(error)) from None


def _invalid(path: Path, line: int, problem: str) -> ValueError:
    return ValueError(
        f"data file {str(path)!r}, line {line}: {problem}; correct it, or keep the rest with skip_invalid=true"
    )


def find_files(sources: Sequence[str | Path]) -> list[Path] | None:
    """The data files among files and folders, those of a folder sorted; None if the only source is a hub id."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if not str(source):
            raise ValueError(f"data source {str(source)!r} is empty: give a file, a folder or a hub id")
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise ValueError(f"data folder {str(source)!r} holds no {', '.join(SUFFIXES)} file")
            files += found
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise ValueError(f"data file {str(source)!r} has an unknown type: use {', '.join(SUFFIXES)}")
            files.append(path)
        elif path.suffix in SUFFIXES or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
            raise ValueError(f"data file {str(source)!r} does not exist")
        elif len(sources) > 1:
            raise ValueError(f"data source {str(source)!r} is no file; a hub id must stand alone")
        else:
            return None
    return files


def local_files(sources: Sequence[str | Path], what: str) -> list[Path]:
    """`find_files`, but ValueError for a hub id; what: the name of the sources in the message."""
    files = find_files(sources)
    if files is None:
        raise ValueError(f"{what} {str(sources[0])!r} is no file here: give {', '.join(SUFFIXES)} files, or a folder")
    return files


# --- texts -> token ids


def tokenize(tokenizer: Any, texts: Sequence[str], end_token_id: int | None = None) -> list[np.ndarray]:
    """Token ids of each text, exactly `tokenizer(text)`, followed by the end token unless it is None."""
    if not texts:
        return []
    encoded = encode(tokenizer, list(texts))["input_ids"]
    tail = [] if end_token_id is None else [end_token_id]
    return [np.asarray(ids + tail, dtype=np.int32) for ids in encoded]


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

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[Document]:
        """The documents of an epoch in a random order of its own, from number `start` in that order."""
        # numpy reads a list as 32-bit words, so [2^32, 0] would equal [0, 1], and accepts no negative number.
        key = [seed, epoch] if 0 <= seed < 2**32 else seed_for(("documents", seed, epoch))
        order = np.random.default_rng(key).permutation(len(self))
        for index in order[start:]:
            yield self.document(index)

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


def load_corpus(
    files: Sequence[Path],
    tokenizer: Any,
    *,
    end_token_id: int | None = None,
    text_column: str = "text",
    skip_invalid: bool = False,
    max_length: int | None = None,
    max_documents: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Read and tokenise files, in batches of documents, `max_documents` at most.

    progress: called with the bytes of text of each batch. Raises ValueError for a file without documents and, unless
    `skip_invalid` leaves them out, for invalid records and supervised examples longer than `max_length`.
    """
    builder = _CorpusBuilder(tokenizer, end_token_id, skip_invalid, max_length)
    documents = builder.documents
    for path in files:
        before = len(documents)
        examples = read_examples(path, text_column=text_column, skip_invalid=skip_invalid)
        while batch := list(itertools.islice(examples, _batch_size(max_documents, len(documents)))):
            num_bytes = builder.add(batch, path)
            if progress is not None:
                progress(num_bytes)
        if len(documents) == before and (max_documents is None or before < max_documents):
            raise ValueError(f"data file {str(path)!r} holds no documents")
    return builder.corpus()


_BATCH = 256
"""Documents that are tokenised at a time."""


def _batch_size(max_documents: int | None, documents: int) -> int:
    """Examples to read next, after so many documents."""
    return _BATCH if max_documents is None else max(0, min(_BATCH, max_documents - documents))


class _CorpusBuilder:
    """The documents that were read, and a digest of their texts."""

    def __init__(self, tokenizer: Any, end_token_id: int | None, skip_invalid: bool, max_length: int | None) -> None:
        self.tokenizer, self.end_token_id = tokenizer, end_token_id
        self.skip_invalid, self.max_length = skip_invalid, max_length
        self.documents: list[Document] = []
        self._digest = hashlib.sha256()

    def add(self, examples: Sequence[Example], path: Path) -> int:
        """Tokenise examples of a file, in their order; return their bytes of text."""
        texts = iter(self._texts([example for example in examples if isinstance(example, str)], path))
        num_bytes = 0
        for example in examples:
            raw = (example if isinstance(example, str) else repr(example)).encode()
            self._digest.update(len(raw).to_bytes(8, "little") + raw)
            num_bytes += len(raw)
            if not isinstance(example, str):
                self.documents += self._supervised(example, path)
                continue
            ids = next(texts)
            if ids is not None:
                self.documents.append(Document(ids))
        return num_bytes

    def _texts(self, texts: list[str], path: Path) -> list[np.ndarray | None]:
        """Token ids of each text, None for one that is left out."""
        try:
            return list(tokenize(self.tokenizer, texts, self.end_token_id))
        except SpecialTextError as error:
            if not self.skip_invalid:
                raise ValueError(f"data file {str(path)!r}: {error}, or keep the rest with skip_invalid=true") from None
        if len(texts) == 1:
            return [None]
        half = len(texts) // 2
        return self._texts(texts[:half], path) + self._texts(texts[half:], path)

    def _supervised(self, example: Any, path: Path) -> list[Document]:
        """The documents of a supervised example, none if it is left out."""
        try:
            encoded = encode_example(self.tokenizer, example, self.end_token_id)
            for ids, loss_mask in encoded:
                if self.max_length is not None and len(ids) > self.max_length:
                    raise InvalidRecordError(f"makes {len(ids)} tokens: raise max_length={self.max_length}")
                if not any(loss_mask):
                    raise InvalidRecordError("has a completion without tokens")
        except (InvalidRecordError, SpecialTextError) as error:
            if self.skip_invalid:
                return []
            colon = ":" if isinstance(error, SpecialTextError) else ""
            raise ValueError(
                f"data file {str(path)!r}: the example {_shortened(repr(example))}{colon} {error}; "
                "correct it, or keep the rest with skip_invalid=true"
            ) from None
        return [Document(np.asarray(ids, dtype=np.int32), np.asarray(mask)) for ids, mask in encoded]

    def corpus(self) -> Corpus:
        """The corpus of all documents, with the digest as its fingerprint."""
        return Corpus.of(self.documents, self._digest.hexdigest()[:16])


def _shortened(text: str, width: int = 70) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


class HubStream:
    """The documents of a hub data set of unknown length, streamed and tokenised in batches."""

    def __init__(self, name: str, tokenizer: Any, *, end_token_id: int | None, text_column: str, split: str) -> None:
        import datasets

        try:
            self.data = datasets.load_dataset(name, split=split, streaming=True)
        except Exception as error:  # the hub's client has many error types of its own
            raise ValueError(
                f"data {name!r} is no file here and cannot be opened on the hub: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        columns = self.data.column_names
        if columns is not None and text_column not in columns:
            raise ValueError(f"data {name!r} has no text column {text_column!r}, found {sorted(columns)}")
        self.tokenizer, self.end_token_id, self.text_column = tokenizer, end_token_id, text_column
        self.fingerprint = f"{name}:{split}"

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[Document]:
        """The documents of an epoch in the order of a shuffling buffer, from number `start` in that order."""
        data = self.data.shuffle(seed=seed_for(("documents", seed, epoch)), buffer_size=10_000)
        texts: list[str] = []
        for record in data.skip(start) if start else data:
            texts.append(record[self.text_column].strip())
            if len(texts) == 256:
                yield from map(Document, tokenize(self.tokenizer, texts, self.end_token_id))
                texts = []
        if texts:
            yield from map(Document, tokenize(self.tokenizer, texts, self.end_token_id))
