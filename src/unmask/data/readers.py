"""Files and lists of records to texts and supervised examples, each with the place where it stands.

Every reader treats what it reads alike: white space around a text is stripped, so is a byte-order mark at its
beginning, and a text that is empty then is left out.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from unmask.data.records import COLUMNS, kind, missing_column, read_record
from unmask.data.supervised import Example, InvalidRecordError

SEPARATOR = b"<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
"""Endings that may follow those of text files."""
_CHUNK = 1 << 20
"""Bytes of a text file that are read at a time."""


class Place(NamedTuple):
    """Where an example stands: a file or data set, and the number of the line, row or record in it, from 1.

    record: shown where the number does not tell which one it is, as in a shuffled stream.
    """

    source: str
    unit: str
    number: int
    record: Any = None

    def __str__(self) -> str:
        shown = "" if self.record is None else f" {reprlib.repr(self.record)}"
        return f"{self.source}, {self.unit} {self.number}{shown}"


class Read(NamedTuple):
    """An example and its place."""

    place: Place
    example: Example


class Faults:
    """What becomes of what is no document: a ValueError, or with `skip` it is left out.

    note: called with a line at the first that is left out, and whenever there are ten times as many.
    """

    def __init__(self, skip: bool = False, note: Callable[[str], None] | None = None) -> None:
        self.skip, self._note, self.number = skip, note, 0

    def __call__(self, place: Place, problem: str) -> None:
        """Leave out what stands at a place, or raise."""
        if not self.skip:
            raise ValueError(f"{place}: {problem}; correct it, or keep the rest with skip_invalid=true")
        self.number += 1
        if self._note is not None and self.number == 10 ** (len(str(self.number)) - 1):
            self._note(f"{self.number} left out with skip_invalid=true so far: {place}: {problem}")


@dataclass(frozen=True)
class Records:
    """Texts and records: any sequence of them, a `datasets.Dataset` for example, or what can be iterated once.

    name: what messages say. fingerprint, num_bytes: of the content, where they are known without reading it.
    """

    items: Iterable[Any]
    name: str = "data"
    fingerprint: str | None = field(default=None, compare=False)
    num_bytes: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.name


def read(source: Path | Records, text_column: str, faults: Faults) -> Iterator[Read]:
    """Texts and supervised examples of a .txt, .jsonl or .parquet file or of records; columns decide which they are."""
    if isinstance(source, Records):
        return _read_items(source, text_column, faults)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return readers[suffix_of(source)](source, text_column, faults)


def suffix_of(path: Path) -> str:
    """The ending that says how a file is read, without that of its compression; parquet files compress themselves."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in COMPRESSED and inner in (".txt", ".jsonl") else path.suffix


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file of bytes, decompressed as its name says; ValueError for one that is damaged."""
    try:
        if path.suffix == ".zst":
            import pyarrow

            with path.open("rb") as raw, pyarrow.CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(stream, _CHUNK)
        else:
            openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
            with openers.get(path.suffix, open)(path, "rb") as file:
                yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if path.suffix not in COMPRESSED or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{file_name(path)} is not {path.suffix[1:]}, or is damaged: {error}") from None


def read_item(item: Any, place: Place, text_column: str, faults: Faults) -> Iterator[Read]:
    """The example that a text or a record makes; nothing for an empty text, and for what is left out."""
    problem = None
    try:
        if not isinstance(item, str | Mapping):
            raise InvalidRecordError(f"is {kind(item)}, where a text or an object with a text column is needed")
        example = read_record({text_column: item} if isinstance(item, str) else item, text_column)
    except InvalidRecordError as error:
        problem = str(error)
    if problem is not None:
        faults(place, problem)
        return
    if isinstance(example, str):
        example = without_mark(example)
    if example:
        yield Read(place, example)


def without_mark(text: str) -> str:
    """A text without white space around it, and without the byte-order mark that some programs begin a file with."""
    return text.strip().removeprefix("\ufeff").strip()


def read_documents(
    path: Path, *, text_column: str = "text", skip_invalid: bool = False, note: Callable[[str], None] | None = None
) -> Iterator[str]:
    """The texts of a file; ValueError if it holds supervised examples. note: see `Faults`."""
    for place, example in read(path, text_column, Faults(skip_invalid, note)):
        if not isinstance(example, str):
            raise ValueError(
                f"{place.source} holds supervised examples (prompt and completion, or messages) "
                "where plain text is needed: choose a column with text_column=NAME, or give another file"
            )
        yield example


def read_examples(path: Path, *, text_column: str = "text", skip_invalid: bool = False) -> Iterator[Example]:
    """Texts and supervised examples of one .txt, .jsonl or .parquet file.

    Text that is not UTF-8, a broken JSON line, and a record that is no example raise a ValueError that names file and
    line; with `skip_invalid` that document is left out instead.
    """
    for _, example in read(path, text_column, Faults(skip_invalid)):
        yield example


def file_name(path: Path) -> str:
    """What messages call a data file."""
    return f"data file {str(path)!r}"


def _read_txt(path: Path, column: str, faults: Faults) -> Iterator[Read]:
    name, line = file_name(path), 1
    for raw in _separated(path):
        text, problem = _decoded(raw)
        before = problem.start if problem else len(_SPACE.match(raw)[0])  # type: ignore[index]
        place = Place(name, "line", line + raw.count(b"\n", 0, before))
        line += raw.count(b"\n")
        raw.clear()  # a document may be as large as the file
        if problem:
            faults(place, problem.text)
        else:
            text = without_mark(text)
            yield from read_item(text, place, column, faults)


_SPACE = re.compile(rb"\s*")


def _separated(path: Path) -> Iterator[bytearray]:
    """The parts of a file between separators, without reading it whole."""
    buffer = bytearray()
    with _opened(path) as file:
        while chunk := file.read(_CHUNK):
            start = max(0, len(buffer) - len(SEPARATOR) + 1)  # what is before it was searched already
            buffer += chunk
            while (at := buffer.find(SEPARATOR, start)) >= 0:
                yield buffer[:at]
                del buffer[: at + len(SEPARATOR)]
                start = 0
    yield buffer


class _Problem(NamedTuple):
    """What is wrong with bytes, and where in them."""

    text: str
    start: int = 0


def _decoded(raw: bytes | bytearray) -> tuple[str, _Problem | None]:
    """UTF-8 to text."""
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "", _Problem("is UTF-16 or UTF-32, not UTF-8: convert the file")
        return "", _Problem(f"is not UTF-8 ({error.reason})", error.start)


def _read_jsonl(path: Path, column: str, faults: Faults) -> Iterator[Read]:
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            place = Place(file_name(path), "line", number)
            text, problem = _decoded(raw)
            text = without_mark(text)
            record: Any = None
            if text:
                record, problem = _parsed(text)
            if problem is None and text and not isinstance(record, dict):
                problem = _Problem(f"is no object with a text column {column!r}, found {kind(record)}")
            if problem is not None:
                faults(place, problem.text)
            elif text:
                yield from read_item(record, place, column, faults)


def _parsed(text: str) -> tuple[Any, _Problem | None]:
    """JSON to its value."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, _Problem(f"is not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return None, _Problem("is JSON that nests too deeply")
    except ValueError as error:  # a number of more digits than Python reads
        return None, _Problem(f"is JSON that cannot be read ({error})")


def _read_parquet(path: Path, column: str, faults: Faults) -> Iterator[Read]:
    import pyarrow
    import pyarrow.parquet

    name, number = file_name(path), 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [one for one in dict.fromkeys((column, *COLUMNS)) if one in names]
        if not columns:
            raise ValueError(f"{name} {missing_column(column, names)}")
        for batch in file.iter_batches(columns=columns, batch_size=64):
            for record, problem in _rows(batch):
                number += 1
                place = Place(name, "row", number)
                if problem is not None:
                    faults(place, problem)
                else:
                    yield from read_item(record, place, column, faults)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is not parquet, or is damaged after row {number}: {reason}") from None


def _rows(batch: Any) -> Iterator[tuple[Any, str | None]]:
    """(record, problem) of each row of an Arrow batch."""
    try:
        yield from ((record, None) for record in batch.to_pylist())
    except ValueError:  # a value that is no UTF-8 or no date of Python's; one row alone holds it
        for i in range(len(batch)):
            try:
                (record,), problem = batch.slice(i, 1).to_pylist(), None
            except ValueError as error:
                record, problem = None, f"holds a value that cannot be read ({error})"
            yield record, problem


def _read_items(records: Records, column: str, faults: Faults) -> Iterator[Read]:
    for number, item in enumerate(records.items, 1):
        yield from read_item(item, Place(records.name, "record", number), column, faults)
