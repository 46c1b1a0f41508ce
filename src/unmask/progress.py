"""Progress of long work on stderr: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

LINE_SECONDS = 10.0

_hushed = [False]
_waiting: list[str] = []


def hush(quiet: bool = True) -> None:
    """Whether progress, notes and other lines about the work are left out from now on, as with -q."""
    _hushed[0] = quiet


def say(*lines: str) -> None:
    """Lines on stderr about the work, after those of `announce`; without any, those alone."""
    lines, _waiting[:] = (*_waiting, *lines), []
    if not _hushed[0]:
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def announce(line: str) -> None:
    """A line on stderr that waits until the work is seen to go on: what is refused says nothing but why."""
    _waiting.append(line)


def withdraw() -> None:
    """Leave out the lines that still wait."""
    _waiting.clear()


class Advance(Protocol):
    """Called with what was done since the last call, and a text to show beside it."""

    def __call__(self, amount: float, note: str = "", /) -> None: ...


@contextmanager
def progress(description: str, total: float | None, *, start: float = 0, show: bool = True) -> Iterator[Advance]:
    """Show progress towards `total` units of work (unknown if None), beginning at `start`."""
    if not show or _hushed[0]:
        yield _silent
        return
    say()
    if not sys.stderr.isatty():
        lines = _Lines(description, total, start)
        yield lines.advance
        lines.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=int(start), note="")

        def advance(amount: float, note: str = "", /) -> None:
            done = bar.tasks[0].completed + amount
            bar.update(task, completed=done if total is None else min(done, total), note=note)

        yield advance
        bar.update(task, completed=total)


class Note(UserWarning):
    """Something that is not as one may expect, and no error; the command shows it as a line."""


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """The lines of `warn` in this thread, for whoever asked from elsewhere; they are not warnings then."""
    lines: list[str] = []
    token = _collected.set(lines)
    try:
        yield lines
    finally:
        _collected.reset(token)


def warn(line: str) -> None:
    """Warn of what the library does otherwise than one may expect."""
    lines = _collected.get()
    if lines is None:
        warnings.warn(line, Note, stacklevel=3)
    else:
        lines.append(line)


def note(line: str) -> None:
    """A line on stderr about what is not as one may expect."""
    say(f"note: {line}")


def _silent(_amount: float, _note: str = "") -> None:
    pass


class _Lines:
    """A line now and then; 100% comes once, at the end, though totals may be estimates."""

    def __init__(self, description: str, total: float | None, start: float) -> None:
        self.description, self.total, self.start = description, total, start
        self.began, self.done, self.shown, self.note = time.monotonic(), start, -LINE_SECONDS, ""

    def advance(self, amount: float, note: str = "", /) -> None:
        self.done, self.note = self.done + amount, note
        elapsed = time.monotonic() - self.began
        if elapsed - self.shown < LINE_SECONDS or (self.total and self.done >= self.total):
            return
        self.shown = elapsed
        left, share = "", ""
        if self.total:
            share = f" {int(100 * self.done / self.total):3}%"
        if self.total and self.done > self.start:
            seconds = int(elapsed * (self.total - self.done) / (self.done - self.start))
            left = f"  ETA {seconds // 60}:{seconds % 60:02d}"
        self._print(f"{share}  {self.note}{left}")

    def finish(self) -> None:
        if self.done > self.start:
            self._print(f"{' 100%' if self.total else ''}  {self.note}")

    def _print(self, rest: str) -> None:
        say(f"{self.description}{rest}".rstrip())
