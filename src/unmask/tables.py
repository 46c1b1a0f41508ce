"""Counts, tables and long lines as text; on a narrow screen words are not broken."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

Rows = Sequence[Sequence[str]]
"""Cells of a table, the first row its header."""


def screen_width() -> int | None:
    """Columns of the terminal, or what COLUMNS says; None where a program reads the output."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return None
    return shutil.get_terminal_size().columns


def aligned(rows: Rows) -> str:
    """A line for each row: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def fitted(rows: Rows, table: Callable[[Rows], str] = aligned) -> str:
    """The rows as a table where it fits the screen, else each row as a heading and its cells by name."""
    text, width = table(rows), screen_width()
    if width is None or max(map(len, text.splitlines())) <= width:
        return text
    head, *body = rows
    parts = []
    for first, *cells in body:
        pairs = [(name, cell) for name, cell in zip(head[1:], cells, strict=True) if cell not in ("", "-")]
        parts.append(wrapped(f"{head[0]}: {first}" if head[0] else first, "  "))
        parts.append(_fill("; ".join(f"{name}: {cell}" for name, cell in pairs), width, "  ", "  "))
    return "\n".join(parts) + ("\n" if text.endswith("\n") else "")


def wrapped(text: str, indent: str = "    ") -> str:
    """Lines that fit the screen, those that go on indented."""
    width = screen_width()
    return text if width is None else "\n".join(_fill(line, width, "", indent) for line in text.splitlines())


def _fill(line: str, width: int, first: str, later: str) -> str:
    if len(line) > width:
        line = re.sub(r"(?<=\S) {5,}", "  ", line)  # a column that was aligned
    return textwrap.fill(line, max(20, width), initial_indent=first, subsequent_indent=later, break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip


def tokens_in_forwards(tokens: int, forwards: int) -> str:
    """Such as "7 tokens in 1 forward"."""
    return f"{number_of(tokens, 'token')} in {number_of(forwards, 'forward')}"


def number_of(number: int, thing: str) -> str:
    """Such as "1 token" and "2 tokens"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
