"""The blocks of README and docs, and the command lines in them.

A block says what it is: `python` and `bash` run; of `console` the lines after "$ " run, the others are what they print;
`text`, `toml` and the like are read. A comment on the line above a block, which readers of the page do not see, says
why it does not run: `<!-- not run: REASON -->`, for Python `<!-- compile only: REASON -->`; or why a console prints
something else in the tests: `<!-- not compared: REASON -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("unmask", "python", "pip", "curl", "make", "bash", "accelerate", "torchrun", "sbatch", "transformers")


class Block(NamedTuple):
    """A fenced block; line: of the page. marker, reason: of the comment above it, if there is one."""

    page: Path
    line: int
    info: str
    text: str
    marker: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.stem}-{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines, start, info, block = page.read_text().splitlines(), 0, None, []
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            block.append(line)
        elif info is None:
            start, info, block = number, line[3:].strip(), []
        else:
            said = re.fullmatch(
                r"<!-- (not run|not compared|compile only): (.+) -->", lines[start - 2] if start > 1 else ""
            )
            yield Block(page, start, info, "\n".join(block), *(said.groups() if said else ()))
            info = None
    assert info is None, f"{page.name}:{start}: a block without an end"


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """(line of the page, command line) of a block: continued lines joined, comments left out."""
    joined, start = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if block.info == "console" and not joined:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        start = start if joined else number
        joined += re.sub(r"(^|\s)#.*$", "", line)
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        if joined.split(maxsplit=1)[:1] and joined.split()[0] in PROGRAMS:
            yield start, joined.strip()
        joined = ""
