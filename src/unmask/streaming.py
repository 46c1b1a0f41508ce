"""Text while it is decoded: the part of it that no later step can change, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import torch

from unmask.sampling.request import Callback, first_end


class FinalText:
    """The `callback` of `generate` for one prompt, which hands on the text up to the first masked position.

    text_of: text of new tokens. first: position of the first new one. end_token_ids: what follows one is no text.
    stop_strings: text from one on is no text. show: called with each piece. With `rest`, the pieces are the text.
    """

    def __init__(
        self,
        text_of: Callable[[list[int]], str],
        first: int,
        show: Callable[[str], None],
        end_token_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> None:
        self._text_of, self._first, self._show = text_of, first, show
        self._ends, self._stops = end_token_ids, stop_strings
        self._tokens: dict[int, int] = {}
        self._new: list[int] = []
        self._shown = 0

    def __call__(self, _row: int, positions: list[int], tokens: list[int]) -> None:
        self._tokens.update(zip(positions, tokens, strict=True))
        before = len(self._new)
        while (position := self._first + len(self._new)) in self._tokens:
            self._new.append(self._tokens[position])
        if len(self._new) == before:
            return
        text = self._text_of(self._new[: first_end(self._new, self._ends)])
        if text.endswith("\ufffd"):  # half a character waits for its other half
            return
        known = min([len(text) - self._begun(text), *(at for at in map(text.find, self._stops) if at >= 0)])
        if known > self._shown:
            piece, self._shown = text[self._shown : known], known
            self._show(piece)

    def _begun(self, text: str) -> int:
        """Characters at the end with which a stop string may begin."""
        lengths = range(max(map(len, self._stops), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)

    def rest(self, text: str) -> str:
        """What of the whole text was not handed on yet."""
        return text[self._shown :]


class _ClosedError(Exception):
    """Nobody reads the text any more."""


def together(callbacks: Sequence[Callback]) -> Callback:
    """All of them as one."""

    def call(row: int, positions: list[int], tokens: list[int]) -> None:
        for each in callbacks:
            each(row, positions, tokens)

    return call


def pieces(generate: Callable[[Callback, Callable[[str], None]], str]) -> Iterator[str]:
    """What `generate` shows, from a thread of its own, which ends when the iterator is closed.

    generate: gets a callback, called at each commit, and `show`, called with a piece; returns the last piece.
    """
    queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
    closed, num_threads = threading.Event(), torch.get_num_threads()

    def on_commit(_row: int, _positions: list[int], _tokens: list[int]) -> None:
        if closed.is_set():
            raise _ClosedError

    def work() -> None:
        torch.set_num_threads(num_threads)  # a new thread has the number of the process
        try:
            queue.put(generate(on_commit, queue.put))
        except _ClosedError:
            pass
        except BaseException as error:  # raised where the text is read
            queue.put(error)
        queue.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
    finally:
        closed.set()
        thread.join()
