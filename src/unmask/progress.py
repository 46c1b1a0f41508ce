"""Progress of long work on stderr: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_SECONDS = 10.0


class Advance(Protocol):
    """Called with what was done since the last call, and a text to show beside it."""

    def __call__(self, amount: float, note: str = "", /) -> None: ...


@contextmanager
def progress(description: str, total: float | None, *, start: float = 0, show: bool = True) -> Iterator[Advance]:
    """Show progress towards `total` units of work (unknown if None), beginning at `start`."""
    if not show:
        yield _silent
        return
    if not sys.stderr.isatty():
        yield _lines(description, total, start)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=int(start), note="")
        yield lambda amount, note="", /: bar.update(task, advance=amount, note=note)


def note(line: str) -> None:
    """A line on stderr about what is not as one may expect."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def _silent(_amount: float, _note: str = "") -> None:
    pass


def _lines(description: str, total: float | None, start: float) -> Advance:
    began, done, shown = time.monotonic(), start, -LINE_SECONDS

    def advance(amount: float, note: str = "", /) -> None:
        nonlocal done, shown
        done += amount
        elapsed = time.monotonic() - began
        finished = total is not None and done >= total
        if not finished and elapsed - shown < LINE_SECONDS:
            return
        shown = elapsed
        left = ""
        if total and done > start and not finished:
            seconds = int(elapsed * (total - done) / (done - start))
            left = f"  ETA {seconds // 60}:{seconds % 60:02d}"
        share = f" {100 * done / total:3.0f}%" if total else ""
        print(f"{description}{share}  {note}{left}".rstrip(), file=sys.stderr, flush=True)

    return advance
