"""Data sets of the `datasets` library: streams of records, and what of them lies in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

from unmask.core.noise import seed_for
from unmask.data.corpus import Document
from unmask.data.documents import BATCH, Encoder
from unmask.data.readers import Place, Read, Records, read_item
from unmask.data.records import COLUMNS, missing_column

T = TypeVar("T")


def open_hub(name: str, split: str, what: str = "data") -> Any:
    """A data set of the hub as a stream; ValueError if it cannot be opened. what: messages call it."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub's client has many error types of its own
        raise ValueError(
            f"{what} {name!r} is no file here and cannot be opened on the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def hub_records(name: str, split: str, what: str = "data") -> Records:
    """A data set of the hub as records that are read once, to their end, and are too many to be kept in memory."""
    stream, called = open_hub(name, split, what), f"{what} {name!r}"
    return Records(records_of(stream, called), called, f"{name}:{split}", sys.maxsize)


def from_datasets(data: Any, split: str) -> Any:
    """An object of `datasets` as `Records`, or as the stream that it is; None for any other object.

    Of a set of splits it is the one named; ValueError if it has none of that name.
    """
    if has_splits(data):
        if split not in data:
            raise ValueError(f"data has no split {split!r}, found {sorted(data)}: choose one with split=NAME")
        data = data[split]
    if _is(data, "Dataset"):
        return Records(data, "data set in memory", data._fingerprint, data.data.nbytes)
    return data if _is(data, "IterableDataset") else None


def has_splits(data: Any) -> bool:
    """Whether data are a set of splits of `datasets`."""
    return _is(data, "DatasetDict") or _is(data, "IterableDatasetDict")


def stream_name(data: Any) -> str:
    """What messages and run.json call a stream."""
    return f"stream {data.info.dataset_name or 'of records'}:{data.split or 'train'}"


def _is(data: Any, name: str) -> bool:
    """Whether an object is of a class of `datasets`, which whoever holds one has imported."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, getattr(datasets, name))


def records_of(data: Any, name: str) -> Iterator[Any]:
    """The records of a stream; ValueError where the library that reads them fails, which has many error types."""
    try:
        yield from data
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{name} cannot be read to its end: {type(error).__name__}: {reason}") from error


class RecordStream:
    """The documents of a data set of unknown length, read and tokenised in batches, in the background.

    data: a `datasets.IterableDataset`. name: what messages call it. encoder: as for files.
    """

    def __init__(self, data: Any, name: str, encoder: Encoder, *, text_column: str, fingerprint: str) -> None:
        columns = data.column_names
        if columns is not None and not {text_column, *COLUMNS} & set(columns):
            raise ValueError(f"{name} {missing_column(text_column, columns)}")
        self.data, self.name, self.encoder, self.text_column = data, name, encoder, text_column
        self.fingerprint = fingerprint

    def stream(self, seed: int, epoch: int, start: int) -> Iterator[list[Document]]:
        """The documents of each record of an epoch, in the order of a shuffling buffer, from record `start` on."""
        for documents in in_background(self._batches(seed, epoch, start)):
            yield from documents

    def _batches(self, seed: int, epoch: int, start: int) -> Iterator[list[list[Document]]]:
        """`stream`, many records at a time."""
        data = self.data.shuffle(seed=seed_for(("documents", seed, epoch)), buffer_size=10_000)
        found: list[list[Read]] = []
        for number, record in enumerate(records_of(data.skip(start) if start else data, self.name), start + 1):
            place = Place(self.name, "shuffled record", number, record)
            found.append(list(read_item(record, place, self.text_column, self.encoder.faults)))
            if len(found) == BATCH:
                yield self._encoded(found)
                found = []
        yield self._encoded(found)

    def forget(self) -> None:
        """Nothing of it is mapped."""

    def _encoded(self, found: list[list[Read]]) -> list[list[Document]]:
        """The documents of each record, of which `found` has one example or none."""
        made = iter(self.encoder([one for of_record in found for one in of_record]))
        return [next(made) if of_record else [] for of_record in found]


_AHEAD = 4
"""Batches of records that are tokenised before they are asked for."""


def in_background(items: Iterator[T]) -> Iterator[T]:
    """The items, which a thread makes a few ahead; what it raises is raised where the item would have come."""
    made: Queue[tuple[T | None, BaseException | None]] = Queue(_AHEAD)
    ended = Event()

    def put(item: T | None, error: BaseException | None = None) -> bool:
        while not ended.is_set():
            try:
                made.put((item, error), timeout=0.1)
            except Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None)

    thread = Thread(target=make, name="stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        ended.set()
        thread.join()
