"""Text files and hub data sets -> documents -> packed rows of one length.

A row holds pieces of documents with their document ids and positions, so that attention can keep them apart.
A document longer than what is left of a row is cut there, and the rest is a document of its own. Everything
an iterator needs to go on where it stopped is (epoch, document, offset).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.attention import PADDING, Layout

SEPARATOR = b"<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")


# --- files -> texts


def read_documents(path: Path, *, text_column: str = "text", skip_invalid: bool = False) -> Iterator[str]:
    """Texts of one .txt, .jsonl or .parquet file, white space around each stripped, empty ones left out.

    A text that is no UTF-8, a broken JSON line or a missing column is a ValueError that names file and line;
    with `skip_invalid` that document alone is left out.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for text in readers[path.suffix](path, text_column, skip_invalid):
        text = text.strip()
        if text:
            yield text


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


def _read_jsonl(path: Path, column: str, skip_invalid: bool) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            problem = ""
            try:
                record = json.loads(raw.decode())
                if isinstance(record, dict) and isinstance(record.get(column), str):
                    yield record[column]
                    continue
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                problem = f"has no text column {column!r}, found {found}; choose one with text_column=NAME"
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8 ({error.reason})"
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg} at column {error.colno})"
            if not skip_invalid:
                raise _invalid(path, number, problem)


def _read_parquet(path: Path, column: str, skip_invalid: bool) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data file {str(path)!r} is not parquet: {str(error).splitlines()[0]}") from None
    if column not in file.schema_arrow.names:
        raise ValueError(
            f"data file {str(path)!r} has no text column {column!r}, found {file.schema_arrow.names}; "
            "choose one with text_column=NAME"
        )
    number = 0
    for batch in file.iter_batches(columns=[column], batch_size=1024):
        for value in batch.column(0).to_pylist():
            number += 1
            if isinstance(value, str):
                yield value
            elif not skip_invalid:
                raise _invalid(path, number, f"holds {type(value).__name__} in column {column!r}, not text")


def _invalid(path: Path, line: int, problem: str) -> ValueError:
    return ValueError(
        f"data file {str(path)!r}, line {line}: {problem}; mend it, or keep the rest with skip_invalid=true"
    )


def find_files(sources: Sequence[str | Path]) -> list[Path] | None:
    """The data files behind files and folders; None if the one source is a hub id."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
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


# --- texts -> token ids


def tokenize(tokenizer: Any, texts: Sequence[str], end_token_id: int | None = None) -> list[np.ndarray]:
    """Token ids of each text, exactly `tokenizer(text)`, with the end token appended if one is given."""
    encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    tail = [] if end_token_id is None else [end_token_id]
    return [np.asarray(ids + tail, dtype=np.int32) for ids in encoded]


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents in memory: document i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def split(self, held_out: int) -> tuple[Corpus, Corpus]:
        """All but the last `held_out` documents, and those."""
        cut = len(self) - held_out
        at = int(self.offsets[cut])
        return (
            Corpus(self.tokens[:at], self.offsets[: cut + 1], self.fingerprint),
            Corpus(self.tokens[at:], self.offsets[cut:] - at, self.fingerprint),
        )

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[np.ndarray]:
        """Documents of an epoch in its own random order, from the `start`-th on."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        for index in order[start:]:
            yield self[index]


def load_corpus(
    files: Sequence[Path],
    tokenizer: Any,
    *,
    end_token_id: int | None = None,
    text_column: str = "text",
    skip_invalid: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Read and tokenise files, in batches of documents; `progress` is told the bytes of text done."""
    pieces: list[np.ndarray] = []
    digest = hashlib.sha256()

    def flush(texts: list[str]) -> None:
        pieces.extend(tokenize(tokenizer, texts, end_token_id))
        done = 0
        for text in texts:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
            done += len(raw)
        if progress is not None:
            progress(done)

    for path in files:
        before, texts = len(pieces), []
        for text in read_documents(path, text_column=text_column, skip_invalid=skip_invalid):
            texts.append(text)
            if len(texts) == 256:
                flush(texts)
                texts = []
        if texts:
            flush(texts)
        if len(pieces) == before:
            raise ValueError(f"data file {str(path)!r} holds no documents")
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return Corpus(np.concatenate(pieces), np.concatenate([[0], lengths.cumsum()]), digest.hexdigest()[:16])


class HubStream:
    """Documents of a hub data set, streamed and tokenised in batches; its length is not known."""

    def __init__(self, name: str, tokenizer: Any, *, end_token_id: int | None, text_column: str, split: str) -> None:
        import datasets

        try:
            self.data = datasets.load_dataset(name, split=split, streaming=True)
        except Exception as error:  # the hub client's own errors are many and say where they come from
            raise ValueError(
                f"data {name!r} is no file here and cannot be opened on the hub: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        columns = self.data.column_names
        if columns is not None and text_column not in columns:
            raise ValueError(f"data {name!r} has no text column {text_column!r}, found {sorted(columns)}")
        self.tokenizer, self.end_token_id, self.text_column = tokenizer, end_token_id, text_column
        self.fingerprint = f"{name}:{split}"

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[np.ndarray]:
        """Documents of an epoch in the order of a shuffling buffer, from the `start`-th on."""
        data = self.data.shuffle(seed=seed + epoch, buffer_size=10_000)
        texts: list[str] = []
        for record in data.skip(start) if start else data:
            texts.append(record[self.text_column].strip())
            if len(texts) == 256:
                yield from tokenize(self.tokenizer, texts, self.end_token_id)
                texts = []
        if texts:
            yield from tokenize(self.tokenizer, texts, self.end_token_id)


# --- token ids -> packed rows


@dataclass(frozen=True)
class PackState:
    """Where the next row begins: which document of which epoch, and how far into it."""

    epoch: int = 0
    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """Packed rows: x0 (batch, length) and where its tokens stand."""

    x0: Tensor
    layout: Layout

    @property
    def num_tokens(self) -> int:
        return int(self.layout.real.sum())

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(self.x0[start:stop], self.layout.at(slice(start, stop)))

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x0.to(device), Layout(*(field.to(device) for field in self.layout)))


class Packer:
    """Rows of `max_length` tokens from a corpus or stream, epoch after epoch, resumable at any row.

    The last row of an epoch is filled up from the next one; with `epochs` the stream ends, and its last row
    is padded.
    """

    def __init__(
        self,
        source: Corpus | HubStream,
        max_length: int,
        *,
        seed: int,
        epochs: int | None = None,
        state: PackState | None = None,
    ) -> None:
        self.source, self.max_length, self.seed, self.epochs = source, max_length, seed, epochs
        self.state = state or PackState()
        self._documents = self._walk(self.state)
        self._rest = np.zeros(0, dtype=np.int64)

    def _walk(self, state: PackState) -> Iterator[tuple[PackState, np.ndarray]]:
        epoch, start, offset = state.epoch, state.document, state.offset
        while self.epochs is None or epoch < self.epochs:
            empty = start == 0
            for number, ids in enumerate(self.source.stream(self.seed, epoch, start), start):
                yield PackState(epoch, number, offset), ids[offset:]
                empty, offset = False, 0
            if empty:
                raise ValueError("the training data holds no documents")
            epoch, start = epoch + 1, 0

    def batch(self, size: int) -> Batch | None:
        """The next `size` rows, at the end filled up with padding, or None when nothing is left.

        Always `size` rows, so that every rank of a distributed step has its share to run.
        """
        ids = np.zeros((size, self.max_length), dtype=np.int64)
        position = np.tile(np.arange(self.max_length), (size, 1))
        document = np.full((size, self.max_length), PADDING, dtype=np.int64)
        row = column = number = 0
        while row < size:
            if not len(self._rest):
                following = next(self._documents, None)
                if following is None:
                    break
                self.state, self._rest = following
                continue
            take = min(len(self._rest), self.max_length - column)
            piece = slice(column, column + take)
            ids[row, piece], position[row, piece], document[row, piece] = (
                self._rest[:take],
                np.arange(take),
                number,
            )
            self._rest, column, number = self._rest[take:], column + take, number + 1
            self.state = replace(self.state, offset=self.state.offset + take)
            if column == self.max_length:
                row, column, number = row + 1, 0, 0
        if row + column == 0:
            return None
        x0, where, owner = (torch.from_numpy(array) for array in (ids, position, document))
        return Batch(x0, Layout.of(where, owner))
