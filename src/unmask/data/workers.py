"""Several processes that tokenise batches side by side; what they make comes back in order."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import current_process, get_all_start_methods, get_context
from typing import Any

from unmask.data.corpus import Document
from unmask.data.documents import Encoder
from unmask.data.pieces import LONG
from unmask.data.readers import Faults, Place, Read
from unmask.limits import check_whole

MOST = 32
"""Processes by default: one reads for all, and has no more to give."""

Made = tuple[list[Read], list[list[Document]]]
_encoder: Encoder | None = None
"""That of a worker."""


def default_processes() -> int:
    """The CPUs that this process may use, `MOST` at most; 1 where it cannot fork others."""
    if not _can_fork() or not hasattr(os, "sched_getaffinity"):
        return 1
    return min(MOST, len(os.sched_getaffinity(0)))


def check_processes(number: int | None) -> None:
    """Raise an error for a number of processes that cannot be."""
    check_whole("num_processes", number, 1, 1024)
    if number is not None and number > 1 and not _can_fork():
        raise ValueError(
            f"num_processes={number}: this system, or this worker of a pool, cannot fork processes: use 1, which has "
            "several threads"
        )


def _can_fork() -> bool:
    """Whether this process may have others; workers of `multiprocessing.Pool` may not."""
    return "fork" in get_all_start_methods() and not current_process().daemon


def in_processes(number: int) -> Callable[[Encoder, Iterator[list[Read]]], Iterator[Made]]:
    """What `documents.in_this_process` does, on so many processes: the same documents and faults in the same order."""

    def encode(encoder: Encoder, batches: Iterator[list[Read]]) -> Iterator[Made]:
        with ProcessPoolExecutor(number, get_context("fork"), _begin, (encoder,)) as pool:
            try:
                yield from _in_order(pool, encoder, batches, 2 * number)
            except BrokenProcessPool as error:
                raise ValueError(
                    f"one of {number} processes that tokenise was killed, perhaps for its memory: use fewer, or one"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    return encode


def _in_order(pool: ProcessPoolExecutor, encoder: Encoder, batches: Iterator[list[Read]], ahead: int) -> Iterator[Made]:
    """The batches and their documents; `ahead` batches are read before the first of them is done."""
    waiting: deque[tuple[list[Read], Future[Any]]] = deque()
    failed: Exception | None = None
    ended = False
    while not ended or waiting:
        while not ended and len(waiting) < ahead:
            try:
                batch = next(batches, None)
            except Exception as error:  # raised where it stands in the order: after the faults of what came before
                batch, failed = None, error
            ended = batch is None
            if batch is not None:
                waiting.append((batch, _submitted(pool, encoder, batch)))
        if waiting:
            batch, future = waiting.popleft()
            made, faults = future.result()
            for place, problem in faults:
                encoder.faults(place, problem)
            yield batch, made
    if failed is not None:
        raise failed


def _submitted(pool: ProcessPoolExecutor, encoder: Encoder, batch: list[Read]) -> Future[Any]:
    """The documents and faults of a batch, to come; a very long text is not sent to another process."""
    if sum(len(example) for _, example in batch if isinstance(example, str)) > 64 * LONG:
        done: Future[Any] = Future()
        done.set_result(_encode_with(encoder, batch))
        return done
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by the workers, which are forked by the first call
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: workers only tokenise
            return pool.submit(_encode, batch)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode(batch: list[Read]) -> tuple[list[list[Document]], list[tuple[Place, str]]]:
    assert _encoder is not None
    return _encode_with(_encoder, batch)


class _Kept(Faults):
    """Faults that are kept for the process that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Place, str]] = []

    def __call__(self, place: Place, problem: str) -> None:
        self.found.append((place, problem))


def _encode_with(encoder: Encoder, batch: Sequence[Read]) -> tuple[list[list[Document]], list[tuple[Place, str]]]:
    kept = _Kept()
    return replace(encoder, faults=kept)(batch), kept.found
